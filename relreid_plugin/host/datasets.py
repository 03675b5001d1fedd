"""Data sets by name: the host's, the plug-in's, folders and tables; and opening them without surprises."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

from ..data.folder import LAYOUT as FOLDER_LAYOUT
from ..data.folder import SPLIT_FOLDERS, has_split_folders, is_market_folder, read_market_folder
from ..data.multimodal import DATASET_FOLDERS, detect_layout, find_dataset, find_folder
from ..data.names import name_pattern as read_name_pattern
from ..data.split import FolderSplits
from ..data.table import LAYOUT as TABLE_LAYOUT
from ..data.unsplit import WITHOUT, is_local, read_local
from ..errors import UserError, did_you_mean
from ..methods import no_download_hint
from .combine import CombinesAll
from .layout import HOST
from .multimodal import PUBLISHED, EmbeddedVehicles, EmbeddedVehiclesTiny, LocalMultimodal, MultimodalDataset, Published
from .registry import available_video_datasets, dataset_table, register_image_dataset

SPLIT_SEED = 0
"""Seed of numpy's and Python's generators while the host draws a data set's random splits."""

_LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # what a data set needs, with alternatives, where its class prints, writes or fails before it checks for anything
    "cuhk01": (("cuhk01/campus", "cuhk01/CUHK01.zip"),),
    "cuhksysu": (("cuhksysu/cropped_images",),),
    "market1501": tuple(
        (f"market1501/Market-1501-v15.09.15/{part}", f"market1501/{part}")
        for part in ("bounding_box_train", "query", "bounding_box_test")
    ),
    "msmt17": (("msmt17/MSMT17_V1/train", "msmt17/MSMT17_V2/mask_train_v2"),),
    "university1652": (
        ("university1652/University-Release/train",),
        ("university1652/University-Release/test/query_drone",),
        ("university1652/University-Release/test/gallery_satellite",),
    ),
}
_FIRST_TOKEN = re.compile(r"[^_.]+")
_CAMERA = re.compile(r"_c(?:am)?(\d+)")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of the plug-in


class FolderDataset(CombinesAll, HOST.data.ImageDataset):  # type: ignore[misc,name-defined]
    """A data set in the layout of Market-1501, read by :func:`relreid_plugin.data.folder.read_market_folder`.

    Args:
        name: What ``data.sources`` and ``data.targets`` call it; looked for as ``<root>/<name>``, then as a path.
        root: ``data.root``.
        name_pattern: ``data.name_pattern``, for a folder.
        split_rule: ``data.split_rule``, for a folder or table without splits.
        **kwargs: Handed to the host's ``ImageDataset``.

    Attributes:
        identity_names: What is written for every identity that is not itself the number that is written.
        camera_names: What is written for every camera number.
        notes: What a user should know of it.
        rule: The rule that divided it; it may leave no training images.
    """

    def __init__(self, name: str, root: str = "", *, name_pattern: str = "", split_rule: str = "", **kwargs: Any) -> None:
        place = find_local(name, root, split_rule)
        if place is None:
            raise _unknown_dataset(name, root)
        train = kwargs.get("mode", "train") == "train"
        splits = read_local(place, read_name_pattern(name_pattern), split_rule, train=train)
        self._open(name, place, splits, **kwargs)

    def _open(self, name: str, place: Path, splits: FolderSplits, **kwargs: Any) -> None:
        self.name = name
        self.dataset_dir, self.rule = str(place), splits.rule
        self.has_cameras = splits.has_cameras
        self.train_identities = splits.train_identities
        self.shared_identities = splits.shared_identities
        self.identity_names, self.camera_names, self.notes = splits.identity_names, splits.camera_names, splits.notes
        # identity 0 is Market-1501's distractor, unless it is asked for
        self._junk_pids = [-1] if any(pid == 0 for _, pid, _ in splits.query) else [0, -1]
        if kwargs.get("verbose", True) and kwargs.get("mode", "train") == "train":
            for note in splits.notes:
                print(f"{name}: {note}")
        # the host's class takes no empty list
        super().__init__(splits.train or [("", 0, 0)], splits.query, splits.gallery, **kwargs)
        if not splits.train:
            self.train = []


class OccludedDuke(FolderDataset):
    """Occluded-DukeMTMC: occluded queries, whole and occluded gallery images (Miao et al., ICCV 2019).

    Layout: ``Occluded_Duke/{bounding_box_train,query,bounding_box_test}`` below ``data.root``.
    """

    dataset_dir = "Occluded_Duke"

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        place = absolute(root) / self.dataset_dir
        self._open("occluded_duke", place, read_market_folder(place), **kwargs)


class EmbeddedPersons(HOST.data.datasets.image.Market1501):  # type: ignore[misc,name-defined]
    """The data set that the package renders itself; written on first use and read by the host's Market-1501 reader."""

    dataset_dir = "embedded_persons"

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        from ..data.embedded import ensure_embedded

        ensure_embedded(type(self).dataset_dir, root)
        super().__init__(root=root, **kwargs)


class EmbeddedPersonsTiny(EmbeddedPersons):
    """A small one of the same kind, for trying things."""

    dataset_dir = "embedded_persons_tiny"


def register_datasets() -> None:
    """Add the plug-in's data sets to the host's table; calling it again does nothing."""
    register_image_dataset("embedded_persons", EmbeddedPersons)
    register_image_dataset("embedded_persons_tiny", EmbeddedPersonsTiny)
    register_image_dataset("occluded_duke", OccludedDuke)
    register_image_dataset("embedded_vehicles", EmbeddedVehicles)
    register_image_dataset("embedded_vehicles_tiny", EmbeddedVehiclesTiny)
    for cls in PUBLISHED:
        register_image_dataset(cls.key, cls)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def absolute(path: str | Path) -> Path:
    """Return ``path`` as the host's classes write it: absolute, home folder filled in, links left as they are."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def find_local(name: str, root: str | Path, split_rule: str = "") -> Path | None:
    """Return the folder or CSV file that ``name`` stands for: ``<root>/<name>``, else ``<name>`` itself, else None.

    With ``split_rule``, a folder without splits counts.
    """
    return next((place for place in _local_places(name, root) if is_local(place, split_rule)), None)


def _local_places(name: str, root: str | Path) -> list[Path]:
    places = [absolute(Path(root).expanduser() / name), absolute(name)]
    return places[:1] if places[0] == places[1] else places


def resolve_dataset(
    name: str,
    root: str | Path,
    *,
    data_type: str = "image",
    download: bool = False,
    multimodal: bool = False,
    name_pattern: str = "",
    split_rule: str = "",
) -> None:
    """Make sure that the host knows ``name`` and that the data set is there.

    A name that is not registered is looked for as a folder in the layout of Market-1501 or a CSV file, ``<root>/<name>`` or
    ``<name>``, and registered.

    Args:
        name: A name in ``data.sources`` or ``data.targets``.
        root: ``data.root``.
        data_type: image or video.
        download: Leave a missing data set to the host, which tries to download it.
        multimodal: A folder or CSV file has several images per sample.
        name_pattern: ``data.name_pattern``; how the files of a folder that is not registered are named.
        split_rule: ``data.split_rule``; how a folder or CSV file without splits is divided.

    Raises:
        UserError: The name matches nothing, or the data set's folder is missing or incomplete; the sentence says where it
            was looked for, how it should look, and what runs without any download.
    """
    table = dataset_table(data_type)
    if name in table and not _is_local(table[name]):
        own = own_namesake(name, table[name], root, multimodal=multimodal) if data_type == "image" else ""
        if not download:
            hint = no_download_hint(several=multimodal)
            _require_folder(name, table[name], root, f"{hint}; {own}" if own else hint)
        if own:
            print(f"note: {own}")
        return
    if multimodal:
        _require_multimodal(name, root)
        dataset_table("image")[name] = functools.partial(LocalMultimodal, name, name_pattern=name_pattern)
        return
    if data_type != "image":
        raise UserError(f"'{name}' is no known {data_type} data set{did_you_mean(name, available_video_datasets())}")
    place = find_local(name, root, split_rule)
    if place is None:
        raise _unknown_dataset(name, root)
    options = {"name_pattern": name_pattern, "split_rule": split_rule}
    dataset_table("image")[name] = functools.partial(FolderDataset, name, **options)


def dataset_place(name: str, root: str | Path, *, data_type: str = "image") -> str:
    """Return what is equal for two names of one data set: a registered name, or the real path of a folder or CSV file."""
    cls: Any = dataset_table(data_type).get(name)
    if not _is_local(cls):
        return name
    if cls.func is LocalMultimodal:
        return os.path.realpath(find_dataset(root, name))
    place = find_local(name, root, cls.keywords.get("split_rule", ""))
    return os.path.realpath(place) if place is not None else name


def _is_local(cls: Any) -> bool:
    """Whether a registered data set is a folder or table that was found by its name."""
    return isinstance(cls, functools.partial) and cls.func in (FolderDataset, LocalMultimodal)


def own_namesake(name: str, cls: Any, root: str | Path, *, multimodal: bool = False) -> str:
    """Say that a folder or table of the user's has the name of a registered data set, and how to name it; else empty.

    Args:
        name: The registered name.
        cls: The data set's class.
        root: ``data.root``.
        multimodal: The run takes data sets with several images per sample.
    """
    top = absolute(root)
    folder = _folder_of(cls, top)
    if not isinstance(cls, type) or issubclass(cls, (EmbeddedPersons, EmbeddedVehicles)):
        return ""
    read = set() if folder is None else {top / part for parts in _wanted_parts(name, cls, top, folder) for part in parts}
    for place in _local_places(name, root):
        is_own = detect_layout(place) is not None if multimodal else is_market_folder(place)
        if place == folder and place.is_dir() and any(path in read and path.exists() for path in place.iterdir()):
            is_own = False
        table = place.with_name(f"{place.name}.csv")
        own = place if is_own else table if table.is_file() else None
        if own is not None:
            break
    else:
        return ""
    short = f"./{own.name}"
    spelled = short if next((p for p in _local_places(short, root) if p.exists()), None) == own else str(own)
    return (
        f"'{name}' is the name of a registered data set, which is meant, and not the {'folder' if is_own else 'table'} "
        f"'{own}'; to mean that one, name it '{spelled}'"
    )


def _unknown_dataset(name: str, root: str | Path) -> UserError:
    places = _local_places(name, root)
    looked = " and ".join(f"'{place}'" for place in places)
    names = [known for known, cls in dataset_table("image").items() if not _is_local(cls)]
    guess = did_you_mean(name, names).lstrip("; ")
    there = [place for place in places if place.is_dir()]
    if there and not has_split_folders(there[0]):
        return UserError(f"data set '{name}': '{there[0]}' has no splits; {WITHOUT}.")
    if there:
        missing = [names[0] for split, names in SPLIT_FOLDERS.items() if not _has_split(there[0], split)]
        looked = f"'{there[0]}', which lacks {', '.join(missing)}"
    return UserError(
        f"data set '{name}' is neither registered ({guess}) nor found at {looked}; it should be a folder with "
        f"{FOLDER_LAYOUT}, or {TABLE_LAYOUT}; {no_download_hint()}."
    )


def _require_multimodal(name: str, root: str | Path) -> None:
    """Raise a :class:`UserError` when there is no folder or CSV file of that name."""
    try:
        place = find_dataset(root, name)
    except UserError:
        pass
    else:
        if place.is_dir() or place.suffix.lower() == ".csv":
            return
    names = [
        known
        for known, cls in dataset_table("image").items()
        if isinstance(cls, type) and issubclass(cls, MultimodalDataset)
    ]
    looked = " and ".join(f"'{place}'" for place in _local_places(name, root))
    raise UserError(
        f"data set '{name}' is neither registered ({did_you_mean(name, names).lstrip('; ')}) nor a folder or CSV file at "
        f"{looked}; it should be a folder in the layout of rgbnt100, rgbnt201, msvr310 or wmveid863, or with "
        f"{{train,query,gallery}}/{{R,N,T}}/ID, or a CSV file with the columns pid, split and one per modality; "
        f"{no_download_hint(several=True)}."
    )


def _has_split(folder: Path, split: str) -> bool:
    return any((folder / name).is_dir() for name in SPLIT_FOLDERS[split])


class _RequiredFiles(Exception):
    """Carries what a data set's class was about to check for."""

    def __init__(self, files: list[str]) -> None:
        super().__init__()
        self.files = files


def _required_files(cls: Any, root: Path) -> list[str]:
    """Return the paths that a host's data set class checks for, by letting it run up to its check.

    The class is asked through a subclass whose download does nothing and whose check hands its list over, so that it neither
    reads nor writes.
    """

    def no_download(*_args: Any) -> None:
        return None

    def hand_over(_self: Any, required_files: str | list[str]) -> None:
        raise _RequiredFiles([required_files] if isinstance(required_files, str) else list(required_files))

    probe = type("Probe", (cls,), {"download_dataset": no_download, "check_before_run": hand_over})
    try:
        probe(root=str(root), transform=lambda image: image)
    except _RequiredFiles as required:
        return required.files
    except (AssertionError, OSError):
        return []
    return []


def _folder_of(cls: Any, top: Path) -> Path | None:
    """Return the folder of a registered data set below ``data.root``, there or not; None where its class does not say."""
    if isinstance(cls, type) and issubclass(cls, Published):
        names = DATASET_FOLDERS[cls.key]
        try:
            return find_folder(top, names)
        except UserError:
            return top / names[0]
    name = getattr(cls, "dataset_dir", None)
    return top / name if isinstance(name, str) else None


def _wanted_parts(name: str, cls: Any, top: Path, folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return what a registered data set needs, relative to ``top``: for each part its alternatives."""
    folder_name = os.path.relpath(folder, top)
    if name in _LAYOUTS:
        return _LAYOUTS[name]
    if issubclass(cls, Published):
        return tuple(tuple(f"{folder_name}/{part}" for part in parts) for parts in cls.parts)
    if issubclass(cls, FolderDataset):
        return tuple(tuple(f"{folder_name}/{part}" for part in parts) for parts in SPLIT_FOLDERS.values())
    return tuple((os.path.relpath(path, top),) for path in _required_files(cls, top))


def _require_folder(name: str, cls: Any, root: str | Path, hint: str) -> None:
    """Raise a :class:`UserError` when a registered data set is not there or not whole; ``hint`` ends its sentence."""
    top = absolute(root)
    folder = _folder_of(cls, top)
    if not isinstance(cls, type) or folder is None or issubclass(cls, (EmbeddedPersons, EmbeddedVehicles)):
        return
    download = "'data.download True' lets torchreid try to download it, and "
    others: tuple[str, ...] = ()  # further names of the folder
    folder_name = os.path.relpath(folder, top)
    if issubclass(cls, Published):
        others, download = DATASET_FOLDERS[cls.key][1:], ""
    wanted = _wanted_parts(name, cls, top, folder)
    missing = [parts for parts in wanted if not any((top / part).exists() for part in parts)]
    if folder.is_dir() and not missing:
        return
    where = f"'{top / missing[0][0]}'" if folder.is_dir() else " or ".join(f"'{top / n}'" for n in (folder_name, *others))
    below = [" or ".join(parts) for parts in dict.fromkeys(wanted) if parts != (folder_name,)]
    layout = f"; below data.root '{top}' it should hold {', '.join(below)}" if below else ""
    raise UserError(f"data set '{name}' was looked for at {where}, which does not exist{layout}; {download}{hint}.")


# ---------------------------------------------------------------------------------------------------------------------
# Opening
