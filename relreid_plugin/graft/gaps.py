"""What an epoch's triplets were like: distances, violated triplets, the size of the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class TripletGaps:
    """Distances of triplets, collected over an epoch; a few numbers per triplet, without gradient."""

    def __init__(self) -> None:
        self._near: list[Tensor] = []
        self._far: list[Tensor] = []

    def add(self, near: Tensor, far: Tensor) -> None:
        """Take the distances of triplets: (n,) from anchor to positive, and (n,) from anchor to negative."""
        self._near.append(near.detach())
        self._far.append(far.detach())

    def summary(self) -> dict[str, float]:
        """Return what the triplets since the last call were like, and forget them.

        Returns:
            ``near``, ``far``: mean distances of anchors to positives and to negatives; ``near_95``, ``far_5``: the distance
            that 95 % of the positives, and 5 % of the negatives, do not exceed; ``active``: share of triplets whose positive
            is not nearer than the negative; ``hinge``: mean of max(0, near - far); ``pull``: mean of
            sigmoid(near - far), which is the size of the soft margin's gradient: 1 at most, 0.5 where both are as far. Empty
            without triplets.
        """
        near = torch.cat(self._near).double() if self._near else torch.empty(0)
        far = torch.cat(self._far).double() if self._far else torch.empty(0)
        self._near, self._far = [], []
        if not len(near):
            return {}
        gap = near - far
        found = {
            "near": near.mean(),
            "near_95": _quantile(near, 0.95),
            "far": far.mean(),
            "far_5": _quantile(far, 0.05),
            "active": (gap >= 0).double().mean(),
            "hinge": gap.clamp_min(0).mean(),
            "pull": gap.sigmoid().mean(),
        }
        return {name: float(value) for name, value in found.items()}


def _quantile(values: Tensor, share: float) -> Tensor:
    """The least of (n,) values that ``share`` of them do not exceed; ``torch.quantile`` refuses more than 16 million."""
    return values.kthvalue(math.ceil(share * len(values))).values


__all__ = ["TripletGaps"]
