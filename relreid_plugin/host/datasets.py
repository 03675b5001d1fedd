"""Data sets by name: the host's, the plug-in's, folders and tables; and opening them without surprises."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import one_per_file
from ..data.folder import LAYOUT as FOLDER_LAYOUT
from ..data.folder import SPLIT_FOLDERS, is_market_folder, read_market_folder
from ..data.labels import plain
from ..data.multimodal import DATASET_FOLDERS, detect_layout, find_dataset, find_folder
from ..data.names import name_pattern as read_name_pattern
from ..data.split import FolderSplits
from ..data.table import LAYOUT as TABLE_LAYOUT
from ..data.table import read_table
from ..errors import UserError, did_you_mean
from ..files import writing
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
        **kwargs: Handed to the host's ``ImageDataset``.

    Attributes:
        identity_names: What is written for every identity that is not itself the number that is written.
        camera_names: What is written for every camera number.
        notes: What a user should know of it.
    """

    def __init__(self, name: str, root: str = "", *, name_pattern: str = "", **kwargs: Any) -> None:
        place = find_local(name, root)
        if place is None:
            raise _unknown_dataset(name, root)
        splits = read_market_folder(place, read_name_pattern(name_pattern)) if place.is_dir() else read_table(place)
        self._open(name, place, splits, **kwargs)

    def _open(self, name: str, place: Path, splits: FolderSplits, **kwargs: Any) -> None:
        self.name = name
        self.dataset_dir = str(place)
        self.has_cameras = splits.has_cameras
        self.train_identities = splits.train_identities
        self.shared_identities = splits.shared_identities
        self.identity_names, self.camera_names, self.notes = splits.identity_names, splits.camera_names, splits.notes
        # identity 0 is Market-1501's distractor, unless it is asked for
        self._junk_pids = [-1] if any(pid == 0 for _, pid, _ in splits.query) else [0, -1]
        if kwargs.get("verbose", True) and kwargs.get("mode", "train") == "train":
            for note in splits.notes:
                print(f"{name}: {note}")
        super().__init__(splits.train, splits.query, splits.gallery, **kwargs)


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


def find_local(name: str, root: str | Path) -> Path | None:
    """Return the folder or CSV file that ``name`` stands for: ``<root>/<name>``, else ``<name>`` itself, else None."""
    for place in _local_places(name, root):
        if is_market_folder(place) or (place.is_file() and place.suffix.lower() == ".csv"):
            return place
    return None


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
    place = find_local(name, root)
    if place is None:
        raise _unknown_dataset(name, root)
    dataset_table("image")[name] = functools.partial(FolderDataset, name, name_pattern=name_pattern)


def dataset_place(name: str, root: str | Path, *, data_type: str = "image") -> str:
    """Return what is equal for two names of one data set: a registered name, or the real path of a folder or CSV file."""
    cls: Any = dataset_table(data_type).get(name)
    if not _is_local(cls):
        return name
    place = find_dataset(root, name) if cls.func is LocalMultimodal else find_local(name, root)
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


def open_dataset(name: str, *, root: str | Path, cache_dir: str | Path, data_type: str = "image", **kwargs: Any) -> Any:
    """Construct a data set of the host's table, in a reproducible order and with errors that name it.

    The host lists files in the order of the file system, numbers training identities in the order of a Python set, draws
    random splits with the generators as they happen to stand, and writes the splits beside the images. Here items come
    sorted by path, labels by identity, splits from a fixed seed, and a data set in a folder that must not be written to is
    opened through a folder of links.

    Args:
        name: A registered name.
        root: ``data.root``.
        cache_dir: Where folders of links and the embedded data set may be put if ``root`` must not be written to.
        data_type: image or video.
        **kwargs: Handed to the data set's class.

    Returns:
        The host's data set object, with the attributes ``train_identities`` (the name of every training label) and
        ``camera_names`` (what is written for every camera number).

    Raises:
        UserError: Files are missing, a split is empty, or a download failed.
    """
    cls = dataset_table(data_type)[name]
    top = absolute(root)
    real = _folder_of(cls, top)
    overlay: Path | None = None
    if isinstance(cls, type) and issubclass(cls, (EmbeddedPersons, EmbeddedVehicles)):
        if real is not None and not real.exists() and not _may_create(top):
            if not (absolute(cache_dir) / real.name).exists():
                print(f"{name}: '{top}' may not be written to; the data set is rendered into '{cache_dir}'")
            top = absolute(cache_dir)
    elif real is not None and real.is_dir() and _writes_splits(cls) and not is_writable(real):
        overlay = make_overlay(real, absolute(cache_dir) / "links")
        top = overlay.parent
    existed = real is None or real.exists()
    try:
        with fixed_seed(SPLIT_SEED):
            dataset = dataset_table(data_type)[name](root=str(top), **kwargs)
    except UserError:
        raise
    except Exception as error:
        if not existed and real is not None and real.is_dir() and not any(real.iterdir()):
            real.rmdir()
        raise _opening_failed(name, real, error, existed=existed) from error
    if overlay is not None and real is not None:
        _map_paths(dataset, overlay, real)
    if not hasattr(dataset, "camera_names"):
        dataset.camera_names = _camera_names(dataset)
    _put_in_order(dataset, relabel=not _writes_splits(cls))
    _one_per_file(name, dataset)
    for split in ("train", "query", "gallery"):
        if not getattr(dataset, split):
            raise UserError(f"data set '{name}' has no {split} images in '{dataset_folder(dataset, real)}'.")
    _require_split_files(name, dataset, real)
    return dataset


def dataset_folder(dataset: Any, real: Path | None) -> Path | str:
    """Return the folder that a data set was read from, for messages."""
    return real if real is not None else getattr(dataset, "dataset_dir", "?")


def _opening_failed(name: str, real: Path | None, error: Exception, *, existed: bool) -> UserError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if not existed:
        return UserError(
            f"data set '{name}' is not at '{real}' and torchreid could not download it ({type(error).__name__}: {reason}); "
            f"put it there by hand; {no_download_hint()}."
        )
    if isinstance(error, IndexError):
        return UserError(f"data set '{name}': a split in '{real}' has no images.")
    if isinstance(error, (FileNotFoundError, RuntimeError)) and "is not found" in reason:
        return UserError(f"data set '{name}' in '{real}' is not whole: {reason}; {no_download_hint()}.")
    odd = _file_being_read(error)
    if odd and isinstance(error, (AttributeError, AssertionError, ValueError)):
        return UserError(
            f"data set '{name}': the name of image '{odd}' does not follow the data set's pattern; rename or remove it, or "
            "read the folder as one of your own by its path and 'data.name_pattern'."
        )
    if isinstance(error, AttributeError) and "NoneType" in reason:
        reason = "a file's name does not follow the data set's pattern"
    if isinstance(error, ImportError):
        package = (error.name or reason).split(".")[0]
        return UserError(f"data set '{name}' needs the package '{package}'; run 'pip install {package}'.")
    where = "" if real is None else f" in '{real}'"
    return UserError(f"data set '{name}'{where} cannot be read ({type(error).__name__}: {reason}).")


def _file_being_read(error: Exception) -> str:
    """The image whose name one of the host's classes was taking apart when it failed, or empty."""
    trace = error.__traceback__
    found = ""
    while trace is not None:
        local = trace.tb_frame.f_locals
        names = [local[key] for key in ("img_path", "img_name", "fname") if isinstance(local.get(key), str)]
        found, trace = (names[0] if names else found), trace.tb_next
    return found


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators, and put them back as they were at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def _writes_splits(cls: Any) -> bool:
    """Whether a host's data set class writes split files: its module then has the host's ``write_json``."""
    return any(hasattr(sys.modules.get(base.__module__), "write_json") for base in getattr(cls, "__mro__", ()))


def is_writable(folder: str | Path) -> bool:
    """Whether this process may write into ``folder`` and its owner means it to be written to.

    The mode is looked at as well because the superuser may write anywhere.
    """
    return os.access(folder, os.W_OK) and bool(os.stat(folder).st_mode & stat.S_IWUSR)


def _may_create(folder: Path) -> bool:
    """Whether ``folder`` is, or can be made, a folder to write to."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and is_writable(folder)


def make_overlay(folder: Path, cache_dir: Path) -> Path:
    """Make a folder that holds a link to everything in ``folder`` and can be written to.

    What the host wrote there on an earlier run stays, unless the overlay was moved since: split files hold absolute paths.

    Args:
        folder: A data set's folder.
        cache_dir: Overlays are made below it.

    Returns:
        A folder of the same name as ``folder``.
    """
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    parent = cache_dir / digest
    overlay = parent / folder.name
    marker = parent / "location.txt"
    if overlay.exists() and (not marker.is_file() or marker.read_text(encoding="utf-8") != str(overlay)):
        shutil.rmtree(overlay)
    with writing(overlay):
        _fill_overlay(overlay, marker, folder)
    return overlay


def _fill_overlay(overlay: Path, marker: Path, folder: Path) -> None:
    overlay.mkdir(parents=True, exist_ok=True)
    marker.write_text(str(overlay), encoding="utf-8")
    for link in overlay.iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink()
    for entry in folder.iterdir():
        link = overlay / entry.name
        if not link.exists():
            with contextlib.suppress(FileExistsError):  # another process was quicker
                link.symlink_to(entry, target_is_directory=entry.is_dir())


def _map_paths(dataset: Any, overlay: Path, real: Path) -> None:
    """Replace paths through the overlay by the real ones, so that nothing depends on where the overlay lies."""
    links = {entry.name for entry in overlay.iterdir() if entry.is_symlink()}
    prefix = f"{overlay}{os.sep}"

    def to_real(path: str) -> str:
        if path.startswith(prefix) and path[len(prefix) :].split(os.sep, 1)[0] in links:
            return str(real / path[len(prefix) :])
        return path

    for split in ("train", "query", "gallery"):
        items = getattr(dataset, split)
        setattr(
            dataset,
            split,
            [((to_real(i[0]) if isinstance(i[0], str) else tuple(map(to_real, i[0]))), *i[1:]) for i in items],
        )
    dataset.data = getattr(dataset, dataset.mode)


def _put_in_order(dataset: Any, *, relabel: bool) -> None:
    """Sort items by path, number the training labels by identity, and note the identities."""
    for split in ("train", "query", "gallery"):
        getattr(dataset, split).sort(key=lambda item: (item[3], item[0], item[1], item[2]))
    if not hasattr(dataset, "train_identities") or len(dataset.train_identities) != dataset.num_train_pids:
        dataset.train_identities = _identities(dataset, relabel=relabel)
    dataset.data = getattr(dataset, dataset.mode)


def _one_per_file(name: str, dataset: Any) -> None:
    """Let the same real files of an identity count once in a split, and say so.

    Data sets of the plug-in did it when they were read; left are those of the host, and splits put together.
    """
    for split in ("train", "query", "gallery"):
        kept, notes = one_per_file(getattr(dataset, split), lambda item: item[0], lambda item: item[1], f"{split} items")
        setattr(dataset, split, kept)
        for note in notes:
            print(f"{name}: {note}")
    dataset.data = getattr(dataset, dataset.mode)


def _identities(dataset: Any, *, relabel: bool) -> list[str]:
    """Return the identity of every training label by the first part of its file names, or the label as text.

    Args:
        dataset: A host's data set whose labels are 0 … n-1.
        relabel: Renumber the labels in the order of the identities, where file names tell them.
    """
    labels = sorted({item[1] for item in dataset.train})
    names: dict[int, set[str]] = {label: set() for label in labels}
    for paths, label, *_ in dataset.train:
        match = _FIRST_TOKEN.match(os.path.basename(paths if isinstance(paths, str) else paths[0]))
        names[label].add(match[0] if match else "")
    tokens = {label: next(iter(found)) for label, found in names.items() if len(found) == 1}
    if len(tokens) != len(labels) or len(set(tokens.values())) != len(labels) or "" in tokens.values():
        return [str(label) for label in labels]
    if relabel and labels == list(range(len(labels))):
        numeric = all(token.isascii() and token.isdigit() for token in tokens.values())
        order = sorted(labels, key=lambda label: (int(tokens[label]) if numeric else 0, tokens[label]))
        new_label = {label: index for index, label in enumerate(order)}
        dataset.train = [(item[0], new_label[item[1]], *item[2:]) for item in dataset.train]
        labels = order
    return [tokens[label] for label in labels]


def _camera_names(dataset: Any) -> dict[int, str]:
    """Return what file names say for every camera number, or the numbers where names do not tell them apart."""
    names: dict[int, set[str]] = {}
    for paths, _, camid, *_ in (*dataset.train, *dataset.query, *dataset.gallery):
        match = _CAMERA.search(os.path.basename(paths if isinstance(paths, str) else paths[0]))
        names.setdefault(int(camid), set()).add(plain(match[1]) if match else "")
    single = {camid: next(iter(found)) for camid, found in names.items() if len(found) == 1}
    if len(single) < len(names) or len(set(single.values())) < len(names) or "" in single.values():
        return {camid: str(camid) for camid in names}
    return single


def _require_split_files(name: str, dataset: Any, real: Path | None) -> None:
    """Raise when a split file names images by absolute paths of another place."""
    if real is None:
        return
    inside = f"{real}{os.sep}"
    for split in ("train", "query", "gallery"):
        item = getattr(dataset, split)[0]
        path = item[0] if isinstance(item[0], str) else item[0][0]
        if not os.path.exists(path) and not path.startswith(inside):
            raise UserError(
                f"data set '{name}': the split files (*.json) in '{real}' name images at another place ('{path}'); delete "
                "them, and they are made anew."
            )
