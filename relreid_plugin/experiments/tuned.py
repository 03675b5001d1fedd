"""What a search leaves: a table of its trials, the best keys as a configuration, and a picture."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config.defaults import _flat, get_default_config, load_config
from ..engine.table import markdown, mean_and_spread
from ..files import csv_text, write_figure, write_json, write_text
from .space import Choices, Interval
from .trials import Trial, best_trial
from .tuning import METRICS, Plan, Search

ENOUGH = 4
"""Complete trials below which nothing is said of the importance of keys."""


def _spread(trial: Trial, metric: str) -> tuple[float, float | None]:
    """Mean over the folds, and sample standard deviation where there are several; percent."""
    scores = 100 * np.asarray([getattr(fold, metric) for fold in trial.folds])
    return float(scores.mean()), float(scores.std(ddof=1)) if len(scores) > 1 else None


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trials_table(plan: Plan, trials: Sequence[Trial]) -> str:
    """Return the trials as Markdown, the best first: percent of held-out identities, mean ± deviation over the folds."""
    keys = list(plan.space.keys)
    ranks = {"complete": 0, "pruned": 1, "failed": 2}
    rows = []
    for trial in sorted(trials, key=lambda each: (ranks[each.state], -(each.score or 0.0), each.number)):
        whole = trial.state == "complete"
        scores = [mean_and_spread(*_spread(trial, metric)) if whole else "-" for metric in METRICS]
        epochs = ", ".join(str(fold.epoch) for fold in trial.folds) if whole else "-"
        state = trial.state + (f", as {trial.same_as}" if trial.same_as else "")
        cells = [_said(trial.values[key]) for key in keys]
        rows.append([str(trial.number), *cells, *scores, epochs, state, f"{trial.seconds:.0f} s"])
    share = f"{plan.folds} folds of the training identities" if plan.folds > 1 else "held-out training identities"
    header = ["trial", *keys, *METRICS, "epoch" if plan.folds == 1 else "epochs", "state", "time"]
    return markdown(
        header, rows, title=f"**{Path(plan.config_file).name}**, {share}", align="l" + "r" * (len(header) - 3) + "lr"
    )


def trials_csv(plan: Plan, trials: Sequence[Trial]) -> str:
    """Return the trials in their order, with the scores of every fold as fractions of 1."""
    keys, folds = list(plan.space.keys), range(plan.folds)
    columns = [f"{metric} {fold}" for fold in folds for metric in METRICS]
    rows: list[list[Any]] = [["trial", "state", *keys, plan.metric, *columns, "seconds", "same as", "problem"]]
    for trial in trials:
        scores = [getattr(fold, metric) for fold in trial.folds for metric in METRICS]
        scores += [""] * (len(columns) - len(scores))
        rows.append(
            [trial.number, trial.state, *trial.values.values(), "" if trial.score is None else trial.score, *scores]
            + [round(trial.seconds, 1), trial.same_as or "", trial.problem]
        )
    return csv_text(rows)


def importances(search: Search) -> dict[str, float]:
    """Return each key's share in what the best trials have in common (PED-ANOVA); empty where there is too little to say."""
    complete = [trial for trial in search.ended() if trial.state == "complete"]
    if len(complete) < ENOUGH or len({trial.score for trial in complete}) < 2:
        return {}
    module = search.optuna.importance
    with warnings.catch_warnings(), contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError):
        warnings.simplefilter("ignore")  # of methods that may change
        found = module.get_param_importances(search.study, evaluator=module.PedAnovaImportanceEvaluator())
        if all(np.isfinite(value) for value in found.values()):
            return {key: float(value) for key, value in found.items()}
    return {}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return out


def best_config(plan: Plan, best: Trial, count: int) -> str:
    """Return the configuration of the best trial as YAML: every key that is not at its default."""
    chosen = [word for key, value in best.values.items() for word in (key, value)]
    cfg = load_config(plan.config_file, [*plan.overrides, *chosen, "data.save_dir", str(plan.out / "best")])
    default = _flat(get_default_config())
    changed = {key: value for key, value in _flat(cfg).items() if value != default[key] or key in best.values}
    mean, deviation = _spread(best, plan.metric)
    says = ", ".join(f"{key} {_said(value)}" for key, value in best.values.items())
    head = (
        f"# {Path(plan.config_file).name} with {says}: the best of {count} trials, {plan.metric} "
        f"{mean_and_spread(mean, deviation)} % of held-out training identities.\n"
    )
    return head + yaml.safe_dump(_nested(changed), sort_keys=False, default_flow_style=None, width=120)


def write_results(search: Search, *, picture: bool = True) -> None:
    """Write ``tune.md``, ``tune.csv``, ``tune.json``, ``best.yml`` and ``tune.png`` into the search's folder.

    Args:
        search: The search.
        picture: Whether the picture is drawn, too.
    """
    plan, trials = search.plan, search.ended()
    best, shares = best_trial(trials), importances(search)
    write_text(plan.out / "tune.md", trials_table(plan, trials) + "\n")
    write_text(plan.out / "tune.csv", trials_csv(plan, trials))
    record = {
        "config_file": str(plan.config_file),
        "searched": plan.space.described(),
        "metric": plan.metric,
        "folds": plan.folds,
        "sampler": plan.drawn_by,
        "seed": plan.seed,
        "best": None if best is None else best.number,
        "importance": shares,
        "trials": [vars(trial) | {"folds": [vars(fold) for fold in trial.folds]} for trial in trials],
    }
    write_json(plan.out / "tune.json", record)
    if best is not None:
        write_text(plan.out / "best.yml", best_config(plan, best, len(trials)))
        if picture:
            draw(plan, trials, shares, plan.out / "tune.png")


def draw(plan: Plan, trials: Sequence[Trial], shares: dict[str, float], path: Path) -> None:
    """Draw the scores in the order of the trials with the best so far, the keys' importance, and the scores over every key.

    Args:
        plan: The search.
        trials: Its trials, one complete at least.
        shares: From :func:`importances`.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    keys = list(plan.space.keys)
    panels = 1 + bool(shares) + len(keys)
    lines = -(-panels // 2)
    figure = Figure(figsize=(8.4, 3.0 * lines), layout="constrained")
    axes = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    left = axes.pop(0)
    _history(left, plan, trials)
    if shares:
        right = axes.pop(0)
        order = sorted(shares, key=lambda key: shares[key])
        right.barh(order, [100 * shares[key] for key in order], color="tab:gray")
        right.set_xlabel("importance, %")
    for key, axis in zip(keys, axes):
        _slice(axis, key, plan, trials)
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    write_figure(path, figure)


def _points(trials: Sequence[Trial], state: str) -> list[Trial]:
    return [trial for trial in trials if trial.state == state and trial.score is not None]


def _history(axis: Any, plan: Plan, trials: Sequence[Trial]) -> None:
    complete = _points(trials, "complete")
    scores = [100 * (trial.score or 0.0) for trial in complete]
    numbers = [trial.number for trial in complete]
    axis.plot(numbers, np.maximum.accumulate(scores), drawstyle="steps-post", color="tab:orange", label="best so far")
    axis.plot(numbers, scores, "o", markersize=4, color="tab:blue", label="complete")
    pruned = _points(trials, "pruned")
    if pruned:
        reached = [100 * (trial.score or 0.0) for trial in pruned]
        axis.plot([trial.number for trial in pruned], reached, "x", markersize=4, color="tab:gray", label="pruned")
    axis.set_xlabel("trial")
    axis.set_ylabel(f"{plan.metric}, %, held-out identities")
    axis.legend(fontsize=8)


def _slice(axis: Any, key: str, plan: Plan, trials: Sequence[Trial]) -> None:
    values = plan.space.keys[key]
    numeric = isinstance(values, Interval) or all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values.values
    )
    names = [] if numeric or not isinstance(values, Choices) else [str(value) for value in values.values]
    for state, marker, colour in (("pruned", "x", "tab:gray"), ("complete", "o", "tab:blue")):
        own = _points(trials, state)
        x = [trial.values[key] if numeric else names.index(str(trial.values[key])) for trial in own]
        axis.plot(x, [100 * (trial.score or 0.0) for trial in own], marker, markersize=4, color=colour)
    if names:
        axis.set_xticks(range(len(names)), names)
    if isinstance(values, Interval) and values.log:
        axis.set_xscale("log")
    axis.set_xlabel(key)
    axis.set_ylabel(f"{plan.metric}, %")
