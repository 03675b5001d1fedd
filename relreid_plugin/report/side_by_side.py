"""Runs side by side: mean and deviation over seeds, paired bootstrap by query, queries won and lost.

Shapes: Q queries, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.table import markdown, mean_and_spread, score_columns, score_header
from ..errors import UserError
from ..features.sets import Features
from ..files import csv_text
from ..methods import methods
from ..metrics.bootstrap import Difference, bootstrap
from .configs import flat
from .outside import outside
from .scored import Subject, Target, subjects

SAME_AP = 1e-9
_QUERY_COLUMNS = (
    *("target", "protocol", "method", "runs", "compared_with", "query", "identity", "camera"),
    *("ap_first", "ap", "gain", "outcome"),
)
_FOLDERS = ("data.save_dir", "data.root", "use_gpu", "data.workers")


@dataclass(frozen=True)
class Pairs:
    """Average precisions of the same queries, here and in the row that a line is compared with.

    Attributes:
        query: The queries, of the first group's first run.
        ap, reference: (Q,) NaN without a match.
        row: Name of the row that is compared with.
    """

    query: Features
    ap: np.ndarray
    reference: np.ndarray
    row: str

    @property
    def gain(self) -> np.ndarray:
        """(Q,) by how much a query is better; 0 where it is the same up to rounding, NaN without a match."""
        gain = self.ap - self.reference
        return np.where(np.abs(gain) <= SAME_AP, 0.0, gain)


@dataclass(frozen=True)
class Line:
    """One row of the comparison.

    Attributes:
        target, protocol, method: As in the runs' tables.
        group: Name of the runs.
        seeds: How many runs there are.
        scores: Score to its values over the runs, fractions of 1; NaN where a run has none.
        pairs: Its queries and those of the same row of the first group, or where that has none of the first group's first
            row; ``None``: it is the first group's, or there are no scores by query.
        difference: Mean AP minus that of the other row, paired by query.
        won, lost: Queries with a higher and with a lower AP than there.
    """

    target: str
    protocol: str
    method: str
    group: str
    seeds: int
    scores: dict[str, np.ndarray]
    pairs: Pairs | None = None
    difference: Difference | None = None
    won: int = 0
    lost: int = 0


def columns(places: Sequence[str]) -> list[Subject]:
    """Read runs, features, logs and rankings; those of other toolkits take the runs' names of their test sets.

    Raises:
        UserError: One of them cannot be read, or belongs to a test set that no run has.
    """
    foreign = [outside(place) for place in places]
    own = subjects([place for place, other in zip(places, foreign) if other is None])
    read = iter(own)
    return [next(read) if other is None else other.subject(own) for other in foreign]


def written(found: Sequence[Line], notes: Sequence[str], *, form: str) -> str:
    """Return lines of a comparison as ``text``, ``markdown``, ``latex`` or ``csv``, with sentences on it (not in CSV)."""
    if form == "csv":
        return _csv(found)
    if form == "latex":
        return _latex(found, notes)
    parts = []
    for target, protocol in dict.fromkeys((line.target, line.protocol) for line in found):
        lines = [line for line in found if (line.target, line.protocol) == (target, protocol)]
        header, cells = _cells(lines)
        if form == "markdown":
            parts.append(markdown(header, [[_escaped(c) for c in row] for row in cells], title=f"**{target}**, {protocol}"))
        else:
            parts.append(f"{target} · {protocol}\n{_aligned([header, *cells])}")
    return "\n\n".join([*parts, "\n".join(notes)])


def groups(found: Sequence[Subject]) -> list[list[Subject]]:
    """Return the runs that differ in nothing but seeds and folders together, in the order of their first ones."""
    seeds = {"train.seed", *(key for method in methods() for key in method.seeds)}
    out: dict[Any, list[Subject]] = {}
    for number, subject in enumerate(found):
        if subject.cfg is None:
            out[number] = [subject]
            continue
        own = {
            k: v for k, v in flat(subject.cfg).items() if k not in seeds and not k.endswith(".seed") and k not in _FOLDERS
        }
        out.setdefault(repr(sorted(own.items())), []).append(subject)
    return list(out.values())


def compare(found: Sequence[Subject], *, seeds: bool = True) -> tuple[list[Line], list[str]]:
    """Return the lines of the comparison and sentences on it.

    Args:
        found: The runs.
        seeds: Whether runs that differ in seeds alone are one group.

    Raises:
        UserError: No test set is in all groups.
    """
    members = groups(found) if seeds else [[subject] for subject in found]
    names = [group[0].name if len(group) == 1 else f"{group[0].name} (× {len(group)})" for group in members]
    common = [name for name in members[0][0].targets if all(any(name in s.targets for s in group) for group in members)]
    if not common:
        listed = "; ".join(f"{subject.name}: {', '.join(subject.targets)}" for subject in found)
        raise UserError(f"the runs have no test set in common ({listed}); compare runs that were tested on the same one.")
    lines, notes = [], []
    for target in common:
        whole = [row for subject in found for row in subject.rows if row["target"] == target]
        first = _first(members[0], target)
        for protocol, method in dict.fromkeys((row["protocol"], row["method"]) for row in whole):
            reference: tuple[np.ndarray, str] | None = None
            for index, (group, name) in enumerate(zip(members, names)):
                own = [_row(subject, target, protocol, method) for subject in group]
                rows = [row for row in own if row is not None]
                if not rows:
                    continue
                ap, why = _ap(group, members[0][0], target, rows[0])
                if why and why not in notes:
                    notes.append(why)
                line: dict[str, Any] = {}
                if index == 0:
                    reference = None if ap is None else (ap, method)
                elif ap is not None:
                    other = reference or first
                    line = {} if other is None else _against(members[0][0].targets[target].data.query, ap, *other)
                lines.append(Line(target, protocol, method, name, len(rows), _scores(rows), **line))
    left = sorted({name for subject in found for name in subject.targets} - set(common))
    if left:
        notes.append(f"test sets that not all runs have are left out: {', '.join(left)}.")
    if len(members) > 1:
        notes.append(
            f"Differences: mAP minus that of the same row of {names[0]}, or of its first row, with 95 % "
            "paired bootstrap over the queries; n.s.: may be no difference. ±: standard deviation over seeds."
        )
    return lines, notes


def _first(group: list[Subject], target: str) -> tuple[np.ndarray, str] | None:
    """AP and name of the first row of a group."""
    row = next(row for row in group[0].rows if row["target"] == target)
    ap, _ = _ap(group, group[0], target, row)
    return None if ap is None else (ap, row["method"])


def _against(query: Features, ap: np.ndarray, reference: np.ndarray, row: str) -> dict[str, Any]:
    pairs = Pairs(query, ap, reference, row)
    won, lost = int((pairs.gain > 0).sum()), int((pairs.gain < 0).sum())
    return {"pairs": pairs, "difference": bootstrap(ap, reference), "won": won, "lost": lost}


def _row(subject: Subject, target: str, protocol: str, method: str) -> dict[str, Any] | None:
    wanted = (target, protocol, method)
    return next((row for row in subject.rows if (row["target"], row["protocol"], row["method"]) == wanted), None)


def _scores(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    flats = [{"mAP": row["mAP"], "mINP": row["mINP"], **row["cmc"]} for row in rows]
    names = dict.fromkeys(name for values in flats for name in values)
    return {
        name: np.array([np.nan if values.get(name) is None else values[name] for values in flats], np.float64)
        for name in names
    }


def _ap(group: list[Subject], first: Subject, target: str, row: dict[str, Any]) -> tuple[np.ndarray | None, str]:
    """AP of every query (Q,), the mean over the runs of a group, in the order of the first run; and why there is none."""
    parts = []
    for subject in group:
        own = subject.targets.get(target)
        scored = None if own is None else own.find(row)
        if own is None or scored is None:
            why = "" if own is None else own.why
            return None, f"{subject.name}: {why}" if why else ""
        if first.targets[target].evaluator is None:
            return None, f"{first.name}: {first.targets[target].why}"
        order = _order(own, first.targets[target])
        if order is None:
            return None, f"{subject.name} has other queries of '{target}' than {first.name}; nothing is paired by query."
        parts.append(scored.result.ap[order])
    return np.mean(parts, axis=0), ""


def _order(own: Target, first: Target) -> np.ndarray | None:
    """Rows of one's queries in the order of the first one's; ``None`` where they are not the same queries."""
    if own.evaluator is None or first.evaluator is None:
        return None
    mine, others = own.data.query, first.data.query
    if len(mine) != len(others):
        return None
    if mine.paths and others.paths:
        place = {path: row for row, path in enumerate(mine.paths)}
        rows = [place.get(path, -1) for path in others.paths]
        if len(place) < len(mine) or min(rows) < 0:
            return None
        order = np.array(rows)
    else:
        order = np.arange(len(mine))
    return order if _labels(mine, order) == _labels(others, np.arange(len(others))) else None


def _labels(features: Features, order: np.ndarray) -> list[Any]:
    return [*features.shown(features.pids[order]), *features.shown_cameras(features.camids[order])]


# --- forms ----------------------------------------------------------------------------------------------------------------
def _cells(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    columns = score_columns(lines[0].scores)
    header = ["method", "runs", *score_header(columns), "mAP - first", "won / lost"]
    cells = []
    for line in lines:
        scores = []
        for name in columns:
            values = line.scores.get(name, np.array([np.nan]))
            spread = 100 * float(values.std(ddof=1)) if len(values) > 1 else None
            scores.append("-" if np.isnan(values).any() else mean_and_spread(100 * float(values.mean()), spread))
        gain = "-" if line.difference is None else str(line.difference)
        queries = "-" if line.difference is None else f"{line.won} / {line.lost}"
        cells.append([line.method, line.group, *scores, gain, queries])
    return header, cells


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) if column < 2 else c.rjust(w) for column, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def tex(text: str) -> str:
    """Return text with the signs that LaTeX reads as its own written out."""
    return "".join(_TEX.get(sign, sign) for sign in text)


def _latex(found: Sequence[Line], notes: Sequence[str]) -> str:
    parts = []
    for target, protocol in dict.fromkeys((line.target, line.protocol) for line in found):
        header, cells = _cells([line for line in found if (line.target, line.protocol) == (target, protocol)])
        body = "\n".join(" & ".join(map(tex, row)) + r" \\" for row in cells)
        parts.append(
            f"% {target}, {protocol}\n\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}\n\\hline\n"
            f"{' & '.join(map(tex, header))} \\\\\n\\hline\n{body}\n\\hline\n\\end{{tabular}}".replace("\n\n", "\n")
        )
    return "\n\n".join([*parts, "\n".join(f"% {note}" for note in notes)])


def _csv(found: Sequence[Line]) -> str:
    """Fractions of 1 in full, a line per row and group."""
    names = list(dict.fromkeys(name for line in found for name in line.scores))
    ends = ["difference", "low", "high", "won", "lost"]
    scores = [column for name in names for column in (name, f"{name}_std")]
    rows: list[list[Any]] = [["target", "protocol", "method", "runs", "seeds", *scores, *ends]]
    for line in found:
        cells: list[Any] = [line.target, line.protocol, line.method, line.group, line.seeds]
        for name in names:
            values = line.scores.get(name)
            known = values is not None and np.isfinite(values).all()
            cells.append(float(values.mean()) if known and values is not None else "")
            cells.append(float(values.std(ddof=1)) if known and values is not None and len(values) > 1 else "")
        gain = line.difference
        cells += [""] * 5 if gain is None else [gain.mean, gain.low, gain.high, line.won, line.lost]
        rows.append(cells)
    return csv_text(rows).rstrip("\n")


def queries_csv(found: Sequence[Line]) -> str:
    """Return every query of every line that is compared, the most won first: AP of both as fractions of 1."""
    rows: list[Sequence[Any]] = [_QUERY_COLUMNS]
    for line in found:
        if line.pairs is None:
            continue
        query, gain = line.pairs.query, line.pairs.gain
        pids, cameras = query.shown(query.pids), query.shown_cameras(query.camids)
        about = [line.target, line.protocol, line.method, line.group, line.pairs.row]
        for row in np.argsort(np.where(np.isnan(gain), np.inf, -gain), kind="stable").tolist():
            path = query.paths[row] if query.paths else f"query {row}"
            scores: list[Any]
            if np.isnan(gain[row]):
                scores, outcome = ["", "", ""], "no match"
            else:
                scores = [float(value[row]) for value in (line.pairs.reference, line.pairs.ap, gain)]
                outcome = "won" if gain[row] > 0 else "lost" if gain[row] < 0 else "same"
            rows.append([*about, path, pids[row], cameras[row], *scores, outcome])
    return csv_text(rows)


__all__ = ["Line", "Pairs", "columns", "compare", "groups", "queries_csv", "tex", "written"]
