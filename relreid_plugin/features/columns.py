"""What arrays of labels, paths and times may look like, and what their columns are called in files.

Shape letters: N images, d width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.files import printable
from ..data.labels import Label, as_label, check_numbers, stored_number
from ..data.rows import MISSING, SPLITS, as_seconds
from ..errors import UserError, did_you_mean, shown
from ..metrics.neighbours import normalise

COLUMNS: dict[str, tuple[str, ...]] = {
    "features": ("features", "feature", "feats", "feat", "vectors", "vector", "embeddings", "embedding", "x"),
    "identities": ("pids", "pid", "identities", "identity", "person_id", "labels", "label", "y"),
    "cameras": ("camids", "camid", "cameras", "camera", "camera_id", "cams", "cam"),
    "paths": ("paths", "path", "files", "file", "filenames", "filename", "image_path", "img_path", "impath"),
    "times": ("times", "time", "timestamps", "timestamp"),
    "splits": ("splits", "split"),
}
"""Every column of a file, and the names it may have there, in any case; the first one is written."""

_LIMIT = 10**18  # numbers of more digits than :data:`relreid_plugin.data.labels.MAX_DIGITS` are names


def find_columns(names: Sequence[str], where: str, prefix: str = "") -> dict[str, str]:
    """Return the name in a file of every column that it has.

    Args:
        names: The names in the file.
        where: The file, for the sentence.
        prefix: What the names begin with.

    Raises:
        UserError: A column is there twice, under one name or two.
    """
    found: dict[str, str] = {}
    for name in names:
        low = name.strip().casefold()
        if not low.startswith(prefix):
            continue
        column = next((column for column, known in COLUMNS.items() if low[len(prefix) :] in known), None)
        if column in found:
            raise UserError(
                f"'{where}' has {column} twice, as '{found[column]}' and as '{name}'; keep one of them, or rename the other."
            )
        if column is not None:
            found[column] = name
    return found


def _array(values: Any, what: str, called: str) -> np.ndarray:
    """Values as an array; a column of one is a vector."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    try:
        array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=None)
    except (ValueError, TypeError):
        raise UserError(f"{what} of {called} are no array: their rows have different lengths.") from None
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    return array


def vectors(values: Any, called: str, paths: Sequence[str] = ()) -> Tensor:
    """Return (N, d) float32 on the CPU.

    Raises:
        UserError: Another shape or kind, or rows that are not finite: how many, and the first.
    """
    if isinstance(values, Tensor):
        found = values.detach().cpu()
        kind = "complex" if found.is_complex() else ""
    else:
        try:
            array = np.asarray(values)
        except (ValueError, TypeError):
            raise UserError(f"{called} have rows of different lengths; (N, d) is needed, one row per image.") from None
        kind = "" if array.dtype.kind in "fiub" else _kind(array)
        if not kind:
            array = array if array.dtype.kind == "f" else array.astype(np.float64)
            with np.errstate(over="ignore"):  # becomes infinity, and is refused below
                array = array.astype(np.float32, copy=not array.flags.writeable)
            found = torch.from_numpy(np.ascontiguousarray(array))
    if kind:
        raise UserError(f"{called} hold {kind}; real numbers are needed.")
    if found.dim() != 2 or not found.shape[1]:
        raise UserError(f"{called} have the shape {tuple(found.shape)}; (N, d) is needed, one row per image.")
    found = found.float().contiguous()
    broken = (~torch.isfinite(found).all(dim=1)).nonzero().flatten()
    if len(broken):
        first = int(broken[0])
        where = f"row {first}" + (f", '{paths[first]}'" if first < len(paths) else "")
        raise UserError(
            f"{called}: {len(broken)} of {len(found)} rows hold NaN, infinity or more than float32 can (first: {where}); "
            "leave them out or extract them again."
        )
    return found


def _kind(array: np.ndarray) -> str:
    kinds = {"O": "Python objects", "U": "text", "S": "text", "c": "complex numbers", "M": "dates", "m": "time spans"}
    return kinds.get(array.dtype.kind, f"{array.dtype} values")


def _one_dimension(array: np.ndarray, what: str, called: str) -> np.ndarray:
    if array.ndim != 1:
        raise UserError(f"{what} of {called} have the shape {array.shape}; (N,) is needed, one per row.")
    return array


def label_column(
    values: Any, what: str, called: str, count: int, paths: Sequence[str] = ()
) -> tuple[np.ndarray, dict[int, str]]:
    """Return labels as (N,) int64, and the names that some of the numbers stand for.

    Numbers stand for themselves, also as text; what else is written is a name, whose number is the same in every process
    (:func:`relreid_plugin.data.labels.stored_number`). -1 is unknown.

    Args:
        values: (N,) integers, whole floats or text; ``None``: all unknown.
        what: ``identities`` or ``cameras``.
        called: What sentences call the features.
        count: N, for ``None``.
        paths: N files, for sentences; empty where they are unknown.

    Raises:
        UserError: Missing values, fractions, numbers below -1 or in digits other than 0-9, or other kinds, counted.
    """
    if values is None:
        return np.full(count, -1, np.int64), {}
    array = _one_dimension(_array(values, what, called), what, called)
    if array.dtype.kind == "O" or array.dtype.kind in "US":
        return _named(array, what, called, paths)
    if array.dtype.kind == "f":
        odd = ~(np.isfinite(array) & (array == np.floor(array)) & (np.abs(array) < 2**53))
        if odd.any():
            raise UserError(
                f"{what} of {called}: {int(odd.sum())} of {len(array)} are missing or no whole numbers (the first: "
                f"{array[odd][0]} in row {int(np.flatnonzero(odd)[0])}); write -1 where one is unknown."
            )
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise UserError(f"{what} of {called} are {_kind(array)}; whole numbers or names are needed.")
    if len(array) and int(array.max()) >= _LIMIT:
        return _named(array.astype(str), what, called, paths)
    array = array.astype(np.int64)
    _refuse_negative(array, what, called, paths)
    return array, {}


def _refuse_negative(array: np.ndarray, what: str, called: str, paths: Sequence[str]) -> None:
    low = array < -1
    if low.any():
        first = int(np.flatnonzero(low)[0])
        where = f" of '{paths[first]}'" if len(paths) == len(array) else ""
        raise UserError(
            f"{what} of {called}: {int(low.sum())} of {len(array)} are below -1 (the first: {int(array[first])}{where}); "
            "they are numbers from 0, or -1 where unknown."
        )


def _named(array: np.ndarray, what: str, called: str, paths: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """Labels that are text, or a mixture of text and numbers."""
    texts = _texts(array, what, called)
    unique, own = np.unique(texts, return_inverse=True)
    written = [str(text).strip() for text in unique]
    empty = np.array([not text or text in MISSING for text in written])[own.reshape(-1)] if len(array) else np.zeros(0, bool)
    if empty.any():
        row = int(np.flatnonzero(empty)[0])
        where = f"row {row}" + (f", '{printable(paths[row])}'" if len(paths) == len(array) else "")
        raise UserError(
            f"{what} of {called}: {int(empty.sum())} of {len(array)} are empty or stand for a missing value (the first: "
            f"{shown(str(texts[row]))} in {where}); write -1 where one is unknown."
        )
    labels = [as_label(text) for text in written]
    numbers = np.array([stored_number(label) for label in labels], dtype=np.int64)
    names: dict[int, str] = {}
    for number, label in zip(numbers.tolist(), labels):
        if isinstance(label, str) and names.setdefault(number, label) != label:
            raise UserError(f"'{label}' and '{names[number]}' cannot be told apart in {called}; rename one of them.")
    found = numbers[own.reshape(-1)] if len(array) else np.zeros(0, np.int64)
    _refuse_negative(found, what, called, paths)
    check_numbers(((text, called) for text in written), {"identities": "identity"}.get(what, "camera"))
    return found, names


def _texts(array: np.ndarray, what: str, called: str) -> np.ndarray:
    if array.dtype.kind == "U":
        return array
    if array.dtype.kind == "S":
        try:
            return np.char.decode(array, "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{what} of {called} are bytes that are no UTF-8 text; save them as text.") from None
    for row, value in enumerate(array.tolist()):
        if isinstance(value, bool) or not isinstance(value, (int, str, os.PathLike)):
            kind = "missing" if value is None or value != value else f"a {type(value).__name__}"
            raise UserError(f"{what} of {called}: row {row} is {kind}; text or whole numbers are needed in every row.")
    return np.array(
        [os.fspath(value) if isinstance(value, os.PathLike) else str(value) for value in array.tolist()], dtype=str
    )


def numbered(labels: np.ndarray | Sequence[Label], names: dict[int, str]) -> np.ndarray:
    """(n,) int64 numbers of labels; those of names are noted in ``names``."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        return labels.astype(np.int64).reshape(-1)
    numbers = np.empty(len(labels), np.int64)
    for row, label in enumerate(labels):
        numbers[row] = number = stored_number(label)
        if isinstance(label, str) and names.setdefault(number, label) != label:
            raise UserError(f"'{label}' and '{names[number]}' cannot be told apart in a store; rename one of them.")
    return numbers


def rows_to_add(
    features: Tensor,
    pids: np.ndarray | Sequence[Label] | None,
    camids: np.ndarray | Sequence[Label] | None,
    paths: Sequence[str] | None,
    splits: Sequence[str] | None,
    *,
    names: tuple[dict[int, str], dict[int, str]],
    unit: bool = False,
) -> tuple[Tensor, np.ndarray, np.ndarray, list[str], list[str]]:
    """Return the rows that a writer was given, each with all that belongs to it.

    Args:
        features: (n, d) of any length.
        pids, camids: (n,) identities and cameras, numbers or names; ``None``: unknown, -1.
        paths: n image files; ``None``: ''.
        splits: n times ``train``, ``query`` or ``gallery``; ``None``: ''.
        names: Names of identities and cameras by number; those that are given by name are added.
        unit: The features have unit length and stay as they are.

    Returns:
        (n, d) unit features in float32, identities, cameras, paths and splits.

    Raises:
        UserError: Labels of another number, or features that are not finite.
    """
    count = len(features)
    files = [""] * count if paths is None else [str(path) for path in paths]
    parts = [""] * count if splits is None else list(splits)
    labels = [
        np.full(count, -1, np.int64) if value is None else numbered(value, known)
        for value, known in zip((pids, camids), names)
    ]
    if {len(files), len(parts), len(labels[0]), len(labels[1])} != {count}:
        raise UserError(
            f"{count} features come with {len(labels[0])} identities, {len(labels[1])} cameras and {len(files)} paths."
        )
    rows = features.detach().cpu().float()
    rows = rows if unit else normalise(rows)
    finite = torch.isfinite(rows).all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise UserError(f"the feature of image '{files[bad]}' holds NaN or infinity; check the model's checkpoint.")
    return rows, labels[0], labels[1], files, parts


def path_column(values: Any, called: str) -> list[str]:
    """Return N paths as text; none where there are none.

    Raises:
        UserError: Something else than text.
    """
    if values is None:
        return []
    if isinstance(values, (list, tuple)) and all(type(value) is str for value in values):
        found = list(values)
    else:
        array = _array(values, "paths", called)
        if array.size and _one_dimension(array, "paths", called).dtype.kind not in "USO":
            raise UserError(f"paths of {called} are {_kind(array)}; text is needed.")
        found = [str(text) for text in _texts(array, "paths", called)] if array.size else []
    empty = sum(not path for path in found)
    if 0 < empty < len(found):
        raise UserError(
            f"{called}: {empty} of {len(found)} paths are empty (first: row {found.index('')}); give all of them, or none."
        )
    return [] if empty else found


def time_column(values: Any, called: str) -> np.ndarray | None:
    """Return (N,) float64 seconds; dates and times are seconds since 1970.

    Raises:
        UserError: Missing values, or text that is neither a number nor a date in ISO 8601, counted.
    """
    if values is None:
        return None
    array = _one_dimension(_array(values, "times", called), "times", called)
    if array.dtype.kind == "M":
        seconds = array.astype("datetime64[us]").astype(np.int64) / 1e6
        seconds[np.isnat(array)] = np.nan
    elif array.dtype.kind in "USO":
        seconds = np.array([as_seconds(str(text).strip()) for text in _texts(array, "times", called)], dtype=np.float64)
    elif array.dtype.kind in "fiu":
        seconds = array.astype(np.float64)
    else:
        raise UserError(f"times of {called} are {_kind(array)}; seconds or dates are needed.")
    missing = ~np.isfinite(seconds)
    if missing.any():
        row = int(np.flatnonzero(missing)[0])
        raise UserError(
            f"times of {called}: {int(missing.sum())} of {len(array)} are missing or no time (the first: "
            f"{shown(str(array[row]))} in row {row}); every row needs seconds or a date like 2024-05-01T12:30:00."
        )
    return seconds


def split_column(values: Any, called: str) -> np.ndarray | None:
    """Return (N,) ``train``, ``query`` or ``gallery``.

    Raises:
        UserError: Another word.
    """
    if values is None:
        return None
    array = _one_dimension(_array(values, "splits", called), "splits", called)
    if array.dtype.kind not in "USO":
        raise UserError(f"splits of {called} are {_kind(array)}; the words train, query and gallery are needed.")
    found = np.char.lower(np.char.strip(_texts(array, "splits", called))) if len(array) else np.zeros(0, "<U7")
    for word in np.unique(found):
        if word not in SPLITS:
            count = int((found == word).sum())
            raise UserError(f"{count} rows of {called} have the split '{word}'{did_you_mean(str(word), SPLITS)}")
    return found.astype("<U7")


def merged_names(parts: Sequence[Mapping[int, str]], what: str) -> dict[int, str]:
    """Return the names of several sets.

    Raises:
        UserError: A number stands for two names.
    """
    names: dict[int, str] = {}
    for part in parts:
        for number, name in part.items():
            if names.setdefault(number, name) != name:
                raise UserError(
                    f"number {number} stands for '{names[number]}' in one set of features and for '{name}' in another: "
                    f"their {what} cannot be compared; read both from files with names."
                )
    return names
