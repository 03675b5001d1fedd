"""Training curves of a run as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import write_figure

NO_LOSSES = frozenset(
    "epoch lr acc center val_mAP val_R1 eta ib_bound ib_estimate ib_holds input_entropy i_fx i_fy entropy".split()
)
"""Entries of an epoch's record that are not drawn as losses."""


def plot_history(history: dict[str, list[dict[str, Any]]], folder: Path) -> list[Path]:
    """Draw the loss and, where there is one, the validation mAP of every stage over its epochs.

    The center loss is left out: it is unweighted in the history and would flatten the other curves. Diagnostics of
    the methods have pictures of their own.

    Args:
        history: Records per epoch, by stage.
        folder: Where the PNG files go.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure

    written = []
    for stage, records in history.items():
        if not records:
            continue
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        epochs = [record["epoch"] for record in records]
        names = dict.fromkeys(key for record in records for key in record)
        for name in [key for key in names if key not in NO_LOSSES and "/" not in key]:
            axis.plot(epochs, [record.get(name, float("nan")) for record in records], label=name, linewidth=1.4)
        axis.set_xlabel("epoch")
        axis.set_ylabel("training loss")
        axis.grid(alpha=0.25)
        lines, labels = axis.get_legend_handles_labels()
        scored = [record for record in records if "val_mAP" in record]
        if scored:
            right = axis.twinx()
            right.plot(
                [record["epoch"] for record in scored],
                [100 * record["val_mAP"] for record in scored],
                color="black",
                marker="o",
                markersize=3,
                linestyle="--",
                label="validation mAP",
            )
            right.set_ylabel("mAP on held-out identities, %")
            more = right.get_legend_handles_labels()
            lines, labels = lines + more[0], labels + more[1]
        figure.legend(lines, labels, fontsize=8, loc="outside lower center", ncols=len(labels))
        axis.set_title(f"{stage}: training")
        path = folder / f"{stage}.png"
        write_figure(path, figure)
        written.append(path)
    return written
