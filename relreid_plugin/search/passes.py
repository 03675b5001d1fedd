"""A full pass: a gallery that is refined on disk, layer by layer and block by block, and goes on after a kill.

Shape letters: N gallery rows, n rows of a block, d width, L layers, G maps, p landmarks.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.checkpoint import atomic_file, read_tensors, write_tensors
from ..errors import UserError
from ..features.arrays import ChunkedArray, RowTable, read_manifest
from ..files import make_folder
from ..metrics.reciprocal import ReciprocalGraph
from .edges import Found, edges_of, kind_of_scan
from .index import TableIndex, open_index
from .layers import (
    _FULL,
    _STEP,
    _device,
    _gallery_layer,
    _Journal,
    _Layer,
    _own_states,
    _spans,
    _state_names,
    encoder_fingerprint,
)

FORMAT = 2
MANIFEST = "states.json"


def next_pass(folder: Path) -> Path:
    """The folder of a pass that is not the one in use."""
    used = None
    if (folder / MANIFEST).is_file():
        with contextlib.suppress(UserError, KeyError):
            used = read_manifest(folder / MANIFEST, what="refined gallery", version=FORMAT, remedy=_FULL)["pass"]
    return folder / ("pass-0002" if used == "pass-0001" else "pass-0001")


@torch.no_grad()
def full_pass(
    folder: Path,
    table: RowTable,
    encoder: Any,
    index: TableIndex,
    block_rows: int,
    camids: np.ndarray | None,
    publish: Callable[..., None],
) -> None:
    """Refine a whole table into a new folder of states, or go on with the pass that was begun there.

    Args:
        folder, table, encoder, index, block_rows, camids: See :func:`~relreid_plugin.search.relations.refine_table`.
        publish: Called with the folder of the pass, its files, the type and the digest of the projections: from then on the
            states are those of the pass.
    """
    place = next_pass(folder)
    edges = edges_of(encoder, camids, len(table))
    header = {"encoder": encoder_fingerprint(encoder), "table": table.fingerprint(), "block": block_rows}
    header["search"] = kind_of_scan(index) if index.exact and not approximate(index) else str(index.config)
    header.update(edges.header(len(table)))
    if index.alive is not None:
        header["alive"] = hashlib.sha256(index.alive.numpy().tobytes()).hexdigest()[:32]
    if not _Journal.continues(place / "journal.txt", header):
        shutil.rmtree(place, ignore_errors=True)
        make_folder(place)
        table.check()
    with _Journal(place / "journal.txt", header) as journal:
        inputs = table
        if encoder.head is not None:
            inputs = _through_head(journal, table, encoder, block_rows)
            index = open_index(inputs, place / "inputs", index.config, alive=index.alive)
        edges.search(journal, inputs, index)
        projections = _refine_layers(
            journal, inputs, encoder, edges.graph(journal.array, len(table)), block_rows, index.alive
        )
    with atomic_file(place / "projections.pt") as temporary:
        torch.save([(first.cpu(), second.cpu()) for first, second in projections], temporary)
    digest = hashlib.sha256((place / "projections.pt").read_bytes()).hexdigest()
    publish(place, {name: journal.pieces(name) for name in _state_names(encoder)}, states_type(encoder), digest)
    for name in (*(f"{name}.bin" for name in edges.temporary()), "projections.part", "journal.txt"):
        (place / name).unlink(missing_ok=True)
    for other in folder.glob("pass-*"):
        if other != place:
            shutil.rmtree(other, ignore_errors=True)


def approximate(index: TableIndex) -> bool:
    """Whether an index of its kind over enough rows would miss some."""
    return index.config.index in ("ivf", "hnsw")


def _through_head(journal: _Journal, table: RowTable, encoder: Any, block_rows: int) -> RowTable:
    """The table's rows behind the encoder's head."""
    for start, stop in _spans(0, len(table), block_rows, "head"):
        if not journal.has(start, "inputs"):
            journal.put("inputs", start, inputs_of(encoder, table.read(start, stop)))
    return inputs_table(encoder, journal.array("inputs", (table.dim,), "float32"))


def inputs_of(encoder: Any, rows: Tensor) -> Tensor:
    """Unit rows (n, d) as the encoder's graph and first layer see them, on the CPU."""
    if encoder.head is None:
        return rows
    return torch.cat([encoder.inputs(part.to(_device(encoder))).cpu() for part in rows.split(_STEP)])


def inputs_table(encoder: Any, array: ChunkedArray) -> RowTable:
    """The rows behind the head of an encoder as a table to search."""
    return RowTable(array, f"inputs|{encoder_fingerprint(encoder)}")


def states_type(encoder: Any) -> str:
    """Type of the keys and values of an encoder's states."""
    return "bfloat16" if encoder.precision == "bfloat16" else "float32"


def _refine_layers(
    journal: _Journal,
    table: RowTable,
    encoder: Any,
    graph: Callable[[int, int], Found],
    block_rows: int,
    alive: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Every layer's states and the refined features; returns the layers' folded projections."""
    size, device, place = len(table), _device(encoder), journal.folder
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
            projections.append(_projections(encoder, inputs, number, alive))
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
            journal.array(f"keys{number}", (maps, to_key.shape[1] // maps), states_type(encoder)),
            journal.array(f"values{number}", (heads, block.attn.head_dim), states_type(encoder)),
            block.attn.states_type,
        )
        mapped = layer.mapped()
        for start, stop in _spans(0, size, block_rows, f"{label} attention"):
            if journal.has(start, output):
                continue
            made = torch.empty(stop - start, table.dim)
            for low in range(start, stop, _STEP):
                high = min(low + _STEP, stop)
                x = inputs.read(low, high).to(device)
                with encoder.autocast(_device(encoder)):
                    x = _gallery_layer(block, layer, mapped, x, *graph(low, high))
                if number == last:
                    x = embedded(encoder, x, table.read(low, high))
                made[low - start : high - start] = x
            journal.put(output, start, made)
        journal.flush()
        if number:
            (place / f"x{number}.bin").unlink(missing_ok=True)
    return projections


def embedded(encoder: Any, x: Tensor, first: Tensor) -> Tensor:
    """Unit test features (n, d) of the last layer's rows ``x``, whose inputs to the first layer were ``first``."""
    return encoder.neck.embed(encoder.add_residual(x.float(), first.to(x.device)))


def _landmarks_so_far(path: Path) -> list[tuple[Tensor, Tensor]]:
    """The projections of the layers that a killed pass had finished."""
    try:
        return read_tensors(path)
    except Exception as error:  # a damaged file raises all kinds of exceptions
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise UserError(f"'{path}' is damaged ({reason}); delete '{path.parent}' and refine the gallery again.") from None


def _projections(encoder: Any, inputs: RowTable, number: int, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """The projections of a layer whose landmarks are rows that were not deleted."""
    kept = torch.arange(len(inputs)) if alive is None else alive.nonzero().flatten()
    if encoder.landmarks == "farthest":
        shaped = inputs.read() if alive is None else inputs.take(kept)
    else:
        shaped = torch.empty(1, 1).expand(len(kept), 1)
    return projections_of(encoder, inputs.take(kept[encoder.landmark_rows(shaped, number)]), number)


def projections_of(encoder: Any, landmarks: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return landmarks (p', d) of a layer folded into its projections, (d, G * p') each."""
    landmarks = landmarks.to(_device(encoder))
    own = torch.arange(len(landmarks), device=landmarks.device)
    alone = ReciprocalGraph(own.unsqueeze(1), torch.ones_like(own, dtype=torch.bool).unsqueeze(1), own.unsqueeze(1))
    with encoder.autocast(_device(encoder)):
        block: Any = encoder.blocks[number]
        states = block.attn.states(landmarks, own, graph=alone)[0]
    return states.query_projection, states.key_projection
