"""Variants of one configuration over several seeds, each trained and tested by the training command, as one table.

The methods' own tables are made of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.defaults import get_default_config, load_config, merge_from_file
from ..errors import UserError
from ..files import write_text
from ..methods import methods
from ..options import check_integer
from ..options import parse_numbers as parse_numbers
from ..processes import run_all
from .runner import read_metrics
from .table import markdown, millions, score_cells, score_columns, score_header


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    Attributes:
        key: Name of its folders.
        title: Name in the table.
        overrides: ``KEY VALUE …`` that make it out of the configuration.
    """

    key: str
    title: str
    overrides: tuple[str, ...]


@dataclass
class Part:
    """One run of an ablation: a variant with a seed, in its folder."""

    variant: Variant
    seed: int
    folder: Path
    cfg: Any


def plan(
    config_file: str, variants: Sequence[Variant], seeds: Sequence[int], *, folder: Path, overrides: Sequence[str]
) -> list[Part]:
    """Return the runs of an ablation, checked before the first one starts.

    Args:
        config_file: YAML configuration that all variants share.
        variants: The rows.
        seeds: Values of ``train.seed``, and of the methods' own seeds of stage 1.
        folder: Runs go to ``<folder>/<variant>-seed<n>``.
        overrides: ``KEY VALUE …`` for all of them.

    Raises:
        UserError: A configuration is wrong, or a folder holds a run of another configuration.
    """
    _refuse_own_keys(overrides)
    parts = []
    for variant in variants:
        for seed in seeds:
            place = folder / f"{variant.key}-seed{seed}"
            seeded = [word for key in _seeds() for word in (key, str(seed))]
            own = [*seeded, "test.rivals", "[]", "data.save_dir", str(place)]
            cfg = load_config(config_file, [*overrides, *variant.overrides, *own])
            part = Part(variant, seed, place, cfg)
            check_folder(part)
            parts.append(part)
    return parts


def _seeds() -> list[str]:
    """Keys of the seeds of stage 1."""
    return ["train.seed", *(key for method in methods() for key in method.seeds)]


def _refuse_own_keys(overrides: Sequence[str]) -> None:
    """Overrides that would be overwritten without a word."""
    for key, option in (*((key, "--seeds") for key in _seeds()), ("data.save_dir", "--out")):
        if key in overrides[::2]:
            raise UserError(f"command line: '{key}' is set for every run by {option}; leave it out of --opts.")
    if "test.rivals" in overrides[::2]:
        raise UserError("command line: this table has no rivals; leave 'test.rivals' out of --opts.")


def check_folder(part: Part) -> None:
    """A finished run of the same configuration is used again; one of another configuration is not touched."""
    path = part.folder / "config.yml"
    if not path.is_file():
        return
    found = get_default_config()
    merge_from_file(found, path)
    found.use_gpu = part.cfg.use_gpu  # the run writes down whether there was a GPU
    if found != part.cfg:
        raise UserError(f"'{part.folder}' holds a run of another configuration; choose another folder by --out.")


def train(parts: Sequence[Part], *, jobs: int = 1, options: Sequence[str] = ("--resume",)) -> None:
    """Train and test the parts that are not done, each in a process of the training command that can be resumed.

    Args:
        parts: From :func:`plan`.
        jobs: Processes at a time; the threads of each are set by ``OMP_NUM_THREADS`` as usual. They end when this one does.
        options: Options of the training command.

    Raises:
        UserError: ``jobs`` is no number of processes, or a run fails; its own sentence is handed on.
    """
    check_integer("jobs", jobs, 1, 256)
    left = [part for part in parts if not (part.folder / "metrics.json").is_file()]
    done = len(parts) - len(left)
    if done:
        print(f"{done} of {len(parts)} runs are done already", flush=True)

    def done_with(number: int, code: int, message: str) -> None:
        part = left[number]
        if code != 0:
            lines = message.strip().splitlines() or [f"ended with exit code {code}"]
            raise UserError(f"{part.folder}: {lines[-1].removeprefix('error: ')}")
        row = read_metrics(part.folder)["rows"][0]
        title = f"{part.variant.title}, seed {part.seed}"
        rank, score = next(iter(row["cmc"].items()))
        print(f"{title}: mAP {row['mAP']:.1%}, R{rank} {score:.1%} ({part.folder})", flush=True)

    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    wanted = [part.folder.with_name(f"{part.folder.name}.yml") for part in left]
    try:
        for part, path in zip(left, wanted):
            write_text(path, part.cfg.dump())
        run_all(
            [[sys.executable, "-m", "relreid_plugin.cli.train", "--config-file", str(path), *options] for path in wanted],
            jobs=jobs,
            environment={**os.environ, "PYTHONPATH": search},
            done=done_with,
        )
    finally:
        for path in wanted:
            path.unlink(missing_ok=True)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation, 0 for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def collect(
    parts: Sequence[Part], signal: Callable[[Part, dict[str, Any]], dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return one record per variant and test set: means and standard deviations over the seeds.

    Runs of one variant are those with its key; what makes it out of the configuration may differ from seed to seed.

    Args:
        parts: Finished runs.
        signal: What a run's metrics say about its training, for the records.
    """
    records = []
    variants: dict[str, Variant] = {}
    for part in parts:
        variants.setdefault(part.variant.key, part.variant)
    for variant in variants.values():
        own = [part for part in parts if part.variant.key == variant.key]
        metrics = [read_metrics(part.folder) for part in own]
        signals = [] if signal is None else [signal(part, each) for part, each in zip(own, metrics)]
        for position, first in enumerate(metrics[0]["rows"]):
            rows = [each["rows"][position] for each in metrics]
            names = ["mAP", "mINP", *first["cmc"]]
            values = {name: [row[name] if name in row else row["cmc"][name] for row in rows] for name in names}
            records.append(
                {
                    "variant": variant.key,
                    "title": variant.title,
                    "target": first["target"],
                    "mean": {name: mean_std(value)[0] for name, value in values.items()},
                    "std": {name: mean_std(value)[1] for name, value in values.items()},
                    "parameters": first["parameters"],
                    "seeds": [part.seed for part in own],
                    "runs": [str(part.folder) for part in own],
                    "signal": signals,
                }
            )
    return records


def score_table(records: Sequence[dict[str, Any]]) -> str:
    """Return the scores as Markdown: percent, mean ± standard deviation over the seeds, one table per test set."""
    tables = []
    for target in dict.fromkeys(record["target"] for record in records):
        members = [record for record in records if record["target"] == target]
        columns = score_columns(members[0]["mean"])
        rows = [
            [
                record["title"],
                *score_cells(record["mean"], record["std"] if len(record["seeds"]) > 1 else None, columns),
                millions(record["parameters"]),
            ]
            for record in members
        ]
        tables.append(markdown(["method", *score_header(columns), "params"], rows, title=f"**{target}**"))
    return "\n\n".join(tables)
