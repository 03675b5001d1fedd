"""The relation recipe: head, neighbours and layers of stage 2, chosen by held-out training identities (METHODS 5).

Nothing of a test set is seen. Training identities take turns in being held out: a head is fitted on the others, the held-out
ones are divided into queries and gallery like a test set, the gallery is refined alone and the queries attend to it. A
setting is taken only where its gain is safely above its own standard error over the identities and where first places are
safely kept, so that doing nothing is what is left where neighbours are not there.

What is scored here is the encoder before its first step of training, in the form of weighted means
(:class:`~relreid_plugin.magformer.attention.RelationBlock`, ``average``); it needs no network and takes seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.defaults import merge_from_list
from ..data.split import as_test_set
from ..features.sets import Features
from ..metrics.neighbours import normalise
from ..metrics.ranking import evaluate_features
from .cameras import CameraIndex, CameraLists, CameraRule
from .discriminant import Discriminant, Projection

_MOST = 16  # neighbours of a kind, at most
_REPEATS = 6  # draws of the folds, at most
_STEPS = (-2, -1, 0, 1, 2, 4)  # changes of the neighbours that are tried around the best ones
RESIDUALS = (0.0, 0.5, 1.0, 2.0, 4.0)  # shares of an image's own feature in the result, tried until no first place is lost


@dataclass(frozen=True)
class Episode:
    """A held-out test set, and the features that a head for it may be fitted on."""

    train: Features
    query: Features
    gallery: Features


@dataclass(frozen=True)
class HeadChoice:
    """A closed-form head: arguments of :meth:`~relreid_plugin.magformer.discriminant.Discriminant.projection`."""

    shrinkage: float = 2.0
    dims: int = 0
    soft: float = 0.0
    keep: float = 0.0

    def of(self, fit: Discriminant) -> Projection:
        """The head of features whose scatter is known."""
        return fit.projection(shrinkage=self.shrinkage, dims=self.dims, soft=self.soft, keep=self.keep)


@dataclass(frozen=True)
class RelationChoice:
    """The relations: a rule for neighbours, layers, and the share of the own feature in the result."""

    rule: CameraRule = field(default_factory=lambda: CameraRule(0, 0))
    rounds: int = 1
    residual: float = 0.0

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
        """Whether the change in R1 is not below ``margin`` standard errors, nor below zero; no change at all keeps it."""
        change, error = self._change("hits", other)
        return self.R1 >= other.R1 and change >= (margin * error if error else 0.0)

    def gains_over(self, other: Score, *, margin: float = 2.0, first: float = 1.0) -> bool:
        """Whether the gain in mAP is above ``margin`` standard errors, and R1 is kept with the margin ``first``."""
        if self.mAP <= other.mAP or not self.keeps_first(other, first):
            return False
        gain, error = self._change("ap", other)
        return gain > margin * error


@dataclass(frozen=True)
class Recipe:
    """What was chosen.

    Attributes:
        head: ``None``: the features as they are.
        relations: See :class:`RelationChoice`.
        scores: Held-out mAP and R1 of the image model, of the head and of the relations, in this order.
        tried: Settings that were scored.
        note: Why nothing was chosen, or empty.
    """

    head: HeadChoice | None
    relations: RelationChoice
    scores: dict[str, tuple[float, float]]
    tried: int = 0
    note: str = ""

    def overrides(self) -> list[str]:
        """The configuration keys that make the encoder, as ``KEY VALUE …``."""
        rule, head = self.relations.rule, self.head or HeadChoice()
        values: dict[str, Any] = {
            "relation.block": "average",
            "relation.init": "identity",
            "relation.neighbours": "camera",
            "relation.num_layers": self.relations.rounds,
            "relation.residual": self.relations.residual,
            "relation.head.kind": "none" if self.head is None else "discriminant",
            "relation.head.shrinkage": head.shrinkage,
            "relation.head.dims": head.dims,
            "relation.head.soft": head.soft,
            "relation.head.keep": head.keep,
            "relation.camera.other": rule.other,
            "relation.camera.same": rule.same,
            "relation.camera.reciprocity": rule.reciprocity,
            "relation.camera.temperature": rule.temperature,
            "relation.camera.offset": rule.offset,
        }
        return [str(part) for pair in values.items() for part in pair]

    def sentence(self) -> str:
        """What was chosen and what it scored on held-out identities, in one line."""
        head, rule = self.head, self.relations.rule
        parts = [
            "no head"
            if head is None
            else f"head (shrinkage {head.shrinkage:g}, {head.dims or 'all'} directions, soft {head.soft:g}, "
            f"keep {head.keep:g})"
        ]
        if self.relations.nothing:
            parts.append("no relations")
        else:
            parts.append(
                f"{rule.other} neighbours of other cameras and {rule.same} of the own one, reciprocity {rule.reciprocity}, "
                f"temperature {rule.temperature:g}, {self.relations.rounds} layers, residual {self.relations.residual:g}"
            )
        scores = ", ".join(f"{name} {100 * mAP:.1f} / {100 * R1:.1f}" for name, (mAP, R1) in self.scores.items())
        return f"recipe: {'; '.join(parts)}" + (f" (held-out mAP / R1: {scores})" if scores else "") + self.note


# --- episodes -----------------------------------------------------------------------------------------------------------


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


# --- scoring ------------------------------------------------------------------------------------------------------------


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


class _Bench:
    """An episode under one head: the neighbour lists are searched once for all rules."""

    def __init__(self, episode: Episode, projection: Projection | None) -> None:
        self.episode = episode
        head = projection or normalise
        self.query, self.gallery = head(episode.query.features), head(episode.gallery.features)
        self._index = CameraIndex(self.gallery, episode.gallery.camids)
        self._lists: tuple[CameraLists, CameraLists] | None = None

    def lists(self) -> tuple[CameraLists, CameraLists]:
        """Gallery and query lists, deep enough for every rule."""
        if self._lists is None:
            gallery, index = self.gallery, self._index
            own, depth = torch.arange(len(gallery)), 2 * _MOST
            self._lists = (
                index.search(gallery, index.camids, other=depth, same=depth, rows=own),
                index.search(self.query, self.episode.query.camids, other=_MOST, same=_MOST),
            )
        return self._lists

    def refine(self, choice: RelationChoice) -> tuple[Tensor, Tensor]:
        """(Q, d) queries and (N, d) gallery, without the residual."""
        x, z = self.query, self.gallery
        if choice.nothing:
            return x, z
        among, to = self.lists()
        thresholds = choice.rule.thresholds(among)
        own, asked = choice.rule.edges(among, thresholds), choice.rule.edges(to, thresholds)
        for _ in range(choice.rounds):
            x, z = attend(x, z, *asked), attend(z, z, *own)
        return x, z

    def result(self, x: Tensor, z: Tensor, residual: float) -> Any:
        """Score refined features."""
        if residual:
            x, z = normalise(x + residual * self.query), normalise(z + residual * self.gallery)
        query, gallery = self.episode.query, self.episode.gallery
        return evaluate_features(x, z, query.pids, gallery.pids, query.camids, gallery.camids, metric="cosine", max_rank=1)


def _score(results: Iterable[tuple[Any, Episode]]) -> Score:
    pairs = list(results)
    return Score(
        mAP=float(np.mean([result.mAP for result, _ in pairs])),
        R1=float(np.mean([result.rank(1) for result, _ in pairs])),
        ap=np.concatenate([result.ap for result, _ in pairs]),
        hits=np.concatenate([result.first == 1 for result, _ in pairs]).astype(float),
        pids=np.concatenate([episode.query.pids for _, episode in pairs]),
    )


# --- choosing -----------------------------------------------------------------------------------------------------------


def choose_head(
    episodes: Sequence[Episode],
    *,
    shrinkage: Sequence[float],
    dims: Sequence[int] = (0,),
    soft: Sequence[float] = (0.0,),
    keep: Sequence[float] = (0.0,),
    gain: float = 2.0,
    first: float = 1.0,
) -> tuple[HeadChoice | None, Score, Score]:
    """Choose the head whose features rank held-out identities best, every image alone.

    Args:
        episodes: Held-out test sets.
        shrinkage, dims, soft, keep: What is tried; directions beyond three quarters of an episode's identities are left out,
            and ``soft`` is tried with all directions.
        gain, first: See :meth:`Score.gains_over`.

    Returns:
        The head, or ``None`` where none gains over the features as they are; its score, and that of the features.
    """
    fits = [Discriminant(episode.train.features, torch.from_numpy(episode.train.pids)) for episode in episodes]
    plain = _score((_Bench(episode, None).result(*_plain(episode), 0.0), episode) for episode in episodes)
    least = min(fit.identities for fit in fits)
    allowed = [number for number in dims if number < 0.75 * least] or [0]
    kinds = [(number, degree) for number in allowed for degree in (soft if number == 0 else (0.0,))]
    best: tuple[HeadChoice | None, Score] = (None, plain)
    for one, (number, degree), share in itertools.product(shrinkage, kinds, keep):
        choice = HeadChoice(one, number, degree, share)
        benches = [_Bench(episode, choice.of(fit)) for episode, fit in zip(episodes, fits)]
        score = _score((bench.result(bench.query, bench.gallery, 0.0), bench.episode) for bench in benches)
        if score.mAP > best[1].mAP and score.keeps_first(plain, first):
            best = (choice, score)
    if best[0] is not None and not best[1].gains_over(plain, margin=gain, first=first):
        best = (None, plain)
    return best[0], best[1], plain


def _plain(episode: Episode) -> tuple[Tensor, Tensor]:
    return normalise(episode.query.features), normalise(episode.gallery.features)


class _Search:
    """Scores settings, each once, and keeps the best one that loses no first place."""

    def __init__(self, benches: Sequence[_Bench], *, floors: Sequence[Score], first: float) -> None:
        self.benches, self.first = benches, first
        self.alone = _score((bench.result(bench.query, bench.gallery, 0.0), bench.episode) for bench in benches)
        self.floors = [self.alone, *floors]
        self.best, self.score = RelationChoice(), self.alone
        self.seen: set[RelationChoice] = set()

    def offer(self, choice: RelationChoice) -> None:
        """Score a setting with as little residual as no loss of first places allows."""
        choice = replace(choice, residual=0.0)
        if choice in self.seen or choice.nothing:
            return
        self.seen.add(choice)
        refined = [bench.refine(choice) for bench in self.benches]
        for residual in RESIDUALS:
            score = _score((bench.result(*pair, residual), bench.episode) for bench, pair in zip(self.benches, refined))
            if score.mAP <= self.score.mAP:
                return
            if all(score.keeps_first(floor, self.first) for floor in self.floors):
                self.best, self.score = replace(choice, residual=residual), score
                return


def choose_relations(
    benches: Sequence[_Bench],
    *,
    neighbours: Sequence[int],
    rounds: Sequence[int],
    reciprocity: Sequence[int],
    temperature: Sequence[float],
    floors: Sequence[Score] = (),
    gain: float = 2.0,
    first: float = 1.0,
) -> tuple[RelationChoice, Score, int]:
    """Choose neighbours, layers, reciprocity and temperature.

    All numbers of neighbours are tried with one layer, one-sided and reciprocal; then, in turns and until nothing changes
    (twice at most), everything else around the best neighbours, and the neighbours around the best of those.

    Args:
        benches: Held-out test sets under the chosen head.
        neighbours, rounds, reciprocity, temperature: What is tried.
        floors: Scores whose R1 must be kept, beside that of the images alone.
        gain, first: See :meth:`Score.gains_over`.

    Returns:
        The choice (nothing where nothing gains), its score, and how many settings were scored.
    """
    search = _Search(benches, floors=floors, first=first)
    offset = _offset(benches)
    sides = [value for value in reciprocity if value < 2] or list(reciprocity)
    for other, same, side in itertools.product(neighbours, neighbours, sides):
        search.offer(RelationChoice(CameraRule(other, same, side, 0.0, offset)))
    for _ in range(2):
        before = search.best
        for count, side, degree in itertools.product(rounds, reciprocity, temperature):
            rule = replace(search.best.rule, reciprocity=side, temperature=degree)
            search.offer(RelationChoice(rule, rounds=count))
        rule, count = search.best.rule, search.best.rounds
        for more, step in itertools.product(_STEPS, _STEPS):
            other, same = (min(max(value, 0), _MOST) for value in (rule.other + more, rule.same + step))
            search.offer(RelationChoice(replace(rule, other=other, same=same), rounds=count))
        if search.best == before:
            break
    if not search.score.gains_over(search.alone, margin=gain, first=first):
        return RelationChoice(), search.alone, len(search.seen)
    return search.best, search.score, len(search.seen)


def _offset(benches: Sequence[_Bench]) -> float:
    """Median similarity of gallery images to their nearest image, to two digits."""
    best = torch.cat([bench.lists()[0].scores.amax(dim=1) for bench in benches])
    best = best[torch.isfinite(best)]
    return round(float(best.median()), 2) if len(best) else 0.5


def choose_recipe(episodes: Sequence[Episode], cfg: Any, *, alone: bool = False) -> Recipe:
    """Choose head and relations by held-out test sets.

    Args:
        episodes: From :func:`fold_episodes`, or made of identities that were held out from the start.
        cfg: A configuration; ``relation.select`` says what is tried.
        alone: Choose no relations (the control).
    """
    if not episodes:
        note = "; the training identities make no held-out test set (too few, or each under one camera): nothing is chosen."
        return Recipe(None, RelationChoice(), {}, note=note)
    select = cfg.relation.select
    margins = {"gain": select.gain, "first": select.first}
    head, score, plain = choose_head(
        episodes,
        shrinkage=list(select.shrinkage),
        dims=list(select.dims),
        soft=list(select.soft),
        keep=list(select.keep),
        **margins,
    )
    scores = {"image model": (plain.mAP, plain.R1), "head": (score.mAP, score.R1)}
    if alone:
        return Recipe(head, RelationChoice(), scores)
    benches = [_Bench(episode, _projection(episode.train, head)) for episode in episodes]
    relations, best, tried = choose_relations(
        benches,
        neighbours=list(select.neighbours),
        rounds=list(select.rounds),
        reciprocity=list(select.reciprocity),
        temperature=list(select.temperature),
        floors=[plain],
        **margins,
    )
    scores["relations"] = (best.mAP, best.R1)
    return Recipe(head, relations, scores, tried)


def _projection(train: Features, head: HeadChoice | None) -> Projection | None:
    if head is None:
        return None
    return head.of(Discriminant(train.features, torch.from_numpy(train.pids)))


def with_recipe(cfg: Any, overrides: Sequence[str]) -> Any:
    """Return a copy of a configuration with the keys of a recipe in it."""
    if not overrides:
        return cfg
    chosen = cfg.clone()
    merge_from_list(chosen, list(overrides))
    return chosen


__all__ = [
    "Episode",
    "HeadChoice",
    "Recipe",
    "RelationChoice",
    "Score",
    "attend",
    "choose_head",
    "choose_recipe",
    "choose_relations",
    "fold_episodes",
    "with_recipe",
]
