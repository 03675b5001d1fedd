"""A loss that spreads the features of a batch: minus the logarithm of their mean variance."""

from __future__ import annotations

from torch import Tensor

from relreid_plugin.engine.observers import Observer


class Spread(Observer):
    """A further part of the loss of stage 1.

    Args:
        weight: Its factor.
    """

    tag, term = "fourth", "spread"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, features: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """(B, d) to a scalar."""
        return -features.var(dim=0).mean().add(1e-6).log()

    def end(self) -> dict[str, float]:
        """The weight belongs to the record."""
        return {"spread_weight": self.weight}
