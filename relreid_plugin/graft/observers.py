"""What GraFT adds to an epoch: whether its triplet loss acts, in the record and, where it does nothing, in the log."""

from __future__ import annotations

from typing import Any

from ..engine.observers import Observer

IDLE = 0.01
"""A triplet loss whose mean gradient is below this share of a full one does nothing."""


class TripletObserver(Observer):
    """Puts the distances of an epoch's triplets into its record, and says once when the loss on them does nothing.

    Args:
        loss: A loss with ``gaps``, ``scheme`` and ``tokens``.
    """

    tag, shown = "GraFT", ("triplet/active", "triplet/pull")

    def __init__(self, loss: Any) -> None:
        self.triplets, self.epoch, self.said = loss, 0, False

    def begin(self, epoch: int) -> None:
        """Count anew."""
        self.epoch = epoch
        self.triplets.gaps.summary()

    def end(self) -> dict[str, float]:
        """``triplet/near``, ``triplet/far`` and the others of :meth:`TripletGaps.summary`."""
        found = self.triplets.gaps.summary()
        if found and found["pull"] < IDLE and not self.said:
            self.said = True
            print(
                f"note: the triplet loss ({self.triplets.scheme}, {self.triplets.tokens} tokens) did nothing in epoch "
                f"{self.epoch + 1}: the mean distance of an anchor is {found['near']:.2f} to its positive and "
                f"{found['far']:.2f} to its negative, so {found['active']:.1%} of the triplets are violated and the mean "
                f"gradient is {found['pull']:.1e} of a full one; another 'graft.tokens' or 'graft.scheme' may act"
            )
        return {f"triplet/{name}": value for name, value in found.items()}


__all__ = ["IDLE", "TripletObserver"]
