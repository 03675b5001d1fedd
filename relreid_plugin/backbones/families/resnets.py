"""Residual networks of the field on torchvision's: last stage at stride 1, IBN, squeeze-and-excitation, non-local blocks.

Shape letters: B images, c channels, h x w places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from .common import InstanceBatchNorm, Weights, count


class Excitation(nn.Module):
    """Squeeze-and-excitation behind a batch normalisation, under the names of fast-reid.

    Args:
        norm: The normalisation.
        channels: Channels c.
        squeezed: Channels in between.
    """

    def __init__(self, norm: nn.Module, channels: int, squeezed: int) -> None:
        super().__init__()
        self.norm = norm
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False), nn.ReLU(), nn.Linear(squeezed, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, c, h, w) -> the same shape."""
        maps = self.norm(maps)
        weights: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return maps * weights[:, :, None, None]


class NonLocal(nn.Module):
    """A block with a non-local one behind it (Wang et al. 2018), whose affinities are products over the number of places.

    Args:
        block: The block before.
        channels: Channels c.
        inner: Channels of queries, keys and values.
    """

    def __init__(self, block: nn.Module, channels: int, inner: int) -> None:
        super().__init__()
        self.block = block
        self.g, self.theta, self.phi = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, c', h', w')."""
        maps = self.block(maps)
        values, queries, keys = (layer(maps).flatten(2) for layer in (self.g, self.theta, self.phi))  # (B, inner, h w)
        together = torch.bmm(values, keys.transpose(1, 2)) / values.shape[2]  # keys and values meet first: (inner, inner)
        found: Tensor = self.W(torch.bmm(together, queries).view(*values.shape[:2], *maps.shape[2:]))
        return found + maps


def build(
    body: Weights, *, pool: nn.Module, stem_relu: bool = True, ceil_mode: bool = False, last_stride: int = 1
) -> tuple[Any, int]:
    """Return a network for the weights of a residual network, whose feature is the pooled map, and its width.

    Args:
        body: Under the names of torchvision; ``bn1.IN`` and ``bn1.BN`` for IBN, ``se.fc`` and ``NL_1`` as in fast-reid.
        pool: (B, c, h, w) -> (B, c, 1, 1).
        stem_relu: Whether the stem has its activation.
        ceil_mode: Whether the stem's pooling rounds up.
        last_stride: Stride of the last stage.
    """
    bottleneck = "layer1.0.conv3.weight" in body
    layers = [count(body, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    net = ResNet(Bottleneck if bottleneck else BasicBlock, layers, num_classes=1)  # type: ignore[arg-type]
    width = net.fc.in_features
    net.fc, net.avgpool = nn.Identity(), pool  # type: ignore[assignment]
    if not stem_relu:
        net.relu = nn.Identity()  # type: ignore[assignment]
    if ceil_mode:
        net.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    first: Any = net.layer4[0]
    (first.conv2 if bottleneck else first.conv1).stride = (last_stride, last_stride)
    if first.downsample is not None:
        first.downsample[0].stride = (last_stride, last_stride)
    if "bn1.IN.weight" in body:
        net.bn1 = InstanceBatchNorm(64)  # type: ignore[assignment]
    for stage in (1, 2, 3, 4):
        blocks: Any = getattr(net, f"layer{stage}")
        inserted = count(body, rf"NL_{stage}\.(\d+)\.")
        for number, block in enumerate(list(blocks)):
            place = f"layer{stage}.{number}."
            if f"{place}bn1.IN.weight" in body:
                block.bn1 = InstanceBatchNorm(block.conv1.out_channels)
            if f"{place}se.fc.0.weight" in body:
                squeezed, channels = body[f"{place}se.fc.0.weight"].shape
                last = "bn3" if bottleneck else "bn2"
                setattr(block, last, Excitation(getattr(block, last), channels, squeezed))
            behind = number - (len(blocks) - inserted)
            if behind >= 0:
                inner, channels = body[f"NL_{stage}.{behind}.g.weight"].shape[:2]
                blocks[number] = NonLocal(block, channels, inner)
    return net, width


def names(body: Weights) -> Weights:
    """Return the weights of a residual network under the names of what :func:`build` makes of them."""
    bottleneck = "layer1.0.conv3.weight" in body
    last = "bn3" if bottleneck else "bn2"
    layers = {stage: count(body, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)}
    inserted = {stage: count(body, rf"NL_{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)}
    found: Weights = {}
    for name, value in body.items():
        parts = name.split(".")
        if parts[0].startswith("NL_"):
            stage = int(parts[0][3:])
            place = layers[stage] - inserted[stage] + int(parts[1])
            found[".".join([f"layer{stage}", str(place), *parts[2:]])] = value
            continue
        if parts[0].startswith("layer"):
            stage, number = int(parts[0][5:]), int(parts[1])
            block = f"{parts[0]}.{number}"
            excited = f"{block}.se.fc.0.weight" in body
            rest = parts[2:]
            if rest[0] == "se":
                rest = [last, *rest[1:]]
            elif rest[0] == last and excited:
                rest = [last, "norm", *rest[1:]]
            if number >= layers[stage] - inserted[stage]:
                rest = ["block", *rest]
            name = ".".join([block, *rest])
        found[name] = value
    return found


__all__ = ["Excitation", "NonLocal", "build", "names"]
