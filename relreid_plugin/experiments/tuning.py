"""A search over configuration keys: trials of cross-validation over training identities, kept by Optuna, resumable.

A trial is one configuration. Its score is the mean over the folds of what held-out training identities say of the weights
that a run would test: those of the epoch with their best mAP. Nothing of a test set is looked at.

The study is a journal in the output folder. A trial that a killed command left is made anew, with the checkpoints that its
folds had written. Every trial is drawn by a seed of its own, from those that had ended before: a search that was killed goes
on to the trials that it would have had.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config.defaults import _flat, load_config, merge_from_list, validate
from ..config.idle import idle_settings
from ..engine.resume import changed_keys, epochs_key, read_behind_first_stage, resume_keys
from ..engine.runner import Run
from ..errors import UserError, is_installed, needed, shown
from ..files import WriteError, make_folder, write_at
from ..locks import folder_lock
from ..methods import methods
from ..options import read_launch
from .space import Choices, Interval, Space
from .trials import Failed, Fold, Pruned, Trial, as_fold, best_trial, read_trial, run_fold, tested_epoch

STUDY = "study.journal"
NAME = "relreid"
"""Name of the study in it."""
METRICS = ("mAP", "R1")
SAMPLERS = ("tpe", "random", "grid")
FRACTION = 0.2
"""Held-out share of the training identities with a single fold, where the configuration holds nobody out."""
VALIDATIONS = 10
"""Validations of a stage that its configuration never validates."""
STARTUP = 5
"""Completed trials before the first one is pruned."""


@dataclass(frozen=True)
class Plan:
    """What a search does.

    Attributes:
        config_file: Configuration that the trials are made from.
        overrides: ``KEY VALUE …`` over it.
        space: What is searched.
        out: Folder of the study, the trials and the results.
        trials: How many trials there are in the end; ``None``: a grid whole, else 20.
        folds: Shares of the training identities that are held out one after the other; 1: one of ``train.val_fraction``.
        metric: ``mAP`` or ``R1`` of the held-out identities.
        sampler: ``tpe``, ``random`` or ``grid``; ``None``: a grid where all values are listed and ``trials`` is ``None``,
            else ``tpe``.
        prune: Whether trials below the median are ended early.
        seed: Of the sampler.
    """

    config_file: str
    overrides: Sequence[str]
    space: Space
    out: Path
    trials: int | None = None
    folds: int = 1
    metric: str = "mAP"
    sampler: str | None = None
    prune: bool = True
    seed: int = 1

    @property
    def drawn_by(self) -> str:
        """The sampler."""
        return self.sampler or ("grid" if self.space.finite and self.trials is None else "tpe")

    @property
    def count(self) -> int:
        """The number of trials."""
        if self.drawn_by == "grid":
            return len(self.space.grid())
        return self.trials or 20

    def config(self, values: dict[str, Any], fold: int, place: Path) -> Any:
        """Return the configuration of one fold of a trial.

        Raises:
            UserError: The values do not go together.
        """
        chosen = [word for key, value in values.items() for word in (key, value)]
        cfg = load_config(self.config_file, [*self.overrides, *chosen])
        own: list[Any] = ["train.val_fraction", 1 / self.folds if self.folds > 1 else cfg.train.val_fraction or FRACTION]
        own += ["train.val_fold", fold, "data.save_dir", str(place), *_validations(cfg)]
        merge_from_list(cfg, own)
        validate(cfg)
        return cfg


def _validations(cfg: Any) -> list[Any]:
    """Overrides that validate every stage, those of a configuration that does so left as they are."""
    flat, found = _flat(cfg), []
    keys = {"test.eval_freq": "train.max_epoch"}
    for method in methods():
        if method.stage_count(cfg):
            for epochs in method.resume.epochs.values():
                own = f"{epochs.rpartition('.')[0]}.eval_freq"
                keys.update({own: epochs} if own in flat else {})
    for own, epochs in keys.items():
        if flat[own] <= 0:
            found += [own, max(1, flat[epochs] // VALIDATIONS)]
    return found


def _optuna() -> Any:
    if not is_installed("optuna"):
        raise UserError("a search needs the package 'optuna', which the extra 'tune' brings; run 'pip install optuna'.")
    return needed("optuna", "a search")


class _Held:
    """The lock of a journal whose folder this process holds."""

    def acquire(self) -> bool:
        """It is."""
        return True

    def release(self) -> None:
        """Stays with the folder."""


def _journal(optuna: Any, path: Path) -> Any:
    """Optuna's storage in a file; half a line, which a full disk may leave at its end, is cut off."""
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            write_at(path, len(whole[0]) + len(whole[1]), b"", cut=True)
    journal = optuna.storages.journal
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=_Held()))


class Search:
    """A search in its folder, which this process holds.

    Args:
        plan: What it does.

    Raises:
        UserError: The folder holds another search, or a study of another version of Optuna.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.optuna = _optuna()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        base = plan.config({}, 0, plan.out)
        self.shares = read_behind_first_stage(plan.space.keys) and 1 in base.train.stages and max(base.train.stages) > 1
        kind = Run(base.clone()).planned[max(base.train.stages) - 1].kind
        self.epochs = plan.space.largest(epochs_key(kind), int(_flat(base)[epochs_key(kind)]))
        self.study = self._open(base)

    # --- the study ----------------------------------------------------------------------------------------------------
    def _open(self, base: Any) -> Any:
        optuna, plan = self.optuna, self.plan
        wanted = {
            "searched": plan.space.described(),
            "folds": plan.folds,
            "metric": plan.metric,
            "sampler": plan.drawn_by,
            "pruned": plan.prune,
            "seed": plan.seed,
        }
        path = plan.out / STUDY
        pruner: Any = optuna.pruners.NopPruner()
        if plan.prune:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=math.ceil(self.epochs / 3))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                study = optuna.create_study(
                    storage=_journal(optuna, path),
                    study_name=NAME,
                    direction="maximize",
                    pruner=pruner,
                    load_if_exists=True,
                )
        except Exception as error:
            raise UserError(
                f"'{path}' cannot be opened as a study of Optuna {optuna.__version__} "
                f"({' '.join(str(error).split())[:160]}); name another folder by --out, or put back a copy."
            ) from error
        found = study.user_attrs.get("search")
        if found is None:
            study.set_user_attr("config", base.dump())
            study.set_user_attr("search", wanted)
            return study
        other = [f"{name} was {shown(found.get(name))} and is {shown(value)}" for name, value in wanted.items()
                 if found.get(name) != value]  # fmt: skip
        machine = (*resume_keys().machine, "data.save_dir")
        changed = changed_keys(study.user_attrs.get("config", ""), base)
        other += [f"'{key}' was {old} and is {new}" for key, (old, new) in changed.items() if key not in machine]
        if other:
            raise UserError(
                f"'{plan.out}' holds another search: {', '.join(other[:3])}; choose another folder by --out, or put the old "
                "values back to go on."
            )
        return study

    def ended(self) -> list[Trial]:
        """Return the trials that have ended, in their order."""
        kept = [each for each in self.study.get_trials(deepcopy=False) if each.state.is_finished()]
        found = [read_trial(each.user_attrs["trial"]) for each in kept if "trial" in each.user_attrs]
        return sorted(found, key=lambda trial: trial.number)

    def _take_up(self) -> None:
        """Trials that a killed command left: one that had come to its end is done, others count for nothing."""
        states = self.optuna.trial.TrialState
        for each in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if "trial" in each.user_attrs:
                self._tell(each.number, read_trial(each.user_attrs["trial"]))
            else:
                self.study.tell(each.number, state=states.FAIL)

    # --- drawing ------------------------------------------------------------------------------------------------------
    def _distribution(self, values: Choices | Interval, whole: bool) -> Any:
        kinds = self.optuna.distributions
        if isinstance(values, Choices):
            return kinds.CategoricalDistribution([_written(value) for value in values.values])
        if whole:
            step = 1 if values.step is None else int(values.step)
            return kinds.IntDistribution(int(values.low), int(values.high), log=values.log, step=step)
        return kinds.FloatDistribution(float(values.low), float(values.high), log=values.log, step=values.step)

    def _ask(self, number: int, whole: dict[str, bool]) -> tuple[Any, dict[str, Any]]:
        """Begin the trial of a number: Optuna's trial, and key to value."""
        samplers, plan = self.optuna.samplers, self.plan
        seed = plan.seed * 1_000_003 % 2**31 + number
        kinds = {key: self._distribution(values, whole[key]) for key, values in plan.space.keys.items()}
        waiting = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.WAITING,))
        if plan.drawn_by == "grid" and not waiting:  # else a killed command left the very trial that is due
            chosen = plan.space.grid()[number - 1]
            self.study.enqueue_trial({key: _written(value) for key, value in chosen.items()})
        tpe = plan.drawn_by == "tpe"
        self.study.sampler = samplers.TPESampler(seed=seed) if tpe else samplers.RandomSampler(seed=seed)
        trial = self.study.ask(fixed_distributions=kinds)
        values = {}
        for key, own in plan.space.keys.items():
            drawn = trial.params[key]
            values[key] = drawn
            if isinstance(own, Choices):
                values[key] = next(value for value in own.values if _written(value) == drawn)
        return trial, values

    # --- the search ---------------------------------------------------------------------------------------------------
    def go(self, write: Write) -> list[Trial]:
        """Make the trials that are left.

        Args:
            write: Called when a trial has ended.

        Returns:
            All trials.

        Raises:
            UserError: A trial cannot run for a reason that its values have no part in.
        """
        self._take_up()
        whole = {key: isinstance(value, int) for key, value in _flat(self.plan.config({}, 0, self.plan.out)).items()}
        for trial in (done := self.ended()):
            self._clear(trial.number)
        if done:
            print(f"{len(done)} of {self.plan.count} trials are done already", flush=True)
        for number in range(len(done) + 1, self.plan.count + 1):
            asked, values = self._ask(number, whole)
            trial = self._made(asked, Trial(number, values, "failed"))
            self._keep(asked, trial)
            self._clear(number)
            write(self, picture=False)
            print(self._sentence(trial), flush=True)
        return self.ended()

    def _made(self, asked: Any, trial: Trial) -> Trial:
        """Run a trial, or take the scores of one with the same values."""
        started, ended = time.perf_counter(), self.ended()
        for other in ended:
            if other.values == trial.values and other.state != "failed":
                trial.state, trial.score, trial.folds = other.state, other.score, other.folds
                trial.same_as = other.same_as or other.number
                return trial
        try:
            self._folds(asked, trial)
            trial.state = "complete"
            trial.score = float(np.mean([getattr(fold, self.plan.metric) for fold in trial.folds]))
        except Pruned as reached:
            trial.state, trial.score = "pruned", float(reached.args[0])
        except Failed as problem:
            trial.problem = str(problem)
        except UserError as error:
            if isinstance(error, WriteError) or not any(other.state != "failed" for other in ended):
                raise
            trial.problem = str(error)
        trial.seconds = time.perf_counter() - started
        return trial

    def _folds(self, asked: Any, trial: Trial) -> None:
        plan = self.plan
        for fold in range(plan.folds):
            try:
                cfg = plan.config(trial.values, fold, self.place(trial.number) / f"fold{fold}")
            except UserError as error:
                raise Failed(str(error)) from error
            best: list[dict[str, Any]] = []

            def report(record: dict[str, Any], fold: int = fold, best: list[dict[str, Any]] = best) -> None:
                if "val_mAP" not in record:
                    return
                best[:] = [tested_epoch([*best, record]) or record]
                reached = [*trial.folds, as_fold(best[0])]
                value = float(np.mean([getattr(each, plan.metric) for each in reached]))
                asked.report(value, fold * self.epochs + int(record["epoch"]))
                if asked.should_prune():
                    raise Pruned(value)

            shared = plan.out / "stage1" / f"fold{fold}" if self.shares else None
            trial.folds.append(run_fold(cfg, report, shared=shared))

    def _keep(self, asked: Any, trial: Trial) -> None:
        """Write a trial's end into the study; with its state, which comes last, it is done."""
        if trial.state == "pruned" and trial.same_as:
            asked.report(trial.score, self.plan.folds * self.epochs)
        asked.set_user_attr("trial", asdict(trial))
        self._tell(asked, trial)

    def _tell(self, asked: Any, trial: Trial) -> None:
        states = self.optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[trial.state]
        self.study.tell(asked, trial.score if trial.state == "complete" else None, state=state)

    def place(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.plan.out / f"trial{number:03d}"

    def _clear(self, number: int) -> None:
        """Take the weights of a trial that has ended away; configurations and logs stay."""
        for fold in self.place(number).glob("fold*"):
            for part in ("bank", *(path.name for path in fold.glob("stage*"))):
                shutil.rmtree(fold / part, ignore_errors=True)

    def _sentence(self, trial: Trial) -> str:
        plan = self.plan
        said = f"trial {trial.number} of {plan.count}: " + ", ".join(f"{key} {_said(v)}" for key, v in trial.values.items())
        if trial.state == "failed":
            return f"{said}: failed: {trial.problem}"
        best = best_trial(self.ended())
        again = f", as trial {trial.same_as}" if trial.same_as else ""
        leads = "" if best is None else f" (best: {best.score:.1%}, trial {best.number})"
        return f"{said}: {plan.metric} {trial.score:.1%}{', pruned' if trial.state == 'pruned' else ''}{again}{leads}"


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _written(value: Any) -> Any:
    """A value as Optuna keeps it: lists as text."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def check_plan(plan: Plan) -> None:
    """Refuse what makes no search, before anything is written.

    Raises:
        UserError: One sentence.
    """
    _optuna()
    if read_launch().world > 1:
        raise UserError("relreid tune trains in one process; start it without torchrun ('unset RANK WORLD_SIZE').")
    if plan.drawn_by == "grid" and not plan.space.finite:
        endless = next(key for key, values in plan.space.keys.items() if isinstance(values, Interval))
        raise UserError(f"command line: --sampler grid needs listed values, but '{endless}' has a range; list them, a,b,c.")
    if plan.drawn_by == "grid" and plan.trials is not None:
        raise UserError(f"command line: a grid has as many trials as combinations, here {plan.count}; leave out --trials.")
    for key in plan.overrides[::2]:
        option = "--search" if key in plan.space.keys else {"data.save_dir": "--out", "train.val_fold": "--folds"}.get(key)
        if key == "train.val_fraction" and plan.folds > 1:
            option = "--folds"
        if option:
            raise UserError(f"command line: '{key}' is set by {option}; leave it out of --opts.")
    first = {key: values.values[0] if isinstance(values, Choices) else values.low for key, values in plan.space.keys.items()}
    try:
        cfg = plan.config(first, 0, plan.out)
    except UserError:
        return  # these values may not go together, others may
    for sentence in idle_settings(cfg):
        if any(f"'{key} " in sentence for key in plan.space.keys):
            print(f"note: {sentence}")


class Write(Protocol):
    """Writes what is known so far."""

    def __call__(self, search: Search, *, picture: bool) -> None:
        """Write it; the picture at the end alone."""


def search(plan: Plan, write: Write) -> Search:
    """Make the trials of a search that are not done.

    Args:
        plan: What it does.
        write: Called when a trial has ended, and at the end.

    Raises:
        UserError: See :func:`check_plan` and :meth:`Search.go`; or no trial is complete in the end.
    """
    check_plan(plan)
    make_folder(plan.out)
    with folder_lock(plan.out):
        found = Search(plan)
        trials = found.go(write)
        write(found, picture=True)
        if best_trial(trials) is None:
            problem = next((trial.problem for trial in reversed(trials) if trial.problem), "all were pruned")
            raise UserError(f"no trial of '{plan.out}' is complete; the last one that failed: {problem}")
    return found


__all__ = ["METRICS", "SAMPLERS", "Fold", "Plan", "Search", "Trial", "best_trial", "check_plan", "search"]
