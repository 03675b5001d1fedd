"""TransReID (He et al. 2021) and its self-supervised kin: TransReID-SSL (Luo et al. 2021) and PersonViT (Hu et al. 2024).

Names as ``base.blocks.0.attn.qkv.weight``, ``bottleneck.weight``; with the jigsaw module ``b1``, ``b2`` and four more necks.
Self-supervised backbones alone, without ``base.`` and neck, are told by a grid of patches that is not square.

Shape letters: B images, N patches, D token width, M cameras.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..files import WeightFile
from ..opened import HALF, Opened, Reading
from .common import NECKS, Family, InstanceBatchNorm, Neck, Weights, before, choose, count, fill, number, say_left, without
from .transformers import HEAD, build, camera_notes, find_grid, tokens_of

POOLINGS = ("cls", "gem", "avg", "max", "avg_max")
PARTS, SHIFT, GROUPS = 4, 5, 2
CAMERA_WEIGHT = 3.0
_SELF_SUPERVISED = ("head", "masked_embed", "mask_token", "predictor")  # what backbones alone are trained with
_OLD_SMALL = (768, 8)  # width and depth of vit_small of 2020: 8 heads, and attention scaled by the whole width


def shuffled(tokens: Tensor, *, shift: int, groups: int) -> Tensor:
    """Return the patches shifted and shuffled across groups, as the released code does it.

    It counts the shift from the class token on, so that one patch less moves to the end, and where the patches do not divide
    into groups it repeats the last but one.

    Args:
        tokens: (B, 1 + N, D).
        shift: Its ``SHIFT_NUM``.
        groups: Its ``SHUFFLE_GROUP``.

    Returns:
        (B, N or N + 1, D).
    """
    moved = torch.cat([tokens[:, shift:], tokens[:, 1:shift]], dim=1)
    if moved.shape[1] % groups:
        moved = torch.cat([moved, moved[:, -2:-1]], dim=1)
    batch, length, width = moved.shape
    return moved.view(batch, groups, length // groups, width).transpose(1, 2).reshape(batch, length, width)


class TransReIDNetwork(nn.Module):
    """What a checkpoint of TransReID computes at test.

    Args:
        vit: A timm vision transformer; with ``local`` its last block and normalisation are those of the global branch.
        cameras: Rows M of the embedding of cameras and viewpoints; 0: none.
        camera_weight: Its factor.
        local: The jigsaw module's branches.
        where: Feature ``before`` or ``after`` the necks; empty: there are none.
        pooling: What the feature is made of: one of :data:`POOLINGS`.
        reduced: Width that the feature is reduced to; 0: it is not.
    """

    def __init__(
        self,
        vit: Any,
        *,
        cameras: int = 0,
        camera_weight: float = CAMERA_WEIGHT,
        local: bool = False,
        where: str = "before",
        pooling: str = "cls",
        reduced: int = 0,
    ) -> None:
        super().__init__()
        self.vit, self.pooling, self.camera_weight = vit, pooling, camera_weight
        dim: int = vit.embed_dim
        self.sie_embed = nn.Parameter(torch.zeros(cameras, 1, dim)) if cameras else None
        self.local: nn.ModuleList | None = None
        if local:
            twin = build(
                size=vit.patch_embed.img_size,
                stride=vit.patch_embed.proj.stride[0],
                patch=vit.patch_embed.patch_size[0],
                dim=dim,
                depth=1,
                heads=vit.blocks[0].attn.num_heads,
                hidden=vit.blocks[0].mlp.fc1.out_features,
                qkv_bias=vit.blocks[0].attn.qkv.bias is not None,
            )
            self.local = nn.ModuleList([twin.blocks[0], twin.norm])
        self.fcneck = nn.Linear(dim, reduced, bias=False) if reduced else None
        self.necks = nn.ModuleList(Neck(reduced or dim, where) for _ in range((1 + PARTS * local) if where else 0))

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Compute features.

        Args:
            images: (B, 3, h, w).
            cameras: (B,) rows of the embedding; None: the mean of them.

        Returns:
            (B, D), or (B, 5 D) with the jigsaw module.
        """
        vit, side = self.vit, None
        if self.sie_embed is not None:
            rows = self.sie_embed[:, 0]
            side = self.camera_weight * (rows.mean(dim=0, keepdim=True) if cameras is None else rows[cameras])
        tokens = tokens_of(vit, images, side, every=True)
        for block in vit.blocks[:-1]:
            tokens = block(tokens)
        features = [self._pool(vit.norm(vit.blocks[-1](tokens)))]
        if self.local is not None:
            features += self._local(tokens)
        if self.fcneck is not None:
            features = [self.fcneck(feature) for feature in features]
        if len(self.necks):
            features = [neck(feature) for neck, feature in zip(self.necks, features)]
        return torch.cat([features[0], *(feature / PARTS for feature in features[1:])], dim=1)

    def _local(self, tokens: Tensor) -> list[Tensor]:
        """(B, 1 + N, D) -> the features of the parts, all in one pass."""
        assert self.local is not None
        block, norm = self.local
        batch, length = tokens.shape[0], (tokens.shape[1] - 1) // PARTS
        patches = shuffled(tokens, shift=SHIFT, groups=GROUPS)[:, : length * PARTS]
        pieces = patches.reshape(batch, PARTS, length, -1)
        heads = tokens[:, None, :1].expand(-1, PARTS, -1, -1)
        found = norm(block(torch.cat([heads, pieces], dim=2).flatten(0, 1)))[:, 0]
        return list(found.view(batch, PARTS, -1).unbind(1))

    def _pool(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:]
        if self.pooling == "gem":
            return tokens[:, 0] + patches.clamp(min=1e-6).pow(3).mean(dim=1).pow(1 / 3)
        if self.pooling == "avg":
            return patches.mean(dim=1)
        if self.pooling == "max":
            return patches.amax(dim=1)
        if self.pooling == "avg_max":
            return patches.unflatten(1, (-1, 4)).amax(dim=2).mean(dim=1)
        return tokens[:, 0]


class _Stem(nn.Module):
    """The convolutional stem of TransReID-SSL before the projection of patches half as large (ICS).

    Args:
        patch: Pixels of a patch.
        dim: Token width D.
    """

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        width = 64
        self.conv = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            InstanceBatchNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            InstanceBatchNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.proj = nn.Conv2d(width, dim, patch // 2, patch // 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, D, rows, columns)."""
        found: Tensor = self.proj(self.conv(images))
        return found


PATCHES = "patch_embed.proj.weight"
"""Behind the prefix of the transformer: ``base.``, ``backbone.``, ``module.backbone.``, none."""


def _detect(weights: Weights) -> bool:
    prefix = before(weights, PATCHES)
    own = (f"{prefix}cls_token", f"{prefix}pos_embed", f"{prefix}blocks.0.attn.qkv.weight", f"{prefix}norm.weight")
    if any(name not in weights for name in own) or f"{prefix}blocks.0.ls1.gamma" in weights:
        return False
    if prefix == "base.":
        return True
    tokens = weights[own[1]].shape[1] - 1
    return math.isqrt(tokens) ** 2 != tokens and weights[own[1]].dim() == 3


def _open(file: WeightFile, weights: Weights, request: Any) -> Opened:
    options, prefix = request.options, before(weights, PATCHES)
    body = without(weights, prefix)
    local, neck, stem = "b1.0.norm1.weight" in weights, "bottleneck.weight" in weights, "patch_embed.conv.0.weight" in body
    dim, depth = body["pos_embed"].shape[2], count(body, r"blocks\.(\d+)\.")
    patch = body["patch_embed.proj.weight"].shape[-1] * (2 if stem else 1)
    label = f"'{file.path}'"
    size, stride = find_grid(body["pos_embed"].shape[1] - 1, patch, request.size, options.get("stride"), label=label)
    old_small = (dim, depth) == _OLD_SMALL
    vit = build(
        size=size,
        stride=stride,
        patch=patch,
        dim=dim,
        depth=depth,
        heads=8 if old_small else max(1, dim // HEAD),
        hidden=len(body["blocks.0.mlp.fc1.weight"]),
        qkv_bias="blocks.0.attn.qkv.bias" in body,
    )
    if stem:
        vit.patch_embed.proj = _Stem(patch, dim)
    cameras = len(body["sie_embed"]) if "sie_embed" in body else 0
    weight = number(options, "camera_weight", CAMERA_WEIGHT, 0, 1000)
    where = choose(options, "neck", "before", NECKS) if neck else ""
    pooling = choose(options, "pooling", "cls", POOLINGS)
    network = TransReIDNetwork(
        vit,
        cameras=cameras,
        camera_weight=weight,
        local=local,
        where=where,
        pooling=pooling,
        reduced=len(weights["fcneck.weight"]) if "fcneck.weight" in weights else 0,
    )

    mapped, unused = _mapped(weights, prefix, depth, local)
    if stem:
        mapped = {_stem_name(name): value for name, value in mapped.items()}
    if old_small:
        _rescale(mapped, dim)
    reading = request.reading(Reading(size, *HALF))
    kind = "TransReID" + (", with its jigsaw module" if local else "") if neck else "a self-supervised vision transformer"
    notes = [
        f"read as released: images of {size[0]}x{size[1]} normalised by 0.5, patches {stride} pixels apart"
        + (f", the feature {where} the neck" if where else "")
        + f" ({pooling})",
        *camera_notes(cameras, weight),
        *say_left(unused, "are not used at test"),
    ]
    return fill(network, mapped, file, reading=reading, title=kind, notes=notes)


def _mapped(weights: Weights, prefix: str, depth: int, local: bool) -> tuple[Weights, list[str]]:
    """The weights under the network's names, and names that it does not use at test."""
    mapped: Weights = {}
    unused = []
    alone = "bottleneck.weight" not in weights
    last, norm = f"{prefix}blocks.{depth - 1}.", f"{prefix}norm."
    for name, value in weights.items():
        inner, part = name.removeprefix(prefix), name.partition(".")[0]
        if (local and name.startswith((last, norm))) or (alone and inner.startswith(_SELF_SUPERVISED)):
            unused.append(name)
        elif alone and not name.startswith(prefix) and name.startswith(_SELF_SUPERVISED):
            unused.append(name)
        elif name.startswith(("b1.0.", "b1.1.")):
            place = f"blocks.{depth - 1}" if name[3] == "0" else "norm"
            mapped[f"vit.{place}.{name[5:]}"] = value
        elif name.startswith(("b2.0.", "b2.1.")):
            mapped[f"local.{name[3:]}"] = value
        elif part.startswith("bottleneck"):
            number = part.removeprefix("bottleneck").removeprefix("_") or "0"
            mapped[f"necks.{number}.norm.{name.removeprefix(part + '.')}"] = value
        elif inner == "sie_embed" or inner.startswith("fc."):
            mapped[inner] = value
        elif part.startswith(("classifier", "fcneck")):
            mapped[name] = value
        else:
            mapped[f"vit.{inner}" if name.startswith(prefix) else name] = value
    return mapped, unused


def _stem_name(name: str) -> str:
    for part in ("conv.", "proj."):
        name = name.replace(f"vit.patch_embed.{part}", f"vit.patch_embed.proj.{part}", 1)
        if f"patch_embed.proj.{part}" in name:
            return name
    return name


def _rescale(mapped: Weights, dim: int) -> None:
    """Let queries be scaled by the whole width, as the old small network has it, where timm scales by a head's."""
    factor = (dim / 8) ** 0.5 / dim**0.5
    for name, value in mapped.items():
        if name.endswith("attn.qkv.weight") or name.endswith("attn.qkv.bias"):
            scaled = value.clone()
            scaled[:dim] *= factor
            mapped[name] = scaled


FAMILY = Family(
    "transreid",
    "TransReID, TransReID-SSL and PersonViT",
    _detect,
    _open,
    ("neck", "stride", "pooling", "camera_weight"),
)
__all__ = ["FAMILY", "TransReIDNetwork", "shuffled"]
