"""SOLIDER (Chen et al. 2023): Swin transformers whose stages are modulated by a semantic weight.

Names as ``base.stages.0.blocks.0.attn.w_msa.qkv.weight``, ``base.semantic_embed_w.0.weight``, ``bottleneck.weight``. Windows
are padded before they are shifted, and never shrink with the image, as in mmdetection and unlike in timm.

Shape letters: B images, h x w places, c channels, W windows, n places of a window, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import WeightFile
from ..opened import HALF, Opened, Reading
from .common import NECKS, Family, Neck, Weights, before, choose, count, fill, number, without

SIZE = (384, 128)
SEMANTIC_WEIGHT = 0.2


def _windows(maps: Tensor, window: int) -> Tensor:
    """(B, h, w, c) -> (B W, n, c)."""
    batch, height, width, channels = maps.shape
    parts = maps.view(batch, height // window, window, width // window, window, channels)
    return parts.transpose(2, 3).reshape(-1, window * window, channels)


class WindowAttention(nn.Module):
    """Attention within windows, shifted in every second block.

    Args:
        dim: Channels c.
        heads: Heads H.
        window: Side of a window.
        shift: Places that the windows are shifted by.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.w_msa = nn.Module()
        msa: Any = self.w_msa
        msa.qkv, msa.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        msa.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        steps = torch.arange(window)
        places = ((2 * window - 1) * steps[:, None] + steps[None, :]).flatten()
        msa.register_buffer("relative_position_index", (places[:, None] + places.flip(0)[None, :]).contiguous())

    def forward(self, maps: Tensor) -> Tensor:
        """(B, h, w, c) -> the same shape."""
        msa: Any = self.w_msa
        batch, height, width, dim = maps.shape
        side = self.window
        padded = F.pad(maps, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = padded.shape[1:3]
        if self.shift:
            padded = torch.roll(padded, (-self.shift, -self.shift), (1, 2))
        qkv = msa.qkv(_windows(padded, side))
        query, key, value = qkv.view(qkv.shape[0], -1, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        bias = msa.relative_position_bias_table[msa.relative_position_index].permute(2, 0, 1)  # (H, n, n)
        mask: Tensor = bias[None]
        if self.shift:
            apart = self._apart(rows, columns, maps)  # (W, n, n)
            mask = (bias[None] + apart[:, None]).repeat(batch, 1, 1, 1)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
        found = msa.proj(found.transpose(1, 2).flatten(2))
        found = found.view(batch, rows // side, columns // side, side, side, dim).transpose(2, 3)
        found = found.reshape(batch, rows, columns, dim)
        if self.shift:
            found = torch.roll(found, (self.shift, self.shift), (1, 2))
        return found[:, :height, :width]

    def _apart(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """-100 between places that the shift has brought together, (W, n, n)."""

        def parts(length: int) -> Tensor:
            places = torch.arange(length, device=like.device)
            return (places >= length - self.window).int() + (places >= length - self.shift).int()

        regions = (3 * parts(rows)[:, None] + parts(columns)[None, :])[None, :, :, None]
        found = _windows(regions, self.window)[..., 0]
        return (found[:, None] != found[:, :, None]).to(like.dtype) * -100.0


class SwinBlock(nn.Module):
    """A block: attention within windows, then a perceptron.

    Args:
        dim: Channels c.
        heads: Heads H.
        window: Side of a window.
        shift: Places that the windows are shifted by.
        hidden: Width within the perceptron.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, shift)
        self.ffn = nn.Module()
        self.ffn.layers = nn.Sequential(nn.Sequential(nn.Linear(dim, hidden), nn.GELU()), nn.Linear(hidden, dim))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, h, w, c) -> the same shape."""
        maps = maps + self.attn(self.norm1(maps))
        layers: Any = self.ffn.layers
        found: Tensor = maps + layers(self.norm2(maps))
        return found


class Merging(nn.Module):
    """Four places become one of twice the channels; they are gathered channel by channel, as ``unfold`` does it.

    Args:
        dim: Channels c.
        out: Channels behind it.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, out, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, h, w, c) -> (B, h / 2, w / 2, c')."""
        batch, height, width, dim = maps.shape
        maps = F.pad(maps, (0, 0, 0, width % 2, 0, height % 2))
        parts = maps.view(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, dim).permute(0, 1, 3, 5, 2, 4)
        found: Tensor = self.reduction(self.norm(parts.flatten(3)))
        return found


class Solider(nn.Module):
    """What a checkpoint of SOLIDER computes at test.

    Args:
        dim: Channels of the first stage.
        depths: Blocks of every stage.
        heads: Heads of every stage.
        window: Side of a window.
        patch: Pixels of a patch.
        ratio: Width within perceptrons, in channels.
        norms: Stages with a normalisation of their own.
        semantic: Whether stages are modulated.
        weight: The semantic weight.
        where: Feature ``before`` or ``after`` the neck; empty: there is none.
        reduced: Width that the feature is reduced to; 0: it is not.
    """

    semantic: Tensor

    def __init__(
        self,
        dim: int,
        depths: list[int],
        heads: list[int],
        *,
        window: int,
        patch: int,
        ratio: int,
        norms: list[int],
        semantic: bool,
        weight: float,
        where: str,
        reduced: int = 0,
    ) -> None:
        super().__init__()
        self.base = nn.Module()
        base: Any = self.base
        base.patch_embed = nn.Module()
        base.patch_embed.projection, base.patch_embed.norm = nn.Conv2d(3, dim, patch, patch), nn.LayerNorm(dim)
        base.stages = nn.ModuleList()
        widths = [dim * 2**stage for stage in range(len(depths))]
        for stage, (width, depth, split) in enumerate(zip(widths, depths, heads)):
            part: Any = nn.Module()
            shifts = [window // 2 if block % 2 else 0 for block in range(depth)]
            part.blocks = nn.ModuleList(SwinBlock(width, split, window, shift, ratio * width) for shift in shifts)
            if stage + 1 < len(depths):
                part.downsample = Merging(width, widths[stage + 1])
            base.stages.append(part)
        for stage in norms:
            base.add_module(f"norm{stage}", nn.LayerNorm(widths[stage]))
        self.modulated, self.last, self.patch = semantic, len(depths) - 1, patch
        if semantic:
            wide = [*widths[1:], widths[-1]]
            base.semantic_embed_w = nn.ModuleList(nn.Linear(2, width) for width in wide)
            base.semantic_embed_b = nn.ModuleList(nn.Linear(2, width) for width in wide)
        self.register_buffer("semantic", torch.tensor([weight, 1 - weight]), persistent=False)
        self.fcneck = nn.Linear(widths[-1], reduced, bias=False) if reduced else None
        self.bottleneck = Neck(reduced or widths[-1], where) if where else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, d)."""
        base: Any = self.base
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        maps = base.patch_embed.norm(base.patch_embed.projection(images).permute(0, 2, 3, 1))
        for stage, part in enumerate(base.stages):
            for block in part.blocks:
                maps = block(maps)
            if stage < self.last:
                maps = part.downsample(maps)
                if self.modulated:
                    scale, offset = (
                        layers[stage](self.semantic) for layers in (base.semantic_embed_w, base.semantic_embed_b)
                    )
                    maps = maps * F.softplus(scale) + offset
        feature = getattr(base, f"norm{self.last}")(maps).mean(dim=(1, 2))
        found: Tensor = self.bottleneck(feature if self.fcneck is None else self.fcneck(feature))
        return found


PATCHES = "patch_embed.projection.weight"


def _detect(weights: Weights) -> bool:
    return f"{before(weights, PATCHES)}stages.0.blocks.0.attn.w_msa.qkv.weight" in weights


def _open(file: WeightFile, weights: Weights, request: Any) -> Opened:
    options, prefix = request.options, before(weights, PATCHES)
    body = without(weights, prefix)
    stages = count(body, r"stages\.(\d+)\.")
    tables = [body[f"stages.{stage}.blocks.0.attn.w_msa.relative_position_bias_table"] for stage in range(stages)]
    dim, patch = len(body["patch_embed.projection.weight"]), body["patch_embed.projection.weight"].shape[-1]
    semantic = "semantic_embed_w.0.weight" in body
    weight = number(options, "semantic_weight", SEMANTIC_WEIGHT, 0, 1)
    where = choose(options, "neck", "before", NECKS) if "bottleneck.weight" in weights else ""
    network = Solider(
        dim,
        [count(body, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        [table.shape[1] for table in tables],
        window=(math.isqrt(len(tables[0])) + 1) // 2,
        patch=patch,
        ratio=len(body["stages.0.blocks.0.ffn.layers.0.0.weight"]) // dim,
        norms=[stage for stage in range(stages) if f"norm{stage}.weight" in body],
        semantic=semantic,
        weight=weight,
        where=where,
        reduced=len(weights["fcneck.weight"]) if "fcneck.weight" in weights else 0,
    )
    mapped: Weights = {}
    for name, value in weights.items():
        if name.startswith(prefix) and name.removeprefix(prefix) in body and (prefix or not name.startswith(_OWN)):
            mapped[f"base.{name.removeprefix(prefix)}"] = value
        else:
            mapped[name.replace("bottleneck.", "bottleneck.norm.", 1)] = value
    reading = request.reading(Reading(SIZE, *HALF))
    notes = [
        f"read as released: images of {reading.size[0]}x{reading.size[1]} normalised by 0.5"
        + (f", semantic weight {weight:g}" if semantic else "")
        + (f", the feature {where} the neck" if where else "")
    ]
    return fill(network, mapped, file, reading=reading, title="SOLIDER", notes=notes)


_OWN = ("bottleneck.", "classifier", "fcneck.")
FAMILY = Family("solider", "SOLIDER", _detect, _open, ("neck", "semantic_weight"))
__all__ = ["FAMILY", "Solider", "SwinBlock", "WindowAttention"]
