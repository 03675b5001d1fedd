"""Evaluating features, the rivals and refining encoders under the two protocols of METHODS 1.

``inductive``: every query is alone with the gallery; its score does not depend on the other queries. ``transductive``:
all queries and the gallery look at each other. A row carries its protocol, and the two are never mixed in a table.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..features.sets import TestFeatures
from ..metrics.cameras import ALONE
from ..metrics.expansion import average_query_expansion, database_augmentation
from ..metrics.neighbours import normalise
from ..metrics.ranking import RankingResult
from ..metrics.rivals import RIVALS
from ..metrics.verification import Verification
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
        parameters: Parameters used for inference, image model and refining encoder together.
        seconds: Time after the features were there: refinement, search and scoring.
        queries: Queries that were scored.
        metric: How the features were ranked and scored.
        verification: EER and true-match rates with intervals, with ``test.verification True``.
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
    verification: dict[str, Any] = field(default_factory=dict)

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

    Attributes:
        verified: Name of every row so far to its ROC, with the option ``verification``.
    """

    def __init__(self, target: str, data: TestFeatures, *, options: EvaluationOptions, parameters: int) -> None:
        self.target, self.data, self.options, self.parameters = target, data, options, parameters
        if not len(data.query) or not len(data.gallery):
            raise UserError(
                f"test set '{target}' has {len(data.query)} query and {len(data.gallery)} gallery images; both are needed."
            )
        self.scorer = Scorer(data, options)
        self.verified: list[tuple[str, Verification]] = []

    def _row(
        self,
        result: RankingResult,
        metric: Metric,
        protocol: str,
        method: str,
        started: float,
        extra: int = 0,
        *,
        features: tuple[Tensor, Tensor],
    ) -> Row:
        """A row; what is re-ranked says so in its name and is transductive: queries look at each other."""
        everybody, seconds = self.options.rerank_all, time.perf_counter() - started
        verification: dict[str, Any] = {}
        if self.options.verification:
            found = self.scorer.verification(*features, metric)
            self.verified.append((f"{method} ({protocol})", found))
            verification = found.as_dict()
        return Row(
            target=self.target,
            protocol="transductive" if everybody else protocol,
            method=method + (RERANKED if everybody else ""),
            mAP=float(result.mAP),
            mINP=float(result.mINP),
            cmc={str(rank): float(result.rank(rank)) for rank in self.options.ranks},
            parameters=self.parameters + extra,
            seconds=seconds,
            queries=int(result.num_valid_queries),
            metric=str(metric),
            verification=verification,
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
        features = self.data.query.features, self.data.gallery.features
        return self._row(self.baseline_result(), self.scorer.metric(), "inductive", name, started, features=features)

    def row(
        self,
        query: Tensor,
        gallery: Tensor,
        *,
        name: str,
        metric: str = "cosine",
        protocol: str = "inductive",
        parameters: int = 0,
    ) -> Row:
        """A line of the table for changed features of the test set, its images in the same order.

        Args:
            query: (Q, d).
            gallery: (G, d).
            name: The method's name in the table.
            metric: ``cosine`` or ``euclidean``.
            protocol: ``inductive`` where a query's features depend on no other query, else ``transductive``.
            parameters: Inference parameters beside the network's.
        """
        started, found = time.perf_counter(), self.scorer.metric(metric)
        result = self.scorer(query, gallery, found)
        return self._row(result, found, protocol, name, started, parameters, features=(query, gallery))

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
                ranked = expanded, database_augmentation(gallery, **settings)
            elif options.rerank_all:
                continue  # every row is re-ranked already
            else:
                metric = self.scorer.metric("cosine", rerank=True) if name == "rerank" else self.scorer.rival_metric(name)
                ranked = self.data.query.features, self.data.gallery.features
            result = self.scorer(*ranked, metric)
            protocol = metric.protocol or rival.protocols[0]
            rows.append(self._row(result, metric, protocol, rival.title, started, features=ranked))
        return rows

    @torch.no_grad()
    def refined_features(self, encoder: Any, protocol: str) -> tuple[Tensor, Tensor]:
        """Return the test features of queries (Q, d) and gallery (G, d), refined under a protocol, on the CPU.

        Args:
            encoder: Module that refines features (N, d) by each other; ``refine_gallery`` and ``refine_queries`` refine a
                gallery by itself and queries each alone with it.
            protocol: ``inductive`` or ``transductive``.
        """
        device = next(encoder.parameters()).device
        encoder.eval()
        query, gallery = self.data.query.features.to(device), self.data.gallery.features.to(device)
        if protocol == "inductive":
            states = encoder.refine_gallery(gallery, self.data.gallery.camids)
            if getattr(states, "alone", False):
                print(f"note: '{self.target}': {ALONE}")
            refined_query = encoder.refine_queries(query, states, self.data.query.camids)
            refined_gallery = states.refined
        else:
            cameras = np.concatenate([self.data.query.camids, self.data.gallery.camids])
            both = encoder(torch.cat([query, gallery]), cameras=cameras)
            refined_query, refined_gallery = both[: len(query)], both[len(query) :]
        return refined_query.float().cpu(), refined_gallery.float().cpu()

    def refined_result(self, encoder: Any, protocol: str) -> RankingResult:
        """Refine query and gallery features under a protocol and rank them by cosine."""
        return self.scorer(*self.refined_features(encoder, protocol), self.scorer.metric("cosine"))

    def relation(self, encoder: Any, *, protocol: str, name: str) -> Row:
        """The line of a refining encoder in the table, under one protocol."""
        started = time.perf_counter()
        refined = self.refined_features(encoder, protocol)
        result = self.scorer(*refined, self.scorer.metric("cosine"))
        if self.options.rerank_all and protocol == "inductive":
            name += " (inductive)"  # both protocols come under one heading
        metric, parameters = self.scorer.metric("cosine"), inference_parameters(encoder)
        return self._row(result, metric, protocol, name, started, parameters, features=refined)


def inference_parameters(model: nn.Module) -> int:
    """Return how many parameters testing uses: all but those of classifiers and class centers."""
    return sum(value.numel() for name, value in model.named_parameters() if "classifier" not in name.split("."))
