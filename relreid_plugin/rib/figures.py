"""The information bottleneck over training: bound, plug-in estimate, check, and the channels that gates keep (RIB)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.checkpoint import write_figure, write_json, write_text
from ..engine.runner import read_metrics
from ..errors import UserError


def bound_history(folder: str | Path) -> list[dict[str, Any]]:
    """Return the epoch records of a finished run.

    Raises:
        UserError: The folder holds no finished run, or one that did not measure the bound.
    """
    records = read_metrics(folder)["history"].get("stage1", [])
    if not any("ibb" in record for record in records):
        raise UserError(
            f"run '{folder}' did not measure the information bottleneck bound; train with 'rib.ibb.eta' above 0, or with "
            "'rib.ibb.measure True' to only measure it, for three epochs or more."
        )
    return records


def information_table(label: str, records: Sequence[dict[str, Any]]) -> str:
    """Return IBB, bound, estimate and the check of every epoch as Markdown, and how often the bound holds."""
    measured = [record for record in records if "ibb" in record]
    lines = [
        f"**{label}**",
        "",
        "| epoch | eta | IBB | H(b) | bound IBB + H(b) | I(F;X) | I(F;Y) | estimate I(F;X) - I(F;Y) | bound holds |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for record in measured:
        names = ("ibb", "input_entropy", "ib_bound", "i_fx", "i_fy", "ib_estimate")
        values = " | ".join(f"{record[name] + 0.0:.5f}" for name in names)
        lines.append(f"| {record['epoch']} | {record['eta']:g} | {values} | {'yes' if record['ib_holds'] else 'NO'} |")
    held = sum(bool(record["ib_holds"]) for record in measured)
    lines += ["", f"The bound holds in {held} of {len(measured)} epochs."]
    return "\n".join(lines)


def _gates(records: Sequence[dict[str, Any]]) -> list[str]:
    return [key.removeprefix("kept_test/") for key in records[-1] if key.startswith("kept_test/")]


def plot_information(runs: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Draw a column per run: the bound; the estimate, on a scale of its own; with gates, the channels that each one keeps.

    Args:
        runs: Label to epoch records.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    rows = 3 if any(_gates(records) for records in runs.values()) else 2
    figure = Figure(figsize=(4.4 * len(runs) + 0.4, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, len(runs), squeeze=False, sharex="col", sharey="row")
    for column, (label, records) in enumerate(runs.items()):
        measured = [record for record in records if "ibb" in record]
        epochs = [record["epoch"] for record in measured]
        top, middle = axes[0][column], axes[1][column]
        top.plot(epochs, [record["ib_bound"] for record in measured], color="tab:red")
        middle.plot(epochs, [record["ib_estimate"] for record in measured], color="tab:green")
        top.set_title(label, fontsize=10)
        entropy = sum(record["input_entropy"] for record in measured) / len(measured)
        held = sum(bool(record["ib_holds"]) for record in measured)
        notes = ((top, f"H(b) = {entropy:.3f}"), (middle, f"below the bound in {held} of {len(measured)} epochs"))
        for axis, note in notes:
            axis.text(0.98, 0.93, note, fontsize=8, transform=axis.transAxes, ha="right", va="top")
        if rows == 3:
            _plot_gates(axes[2][column], records)
        warm = [record["epoch"] for record in measured if record["eta"] == 0]
        trained = any(record["eta"] > 0 for record in measured)
        for axis in axes[:, column]:
            axis.grid(alpha=0.25)
            if warm and trained:
                axis.axvspan(records[0]["epoch"] - 0.5, warm[-1] + 0.5, color="grey", alpha=0.12, linewidth=0)
        if warm and trained:
            top.text(records[0]["epoch"], 0.04, "warm-up", fontsize=8, transform=top.get_xaxis_transform())
        axes[-1][column].set_xlabel("epoch")
    axes[0][0].set_ylabel("bound IBB + H(b), nats")
    axes[1][0].set_ylabel("I(F;X) - I(F;Y), nats")
    if rows == 3:
        axes[2][0].set_ylabel("kept channels, %")
    write_figure(path, figure)


def _plot_gates(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    epochs, names = [record["epoch"] for record in records], _gates(records)
    for name in names:
        values = [100 * record.get(f"kept_test/{name}", float("nan")) for record in records]
        axis.plot(epochs, values, label=name.removeprefix("vit.").removeprefix("backbone.body."), linewidth=1.3)
    if 0 < len(names) <= 12:
        axis.legend(fontsize=7, ncols=2)
    if not names:
        axis.text(0.5, 0.5, "no channel gates", transform=axis.transAxes, ha="center", va="center", fontsize=9)


def draw_information(runs: Mapping[str, str | Path], out: Path) -> str:
    """Write ``information.png``, ``information.md`` and ``information.json`` of several runs.

    Args:
        runs: Label to run folder.
        out: Where the files go.

    Returns:
        The tables.

    Raises:
        UserError: A folder holds no finished run, or one that did not measure the bound.
    """
    histories = {label: bound_history(folder) for label, folder in runs.items()}
    plot_information(histories, out / "information.png")
    tables = "\n\n".join(information_table(label, records) for label, records in histories.items())
    write_json(out / "information.json", {"runs": {key: str(value) for key, value in runs.items()}, "history": histories})
    write_text(out / "information.md", tables + "\n")
    return tables
