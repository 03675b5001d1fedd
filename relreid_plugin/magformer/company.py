"""In which galleries images stay alone: those that are thinner than the ones in which relations gain (METHODS 5).

A test set may be made otherwise than the training set: with one image per identity in the gallery nothing is there to be
refined, and neighbours are strangers. Its labels are not seen, but how near its images' nearest neighbours are is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .benches import Bench, RelationChoice, mean_score, scored
from .episodes import thinned

_APART = 0.25
"""Galleries are told apart where their shares are: one in which relations lose has so much less than a natural one, and one
in which they gain has at least so much of the way from the former to the latter."""


def choose_company(benches: Sequence[Bench], choice: RelationChoice, *, seed: int) -> RelationChoice:
    """Choose in which galleries images stay alone: those in which relations lose, told by their nearest neighbours.

    The galleries of the held-out test sets are thinned (:func:`thinned`). ``support`` is the similarity to the nearest
    neighbour that tells images with another one of their identity from the others best (largest sum of both rates);
    ``least`` lies between the largest share of such images in a gallery in which relations lose mAP or first places and that
    is clearly below a natural one's, and the smallest that is clearly above it and in which they do not.

    Args:
        benches: Held-out test sets under the chosen head.
        choice: What was chosen for them.
        seed: Draws what is left out.
    """
    rng = np.random.default_rng(seed)
    kinds: list[list[Bench]] = [list(benches)]
    for parts in zip(*(thinned(bench.episode, rng) for bench in benches)):
        kinds.append([Bench(part, bench.projection) for part, bench in zip(parts, benches) if len(part.query)])
    near = [[choice.rule.nearest(bench.lists()[0]).numpy() for bench in kind] for kind in kinds]
    with_company = []
    for kind in kinds:
        for bench in kind:
            own, count = np.unique(bench.episode.gallery.pids, return_inverse=True, return_counts=True)[1:]
            with_company.append(count[own] > 1)
    scores, labels = np.concatenate([part for kind in near for part in kind]), np.concatenate(with_company)
    if labels.all() or not labels.any():
        return choice
    order = np.argsort(-scores, kind="stable")
    rates = np.cumsum(labels[order]) / labels.sum() - np.cumsum(~labels[order]) / (~labels).sum()
    support = round(float(scores[order][int(rates.argmax())]), 3)
    shares, harmed = [], []
    for kind, sides in zip(kinds, near):
        if not kind:
            continue
        alone = mean_score((bench.result(bench.query, bench.gallery), bench.episode) for bench in kind)
        score = scored(choice, kind)
        shares.append(float(np.mean(np.concatenate(sides) >= support)))
        harmed.append(score.mAP < alone.mAP or score.R1 < alone.R1)
    losing = [share for share, harm in zip(shares, harmed) if harm and share <= (1 - _APART) * shares[0]]
    if not losing or harmed[0]:
        return choice
    lost = max(losing)
    bar = lost + _APART * (shares[0] - lost)
    above = [share for share, harm in zip(shares, harmed) if not harm and share >= bar]  # a natural one's at least
    return replace(choice, rule=replace(choice.rule, support=support, least=round((lost + min(above)) / 2, 3)))


__all__ = ["choose_company"]
