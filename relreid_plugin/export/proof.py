"""The proof that an exported file is the same model: cosines of features, the ranking's scores, and first places.

Shape letters: n images, Q queries, G gallery images, d width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.scoring import EvaluationOptions, Scorer
from ..errors import UserError
from ..features.sets import TestFeatures
from ..metrics.ranking import evaluate_ranking

COSINE = {"float32": 0.9999, "fp16": 0.999, "int8": 0.9}
"""Least cosine of an image's two features: of every image in float32, of their mean in lower precision."""
LOSS = {"float32": 0.01, "fp16": 0.5, "int8": 2.0}
"""Largest loss of mAP, in points; in float32 also the largest gain, beyond what ties make of it."""
TIE = 1e-5
"""Gallery images whose distances to a query differ by less share a place; times the mean distance where that is above 1."""
VAGUE = 5.0
"""Points of mAP: where ties alone make more of a difference, the images do not prove much about the ranking."""
_ROWS = 1024


@dataclass(frozen=True)
class Comparison:
    """Features of the same images, by the model itself and by an exported file.

    Attributes:
        images: How many were compared.
        min_cosine, mean_cosine: Of an image's two features.
        queries: Queries that were ranked.
        other_first: Those of them with another first place, ties left out.
        ties: Those whose first place changed among equals (:data:`TIE`).
        mAP, R1: Of the model and of the file, in percent; ``None``: the images have no identities to score by.
        span: The least and the largest mAP that the model has when all ties go against it, and for it.
    """

    images: int
    min_cosine: float
    mean_cosine: float
    queries: int
    other_first: int
    ties: int
    mAP: tuple[float, float] | None = None
    R1: tuple[float, float] | None = None
    span: tuple[float, float] | None = None


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine (n,), float64, of rows (n, d); of two rows of zeros it is 1."""
    first, second = first.double(), second.double()
    norms = first.norm(dim=1) * second.norm(dim=1)
    found = (first * second).sum(dim=1) / norms.clamp_min(1e-300)
    return torch.where((first.norm(dim=1) == 0) & (second.norm(dim=1) == 0), torch.ones_like(found), found)


def _tie(distances: Tensor) -> float:
    return TIE * max(1.0, float(distances.abs().mean()))


def first_places(scorer: Scorer, own: TestFeatures, other: TestFeatures) -> tuple[int, int]:
    """Return how many queries have another first place under other features of the same images, and how many tie.

    Gallery images that the protocol discards have no place.
    """
    metric = scorer.metric()
    changed = ties = 0
    tie = _tie(scorer.distances(own.query.features[:_ROWS], own.gallery.features, metric))
    for start in range(0, len(own.query), _ROWS):
        rows = slice(start, start + _ROWS)
        junk = torch.from_numpy(scorer.junk(rows))
        places = []
        for features in (own, other):
            distances = scorer.distances(features.query.features[rows], features.gallery.features, metric)
            places.append(distances.double().masked_fill(junk, float("inf")))
        ranked = torch.isfinite(places[0]).any(dim=1)
        winners = places[1].argmin(dim=1, keepdim=True)
        gap = places[0].gather(1, winners).squeeze(1) - places[0].amin(dim=1)
        differs = ranked & (winners.squeeze(1) != places[0].argmin(dim=1))
        same = differs & (gap <= tie)
        ties += int(same.sum())
        changed += int((differs & ~same).sum())
    return changed, ties


def compare(own: TestFeatures, other: TestFeatures, *, options: EvaluationOptions | None = None) -> Comparison:
    """Compare features of the same images.

    Args:
        own: By the model itself.
        other: By the exported file, in the same order.
        options: How they are ranked; ``None``: by cosine.

    Raises:
        UserError: Widths differ, or features are not finite.
    """
    options = options or EvaluationOptions(metric="cosine")
    for name in ("query", "gallery"):
        mine, theirs = getattr(own, name).features, getattr(other, name).features
        if mine.shape != theirs.shape:
            raise UserError(
                f"the exported file gives features of shape {tuple(theirs.shape)} for images of which the model gives "
                f"{tuple(mine.shape)}."
            )
        broken = int((~torch.isfinite(theirs).all(dim=1)).sum())
        if broken:
            raise UserError(f"{broken} of {len(theirs)} features of the exported file hold NaN or infinity.")
    similar = torch.cat(
        [cosines(getattr(own, name).features, getattr(other, name).features) for name in ("query", "gallery")]
    )
    scorer = Scorer(own, options)
    changed, ties = first_places(scorer, own, other)
    scores = [_scores(scorer, features) for features in (own, other)]
    mean_ap = rank1 = span = None
    if scores[0] is not None and scores[1] is not None:
        mean_ap, rank1 = (scores[0].mAP, scores[1].mAP), (scores[0].R1, scores[1].R1)
        span = scores[0].span
    return Comparison(
        images=len(own.gallery) if own.query.paths and own.query.paths == own.gallery.paths else len(similar),
        min_cosine=float(similar.min()),
        mean_cosine=float(similar.mean()),
        queries=len(own.query),
        other_first=changed,
        ties=ties,
        mAP=mean_ap,
        R1=rank1,
        span=span,
    )


@dataclass(frozen=True)
class _Scores:
    """mAP and R1 in percent, and the least and largest mAP of distances that differ by less than a tie."""

    mAP: float
    R1: float
    span: tuple[float, float]


def _scores(scorer: Scorer, features: TestFeatures) -> _Scores | None:
    """The scores of features; ``None`` where no query has a match."""
    query, gallery = features.query, features.gallery
    match = torch.from_numpy(query.pids[:, None] == gallery.pids[None])
    if not bool((match & ~torch.from_numpy(scorer.junk(slice(None)))).any()):
        return None
    distances = scorer.distances(query.features, gallery.features, scorer.metric()).double()
    tie = _tie(distances)
    found = [evaluate_ranking(distances + shift * match, **scorer.labels) for shift in (0.0, tie, -tie)]
    values = [100.0 * float(result.mAP) for result in found]
    return _Scores(values[0], 100.0 * float(found[0].rank(1)), (values[1], values[2]))


def judge(comparison: Comparison, precision: str, *, most_loss: float | None = None) -> list[str]:
    """Return why an exported file is not accepted; empty: it is.

    Args:
        comparison: Of its features with the model's.
        precision: ``float32``, ``fp16`` or ``int8``.
        most_loss: Largest loss of mAP in points, instead of that of :data:`LOSS`; for ``fp16`` and ``int8``.
    """
    exact = precision == "float32"
    value = comparison.min_cosine if exact else comparison.mean_cosine
    reasons = []
    if not value >= COSINE[precision]:
        which = "the least" if exact else "the mean"
        reasons.append(f"{which} cosine of features is {value:.6f}, below {COSINE[precision]}")
    if comparison.mAP is not None:
        low, high = comparison.span or (comparison.mAP[0], comparison.mAP[0])
        bound = LOSS[precision] if exact or most_loss is None else most_loss
        if comparison.mAP[1] < low - bound or (exact and comparison.mAP[1] > high + bound):
            reasons.append(
                f"mAP is {comparison.mAP[1]:.2f} instead of {comparison.mAP[0]:.2f}, more than {bound:g} points off"
            )
    if exact and comparison.other_first:
        reasons.append(f"{comparison.other_first} of {comparison.queries} queries have another first place")
    return reasons


def doubts(comparison: Comparison) -> list[str]:
    """Return what a user should know of a comparison that was accepted."""
    notes = []
    if comparison.mAP is None:
        notes.append("no query has a match among these images, so that first places are compared, and no mAP")
    if comparison.span is not None and comparison.span[1] - comparison.span[0] > VAGUE:
        notes.append(
            f"the model tells these images hardly apart (ties alone move its mAP from {comparison.span[0]:.1f} to "
            f"{comparison.span[1]:.1f}), so that they prove little about the ranking"
        )
    return notes


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison for the proof."""
    found = asdict(comparison)
    for name in ("mAP", "R1"):
        pair = found.pop(name)
        found[name] = None if pair is None else {"model": round(pair[0], 4), "exported": round(pair[1], 4)}
    span = found.pop("span")
    found["mAP_of_ties"] = None if span is None else [round(each, 4) for each in span]
    return found


__all__ = ["COSINE", "LOSS", "TIE", "Comparison", "as_json", "compare", "cosines", "doubts", "first_places", "judge"]
