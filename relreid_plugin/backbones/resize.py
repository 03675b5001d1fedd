"""Weights of another image size, patch size or number of channels, made to fit by the libraries' own functions."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any

import yaml
from torch import Tensor, nn

Grid = tuple[int, int]


def stored_grid(content: Mapping[Any, Any], weights: Mapping[str, Tensor]) -> Grid | None:
    """Return the grid of patches, (rows, columns), that a checkpoint of the plug-in says it was trained with.

    Args:
        content: The file's outermost dict.
        weights: Its state dict.
    """
    patch = next((value.shape[-2:] for name, value in weights.items() if name.endswith("patch_embed.proj.weight")), None)
    with contextlib.suppress(yaml.YAMLError, KeyError, TypeError, ValueError, ZeroDivisionError):
        if patch is not None and isinstance(content["config"], str):
            config = yaml.safe_load(content["config"])
            stride = int(config["vit"]["stride"]) if config["model"]["name"] == "transreid" else 0
            sides = [int(config["data"][side]) for side in ("height", "width")]
            rows, columns = ((side - int(size)) // (stride or int(size)) + 1 for side, size in zip(sides, patch))
            return rows, columns
    return None


def guess_grid(tokens: int, like: Grid) -> Grid | None:
    """Return the grid of so many patches: a square one, as published weights have, else one of the shape of ``like``.

    Args:
        tokens: Patches.
        like: Another grid (rows, columns).
    """
    side = math.isqrt(tokens)
    if side and side * side == tokens:
        return side, side
    wanted = math.log(like[0] / like[1])
    pairs = [(tokens // columns, columns) for columns in range(1, tokens + 1) if tokens % columns == 0]
    near = [pair for pair in pairs if abs(math.log(pair[0] / pair[1]) - wanted) < 0.2]
    return near[0] if len(near) == 1 else None


def _prefix_tokens(module: Any) -> int:
    """Tokens of a timm network (class, distillation, register) that have position embeddings of their own."""
    return 0 if getattr(module, "no_embed_class", False) else int(getattr(module, "num_prefix_tokens", 1))


def _positions(module: Any, value: Tensor, target: Tensor, grid: Grid | None) -> tuple[Tensor, str] | None:
    """Position embeddings (1, P + N, D) of a timm network, from another grid."""
    from timm.layers import resample_abs_pos_embed

    new = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    if new is None or value.dim() != 3 or target.dim() != 3 or value.shape[::2] != target.shape[::2]:
        return None
    prefix = _prefix_tokens(module)
    patches = value.shape[1] - prefix
    if grid is not None and grid[0] * grid[1] != patches:
        return None
    old = grid or guess_grid(patches, new)
    if old is None or target.shape[1] - prefix != new[0] * new[1]:
        return None
    resized = resample_abs_pos_embed(value, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    return resized, f"from {old[0]}x{old[1]} to {new[0]}x{new[1]} patches"


def _kernel(value: Tensor, target: Tensor, *, first: bool, patches: bool) -> tuple[Tensor, str] | None:
    """A convolution (O, I, h, w) of other channels or, for patches, of another size."""
    from timm.layers import resample_patch_embed
    from timm.models import adapt_input_conv

    if value.dim() != 4 or target.dim() != 4 or len(value) != len(target):
        return None
    said = []
    if value.shape[2:] != target.shape[2:]:
        if not patches:
            return None
        said.append(f"from {value.shape[2]}x{value.shape[3]} to {target.shape[2]}x{target.shape[3]} pixels")
        value = resample_patch_embed(value.float(), list(target.shape[2:]))
    if value.shape[1] != target.shape[1]:
        if not first or value.shape[1] != 3:
            return None
        said.append(f"from 3 to {target.shape[1]} channels")
        value = adapt_input_conv(target.shape[1], value)
    return (value, " and ".join(said)) if value.shape == target.shape else None


def _first_conv(model: nn.Module, name: str) -> bool:
    owner = name.removesuffix(".weight")
    return owner in _first_convs(model)


def _first_convs(model: nn.Module) -> list[str]:
    """The layer that takes the images, of the network or of each of its ``backbones``."""
    backbones: Any = getattr(model, "backbones", [])
    parts = [(f"backbones.{index}.", part) for index, part in enumerate(backbones)]
    found = []
    for prefix, part in parts or [("", model)]:
        for name, layer in part.named_modules():
            if isinstance(layer, nn.Conv2d):
                found.append(prefix + name)
                break
    return found


def adapt(model: nn.Module, name: str, value: Tensor, target: Tensor, grid: Grid | None) -> tuple[Tensor, str] | None:
    """Make one tensor of a file fit the model, where a library has a function for it.

    Args:
        model: The model.
        name: Its tensor.
        value: That of the file, of another shape or of another grid.
        target: That of the model.
        grid: The grid of patches of the file, where it says so.

    Returns:
        The tensor and what was done to it, in a few words; ``None``: it cannot be made to fit.
    """
    owner, _, leaf = name.rpartition(".")
    if not value.is_floating_point():
        return None
    if leaf == "pos_embed":
        return _positions(model.get_submodule(owner), value.float(), target, grid)
    if leaf == "pos_embedding" and value.shape != target.shape:
        return _torchvision_positions(model.get_submodule(owner.rpartition(".")[0]), value)
    if leaf == "weight":
        patches = owner.endswith("patch_embed.proj")
        return _kernel(value, target, first=_first_conv(model, name), patches=patches)
    return None


def _torchvision_positions(vit: Any, value: Tensor) -> tuple[Tensor, str] | None:
    """Position embeddings of torchvision's vision transformer, which has square images."""
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if not isinstance(vit, VisionTransformer) or value.dim() != 3:
        return None
    name = "encoder.pos_embedding"
    with contextlib.suppress(ValueError):
        resized = interpolate_embeddings(vit.image_size, vit.patch_size, {name: value})[name]  # type: ignore[arg-type]
        return resized, f"from {value.shape[1] - 1} to {resized.shape[1] - 1} patches"
    return None


def same_grid(model: nn.Module, name: str, grid: Grid | None) -> bool:
    """Whether position embeddings of equal number lie on the same grid, as far as the file says."""
    if grid is None or not name.endswith("pos_embed"):
        return True
    own = getattr(getattr(model.get_submodule(name.rpartition(".")[0]), "patch_embed", None), "grid_size", None)
    return own is None or tuple(own) == grid


def library_form(body: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return weights as timm's own loading of this network makes them: renamed, and resized to it.

    Args:
        body: A timm network.
        weights: A state dict of any published form that timm knows.

    Returns:
        ``None`` where the network is none of timm's, has no such function, or it does not know these weights.
    """
    cls = type(body)
    if not cls.__module__.startswith("timm."):
        return None
    convert = getattr(sys.modules.get(cls.__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return None
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        options["adapt_layer_scale"] = any("gamma_" in name for name in weights)
    try:
        found = convert(dict(weights), body, **options)
    except Exception:  # such functions expect the weights that they know, and raise anything at others
        return None
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def take_grid(body: Any, weights: Mapping[str, Tensor], grid: Grid | None) -> None:
    """Give a timm vision transformer the grid of its weights, so that its positions are resized once, afterwards.

    Args:
        body: Changed in place, where it has position embeddings on a grid.
        weights: State dict, with any prefix.
        grid: Its grid, where it is known.
    """
    positions = next((v for name, v in weights.items() if name.split(".")[-1] == "pos_embed"), None)
    own = getattr(getattr(body, "patch_embed", None), "grid_size", None)
    if positions is None or positions.dim() != 3 or own is None or not hasattr(body, "set_input_size"):
        return
    patches = positions.shape[1] - _prefix_tokens(body)
    found = grid if grid is not None and grid[0] * grid[1] == patches else guess_grid(patches, own) if patches > 0 else None
    if found is not None and tuple(found) != tuple(own) and positions.shape[2] == body.embed_dim:
        patch = body.patch_embed.patch_size
        body.set_input_size(img_size=(found[0] * patch[0], found[1] * patch[1]))


__all__ = ["adapt", "guess_grid", "library_form", "same_grid", "stored_grid", "take_grid"]
