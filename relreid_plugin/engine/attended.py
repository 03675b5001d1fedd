"""Whom images looked at: what a stage that refines features by others says of the weights it gave them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OWN = -1
"""Number of the query itself among those it looked at."""
NOBODY = -2
"""Number of an empty place."""


@dataclass(frozen=True)
class Attended:
    """Whom every query looked at, layer by layer; L layers, Q queries, K images.

    Attributes:
        title: The row of the table that it belongs to, without its protocol.
        index: (L, Q, K) gallery images by falling weight; :data:`OWN` is the query itself, :data:`NOBODY` an empty place.
        weight: (L, Q, K) the mean over the heads; where maps are subtracted from each other it may be negative.
    """

    title: str
    index: np.ndarray
    weight: np.ndarray


def strongest(index: np.ndarray, weight: np.ndarray, kept: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the strongest images of one layer by falling weight, the query itself always among them.

    Args:
        index: (Q, K) images, :data:`OWN` for the query itself.
        weight: (Q, K).
        kept: (Q, K) bool, slots that hold an image.
        most: Images of a query beside itself that stay, those with the largest absolute weights.

    Returns:
        Images and weights, (Q, min(K, most + 1)); empty places are :data:`NOBODY` with weight 0, at the end.
    """
    size = np.where(kept, np.where(index == OWN, np.inf, np.abs(weight)), -1.0)
    chosen = np.argsort(-size, axis=1, kind="stable")[:, : most + 1]
    index, weight, kept = (np.take_along_axis(value, chosen, axis=1) for value in (index, weight, kept))
    order = np.argsort(np.where(kept, -weight, np.inf), axis=1, kind="stable")
    index, weight, kept = (np.take_along_axis(value, order, axis=1) for value in (index, weight, kept))
    return np.where(kept, index, NOBODY), np.where(kept, weight, 0.0)


__all__ = ["NOBODY", "OWN", "Attended", "strongest"]
