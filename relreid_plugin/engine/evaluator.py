"""Evaluating features, the rivals and the relation encoder under the two protocols of METHODS 1.

``inductive``: every query is alone with the gallery; its score does not depend on the other queries. ``transductive``:
all queries and the gallery look at each other. A row carries its protocol, and the two are never mixed in a table.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..features.sets import TestFeatures
from ..magformer.encoder import RelationEncoder
from ..metrics.expansion import average_query_expansion, database_augmentation
from ..metrics.neighbours import normalise
from ..metrics.ranking import RankingResult
from ..metrics.rivals import RIVALS
from .scoring import EvaluationOptions, Metric, Scorer

RERANKED = " + k-reciprocal re-ranking"
"""What the name of a re-ranked method ends with."""


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
        metric: How the features were ranked and scored.
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
    metric: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)


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
        self.scorer = Scorer(data, options)

    def _row(self, result: RankingResult, metric: Metric, protocol: str, method: str, started: float, extra: int = 0) -> Row:
        """A row; what is re-ranked says so in its name and is transductive: queries look at each other."""
        everybody = self.options.rerank_all
        return Row(
            target=self.target,
            protocol="transductive" if everybody else protocol,
            method=method + (RERANKED if everybody else ""),
            mAP=float(result.mAP),
            mINP=float(result.mINP),
            cmc={str(rank): float(result.rank(rank)) for rank in self.options.ranks},
            parameters=self.parameters + extra,
            seconds=time.perf_counter() - started,
            queries=int(result.num_valid_queries),
            metric=str(metric),
        )

    def score(self, query: Tensor, gallery: Tensor, metric: str) -> RankingResult:
        """Rank features (Q, d) and (G, d) of the test set by ``euclidean`` or ``cosine`` distance, under the options."""
        return self.scorer(query, gallery, self.scorer.metric(metric))

    def baseline_result(self) -> RankingResult:
        """Scores of the image model's features, ranked as in :meth:`baseline`."""
        return self.scorer(self.data.query.features, self.data.gallery.features, self.scorer.metric())

    def baseline(self, name: str = "image model") -> Row:
        """The image model's features, ranked by the configured distance.

        Args:
            name: The method's name in the table.
        """
        started = time.perf_counter()
        return self._row(self.baseline_result(), self.scorer.metric(), "inductive", name, started)

    def rivals(self) -> list[Row]:
        """What a user would do instead on the same features, at unit length."""
        options, rows = self.options, []
        query, gallery = normalise(self.data.query.features), normalise(self.data.gallery.features)
        for name, rival in RIVALS.items():
            if name not in options.rivals:
                continue
            started, settings = time.perf_counter(), options.settings(name)
            if name in ("aqe", "aqe-alpha"):
                metric = self.scorer.metric("cosine")
                expanded = average_query_expansion(query, gallery, **settings)
                result = self.scorer(expanded, database_augmentation(gallery, **settings), metric)
            elif options.rerank_all:
                continue  # every row is re-ranked already
            else:
                metric = self.scorer.metric("cosine", rerank=True) if name == "rerank" else self.scorer.rival_metric(name)
                result = self.scorer(self.data.query.features, self.data.gallery.features, metric)
            rows.append(self._row(result, metric, metric.protocol or rival.protocols[0], rival.title, started))
        return rows

    @torch.no_grad()
    def refined_features(self, encoder: RelationEncoder, protocol: str) -> tuple[Tensor, Tensor]:
        """Return the test features of queries (Q, d) and gallery (G, d), refined under a protocol, on the CPU."""
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
        return refined_query.float().cpu(), refined_gallery.float().cpu()

    def refined_result(self, encoder: RelationEncoder, protocol: str) -> RankingResult:
        """Refine query and gallery features under a protocol and rank them by cosine."""
        return self.scorer(*self.refined_features(encoder, protocol), self.scorer.metric("cosine"))

    def relation(self, encoder: RelationEncoder, *, protocol: str, name: str) -> Row:
        """The relation encoder's line of the table under one protocol."""
        started = time.perf_counter()
        result = self.refined_result(encoder, protocol)
        if self.options.rerank_all and protocol == "inductive":
            name += " (inductive)"  # both protocols come under one heading
        return self._row(result, self.scorer.metric("cosine"), protocol, name, started, inference_parameters(encoder))


def inference_parameters(model: nn.Module) -> int:
    """Return how many parameters testing uses: all but those of classifiers and class centers."""
    return sum(value.numel() for name, value in model.named_parameters() if "classifier" not in name.split("."))
