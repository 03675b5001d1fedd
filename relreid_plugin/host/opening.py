"""Opening the host's data sets: files in order, written nowhere they must not be, failures as sentences."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import one_per_file
from ..data.labels import plain
from ..errors import PACKAGES, UserError
from ..files import writing
from ..methods import no_download_hint
from .datasets import _CAMERA, _FIRST_TOKEN, SPLIT_SEED, EmbeddedPersons, _folder_of, absolute
from .multimodal import EmbeddedVehicles
from .registry import dataset_table


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
        if not getattr(dataset, split) and not (split == "train" and getattr(dataset, "rule", None)):
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
        module = (error.name or reason).split(".")[0]
        package = PACKAGES.get(module, module)
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
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
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
