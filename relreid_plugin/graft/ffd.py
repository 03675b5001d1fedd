"""Triplet losses over fused tokens (F) and data tokens (D) of a multimodal model (GraFT, section 4.3; METHODS 3).

Shape letters: B triplets or samples, d feature width.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.losses import CompositeLoss

SCHEMES = tuple("".join(roles) for roles in product("FD", repeat=3))
"""What anchor, positive and negative are: F, the fused token, or D, the mean over modalities of one data token."""
DISTANCES = ("euclidean", "squared")
EPSILON = 1e-12
"""Least squared distance under a root, so that its gradient stays finite."""


def _check(scheme: str, distance: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")


def _rooted(squared: Tensor, distance: str) -> Tensor:
    return squared if distance == "squared" else squared.clamp_min(EPSILON).sqrt()


def role_triplet_loss(
    fused: tuple[Tensor, Tensor, Tensor],
    data: tuple[Tensor, Tensor, Tensor],
    *,
    scheme: str = "FFD",
    distance: str = "euclidean",
) -> Tensor:
    """Soft-margin triplet loss log(1 + exp(D(a, p) - D(a, n))) of given triplets (GraFT, eqs. 8 and 12).

    Args:
        fused: Fused tokens (B, d) of anchors, positives and negatives.
        data: Their data tokens (B, d), averaged over the modalities.
        scheme: One of :data:`SCHEMES`: which of the two stands for anchor, positive and negative.
        distance: ``euclidean`` (released code) or ``squared`` (paper, eq. 8).

    Returns:
        Scalar, the mean over the triplets.

    Raises:
        ValueError: Unknown scheme or distance.
    """
    _check(scheme, distance)
    anchor, positive, negative = (fused[role] if letter == "F" else data[role] for role, letter in enumerate(scheme))
    near = _rooted((anchor - positive).square().sum(dim=1), distance)
    far = _rooted((anchor - negative).square().sum(dim=1), distance)
    return F.softplus(near - far).mean()


def mined_triplet_loss(
    fused: Tensor, data: Tensor, labels: Tensor, *, scheme: str = "FFD", distance: str = "euclidean"
) -> Tensor:
    """The same with triplets mined in the batch: for every anchor its farthest positive and its nearest negative.

    Args:
        fused: (B, d) fused tokens.
        data: (B, d) data tokens, averaged over the modalities.
        labels: (B,) identities; a batch holds several samples per identity.
        scheme: One of :data:`SCHEMES`.
        distance: ``euclidean`` or ``squared``.

    Returns:
        Scalar, the mean over anchors with a positive (another sample) and a negative; 0 without gradient where there is
        none.

    Raises:
        ValueError: Unknown scheme or distance.
    """
    _check(scheme, distance)
    anchor, positive, negative = (fused if letter == "F" else data for letter in scheme)
    same = labels.unsqueeze(1) == labels.unsqueeze(0)
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    near = _rooted(_squared(anchor, positive), distance).masked_fill(~(same & other), float("-inf")).amax(dim=1)
    far = _rooted(_squared(anchor, negative), distance).masked_fill(same, float("inf")).amin(dim=1)
    valid = torch.isfinite(near) & torch.isfinite(far)
    if not bool(valid.any()):
        return (fused.sum() + data.sum()) * 0.0
    return F.softplus(near[valid] - far[valid]).mean()


def _squared(left: Tensor, right: Tensor) -> Tensor:
    """(B, d), (B, d) -> (B, B) squared distances, not negative."""
    squared = left.square().sum(dim=1).unsqueeze(1) + right.square().sum(dim=1).unsqueeze(0) - 2.0 * left @ right.t()
    return squared.clamp_min(0.0)


class GraFTLoss(CompositeLoss):
    """Weighted sum of cross-entropy, triplet loss over fused and data tokens, and center loss (GraFT, eq. 10).

    Given triplets, cross-entropy and center loss are the anchors'; with mining they are all samples'.

    Args:
        num_classes: Classes C.
        dim: Feature width d.
        mined: Mine triplets in the batch instead of taking the first, second and last third of it as anchors, positives
            and negatives.
        scheme: One of :data:`SCHEMES`.
        distance: One of :data:`DISTANCES`.
        **weights: ``ce``, ``triplet``, ``center``, ``label_smoothing`` of :class:`CompositeLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        mined: bool = False,
        scheme: str = "FFD",
        distance: str = "euclidean",
        **weights: float,
    ) -> None:
        super().__init__(num_classes, dim, **weights)
        _check(scheme, distance)
        self.mined, self.scheme, self.distance = mined, scheme, distance

    def fused_loss(self, logits: Tensor, fused: Tensor, data: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Args:
            logits: (B, C) of the classified samples: all, or the anchors.
            fused: (B, d), or (3 B, d) with given triplets.
            data: As ``fused``.
            labels: (B,), or (3 B,) with given triplets.

        Returns:
            The weighted sum, and the unweighted parts by name.
        """
        parts: dict[str, Tensor] = {}
        count = len(logits)
        own = labels[:count]
        if self.weights["ce"]:
            parts["ce"] = F.cross_entropy(logits, own, label_smoothing=self.label_smoothing)
        if self.weights["triplet"]:
            options = {"scheme": self.scheme, "distance": self.distance}
            if self.mined:
                parts["triplet"] = mined_triplet_loss(fused, data, labels, **options)
            else:
                thirds, others = fused.view(3, count, -1), data.view(3, count, -1)
                parts["triplet"] = role_triplet_loss(
                    (thirds[0], thirds[1], thirds[2]), (others[0], others[1], others[2]), **options
                )
        if self.center is not None:
            parts["center"] = self.center(fused[:count], own)
        total = sum((self.weights[name] * value for name, value in parts.items()), torch.zeros((), device=labels.device))
        return total, parts
