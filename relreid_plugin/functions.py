"""Features in, numbers out: scores, re-ranking and search on arrays or on files of features. No host is needed.

Shape letters: Q queries, G gallery images, d width, k results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .engine.scoring import EvaluationOptions, Scorer
from .errors import UserError
from .features.files import read
from .features.pairs import both_have_cameras, test_set
from .features.sets import Features, TestFeatures, common_model
from .metrics.candidates import exact_scores
from .metrics.neighbours import normalise, topk_neighbours
from .metrics.ranking import RankingResult, evaluate_ranking
from .metrics.rivals import rival_named
from .options import check_integer
from .search.exact import stable_order
from .search.gallery import SearchResult, near_enough

Labels = Any
"""(N,) identities or cameras: numbers or names."""
Source = Any
""":class:`~relreid_plugin.features.sets.Features`, an array or tensor (N, d), or a file that
:func:`~relreid_plugin.features.files.read` reads."""


def as_features(source: Source, identities: Labels = None, cameras: Labels = None, *, name: str = "") -> Features:
    """Return features of whatever is given.

    Args:
        source: See :data:`Source`.
        identities: (N,), with an array.
        cameras: The same.
        name: What sentences call an array.

    Raises:
        UserError: Labels are given beside features that have them, or something does not fit.
    """
    if isinstance(source, (str, Path)):
        source = read(source)
    if isinstance(source, Features):
        if identities is not None or cameras is not None:
            raise UserError(f"{source.called} have their own identities and cameras; leave the others out.")
        return source
    return Features.of(source, identities, cameras, source=name)


def as_pair(query: Source, gallery: Source, identities: Any = None, cameras: Any = None) -> tuple[Features, Features]:
    """Return queries and gallery of one width; labels come as pairs (of queries, of gallery)."""
    for what, pair in (("identities", identities), ("cameras", cameras)):
        if pair is not None and (not isinstance(pair, (tuple, list)) or len(pair) != 2):
            raise UserError(f"{what} take a pair: those of the queries and those of the gallery.")
    labels = [pair or (None, None) for pair in (identities, cameras)]
    both = tuple(
        as_features(source, labels[0][side], labels[1][side], name=name)
        for side, (source, name) in enumerate(((query, "query"), (gallery, "gallery")))
    )
    if both[0].dim != both[1].dim:
        raise UserError(f"queries have width {both[0].dim} and the gallery {both[1].dim}; one model makes both.")
    common_model(both)
    return both[0], both[1]


def evaluate(
    query: Source,
    gallery: Source,
    *,
    identities: tuple[Labels, Labels] | None = None,
    cameras: tuple[Labels, Labels] | None = None,
    metric: str = "cosine",
    distances: Any = None,
    max_rank: int = 50,
) -> RankingResult:
    """Score a ranking of the gallery for every query: mAP, CMC and mINP, as the tables of runs do.

    Gallery images of a query's identity and camera are discarded, and so is a query's own file. Images without an identity
    are left out; where there are no cameras, none is discarded.

    Args:
        query: Q queries, see :data:`Source`.
        gallery: G images.
        identities: Those of both, with arrays.
        cameras: Those of both, with arrays that have any.
        metric: ``cosine`` or ``euclidean``.
        distances: (Q, G) to rank by instead, such as those of :func:`rerank`.
        max_rank: Length of the CMC curve.

    Raises:
        UserError: What does not fit, or no query has a match.

    Example:
        >>> import numpy as np
        >>> import relreid_plugin
        >>> query, gallery = np.eye(4)[:2], np.eye(4)
        >>> relreid_plugin.evaluate(query, gallery, identities=([0, 1], [0, 1, 2, 3])).mAP
        1.0
    """
    check_integer("max_rank", max_rank, 1)
    if metric not in ("cosine", "euclidean"):
        raise UserError(f"metric is '{metric}'; valid ones: cosine, euclidean.")
    first, second = as_pair(query, gallery, identities, cameras)
    data, notes = test_set(first, second)
    for note in notes:
        if "left out" in note:
            print(f"note: {note}")
    scorer = Scorer(data, EvaluationOptions(metric=metric, ranks=(max_rank,)))
    if distances is None:
        return scorer(data.query.features, data.gallery.features, scorer.metric())
    matrix = np.asarray(distances.detach().cpu() if isinstance(distances, Tensor) else distances)
    if matrix.shape != (len(first), len(second)):
        raise UserError(
            f"distances have the shape {matrix.shape}, but there are {len(first)} queries and {len(second)} gallery images."
        )
    matrix = matrix[np.ix_(first.pids != -1, second.pids != -1)]
    return evaluate_ranking(matrix, **scorer.labels, max_rank=max_rank)


def rerank(
    query: Source,
    gallery: Source,
    *,
    by: str = "rerank",
    cameras: tuple[Labels, Labels] | None = None,
    protocol: str | None = None,
    **settings: Any,
) -> Tensor:
    """Return distances (Q, G) of the queries to the gallery, ranked anew; smaller is nearer.

    Args:
        query: Q queries, see :data:`Source`.
        gallery: G images.
        by: A name in :data:`~relreid_plugin.metrics.rivals.RIVALS`: ``rerank`` (k-reciprocal), ``aqe``, ``aqe-alpha``,
            ``gnn``, ``gcr``, ``cajaccard``, ``nfc``, ``diffusion``.
        cameras: Those of both, with arrays, where the re-ranking uses them.
        protocol: ``inductive`` or ``transductive``; ``None``: the published one.
        settings: Values in place of the paper's, such as ``k1=20``.

    Returns:
        (Q, G) float32 on the CPU, for :func:`evaluate`.

    Raises:
        UserError: An unknown name or setting, missing cameras or those of one side alone, or what does not fit.
    """
    rival = rival_named(by)
    first, second = as_pair(query, gallery, None, cameras)
    seen = {}
    if rival.cameras != "none" and both_have_cameras(first, second):
        seen = {"query_cameras": first.camids, "gallery_cameras": second.camids}
    return rival.distances(first.features, second.features, protocol=protocol, **seen, **settings)


def search(query: Source, gallery: Source, k: int = 10, *, threshold: float | None = None) -> SearchResult:
    """Return the k gallery images nearest to every query, by cosine, exactly.

    Args:
        query: Q queries, see :data:`Source`.
        gallery: G images.
        k: Results per query; cut to G.
        threshold: Results that score less are left out (row -1), so a query may have none: it is not in the gallery.

    Raises:
        UserError: What does not fit.
    """
    check_integer("k", k, 1)
    first, second = as_pair(query, gallery)
    queries, images = normalise(first.features), normalise(second.features)
    rows = topk_neighbours(queries, images, k)
    scores, rows = stable_order(exact_scores(queries, images, rows).float(), rows, k)
    if threshold is not None:
        scores, rows = near_enough(scores, rows, threshold)
    chosen, there = rows.numpy(), rows.numpy() >= 0
    return SearchResult(
        scores,
        rows,
        np.where(there, second.pids[chosen], -1),
        np.where(there, second.camids[chosen], -1),
        [[second.paths[row] if row >= 0 and second.paths else "" for row in line] for line in rows.tolist()],
        dict(second.identity_names),
        dict(second.camera_names),
    )


__all__: Sequence[str] = ["TestFeatures", "as_features", "as_pair", "evaluate", "rerank", "search"]
