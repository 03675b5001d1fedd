"""Data sets whose samples are several images at once, in the host's terms: registry, samplers, sums, ``combineall``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.multimodal import (
    DATASET_FOLDERS,
    check_samples,
    find_dataset,
    find_folder,
    read_any,
    read_msvr310,
    read_rgbnt201,
    read_strips,
    read_views,
    read_wmveid863,
)
from ..data.multimodal_transforms import MultimodalTransform
from ..data.names import name_pattern as read_name_pattern
from ..data.ranges import Range, modality_ranges
from ..data.samples import MultimodalSplits
from ..errors import UserError
from .combine import CombinesAll
from .layout import HOST


class Strip(str):
    """Path of a strip that knows its views.

    Attributes:
        modalities: What the views are, from left to right.
    """

    modalities: tuple[str, ...]

    def __new__(cls, path: str, modalities: tuple[str, ...]) -> Strip:
        strip = super().__new__(cls, path)
        strip.modalities = modalities
        return strip

    def __getnewargs__(self) -> tuple[str, tuple[str, ...]]:  # type: ignore[override]
        return str(self), self.modalities


class Files(tuple):
    """Paths of a sample's images that know what they are.

    Attributes:
        modalities: One for every path.
    """

    modalities: tuple[str, ...]

    def __new__(cls, paths: Sequence[str], modalities: tuple[str, ...]) -> Files:
        files = super().__new__(cls, paths)
        files.modalities = modalities
        return files

    def __getnewargs__(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(self), self.modalities


class SampleTransform:
    """Read the views of a sample that are asked for, and make one tensor of them.

    Args:
        modalities: Modalities to read, in the order of the tensor.
        transform: Views to tensor.
        ranges: Per modality, what becomes black and white in files of more than 8 bits.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        transform: MultimodalTransform,
        ranges: Mapping[str, Range | None] | None = None,
    ) -> None:
        self.modalities, self.transform, self.ranges = tuple(modalities), transform, dict(ranges or {})

    def __call__(self, source: Strip | Files) -> Tensor:
        """Return (M, 3, h, w) of a sample."""
        plain = str(source) if isinstance(source, Strip) else tuple(source)
        return self.transform(read_views(plain, source.modalities, self.modalities, ranges=self.ranges))

    def __repr__(self) -> str:
        return f"SampleTransform({'+'.join(self.modalities)}, {self.transform})"


class MultimodalDataset(CombinesAll, HOST.data.ImageDataset):  # type: ignore[misc,name-defined]
    """A data set of the host whose items are ``(Strip | Files, pid, camid, dsetid)``.

    Items read ``img`` of shape (M, 3, h, w); ``impath`` is the strip or the first file. Its sum with another one is of the
    same class, so that several sources, ``combineall`` and the host's samplers work.

    Args:
        name: What ``data.sources`` and ``data.targets`` call it.
        place: Its folder or CSV file.
        splits: What a reader found.
        **kwargs: Handed to the host's ``ImageDataset``.
    """

    train: list[Any]
    num_train_pids: int
    num_train_cams: int

    def __init__(self, name: str, place: Path, splits: MultimodalSplits, **kwargs: Any) -> None:
        self.name, self.dataset_dir, self.group = name, str(place), splits.group
        self.modalities, self.has_cameras = splits.modalities, splits.has_cameras
        self.train_identities, self.notes = splits.train_identities, splits.notes
        self.shared_identities = splits.shared_identities
        self.identity_names = splits.identity_names
        if kwargs.get("verbose", True) and kwargs.get("mode", "train") == "train":
            for note in splits.notes:
                print(f"{name}: {note}")
        for split in ("train", "query", "gallery"):
            if not getattr(splits, split):
                raise UserError(f"data set '{name}' has no {split} samples in '{place}'.")
        parts = [_items(part, splits.modalities) for part in (splits.train, splits.query, splits.gallery)]
        super().__init__(*parts, **kwargs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a sample."""
        source, pid, camid, dsetid = self.data[index]
        transform: Callable[[Any], Any] | None = self.transform
        image = transform(source) if transform is not None else read_views(source, source.modalities)
        path = str(source) if isinstance(source, Strip) else source[0]
        return {"img": image, "pid": pid, "camid": camid, "impath": path, "dsetid": dsetid}

    def __add__(self, other: Any) -> MultimodalDataset:
        """Return a training set of both, identities, cameras and data sets numbered on."""
        if not isinstance(other, MultimodalDataset):
            raise UserError(
                f"data set '{getattr(other, 'name', type(other).__name__)}' has one image per sample and cannot be trained "
                f"on together with '{self.name}'."
            )
        cameras = 1 + max(item[2] for item in self.train)  # more than num_train_cams where numbers are left out
        more = [
            (source, pid + self.num_train_pids, camid + cameras, dsetid + self.num_datasets)
            for source, pid, camid, dsetid in other.train
        ]
        both = type(self).__new__(MultimodalDataset)
        both.name, both.dataset_dir, both.group = f"{self.name}+{other.name}", self.dataset_dir, self.group
        both.modalities, both.has_cameras = self.modalities, self.has_cameras and other.has_cameras
        both.notes = [*self.notes, *other.notes]
        options = {"transform": self.transform, "mode": self.mode, "combineall": False, "verbose": False}
        HOST.data.ImageDataset.__init__(both, [*self.train, *more], self.query, self.gallery, **options)
        return both


def _items(samples: Sequence[tuple[Any, int, int]], modalities: tuple[str, ...]) -> list[tuple[Any, int, int, int]]:
    return [
        (Strip(source, modalities) if isinstance(source, str) else Files(source, modalities), pid, camid, 0)
        for source, pid, camid in samples
    ]


class Published(MultimodalDataset):
    """A published data set; its class says where it is and how it is read.

    Attributes:
        key: Its name in the host's registry.
        parts: The folders that it needs below its own, with alternatives.
    """

    key = ""
    parts: tuple[tuple[str, ...], ...] = ()
    reader: Callable[[Path], MultimodalSplits]

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        place = find_folder(root, DATASET_FOLDERS[self.key])
        super().__init__(self.key, place, type(self).reader(place), **kwargs)


_STRIP_PARTS = tuple((f"rgbir/{part}", part) for part in ("bounding_box_train", "query", "bounding_box_test"))


class RGBNT100(Published):
    """100 vehicles in R, N, T (Li et al., AAAI 2020): strips of three views."""

    key, dataset_dir = "rgbnt100", "RGBNT100"
    parts = _STRIP_PARTS
    reader = staticmethod(lambda place: read_strips(place, ("R", "N", "T")))


class RGBN300(Published):
    """300 vehicles in R, N (Li et al., AAAI 2020): strips of two views."""

    key, dataset_dir = "rgbn300", "RGBN300"
    parts = _STRIP_PARTS
    reader = staticmethod(lambda place: read_strips(place, ("R", "N")))


class RGBNT201(Published):
    """201 persons in R, N, T (Zheng et al., AAAI 2021)."""

    key, dataset_dir = "rgbnt201", "RGBNT201"
    parts = (("train_171",), ("test",))
    reader = staticmethod(read_rgbnt201)


class MSVR310(Published):
    """310 vehicles in R, N, T (Zheng et al., 2022); a gallery image of the query's identity and scene is discarded."""

    key, dataset_dir = "msvr310", "MSVR310"
    parts = (("bounding_box_train",), ("query3",), ("bounding_box_test",))
    reader = staticmethod(read_msvr310)


class WMVEID863(Published):
    """863 vehicles in the wild in R, N, T."""

    key, dataset_dir = "wmveid863", "WMVEID863"
    parts = (("train",), ("query",), ("test",))
    reader = staticmethod(read_wmveid863)


class EmbeddedVehicles(MultimodalDataset):
    """The vehicles that the package renders itself, in the layout of RGBNT100; written on first use."""

    dataset_dir = "embedded_vehicles"

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        from ..data.embedded import ensure_embedded_vehicles

        name = type(self).dataset_dir
        place = ensure_embedded_vehicles(name, root)
        super().__init__(name, place, read_strips(place, ("R", "N", "T")), **kwargs)


class EmbeddedVehiclesTiny(EmbeddedVehicles):
    """A small one of the same kind, for trying things."""

    dataset_dir = "embedded_vehicles_tiny"


class LocalMultimodal(MultimodalDataset):
    """A folder of any of the layouts, or a CSV file, found by its name; ``name_pattern`` as for folders of single images."""

    def __init__(self, name: str, root: str = "", *, name_pattern: str = "", **kwargs: Any) -> None:
        place = find_dataset(root, name)
        super().__init__(name, place, read_any(place, pattern=read_name_pattern(name_pattern)), **kwargs)


PUBLISHED: tuple[type[Published], ...] = (RGBNT100, RGBN300, RGBNT201, MSVR310, WMVEID863)


def use_modalities(cfg: Any, manager: Any) -> None:
    """Let a data manager's data sets read the modalities of ``multimodal.modalities``, transformed together.

    The manager gets ``notes``: what a user should know of the test sets' protocols.

    Args:
        cfg: Configuration.
        manager: The host's data manager over multimodal data sets.

    Raises:
        UserError: A data set without one of the modalities, a file that cannot be used, or ``data.k_tfm`` above 1.
    """
    if cfg.data.k_tfm != 1:
        raise UserError(f"'model.name {cfg.model.name}' takes one augmented copy of a sample; set 'data.k_tfm 1'.")
    wanted = list(cfg.multimodal.modalities)
    testsets = [loader.dataset for pair in manager.test_loader.values() for loader in pair.values()]
    trainsets = [loader.dataset for loader in (manager.train_loader, manager.train_loader_t) if loader is not None]
    sources: dict[Any, tuple[str, ...]] = {}
    for dataset in [*trainsets, *testsets]:
        for source, *_ in dataset.data:
            missing = [name for name in wanted if name not in source.modalities]
            if missing:
                raise UserError(
                    f"key 'multimodal.modalities' asks for {', '.join(missing)}, but data set '{dataset.name}' has only "
                    f"{', '.join(source.modalities)}; take a selection of these."
                )
            sources[source] = source.modalities
    ranges = modality_ranges(wanted, cfg.multimodal.pixel_range)
    for modalities in dict.fromkeys(sources.values()):
        own = [source for source, names in sources.items() if names == modalities]
        plain = [str(source) if isinstance(source, Strip) else tuple(source) for source in own]
        for note in check_samples(plain, modalities, cfg.data.check_images, wanted=wanted, ranges=ranges):
            print(f"note: {note}")
    names = list(cfg.data.transforms)
    mean, std = (
        list(rows) * len(wanted) if len(rows) == 1 else list(rows) for rows in (cfg.multimodal.mean, cfg.multimodal.std)
    )
    for training in (True, False):
        transform = MultimodalTransform(cfg.data.height, cfg.data.width, names=names, mean=mean, std=std, training=training)
        setattr(manager, "transform_tr" if training else "transform_te", SampleTransform(wanted, transform, ranges))
    for dataset in trainsets:
        dataset.transform = manager.transform_tr
    for dataset in testsets:
        dataset.transform = manager.transform_te
    manager.notes = list(dict.fromkeys(f"{dataset.name}: {note}" for dataset in testsets for note in dataset.notes))
