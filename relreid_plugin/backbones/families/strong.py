"""reid-strong-baseline (Luo et al. 2019): a ResNet or ResNet-IBN-a, its last stage at stride 1, averaged, and a BNNeck.

Names as ``base.layer1.0.conv1.weight``, ``bottleneck.running_mean``. Its plain ResNets have no activation behind the first
normalisation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..files import WeightFile
from ..opened import Opened, Reading
from .common import NECKS, Family, Neck, Weights, choose, fill, without
from .resnets import build, names


class StrongBaseline(nn.Module):
    """A residual network and a BNNeck.

    Args:
        base: (B, 3, h, w) -> (B, d).
        width: Width d.
        where: Feature ``before`` or ``after`` the neck; empty: there is none.
    """

    def __init__(self, base: nn.Module, width: int, where: str) -> None:
        super().__init__()
        self.base = base
        self.bottleneck = Neck(width, where) if where else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, d)."""
        found: Tensor = self.bottleneck(self.base(images))
        return found


def _detect(weights: Weights) -> bool:
    return "base.layer4.0.conv1.weight" in weights and "base.conv1.weight" in weights


def _open(file: WeightFile, weights: Weights, request: Any) -> Opened:
    body = without(weights, "base.")
    for name in ("fc.weight", "fc.bias"):  # of ImageNet; the IBN networks carry it along
        body.pop(name, None)
    ibn = any(".bn1.IN." in name for name in body)
    base, width = build(body, pool=nn.AdaptiveAvgPool2d(1), stem_relu=ibn)
    where = choose(request.options, "neck", "after", NECKS) if "bottleneck.weight" in weights else ""
    mapped = {f"base.{name}": value for name, value in names(body).items()}
    for name, value in weights.items():
        if not name.startswith("base."):
            mapped[name.replace("bottleneck.", "bottleneck.norm.", 1)] = value
    for name in ("fc.weight", "fc.bias"):
        if f"base.{name}" in weights:
            mapped[name] = weights[f"base.{name}"]
    reading = request.reading(Reading())
    notes = [
        "read as reid-strong-baseline has it: last stage at stride 1"
        + (", no activation behind the first normalisation" if not ibn else "")
        + (f", the feature {where} the neck" if where else "")
        + f"; images of {reading.size[0]}x{reading.size[1]}, unless you say otherwise"
    ]
    return fill(StrongBaseline(base, width, where), mapped, file, reading=reading, title="reid-strong-baseline", notes=notes)


FAMILY = Family("strong", "reid-strong-baseline", _detect, _open, ("neck",))
__all__ = ["FAMILY", "StrongBaseline"]
