"""Networks that the host or a run has, opened for pictures."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

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

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, d)."""
        found: Tensor = self.model(images)
        return found


def open_run_network(name: str, request: Request) -> Opened:
    """Open the image model of a finished run.

    Raises:
        UserError: The folder holds no trained run, or one of tracklets or several modalities.
    """
    from .. import register
    from ..methods import takes_several
    from .runner import open_run

    register()
    request.refuse(f"run '{name}'", but=("overrides",))
    run = open_run(name, request.overrides)
    cfg = run.cfg
    if takes_several(cfg) or cfg.data.type != "image":
        raise UserError(f"run '{name}' is one of tracklets or several modalities; pictures are seen one by one here.")
    reading = Reading((cfg.data.height, cfg.data.width), tuple(cfg.data.norm_mean), tuple(cfg.data.norm_std))
    return Opened(RunNetwork(run.bare).eval(), reading, f"run '{name}'", [], identity=run.fingerprint)


def open_file(name: str, request: Request) -> Opened:
    """Open a folder of the hub's layout, or a file of weights whose family is known.

    Raises:
        UserError: No network is known by it.
    """
    place = Path(name)
    if place.is_dir() and is_hub_folder(place):
        return open_hub_folder(place, request)
    raise UserError(f"'{name}' names no network; name 'host:NAME', 'timm:NAME' or 'torchvision:NAME', and it by 'weights'.")


__all__ = ["RunNetwork", "open_file", "open_host", "open_run_network"]
