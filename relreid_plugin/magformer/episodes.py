"""Held-out test sets made of training identities, as rich as those are and thinner (METHODS 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..data.split import as_test_set
from ..features.sets import Features

_REPEATS = 6  # draws of the folds, at most


@dataclass(frozen=True)
class Episode:
    """A held-out test set, and the features that a head for it may be fitted on."""

    train: Features
    query: Features
    gallery: Features


def _drawn(features: Features, images: int, rng: np.random.Generator) -> Features:
    """Identities drawn until they have about ``images`` images; 0: all."""
    if not images or len(features) <= images:
        return features
    names, own, count = np.unique(features.pids, return_inverse=True, return_counts=True)
    order = rng.permutation(len(names))
    chosen = order[: max(4, int(np.searchsorted(count[order].cumsum(), images)) + 1)]
    return features.take(np.flatnonzero(np.isin(own, chosen)))


def fold_episodes(
    features: Features, *, folds: int = 2, identities: int = 300, images: int = 12000, seed: int = 1
) -> list[Episode]:
    """Let the identities of a training set take turns in being held out.

    Args:
        features: Training features.
        folds: Parts of the identities; each is held out once per draw.
        identities: The parts are drawn anew until so many identities took part, six times at most.
        images: See ``relation.select.images``.
        seed: Draws identities, parts and queries.

    Returns:
        Episodes; none where no part has an identity with images of two cameras, or there are fewer than 2 * ``folds``
        identities.
    """
    rng = np.random.default_rng(seed)
    features = _drawn(features, images, rng)
    names = np.unique(features.pids)
    if len(names) < 2 * folds:
        return []
    out = []
    for _ in range(int(np.clip(-(-identities // len(names)), 1, _REPEATS))):
        order = rng.permutation(len(names))
        for part in range(folds):
            held = np.isin(features.pids, names[order[part::folds]])
            items = [(row, int(features.pids[row]), int(features.camids[row])) for row in np.flatnonzero(held)]
            query, gallery = as_test_set(items, rng)
            if not query:
                continue
            sets = []
            for side in (query, gallery):
                chosen = features.take([item[0] for item in side])
                sets.append(replace(chosen, camids=np.array([item[2] for item in side])))
            out.append(Episode(features.take(np.flatnonzero(~held)), *sets))
    return out


def _one_of_each(gallery: Features, names: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of a gallery in which every name (N,) stands once."""
    order = rng.permutation(len(gallery))
    return np.sort(order[np.unique(names[order], return_index=True)[1]])


def thinned(episode: Episode, rng: np.random.Generator) -> list[Episode]:
    """Return an episode with galleries that are thinner than training identities make them.

    Returns:
        With one image per identity; with one for every second identity; and with one per identity and camera. Queries that
        have no match of another camera left are dropped, and so are episodes without queries.
    """
    gallery, query = episode.gallery, episode.query
    pairs = np.unique(np.stack([gallery.pids, gallery.camids]), axis=1, return_inverse=True)[1].ravel()
    once = _one_of_each(gallery, gallery.pids, rng)
    drawn = rng.permutation(np.unique(gallery.pids))
    whole = np.flatnonzero(np.isin(gallery.pids, drawn[::2]))
    out = []
    for rows in (once, np.union1d(whole, once), _one_of_each(gallery, pairs, rng)):
        part = gallery.take(rows)
        match = (query.pids[:, None] == part.pids) & (query.camids[:, None] != part.camids)
        asked = np.flatnonzero(match.any(axis=1))
        out.append(Episode(episode.train, query.take(asked), part))
    return out


__all__ = ["Episode", "fold_episodes", "thinned"]
