"""The ablation ladder (paper Table 1) from one stage 1: every rung is one switch of the configuration."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.defaults import merge_from_list
from ..engine import checkpoint as ckpt
from ..engine.runner import METHOD_NAMES, Run, read_metrics
from ..errors import UserError, did_you_mean
from ..files import atomic_file
from ..locks import folder_lock

RUNGS: dict[str, tuple[str, list[str]]] = {
    "nformer": ("NFormer: LAA + RNS", ["relation.attention", "nformer", "relation.init", "paper"]),
    "malaa": ("MALAA + RNS", ["relation.attention", "malaa", "relation.init", "paper"]),
    "magformer": ("MagFormer: MALAA + RNS + DiffAttn", ["relation.attention", "magformer", "relation.init", "paper"]),
    "affinity": (
        "MagFormer, affinity neighbours (eq. 3)",
        ["relation.attention", "magformer", "relation.init", "paper", "relation.neighbours", "affinity"],
    ),
    "diffusion": (
        "MagFormer, diffusion start (beyond the paper)",
        ["relation.attention", "magformer", "relation.init", "diffusion"],
    ),
}
"""Rung to its title and the overrides that make it."""


def _share(source: Path, target: Path, *more: tuple[str, str]) -> None:
    """Give ``target`` the stage-1 checkpoints and feature banks of ``source``: hard links, copies where there are none.

    Args:
        source: A run's folder.
        target: Another one.
        more: Further folders of a run, with the pattern of their files.
    """
    for part, pattern in (("stage1", "*.pth.tar"), *more, ("bank", "*.pt")):
        for file in sorted((source / part).glob(pattern)):
            copy = target / part / file.name
            if copy.exists() and copy.samefile(file):
                continue
            with atomic_file(copy) as temporary:
                try:
                    temporary.unlink()
                    os.link(file, temporary)
                except OSError:
                    shutil.copy2(file, temporary)


def _merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one method over seeds -> means and standard deviations."""
    names = ["mAP", "mINP", *records[0]["cmc"]]
    values = np.array([[row["mAP"], row["mINP"], *row["cmc"].values()] for row in records])
    deviation = values.std(axis=0, ddof=1) if len(records) > 1 else np.zeros(len(names))
    return {
        "protocol": records[0]["protocol"],
        "mean": dict(zip(names, values.mean(axis=0).tolist())),
        "std": dict(zip(names, deviation.tolist())),
        "parameters": records[0]["parameters"],
        "metric": records[0].get("metric", ""),
        "runs": len(records),
    }


def run_ladder(cfg: Any, *, rungs: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Train stage 1 once, then every rung for every seed; parts that are done are used again.

    Args:
        cfg: A configuration with both stages; ``data.save_dir`` holds the whole ladder.
        rungs: Keys of :data:`RUNGS`.
        seeds: Seeds of stage 2.

    Returns:
        ``{"target": …, "rows": [{"method", "protocol", "mean", "std", "parameters", "metric", "runs", "selected"}]}``; also
        written as ``ladder.json`` and ``ladder.md``.

    Raises:
        UserError: Unknown rung, or a configuration without stage 2.
    """
    for rung in rungs:
        if rung not in RUNGS:
            raise UserError(f"--rungs: unknown rung '{rung}'{did_you_mean(rung, RUNGS)}")
    if 2 not in cfg.train.stages:
        raise UserError("the ladder needs a configuration with 'train.stages [1, 2]'.")
    folder = Path(cfg.data.save_dir)
    with folder_lock(folder):
        return _climb(cfg, folder, rungs, seeds)


def _climb(cfg: Any, folder: Path, rungs: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    image_run = folder / "ladder" / "image-model"
    _share(folder, image_run)
    base = cfg.clone()
    base.data.save_dir = str(image_run)
    Run(base, stages=[1], resume=True).execute()
    rows: list[dict[str, Any]] = []
    for row in read_metrics(image_run)["rows"]:
        rows.append({"target": row["target"], "method": row["method"], "selected": [], **_merge([row])})
    for rung in rungs:
        title, overrides = RUNGS[rung]
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        selected: list[int] = []
        for seed in seeds:
            part = folder / "ladder" / f"{rung}-seed{seed}"
            _share(image_run, part)
            own = cfg.clone()
            merge_from_list(
                own, [*overrides, "relation.train.seed", str(seed), "data.save_dir", str(part), "test.rivals", "[]"]
            )
            Run(own, stages=[2], resume=True).execute()
            _share(part, image_run)
            metrics = read_metrics(part)
            selected.append(metrics["selected_epoch"]["stage2"])
            for row in metrics["rows"][1:]:
                name = METHOD_NAMES[own.relation.attention]
                if row["method"].startswith(name):
                    ending = row["method"].removeprefix(name)  # such as "(inductive) + k-reciprocal re-ranking"
                    found.setdefault((row["target"], row["protocol"], ending), []).append(row)
        for (target, _, ending), records in found.items():
            rows.append({"target": target, "method": f"+ {title}{ending}", "selected": selected, **_merge(records)})
    result = {"rows": rows, "seeds": list(seeds), "config": cfg.dump()}
    ckpt.write_json(folder / "ladder.json", result)
    ckpt.write_text(folder / "ladder.md", ladder_table(result) + "\n")
    return result


def ladder_table(result: dict[str, Any]) -> str:
    """Return the ladder as Markdown, one table per test set and protocol, percent, mean ± standard deviation over seeds."""
    parts = []
    rows = result["rows"]
    for target in dict.fromkeys(row["target"] for row in rows):
        for protocol in ("inductive", "transductive"):
            members = [row for row in rows if row["target"] == target and row["protocol"] == protocol]
            if not members:
                continue
            ranks = [rank for rank in ("1", "5", "10") if rank in members[0]["mean"]]
            header = ["method", "mAP", *(f"R{rank}" for rank in ranks), "mINP", "params", "chosen epoch"]
            lines = [f"**{target}**, {protocol}", "", "| " + " | ".join(header) + " |"]
            lines.append("|---|" + "---:|" * (len(header) - 1))
            for row in members:
                cells = [row["method"]]
                for name in ["mAP", *ranks, "mINP"]:
                    deviation = f" ± {100 * row['std'][name]:.1f}" if row["runs"] > 1 else ""
                    cells.append(f"{100 * row['mean'][name]:.1f}{deviation}")
                cells += [f"{row['parameters'] / 1e6:.2f}M", ", ".join(map(str, row["selected"])) or "-"]
                lines.append("| " + " | ".join(cells) + " |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


__all__ = ["RUNGS", "ladder_table", "run_ladder"]
