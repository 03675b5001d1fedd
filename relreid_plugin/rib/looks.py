"""What the report of a run asks of its network: Grad-CAM of some queries, mAP over the covered part of the queries.

Shape letters: B queries, h x w pixels, d feature width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.bank import bank_file
from ..engine.runner import Run
from ..errors import UserError
from ..features.sets import TestFeatures
from ..files import WriteError, write_json
from ..host import make_loader
from ..methods import Looks, Overlay, Panel, Table
from ..reading import read_json
from .gradcam import cams, identity_features
from .occlusion import alter_queries

FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8)
"""Covered shares of the queries."""
MOST_QUERIES = 1000
"""That are covered; of more, as many spread over all."""
FOLDER = "occlusion"
"""Folder in a run's that keeps the scores."""
_SEED, _FILL = 0, "noise"


class RIBLooks(Looks):
    """Grad-CAM, and mAP over the covered part of the queries."""

    def wanted(self, cfg: Any) -> bool:
        """Runs with RIB's attention or bound."""
        return cfg.rib.attention != "none" or cfg.rib.ibb.eta > 0

    def overlays(self, run: Run, target: str, data: TestFeatures, rows: Sequence[int]) -> list[Overlay]:
        """What speaks for the likeness to the query's identity, by Grad-CAM."""
        chosen = data.query.take(np.asarray(rows))
        loader = make_loader(run.datamanager, _items(chosen), run.datamanager.transform_te, run.cfg.test.batch_size, 0)
        images = torch.cat([batch["img"] for batch in loader])
        cameras = run.test_cameras(target)(torch.from_numpy(chosen.camids)).numpy()
        wanted = identity_features(run, data.gallery, images, chosen.pids, cameras, chosen.paths)
        about = "what speaks for the cosine to the mean of the identity's gallery features; blue: nothing, red: most"
        return [Overlay("Grad-CAM", about, cams(run, images, cameras, wanted))]

    def measured(self, run: Run, target: str, data: TestFeatures) -> list[Panel | Table]:
        """mAP and R1 over the covered part."""
        found = covered_scores(run, target, data)
        about = "" if found["queries"] == found["of"] else f"; {found['queries']:,} of {found['of']:,} queries"
        title = f"Queries covered by blocks of random colours{about}"
        scores = {name: found[name] for name in ("mAP", "rank1")}
        lines = {
            label: [(100 * share, 100 * value) for share, value in zip(found["fractions"], scores[name])]
            for label, name in (("mAP", "mAP"), ("R1", "rank1"))
        }
        rows = [(f"{share:.0%}", *values) for share, *values in zip(found["fractions"], scores["mAP"], scores["rank1"])]
        return [
            Panel(title, "covered part of every query, %", "mAP and R1, %", lines, target=target),
            Table(title, ("covered", "mAP", "R1"), rows, target=target),
        ]


def covered_scores(
    run: Run, target: str, data: TestFeatures, *, fractions: Sequence[float] = FRACTIONS, most: int = MOST_QUERIES
) -> dict[str, Any]:
    """Return scores of the image model while more and more of every query is covered; the gallery stays as it is.

    They are kept in the run's folder, and taken from there while model, images and keys of ``test`` are the same.

    Args:
        run: An opened run of single images.
        target: A test set of its.
        data: Its features.
        fractions: Covered shares; 0 is scored by ``data`` itself.
        most: Queries that are covered at most.

    Returns:
        ``target``, ``key``, ``fractions``, ``queries``, ``of`` (queries in all), ``mAP`` and ``rank1`` by fraction.

    Raises:
        UserError: An image is not there.
    """
    count = len(data.query)
    rows = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    chosen = data.query.take(rows)
    path = bank_file(run.folder / FOLDER, target).with_suffix(".json")
    key = _key(run, target, replace(data, query=chosen), fractions)
    if path.is_file():
        kept = read_json(path, what="scores of covered queries", remedy="take it away, and it is measured again")
        if kept.get("key") == key:
            return kept
    scores = []
    for fraction in fractions:
        query = chosen
        if fraction > 0:
            alter = partial(alter_queries, fraction=fraction, seed=_SEED, fill=_FILL)
            found = run.features.bank(f"{target}-query", _items(chosen), keep=False, target=target, alter=alter)
            query = replace(chosen, features=found.features)
        result = run.score(TestFeatures(query, data.gallery))
        scores.append((float(result.mAP), float(result.rank(1))))
    content = {
        "target": target,
        "key": key,
        "fill": _FILL,
        "seed": _SEED,
        "fractions": list(fractions),
        "queries": len(rows),
        "of": count,
        "mAP": [one for one, _ in scores],
        "rank1": [one for _, one in scores],
    }
    try:
        write_json(path, content)
    except WriteError as error:
        if not error.read_only:
            raise
    return content


def _key(run: Run, target: str, data: TestFeatures, fractions: Sequence[float]) -> str:
    """What the scores depend on: weights, how images are read and scored, queries and gallery."""
    about = (run.fingerprint, run.network.describe_input(run), run.cfg.test.dump(), tuple(fractions), _SEED, _FILL)
    digest = hashlib.sha256(repr((about, run.cfg.data.height, run.cfg.data.width, target)).encode())
    for part in (data.query, data.gallery):
        digest.update(repr(part.paths).encode("utf-8", "surrogateescape"))
        for values in (part.features.numpy(), part.pids, part.camids):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:20]


def _items(queries: Any) -> list[tuple[str, int, int, int]]:
    """The host's tuples of images.

    Raises:
        UserError: One of them is not there.
    """
    missing = next((path for path in queries.paths if not Path(path).is_file()), None)
    if missing is not None or not queries.paths:
        raise UserError(f"the image '{missing}' is not there." if queries.paths else "the queries have no images.")
    rows = zip(queries.paths, queries.pids, queries.camids)
    return [(path, int(pid), int(camera), 0) for path, pid, camera in rows]


__all__ = ["FRACTIONS", "MOST_QUERIES", "RIBLooks", "covered_scores"]
