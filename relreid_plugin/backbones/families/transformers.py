"""Vision transformers of the field on timm's: overlapping patches, cameras, and the grid that a file was trained with.

Shape letters: B images, N patches, D token width, M cameras.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...errors import UserError
from ..opened import check_size
from ..patches import fit_to_images

SIZES = ((256, 128), (384, 128), (256, 256), (224, 224), (384, 384))
"""Image sizes that the field trains with, the likeliest first."""
STRIDES = (16, 12, 14)
HEAD = 64
"""Width of an attention head in all of these networks, but for one."""


def find_grid(tokens: int, patch: int, size: Any, stride: Any, *, label: str) -> tuple[tuple[int, int], int]:
    """Return image size and stride of so many patches.

    Args:
        tokens: Patches N.
        patch: Pixels of a patch.
        size: (height, width) that a user gives, or None.
        stride: Pixels from patch to patch that a user gives, or None.
        label: Begin of the sentence.

    Raises:
        UserError: No usual size and stride, or not the given ones, make so many patches.
    """
    sizes = SIZES if size is None else (check_size(size),)
    if stride is not None and (isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= patch):
        raise UserError(f"option 'stride' takes the pixels from patch to patch, an integer in [1, {patch}], got {stride!r}.")
    strides = tuple(dict.fromkeys((patch, *STRIDES))) if stride is None else (stride,)
    for height, width in sizes:
        for step in strides:
            if step <= patch <= min(height, width):
                if ((height - patch) // step + 1) * ((width - patch) // step + 1) == tokens:
                    return (height, width), step
    what = f"images of {sizes[0][0]}x{sizes[0][1]}" if size is not None else "usual images"
    raise UserError(
        f"{label} has positions for {tokens} patches of {patch} pixels, which {what} do not have at the strides "
        f"{', '.join(map(str, strides))}; give the size that it was trained with and the option 'stride'."
    )


def build(
    *,
    size: tuple[int, int],
    stride: int,
    patch: int,
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    qkv_bias: bool = True,
    eps: float = 1e-6,
    **options: Any,
) -> Any:
    """Return a timm vision transformer without a classifier.

    Args:
        size: (height, width) of the images.
        stride: Pixels from patch to patch.
        patch: Pixels of a patch.
        dim: Token width D.
        depth: Blocks.
        heads: Attention heads.
        hidden: Width within the blocks' perceptrons.
        qkv_bias: Whether queries, keys and values have a bias.
        eps: Of the normalisations.
        **options: Further ones of timm's class.
    """
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / dim,
        qkv_bias=qkv_bias,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=eps),
        **options,
    )
    fit_to_images(vit, size, stride=stride)
    return vit


def tokens_of(vit: Any, images: Tensor, side: Tensor | None, *, every: bool) -> Tensor:
    """Return the tokens before the first block.

    Args:
        vit: A network of :func:`build`.
        images: (B, 3, h, w).
        side: What is added for the camera, (1, D) or (B, D); None: nothing.
        every: It is added to every token, else to the class token alone.

    Returns:
        (B, 1 + N, D).
    """
    tokens: Tensor = vit._pos_embed(vit.patch_embed(images))
    if side is not None:
        if every:
            tokens = tokens + side[:, None]
        else:
            tokens = tokens.clone()
            tokens[:, 0] += side
    found: Tensor = vit.norm_pre(tokens)
    return found


def camera_notes(cameras: int, weight: float) -> list[str]:
    """Return the note on a camera embedding."""
    if not cameras:
        return []
    return [f"the camera is unknown here: the mean of the file's {cameras} camera embeddings is added, {weight:g} times"]


def block_count(weights: Mapping[str, Tensor], prefix: str = "") -> int:
    """Return how many blocks a state dict has below a prefix."""
    start = f"{prefix}blocks."
    found = {name[len(start) :].split(".")[0] for name in weights if name.startswith(start)}
    return len(found)


__all__ = ["HEAD", "SIZES", "STRIDES", "block_count", "build", "camera_notes", "find_grid", "tokens_of"]
