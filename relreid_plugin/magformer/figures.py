"""Figures of the MagFormer paper from finished runs: feature space, attention scores, stage-2 loss (paper Figs. 2, 4, 5, 6).

Shape letters: N gallery images, d width, L layers, H heads, K slots per image, S images of the drawn identities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from ..config.defaults import get_default_config, load_config
from ..engine import checkpoint as ckpt
from ..engine.bank import bank_file
from ..errors import UserError, did_you_mean, needed
from ..features.banks import bank_features
from ..features.sets import Features
from ..metrics.neighbours import normalise
from ..metrics.plane import SEED, on_a_plane, perplexity_of
from .attention import RelationAttentionOutput
from .config import stage_number
from .encoder import RelationEncoder
from .stage import encoder_of_state

TITLES = {"nformer": "NFormer", "malaa": "MALAA", "magformer": "MagFormer"}
_FEATURE_SPACE = "the feature-space figure"
BIN_WIDTH = 0.05
LOW, HIGH = "tab:blue", "tab:red"


@dataclass
class RelationRun:
    """What the figures need of one run.

    Attributes:
        folder: The run's folder.
        label: Short name in titles and tables.
        cfg: The configuration that stage 2 was trained with.
        encoder: The tested stage-2 model, in evaluation mode, on the CPU.
        epoch: Epoch of ``encoder``.
        history: Training records of stage 2, one per epoch.
        image_model: Fingerprint of the image model under the encoder.
        target: The test set.
        gallery: Its gallery, image-model features (N, d).
        query_pids: Identities of its queries.
    """

    folder: Path
    label: str
    cfg: Any
    encoder: RelationEncoder
    epoch: int
    history: list[dict[str, Any]]
    image_model: str
    target: str
    gallery: Features
    query_pids: np.ndarray


# --- reading runs -----------------------------------------------------------------------------------------------------
def _load_bank(folder: Path, target: str, part: str) -> Features:
    path = bank_file(folder / "bank", f"{target}-{part}")
    if not path.is_file():
        raise UserError(
            f"run folder '{folder}' holds no {part} features of '{target}' ('{path}' is missing); "
            "run relreid test on it first."
        )
    try:
        stored = ckpt.read_tensors(path)
        bank = bank_features(stored)
    except Exception as error:
        raise UserError(f"feature bank '{path}' cannot be read ({type(error).__name__}); run relreid test on it.") from None
    if not bool(torch.isfinite(bank.features).all()):
        raise UserError(f"feature bank '{path}' holds values that are not finite; the image model of this run has diverged.")
    return bank


def load_run(folder: str | Path, *, target: str | None = None) -> RelationRun:
    """Read a run that has trained stage 2 and was tested.

    Args:
        folder: The run's folder (``data.save_dir``).
        target: A test set of the run; ``None`` for its first one.

    Returns:
        The run with the weights that its test used: the best validated ones, else the last.

    Raises:
        UserError: No such folder, no stage 2, no such test set, or no stored features of it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run folder '{folder}' does not exist.")
    written = folder / "config.yml"
    number = stage_number(load_config(written)) if written.is_file() else 2
    last = folder / f"stage{number}" / "last.pth.tar"
    if not last.is_file():
        raise UserError(
            f"run folder '{folder}' has no stage {number} ('{last}' is missing); train it by relreid train with that "
            "stage in 'train.stages' and a 'relation.attention'."
        )
    state = ckpt.load(last, kind="relation")
    history = state["history"]
    path = ckpt.tested(last.parent)
    if path != last:
        state = ckpt.load(path, kind="relation")
    cfg = get_default_config()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(state["config"]))
    if target is None:
        target = cfg.data.targets[0]
    elif target not in cfg.data.targets:
        raise UserError(f"--target '{target}' is no test set of run '{folder}'{did_you_mean(target, cfg.data.targets)}")
    gallery, query = _load_bank(folder, target, "gallery"), _load_bank(folder, target, "query")
    if gallery.features.shape[1] != state["dim"]:
        raise UserError(
            f"the features of '{target}' in '{folder}' have width {gallery.features.shape[1]}, but its stage {number} takes "
            f"{state['dim']}; run relreid test on it again."
        )
    encoder = encoder_of_state(cfg, state, path=path)
    return RelationRun(
        folder=folder,
        label=TITLES[cfg.relation.attention],
        cfg=cfg,
        encoder=encoder.eval(),
        epoch=int(state["epoch"]),
        history=history,
        image_model=state["image_model"],
        target=target,
        gallery=gallery,
        query_pids=query.pids,
    )


def load_runs(folders: list[str | Path], *, target: str | None = None) -> list[RelationRun]:
    """Read several runs of one test set; runs of the same rung get their folder's name into the label.

    Args:
        folders: Run folders, each once.
        target: A test set of all runs; ``None`` for the first one of the first run.

    Raises:
        UserError: As :func:`load_run`, or a folder twice, or galleries that are not the same.
    """
    runs: list[RelationRun] = []
    seen: set[Path] = set()
    for folder in folders:
        if Path(folder).resolve() in seen:
            raise UserError(f"run folder '{folder}' is given twice.")
        seen.add(Path(folder).resolve())
        runs.append(load_run(folder, target=target))
        target = runs[0].target
        first, other = runs[0].gallery, runs[-1].gallery
        if not (np.array_equal(first.pids, other.pids) and np.array_equal(first.camids, other.camids)):
            raise UserError(
                f"runs '{runs[0].folder}' and '{folder}' have different galleries of '{target}'; draw them one by one."
            )
    labels = [run.label for run in runs]
    names = [run.folder.resolve().name for run in runs]
    for run, label, name in zip(runs, labels, names):
        if labels.count(label) > 1:
            run.label = f"{label} ({name if names.count(name) == 1 else run.folder})"
    return runs


# --- feature space ----------------------------------------------------------------------------------------------------
def choose_identities(gallery_pids: np.ndarray, query_pids: np.ndarray, *, count: int) -> np.ndarray:
    """Return the queried identities with the most gallery images.

    Identities without a query (distractors, junk) are left out; of equally frequent ones the smaller number wins.

    Args:
        gallery_pids: (N,).
        query_pids: (Q,).
        count: How many, at least 2; fewer come back where there are fewer.

    Returns:
        Identities, the most frequent first; each has at least two gallery images.

    Raises:
        UserError: Fewer than two such identities.
    """
    if count < 2:
        raise UserError(f"--identities must be at least 2, got {count}.")
    pids, counts = np.unique(gallery_pids, return_counts=True)
    usable = np.isin(pids, query_pids) & (counts >= 2)
    pids, counts = pids[usable], counts[usable]
    if len(pids) < 2:
        raise UserError(
            f"the gallery has {len(pids)} queried identities with two images or more, but the feature-space figure needs 2; "
            "choose another test set by --target."
        )
    return pids[np.lexsort((pids, -counts))][:count]


def feature_space(runs: list[RelationRun], *, identities: int = 12) -> dict[str, Any]:
    """Embed image-model features and every run's refined features of the same images in the plane (paper Fig. 4).

    The galleries are refined whole and alone (inductive protocol); only then the identities' images are taken. Runs on
    different image models get one image-model panel each.

    Args:
        runs: From :func:`load_runs`.
        identities: How many identities.

    Returns:
        ``identities``, ``pids`` (S), ``perplexity``, ``seed`` and ``panels``, each with ``title``, ``points`` (S, 2) and
        ``silhouette``: the mean cosine silhouette of the identities in the full feature space, in [-1, 1].
    """
    silhouette = needed("sklearn.metrics", _FEATURE_SPACE).silhouette_score
    gallery = runs[0].gallery
    chosen = choose_identities(gallery.pids, runs[0].query_pids, count=identities)
    rows = np.flatnonzero(np.isin(gallery.pids, chosen))
    pids = gallery.pids[rows]
    several = len({run.image_model for run in runs}) > 1
    spaces: list[tuple[str, Tensor]] = []
    drawn: set[str] = set()
    for run in runs:
        if run.image_model not in drawn:
            drawn.add(run.image_model)
            title = f"image model of {run.label}" if several else "image model"
            spaces.append((title, normalise(run.gallery.features)))
        spaces.append((run.label, run.encoder.refine_gallery(run.gallery.features, run.gallery.camids).refined))
    panels = []
    for title, features in spaces:
        values = features[torch.from_numpy(rows)].double().numpy()
        points = on_a_plane(values, what=_FEATURE_SPACE)
        score = float(silhouette(values, pids, metric="cosine"))
        panels.append({"title": title, "silhouette": score, "points": points.tolist()})
    return {
        "identities": gallery.shown(chosen),
        "pids": gallery.shown(pids),
        "perplexity": perplexity_of(len(rows)),
        "seed": SEED,
        "panels": panels,
    }


def _palette(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](step) for step in range(count)]
    if count <= 20:
        return [colormaps["tab20"](step) for step in (*range(0, 20, 2), *range(1, 20, 2))][:count]
    return [colormaps["hsv"](step / count) for step in range(count)]


def plot_feature_space(numbers: dict[str, Any], path: Path) -> None:
    """Draw what :func:`feature_space` returned, one panel per feature space, up to four in a line."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels, identities = numbers["panels"], numbers["identities"]
    lines = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / lines)
    figure = Figure(figsize=(3.4 * columns, 3.85 * lines + 0.4), layout=ConstrainedLayoutEngine(h_pad=0.1))
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    pids = numbers["pids"]
    colours = dict(zip(identities, _palette(len(identities))))
    for axis, panel in zip(axes, panels):
        points = np.asarray(panel["points"])
        axis.scatter(points[:, 0], points[:, 1], c=[colours[pid] for pid in pids], s=20, linewidths=0.3, edgecolors="white")
        axis.set_title(f"{_wrapped(panel['title'], 34)}\nmean silhouette {panel['silhouette']:.3f}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.margins(0.06)
        axis.set_box_aspect(1)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    title = f"t-SNE of {len(pids)} gallery images, one colour for each of {len(identities)} identities"
    figure.suptitle(_wrapped(title, 40 * columns), fontsize=11)
    ckpt.write_figure(path, figure)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


# --- attention --------------------------------------------------------------------------------------------------------
def bin_edges(lowest: float, highest: float) -> np.ndarray:
    """Return histogram edges, 0.05 apart, that hold [0, 1] and [lowest, highest]."""
    first = math.floor(round(min(0.0, lowest) / BIN_WIDTH, 6))
    last = math.ceil(round(max(1.0, highest) / BIN_WIDTH, 6))
    return np.arange(first, last + 1) * BIN_WIDTH


def row_entropy(weights: Tensor) -> Tensor:
    """Return the entropy, in nats, of the absolute weights of every row divided by their sum.

    Args:
        weights: (N, K), zero where a slot is not kept; softmax rows, or differences of them.

    Returns:
        (N,); 0 for a row that puts everything on one image.
    """
    size = weights.abs().double()
    share = size / size.sum(dim=1, keepdim=True).clamp_min(1e-300)
    return -torch.xlogy(share, share).sum(dim=1)


def attention_statistics(layers: list[RelationAttentionOutput], *, edges: np.ndarray) -> list[list[dict[str, Any]]]:
    """Count and summarise the weights of kept neighbours (an image's own slot included) per layer and head.

    Args:
        layers: From :meth:`~relreid_plugin.magformer.encoder.RelationEncoder.attention_maps`; weights (N, H, K).
        edges: Histogram edges; every weight must lie between the first and the last.

    Returns:
        Per layer and head: ``counts`` per bin, ``weights`` (how many), ``share_above_half`` in [0, 1], ``min``, ``max``,
        ``entropy`` (mean of the rows, nats) and ``entropy_of_uniform`` (mean of entropy / log(kept neighbours) over the rows
        with two or more; ``None`` without any), see :func:`row_entropy`.
    """
    table = []
    for layer in layers:
        kept = layer.mask.sum(dim=1)
        linked = kept >= 2
        heads = []
        for head in range(layer.weights.shape[1]):
            weights = layer.weights[:, head].masked_fill(~layer.mask, 0.0).double()
            values = weights[layer.mask].numpy()
            entropy = row_entropy(weights)
            ratio = entropy[linked] / kept[linked].double().log()
            heads.append(
                {
                    "counts": np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)[0].tolist(),
                    "weights": int(values.size),
                    "share_above_half": float((values > 0.5).mean()),
                    "min": float(values.min()),
                    "max": float(values.max()),
                    "entropy": float(entropy.mean()),
                    "entropy_of_uniform": float(ratio.mean()) if len(ratio) else None,
                }
            )
        table.append(heads)
    return table


def attention_scores(runs: list[RelationRun]) -> dict[str, Any]:
    """Summarise every run's attention over the gallery alone (paper Figs. 5 and 6).

    Args:
        runs: From :func:`load_runs`; runs with affinity neighbours are left out.

    Returns:
        ``edges`` of the bins, ``runs`` with ``label``, ``differential``, ``alone`` (share of images that keep no neighbour
        but themselves), ``lambda`` per layer (``None`` without DiffAttn) and ``layers`` (:func:`attention_statistics`), and
        ``skipped`` with the labels left out.
    """
    shown = [run for run in runs if run.encoder.neighbours == "feature"]
    outputs = [run.encoder.attention_maps(run.gallery.features, run.gallery.camids) for run in shown]
    values = [layer.weights.masked_fill(~layer.mask.unsqueeze(1), 0.0) for layers in outputs for layer in layers]
    lowest = min((float(one.min()) for one in values), default=0.0)
    highest = max((float(one.max()) for one in values), default=1.0)
    edges = bin_edges(lowest, highest)
    entries = []
    for run, layers in zip(shown, outputs):
        attentions: list[Any] = [block.attn for block in run.encoder.blocks]
        differential = attentions[0].differential
        entries.append(
            {
                "label": run.label,
                "differential": differential,
                "alone": float((layers[0].mask.sum(dim=1) == 1).double().mean()),
                "lambda": [float(one.lambda_value().detach()) if differential else None for one in attentions],
                "layers": attention_statistics(layers, edges=edges),
            }
        )
    return {
        "edges": np.round(edges, 6).tolist(),
        "runs": entries,
        "skipped": [run.label for run in runs if run.encoder.neighbours != "feature"],
    }


def plot_attention(numbers: dict[str, Any], path: Path) -> None:
    """Draw what :func:`attention_scores` returned: a row per run, a column per layer and head, weights above 0.5 in red."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

    edges, entries = np.asarray(numbers["edges"]), numbers["runs"]
    slots = sorted({(y, x) for entry in entries for y, heads in enumerate(entry["layers"]) for x in range(len(heads))})
    figure = Figure(
        figsize=(max(5.5, 1.95 * len(slots) + 0.9), 2.0 * len(entries) + 0.9),
        layout="constrained",
    )
    grid = figure.subplots(len(entries), len(slots), squeeze=False, sharex=True, sharey=True)
    total = max(head["weights"] for entry in entries for heads in entry["layers"] for head in heads)
    floor = 10.0 ** math.floor(math.log10(100.0 / total))
    high = edges[:-1] >= 0.5 - 1e-9
    for y, entry in enumerate(entries):
        for x, (layer, head) in enumerate(slots):
            axis = grid[y, x]
            if layer >= len(entry["layers"]) or head >= len(entry["layers"][layer]):
                axis.set_axis_off()
                continue
            numbers_here = entry["layers"][layer][head]
            share = 100.0 * np.asarray(numbers_here["counts"]) / numbers_here["weights"]
            colours = [HIGH if flag else LOW for flag in high]
            axis.bar(edges[:-1], share, width=np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.3)
            axis.set_yscale("log")
            axis.set_ylim(floor, 800.0)
            axis.set_xlim(edges[0], edges[-1])
            axis.yaxis.set_major_locator(LogLocator(base=10.0, numticks=12))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_locator(MultipleLocator(0.5 if edges[-1] - edges[0] < 4 else 2.0))
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.25)
            axis.set_axisbelow(True)
            above = f"> 0.5: {100 * numbers_here['share_above_half']:.1f}%"
            axis.text(0.97, 0.95, above, transform=axis.transAxes, ha="right", va="top", fontsize=8, color=HIGH)
        for x, (layer, head) in enumerate(slots):
            if y == 0:
                grid[y, x].set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
        grid[y, 0].set_ylabel(f"{_wrapped(entry['label'], 26)}\nweights, %", fontsize=9)
    figure.supxlabel("attention weight of a kept neighbour", fontsize=9)
    ckpt.write_figure(path, figure)


def attention_table(numbers: dict[str, Any]) -> str:
    """Return the numbers of :func:`attention_scores` as lines of text: a line per run, layer and head."""
    width = max([len(entry["label"]) for entry in numbers["runs"]] + [3])
    lines = [f"{'run':{width}}  layer  head  lambda  weights > 0.5  entropy, nats  of uniform"]
    for entry in numbers["runs"]:
        for layer, heads in enumerate(entry["layers"]):
            strength = entry["lambda"][layer]
            shown = "-" if strength is None else f"{strength:.3f}"
            for head, values in enumerate(heads):
                ratio = values["entropy_of_uniform"]
                part = "-" if ratio is None else f"{100 * ratio:.1f}%"
                lines.append(
                    f"{entry['label']:{width}}  {layer + 1:5d}  {head + 1:4d}  {shown:>6}  "
                    f"{100 * values['share_above_half']:12.2f}%  {values['entropy']:13.3f}  {part:>10}"
                )
    return "\n".join(lines)


# --- loss -------------------------------------------------------------------------------------------------------------
def loss_curves(runs: list[RelationRun]) -> dict[str, Any]:
    """Collect the stage-2 training losses (paper Fig. 2).

    Args:
        runs: From :func:`load_runs`.

    Returns:
        ``scale``: ``log`` where the total losses span more than a decade, else ``linear``; ``runs`` with ``label``,
        ``epochs``, ``loss`` and the unweighted parts ``ce`` and ``triplet`` where they were used; values that are not
        finite are ``None``.
    """
    entries = []
    for run in runs:
        entry: dict[str, Any] = {"label": run.label, "epochs": [record["epoch"] for record in run.history]}
        for name in ("loss", "ce", "triplet"):
            if run.history and name in run.history[0]:
                values = [record.get(name) for record in run.history]
                entry[name] = [one if one is not None and math.isfinite(one) else None for one in values]
        entries.append(entry)
    totals = [one for entry in entries for one in entry.get("loss", []) if one is not None and one > 0]
    decade = bool(totals) and max(totals) > 10 * min(totals)
    return {"scale": "log" if decade else "linear", "runs": entries}


def plot_loss(numbers: dict[str, Any], path: Path) -> None:
    """Draw what :func:`loss_curves` returned in one axis: totals solid, their parts faint.

    Earlier runs have broader lines, so that they show under later ones of the same course.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    entries = numbers["runs"]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    styles: dict[str, tuple[Any, float, float]] = {
        "loss": ("-", 1.0, 1.6),
        "ce": ("--", 0.4, 1.0),
        "triplet": (":", 0.45, 1.2),
    }
    handles, used = [], []
    for order, (entry, colour) in enumerate(zip(entries, _palette(len(entries)))):
        broader = 1.0 + 0.7 * min(3, len(entries) - 1 - order)
        handles.append(Line2D([], [], color=colour, linewidth=1.6 * broader, label=_wrapped(entry["label"], 40)))
        for name, (style, alpha, width) in styles.items():
            if name not in entry:
                continue
            used.append(name)
            values = [float("nan") if one is None else one for one in entry[name]]
            look = {"color": colour, "alpha": alpha, "linewidth": width * broader}
            if len(values) <= 3:
                look |= {"marker": "o", "markersize": 4 * broader}
            axis.plot(entry["epochs"], values, style, **look)
    words = {"loss": "total", "ce": "cross-entropy part", "triplet": "triplet part"}
    for name, (style, alpha, width) in styles.items():
        if name in used:
            handles.append(Line2D([], [], color="black", linestyle=style, alpha=alpha, linewidth=width, label=words[name]))
    if numbers["scale"] == "log":
        axis.set_yscale("log")
        totals = [one for entry in entries for one in entry.get("loss", []) if one is not None and one > 0]
        axis.set_ylim(bottom=max(axis.get_ylim()[0], min(totals) / 30))
    last = max((max(entry["epochs"], default=1) for entry in entries), default=1)
    if last == 1:
        axis.set_xlim(0.5, 1.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss")
    axis.set_title("stage 2: training loss", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(handles=handles, fontsize=8)
    ckpt.write_figure(path, figure)


# --- all of them ------------------------------------------------------------------------------------------------------
def draw_figures(
    folders: list[str | Path],
    *,
    out: str | Path | None = None,
    target: str | None = None,
    identities: int = 12,
) -> dict[str, Any]:
    """Draw ``tsne.png``, ``attention.png`` and ``loss.png``, write ``figures.json``, and print the numbers worth reading.

    Args:
        folders: Run folders with stage 2 and stored features.
        out: Folder of the pictures; ``None`` for ``figures`` in the first run's folder.
        target: Test set; ``None`` for the first one of the first run.
        identities: Identities in the feature-space figure, at least 2.

    Returns:
        The content of ``figures.json``.

    Raises:
        UserError: A run that cannot be drawn, scikit-learn missing, or a folder that cannot be written.
    """
    out = Path(folders[0]) / "figures" if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file; name a folder.")
    runs = load_runs(folders, target=target)
    space = feature_space(runs, identities=identities)
    attention = attention_scores(runs)
    loss = loss_curves(runs)
    trained = any(entry["epochs"] for entry in loss["runs"])
    numbers: dict[str, Any] = {
        "target": runs[0].target,
        "gallery_images": len(runs[0].gallery),
        "runs": [
            {
                "label": run.label,
                "folder": str(run.folder),
                "attention": run.cfg.relation.attention,
                "neighbours": run.cfg.relation.neighbours,
                "epoch": run.epoch,
                "image_model": run.image_model,
            }
            for run in runs
        ],
        "tsne": space,
        "attention": attention,
        "loss": loss,
    }
    files = []
    for name, plot, part, wanted in (
        ("tsne.png", plot_feature_space, space, True),
        ("attention.png", plot_attention, attention, bool(attention["runs"])),
        ("loss.png", plot_loss, loss, trained),
    ):
        if wanted:
            plot(part, out / name)
            files.append(name)
    numbers["files"] = files
    ckpt.write_json(out / "figures.json", numbers)
    _print_numbers(numbers, trained=trained)
    print(f"figures: {', '.join(str(out / name) for name in [*files, 'figures.json'])}")
    return numbers


def _print_numbers(numbers: dict[str, Any], *, trained: bool) -> None:
    space, attention = numbers["tsne"], numbers["attention"]
    width = max(len(panel["title"]) for panel in space["panels"])
    count, images = len(space["identities"]), len(space["pids"])
    print(f"{numbers['target']}: mean cosine silhouette in the full space, {count} identities, {images} gallery images")
    for panel in space["panels"]:
        print(f"  {panel['title']:{width}}  {panel['silhouette']:7.3f}")
    if attention["runs"]:
        print("\nattention weights of kept neighbours, gallery alone")
        print(attention_table(attention))
        for entry in attention["runs"]:
            print(f"{entry['label']}: {100 * entry['alone']:.1f}% of the images keep no neighbour but themselves.")
        if any(entry["differential"] for entry in attention["runs"]):
            print("With DiffAttn a row sums to 1 - lambda instead of 1; its entropy is that of the absolute weights.")
    if attention["skipped"]:
        names = ", ".join(attention["skipped"])
        print(f"note: no attention figure for {names}: with affinity neighbours every map has its own graph.")
    if not trained:
        print("note: no loss figure: stage 2 of these runs has no training epochs.")
    print()
