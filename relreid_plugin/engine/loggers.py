"""Where a training's values go: ``train.loggers`` by name, behind one small interface.

A logger takes ``add_scalar(name, value, step)`` and ``close``. TensorBoard's events are written at once, and those of steps
that a resumed run makes again are hidden (:mod:`relreid_plugin.engine.events`). All others get what was collected since the
last checkpoint right after the next one was written (:meth:`Loggers.flush`): a run that goes on begins behind a checkpoint,
so no step is written twice.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import UserError, needed
from ..files import csv_text, write_json, write_text, writing
from ..reading import read_json, read_text
from .events import EventWriter

IDS = "loggers.json"
"""File in a stage's folder with the identifiers of its runs in MLflow and W&B."""
PROJECT = "relreid"
"""Experiment in MLflow, project in W&B."""


class Value(NamedTuple):
    """One value.

    Attributes:
        name: Such as ``Train/loss``.
        step: Batch counted from 0 over all epochs for names that begin with ``Train/``, else the epoch counted from 1.
        value: The number.
    """

    name: str
    step: int
    value: float


class Sink(Protocol):
    """What is written at checkpoints."""

    def write(self, values: Sequence[Value]) -> None:
        """Add values."""

    def close(self) -> None:
        """End."""


class CsvSink:
    """``metrics.csv`` in the stage's folder: columns name, step, value.

    Args:
        folder: The stage's folder.
        behind: Whether a value was made before the run goes on; others are taken out.
    """

    def __init__(self, folder: Path, behind: Callable[[Value], bool]) -> None:
        self.path = folder / "metrics.csv"
        kept = [value for value in read_csv(self.path) if behind(value)] if self.path.is_file() else []
        write_text(self.path, "name,step,value\n" + _lines(kept))

    def write(self, values: Sequence[Value]) -> None:
        """Append rows."""
        with writing(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(_lines(values))

    def close(self) -> None:
        """Nothing is open."""


def _lines(values: Sequence[Value]) -> str:
    return csv_text((value.name, value.step, repr(value.value)) for value in values)


def read_csv(path: Path) -> list[Value]:
    """Return the values of a ``metrics.csv``; a last line that a killed run left unfinished is left out."""
    text = read_text(path)
    rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))[1:]
    return [Value(name, int(step), float(value)) for name, step, value in rows]


class MlflowSink:
    """A run in MLflow's local database ``mlflow.db`` beside the stage's folder.

    Args:
        folder: The stage's folder.
        fresh: The stage starts, and with it a new run; else the one that it began goes on.
    """

    def __init__(self, folder: Path, fresh: bool) -> None:
        client = needed("mlflow.tracking", "'train.loggers' mlflow").MlflowClient
        self._metric = needed("mlflow.entities", "'train.loggers' mlflow").Metric
        home = folder.parent.absolute()
        self.client = client(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")

        def begin() -> str:
            found = self.client.get_experiment_by_name(PROJECT)
            experiment = found and found.experiment_id
            if found is None:
                place = (home / "mlartifacts").as_uri()
                experiment = self.client.create_experiment(PROJECT, artifact_location=place)
            name = {"mlflow.runName": f"{folder.parent.name}/{folder.name}"}
            return str(self.client.create_run(experiment, tags=name).info.run_id)

        self.run = _identifier(folder, "mlflow", fresh, begin)

    def write(self, values: Sequence[Value]) -> None:
        """Log in batches, as large as MLflow takes them; what is not finite has no place there."""
        now = int(time.time() * 1000)
        metrics = [self._metric(_plain(name), value, now, step) for name, step, value in values if math.isfinite(value)]
        for low in range(0, len(metrics), 1000):
            self.client.log_batch(self.run, metrics=metrics[low : low + 1000])

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run)


class WandbSink:
    """An offline run of W&B in the folder ``wandb`` beside the stage's; ``wandb sync`` sends it.

    Args:
        folder: The stage's folder.
        fresh: The stage starts, and with it a new run; else the one that it began goes on.
    """

    def __init__(self, folder: Path, fresh: bool) -> None:
        wandb = needed("wandb", "'train.loggers' wandb")
        identifier = _identifier(folder, "wandb", fresh, lambda: uuid.uuid4().hex[:12])
        self.run = wandb.init(
            project=PROJECT,
            name=f"{folder.parent.name}/{folder.name}",
            id=identifier,
            resume="allow",
            mode="offline",
            dir=str(folder.parent),
            settings=wandb.Settings(silent=True),
        )
        self.run.define_metric("Train/*", step_metric="batch")
        self.run.define_metric("*", step_metric="epoch")

    def write(self, values: Sequence[Value]) -> None:
        """Log all values of a step at once, on an axis of batches or of epochs."""
        steps: dict[tuple[str, int], dict[str, float]] = {}
        for name, step, value in values:
            axis = "batch" if name.startswith("Train/") else "epoch"
            steps.setdefault((axis, step), {axis: step})[name] = value
        for logged in steps.values():
            self.run.log(logged)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


def _plain(name: str) -> str:
    """A name in the characters that MLflow takes."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)


def _identifier(folder: Path, logger: str, fresh: bool, begin: Callable[[], str]) -> str:
    """Return the identifier of a stage's run in a logger, kept in its folder."""
    path = folder / IDS
    known: dict[str, str] = {}
    with contextlib.suppress(UserError):
        known = read_json(path, what="identifiers of loggers", remedy="remove it")
    if fresh or logger not in known:
        known[logger] = begin()
        write_json(path, known)
    return known[logger]


class Loggers:
    """All loggers of a stage as one.

    Args:
        names: Of ``train.loggers``.
        folder: The stage's folder.
        first_epoch: Epochs that are done.
        batches: Batches of an epoch.

    Raises:
        UserError: A logger's package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, *, first_epoch: int, batches: int) -> None:
        first_step, fresh = first_epoch * batches, first_epoch == 0
        self._sinks: list[Sink] = []
        self._events: EventWriter | None = None
        self._pending: list[Value] = []
        if "tensorboard" in names:
            self._events = EventWriter(folder / "tensorboard", purge_step=first_step)
        if "csv" in names:

            def behind(value: Value) -> bool:
                return value.step < first_step if value.name.startswith("Train/") else value.step <= first_epoch

            self._sinks.append(CsvSink(folder, behind))
        if "mlflow" in names:
            self._sinks.append(MlflowSink(folder, fresh))
        if "wandb" in names:
            self._sinks.append(WandbSink(folder, fresh))

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        """Take a value."""
        if self._events is not None:
            self._events.add_scalar(name, value, step)
        if self._sinks:
            self._pending.append(Value(name, int(step), float(value)))

    def flush(self) -> None:
        """Hand on what was collected; a checkpoint was written that a run goes on behind."""
        for sink in self._sinks if self._pending else ():
            sink.write(self._pending)
        self._pending.clear()

    def close(self) -> None:
        """End all of them.

        Raises:
            WriteError: One cannot write what is left.
        """
        self.flush()
        for sink in self._sinks:
            sink.close()
        if self._events is not None:
            self._events.close()

    def abandon(self) -> None:
        """End after an error; what was made since the last checkpoint is made again by a run that goes on."""
        self._pending.clear()
        for sink in self._sinks:
            with contextlib.suppress(Exception):
                sink.close()
        if self._events is not None:
            self._events.abandon()


__all__ = ["IDS", "CsvSink", "Loggers", "MlflowSink", "Value", "WandbSink", "read_csv"]
