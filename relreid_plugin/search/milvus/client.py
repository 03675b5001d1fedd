"""The connection to Milvus, and small documents that are kept there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError, needed

PREFIX = "milvus:"
FORMAT = 1
MOST = 16_384
"""What Milvus returns at most of one search or query."""
_BYTES = 1 << 24  # of vectors that travel in one message; servers refuse 64 MiB
_PART = 60_000  # characters of a document that one entity holds
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_INDICES = {"flat": "FLAT", "ivf": "IVF_FLAT", "hnsw": "HNSW"}


def is_milvus(name: Any) -> bool:
    """Whether a store is named as one in Milvus: ``milvus:FILE.db``, ``milvus:http://HOST:PORT``, each with ``#NAME``."""
    return isinstance(name, str) and name.startswith(PREFIX)


class Place(NamedTuple):
    """Where a gallery is.

    Attributes:
        uri: What the client connects to.
        collection: Name of the gallery's collection.
        file: The embedded file; ``None``: a server.
    """

    uri: str
    collection: str
    file: Path | None


def place_of(name: str) -> Place:
    """Return where a gallery is by its name.

    Raises:
        UserError: The name says no file that ends in ``.db``, no URI, or no name of a collection.
    """
    uri, _, collection = name.removeprefix(PREFIX).partition("#")
    collection = collection or "gallery"
    if not _NAME.fullmatch(collection):
        raise UserError(f"'{name}': '{collection}' is no name of a collection; take letters, digits and underscores.")
    if re.match(r"(https?|tcp)://", uri):
        return Place(uri, collection, None)
    if not uri.endswith(".db"):
        raise UserError(f"'{name}' names no gallery; write {PREFIX}FILE.db, or {PREFIX}http://HOST:19530 for a server.")
    return Place(uri, collection, Path(uri))


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """Turn what Milvus complains of into one sentence."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        text = " ".join(str(getattr(error, "message", error)).split())
        raise UserError(f"'{name}': Milvus refuses: {text.removesuffix('.')}.") from error


def connect(name: str, *, create: bool = False) -> Any:
    """Return a client for the gallery of a name; an access token is read from the variable ``MILVUS_TOKEN``.

    Args:
        name: See :func:`is_milvus`.
        create: Make an embedded file that is not there.

    Raises:
        UserError: pymilvus or milvus-lite is not installed, there is no such file, another process has it open, or the
            server does not answer.
    """
    pymilvus = needed("pymilvus", "a gallery in Milvus")
    place = place_of(name)
    if place.file is not None:
        needed("milvus_lite", "a gallery in an embedded file of Milvus")
        if not create and not place.file.exists():
            raise UserError(f"'{name}': '{place.file}' does not exist; make a gallery by relreid copy or relreid extract.")
        if place.file.is_file():
            raise UserError(f"'{name}': '{place.file}' is a file; galleries of milvus-lite 3 are folders.")
        logging.getLogger("milvus_lite.server_manager").setLevel(logging.CRITICAL)  # what it says is said below
    logging.getLogger("pymilvus.decorators").setLevel(logging.CRITICAL)
    logging.getLogger("pymilvus.client.iterator.query_iterator").setLevel(
        logging.ERROR
    )  # the embedded one has no clock, and says so
    try:
        return pymilvus.MilvusClient(uri=place.uri, token=os.environ.get("MILVUS_TOKEN", ""))
    except pymilvus.exceptions.MilvusException as error:
        if place.file is not None:
            raise UserError(
                f"'{name}' cannot be opened: another process has it open, or it is damaged; an embedded file takes one "
                "process at a time, a server takes many."
            ) from error
        text = " ".join(str(getattr(error, "message", error)).split())
        raise UserError(f"'{name}': no Milvus answers at '{place.uri}' ({text}); start it, or write its address.") from error


def vector_batch(width: int) -> int:
    """Return how many vectors of a width travel in one message."""
    return max(1, min(MOST, _BYTES // (4 * max(1, width))))


def make_collection(
    client: Any,
    name: str,
    vectors: Sequence[tuple[str, int, str]],
    scalars: Sequence[tuple[str, str]],
    *,
    key: str = "row",
    nlist: int = 1024,
) -> None:
    """Make a collection that answers with everything that was written before.

    Args:
        client: The connection.
        name: Its name.
        vectors: Name, width and index (``flat``, ``ivf``, ``hnsw``) of every vector field.
        scalars: Name and type of the others; ``time`` may be null.
        key: Name of the primary key: a number, or text where it is ``key``.
        nlist: Cells of an IVF index.
    """
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    if key == "key":
        schema.add_field(key, DataType.VARCHAR, max_length=256, is_primary=True)
    else:
        schema.add_field(key, DataType.INT64, is_primary=True)
    indices = client.prepare_index_params()
    for field, width, kind in vectors:
        schema.add_field(field, DataType.FLOAT_VECTOR, dim=width)
        params = {"flat": {}, "ivf": {"nlist": nlist}, "hnsw": {"M": 32, "efConstruction": 200}}[kind]
        indices.add_index(field, index_type=_INDICES[kind], metric_type="IP", params=params)
    for field, kind in scalars:
        options: dict[str, Any] = {"max_length": 65_535} if kind == "VARCHAR" else {}
        schema.add_field(field, getattr(DataType, kind), **options, **({"nullable": True} if field == "time" else {}))
    client.create_collection(name, schema=schema, index_params=indices, consistency_level="Strong")


def fetch(client: Any, collection: str, rows: np.ndarray, fields: Sequence[str], *, width: int = 0) -> list[dict[str, Any]]:
    """Return the entities of chosen rows that are there, in no order.

    Args:
        client: The connection.
        collection: Name of the collection.
        rows: (n,) int64.
        fields: What is wanted of them beside ``row``.
        width: Numbers of a row that travel.
    """
    step, found = vector_batch(width), []
    for start in range(0, len(rows), step):
        ids = rows[start : start + step].tolist()
        found += list(client.query(collection, ids=ids, output_fields=["row", *fields]))
    return found


def fetch_vectors(client: Any, collection: str, rows: np.ndarray, field: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one vector field of chosen rows.

    Args:
        client, collection, rows: See :func:`fetch`.
        field: The field.
        width: Its width d.

    Returns:
        (n, d) float32, zero where there is no such row, and (n,) bool, which are there.
    """
    unique, inverse = np.unique(rows, return_inverse=True)
    values, there = np.zeros((len(unique), width), np.float32), np.zeros(len(unique), bool)
    for entity in fetch(client, collection, unique, [field], width=width):
        slot = int(np.searchsorted(unique, entity["row"]))
        values[slot], there[slot] = entity[field], True
    return values[inverse], there[inverse]


class Documents:
    """JSON values by key in a collection; a value of one entity is replaced in one step.

    Args:
        client: The connection.
        collection: Name of the collection, made by :meth:`make`.
    """

    def __init__(self, client: Any, collection: str) -> None:
        self.client, self.collection = client, collection

    def there(self) -> bool:
        """Whether the collection is there; it can be read from then on."""
        if not self.client.has_collection(self.collection):
            return False
        self.client.load_collection(self.collection)
        return True

    def make(self) -> None:
        """Make the collection where it is missing."""
        if not self.there():
            make_collection(self.client, self.collection, [("none", 2, "flat")], [("value", "VARCHAR")], key="key")

    def read(self, key: str) -> Any:
        """Return a value; ``None`` where there is none."""
        found = list(self.client.query(self.collection, ids=[key], output_fields=["value"]))
        if not found:
            return None
        value = json.loads(found[0]["value"])
        if not isinstance(value, dict) or "parts" not in value:
            return value
        keys = [f"{key}/{number}" for number in range(value["parts"])]
        found = self.client.query(self.collection, ids=keys, output_fields=["value"])
        parts = {each["key"]: each["value"] for each in found}
        return "".join(parts[each] for each in keys)

    def write(self, key: str, value: Any) -> None:
        """Replace a value; what is longer than an entity is text, written part by part before the entity that names them."""
        if isinstance(value, str):
            parts = [value[start : start + _PART] for start in range(0, len(value), _PART)]
            for number, part in enumerate(parts):
                self._put(f"{key}/{number}", part)
            value = {"parts": len(parts)}
        self._put(key, json.dumps(value))

    def _put(self, key: str, text: str) -> None:
        self.client.upsert(self.collection, [{"key": key, "value": text, "none": [0.0, 0.0]}])


__all__ = [
    "FORMAT",
    "MOST",
    "PREFIX",
    "Documents",
    "Place",
    "connect",
    "fetch",
    "fetch_vectors",
    "is_milvus",
    "make_collection",
    "place_of",
    "told",
    "vector_batch",
]
