"""What watches the epochs of stage 1, and may add to its loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Observer:
    """Set up before every epoch, asked after it, and in between for a part of the loss.

    Attributes:
        tag: Heading of its values among TensorBoard's events.
        state_name: Entry of the stage's checkpoints that holds :attr:`state`; empty: it has none.
        state: Object with ``state_dict`` and ``load_state_dict``.
        term: Name of its part of the composite loss; empty: it adds none.
        shown: Names in its record that the log's line on an epoch has too.
        weight: Factor of that part in this epoch; 0: it is computed and recorded only.
    """

    tag = "epoch"
    state_name = ""
    state: Any = None
    term = ""
    shown: tuple[str, ...] = ()
    weight = 0.0

    def begin(self, epoch: int) -> None:
        """Prepare for ``epoch``, counted from 0."""

    def see(self, logits: Tensor, labels: Tensor) -> None:
        """Look at a batch's predictions, where the observer has a part of the composite loss.

        Args:
            logits: (B, C), without gradient.
            labels: (B,).
        """

    def describe(self, images: Tensor) -> Tensor:
        """Return what :meth:`loss` reads of a batch of images (B, 3, h, w), as (B, …): all of them, unless overridden.

        Where several processes train, each describes its own images, and the descriptions travel.
        """
        return images

    def loss(self, features: Tensor, labels: Tensor, images: Tensor) -> Tensor | None:
        """Return the unweighted part of the loss for a batch, that of all processes where several train.

        Args:
            features: (B, d) that the model hands on for it, before or behind the BNNeck.
            labels: (B,).
            images: (B, …) from :meth:`describe`.

        Returns:
            A scalar, or ``None`` while there is nothing to compute.
        """
        return None

    def end(self) -> dict[str, float]:
        """Return what the epoch's record shall hold."""
        return {}


__all__ = ["Observer"]
