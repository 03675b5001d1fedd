"""A run's results as files: ``metrics.json``, ``table.md``, the training curves; and reading them again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import UserError, shown
from ..reading import read_json

_TEXTS, _SCORES = ("target", "protocol", "method"), ("mAP", "mINP")


def _number(value: Any, most: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most + 1e-6 and value < math.inf


def _wrong(row: dict[str, Any]) -> str:
    """What is not as it was written in a row of the table; empty: nothing."""
    for key in (*_TEXTS, *_SCORES, "cmc", "parameters"):
        if key not in row:
            return f"a row has no '{key}'"
    cmc = row["cmc"]
    if not isinstance(cmc, dict) or not cmc or not all(rank.isdecimal() and _number(cmc[rank], 1) for rank in cmc):
        return f"'cmc' of a row is {shown(cmc)}, not ranks to fractions of 1"
    for keys, right, form in (
        (_TEXTS, lambda value: isinstance(value, str), "a text"),
        (_SCORES, lambda value: _number(value, 1), "a fraction of 1"),
        (("parameters", "seconds", "queries"), lambda value: _number(value), "a number"),
        (("metric",), lambda value: isinstance(value, str), "a text"),
        (("verification",), lambda value: isinstance(value, dict), "a mapping"),
    ):
        for key in keys:
            if key in row and not right(row[key]):
                return f"'{key}' of a row is {shown(row[key])}, not {form}"
    return ""


def _wrong_metrics(metrics: dict[str, Any]) -> str:
    rows, history, selected = metrics.get("rows"), metrics.get("history"), metrics.get("selected_epoch")
    table = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    if not table or not isinstance(history, dict) or not isinstance(selected, dict):
        return "its table or history is missing"
    if not all(isinstance(part, list) and all(isinstance(epoch, dict) for epoch in part) for part in history.values()):
        return "its history is no list of epochs per stage"
    if not all(_number(epoch) for epoch in selected.values()):
        return "'selected_epoch' holds no numbers of epochs"
    notes = metrics.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        return "its notes are no list of texts"
    return next(filter(None, map(_wrong, metrics["rows"])), "")


def read_metrics(folder: Path | str) -> dict[str, Any]:
    """Read a run folder's ``metrics.json``.

    Raises:
        UserError: The folder holds no finished run, or the file is damaged.
    """
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise UserError(f"'{folder}' holds no finished run ('{path}' does not exist).")
    remedy = "test the run again by relreid test, or put back a copy"
    metrics = read_json(path, what="metrics of a run", remedy=remedy)
    wrong = _wrong_metrics(metrics)
    if wrong:
        raise UserError(f"'{path}' is damaged ({wrong}); {remedy}.")
    return metrics


def without_nan(value: Any) -> Any:
    """Return a value for JSON: numbers that are not finite become ``None``."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
