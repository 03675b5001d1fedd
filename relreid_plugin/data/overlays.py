"""Weights over the pixels of pictures, as colours on them."""

from __future__ import annotations

import numpy as np


def overlay(pictures: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Lay maps over pictures, half and half, from blue (0) to red (1).

    Args:
        pictures: (B, h, w, 3) in [0, 1].
        maps: (B, h, w) in [0, 1].

    Returns:
        (B, h, w, 3) in [0, 1].
    """
    from matplotlib import colormaps

    return 0.5 * pictures + 0.5 * colormaps["jet"](maps)[..., :3]


__all__ = ["overlay"]
