"""Nearest images of other cameras and of the own one in a table on disk.

The lists are those of :class:`~relreid_plugin.metrics.cameras.CameraIndex`, which has the gallery in memory.

Shape letters: N rows, Q queries, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..features.arrays import RowTable
from ..metrics.cameras import UNKNOWN, CameraLists


class RowPart:
    """Chosen rows of a table, as a table of their own.

    Args:
        table: (N, d).
        rows: (n,) int64, rising.
    """

    def __init__(self, table: RowTable, rows: Tensor) -> None:
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor) -> Tensor:
        """Return chosen rows of the part, (m,) int64 -> (m, d)."""
        return self.table.take(self.rows[rows])

    def blocks(self, *, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows (m, d)) of the first ``stop`` rows of the part, file by file."""
        rows = self.rows[:stop]
        end = int(rows[-1]) + 1 if len(rows) else 0
        for first, block in self.table.blocks(stop=end):
            low, high = torch.searchsorted(rows, torch.tensor([first, first + len(block)])).tolist()
            if low < high:
                yield low, block[rows[low:high] - first]


def search_by_camera(
    index: Any,
    cameras: Tensor,
    queries: Tensor,
    own: Tensor,
    *,
    other: int,
    same: int,
    rows: Tensor | None = None,
    limit: int | None = None,
) -> CameraLists:
    """Return the nearest images of other cameras and of the query's own.

    Args:
        index: Of the table, such as :class:`~relreid_plugin.search.index.TableIndex`.
        cameras: (N,) of its rows; not read where the index knows them.
        queries: (Q, d) unit features.
        own: (Q,) their cameras; an unknown one: every image is one of another camera. Where the queries are rows of the
            table, those without a camera count as one camera.
        other: Neighbours of other cameras.
        same: Neighbours of the own camera.
        rows: (Q,) rows of the queries, which are not their own neighbours; ``None``: not in the table.
        limit: Search the first rows only.
    """
    size = len(index.table) if limit is None else min(len(index.table), limit)
    found = torch.zeros(len(queries), other + same, dtype=torch.long)
    scores = torch.full((len(queries), other + same), -torch.inf)
    for camera in own.unique().tolist() if other + same else []:
        chosen = (own == camera).nonzero().flatten()
        known = camera != UNKNOWN or rows is not None
        for near, start, count in ((False, 0, other), (True, other, same)):
            among = index.of_camera(cameras, camera if known else None, near=near, size=size) if count else None
            if among is None:
                continue
            spare = int(near and rows is not None)
            value, best = index.search(queries[chosen], count + spare, among=among)
            if spare and rows is not None:
                itself = best == rows[chosen].unsqueeze(1)
                value, order = value.masked_fill(itself, -torch.inf).sort(dim=1, descending=True, stable=True)
                best = best.gather(1, order)
            value, best = value[:, :count], best[:, :count]
            slots = slice(start, start + value.shape[1])
            found[chosen, slots] = best.masked_fill(value == -torch.inf, 0)
            scores[chosen, slots] = value
    return CameraLists(found, scores, other)


__all__ = ["RowPart", "search_by_camera"]
