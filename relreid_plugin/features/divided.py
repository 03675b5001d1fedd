"""Features without splits, divided by a rule that is written beside them, so that it is the same next time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rules import RULES, Parts, divide
from ..errors import UserError, did_you_mean
from ..files import WriteError, write_json
from ..reading import read_json
from .sets import Features

FORMAT = 1
SEED = 1
"""Draws identities and queries; the file beside the data keeps what was drawn."""


def split_file(path: Path | str, rule: str, *, train: bool) -> Path:
    """Return where the parts of features are written: ``x.npz.split-image.json``, in a store's or run's folder beside it."""
    path = Path(path)
    return path.parent / f"{path.name}.split-{rule}{'-train' if train else ''}.json"


def divided(features: Features, path: Path | str, rule: str, *, train: bool = False) -> tuple[Parts, str]:
    """Divide features by a rule, or as they were divided before.

    Args:
        features: With identities.
        path: Where they were read from; the parts are written beside it.
        rule: One of :data:`~relreid_plugin.data.rules.RULES`.
        train: Whether training images are needed.

    Returns:
        Rows of train, query and gallery, and a sentence that says how they were divided.

    Raises:
        UserError: See :func:`~relreid_plugin.data.rules.divide`; or the file of the parts is damaged or of other features.
    """
    if rule not in RULES:
        raise UserError(f"there is no rule '{rule}' to divide features by{did_you_mean(rule, RULES)}")
    place, digest = split_file(path, rule, train=train), _digest(features)
    if place.is_file():
        return _read(place, digest, len(features)), f"'{path}' is divided as '{place}' says"
    what = f"'{features.source or path}'"
    parts = divide(features.pids, features.camids, features.times, rule, train=train, seed=SEED, what=what)
    content = {"format": FORMAT, "rule": rule, "seed": SEED, "rows": len(features), "labels": digest}
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in parts.items() if len(rows))
    sentence = f"'{path}' has no splits and is divided by the rule '{rule}' ({counts})"
    try:
        write_json(place, {**content, **{name: rows.tolist() for name, rows in parts.items()}})
    except WriteError as error:
        if not error.read_only:
            raise
        return parts, f"{sentence}; it cannot be written beside the data, the same labels will be divided in the same way"
    return parts, f"{sentence}, as written into '{place}'"


def _digest(features: Features) -> str:
    digest = hashlib.sha256()
    columns: list[Any] = [features.pids, features.camids]
    for column in columns + ([] if features.times is None else [features.times]):
        digest.update(np.ascontiguousarray(column).tobytes() + b"|")
    for name in features.paths:
        digest.update(os.path.basename(name).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:20]


def _read(place: Path, digest: str, count: int) -> Parts:
    way_out = "take it away to divide the features anew, which changes what is tested"
    found = read_json(place, what="splits of features", remedy=way_out)
    try:
        parts = {name: np.array(found[name], dtype=np.int64).reshape(-1) for name in ("train", "query", "gallery")}
        if found["labels"] != digest or found["rows"] != count:
            raise UserError(f"'{place}' divides other features ({found['rows']} rows) than are there ({count}); {way_out}.")
        if any(len(rows) and not 0 <= rows.min() <= rows.max() < count for rows in parts.values()):
            raise ValueError("rows that are not there")
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"'{place}' is damaged (no splits of features); {way_out}.") from None
    return parts
