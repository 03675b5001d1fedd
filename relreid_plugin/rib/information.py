"""The information bottleneck bound IBB as pure functions (RIB; METHODS 2).

Shape letters: n samples, d width, C classes (as many clusters of features, a, and of inputs, b).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.neighbours import normalise


def input_descriptor(images: Tensor, grid: tuple[int, int] = (16, 8)) -> Tensor:
    """Return the fixed descriptor of an input image: every channel averaged to a coarse grid.

    Args:
        images: (n, 3, h, w), normalised as the network sees them.
        grid: Rows and columns.

    Returns:
        (n, 3 * rows * columns) float32, without gradient.
    """
    return F.adaptive_avg_pool2d(images.detach().float(), grid).flatten(1)


def soft_assignment(vectors: Tensor, centroids: Tensor, *, beta: float = 1.0, seen: Tensor | None = None) -> Tensor:
    """Return the logarithm of the soft assignment phi(v, a) = softmax_a(-beta ||v/||v|| - c_a||^2).

    ||v/||v||||^2 is the same for every a and cancels in the softmax, so one matrix product does it.

    Args:
        vectors: (n, d); their length does not matter.
        centroids: (C, d).
        beta: Sharpness.
        seen: (C,) bool; clusters without a centroid yet get probability 0. ``None``: all have one.

    Returns:
        (n, C) log phi; minus infinity for clusters that were not seen.
    """
    logits = beta * (2.0 * normalise(vectors) @ centroids.t() - centroids.square().sum(dim=1))
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    return logits.log_softmax(dim=1)


def ib_bound_terms(log_phi_f: Tensor, log_phi_x: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two terms of IBB per sample.

    The first one, sum_b phi(X_i, b) log phi(X_i, b) * sum_a phi(F_i, a), has no gradient with respect to the features,
    because sum_a phi(F_i, a) = 1; it is computed without one. The double sum over a and b is never formed: O(n C).

    Args:
        log_phi_f: (n, C) log assignment of the features.
        log_phi_x: (n, C) log assignment of the inputs.
        log_q: (n, C) rows log Q(. | y_i).

    Returns:
        (n,) first terms, at most 0; (n,) second terms -sum_a phi(F_i, a) log Q(a | y_i).
    """
    with torch.no_grad():
        first = -torch.special.entr(log_phi_x.exp()).sum(dim=1)
    return first, -(log_phi_f.exp() * log_q).sum(dim=1)


def ib_bound(log_phi_f: Tensor, log_phi_x: Tensor, log_q: Tensor) -> Tensor:
    """Return IBB, the mean over the samples of both terms of :func:`ib_bound_terms`; I(F;X) - I(F;Y) <= IBB + H(b)."""
    first, second = ib_bound_terms(log_phi_f, log_phi_x, log_q)
    return first.mean() + second.mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of a distribution in nats; 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum()


def mutual_information(joint: Tensor) -> Tensor:
    """Return the mutual information of a joint distribution (A, B) in nats."""
    return entropy(joint.sum(dim=1)) + entropy(joint.sum(dim=0)) - entropy(joint)
