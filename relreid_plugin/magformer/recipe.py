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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config.defaults import merge_from_list
from ..features.sets import Features
from ..metrics.neighbours import normalise
from .benches import MOST, Bench, RelationChoice, Score, attend, mean_score, scored
from .cameras import CameraRule
from .company import choose_company
from .discriminant import Discriminant, Projection
from .episodes import Episode, fold_episodes, thinned

_STEPS = (-2, -1, 0, 1, 2, 4)  # changes of the neighbours that are tried around the best ones
HELD = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.0), (2.0, 0.0), (4.0, 0.0))
"""Shares in the result of an image's own feature and of a query's nearest image, tried in turns until first places are kept.
The first two are loose: they are taken only where first places are gained."""
_LOOSE = HELD[:2]


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
            "relation.anchor": self.relations.anchor,
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
            "relation.camera.support": rule.support,
            "relation.camera.least": rule.least,
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
                + (f", anchor {self.relations.anchor:g}" if self.relations.anchor else "")
            )
            if rule.least:
                parts.append(f"only where {rule.least:.0%} of a gallery's images have one of {rule.support:g} or more")
        scores = ", ".join(f"{name} {100 * mAP:.1f} / {100 * R1:.1f}" for name, (mAP, R1) in self.scores.items())
        return f"recipe: {'; '.join(parts)}" + (f" (held-out mAP / R1: {scores})" if scores else "") + self.note


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
    plain = mean_score((Bench(episode, None).result(*_plain(episode)), episode) for episode in episodes)
    least = min(fit.identities for fit in fits)
    allowed = [number for number in dims if number < 0.75 * least] or [0]
    kinds = [(number, degree) for number in allowed for degree in (soft if number == 0 else (0.0,))]
    best: tuple[HeadChoice | None, Score] = (None, plain)
    for one, (number, degree), share in itertools.product(shrinkage, kinds, keep):
        choice = HeadChoice(one, number, degree, share)
        benches = [Bench(episode, choice.of(fit)) for episode, fit in zip(episodes, fits)]
        score = mean_score((bench.result(bench.query, bench.gallery), bench.episode) for bench in benches)
        if score.mAP > best[1].mAP and score.keeps_first(plain, first):
            best = (choice, score)
    if best[0] is not None and not best[1].gains_over(plain, margin=gain, first=first):
        best = (None, plain)
    return best[0], best[1], plain


def _plain(episode: Episode) -> tuple[Tensor, Tensor]:
    return normalise(episode.query.features), normalise(episode.gallery.features)


class _Search:
    """Scores settings, each once, and keeps the best one that loses no first place."""

    def __init__(self, benches: Sequence[Bench], *, floors: Sequence[Score], first: float, kept: float) -> None:
        self.benches = benches
        self.alone = mean_score((bench.result(bench.query, bench.gallery), bench.episode) for bench in benches)
        self.floors = [(self.alone, kept), *((floor, first) for floor in floors)]
        self.best, self.score = RelationChoice(), self.alone
        self.seen: set[RelationChoice] = set()

    def offer(self, choice: RelationChoice) -> None:
        """Score a setting with as little residual and anchor as keeping first places allows."""
        choice = replace(choice, residual=0.0, anchor=0.0)
        if choice in self.seen or choice.nothing:
            return
        self.seen.add(choice)
        refined = [bench.refine(choice) for bench in self.benches]
        for residual, anchor in HELD:
            own = replace(choice, residual=residual, anchor=anchor)
            if anchor and not choice.rule.other:
                continue
            score = scored(own, self.benches, refined)
            safe = all(score.keeps_first(*floor) for floor in self.floors)
            if (residual, anchor) in _LOOSE:
                safe = safe and score.gains_first(*self.floors[0])
            if safe and score.mAP > self.score.mAP:
                self.best, self.score = own, score
                return
            if score.mAP <= self.score.mAP and not (residual or anchor):
                return


def choose_relations(
    benches: Sequence[Bench],
    *,
    neighbours: Sequence[int],
    rounds: Sequence[int],
    reciprocity: Sequence[int],
    temperature: Sequence[float],
    floors: Sequence[Score] = (),
    gain: float = 2.0,
    first: float = 1.0,
    kept: float = 2.0,
) -> tuple[RelationChoice, Score, int]:
    """Choose neighbours, layers, reciprocity and temperature.

    All numbers of neighbours are tried with one layer, one-sided and reciprocal; then, in turns and until nothing changes
    (twice at most), everything else around the best neighbours, and the neighbours around the best of those.

    Args:
        benches: Held-out test sets under the chosen head.
        neighbours, rounds, reciprocity, temperature: What is tried.
        floors: Scores whose R1 must be kept with the margin ``first``, beside that of the images alone.
        gain, first: See :meth:`Score.gains_over`.
        kept: As ``first``, over the images alone.

    Returns:
        The choice (nothing where nothing gains), its score, and how many settings were scored.
    """
    search = _Search(benches, floors=floors, first=first, kept=kept)
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
            other, same = (min(max(value, 0), MOST) for value in (rule.other + more, rule.same + step))
            search.offer(RelationChoice(replace(rule, other=other, same=same), rounds=count))
        if search.best == before:
            break
    if not search.score.gains_over(search.alone, margin=gain, first=kept):
        return RelationChoice(), search.alone, len(search.seen)
    return search.best, search.score, len(search.seen)


def _offset(benches: Sequence[Bench]) -> float:
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
    benches = [Bench(episode, _projection(episode.train, head)) for episode in episodes]
    relations, best, tried = choose_relations(
        benches,
        neighbours=list(select.neighbours),
        rounds=list(select.rounds),
        reciprocity=list(select.reciprocity),
        temperature=list(select.temperature),
        floors=[plain],
        kept=select.kept,
        **margins,
    )
    if not relations.nothing:
        relations = choose_company(benches, relations, seed=cfg.relation.train.seed)
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
    "choose_company",
    "choose_head",
    "choose_recipe",
    "choose_relations",
    "fold_episodes",
    "thinned",
    "with_recipe",
]
