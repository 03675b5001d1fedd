"""A store on disk written into Milvus, chunk by chunk; and what was written before brought up to date."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from ...features.store import FeatureStore
from .store import MilvusStore, MilvusWriter


def copy_store(store: FeatureStore, name: str, *, index: str | None = None, nlist: int = 0) -> MilvusStore:
    """Make a gallery in Milvus the same as a store on disk: rows that are missing are written, deleted ones deleted.

    Row numbers stay. A killed copy goes on after the last chunk that was committed when this is called again.

    Args:
        store: The store.
        name: The gallery, see :class:`~relreid_plugin.search.milvus.store.MilvusStore`.
        index: Index of a new gallery: ``flat`` (exact), ``ivf`` or ``hnsw``.
        nlist: Cells of an IVF index; 0: 1024.

    Raises:
        UserError: The gallery holds something else than the store's first rows, or Milvus refuses.
    """
    deleted, splits = set(store.deleted.tolist()), store.splits
    firsts = store.array.firsts.tolist()
    batch = max(np.diff(firsts), default=0) + 1  # a chunk is committed with its fingerprint, by flush
    with MilvusWriter(name, dim=store.dim, model=store.model, index=index, nlist=nlist, batch=int(batch)) as writer:
        known = len(writer)
        if known and (known not in firsts or writer.head["source"] != store.fingerprint(known)):
            raise UserError(
                f"'{name}' holds {known} rows that are not the first ones of store '{store.folder}'; copy into a gallery of "
                "another name."
            )
        if writer.head["planned"] != len(store):
            writer.plan(len(store))
        with tqdm(total=len(store), initial=known, desc="copying", unit="row", leave=False, disable=None) as bar:
            for low, high in zip(firsts, firsts[1:]):
                if low < known or low == high:
                    continue
                pids, camids, paths = store.labels(range(low, high))
                writer.add(
                    store.read(low, high),
                    pids,
                    camids,
                    paths,
                    None if splits is None else splits[low:high].tolist(),
                    names=(store.identity_names, store.camera_names),
                    alive=[row not in deleted for row in range(low, high)],
                    unit=True,
                )
                writer.flush(source=store.fingerprint(high))
                bar.update(high - low)
        writer.delete(row for row in deleted if row < known)
    return MilvusStore(name)


__all__ = ["copy_store"]
