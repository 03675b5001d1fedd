"""Fair tables of relations: every set of features alone and under every rival, with intervals (METHODS 5).

What a relation encoder is worth is its gain over the *control*, the same encoder with every image alone, and over what a
user would do with the control's features instead: query expansion with as many neighbours as held-out identities choose,
and re-ranking. Differences are paired over the queries, and bootstrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..engine.scoring import EvaluationOptions, Scorer
from ..engine.table import markdown, millions, score_cells, score_columns, score_header
from ..features.sets import TestFeatures
from ..metrics.bootstrap import Difference, bootstrap
from ..metrics.expansion import Expansions, average_query_expansion, database_augmentation
from ..metrics.ranking import RankingResult, evaluate_features
from ..metrics.rivals import RIVALS

IMAGE, CONTROL = "image model", "control"
EXPANSION_K = (1, 2, 3, 5, 8, 12, 20)
"""Neighbours that are tried for query expansion, beside none."""
EXPANSION_ALPHA = (1.0, 3.0)
"""Exponents that are tried for alpha query expansion."""
_TOLERANCE = 0.003  # mAP below the better of image model and control that is no harm


@dataclass(frozen=True)
class Expansion:
    """A chosen query expansion: ``k`` 0 leaves the features alone."""

    k: int
    alpha: float = 0.0


@dataclass
class FairRow:
    """One line of a fair table, over the seeds.

    Attributes:
        features: Whose features: :data:`IMAGE`, :data:`CONTROL` or a rung.
        title: How they are called.
        rival: What is done with them, a key of the rivals, or empty.
        protocol: ``inductive`` or ``transductive``.
        setting: What held-out identities chose, per seed.
        results: One result per seed.
        parameters: Inference parameters.
        metric: How it was ranked.
    """

    features: str
    title: str
    rival: str
    protocol: str
    parameters: int
    metric: str
    ending: str = ""
    setting: list[str] = field(default_factory=list)
    results: list[RankingResult] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The row's name."""
        return f"{self.title}{self.ending}"

    @property
    def reranks(self) -> bool:
        """Whether more is done with the features than averaging those of the gallery: a re-ranking, or a look at queries."""
        expands = not self.rival or self.rival.startswith("aqe")
        return self.protocol != "inductive" or not expands

    def values(self, name: str) -> np.ndarray:
        """Scores of the seeds: ``mAP``, ``mINP`` or a rank."""
        return np.array([getattr(one, name) if name.startswith("m") else one.rank(int(name)) for one in self.results])

    def mean(self, name: str) -> float:
        """Mean over the seeds."""
        return float(self.values(name).mean())

    @property
    def ap(self) -> np.ndarray:
        """Average precision of every query (Q,), the mean over the seeds."""
        return np.mean([one.ap for one in self.results], axis=0)

    def as_dict(self, ranks: Sequence[int]) -> dict[str, Any]:
        """The row for JSON."""
        names = ["mAP", "mINP", *map(str, ranks)]
        values = np.array([self.values(name) for name in names])
        deviation = values.std(axis=1, ddof=1) if values.shape[1] > 1 else np.zeros(len(names))
        return {
            "features": self.features,
            "method": self.method,
            "rival": self.rival,
            "protocol": self.protocol,
            "mean": dict(zip(names, values.mean(axis=1).tolist())),
            "std": dict(zip(names, deviation.tolist())),
            "seeds": {name: row.tolist() for name, row in zip(names, values)},
            "setting": self.setting,
            "parameters": self.parameters,
            "metric": self.metric,
            "runs": len(self.results),
        }


# --- held-out choice ----------------------------------------------------------------------------------------------------


def expand(query: Tensor, gallery: Tensor, choice: Expansion) -> tuple[Tensor, Tensor]:
    """Query expansion and database augmentation of features (Q, d) and (G, d)."""
    options: dict[str, Any] = {"k": choice.k, "alpha": choice.alpha}
    return average_query_expansion(query, gallery, **options), database_augmentation(gallery, **options)


def held_out_expansions(held_out: Sequence[TestFeatures]) -> list[tuple[Expansions, TestFeatures]]:
    """The neighbours of held-out test sets that :func:`choose_expansion` needs."""
    depth = max(EXPANSION_K)
    return [(Expansions(data.query.features, data.gallery.features, k=depth), data) for data in held_out]


def choose_expansion(held_out: Sequence[tuple[Expansions, TestFeatures]], *, alphas: Sequence[float]) -> Expansion:
    """Choose the query expansion that ranks held-out identities best.

    It is chosen by mAP alone, doing nothing included: unlike relations it need not keep first places, which favours it.

    Args:
        held_out: See :func:`held_out_expansions`.
        alphas: Exponents that are tried.
    """

    def score(choice: Expansion) -> float:
        means = []
        for expansions, data in held_out:
            query, gallery = data.query, data.gallery
            labels = (query.pids, gallery.pids, query.camids, gallery.camids)
            expanded = expansions(choice.k, choice.alpha)
            means.append(evaluate_features(*expanded, *labels, metric="cosine", max_rank=1).mAP)
        return float(np.mean(means))

    return max([Expansion(0), *(Expansion(k, alpha) for alpha in alphas for k in EXPANSION_K)], key=score)


# --- rows ---------------------------------------------------------------------------------------------------------------


class FairTable:
    """The rows of one test set: features are added one after the other, under every rival.

    Args:
        target: Name of the test set.
        data: The image model's features of it.
        options: How it is scored.
        rivals: Names of the rivals; ``None``: all.
    """

    def __init__(
        self, target: str, data: TestFeatures, options: EvaluationOptions, *, rivals: Sequence[str] | None = None
    ) -> None:
        self.target, self.data, self.options = target, data, options
        self.scorer = Scorer(data, options)
        self.rivals = [RIVALS[name] for name in (RIVALS if rivals is None else rivals)]
        self.rows: dict[tuple[str, str, str], FairRow] = {}

    def add(
        self,
        features: str,
        title: str,
        query: Tensor,
        gallery: Tensor,
        *,
        parameters: int,
        held_out: Sequence[TestFeatures] = (),
        metric: str | None = "cosine",
        stacked: bool = True,
    ) -> None:
        """Score features of one seed, alone and under the rivals.

        Args:
            features: :data:`IMAGE`, :data:`CONTROL` or a rung.
            title: How they are called.
            query, gallery: (Q, d) and (G, d), inductive ones.
            parameters: Inference parameters.
            held_out: The same features of held-out test sets, to choose query expansions by.
            metric: Distance of the row alone; ``None``: the image model's own.
            stacked: Whether there are rivals.
        """
        own = self.scorer.metric(metric)
        about: dict[str, Any] = {"features": features, "title": title, "parameters": parameters}
        self._note(self.scorer(query, gallery, own), rival="", protocol="inductive", metric=str(own), **about)
        if not stacked:
            return
        unit = self.scorer.metric("cosine")
        found = held_out_expansions(held_out)
        for name, alphas in (("aqe", (0.0,)), ("aqe-alpha", EXPANSION_ALPHA)) if held_out else ():
            choice = choose_expansion(found, alphas=alphas)
            result = self.scorer(*expand(query, gallery, choice), unit)
            said = f"k={choice.k}" + (f", alpha={choice.alpha:g}" if name == "aqe-alpha" and choice.k else "")
            ending = f" {RIVALS[name].title} (k held out)"
            row = {"rival": f"{name}-held-out", "ending": ending, "setting": said}
            self._note(result, protocol="inductive", metric=str(unit), **row, **about)
        for rival in self.rivals:
            for protocol in rival.protocols:
                result = self.scorer(query, gallery, self.scorer.rival_metric(rival.name, protocol))
                row = {"rival": rival.name, "ending": f" {rival.title}"}
                self._note(result, protocol=protocol, metric=str(unit), **row, **about)

    def add_transductive(self, features: str, title: str, query: Tensor, gallery: Tensor, *, parameters: int) -> None:
        """Score features for which queries and gallery looked at each other; arguments as in :meth:`add`."""
        unit = self.scorer.metric("cosine")
        about: dict[str, Any] = {"features": features, "title": title, "parameters": parameters}
        self._note(self.scorer(query, gallery, unit), rival="", protocol="transductive", metric=str(unit), **about)

    def _note(self, result: RankingResult, *, setting: str = "", **about: Any) -> None:
        key = (about["features"], about["rival"], about["protocol"])
        row = self.rows.setdefault(key, FairRow(**about))
        row.results.append(result)
        row.setting += [setting] if setting else []

    def row(self, features: str, rival: str = "", protocol: str = "inductive") -> FairRow | None:
        """A row, where there is one."""
        return self.rows.get((features, rival, protocol))

    def best(self, features: Sequence[str], *, reranked: bool) -> FairRow | None:
        """The row of some features with the highest mAP.

        Args:
            features: Whose.
            reranked: Among the rows in which rivals re-rank, or queries see each other; else among the inductive features
                alone and with query expansion.
        """
        found = [row for row in self.rows.values() if row.features in features and row.reranks == reranked]
        return max(found, key=lambda row: row.mean("mAP"), default=None)

    def difference(self, first: FairRow, second: FairRow) -> Difference:
        """mAP of a row minus that of another, with its interval."""
        return bootstrap(first.ap, second.ap)


@dataclass(frozen=True)
class Verdict:
    """Whether an encoder earned its place on a test set; differences are its mAP minus that of a row.

    Attributes:
        features: The rung.
        gain: Over the control.
        inductive: Over the best of image model and control, alone and with query expansion, inductive; and that row's name.
        reranked: Over the best re-ranked row of the control, inductive or not, and that row's name.
        floor: mAP and R1 minus the better ones of image model and control.
    """

    features: str
    title: str
    gain: Difference
    inductive: tuple[Difference, str]
    reranked: tuple[Difference, str] | None
    floor: tuple[float, float]

    @property
    def harmless(self) -> bool:
        """Whether mAP is at most 0.3 points and R1 not below the better ones of image model and control."""
        return self.floor[0] >= -_TOLERANCE and self.floor[1] >= -1e-9

    def lines(self) -> list[str]:
        """The verdict in sentences."""

        def said(difference: Difference) -> str:
            return "yes" if difference.mean > 0 else "no" if difference.mean < 0 else "equal"

        out = [f"{self.title} - control: {self.gain} mAP"]
        best, name = self.inductive
        out.append(f"above the best of image model and control, alone and expanded ({name}): {said(best)}, {best}")
        if self.reranked is not None:
            out.append(
                f"above the best re-ranked control ({self.reranked[1]}): {said(self.reranked[0])}, {self.reranked[0]}"
            )
        kept = "no harm" if self.harmless else "HARM"
        out.append(
            f"against the better of image model and control: {100 * self.floor[0]:+.1f} mAP, {100 * self.floor[1]:+.1f} R1: "
            f"{kept}"
        )
        return out


def judge(table: FairTable, features: str) -> Verdict | None:
    """Judge a rung by the rows of a table; ``None`` where image model, control or rung are missing."""
    own, control, image = table.row(features), table.row(CONTROL), table.row(IMAGE)
    best = table.best((IMAGE, CONTROL), reranked=False)
    if own is None or control is None or image is None or best is None:
        return None
    again = table.best((CONTROL,), reranked=True)
    return Verdict(
        features,
        own.title,
        table.difference(own, control),
        (table.difference(own, best), best.method),
        None if again is None else (table.difference(own, again), again.method),
        (
            own.mean("mAP") - max(image.mean("mAP"), control.mean("mAP")),
            own.mean("1") - max(image.mean("1"), control.mean("1")),
        ),
    )


def fair_markdown(table: FairTable, rungs: Sequence[str]) -> str:
    """Return a table as Markdown: a part per protocol, percent, mean ± standard deviation over the seeds, and the verdicts.

    Every row says its difference in mAP to the control alone with a 95 % interval (paired bootstrap over the queries);
    ``n.s.`` marks one that may be none.
    """
    parts = []
    columns = score_columns([str(rank) for rank in table.options.ranks])
    control = table.row(CONTROL)
    for protocol in ("inductive", "transductive"):
        rows = [row for row in table.rows.values() if row.protocol == protocol]
        if not rows:
            continue
        header = ["method", *score_header(columns), "- control, mAP", "chosen", "params"]
        cells = []
        for row in rows:
            values = {name: row.values(name) for name in columns}
            deviation = {name: float(own.std(ddof=1)) for name, own in values.items()} if len(row.results) > 1 else None
            gain = "" if control is None or row is control else str(table.difference(row, control))
            chosen = "; ".join(dict.fromkeys(row.setting)) or "-"
            scores = score_cells({name: float(own.mean()) for name, own in values.items()}, deviation, columns)
            cells.append([row.method, *scores, gain, chosen, millions(row.parameters)])
        parts.append(markdown(header, cells, title=f"**{table.target}**, {protocol}"))
    verdicts = [verdict for verdict in (judge(table, rung) for rung in rungs) if verdict is not None]
    parts += ["\n".join(f"- {line}" for line in verdict.lines()) for verdict in verdicts]
    return "\n\n".join(parts)


__all__ = [
    "CONTROL",
    "IMAGE",
    "Difference",
    "Expansion",
    "FairRow",
    "FairTable",
    "Verdict",
    "bootstrap",
    "choose_expansion",
    "expand",
    "fair_markdown",
    "held_out_expansions",
    "judge",
]
