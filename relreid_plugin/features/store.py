"""Feature stores: the features of a gallery on disk, read through memory maps.

A store is a folder::

    store.json              manifest, written last and atomically: what it does not name does not exist
    chunk-000000.features   rows of one chunk, little-endian float32, float16 or bfloat16
    chunk-000000.labels     its identities (int64), cameras (int32), ends of the paths (uint32) and the paths (UTF-8)
    chunk-000000.names      of a chunk with labels that are names, or with splits (JSON): what the numbers stand for, and the
                            splits as [name, rows] one after the other; its cameras are int64
    writer.lock             there while a process writes, and held by it

Chunks never change once the manifest names them; new rows come in new chunks. A process that is killed while it appends
leaves the store as it was after the last whole chunk. The manifest has a checksum of its own and a SHA-256 per file: sizes
are compared whenever a store is opened, sums when a file was not compared since it was last changed (see
:mod:`relreid_plugin.features.verified`), by :meth:`FeatureStore.verify` and in every pass over all rows that builds
something.

Rows have unit length: search is by cosine. A deleted row (:mod:`relreid_plugin.features.deleted`) keeps its number, so that
indices and refined galleries stay those of the store; the manifest names it, and no search finds it.
Shape letters: N rows, n some of them, d width.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.labels import Label
from ..errors import UserError
from ..files import atomic_file, clear_leftovers
from ..locks import STORE_LOCK, folder_lock
from ..reading import read_text
from .arrays import (
    _TYPES,
    CHUNK_ROWS,
    FEATURE_TYPES,
    FORMAT,
    ChunkedArray,
    Piece,
    RowTable,
    check_size,
    read_manifest,
    write_manifest,
    write_tensor,
)
from .columns import rows_to_add
from .verified import Checked, check_digest, check_once

MANIFEST = "store.json"
SHARD_PATTERN = "shard-*"

_INT32 = np.iinfo(np.int32)


@contextlib.contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for writing; the lock goes with the process, however it ends.

    Raises:
        UserError: Another writer holds it.
        WriteError: The folder cannot be written to.
    """
    with folder_lock(folder, STORE_LOCK):
        yield


class FeatureStore(RowTable):
    """A store, opened to read; it shows the rows that were there when it was opened.

    Args:
        folder: The store's folder, or a folder of shards ``shard-…``, each a store, whose rows follow one another.
        verify: Compare every file with its SHA-256 now, also those that are unchanged since they were last compared.

    Attributes:
        folder: The folder.
        model: Fingerprint of the model that made the features.
        planned: Rows that the store has when the extraction that wrote to it last has ended; N unless it was interrupted.
        shards: Folders of the stores that hold the rows, in order.
        deleted: Rows (int64, rising) that were taken out.

    Raises:
        UserError: No store, a damaged one, or shards that do not belong together.
    """

    def __init__(self, folder: Path | str, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"store '{folder}' does not exist; make one with relreid extract.")
        self.shards = [self.folder]
        if not (self.folder / MANIFEST).is_file():
            self.shards = sorted(path for path in self.folder.glob(SHARD_PATTERN) if (path / MANIFEST).is_file())
            if not self.shards:
                raise UserError(f"'{folder}' is no store ('{self.folder / MANIFEST}' does not exist).")
        manifests = [read_manifest(path / MANIFEST, what="store") for path in self.shards]
        try:
            self._assemble(manifests)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"'{self.folder / MANIFEST}' is damaged (entries are missing); make the store again or put back a copy."
            ) from None
        if verify:
            self.verify()
        else:
            check_once(self._checked())

    def _checked(self) -> list[Checked]:
        """The files and their checksums."""
        files = [Checked(piece.path, ((0, -1, piece.digest),)) for piece in [*self.array.pieces, *self._labels]]
        names = [(number, digest) for number, digest in enumerate(self._names) if digest is not None]
        return [*files, *(Checked(self._names_file(number), ((0, -1, digest),)) for number, digest in names)]

    def _assemble(self, manifests: list[dict[str, Any]]) -> None:
        first = manifests[0]
        for folder, manifest in zip(self.shards, manifests):
            for key in ("dim", "dtype", "model"):
                if manifest[key] != first[key]:
                    raise UserError(
                        f"shards '{self.shards[0]}' and '{folder}' do not belong together: {key} is {first[key]} and "
                        f"{manifest[key]}."
                    )
        worlds = {manifest["shard"][1] for manifest in manifests}
        if len(self.shards) > 1 or not (self.folder / MANIFEST).is_file():
            found = sorted(manifest["shard"][0] for manifest in manifests)
            if len(worlds) > 1 or found != list(range(max(worlds))):
                raise UserError(
                    f"store '{self.folder}' holds shards {found} of {max(worlds)}, and every one of them is needed, once; "
                    "finish the extraction with as many processes as it was begun with."
                )
        self.model, self.dtype = str(first["model"]), str(first["dtype"])
        self.planned, before = 0, 0
        deleted = [np.empty(0, np.int64)]
        pieces, self._labels, self._roots, self._names = [], [], [], []
        for folder, manifest in zip(self.shards, manifests):
            rows = sum(int(chunk["rows"]) for chunk in manifest["chunks"])
            self.planned += max(rows, int(manifest.get("planned", 0)))
            deleted.append(before + np.asarray(manifest.get("deleted", []), np.int64))
            before += rows
            for chunk in manifest["chunks"]:
                name = folder / chunk["name"]
                pieces.append(Piece(name.with_suffix(".features"), int(chunk["rows"]), chunk["features"]))
                self._labels.append(Piece(name.with_suffix(".labels"), int(chunk["rows"]), chunk["labels"]))
                self._roots.append(manifest["root"])
                self._names.append(chunk.get("names"))
                check_size(self._labels[-1].path, int(chunk["label_bytes"]))
        self.deleted = np.concatenate(deleted)
        super().__init__(
            ChunkedArray(pieces, (int(first["dim"]),), self.dtype), f"features|{first['dim']}|{self.dtype}|{self.model}"
        )

    @functools.cached_property
    def alive(self) -> Tensor | None:
        """(N,) bool, the rows that were not deleted; None where none was."""
        if not len(self.deleted):
            return None
        alive = torch.ones(len(self), dtype=torch.bool)
        alive[torch.from_numpy(self.deleted)] = False
        return alive

    @property
    def shortage(self) -> str:
        """One sentence where an extraction was interrupted, else empty."""
        if self.planned <= len(self):
            return ""
        return (
            f"store '{self.folder}' holds {len(self)} of {self.planned} images, its extraction was interrupted or is still "
            "running; go on by relreid extract with the same arguments."
        )

    def verify(self, *, progress: bool = True) -> None:
        """Compare every file with its SHA-256.

        Raises:
            UserError: A file was changed.
        """
        for number in tqdm(range(len(self._labels)), desc="verifying", leave=False, disable=None if progress else True):
            self.array.verify(number)
            check_digest(self._labels[number].path, self._labels[number].digest)
            if self._names[number] is not None:
                check_digest(self._names_file(number), self._names[number])

    def _names_file(self, number: int) -> Path:
        return self._labels[number].path.with_suffix(".names")

    @functools.cached_property
    def _named(self) -> dict[str, dict[int, str]]:
        named: dict[str, dict[int, str]] = {"identities": {}, "cameras": {}}
        self._splits: list[list[str]] = []
        for number, digest in enumerate(self._names):
            self._splits.append([""] * self._labels[number].rows)
            if digest is None:
                continue
            path = self._names_file(number)
            try:
                found = json.loads(read_text(path))
                for kind, names in named.items():
                    names.update((int(key), str(name)) for key, name in found[kind].items())
                if "splits" in found:
                    self._splits[-1] = [str(name) for name, rows in found["splits"] for _ in range(int(rows))]
            except (UserError, ValueError, KeyError, AttributeError, TypeError):
                raise UserError(
                    f"'{path.parent}' is damaged: '{path.name}' cannot be read; make it again or put back a copy."
                ) from None
        return named

    @property
    def identity_names(self) -> dict[int, str]:
        """The names of identities that are no numbers of their own, by what stands for them in :attr:`pids`."""
        return self._named["identities"]

    @property
    def camera_names(self) -> dict[int, str]:
        """The names of cameras that are no numbers of their own, by what stands for them in :attr:`camids`."""
        return self._named["cameras"]

    @property
    def splits(self) -> np.ndarray | None:
        """(N,) ``train``, ``query`` or ``gallery``; ``None``: the rows were added without.

        Raises:
            UserError: Some rows have a split, and others have none.
        """
        assert self._named is not None  # reads them
        splits = np.array([split for part in self._splits for split in part], dtype="<U7")
        without = int((splits == "").sum())
        if 0 < without < len(splits):
            raise UserError(
                f"store '{self.folder}': {without} of {len(self)} rows have no split, and the others have; extract it again "
                "in one way."
            )
        return None if without == len(splits) else splits

    def _label_map(self, number: int) -> np.ndarray:
        return np.memmap(self._labels[number].path, dtype=np.uint8, mode="r").view(np.ndarray)

    @property
    def pids(self) -> np.ndarray:
        """(N,) int64 identities, -1 where unknown; read anew at each call."""
        parts = [self._label_map(i)[: 8 * piece.rows].view("<i8") for i, piece in enumerate(self._labels)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @property
    def camids(self) -> np.ndarray:
        """(N,) int32 cameras, int64 where some are names, -1 where unknown; read anew at each call."""
        parts = [self._cameras(i, self._label_map(i)) for i in range(len(self._labels))]
        return np.concatenate([np.empty(0, np.int32), *parts])

    def _camera_bytes(self, number: int) -> int:
        return 4 if self._names[number] is None else 8

    def _cameras(self, number: int, data: np.ndarray) -> np.ndarray:
        rows, width = self._labels[number].rows, self._camera_bytes(number)
        return data[8 * rows : (8 + width) * rows].view(f"<i{width}")

    def labels(self, rows: Tensor | Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return identities (n,), cameras (n,) and image files of chosen rows; a row of -1 has -1, -1 and ''."""
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        pids, camids, paths = np.full(len(wanted), -1, np.int64), np.full(len(wanted), -1, np.int64), [""] * len(wanted)
        owner = np.searchsorted(self.array.firsts, wanted, side="right") - 1
        for slot in np.flatnonzero(wanted >= 0):
            number = int(owner[slot])
            data, size, row = self._label_map_cached(number), self._labels[number].rows, int(wanted[slot])
            row -= int(self.array.firsts[number])
            pids[slot] = data[8 * row : 8 * row + 8].view("<i8")[0]
            camids[slot] = self._cameras(number, data)[row]
            paths[slot] = self._path(data, size, row, number)
        return pids, camids if any(self._names) else camids.astype(np.int32), paths

    def _label_map_cached(self, number: int) -> np.ndarray:
        cache = self.__dict__.setdefault("_label_maps", {})
        if number not in cache:
            cache[number] = self._label_map(number)
        return cache[number]

    def _path(self, data: np.ndarray, size: int, row: int, number: int) -> str:
        width = 8 + self._camera_bytes(number)
        ends = data[width * size : (width + 4) * size].view("<u4")
        begin = int(ends[row - 1]) if row else 0
        first = (width + 4) * size
        path = data[first + begin : first + int(ends[row])].tobytes().decode("utf-8", "surrogateescape")
        return os.path.join(self._roots[number], path)

    def iter_paths(self) -> Iterator[str]:
        """Yield the image file of every row, in order."""
        for number, piece in enumerate(self._labels):
            data = self._label_map(number)
            for row in range(piece.rows):
                yield self._path(data, piece.rows, row, number)


class StoreWriter:
    """Make a store, or append to one: a context manager that holds the store's lock.

    Rows are written whenever a chunk is full, and the rest when the block ends without an error. An interrupted writer
    leaves the whole chunks; a new writer goes on after them (``len(writer)`` says where, :meth:`known_paths` with what).

    Args:
        folder: The store's folder.
        dim: Feature width d.
        model: Fingerprint of the model that makes the features; a store holds features of one model.
        dtype: ``float32``, ``float16`` or ``bfloat16``; ``None``: that of the store, ``float32`` for a new one. Half
            precision halves the folder and moves a cosine by up to about 1e-3 (float16) or 1e-2 (bfloat16).
        chunk_rows: Rows per chunk.
        root: Folder to which the paths of a new store are relative in its files, to keep them short.
        shard: (number, count) of this store among those that are searched together.

    Raises:
        UserError: Another writer, another model, width, type or shard than the store's, or a folder of something else.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        dim: int,
        model: str = "",
        dtype: str | None = None,
        chunk_rows: int = CHUNK_ROWS,
        root: str = "",
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if dtype is not None and dtype not in FEATURE_TYPES:
            raise UserError(f"type of the store is '{dtype}'; valid ones: {', '.join(FEATURE_TYPES)}.")
        if chunk_rows < 1 or dim < 1:
            raise UserError(f"a store needs at least 1 row per chunk and width 1, got {chunk_rows} and {dim}.")
        self.folder, self.chunk_rows = Path(folder), chunk_rows
        self._wanted = {"dim": dim, "dtype": dtype, "model": model, "shard": list(shard)}
        self._root = root
        self._stack = contextlib.ExitStack()
        self._buffer: list[tuple[Tensor, np.ndarray, np.ndarray, list[str], list[str]]] = []
        self._names: dict[str, dict[int, str]] = {"identities": {}, "cameras": {}}

    def __enter__(self) -> StoreWriter:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"'{self.folder}' is a file; name a folder for the store.")
        with contextlib.ExitStack() as stack:
            stack.enter_context(writer_lock(self.folder))
            self._open()
            self._stack = stack.pop_all()
        return self

    def _open(self) -> None:
        wanted = self._wanted
        if (self.folder / MANIFEST).is_file():
            FeatureStore(self.folder)  # complains about damage before anything is added
            self.manifest = read_manifest(self.folder / MANIFEST, what="store")
            for key, value in wanted.items():
                if value is not None and value != self.manifest[key]:
                    raise UserError(
                        f"store '{self.folder}' has {key} {self.manifest[key]}, but {key} {value} is to be added; write to "
                        "another folder."
                    )
        else:
            if any(self.folder.glob(f"{SHARD_PATTERN}/{MANIFEST}")):
                raise UserError(
                    f"'{self.folder}' is a folder of shards; append to it with as many processes as it has shards."
                )
            dtype = wanted["dtype"] or "float32"
            self.manifest = {"format": FORMAT, **wanted, "dtype": dtype, "root": self._root, "chunks": []}
            self._write_manifest()
        clear_leftovers(self.folder)  # what a killed writer was writing

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._stack.close()

    def __len__(self) -> int:
        """Rows that are safely in the store."""
        return sum(chunk["rows"] for chunk in self.manifest["chunks"])

    def plan(self, rows: int) -> None:
        """Note how many rows the store will have, so that one that stays short of it can be told from a whole one."""
        self.manifest["planned"] = rows
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_manifest(self.folder / MANIFEST, self.manifest)

    def known_paths(self) -> set[str]:
        """Return the image files whose features are in the store."""
        return set(FeatureStore(self.folder).iter_paths())

    def add(
        self,
        features: Tensor,
        pids: np.ndarray | Sequence[Label] | None = None,
        camids: np.ndarray | Sequence[Label] | None = None,
        paths: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
    ) -> None:
        """Append rows.

        Args:
            features: (n, d) of any length; they are scaled to unit length.
            pids: (n,) identities, numbers or names; ``None``: unknown, -1.
            camids: (n,) cameras, numbers or names; ``None``: unknown, -1.
            paths: n image files; ``None``: ''.
            splits: n times ``train``, ``query`` or ``gallery``; ``None``: they have none.

        Raises:
            UserError: Features of another width, or not finite; labels of another number.
        """
        if features.dim() != 2 or features.shape[1] != self.manifest["dim"]:
            raise UserError(
                f"features of shape {tuple(features.shape)} do not fit store '{self.folder}', which has width "
                f"{self.manifest['dim']}."
            )
        part = rows_to_add(features, pids, camids, paths, splits, names=(self._names["identities"], self._names["cameras"]))
        if len(features):
            self._buffer.append(part)
        while sum(len(part[0]) for part in self._buffer) >= self.chunk_rows:
            self._write(self.chunk_rows)

    def flush(self) -> None:
        """Write the rows that do not fill a chunk."""
        self._write(self.chunk_rows)

    def _write(self, limit: int) -> None:
        if not self._buffer:
            return
        features = torch.cat([part[0] for part in self._buffer])
        pids, camids = (np.concatenate([part[i] for part in self._buffer]) for i in (1, 2))
        paths, splits = ([text for part in self._buffer for text in part[i]] for i in (3, 4))  # type: ignore[union-attr]
        rest = slice(limit, None)
        self._buffer = []
        if len(features) > limit:
            self._buffer = [(features[rest], pids[rest], camids[rest], paths[rest], splits[rest])]
        root = self.manifest["root"]
        prefix = root and root.rstrip(os.sep) + os.sep
        blobs = [path.removeprefix(prefix).encode("utf-8", "surrogateescape") for path in paths[:limit]]
        ends = np.cumsum([len(blob) for blob in blobs], dtype=np.int64)
        named = self._named_in(pids[:limit], camids[:limit], splits[:limit])
        packed = b"".join(
            (
                pids[:limit].astype("<i8").tobytes(),
                camids[:limit].astype("<i4" if named is None else "<i8").tobytes(),
                ends.astype("<u4").tobytes(),
                *blobs,
            )
        )
        name = f"chunk-{len(self.manifest['chunks']):06d}"
        torch_type = _TYPES[self.manifest["dtype"]][0]
        digest = write_tensor(self.folder / f"{name}.features", features[:limit].to(torch_type))
        with atomic_file(self.folder / f"{name}.labels") as temporary:
            temporary.write_bytes(packed)
        if named is not None:
            with atomic_file(self.folder / f"{name}.names") as temporary:
                temporary.write_bytes(named)
        self.manifest["chunks"].append(
            {
                "name": name,
                "rows": len(blobs),
                "features": digest,
                "labels": hashlib.sha256(packed).hexdigest(),
                "label_bytes": len(packed),
                **({} if named is None else {"names": hashlib.sha256(named).hexdigest()}),
            }
        )
        self._write_manifest()

    def _named_in(self, pids: np.ndarray, camids: np.ndarray, splits: list[str]) -> bytes | None:
        """What the numbers of a chunk stand for, and its splits, as JSON; None where there are none, and labels are numbers
        that fit the file's types."""
        chosen: dict[str, Any] = {
            kind: {str(n): self._names[kind][n] for n in np.unique(labels).tolist() if n in self._names[kind]}
            for kind, labels in (("identities", pids), ("cameras", camids))
        }
        wide = bool(len(camids)) and (int(camids.max()) > _INT32.max or int(camids.min()) < _INT32.min)
        if any(splits):
            chosen["splits"] = [[split, len(list(rows))] for split, rows in itertools.groupby(splits)]
        return json.dumps(chosen).encode() if wide or any(chosen.values()) else None
