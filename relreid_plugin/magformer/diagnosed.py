"""Diagnoses of runs and of features in files, as tables, JSON and a picture (``relreid diagnose``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine import checkpoint as ckpt
from ..engine.runner import Run, open_run
from ..errors import UserError, did_you_mean
from ..features.sets import FeatureSet, TestFeatures
from .config import stage_number
from .diagnosis import GALLERY, QUERIES, Part, as_part, diagnose
from .encoder import RelationEncoder
from .recipe import fold_episodes, with_recipe
from .stage import build_encoder, fit_head

TRAINING, HELD_OUT = "training", "held-out"
_COLOURS = {
    "true_other": ("tab:green", "true, other camera"),
    "true_same": ("yellowgreen", "true, own camera"),
    "false_other": ("tab:red", "false, other camera"),
    "false_same": ("lightcoral", "false, own camera"),
}
_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.06), "ncols": 3}


# --- what is looked at ------------------------------------------------------------------------------------------------


def parts_of_run(folder: Path | str, *, target: str | None = None) -> tuple[list[Part], int]:
    """Return training, held-out and test identities of a run with its encoder over them, and the encoder's neighbours.

    Training identities are divided into queries and gallery like held-out ones.

    Args:
        folder: The run's folder.
        target: One of its test sets; ``None``: all.

    Raises:
        UserError: No such run or test set.
    """
    run, missing = _opened(folder)
    targets = list(run.cfg.data.targets)
    if target is not None and target not in targets:
        raise UserError(f"--target '{target}' is no test set of run '{folder}'{did_you_mean(target, targets)}")
    encoder = run.refiner()
    if encoder is not None and not isinstance(encoder, RelationEncoder):
        raise UserError(f"run '{folder}' refines its features by another method; give its features instead.")
    encoder = None if encoder is None else encoder.cpu()
    if encoder is not None and encoder.neighbours == "affinity":
        print("note: with 'relation.neighbours affinity' every map has neighbours of its own; attention is not measured.")
    parts = []
    if missing:
        print(f"note: training and held-out identities are left out: {missing}")
    else:
        bank = run.features.bank("train", run.datamanager.train_loader.dataset.train)
        parts += [as_part(TRAINING, bank, encoder), *_held_out(run, bank, encoder)]
    for name in targets if target is None else [target]:
        parts.append(Part(name, run.target_features(name), encoder))
    k = 10
    if encoder is not None:
        k = encoder.k - 1 if encoder.rule is None else encoder.rule.other + encoder.rule.same  # an image is one of its k
        k = max(1, k)
    return parts, k


def _opened(folder: Path | str) -> tuple[Run, str]:
    """A run with its training data, or without it and why."""
    try:
        return open_run(folder, training=True), ""
    except UserError as error:
        return open_run(folder), str(error)


def _held_out(run: Run, bank: FeatureSet, encoder: RelationEncoder | None) -> list[Part]:
    """Identities that the network did not train on; where it is frozen, a turn of the training ones, with its own head."""
    cfg = run.cfg
    held = run.features.held_out() if cfg.train.val_fraction > 0 else None
    if held is not None:
        return [Part(HELD_OUT, held, encoder)]
    if 1 in cfg.train.stages or encoder is None:
        return []
    select = cfg.relation.select
    given = {"folds": select.folds, "identities": select.identities, "images": select.images}
    episodes = fold_episodes(bank, **given, seed=cfg.relation.train.seed)
    if not episodes:
        return []
    state = ckpt.load(run.stage_folder(stage_number(cfg)) / "last.pth.tar", kind="relation")
    own = with_recipe(cfg, state.get("recipe", []))
    if own.relation.train.max_epoch > 0:
        return []  # the encoder has seen them all
    other = build_encoder(own, dim=encoder.dim, num_classes=encoder.num_classes)
    fit_head(own, other, episodes[0].train)
    return [Part(HELD_OUT, TestFeatures(episodes[0].query, episodes[0].gallery), other.eval())]


def parts_of_features(
    name: str, features: FeatureSet, *, gallery: FeatureSet | None = None, train: FeatureSet | None = None
) -> list[Part]:
    """Return the parts of features from anywhere, in the order of :func:`parts_of_run`.

    Args:
        name: What tables call them.
        features: Queries where ``gallery`` is given; else they are divided into queries and gallery as held-out identities
            are.
        gallery: The gallery, or ``None``.
        train: Training features beside them, or ``None``.

    Raises:
        UserError: Identities that are not known, or that make no queries.
    """
    parts = [] if train is None else [as_part(TRAINING, _known(TRAINING, train))]
    if gallery is None:
        return [*parts, as_part(name, _known(name, features))]
    if gallery.features.shape[1] != features.features.shape[1]:
        raise UserError(
            f"queries of width {features.features.shape[1]} do not fit a gallery of width {gallery.features.shape[1]}; both "
            "need the same model."
        )
    return [*parts, Part(name, TestFeatures(_known(name, features), gallery))]


def _known(name: str, features: FeatureSet) -> FeatureSet:
    """The images whose identity is known; says how many are not."""
    rows = np.flatnonzero(features.pids >= 0)
    if not len(rows):
        raise UserError(f"'{name}': the identities of all {len(features)} images are unknown; they are needed here.")
    if len(rows) == len(features):
        return features
    print(f"note: {len(features) - len(rows)} of {len(features)} images of '{name}' have no identity and are left out.")
    return FeatureSet(features.features[torch.from_numpy(rows)], features.pids[rows], features.camids[rows], [])


# --- what is said -----------------------------------------------------------------------------------------------------


def diagnosis_markdown(result: dict[str, Any]) -> str:
    """Return a diagnosis as Markdown: neighbours, attention and reach; shares and scores in percent."""
    parts = ["**neighbours**", "", _neighbour_table(result)]
    if any(entry["attention"] for entry in result["parts"]):
        parts += ["", "**attention**", "", _attention_table(result)]
    return "\n".join([*parts, "", "**reach**", "", _reach_table(result)])


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _neighbour_table(result: dict[str, Any]) -> str:
    header = ["identities", "of", "k", "matches", "of other cameras", "nearest: true", "other camera", "found", "none"]
    header += ["reciprocal: kept", "true", "other camera", "found", "none"]
    rows = []
    for entry in result["parts"]:
        for found in entry["neighbours"]:
            row = [f"{entry['name']} ({entry['identities']})", found["of"], str(found["k"])]
            row += [f"{found['matches']:.1f}", f"{found['matches_other']:.1f}"]
            for name in ("nearest", "reciprocal"):
                row += [f"{found['reciprocal_kept']:.1f}"] if name == "reciprocal" else []
                row += [_share(found[f"{name}_{key}"]) for key in ("true", "true_other", "found", "none")]
            rows.append(row)
    return _rows(header, rows, 2)


def _attention_table(result: dict[str, Any]) -> str:
    header = ["identities", "of", "layer", "neighbours", "entropy, of uniform", "KL, nats", "itself", "true", "if uniform"]
    header += ["false", "if uniform", "negative"]
    rows = []
    for entry in result["parts"]:
        for number, layer in enumerate(entry["attention"], 1):
            for of in (QUERIES, GALLERY):
                found = layer[of]
                row = [entry["name"], of, str(number), f"{found['kept']:.1f}", _share(found["entropy"])]
                row += [f"{found['divergence']:.3f}"]
                row += [
                    _share(found[key]) for key in ("itself", "true", "uniform_true", "false", "uniform_false", "negative")
                ]
                rows.append(row)
    return _rows(header, rows, 2)


def _reach_table(result: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for entry in result["parts"] for name in entry["reach"]))
    header = ["features", *(f"{entry['name']}: {score}" for entry in result["parts"] for score in ("mAP", "R1"))]
    rows = []
    for name in names:
        row = [name]
        for entry in result["parts"]:
            found = entry["reach"].get(name)
            row += ["-", "-"] if found is None else [_share(found["mAP"]), _share(found["R1"])]
        rows.append(row)
    return _rows(header, rows, 1)


def plot_diagnosis(result: dict[str, Any], path: Path) -> None:
    """Draw a diagnosis: who the neighbours are, where the attention's weight falls, and what could be reached."""
    from matplotlib.figure import Figure

    entries = result["parts"]
    figure = Figure(figsize=(4.4 * 3, 1.6 + 1.1 * max(3, len(entries))), layout="constrained")
    near, weight, scores = figure.subplots(1, 3)
    bars = [
        (f"{entry['name']}\n{of}, {kind}", found, kind)
        for entry in entries
        for of in (QUERIES, GALLERY)
        for kind in ("nearest", "reciprocal")
        for found in [next(one for one in entry["neighbours"] if one["of"] == of)]
    ]
    for place, (_, found, kind) in enumerate(bars):
        left = 0.0
        for key, (colour, label) in _COLOURS.items():
            value = 100 * found[f"{kind}_{key}"]
            near.barh(place, value, left=left, color=colour, label=label if not place else None)
            left += value
    near.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7)
    near.invert_yaxis()
    near.set_title(f"the {result['k'][0]} nearest, %", fontsize=9)
    near.legend(fontsize=6, **_BELOW)
    layers = [
        (f"{entry['name']}, {of}, layer {number}", layer[of])
        for entry in entries
        for of in (QUERIES, GALLERY)
        for number, layer in enumerate(entry["attention"], 1)
    ]
    for place, (_, found) in enumerate(layers):
        left = 0.0
        for key, colour in (("itself", "tab:blue"), ("true", "tab:green"), ("false", "tab:red")):
            weight.barh(place, 100 * found[key], left=left, color=colour, label=key if not place else None)
            left += 100 * found[key]
        weight.plot(100 * (found["uniform_itself"] + found["uniform_true"]), place, "k|", markersize=9)
    weight.set_title("attention's weight, % (mark: true | false if uniform)", fontsize=9)
    if layers:
        weight.set_yticks(range(len(layers)), [name for name, _ in layers], fontsize=7)
        weight.invert_yaxis()
        weight.legend(fontsize=6, **_BELOW)
    else:
        weight.set_axis_off()
        weight.text(0.5, 0.5, "no encoder", ha="center", fontsize=9)
    names = list(dict.fromkeys(name for entry in entries for name in entry["reach"]))
    height = 0.8 / len(entries)
    for number, entry in enumerate(entries):
        values = [100 * entry["reach"].get(name, {"mAP": float("nan")})["mAP"] for name in names]
        scores.barh([place + number * height for place in range(len(names))], values, height=height, label=entry["name"])
    scores.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names, fontsize=7)
    scores.invert_yaxis()
    scores.set_title("mAP, %", fontsize=9)
    scores.legend(fontsize=6, **_BELOW)
    for axis in (near, weight, scores):
        axis.tick_params(axis="x", labelsize=7)
    ckpt.write_figure(path, figure)


def write_diagnosis(source: str, parts: Sequence[Part], folder: Path, *, ks: Sequence[int]) -> dict[str, Any]:
    """Measure parts, print the tables, and write ``diagnosis.md``, ``.json`` and ``.png``.

    Args:
        source: What was diagnosed, for the JSON.
        parts: From :func:`parts_of_run` or :func:`parts_of_features`.
        folder: Where the files go.
        ks: Neighbours, see :func:`~relreid_plugin.magformer.diagnosis.diagnose`.

    Returns:
        What ``diagnosis.json`` holds.

    Raises:
        WriteError: The folder cannot be written to.
    """
    result = {"source": source, **diagnose(parts, ks=ks)}
    text = diagnosis_markdown(result)
    plot_diagnosis(result, folder / "diagnosis.png")
    ckpt.write_text(folder / "diagnosis.md", text + "\n")
    ckpt.write_json(folder / "diagnosis.json", result)
    print(f"{text}\n\n{folder / 'diagnosis.md'}, .json and .png")
    return result


__all__ = ["diagnosis_markdown", "parts_of_features", "parts_of_run", "plot_diagnosis", "write_diagnosis"]
