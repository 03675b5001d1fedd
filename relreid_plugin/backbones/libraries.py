"""Networks of torchvision and timm by name, with local or the library's own weights, and how they want their images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from .files import WeightFile, read_weight_file
from .networks import PooledBackbone, build_backbone
from .opened import IMAGENET, INTERPOLATIONS, Opened, Reading
from .resize import guess_grid
from .weights import load_into, state_dicts

_LIKE = (16, 8)  # a grid of patches of the shape that persons have


def require_weights(name: str, request: Any) -> None:
    """Refuse a network without weights: its features would be noise.

    Raises:
        UserError: Neither a file is named, nor the library's weights are asked for; or both.
    """
    request.refuse(f"'{name}'", but=("weights", "pretrained", "size", "mean", "std", "interpolation"))
    if request.weights and request.pretrained:
        raise UserError(f"'{name}': name a file by 'weights', or set 'pretrained', not both.")
    if not request.weights and not request.pretrained:
        raise UserError(
            f"'{name}' has no weights; name a file by 'weights', or set 'pretrained' to fetch the library's own."
        )


def build_named(
    name: str, request: Any, reading: Reading, *, host_builder: Callable[[str, bool], nn.Module] | None = None
) -> Opened:
    """Return a network of a library with its weights.

    Args:
        name: With its prefix.
        request: A :class:`~relreid_plugin.features.opening.Request`.
        reading: How the network wants its images.
        host_builder: As :func:`~relreid_plugin.backbones.networks.build_backbone`.

    Raises:
        UserError: No such network, or weights that do not fill it.
    """
    notes: list[str] = []
    reading = request.reading(reading)
    network = build_backbone(
        name,
        pretrained=request.pretrained,
        weights=request.weights,
        output_stride=0,
        image_size=reading.size,
        host_builder=host_builder,
        key="weights",
        say=notes.append,
        trained=False,
    )
    return Opened(network.eval(), reading, name, notes)


def open_torchvision(name: str, request: Any) -> Opened:
    """Open ``torchvision:NAME``; images are read as torchvision's own weights want them.

    Raises:
        UserError: No such network, no weights, or weights that do not fill it.
    """
    import torchvision

    require_weights(f"torchvision:{name}", request)
    reading = Reading((224, 224))
    if name in torchvision.models.list_models(module=torchvision.models):
        transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        side = transforms.crop_size[0]
        mode = str(transforms.interpolation.value)
        reading = Reading((side, side), tuple(transforms.mean), tuple(transforms.std), mode)
    return build_named(f"torchvision:{name}", request, reading)


def open_timm(name: str, request: Any) -> Opened:
    """Open ``timm:NAME``; images are read as timm's own weights of that name want them, of the size that the weights have.

    Raises:
        UserError: No such network, no weights, or weights that do not fill it.
    """
    import timm

    require_weights(f"timm:{name}", request)
    reading = Reading((224, 224))
    if timm.is_model(name):
        reading = reading_of(timm.get_pretrained_cfg(name))
        if request.weights and request.size is None:
            reading = _at_their_size(name, read_weight_file(request.weights, key="weights"), reading)
    return build_named(f"timm:{name}", request, reading)


def reading_of(config: Any) -> Reading:
    """Return how images are read by a pretrained configuration of timm's, an object or a dict."""

    def get(key: str, default: Any) -> Any:
        value = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
        return default if value is None else value

    mode = str(get("interpolation", "bicubic"))
    return Reading(
        tuple(get("input_size", (3, 224, 224))[-2:]),
        tuple(float(each) for each in get("mean", IMAGENET[0])),
        tuple(float(each) for each in get("std", IMAGENET[1])),
        mode if mode in INTERPOLATIONS else "bicubic",
    )


def _at_their_size(name: str, file: WeightFile, reading: Reading) -> Reading:
    """The size of images that position embeddings of a file were trained with, where they say so."""
    for _, weights in state_dicts(file.content)[:1]:
        positions = next((value for key, value in weights.items() if key.split(".")[-1] == "pos_embed"), None)
        patch = next((value.shape[-2:] for key, value in weights.items() if key.endswith("patch_embed.proj.weight")), None)
        if positions is None or patch is None or positions.dim() != 3:
            return reading
        own = (reading.size[0] // patch[0], reading.size[1] // patch[1])
        for prefix in (1, 2, 0, 5):
            tokens = positions.shape[1] - prefix
            if tokens == own[0] * own[1]:
                return reading
            grid = guess_grid(tokens, _LIKE) if tokens > 0 else None
            if grid is not None:
                size = (grid[0] * int(patch[0]), grid[1] * int(patch[1]))
                return Reading(size, reading.mean, reading.std, reading.interpolation)
    return reading


# --- folders in the hub's layout --------------------------------------------------------------------------------------
def is_hub_folder(place: Path) -> bool:
    """Whether a folder has a ``config.json`` that names a network of timm's."""
    return bool(_hub_config(place).get("architecture"))


def _hub_config(place: Path) -> dict[str, Any]:
    file = place / "config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' is no JSON text ({' '.join(str(error).split())[:80]}); fetch it again.") from None
    return found if isinstance(found, dict) else {}


def open_hub_folder(place: Path, request: Any) -> Opened:
    """Open a folder of the hub's layout: ``config.json`` of timm beside ``model.safetensors`` or ``pytorch_model.bin``.

    Raises:
        UserError: timm does not know its architecture, or the weights do not fill it.
    """
    import timm

    request.refuse(f"folder '{place}'", but=("size", "mean", "std", "interpolation"))
    config = _hub_config(place)
    name = str(config["architecture"])
    if not timm.is_model(name):
        raise UserError(f"'{place / 'config.json'}' names '{name}', which timm {timm.__version__} does not have.")
    stored = config.get("pretrained_cfg")
    reading = reading_of({**(stored if isinstance(stored, dict) else {}), **{k: config[k] for k in _FLAT if k in config}})
    reading = request.reading(reading)
    options = dict(config.get("model_args") or {})
    options.pop("num_classes", None)
    if request.size is not None:
        options["img_size"] = reading.size
    try:
        body = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        first = " ".join(str(error).split())[:120]
        raise UserError(f"'{place / 'config.json'}' does not describe a '{name}' of this timm ({first}).") from None
    file = read_weight_file(place, key="")
    report = load_into(body, file, label=f"weight file '{file.path}'", whole=False)
    width = int(getattr(body, "num_features", 0))
    return Opened(PooledBackbone(body, width).eval(), reading, f"'{name}' of timm", [report.sentence()])


_FLAT = ("input_size", "mean", "std", "interpolation")


__all__ = [
    "build_named",
    "is_hub_folder",
    "open_hub_folder",
    "open_timm",
    "open_torchvision",
    "reading_of",
    "require_weights",
]
