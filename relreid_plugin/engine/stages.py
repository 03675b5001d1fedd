"""What a stage of a run is, and the first one of every run: training the network."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..backbones.recompute import recompute_activations
from ..backbones.weights import load_weight_file
from ..config.idle import idle_settings
from ..errors import UserError
from . import checkpoint as ckpt
from .base import EngineMixin, StageContext
from .batches import check_batches
from .distributed import from_main, main_first
from .evaluator import Evaluator, Row, inference_parameters
from .logs import set_seed
from .resume import check_data, check_keys, note_changes

if TYPE_CHECKING:
    from ..features.sets import TestFeatures
    from .attended import Attended
    from .runner import Run


class Stage:
    """One of the stages that a run trains one after the other, each in a folder of its own.

    Attributes:
        number: Its number in ``train.stages``, counted from 1; the run sets it.
        kind: Kind of its checkpoints; no other stage has it.
        refines: Whether it leaves the network as it is and refines its features (:meth:`refiner`).
    """

    number = 1
    kind = ""
    refines = False

    @property
    def name(self) -> str:
        """What folder, history and table call it."""
        return f"stage{self.number}"

    def folder(self, run: Run) -> Path:
        """Return where its checkpoints are."""
        return run.stage_folder(self.number)

    def tested_path(self, run: Run) -> Path:
        """Return the checkpoint that is tested: the best validated one, else the last."""
        return ckpt.tested(self.folder(run))

    def newest(self, run: Run) -> dict[str, Any] | None:
        """Return its newest checkpoint, ``None`` where there is none."""
        path = self.folder(run) / "last.pth.tar"
        return ckpt.load(path, kind=self.kind) if path.is_file() else None

    def note_tested(self, run: Run, state: dict[str, Any], newest: dict[str, Any]) -> None:
        """Keep what the run's metrics say of it: the epochs of the newest checkpoint, and the epoch that is tested."""
        run.history[self.name] = newest["history"]
        run.selected[self.name] = state["epoch"]

    def check(self, run: Run) -> None:
        """Find out whether it can train behind the network that was built, before anything is trained."""

    def train(self, run: Run) -> None:
        """Train it, or what is left of it."""
        raise NotImplementedError

    def load(self, run: Run) -> None:
        """Put its chosen weights where the next stages and the tests find them."""

    def rows(self, run: Run, evaluator: Evaluator) -> list[Row]:
        """Return the rows that it adds to the table of a test set."""
        return []

    def refiner(self, run: Run) -> Any:
        """Return the trained encoder that refines features by others; ``None``: it has none."""
        return None

    def attended(self, run: Run, data: TestFeatures) -> Attended | None:
        """Return whom the queries of a test set looked at in the gallery; ``None``: the stage weighs no images."""
        return None


def train_engine(
    run: Run,
    stage: Stage,
    engine: EngineMixin,
    extra: dict[str, Any],
    context: StageContext,
    *,
    announce: Callable[[], None],
    belongs: Callable[[dict[str, Any], Path], None],
    **options: Any,
) -> None:
    """Train a stage behind the first one, from its newest checkpoint where the run goes on.

    Args:
        run: The run.
        stage: The stage.
        engine: Its engine.
        extra: Further states of its checkpoints.
        context: Folder, epochs, validation.
        announce: Prints what is going to be trained.
        belongs: Raises where a checkpoint was trained behind other weights than those that are there.
        **options: Of the host's loop.
    """
    engine.attach(context, **extra)
    engine.updates.widen(engine)
    if run.resume and context.last.is_file():
        state = ckpt.load(context.last, kind=stage.kind)
        belongs(state, context.last)
        engine.restore(state, context.last)
        note_changes(state, run.cfg)
        print(f"resuming stage {stage.number} after epoch {engine.first_epoch} from '{context.last}'")
    if engine.first_epoch >= context.max_epoch and context.last.is_file():
        print(f"stage {stage.number} is complete ({context.max_epoch} epochs)")
        return
    started = time.perf_counter()
    announce()
    engine.fit(print_freq=run.cfg.train.print_freq, **options)
    if context.max_epoch == 0:
        ckpt.save(context.last, engine.state(0))
    print(f"stage {stage.number} took {time.perf_counter() - started:.0f} s")


class ImageStage(Stage):
    """Stage 1: the network that gives features, by the host's loop."""

    kind = "image"

    def will_restore(self, run: Run) -> bool:
        """Whether the run's own checkpoint has the weights."""
        here = (run.resume or 1 not in run.stages) and (self.folder(run) / "last.pth.tar").is_file()
        return here or run.network.stands_alone(run)

    def build(self, run: Run) -> None:
        """Open the data and build model and engine; the data comes first, since it says how many identities there are."""
        cfg, network = run.cfg, run.network
        set_seed(cfg.train.seed)
        with main_first():  # data sets are rendered, unpacked and cached by one process
            run.datamanager = network.open_data(run)
        set_seed(cfg.train.seed)
        run.cameras = network.camera_table(run)
        restores = self.will_restore(run)
        built = cfg
        if restores and cfg.backbone.weights:  # its own checkpoint has them
            built = cfg.clone()
            built.backbone.weights = ""
        pretrained = cfg.model.pretrained and not (cfg.model.load_weights or restores)
        run.model = network.build_model(run, built, pretrained=pretrained)
        self._note(run)
        if cfg.model.load_weights:
            take_weights(run, run.model, "model.load_weights")
        if cfg.train.checkpointing and cfg.data.type != "features":
            recompute_activations(run.model)
        run.place_model()
        run.parameters = inference_parameters(run.bare)
        run.engine, extra = network.build_engine(run)
        run.engine.training_cameras = run.cameras.training_rows()
        if 1 in run.stages and cfg.train.max_epoch > 0:
            manager = run.datamanager
            check_batches(run.bare, manager.train_loader, identities=manager.num_train_pids, classified=network.classified)
        for stage in run.planned[1:]:
            if stage.number in cfg.train.stages:
                stage.check(run)
        if cfg.model.resume and not restores:
            take_weights(run, run.bare, "model.resume", only_check=True)
        held_out = bool(len(run.datamanager.val_query))
        context = StageContext(
            kind=self.kind,
            folder=self.folder(run),
            max_epoch=cfg.train.max_epoch,
            checkpoint_freq=cfg.train.checkpoint_freq,
            eval_freq=cfg.test.eval_freq,
            start_eval=cfg.test.start_eval,
            static=run.static(),
            validate=run.features.validate if held_out else None,
            monitor=None if held_out else run.features.monitor,
            sample_seeds=cfg.data.sample_seeds,
            loggers=tuple(cfg.train.loggers),
            watch=run.watch,
        )
        run.engine.attach(context, **extra)

    def _note(self, run: Run) -> None:
        """Say what was set and does nothing, and what the network misses in the data."""
        run.notes = idle_settings(run.cfg)
        for note in run.notes:
            print(f"note: {note}")
        run.notes += run.network.data_notes(run)

    def train(self, run: Run) -> None:
        """Train the network."""
        cfg, engine = run.cfg, run.engine
        context = engine.context
        engine.updates.widen(engine)
        if run.resume and context.last.is_file():
            self._go_on(run, ckpt.load(context.last, kind=self.kind), context.last)
            print(f"resuming stage 1 after epoch {engine.first_epoch} from '{context.last}'")
        elif cfg.model.resume:
            self._resume_from_key(run)
        if cfg.train.start_epoch > 0 and engine.first_epoch == 0 and not engine.history:
            engine.skip_epochs(cfg.train.start_epoch)
            print(f"stage 1 starts after epoch {cfg.train.start_epoch} ('train.start_epoch')")
        if engine.first_epoch >= context.max_epoch and context.last.is_file():
            print(f"stage 1 is complete ({context.max_epoch} epochs)")
        else:
            started = time.perf_counter()
            print(f"stage 1: {cfg.model.name}, {run.parameters / 1e6:.2f}M parameters, {cfg.train.max_epoch} epochs")
            engine.fit(
                start_eval=cfg.test.start_eval,
                print_freq=cfg.train.print_freq,
                fixbase_epoch=cfg.train.fixbase_epoch,
                open_layers=list(cfg.train.open_layers),
            )
            print(f"stage 1 took {time.perf_counter() - started:.0f} s")
        if cfg.train.max_epoch == 0 and not from_main(context.last.is_file):
            ckpt.save(context.last, engine.state(0))

    def _go_on(self, run: Run, state: dict[str, Any], path: Path) -> None:
        """Take up the training where a checkpoint left it."""
        manager = run.datamanager
        check_data(state, manager.label_map, int(manager.num_train_pids), run.cfg.data.root, path)
        run.engine.restore(state, path)
        note_changes(state, run.cfg)

    def _resume_from_key(self, run: Run) -> None:
        path = Path(run.cfg.model.resume)
        try:
            state = ckpt.load(path, kind=self.kind)
        except UserError:
            if not path.is_file():
                raise
            take_weights(run, run.model, "model.resume")
            print(f"'{path}' is no checkpoint of stage 1 of this plug-in: only its weights are taken")
            return
        check_keys(state, run.cfg, path)
        self._go_on(run, state, path)
        print(f"resuming stage 1 after epoch {run.engine.first_epoch} from '{path}'")

    def load(self, run: Run) -> None:
        """Put the chosen weights into the model: the best validated ones, else the last."""
        context, path = run.engine.context, self.tested_path(run)
        model = run.cfg.model
        run.engine.updates.narrow(run.engine)
        if not path.is_file():  # the weights of model.load_weights are in the model; see the guard of the folder
            if model.resume:
                self._resume_from_key(run)
            run.fingerprint = ckpt.fingerprint(run.bare)
            return
        state = ckpt.load(path, kind=self.kind)
        ckpt.load_weights(run.bare, state["state_dict"], path=path)
        self.note_tested(run, state, state if path == context.last else ckpt.load(context.last, kind=self.kind))
        if not run.stages and (model.load_weights or model.resume):
            key = "model.load_weights" if model.load_weights else "model.resume"
            print(f"note: the weights that are tested are those of '{path}', the run's own, not those of '{key}'.")
        run.fingerprint = ckpt.fingerprint(run.bare)


def take_weights(run: Run, model: nn.Module, key: str, *, only_check: bool = False, classes: int = 0) -> None:
    """Load the weight file that a key names into a model and say what was loaded, or only find out whether it fits.

    Args:
        run: The run.
        model: The model.
        key: Key of the configuration that holds the file's path.
        only_check: Leave the model as it is.
        classes: Identities of the model's classifier; 0: the run's.

    Raises:
        UserError: The file does not fit.
    """
    section, name = key.split(".")
    report = load_weight_file(
        model,
        run.cfg[section][name],
        key=key,
        partial=run.cfg.model.partial_weights,
        classes=classes or int(run.datamanager.num_train_pids),
        prepare=run.network.prepare_weights,
        only_check=only_check,
    )
    if not only_check:
        print(report.sentence())
