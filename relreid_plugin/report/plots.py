"""Curves of a report as SVG inside the page, in the colours of its theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.curves import NO_LOSSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..methods import Panel
    from ..metrics.verification import Verification
    from .measures import Distributions

_INK = "#123456"  # stands for the page's own text colour
PALETTE = ("#0f7fc9", "#d9661f", "#12966b", "#b65fa0", "#8a6d1d", "#5f6fd0")
MOST_POINTS = 400
SHOWN_BINS = 80


def svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an ``svg`` element without anything that points out of the page.

    Args:
        figure: Drawn on a transparent ground.
        name: Begins the ids in it.
        label: What a screen reader says.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace(_INK, "currentColor")
    text = re.sub(r'(\sid=")', rf"\1{name}-", text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def _panel(width: float = 5.2, height: float = 3.4) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    _ink(axis)
    return figure, axis


def _ink(axis: Any) -> None:
    axis.tick_params(colors=_INK, labelsize=8)
    axis.grid(alpha=0.2, color=_INK)
    for spine in axis.spines.values():
        spine.set_color(_INK)
    for label in (axis.xaxis.label, axis.yaxis.label, axis.title):
        label.set_color(_INK)
        label.set_fontsize(9)


def _legend(figure: Figure, *axes: Any) -> None:
    """Name the lines of some axes below them."""
    handles: list[Any] = []
    labels: list[str] = []
    for axis in axes:
        more = axis.get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
    if handles:
        columns = 2 if len(labels) > 1 and max(map(len, labels)) < 50 else 1
        columns = 4 if max(map(len, labels)) < 16 else columns
        where: Any = "outside lower center"
        figure.legend(handles, labels, fontsize=7, labelcolor=_INK, framealpha=0, edgecolor="none", loc=where, ncols=columns)


def _plain(text: str) -> str:
    """Text that matplotlib shall not take for mathematics."""
    return text.replace("$", r"\$")


def history(records: Sequence[Mapping[str, Any]], stage: str, name: str) -> str:
    """Return losses and validation over the epochs of a stage; empty where nothing was recorded."""
    if not records:
        return ""
    figure, axis = _panel()
    epochs = [record["epoch"] for record in records]
    names = [key for key in dict.fromkeys(key for record in records for key in record)]
    losses = [key for key in names if key not in NO_LOSSES and "/" not in key]
    for key, colour in zip(losses, PALETTE * (len(losses) // len(PALETTE) + 1)):
        values = [np.nan if record.get(key) is None else record[key] for record in records]
        axis.plot(epochs, values, label=_plain(key), color=colour, linewidth=1.4, marker="." if len(records) < 20 else None)
    axis.set(xlabel="epoch", ylabel="training loss")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    scored = [record for record in records if record.get("val_mAP") is not None]
    if scored:
        right = axis.twinx()
        _ink(right)
        right.grid(False)
        right.plot(
            [record["epoch"] for record in scored],
            [100 * record["val_mAP"] for record in scored],
            color=_INK,
            linestyle="--",
            marker="o",
            markersize=3,
            label="validation mAP",
        )
        right.set_ylabel("mAP on held-out identities, %")
        right.yaxis.label.set_color(_INK)
        _legend(figure, axis, right)
    else:
        _legend(figure, axis)
    return svg(figure, name, f"Training losses and validation of {stage} over {len(records)} epochs")


def panel(found: Panel, name: str) -> str:
    """Return the lines that a method adds."""
    figure, axis = _panel()
    for (label, points), colour in zip(found.lines.items(), PALETTE * len(found.lines)):
        x, y = zip(*points)
        axis.plot(x, y, label=_plain(label), color=colour, linewidth=1.4, marker="." if len(points) < 20 else None)
    axis.set(xlabel=found.x, ylabel=found.y)
    if found.x == "epoch":
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axis)
    return svg(figure, name, f"{found.title}: " + ", ".join(found.lines))


def cmc(curves: Mapping[str, np.ndarray], name: str) -> str:
    """Return CMC curves (R,) by name of the row."""
    figure, axis = _panel()
    for (label, values), colour in zip(curves.items(), PALETTE * len(curves)):
        axis.plot(np.arange(1, len(values) + 1), 100 * values, label=_plain(label), color=colour, linewidth=1.4)
    axis.set(xlabel="rank", ylabel="queries with a match, %", xlim=(1, max(2, max(map(len, curves.values())))))
    _legend(figure, axis)
    return svg(figure, name, "Cumulative matching characteristic: " + ", ".join(curves))


def _thinned(found: Verification) -> np.ndarray:
    count = len(found.thresholds)
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(np.int64))


def roc(curves: Mapping[str, Verification], point: tuple[float, float, str] | None, name: str) -> str:
    """Return true-match over false-match rates, and the point (FPR, TPR, label) of a threshold."""
    figure, axis = _panel()
    lowest = min(0.5 / found.negatives for found in curves.values())
    for (label, found), colour in zip(curves.items(), PALETTE * len(curves)):
        rows = _thinned(found)
        fpr = np.maximum(found.fpr[rows], lowest)
        text = f"{label}, EER {found.eer.value:.1%}"
        axis.step(fpr, found.tpr[rows], where="post", label=_plain(text), color=colour, linewidth=1.4)
    if point is not None:
        axis.plot([max(point[0], lowest)], [point[1]], "o", color=_INK, label=_plain(point[2]))
    axis.set(xscale="log", xlim=(lowest, 1), ylim=(0, 1.02))
    axis.set(xlabel="false-match rate (pairs of two)", ylabel="true-match rate (pairs of one)")
    _legend(figure, axis)
    return svg(figure, name, "Receiver operating characteristic: " + ", ".join(curves))


def precision_recall(curves: Mapping[str, Verification], name: str) -> str:
    """Return precision over recall of all pairs at every threshold."""
    figure, axis = _panel()
    for (label, found), colour in zip(curves.items(), PALETTE * len(curves)):
        rows = _thinned(found)
        right, wrong = found.tpr[rows] * found.positives, found.fpr[rows] * found.negatives
        precision = right / np.maximum(right + wrong, 1e-12)
        axis.plot(found.tpr[rows], precision, label=_plain(label), color=colour, linewidth=1.4)
    axis.set(xlabel="recall of pairs of one identity", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    _legend(figure, axis)
    return svg(figure, name, "Precision over recall of pairs: " + ", ".join(curves))


def histogram(found: Distributions, threshold: float | None, name: str) -> str:
    """Return the cosines of pairs of one identity and of two, each with an area of 1."""
    figure, axis = _panel()
    used = np.flatnonzero(found.same + found.different)
    low, step = used[0], -(-(used[-1] + 1 - used[0]) // SHOWN_BINS)
    starts = np.arange(low, used[-1] + 1, step)
    edges = found.edges[np.minimum(np.append(starts, starts[-1] + step), len(found.edges) - 1)]
    for counts, label, colour in ((found.same, "one identity", PALETTE[2]), (found.different, "two", PALETTE[1])):
        grouped = np.add.reduceat(counts, starts)
        density = grouped / max(1, counts.sum()) / np.diff(edges)
        axis.stairs(density, edges, fill=True, alpha=0.4, color=colour, label=f"{label}: {counts.sum():,} pairs")
    if threshold is not None:
        axis.axvline(threshold, color=_INK, linestyle="--", label=f"calibrated threshold {threshold:.4f}")
    axis.set(xlim=(edges[0], edges[-1]), xlabel="cosine", ylabel="density")
    _legend(figure, axis)
    return svg(figure, name, "Distributions of the cosine of pairs of one identity and of two")
