"""Result tables as text and Markdown."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from .evaluator import Row

TITLES = {
    "inductive": "inductive: every query alone with the gallery",
    "transductive": "transductive: all queries and the gallery look at each other",
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", align: str = "") -> str:
    """Return a table as Markdown.

    Args:
        header: Names of the columns.
        rows: Cells.
        title: What stands above it, bold where it is ``**so**``; empty: nothing.
        align: A letter per column, ``l`` or ``r``; empty: the first column left and the others right.
    """
    marks = [{"l": "---", "r": "---:"}[letter] for letter in align or "l" + "r" * (len(header) - 1)]
    lines = [title, ""] if title else []
    lines += ["| " + " | ".join(header) + " |", "|" + "|".join(marks) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def mean_and_spread(mean: float, deviation: float | None = None, *, digits: int = 1) -> str:
    """Return ``mean ± deviation``, the mean alone where there is no deviation."""
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def score_columns(names: Container[str]) -> list[str]:
    """Return the scores that tables show, of those that there are: mAP, the ranks 1, 5 and 10, mINP."""
    return ["mAP", *(rank for rank in ("1", "5", "10") if rank in names), "mINP"]


def score_header(columns: Sequence[str]) -> list[str]:
    """Return the names of :func:`score_columns` in a table's header."""
    return [name if name.startswith("m") else f"R{name}" for name in columns]


def score_cells(mean: Mapping[str, float], deviation: Mapping[str, float] | None, columns: Sequence[str]) -> list[str]:
    """Return scores in percent.

    Args:
        mean: Score to its mean.
        deviation: Score to its standard deviation; ``None``: there is none.
        columns: The scores.
    """
    return [mean_and_spread(100 * mean[name], None if deviation is None else 100 * deviation[name]) for name in columns]


def millions(parameters: float) -> str:
    """Return a number of parameters as tables show it."""
    return f"{parameters / 1e6:.2f}M"


def _rates(rows: Sequence[Row]) -> list[str]:
    """False-match rates of the columns of verification; none without ``test.verification``."""
    return list(dict.fromkeys(rate for row in rows for rate in row.verification.get("tpr", {})))


def _header(ranks: Sequence[str], rates: Sequence[str] = ()) -> list[str]:
    verification = ["EER", *(f"T@{rate}" for rate in rates)] if rates else []
    return ["method", *score_header(["mAP", *ranks, "mINP"]), *verification, "params", "time"]


def _cells(row: Row, ranks: Sequence[str], rates: Sequence[str] = ()) -> list[str]:
    columns = ["mAP", *ranks, "mINP"]
    scores = score_cells({"mAP": row.mAP, "mINP": row.mINP, **row.cmc}, None, columns)
    if rates:
        found = [row.verification["eer"], *(row.verification["tpr"][rate] for rate in rates)]
        scores += [mean_and_spread(100 * value[0]) for value in found]
    return [row.method, *scores, millions(row.parameters), f"{row.seconds:.2f} s"]


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
        rates = _rates(members)
        for cells in [_header(ranks, rates), *(_cells(row, ranks, rates) for row in members)]:
            lines.append(f"  {cells[0]:<{width}}" + "".join(f"{cell:>9}" for cell in cells[1:]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the same as Markdown tables."""
    if not rows:
        return ""
    ranks, parts = _ranks(rows), []
    for target, protocol, members in _groups(rows):
        title = f"**{target}**, {TITLES[protocol]}{_shot(members)}"
        rates = _rates(members)
        parts.append(markdown(_header(ranks, rates), (_cells(row, ranks, rates) for row in members), title=title))
    return "\n\n".join(parts)
