"""Rows that are taken out of a store: named in its manifest, found by no search, at their old numbers.

Indices and refined galleries hold the rows by number and stay valid. What is deleted stays on the disk until the store is
made anew; nothing that reads a store shows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import UserError
from .arrays import read_manifest, write_manifest
from .store import MANIFEST, FeatureStore, writer_lock


def delete_rows(folder: Path | str, rows: Iterable[int]) -> int:
    """Take rows out of a store, or out of the shards that hold them; on the disk when the call returns.

    Args:
        folder: The store's folder, or the folder of its shards.
        rows: Their numbers; those that were deleted before may be among them.

    Returns:
        How many were deleted by this call.

    Raises:
        UserError: A row that the store does not have, another writer, or a damaged store.
        WriteError: A manifest cannot be written; of several shards some may have been.
    """
    store = FeatureStore(folder)
    wanted = np.unique(np.fromiter(rows, np.int64))
    outside = wanted[(wanted < 0) | (wanted >= len(store))]
    if len(outside):
        raise UserError(f"store '{folder}' has no row {outside[0]}; its rows are 0 to {len(store) - 1}.")
    count = first = 0
    for place in store.shards:
        with writer_lock(place):
            manifest = read_manifest(place / MANIFEST, what="store")
            size = sum(chunk["rows"] for chunk in manifest["chunks"])
            own = wanted[(wanted >= first) & (wanted < first + size)] - first
            before = manifest.get("deleted", [])
            after = np.union1d(np.asarray(before, np.int64), own).tolist()
            if len(after) > len(before):
                write_manifest(place / MANIFEST, {**manifest, "deleted": after})
                count += len(after) - len(before)
        first += size
    return count


__all__ = ["delete_rows"]
