"""What holds a gallery: files with faiss, which is the default, or Milvus; the searcher asks both the same way.

Shape letters: N gallery rows, d width.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.images import taken_at
from ..errors import UserError
from ..features.deleted import delete_rows
from ..features.store import FeatureStore
from ..metrics.neighbours import SearchConfig
from .filters import Filter
from .index import TableIndex, open_index
from .layers import encoder_fingerprint
from .milvus import MilvusStates, MilvusStore, MilvusWriter, is_milvus
from .milvus.index import MilvusIndex
from .milvus.states import states_key, upload, work_folder
from .relations import RelationStates, refine_table

INDEX_NAME = "features"
_TIME_THREADS = 8

Store = FeatureStore | MilvusStore
States = RelationStates | MilvusStates


class Engine(Protocol):
    """What a searcher asks of whatever holds a gallery.

    Attributes:
        store: Features and labels: ``len``, ``dim``, ``model``, ``shortage``, ``pids``, ``camids``, ``labels``, ``take``,
            ``read``, ``verify``.
        name: What sentences call the gallery.
        living: Images that were not deleted.
    """

    store: Any
    name: str
    living: int

    def index(self, config: SearchConfig, *, build: bool, verify: bool) -> Any:
        """Return what searches the features."""

    def index_of(self, what: str, states: Any, config: SearchConfig, *, build: bool, verify: bool) -> Any:
        """Return what searches ``refined`` or ``inputs`` of the states."""

    def states(self, encoder: Any, *, verify: bool, camids: np.ndarray | None) -> Any:
        """Open the layer states; a :class:`UserError` where there are none."""

    def refine(
        self, encoder: Any, config: SearchConfig, *, full: bool, block_rows: int, verify: bool, camids: Any, build: bool
    ) -> Any:
        """Refine the gallery, or its new images, and return the states; goes on where a killed call was."""

    def among(self, chosen: Filter | Tensor | None) -> Any:
        """Return which images may be found, as the indices take it; ``None``: all."""

    def rows_of(self, chosen: Filter) -> list[int]:
        """Return the living rows that meet conditions, rising."""

    def delete(self, rows: Iterable[int]) -> int:
        """Take rows out and return how many were there; on the disk when it returns."""


class FileEngine:
    """A store on disk, with faiss's indices beside it.

    Args:
        store: The store.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.name = store, str(store.folder)
        self.living = len(store) - len(store.deleted)
        self._times: np.ndarray | None = None

    def folder(self, encoder: Any) -> Path:
        """Where an encoder's layer states are."""
        return self.store.folder / f"relation-{encoder_fingerprint(encoder)[:12]}"

    def index(self, config: SearchConfig, *, build: bool, verify: bool) -> TableIndex:
        """As of :class:`Engine`."""
        path = self.store.folder / INDEX_NAME
        return open_index(self.store, path, config, build=build, verify=verify, alive=self.store.alive)

    def index_of(self, what: str, states: RelationStates, config: SearchConfig, *, build: bool, verify: bool) -> TableIndex:
        """As of :class:`Engine`."""
        if what == "inputs" and states.inputs is self.store:
            return self.index(config, build=build, verify=verify)
        table, path = getattr(states, what), states.pass_folder / what
        return open_index(table, path, config, build=build, verify=verify, alive=self.store.alive)

    def states(self, encoder: Any, *, verify: bool, camids: np.ndarray | None) -> RelationStates:
        """As of :class:`Engine`."""
        return RelationStates(self.folder(encoder), self.store, encoder, verify=verify, camids=camids)

    def refine(
        self, encoder: Any, config: SearchConfig, *, full: bool, block_rows: int, verify: bool, camids: Any, build: bool
    ) -> RelationStates:
        """As of :class:`Engine`."""
        index = (
            self.index(config, build=build, verify=verify)
            if encoder.head is None
            else TableIndex(self.store, config, alive=self.store.alive)  # what comes out of the head has its own
        )
        options: dict[str, Any] = {"full": full, "block_rows": block_rows, "verify": verify, "camids": camids}
        return refine_table(self.folder(encoder), self.store, encoder, index, **options)

    def among(self, chosen: Filter | Tensor | None) -> Tensor | None:
        """As of :class:`Engine`."""
        if isinstance(chosen, Filter):
            return torch.from_numpy(self._mask(chosen)) if chosen else None
        if chosen is not None and chosen.shape != (len(self.store),):
            raise UserError(
                f"among has shape {tuple(chosen.shape)}; one value for each of {len(self.store)} images is needed."
            )
        return chosen

    def _mask(self, chosen: Filter) -> np.ndarray:
        return chosen.mask(self.store.pids, self.store.camids, self.times)

    def times(self) -> np.ndarray:
        """(N,) when the images were taken, NaN where unknown; read from their files at the first call."""
        if self._times is None:
            with ThreadPoolExecutor(_TIME_THREADS) as pool:
                found = pool.map(taken_at, self.store.iter_paths(), chunksize=256)
                self._times = np.fromiter(found, np.float64, len(self.store))
        return self._times

    def rows_of(self, chosen: Filter) -> list[int]:
        """As of :class:`Engine`."""
        return np.setdiff1d(np.flatnonzero(self._mask(chosen)), self.store.deleted).tolist()

    def delete(self, rows: Iterable[int]) -> int:
        """As of :class:`Engine`."""
        return delete_rows(self.store.folder, rows)


class MilvusEngine:
    """A gallery in Milvus.

    Args:
        store: The gallery.
    """

    def __init__(self, store: MilvusStore) -> None:
        self.store, self.name, self.living = store, store.name, store.living

    def index(self, config: SearchConfig, *, build: bool, verify: bool) -> MilvusIndex:
        """As of :class:`Engine`."""
        return MilvusIndex(self.store, config, self.store.kind, self.store.gone)

    def index_of(self, what: str, states: MilvusStates, config: SearchConfig, *, build: bool, verify: bool) -> MilvusIndex:
        """As of :class:`Engine`."""
        return states.index(getattr(states, what), config)

    def states(self, encoder: Any, *, verify: bool, camids: np.ndarray | None) -> MilvusStates:
        """As of :class:`Engine`."""
        return MilvusStates(self.store, encoder)

    def refine(
        self, encoder: Any, config: SearchConfig, *, full: bool, block_rows: int, verify: bool, camids: Any, build: bool
    ) -> MilvusStates:
        """As of :class:`Engine`: appended images against what is in Milvus, a full pass on files that are uploaded."""
        if not full and self.store.documents.read(states_key(encoder)) is not None:
            states = MilvusStates(self.store, encoder)
            return states if states.rows == len(self.store) else states.append(config)
        table: Any = self.store
        folder = work_folder(self.store)
        plain = SearchConfig()  # the pass holds the features, or reads them block by block
        index: Any = TableIndex(table, plain, alive=self.store.alive)
        options: dict[str, Any] = {"full": full, "block_rows": block_rows, "verify": verify, "camids": camids}
        states = upload(refine_table(folder, table, encoder, index, **options), self.store)
        shutil.rmtree(folder)
        return states

    def among(self, chosen: Filter | Tensor | None) -> str | None:
        """As of :class:`Engine`.

        Raises:
            UserError: Rows are given one by one.
        """
        if chosen is not None and not isinstance(chosen, Filter):
            raise UserError(f"'{self.name}' is searched among images that meet a filter, not among rows that are listed.")
        return (chosen.expression() or None) if chosen else None

    def rows_of(self, chosen: Filter) -> list[int]:
        """As of :class:`Engine`."""
        return self.store.rows_of(chosen)

    def delete(self, rows: Iterable[int]) -> int:
        """As of :class:`Engine`."""
        with MilvusWriter(self.store.name, dim=self.store.dim) as writer:
            return writer.delete(rows)


def open_store(name: Store | Path | str) -> Store:
    """Open a gallery by its name: a folder, or one in Milvus (``milvus:FILE.db``, ``milvus:http://HOST:PORT``).

    Raises:
        UserError: There is none, or it is damaged.
    """
    if isinstance(name, (FeatureStore, MilvusStore)):
        return name
    return MilvusStore(str(name)) if is_milvus(name) else FeatureStore(name)


def engine_of(store: Store | Path | str) -> FileEngine | MilvusEngine:
    """Return what holds a gallery; see :func:`open_store`."""
    store = open_store(store)
    return MilvusEngine(store) if isinstance(store, MilvusStore) else FileEngine(store)


__all__ = ["INDEX_NAME", "Engine", "FileEngine", "MilvusEngine", "engine_of", "open_store"]
