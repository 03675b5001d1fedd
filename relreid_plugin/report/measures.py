"""What a report counts over the pairs of a test set: distributions, cameras, numbers of matches, ranked lists.

Shapes: Q queries, G gallery images, B queries of a block, k images of a ranked list, C cameras, n bins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.files import Unreadable
from ..data.images import read_header
from ..engine.scoring import Scorer
from ..errors import UserError
from ..features.sets import TestFeatures
from ..metrics.neighbours import normalise
from .scored import Scored, Target

BINS = 4096  # of the cosine
JUNK_SHOWN = 5
MOST_CAMERAS = 12
"""Gallery cameras up to which mAP is given by camera pair: a test of every one is made."""
_BLOCK_VALUES = 2**22
_MATCH_EDGES = (1, 2, 3, 5, 9, 17, 33)  # smallest number of matches in every group


@dataclass(frozen=True)
class Distributions:
    """Cosines of all pairs that the protocol keeps.

    Attributes:
        edges: (n + 1,) of the bins.
        same, different: (n,) pairs of one identity and of two.
        cameras: Per pair of cameras: query camera, gallery camera, pairs of one, their mean, pairs of two, their mean.
        accepted: Pairs of one and of two at or above a threshold, where one was given.
    """

    edges: np.ndarray
    same: np.ndarray
    different: np.ndarray
    cameras: list[tuple[str, str, int, float | None, int, float | None]]
    accepted: tuple[int, int] | None


def _blocks(count: int, gallery: int) -> Iterator[slice]:
    step = max(1, _BLOCK_VALUES // max(1, gallery))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def distributions(data: TestFeatures, scorer: Scorer, threshold: float | None = None) -> Distributions:
    """Count the cosines of all pairs, in bins and by camera pair.

    Args:
        data: Query and gallery.
        scorer: Says which pairs are none.
        threshold: Cosine of a verifier.
    """
    query, gallery = normalise(data.query.features), normalise(data.gallery.features)
    cameras, codes = np.unique(np.concatenate([data.query.camids, data.gallery.camids]), return_inverse=True)
    own, others = codes[: len(data.query)], codes[len(data.query) :]
    size = len(cameras)
    edges = np.linspace(-1, 1, BINS + 1)
    counts, pairs, sums = np.zeros((2, BINS), np.int64), np.zeros((2, size * size), np.int64), np.zeros((2, size * size))
    accepted = np.zeros(2, np.int64)
    for rows in _blocks(len(query), len(gallery)):
        cosine = (query[rows] @ gallery.T).double().numpy()
        kept = ~scorer.junk(rows)
        same = data.query.pids[rows, None] == data.gallery.pids[None]
        place = np.clip(((cosine + 1) / 2 * BINS).astype(np.int64), 0, BINS - 1)
        pair = own[rows, None] * size + others[None]
        for line, chosen in enumerate((kept & ~same, kept & same)):
            counts[line] += np.bincount(place[chosen], minlength=BINS)
            pairs[line] += np.bincount(pair[chosen], minlength=size * size)
            sums[line] += np.bincount(pair[chosen], weights=cosine[chosen], minlength=size * size)
            if threshold is not None:
                accepted[line] += int((cosine[chosen].astype(np.float32) >= np.float32(threshold)).sum())
    names = {**data.query.camera_names, **data.gallery.camera_names}
    shown = [str(names.get(int(camera), int(camera))) for camera in cameras]
    table: list[tuple[str, str, int, float | None, int, float | None]] = []
    for index in np.flatnonzero(pairs.sum(axis=0)).tolist():
        means = [float(sums[line, index] / pairs[line, index]) if pairs[line, index] else None for line in (1, 0)]
        first, second = shown[index // size], shown[index % size]
        table.append((first, second, int(pairs[1, index]), means[0], int(pairs[0, index]), means[1]))
    found = None if threshold is None else (int(accepted[1]), int(accepted[0]))
    return Distributions(edges, counts[1], counts[0], table, found)


def matches(data: TestFeatures, scorer: Scorer) -> np.ndarray:
    """Return how many gallery images are matches of every query, (Q,)."""
    found = np.zeros(len(data.query), np.int64)
    for rows in _blocks(len(data.query), len(data.gallery)):
        found[rows] = ((data.query.pids[rows, None] == data.gallery.pids[None]) & ~scorer.junk(rows)).sum(axis=1)
    return found


def by_matches(ap: np.ndarray, counts: np.ndarray) -> list[tuple[str, int, float]]:
    """Return mAP by the number of matches: group, queries, mAP; queries without a match are left out."""
    out = []
    for low, high in zip(_MATCH_EDGES, (*_MATCH_EDGES[1:], None)):
        chosen = (counts >= low) & ((counts < high) if high is not None else True) & np.isfinite(ap)
        if chosen.any():
            name = f"{low} or more" if high is None else str(low) if high == low + 1 else f"{low}–{high - 1}"
            out.append((name, int(chosen.sum()), float(ap[chosen].mean())))
    return out


def by_size(ap: np.ndarray, sizes: np.ndarray) -> list[tuple[str, int, float]]:
    """Return mAP by the size of the query images, in up to four groups of about as many: pixels, queries, mAP.

    Args:
        ap: (Q,) NaN for queries without a match, which are left out.
        sizes: (Q, 2) width and height in pixels, 0 where they are unknown, which are left out.
    """
    area = sizes.prod(axis=1)
    known = np.isfinite(ap) & (area > 0)
    if not known.any():
        return []
    edges = np.unique(np.quantile(area[known], [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    group = np.searchsorted(edges, area)
    out = []
    for number in range(len(edges)):
        chosen = known & (group == number)
        small, large = (sizes[chosen][pick(area[chosen])] for pick in (np.argmin, np.argmax))
        ends = dict.fromkeys(f"{width} × {height}" for width, height in (small, large))
        out.append((" to ".join(ends), int(chosen.sum()), float(ap[chosen].mean())))
    return out


def image_sizes(paths: Sequence[str]) -> np.ndarray:
    """Return width and height of image files (N, 2) from their headers; 0 for those that cannot be read."""
    out = np.zeros((len(paths), 2), np.int64)
    for row, path in enumerate(paths):
        with contextlib.suppress(Unreadable):
            out[row] = read_header(path).size
    return out


def by_camera(target: Target, scored: Scored) -> tuple[list[tuple[str, str, int, float]], str]:
    """Return mAP by camera pair, every gallery camera alone: query camera, gallery camera, queries, mAP; and a note.

    The distances are those of the row, where it ranks by a distance; a re-ranking of the part would be another one.
    """
    data = target.data
    assert target.evaluator is not None
    cameras = np.unique(data.gallery.camids)
    if len(cameras) > MOST_CAMERAS:
        return [], f"the gallery has {len(cameras)} cameras; mAP by camera pair is given for up to {MOST_CAMERAS}."
    if scored.metric.reranks:
        return [], "the row is re-ranked among the whole gallery; mAP by camera pair is given for rows without re-ranking."
    names = {**data.query.camera_names, **data.gallery.camera_names}
    out = []
    for camera in cameras.tolist():
        rows = np.flatnonzero(data.gallery.camids == camera)
        part = TestFeatures(data.query, data.gallery.take(rows))
        try:
            result = Scorer(part, target.evaluator.options)(scored.query, scored.gallery[rows], scored.metric)
        except UserError:  # no query has a match by this camera
            continue
        for own in np.unique(data.query.camids).tolist():
            chosen = (data.query.camids == own) & np.isfinite(result.ap)
            if chosen.any():
                pair = str(names.get(own, own)), str(names.get(camera, camera))
                out.append((*pair, int(chosen.sum()), float(result.ap[chosen].mean())))
    return out, ""


@dataclass(frozen=True)
class Lists:
    """The nearest gallery images of every query, discarded ones among them.

    Attributes:
        index: (Q, k') gallery images by rising distance, -1 where nothing is left.
        state: (Q, k') 0: another identity; 1: the query's; 2: discarded by the protocol.
        distance: (Q, k').
    """

    index: np.ndarray
    state: np.ndarray
    distance: np.ndarray


def ranked(target: Target, scored: Scored, topk: int) -> Lists:
    """Return the k nearest images that count, and of the discarded ones the nearest few that lie ahead of the last of them.

    Equal distances are in gallery order, as in the scores.
    """
    assert target.evaluator is not None
    scorer, data = target.evaluator.scorer, target.data
    gallery = len(data.gallery)
    topk, most = min(topk, gallery), min(JUNK_SHOWN, gallery)
    whole = scorer.distances(scored.query, scored.gallery, scored.metric) if scored.metric.reranks else None
    parts: list[list[np.ndarray]] = [[], [], []]
    for rows in _blocks(len(data.query), gallery):
        own = scorer.distances(scored.query[rows], scored.gallery, scored.metric) if whole is None else whole[rows]
        values, junk = own.double().numpy(), scorer.junk(rows)
        real = np.argsort(np.where(junk, np.inf, values), axis=1, kind="stable")[:, :topk]
        waste = np.argsort(np.where(junk, values, np.inf), axis=1, kind="stable")[:, :most]
        there = np.concatenate([~np.take_along_axis(junk, real, 1), np.take_along_axis(junk, waste, 1)], axis=1)
        index = np.concatenate([real, waste], axis=1)
        near = np.where(there, np.take_along_axis(values, index, 1), np.inf)
        last = np.where(there[:, :topk], near[:, :topk], -np.inf).max(axis=1, keepdims=True)
        there[:, topk:] &= near[:, topk:] <= last
        near = np.where(there, near, np.inf)
        order = np.lexsort((index, near), axis=1)
        index, near, there = (np.take_along_axis(value, order, 1) for value in (index, near, there))
        same = data.query.pids[rows, None] == data.gallery.pids[index]
        state = np.where(np.take_along_axis(junk, index, 1), 2, same.astype(np.int64))
        for part, value in zip(parts, (np.where(there, index, -1), state, near)):
            part.append(value)
    return Lists(*(np.concatenate(part) for part in parts))


def first_ranks(scored: Scored) -> list[Any]:
    """Return the rank of the first match of every query, ``None`` without one."""
    first = scored.result.first
    return [None] * len(scored.result.ap) if first is None else [int(value) or None for value in first]
