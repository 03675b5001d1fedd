"""A refined gallery in Milvus: what queries attend to, fetched by row for the neighbours that a search finds.

An entity of a row has its refined feature, and one vector ``states`` of thresholds, and of keys and values layer by layer.
A full pass is made on files (:func:`~relreid_plugin.search.relations.refine_table`, or by several processes) and uploaded;
rows that are appended later are refined as queries against what is in Milvus and written there at once.

Shape letters: N gallery rows, Q queries, n rows, d width, L layers, G maps, p landmarks, H heads, w width of ``states``.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...errors import UserError
from ...metrics.cameras import UNKNOWN, as_cameras
from ...metrics.neighbours import SearchConfig
from ..edges import edges_of
from ..layers import _device, encoder_fingerprint
from ..online import refine_rows, states_of_rows
from ..relations import RelationStates, require_usable
from .client import fetch, fetch_vectors, make_collection, told
from .index import MilvusIndex, MilvusTable
from .store import SCALARS, STATES, MilvusStore, MilvusWriter, upsert

_FEWEST = -1e30  # stands for minus infinity, and plus that for infinity, which Milvus does not take
_QUERIES = 256  # queries whose neighbours' states are fetched together
_WIDEST = 32_768
_BLOCK = 4096  # rows per commit


class _Layout:
    """Where thresholds, keys and values are in the vector ``states``."""

    def __init__(self, encoder: Any, projections: list[tuple[Tensor, Tensor]], thresholds: tuple[int, ...]) -> None:
        self.thresholds = thresholds
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        for number, (block, (_, to_key)) in enumerate(zip(encoder.blocks, projections)):
            attention = block.attn
            self.shapes.append((f"keys{number}", (attention.num_maps, to_key.shape[1] // attention.num_maps)))
            self.shapes.append((f"values{number}", (attention.num_heads, attention.head_dim)))
        self.width = int(np.prod(thresholds)) + sum(a * b for _, (a, b) in self.shapes)
        if self.width > _WIDEST:
            raise UserError(
                f"the states of {len(encoder.blocks)} layers of width {encoder.dim} take {self.width} numbers per image, "
                f"and Milvus keeps {_WIDEST} at most; keep this gallery in a store on disk."
            )

    def pack(self, made: dict[str, Tensor]) -> np.ndarray:
        """Tensors (n, …) by name -> (n, w) float32."""
        names = ["thresholds", *(name for name, _ in self.shapes)]
        flat = torch.cat([made[name].float().reshape(len(made[name]), -1) for name in names], dim=1)
        return flat.clamp(_FEWEST, -_FEWEST).numpy()

    def unpack(self, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """(n, w) float32 -> tensors (n, …) by name."""
        low = int(np.prod(self.thresholds))
        first = values[:, :low].reshape(len(values), *self.thresholds)
        first = torch.where(first <= _FEWEST, -torch.inf, torch.where(first >= -_FEWEST, torch.inf, first))
        made = {"thresholds": first}
        for name, shape in self.shapes:
            high = low + shape[0] * shape[1]
            made[name] = values[:, low:high].reshape(len(values), *shape).to(dtype)
            low = high
        return made


class _Fetched:
    """States of some rows, found by number; what :mod:`~relreid_plugin.search.online` indexes like those of all rows."""

    def __init__(self, states: MilvusStates, rows: Tensor) -> None:
        self.states, self.rows = states, rows.unique()
        with told(states.store.name):
            values, there = fetch_vectors(
                states.store.client, states.collection, self.rows.numpy(), "states", states.layout.width
            )
        self.there = torch.from_numpy(there)
        self.made = states.layout.unpack(torch.from_numpy(values), states.dtype)

    def place(self, rows: Tensor) -> Tensor:
        """Rows of any shape -> where they are here."""
        return torch.searchsorted(self.rows, rows.contiguous())


class _Thresholds:
    """The gallery's thresholds, fetched when rows are asked for, and kept for the layers."""

    def __init__(self, states: MilvusStates) -> None:
        self.states = states
        self.fetched: _Fetched | None = None

    def __getitem__(self, chosen: Any) -> Tensor:
        rows, rest = (chosen[0], chosen[1:]) if isinstance(chosen, tuple) else (chosen, ())
        if self.fetched is None or not torch.isin(rows, self.fetched.rows).all():
            self.fetched = _Fetched(self.states, rows.flatten())
        values = self.fetched.made["thresholds"]
        return values[(self.fetched.place(rows), *rest)]

    def layers(self, rows: Tensor, mask: Tensor) -> list[_FetchedLayer]:
        """The layers' states of the rows whose thresholds were read."""
        fetched = self.fetched
        assert fetched is not None
        if not fetched.there[fetched.place(rows[mask])].all():
            raise UserError(f"images of '{self.states.store.name}' were deleted while it was searched; search again.")
        return [_FetchedLayer(self.states, fetched, number) for number in range(len(self.states.encoder.blocks))]


class _FetchedLayer:
    """One layer of the fetched states."""

    def __init__(self, states: MilvusStates, fetched: _Fetched, number: int) -> None:
        self.fetched, self.number = fetched, number
        self.to_query, self.to_key = states.projections[number]
        self.kind = states.encoder.blocks[number].attn.states_type

    def gathered(self, rows: Tensor, device: torch.device) -> Any:
        """The states of chosen rows (n,) as a gallery of their own."""
        place = self.fetched.place(rows)
        keys, values = (self.fetched.made[f"{part}{self.number}"][place].to(device) for part in ("keys", "values"))
        return self.kind(self.to_query, self.to_key, keys, values)


class MilvusStates:
    """The states of a refined gallery in Milvus, opened to refine queries against them.

    Args:
        store: The gallery.
        encoder: The encoder that refined it, in evaluation mode.

    Attributes:
        rows: Gallery rows that are refined.
        base_rows: Those that saw each other in the full pass; the rest was refined as if they were queries.
        refined: (rows, d) unit test features.
        inputs: (rows, d) what is searched for neighbours.
        alone: Whether every image stays alone, since the gallery's images have too little company.

    Raises:
        UserError: The gallery was not refined by this encoder.
    """

    def __init__(self, store: MilvusStore, encoder: Any) -> None:
        require_usable(encoder, store)
        self.store, self.encoder = store, encoder
        self.key = states_key(encoder)
        with told(store.name):
            head = store.documents.read(self.key)
            if head is None:
                raise UserError(
                    f"'{store.name}' was not refined by this relation encoder; refine it by relreid refine, or upload a "
                    "store that is refined by relreid copy --relations."
                )
            projections = store.documents.read(f"{self.key}/{head['pass']}/projections")
            self.collection = states_collection(store, encoder, head["pass"])
            store.client.load_collection(self.collection)
        self.head = head
        self.rows, self.base_rows = int(head["rows"]), int(head["base_rows"])
        self.dtype = getattr(torch, head["dtype"])
        loaded = torch.load(io.BytesIO(base64.b64decode(projections)), weights_only=True)
        self.projections = [(first.to(_device(encoder)), second.to(_device(encoder))) for first, second in loaded]
        self._edges = edges_of(encoder, np.empty(0, np.int64), 0)
        self.layout = _Layout(encoder, loaded, () if encoder.rule is None else (2,))
        self.alone = bool(head["alone"])
        self.refined = self._table("refined")
        self.inputs: MilvusTable = store if encoder.head is None else self._table("inputs")

    def _table(self, field: str) -> MilvusTable:
        identity = f"{field}|{self.store.identity}|{self.key}|{self.head['pass']}"
        return MilvusTable(self.store.client, self.collection, field, self.store.dim, self.rows, self.store.name, identity)

    def index(self, table: MilvusTable, config: SearchConfig) -> MilvusIndex:
        """Return what searches :attr:`refined` or :attr:`inputs`."""
        return MilvusIndex(table, config, self.store.kind, self.store.gone)

    @torch.no_grad()
    def refine_queries(self, queries: Tensor, index: MilvusIndex, camids: Any = None) -> Tensor:
        """Refine every query as if it were alone with the gallery.

        Args:
            queries: (Q, d) unit features.
            index: Of :attr:`inputs`.
            camids: (Q,) cameras, read where the encoder counts neighbours by camera; -1 or ``None``: unknown.

        Returns:
            (Q, d) unit test features, on the CPU.
        """
        own = as_cameras(camids, len(queries), missing=UNKNOWN)
        parts = zip(queries.float().split(_QUERIES), own.split(_QUERIES)) if len(queries) else ()
        refined = []
        for part, cameras in parts:
            thresholds = _Thresholds(self)
            given = (self._edges, index, thresholds, thresholds.layers, self.rows)
            refined.append(refine_rows(self.encoder, part, cameras, *given, refined=self.refined))
        return torch.cat(refined) if refined else queries.new_empty(0, self.store.dim)

    def append(self, config: SearchConfig) -> MilvusStates:
        """Refine the gallery's new rows as if they were queries and write their states; returns the states of all rows."""
        store, start, stop = self.store, self.rows, len(self.store)
        index, documents = self.index(self.inputs, config), self.store.documents
        with MilvusWriter(store.name, dim=store.dim), told(store.name):
            begun = documents.read(f"{self.key}/append")
            if begun is None or (begun["from"], begun["to"], begun["of"]) != (start, stop, self.head["of"]):
                begun = {"from": start, "to": stop, "of": self.head["of"], "done": start}
            spans = range(begun["done"], stop, _BLOCK)
            with tqdm(total=stop - begun["done"], desc="refining new images", unit="row", leave=False, disable=None) as bar:
                for low in spans:
                    rows = np.arange(low, min(low + _BLOCK, stop))
                    self._append_rows(rows, index, start)
                    documents.write(f"{self.key}/append", {**begun, "done": int(rows[-1]) + 1})
                    bar.update(len(rows))
            documents.write(self.key, {**self.head, "rows": stop})
            store.client.flush(self.collection)
        return MilvusStates(store, self.encoder)

    def _append_rows(self, rows: np.ndarray, index: MilvusIndex, size: int) -> None:
        store = self.store
        scalars = [name for name, _ in SCALARS]
        found = {each["row"]: each for each in fetch(store.client, store.collection, rows, scalars)}
        living = torch.tensor(sorted(set(found) - set(store.gone)), dtype=torch.long)
        cameras = torch.tensor([found[row]["camid"] for row in living.tolist()], dtype=torch.long)
        for part, own in zip(living.split(_QUERIES), cameras.split(_QUERIES)):
            if not len(part):
                continue
            thresholds = _Thresholds(self)
            given = (self._edges, index, thresholds, thresholds.layers, size)
            made = states_of_rows(self.encoder, store.take(part), own, *given)
            if self.encoder.rule is not None:  # settled as those of the pass
                made["thresholds"] = made["thresholds"][:, :2].masked_fill(torch.tensor(self.alone), torch.inf)
            write_states(store, self.collection, self.layout, part, made, found)


def states_key(encoder: Any) -> str:
    """Return the key of the head of an encoder's states."""
    return f"{STATES}/{encoder_fingerprint(encoder)[:12]}"


def states_collection(store: MilvusStore, encoder: Any, number: int) -> str:
    """Return the collection of an encoder's states of one pass."""
    return f"{store.collection}_{STATES}_{encoder_fingerprint(encoder)[:12]}_{number}"


def write_states(
    store: MilvusStore,
    collection: str,
    layout: _Layout,
    rows: Tensor,
    made: dict[str, Tensor],
    found: dict[int, dict[str, Any]],
) -> None:
    """Write entities of a refined gallery.

    Args:
        store: The gallery.
        collection: Of its states.
        layout: Of the vector ``states``.
        rows: (n,) rows.
        made: Their tensors by name.
        found: Their cameras, identities and times by row.
    """
    packed, vectors = layout.pack(made), {name: made[name].numpy() for name in ("refined", "inputs") if name in made}
    entities = [
        {
            "row": row,
            "states": packed[slot],
            **{name: values[slot] for name, values in vectors.items()},
            **{name: found[row][name] for name, _ in SCALARS},
        }
        for slot, row in enumerate(rows.tolist())
    ]
    upsert(store.client, store.name, collection, entities, layout.width + store.dim * len(vectors))


def upload(states: RelationStates, store: MilvusStore) -> MilvusStates:
    """Write the states of a full pass, which are on disk, into Milvus, where they take the place of those before.

    A killed upload goes on when it is called again with the same states.

    Args:
        states: Of the gallery's rows, in their order.
        store: The gallery.

    Raises:
        UserError: The states are of more rows than the gallery has.
    """
    encoder, client = states.encoder, store.client
    if states.rows > len(store):
        raise UserError(
            f"'{store.name}' holds {len(store)} images, the refined gallery {states.rows}; copy the store first."
        )
    key, documents = states_key(encoder), store.documents
    projections = [(layer.to_query.cpu(), layer.to_key.cpu()) for layer in states.layers]
    layout = _Layout(encoder, projections, states.thresholds.shape[1:])
    pieces = [piece.digest for name in sorted(states.files) for piece in states.files[name]]
    of = hashlib.sha256("|".join([states.digest, *pieces]).encode()).hexdigest()[:32]
    with MilvusWriter(store.name, dim=store.dim), told(store.name):
        before, begun = documents.read(key), documents.read(f"{key}/upload")
        if before is not None and before["of"] == of and before["rows"] >= states.rows:
            return MilvusStates(store, encoder)
        number = 1 if before is None else before["pass"] % 2 + 1
        collection = states_collection(store, encoder, number)
        if begun is None or begun["of"] != of or not client.has_collection(collection):
            if client.has_collection(collection):
                client.drop_collection(collection)
            fields = [("refined", store.dim, store.kind), ("states", layout.width, "flat")]
            fields += [] if encoder.head is None else [("inputs", store.dim, store.kind)]
            make_collection(client, collection, fields, SCALARS)
            begun = {"of": of, "rows": 0}
            documents.write(f"{key}/upload", begun)
        client.load_collection(collection)
        with tqdm(total=states.rows - begun["rows"], desc="uploading states", unit="row", leave=False, disable=None) as bar:
            for low in range(begun["rows"], states.rows, _BLOCK):
                high = min(low + _BLOCK, states.rows)
                found = {e["row"]: e for e in fetch(client, store.collection, np.arange(low, high), [n for n, _ in SCALARS])}
                rows = torch.tensor(sorted(found), dtype=torch.long)
                made = {"thresholds": states.thresholds[rows], "refined": states.refined.take(rows)}
                made.update({} if encoder.head is None else {"inputs": states.inputs.take(rows)})
                for layer, each in enumerate(states.layers):
                    made[f"keys{layer}"], made[f"values{layer}"] = each.keys.take(rows), each.values.take(rows)
                write_states(store, collection, layout, rows, made, found)
                documents.write(f"{key}/upload", {"of": of, "rows": high})
                bar.update(high - low)
        client.flush(collection)
        stream = io.BytesIO()
        torch.save(projections, stream)
        documents.write(f"{key}/{number}/projections", base64.b64encode(stream.getvalue()).decode())
        head = {"of": of, "pass": number, "rows": states.rows, "base_rows": states.base_rows, "dtype": states.dtype}
        head["alone"] = states.alone
        documents.write(key, head)
        if before is not None:
            client.drop_collection(states_collection(store, encoder, before["pass"]))
    return MilvusStates(store, encoder)


def work_folder(store: MilvusStore) -> Path:
    """Return where a full pass over a gallery in Milvus is made, before it is uploaded."""
    place = store.place
    return Path(f"{place.file}.refining") if place.file else Path(f"{place.collection}.refining")


__all__ = ["MilvusStates", "states_collection", "states_key", "upload", "work_folder"]
