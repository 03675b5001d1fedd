"""Features in files of any extractor: npz, npy with a CSV beside it, parquet, stores and the banks of runs.

A file's form is found from its first bytes, not from its name. Nothing in a file is executed: arrays of Python objects and
pickles are refused.

=====================  ==============================================================================================
``x.npz``              arrays named as in :data:`~relreid_plugin.features.columns.COLUMNS`, or ``query_…``, ``gallery_…``;
                       and ``model``, the fingerprint of what made them
``x.npy`` + ``x.csv``  the features, and a table with a row for each: ``path``, ``pid``, ``camid``, ``time``, ``split``
``x.parquet``          the same columns; ``features`` is a list per row, or there is a column of numbers per dimension
a store                a folder of ``relreid extract``
a run                  its folder (the test set's features) or a file in its ``bank``
=====================  ==============================================================================================

Shape letters: N images, d width.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.files import printable, why_not_regular
from ..data.rows import MISSING, SPLITS, Rows
from ..errors import UserError, needed
from ..files import atomic_file, csv_text
from .banks import FOLDER as BANKS
from .banks import read_bank, read_run
from .columns import COLUMNS, find_columns
from .sets import Features, joined
from .store import MANIFEST, SHARD_PATTERN, FeatureStore, StoreWriter

FORMS = "a store, a run, an npz file, an npy file with a CSV file beside it, or a parquet file"
_WIDE = re.compile(r"(?:f|x|v|dim|feat|feature|features|emb|embedding)?[_.]?(\d+)")
MODEL = "model"
"""Name of the array that holds the fingerprint of what made the features."""
_PARQUET_MODEL = b"relreid_model"
_ARRAY_ERRORS = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError)


def form_of(path: Path | str) -> str:
    """Return the form of a file or folder: ``npz``, ``npy``, ``parquet``, ``store``, ``run``, ``bank``; empty: none of them.

    A file whose name ends with ``.csv`` is the table of an npy file where one lies beside it.
    """
    path = Path(path)
    if path.is_dir():
        if (path / MANIFEST).is_file() or any(path.glob(f"{SHARD_PATTERN}/{MANIFEST}")):
            return "store"
        return "run" if (path / "config.yml").is_file() or (path / BANKS).is_dir() else ""
    if why_not_regular(path):
        return ""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError:
        return ""
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, NotImplementedError):
            return "npz" if path.suffix == ".npz" else "bank"
        return "bank" if any(name.endswith("/data.pkl") for name in names) else "npz"
    if path.suffix.lower() == ".csv" and path.with_suffix(".npy").is_file():
        return "npy"
    return ""


def read(path: Path | str, *, target: str = "") -> Features:
    """Read features from a file or folder, whatever form it has.

    Args:
        path: A store, a run, an npz file, an npy file with a CSV file beside it, or a parquet file.
        target: Of a run with several test sets: which.

    Raises:
        UserError: No such file, another form, or content that does not fit; the sentence names the file, and counts.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from relreid_plugin.features import read
        >>> name = tempfile.mkdtemp() + "/query.npz"
        >>> np.savez(name, features=np.eye(4), pids=[1, 1, 2, 2], camids=[1, 2, 1, 2])
        >>> len(read(name))
        4
    """
    path = Path(path)
    form = form_of(path)
    if target and form != "run":
        raise UserError(f"'{printable(path)}' is no run's folder; only a run has test sets to choose from.")
    if form == "store":
        return _read_store(path)
    if form == "run":
        return read_run(path, target)
    if not form:
        raise UserError(f"'{printable(path)}' {_why_no_form(path)}; name {FORMS}.")
    readers: dict[str, Any] = {"npz": _read_npz, "npy": _read_npy, "parquet": _read_parquet, "bank": read_bank}
    found: Features = readers[form](path)
    if not len(found):
        raise UserError(f"'{printable(path)}' holds no features (0 rows).")
    return found


def _why_no_form(path: Path) -> str:
    if path.is_dir():
        return "is a folder, but no store and no run"
    reason = why_not_regular(path)
    if reason:
        return reason
    if path.suffix.lower() == ".csv":
        return f"has no file '{path.with_suffix('.npy').name}' of features beside it"
    if path.suffix.lower() in (".pkl", ".pickle", ".pth", ".pt"):
        return "is no bank of features, and a pickle is never loaded"
    return "holds no features in a form that is read"


# --- npz --------------------------------------------------------------------------------------------------------------
def _read_npz(path: Path) -> Features:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"'{path}' holds the array '{twice}' twice; keep one of them.")
            _check_names(archive)
            parts = [(prefix, find_columns(names, str(path), prefix)) for prefix in _prefixes(names, path)]
            if not parts:
                parts = [("", _only_matrix(archive, names, path))]
            arrays = [(prefix, {name: _member(archive, key, path) for name, key in part.items()}) for prefix, part in parts]
            model = _model(archive, names, path)
    except _ARRAY_ERRORS as error:
        raise UserError(f"'{path}' cannot be read ({_reason(error)}); it is damaged or no npz file.") from None
    return _from_parts(arrays, path, model)


def _model(archive: Any, names: list[str], path: Path) -> str:
    """The fingerprint in a file; empty where there is none, or something else is called so."""
    found = _member(archive, MODEL, path) if MODEL in names else None
    return str(found) if found is not None and found.ndim == 0 and found.dtype.kind == "U" else ""


def _check_names(archive: Any) -> None:
    """Refuse a file in which the name of an array is not the one in the file's directory: one of them was changed."""
    for entry in archive.zip.infolist():
        archive.zip.open(entry).close()


def _prefixes(names: list[str], path: Path) -> list[str]:
    """What the names of the arrays of each part begin with; '' where the file is one part."""
    low = [name.casefold() for name in names]
    parts = [
        f"{split}_" for split in SPLITS if any(name in [f"{split}_{end}" for end in COLUMNS["features"]] for name in low)
    ]
    whole = next((name for name in names if name.casefold() in COLUMNS["features"]), None)
    if whole is None:
        return parts
    if parts:
        raise UserError(
            f"'{path}' has the array '{whole}' and others that begin with '{parts[0]}'; keep all features in one, or a part "
            "for each split."
        )
    return [""]


def _only_matrix(archive: Any, names: list[str], path: Path) -> dict[str, str]:
    matrices = [name for name in names if _member(archive, name, path).ndim == 2]
    if len(matrices) != 1:
        listed = ", ".join(names[:20]) or "none"
        raise UserError(
            f"'{path}' has no array '{COLUMNS['features'][0]}' (it has: {listed}); name the arrays "
            f"{', '.join(column[0] for column in COLUMNS.values())}, or put query_ and gallery_ before the names."
        )
    return {"features": matrices[0], **find_columns([name for name in names if name != matrices[0]], str(path))}


def _member(archive: Any, key: str, path: Path) -> np.ndarray:
    try:
        found = archive[key]
    except ValueError as error:
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            raise UserError(
                f"'{path}': the array '{key}' holds Python objects (a pickle), which are never loaded; save it as numbers "
                "or text, such as numpy.asarray(values, dtype=str)."
            ) from None
        raise
    if not isinstance(found, np.ndarray):
        raise UserError(f"'{path}': '{key}' is no array of numpy; save it by numpy.savez.")
    return found


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _from_parts(parts: list[tuple[str, dict[str, Any]]], path: Path, model: str) -> Features:
    found = []
    for prefix, arrays in parts:
        if "features" not in arrays:
            raise UserError(f"'{path}' has no column of features; it has: {', '.join(arrays) or 'none'}.")
        values = arrays.pop("features")
        source = str(path) + (f" ({prefix.rstrip('_')})" if prefix else "")
        one = Features.of(values, source=source, model=model, **arrays)
        found.append(one.with_split(prefix.rstrip("_")) if prefix else one)
    return found[0] if len(found) == 1 and not parts[0][0] else joined(found, source=str(path))


# --- npy and CSV ------------------------------------------------------------------------------------------------------
def _read_npy(path: Path) -> Features:
    path = path.with_suffix(".npy")
    try:
        values = np.load(path, allow_pickle=False, mmap_mode="r")
    except _ARRAY_ERRORS as error:
        if "Object arrays" in str(error) or "Python objects" in str(error) or "allow_pickle" in str(error):
            raise UserError(f"'{path}' holds Python objects (a pickle), which are never loaded; save numbers.") from None
        raise UserError(f"'{path}' cannot be read ({_reason(error)}); it is damaged or no npy file.") from None
    table = path.with_suffix(".csv")
    columns = _read_table(table) if table.is_file() else {}
    rows = {len(column) for column in columns.values()}
    if rows and values.ndim == 2 and rows != {len(values)}:
        raise UserError(f"'{path}' has {len(values)} rows and '{table}' has {rows.pop()}; every feature needs its row.")
    return Features.of(np.asarray(values), source=str(path), **columns)


def _read_table(path: Path) -> dict[str, Any]:
    """The columns of the CSV file beside an npy file; a column that is empty in every row counts as missing."""
    known = [name for names in COLUMNS.values() for name in names]
    rows = Rows(path, (), known, layout="a CSV file with a row per feature and the header path,pid,camid,time,split")
    columns = find_columns([name for name in rows.header if name], str(path))
    columns.pop("features", None)
    if not columns:
        raise UserError(f"{path}: no column is named path, pid, camid, time or split; it says nothing of the features.")
    cells: dict[str, list[str]] = {column: [] for column in columns}
    for row in rows:
        for column, name in columns.items():
            cell = row[name]
            cells[column].append("" if cell in MISSING else cell)
    filled = {column: values for column, values in cells.items() if any(values) or not values}
    for column, values in filled.items():
        empty = sum(not value for value in values)
        if empty and column != "paths":
            raise UserError(
                f"{path}: {empty} of {len(values)} rows have an empty '{columns[column]}' (the first: row "
                f"{values.index('') + 1}); fill all of them, or none."
            )
    return {column: (values if column == "paths" else np.array(values, dtype=str)) for column, values in filled.items()}


# --- parquet ----------------------------------------------------------------------------------------------------------
def _pyarrow() -> Any:
    return needed("pyarrow.parquet", "a parquet file")


def _read_parquet(path: Path) -> Features:
    parquet = _pyarrow()
    import pyarrow

    try:
        with path.open("rb") as stream:
            file = parquet.ParquetFile(stream, page_checksum_verification=True)
            names = list(file.schema_arrow.names)
            model = ((file.schema_arrow.metadata or {}).get(_PARQUET_MODEL) or b"").decode("utf-8", "replace")
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"'{path}' has the column '{twice}' twice; keep one of them.")
            columns = find_columns(names, str(path))
            wide = [] if "features" in columns else _wide_columns(names, set(columns.values()))
            if "features" not in columns and not wide:
                listed = ", ".join(names[:20])
                raise UserError(f"'{path}' has no column 'features' (it has: {listed}); name the column of lists so.")
            table = file.read([*columns.values(), *wide])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' cannot be read ({_reason(error)}); it is damaged or no parquet file.") from None
    arrays = {column: _arrow_values(table, name, path) for column, name in columns.items() if column != "features"}
    if wide:
        matrix = np.stack([_arrow_values(table, name, path) for name in wide], axis=1)
    else:
        matrix = _arrow_matrix(table, columns["features"], path)
    return Features.of(matrix, source=str(path), model=model, **arrays)


def _wide_columns(names: list[str], taken: set[str]) -> list[str]:
    """Columns of one number each, such as ``f0`` … ``f511``, in the order of their numbers."""
    stems: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = _WIDE.fullmatch(name.strip().casefold())
        if match is not None and name not in taken:
            stems.setdefault(name[: match.start(1)], []).append((int(match[1]), name))
    if len(stems) != 1:
        return []
    pairs = next(iter(stems.values()))
    found = dict(pairs)
    if len(found) < len(pairs):  # f1 and f01
        return []
    first = min(found)
    return [found[number] for number in sorted(found)] if sorted(found) == list(range(first, first + len(found))) else []


def _arrow_values(table: Any, name: str, path: Path) -> np.ndarray:
    import pyarrow

    column = table.column(name).combine_chunks()
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        raise UserError(
            f"'{path}': {column.null_count} of {len(column)} rows have no '{name}'; fill all, or leave the column out."
        )
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        return np.array(column.to_pylist(), dtype=str)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _arrow_matrix(table: Any, name: str, path: Path) -> np.ndarray:
    import pyarrow

    column = table.column(name).combine_chunks()
    kinds = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(kind(column.type) for kind in kinds):
        raise UserError(f"'{path}': the column '{name}' is {column.type}, not a list of numbers per row.")
    if column.null_count:
        raise UserError(f"'{path}': {column.null_count} of {len(column)} rows have no '{name}'; leave them out.")
    flat = column.flatten()
    if pyarrow.types.is_fixed_size_list(column.type):
        width = column.type.list_size
    else:
        lengths = np.diff(np.asarray(column.offsets))
        width = int(lengths[0]) if len(lengths) else 1
        odd = int((lengths != width).sum())
        if odd:
            row = int(np.flatnonzero(lengths != width)[0])
            raise UserError(
                f"'{path}': {odd} of {len(column)} rows of '{name}' are not of the first one's width {width} (first other: "
                f"row {row}, width {int(lengths[row])})."
            )
    if flat.null_count:
        raise UserError(f"'{path}': {flat.null_count} numbers of '{name}' are missing; extract these features again.")
    values = np.asarray(flat.to_numpy(zero_copy_only=False))
    return values.reshape(len(column), width) if width else values.reshape(len(column), 0)


# --- stores -----------------------------------------------------------------------------------------------------------
def _read_store(path: Path) -> Features:
    store = FeatureStore(path)
    if store.shortage:
        print(f"note: {store.shortage}")
    if len(store) == len(store.deleted):
        raise UserError(f"store '{path}' is empty; extract features of some images first.")
    return store_features(store)


def store_features(store: FeatureStore) -> Features:
    """Return all rows of a store but the deleted ones; their features have unit length."""
    paths = list(store.iter_paths())
    named = [path or f"{store.folder}:{row}" for row, path in enumerate(paths)] if any(paths) else []
    kept = np.setdiff1d(np.arange(len(store)), store.deleted)
    return Features(
        store.take(torch.from_numpy(kept)),
        store.pids[kept],
        store.camids[kept].astype(np.int64),
        [named[row] for row in kept] if named else [],
        dict(store.identity_names),
        dict(store.camera_names),
        splits=store.splits,
        source=str(store.folder),
        model=store.model,
    )


# --- writing ----------------------------------------------------------------------------------------------------------
def write(features: Features, path: Path | str) -> Path:
    """Write features to a file whose form is its name's ending, whole or not at all.

    Args:
        features: What to write.
        path: ``….npz``, ``….npy`` (with ``….csv`` beside it), ``….parquet``; a name without an ending is a store's folder,
            whose rows are scaled to unit length and which keeps no times. An npy file keeps no fingerprint of a model.

    Returns:
        The path.

    Raises:
        UserError: Another ending, or a store that has other content.
        WriteError: It cannot be written.
    """
    path = Path(path)
    check_ending(path)
    columns = _columns(features)
    if path.suffix in (".npy", ".parquet"):
        _check_text(columns, path)
    if path.suffix == ".npz":
        named = {MODEL: np.array(features.model)} if features.model else {}
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **columns, **named)  # type: ignore[arg-type]
    elif path.suffix == ".npy":
        with atomic_file(path.with_suffix(".csv")) as temporary:
            temporary.write_bytes(_csv(columns, len(features)))
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, columns["features"], allow_pickle=False)
    elif path.suffix == ".parquet":
        _write_parquet(columns, path, features.model)
    else:
        _write_store(features, path)
    return path


def check_ending(path: Path) -> None:
    """Raise a :class:`UserError` where a name's ending is none that :func:`write` knows, or its package is not there."""
    if path.suffix not in ("", ".npz", ".npy", ".parquet"):
        raise UserError(f"'{path}' ends with '{path.suffix}'; features are written to .npz, .npy, .parquet or a folder.")
    if path.suffix == ".parquet":
        _pyarrow()


def _columns(features: Features) -> dict[str, np.ndarray]:
    """The columns of a file under the names that are written; unknown ones are left out."""
    columns: dict[str, Any] = {"features": features.features.numpy()}
    for name, labels, names in (
        ("pids", features.pids, features.identity_names),
        ("camids", features.camids, features.camera_names),
    ):
        if len(labels) and bool((labels == -1).all()):
            continue
        columns[name] = _written(labels, names)
    if features.paths:
        columns["paths"] = np.array(features.paths, dtype=str)
    if features.times is not None:
        columns["times"] = features.times
    if features.splits is not None:
        columns["splits"] = features.splits
    return columns


def _check_text(columns: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuse names of files and labels that hold bytes of no text, which CSV and parquet files cannot."""
    for name in sorted({"paths", "pids", "camids"} & set(columns)):
        for text in map(str, columns[name]):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(
                    f"'{printable(text)}' of the {name} is no UTF-8 text, which a {path.suffix} file cannot hold; rename "
                    "the file, or write an npz file or a store."
                ) from None


def _written(labels: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    unique, own = np.unique(np.asarray(labels, np.int64), return_inverse=True)
    if not any(int(label) in names for label in unique):
        return np.asarray(labels, np.int64)
    return np.array([names.get(int(label), str(int(label))) for label in unique], dtype=str)[own.reshape(-1)]


def _csv(columns: Mapping[str, np.ndarray], count: int) -> bytes:
    names = {"paths": "path", "pids": "pid", "camids": "camid", "times": "time", "splits": "split"}
    there = [name for name in names if name in columns]
    lists = [[repr(v) if isinstance(v, float) else v for v in columns[name].tolist()] for name in there]
    header = [names[name] for name in there] or ["pid"]
    return csv_text([header, *(zip(*lists) if there else [[-1]] * count)]).encode("utf-8")


def _write_parquet(columns: Mapping[str, np.ndarray], path: Path, model: str) -> None:
    parquet = _pyarrow()
    import pyarrow

    values = np.ascontiguousarray(columns["features"])
    flat = pyarrow.array(values.reshape(-1))
    arrays = {"features": pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])}
    arrays.update({name: pyarrow.array(column) for name, column in columns.items() if name != "features"})
    with atomic_file(path) as temporary:
        about = {_PARQUET_MODEL: model} if model else None
        parquet.write_table(pyarrow.table(arrays).replace_schema_metadata(about), temporary, write_page_checksum=True)


def _write_store(features: Features, path: Path) -> None:
    with StoreWriter(path, dim=features.dim, model=features.model) as writer:
        if len(writer):
            raise UserError(f"store '{path}' has {len(writer)} rows already; write to another folder.")
        writer.add(
            features.features,
            features.shown(features.pids) if features.identity_names else features.pids,
            features.shown_cameras(features.camids) if features.camera_names else features.camids,
            features.paths or None,
            None if features.splits is None else features.splits.tolist(),
        )


__all__ = ["FORMS", "check_ending", "form_of", "read", "store_features", "write"]
