"""A run's results as files: ``metrics.json``, ``table.md``, the training curves; and reading them again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..reading import read_json

_ROW = {"target", "protocol", "method", "mAP", "mINP", "cmc", "parameters"}


def read_metrics(folder: Path | str) -> dict[str, Any]:
    """Read a run folder's ``metrics.json``.

    Raises:
        UserError: The folder holds no finished run, or the file is damaged.
    """
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise UserError(f"'{folder}' holds no finished run ('{path}' does not exist).")
    remedy = "test the run again by tools/train_net.py --eval-only, or put back a copy"
    metrics = read_json(path, what="metrics of a run", remedy=remedy)
    rows, history = metrics.get("rows"), metrics.get("history")
    whole = isinstance(rows, list) and rows and all(isinstance(row, dict) and _ROW <= row.keys() for row in rows)
    if not whole or not isinstance(history, dict) or not isinstance(metrics.get("selected_epoch"), dict):
        raise UserError(f"'{path}' is damaged (its table or history is missing); {remedy}.")
    return metrics


def without_nan(value: Any) -> Any:
    """Return a value for JSON: numbers that are not finite become ``None``."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
