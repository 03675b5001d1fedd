"""Neighbour feature centralisation (NFC): every feature moves towards those that it shares a list with.

Shapes: Q queries, G gallery images, d width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .lists import check_numbers, check_protocol, edges, entered, others, ranked, unit_pair
from .neighbours import normalise


def neighbour_centralisation(
    query: Tensor, gallery: Tensor, *, k1: int = 2, k2: int = 2, protocol: str = "transductive"
) -> tuple[Tensor, Tensor]:
    """Add to every feature its mutual neighbours (Yuan et al., "From Poses to Identity" (Pose2ID), CVPR 2025).

    ``x_i = unit(x_i + sum of x_j)`` over the k1 nearest other features j of i that have i among their own k2 nearest others,
    all of unit length and as they were before.

    ``transductive``, as published: the gallery among itself and the queries among themselves. ``inductive``: the gallery
    among itself, and every query among the gallery: with its k1 nearest gallery features whose k2 nearest it would enter;
    so a query's result does not depend on the other queries.

    Args:
        query: (Q, d), any length.
        gallery: (G, d), any length, on the same device.
        k1: Neighbours of a feature.
        k2: Neighbours among which it has to be in turn.
        protocol: ``transductive`` or ``inductive``.

    Returns:
        Queries (Q, d) and gallery (G, d) of unit length, to be ranked by their cosine.

    Raises:
        UserError: Shapes that do not fit, features that are not finite, or parameters out of range.
    """
    inductive = check_protocol(protocol)
    check_numbers(1, k1=k1, k2=k2)
    with torch.no_grad():
        query, gallery = unit_pair(query, gallery)
        centred, thresholds = _centred(gallery, k1, k2)
        if not inductive:
            return _centred(query, k1, k2)[0], centred
        index, _ = ranked(query, gallery, k1)
        back = entered(query, gallery, thresholds)
        back.data[:] = 1
        mutual = edges(index, len(gallery)).multiply(back).tocsr()
        return _sum(query, mutual @ gallery.cpu().numpy()), centred


def _centred(features: Tensor, k1: int, k2: int) -> tuple[Tensor, Tensor]:
    """Centralised features (N, d), and the score of every one's k2-th nearest other (N,)."""
    index, scores = others(features, max(k1, k2))
    forward, back = edges(index[:, :k1], len(features)), edges(index[:, :k2], len(features))
    mutual = forward.multiply(back.T.tocsr()).tocsr()
    return _sum(features, mutual @ features.cpu().numpy()), scores[:, k2 - 1]


def _sum(features: Tensor, added: np.ndarray) -> Tensor:
    return normalise(features + torch.from_numpy(np.ascontiguousarray(added)).to(features))
