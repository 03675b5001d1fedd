"""How a row of a table is ranked and scored: the one place that decides the metric for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.samefile import file_numbers
from ..features.sets import TestFeatures
from ..metrics.distance import pairwise_distance
from ..metrics.neighbours import normalise
from ..metrics.ranking import RankingResult, evaluate_cuhk03, evaluate_features, evaluate_ranking
from ..metrics.reranking import k_reciprocal_rerank_features
from ..metrics.rivals import RIVALS, Rival
from ..metrics.verification import Scores, Verification, cosine_scores, verify

CUHK03_REPEATS = 10
"""Random galleries per query of the single-gallery-shot metric."""
CUHK03_SEED = 0
"""Seed of these draws: the same features give the same curve."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, and how (see the configuration keys of the same names).

    Attributes:
        metric: ``euclidean`` or ``cosine`` distance of the image model's features.
        normalise: L2-normalise them first.
        ranks: CMC ranks.
        rivals: Names in :data:`~relreid_plugin.metrics.rivals.RIVALS`.
        aqe_k, aqe_alpha: Query expansion.
        k1, k2, lambda_value: k-reciprocal re-ranking.
        rerank_all: Re-rank every row's features instead of ranking them by distance.
        cuhk03_metric: Score every row by the single-gallery-shot metric of the classic CUHK03 split.
        rival_protocol: ``published``, or the protocol that rivals get where they exist under it.
        verification: Also tell pairs of one identity from pairs of two, by every row's distances.
        rival_settings: Settings of the other rivals by name, where they are not those of the papers.
    """

    metric: str = "euclidean"
    normalise: bool = False
    ranks: Sequence[int] = (1, 5, 10, 20)
    rivals: Sequence[str] = ("aqe", "rerank")
    aqe_k: int = 5
    aqe_alpha: float = 0.0
    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3
    rerank_all: bool = False
    cuhk03_metric: bool = False
    rival_protocol: str = "published"
    rival_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    verification: bool = False

    @classmethod
    def of(cls, cfg: Any) -> EvaluationOptions:
        """Return what the keys of ``test`` ask for."""
        test = cfg.test
        return cls(
            metric=test.dist_metric,
            normalise=test.normalize_feature,
            ranks=tuple(test.ranks),
            rivals=tuple(test.rivals),
            aqe_k=test.aqe.k,
            aqe_alpha=test.aqe.alpha,
            k1=test.kreciprocal.k1,
            k2=test.kreciprocal.k2,
            lambda_value=test.kreciprocal.lambda_value,
            rival_protocol=test.rival_protocol,
            rival_settings={
                "aqe-alpha": dict(**test.aqe_alpha),
                "gnn": dict(**test.gnn),
                "gcr": dict(**test.gcr),
                "cajaccard": dict(**test.cajaccard),
                "nfc": dict(**test.nfc),
                "diffusion": dict(**test.diffusion),
            },
            rerank_all=test.rerank,
            cuhk03_metric=cfg.cuhk03.use_metric_cuhk03,
            verification=test.verification,
        )

    def settings(self, name: str) -> dict[str, Any]:
        """Return a rival's settings."""
        if name == "aqe":
            return {"k": self.aqe_k, "alpha": self.aqe_alpha}
        if name == "rerank":
            return {"k1": self.k1, "k2": self.k2, "lambda_value": self.lambda_value}
        return {**RIVALS[name].settings, **self.rival_settings.get(name, {})}


@dataclass(frozen=True)
class Metric:
    """A way to rank features.

    Attributes:
        distance: ``euclidean`` or ``cosine``.
        unit: The features are scaled to unit length first.
        rerank: Rank by k-reciprocal re-ranked distances. Those start from Euclidean distances, which order unit features
            as the cosine does; so ``cosine`` means unit features here.
        rival: Rank by the distances of another re-ranking, which works on unit features.
        protocol: Under which.
        cuhk03: Score the ranking with one random gallery image per identity, the mean of some draws.
    """

    distance: str = "euclidean"
    unit: bool = False
    rerank: bool = False
    rival: Rival | None = None
    protocol: str = ""
    cuhk03: bool = False

    @property
    def reranks(self) -> bool:
        """Whether it ranks by something else than the distance of two features."""
        return self.rerank or self.rival is not None

    def __str__(self) -> str:
        of = "cosine" if self.distance == "cosine" else "Euclidean" + (", unit features" if self.unit else "")
        text = f"k-reciprocal re-ranking of {of}" if self.rerank else of
        text = text if self.rival is None else f"{self.rival.title.lstrip('+ ')} of {of}"
        return text + (f"; single-gallery-shot CMC, {CUHK03_REPEATS} draws" if self.cuhk03 else "")


class Scorer:
    """Rank one test set's features in several ways.

    Gallery images of a query's identity and camera are discarded, and so is a query's own file: the query is no match of
    itself. That holds for the ranked list; what a query or a gallery image is averaged with, attends to or is re-ranked
    among is the gallery as it is, since no label enters there.

    Args:
        data: Its features; they say which labels there are, and which gallery images are queries themselves.
        options: What to evaluate.
    """

    def __init__(self, data: TestFeatures, options: EvaluationOptions) -> None:
        self.options = options
        query, gallery = data.query, data.gallery
        self.labels: dict[str, Any] = {
            "query_pids": query.pids,
            "gallery_pids": gallery.pids,
            "query_camids": query.camids,
            "gallery_camids": gallery.camids,
        }
        known = len(query.paths) == len(query) and len(gallery.paths) == len(gallery)
        numbers = file_numbers(query.paths, gallery.paths) if known else None
        if numbers is not None:
            self.labels["query_files"], self.labels["gallery_files"] = numbers

    def metric(self, distance: str | None = None, *, rerank: bool = False) -> Metric:
        """Return the metric of a row.

        Args:
            distance: The features' own; ``None``: that of the image model's features.
            rerank: Re-rank this row even if the options do not say so for all.
        """
        options = self.options
        return Metric(
            distance=options.metric if distance is None else distance,
            unit=options.normalise and distance is None,
            rerank=rerank or options.rerank_all,
            cuhk03=options.cuhk03_metric,
        )

    def rival_metric(self, name: str, protocol: str = "") -> Metric:
        """Return the metric of a rival's row.

        Args:
            name: In :data:`~relreid_plugin.metrics.rivals.RIVALS`.
            protocol: One of the rival's; empty: as the options say.
        """
        rival, options = RIVALS[name], self.options
        wanted = protocol or rival.protocol(options.rival_protocol)
        return Metric(distance="cosine", rival=rival, protocol=wanted, cuhk03=options.cuhk03_metric)

    def __call__(self, query: Tensor, gallery: Tensor, metric: Metric) -> RankingResult:
        """Rank features by a metric.

        Args:
            query: (Q, d).
            gallery: (G, d).
            metric: From :meth:`metric`.
        """
        if not metric.reranks and not metric.cuhk03:
            max_rank = max(50, *self.options.ranks)
            query, gallery = self._scaled(query, gallery, metric)
            return evaluate_features(query, gallery, **self.labels, metric=metric.distance, max_rank=max_rank)
        return self.of_distances(self.distances(query, gallery, metric), cuhk03=metric.cuhk03)

    def of_distances(self, distances: Tensor, *, cuhk03: bool = False) -> RankingResult:
        """Rank by given distances (Q, G), smaller is nearer; ``cuhk03``: by CUHK03's protocol of single shots."""
        max_rank = max(50, *self.options.ranks)
        if cuhk03:
            draws: dict[str, Any] = {"num_repeats": CUHK03_REPEATS, "seed": CUHK03_SEED}
            return evaluate_cuhk03(distances, **self.labels, **draws, max_rank=max_rank)
        return evaluate_ranking(distances, **self.labels, max_rank=max_rank)

    def verification(self, query: Tensor, gallery: Tensor, metric: Metric) -> Verification:
        """Return ROC, EER and rates of all pairs, scored by the distances of a metric; the arguments of calling."""
        if metric.reranks:
            whole = self.distances(query, gallery, metric)
            return self._verified(lambda rows: -whole[rows])
        query, gallery = self._scaled(query, gallery, metric)
        if metric.distance == "cosine":
            return self._verified(cosine_scores(normalise(query), normalise(gallery)))
        return self._verified(lambda rows: -pairwise_distance(query[rows], gallery, metric=metric.distance))

    def _verified(self, scores: Scores) -> Verification:
        return verify(scores, self.labels["query_pids"], self.labels["gallery_pids"], junk=self.junk)

    def junk(self, rows: slice) -> np.ndarray:
        """Return which gallery images are discarded for some queries, (B, G) bool."""
        labels = self.labels

        def equal(name: str) -> np.ndarray:
            return labels[f"query_{name}"][rows, None] == labels[f"gallery_{name}"][None]

        junk = equal("pids") & equal("camids")
        return junk | equal("files") if "query_files" in labels else junk

    def _scaled(self, query: Tensor, gallery: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        if metric.unit or (metric.rerank and metric.distance == "cosine"):
            return normalise(query), normalise(gallery)
        return query, gallery

    def distances(self, query: Tensor, gallery: Tensor, metric: Metric) -> Tensor:
        """Return the distances (Q, G) by which a metric ranks features; the arguments of calling the scorer."""
        if metric.rival is not None:
            return metric.rival.distances(
                query,
                gallery,
                query_cameras=self.labels["query_camids"],
                gallery_cameras=self.labels["gallery_camids"],
                protocol=metric.protocol,
                **self.options.settings(metric.rival.name),
            )
        query, gallery = self._scaled(query, gallery, metric)
        if not metric.rerank:
            return pairwise_distance(query, gallery, metric=metric.distance)
        options = self.options
        return torch.from_numpy(
            k_reciprocal_rerank_features(query, gallery, k1=options.k1, k2=options.k2, lambda_value=options.lambda_value)
        )
