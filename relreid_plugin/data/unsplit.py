"""Folders and tables of images with splits or without; the latter are divided by a rule that is written beside them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError, did_you_mean
from .files import one_per_file, walk_files
from .folder import check_read, has_split_folders, is_market_folder, read_market_folder, read_name
from .images import is_image_name
from .labels import check_numbers, plain
from .names import NamePattern, ReadName
from .parts import SEED, keep_parts, split_file
from .rules import RULES, TRAINS, divide
from .split import FolderSplits, Record, number_identities
from .table import numbered_table, read_rows

WITHOUT = (
    f"name the rule that divides it by 'data.split_rule' ({', '.join(RULES)}; {' and '.join(TRAINS)} leave images to train "
    "on), or make the folders bounding_box_train/, query/ and bounding_box_test/"
)
"""End of the sentence on a folder without splits where no rule is named."""


def is_local(place: Path, rule: str = "") -> bool:
    """Whether a place is a data set: a folder with splits, a CSV file, or, with a rule, a folder without splits."""
    if place.is_file():
        return place.suffix.lower() == ".csv"
    return is_market_folder(place) or bool(rule and place.is_dir() and not has_split_folders(place))


def read_local(place: Path, pattern: NamePattern | None = None, rule: str = "", *, train: bool = False) -> FolderSplits:
    """Read a data set that lies in a folder or a CSV file.

    Args:
        place: See :func:`is_local`.
        pattern: How the files of a folder are named.
        rule: One of :data:`~relreid_plugin.data.rules.RULES`, for what has no splits; else a note says that it does nothing.
        train: Training images are needed.

    Raises:
        UserError: See :func:`~relreid_plugin.data.folder.read_market_folder`, :func:`~relreid_plugin.data.table.read_rows`
            and :func:`divided_images`.
    """
    if rule and rule not in RULES:
        raise UserError(f"there is no rule '{rule}' to divide images by{did_you_mean(rule, RULES)}")
    if place.is_dir():
        if not is_market_folder(place):
            records, first_camera, notes = read_unsplit_folder(place, pattern)
            found = divided_images(place, records, first_camera, rule=rule, train=train)
            found.notes[:0] = notes
            return found
        found = read_market_folder(place, pattern)
    else:
        table = read_rows(place, unsplit=bool(rule))
        if "" in table.splits:
            return divided_images(place, table.splits[""], 0, table.times, rule=rule, train=train)
        found = numbered_table(table)
    if rule:
        found.notes.append(f"'data.split_rule {rule}' does nothing here: '{place}' has splits of its own")
    return found


def read_unsplit_folder(folder: Path, pattern: NamePattern | None = None) -> tuple[list[Record], int, list[str]]:
    """Read the images of a folder without splits, sorted by path.

    They lie in the folder itself, named ``ID_cC_….jpg`` or ``ID_….jpg``; or in a folder per identity, ``ID/….jpg``, whose
    names may have ``cC`` in them; or in one per identity and camera, ``ID/C/….jpg``. With a pattern names say everything.

    Args:
        folder: Hidden folders in it are passed over.
        pattern: How files are named instead.

    Returns:
        The records, the number of the first camera, 0 or 1, and notes on what is passed over.

    Raises:
        UserError: No image, images at several depths, or names as :func:`~relreid_plugin.data.folder.read_market_folder`
            refuses them.
    """
    paths, notes = walk_files(folder, is_image_name)
    found = [(Path(path), Path(path).relative_to(folder).parts) for path in paths]
    found = [(path, parts) for path, parts in found if not any(part.startswith(".") for part in parts)]
    if not found:
        raise UserError(f"folder '{folder}' has no images.")
    first, depth = found[0][0], len(found[0][1])
    for path, parts in found:
        if pattern is None and (len(parts) != depth or depth > 3):
            beside = f" and '{first}' elsewhere" if len(parts) != depth else ""
            raise UserError(
                f"'{path}' lies in {len(parts) - 1} folders{beside}; put all images into '{folder}' itself, into IDENTITY/ "
                "or into IDENTITY/CAMERA/, or say how they are named by 'data.name_pattern'."
            )
    names: list[ReadName] = []
    for path, parts in found:
        folders = ("", None) if depth == 1 or pattern is not None else (parts[0], parts[1] if depth == 3 else None)
        names.append(read_name(path, pattern, *folders))
    first_camera = check_read(folder, {"": names}, pattern)
    return [Record(name.path, name.identity, name.camera) for name in names], first_camera, notes


def divided_images(
    place: Path,
    records: Sequence[Record],
    first_camera: int,
    times: Sequence[float] | None = None,
    *,
    rule: str,
    train: bool = False,
) -> FolderSplits:
    """Divide images by a rule, or as they were divided before; identity -1 is left out.

    Args:
        place: The folder or table; the parts are written beside it (:func:`~relreid_plugin.data.parts.split_file`).
        records: All with a camera, or none.
        first_camera: Number of the first camera.
        times: Seconds of every record; NaN: unknown.
        rule: One of :data:`~relreid_plugin.data.rules.RULES`.
        train: Training images are needed.

    Returns:
        The splits, with a note that says how they came about. By ``image`` an image is query and gallery, by ``time``
        gallery and training image.

    Raises:
        UserError: See :func:`~relreid_plugin.data.rules.divide`; or the file of the parts is damaged or of other images.
    """
    what = f"'{place}'"
    if train and rule not in TRAINS:
        divide(np.zeros(0, np.int64), np.zeros(0, np.int64), None, rule, train=True, seed=SEED, what=what)
    check_numbers(((record.identity, record.path) for record in records), "identity")
    rows = [(record, row) for row, record in enumerate(records) if plain(record.identity) != "-1"]
    rows, notes = one_per_file(rows, lambda each: each[0].path, lambda each: plain(each[0].identity), "images")
    kept = [record for record, _ in rows]
    if rule == "time" and times is not None:
        missing = sum(not np.isfinite(times[row]) for _, row in rows)
        if missing:
            raise UserError(f"'data.split_rule time' needs times, and {missing} of {len(rows)} images of {what} have none.")
    seconds = np.array([times[row] for _, row in rows]) if times is not None and rule == "time" else None
    identities, cameras = [plain(each.identity) for each in kept], [plain(each.camera or "") for each in kept]
    pids = np.unique(np.array(identities), return_inverse=True)[1].reshape(-1)
    camids = np.unique(np.array(cameras), return_inverse=True)[1].reshape(-1)
    if kept and kept[0].camera is None:
        camids = np.full(len(kept), -1)
    base = place if place.is_dir() else place.parent
    names = [os.path.relpath(each.path, base).replace(os.sep, "/") for each in kept]
    sizes = _hash([(name, str(_size(each.path))) for name, each in zip(names, kept)])
    found = keep_parts(
        place,
        split_file(place, rule),
        rule=rule,
        labels=_hash([*zip(names, identities, cameras), *([] if seconds is None else [[str(s)] for s in seconds.tolist()])]),
        count=len(kept),
        what="images",
        make=lambda: divide(pids, camids, seconds, rule, train=rule in TRAINS, seed=SEED, what=what),
        more={"sizes": sizes},
    )
    notes.insert(0, found.said)
    if found.stored.get("sizes", sizes) != sizes:
        notes.append(f"images of '{place}' were changed since it was divided (files have other sizes); the parts are kept")
    parts = {name: [kept[row] for row in places] for name, places in found.parts.items()}
    numbered = number_identities(parts, first_camera=first_camera)
    numbered.notes[:0] = notes
    numbered.rule = rule
    return numbered


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _hash(rows: Sequence[Sequence[str]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update("\0".join(row).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:20]


__all__ = ["WITHOUT", "divided_images", "is_local", "read_local", "read_unsplit_folder"]
