"""Results that other toolkits print: the last ones of torchreid's logs and of fast-reid's.

torchreid prints a block per test set, ``##### Evaluating NAME (source) #####`` to ``Rank-20 : 95.0%``; fast-reid a table
with the columns ``Datasets`` (or ``Dataset``), ``Rank-1``, …, ``mAP``, ``mINP``, in percent and in colours. What either says
of re-ranking and query expansion before its results goes into the row's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..reading import read_text

MOST_BYTES = 1 << 28
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SET = re.compile(r"##### Evaluating (.+) \((?:source|target)\) #####")
_MAP = re.compile(r"^mAP: ([\d.]+)%$")
_RANK = re.compile(r"^Rank-(\d+)\s*: ([\d.]+)%$")
_NUMBER = re.compile(r"^([\d.]+)\s*%?$")
_RERANKED, _EXPANDED = "k-reciprocal re-ranking", "average query expansion"
_SAID = (("Test with AQE setting", _EXPANDED), ("rerank setting", _RERANKED))


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """Return the last results of every test set in a log, as rows of a table; scores are fractions of 1.

    Raises:
        UserError: No text file, or none of a log's result is understood.
    """
    lines = [_COLOUR.sub("", line).strip() for line in read_text(path, most_bytes=MOST_BYTES).splitlines()]
    rows = {row["target"]: row for row in (*_torchreid(lines), *_fastreid(lines))}
    if not rows:
        raise UserError(
            f"'{path}' is no log that is understood: it has neither torchreid's '** Results **' with mAP and ranks below "
            "'##### Evaluating … #####', nor fast-reid's table with the columns 'Datasets', 'Rank-1' and 'mAP'; name a "
            "run's folder, such a log, features, or a ranking as JSON."
        )
    return list(rows.values())


def _row(target: str, toolkit: str, ways: list[str], scores: dict[str, float]) -> dict[str, Any]:
    """A row of a table, of scores by the names mAP, mINP and the ranks."""
    return {
        "target": target,
        "protocol": "transductive" if _RERANKED in ways else "inductive",
        "method": " + ".join([f"{toolkit}'s log", *ways]),
        "mAP": scores["mAP"],
        "mINP": scores.get("mINP"),
        "cmc": {name: value for name, value in scores.items() if name.isdigit()},
    }


def _torchreid(lines: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    target = ""
    ways: list[str] = []
    for number, line in enumerate(lines):
        begun = _SET.search(line)
        if begun:
            target, ways = begun[1], []
        elif line == "Applying person re-ranking ...":
            ways = [_RERANKED]
        elif line == "** Results **" and target:
            scores: dict[str, float] = {}
            for own in lines[number + 1 :]:
                score, rank = _MAP.match(own), _RANK.match(own)
                if score:
                    scores["mAP"] = float(score[1]) / 100
                elif rank:
                    scores[rank[1]] = float(rank[2]) / 100
                elif own != "CMC curve":
                    break
            if len(scores) > 1 and "mAP" in scores:
                found.append(_row(target, "torchreid", ways, scores))
    return found


def _fastreid(lines: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    header: list[str] = []
    ways: list[str] = []
    for line in lines:
        ways += [name for said, name in _SAID if said in line and name not in ways]
        if "Start inference on" in line:
            ways = []
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[0] in ("Dataset", "Datasets") and {"Rank-1", "mAP"} <= set(cells):
            header = cells
        elif not cells:
            header = []
        elif header and len(cells) == len(header):
            values = {name.removeprefix("Rank-"): _NUMBER.match(cell) for name, cell in zip(header[1:], cells[1:])}
            scores = {name: float(value[1]) / 100 for name, value in values.items() if value}
            if {"1", "mAP"} <= scores.keys():
                found.append(_row(cells[0], "fast-reid", ways, scores))
    return found


__all__ = ["read_log"]
