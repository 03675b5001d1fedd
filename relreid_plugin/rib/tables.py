"""RIB's ablation and the sweep of the bound's weight, from configuration to tables and pictures (RIB; METHODS 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.defaults import load_config
from ..engine.checkpoint import write_figure, write_json, write_text
from ..engine.grid import Part, Variant, collect, eta_variants, plan, rib_variants, score_table, signal_table, train
from ..errors import UserError
from ..locks import folder_lock
from .figures import bound_history, plot_information
from .occlusion import write_stress_test


def rib_report(
    config_files: Sequence[str], seeds: Sequence[int], *, out: Path, jobs: int = 1, overrides: Sequence[str] = ()
) -> str:
    """Train what is not trained yet, and write ``rib.md``, ``rib.json`` and the pictures.

    For every configuration: the scores of baseline, + attention and + attention + IBB (mean ± standard deviation over the
    seeds), the training signal, ``<name>-information.png`` (bound, estimate and kept channels of the first seed), and the
    occlusion stress test (``<name>-occlusion.png``, ``.md``, ``.json``).

    Args:
        config_files: Configurations with a RIB attention.
        seeds: Seeds.
        out: Folder of runs, tables and pictures.
        jobs: Runs at a time.
        overrides: ``KEY VALUE …`` for all runs.

    Returns:
        The tables, as Markdown.

    Raises:
        UserError: A configuration does not fit, or a run fails.
    """
    plans: dict[str, list[Part]] = {}
    for file in config_files:
        variants = rib_variants(load_config(file, overrides))
        name = Path(file).stem
        plans[name] = plan(file, variants, seeds, folder=out / name, overrides=overrides)
    with folder_lock(out):
        train([part for parts in plans.values() for part in parts], jobs=jobs)
        return _rib_tables(plans, seeds, out)


def _rib_tables(plans: dict[str, list[Part]], seeds: Sequence[int], out: Path) -> str:
    sections, results = [], {}
    for name, parts in plans.items():
        records = collect(parts)
        target = parts[0].cfg.data.targets[0]
        groups: dict[str, list[str | Path]] = {}
        for part in parts:
            groups.setdefault(part.variant.title, []).append(part.folder)
        stress = write_stress_test(groups, out, name=f"{name}-occlusion", target=target)
        first = {part.variant.title: bound_history(part.folder) for part in parts if part.seed == seeds[0]}
        plot_information(first, out / f"{name}-information.png")
        sections.append(f"## {name}\n\n{score_table(records)}\n\n{signal_table(records)}\n\n{stress}")
        results[name] = records
    report = "\n\n".join(sections)
    write_json(out / "rib.json", results)
    write_text(out / "rib.md", report + "\n")
    return report


def eta_report(
    config_file: str,
    etas: Sequence[float],
    seeds: Sequence[int],
    *,
    out: Path,
    jobs: int = 1,
    overrides: Sequence[str] = (),
) -> str:
    """Train what is not trained yet, and write ``eta.md``, ``eta.json`` and ``eta.png``: scores and IBB over eta.

    Args:
        config_file: Configuration.
        etas: Weights of the bound; with 0 it is only measured.
        seeds: Seeds.
        out: Folder of runs, table and picture.
        jobs: Runs at a time.
        overrides: ``KEY VALUE …`` for all runs.

    Returns:
        The tables, as Markdown.

    Raises:
        UserError: A configuration does not fit, or a run fails.
    """
    if "rib.ibb.eta" in overrides[::2]:
        raise UserError("command line: 'rib.ibb.eta' is set by --etas; leave it out of --opts.")
    variants = eta_variants(etas)
    parts = plan(config_file, variants, seeds, folder=out, overrides=overrides)
    with folder_lock(out):
        train(parts, jobs=jobs)
        records = collect(parts)
        report = f"{score_table(records)}\n\n{signal_table(records)}"
        plot_eta(etas, variants, records, out / "eta.png")
        write_json(out / "eta.json", {"etas": list(etas), "records": records})
        write_text(out / "eta.md", report + "\n")
    return report


def plot_eta(etas: Sequence[float], variants: Sequence[Variant], records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw mAP and the last epoch's IBB over eta, with the standard deviation over the seeds.

    Args:
        etas: Weights.
        variants: One per weight.
        records: From :func:`relreid_plugin.engine.grid.collect`.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    order = np.argsort(etas)
    x = np.asarray(etas)[order]
    for target in dict.fromkeys(record["target"] for record in records):
        own = {record["variant"]: record for record in records if record["target"] == target}
        rows = [own[variants[index].key] for index in order]
        mean, deviation = (100 * np.asarray([row[name]["mAP"] for row in rows]) for name in ("mean", "std"))
        left.errorbar(
            x, mean, yerr=deviation if deviation.any() else None, marker="o", markersize=4, capsize=3, label=target
        )
        last = np.asarray([[signal["ibb_last"] for signal in row["signal"]] for row in rows])
    spread = last.std(axis=1, ddof=1) if last.shape[1] > 1 else None
    right.errorbar(x, last.mean(axis=1), yerr=spread, marker="s", markersize=4, capsize=3, color="tab:red")
    left.set_ylabel("mAP, %")
    right.set_ylabel("IBB in the last epoch, nats")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("eta, weight of the bound")
        axis.grid(alpha=0.25)
    write_figure(path, figure)
