"""Arrays on disk, in pieces that grow: manifests, checksums, and tables of rows over them."""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import atomic_file, write_at, write_json
from ..metrics.neighbours import normalise
from ..reading import read_json
from .verified import check_digest

FORMAT = 1

CHUNK_ROWS = 8192

_FEW = 64  # rows that are looked up one by one

_TYPES: dict[str, tuple[torch.dtype, np.dtype]] = {
    "float32": (torch.float32, np.dtype("<f4")),
    "float16": (torch.float16, np.dtype("<f2")),
    "bfloat16": (torch.bfloat16, np.dtype("<i2")),
    "int32": (torch.int32, np.dtype("<i4")),
    "bool": (torch.bool, np.dtype("?")),
}

FEATURE_TYPES = ("float32", "float16", "bfloat16")


def read_manifest(path: Path, *, what: str, version: int = FORMAT, remedy: str = "") -> dict[str, Any]:
    """Read a JSON manifest of this package.

    Args:
        path: The file.
        what: What it describes, for the sentence: ``store``, ``index``, ….
        version: Its format.
        remedy: What to do where it cannot be used; empty: make it again.

    Raises:
        UserError: It is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise UserError(f"'{path.parent}' is no {what} ('{path}' does not exist).")
    way_out = (remedy or f"make the {what} again or put back a copy.").removesuffix(".")
    value = read_json(path, what=f"manifest of a {what}", remedy=way_out)
    if "format" not in value:
        raise UserError(f"'{path}' is damaged (no manifest of a {what}); {way_out}.")
    found = value["format"]
    if found != version:
        raise UserError(
            f"'{path}' has format {found}, this version of the plug-in reads format {version}; "
            f"{remedy or f'make the {what} again.'}"
        )
    stored = value.pop("checksum", None)  # older versions write none
    if stored is not None and stored != _manifest_sum(value):
        raise UserError(f"'{path}' is damaged (it does not hold what was written); {way_out}.")
    return value


def _manifest_sum(value: dict[str, Any]) -> str:
    """CRC-32 of a manifest's entries in a fixed form."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def write_manifest(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON manifest atomically, with a checksum of its entries."""
    write_json(path, {**value, "checksum": _manifest_sum(value)})


def _bytes(value: Tensor) -> memoryview:
    values: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(values)


def write_tensor(path: Path, value: Tensor) -> str:
    """Write the bytes of a tensor atomically and return their SHA-256."""
    data = _bytes(value)
    with atomic_file(path) as temporary:
        with temporary.open("wb") as stream:
            stream.write(data)
    return hashlib.sha256(data).hexdigest()


def write_rows(path: Path, first: int, value: Tensor) -> str:
    """Write rows (n, …) into a file from row ``first`` on, wait until they are on the disk, and return their SHA-256."""
    data = _bytes(value)
    write_at(path, first * (len(data) // max(1, len(value))), data)
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Piece:
    """Rows of a :class:`ChunkedArray` that were written together: a file, or a part of one.

    Attributes:
        path: The file.
        rows: Rows.
        digest: Their SHA-256.
        first: Row of the file where they begin.
    """

    path: Path
    rows: int
    digest: str
    first: int = 0


class ChunkedArray:
    """An array ``(N, *shape)`` that lies in one file or several, each mapped into memory when it is first touched.

    Args:
        pieces: Its pieces in order; pieces that follow one another in a file are read as one.
        shape: Shape of one row.
        dtype: ``float32``, ``float16``, ``bfloat16``, ``int32`` or ``bool``.
        growing: Files may be longer than their pieces: more is being appended to them.

    Raises:
        UserError: A file is missing or has the wrong size.
    """

    def __init__(self, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: str, *, growing: bool = False) -> None:
        self.pieces, self.shape, self.dtype = list(pieces), shape, dtype
        self.firsts = np.cumsum([0, *(piece.rows for piece in self.pieces)], dtype=np.int64)
        self._width = int(np.prod(shape)) * _TYPES[dtype][1].itemsize
        files: list[tuple[Path, int, int]] = []
        for piece in self.pieces:
            first = piece.first
            if files and (files[-1][0], files[-1][2]) == (piece.path, first):
                first = files.pop()[1]
            files.append((piece.path, first, piece.first + piece.rows))
        self._files = files
        self._starts = np.cumsum([0, *(stop - first for _, first, stop in files)], dtype=np.int64)
        self._maps: list[np.ndarray | None] = [None] * len(files)
        for path, _, stop in files:
            check_size(path, stop * self._width, growing=growing)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def _map(self, number: int) -> np.ndarray:
        """Rows of one file (rows, *shape) over its memory map; writing to it does not change the file."""
        mapped = self._maps[number]
        if mapped is None:
            path, first, stop = self._files[number]
            kind, shape, raw = _TYPES[self.dtype][1], (stop - first, *self.shape), None
            if stop > first:
                raw = np.memmap(path, dtype=kind, mode="c", shape=shape, offset=first * self._width)
            mapped = np.empty((0, *self.shape), _TYPES[self.dtype][1]) if raw is None else raw.view(np.ndarray)
            self._maps[number] = mapped
        return mapped

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).view(_TYPES[self.dtype][0])

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` in the array's own type; within one file nothing is copied."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            begin, end = int(self._starts[first]), min(stop, int(self._starts[first + 1]))
            parts.append(self._tensor(self._map(first)[start - begin : end - begin]))
            start, first = end, first + 1
        if not parts:
            return torch.empty(0, *self.shape, dtype=_TYPES[self.dtype][0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def take(self, rows: Tensor) -> Tensor:
        """Return chosen rows (n,) int64 -> ``(n, *shape)`` in the array's own type."""
        rows = rows.cpu()
        if len(self._files) == 1:
            return self._tensor(self._map(0)).index_select(0, rows)
        out = np.empty((len(rows), *self.shape), _TYPES[self.dtype][1])
        wanted = rows.numpy()
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        local = wanted - self._starts[owner]
        if len(rows) <= _FEW:
            for slot, (number, row) in enumerate(zip(owner.tolist(), local.tolist())):
                out[slot] = self._map(number)[row]
            return self._tensor(out)
        result, order = self._tensor(out), np.argsort(owner, kind="stable")
        numbers, begins = np.unique(owner[order], return_index=True)
        for number, slots in zip(numbers.tolist(), np.split(order, begins[1:])):
            picked = self._tensor(self._map(number)).index_select(0, torch.from_numpy(local[slots]))
            result[torch.from_numpy(slots)] = picked
        return result

    def prefetch(self, rows: Tensor) -> None:
        """Let the system read chosen rows (n,) from the disk all at once, before they are needed one after the other."""
        owner = np.searchsorted(self._starts, rows.numpy(), side="right") - 1
        for number, row in zip(owner.tolist(), (rows.numpy() - self._starts[owner]).tolist()):
            mapped: Any = self._map(number).base
            start = row * self._width + self._files[number][1] * self._width % mmap.ALLOCATIONGRANULARITY
            aligned = start - start % mmap.PAGESIZE
            mapped._mmap.madvise(mmap.MADV_WILLNEED, aligned, start + self._width - aligned)

    def verify(self, number: int) -> None:
        """Compare one piece with its SHA-256.

        Raises:
            UserError: It was changed.
        """
        piece = self.pieces[number]
        start, size, digest = self.extent(piece)
        check_digest(piece.path, digest, start=start, size=size)

    def extent(self, piece: Piece) -> tuple[int, int, str]:
        """Return first byte, bytes and SHA-256 of one of the pieces in its file."""
        return piece.first * self._width, piece.rows * self._width, piece.digest


def check_size(path: Path, size: int, *, growing: bool = False) -> None:
    """Raise a :class:`UserError` where a file of a store is missing or not ``size`` bytes long (``growing``: shorter)."""
    try:
        found = path.stat().st_size
    except OSError:
        raise UserError(f"'{path.parent}' is damaged: '{path.name}' is missing; make it again or put back a copy.") from None
    if found < size or (found > size and not growing):
        raise UserError(
            f"'{path.parent}' is damaged: '{path.name}' has {found} bytes, not {size}; make it again or put back a copy."
        )


class RowTable:
    """Unit feature rows on disk that can be searched; what stores and refined galleries have in common.

    Args:
        array: (N, d).
        identity: What the rows are besides their bytes: width, type, model.
    """

    def __init__(self, array: ChunkedArray, identity: str) -> None:
        self.array, self.identity = array, identity

    def __len__(self) -> int:
        return len(self.array)

    @property
    def dim(self) -> int:
        """Width d."""
        return self.array.shape[0]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` (all by default), (n, d) float32 of unit length."""
        return self._raise(self.array.read(start, len(self) if stop is None else stop))

    def take(self, rows: Tensor) -> Tensor:
        """Return chosen rows (n,) int64 -> (n, d) float32 of unit length."""
        return self._raise(self.array.take(rows))

    def _raise(self, rows: Tensor) -> Tensor:
        """Half-precision rows are scaled to unit length again; float32 rows were when they were written."""
        return rows if rows.dtype == torch.float32 else normalise(rows.float())

    def blocks(self, *, start: int = 0, stop: int | None = None, verify: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, (n, d) float32 rows) file by file.

        Args:
            start: First row.
            stop: Row after the last.
            verify: Compare each file with its SHA-256 first.

        Raises:
            UserError: A file was changed.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        firsts = self.array.firsts
        for number in range(len(self.array.pieces)):
            low, high = max(start, int(firsts[number])), min(stop, int(firsts[number + 1]))
            if low < high:
                if verify:
                    self.array.verify(number)
                yield low, self.read(low, high)

    def check(self, start: int = 0) -> None:
        """Compare the files that hold rows from ``start`` on with their SHA-256.

        Raises:
            UserError: A file was changed.
        """
        for number, end in enumerate(self.array.firsts[1:]):
            if end > start:
                self.array.verify(number)

    def fingerprint(self, rows: int | None = None) -> str | None:
        """Return a hash of the first ``rows`` rows (all by default); ``None`` where no chunk ends there.

        What was built from a table keeps this hash: a table that was appended to since still has it for the same number of
        rows, any other one has not.
        """
        rows = len(self) if rows is None else rows
        digest, seen = hashlib.sha256(self.identity.encode()), 0
        for piece in self.array.pieces:
            if seen >= rows:
                break
            digest.update(f"|{piece.rows}:{piece.digest}".encode())
            seen += piece.rows
        return digest.hexdigest()[:32] if seen == rows else None
