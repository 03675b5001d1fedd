"""Triplet losses over fused tokens (F) and data tokens (D) of a multimodal model (GraFT, section 4.3; METHODS 3).

Shape letters: B triplets or samples, d feature width.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.losses import CompositeLoss
from .gaps import TripletGaps

SCHEMES = tuple("".join(roles) for roles in product("FD", repeat=3))
"""What anchor, positive and negative are: F, the fused token, or D, the mean over modalities of one data token."""
DISTANCES = ("euclidean", "squared")
TOKENS = ("raw", "unit", "centred")
"""Tokens as distances are taken between them: as the encoders give them (paper); each of length 1; fused tokens less the
mean fused token of the batch, and data tokens less the mean data token."""
EPSILON = 1e-12
"""Least squared distance under a root, so that its gradient stays finite."""


def _check(scheme: str, distance: str, tokens: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {tokens!r}")


def _placed(values: Tensor, tokens: str) -> Tensor:
    """(B, d) tokens of one kind -> the same as ``tokens`` says, see :data:`TOKENS`."""
    if tokens == "centred":
        return values - values.mean(dim=0)
    return F.normalize(values, dim=1) if tokens == "unit" else values


def _rooted(squared: Tensor, distance: str) -> Tensor:
    return squared if distance == "squared" else squared.clamp_min(EPSILON).sqrt()


def role_distances(
    fused: tuple[Tensor, Tensor, Tensor],
    data: tuple[Tensor, Tensor, Tensor],
    *,
    scheme: str = "FFD",
    distance: str = "euclidean",
    tokens: str = "raw",
) -> tuple[Tensor, Tensor]:
    """Distances of given triplets.

    Args:
        fused: Fused tokens (B, d) of anchors, positives and negatives.
        data: Their data tokens (B, d), averaged over the modalities.
        scheme: One of :data:`SCHEMES`: which of the two stands for anchor, positive and negative.
        distance: ``euclidean`` (released code) or ``squared`` (paper, eq. 8).
        tokens: One of :data:`TOKENS`; with ``centred`` the mean is that of all 3 B samples.

    Returns:
        (B,) distances of the anchors to their positives, and (B,) to their negatives.

    Raises:
        ValueError: Unknown scheme, distance or tokens.
    """
    _check(scheme, distance, tokens)
    kinds = {"F": _placed(torch.cat(fused), tokens).chunk(3), "D": _placed(torch.cat(data), tokens).chunk(3)}
    anchor, positive, negative = (kinds[letter][role] for role, letter in enumerate(scheme))
    near = _rooted((anchor - positive).square().sum(dim=1), distance)
    far = _rooted((anchor - negative).square().sum(dim=1), distance)
    return near, far


def mined_distances(
    fused: Tensor, data: Tensor, labels: Tensor, *, scheme: str = "FFD", distance: str = "euclidean", tokens: str = "raw"
) -> tuple[Tensor, Tensor]:
    """Distances of triplets mined in the batch: for every anchor its farthest positive and its nearest negative.

    Args:
        fused: (B, d) fused tokens.
        data: (B, d) data tokens, averaged over the modalities.
        labels: (B,) identities; a batch holds several samples per identity.
        scheme: One of :data:`SCHEMES`.
        distance: ``euclidean`` or ``squared``.
        tokens: One of :data:`TOKENS`.

    Returns:
        (n,) distances to the positives and (n,) to the negatives, of the n anchors that have both.

    Raises:
        ValueError: Unknown scheme, distance or tokens.
    """
    _check(scheme, distance, tokens)
    kinds = {"F": _placed(fused, tokens), "D": _placed(data, tokens)}
    anchor, positive, negative = (kinds[letter] for letter in scheme)
    same = labels.unsqueeze(1) == labels.unsqueeze(0)
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    near = _rooted(_squared(anchor, positive), distance).masked_fill(~(same & other), float("-inf")).amax(dim=1)
    far = _rooted(_squared(anchor, negative), distance).masked_fill(same, float("inf")).amin(dim=1)
    valid = torch.isfinite(near) & torch.isfinite(far)
    return near[valid], far[valid]


def soft_margin(near: Tensor, far: Tensor) -> Tensor:
    """Mean of log(1 + exp(D(a, p) - D(a, n))) over triplets (n,), (n,); 0 without a triplet (GraFT, eq. 8)."""
    return F.softplus(near - far).sum() / max(1, len(near))


def role_triplet_loss(
    fused: tuple[Tensor, Tensor, Tensor],
    data: tuple[Tensor, Tensor, Tensor],
    *,
    scheme: str = "FFD",
    distance: str = "euclidean",
    tokens: str = "raw",
) -> Tensor:
    """Soft-margin triplet loss of given triplets (GraFT, eqs. 8 and 12): see :func:`role_distances`.

    Returns:
        Scalar, the mean over the triplets.

    Raises:
        ValueError: Unknown scheme, distance or tokens.
    """
    return soft_margin(*role_distances(fused, data, scheme=scheme, distance=distance, tokens=tokens))


def mined_triplet_loss(
    fused: Tensor, data: Tensor, labels: Tensor, *, scheme: str = "FFD", distance: str = "euclidean", tokens: str = "raw"
) -> Tensor:
    """The same with triplets mined in the batch: see :func:`mined_distances`.

    Returns:
        Scalar, the mean over anchors with a positive (another sample) and a negative; 0 with a gradient of 0 where there is
        none.

    Raises:
        ValueError: Unknown scheme, distance or tokens.
    """
    return soft_margin(*mined_distances(fused, data, labels, scheme=scheme, distance=distance, tokens=tokens))


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
        tokens: One of :data:`TOKENS`.
        **weights: ``ce``, ``triplet``, ``center``, ``label_smoothing`` of :class:`CompositeLoss`.

    Attributes:
        gaps: The distances of the triplets since it was last asked.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        mined: bool = False,
        scheme: str = "FFD",
        distance: str = "euclidean",
        tokens: str = "raw",
        **weights: float,
    ) -> None:
        super().__init__(num_classes, dim, **weights)
        _check(scheme, distance, tokens)
        self.mined, self.scheme, self.distance, self.tokens = mined, scheme, distance, tokens
        self.gaps = TripletGaps()

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
            options = {"scheme": self.scheme, "distance": self.distance, "tokens": self.tokens}
            if self.mined:
                near, far = mined_distances(fused, data, labels, **options)
            else:
                thirds, others = fused.view(3, count, -1), data.view(3, count, -1)
                near, far = role_distances((thirds[0], thirds[1], thirds[2]), (others[0], others[1], others[2]), **options)
            self.gaps.add(near, far)
            parts["triplet"] = soft_margin(near, far)
        if self.center is not None:
            parts["center"] = self.center(fused[:count], own)
        total = sum((self.weights[name] * value for name, value in parts.items()), torch.zeros((), device=labels.device))
        return total, parts
