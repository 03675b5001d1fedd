"""What every engine of the plug-in adds to the host's: checkpoints that resume exactly, validation, kept features."""

from __future__ import annotations

import datetime
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from tqdm import tqdm

from ..collective import Cut, bare_model, world
from ..data.cameras import UNKNOWN, CameraRows
from ..data.samefile import first_path
from ..data.transforms import reset_transforms
from ..errors import UserError
from ..features.sets import Features, TestFeatures
from ..metrics.ranking import RankingResult
from ..processes import raise_pending
from . import checkpoint as ckpt
from .distributed import GatheredCriterion, Trainer, collect, main, mean_over_rows, share_batches, share_loader
from .events import NoEvents
from .loggers import Loggers
from .observers import Observer
from .resume import restore_schedule
from .updates import Updates

Alter = Callable[[torch.Tensor, list[str]], torch.Tensor]
Watch = Callable[[str, dict[str, Any]], None]


class ProgressLoader:
    """A loader with a progress bar on a terminal, and nothing elsewhere.

    Args:
        loader: The loader.
        label: Name on the bar.
        through: What its batches go through on their way; ``None``: nothing.
    """

    def __init__(
        self,
        loader: Any,
        label: Callable[[], str] | str,
        through: Callable[[Iterable[Any]], Iterator[Any]] | None = None,
    ) -> None:
        self.loader, self.label, self.through = loader, label, through

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        label = self.label if isinstance(self.label, str) else self.label()
        batches = tqdm(self.loader, desc=label, leave=False, disable=None, dynamic_ncols=True)
        yield from batches if self.through is None else self.through(batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


@dataclass
class StageContext:
    """What a stage needs beside its model, data and optimiser.

    Attributes:
        kind: ``image`` or ``relation``.
        folder: The stage's folder for checkpoints and TensorBoard events.
        max_epoch: Epochs of the stage.
        checkpoint_freq: Epochs between checkpoints.
        eval_freq: Epochs between validations; 0 or less: none but the final one.
        start_eval: First epoch to validate after.
        static: Entries that every checkpoint of the stage carries (configuration, label map, normalisation, …).
        validate: Returns the validation result, or ``None`` when no identities are held out.
        monitor: Without held-out identities: returns scores on the test sets to print and record. They choose nothing.
        sample_seeds: Every sample's augmentation has a seed of its own.
        loggers: Where values go (:mod:`relreid_plugin.engine.loggers`).
        watch: Called with the name of the stage's folder and every epoch's record, once its checkpoint is written; what it
            raises ends the training.
    """

    kind: str
    folder: Path
    max_epoch: int
    checkpoint_freq: int = 1
    eval_freq: int = -1
    start_eval: int = 0
    static: dict[str, Any] = field(default_factory=dict)
    validate: Callable[[], RankingResult] | None = None
    monitor: Callable[[], dict[str, float]] | None = None
    sample_seeds: bool = False
    loggers: tuple[str, ...] = ("tensorboard",)
    watch: Watch | None = None

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "last.pth.tar"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation."""
        return self.folder / "best.pth.tar"


class EngineMixin:
    """Mixed in before one of the host's engines.

    Worked around here, from outside: checkpoints only at tests, crash without a scheduler, layers unfrozen at every epoch,
    tests that index past a small gallery, features that are thrown away after a test.
    """

    if TYPE_CHECKING:  # the host's engine, mixed in later, has the rest

        def __getattr__(self, name: str) -> Any: ...

        def run(self, **options: Any) -> None: ...

    context: StageContext
    train_loader: Any
    epoch: int
    extra_states: dict[str, Any]
    training_cameras: CameraRows = UNKNOWN
    """Rows of the model's camera embedding for the training images."""
    camera_rows: CameraRows = UNKNOWN
    """The same for the images that are read now."""
    batch_groups = 1
    """Runs of a batch that are cut alike across processes (:class:`~relreid_plugin.collective.Cut`)."""
    trainer: Trainer | None = None
    """How the model trains in several processes, while it does."""
    whole_summary = False
    """Whether a step's summary is of the whole batch in all its parts."""
    mined = False
    """Whether the loss looks for the hardest pairs of a batch."""

    @property
    def updates(self) -> Updates:
        """How its steps compute and when they update; plain, unless it was given others."""
        return self.__dict__.setdefault("_updates", Updates())

    @updates.setter
    def updates(self, updates: Updates) -> None:
        self._updates = updates

    @property
    def observers(self) -> list[Observer]:
        """What is told of the begin and the end of every epoch and adds to its record."""
        return self.__dict__.setdefault("_observers", [])

    @property
    def reads_cameras(self) -> bool:
        """Whether the model takes the cameras beside the images."""
        return bool(getattr(bare_model(self.model), "uses_cameras", False))

    def batch_cameras(self, data: dict[str, Any], images: torch.Tensor) -> torch.Tensor:
        """(B,) rows of the camera embedding for a batch, on the images' device; -1 for cameras that training never saw."""
        return self.camera_rows(torch.as_tensor(data["camid"])).to(images.device)

    def attach(self, context: StageContext, **extra_states: Any) -> None:
        """Connect the engine to its stage.

        Args:
            context: The stage.
            **extra_states: Further objects with ``state_dict`` that a checkpoint must hold (center loss, its optimiser).
        """
        self.context = context
        self.extra_states = extra_states
        self.history: list[dict[str, Any]] = []
        self.best_score: float | None = None
        self.best_epoch = 0
        self.first_epoch = 0
        self.max_epoch = context.max_epoch
        self.features: dict[str, TestFeatures] = {}
        self.results: dict[str, RankingResult] = {}
        self._idle_parts: set[str] = set()
        self._never_finite = set(self._not_finite())  # such as masks of minus infinity
        self.trainable = {name: value.requires_grad for name, value in self.model.named_parameters()}
        self.train_loader = ProgressLoader(
            self.train_loader,
            lambda: f"epoch {self.epoch + 1}/{self.max_epoch}",
            lambda batches: self.updates.watched(batches),
        )

    # --- training -----------------------------------------------------------------------------------------------------
    def fit(self, **run_options: Any) -> None:
        """Train from the first epoch that is not done yet; the host's loop does the epochs."""
        context = self.context
        if self.first_epoch >= context.max_epoch:
            return
        self._started = time.perf_counter()
        self.updates.start(self, mined=self.mined)
        self._share()
        writer: Any = NoEvents()
        if main():
            writer = Loggers(context.loggers, context.folder, first_epoch=self.first_epoch, batches=len(self.train_loader))
        self.writer = writer
        try:
            self.run(
                save_dir=str(context.folder),
                max_epoch=context.max_epoch,
                start_epoch=self.first_epoch,
                eval_freq=-1,
                **run_options,
            )
        except BaseException:
            writer.abandon()
            raise
        if self.trainer is not None:
            self.trainer.release()

    def share_loader(self, loader: Any) -> tuple[Any, Cut]:
        """Return a training loader over this process's rows of every batch, and how batches are cut."""
        return share_loader(loader, groups=self.batch_groups)

    def _share(self) -> None:
        """Cut the batches across the processes that train, and let the model and the host's losses see the whole ones."""
        if world() == 1 and not self.context.sample_seeds:
            return
        self.train_loader.loader, cut = self.share_loader(self.train_loader.loader)
        if world() > 1:
            self.trainer = Trainer(self.model, cut)
            for name in ("criterion", "criterion_t", "criterion_x"):  # the host's
                if hasattr(self, name):
                    setattr(self, name, GatheredCriterion(getattr(self, name)))

    def train(self, print_freq: int = 10, fixbase_epoch: int = 0, open_layers: Any = None) -> None:
        """One epoch by the host, then validation and checkpoint."""
        reset_transforms(self.datamanager)
        self._sums: dict[str, float] = {}
        self.camera_rows = self.training_cameras
        for observer in self.observers:
            observer.begin(self.epoch)
        self.updates.begin()
        cast(Any, super()).train(print_freq=print_freq, fixbase_epoch=fixbase_epoch, open_layers=open_layers)
        self._end_of_epoch()

    def forward_backward(self, data: Any) -> dict[str, float]:
        """The host's step; the epoch's mean losses are kept for the history.

        Raises:
            UserError: A part of the loss is not finite.
        """
        raise_pending()
        summary = self._step(data)
        for name, value in summary.items():
            if not math.isfinite(float(value)):
                raise self.explosion(name, float(value))
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        return summary

    def _step(self, data: Any) -> dict[str, float]:
        host = cast(Any, super())
        if self.trainer is None:
            with self.updates.step(self):
                return host.forward_backward(data)
        with self.trainer.step(self), self.updates.step(self):
            summary = host.forward_backward(data)
        if not self.whole_summary and "acc" in summary:
            summary["acc"] = mean_over_rows(summary["acc"], self.trainer.cut)
        return summary

    def explosion(self, name: str, value: float) -> UserError:
        """The sentence for a part of the loss that is not finite."""
        batch, batches = getattr(self, "batch_idx", 0) + 1, len(self.train_loader)
        return UserError(
            f"the loss became {value} in epoch {self.epoch + 1}, batch {batch} of {batches} (part '{name}'); lower the "
            f"learning rate (it is {float(self.get_current_lr()):.2g}) or lengthen the warm-up; {self._kept()}."
        )

    def _kept(self) -> str:
        last = self.context.last
        return f"the last checkpoint stays ('{last}')" if last.is_file() else "no checkpoint was written yet"

    def _not_finite(self) -> list[str]:
        values = self.model.state_dict().items()
        return [
            name for name, value in values if value.is_floating_point() and not bool(torch.isfinite(value.detach()).all())
        ]

    def _require_finite_weights(self) -> None:
        """A checkpoint never holds weights that are not finite: a gradient may be without a loss that shows it."""
        broken = [name for name in self._not_finite() if name not in self._never_finite]
        if broken:
            raise UserError(
                f"{len(broken)} of the model's tensors hold NaN or infinity after epoch {self.epoch + 1} (first: "
                f"'{broken[0].removeprefix('module.')}'); lower the learning rate (it is "
                f"{float(self.get_current_lr()):.2g}) or lengthen the warm-up; {self._kept()}."
            )

    def two_stepped_transfer_learning(self, epoch: int, fixbase_epoch: int, open_layers: Any, model: Any = None) -> None:
        """Train only ``open_layers`` in the first epochs; afterwards what was trainable at the start, and nothing else."""
        if (epoch + 1) <= fixbase_epoch and open_layers is not None:
            cast(Any, super()).two_stepped_transfer_learning(epoch, fixbase_epoch, open_layers, model)
            return
        for name, value in self.model.named_parameters():
            value.requires_grad_(self.trainable[name])
        self.set_model_mode("train")

    def _end_of_epoch(self) -> None:
        context, done = self.context, self.epoch + 1
        self._require_finite_weights()
        record: dict[str, Any] = {"epoch": done, "lr": float(self.get_current_lr())}
        record.update({name: value / max(1, self.num_batches) for name, value in self._sums.items()})
        record.update(self.updates.end())
        observed = [(observer.tag, observer.end()) for observer in self.observers]
        for tag, values in observed:
            record.update(values)
            if self.writer is not None:
                for name, value in values.items():
                    self.writer.add_scalar(f"{tag}/{name}", value, done)
        self._print_epoch(record)
        self._say_idle_parts(done)
        last = done == context.max_epoch
        due = context.eval_freq > 0 and done >= context.start_eval and done % context.eval_freq == 0
        if context.validate is not None and context.eval_freq > 0 and (due or last):
            with ckpt.preserved_rng(), self.updates.averaged():
                result = context.validate()
            record["val_mAP"], record["val_R1"] = float(result.mAP), float(result.rank(1))
            print(f"validation after epoch {done}: mAP {result.mAP:.1%}, R1 {result.rank(1):.1%} (held-out identities)")
            if self.writer is not None:
                self.writer.add_scalar("Validation/mAP", result.mAP, done)
                self.writer.add_scalar("Validation/rank1", result.rank(1), done)
        elif context.monitor is not None and due and not last:
            with ckpt.preserved_rng(), self.updates.averaged():
                scores = context.monitor()
            record.update(scores)
            print(f"test after epoch {done}: " + ", ".join(f"{name} {value:.1%}" for name, value in scores.items()))
            if self.writer is not None:
                for name, value in scores.items():
                    self.writer.add_scalar(f"Test/{name}", value, done)
        self.history.append(record)
        improved = "val_mAP" in record and (self.best_score is None or record["val_mAP"] > self.best_score)
        if improved:
            self.best_score, self.best_epoch = record["val_mAP"], done
        state = self.state(done)
        if improved:
            ckpt.save(context.best, state)
        if last or done % context.checkpoint_freq == 0:
            ckpt.save(context.last, state)
            if self.writer is not None:
                self.writer.flush()
        if context.watch is not None:
            context.watch(context.folder.name, record)

    def _print_epoch(self, record: dict[str, Any]) -> None:
        done, total = record["epoch"], self.context.max_epoch
        elapsed = time.perf_counter() - self._started
        left = elapsed / max(1, done - self.first_epoch) * (total - done)
        names = [*self._sums, *(name for observer in self.observers for name in getattr(observer, "shown", ()))]
        losses = ", ".join(f"{name} {record[name]:.3f}" for name in names if name in record)
        print(f"epoch {done}/{total}: {losses}, lr {record['lr']:.2e}, eta {datetime.timedelta(seconds=round(left))}")

    def _say_idle_parts(self, done: int) -> None:
        """A part of the loss that was exactly 0 for a whole epoch trains nothing; it is said once."""
        for name, value in self._sums.items():
            if value == 0.0 and name != "acc" and name not in self._idle_parts:
                self._idle_parts.add(name)
                print(f"note: part '{name}' of the loss was 0 in every batch of epoch {done}: it trained nothing there")

    # --- checkpoints --------------------------------------------------------------------------------------------------
    def state(self, epoch: int) -> dict[str, Any]:
        """Return what a checkpoint after ``epoch`` epochs holds."""
        model = bare_model(self.model)
        return {
            **self.context.static,
            "kind": self.context.kind,
            **self.updates.entries(model.state_dict()),
            "epoch": epoch,
            "max_epoch": self.context.max_epoch,
            "rank1": float(self.history[-1].get("val_R1", 0.0)) if self.history else 0.0,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "extra": {name: value.state_dict() for name, value in self.extra_states.items()},
            "rng": ckpt.rng_state(),
            "history": self.history,
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "processes": world(),
            "sample_seeds": self.context.sample_seeds,
        }

    def save_model(self, epoch: int, rank1: float, save_dir: str, is_best: bool = False) -> None:
        """The host asks for a checkpoint after a test; the end of the epoch has written it already."""

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint of this stage; with another number of epochs, on the schedule of that many."""
        model = bare_model(self.model)
        ckpt.load_weights(model, state["state_dict"], path=path)
        self.updates.restore(model, state)
        rebuild = state["max_epoch"] != self.context.max_epoch
        restore_schedule(self.optimizer, self.scheduler, state, rebuild=rebuild)
        for name, value in self.extra_states.items():
            value.load_state_dict(state["extra"][name])
        self.history, self.best_score, self.best_epoch = state["history"], state["best_score"], state["best_epoch"]
        self.first_epoch = self.epoch = state["epoch"]
        ckpt.set_rng_state(state["rng"])
        before = int(state.get("processes", 1))
        if before != world():
            seeded = state.get("sample_seeds", False) and self.context.sample_seeds
            print(
                f"note: {before} process{'' if before == 1 else 'es'} wrote the checkpoint, and {world()} go on: batches, "
                "losses, statistics and noise are those of the whole batch as before, up to rounding; augmentation is "
                + ("drawn as before." if seeded else "drawn otherwise from here on ('data.sample_seeds').")
            )

    def skip_epochs(self, count: int) -> None:
        """Count on from an epoch without a checkpoint of it: the first ones are taken for trained elsewhere.

        The learning rate is that of the schedule at this epoch.

        Args:
            count: Epochs to leave out.
        """
        self.first_epoch = self.epoch = count
        if self.scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a schedule is stepped before its optimiser here
                for _ in range(count * self.schedule_steps):
                    self.scheduler.step()

    @property
    def schedule_steps(self) -> int:
        """How often an epoch steps the schedule."""
        return 1

    # --- testing ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def extract(self, loader: Any, *, label: str, alter: Alter | None = None) -> Features:
        """Return the features of all images of a loader, in its order; the model stays in the mode it is in.

        Args:
            loader: One of the host's test loaders.
            label: Name on the progress bar.
            alter: Changes a batch of normalised images (B, 3, h, w), whose files it is told, before the model sees it.

        Raises:
            UserError: Features are not finite.
        """
        features, pids, camids, paths = [], [], [], []
        for data in tqdm(share_batches(loader), desc=label, leave=False, disable=None, dynamic_ncols=True):
            raise_pending()
            images, batch_pids, batch_camids = self.parse_data_for_eval(data)
            if self.use_gpu:
                images = images.cuda(non_blocking=True)
            if alter is not None:
                images = alter(images, list(data["impath"]))
            if self.reads_cameras:
                output = self.model(images, self.batch_cameras(data, images))
            else:
                output = self.extract_features(images)
            features.append(output.float().cpu())
            pids.append(np.asarray(batch_pids))
            camids.append(np.asarray(batch_camids))
            paths.extend(data.get("impath", []))
        if world() > 1:
            parts = zip(*collect([features, pids, camids, paths]))
            features, pids, camids, paths = ([one for part in kind for one in part] for kind in parts)
        if not paths:  # the host's batches of tracklets do not name them
            paths = [first_path(item[0]) for item in getattr(getattr(loader, "dataset", None), "data", [])]
        found = torch.cat(features)
        _require_finite(found, paths, label)
        return Features(found, np.concatenate(pids), np.concatenate(camids), paths)

    def extract_target(self, name: str) -> TestFeatures:
        """Return query and gallery features of a test set."""
        self.set_model_mode("eval")
        loaders = self.test_loader[name]
        with ckpt.preserved_rng():
            return TestFeatures(
                self.extract(loaders["query"], label=f"{name} query"),
                self.extract(loaders["gallery"], label=f"{name} gallery"),
            )

    def test(self, **options: Any) -> float:
        """The host tests at the end of its loop; the plug-in tests once, after all stages (see ``engine.runner``)."""
        return 0.0


def _require_finite(features: torch.Tensor, paths: list[Any], label: str) -> None:
    """Refuse features (N, d) that are not finite, with their number and the first image."""
    broken = (~torch.isfinite(features).flatten(1).all(dim=1)).nonzero().flatten()
    if len(broken):
        first = int(broken[0])
        where = f" (first: '{paths[first]}')" if first < len(paths) else ""
        raise UserError(
            f"{len(broken)} of {len(features)} features of '{label}' hold NaN or infinity{where}; the image model is "
            "damaged or its training diverged: take another checkpoint, or train with a lower learning rate."
        )
