"""Rankings of any program as JSON: every query's gallery images, the nearest first.

::

    {"target": "market1501", "method": "my model", "protocol": "inductive",
     "rankings": {"query/0001_c1.jpg": ["gallery/0001_c2.jpg", "gallery/0007_c1.jpg"]}}

``protocol`` may be left out (``inductive``). Identities and cameras are those of the run that it is compared with: images
are told by their paths, or where those differ by their file names. A list may leave out what the protocol discards for its
query and nothing else, since a score needs the ranks of all matches.

Shapes: Q queries, G gallery images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.evaluator import Evaluator
from ..engine.table import TITLES
from ..errors import UserError
from ..features.sets import TestFeatures
from ..metrics.ranking import RankingResult
from ..reading import read_json

_REMEDY = "write it as docs/howto/report.md says"


def read_ranking(path: Path | str) -> dict[str, Any]:
    """Return a ranking's ``target``, ``method``, ``protocol`` and ``rankings``.

    Raises:
        UserError: No such JSON.
    """
    found = {"protocol": "inductive", **read_json(path, what="ranking", remedy=_REMEDY)}
    lists: Any = found.get("rankings")
    texts = all(isinstance(found.get(name), str) for name in ("target", "method", "protocol"))
    whole = isinstance(lists, dict) and bool(lists)
    if (
        not texts
        or not whole
        or not all(isinstance(own, list) and all(isinstance(one, str) for one in own) for own in lists.values())
    ):
        raise UserError(
            f"'{path}' is no ranking: it needs texts for 'target' and 'method', and 'rankings', an object with a list of "
            f"gallery images for every query; {_REMEDY}."
        )
    if found["protocol"] not in TITLES:
        raise UserError(f"'{path}': 'protocol' is '{found['protocol']}'; valid ones: {', '.join(TITLES)}.")
    return found


def score_ranking(found: dict[str, Any], evaluator: Evaluator, *, path: Path | str) -> RankingResult:
    """Score a ranking by the labels and the protocol of a test set.

    Args:
        found: From :func:`read_ranking`.
        evaluator: Of the test set.
        path: For the sentences.

    Raises:
        UserError: Its images are not those of the test set, or a list leaves out an image that counts.
    """
    data, lists = evaluator.data, found["rankings"]
    if evaluator.options.cuhk03_metric:
        raise UserError(
            f"'{path}': the run scores '{evaluator.target}' by CUHK03's single shots, which a ranking cannot be."
        )
    queries = _places(list(lists), data.query.paths, path, "query")
    missing = sorted(set(range(len(data.query))) - set(queries.tolist()))
    if missing:
        first = data.query.paths[missing[0]]
        raise UserError(f"'{path}' has no list for {len(missing)} of {len(data.query)} queries; the first: '{first}'.")
    names = list(dict.fromkeys(name for own in lists.values() for name in own))
    numbers = dict(zip(names, _places(names, data.gallery.paths, path, "gallery").tolist()))
    ranks = np.full((len(data.query), len(data.gallery)), np.inf, np.float32)
    for query, own in zip(queries.tolist(), lists.values()):
        places = np.array([numbers[name] for name in own], np.int64)
        if len(np.unique(places)) < len(places):
            raise UserError(f"'{path}': the list of query '{data.query.paths[query]}' names an image twice.")
        ranks[query, places] = np.arange(len(places))
    _require_whole(ranks, evaluator, data, path)
    return evaluator.scorer.of_distances(torch.from_numpy(ranks))


def _require_whole(ranks: np.ndarray, evaluator: Evaluator, data: TestFeatures, path: Path | str) -> None:
    left = np.isinf(ranks) & ~evaluator.scorer.junk(slice(0, len(ranks)))
    if left.any():
        query, image = (int(place[0]) for place in np.nonzero(left))
        raise UserError(
            f"'{path}': the lists of {int(left.any(axis=1).sum())} queries leave out gallery images that count, the first "
            f"'{data.gallery.paths[image]}' of query '{data.query.paths[query]}'; write whole lists, not the nearest images."
        )


def _places(names: Sequence[str], paths: Sequence[str], path: Path | str, what: str) -> np.ndarray:
    """Return the rows of images (N,), by path or by file name."""
    if not paths:
        raise UserError(f"'{path}': the run that it is compared with knows no paths of its {what} images.")
    for key in (str, lambda name: Path(name).name):
        known = {key(own): row for row, own in enumerate(paths)}
        wanted = [key(name) for name in names]
        if len(known) == len(paths) and all(name in known for name in wanted):
            rows = np.array([known[name] for name in wanted], np.int64)
            if len(np.unique(rows)) == len(rows):
                return rows
    unknown = [name for name in names if Path(name).name not in {Path(own).name for own in paths}]
    if unknown:
        raise UserError(f"'{path}': {len(unknown)} {what} images are not in the test set; the first: '{unknown[0]}'.")
    raise UserError(f"'{path}': {what} images cannot be told by their file names, which are not unique; write whole paths.")


__all__ = ["read_ranking", "score_ranking"]
