"""A gallery refined on disk: every layer's states of the inductive protocol, so that a query costs O(L k d).

An encoder's ``refine_gallery`` keeps the states of a gallery in main memory. Here
they are computed block by block and written to files, one per layer and kind, so that neither the features nor the states
have to fit into memory, and a killed pass goes on at the block where it was. The numbers are the same up to the rounding of
sums (1e-6).

A folder of states::

    states.json        manifest, written last and atomically, with a SHA-256 per block
    pass-0001/         files of the newest full pass and of what was appended to it
        projections.pt     landmarks folded into the projections, per layer
        keys0.bin, values0.bin, …, thresholds.bin, refined.bin

A layer reads its neighbours' values through the memory map of one file; what is computed is hashed and written by a thread
of its own while the next block is computed. The machine should have memory left for the pages of one layer's values (2 GiB
for a million rows of width 512); with less the pass is as slow as the disk.

**What is approximate.** A full pass lets all gallery images look at each other. Images that are appended later are refined
as if they were queries: they see the images that were refined before, and later queries see them; but the images of before
do not see them (their refined features, neighbours and thresholds stay), images appended together do not see each other,
and the landmarks stay those of the pass. A full pass over the grown gallery makes it exact again.

Shape letters: N gallery rows, Q queries, n rows of a block, d width, k neighbours, L layers, G maps, p landmarks, H heads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..engine.checkpoint import atomic_file, read_tensors, write_tensors
from ..errors import UserError
from ..features.arrays import ChunkedArray, Piece, RowTable, read_manifest, write_manifest
from ..features.store import writer_lock
from ..features.verified import Checked, check_once, trust
from ..files import clear_leftovers, make_folder
from ..metrics.neighbours import topk_neighbours
from ..metrics.reciprocal import ReciprocalGraph, kth_scores
from .index import TableIndex
from .layers import (
    _FULL,
    _HELD,
    _SEARCHED,
    _SINGLE,
    _STEP,
    _checked,
    _device,
    _gallery_layer,
    _Journal,
    _Layer,
    _open_layers,
    _own_states,
    _query_layer,
    _query_neighbours,
    _spans,
    _state_names,
    encoder_fingerprint,
)

FORMAT = 2
MANIFEST = "states.json"
BLOCK_ROWS = 16_384


class RelationStates:
    """The states of a refined gallery, opened to refine queries against them.

    Args:
        folder: Folder of states, written by :func:`refine_table`.
        table: The gallery's features.
        encoder: The encoder that refined them, in evaluation mode.
        verify: Compare every file with its SHA-256.

    Attributes:
        rows: Gallery rows that are refined.
        base_rows: Those that saw each other in the full pass; the rest was refined as if they were queries.
        refined: (rows, d) unit test features of the gallery.

    Raises:
        UserError: No states, damaged ones, those of another encoder or of other features.
    """

    def __init__(self, folder: Path | str, table: RowTable, encoder: Any, *, verify: bool = False) -> None:
        _require_usable(encoder, table)
        self.folder, self.table, self.encoder = Path(folder), table, encoder
        if not (self.folder / MANIFEST).is_file():
            raise UserError(
                f"the gallery was not refined yet ('{self.folder / MANIFEST}' does not exist); refine it by "
                "GallerySearcher.refine or tools/search.py --relations."
            )
        manifest = read_manifest(self.folder / MANIFEST, what="refined gallery", version=FORMAT, remedy=_FULL)
        try:
            self._open(manifest)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"'{self.folder / MANIFEST}' is damaged (entries are missing); {_FULL}") from None
        if verify:
            self.verify()
        else:
            check_once(_checked(self._arrays))

    def _open(self, manifest: dict[str, Any]) -> None:
        table, encoder = self.table, self.encoder
        if manifest["encoder"] != encoder_fingerprint(encoder):
            raise UserError(f"the states in '{self.folder}' are those of another relation encoder; {_FULL}")
        self.rows, self.base_rows = int(manifest["rows"]), int(manifest["base_rows"])
        if self.rows > len(table) or table.fingerprint(self.rows) != manifest["table"]:
            raise UserError(f"the states in '{self.folder}' belong to other features than the store's; {_FULL}")
        self.pass_folder = self.folder / manifest["pass"]
        self.files: dict[str, list[Piece]] = {
            name: [Piece(self.pass_folder / f"{name}.bin", rows, digest, first) for first, rows, digest in entries]
            for name, entries in manifest["files"].items()
        }
        self._projections_digest, self._dtype = manifest["projections"], manifest["dtype"]
        self.layers = _open_layers(self.pass_folder, encoder, self.files, self._dtype, self._projections_digest)
        self._arrays = [array for layer in self.layers for array in (layer.keys, layer.values)]
        refined = ChunkedArray(self.files["refined"], (table.dim,), "float32", growing=True)
        thresholds = ChunkedArray(self.files["thresholds"], (), "float32", growing=True)
        self._arrays += [thresholds, refined]
        self._thresholds = thresholds.read(0, self.rows)
        self.refined = RowTable(refined, f"refined|{manifest['encoder']}")

    def verify(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            UserError: A file was changed.
        """
        pieces = [(array, number) for array in self._arrays for number in range(len(array.pieces))]
        for array, number in tqdm(pieces, desc="verifying", leave=False, disable=None):
            array.verify(number)

    def online_files(self) -> list[Path]:
        """The files that queries are refined against."""
        names = [f"{part}{layer}" for part in ("values", "keys") for layer in range(len(self.layers))]
        return [self.pass_folder / f"{name}.bin" for name in names]

    @torch.no_grad()
    def refine_queries(self, queries: Tensor, index: TableIndex) -> Tensor:
        """Refine every query as if it were alone with the gallery.

        Args:
            queries: (Q, d) unit features.
            index: Of the gallery's input features.

        Returns:
            (Q, d) unit test features, on the CPU: those of ``encoder.refine_queries``.
        """
        parts = [self._refine(part, index) for part in queries.float().split(_STEP)] if len(queries) else []
        return torch.cat(parts) if parts else queries.new_empty(0, self.table.dim)

    def _refine(self, queries: Tensor, index: TableIndex) -> Tensor:
        encoder = self.encoder
        rows, mask, _ = _query_neighbours(queries, index, lambda found: self._thresholds[found], encoder.k, self.rows)
        if len(queries) <= _SINGLE and hasattr(mmap, "MADV_WILLNEED"):
            wanted = rows[mask]
            for layer in self.layers:
                layer.values.prefetch(wanted)
        x = queries.to(_device(encoder))
        with encoder.autocast(_device(encoder)):
            for block, layer in zip(encoder.blocks, self.layers):
                x = _query_layer(block, layer, x, rows, mask)
        return encoder.neck.embed(x.float()).cpu()

    @torch.no_grad()
    def _append(self, index: TableIndex, block_rows: int) -> None:
        """Refine the table's new rows as if they were queries and add their states."""
        encoder, table, known = self.encoder, self.table, self.rows
        header = {"from": known, "to": len(table), "table": table.fingerprint(), "block": block_rows}
        table.check(known)
        names = _state_names(len(self.layers))
        with _Journal(self.pass_folder / "appended.txt", header) as journal:
            for start, stop in _spans(known, len(table), block_rows, "refining new images"):
                if journal.has(start, *names):
                    continue
                made: dict[str, list[Tensor]] = {name: [] for name in names}
                for x in table.read(start, stop).split(_STEP):
                    rows, mask, own = _query_neighbours(x, index, lambda found: self._thresholds[found], encoder.k, known)
                    made["thresholds"].append(own)
                    x = x.to(_device(encoder))
                    with encoder.autocast(_device(encoder)):
                        for number, (block, layer) in enumerate(zip(encoder.blocks, self.layers)):
                            keys, values = _own_states(block, layer.to_key, x)
                            made[f"keys{number}"].append(keys.cpu())
                            made[f"values{number}"].append(values.cpu())
                            x = _query_layer(block, layer, x, rows, mask)
                    made["refined"].append(encoder.neck.embed(x.float()).cpu())
                for name in names:
                    journal.put(name, start, torch.cat(made[name]))
        files = {name: [*self.files[name], *journal.pieces(name)] for name in names}
        _publish(self.folder, self.pass_folder, table, encoder, files, self._dtype, self._projections_digest, self.base_rows)
        journal.path.unlink()
        trust(
            [
                Checked(array.pieces[0].path, tuple(array.extent(piece) for piece in files[name]))
                for name, array in zip(names, self._arrays)
            ]
        )


def refine_table(
    folder: Path | str,
    table: RowTable,
    encoder: Any,
    index: TableIndex,
    *,
    full: bool = False,
    block_rows: int = BLOCK_ROWS,
    verify: bool = False,
) -> RelationStates:
    """Refine a gallery on disk, or the rows that were appended since; a killed call is taken up by the next one.

    Args:
        folder: Where the states go.
        table: (N, d) unit features.
        encoder: Relation encoder in evaluation mode, with feature neighbours.
        index: Of the table.
        full: Make a full pass, also where only new rows are to be refined (see "What is approximate" above).
        block_rows: Rows per file.
        verify: Compare the states that are there already with their SHA-256.

    Returns:
        The states of all N rows.

    Raises:
        UserError: An empty table, an encoder that does not fit, affinity neighbours, or damaged files or states of other
            features that a full pass would replace.
    """
    folder = Path(folder)
    _require_usable(encoder, table)
    if not len(table):
        raise UserError("the gallery is empty; extract features of some images first.")
    with writer_lock(folder):
        clear_leftovers(folder, below=True)
        if full or not (folder / MANIFEST).is_file():
            _full_pass(folder, table, encoder, index, block_rows)
        else:
            states = RelationStates(folder, table, encoder, verify=verify)
            if states.rows == len(table):
                return states
            states._append(index, block_rows)
    return RelationStates(folder, table, encoder)


def _require_usable(encoder: Any, table: RowTable) -> None:
    if encoder.training:
        raise RuntimeError("call eval() first: refining a gallery is defined for testing only.")
    if encoder.neighbours != "feature":
        why = "every layer would search the whole gallery" if encoder.neighbours == "affinity" else "they are not stored"
        raise UserError(f"a gallery on disk needs 'relation.neighbours feature': with '{encoder.neighbours}' {why}.")
    if encoder.head is not None or encoder.residual:
        raise UserError("a gallery on disk is refined without 'relation.head' and 'relation.residual'; leave both out.")
    if encoder.dim != table.dim:
        raise UserError(
            f"the relation encoder has width {encoder.dim} and the store {table.dim}; both need the same image model."
        )


def _publish(
    folder: Path,
    pass_folder: Path,
    table: RowTable,
    encoder: Any,
    files: dict[str, list[Piece]],
    dtype: str,
    projections: str,
    base_rows: int,
) -> None:
    """Write the manifest: from now on the states are those of ``pass_folder``, for all rows of the table."""
    entries = {name: [[piece.first, piece.rows, piece.digest] for piece in pieces] for name, pieces in files.items()}
    manifest = {
        "format": FORMAT,
        "encoder": encoder_fingerprint(encoder),
        "table": table.fingerprint(),
        "rows": len(table),
        "base_rows": base_rows,
        "pass": pass_folder.name,
        "dtype": dtype,
        "projections": projections,
        "files": entries,
    }
    write_manifest(folder / MANIFEST, manifest)


def _next_pass(folder: Path) -> Path:
    """The folder of a pass that is not the one in use."""
    used = None
    if (folder / MANIFEST).is_file():
        with contextlib.suppress(UserError, KeyError):
            used = read_manifest(folder / MANIFEST, what="refined gallery", version=FORMAT, remedy=_FULL)["pass"]
    return folder / ("pass-0002" if used == "pass-0001" else "pass-0001")


@torch.no_grad()
def _full_pass(folder: Path, table: RowTable, encoder: Any, index: TableIndex, block_rows: int) -> None:
    place = _next_pass(folder)
    header = {"encoder": encoder_fingerprint(encoder), "table": table.fingerprint(), "block": block_rows}
    header["search"] = _kind(index) if index.exact else str(index.config)
    if not _Journal.continues(place / "journal.txt", header):
        shutil.rmtree(place, ignore_errors=True)
        make_folder(place)
        table.check()
    with _Journal(place / "journal.txt", header) as journal:
        _search_neighbours(journal, table, encoder.k, index)
        _make_graph(journal, min(encoder.k, len(table)))
        projections = _refine_layers(journal, table, encoder, block_rows)
    with atomic_file(place / "projections.pt") as temporary:
        torch.save([(first.cpu(), second.cpu()) for first, second in projections], temporary)
    digest = hashlib.sha256((place / "projections.pt").read_bytes()).hexdigest()
    files = {name: journal.pieces(name) for name in _state_names(len(encoder.blocks))}
    _publish(folder, place, table, encoder, files, _states_type(encoder), digest, len(table))
    for name in ("lists.bin", "index.bin", "mask.bin", "projections.part", "journal.txt"):
        (place / name).unlink(missing_ok=True)
    for other in folder.glob("pass-*"):
        if other != place:
            shutil.rmtree(other, ignore_errors=True)


def _kind(index: TableIndex) -> str:
    """How an index without cells or links searches many rows."""
    return "scan" if index.config.index == "scan" else "flat"


def _states_type(encoder: Any) -> str:
    return "bfloat16" if encoder.precision == "bfloat16" else "float32"


def _search_neighbours(journal: _Journal, table: RowTable, k: int, index: TableIndex) -> None:
    """Every row's neighbour list (rows rising, int32) and the score of its last neighbour.

    Without an approximate index :func:`topk_neighbours` searches, which has the features in memory, or, where they are too
    large for that, the table is read once for every thousand rows.
    """
    size = len(table)
    held = table.read() if index.exact and size * table.dim <= _HELD else None
    step = size if held is not None and size <= 4 * _SEARCHED else _SEARCHED  # a set with itself is half the work
    for start, stop in _spans(0, size, step, "neighbours"):
        if journal.has(start, "lists", "thresholds"):
            continue
        if held is not None:
            some = held if step == size else held[start:stop]
            rows = topk_neighbours(
                some, held, k, config=dataclasses.replace(index.config, backend="torch", index=_kind(index))
            )
            journal.put("lists", start, rows.int())
            journal.put("thresholds", start, kth_scores(some, held, rows))
            continue
        rows, last = index.neighbours(table.read(start, stop), k)
        own = torch.arange(start, stop).unsqueeze(1)
        rows = torch.where(rows < 0, torch.where(rows[:, :1] < 0, own, rows[:, :1]), rows)
        journal.put("lists", start, rows.sort(dim=1).values.int())
        journal.put("thresholds", start, last)


def _make_graph(journal: _Journal, k: int) -> None:
    """The reciprocal graph: rows (N, k + 1), the last slot for rows that are not in their own list, and the kept slots."""
    lists = journal.array("lists", (k,), "int32")
    whole = lists.read(0, len(lists))
    for start, stop in _spans(0, len(lists), _SEARCHED, "graph"):
        if journal.has(start, "index", "mask"):
            continue
        indices, masks = [], []
        for low in range(start, stop, _STEP):
            rows = whole[low : min(low + _STEP, stop)]
            own = torch.arange(low, low + len(rows), dtype=torch.int32).unsqueeze(1)
            others = whole.index_select(0, rows.flatten()).view(*rows.shape, k)
            mask = (others == own.unsqueeze(2)).any(dim=2) & (rows != own)
            mask[:, 1:] &= rows[:, 1:] != rows[:, :-1]
            indices.append(torch.cat([rows, own], dim=1))
            masks.append(torch.cat([mask, torch.ones_like(own, dtype=torch.bool)], dim=1))
        journal.put("index", start, torch.cat(indices))
        journal.put("mask", start, torch.cat(masks))
    journal.flush()


def _refine_layers(journal: _Journal, table: RowTable, encoder: Any, block_rows: int) -> list[tuple[Tensor, Tensor]]:
    """Every layer's states and the refined features; returns the layers' folded projections."""
    size, device, place = len(table), _device(encoder), journal.folder
    k = min(encoder.k, size)
    indices, masks = journal.array("index", (k + 1,), "int32"), journal.array("mask", (k + 1,), "bool")
    projections: list[tuple[Tensor, Tensor]] = []
    if (place / "projections.part").is_file():
        projections = _landmarks_so_far(place / "projections.part")
    last = len(encoder.blocks) - 1
    for number, block in enumerate(encoder.blocks):
        output = "refined" if number == last else f"x{number + 1}"
        label = f"layer {number + 1}/{last + 1}"
        starts = range(0, size, block_rows)
        if all(journal.has(start, output) for start in starts) and len(projections) > number:
            continue
        inputs = RowTable(journal.array(f"x{number}", (table.dim,), "float32"), "") if number else table
        if len(projections) == number:
            projections.append(_projections(encoder, inputs, number))
            write_tensors(place / "projections.part", [(first.cpu(), second.cpu()) for first, second in projections])
        to_query, to_key = (side.to(device) for side in projections[number])
        for start, stop in _spans(0, size, block_rows, f"{label} states"):
            if not journal.has(start, f"keys{number}", f"values{number}"):
                with encoder.autocast(_device(encoder)):
                    keys, values = _own_states(block, to_key, inputs.read(start, stop).to(device))
                journal.put(f"keys{number}", start, keys)
                journal.put(f"values{number}", start, values)
        maps, heads = block.attn.num_maps, block.attn.num_heads
        layer = _Layer(
            to_query,
            to_key,
            journal.array(f"keys{number}", (maps, to_key.shape[1] // maps), _states_type(encoder)),
            journal.array(f"values{number}", (heads, block.attn.head_dim), _states_type(encoder)),
            block.attn.states_type,
        )
        mapped = layer.mapped()
        for start, stop in _spans(0, size, block_rows, f"{label} attention"):
            if journal.has(start, output):
                continue
            made = torch.empty(stop - start, table.dim)
            for low in range(start, stop, _STEP):
                high = min(low + _STEP, stop)
                x, kept = inputs.read(low, high).to(device), masks.read(low, high)
                with encoder.autocast(_device(encoder)):
                    x = _gallery_layer(block, layer, mapped, x, indices.read(low, high), kept)
                made[low - start : high - start] = encoder.neck.embed(x.float()) if number == last else x
            journal.put(output, start, made)
        journal.flush()
        if number:
            (place / f"x{number}.bin").unlink(missing_ok=True)
    return projections


def _landmarks_so_far(path: Path) -> list[tuple[Tensor, Tensor]]:
    """The projections of the layers that a killed pass had finished."""
    try:
        return read_tensors(path)
    except Exception as error:  # a damaged file raises all kinds of exceptions
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise UserError(f"'{path}' is damaged ({reason}); delete '{path.parent}' and refine the gallery again.") from None


def _projections(encoder: Any, inputs: RowTable, number: int) -> tuple[Tensor, Tensor]:
    """The layer's landmarks folded into both projections, (d, G * p) each."""
    size = len(inputs)
    shaped = inputs.read() if encoder.landmarks == "farthest" else torch.empty(1, 1).expand(size, 1)
    landmarks = inputs.take(encoder.landmark_rows(shaped, number)).to(_device(encoder))
    own = torch.arange(len(landmarks), device=landmarks.device)
    alone = ReciprocalGraph(own.unsqueeze(1), torch.ones_like(own, dtype=torch.bool).unsqueeze(1), own.unsqueeze(1))
    with encoder.autocast(_device(encoder)):
        block: Any = encoder.blocks[number]
        states = block.attn.states(landmarks, own, graph=alone)[0]
    return states.query_projection, states.key_projection
