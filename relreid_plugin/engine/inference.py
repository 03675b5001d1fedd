"""The data manager of a trained run that is looked into, without the data that it was trained on."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config.defaults import get_default_config, merge_from_list, validate
from ..data.cameras import CameraTable
from ..data.checks import check_images
from ..data.labels import Label, as_label
from ..data.ranges import check_range
from ..errors import UserError, did_you_mean
from ..host import HOST, apply_patches, open_dataset, resolve_dataset
from ..host.multimodal import MultimodalDataset


class TestSets(Mapping[str, dict[str, list[tuple]]]):
    """The query and gallery items of test sets, each read when it is asked for, once.

    Args:
        names: ``data.targets``.
        read: Returns the items ``{"query": …, "gallery": …}`` of a name.
    """

    __test__ = False

    def __init__(self, names: Sequence[str], read: Callable[[str], dict[str, list[tuple]]]) -> None:
        self._names, self._read_one = names, read
        self._read: dict[str, dict[str, list[tuple]]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in list(self._names)

    def __getitem__(self, name: str) -> dict[str, list[tuple]]:
        if name not in self:
            raise KeyError(name)
        if name not in self._read:
            self._read[name] = self._read_one(name)
        return self._read[name]


SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "query": ("query",),
    "gallery": ("gallery",),
    "test": ("query", "gallery"),
    "all": ("train", "query", "gallery"),
}
"""What may be asked of a data set, and the splits that it means."""

READS = ("data", "market1501", "cuhk03")
"""Sections of the configuration that say how data sets are read."""

Placed = tuple[str, Label, Label, str]
"""An image file, its identity and its camera (numbers or names), and its split."""


def data_config(overrides: Sequence[str]) -> Any:
    """Return the defaults with ``KEY VALUE …`` over them, to read data sets for a model that is no run.

    Raises:
        UserError: A key that says nothing of data sets, or a value that cannot be.
    """
    cfg = get_default_config()
    for key in overrides[::2]:
        if key.split(".")[0] not in READS:
            raise UserError(f"'{key}' is a key of runs; of other models only data sets are read: {', '.join(READS)}.")
    merge_from_list(cfg, list(overrides))
    validate(cfg)
    return cfg


def open_images(cfg: Any, name: str, cache_dir: Path) -> Any:
    """Open a data set of single images: a registered name, a folder or a CSV file.

    Args:
        cfg: Its keys ``data`` say where and how.
        name: As in ``data.targets``.
        cache_dir: Where what cannot be written beside the data is put.

    Raises:
        UserError: It is not there, not whole, or has several images per sample.
    """
    own = {"name_pattern": cfg.data.name_pattern, "split_rule": cfg.data.split_rule}
    resolve_dataset(name, cfg.data.root, download=cfg.data.download, **own)
    with contextlib.redirect_stdout(io.StringIO()):  # the host describes the data set at length
        dataset = open_dataset(
            name,
            root=cfg.data.root,
            cache_dir=cache_dir,
            mode="query",
            combineall=cfg.data.combineall,
            split_id=cfg.data.split_id,
            cuhk03_labeled=cfg.cuhk03.labeled_images,
            cuhk03_classic_split=cfg.cuhk03.classic_split,
            market1501_500k=cfg.market1501.use_500k_distractors,
        )
    if isinstance(dataset, MultimodalDataset):
        raise UserError(f"data set '{name}' has several images per sample; name one with single images.")
    if getattr(dataset, "rule", ""):  # who is tested is of the plug-in's making
        for note in dataset.notes:
            print(f"note: {name}: {note}")
    return dataset


def labelled_images(cfg: Any, name: str, cache_dir: Path, split: str) -> list[Placed]:
    """Return images of a data set with identities and cameras as they are written, where the data set tells.

    Args:
        cfg: Its keys ``data`` say where and how.
        name: As in ``data.targets``.
        cache_dir: Where what cannot be written beside the data is put.
        split: One of :data:`SPLITS`.

    Raises:
        UserError: No such data set, or images that are in two splits.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split '{split}'{did_you_mean(split, SPLITS)}")
    dataset = open_images(cfg, name, cache_dir)
    written = getattr(dataset, "identity_names", None)
    tested = {pid: as_label(text) for pid, text in (written or {}).items()}
    # the host numbers what is trained on and what is tested apart from each other
    trained = [as_label(text if written is not None else f"train {text}") for text in dataset.train_identities]
    cameras = {camid: as_label(text) for camid, text in getattr(dataset, "camera_names", {}).items()}
    cameras = {camid: label for camid, label in cameras.items() if isinstance(label, str)}
    found: list[Placed] = []
    for part in SPLITS[split]:
        for path, pid, camid, *_ in getattr(dataset, part):
            identity = trained[pid] if part == "train" else tested.get(pid, int(pid))
            found.append((path, identity, cameras.get(camid, int(camid)), part))
    twice = len(found) - len({path for path, *_ in found})
    if twice:
        raise UserError(
            f"{twice} images of data set '{name}' are in two of its splits ({', '.join(SPLITS[split])}); extract one split "
            "at a time."
        )
    return found


def _open_test_set(cfg: Any, manager: Any, cache_dir: Path, name: str) -> dict[str, list[tuple]]:
    """The items of one of ``data.targets``; the names of its cameras and identities go to the manager."""
    dataset = open_images(cfg, name, cache_dir)
    check_images(
        [item[0] for item in dataset.query + dataset.gallery],
        cfg.data.check_images,
        pixel_range=check_range("data.pixel_range", cfg.data.pixel_range),
    )
    manager.camera_names[name] = dict(getattr(dataset, "camera_names", {}))
    manager.identity_names[name] = dict(getattr(dataset, "identity_names", {}))
    return {"query": dataset.query, "gallery": dataset.gallery}


def data_of_checkpoint(cfg: Any, state: dict[str, Any], cache_dir: Path) -> Any:
    """Return the host's data manager for inference: what a stage-1 checkpoint says of the training data, without the data.

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
    manager.cameras = cameras_of_checkpoint(cfg, state)
    manager.num_cameras = manager.cameras.size
    manager.camera_names, manager.identity_names = {}, {}
    manager.train_loader, manager.test_loader = torch.utils.data.DataLoader(images), {}
    manager.val_query, manager.val_gallery = [], []
    manager.test_dataset = TestSets(cfg.data.targets, partial(_open_test_set, cfg, manager, cache_dir))
    return manager


def cameras_of_checkpoint(cfg: Any, state: dict[str, Any]) -> CameraTable:
    """Return the rows of a stage-1 checkpoint's camera embedding."""
    if "cameras" in state:
        return CameraTable.of(state["cameras"], cfg.data.sources)
    table = state["state_dict"].get("cameras.table")
    return CameraTable(None, 0 if table is None else len(table), tuple(cfg.data.sources))
