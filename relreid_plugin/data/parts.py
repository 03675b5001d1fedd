"""Parts of what came without splits, written beside it when they are made, and read again the next time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import WriteError, write_json
from ..reading import read_json
from .rules import Parts

FORMAT = 1
SEED = 1
"""Draws identities and queries; the file beside the data keeps what was drawn."""


@dataclass(frozen=True)
class Kept:
    """Parts that are kept in a file.

    Attributes:
        parts: Rows of every part.
        said: How they came about, for people.
        stored: What the file holds; empty where it was made just now.
    """

    parts: Parts
    said: str
    stored: dict[str, Any]


def split_file(path: Path | str, rule: str, *, train: bool = False) -> Path:
    """Return where parts are written: ``x.npz.split-image.json``, of a folder beside it."""
    path = Path(path)
    return path.parent / f"{path.name}.split-{rule}{'-train' if train else ''}.json"


def keep_parts(
    path: Path | str,
    place: Path,
    *,
    rule: str,
    labels: str,
    count: int,
    what: str,
    make: Callable[[], Parts],
    more: dict[str, Any] | None = None,
) -> Kept:
    """Return parts as they were made before, or make them and write them.

    Args:
        path: Where the data was read from, for sentences.
        place: The file of the parts, as :func:`split_file` names it.
        rule: The rule's name, for sentences and the file.
        labels: Hash of all that the parts depend on.
        count: Rows that there are.
        what: What the rows are, plural.
        make: Divides them.
        more: Written into the file as well.

    Raises:
        UserError: The file is damaged, or of other data.
    """
    if place.is_file():
        parts, stored = _read(place, labels, count, what)
        return Kept(parts, f"'{path}' is divided as '{place}' says ({_counts(parts)})", stored)
    parts = make()
    content = {"format": FORMAT, "rule": rule, "seed": SEED, "rows": count, "labels": labels, **(more or {})}
    said = f"'{path}' has no splits and is divided by the rule '{rule}' ({_counts(parts)})"
    try:
        write_json(place, {**content, **{name: rows.tolist() for name, rows in parts.items()}})
    except WriteError as error:
        if not error.read_only:
            raise
        said += "; it cannot be written beside the data, the same labels will be divided in the same way"
    else:
        said += f", as written into '{place}'"
    return Kept(parts, said, {})


def _counts(parts: Parts) -> str:
    return ", ".join(f"{len(parts[name])} {name}" for name in ("train", "query", "gallery") if len(parts[name]))


def _read(place: Path, labels: str, count: int, what: str) -> tuple[Parts, dict[str, Any]]:
    way_out = f"take it away to divide the {what} anew, which changes what is tested"
    found = read_json(place, what=f"splits of {what}", remedy=way_out)
    try:
        parts = {name: np.array(found[name], dtype=np.int64).reshape(-1) for name in ("train", "query", "gallery")}
        if found["labels"] != labels or found["rows"] != count:
            raise UserError(f"'{place}' divides other {what} ({found['rows']} rows) than are there ({count}); {way_out}.")
        if any(len(rows) and not 0 <= rows.min() <= rows.max() < count for rows in parts.values()):
            raise ValueError("rows that are not there")
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"'{place}' is damaged (no splits of {what}); {way_out}.") from None
    return parts, found


__all__ = ["SEED", "Kept", "keep_parts", "split_file"]
