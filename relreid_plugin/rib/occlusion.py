"""Occlusion stress test: scores of image models while more and more of every query is covered (RIB; METHODS 2).

Shape letters: B images, h x w pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.checkpoint import write_figure, write_json, write_text
from ..engine.runner import Run, open_run
from ..engine.table import markdown, mean_and_spread
from ..errors import UserError

FILLS = ("noise", "mean")
FRACTIONS = tuple(step / 10 for step in range(9))
CELLS = (16, 8)
"""Rows and columns of coloured blocks in an occluder that covers the whole image."""


@dataclass
class Curve:
    """Scores of one method over the covered fraction.

    Attributes:
        label: The method.
        runs: Its run folders, one per seed.
        mAP: (runs, fractions).
        rank1: (runs, fractions).
    """

    label: str
    runs: list[str]
    mAP: np.ndarray
    rank1: np.ndarray


def _seeds(keys: Sequence[str], seed: int, device: torch.device) -> Tensor:
    """One 62-bit number per image, a function of its key and the seed alone."""
    texts = [f"{seed}|{key}".encode("utf-8", "surrogateescape") for key in keys]  # a file's name may be no text
    values = [int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 2 for text in texts]
    return torch.tensor(values, dtype=torch.int64, device=device)


def _uniform(seeds: Tensor, count: int) -> Tensor:
    """(B,) seeds -> (B, count) numbers in [0, 1), by mixing the bits of seed and position."""
    mixed = seeds.unsqueeze(1) + 0x1E3779B97F4A7C15 * torch.arange(1, count + 1, device=seeds.device)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB), (31, 0x2545F4914F6CDD1D)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((mixed >> 11) & ((1 << 52) - 1)).double().div(2**52)


def occluder_mask(fraction: float, keys: Sequence[str], size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Return where the images are covered: a rectangle that grows from one side, which the key and the seed choose.

    Args:
        fraction: Share of the image, in [0, 1]; rounded to whole rows or columns.
        keys: B names.
        size: (h, w).
        seed: Another seed gives other sides.

    Returns:
        (B, h, w) bool. What a fraction covers, every larger one covers too.

    Raises:
        ValueError: The fraction is outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    height, width = size
    side = _seeds(keys, seed, torch.device("cpu")) % 4  # top, bottom, left, right
    rows, columns = torch.arange(height).view(1, height, 1), torch.arange(width).view(1, 1, width)
    along = torch.stack(
        [
            (rows < round(fraction * height)).expand(1, height, width),
            (rows >= height - round(fraction * height)).expand(1, height, width),
            (columns < round(fraction * width)).expand(1, height, width),
            (columns >= width - round(fraction * width)).expand(1, height, width),
        ]
    ).squeeze(1)
    return along[side]


def occlude(images: Tensor, fraction: float, keys: Sequence[str], *, seed: int = 0, fill: str = "noise") -> Tensor:
    """Cover a fraction of every image.

    What an image looks like depends on its key, the fraction and the seed, not on the batch it is in.

    Args:
        images: (B, 3, h, w), normalised.
        fraction: See :func:`occluder_mask`.
        keys: B names, such as those of the files.
        seed: Chooses sides and colours.
        fill: ``noise``: blocks of random colours; ``mean``: the data set's mean colour.

    Returns:
        (B, 3, h, w), a copy.

    Raises:
        ValueError: Unknown fill, or a fraction outside [0, 1].
    """
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}")
    batch, channels, height, width = images.shape
    mask = occluder_mask(fraction, keys, (height, width), seed=seed).to(images.device).unsqueeze(1)
    if fill == "mean":
        return images.masked_fill(mask, 0.0)
    rows, columns = CELLS
    blocks = _uniform(_seeds(keys, seed, images.device), channels * rows * columns)
    blocks = (4.0 * blocks - 2.0).to(images.dtype).view(batch, channels, rows, columns)  # within two standard deviations
    return torch.where(mask, F.interpolate(blocks, size=(height, width), mode="nearest"), images)


def alter_queries(images: Tensor, paths: list[str], *, fraction: float, seed: int, fill: str) -> Tensor:
    """:func:`occlude` by the names of files, as :meth:`Run.target_features` takes it."""
    return occlude(images, fraction, [Path(path).name for path in paths], seed=seed, fill=fill)


def choose_target(runs: Mapping[str, Any], target: str | None) -> str:
    """Return the test set to look at: ``target``, or the first one of the first run.

    Raises:
        UserError: A run does not have it.
    """
    name = target or next(iter(runs.values())).cfg.data.targets[0]
    for folder, run in runs.items():
        if name not in run.cfg.data.targets:
            raise UserError(f"run '{folder}' was not tested on '{name}' but on {', '.join(run.cfg.data.targets)}.")
    return name


def parse_groups(words: Sequence[str]) -> dict[str, list[str]]:
    """Return methods and their run folders from words like ``RUN`` or ``LABEL=RUN,RUN``.

    Raises:
        UserError: A label without a folder, or the same label twice.
    """
    groups: dict[str, list[str]] = {}
    for word in words:
        label, found, rest = word.partition("=")
        folders = [folder for folder in (rest if found else word).split(",") if folder]
        label = label if found else Path(word).name
        if not folders or not label:
            raise UserError(f"command line: '{word}' names no run; write RUN or LABEL=RUN,RUN.")
        if label in groups:
            raise UserError(f"command line: two methods are called '{label}'; name them by LABEL=RUN,RUN.")
        groups[label] = folders
    return groups


def single_runs(words: Sequence[str]) -> dict[str, str]:
    """:func:`parse_groups` with one run per label.

    Raises:
        UserError: A label with several runs, too.
    """
    groups = parse_groups(words)
    for label, folders in groups.items():
        if len(folders) > 1:
            raise UserError(f"command line: '{label}' names {len(folders)} runs; here a label takes one.")
    return {label: folders[0] for label, folders in groups.items()}


def stress_test(
    groups: Mapping[str, Sequence[str | Path]],
    *,
    fractions: Sequence[float] = FRACTIONS,
    target: str | None = None,
    fill: str = "noise",
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> tuple[str, list[Curve]]:
    """Score trained runs on queries that are covered more and more; the gallery stays as it is.

    Args:
        groups: Method to its run folders, one per seed.
        fractions: Covered shares of every query image.
        target: Test set; ``None``: the first one of the first run.
        fill: See :func:`occlude`.
        seed: See :func:`occlude`.
        overrides: ``KEY VALUE …`` over the runs' configurations, such as another ``data.root``.

    Returns:
        The test set's name and one curve per method.

    Raises:
        UserError: A folder holds no run, or one of another test set.
    """
    if fill not in FILLS:
        raise UserError(f"command line: the fill is one of {', '.join(FILLS)}, got '{fill}'.")
    if not fractions or not all(0.0 <= fraction <= 1.0 for fraction in fractions):
        raise UserError("command line: the fractions to cover must lie in [0, 1], as in 0,0.2,0.4.")
    curves, name = [], target
    for label, folders in groups.items():
        scores = []
        for folder in folders:
            run = open_run(folder, overrides)
            run.network.require_pictures(run)
            name = choose_target({str(folder): run}, name)
            scores.append([_score(run, name, fraction, seed, fill) for fraction in fractions])
        table = np.asarray(scores)
        curves.append(Curve(label, [str(folder) for folder in folders], table[:, :, 0], table[:, :, 1]))
    assert name is not None
    return name, curves


def _score(run: Run, target: str, fraction: float, seed: int, fill: str) -> tuple[float, float]:
    alter = None if fraction == 0 else partial(alter_queries, fraction=fraction, seed=seed, fill=fill)
    result = run.score(run.target_features(target, alter))
    return float(result.mAP), float(result.rank(1))


def stress_table(target: str, fractions: Sequence[float], curves: Sequence[Curve]) -> str:
    """Return mAP and R1 in percent by covered fraction as Markdown, mean ± standard deviation over a method's runs."""
    header = ["covered", *(f"{curve.label}: {score}" for curve in curves for score in ("mAP", "R1"))]
    rows = []
    for column, fraction in enumerate(fractions):
        cells = [f"{fraction:.0%}"]
        for curve in curves:
            for values in (curve.mAP[:, column], curve.rank1[:, column]):
                deviation = 100 * values.std(ddof=1) if len(values) > 1 else None
                cells.append(mean_and_spread(100 * values.mean(), deviation))
        rows.append(cells)
    return markdown(header, rows, title=f"**{target}**, queries covered", align="r" * len(header))


def plot_stress(target: str, fractions: Sequence[float], curves: Sequence[Curve], path: Path) -> None:
    """Draw mAP over the covered fraction, one line per method, its standard deviation over the runs shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    x = [100 * fraction for fraction in fractions]
    for curve, marker in zip(curves, "osD^vPX*" * len(curves)):
        mean = 100 * curve.mAP.mean(axis=0)
        count = len(curve.runs)
        (line,) = axis.plot(
            x, mean, marker=marker, markersize=4, label=curve.label + (f" ({count} runs)" if count > 1 else "")
        )
        if count > 1:
            spread = 100 * curve.mAP.std(axis=0, ddof=1)
            axis.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel("part of every query image that is covered, %")
    axis.set_ylabel("mAP, %")
    axis.set_ylim(bottom=0)
    axis.set_title(f"{target}: occlusion stress test")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    write_figure(path, figure)


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images (B, 3, h, w) -> (B, h, w, 3) in [0, 1]."""
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return (images.cpu().float() * scale + shift).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def plot_examples(
    run: Run, target: str, fractions: Sequence[float], path: Path, *, count: int = 4, seed: int = 0, fill: str = "noise"
) -> None:
    """Draw a few queries of a run at every fraction, as the model sees them."""
    from matplotlib.figure import Figure

    images, names = load_queries(run, target, count)[:2]
    cfg = run.cfg
    figure = Figure(figsize=(0.9 * len(fractions), 1.75 * len(names) + 0.3), layout="constrained")
    axes = figure.subplots(len(names), len(fractions), squeeze=False)
    for column, fraction in enumerate(fractions):
        covered = pixels(occlude(images, fraction, names, seed=seed, fill=fill), cfg.data.norm_mean, cfg.data.norm_std)
        for row, picture in enumerate(covered):
            axis = axes[row][column]
            axis.imshow(picture)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(f"{fraction:.0%}", fontsize=9)
    write_figure(path, figure)


def chosen_queries(run: Run, target: str, count: int) -> list[tuple[Any, ...]]:
    """Return the items of up to ``count`` queries of a test set, spread over its identities."""
    records = run.datamanager.test_dataset[target]["query"]
    return [records[index] for index in np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)]


def load_queries(run: Run, target: str, count: int) -> tuple[Tensor, list[str], np.ndarray, np.ndarray]:
    """Return queries of a test set, spread over its identities: images (B, 3, h, w) normalised, file names, identities,
    cameras."""
    from ..host import make_loader

    chosen = chosen_queries(run, target, count)
    loader = make_loader(run.datamanager, chosen, run.datamanager.transform_te, run.cfg.test.batch_size, 0)
    batches = list(loader)
    return (
        torch.cat([batch["img"] for batch in batches]),
        [Path(path).name for batch in batches for path in batch["impath"]],
        np.concatenate([np.asarray(batch["pid"]) for batch in batches]),
        np.concatenate([np.asarray(batch["camid"]) for batch in batches]),
    )


def write_stress_test(
    groups: Mapping[str, Sequence[str | Path]],
    out: Path,
    *,
    name: str = "occlusion",
    fractions: Sequence[float] = FRACTIONS,
    target: str | None = None,
    fill: str = "noise",
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> str:
    """Run :func:`stress_test` and write ``<name>.png``, ``<name>-examples.png``, ``<name>.md`` and ``<name>.json``.

    Returns:
        The table.
    """
    found, curves = stress_test(groups, fractions=fractions, target=target, fill=fill, seed=seed, overrides=overrides)
    table = stress_table(found, fractions, curves)
    plot_stress(found, fractions, curves, out / f"{name}.png")
    first = open_run(next(iter(groups.values()))[0], overrides)
    plot_examples(first, found, fractions, out / f"{name}-examples.png", seed=seed, fill=fill)
    records = [
        {"label": curve.label, "runs": curve.runs, "mAP": curve.mAP.tolist(), "rank1": curve.rank1.tolist()}
        for curve in curves
    ]
    write_json(
        out / f"{name}.json",
        {"target": found, "fill": fill, "seed": seed, "fractions": list(fractions), "methods": records},
    )
    write_text(out / f"{name}.md", table + "\n")
    return table
