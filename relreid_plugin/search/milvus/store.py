"""A gallery in Milvus: its features and labels, the writer, and deletion.

Shape letters: N rows, n some of them, d width.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from ...data.images import taken_at
from ...data.labels import Label
from ...errors import UserError
from ...features.columns import rows_to_add
from ..filters import Filter
from .client import FORMAT, MOST, Documents, connect, fetch, make_collection, place_of, told, vector_batch
from .index import MilvusTable, living_rows

HEAD = "gallery"
STATES = "states"
_LABELS = ("pid", "camid", "identity", "camera", "path")
SCALARS = (("pid", "INT64"), ("camid", "INT64"), ("time", "DOUBLE"))
_DELETED = 1000  # rows that one commit deletes
_TIME_THREADS = 8


def _sentence(name: str) -> UserError:
    return UserError(f"'{name}' holds no gallery of that name; make one by relreid copy or relreid extract.")


class MilvusStore(MilvusTable):
    """A gallery in Milvus, opened to read; it shows the rows that were committed when it was opened.

    Args:
        name: ``milvus:FILE.db`` or ``milvus:http://HOST:PORT``, and ``#NAME`` where the gallery has another name than
            ``gallery``.

    Attributes:
        model: Fingerprint of the model that made the features.
        planned: Rows that the gallery has when the extraction that wrote to it last has ended.
        kind: Index: ``flat``, ``ivf`` or ``hnsw``.
        gone: Rows whose deletion was committed and not carried out.
        identity_names, camera_names: What numbers stand for, as far as :meth:`labels` was asked for them.

    Raises:
        UserError: No Milvus, no gallery, or one of another format.
    """

    dtype = "float32"

    def __init__(self, name: str) -> None:
        self.place = place_of(name)
        client = connect(name)
        self.documents = Documents(client, f"{self.place.collection}_manifest")
        with told(name):
            head = self.documents.read(HEAD) if self.documents.there() else None
            if head is None:
                raise _sentence(name)
            if head["format"] != FORMAT:
                raise UserError(f"'{name}' has format {head['format']}, this version of the plug-in reads format {FORMAT}.")
            client.load_collection(self.place.collection)
        self.head = head
        self.model, self.planned, self.kind = str(head["model"]), int(head["planned"]), str(head["index"])
        self.gone: list[int] = list(head["gone"])
        self.living = int(head["rows"]) - int(head["deleted"])
        self.identity_names: dict[int, str] = {}
        self.camera_names: dict[int, str] = {}
        super().__init__(
            client, self.place.collection, "feature", int(head["dim"]), int(head["rows"]), name, f"milvus|{head['id']}"
        )

    @property
    def shortage(self) -> str:
        """One sentence where an extraction or a copy was interrupted, else empty."""
        if self.planned <= len(self):
            return ""
        return (
            f"'{self.name}' holds {len(self)} of {self.planned} images, the command that writes it was interrupted or is "
            "still running; run it again with the same arguments."
        )

    @property
    def alive(self) -> Tensor | None:
        """(N,) bool, the rows that were not deleted; None where none was; read anew at each call."""
        return None if self.living == len(self) else living_rows(self, self.gone)

    def verify(self) -> None:
        """Compare the counts of the gallery with what Milvus holds.

        Raises:
            UserError: They differ.
        """
        found = int(living_rows(self, self.gone).sum())
        if found != self.living:
            raise UserError(f"'{self.name}' is damaged: it holds {found} of {self.living} images; make it again.")

    def _column(self, field: str) -> np.ndarray:
        column = np.full(len(self), -1, np.int64)
        with told(self.name):
            for entity in fetch(self.client, self.collection, np.arange(len(self)), [field]):
                column[entity["row"]] = entity[field]
        return column

    @property
    def pids(self) -> np.ndarray:
        """(N,) int64 identities, -1 where unknown or deleted; read anew at each call."""
        return self._column("pid")

    @property
    def camids(self) -> np.ndarray:
        """(N,) int64 cameras, -1 where unknown or deleted; read anew at each call."""
        return self._column("camid")

    def labels(self, rows: Tensor | Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return identities (n,), cameras (n,) and image files of chosen rows; a row of -1 has -1, -1 and ''."""
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        with told(self.name):
            entities = fetch(self.client, self.collection, np.unique(wanted[wanted >= 0]), _LABELS)
        found = {entity["row"]: entity for entity in entities}
        for entity in entities:
            self.identity_names.update({entity["pid"]: entity["identity"]} if entity["identity"] else {})
            self.camera_names.update({entity["camid"]: entity["camera"]} if entity["camera"] else {})
        none = {"pid": -1, "camid": -1, "path": ""}
        chosen = [found.get(int(row), none) for row in wanted]
        pids, camids = (np.array([each[key] for each in chosen], np.int64) for key in ("pid", "camid"))
        return pids, camids, [each["path"] for each in chosen]

    def iter_paths(self) -> Iterator[str]:
        """Yield the image file of every living row, in order."""
        with told(self.name):
            for start in range(0, len(self), MOST):
                rows = np.arange(start, min(start + MOST, len(self)))
                found = fetch(self.client, self.collection, rows, ["path"])
                yield from (entity["path"] for entity in sorted(found, key=lambda entity: entity["row"]))

    def rows_of(self, chosen: Filter) -> list[int]:
        """Return the living rows that meet conditions, rising."""
        rows: list[int] = []
        with told(self.name):
            parts = self.client.query_iterator(
                self.collection,
                batch_size=MOST // 2,
                filter=" and ".join(filter(None, [f"row < {len(self)}", chosen.expression()])),
                output_fields=["row"],
            )
            while part := parts.next():
                rows += [entity["row"] for entity in part]
            parts.close()
        return sorted(set(rows) - set(self.gone))

    def state_collections(self) -> list[str]:
        """Return the collections of the gallery's layer states, unfinished ones included."""
        prefix = f"{self.collection}_{STATES}_"
        return [name for name in self.client.list_collections() if name.startswith(prefix)]


class MilvusWriter:
    """Make a gallery in Milvus, or append to one: a context manager.

    Rows are committed batch by batch; those of a writer that was killed and that it had not committed are written again by
    the next one, at the same numbers (``len(writer)`` says where it goes on).

    Args:
        name: See :class:`MilvusStore`.
        dim: Feature width d.
        model: Fingerprint of the model that makes the features; a gallery holds features of one model; ``None``:
            whatever model the gallery has.
        index: Index of a new gallery: ``flat``, ``ivf`` or ``hnsw``; ``None``: that of the gallery, or ``flat``.
        batch: Rows per commit.

    Raises:
        UserError: Another writer, another model, width or index than the gallery's, or no Milvus.
    """

    def __init__(
        self, name: str, *, dim: int, model: str | None = None, index: str | None = None, batch: int = 4096, nlist: int = 0
    ) -> None:
        self.name, self.place, self.batch = name, place_of(name), batch
        self._wanted = {"dim": dim, "model": model, "index": index}
        self._nlist = nlist
        self._buffer: list[dict[str, Any]] = []
        self.head: dict[str, Any] = {}

    def __enter__(self) -> MilvusWriter:
        self.client = connect(self.name, create=True)
        self.documents = Documents(self.client, f"{self.place.collection}_manifest")
        with told(self.name):
            self.documents.make()
            head = self.documents.read(HEAD)
            if head is None:
                self._make()
            else:
                self.head = head
                for key, value in self._wanted.items():
                    if value is not None and value != head[key]:
                        raise UserError(
                            f"'{self.name}' has {key} {head[key]}, but {key} {value} is to be added; write to a gallery of "
                            "another name."
                        )
                self.client.load_collection(self.place.collection)
            self._tidy()
        return self

    def _make(self) -> None:
        wanted = {**self._wanted, "index": self._wanted["index"] or "flat", "model": self._wanted["model"] or ""}
        if self.client.has_collection(self.place.collection):  # of a writer that was killed before it wrote the head
            if list(self.client.query(self.place.collection, filter="", output_fields=["count(*)"]))[0]["count(*)"]:
                raise UserError(f"'{self.name}': a collection of that name is there and is no gallery; take another name.")
            self.client.drop_collection(self.place.collection)
        scalars = [*SCALARS, *((name, "VARCHAR") for name in ("identity", "camera", "path", "split"))]
        vectors = [("feature", int(wanted["dim"] or 0), str(wanted["index"]))]
        make_collection(self.client, self.place.collection, vectors, scalars, nlist=self._nlist or 1024)
        self.head = {
            "format": FORMAT,
            "version": 0,
            "id": uuid.uuid4().hex,
            **wanted,
            "rows": 0,
            "planned": 0,
            "deleted": 0,
            "gone": [],
            "source": None,
        }
        self.documents.write(HEAD, self.head)

    def _tidy(self) -> None:
        """Carry out what a killed writer had begun."""
        collections = [self.place.collection, *MilvusStore(self.name).state_collections()]
        if self.head["gone"]:
            self._remove(collections)
        for collection in collections:
            self.client.load_collection(collection)
            self.client.delete(collection, filter=f"row >= {len(self)}")

    def _remove(self, collections: list[str]) -> None:
        for collection in collections:
            self.client.load_collection(collection)
            self.client.delete(collection, ids=self.head["gone"])
        self.commit(gone=[])

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.flush()
            with told(self.name):
                self.client.flush(self.place.collection)

    def __len__(self) -> int:
        """Rows that are safely in the gallery."""
        return int(self.head["rows"])

    def commit(self, **changes: Any) -> None:
        """Replace entries of the head: what it says counts from now on.

        Raises:
            UserError: Another process has written to the gallery since this writer looked at it.
        """
        with told(self.name):
            if self.documents.read(HEAD)["version"] != self.head["version"]:
                raise UserError(
                    f"'{self.name}' is being written by another process; let one at a time write, then try again."
                )
            self.head = {**self.head, **changes, "version": self.head["version"] + 1}
            self.documents.write(HEAD, self.head)

    def plan(self, rows: int) -> None:
        """Note how many rows the gallery will have, so that one that stays short of it can be told from a whole one."""
        self.commit(planned=rows)

    def known_paths(self) -> set[str]:
        """Return the image files whose features are in the gallery."""
        return set(MilvusStore(self.name).iter_paths())

    def add(
        self,
        features: Tensor,
        pids: np.ndarray | Sequence[Label] | None = None,
        camids: np.ndarray | Sequence[Label] | None = None,
        paths: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
        *,
        names: tuple[dict[int, str], dict[int, str]] | None = None,
        alive: Sequence[bool] | None = None,
        unit: bool = False,
    ) -> None:
        """Append rows; they are committed when a batch is full. When they were taken is read from the image files.

        Args:
            features: (n, d) of any length; they are scaled to unit length.
            pids: (n,) identities, numbers or names; ``None``: unknown, -1.
            camids: (n,) cameras; the same.
            paths: n image files; ``None``: ''.
            splits: n times ``train``, ``query`` or ``gallery``; ``None``: they have none.
            names: Names of identities and of cameras, where they are given by number.
            alive: n times whether the row is there; one that is not only takes a number.
            unit: The features have unit length and are kept to the last bit.

        Raises:
            UserError: Features of another width, or not finite; labels of another number.
        """
        if features.dim() != 2 or features.shape[1] != self.head["dim"]:
            raise UserError(
                f"features of shape {tuple(features.shape)} do not fit '{self.name}', which has width {self.head['dim']}."
            )
        given = ({}, {}) if names is None else (dict(names[0]), dict(names[1]))
        rows, pids, camids, files, parts = rows_to_add(features, pids, camids, paths, splits, names=given, unit=unit)
        strange = next((path for path in files if not _is_text(path)), None)
        if strange is not None:
            raise UserError(f"'{self.name}': the name {strange!r} is no UTF-8, which Milvus cannot keep; rename the file.")
        with ThreadPoolExecutor(_TIME_THREADS) as pool:
            times = list(pool.map(taken_at, files, chunksize=256))
        for slot, vector in enumerate(rows.numpy()):
            pid, camid = int(pids[slot]), int(camids[slot])
            entity = {
                "feature": vector,
                "pid": pid,
                "camid": camid,
                "time": None if np.isnan(times[slot]) else times[slot],
                "identity": given[0].get(pid, ""),
                "camera": given[1].get(camid, ""),
                "path": files[slot],
                "split": parts[slot],
            }
            self._buffer.append(entity if alive is None or alive[slot] else {})
        while len(self._buffer) >= self.batch:
            self._write(self.batch)

    def flush(self, **changes: Any) -> None:
        """Commit the rows that do not fill a batch, and changes of the head with them."""
        while len(self._buffer) > self.batch:
            self._write(self.batch)
        if self._buffer or changes:
            self._write(self.batch, **changes)

    def _write(self, limit: int, **changes: Any) -> None:
        part, self._buffer = self._buffer[:limit], self._buffer[limit:]
        entities = [{"row": len(self) + number, **entity} for number, entity in enumerate(part) if entity]
        upsert(self.client, self.name, self.place.collection, entities, self.head["dim"])
        gone = len(part) - len(entities)
        self.commit(rows=len(self) + len(part), deleted=self.head["deleted"] + gone, **changes)

    def delete(self, rows: Iterable[int]) -> int:
        """Take rows out of the gallery and out of its refined forms; returns how many were there.

        Raises:
            UserError: A row that the gallery does not have.
        """
        wanted, count = np.unique(np.fromiter(rows, np.int64)), 0
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise UserError(f"'{self.name}' has no row {outside[0]}; its rows are 0 to {len(self) - 1}.")
        collections = [self.place.collection, *MilvusStore(self.name).state_collections()]
        for start in range(0, len(wanted), _DELETED):
            with told(self.name):
                found = fetch(self.client, self.place.collection, wanted[start : start + _DELETED], [])
                there = sorted(entity["row"] for entity in found)
                if there:
                    self.commit(gone=there, deleted=self.head["deleted"] + len(there))
                    self._remove(collections)
                    count += len(there)
        return count


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def upsert(client: Any, name: str, collection: str, entities: list[dict[str, Any]], width: int) -> None:
    """Write entities by their keys, in messages of a size that Milvus takes."""
    step = min(4096, vector_batch(width))
    with told(name):
        for start in range(0, len(entities), step):
            client.upsert(collection, entities[start : start + step])


def drop_gallery(name: str) -> None:
    """Take a whole gallery away; nothing happens where there is none."""
    with contextlib.suppress(UserError):
        store = MilvusStore(name)
        with told(name):
            for collection in (store.documents.collection, *store.state_collections(), store.collection):
                store.client.drop_collection(collection)


__all__ = ["MilvusStore", "MilvusWriter", "drop_gallery", "upsert"]
