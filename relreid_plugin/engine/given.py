"""Runs on features that are there already (``data.type features``): no picture is read, everything else is as with images.

Stage 1 is either nothing (``model.name features``: the features as they are) or the BNNeck baseline with the features in
place of a backbone's (``model.name bnneck_baseline``).

Shape letters: N images, B images of a batch, d width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbones.baseline import GivenFeatures, baseline_on
from ..config.targets import PAIR, pair_targets
from ..data.audit import TestSet, audit_splits, check_matches, shared_identities_note
from ..data.cameras import CameraTable
from ..errors import UserError
from ..features.divided import divided
from ..features.files import read
from ..features.pairs import test_set
from ..features.sets import Features
from ..host import build_optimizer, build_scheduler, complete_manager, make_loader
from ..methods import BASELINE
from . import checkpoint as ckpt
from .base import EngineMixin
from .image import build_image_engine
from .inference import TestSets
from .models import adapt, configured
from .network import Network, View

if TYPE_CHECKING:
    from .runner import Run

GIVEN = "features"
"""``model.name`` of the features as they are."""
DEFAULT_RULE = "image"
"""How a test file without splits is divided where no rule is named."""
SIDES = ("query", "gallery")


class FeatureRow(str):
    """What stands for an image whose feature is given: its file's path, or the row's place, with the vector.

    Attributes:
        vector: (d,) float32.
    """

    vector: Tensor

    def fingerprint(self) -> bytes:
        """Return what changes with the feature."""
        return self.vector.numpy().tobytes()


def records_of(features: Features, pids: Sequence[int] | None = None) -> list[tuple[FeatureRow, int, int, int]]:
    """Return features with paths as the host's tuples ``(source, pid, camid, dsetid)``."""
    labels = features.pids.tolist() if pids is None else pids
    out = []
    for place, vector, pid, camid in zip(features.paths, features.features, labels, features.camids.tolist()):
        row = FeatureRow(place)
        row.vector = vector
        out.append((row, int(pid), int(camid), 0))
    return out


class FeatureRows(Dataset):
    """Records of given features, with what the host's loaders and samplers read of a data set.

    Args:
        train: Training records; they are also what is loaded, until ``data`` is replaced.
        num_train_pids: Training identities.
    """

    transform: Callable[..., Any] | None = None
    k_tfm = 1
    pixel_range = None

    def __init__(self, train: list[tuple], num_train_pids: int) -> None:
        self.train = self.data = train
        self.num_train_pids = num_train_pids
        self.num_train_cams = len({item[2] for item in train})

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, pid, camid, dsetid = self.data[index]
        return {"img": source.vector, "pid": pid, "camid": camid, "impath": str(source), "dsetid": dsetid}


class FeatureManager:
    """What the host's engines read of a data manager, over given features.

    Attributes:
        train_loader, test_loader, test_dataset, label_map, cameras, …: See
            :func:`relreid_plugin.host.datamanager.build_datamanager`.
        dim: Width d.
    """

    def __init__(self, cfg: Any, train: FeatureRows, cameras: CameraTable) -> None:
        self.sources, self.targets = list(cfg.data.sources), list(cfg.data.targets)
        self.use_gpu = cfg.use_gpu
        self.transform_tr = self.transform_te = None
        self.height, self.width, self.data_type = cfg.data.height, cfg.data.width, "features"
        self.train_loader: Any = torch.utils.data.DataLoader(train) if not len(train) else None
        self._num_train_pids = train.num_train_pids
        self.test_loader: dict[str, Any] = {}
        self.test_dataset: Mapping[str, dict[str, list[tuple]]] = {}
        self.identity_names: dict[str, dict[int, str]] = {}
        self.camera_names: dict[str, dict[int, str]] = {}
        self.val_query: list[tuple] = []
        self.val_gallery: list[tuple] = []
        self.notes: list[str] = []
        self.label_map: dict[int, str] = {}
        self.cameras, self.num_cameras = cameras, cameras.size
        self.dim = 0

    @property
    def num_train_pids(self) -> int:
        """Training identities."""
        return self._num_train_pids


# --- reading ----------------------------------------------------------------------------------------------------------
def _place(cfg: Any, name: str) -> Path:
    """The file that a name means: as it is, or below ``data.root``."""
    path = Path(name)
    below = Path(cfg.data.root) / name
    return below if not path.exists() and below.exists() else path


def feature_places(cfg: Any, name: str) -> list[Path]:
    """Return the files that one of ``data.sources`` or ``data.targets`` means: one, or queries and gallery."""
    if PAIR in name and not _place(cfg, name).exists():
        return [_place(cfg, part) for part in name.split(PAIR)]
    return [_place(cfg, name)]


def _read(path: Path) -> Features:
    """Features with a path for every row, so that the same row is the same image wherever it is named."""
    found = read(path)
    return found if found.paths else replace(found, paths=[f"{path}:{row}" for row in range(len(found))])


def read_source(cfg: Any, name: str) -> tuple[Features, list[str]]:
    """Return the training features of one of ``data.sources``, and notes."""
    path = _place(cfg, name)
    found, note = _read(path).known()
    notes = [note] if note else []
    if found.splits is not None:
        return found.part("train"), notes
    if name in list(cfg.data.targets):
        parts, said = divided(found, path, cfg.data.split_rule or "identity", train=True)
        return found.take(parts["train"]), [*notes, said]
    return found, notes


def read_target(cfg: Any, name: str) -> tuple[Features, Features, list[str]]:
    """Return queries and gallery of one of ``data.targets``, and notes."""
    places = feature_places(cfg, name)
    if len(places) > 1:
        if len(places) != 2:
            raise UserError(f"'data.targets' names '{name}'; a test set is QUERY{PAIR}GALLERY, or one file.")
        pair = [_read(place) for place in places]
        own = [part.splits is not None and not (part.splits == split).all() for part, split in zip(pair, SIDES)]
        if any(own):
            raise UserError(
                f"'{places[own.index(True)]}' has queries and gallery of its own; name it as a test set of its own, or with "
                "'data.split_rule' where there are two."
            )
        data, notes = test_set(*pair)
        return data.query, data.gallery, notes
    path = places[0]
    found, note = _read(path).known()
    notes = [note] if note else []
    if found.splits is not None:
        query, gallery = found.part("query"), found.part("gallery")
    else:
        both = name in list(cfg.data.sources)
        rule = cfg.data.split_rule or ("identity" if both else DEFAULT_RULE)
        parts, said = divided(found, path, rule, train=both)
        query, gallery, notes = found.take(parts["query"]), found.take(parts["gallery"]), [*notes, said]
    data, more = test_set(query, gallery)
    return data.query, data.gallery, [*notes, *more]


def _records_of_target(cfg: Any, manager: FeatureManager, name: str) -> dict[str, list[tuple]]:
    """The records of one of ``data.targets``; names, notes and the width go to the manager."""
    query, gallery, notes = read_target(cfg, name)
    for part in (query, gallery):
        if manager.dim and part.dim != manager.dim:
            raise UserError(
                f"test set '{name}' has features of width {part.dim}, and the training features have width "
                f"{manager.dim}; one model makes all of them."
            )
    manager.dim = manager.dim or query.dim
    manager.identity_names[name] = {**query.identity_names, **gallery.identity_names}
    manager.camera_names[name] = {**query.camera_names, **gallery.camera_names}
    manager.notes += [f"{name}: {note}" for note in notes]
    return {"query": records_of(query), "gallery": records_of(gallery)}


def open_features(cfg: Any) -> FeatureManager:
    """Read the training and test features of a configuration.

    Raises:
        UserError: What cannot be read, trained on or scored.
    """
    records: list[tuple] = []
    identities: list[str] = []
    cameras: list[tuple[int, str, str]] = []
    numbers: list[set[int]] = []
    notes: list[str] = []
    dim, offset, labelled = 0, 0, True
    several = len(cfg.data.sources) > 1
    for number, name in enumerate(cfg.data.sources):
        found, more = read_source(cfg, name)
        notes += [f"{name}: {note}" for note in more]
        if dim and found.dim != dim:
            raise UserError(f"'data.sources': '{name}' has features of width {found.dim}, the one before {dim}.")
        dim = found.dim
        unique = sorted(set(found.pids.tolist()))
        numbers.append(set(unique))
        label = {pid: len(identities) + index for index, pid in enumerate(unique)}
        shown = [str(text) for text in found.shown(unique)]
        identities += [f"{name}/{text}" for text in shown] if several else shown
        own = {camera: offset + index for index, camera in enumerate(sorted(set(found.camids.tolist())))}
        labelled = labelled and found.has_cameras
        cameras += [(own[camera], name, str(found.shown_cameras([camera])[0])) for camera in own]
        offset += len(own)
        rows = records_of(found, [label[pid] for pid in found.pids.tolist()])
        records += [(source, pid, own[camera], number) for source, pid, camera, _ in rows]
    train = FeatureRows(records, len(identities))
    manager = FeatureManager(cfg, train, CameraTable.of((), list(cfg.data.sources)))
    manager.dim = dim
    manager.test_dataset = targets = TestSets(cfg.data.targets, partial(_records_of_target, cfg, manager))
    tests = {name: TestSet(**targets[name]) for name in targets}
    notes += manager.notes
    if cfg.data.check_leakage != "none":
        notes += audit_splits(records, identities, tests, check="path")
        for name, test in tests.items():
            tested = {item[1] for item in [*test.query, *test.gallery]}
            shared = sorted(set.union(*numbers) & tested) if numbers else []
            names = manager.identity_names[name]
            notes += shared_identities_note(name, [names.get(pid, str(pid)) for pid in shared])
    for name, test in tests.items():
        notes += check_matches(name, test)
    for note in notes:
        print(f"note: {note}")
    manager.notes = notes
    complete_manager(cfg, manager, train, identities)
    trained = {item[2] for item in train.train}
    manager.cameras = CameraTable.of([c for c in cameras if c[0] in trained] if labelled else (), list(cfg.data.sources))
    manager.num_cameras = manager.cameras.size
    for name, test in tests.items():
        manager.test_loader[name] = {
            split: make_loader(manager, list(items), lambda value: value, cfg.test.batch_size, 0)
            for split, items in zip(SIDES, (test.query, test.gallery))
        }
    return manager


def _of_checkpoint(cfg: Any, state: dict[str, Any]) -> FeatureManager:
    """What a checkpoint says of the training features, without them; test sets are read when they are asked for."""
    rows = FeatureRows([], int(state["num_classes"]))
    cameras = CameraTable.of(state.get("cameras", ()), list(cfg.data.sources))
    manager = FeatureManager(cfg, rows, cameras)
    manager.label_map = state["label_map"]
    manager.test_dataset = TestSets(cfg.data.targets, partial(_records_of_target, cfg, manager))
    manager.dim = int(state["input_dim"])
    return manager


# --- the network ------------------------------------------------------------------------------------------------------
class FeatureNetwork(Network):
    """Given features in place of a network's.

    Args:
        cfg: Configuration of the run.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._passes = False
        pair_targets(cfg)
        if cfg.model.name not in (GIVEN, BASELINE):
            raise UserError(
                f"'data.type features' has no pictures for 'model.name {cfg.model.name}'; choose {GIVEN} (the features as "
                f"they are) or {BASELINE} (a BNNeck head on them)."
            )
        if cfg.test.visrank:
            raise UserError("'test.visrank True' draws pictures, and 'data.type features' has none; set it to False.")

    @property
    def trains(self) -> bool:
        """Whether stage 1 has anything to train."""
        return bool(self.cfg.model.name != GIVEN)

    def open_data(self, run: Run) -> Any:
        """The features of sources and targets; for inference, without the former."""
        if run.inference:
            for stage in run.planned:
                path = stage.tested_path(run)
                if path.is_file():
                    return _of_checkpoint(self.cfg, ckpt.load(path, kind=stage.kind))
        return open_features(self.cfg)

    def static(self, run: Run) -> dict[str, Any]:
        """The width of the features beside what every checkpoint holds."""
        return {"input_dim": run.datamanager.dim}

    def build_model(self, run: Run, cfg: Any, *, pretrained: bool) -> nn.Module:
        """The BNNeck baseline on the features, or the features."""
        given = GivenFeatures(run.datamanager.dim)
        adapt(cfg, given)
        if not self.trains:
            return given
        configured(BASELINE, "softmax" if cfg.loss.name == "softmax" else "triplet", cfg)
        return baseline_on(given, run.datamanager.num_train_pids, cfg)

    def build_engine(self, run: Run) -> tuple[EngineMixin, dict[str, Any]]:
        """As of any image model; features as they are have nothing to optimise."""
        cfg = self.cfg
        if self.trains:
            return super().build_engine(run)
        if 1 in run.stages and cfg.train.max_epoch > 0:
            raise UserError(
                f"'model.name {GIVEN}' takes the features as they are, so stage 1 has nothing to train; set "
                f"'train.max_epoch 0', leave stage 1 out of 'train.stages', or choose 'model.name {BASELINE}'."
            )
        idle = nn.Linear(1, 1)
        optimizer = build_optimizer(idle, cfg)
        dim = run.datamanager.dim
        scheduler = build_scheduler(optimizer, cfg)
        return build_image_engine(cfg, run.datamanager, run.model, optimizer, scheduler, feature_dim=dim)

    def views(self) -> list[View]:
        """The head's features, and beside them those that were given."""
        given = View("features as given", "" if not self.trains else "-given", ("given",))
        return [View("BNNeck baseline"), given] if self.trains else [given]

    @contextlib.contextmanager
    def seeing(self, run: Run, view: View) -> Iterator[None]:
        """Let the features pass by the head where they are looked at as they were given."""
        engine: Any = run.engine
        self._passes = bool(view.subset)
        if self._passes:
            engine.extract_features = lambda features: features
        try:
            yield
        finally:
            self._passes = False
            engine.__dict__.pop("extract_features", None)

    def describe_input(self, run: Run) -> str:
        """Whether features pass by the head; the keys of banks hold the features themselves."""
        return f"features|{self._passes}"

    def require_pictures(self, run: Run) -> None:
        """There are none.

        Raises:
            UserError: Always.
        """
        raise UserError(f"run '{run.folder}' is one of given features ('data.type features'); it has no pictures.")

    def read_picture(self, run: Run, source: Any) -> Any:
        """There is none: see :meth:`require_pictures`."""
        self.require_pictures(run)
