"""The grid of patches of a timm vision transformer: of another image size, and overlapping."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UserError


def fit_to_images(vit: nn.Module, image_size: tuple[int, int], *, stride: int = 0) -> tuple[int, int]:
    """Give a timm ``VisionTransformer`` another image size and, if asked, overlapping patches; changed in place.

    The position embeddings are resized once, from the grid that the weights were trained with to the new one (bicubic).

    Args:
        vit: The network.
        image_size: (height, width) of the images, pixels.
        stride: Pixels from patch to patch; below the patch size they overlap (TransReID: 12 for patches of 16). 0 keeps
            patches side by side.

    Returns:
        The new grid, (rows, columns).

    Raises:
        UserError: Another kind of network, or images smaller than a patch.
    """
    from timm.layers import PatchEmbed, resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    network: Any = vit
    embed: Any = getattr(vit, "patch_embed", None)
    plain = isinstance(vit, VisionTransformer) and type(embed) is PatchEmbed
    if not plain:
        raise UserError(
            f"backbone.name: a {type(vit).__name__} is no plain vision transformer of timm; choose a 'timm:vit_…' or "
            "'timm:deit_…' (hybrid, EVA, BEiT and Swin networks work with 'model.name bnneck_baseline')."
        )
    patch, old = embed.patch_size, embed.grid_size
    step = (stride, stride) if stride else patch
    if image_size[0] < patch[0] or image_size[1] < patch[1]:
        raise UserError(
            f"images of {image_size[0]}x{image_size[1]} are smaller than a patch of {patch[0]}x{patch[1]}; raise "
            "'data.height' and 'data.width', or lower 'vit.patch_size'."
        )
    grid = ((image_size[0] - patch[0]) // step[0] + 1, (image_size[1] - patch[1]) // step[1] + 1)
    embed.proj.stride = step
    embed.img_size, embed.grid_size, embed.num_patches = image_size, grid, grid[0] * grid[1]
    embed.strict_img_size, embed.dynamic_img_pad, network.dynamic_img_size = True, False, False
    if network.pos_embed is not None and grid != old:
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        with torch.no_grad():
            resized = resample_abs_pos_embed(
                network.pos_embed, new_size=list(grid), old_size=list(old), num_prefix_tokens=prefix
            )
        network.pos_embed = nn.Parameter(resized.contiguous(), requires_grad=network.pos_embed.requires_grad)
    return grid


__all__ = ["fit_to_images"]
