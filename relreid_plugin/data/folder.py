"""Data sets in a folder of three: training images, queries, gallery (the layout of Market-1501 and its relatives)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .images import is_image_name
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

_WITH_CAMERA = re.compile(r"(?P<identity>.+?)_c(?P<camera>\d+)")
_CAMERA_ONLY = re.compile(r"(?:^|_)c(?P<camera>\d+)")


def is_market_folder(folder: str | Path) -> bool:
    """Whether ``folder`` has one folder for each of training images, queries and gallery."""
    return all(_split_folder(Path(folder), split) is not None for split in SPLIT_FOLDERS)


def read_market_folder(folder: str | Path) -> FolderSplits:
    """Read a data set in the layout of Market-1501.

    A file ``ID_cC_….jpg`` shows identity ``ID`` under camera C. Files ``ID_….jpg`` have no camera label; a data set has
    either the one or the other. A split folder without images but with folders in it is read as ``ID/….jpg``. Files that
    are no images are passed over; so is identity -1. Files come in sorted order.

    Args:
        folder: Holds ``bounding_box_train``, ``query`` and ``bounding_box_test`` (or ``train``, ``query``, ``gallery``).

    Raises:
        UserError: A split folder is missing or has no image, a name holds no identity, or only some names hold a camera.
    """
    folder = Path(folder)
    splits: dict[str, list[Record]] = {}
    for split, names in SPLIT_FOLDERS.items():
        place = _split_folder(folder, split)
        if place is None:
            raise UserError(f"data set '{folder}' has no folder '{names[0]}'; it should hold {LAYOUT}.")
        splits[split] = list(_read_split(place))
        if not splits[split]:
            raise UserError(f"folder '{place}' has no images; it should hold images named ID_cC_….jpg.")
    splits, notes = one_record_per_file(splits)
    everything = [record for records in splits.values() for record in records]
    with_camera = next((record for record in everything if record.camera is not None), None)
    without = next((record for record in everything if record.camera is None), None)
    if with_camera is not None and without is not None:
        raise UserError(
            f"data set '{folder}' mixes names with a camera ('{with_camera.path}') and without ('{without.path}'); name all "
            "files ID_cC_…, or none."
        )
    zero = any(record.camera == 0 for record in everything)
    numbered = number_identities(splits, first_camera=0 if zero else 1)
    numbered.notes[:0] = notes
    return numbered


def _split_folder(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in SPLIT_FOLDERS[split] if (folder / name).is_dir()), None)


def _read_split(place: Path) -> Iterator[Record]:
    with os.scandir(place) as entries:
        names = {entry.name: entry.is_dir() for entry in entries}
    images = sorted(name for name, is_dir in names.items() if not is_dir and is_image_name(name))
    for name in images:
        yield _parse(place / name)
    if images:
        return
    for identity in sorted(name for name, is_dir in names.items() if is_dir and not name.startswith(".")):
        for name in sorted(filter(is_image_name, os.listdir(place / identity))):
            match = _CAMERA_ONLY.search(name)
            yield Record(str(place / identity / name), identity, int(match["camera"]) if match else None)


def _parse(path: Path) -> Record:
    match = _WITH_CAMERA.match(path.stem)
    if match:
        return Record(str(path), match["identity"], int(match["camera"]))
    identity, separator, _ = path.stem.partition("_")
    if not identity or not separator:
        raise UserError(f"image '{path}' does not name its identity; name it ID_cC_….jpg, or ID_….jpg without a camera.")
    return Record(str(path), identity, None)
