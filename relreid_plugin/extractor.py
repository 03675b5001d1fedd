"""Any model, any picture: ``load_extractor`` names the one and takes the other.

.. code-block:: python

    extractor = load_extractor("host:osnet_x0_25", weights="osnet_x0_25_msmt17.pth")
    features = extractor(["a.jpg", "b.jpg"])  # (2, 512)

What :data:`PREFIXES` lists can stand before a name; a run, a folder of the hub's layout and a checkpoint whose family is
known are named by their path alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .backbones.opened import Opened, Reading
from .features.extractor import Extractor, ImageExtractor
from .features.opening import Request, open_network, prefixes, register_opener

PREFIXES = {
    "run": "relreid_plugin.engine.opened:open_run_network",
    "host": "relreid_plugin.engine.opened:open_host",
    "file": "relreid_plugin.engine.opened:open_file",
    "torchvision": "relreid_plugin.backbones.libraries:open_torchvision",
    "timm": "relreid_plugin.backbones.libraries:open_timm",
    "onnx": "relreid_plugin.backbones.exported:open_onnx",
    "openvino": "relreid_plugin.backbones.exported:open_openvino",
    "torchscript": "relreid_plugin.backbones.exported:open_torchscript",
    "package": "relreid_plugin.export.package:open_package",
}
_ENDINGS = {"onnx": (".onnx",), "openvino": (".xml",)}
for _prefix, _opener in PREFIXES.items():
    register_opener(_prefix, _opener, endings=_ENDINGS.get(_prefix, ()))


def load_extractor(
    model: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] = "",
    pretrained: bool = False,
    size: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    batch_size: int = 0,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    channels_last: bool = True,
    pixel_range: Any = None,
) -> Any:
    """Return what gives features of any pictures by the model that is named.

    Args:
        model: The folder of a run; ``host:NAME`` (torchreid's models), ``torchvision:NAME``, ``timm:NAME``; a folder of the
            hub's layout (``config.json`` beside the weights); or a checkpoint as the field publishes them, whose family is
            told by its keys (:mod:`relreid_plugin.backbones.families`).
        weights: The file of weights for a network that is named by a prefix.
        pretrained: Instead: the library's own weights, over the network or from its cache.
        size: (height, width) of the images; ``None``: as the network was trained.
        mean, std: Normalisation of red, green and blue, on the scale [0, 1]; ``None``: as the network was trained.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``; ``None``: as the network was trained.
        overrides: ``KEY VALUE …`` over a run's configuration.
        options: What the shapes in a checkpoint do not tell, such as ``{"neck": "after"}``; every family says what it takes.
        batch_size, workers, device, precision, channels_last, pixel_range: As for
            :class:`~relreid_plugin.features.extractor.Extractor`.

    Returns:
        An :class:`~relreid_plugin.features.extractor.Extractor`; of a run of several modalities a
        :class:`~relreid_plugin.engine.samples.SampleExtractor`.

    Raises:
        UserError: No such model, no weights, or weights that do not fill it.
    """
    request = Request(
        os.fspath(weights),
        pretrained,
        size,
        mean,
        std,
        interpolation,
        tuple(str(word) for word in overrides),
        dict(options or {}),
    )
    opened = open_network(model, request)
    make: Any = opened.extractor or Extractor
    return make(
        opened,
        name=os.fspath(model),
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        channels_last=channels_last,
        pixel_range=pixel_range,
    )


__all__ = [
    "PREFIXES",
    "Extractor",
    "ImageExtractor",
    "Opened",
    "Reading",
    "Request",
    "load_extractor",
    "prefixes",
    "register_opener",
]
