"""Same or not: ROC, equal error rate and rates at a threshold over all pairs of queries and gallery images; open-set search.

Shapes: Q queries, G gallery images, d width, P pairs of one identity, N pairs of two, I query identities, T thresholds.

Pairs that the protocol discards (the query's identity and camera, or its own file) are no pairs. A pair is accepted where
its score is at least the threshold: the true-match rate (TPR) is the share of P that is accepted, the false-match rate (FPR)
that of N. The best TPR at any FPR is reached at the score of a pair of one identity; so the scores of the P pairs are kept,
and the N pairs are only counted between them, a block of queries at a time. Nothing is binned or sampled.

Intervals are percentiles of a bootstrap over the identities of the queries (all pairs of an identity come and go together),
at up to :data:`GRID` of the P scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import UserError

RATES = (1e-2, 1e-3, 1e-4)
"""False-match rates of tables."""
GRID = 2048
REPEATS = 1000
SEED = 0
_BLOCK_VALUES = 2**22

Scores = Callable[[slice], Tensor]
"""Rows of queries to their scores (B, G); larger is more alike."""
Junk = Callable[[slice], np.ndarray]
"""Rows of queries to the pairs that are none, (B, G) bool."""


@dataclass(frozen=True)
class Rate:
    """A rate with its interval.

    Attributes:
        value: In [0, 1].
        low, high: Ends of the 95 % interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verification:
    """How well a threshold tells pairs of one identity from pairs of two.

    Attributes:
        thresholds: (T,) falling scores of pairs of one identity.
        tpr, fpr: (T,) rates of accepted pairs at every threshold.
        positives, negatives, identities: P, N, I.
        eer: Smallest rate that FPR and 1 - TPR can both be kept at.
        at: By false-match rate: the best TPR at no more than it.
        top: The largest score of all pairs.
    """

    thresholds: np.ndarray
    tpr: np.ndarray
    fpr: np.ndarray
    positives: int
    negatives: int
    identities: int
    eer: Rate
    at: dict[float, Rate]
    top: float = 1.0

    def threshold(self, rate: float) -> tuple[float, float, float]:
        """Return the threshold with the best TPR at a false-match rate of at most ``rate``, its FPR and its TPR.

        Where no pair of one identity can be accepted at that rate, the threshold is above all scores.
        """
        kept = np.flatnonzero(self.fpr <= rate)
        if not len(kept):
            return float(np.nextafter(np.float32(self.top), np.float32(np.inf))), 0.0, 0.0
        last = int(kept[-1])
        return float(self.thresholds[last]), float(self.fpr[last]), float(self.tpr[last])

    def as_dict(self) -> dict[str, object]:
        """Return EER and rates with their intervals, for JSON."""
        rates = {f"{rate:g}": [value.value, value.low, value.high] for rate, value in self.at.items()}
        return {
            "eer": [self.eer.value, self.eer.low, self.eer.high],
            "tpr": rates,
            "positives": self.positives,
            "negatives": self.negatives,
            "identities": self.identities,
        }


def cosine_scores(query: Tensor, gallery: Tensor) -> Scores:
    """Return the scores of unit features (Q, d) and (G, d): their cosine."""
    return lambda rows: query[rows] @ gallery.T


def _blocks(count: int, gallery: int) -> Iterator[slice]:
    step = max(1, _BLOCK_VALUES // max(1, gallery))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def verify(
    scores: Scores,
    query_pids: np.ndarray,
    gallery_pids: np.ndarray,
    *,
    junk: Junk | None = None,
    rates: Sequence[float] = RATES,
    repeats: int = REPEATS,
    seed: int = SEED,
) -> Verification:
    """Return ROC, EER and the TPR at false-match rates over all pairs, in memory of a block and the P scores.

    Args:
        scores: Of blocks of queries; called twice for every block.
        query_pids: (Q,).
        gallery_pids: (G,).
        junk: Pairs that are none; ``None``: all are.
        rates: False-match rates.
        repeats: Draws of the bootstrap.
        seed: Of these draws.

    Raises:
        UserError: No pair of one identity, or none of two, or scores that are not finite.
    """
    query_pids, gallery_pids = np.asarray(query_pids), np.asarray(gallery_pids)
    names, owner = np.unique(query_pids, return_inverse=True)
    owner = owner.reshape(-1)
    found, whose = [], []
    for rows in _blocks(len(query_pids), len(gallery_pids)):
        block, same, _ = _block(scores, rows, query_pids, gallery_pids, junk)
        found.append(block[same])
        whose.append(np.broadcast_to(owner[rows, None], same.shape)[same])
    positive, of = np.concatenate(found or [np.zeros(0)]), np.concatenate(whose or [np.zeros(0, int)])
    if not len(positive):
        raise UserError("there is no pair of one identity among queries and gallery, so nothing can be verified.")
    thresholds, place = np.unique(positive, return_inverse=True)  # rising
    place, size = place.reshape(-1), len(thresholds)
    grid = np.unique(np.linspace(0, size - 1, min(size, GRID)).round().astype(np.int64))
    coarse = np.searchsorted(grid, np.arange(size), side="right")  # thresholds of the grid at or below each one
    false, total = np.zeros(size + 1, np.int64), np.zeros(len(names), np.int64)
    width, top = len(grid) + 1, float(thresholds[-1])
    false_of = np.zeros(len(names) * width, np.int64)
    for rows in _blocks(len(query_pids), len(gallery_pids)):
        block, _, other = _block(scores, rows, query_pids, gallery_pids, junk)
        total += np.bincount(owner[rows], weights=other.sum(axis=1), minlength=len(names)).astype(np.int64)
        value = block[other]
        top = max(top, float(value.max(initial=top)))
        # thresholds at or below a score: it is accepted by them
        accepted = np.searchsorted(thresholds, value, side="right")
        false += np.bincount(accepted, minlength=size + 1)
        own = np.broadcast_to(owner[rows, None], other.shape)[other]
        steps = np.concatenate([[0], coarse])[accepted]
        false_of += np.bincount(own * width + steps, minlength=len(false_of))
    negatives = int(total.sum())
    if not negatives:
        raise UserError("there is no pair of two identities among queries and gallery, so nothing can be verified.")
    fpr = _at_least(false)[1:] / negatives
    tpr = _at_least(np.bincount(place + 1, minlength=size + 1))[1:] / len(positive)
    true_of = np.bincount(of * width + coarse[place], minlength=len(names) * width)
    drawn = _bootstrap(true_of.reshape(-1, width), false_of.reshape(-1, width), rates, repeats, seed)

    def rate(value: float, draws: np.ndarray) -> Rate:
        usable = draws[~np.isnan(draws)]
        low, high = np.percentile(usable, [2.5, 97.5]) if len(usable) else (np.nan, np.nan)
        return Rate(value, float(low), float(high))

    return Verification(
        thresholds[::-1].copy(),
        tpr[::-1].copy(),
        fpr[::-1].copy(),
        len(positive),
        negatives,
        len(np.unique(of)),
        rate(float(np.maximum(fpr, 1 - tpr).min()), drawn[0]),
        {wanted: rate(_best(tpr, fpr, wanted), draws) for wanted, draws in zip(rates, drawn[1:])},
        top,
    )


def _block(
    scores: Scores, rows: slice, query_pids: np.ndarray, gallery_pids: np.ndarray, junk: Junk | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of some queries, their pairs of one identity and of two."""
    block = scores(rows).float().cpu().numpy()
    if not np.isfinite(block).all():
        raise UserError("scores of pairs hold NaN or infinity; check the features that they come from.")
    same = query_pids[rows, None] == gallery_pids[None]
    pairs = np.ones_like(same) if junk is None else ~junk(rows)
    return block, same & pairs, ~same & pairs


def _at_least(counts: np.ndarray) -> np.ndarray:
    """Counts by the number of thresholds that accept -> how many every threshold accepts."""
    return counts[::-1].cumsum()[::-1]


def _best(tpr: np.ndarray, fpr: np.ndarray, rate: float) -> float:
    kept = tpr[fpr <= rate]
    return float(kept.max()) if len(kept) else 0.0


def _bootstrap(true_of: np.ndarray, false_of: np.ndarray, rates: Sequence[float], repeats: int, seed: int) -> np.ndarray:
    """(1 + rates, repeats) EER and TPR of identities drawn with replacement, from their counts (I, T + 1)."""
    rng, count = np.random.default_rng(seed), len(true_of)
    out = np.full((1 + len(rates), repeats), np.nan)
    accepted = [
        np.ascontiguousarray(part[:, ::-1].cumsum(axis=1)[:, ::-1]).astype(np.float64) for part in (true_of, false_of)
    ]
    step = max(1, _BLOCK_VALUES // max(1, accepted[0].shape[1]))
    for start in range(0, repeats, step):
        size = min(step, repeats - start)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        true, false = (weights @ part for part in accepted)
        with np.errstate(invalid="ignore", divide="ignore"):
            tpr, fpr = true[:, 1:] / true[:, :1], false[:, 1:] / false[:, :1]
        broken = ~(np.isfinite(tpr).all(axis=1) & np.isfinite(fpr).all(axis=1))
        eer = np.maximum(fpr, 1 - tpr).min(axis=1)
        values = [eer, *(np.where(fpr <= rate, tpr, 0.0).max(axis=1) for rate in rates)]
        for line, value in zip(out, values):
            line[start : start + size] = np.where(broken, np.nan, value)
    return out


# --- open-set search --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OpenSet:
    """Search for identities some of which are not in the gallery (Phillips, Grother and Micheals, 2011).

    Attributes:
        mated, strangers: Queries whose identity is in the gallery, and queries whose is not.
        at: By false-alarm rate (FAR): threshold, the FAR it has, and the detection and identification rate (DIR).
    """

    mated: int
    strangers: int
    at: dict[float, tuple[float, float, float]]


def open_set(
    scores: Scores,
    query_pids: np.ndarray,
    gallery_pids: np.ndarray,
    *,
    junk: Junk | None = None,
    rank: int = 1,
    rates: Sequence[float] = (1e-1, 1e-2),
) -> OpenSet:
    """Return the detection and identification rate at false-alarm rates.

    A query whose identity is in the gallery is detected and identified where a gallery image of its identity is among the
    ``rank`` best ones and scores at least the threshold. One whose identity is not there is a false alarm where its best
    score reaches the threshold. Equal scores keep the gallery's order.

    Args:
        scores: As of :func:`verify`.
        query_pids: (Q,).
        gallery_pids: (G,).
        junk: Pairs that are none.
        rank: How deep a match may lie.
        rates: False-alarm rates.

    Raises:
        UserError: All queries are in the gallery, or none is.
    """
    if not all(0 <= rate < 1 for rate in rates):
        raise UserError(f"false-alarm rates are {list(rates)}; they must lie in [0, 1).")
    query_pids, gallery_pids = np.asarray(query_pids), np.asarray(gallery_pids)
    matched, alarms = [], []
    for rows in _blocks(len(query_pids), len(gallery_pids)):
        block, same, other = _block(scores, rows, query_pids, gallery_pids, junk)
        block = np.where(same | other, block, -np.inf)
        best = np.where(same, block, -np.inf)
        place, top = best.argmax(axis=1), best.max(axis=1)
        before = np.arange(block.shape[1])[None] < place[:, None]
        ahead = ((block > top[:, None]) | ((block == top[:, None]) & before)).sum(axis=1)
        mated = same.any(axis=1)
        matched.append(np.where(ahead < rank, top, -np.inf)[mated])
        alarms.append(block.max(axis=1)[~mated])
    hits, strangers = np.concatenate(matched), np.sort(np.concatenate(alarms))[::-1]
    if not len(hits) or not len(strangers):
        raise UserError(
            f"open-set search needs queries that are in the gallery and others; there are {len(hits)} and {len(strangers)}."
        )
    at = {}
    for rate in rates:
        allowed = int(np.floor(rate * len(strangers) + 1e-9))
        # above the score of the first stranger that is one too many
        threshold = float(np.nextafter(np.float32(strangers[allowed]), np.float32(np.inf)))
        alarm = float((strangers >= threshold).mean())
        at[rate] = (threshold, alarm, float((hits >= threshold).mean()))
    return OpenSet(len(hits), len(strangers), at)


__all__ = ["GRID", "RATES", "OpenSet", "Rate", "Verification", "cosine_scores", "open_set", "verify"]
