"""Training curves of a run as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import write_figure

if TYPE_CHECKING:
    from ..metrics.verification import Verification

NO_LOSSES = frozenset(
    "epoch lr acc center val_mAP val_R1 scale skipped eta "
    "ib_bound ib_estimate ib_holds input_entropy i_fx i_fy entropy".split()
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


def plot_roc(curves: Mapping[str, Sequence[tuple[str, Verification]]], folder: Path) -> None:
    """Draw the ROC of every row, a panel per test set, into ``roc.png``.

    Args:
        curves: Test set to (name of the row, its ROC).
        folder: Where it goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * max(1, len(curves)), 4.8), layout="constrained")
    panels = figure.subplots(1, max(1, len(curves)), squeeze=False)[0]
    for panel, (target, found) in zip(panels, curves.items()):
        lowest = min((0.5 / value.negatives for _, value in found), default=1e-6)
        for name, value in found:
            panel.step(np.maximum(value.fpr, lowest), value.tpr, where="post", label=f"{name}, EER {value.eer.value:.1%}")
        panel.set(xscale="log", xlim=(lowest, 1), ylim=(0, 1), title=target)
        panel.set(xlabel="false-match rate (pairs of two identities)", ylabel="true-match rate (pairs of one)")
        panel.grid(alpha=0.3)
        if found:
            panel.legend(fontsize="small")
    write_figure(folder / "roc.png", figure)
