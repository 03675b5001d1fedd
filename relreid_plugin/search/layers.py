"""Stored states of an encoder's layers: queries and gallery rows that attend to them, and the journal of a pass."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..engine.checkpoint import fingerprint, write_text
from ..errors import UserError
from ..features.arrays import ChunkedArray, Piece, write_rows
from ..features.verified import Checked, check_digest
from ..files import writing
from ..metrics.reciprocal import ReciprocalGraph

_STEP = 2048  # rows that attend together

_SEARCHED = 65_536  # rows whose neighbours are searched together

_HELD = 1 << 30  # numbers of a table that is held in memory to search it exactly: 4 GiB

_PENDING = 4  # blocks that may wait to be written

_SINGLE = 8  # queries whose neighbours' values are asked of the disk all at once

_FULL = "make a full pass (relreid refine --full)."


def encoder_fingerprint(encoder: Any) -> str:
    """Return a hash of an encoder's weights and of the settings that its states depend on."""
    settings: tuple[Any, ...] = (
        encoder.k,
        encoder.num_landmarks,
        encoder.landmarks,
        encoder.landmark_seed,
        encoder.precision,
    )
    further = (encoder.rule, encoder.residual, encoder.block)  # a head is among the weights
    if further != (None, 0.0, "transformer"):
        settings = (*settings, *further)
    since = (encoder.anchor, *((encoder.rule.support, encoder.rule.least) if encoder.rule else ()))
    if any(since):
        settings = (*settings, *since)
    return hashlib.sha256(f"{fingerprint(encoder)}|{settings}".encode()).hexdigest()[:20]


def _device(encoder: Any) -> torch.device:
    return next(encoder.parameters()).device


@dataclass(frozen=True)
class _Layer:
    """Stored states of one layer: projections (d, G * p), keys (N, G, p), values (N, H, d / H); ``kind`` holds them."""

    to_query: Tensor
    to_key: Tensor
    keys: ChunkedArray
    values: ChunkedArray
    kind: Any

    def gathered(self, rows: Tensor, device: torch.device) -> Any:
        """The states of chosen rows (n,) as a gallery of their own."""
        return self.kind(self.to_query, self.to_key, self.keys.take(rows).to(device), self.values.take(rows).to(device))

    def mapped(self) -> Any:
        """The states of all rows, over their memory maps."""
        return self.kind(
            self.to_query, self.to_key, self.keys.read(0, len(self.keys)), self.values.read(0, len(self.values))
        )


def _query_layer(block: Any, layer: _Layer, x: Tensor, rows: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """One layer of queries (n, d) that attend to stored rows (n, k) and to themselves."""
    states = layer.gathered(rows.flatten(), x.device)
    local = torch.arange(rows.numel(), device=x.device).view_as(rows)
    bias = None if bias is None else bias.to(x.device)
    attended = block.attn.attend_to_gallery(x, states, index=local, mask=mask.to(x.device), bias=bias)
    return block.feed_forward(x, attended)


def _gallery_layer(
    block: Any, layer: _Layer, mapped: Any, x: Tensor, index: Tensor, mask: Tensor, bias: Tensor | None
) -> Tensor:
    """One layer of gallery rows (n, d) that attend to rows (n, K) of their graph, themselves included."""
    if x.device.type == "cpu":
        states = mapped
    else:
        states = layer.gathered(index.flatten().long(), x.device)
        index, mask = torch.arange(index.numel(), device=x.device).view(index.shape), mask.to(x.device)
    return _attending(block, layer, states, x, index, mask, bias)


def _attending(
    block: Any, layer: _Layer, states: Any, x: Tensor, index: Tensor, mask: Tensor, bias: Tensor | None
) -> Tensor:
    """One layer of gallery rows (n, d) that attend to slots (n, K) of ``states``, which are n or more."""
    states.queries = (x @ layer.to_query).view(len(x), block.attn.num_maps, -1)
    graph = ReciprocalGraph(index, mask, index, None if bias is None else bias.to(x.device))
    return block.feed_forward(x, block.attn.attend_rows(slice(0, len(x)), states, [graph]))


def _own_states(block: Any, to_key: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What later images need of rows (n, d) to attend to them: keys (n, G, p), values (n, H, c)."""
    attention = block.attn
    keys = (x @ to_key).view(len(x), attention.num_maps, -1)
    return keys, attention.value(x).view(len(x), attention.num_heads, attention.head_dim)


class _Journal:
    """Files that a pass writes in blocks of rows; a line per block, written after it.

    Blocks are written in the order in which they are handed over, by a thread of its own; :meth:`flush`, or the end of the
    ``with`` block, waits for it.

    Args:
        path: The journal.
        header: What the files belong to; entries of a journal with another header are dropped.

    Raises:
        UserError: The disk is full or may not be written to (from any method).
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.folder = path, path.parent
        self._blocks: dict[str, dict[int, Piece]] = {}
        self._writer = ThreadPoolExecutor(1)
        self._room = threading.Semaphore(_PENDING)
        self._pending: list[Future[None]] = []
        first, lines = json.dumps(header, sort_keys=True), self._lines(path)
        kept = lines[1:] if self.continues(path, header) else []
        for line in kept:
            name, start, rows, digest = line.split()
            self._note(name, Piece(self.folder / f"{name}.bin", int(rows), digest, int(start)))
        write_text(path, "\n".join([first, *kept, ""]))

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._writer.shutdown(cancel_futures=True)

    @staticmethod
    def _lines(path: Path) -> list[str]:
        return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # a torn line has no end

    @classmethod
    def continues(cls, path: Path, header: dict[str, Any]) -> bool:
        """Whether the journal's files belong to ``header``."""
        return cls._lines(path)[:1] == [json.dumps(header, sort_keys=True)]

    def _note(self, name: str, piece: Piece) -> None:
        self._blocks.setdefault(name, {})[piece.first] = piece

    def has(self, start: int, *names: str) -> bool:
        """Whether the blocks from row ``start`` on were written, by this process or one before."""
        return all(start in self._blocks.get(name, {}) for name in names)

    def put(self, name: str, start: int, value: Tensor) -> None:
        """Hand over rows (n, …) of file ``name`` from row ``start`` on; they must not be changed afterwards."""
        self._pending = [future for future in self._pending if not self._done(future)]
        self._room.acquire()
        self._pending.append(self._writer.submit(self._write, name, start, value.cpu()))

    def _write(self, name: str, start: int, value: Tensor) -> None:
        try:
            path = self.folder / f"{name}.bin"
            digest = write_rows(path, start, value)
            with writing(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(f"{name} {start} {len(value)} {digest}\n")
                stream.flush()
                os.fsync(stream.fileno())
            self._note(name, Piece(path, len(value), digest, start))
        finally:
            self._room.release()

    def _done(self, future: Future[None]) -> bool:
        if future.done():
            future.result()
        return future.done()

    def flush(self) -> None:
        """Wait until everything is written."""
        for future in self._pending:
            future.result()
        self._pending = []

    def pieces(self, name: str) -> list[Piece]:
        """The blocks of a file, in order; call :meth:`flush` first."""
        return [piece for _, piece in sorted(self._blocks.get(name, {}).items())]

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> ChunkedArray:
        """A whole file, once everything is written."""
        self.flush()
        return ChunkedArray(self.pieces(name), shape, dtype)


def _checked(arrays: list[ChunkedArray]) -> list[Checked]:
    """The files of arrays and the checksums of their blocks."""
    return [Checked(array.pieces[0].path, tuple(array.extent(piece) for piece in array.pieces)) for array in arrays]


def _state_names(encoder: Any) -> list[str]:
    """Files of an encoder's states; ``inputs`` are the features behind its head, where it has one."""
    kept = [f"{part}{layer}" for layer in range(len(encoder.blocks)) for part in ("keys", "values")]
    return [*kept, "thresholds", "refined", *(["inputs"] if encoder.head is not None else [])]


def _spans(start: int, stop: int, size: int, label: str) -> Iterator[tuple[int, int]]:
    with tqdm(total=stop - start, desc=label, unit="row", leave=False, disable=None) as bar:
        for low in range(start, stop, size):
            yield low, min(low + size, stop)
            bar.update(min(size, stop - low))


def _open_layers(folder: Path, encoder: Any, files: dict[str, list[Piece]], dtype: str, digest: str) -> list[_Layer]:
    path = folder / "projections.pt"
    if not path.is_file():
        raise UserError(f"'{folder}' is damaged: 'projections.pt' is missing; {_FULL}")
    check_digest(path, digest)
    layers = []
    for number, (block, sides) in enumerate(zip(encoder.blocks, torch.load(path, weights_only=True))):
        to_query, to_key = (side.to(_device(encoder)) for side in sides)
        attention = block.attn
        shape = (attention.num_maps, to_key.shape[1] // attention.num_maps)
        keys = ChunkedArray(files[f"keys{number}"], shape, dtype, growing=True)
        values = ChunkedArray(files[f"values{number}"], (attention.num_heads, attention.head_dim), dtype, growing=True)
        layers.append(_Layer(to_query, to_key, keys, values, attention.states_type))
    return layers
