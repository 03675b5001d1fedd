"""A gallery refined on disk: every layer's states of the inductive protocol, so that a query costs O(L k d).

An encoder's ``refine_gallery`` keeps the states of a gallery in main memory. Here
they are computed block by block and written to files, one per layer and kind, so that neither the features nor the states
have to fit into memory, and a killed pass goes on at the block where it was. The numbers are the same up to the rounding of
sums (1e-6).

A folder of states::

    states.json        manifest, written last and atomically, with a SHA-256 per block
    pass-0001/         files of the newest full pass and of what was appended to it
        projections.pt     landmarks folded into the projections, per layer
        keys0.bin, values0.bin, …, thresholds.bin, refined.bin, inputs.bin (features behind the head, where there is one)

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

import functools
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..features.arrays import ChunkedArray, Piece, RowTable, read_manifest, write_manifest
from ..features.store import writer_lock
from ..features.verified import Checked, check_once, trust
from ..files import clear_leftovers
from ..metrics.cameras import UNKNOWN, as_cameras, stays_alone
from .edges import edges_of
from .index import TableIndex, open_index
from .layers import (
    _FULL,
    _SINGLE,
    _STEP,
    _checked,
    _Journal,
    _Layer,
    _open_layers,
    _spans,
    _state_names,
    encoder_fingerprint,
)
from .online import refine_rows, states_of_rows
from .passes import FORMAT, MANIFEST, full_pass, inputs_table

BLOCK_ROWS = 16_384


class RelationStates:
    """The states of a refined gallery, opened to refine queries against them.

    Args:
        folder: Folder of states, written by :func:`refine_table`.
        table: The gallery's features.
        encoder: The encoder that refined them, in evaluation mode.
        verify: Compare every file with its SHA-256.
        camids: (N,) cameras of the gallery, for an encoder that counts neighbours by camera.

    Attributes:
        rows: Gallery rows that are refined.
        base_rows: Those that saw each other in the full pass; the rest was refined as if they were queries.
        refined: (rows, d) unit test features of the gallery.
        thresholds: (rows, …) what a query must score to be a row's neighbour.
        dtype: Type of keys and values.
        digest: SHA-256 of the layers' projections.
        inputs: (rows, d) what is searched for neighbours: the gallery's features, behind the encoder's head where there
            is one.

    Raises:
        UserError: No states, damaged ones, those of another encoder or of other features.
    """

    def __init__(
        self,
        folder: Path | str,
        table: RowTable,
        encoder: Any,
        *,
        verify: bool = False,
        camids: np.ndarray | None = None,
    ) -> None:
        require_usable(encoder, table)
        self.folder, self.table, self.encoder = Path(folder), table, encoder
        self._edges = edges_of(encoder, camids, len(table))
        self._cameras = as_cameras(camids, len(table), missing=UNKNOWN)
        if not (self.folder / MANIFEST).is_file():
            raise UserError(
                f"the gallery was not refined yet ('{self.folder / MANIFEST}' does not exist); refine it by "
                "GallerySearcher.refine or relreid refine."
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
        if any(manifest.get(key) != value for key, value in self._edges.header(self.rows).items()):
            raise UserError(f"the states in '{self.folder}' belong to other cameras than the store's; {_FULL}")
        self.pass_folder = self.folder / manifest["pass"]
        self.files: dict[str, list[Piece]] = {
            name: [Piece(self.pass_folder / f"{name}.bin", rows, digest, first) for first, rows, digest in entries]
            for name, entries in manifest["files"].items()
        }
        self.digest, self.dtype = manifest["projections"], manifest["dtype"]
        self.layers = _open_layers(self.pass_folder, encoder, self.files, self.dtype, self.digest)
        self._arrays = [array for layer in self.layers for array in (layer.keys, layer.values)]
        refined = ChunkedArray(self.files["refined"], (table.dim,), "float32", growing=True)
        thresholds = ChunkedArray(self.files["thresholds"], self._edges.shape, "float32", growing=True)
        self._arrays += [thresholds, refined]
        self.inputs: RowTable = table
        if encoder.head is not None:
            self._arrays.append(ChunkedArray(self.files["inputs"], (table.dim,), "float32", growing=True))
            self.inputs = inputs_table(encoder, self._arrays[-1])
        self.thresholds = self._edges.settled(thresholds.read(0, self.rows), self.base_rows)
        self.refined = RowTable(refined, f"refined|{manifest['encoder']}")

    @property
    def alone(self) -> bool:
        """Whether every image stays alone, since the gallery's images have too little company."""
        return stays_alone(self.thresholds)

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
    def refine_queries(self, queries: Tensor, index: TableIndex, camids: Any = None) -> Tensor:
        """Refine every query as if it were alone with the gallery.

        Args:
            queries: (Q, d) unit features.
            index: Of :attr:`inputs`.
            camids: (Q,) cameras as the gallery has them, read where the encoder counts neighbours by camera; -1 or ``None``:
                unknown, every gallery image is one of another camera.

        Returns:
            (Q, d) unit test features, on the CPU: those of ``encoder.refine_queries``.

        Raises:
            UserError: Not one camera per query.
        """
        own = as_cameras(camids, len(queries), missing=UNKNOWN)
        parts = zip(queries.float().split(_STEP), own.split(_STEP)) if len(queries) else ()
        refined = [self._refine(part, cameras, index) for part, cameras in parts]
        return torch.cat(refined) if refined else queries.new_empty(0, self.table.dim)

    def _refine(self, queries: Tensor, cameras: Tensor, index: TableIndex) -> Tensor:
        def layers(rows: Tensor, mask: Tensor) -> list[_Layer]:
            if len(queries) <= _SINGLE and hasattr(mmap, "MADV_WILLNEED"):
                wanted = rows[mask]
                for layer in self.layers:
                    layer.values.prefetch(wanted)
            return self.layers

        given = (self._edges, index, self.thresholds, layers, self.rows)
        return refine_rows(self.encoder, queries, cameras, *given, refined=self.refined)

    @torch.no_grad()
    def _append(self, index: TableIndex, block_rows: int) -> None:
        """Refine the table's new rows as if they were queries and add their states."""
        encoder, table, known = self.encoder, self.table, self.rows
        header = {"from": known, "to": len(table), "table": table.fingerprint(), "block": block_rows}
        header.update(self._edges.header(len(table)))
        table.check(known)
        names = _state_names(encoder)
        if self.inputs is not table:
            index = open_index(self.inputs, self.pass_folder / "inputs", index.config, alive=index.alive)
        with _Journal(self.pass_folder / "appended.txt", header) as journal:
            for start, stop in _spans(known, len(table), block_rows, "refining new images"):
                if journal.has(start, *names):
                    continue
                cameras = self._cameras[start:stop].split(_STEP)
                parts = [
                    states_of_rows(encoder, x, theirs, self._edges, index, self.thresholds, self.layers, known)
                    for x, theirs in zip(table.read(start, stop).split(_STEP), cameras)
                ]
                for name in names:
                    journal.put(name, start, torch.cat([made[name] for made in parts]))
        files = {name: [*self.files[name], *journal.pieces(name)] for name in names}
        publish = functools.partial(publish_states, self.folder, table, encoder, self._edges, self.base_rows)
        publish(self.pass_folder, files, self.dtype, self.digest)
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
    camids: np.ndarray | None = None,
) -> RelationStates:
    """Refine a gallery on disk, or the rows that were appended since; a killed call is taken up by the next one.

    Args:
        folder: Where the states go.
        table: (N, d) unit features.
        encoder: Relation encoder in evaluation mode, with neighbours by feature or by camera.
        index: Of the table; where the encoder has a head, only its settings count.
        full: Make a full pass, also where only new rows are to be refined (see "What is approximate" above).
        block_rows: Rows per file.
        verify: Compare the states that are there already with their SHA-256.
        camids: (N,) cameras of the table's images, for an encoder that counts neighbours by camera; -1 where unknown.

    Returns:
        The states of all N rows.

    Raises:
        UserError: An empty table, an encoder that does not fit, affinity neighbours, or damaged files or states of other
            features that a full pass would replace.
    """
    folder = Path(folder)
    require_usable(encoder, table)
    if not len(table):
        raise UserError("the gallery is empty; extract features of some images first.")
    with writer_lock(folder):
        clear_leftovers(folder, below=True)
        if full or not (folder / MANIFEST).is_file():
            edges = edges_of(encoder, camids, len(table))
            publish = functools.partial(publish_states, folder, table, encoder, edges, len(table))
            full_pass(folder, table, encoder, index, block_rows, camids, publish)
        else:
            states = RelationStates(folder, table, encoder, verify=verify, camids=camids)
            if states.rows == len(table):
                return states
            states._append(index, block_rows)
    return RelationStates(folder, table, encoder, camids=camids)


def require_usable(encoder: Any, table: Any) -> None:
    """Refuse an encoder that cannot refine a table on disk.

    Raises:
        RuntimeError: It is in training mode.
        UserError: It has affinity neighbours, or another width.
    """
    if encoder.training:
        raise RuntimeError("call eval() first: refining a gallery is defined for testing only.")
    if encoder.neighbours not in ("feature", "camera"):
        raise UserError(
            "a gallery on disk needs 'relation.neighbours feature' or 'camera': with "
            f"'{encoder.neighbours}' every layer would search the whole gallery."
        )
    if encoder.dim != table.dim:
        raise UserError(
            f"the relation encoder has width {encoder.dim} and the store {table.dim}; both need the same image model."
        )


def publish_states(
    folder: Path,
    table: RowTable,
    encoder: Any,
    edges: Any,
    base_rows: int,
    pass_folder: Path,
    files: dict[str, list[Piece]],
    dtype: str,
    projections: str,
) -> None:
    """Write the manifest: from now on the states are those of ``pass_folder``, for all rows of the table.

    Args:
        folder: Of the states.
        table: The gallery's features.
        encoder: The encoder that refined them.
        edges: Who attends to whom.
        base_rows: Rows that saw each other.
        pass_folder: Where the files are.
        files: Their pieces by name, in order.
        dtype: Type of keys and values.
        projections: SHA-256 of the layers' projections.
    """
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
        **edges.header(len(table)),
    }
    write_manifest(folder / MANIFEST, manifest)
