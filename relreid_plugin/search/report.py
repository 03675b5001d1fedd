"""A ranking as a table, as JSON, and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..data.files import printable
from ..data.images import read_image
from ..data.labels import Label
from ..data.names import NamePattern
from ..data.samefile import FileNumbers
from ..engine.checkpoint import atomic_file, write_json
from ..errors import UserError
from .extractor import name_labels
from .gallery import SearchResult

_SAME, _OTHER, _UNKNOWN = (30, 140, 60), (200, 50, 40), (150, 150, 150)
_ITSELF = "the query itself"


def ranking_table(queries: Sequence[str], result: SearchResult, *, shown: int = 5) -> str:
    """Return an aligned table: per query its first results as score, identity and file name.

    Args:
        queries: Q image files.
        result: Their ranking.
        shown: Results per query.
    """
    lines = []
    for query, ranked in zip(queries, mark_own_files(queries, result)):
        lines.append(printable(query))
        lines.extend(
            f"  {item['rank']:>4} {item['score']:>8.4f} {_identity(item['pid']):>8}  {printable(item['path'])}"
            + (f" ({_ITSELF})" if item["query_itself"] else "")
            for item in ranked[:shown]
        )
        if not ranked:
            lines.append("       not in the gallery")
    return "\n".join(lines)


def mark_own_files(queries: Sequence[str], result: SearchResult) -> list[list[dict[str, Any]]]:
    """Return :meth:`SearchResult.as_dicts` with an entry ``query_itself``: the image is the query's own file.

    Through links and other spellings too. Such an image is found because it is the query; it is no match of it.
    """
    listed = result.as_dicts()
    number = FileNumbers()
    for query, ranked in zip(queries, listed):
        own = number(os.path.abspath(query))
        for item in ranked:
            item["query_itself"] = number(os.path.abspath(item["path"])) == own
    return listed


def _identity(pid: Label) -> str:
    return pid if isinstance(pid, str) else "?" if pid < 0 else f"id {pid}"


def write_ranking(path: Path, queries: Sequence[str], result: SearchResult, settings: dict[str, Any]) -> None:
    """Write a ranking as JSON: the settings, and per query its file and results.

    Args:
        path: The file.
        queries: Q image files.
        result: Their ranking.
        settings: What to note about the search.
    """
    listed = [{"query": query, "results": ranked} for query, ranked in zip(queries, mark_own_files(queries, result))]
    write_json(path, {"settings": settings, "queries": listed})


def draw_ranking(
    path: Path,
    queries: Sequence[str],
    result: SearchResult,
    *,
    shown_queries: int = 8,
    shown: int = 10,
    size: tuple[int, int] = (128, 64),
    pixel_range: Sequence[float] | None = None,
    pattern: NamePattern | None = None,
) -> None:
    """Draw queries and their ranked gallery images with score and identity.

    Frames are green where the identity is the query's, red where it is another, and grey where either is unknown or the
    image is the query itself. A gallery image whose file is gone is left blank.

    Args:
        path: PNG file.
        queries: Q image files.
        result: Their ranking.
        shown_queries: Rows of the picture.
        shown: Gallery images per row.
        size: (height, width) of a cell, pixels; images keep their shape in it.
        pixel_range: (low, high), what becomes black and white in files of more than 8 bits (``data.pixel_range``).
        pattern: How the queries' files are named, for their identities.

    Raises:
        WriteError: The picture cannot be written.
    """
    ranked = mark_own_files(queries, result)[:shown_queries]
    height, width = size
    gap, caption, head, frame = 8, 26, 18, 3
    columns = 1 + min(shown, max((len(items) for items in ranked), default=0))
    sheet = Image.new(
        "RGB",
        (gap + columns * (width + gap) + gap, head + len(ranked) * (height + caption + gap) + gap),
        (255, 255, 255),
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)

    def cell(column: int, row: int, file: str, lines: Sequence[str], colour: tuple[int, int, int]) -> None:
        x = gap + column * (width + gap) + (gap if column else 0)
        y = head + row * (height + caption + gap)
        try:
            picture = ImageOps.contain(read_image(file, pixel_range), (width - 2 * frame, height - 2 * frame))
        except UserError:
            picture = Image.new("RGB", (width - 2 * frame, height - 2 * frame), (235, 235, 235))
        left, top = x + (width - picture.width) // 2, y + (height - picture.height) // 2
        draw.rectangle(
            (left - frame, top - frame, left + picture.width + frame - 1, top + picture.height + frame - 1), colour
        )
        sheet.paste(picture, (left, top))
        for number, line in enumerate(lines):
            draw.text((x + 2, y + height + 1 + 11 * number), line, fill=(0, 0, 0), font=font)

    draw.text((gap, 3), "query", fill=(0, 0, 0), font=font)
    for column in range(1, columns):
        draw.text((2 * gap + column * (width + gap), 3), f"{column}", fill=(0, 0, 0), font=font)
    for row, (query, items) in enumerate(zip(queries, ranked)):
        pid = name_labels(query, pattern)[1]
        cell(0, row, query, [_identity(pid)], (30, 60, 160))
        for column, item in enumerate(items[:shown], start=1):
            known = _identity(pid) != "?" and _identity(item["pid"]) != "?" and not item["query_itself"]
            colour = (_SAME if item["pid"] == pid else _OTHER) if known else _UNKNOWN
            label = "itself" if item["query_itself"] else _identity(item["pid"])
            cell(column, row, item["path"], [f"{item['score']:.3f}", label], colour)
    with atomic_file(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)
