"""RIB's ablation and the sweep of the bound's weight, from configuration to tables and pictures (RIB; METHODS 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.defaults import load_config
from ..engine import checkpoint as ckpt
from ..engine.checkpoint import write_figure, write_json, write_text
from ..engine.grid import Part, Variant, collect, mean_std, plan, score_table, train
from ..engine.table import markdown, mean_and_spread
from ..errors import UserError
from ..locks import folder_lock
from .control import smoothing_of_like_strength
from .figures import bound_history, plot_information
from .observers import warmup_epochs
from .occlusion import write_stress_test

ATTENTION_TITLES = {"dcs": "DCS", "se": "CA (SE)", "cbam": "CA (CBAM)"}


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


def control_variants(cfg: Any, attention: dict[str, Any], bound: dict[str, Any], *, classes: int) -> list[Variant]:
    """Return the controls of one seed: gates that are drawn, and label smoothing in the bound's place.

    Args:
        cfg: The configuration.
        attention: Last epoch's record of the seed's run with attention alone.
        bound: That of its run with attention and bound.
        classes: Training identities C.

    Returns:
        ``random`` (DCS only): at drawn places the shares of channels that the gates of ``attention`` kept, in testing and
        under noise. ``smoothing``: attention, and the label smoothing whose best prediction differs in entropy from that of
        the configuration's smoothing as the predictions of ``bound`` do from those of ``attention``.
    """
    title, measure = ATTENTION_TITLES[cfg.rib.attention], ("rib.ibb.eta", "0", "rib.ibb.measure", "True")
    found = []
    if cfg.rib.attention == "dcs":
        test, noise = (
            str([round(attention[name], 4) for name in attention if name.startswith(start)])
            for start in ("kept_test/", "kept/")
        )
        drawn = ("rib.dcs.control", "random", "rib.dcs.keep", test, "rib.dcs.keep_noise", noise)
        found.append(Variant("random", f"+ {title}, gates drawn", (*measure, *drawn)))
    smoothing = smoothing_of_like_strength(
        bound["entropy"] - attention["entropy"],
        smoothing=cfg.loss.composite.smoothing if cfg.loss.softmax.label_smooth else 0.0,
        classes=classes,
    )
    like = ("loss.softmax.label_smooth", "True", "loss.composite.smoothing", f"{smoothing:.4f}")
    return [*found, Variant("smoothing", f"+ {title} + label smoothing", (*measure, *like))]


def plan_controls(config_file: str, parts: Sequence[Part], *, folder: Path, overrides: Sequence[str]) -> list[Part]:
    """Return the runs of the controls of an ablation whose runs are done: see :func:`control_variants`.

    Raises:
        UserError: A run did not measure the bound, or says nothing about the entropy of its predictions.
    """
    found: list[Part] = []
    for seed in dict.fromkeys(part.seed for part in parts):
        _, attention, bound = (part for part in parts if part.seed == seed)
        last = [bound_history(part.folder)[-1] for part in (attention, bound)]
        for part, record in zip((attention, bound), last):
            if "entropy" not in record:
                raise UserError(
                    f"'{part.folder}' holds a run of an earlier version, which says nothing about the entropy of its "
                    "predictions; choose another folder by --out."
                )
        classes = ckpt.load(attention.folder / "stage1" / "last.pth.tar", kind="image")["num_classes"]
        variants = control_variants(attention.cfg, last[0], last[1], classes=classes)
        found += plan(config_file, variants, [seed], folder=folder, overrides=overrides)
    return found


def eta_variants(etas: Sequence[float]) -> list[Variant]:
    """Return one variant per weight of the bound; weight 0 measures it only."""
    written = [f"{eta:g}" if float(f"{eta:g}") == eta else repr(eta) for eta in etas]
    return [
        Variant(f"eta{eta}", f"eta = {eta}", ("rib.ibb.eta", eta, "rib.ibb.measure", str(float(eta) == 0)))
        for eta in written
    ]


def training_signal(part: Part, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what a run says about its training signal; the end of the warm-up is the same epoch for all variants."""
    history = metrics["history"]["stage1"]
    end = warmup_epochs(part.cfg.rib.ibb.warmup, part.cfg.train.max_epoch)
    last = history[-1]
    measured = [record for record in history if "ibb" in record]
    softmax, composite = part.cfg.loss.softmax, part.cfg.loss.composite
    out: dict[str, Any] = {
        "smoothing": composite.smoothing if softmax.label_smooth else 0.0,
        "kept": {key.removeprefix("kept_test/"): value for key, value in last.items() if key.startswith("kept_test/")},
        "kept_noise": {key.removeprefix("kept/"): value for key, value in last.items() if key.startswith("kept/")},
    }
    if measured:
        before = [record for record in measured if record["epoch"] <= end]
        out["ibb_warmup"] = (before or measured[:1])[-1]["ibb"]
        out["ibb_last"] = measured[-1]["ibb"]
        out["entropy"] = measured[-1].get("entropy", float("nan"))
        out["bound_holds"] = sum(record["ib_holds"] == 1.0 for record in measured)
        out["epochs_measured"] = len(measured)
    return out


def signal_table(records: Sequence[dict[str, Any]]) -> str:
    """Return what shows that training works: IBB before and after it is trained on, the bound check, kept channels.

    Entropy is that of the predicted identities of training images in the last epoch. Kept channels are those of the last
    epoch under the test-time rule, the mean over the seeds for every layer.
    """
    header = ["method", "IBB, end of warm-up", "IBB, last epoch", "bound holds", "label smoothing", "entropy"]
    rows: list[list[str]] = []
    seen = set()
    for record in records:
        if record["variant"] in seen or not any("ibb_last" in signal for signal in record["signal"]):
            continue
        seen.add(record["variant"])
        signals = record["signal"]
        cells = [record["title"]]
        for name in ("ibb_warmup", "ibb_last"):
            mean, deviation = mean_std([signal[name] for signal in signals])
            cells.append(mean_and_spread(mean, deviation if len(signals) > 1 else None, digits=4))
        holds, epochs = (sum(signal[name] for signal in signals) for name in ("bound_holds", "epochs_measured"))
        cells.append(f"{holds} of {epochs} epochs")
        cells += [f"{mean_std([signal[name] for signal in signals])[0]:.3f}" for name in ("smoothing", "entropy")]
        layers = signals[0]["kept"]
        rates = [np.mean([signal["kept"][layer] for signal in signals]) for layer in layers]
        cells.append(", ".join(f"{100 * rate:.1f} %" for rate in rates) or "-")
        rows.append(cells)
    return markdown([*header, "kept channels, first layer … last layer"], rows, align="lrrrrrl")


def rib_report(
    config_files: Sequence[str], seeds: Sequence[int], *, out: Path, jobs: int = 1, overrides: Sequence[str] = ()
) -> str:
    """Train what is not trained yet, and write ``rib.md``, ``rib.json`` and the pictures.

    For every configuration: the scores of baseline, + attention, + attention + IBB and their controls (mean ± standard
    deviation over the seeds; :func:`control_variants`), the training signal, ``<name>-information.png`` (bound, estimate and
    kept channels of the first seed), and the occlusion stress test (``<name>-occlusion.png``, ``.md``, ``.json``) of the
    first three.

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
    controls: dict[str, list[Part]] = {}
    for file in config_files:
        variants = rib_variants(load_config(file, overrides))
        name = Path(file).stem
        plans[name] = plan(file, variants, seeds, folder=out / name, overrides=overrides)
    with folder_lock(out):
        train([part for parts in plans.values() for part in parts], jobs=jobs)
        for file in config_files:
            name = Path(file).stem
            controls[name] = plan_controls(file, plans[name], folder=out / name, overrides=overrides)
        train([part for parts in controls.values() for part in parts], jobs=jobs)
        return _rib_tables(plans, controls, seeds, out)


def _rib_tables(plans: dict[str, list[Part]], controls: dict[str, list[Part]], seeds: Sequence[int], out: Path) -> str:
    sections, results = [], {}
    for name, parts in plans.items():
        records = collect([*parts, *controls[name]], training_signal)
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
        records = collect(parts, training_signal)
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
