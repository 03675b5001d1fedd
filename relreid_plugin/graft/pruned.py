"""Pruning the transformer blocks of a multimodal model: single weights by torch's own utilities, or heads and channels.

A model here has ``backbones``, timm vision transformers with ``blocks``, as :class:`relreid_plugin.graft.model.GraFT`.

Shape letters: D token width, H heads, d head width, C hidden channels of an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn.utils import prune

from ..engine.packing import choose_units
from ..errors import UserError


def backbone_blocks(model: Any) -> dict[str, Any]:
    """Return the transformer blocks of all backbones, by their names in the model."""
    return {
        f"backbones.{index}.blocks.{position}": block
        for index, body in enumerate(model.backbones)
        for position, block in enumerate(getattr(body, "blocks", ()))
    }


def prunable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of attentions and MLPs: queries, keys, values, projections, MLPs (GraFT, section 5.4).

    Raises:
        UserError: The backbone has no such blocks.
    """
    layers = {
        f"{name}.{part}.{inner}": layer
        for name, block in backbone_blocks(model).items()
        for part in ("attn", "mlp")
        for inner, layer in getattr(block, part, nn.Module()).named_modules()
        if isinstance(layer, nn.Linear) and inner != "gate"
    }
    if not layers:
        body: Any = model.backbones[0]  # type: ignore[index]
        raise UserError(
            f"a backbone of type {type(body).__name__} has no transformer blocks to prune; prune a 'timm:vit_…' or "
            "'timm:deit_…'."
        )
    return layers


def prunable_weights(model: nn.Module) -> int:
    """Return how many weights :func:`prune_weights` may take."""
    return sum(layer.weight.numel() for layer in prunable_layers(model).values())


def zero_weights(model: nn.Module) -> int:
    """Return how many of them are exactly 0; a backbone without blocks has none."""
    if not backbone_blocks(model):
        return 0
    return sum(layer.weight.numel() - int(torch.count_nonzero(layer.weight)) for layer in prunable_layers(model).values())


# --- single weights ---------------------------------------------------------------------------------------------------
def prune_weights(model: nn.Module, count: int) -> None:
    """Set weights to 0 until ``count`` are: those of least magnitude over all blocks; what is 0 already stays so.

    The layers train under torch's pruning masks until :func:`settle_weights`.

    Args:
        model: Changed in place.
        count: Weights that are 0 afterwards; no more than :func:`prunable_weights`.

    Raises:
        UserError: A weight is not finite.
    """
    layers = prunable_layers(model)
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise UserError(f"layer '{name}' holds weights that are not finite; the run has diverged.")
        prune.custom_from_mask(layer, "weight", layer.weight.detach() != 0)
    more = count - zero_weights(model)
    if more > 0:
        pairs = [(layer, "weight") for layer in layers.values()]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=more)
    masked: Any
    for masked in layers.values():  # no memory of what was pruned, and no negative zeros
        with torch.no_grad():
            masked.weight_orig.masked_fill_(masked.weight_mask == 0, 0.0)


def settle_weights(model: nn.Module) -> None:
    """Turn masked layers into plain ones whose pruned weights are 0."""
    for layer in prunable_layers(model).values():
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")


# --- heads and channels -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Units:
    """What structured pruning may remove: heads and hidden channels of all blocks.

    Attributes:
        scores: (U,) mean square of a unit's weights, so that units of different sizes compare.
        sizes: (U,) its parameters.
        groups: (U,) 2 b for the heads of block b, 2 b + 1 for its channels; in the order of the units.
    """

    scores: Tensor
    sizes: Tensor
    groups: Tensor

    @property
    def removable(self) -> int:
        """Parameters of all units but the largest possible rest: one head and one channel in every block."""
        total = int(self.sizes.sum())
        first = torch.cat([torch.ones(1, dtype=torch.bool), self.groups[1:] != self.groups[:-1]])
        return total - int(self.sizes[first].sum())


def _check_block(name: str, block: Any) -> None:
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    plain = (
        type(attn) is Attention
        and getattr(attn, "gate", None) is None
        and isinstance(attn.norm, nn.Identity)
        and type(mlp) is Mlp
        and isinstance(mlp.fc1, nn.Linear)
        and isinstance(mlp.norm, nn.Identity)
    )
    if not plain:
        raise UserError(
            f"block '{name}' has no plain attention and MLP of timm ({type(attn).__name__}, {type(mlp).__name__}); prune "
            "single weights, without --structured."
        )


def find_units(model: nn.Module) -> Units:
    """Return the heads and channels of a model with their importance.

    A head is its rows of queries, keys and values and its columns of the projection; a channel is its row of the first
    layer of the MLP and its column of the second one.

    Raises:
        UserError: The backbone has no blocks, or blocks of another kind than timm's plain ones.
    """
    prunable_layers(model)
    scores, sizes, groups = [], [], []
    for index, (name, block) in enumerate(backbone_blocks(model).items()):
        _check_block(name, block)
        attn, mlp = block.attn, block.mlp
        heads, width = attn.num_heads, attn.head_dim
        rows = attn.qkv.weight.detach().double().view(3, heads, width, -1).square().sum(dim=(0, 2, 3))
        columns = attn.proj.weight.detach().double().view(-1, heads, width).square().sum(dim=(0, 2))
        count = width * (3 * attn.qkv.in_features + attn.proj.out_features)
        scores.append((rows + columns) / count)
        sizes.append(torch.full((heads,), count + (3 * width if attn.qkv.bias is not None else 0)))
        groups.append(torch.full((heads,), 2 * index))
        first, second = mlp.fc1.weight.detach().double(), mlp.fc2.weight.detach().double()
        channels, count = len(first), mlp.fc1.in_features + mlp.fc2.out_features
        scores.append((first.square().sum(dim=1) + second.square().sum(dim=0)) / count)
        sizes.append(torch.full((channels,), count + (1 if mlp.fc1.bias is not None else 0)))
        groups.append(torch.full((channels,), 2 * index + 1))
    found = torch.cat(scores).cpu()
    if not bool(torch.isfinite(found).all()):
        raise UserError("the backbone holds weights that are not finite; the run has diverged.")
    return Units(found, torch.cat(sizes), torch.cat(groups))


def _select(layer: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    weight = layer.weight.detach()
    if rows is not None:
        weight = weight[rows]
        layer.out_features = len(rows)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[rows], requires_grad=layer.bias.requires_grad)
    if columns is not None:
        weight = weight[:, columns]
        layer.in_features = len(columns)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)


def keep_heads(attn: Any, heads: Tensor) -> None:
    """Keep only some heads of a timm attention; changed in place.

    Args:
        attn: :class:`timm.layers.Attention`.
        heads: (H',) indices of the heads that stay.
    """
    width, device = attn.head_dim, attn.proj.weight.device
    columns = (heads[:, None] * width + torch.arange(width)).flatten().to(device)
    rows = (torch.arange(3, device=device)[:, None] * attn.num_heads * width + columns).flatten()
    _select(attn.qkv, rows=rows)
    _select(attn.proj, columns=columns)
    attn.num_heads, attn.attn_dim = len(heads), len(heads) * width


def keep_channels(mlp: Any, channels: Tensor) -> None:
    """Keep only some hidden channels of a timm MLP; changed in place.

    Args:
        mlp: :class:`timm.layers.Mlp`.
        channels: (C',) indices of the channels that stay.
    """
    channels = channels.to(mlp.fc1.weight.device)
    _select(mlp.fc1, rows=channels)
    _select(mlp.fc2, columns=channels)


def prune_units(model: nn.Module, excess: int) -> None:
    """Remove whole heads and hidden channels, those of least magnitude over all blocks, of ``excess`` parameters or more.

    Every block keeps a head and a channel. See :func:`relreid_plugin.engine.packing.choose_units` for how much more
    than ``excess`` may go.

    Args:
        model: Changed in place; its parameters are new ones.
        excess: Parameters to remove.
    """
    units = find_units(model)
    removed = choose_units(units.scores, units.sizes, units.groups, excess)
    for index, block in enumerate(backbone_blocks(model).values()):
        gone = removed[units.groups == 2 * index]
        if bool(gone.any()):
            keep_heads(block.attn, torch.nonzero(~gone).flatten())
        gone = removed[units.groups == 2 * index + 1]
        if bool(gone.any()):
            keep_channels(block.mlp, torch.nonzero(~gone).flatten())


def block_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Return (heads, hidden channels) of every block of timm's plain kind."""
    return [
        (int(block.attn.num_heads), int(cast(Any, block).mlp.fc1.out_features))
        for block in backbone_blocks(model).values()
        if type(block.attn) is Attention and type(block.mlp) is Mlp
    ]


def fit_shapes(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Give a freshly built model the fewer heads and channels of a pruned state dict; the weights are to be loaded yet.

    Args:
        model: Changed in place where shapes differ; its parameters are new ones there.
        state: State dict of the same model, whole or structurally pruned.

    Returns:
        Whether anything differed.
    """
    changed = False
    for name, block in backbone_blocks(model).items():
        attn: Any = getattr(block, "attn", None)
        mlp: Any = getattr(block, "mlp", None)
        stored = state.get(f"{name}.attn.proj.weight")
        if type(attn) is Attention and stored is not None and stored.dim() == 2:
            heads, rest = divmod(stored.shape[1], attn.head_dim)
            if not rest and 0 < heads < attn.num_heads:
                keep_heads(attn, torch.arange(heads))
                changed = True
        stored = state.get(f"{name}.mlp.fc1.weight")
        if type(mlp) is Mlp and stored is not None and 0 < len(stored) < int(cast(Any, mlp).fc1.out_features):
            keep_channels(mlp, torch.arange(len(stored)))
            changed = True
    return changed


__all__ = [
    "Units",
    "backbone_blocks",
    "block_shapes",
    "find_units",
    "fit_shapes",
    "keep_channels",
    "keep_heads",
    "prunable_layers",
    "prunable_weights",
    "prune_units",
    "prune_weights",
    "settle_weights",
    "zero_weights",
]
