"""Chosen identities of a test set on a plane.

Shapes: n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError, did_you_mean
from ..metrics.neighbours import normalise
from ..metrics.plane import on_a_plane
from .scored import Scored, Target

SHOWN = 12
"""Identities that are shown where none are named: those of the lowest mean AP."""
MOST_IMAGES = 25
"""Of an identity."""
_LEAST = 8  # images, below which a plane says nothing


@dataclass(frozen=True)
class IdentityMap:
    """Images of a few identities on a plane.

    Attributes:
        title: The row of the table whose features they are.
        query, gallery: Rows of the images, (n,) together, the queries first.
        place: (n, 2) in [0, 1].
    """

    title: str
    query: np.ndarray
    gallery: np.ndarray
    place: np.ndarray


def identity_maps(target: Target, names: Sequence[str] = ()) -> tuple[list[IdentityMap], list[str]]:
    """Return the identities by the first row's features, and by those of the last row of its protocol where they are others.

    Args:
        target: With scores by query.
        names: Identities, as the table of a query's images calls them; empty: the twelve of the lowest mean AP.

    Returns:
        Up to two maps, none where there are too few images; and why there is none where scikit-learn is missing.

    Raises:
        UserError: An identity is not in the test set.
    """
    data, first = target.data, target.scored[0]
    pids = _named(target, names) if names else _worst(data.query.pids, first.result.ap)
    query, gallery = (_some(part.pids, pids) for part in (data.query, data.gallery))
    count = len(query) + len(gallery)
    if count < _LEAST:
        return [], []
    alike = [one for one in target.scored if one.row.protocol == first.row.protocol and not one.aside]
    rows = [first, *(one for one in alike[-1:] if _other_features(first, one))]
    out = []
    for one in rows:
        values = normalise(torch.cat([one.query[query], one.gallery[gallery]])).double().numpy()
        try:
            found = on_a_plane(values, what="the map of identities")
        except UserError as error:
            return [], [str(error)]
        found = found - found.min(axis=0)
        out.append(IdentityMap(f"{one.row.method} ({one.row.protocol})", query, gallery, found / max(found.max(), 1e-12)))
    return out, []


def _named(target: Target, names: Sequence[str]) -> np.ndarray:
    data = target.data
    known = dict(zip(map(str, data.query.shown(data.query.pids)), data.query.pids.tolist()))
    unknown = [name for name in names if name not in known]
    if unknown:
        remedy = did_you_mean(unknown[0], known)
        raise UserError(f"--identities: '{unknown[0]}' is no identity among the queries of '{target.name}'{remedy}")
    return np.array([known[name] for name in names])


def _worst(pids: np.ndarray, ap: np.ndarray) -> np.ndarray:
    """Identities of the lowest mean AP."""
    valid = np.isfinite(ap)
    unique, place = np.unique(pids[valid], return_inverse=True)
    means = np.bincount(place, weights=ap[valid]) / np.bincount(place)
    return unique[np.argsort(means, kind="stable")[:SHOWN]]


def _some(pids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows of the first few images of every chosen identity."""
    rows = [np.flatnonzero(pids == pid)[:MOST_IMAGES] for pid in chosen.tolist()]
    return np.concatenate([np.zeros(0, np.int64), *rows])


def _other_features(first: Scored, other: Scored) -> bool:
    return first.query.shape != other.query.shape or not torch.equal(first.query, other.query)


__all__ = ["IdentityMap", "identity_maps"]
