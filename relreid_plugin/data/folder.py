"""Data sets in a folder of three: training images, queries, gallery (the layout of Market-1501 and its relatives)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .files import printable, walk_files
from .images import is_image_name
from .labels import plain
from .names import CAMERA_ONLY, PRESETS, WITH_CAMERA, NamePattern, ReadName, check_names
from .split import FolderSplits, Record, number_identities, one_record_per_file

SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {
    "train": ("bounding_box_train", "train"),
    "query": ("query",),
    "gallery": ("bounding_box_test", "gallery"),
}
LAYOUT = (
    "bounding_box_train/, query/ and bounding_box_test/ (or train/, query/, gallery/) with images named ID_cC_….jpg, ID the "
    "identity and C the camera"
)


def is_market_folder(folder: str | Path) -> bool:
    """Whether ``folder`` has one folder for each of training images, queries and gallery."""
    return all(_split_folder(Path(folder), split) is not None for split in SPLIT_FOLDERS)


def read_market_folder(folder: str | Path, pattern: NamePattern | None = None) -> FolderSplits:
    """Read a data set in the layout of Market-1501.

    A file ``ID_cC_….jpg`` shows identity ``ID`` under camera C. Files ``ID_….jpg`` have no camera label; a data set has
    either the one or the other. A split folder without images but with folders in it is read as ``ID/….jpg``. Files that
    are no images are passed over; so is identity -1. Files come in sorted order.

    Args:
        folder: Holds ``bounding_box_train``, ``query`` and ``bounding_box_test`` (or ``train``, ``query``, ``gallery``).
        pattern: How names are written instead; files in folders of a split folder are read by it as well.

    Raises:
        UserError: A split folder is missing or has no image, a name holds no identity or begins with a camera, only some
            names hold a camera, or a name does not match ``pattern``.
    """
    folder = Path(folder)
    read: dict[str, list[ReadName]] = {}
    passed_over: list[str] = []
    for split, names in SPLIT_FOLDERS.items():
        place = _split_folder(folder, split)
        if place is None:
            raise UserError(f"data set '{folder}' has no folder '{names[0]}'; it should hold {LAYOUT}.")
        read[split] = list(_read_split(place, pattern))
        passed_over += _passed_over(place, {name.path for name in read[split]})
        if not read[split]:
            form = "ID_cC_….jpg" if pattern is None else f"by 'data.name_pattern {pattern.key}'"
            raise UserError(f"folder '{place}' has no images; it should hold images named {form}.")
    first_camera = check_read(folder, read, pattern)
    records = {split: [Record(name.path, name.identity, name.camera) for name in names] for split, names in read.items()}
    splits, notes = one_record_per_file(records)
    numbered = number_identities(splits, first_camera=first_camera)
    numbered.notes[:0] = [*notes, *passed_over]
    return numbered


def check_read(folder: Path, read: dict[str, list[ReadName]], pattern: NamePattern | None) -> int:
    """Refuse names that cannot be meant as they were read; return the number of the first camera, 0 or 1.

    Raises:
        UserError: See :func:`read_market_folder`.
    """
    if pattern is None:
        check_names(read)
    everything = [name for names in read.values() for name in names]
    with_camera = next((name for name in everything if name.camera is not None), None)
    without = next((name for name in everything if name.camera is None), None)
    if with_camera is not None and without is not None:
        form = (
            "ID_cC_…, or none" if pattern is None else f"by 'data.name_pattern {pattern.key}', or leave the camera out of it"
        )
        raise UserError(
            f"data set '{folder}' mixes names with a camera ('{with_camera.path}') and without ('{without.path}'); name all "
            f"files {form}."
        )
    if pattern is not None and len(everything) > len(read) and len({name.identity for name in everything}) == 1:
        raise UserError(
            f"'data.name_pattern {pattern.key}' reads the same identity, '{everything[0].identity}', from all "
            f"{len(everything)} names of data set '{folder}' (the first is '{everything[0].path}'); change the pattern."
        )
    return 0 if any(name.camera is not None and plain(name.camera) == "0" for name in everything) else 1


def has_split_folders(folder: str | Path) -> bool:
    """Whether ``folder`` has any folder that is named like a split."""
    return any(_split_folder(Path(folder), split) is not None for split in SPLIT_FOLDERS)


def _split_folder(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in SPLIT_FOLDERS[split] if (folder / name).is_dir()), None)


def _read_split(place: Path, pattern: NamePattern | None) -> Iterator[ReadName]:
    with os.scandir(place) as entries:
        names = {entry.name: entry.is_dir() for entry in entries}
    images = sorted(name for name, is_dir in names.items() if not is_dir and is_image_name(name))
    for name in images:
        yield read_name(place / name, pattern)
    if images:
        return
    for identity in sorted(name for name, is_dir in names.items() if is_dir and not name.startswith(".")):
        for name in sorted(filter(is_image_name, os.listdir(place / identity))):
            file = place / identity / name
            yield read_name(file, pattern, identity)


def _passed_over(place: Path, read: set[str]) -> list[str]:
    """Sentences on pictures below a split folder that are not read: in other folders, or of other endings."""
    found, notes = walk_files(place, is_image_name)
    left = [
        path
        for path in found
        if path not in read and not any(p.startswith(".") for p in Path(path).relative_to(place).parts)
    ]
    if left:
        notes.append(
            f"{len(left)} image{'s' if len(left) > 1 else ''} below '{place}' {'are' if len(left) > 1 else 'is'} not read, "
            f"since {'they lie' if len(left) > 1 else 'it lies'} in other folders than the {len(read)} that are "
            f"('{printable(left[0])}'); put all of them side by side, or into a folder per identity"
        )
    return notes


def read_name(file: Path, pattern: NamePattern | None, identity: str = "", camera: str | None = None) -> ReadName:
    """Return what a file's name says.

    Args:
        file: The image.
        pattern: How it is named; it says everything.
        identity: Name of the identity's folder, else: the name begins with the identity, as in Market-1501.
        camera: Name of the camera's folder, else: the name may have ``cC`` in it.
    """
    if pattern is not None:
        return _by_pattern(file, pattern)
    if not identity:
        return _parse(file)
    match = CAMERA_ONLY.search(file.name) if camera is None else None
    return ReadName(str(file), identity, identity, match["camera"] if match else camera)


def _by_pattern(file: Path, pattern: NamePattern) -> ReadName:
    identity, camera = pattern.read(str(file))
    return ReadName(str(file), file.stem, identity, camera)


def _parse(path: Path) -> ReadName:
    match = WITH_CAMERA.match(path.stem)
    if match:
        return ReadName(str(path), path.stem, match["identity"], match["camera"])
    identity, separator, _ = path.stem.partition("_")
    if not identity or not separator:
        raise UserError(
            f"image '{path}' does not name its identity; name it ID_cC_….jpg, or ID_….jpg without a camera, or say how "
            f"names are written by 'data.name_pattern' ({', '.join(PRESETS)}, or a regular expression)."
        )
    return ReadName(str(path), path.stem, identity, None)
