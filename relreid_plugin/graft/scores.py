"""What every modality is worth, for the report: tests with modalities missing, and trainings on fewer of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..methods import Table
from ..reading import read_json

TITLES = {
    "graft": "GraFT",
    "early": "early fusion",
    "late": "late fusion (Multi-Stream ViT)",
    "cls": "vanilla fusion, CLS token",
    "average": "vanilla fusion, averaged tokens",
}
TABLE = "modalities.json"
"""File of ``relreid tables graft modalities``, beside its runs."""


def modality_tables(folder: Path, metrics: Mapping[str, Any]) -> list[Table]:
    """Return a run's rows of tests with modalities missing, and the table of trainings that it is part of.

    Args:
        folder: The run's folder.
        metrics: Content of its ``metrics.json``.

    Raises:
        UserError: ``modalities.json`` beside the run is damaged.
    """
    return [*_missing(metrics["rows"]), *_trained(folder)]


def _missing(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = []
        for row in rows:
            title, _, subset = str(row["method"]).partition(", ")
            if row["target"] == target and title in TITLES.values() and subset:
                own.append((subset, row["mAP"], row["cmc"].get("1")))
        if len(own) > 1:
            found.append(_table("Tests with modalities missing", "seen", own, target))
    return found


def _trained(folder: Path) -> list[Table]:
    path = folder.resolve().parent / TABLE
    if not path.is_file():
        return []
    content = read_json(path, what="table of modalities", remedy="make it again by 'relreid tables graft modalities'")
    records = content.get("records", [])
    found = []
    for target in dict.fromkeys(record["target"] for record in records):
        own = [record for record in records if record["target"] == target]
        if not any(Path(one).name == folder.resolve().name for record in own for one in record["runs"]):
            continue
        seeds = max(len(record["seeds"]) for record in own)
        means = [(record["title"], record["mean"]["mAP"], record["mean"].get("1")) for record in own]
        title = "Trained on fewer modalities" + (f", means over {seeds} seeds" if seeds > 1 else "")
        found.append(_table(title, "trained on", means, target))
    return found


def _table(title: str, first: str, rows: Sequence[tuple[str, float, float | None]], target: str) -> Table:
    """A table by mAP, whose last column is the difference to the row with the most modalities."""
    whole = max(rows, key=lambda row: row[0].partition(" ")[0].count("+"))
    lines = [(name, score, "–" if rank is None else rank, score - whole[1]) for name, score, rank in rows]
    return Table(title, (first, "mAP", "R1", f"mAP against {whole[0]}"), lines, target=target)


__all__ = ["TITLES", "modality_tables"]
