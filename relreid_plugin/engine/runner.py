"""A whole run: its stages one after the other, tests, table, and everything under one folder."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..collective import world
from ..config.defaults import load_config
from ..config.validation import schedule_notes
from ..data.cameras import CameraRows, CameraTable
from ..errors import UserError
from ..features.sets import TestFeatures
from ..locks import folder_lock
from ..methods import methods
from ..metrics.ranking import RankingResult
from ..metrics.verification import Verification
from .base import Alter, EngineMixin, Watch
from .distributed import check_shared, from_main, main, main_holds, wait_for_all
from .evaluator import EvaluationOptions, Evaluator, Row
from .features import RunFeatures
from .folder import guard, write_context, write_results
from .logs import environment, logged, set_seed
from .network import build_network
from .ranked import draw_target
from .records import read_metrics
from .resume import other_tests
from .stages import ImageStage, Stage
from .table import text_table


@dataclass
class RunResult:
    """What a run leaves.

    Attributes:
        rows: The table.
        history: Records per epoch, by stage.
        folder: The run's folder.
        stage1_features: The network's features of every test set.
    """

    rows: list[Row]
    history: dict[str, list[dict[str, Any]]]
    folder: Path
    stage1_features: dict[str, TestFeatures] = field(default_factory=dict)


class Run:
    """One configuration in one folder.

    Args:
        cfg: A validated configuration; changed only where a device is missing.
        stages: Numbers of the stages to train, a subset of ``train.stages``; empty to only test.
        resume: Go on from the folder's checkpoints where there are any.

    Attributes:
        planned: All stages that the configuration's methods have, in order, whether ``train.stages`` names them or not.
        network: How the network is trained and tested.
        features: Features by the network as it is.
        datamanager, cameras, model, bare, parameters, engine, fingerprint: From the building of stage 1 on: the host's data
            manager, rows of the camera embedding, the network, the same without its wrapper, its inference parameters, the
            engine that has it, and a hash of its weights.
        verified: With ``test.verification``: by test set, the ROC of every row.
        rows, history, selected, notes: The table; records per epoch and the tested epoch, by stage; what a user should know.
        results: Where the results go: the folder, or another one in it for tests with other keys.
        inference: Whether the training data may be missing: nothing is trained.
        watch: What is told of every epoch of every stage; see :class:`~relreid_plugin.engine.base.StageContext`.
    """

    datamanager: Any
    cameras: CameraTable
    model: nn.Module
    bare: Any
    engine: EngineMixin
    parameters: int
    fingerprint: str
    watch: Watch | None = None

    def __init__(self, cfg: Any, *, stages: list[int] | None = None, resume: bool = False) -> None:
        self.cfg = cfg
        self.stages = sorted(set(cfg.train.stages if stages is None else stages))
        self.resume, self.inference = resume, False
        self.folder = self.results = Path(cfg.data.save_dir)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.selected: dict[str, int] = {}
        self._drawn: list[Path] = []
        self.verified: dict[str, list[tuple[str, Verification]]] = {}
        if cfg.use_gpu and not torch.cuda.is_available():
            cfg.use_gpu = False
        if world() > 1:
            cfg.data.sample_seeds = True  # whichever process reads a sample
        self.network = build_network(cfg)
        self.first = ImageStage()
        adding = [method for method in methods() if method.stage_count(cfg)]
        self.planned: list[Stage] = [self.first, *(stage for method in adding for stage in method.stages(cfg))]
        for number, stage in enumerate(self.planned, 1):
            stage.number = number
        self.features = RunFeatures(self)

    def stage_folder(self, number: int) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.folder / f"stage{number}"

    # --- what stages ask for ------------------------------------------------------------------------------------------
    def place_model(self) -> None:
        """Move the network to the GPU, where the configuration asks for one (a process has one), in its memory format."""
        if self.cfg.train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.cfg.use_gpu:
            self.model = self.model.cuda()
            count = torch.cuda.device_count()
            if count > 1:
                print(
                    f"note: one of {count} GPUs is used; for all of them: 'torchrun --nproc-per-node {count} -m "
                    "relreid_plugin train …'."
                )
        self.bare = self.model

    def static(self) -> dict[str, Any]:
        """Return what every checkpoint of the run holds."""
        cfg, cameras = self.cfg, self.cameras.cameras
        return {
            "config": cfg.dump(),
            "label_map": dict(self.datamanager.label_map),
            "num_classes": int(self.datamanager.num_train_pids),
            **self.network.static(self),
            **({} if cameras is None else {"cameras": [list(camera) for camera in cameras]}),
            "normalisation": {
                "mean": list(cfg.data.norm_mean),
                "std": list(cfg.data.norm_std),
                "height": cfg.data.height,
                "width": cfg.data.width,
            },
        }

    def options(self) -> EvaluationOptions:
        """Return what the keys of ``test`` ask of the evaluator."""
        return EvaluationOptions.of(self.cfg)

    def asked(self) -> list[Stage]:
        """Return the stages that ``train.stages`` names, and the first one, whose weights may come from elsewhere."""
        return [stage for stage in self.planned if stage is self.first or stage.number in self.cfg.train.stages]

    # --- what a trained run is asked ----------------------------------------------------------------------------------
    def refiner(self) -> Any:
        """Return the trained encoder that refines the network's features by others, ``None`` where no stage has one."""
        for stage in self.asked():
            found = stage.refiner(self)
            if found is not None:
                return found
        return None

    def target_features(self, name: str, alter: Alter | None = None) -> TestFeatures:
        """Return the network's features of a test set, its queries changed by ``alter`` before the model sees them.

        Args:
            name: One of ``data.targets``.
            alter: ``(images (B, 3, h, w) normalised, files) -> images``; ``None`` leaves the queries alone.

        Raises:
            UserError: No such test set, or tracklets.
        """
        return self.features.altered(name, alter)

    def test_cameras(self, name: str) -> CameraRows:
        """Return the rows of the model's camera embedding for the cameras of a test set."""
        return self.features.cameras(name)

    def score(self, features: TestFeatures) -> RankingResult:
        """Return the scores of features under the metric of the run's image-model row."""
        return self.features.score(features)

    def read_picture(self, source: Any) -> Any:
        """Return the picture of a data set's item, as the network reads it."""
        return self.network.read_picture(self, source)

    # --- the run ------------------------------------------------------------------------------------------------------
    def execute(self) -> RunResult:
        """Train the stages that are not done, test, print the table, and write the folder.

        A finished run that shall go on is not written: its table is printed. Where a test has other keys than the run in
        the folder, its results go to ``tests/…`` in it.

        Raises:
            UserError: The user's mistake, another process in the folder, or a file that cannot be written.
        """
        finished = guard(self)
        if finished is not None:
            if other_tests(self.folder, self.cfg) == self.folder:
                return self._show_finished(finished)
            self.stages = []
        fresh = not self.folder.exists()
        if not self.stages:
            self.results = other_tests(self.folder, self.cfg)
        wait_for_all()
        with main_holds(lambda: folder_lock(self.folder)):
            check_shared(self.folder)
            return self._execute(fresh)

    def learn(self, watch: Watch | None = None) -> dict[str, list[dict[str, Any]]]:
        """Train the stages that are not done, and test nothing: no feature of a test set is extracted.

        Args:
            watch: Told of every epoch that trains, as ``(stage, record)``; what it raises ends the training.

        Returns:
            The records of all epochs by stage, those of checkpoints that were there included.

        Raises:
            UserError: As :meth:`execute`.
        """
        self.watch = watch
        guard(self)
        fresh = not self.folder.exists()
        with main_holds(lambda: folder_lock(self.folder)), self._begun(fresh):
            self._through_stages()
        return self.history

    @contextlib.contextmanager
    def _begun(self, fresh: bool) -> Iterator[None]:
        """In the block the folder has its context, its log is written, and the network is built."""
        from_main(lambda: write_context(self))
        log = self.results / ("train.log" if self.stages else "test.log")
        with main_holds(lambda: logged(log)):
            print(f"run folder: {self.folder} (configuration: config.yml)")
            for note in schedule_notes(self.cfg) if self.stages else []:
                print(f"note: {note}")
            try:
                self.first.build(self)
            except UserError:
                if fresh and main():
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise
            yield

    def _execute(self, fresh: bool) -> RunResult:
        with self._begun(fresh):
            tested = self._through_stages()
            kept = self.test(tested)
            if main():
                self._print_table(write_results(self))
        return RunResult(self.rows, self.history, self.folder, kept)

    def _through_stages(self) -> list[Stage]:
        """Train the stages that are to be trained, each behind the chosen weights of those before; return what is tested.

        Stages behind the last one that was trained are neither loaded nor tested.
        """
        last = max(self.stages) if self.stages else len(self.planned)
        through = [stage for stage in self.asked() if stage.number <= last]
        for stage in through:
            if stage.number in self.stages:
                stage.train(self)
            stage.load(self)
        return through

    def test(self, stages: Sequence[Stage]) -> dict[str, TestFeatures]:
        """Add the rows of every test set to the table; return its headline features.

        Args:
            stages: Those that add rows of their own.
        """
        kept = {}
        for name in self.cfg.data.targets:
            for index, view in enumerate(self.network.views()):
                features = self.features.test(name, view)
                if not main():  # features are everybody's work, ranking is not
                    continue
                evaluator = Evaluator(name, features, options=self.options(), parameters=self.parameters)
                if view.note:
                    self.notes.append(f"{name}: {view.note}")
                self.rows.append(evaluator.baseline(view.label))
                self.verified.setdefault(name, []).extend(evaluator.verified)
                if index:
                    continue
                evaluator.verified.clear()
                kept[name] = features
                self.rows.extend(evaluator.rivals())
                for stage in stages:
                    self.rows.extend(stage.rows(self, evaluator))
                self.verified[name] += evaluator.verified
                if self.cfg.test.visrank:
                    self._drawn.append(draw_target(self, evaluator, self._drawn))
        return kept

    def _show_finished(self, metrics: dict[str, Any]) -> RunResult:
        """Print the table of a finished run; nothing is written."""
        self.rows = [Row(**row) for row in metrics["rows"]]
        self.history, self.selected = metrics["history"], metrics["selected_epoch"]
        print(f"'{self.folder}' is finished; this is its table ('{self.folder / 'metrics.json'}'), and nothing was written")
        self._print_table(metrics["notes"])
        return RunResult(self.rows, self.history, self.folder)

    def _print_table(self, notes: Sequence[str]) -> None:
        for note in notes:
            print(f"note: {note}")
        chosen = ", ".join(f"{stage} epoch {epoch}" for stage, epoch in self.selected.items())
        print(f"\ntested: {chosen}\n\n{text_table(self.rows)}\n\nrun folder: {self.folder}")
        if self.results != self.folder:
            print(f"other keys than the run's; results: {self.results}")


def open_run(folder: Path | str, overrides: Sequence[str] = (), *, training: bool = False) -> Run:
    """Open a trained run to look into its network: engine and the tested weights of its stages, in evaluation mode.

    Of a run of single images no training data is needed: its checkpoint says what there is to know of them, and the test
    sets are opened when ``datamanager.test_dataset`` is asked for one.

    Args:
        folder: The run's folder (``data.save_dir``); nothing in it is changed but its feature bank.
        overrides: ``KEY VALUE …`` over the run's configuration, such as another ``data.root``.
        training: Open the training data, too.

    Raises:
        UserError: The folder holds no trained run, or the training data is wanted and missing.
    """
    folder = Path(folder)
    if not (folder / "config.yml").is_file():
        raise UserError(f"'{folder}' holds no run ('{folder / 'config.yml'}' does not exist).")
    if "data.save_dir" in overrides[::2]:
        raise UserError(f"the run's folder is '{folder}'; leave out the override 'data.save_dir'.")
    run = Run(load_config(folder / "config.yml", [*overrides, "data.save_dir", str(folder)]), stages=[])
    run.inference = True
    guard(run)
    run.inference = not training
    with contextlib.redirect_stdout(io.StringIO()):  # the host describes the data sets at length
        run.first.build(run)
    for stage in run.asked():
        if not stage.refines:
            stage.load(run)
    run.engine.set_model_mode("eval")
    return run


__all__ = ["Run", "RunResult", "environment", "logged", "open_run", "read_metrics", "set_seed"]
