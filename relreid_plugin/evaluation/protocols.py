"""Evaluating features, the rivals and the relation encoder under the two protocols of METHODS 1.

``inductive``: every query is alone with the gallery; its score does not depend on the other queries. ``transductive``:
all queries and the gallery look at each other. A row carries its protocol, and the two are never mixed in a table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..functional.distance import pairwise_distance
from ..functional.expansion import average_query_expansion, database_augmentation
from ..functional.neighbours import normalise
from ..functional.ranking import RankingResult, evaluate_cuhk03, evaluate_features, evaluate_ranking
from ..functional.reranking import k_reciprocal_rerank_features
from ..models.relation import RelationEncoder
from .features import TestFeatures


@dataclass(frozen=True)
class Row:
    """One line of a result table; scores are fractions of 1, times in seconds.

    Attributes:
        target: Test set.
        protocol: ``inductive`` or ``transductive``.
        method: What was done with the features.
        mAP, mINP: Means over the queries with a match.
        cmc: Rank (as text) to CMC score.
        parameters: Parameters used for inference, image model and relation encoder together.
        seconds: Time after the features were there: refinement, search and scoring.
        queries: Queries that were scored.
    """

    target: str
    protocol: str
    method: str
    mAP: float
    mINP: float
    cmc: dict[str, float]
    parameters: int
    seconds: float
    queries: int

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, and how (see the configuration keys of the same names).

    Attributes:
        metric: ``euclidean`` or ``cosine`` distance of the image model's features.
        normalise: L2-normalise them first.
        ranks: CMC ranks.
        rivals: ``aqe``, ``rerank``.
        aqe_k, aqe_alpha: Query expansion.
        k1, k2, lambda_value: k-reciprocal re-ranking.
        rerank_all: Re-rank every row's features instead of ranking them by distance.
        cuhk03_metric: Single-gallery-shot metric of the classic CUHK03 split.
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


class Evaluator:
    """Score one test set in several ways.

    Args:
        target: Name of the test set.
        data: Its features.
        options: What to evaluate.
        parameters: Inference parameters of the image model.
    """

    def __init__(self, target: str, data: TestFeatures, *, options: EvaluationOptions, parameters: int) -> None:
        self.target, self.data, self.options, self.parameters = target, data, options, parameters
        if not len(data.query) or not len(data.gallery):
            raise UserError(
                f"test set '{target}' has {len(data.query)} query and {len(data.gallery)} gallery images; both are needed."
            )

    def _row(self, result: RankingResult, protocol: str, method: str, started: float, extra: int = 0) -> Row:
        return Row(
            target=self.target,
            protocol=protocol,
            method=method,
            mAP=float(result.mAP),
            mINP=float(result.mINP),
            cmc={str(rank): float(result.rank(rank)) for rank in self.options.ranks},
            parameters=self.parameters + extra,
            seconds=time.perf_counter() - started,
            queries=int(result.num_valid_queries),
        )

    def _labels(self) -> tuple:
        query, gallery = self.data.query, self.data.gallery
        return query.pids, gallery.pids, query.camids, gallery.camids

    def score(self, query: Tensor, gallery: Tensor, metric: str) -> RankingResult:
        """Rank by distance, or by re-ranked distance with ``rerank_all``."""
        max_rank = max(50, *self.options.ranks)
        if self.options.rerank_all:
            return evaluate_ranking(self._rerank(query, gallery), *self._labels(), max_rank=max_rank)
        if self.options.cuhk03_metric:
            return evaluate_cuhk03(pairwise_distance(query, gallery, metric=metric), *self._labels(), max_rank=max_rank)
        return evaluate_features(query, gallery, *self._labels(), metric=metric, max_rank=max_rank)

    def _rerank(self, query: Tensor, gallery: Tensor):
        options = self.options
        return k_reciprocal_rerank_features(query, gallery, k1=options.k1, k2=options.k2, lambda_value=options.lambda_value)

    def baseline(self, name: str = "image model") -> Row:
        """The image model's features, ranked by distance.

        Args:
            name: The method's name in the table.
        """
        started = time.perf_counter()
        query, gallery = self.data.query.features, self.data.gallery.features
        if self.options.normalise:
            query, gallery = normalise(query), normalise(gallery)
        name += " + k-reciprocal re-ranking" if self.options.rerank_all else ""
        protocol = "transductive" if self.options.rerank_all else "inductive"
        return self._row(self.score(query, gallery, self.options.metric), protocol, name, started)

    def rivals(self) -> list[Row]:
        """What a user would do instead on the same features."""
        options, rows = self.options, []
        query, gallery = normalise(self.data.query.features), normalise(self.data.gallery.features)
        if "aqe" in options.rivals:
            started = time.perf_counter()
            expanded = average_query_expansion(query, gallery, k=options.aqe_k, alpha=options.aqe_alpha)
            augmented = database_augmentation(gallery, k=options.aqe_k, alpha=options.aqe_alpha)
            result = evaluate_features(
                expanded, augmented, *self._labels(), metric="cosine", max_rank=max(50, *options.ranks)
            )
            rows.append(self._row(result, "inductive", "+ average query expansion", started))
        if "rerank" in options.rivals and not options.rerank_all:
            started = time.perf_counter()
            result = evaluate_ranking(self._rerank(query, gallery), *self._labels(), max_rank=max(50, *options.ranks))
            rows.append(self._row(result, "transductive", "+ k-reciprocal re-ranking", started))
        return rows

    @torch.no_grad()
    def refined_result(self, encoder: RelationEncoder, protocol: str) -> RankingResult:
        """Refine query and gallery features under a protocol and rank them by cosine distance."""
        device = next(encoder.parameters()).device
        encoder.eval()
        query, gallery = self.data.query.features.to(device), self.data.gallery.features.to(device)
        if protocol == "inductive":
            states = encoder.refine_gallery(gallery, self.data.gallery.camids)
            refined_query = encoder.refine_queries(query, states, self.data.query.camids)
            refined_gallery = states.refined
        else:
            cameras = np.concatenate([self.data.query.camids, self.data.gallery.camids])
            both = encoder(torch.cat([query, gallery]), cameras=cameras)
            refined_query, refined_gallery = both[: len(query)], both[len(query) :]
        return self.score(refined_query.float().cpu(), refined_gallery.float().cpu(), "cosine")

    def relation(self, encoder: RelationEncoder, *, protocol: str, name: str) -> Row:
        """The relation encoder's line of the table under one protocol."""
        started = time.perf_counter()
        result = self.refined_result(encoder, protocol)
        return self._row(result, protocol, name, started, inference_parameters(encoder))


def inference_parameters(model: nn.Module) -> int:
    """Return how many parameters testing uses: all but those of classifiers and class centers."""
    return sum(value.numel() for name, value in model.named_parameters() if "classifier" not in name.split("."))
