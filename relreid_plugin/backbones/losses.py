"""Losses on features and logits: label-smoothed cross-entropy, batch-hard triplet, center loss, and their weighted sum.

Shape letters: B batch, d feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def batch_hard_triplet_loss(features: Tensor, labels: Tensor, *, margin: float = 0.3) -> Tensor:
    """Triplet loss with the hardest positive and negative of every anchor in the batch (Hermans et al. 2017).

    Args:
        features: (B, d).
        labels: (B,) identities.
        margin: Hinge margin in units of the Euclidean distance; 0 uses the soft margin log(1 + exp(d_ap - d_an)).

    Returns:
        Mean over the anchors that have a negative in the batch; 0 (with zero gradient) when there is none.
    """
    squared = features.square().sum(dim=1)
    distances = squared.unsqueeze(1) + squared.unsqueeze(0) - 2.0 * features @ features.t()
    distances = distances.clamp_min(1e-12).sqrt()
    same = labels.unsqueeze(1) == labels.unsqueeze(0)
    positive = distances.masked_fill(~same, float("-inf")).amax(dim=1)
    negative = distances.masked_fill(same, float("inf")).amin(dim=1)
    valid = ~same.all(dim=1)
    gap = torch.where(valid, positive - negative, 0.0)  # no choice of rows: it has the host wait for a GPU
    loss = F.relu(gap + margin) if margin > 0 else F.softplus(gap)
    return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp_min(1)


class CenterLoss(nn.Module):
    """Center loss: half the squared distance of a feature to its class center, averaged over the batch (Wen et al. 2016).

    The paper prints a sum over the images; the released code averages, and the published weight 0.0005 belongs to the mean.

    Args:
        num_classes: Classes C.
        dim: Feature width d.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, dim))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """(B, d), (B,) -> scalar."""
        return 0.5 * (features - self.centers[labels]).square().sum(dim=1).mean()


def _branches(values: list[Tensor]) -> Tensor:
    """Global loss, or half of it and half of the local losses' mean."""
    return values[0] if len(values) == 1 else 0.5 * values[0] + 0.5 * torch.stack(values[1:]).mean()


class CompositeLoss(nn.Module):
    """Weighted sum of label-smoothed cross-entropy, batch-hard triplet and center loss.

    Args:
        num_classes: Classes C.
        dim: Feature width d.
        ce: Weight of the cross-entropy.
        triplet: Weight of the triplet loss.
        center: Weight of the center loss.
        margin: Triplet margin; 0 is the soft margin.
        label_smoothing: Label smoothing of the cross-entropy.

    Raises:
        ValueError: No weight is above 0.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        ce: float = 1.0,
        triplet: float = 0.0,
        center: float = 0.0005,
        margin: float = 0.3,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if min(ce, triplet, center) < 0 or ce + triplet + center == 0:
            raise ValueError("loss weights must not be negative, and one of them must be above 0.")
        self.weights = {"ce": ce, "triplet": triplet, "center": center}
        self.margin, self.label_smoothing = margin, label_smoothing
        self.center = CenterLoss(num_classes, dim) if center > 0 else None

    def forward(
        self, logits: Tensor | Sequence[Tensor], features: Tensor | Sequence[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Args:
            logits: (B, C); of a model with local branches a list, the global one first. Global and local branches then
                count half each (TransReID, eq. 5); the center loss is the global branch's.
            features: (B, d) before BNNeck, or a list as for ``logits``.
            labels: (B,) in [0, C).

        Returns:
            The weighted sum, and the unweighted parts by name.
        """
        all_logits = [logits] if isinstance(logits, Tensor) else list(logits)
        all_features = [features] if isinstance(features, Tensor) else list(features)
        parts: dict[str, Tensor] = {}
        if self.weights["ce"]:
            smoothing = self.label_smoothing
            parts["ce"] = _branches([F.cross_entropy(each, labels, label_smoothing=smoothing) for each in all_logits])
        if self.weights["triplet"]:
            margin = self.margin
            parts["triplet"] = _branches([batch_hard_triplet_loss(each, labels, margin=margin) for each in all_features])
        if self.center is not None:
            parts["center"] = self.center(all_features[0], labels)
        total = sum((self.weights[name] * value for name, value in parts.items()), torch.zeros((), device=labels.device))
        return total, parts

    def center_states(self, lr: float) -> dict[str, Any]:
        """Return this loss and its class centers' own SGD, as ``loss`` and ``center_optimizer``, for the checkpoint.

        Args:
            lr: Learning rate of the centers.

        Returns:
            Empty without a center loss, which has no state.
        """
        if self.center is None:
            return {}
        return {"loss": self, "center_optimizer": torch.optim.SGD([self.center.centers], lr=lr)}

    def unscale_center_gradients(self, *, batches: int = 1) -> None:
        """Divide the centers' gradients by the center weight, so that the weight does not slow the centers down.

        Args:
            batches: So many batches' gradients were added up, and their mean is wanted.
        """
        if self.center is not None and self.center.centers.grad is not None:
            self.center.centers.grad.div_(self.weights["center"] * batches)
