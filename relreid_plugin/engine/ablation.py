"""Variants of one configuration over several seeds, each trained and tested by the training command, as one table.

Two commands are made of it: ``tools/rib.py`` (baseline, + attention, + attention + IBB, and the occlusion stress test) and
``tools/eta.py`` (sweep of the bound's weight).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import get_default_config, load_config, merge_from_file
from ..errors import UserError
from . import checkpoint as ckpt
from .rib import warmup_epochs
from .runner import read_metrics

ATTENTION_TITLES = {"dcs": "DCS", "se": "CA (SE)", "cbam": "CA (CBAM)"}


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


def rib_variants(cfg: Any) -> list[Variant]:
    """Return baseline, + attention, + attention + IBB of a RIB configuration.

    All of them measure the bound; only the last one trains on it.

    Raises:
        UserError: The configuration has no RIB attention, or no weight of the bound.
    """
    kind = cfg.rib.attention
    if kind == "none" or cfg.rib.ibb.eta <= 0:
        raise UserError(
            "the table needs a configuration with 'rib.attention' (dcs, se or cbam) and 'rib.ibb.eta' above 0, such as "
            "configs/rib_dcs_vit_embedded.yml."
        )
    title, measure = ATTENTION_TITLES[kind], ("rib.ibb.eta", "0", "rib.ibb.measure", "True")
    return [
        Variant("baseline", "baseline", ("rib.attention", "none", "rib.places", "[]", *measure)),
        Variant(kind, f"+ {title}", measure),
        Variant(f"{kind}-ibb", f"+ {title} + IBB", ()),
    ]


def eta_variants(etas: Sequence[float]) -> list[Variant]:
    """Return one variant per weight of the bound; weight 0 measures it only."""
    return [
        Variant(f"eta{eta:g}", f"eta = {eta:g}", ("rib.ibb.eta", f"{eta:g}", "rib.ibb.measure", str(eta == 0)))
        for eta in etas
    ]


def plan(
    config_file: str, variants: Sequence[Variant], seeds: Sequence[int], *, folder: Path, overrides: Sequence[str]
) -> list[Part]:
    """Return the runs of an ablation, checked before the first one starts.

    Args:
        config_file: YAML configuration that all variants share.
        variants: The rows.
        seeds: Values of ``train.seed`` and ``rib.dcs.seed``.
        folder: Runs go to ``<folder>/<variant>-seed<n>``.
        overrides: ``KEY VALUE …`` for all of them.

    Raises:
        UserError: A configuration is wrong, or a folder holds a run of another configuration.
    """
    parts = []
    for variant in variants:
        for seed in seeds:
            place = folder / f"{variant.key}-seed{seed}"
            own = ["train.seed", str(seed), "rib.dcs.seed", str(seed), "test.rivals", "[]", "data.save_dir", str(place)]
            cfg = load_config(config_file, [*overrides, *variant.overrides, *own])
            part = Part(variant, seed, place, cfg)
            _check_folder(part)
            parts.append(part)
    return parts


def _check_folder(part: Part) -> None:
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
        jobs: Processes at a time; the threads of each are set by ``OMP_NUM_THREADS`` as usual.
        options: Options of the training command.

    Raises:
        UserError: A run fails; its own sentence is handed on.
    """
    left = [part for part in parts if not (part.folder / "metrics.json").is_file()]
    done = len(parts) - len(left)
    if done:
        print(f"{done} of {len(parts)} runs are done already", flush=True)

    def run(part: Part) -> None:
        part.folder.parent.mkdir(parents=True, exist_ok=True)
        wanted = part.folder.with_suffix(".yml")
        ckpt.write_text(wanted, part.cfg.dump())
        command = [sys.executable, "-m", "relreid_plugin.engine.cli", "--config-file", str(wanted), *options]
        root = str(Path(__file__).resolve().parents[2])
        search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": search}
        )
        wanted.unlink(missing_ok=True)
        if process.returncode != 0:
            lines = process.stderr.strip().splitlines() or ["no message"]
            raise UserError(f"{part.folder}: {lines[-1].removeprefix('error: ')}")
        row = read_metrics(part.folder)["rows"][0]
        title = f"{part.variant.title}, seed {part.seed}"
        rank, score = next(iter(row["cmc"].items()))
        print(f"{title}: mAP {row['mAP']:.1%}, R{rank} {score:.1%} ({part.folder})", flush=True)

    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        futures = [pool.submit(run, part) for part in left]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def _signal(history: list[dict[str, Any]], warmup_epochs: int) -> dict[str, Any]:
    """What one run says about its training signal; the end of the warm-up is the same epoch for all variants."""
    last = history[-1]
    measured = [record for record in history if "ibb" in record]
    out: dict[str, Any] = {
        "kept": {key.removeprefix("kept_test/"): value for key, value in last.items() if key.startswith("kept_test/")},
        "kept_noise": {key.removeprefix("kept/"): value for key, value in last.items() if key.startswith("kept/")},
    }
    if measured:
        before = [record for record in measured if record["epoch"] <= warmup_epochs]
        out["ibb_warmup"] = (before or measured[:1])[-1]["ibb"]
        out["ibb_last"] = measured[-1]["ibb"]
        out["bound_holds"] = sum(record["ib_holds"] == 1.0 for record in measured)
        out["epochs_measured"] = len(measured)
    return out


def collect(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return one record per variant and test set: means and standard deviations over the seeds, and the training signal."""
    records = []
    for variant in dict.fromkeys(part.variant for part in parts):
        own = [part for part in parts if part.variant == variant]
        metrics = [read_metrics(part.folder) for part in own]
        signals = [
            _signal(each["history"]["stage1"], warmup_epochs(part.cfg.rib.ibb.warmup, part.cfg.train.max_epoch))
            for each, part in zip(metrics, own)
        ]
        for position, first in enumerate(metrics[0]["rows"]):
            rows = [each["rows"][position] for each in metrics]
            names = ["mAP", "mINP", *first["cmc"]]
            values = {name: [row[name] if name in row else row["cmc"][name] for row in rows] for name in names}
            records.append(
                {
                    "variant": variant.key,
                    "title": variant.title,
                    "target": first["target"],
                    "mean": {name: _mean_std(value)[0] for name, value in values.items()},
                    "std": {name: _mean_std(value)[1] for name, value in values.items()},
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
        ranks = [rank for rank in ("1", "5", "10") if rank in members[0]["mean"]]
        header = ["method", "mAP", *(f"R{rank}" for rank in ranks), "mINP", "params"]
        lines = [f"**{target}**", "", "| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        for record in members:
            cells = [record["title"]]
            for name in ["mAP", *ranks, "mINP"]:
                deviation = f" ± {100 * record['std'][name]:.1f}" if len(record["seeds"]) > 1 else ""
                cells.append(f"{100 * record['mean'][name]:.1f}{deviation}")
            cells.append(f"{record['parameters'] / 1e6:.2f}M")
            lines.append("| " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def signal_table(records: Sequence[dict[str, Any]]) -> str:
    """Return what shows that training works: IBB before and after it is trained on, the bound check, kept channels.

    Kept channels are those of the last epoch under the test-time rule, the mean over the seeds for every layer.
    """
    header = ["method", "IBB, end of warm-up", "IBB, last epoch", "bound holds", "kept channels, first layer … last layer"]
    lines = ["| " + " | ".join(header) + " |", "|---|---:|---:|---:|---|"]
    seen = set()
    for record in records:
        if record["variant"] in seen or not any("ibb_last" in signal for signal in record["signal"]):
            continue
        seen.add(record["variant"])
        signals = record["signal"]
        cells = [record["title"]]
        for name in ("ibb_warmup", "ibb_last"):
            mean, deviation = _mean_std([signal[name] for signal in signals])
            cells.append(f"{mean:.4f}" + (f" ± {deviation:.4f}" if len(signals) > 1 else ""))
        holds, epochs = (sum(signal[name] for signal in signals) for name in ("bound_holds", "epochs_measured"))
        cells.append(f"{holds} of {epochs} epochs")
        layers = signals[0]["kept"]
        rates = [np.mean([signal["kept"][layer] for signal in signals]) for layer in layers]
        cells.append(", ".join(f"{100 * rate:.1f} %" for rate in rates) or "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Return the comma-separated numbers of an option.

    Raises:
        UserError: Something else, a negative number, or the same number twice.
    """
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 0 or len(set(values)) < len(values):
        raise UserError(f"command line: {option} takes different numbers of at least 0 like 1,2,3, got '{text}'.")
    return values
