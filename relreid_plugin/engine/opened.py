"""Networks that the host or a run has, opened for pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbones.describe import looks_like
from ..backbones.families import open_family, unknown_file
from ..backbones.families.common import plain_states
from ..backbones.files import read_weight_file
from ..backbones.libraries import build_named, is_hub_folder, open_hub_folder, require_weights
from ..backbones.opened import PERSON, Opened, Reading
from ..errors import UserError
from ..features.opening import Request

_SIZES = {"hacnn": (160, 64)}  # networks of the host whose layers are made for another size than 256x128


def open_host(name: str, request: Request) -> Opened:
    """Open ``host:NAME``, a network of torchreid's, with its own or given weights.

    Raises:
        UserError: torchreid is not installed, no such network, no weights, or weights that do not fill it.
    """
    from .. import register
    from .models import host_features

    register()
    require_weights(f"host:{name}", request)
    return build_named(f"host:{name}", request, Reading(_SIZES.get(name, PERSON)), host_builder=host_features)


class RunNetwork(nn.Module):
    """The tested network of a run, as a function of images alone.

    Args:
        model: The network; one with a camera embedding sees every camera as unknown.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """(B, 3, h, w) -> (B, d); ``cameras`` are rows of the camera embedding, (B,)."""
        found: Tensor = self.model(images) if cameras is None else self.model(images, cameras)
        return found


def open_run_network(name: str, request: Request) -> Opened:
    """Open the image model of a finished run.

    Raises:
        UserError: The folder holds no trained run, or one of tracklets.
    """
    from .. import register
    from ..methods import takes_several
    from .runner import open_run

    register()
    request.refuse(f"run '{name}'", but=("overrides",))
    run = open_run(name, request.overrides)
    cfg = run.cfg
    if cfg.data.type == "features":
        raise UserError(
            f"run '{name}' is one of given features and sees no pictures; search its features by relreid_plugin.search "
            "and refine them by relreid_plugin.relations.refine, as docs/howto/features.md says."
        )
    if cfg.data.type != "image":
        raise UserError(f"run '{name}' is one of tracklets; stores hold features of single images.")
    if takes_several(cfg):
        from .samples import SampleExtractor

        multimodal = cfg.multimodal
        identity = f"{run.fingerprint}|{list(multimodal.modalities)}|{multimodal.mean}|{multimodal.std}"
        if multimodal.pixel_range:
            identity += f"|range {multimodal.pixel_range}"
        return Opened(
            run.bare,
            Reading((cfg.data.height, cfg.data.width), interpolation="bicubic"),
            f"run '{name}'",
            identity=identity,
            run=run,
            extractor=SampleExtractor,
        )
    reading = Reading((cfg.data.height, cfg.data.width), tuple(cfg.data.norm_mean), tuple(cfg.data.norm_std))
    return Opened(
        RunNetwork(run.bare).eval(),
        reading,
        f"run '{name}'",
        identity=run.fingerprint,
        pixel_range=list(cfg.data.pixel_range),
        run=run,
    )


def open_file(name: str, request: Request) -> Opened:
    """Open a folder of the hub's layout, or a file of weights whose family is known.

    Raises:
        UserError: No network is known by it.
    """
    place = Path(name)
    if place.is_dir() and is_hub_folder(place):
        return open_hub_folder(place, request)
    if place.is_dir():
        raise UserError(
            f"'{name}' holds no run ('{place / 'config.yml'}' does not exist), and no 'config.json' that names a network "
            "of timm."
        )
    file = read_weight_file(name)
    found = open_family(file, request)
    if found is not None:
        return found
    for weights in plain_states(file.content):
        model = host_model_of(weights, place.name)
        if model:
            request.refuse(f"'{name}', weights of '{model}',", but=("size", "mean", "std", "interpolation"))
            return open_host(model, dataclasses.replace(request, weights=name))
    raise UserError(unknown_file(file))


def host_model_of(weights: Mapping[str, Tensor], file: str = "") -> str:
    """Return the host's model whose layers are those of a state dict, by names and shapes; empty where there is none.

    Args:
        weights: The state dict.
        file: The file's name: where several models fit, the one that it begins with.

    Raises:
        UserError: Several models fit, and the file's name does not tell which.
    """
    from ..host import available_models, build_model
    from ..methods import BASELINE, builders

    own = {BASELINE, *builders()}
    hint = looks_like({}, list(weights))
    shapes = {name: tuple(value.shape) for name, value in weights.items() if not _passed_over(name)}
    names = [name for name in available_models() if name not in own and _may_be(name, hint, file)]
    names.sort(key=lambda name: (not file.startswith(name), -len(name)))
    fitting = []
    for name in names:
        with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            model = build_model(name, 1, "softmax", False, False)
            there = {key: tuple(value.shape) for key, value in model.state_dict().items() if not _passed_over(key)}
            if there == shapes:
                fitting.append(name)
        if fitting and file.startswith(fitting[0]):
            return fitting[0]
    if len(fitting) > 1:
        raise UserError(
            f"the weights in '{file}' fit several models of torchreid ({', '.join(fitting)}); name the right one as "
            "'host:NAME', and the file by 'weights'."
        )
    return fitting[0] if fitting else ""


def _may_be(model: str, hint: str, file: str) -> bool:
    """Whether a model may be that of a file, by the file's name and by what its layers look like."""
    if file.startswith(model) or ("OSNet" in hint and model.startswith("osnet")):
        return True
    depth = hint.removeprefix("a ResNet-")
    return depth.isdigit() and bool(re.search(rf"res\w*?{depth}(?!\d)", model))


def _passed_over(name: str) -> bool:
    """Whether a tensor says nothing of the model: classifiers have as many rows as there were identities."""
    return name.startswith("classifier") or name.endswith("num_batches_tracked")


__all__ = ["RunNetwork", "host_model_of", "open_file", "open_host", "open_run_network"]
