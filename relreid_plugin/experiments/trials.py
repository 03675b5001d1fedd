"""One trial of a search: its folds, and what held-out identities say of them."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.folder import share_stages
from ..engine.resume import epochs_key
from ..engine.runner import Run
from ..errors import UserError, explain
from ..files import WriteError, write_error


@dataclass
class Fold:
    """What one fold of a trial came to: scores as fractions of 1, and the epoch that they belong to."""

    mAP: float
    R1: float
    epoch: int


@dataclass
class Trial:
    """One trial that has ended.

    Attributes:
        number: Its place among them, from 1 on.
        values: Key to value.
        state: ``complete``, ``pruned`` or ``failed``.
        score: The mean of the metric over the folds, of a complete one; of a pruned one what it had reached.
        folds: Of a complete one, and of a pruned one those that it had done.
        seconds: Time that it took.
        same_as: Number of the trial with the same values, whose scores it has; 0: none.
        problem: Why it failed.
    """

    number: int
    values: dict[str, Any]
    state: str
    score: float | None = None
    folds: list[Fold] = field(default_factory=list)
    seconds: float = 0.0
    same_as: int = 0
    problem: str = ""


def read_trial(kept: dict[str, Any]) -> Trial:
    """Return a trial from what ``dataclasses.asdict`` made of it."""
    return Trial(**{**kept, "folds": [Fold(**fold) for fold in kept["folds"]]})


class Pruned(Exception):
    """The trial is below the median."""


class Failed(Exception):
    """The trial's own values are at fault."""


def tested_epoch(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of the epoch that a run tests: the first one of the best validated mAP."""
    validated = [record for record in history if "val_mAP" in record]
    return max(validated, key=lambda record: record["val_mAP"], default=None)


def as_fold(record: dict[str, Any]) -> Fold:
    """Return the scores of a validated epoch's record."""
    return Fold(float(record["val_mAP"]), float(record["val_R1"]), int(record["epoch"]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a run prints goes to its own log alone."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def run_fold(cfg: Any, report: Callable[[dict[str, Any]], None], *, shared: Path | None = None) -> Fold:
    """Train one fold and return what its held-out identities say of it.

    Args:
        cfg: Its configuration.
        report: Told of every validated epoch of the last stage, those of checkpoints that were there included; what it
            raises ends the training.
        shared: A run whose stage 1 is taken, and trained where it is not done; ``None``: the fold trains its own.

    Raises:
        Failed: The trial's values are at fault: the sentence.
        UserError: Something else is.
    """
    place = Path(cfg.data.save_dir)
    run = None
    try:
        with _quiet():
            if shared is not None:
                first = cfg.clone()
                first.data.save_dir = str(shared)
                run = Run(first, stages=[1], resume=True)
                run.learn()
                share_stages(shared, place, [1])
            run = Run(cfg, resume=True)
            stage = run.planned[max(cfg.train.stages) - 1]
            done = stage.newest(run)
            for record in done["history"] if done else []:
                report(record)
            history = run.learn(lambda name, record: report(record) if name == stage.name else None)[stage.name]
            if shared is not None:
                share_stages(place, shared, [])  # features that other trials need, too
    except Pruned:
        raise
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else explain(error)
        own = run is not None and "engine" in vars(run)  # the data is there and the network stands
        if not own or not said or isinstance(error, (WriteError, ImportError)) or write_error(error) is not None:
            raise
        raise Failed(said) from error
    finally:
        if torch.cuda.is_available():  # the network of a fold that has ended hangs in circles
            gc.collect()
            torch.cuda.empty_cache()
    record = tested_epoch(history)
    if record is None:
        raise UserError(
            f"{stage.name} has no score of held-out identities: it trains no epoch ('{epochs_key(stage.kind)}')."
        )
    return as_fold(record)


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the first of the best complete trials; ``None`` where none is complete."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.score is not None]
    return max(complete, key=lambda trial: trial.score or 0.0, default=None)
