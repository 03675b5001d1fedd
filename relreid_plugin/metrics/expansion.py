"""Query expansion and database augmentation: features averaged with their nearest gallery features.

Shapes: Q queries, G gallery images, d width, k neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import UserError
from .candidates import exact_scores
from .neighbours import normalise, topk_neighbours


def average_query_expansion(
    query: torch.Tensor, gallery: torch.Tensor, *, k: int = 5, alpha: float = 0.0, include_self: bool = True
) -> torch.Tensor:
    """Average every query with its k nearest gallery features.

    Chum et al., ICCV 2007; with weights (alpha-QE) Radenović et al., TPAMI 2018. The result is
    ``normalise(q + sum_j max(s_j, 0)**alpha g_j)`` over the k gallery features with the largest cosine similarity s_j,
    all of unit length. Every query is alone with the gallery: no query changes another's result. Equal similarities are
    taken in gallery order. A zero vector has no neighbours and stays zero.

    Args:
        query: (Q, d), any length.
        gallery: (G, d), any length, on the same device.
        k: Neighbours; more than G means all of them, 0 only scales the queries.
        alpha: Exponent of the similarity; 0 is the plain average.
        include_self: Whether the query is part of its average (with weight 1).

    Returns:
        (Q, d) of unit length; float64 if either input is, float32 otherwise.

    Raises:
        UserError: Shapes that do not fit, a negative ``k`` or ``alpha``, nothing to average, an empty gallery, or
            features that are not finite.
    """
    query, gallery = _unit(query, gallery, k, alpha)
    if not (k or include_self):
        raise UserError("k is 0 and include_self is False; there is nothing to average.")
    k = min(k, gallery.shape[0])
    index = topk_neighbours(query, gallery, k) if k else query.new_empty((query.shape[0], 0), dtype=torch.long)
    return _average(query, gallery, index, exact_scores(query, gallery, index), alpha, include_self)


def database_augmentation(gallery: torch.Tensor, *, k: int = 5, alpha: float = 0.0) -> torch.Tensor:
    """Average every gallery feature with itself and its k nearest other gallery features.

    Arandjelović and Zisserman, CVPR 2012. All features are averaged from the gallery as it was given. Weights, ties and
    zero vectors are those of :func:`average_query_expansion`.

    Args:
        gallery: (G, d), any length.
        k: Neighbours besides the feature itself; more than G - 1 means all others.
        alpha: Exponent of the similarity; 0 is the plain average.

    Returns:
        (G, d) of unit length; float64 stays, everything else becomes float32.

    Raises:
        UserError: A wrong shape, a negative ``k`` or ``alpha``, an empty gallery, or features that are not finite.
    """
    _, gallery = _unit(gallery, gallery, k, alpha)
    size = gallery.shape[0]
    k = min(k, size - 1)
    index = topk_neighbours(gallery, gallery, k + 1)  # with the feature itself, unless its duplicates crowd it out
    own = torch.arange(size, device=index.device).unsqueeze(1)
    scores = exact_scores(gallery, gallery, index).masked_fill(index == own, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return _average(gallery, gallery, index.gather(1, order), scores.gather(1, order), alpha, True)


class Expansions:
    """Query expansions and database augmentations of the same features with many settings; neighbours are searched once.

    Args:
        query: (Q, d), any length.
        gallery: (G, d), any length.
        k: The most neighbours that will be asked for.

    Raises:
        UserError: See :func:`average_query_expansion`.
    """

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor, *, k: int) -> None:
        self.query, self.gallery = _unit(query, gallery, k, 0.0)
        self._lists = [self._best(self.query, k, alone=False), self._best(self.gallery, k, alone=True)]

    def _best(self, features: torch.Tensor, k: int, *, alone: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, k) gallery rows, best first, and their similarities; ``alone``: without the feature itself."""
        index = topk_neighbours(features, self.gallery, min(k + alone, len(self.gallery))).sort(dim=1).values
        scores = exact_scores(features, self.gallery, index)
        if alone:
            own = torch.arange(len(features), device=index.device).unsqueeze(1)
            scores = scores.masked_fill(index == own, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        kept = min(k, len(self.gallery) - alone)
        return index.gather(1, order)[:, :kept], scores[:, :kept]

    def __call__(self, k: int, alpha: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (Q, d) expanded queries and the (G, d) augmented gallery, of unit length."""
        sides = zip((self.query, self.gallery), self._lists)
        query, gallery = (_average(x, self.gallery, i[:, :k], s[:, :k], alpha, True) for x, (i, s) in sides)
        return query, gallery


def _unit(query: torch.Tensor, gallery: torch.Tensor, k: int, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    for name, value in (("query", query), ("gallery", gallery)):
        if value.dim() != 2:
            raise UserError(f"{name} has shape {tuple(value.shape)}; pass features of shape (n, d).")
    if query.shape[1] != gallery.shape[1]:
        raise UserError(
            f"query has {query.shape[1]} dimensions and gallery has {gallery.shape[1]}; both need the same model."
        )
    if not gallery.shape[0]:
        raise UserError("gallery is empty; expansion needs at least one gallery feature.")
    for name, number in (("k", k), ("alpha", alpha)):
        if number < 0:
            raise UserError(f"{name} is {number}; it must not be negative.")
    dtype = torch.float64 if torch.float64 in (query.dtype, gallery.dtype) else torch.float32
    return normalise(query.detach().to(dtype)), normalise(gallery.detach().to(dtype))


def _average(
    features: torch.Tensor,
    gallery: torch.Tensor,
    index: torch.Tensor,
    scores: torch.Tensor,
    alpha: float,
    include_self: bool,
) -> torch.Tensor:
    """Weighted sum (B, d) of ``gallery[index]`` and, if asked for, ``features``, scaled to unit length."""
    weights = scores.clamp_min(0).pow(alpha).to(gallery.dtype)
    weights *= (features != 0).any(dim=1, keepdim=True)
    total = features.clone() if include_self else torch.zeros_like(features)
    if index.shape[1]:
        total += F.embedding_bag(index, gallery, per_sample_weights=weights, mode="sum")
    return normalise(total)
