"""Ranges of values: what becomes black and white in pictures of more than 8 bits per channel."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any

from ..errors import UserError

Range = tuple[float, float]
RANGE_KEY = "'data.pixel_range'"


def check_range(key: str, value: Any) -> Range | None:
    """Return a configured range as (low, high), or None for an empty one.

    Raises:
        UserError: It is something else than two rising numbers; the sentence names ``key``.
    """
    if isinstance(value, (list, tuple)):
        if not value:
            return None
        numbers = [item for item in value if isinstance(item, (int, float)) and not isinstance(item, bool)]
        if len(numbers) == len(value) == 2 and all(map(math.isfinite, numbers)) and numbers[0] < numbers[1]:
            return float(numbers[0]), float(numbers[1])
    raise UserError(
        f"key '{key}' must be [low, high], two rising numbers (the values that become black and white), or [] for files of "
        f"8 bits, got {value!r}."
    )


def modality_ranges(modalities: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, Range | None]:
    """Return every modality's range out of the rows of ``multimodal.pixel_range``.

    Args:
        modalities: Names.
        rows: [low, high] or [] for each, or one row for all, or none at all.

    Raises:
        UserError: Another number of rows, or a row that is no range.
    """
    key = "multimodal.pixel_range"
    if len(rows) not in (0, 1, len(modalities)):
        raise UserError(
            f"key '{key}' must hold [low, high] (or []) for each of {', '.join(modalities)}, or once for all, got {rows!r}."
        )
    given = [check_range(key, row) for row in rows] or [None]
    return dict(zip(modalities, given * len(modalities) if len(given) == 1 else given))


def parse_range_rows(text: str) -> list[Any]:
    """Return the rows of ``multimodal.pixel_range`` out of a command line's text.

    Raises:
        UserError: The text is no list.
    """
    try:
        rows = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        rows = None
    if not isinstance(rows, (list, tuple)):
        raise UserError(f"command line: --pixel-range takes rows such as [[],[],[0,65535]], got '{text}'.")
    return list(rows)


def range_key(modality: str) -> str:
    """Return how sentences name a modality's range."""
    return f"'multimodal.pixel_range' for {modality}"


def needs_range(depth: str, key: str) -> tuple[str, str]:
    """Return reason and remedy of a file with more than 8 bits and no range."""
    return (
        f"has {depth}",
        f"give the values that become black and white by {key} (such as [0, 65535]), or convert the file to 8 bits",
    )
