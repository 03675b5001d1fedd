"""Result tables as text and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .evaluator import Row

TITLES = {
    "inductive": "inductive: every query alone with the gallery",
    "transductive": "transductive: all queries and the gallery look at each other",
}


def _header(ranks: Sequence[str]) -> list[str]:
    return ["method", "mAP", *(f"R{rank}" for rank in ranks), "mINP", "params", "time"]


def _cells(row: Row, ranks: Sequence[str]) -> list[str]:
    scores = [row.mAP, *(row.cmc[rank] for rank in ranks), row.mINP]
    return [row.method, *(f"{100 * score:.1f}" for score in scores), f"{row.parameters / 1e6:.2f}M", f"{row.seconds:.2f} s"]


def _groups(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    out: list[tuple[str, str, list[Row]]] = []
    for target in dict.fromkeys(row.target for row in rows):
        for protocol in TITLES:
            members = [row for row in rows if row.target == target and row.protocol == protocol]
            if members:
                out.append((target, protocol, members))
    return out


def _shot(rows: Sequence[Row]) -> str:
    """What a title adds where ranks are not those in the whole gallery."""
    return " · single-gallery-shot CMC" if "single-gallery-shot" in rows[0].metric else ""


def _ranks(rows: Sequence[Row]) -> list[str]:
    return [rank for rank in rows[0].cmc if rank in ("1", "5", "10")] or list(rows[0].cmc)


def text_table(rows: Sequence[Row]) -> str:
    """Return aligned tables, one per test set and protocol; scores in percent."""
    if not rows:
        return ""
    ranks, parts = _ranks(rows), []
    width = max(len(row.method) for row in rows)
    for target, protocol, members in _groups(rows):
        lines = [f"{target} · {TITLES[protocol]} · {members[0].queries} queries{_shot(members)}"]
        for cells in [_header(ranks), *(_cells(row, ranks) for row in members)]:
            lines.append(f"  {cells[0]:<{width}}" + "".join(f"{cell:>9}" for cell in cells[1:]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the same as Markdown tables."""
    if not rows:
        return ""
    ranks, parts = _ranks(rows), []
    for target, protocol, members in _groups(rows):
        lines = [f"**{target}**, {TITLES[protocol]}{_shot(members)}", "", "| " + " | ".join(_header(ranks)) + " |"]
        lines.append("|---|" + "---:|" * (len(ranks) + 4))
        lines.extend("| " + " | ".join(_cells(row, ranks)) + " |" for row in members)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
