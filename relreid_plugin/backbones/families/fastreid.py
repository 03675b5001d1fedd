"""fast-reid (He et al. 2020): BoT, AGW and SBS on ResNets, with IBN, squeeze-and-excitation and non-local blocks.

Names as ``backbone.layer1.0.conv1.weight``, ``heads.bottleneck.0.weight``. The feature is the one behind the head's
normalisation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import UserError
from ..files import WeightFile
from ..opened import IMAGENET, Opened, Reading
from .common import Family, GeneralisedMean, Weights, choose, fill, without
from .resnets import build, names

POOLINGS = ("avg", "max", "avg_max", "gem")
_CLASSIFIERS = ("weight", "classifier.", "cls_layer.")


class _AverageAndMaximum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.average, self.largest = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, c, 1, 1)."""
        found: Tensor = self.average(maps) + self.largest(maps)
        return found


class FastReID(nn.Module):
    """A residual network and the layers of an embedding head.

    Args:
        backbone: (B, 3, h, w) -> (B, d).
        width: Width d.
        reduced: Width that the head reduces it to; 0: it does not.
        normed: Whether the head has a normalisation.
    """

    def __init__(self, backbone: nn.Module, width: int, reduced: int, normed: bool) -> None:
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = [nn.Conv2d(width, reduced, 1, bias=False)] if reduced else []
        if normed:
            layers.append(nn.BatchNorm2d(reduced or width))
        self.bottleneck = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, d)."""
        found: Tensor = self.bottleneck(self.backbone(images)[:, :, None, None])
        return found.flatten(1)


def _detect(weights: Weights) -> bool:
    return any(name.startswith("backbone.") for name in weights) and any(name.startswith("heads.") for name in weights)


def _open(file: WeightFile, weights: Weights, request: Any) -> Opened:
    body, heads = without(weights, "backbone."), without(weights, "heads.")
    if "layer4.0.conv1.weight" not in body or "conv1.weight" not in body:
        raise UserError(
            f"'{file.path}' is a checkpoint of fast-reid with a backbone that is not built here ('{next(iter(body))}', …); "
            "ResNets with and without IBN, squeeze-and-excitation and non-local blocks are."
        )
    learned = "pool_layer.p" in heads
    guess = "gem" if learned or any(name.startswith("NL_") for name in body) else "avg"
    pooling = choose(request.options, "pooling", guess, POOLINGS)
    if learned and pooling != "gem":
        raise UserError(f"'{file.path}' has a trained generalised mean, 'heads.pool_layer.p'; leave out option 'pooling'.")
    pools: dict[str, nn.Module] = {
        "avg": nn.AdaptiveAvgPool2d(1),
        "max": nn.AdaptiveMaxPool2d(1),
        "avg_max": _AverageAndMaximum(),
        "gem": GeneralisedMean(),
    }
    backbone, width = build(body, pool=pools[pooling], ceil_mode=True)
    reduced = next((len(value) for name, value in heads.items() if name == "bottleneck.0.weight" and value.dim() == 4), 0)
    normed = any(name.startswith("bottleneck.") and name.endswith("running_mean") for name in heads)
    mapped = {f"backbone.{name}": value for name, value in names(body).items()}
    if pooling == "gem":
        mapped["backbone.avgpool.p"] = heads["pool_layer.p"] if learned else backbone.avgpool.p.detach()
    for name, value in heads.items():
        if name.startswith(_CLASSIFIERS):
            mapped["classifier.weight" if name == "weight" else f"classifier_{name}"] = value
        elif name != "pool_layer.p":
            mapped[name] = value
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    for name, value in weights.items():
        if name == "pixel_mean":
            mean = tuple(round(float(each) / 255, 6) for each in value.flatten())
        elif name == "pixel_std":
            std = tuple(round(float(each) / 255, 6) for each in value.flatten())
        elif not name.startswith(("backbone.", "heads.")):
            mapped[name] = value
    size = (384, 128) if learned else (256, 128)
    reading = request.reading(Reading(size, mean, std, "bicubic"))
    said = f"{'trained ' if learned else ''}{pooling} pooling"
    notes = [
        f"read as its configurations have it: {said}, images of {reading.size[0]}x{reading.size[1]}, unless you say "
        "otherwise"
    ]
    return fill(FastReID(backbone, width, reduced, normed), mapped, file, reading=reading, title="fast-reid", notes=notes)


FAMILY = Family("fastreid", "fast-reid", _detect, _open, ("pooling",))
__all__ = ["FAMILY", "FastReID"]
