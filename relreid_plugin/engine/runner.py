"""A whole run: stages, tests, table, and everything under one folder."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import platform
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn

from ..backbones.files import WeightFile
from ..backbones.weights import load_weight_file
from ..config.defaults import MULTIMODAL_MODELS, load_config
from ..config.idle import idle_settings
from ..config.validation import schedule_notes
from ..data.cameras import UNKNOWN, CameraRows, CameraTable
from ..data.checks import check_images
from ..data.images import read_image
from ..data.ranges import check_range
from ..data.samefile import first_path
from ..errors import UserError, did_you_mean
from ..features.sets import FeatureSet, TestFeatures
from ..files import clear_leftovers, make_folder, writing
from ..host import (
    HOST,
    apply_patches,
    build_datamanager,
    build_model,
    build_optimizer,
    build_scheduler,
    make_loader,
    open_dataset,
    resolve_dataset,
)
from ..locks import folder_lock
from ..magformer.encoder import RelationEncoder
from ..magformer.recipe import with_recipe
from ..magformer.stage import build_encoder, build_relation_engine, chosen_recipe, encoder_of_state, fit_head
from ..metrics.neighbours import faiss_available
from ..metrics.ranking import RankingResult
from ..reading import read_json
from . import checkpoint as ckpt
from .bank import bank_key, load_or_extract
from .base import Alter, EngineMixin, StageContext
from .batches import check_batches
from .evaluator import EvaluationOptions, Evaluator, Row, inference_parameters
from .image import build_image_engine
from .resume import check_data, check_keys, check_second_stage, finished_metrics, note_changes, other_tests
from .table import markdown_table, text_table

METHOD_NAMES = {"nformer": "+ NFormer", "malaa": "+ MALAA", "magformer": "+ MagFormer"}


@dataclass
class RunResult:
    """What a run leaves.

    Attributes:
        rows: The table.
        history: Records per epoch, by stage.
        folder: The run's folder.
        stage1_features: Image-model features of every test set.
    """

    rows: list[Row]
    history: dict[str, list[dict[str, Any]]]
    folder: Path
    stage1_features: dict[str, TestFeatures] = field(default_factory=dict)


class _Tee:
    """Standard output that is also written to a file; what cannot be written there is said."""

    def __init__(self, console: TextIO, file: TextIO, path: Path) -> None:
        self.console, self.file, self.path = console, file, path

    def write(self, text: str) -> int:
        with writing(self.path):
            self.file.write(text)
        return self.console.write(text)

    def flush(self) -> None:
        with writing(self.path):
            self.file.flush()
        self.console.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Append everything printed in the block to ``path``; also where a defect of the program is, for a report.

    Raises:
        WriteError: The file cannot be written, from any ``print`` in the block.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    console = sys.stdout
    sys.stdout = _Tee(console, file, path)  # type: ignore[assignment]
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            with contextlib.suppress(OSError):
                file.write(traceback.format_exc())
        raise
    finally:
        sys.stdout = console
        with contextlib.suppress(OSError):  # what could not be written was said when it was printed
            file.close()


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the host draws from the global generator)
    torch.manual_seed(seed)


def environment() -> dict[str, Any]:
    """Return the versions and the machine that a run's numbers belong to."""
    from importlib import metadata

    versions = {}
    for name in ("torch", "torchvision", "torchreid", "timm", "faiss-cpu", "numpy", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "host_layout": HOST.layout,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


class _TestSets(Mapping[str, dict[str, list[tuple]]]):
    """The query and gallery items of ``data.targets``, each data set opened when it is asked for."""

    def __init__(self, cfg: Any, manager: Any, cache_dir: Path) -> None:
        self._cfg, self._manager, self._cache_dir = cfg, manager, cache_dir
        self._opened: dict[str, dict[str, list[tuple]]] = {}

    def __len__(self) -> int:
        return len(self._cfg.data.targets)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cfg.data.targets)

    def __contains__(self, name: object) -> bool:
        return name in list(self._cfg.data.targets)

    def __getitem__(self, name: str) -> dict[str, list[tuple]]:
        if name not in self:
            raise KeyError(name)
        if name not in self._opened:
            cfg = self._cfg
            resolve_dataset(name, cfg.data.root, download=cfg.data.download, name_pattern=cfg.data.name_pattern)
            with contextlib.redirect_stdout(io.StringIO()):  # the host describes the data set at length
                dataset = open_dataset(
                    name,
                    root=cfg.data.root,
                    cache_dir=self._cache_dir,
                    mode="query",
                    combineall=cfg.data.combineall,
                    split_id=cfg.data.split_id,
                    cuhk03_labeled=cfg.cuhk03.labeled_images,
                    cuhk03_classic_split=cfg.cuhk03.classic_split,
                    market1501_500k=cfg.market1501.use_500k_distractors,
                )
            check_images(
                [item[0] for item in dataset.query + dataset.gallery],
                cfg.data.check_images,
                pixel_range=check_range("data.pixel_range", cfg.data.pixel_range),
            )
            self._manager.camera_names[name] = dict(getattr(dataset, "camera_names", {}))
            self._manager.identity_names[name] = dict(getattr(dataset, "identity_names", {}))
            self._opened[name] = {"query": dataset.query, "gallery": dataset.gallery}
        return self._opened[name]


def _data_of_checkpoint(cfg: Any, state: dict[str, Any], cache_dir: Path) -> Any:
    """The host's data manager for inference: what a stage-1 checkpoint says of the training data, without the data.

    Test sets are opened when they are asked for.
    """
    apply_patches()
    manager = HOST.data.datamanager.DataManager(
        sources=list(cfg.data.sources),
        targets=list(cfg.data.targets),
        height=cfg.data.height,
        width=cfg.data.width,
        transforms=[],
        norm_mean=list(cfg.data.norm_mean),
        norm_std=list(cfg.data.norm_std),
        use_gpu=cfg.use_gpu,
    )
    unread = [("", 0, 0, 0)]  # the host's class of image lists refuses to be empty
    images = HOST.data.ImageDataset(unread, unread, unread, mode="query", verbose=False)
    images.data = []
    images.pixel_range = check_range("data.pixel_range", cfg.data.pixel_range)
    manager._num_train_pids = state["num_classes"]
    manager.label_map = state["label_map"]
    manager.cameras = _cameras_of_checkpoint(cfg, state)
    manager.num_cameras = manager.cameras.size
    manager.camera_names, manager.identity_names = {}, {}
    manager.train_loader, manager.test_loader = torch.utils.data.DataLoader(images), {}
    manager.val_query, manager.val_gallery = [], []
    manager.test_dataset = _TestSets(cfg, manager, cache_dir)
    return manager


def _cameras_of_checkpoint(cfg: Any, state: dict[str, Any]) -> CameraTable:
    """The rows of a stage-1 checkpoint's camera embedding."""
    if "cameras" in state:
        return CameraTable.of(state["cameras"], cfg.data.sources)
    table = state["state_dict"].get("cameras.table")
    return CameraTable(None, 0 if table is None else len(table), tuple(cfg.data.sources))


class Run:
    """One configuration in one folder.

    Args:
        cfg: A validated configuration; changed only where a device is missing.
        stages: Stages to train, a subset of ``train.stages``; empty to only test.
        resume: Go on from the folder's checkpoints where there are any.
    """

    inference = False
    """Whether the training data may be missing: nothing is trained, and images come from elsewhere or from test sets."""

    def __init__(self, cfg: Any, *, stages: list[int] | None = None, resume: bool = False) -> None:
        self.cfg = cfg
        self.stages = sorted(set(cfg.train.stages if stages is None else stages))
        self.resume = resume
        self.folder = Path(cfg.data.save_dir)
        self.rows: list[Row] = []
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.selected: dict[str, int] = {}
        self.results = self.folder
        self._drawn: list[Path] = []
        if cfg.use_gpu and not torch.cuda.is_available():
            cfg.use_gpu = False
        self.uses_relation = cfg.relation.attention != "none" and 2 in cfg.train.stages

    # --- folder -------------------------------------------------------------------------------------------------------
    def _stage_folder(self, stage: int) -> Path:
        return self.folder / f"stage{stage}"

    def _guard_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"'data.save_dir' is '{self.folder}', which is a file; name a folder.")
        if 1 not in self.stages and not (self.cfg.model.load_weights or self.cfg.model.resume):
            if not (self._stage_folder(1) / "last.pth.tar").is_file():
                raise UserError(
                    f"no stage-1 checkpoint in '{self._stage_folder(1)}'; train it first (without --stage 2 and "
                    "--eval-only), name the run's folder by 'data.save_dir', or give weights by 'model.load_weights FILE'."
                )
        if self.cfg.model.resume and not Path(self.cfg.model.resume).is_file():
            raise UserError(f"'model.resume' names '{self.cfg.model.resume}', which does not exist.")
        if self.resume:
            self._check_resume()
            return
        for stage in self.stages:
            if (self._stage_folder(stage) / "last.pth.tar").is_file():
                raise UserError(
                    f"'{self.folder}' already holds a run of stage {stage}; go on with --resume, test it with --eval-only, "
                    "or choose another folder by 'data.save_dir FOLDER'."
                )

    _kinds: tuple[str, str] = ("image", "relation")
    """Kinds of the checkpoints of both stages."""

    def _newest(self, stage: int) -> dict[str, Any] | None:
        path = self._stage_folder(stage) / "last.pth.tar"
        return ckpt.load(path, kind=self._kinds[stage - 1]) if path.is_file() else None

    def _check_resume(self) -> None:
        """Refuse keys that may not change (:mod:`relreid_plugin.engine.resume`) before anything is written."""
        found = {stage: state for stage in self.stages if (state := self._newest(stage)) is not None}
        for stage, state in found.items():
            check_keys(state, self.cfg, self._stage_folder(stage) / "last.pth.tar")
        if 1 in found:
            check_second_stage(found[1], self.cfg, self._stage_folder(2) / "last.pth.tar")
        if found and len(found) == len(self.stages):
            self._finished = finished_metrics(self.folder, found, self.cfg)

    _finished: dict[str, Any] | None = None
    """The metrics of a run that has nothing left to train."""

    def _show_finished(self, metrics: dict[str, Any]) -> RunResult:
        """Print the table of a finished run; nothing is written."""
        self.rows = [Row(**row) for row in metrics["rows"]]
        self.history, self.selected = metrics["history"], metrics["selected_epoch"]
        print(f"'{self.folder}' is finished; this is its table ('{self.folder / 'metrics.json'}'), and nothing was written")
        self._print_table(metrics["notes"])
        return RunResult(self.rows, self.history, self.folder)

    def _write_context(self) -> None:
        make_folder(self.folder)
        for part in ("", "stage1", "stage2", "bank", "plots"):  # what a killed run was writing
            clear_leftovers(self.folder / part)
        if not self.stages and self.results == self.folder and (self.folder / "config.yml").is_file():
            return
        ckpt.write_text(self.results / "config.yml", self.cfg.dump())
        ckpt.write_json(self.results / "environment.json", environment())

    # --- stage 1 ------------------------------------------------------------------------------------------------------
    def _build_image_model(self) -> None:
        cfg = self.cfg
        set_seed(cfg.train.seed)
        self.datamanager = self._open_data()
        set_seed(cfg.train.seed)
        self.cameras = self._camera_table()
        loss = "softmax" if cfg.loss.name == "softmax" else "triplet"
        weights_come = bool(cfg.model.load_weights) or self._will_restore_stage1()
        built = cfg
        if self._will_restore_stage1() and cfg.backbone.weights:  # its own checkpoint has them
            built = cfg.clone()
            built.backbone.weights = ""
        self.model = build_model(
            cfg.model.name,
            self.datamanager.num_train_pids,
            loss,
            cfg.model.pretrained and not weights_come,
            cfg.use_gpu,
            cfg=built,
            num_cameras=self.cameras.size,
        )
        self._note_cameras()
        if cfg.model.load_weights:
            self._take_weights(self.model, "model.load_weights")
        if cfg.use_gpu:
            self.model = nn.DataParallel(self.model).cuda() if torch.cuda.device_count() > 1 else self.model.cuda()
        self.bare = self.model.module if isinstance(self.model, nn.DataParallel) else self.model
        self.parameters = inference_parameters(self.bare)
        self.engine, extra = self._build_engine()
        self.engine.training_cameras = self.cameras.training_rows()
        if 1 in self.stages and cfg.train.max_epoch > 0:
            manager = self.datamanager
            check_batches(self.bare, manager.train_loader, identities=manager.num_train_pids, classified=self._classified)
        width: Any = getattr(self.bare, "test_dim", getattr(self.bare, "feature_dim", None))
        if self.uses_relation and width is not None:
            self._check_encoder(width)
        if cfg.model.resume and not self._will_restore_stage1():
            self._take_weights(self.bare, "model.resume", only_check=True)
        held_out = bool(len(self.datamanager.val_query))
        context = StageContext(
            kind="image",
            folder=self._stage_folder(1),
            max_epoch=cfg.train.max_epoch,
            checkpoint_freq=cfg.train.checkpoint_freq,
            eval_freq=cfg.test.eval_freq,
            start_eval=cfg.test.start_eval,
            static=self._static(),
            validate=self._validate_image if held_out else None,
            monitor=None if held_out else self._monitor_image,
        )
        self.engine.attach(context, **extra)

    def _take_weights(self, model: nn.Module, key: str, *, only_check: bool = False, classes: int = 0) -> None:
        """Load the weight file that a key names into a model and say what was loaded, or only find out whether it fits."""
        section, name = key.split(".")
        report = load_weight_file(
            model,
            self.cfg[section][name],
            key=key,
            partial=self.cfg.model.partial_weights,
            classes=classes or int(self.datamanager.num_train_pids),
            prepare=self._prepare_weights,
            only_check=only_check,
        )
        if not only_check:
            print(report.sentence())

    def _prepare_weights(self, model: nn.Module, file: WeightFile) -> None:
        """Make a model ready for a weight file, before both are compared."""

    def _open_data(self) -> Any:
        cfg, path = self.cfg, self._tested_image_weights()
        if self.inference and path.is_file() and cfg.data.type == "image" and cfg.model.name not in MULTIMODAL_MODELS:
            return _data_of_checkpoint(cfg, ckpt.load(path, kind="image"), self.folder / "cache")
        return build_datamanager(cfg, cache_dir=self.folder / "cache")

    def _camera_table(self) -> CameraTable:
        """The cameras of the model: the checkpoint's where one is tested or gone on from, else the training set's."""
        cfg, own = self.cfg, self.datamanager.cameras
        path = self._stage_folder(1) / "last.pth.tar" if self._will_restore_stage1() else Path(cfg.model.resume or ".")
        if cfg.model.name != "transreid" or not path.is_file():
            return own
        try:
            state = ckpt.load(path, kind="image")
        except UserError:  # whoever loads the weights says so, or takes a file of another kind
            return own
        table = _cameras_of_checkpoint(cfg, state)
        trains_on = 1 in self.stages and state["epoch"] < cfg.train.max_epoch
        same = table.size == own.size if table.cameras is None else table.cameras == own.cameras
        if trains_on and not same and (table.cameras is not None or 1 + own.largest > table.size):
            raise UserError(
                f"checkpoint '{path}' was trained with {table.size} cameras, and the training set's {own.size} are not the "
                "same ones; go on with the data that it was trained with, or train anew in another 'data.save_dir'."
            )
        return table

    def _tested_image_weights(self) -> Path:
        """The stage-1 checkpoint that is tested: the best validated one, else the last."""
        best = self._stage_folder(1) / "best.pth.tar"
        return best if best.is_file() else self._stage_folder(1) / "last.pth.tar"

    def _build_engine(self) -> tuple[EngineMixin, dict[str, Any]]:
        """The engine of stage 1, and the further states that its checkpoints must hold."""
        optimizer = build_optimizer(self.model, self.cfg)
        scheduler = build_scheduler(optimizer, self.cfg)
        dim = getattr(self.bare, "feature_dim", None)
        return build_image_engine(self.cfg, self.datamanager, self.model, optimizer, scheduler, feature_dim=dim)

    def _classified(self, items: int) -> int:
        """How many of a training batch's items are classified."""
        return items

    def _note_cameras(self) -> None:
        """Say what was set and does nothing, and when a camera embedding is asked for without camera labels."""
        self.notes: list[str] = idle_settings(self.cfg)
        for note in self.notes:
            print(f"note: {note}")
        if self.cfg.model.name == "transreid" and self.cfg.vit.camera_weight > 0 and self.cameras.size == 0:
            self.notes.append("the training data has no camera labels; the camera embedding is off.")

    def test_cameras(self, name: str) -> CameraRows:
        """Return the rows of the model's camera embedding for the cameras of a test set."""
        if not self.engine.reads_cameras:
            return UNKNOWN
        _ = self.datamanager.test_dataset[name]  # opens it, where that is left until it is needed
        return self.cameras.test_rows(name, self.datamanager.camera_names.get(name, {}))

    def _check_encoder(self, dim: int) -> None:
        """Find out before stage 1 is trained, not after it."""
        with ckpt.preserved_rng():
            try:
                encoder = build_encoder(self.cfg, dim=dim, num_classes=2)
            except ValueError as error:
                raise UserError(f"keys of 'relation' do not fit features of width {dim}: {error}") from None
            if self.cfg.relation.load_weights and 2 in self.stages:
                self._take_weights(encoder, "relation.load_weights", only_check=True, classes=2)
        encoder.search.resolve()

    def _will_restore_stage1(self) -> bool:
        folder = self._stage_folder(1)
        return (self.resume or 1 not in self.stages) and (folder / "last.pth.tar").is_file()

    def _static(self) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "config": cfg.dump(),
            "label_map": dict(self.datamanager.label_map),
            "num_classes": int(self.datamanager.num_train_pids),
            **({} if self.cameras.cameras is None else {"cameras": [list(camera) for camera in self.cameras.cameras]}),
            "normalisation": {
                "mean": list(cfg.data.norm_mean),
                "std": list(cfg.data.norm_std),
                "height": cfg.data.height,
                "width": cfg.data.width,
            },
        }

    def _score_pair(self, query: FeatureSet, gallery: FeatureSet) -> RankingResult:
        return self.score(TestFeatures(query, gallery))

    def _validation_features(self) -> TestFeatures:
        manager = self.datamanager
        query = self._bank("val-query", manager.val_query, keep=False)
        return TestFeatures(query, self._bank("val-gallery", manager.val_gallery, keep=False))

    def _validate_image(self) -> RankingResult:
        features = self._validation_features()
        return self._score_pair(features.query, features.gallery)

    def _monitor_image(self) -> dict[str, float]:
        scores = {}
        for name in self.cfg.data.targets:
            self.engine.camera_rows = self.test_cameras(name)
            features = self.engine.extract_target(name)
            result = self._score_pair(features.query, features.gallery)
            scores[f"{name}/mAP"], scores[f"{name}/R1"] = float(result.mAP), float(result.rank(1))
        return scores

    def _train_image(self) -> None:
        cfg, context = self.cfg, self.engine.context
        if self.resume and context.last.is_file():
            state = ckpt.load(context.last, kind="image")
            self._go_on(state, context.last)
            print(f"resuming stage 1 after epoch {self.engine.first_epoch} from '{context.last}'")
        elif cfg.model.resume:
            self._resume_from_key()
        if cfg.train.start_epoch > 0 and self.engine.first_epoch == 0 and not self.engine.history:
            self.engine.skip_epochs(cfg.train.start_epoch)
            print(f"stage 1 starts after epoch {cfg.train.start_epoch} ('train.start_epoch')")
        if self.engine.first_epoch >= context.max_epoch and context.last.is_file():
            print(f"stage 1 is complete ({context.max_epoch} epochs)")
        else:
            started = time.perf_counter()
            print(f"stage 1: {cfg.model.name}, {self.parameters / 1e6:.2f}M parameters, {cfg.train.max_epoch} epochs")
            self.engine.fit(
                start_eval=cfg.test.start_eval,
                print_freq=cfg.train.print_freq,
                fixbase_epoch=cfg.train.fixbase_epoch,
                open_layers=list(cfg.train.open_layers),
            )
            print(f"stage 1 took {time.perf_counter() - started:.0f} s")
        if cfg.train.max_epoch == 0 and not context.last.is_file():
            ckpt.save(context.last, self.engine._state(0))

    def _go_on(self, state: dict[str, Any], path: Path) -> None:
        """Take up stage 1 where a checkpoint left it."""
        manager = self.datamanager
        check_data(state, manager.label_map, int(manager.num_train_pids), self.cfg.data.root, path)
        self.engine.restore(state, path)
        note_changes(state, self.cfg)

    def _resume_from_key(self) -> None:
        path = Path(self.cfg.model.resume)
        try:
            state = ckpt.load(path, kind="image")
        except UserError:
            if not path.is_file():
                raise
            self._take_weights(self.model, "model.resume")
            print(f"'{path}' is no checkpoint of stage 1 of this plug-in: only its weights are taken")
            return
        check_keys(state, self.cfg, path)
        self._go_on(state, path)
        print(f"resuming stage 1 after epoch {self.engine.first_epoch} from '{path}'")

    def _load_image(self) -> None:
        """Put the chosen stage-1 weights into the model: the best validated ones, else the last."""
        context, path = self.engine.context, self._tested_image_weights()
        if not path.is_file():  # the weights of model.load_weights are in the model; see _guard_folder
            if self.cfg.model.resume:
                self._resume_from_key()
            self.fingerprint = ckpt.fingerprint(self.bare)
            return
        state = ckpt.load(path, kind="image")
        ckpt.load_weights(self.bare, state["state_dict"], path=path)
        self.history["stage1"] = (
            state["history"] if path == context.last else ckpt.load(context.last, kind="image")["history"]
        )
        self.selected["stage1"] = state["epoch"]
        if not self.stages and (self.cfg.model.load_weights or self.cfg.model.resume):
            key = "model.load_weights" if self.cfg.model.load_weights else "model.resume"
            print(f"note: the weights that are tested are those of '{path}', the run's own, not those of '{key}'.")
        self.fingerprint = ckpt.fingerprint(self.bare)

    # --- features -----------------------------------------------------------------------------------------------------
    def _bank(
        self,
        name: str,
        records: list[tuple],
        *,
        keep: bool = True,
        augment: int | None = None,
        target: str = "",
        alter: Alter | None = None,
    ) -> FeatureSet:
        """Features of a list of images by the image model, from the folder's bank when it is the same."""
        cfg, manager = self.cfg, self.datamanager
        rows = self.test_cameras(target) if target else self.engine.training_cameras
        transform = manager.transform_te if augment is None else manager.transform_tr

        def extract() -> FeatureSet:
            self.engine.set_model_mode("eval")
            self.engine.camera_rows = rows
            loader = make_loader(manager, records, transform, cfg.test.batch_size, cfg.data.workers)
            with ckpt.preserved_rng():
                if augment is not None:
                    set_seed(cfg.train.seed * 1_000_003 + augment)
                found = self.engine.extract(loader, label=name, alter=alter)
            return replace(found, identity_names=manager.identity_names.get(target, {})) if target else found

        if not keep:
            return extract()
        description = f"{cfg.data.height}x{cfg.data.width}|{self._describe_input()}"
        if self.engine.reads_cameras:
            description += f"|cameras {rows.description}"
        if augment is not None:
            description += f"|{cfg.data.transforms}|{cfg.train.seed}|{augment}|{cfg.data.workers}"
        key = bank_key(self.fingerprint, records, description)
        return load_or_extract(self.folder / "bank", name, key, extract, optional=self.inference)

    def _describe_input(self) -> str:
        data = self.cfg.data
        return f"{data.norm_mean}|{data.norm_std}" + (f"|range {data.pixel_range}" if data.pixel_range else "")

    def _test_features(self, name: str) -> TestFeatures:
        sets = self.datamanager.test_dataset[name]
        if self.cfg.data.type == "video":
            return self.engine.extract_target(name)
        return TestFeatures(
            self._bank(f"{name}-query", sets["query"], target=name),
            self._bank(f"{name}-gallery", sets["gallery"], target=name),
        )

    def target_features(self, name: str, alter: Alter | None = None) -> TestFeatures:
        """Return image-model features of a test set, its queries changed by ``alter`` before the model sees them.

        Args:
            name: One of ``data.targets``.
            alter: ``(images (B, 3, h, w) normalised, files) -> images``; ``None`` leaves the queries alone.

        Raises:
            UserError: No such test set, or tracklets.
        """
        if name not in self.datamanager.test_dataset:
            raise UserError(f"'{name}' is no test set of run '{self.folder}'{did_you_mean(name, self.cfg.data.targets)}")
        if self.cfg.data.type == "video":
            raise UserError(f"run '{self.folder}' is one of tracklets; queries can only be changed with 'data.type image'.")
        sets = self.datamanager.test_dataset[name]
        query = self._bank(f"{name}-query", sets["query"], keep=alter is None, target=name, alter=alter)
        return TestFeatures(query, self._bank(f"{name}-gallery", sets["gallery"], target=name))

    def score(self, features: TestFeatures) -> RankingResult:
        """Return the scores of image-model features under the metric of the run's image-model row."""
        return Evaluator("test", features, options=self._options(), parameters=0).baseline_result()

    # --- stage 2 ------------------------------------------------------------------------------------------------------
    def _train_second(self) -> None:
        """Train stage 2."""
        self._train_relation()

    def _prepare_test(self, *, second: bool) -> None:
        """Put the weights to be tested into the model; those of stage 1 are there."""

    def _train_relation(self) -> None:
        cfg = self.cfg
        if cfg.data.type == "video":
            raise UserError("stage 2 works on image data; set 'data.type image'.")
        records = self.datamanager.train_loader.dataset.train
        refresh = cfg.relation.bank.refresh
        bank = self._bank("train", records, augment=None if refresh == 0 else 0)
        set_seed(1_000_003 * cfg.train.seed + cfg.relation.train.seed)
        cfg, recipe = self._with_recipe(bank)
        encoder = build_encoder(cfg, dim=bank.features.shape[1], num_classes=self.datamanager.num_train_pids)
        fit_head(cfg, encoder, bank)
        if cfg.relation.load_weights:
            self._take_weights(encoder, "relation.load_weights")
        engine, extra = build_relation_engine(
            cfg, bank, encoder, num_classes=self.datamanager.num_train_pids, name="+".join(cfg.data.sources)
        )
        held_out = bool(len(self.datamanager.val_query))
        validation = None
        if held_out and cfg.relation.train.eval_freq > 0:
            validation = self._held_out()
        context = StageContext(
            kind="relation",
            folder=self._stage_folder(2),
            max_epoch=cfg.relation.train.max_epoch,
            checkpoint_freq=cfg.train.checkpoint_freq,
            eval_freq=cfg.relation.train.eval_freq,
            static={
                **self._static(),
                "image_model": self.fingerprint,
                "dim": bank.features.shape[1],
                **({"recipe": recipe} if recipe else {}),
            },
            validate=None if validation is None else lambda: self._validate_relation(encoder, validation),
        )
        engine.attach(context, **extra)
        if refresh > 0:
            engine.refresh = lambda epoch: self._refreshed_bank(records, epoch)
        if self.resume and context.last.is_file():
            state = ckpt.load(context.last, kind="relation")
            self._check_image_model(state, context.last)
            engine.restore(state, context.last)
            note_changes(state, cfg)
            print(f"resuming stage 2 after epoch {engine.first_epoch} from '{context.last}'")
        if engine.first_epoch >= context.max_epoch and context.last.is_file():
            print(f"stage 2 is complete ({context.max_epoch} epochs)")
            return
        started = time.perf_counter()
        print(
            f"stage 2: {cfg.relation.attention}, {inference_parameters(encoder) / 1e6:.2f}M parameters, "
            f"{len(bank)} features, {len(engine.train_loader)} steps of {engine.datamanager.dataset.count} per epoch, "
            f"{context.max_epoch} epochs"
        )
        self._note_search(encoder)
        engine.fit(print_freq=cfg.train.print_freq)
        if context.max_epoch == 0:
            ckpt.save(context.last, engine._state(0))
        print(f"stage 2 took {time.perf_counter() - started:.0f} s")

    def _with_recipe(self, bank: FeatureSet) -> tuple[Any, list[str]]:
        """The configuration of stage 2, and the keys in it that held-out identities chose, now or before a resumed run."""
        last = self._stage_folder(2) / "last.pth.tar"
        if self.resume and last.is_file():
            recipe = ckpt.load(last, kind="relation").get("recipe", [])
        else:
            with ckpt.preserved_rng():
                recipe = chosen_recipe(self.cfg, bank, self._held_out())
        return with_recipe(self.cfg, recipe), recipe

    def _held_out(self) -> TestFeatures | None:
        """Features of the identities that are held out by ``train.val_fraction``."""
        manager = self.datamanager
        if not len(manager.val_query):
            return None
        return TestFeatures(self._bank("val-query", manager.val_query), self._bank("val-gallery", manager.val_gallery))

    def _refreshed_bank(self, records: list[tuple], epoch: int) -> FeatureSet | None:
        refresh = self.cfg.relation.bank.refresh
        first = epoch - epoch % refresh
        if epoch != first and getattr(self, "_bank_epoch", None) == first:
            return None
        self._bank_epoch = first
        return self._bank("train", records, augment=first)

    def _check_image_model(self, state: dict[str, Any], path: Path) -> None:
        if state["image_model"] != self.fingerprint:
            raise UserError(
                f"checkpoint '{path}' belongs to another image model than that of '{self._stage_folder(1)}'; "
                "train stage 2 again in another 'data.save_dir', or put the image model back."
            )

    def _validate_relation(self, encoder: RelationEncoder, validation: TestFeatures) -> RankingResult:
        encoder.eval()
        evaluator = Evaluator("validation", validation, options=self._options(), parameters=0)
        return evaluator.refined_result(encoder, self.cfg.relation.protocols[0])

    def load_relation(self) -> RelationEncoder:
        """Return the tested stage-2 encoder, the best validated one, else the last, in evaluation mode.

        Raises:
            UserError: No stage-2 checkpoint, or one over another image model.
        """
        folder = self._stage_folder(2)
        path = folder / "best.pth.tar"
        if not path.is_file():
            path = folder / "last.pth.tar"
        if not path.is_file() and self.cfg.relation.load_weights:
            path = Path(self.cfg.relation.load_weights)
        if not path.is_file():
            raise UserError(
                f"no stage-2 checkpoint in '{folder}'; train it first (without --eval-only), or test stage 1 "
                "alone by 'train.stages [1]'."
            )
        state = ckpt.load(path, kind="relation")
        self._check_image_model(state, path)
        encoder = encoder_of_state(self.cfg, state, path=path)
        last = folder / "last.pth.tar"
        self.history["stage2"] = ckpt.load(last, kind="relation")["history"] if last.is_file() else state["history"]
        self.selected["stage2"] = state["epoch"]
        if self.cfg.use_gpu:
            encoder.cuda()
        return encoder.eval()

    def _note_search(self, encoder: RelationEncoder) -> None:
        backend = encoder.search.resolve()
        if backend == "torch" and self.cfg.relation.search.backend == "auto" and not faiss_available():
            print(
                "note: faiss is not installed; neighbours are searched exactly by torch ('pip install faiss-cpu' for faiss)."
            )

    # --- tests --------------------------------------------------------------------------------------------------------
    def _options(self) -> EvaluationOptions:
        test = self.cfg.test
        return EvaluationOptions(
            metric=test.dist_metric,
            normalise=test.normalize_feature,
            ranks=tuple(test.ranks),
            rivals=tuple(test.rivals),
            aqe_k=test.aqe.k,
            aqe_alpha=test.aqe.alpha,
            k1=test.kreciprocal.k1,
            k2=test.kreciprocal.k2,
            lambda_value=test.kreciprocal.lambda_value,
            rival_protocol=test.rival_protocol,
            rival_settings={
                "aqe-alpha": dict(**test.aqe_alpha),
                "gnn": dict(**test.gnn),
                "gcr": dict(**test.gcr),
                "cajaccard": dict(**test.cajaccard),
                "nfc": dict(**test.nfc),
                "diffusion": dict(**test.diffusion),
            },
            rerank_all=test.rerank,
            cuhk03_metric=self.cfg.cuhk03.use_metric_cuhk03,
        )

    def _test(self, *, with_relation: bool) -> dict[str, TestFeatures]:
        from .ranked import draw_target

        cfg, kept = self.cfg, {}
        encoder = self.load_relation() if with_relation else None
        for name in cfg.data.targets:
            features = self._test_features(name)
            kept[name] = features
            evaluator = Evaluator(name, features, options=self._options(), parameters=self.parameters)
            self.rows.append(evaluator.baseline())
            self.rows.extend(evaluator.rivals())
            if encoder is not None:
                self._note_search(encoder)
                for protocol in cfg.relation.protocols:
                    title = METHOD_NAMES[cfg.relation.attention]
                    self.rows.append(evaluator.relation(encoder, protocol=protocol, name=title))
            if cfg.test.visrank:
                self._drawn.append(draw_target(self, evaluator, self._drawn))
        return kept

    def read_picture(self, source: Any) -> Any:
        """The picture of a data set's item, as the data set reads it; of a tracklet, its first one."""
        if self.cfg.data.type == "video":
            return read_image(first_path(source), check_range("data.pixel_range", self.cfg.data.pixel_range))
        dataset = copy.copy(self.datamanager.train_loader.dataset)
        dataset.data, dataset.transform, dataset.k_tfm = [(source, 0, 0, 0)], None, 1
        return dataset[0]["img"]

    def _finish(self) -> None:
        notes = [*getattr(self.datamanager, "notes", []), *self.notes]
        metrics: dict[str, Any] = {
            "rows": [row.as_dict() for row in self.rows],
            "history": self.history,
            "selected_epoch": self.selected,
            "notes": notes,
        }
        from .curves import plot_history

        plot_history(self.history, self.results / "plots")
        ckpt.write_text(self.results / "table.md", markdown_table(self.rows) + "\n")
        ckpt.write_json(self.results / "metrics.json", _without_nan(metrics))  # last: with it the run is finished
        self._print_table(notes)

    def _print_table(self, notes: Sequence[str]) -> None:
        for note in notes:
            print(f"note: {note}")
        chosen = ", ".join(f"{stage} epoch {epoch}" for stage, epoch in self.selected.items())
        print(f"\ntested: {chosen}\n\n{text_table(self.rows)}\n\nrun folder: {self.folder}")
        if self.results != self.folder:
            print(f"other keys than the run's; results: {self.results}")

    def execute(self) -> RunResult:
        """Train the stages that are not done, test, print the table, and write the folder.

        A finished run that shall go on is not written: its table is printed. Where a test has other keys than the run in
        the folder, its results go to ``tests/…`` in it.

        Raises:
            UserError: The user's mistake, another process in the folder, or a file that cannot be written.
        """
        self._guard_folder()
        if self._finished is not None:
            if other_tests(self.folder, self.cfg) == self.folder:
                return self._show_finished(self._finished)
            self.stages = []
        fresh = not self.folder.exists()
        with folder_lock(self.folder):
            return self._execute(fresh)

    def _execute(self, fresh: bool) -> RunResult:
        if not self.stages:
            self.results = other_tests(self.folder, self.cfg)
        self._write_context()
        with logged(self.results / ("train.log" if self.stages else "test.log")):
            print(f"run folder: {self.folder} (configuration: config.yml)")
            for note in schedule_notes(self.cfg) if self.stages else []:
                print(f"note: {note}")
            try:
                self._build_image_model()
            except UserError:
                if fresh:
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise
            if 1 in self.stages:
                self._train_image()
            self._load_image()
            if 2 in self.stages:
                self._train_second()
            second = 2 in self.cfg.train.stages and self.stages != [1]
            self._prepare_test(second=second)
            kept = self._test(with_relation=self.uses_relation and second)
            self._finish()
        return RunResult(self.rows, self.history, self.folder, kept)


def open_run(folder: Path | str, overrides: Sequence[str] = ()) -> Run:
    """Open a trained run to look into its image model: engine and the tested stage-1 weights, in evaluation mode.

    Of a run of single images no training data is needed: its checkpoint says what there is to know of them, and the test
    sets are opened when ``datamanager.test_dataset`` is asked for one.

    Args:
        folder: The run's folder (``data.save_dir``); nothing in it is changed but its feature bank.
        overrides: ``KEY VALUE …`` over the run's configuration, such as another ``data.root``.

    Raises:
        UserError: The folder holds no trained run.
    """
    folder = Path(folder)
    if not (folder / "config.yml").is_file():
        raise UserError(f"'{folder}' holds no run ('{folder / 'config.yml'}' does not exist).")
    if "data.save_dir" in overrides[::2]:
        raise UserError(f"the run's folder is '{folder}'; leave out the override 'data.save_dir'.")
    cfg = load_config(folder / "config.yml", [*overrides, "data.save_dir", str(folder)])
    from ..graft.stage import build_run

    run = build_run(cfg, stages=[])
    run.inference = True
    run._guard_folder()
    with contextlib.redirect_stdout(io.StringIO()):  # the host describes the data sets at length
        run._build_image_model()
    run._load_image()
    run._prepare_test(second=2 in cfg.train.stages)
    run.engine.set_model_mode("eval")
    return run


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_ROW = {"target", "protocol", "method", "mAP", "mINP", "cmc", "parameters"}


def read_metrics(folder: Path | str) -> dict[str, Any]:
    """Read a run folder's ``metrics.json``.

    Raises:
        UserError: The folder holds no finished run, or the file is damaged.
    """
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise UserError(f"'{folder}' holds no finished run ('{path}' does not exist).")
    remedy = "test the run again by tools/train_net.py --eval-only, or put back a copy"
    metrics = read_json(path, what="metrics of a run", remedy=remedy)
    rows, history = metrics.get("rows"), metrics.get("history")
    whole = isinstance(rows, list) and rows and all(isinstance(row, dict) and _ROW <= row.keys() for row in rows)
    if not whole or not isinstance(history, dict) or not isinstance(metrics.get("selected_epoch"), dict):
        raise UserError(f"'{path}' is damaged (its table or history is missing); {remedy}.")
    return metrics


__all__ = ["EngineMixin", "Run", "RunResult", "environment", "logged", "open_run", "read_metrics", "set_seed"]
