"""A full pass by several processes, each with its part of the gallery's rows; neighbours' lists and values are exchanged.

The states are those of one process up to the rounding of sums (1e-6): exact neighbours, the same landmarks, the same order
of slots. A process reads the features of its own rows only, and holds them, its neighbour lists, and what a block of
:data:`~relreid_plugin.search.layers._STEP` rows attends to. All of them write into one folder of states, each at its rows;
every process has a journal of its own, so a pass that was killed goes on block by block with as many processes as before.

Shape letters: N gallery rows, n rows of a process, d width, k neighbours, K slots of a graph row.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..collective import rank, world
from ..engine.checkpoint import atomic_file
from ..engine.distributed import check_shared, from_main, main_holds, wait_for_all
from ..errors import UserError
from ..features.arrays import ChunkedArray, Piece
from ..features.store import FeatureStore, writer_lock
from ..files import clear_leftovers, make_folder
from ..metrics.cameras import CameraLists
from .edges import CameraEdges, edges_of
from .engines import FileEngine
from .exchange import exchange, gathered, most, neighbours, part_of
from .layers import (
    _STEP,
    _attending,
    _device,
    _Journal,
    _Layer,
    _own_states,
    _spans,
    _state_names,
    encoder_fingerprint,
)
from .passes import embedded, inputs_of, next_pass, projections_of, states_type
from .relations import BLOCK_ROWS, publish_states, require_usable


class ShardedPass:
    """One process's part in a full pass.

    Args:
        store: The gallery, on a file system that all processes see.
        encoder: Relation encoder in evaluation mode, with neighbours by feature.
        block_rows: Rows per block of the journal.

    Raises:
        UserError: An encoder that one process alone can refine a gallery by.
    """

    def __init__(self, store: FeatureStore, encoder: Any, *, block_rows: int = BLOCK_ROWS) -> None:
        require_usable(encoder, store)
        if encoder.landmarks == "farthest":
            raise UserError(
                "a gallery with farthest landmarks is refined by one process; run relreid refine without torchrun."
            )
        self.store, self.encoder, self.block = store, encoder, block_rows
        self.size, self.k = len(store), min(encoder.k, len(store))
        self.low, self.high = part_of(self.size)
        self.folder = FileEngine(store).folder(encoder)
        self.camids = None if encoder.rule is None else store.camids
        self.edges = edges_of(encoder, self.camids, self.size)
        self.alive = store.alive

    def _current(self) -> bool:
        """Whether there are states of a full pass over the whole gallery."""
        with contextlib.suppress(UserError):
            states = FileEngine(self.store).states(self.encoder, verify=False, camids=self.camids)
            return states.rows == states.base_rows == self.size
        return False

    def run(self, *, full: bool = False) -> None:
        """Refine the gallery where it was not, or go on where a killed pass was.

        Args:
            full: Make a pass also where all images were refined together.

        Raises:
            UserError: Another writer, a folder that not all processes see, or damaged features.
        """
        if self.size < world():
            raise UserError(f"{world()} processes are too many for {self.size} images; start fewer.")
        if not full and from_main(self._current):
            return
        with main_holds(lambda: writer_lock(self.folder)):
            from_main(lambda: clear_leftovers(self.folder, below=True))
            check_shared(self.folder)
            place = from_main(lambda: next_pass(self.folder))
            name = f"journal-{rank():03d}-of-{world():03d}.txt"
            header = self._header()
            if not all(gathered(_Journal.continues(place / name, header))):
                wait_for_all()
                from_main(lambda: shutil.rmtree(place, ignore_errors=True))
                from_main(lambda: make_folder(place))
                for number in range(len(self.store.array.pieces)):
                    first, last = self.store.array.firsts[number : number + 2]
                    if first < self.high and last > self.low:
                        self.store.array.verify(number)
            with _Journal(place / name, header) as journal:
                projections = self._refine(journal)
                journal.flush()
                pieces = gathered({name: journal.pieces(name) for name in _state_names(self.encoder)})
            from_main(lambda: self._publish(place, pieces, projections))
            wait_for_all()

    def _header(self) -> dict[str, Any]:
        header = {"encoder": encoder_fingerprint(self.encoder), "table": self.store.fingerprint(), "block": self.block}
        header.update({"processes": world(), "rank": rank(), "search": "exact"})
        header.update(self.edges.header(self.size))
        if self.alive is not None:
            header["alive"] = hashlib.sha256(self.alive.numpy().tobytes()).hexdigest()[:32]
        return header

    def _publish(self, place: Path, pieces: list[dict[str, list[Piece]]], projections: list[tuple[Tensor, Tensor]]) -> None:
        with atomic_file(place / "projections.pt") as temporary:
            torch.save([(first.cpu(), second.cpu()) for first, second in projections], temporary)
        digest = hashlib.sha256((place / "projections.pt").read_bytes()).hexdigest()
        files = {name: [piece for each in pieces for piece in each[name]] for name in pieces[0]}
        kind = states_type(self.encoder)
        publish_states(self.folder, self.store, self.encoder, self.edges, self.size, place, files, kind, digest)
        for name in (*self.edges.temporary(), *(f"x{number}" for number in range(1, len(self.encoder.blocks)))):
            (place / f"{name}.bin").unlink(missing_ok=True)
        for path in [*place.glob("journal-*"), *place.glob("projections-*")]:
            path.unlink()
        for other in self.folder.glob("pass-*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)

    # --- the parts of a pass ------------------------------------------------------------------------------------------
    def _steps(self, size: int) -> list[tuple[int, int]]:
        """Own rows in steps, as many in every process; the last ones may be empty."""
        count = most(-(-(self.high - self.low) // size))
        return [(min(self.low + i * size, self.high), min(self.low + (i + 1) * size, self.high)) for i in range(count)]

    def _array(self, journal: _Journal, name: str, shape: tuple[int, ...], dtype: str) -> ChunkedArray:
        """A file's own rows, numbered from 0 on; others write theirs into the same file."""
        journal.flush()
        return ChunkedArray(journal.pieces(name), shape, dtype, growing=True)

    @torch.no_grad()
    def _refine(self, journal: _Journal) -> list[tuple[Tensor, Tensor]]:
        encoder, dim = self.encoder, self.store.dim
        own: Callable[[Tensor], Tensor] = lambda rows: self.store.take(rows + self.low)  # noqa: E731
        if encoder.head is not None:
            for start, stop in _spans(self.low, self.high, self.block, "head"):
                if not journal.has(start, "inputs"):
                    journal.put("inputs", start, inputs_of(encoder, self.store.read(start, stop)))
            own = self._array(journal, "inputs", (dim,), "float32").take
        if isinstance(self.edges, CameraEdges):
            self._search_by_camera(journal, own, self.edges)
            self._graph_by_camera(journal, self.edges)
        else:
            self._search(journal, own)
            self._graph(journal)
        projections: list[tuple[Tensor, Tensor]] = []
        for number in range(len(encoder.blocks)):
            own_x = self._array(journal, f"x{number}", (dim,), "float32").take if number else own
            projections.append(self._projections(own_x, number))
            self._layer(journal, number, own_x, own, projections[number])
        return projections

    def _search(self, journal: _Journal, own: Callable[[Tensor], Tensor]) -> None:
        if most(int(not journal.has(self.low, "lists", "thresholds"))):
            rows, scores = neighbours(self.size, self.store.dim, self.k, own, alive=self.alive)
            itself = torch.arange(self.low, self.high).unsqueeze(1)
            rows = torch.where(rows < 0, torch.where(rows[:, :1] < 0, itself, rows[:, :1]), rows)
            journal.put("lists", self.low, rows.sort(dim=1).values.int())
            journal.put("thresholds", self.low, scores[:, -1])

    def _graph(self, journal: _Journal) -> None:
        lists = self._array(journal, "lists", (self.k,), "int32")
        for start, stop in self._steps(_STEP):
            there = start == stop or journal.has(start, "index", "mask")
            if not most(int(not there)):
                continue
            rows = lists.read(start - self.low, stop - self.low).long()
            wanted = rows.unique()
            theirs = exchange(wanted, self.size, lists.take).long()
            own = torch.arange(start, stop).unsqueeze(1)
            others = theirs[torch.searchsorted(wanted, rows.flatten())].view(*rows.shape, self.k)
            mask = (others == own.unsqueeze(2)).any(dim=2) & (rows != own)
            mask[:, 1:] &= rows[:, 1:] != rows[:, :-1]
            if not there:
                journal.put("index", start, torch.cat([rows, own], dim=1).int())
                journal.put("mask", start, torch.cat([mask, torch.ones_like(own, dtype=torch.bool)], dim=1))
        journal.flush()

    def _search_by_camera(self, journal: _Journal, own: Callable[[Tensor], Tensor], edges: CameraEdges) -> None:
        other, same = edges.rule.depth
        names = ["thresholds", *(["lists", "scores"] if other + same else [])]
        if not most(int(not journal.has(self.low, *names))):
            return
        index = torch.zeros(self.high - self.low, other + same, dtype=torch.long)
        scores = torch.full(index.shape, -torch.inf)
        for near, first, count in ((False, 0, other), (True, other, same)):
            count = min(count, self.size)
            if not count:
                continue

            def barred(rows: Tensor, columns: Tensor, near: bool = near) -> Tensor:
                alike = edges.cameras[rows].unsqueeze(1) == edges.cameras[columns]
                return ~alike | (rows.unsqueeze(1) == columns) if near else alike

            found = neighbours(self.size, self.store.dim, count, own, alive=self.alive, barred=barred)
            index[:, first : first + count], scores[:, first : first + count] = found[0].clamp_min(0), found[1]
        if other + same:
            journal.put("lists", self.low, index.int())
            journal.put("scores", self.low, scores)
        journal.put("thresholds", self.low, edges.rule.thresholds(CameraLists(index, scores, other)))

    def _graph_by_camera(self, journal: _Journal, edges: CameraEdges) -> None:
        own = self._array(journal, "thresholds", edges.shape, "float32")
        thresholds = edges.settled(exchange(torch.arange(self.size), self.size, own.take))
        lists = edges.lists(functools.partial(self._array, journal))
        for start, stop in _spans(self.low, self.high, _STEP, "graph"):
            if journal.has(start, "index", "mask", "bias"):
                continue
            found, rows = lists(start - self.low, stop - self.low), torch.arange(start, stop)
            index, mask, bias = edges.rule.joined(found, thresholds, rows)
            journal.put("index", start, index.int())
            journal.put("mask", start, mask)
            journal.put("bias", start, bias)
        journal.flush()

    def _projections(self, own: Callable[[Tensor], Tensor], number: int) -> tuple[Tensor, Tensor]:
        """The layer's landmarks, which are the same in every process, folded into both projections."""
        kept = torch.arange(self.size) if self.alive is None else self.alive.nonzero().flatten()
        drawn = kept[self.encoder.landmark_rows(torch.empty(1, 1).expand(len(kept), 1), number)]
        rows, order = drawn.sort()
        found = torch.empty(len(rows), self.store.dim)
        found[order] = exchange(rows, self.size, own)
        return projections_of(self.encoder, found, number)

    def _layer(
        self,
        journal: _Journal,
        number: int,
        own_x: Callable[[Tensor], Tensor],
        first: Callable[[Tensor], Tensor],
        projections: tuple[Tensor, Tensor],
    ) -> None:
        encoder, device, last = self.encoder, _device(self.encoder), len(self.encoder.blocks) - 1
        block, output = encoder.blocks[number], "refined" if number == last else f"x{number + 1}"
        label, dim = f"layer {number + 1}/{last + 1}", self.store.dim
        to_query, to_key = (side.to(device) for side in projections)
        names = f"keys{number}", f"values{number}"
        for start, stop in _spans(self.low, self.high, self.block, f"{label} states"):
            if not journal.has(start, *names):
                x = own_x(torch.arange(start - self.low, stop - self.low)).to(device)
                with encoder.autocast(device):
                    keys, values = _own_states(block, to_key, x)
                journal.put(names[0], start, keys)
                journal.put(names[1], start, values)
        attention, kind = block.attn, states_type(encoder)
        shapes = (attention.num_maps, to_key.shape[1] // attention.num_maps), (attention.num_heads, attention.head_dim)
        stored = [self._array(journal, name, shape, kind) for name, shape in zip(names, shapes)]
        layer = _Layer(to_query, to_key, stored[0], stored[1], attention.states_type)
        graph = self.edges.graph(functools.partial(self._array, journal), self.size)
        for start, stop in self._steps(self.block):
            there = start == stop or journal.has(start, output)
            if not most(int(not there)):
                continue
            made = torch.empty(stop - start, dim)
            for low in range(start, start + most(stop - start), _STEP):
                low, high = min(low, stop), min(low + _STEP, stop)
                index, mask, bias = graph(low - self.low, high - self.low)
                wanted = torch.cat([index[mask].long(), torch.arange(low, high)]).unique()
                if there:  # what others ask for is answered all the same
                    wanted = wanted[:0]
                keys, values = (exchange(wanted, self.size, array.take) for array in stored)
                if there or low == high:
                    continue
                x = own_x(torch.arange(low - self.low, high - self.low)).to(device)
                slots = torch.searchsorted(wanted, index.long()).clamp_max(len(wanted) - 1)
                states = layer.kind(to_query, to_key, keys.to(device), values.to(device))
                with encoder.autocast(device):
                    x = _attending(block, layer, states, x, slots.to(device), mask.to(device), bias)
                if number == last:
                    x = embedded(encoder, x, first(torch.arange(low - self.low, high - self.low)))
                made[low - start : high - start] = x.cpu()
            if not there:
                journal.put(output, start, made)
        journal.flush()


__all__ = ["ShardedPass"]
