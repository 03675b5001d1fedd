"""Pillow's resampling as two matrix products, for graphs that take photos of any size.

A row of the result is a weighted sum of rows of the photo; the weights depend on both sizes alone. So the resizing along an
axis is a product with a matrix, which a graph can make out of the photo's size, and every runtime has matrix products, where
the resize operators of runtimes differ from Pillow's by several grey levels. Along one axis the result is Pillow's but for
ties of rounding. Which axis goes first depends on Pillow's version and on the sizes; here rows always do, so that a photo
that is resized along both may differ by one grey level.

Shape letters: B images, c channels, H x W pixels of a photo, h x w pixels of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
"""Half the width of a kernel, in pixels of the result, or of the photo where that is enlarged."""


def kernel(distance: Tensor, interpolation: str) -> Tensor:
    """Return the weights at distances from the centre: a triangle, or Keys' cubic with a = -0.5, as in Pillow."""
    far = distance.abs()
    if interpolation == "bilinear":
        return (1.0 - far).clamp_min(0.0)
    a = -0.5
    near = ((a + 2.0) * far - (a + 3.0)) * far * far + 1.0
    tail = (((far - 5.0) * far + 8.0) * far - 4.0) * a
    return torch.where(far < 1.0, near, torch.where(far < 2.0, tail, torch.zeros_like(far)))


def weights(axis: Tensor, target: int, interpolation: str) -> Tensor:
    """Return the matrix (target, length) that resizes an axis.

    The centre of target pixel i is at (i + 0.5) s of the photo, s = length / target; the kernel is stretched by max(s, 1)
    when it shrinks; pixels whose centres are not within its support have no weight, and the rest is scaled to the sum 1
    (``precompute_coeffs`` in Pillow's ``Resample.c``).

    Args:
        axis: (length,) any values: a line of the photo, whose length counts.
        target: Pixels of the result.
        interpolation: One of :data:`SUPPORT`.
    """
    ones = torch.ones_like(axis, dtype=torch.float64)
    pixels = ones.cumsum(dim=0) - 1.0
    scale = ones.sum() / target
    stretch = scale.clamp_min(1.0)
    centres = (torch.arange(target, dtype=torch.float64, device=axis.device) + 0.5) * scale
    support = SUPPORT[interpolation] * stretch
    first = torch.floor(centres - support + 0.5).unsqueeze(1)
    last = torch.floor(centres + support + 0.5).unsqueeze(1)
    found = kernel((pixels.unsqueeze(0) - centres.unsqueeze(1) + 0.5) / stretch, interpolation)
    found = found * ((pixels.unsqueeze(0) >= first) & (pixels.unsqueeze(0) < last)).to(torch.float64)
    return (found / found.sum(dim=1, keepdim=True)).to(torch.float32)


class Resize(nn.Module):
    """Resize photos of any size, first along the rows, then along the columns, each time to whole grey levels.

    Args:
        size: (h, w).
        interpolation: ``bilinear`` or ``bicubic``.

    Raises:
        UserError: Another interpolation.
    """

    def __init__(self, size: tuple[int, int], *, interpolation: str = "bilinear") -> None:
        super().__init__()
        if interpolation not in SUPPORT:
            raise UserError(
                f"images of this model are resized by '{interpolation}', which a graph cannot do here (it can: "
                f"{', '.join(SUPPORT)}); leave out --with-preprocessing."
            )
        self.size, self.interpolation = size, interpolation

    def forward(self, photos: Tensor) -> Tensor:
        """(B, c, H, W) of 0 to 255 -> (B, c, h, w) of whole numbers from 0 to 255."""
        across = weights(photos[0, 0, 0], self.size[1], self.interpolation)
        down = weights(photos[0, 0, :, 0], self.size[0], self.interpolation)
        return _levels(down @ _levels(photos @ across.t()))


def _levels(values: Tensor) -> Tensor:
    return torch.floor(values + 0.5).clamp(0.0, 255.0)


__all__ = ["Resize", "kernel", "weights"]
