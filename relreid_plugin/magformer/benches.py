"""What a setting of the relations scores on held-out test sets, without a network (METHODS 5).

What is scored is the encoder before its first step of training, in the form of weighted means
(:class:`~relreid_plugin.magformer.attention.RelationBlock`, ``average``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.neighbours import normalise
from ..metrics.ranking import evaluate_features
from .cameras import CameraIndex, CameraLists, CameraRule, anchored
from .discriminant import Projection
from .episodes import Episode

MOST = 16
"""Neighbours of a kind, at most."""


@dataclass(frozen=True)
class RelationChoice:
    """The relations: a rule for neighbours, layers, and the shares of the own feature and of the nearest in the result."""

    rule: CameraRule = field(default_factory=lambda: CameraRule(0, 0))
    rounds: int = 1
    residual: float = 0.0
    anchor: float = 0.0

    @property
    def nothing(self) -> bool:
        """Whether every image stays alone."""
        return not (self.rule.other or self.rule.same)


@dataclass(frozen=True)
class Score:
    """Means over the episodes, and the scores of every query.

    Attributes:
        mAP, R1: Fractions of 1, means over the episodes.
        ap: Average precisions of all queries of all episodes.
        hits: Whether the first image is a match, 0 or 1.
        pids: Their identities.
    """

    mAP: float
    R1: float
    ap: np.ndarray
    hits: np.ndarray
    pids: np.ndarray

    def _change(self, name: str, other: Score) -> tuple[float, float]:
        """Mean over the identities of what a query gains over ``other``, and its standard error."""
        mine, theirs = getattr(self, name), getattr(other, name)
        valid = np.isfinite(self.ap) & np.isfinite(other.ap)
        names, own = np.unique(self.pids[valid], return_inverse=True)
        gain = np.bincount(own, weights=(mine - theirs)[valid]) / np.bincount(own)
        return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(names))) if len(names) > 1 else np.inf

    def keeps_first(self, other: Score, margin: float) -> bool:
        """Whether no query loses its first place, or R1 is gained."""
        return bool((self.hits >= other.hits).all()) or self.gains_first(other, margin)

    def gains_first(self, other: Score, margin: float) -> bool:
        """Whether R1 rises, by not less than ``margin`` standard errors."""
        change, error = self._change("hits", other)
        return self.R1 > other.R1 and change >= margin * error

    def gains_over(self, other: Score, *, margin: float = 2.0, first: float = 1.0) -> bool:
        """Whether the gain in mAP is above ``margin`` standard errors, and R1 is kept with the margin ``first``."""
        if self.mAP <= other.mAP or not self.keeps_first(other, first):
            return False
        gain, error = self._change("ap", other)
        return gain > margin * error


def attend(x: Tensor, values: Tensor, index: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """Weighted mean of an image and its neighbours: what an untrained block of ``average`` does.

    Args:
        x: (n, d) unit features.
        values: (N, d) unit features of the neighbours.
        index, mask, bias: (n, K), see :meth:`~relreid_plugin.magformer.cameras.CameraRule.edges`.

    Returns:
        (n, d) unit features.
    """
    if not index.shape[1]:
        return x
    weights = torch.where(mask, bias.exp(), torch.zeros_like(bias)).to(values.dtype)
    return normalise(x + F.embedding_bag(index, values, per_sample_weights=weights, mode="sum"))


class Bench:
    """An episode under one head: the neighbour lists are searched once for all rules."""

    def __init__(self, episode: Episode, projection: Projection | None) -> None:
        self.episode, self.projection = episode, projection
        head = projection or normalise
        self.query, self.gallery = head(episode.query.features), head(episode.gallery.features)
        self._index = CameraIndex(self.gallery, episode.gallery.camids)
        self._lists: tuple[CameraLists, CameraLists] | None = None

    def lists(self) -> tuple[CameraLists, CameraLists]:
        """Gallery and query lists, deep enough for every rule."""
        if self._lists is None:
            gallery, index = self.gallery, self._index
            own, depth = torch.arange(len(gallery)), 2 * MOST
            self._lists = (
                index.search(gallery, index.camids, other=depth, same=depth, rows=own),
                index.search(self.query, self.episode.query.camids, other=MOST, same=MOST),
            )
        return self._lists

    def limits(self, rule: CameraRule) -> Tensor:
        """The gallery's thresholds under a rule."""
        return rule.settled(rule.thresholds(self.lists()[0]))

    def refine(self, choice: RelationChoice) -> tuple[Tensor, Tensor]:
        """(Q, d) queries and (N, d) gallery, without residual and anchor."""
        x, z = self.query, self.gallery
        if choice.nothing:
            return x, z
        among, to = self.lists()
        thresholds = self.limits(choice.rule)
        own, asked = choice.rule.edges(among, thresholds), choice.rule.edges(to, thresholds)
        for _ in range(choice.rounds):
            x, z = attend(x, z, *asked), attend(z, z, *own)
        return x, z

    def held(self, choice: RelationChoice, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Refined features with residual and anchor."""
        if choice.residual:
            x, z = normalise(x + choice.residual * self.query), normalise(z + choice.residual * self.gallery)
        if choice.anchor and choice.rule.other:
            rows = choice.rule.first(self.lists()[1].cut(choice.rule.other, choice.rule.same), self.limits(choice.rule))
            x = anchored(x, rows, choice.anchor, z.__getitem__)
        return x, z

    def result(self, x: Tensor, z: Tensor) -> Any:
        """Score features."""
        query, gallery = self.episode.query, self.episode.gallery
        return evaluate_features(x, z, query.pids, gallery.pids, query.camids, gallery.camids, metric="cosine", max_rank=1)


def mean_score(results: Iterable[tuple[Any, Episode]]) -> Score:
    pairs = list(results)
    return Score(
        mAP=float(np.mean([result.mAP for result, _ in pairs])),
        R1=float(np.mean([result.rank(1) for result, _ in pairs])),
        ap=np.concatenate([result.ap for result, _ in pairs]),
        hits=np.concatenate([result.first == 1 for result, _ in pairs]).astype(float),
        pids=np.concatenate([episode.query.pids for _, episode in pairs]),
    )


def scored(choice: RelationChoice, benches: Sequence[Bench], refined: Sequence[tuple[Tensor, Tensor]] = ()) -> Score:
    """Score a setting; ``refined``: what the benches refined by it, where that is known."""
    pairs = zip(benches, refined or [bench.refine(choice) for bench in benches])
    return mean_score((bench.result(*bench.held(choice, *pair)), bench.episode) for bench, pair in pairs)


__all__ = ["MOST", "Bench", "RelationChoice", "Score", "attend", "mean_score", "scored"]
