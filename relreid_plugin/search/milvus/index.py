"""Rows of a collection as a table, and the search in it, with the scores and the order of every other index.

Milvus chooses candidates by float32 scores; they are scored anew in float64 and ordered as
:mod:`relreid_plugin.search.exact` says, and where near-ties could hide behind the last candidate, more are asked for.

Shape letters: N rows, Q queries, n some rows, d width, k results, s candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...metrics.candidates import TOLERANCE
from ...metrics.neighbours import SearchConfig
from ..exact import SPARE, checked_queries, stable_order, table_scores
from .client import MOST, fetch_vectors, told, vector_batch

_BLOCK = 8192
_HITS = 1 << 20  # candidates that are asked for at once


class MilvusTable:
    """A vector field of a collection as rows that are read by number; it is what a table of files is to the files.

    Args:
        client: The connection.
        collection: Name of the collection.
        field: The field.
        dim: Its width d.
        rows: N, those that are deleted included; they read as the first unit vector.
        name: What sentences call the gallery.
        identity: What the rows are: it goes into their fingerprint.
    """

    def __init__(self, client: Any, collection: str, field: str, dim: int, rows: int, name: str, identity: str) -> None:
        self.client, self.collection, self.field, self.name = client, collection, field, name
        self.dim, self.identity, self._rows = dim, identity, rows

    def __len__(self) -> int:
        return self._rows

    def take(self, rows: Tensor) -> Tensor:
        """Return chosen rows (n,) int64 -> (n, d) float32."""
        with told(self.name):
            values, there = fetch_vectors(self.client, self.collection, rows.numpy(), self.field, self.dim)
        values[~there, 0] = 1
        return torch.from_numpy(values)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` (all by default), (n, d) float32."""
        return self.take(torch.arange(start, len(self) if stop is None else stop))

    def blocks(self, *, start: int = 0, stop: int | None = None, verify: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, (n, d) float32 rows) block by block."""
        stop = len(self) if stop is None else min(stop, len(self))
        for low in range(start, stop, _BLOCK):
            yield low, self.read(low, min(low + _BLOCK, stop))

    def check(self, start: int = 0) -> None:
        """Do nothing: Milvus watches over its own files."""

    def fingerprint(self, rows: int | None = None) -> str:
        """Return a hash of what the first ``rows`` rows are (all by default); rows never change."""
        return hashlib.sha256(f"{self.identity}|{len(self) if rows is None else rows}".encode()).hexdigest()[:32]


class MilvusIndex:
    """What searches a table in Milvus.

    Args:
        table: The rows.
        config: Search parameters ``nprobe`` and ``ef``.
        kind: Index of the field: ``flat``, ``ivf`` or ``hnsw``.
        gone: Rows that are deleted and may still be there.
    """

    alive = None
    file = None

    def __init__(self, table: MilvusTable, config: SearchConfig, kind: str, gone: list[int]) -> None:
        self.table, self.config, self.kind, self._gone = table, config, kind, gone

    @property
    def exact(self) -> bool:
        """Whether every search finds the true neighbours."""
        return self.kind == "flat"

    def _expression(self, size: int, among: str | None) -> str:
        parts = [f"row < {size}"]
        parts += [f"row not in {self._gone}"] if self._gone else []
        return " and ".join([*parts, *([f"({among})"] if among else [])])

    def of_camera(self, cameras: Tensor, camera: int | None, *, near: bool, size: int) -> str | None:
        """As of :class:`~relreid_plugin.search.index.TableIndex`; Milvus has the cameras."""
        if camera is None:
            return None if near else f"row < {size}"
        return f"row < {size} and camid {'==' if near else '!='} {camera}"

    def search(
        self, queries: Tensor, k: int, *, limit: int | None = None, among: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the k best rows.

        Args:
            queries: (Q, d) float32 unit features.
            k: At most.
            limit: Search the first rows only.
            among: Search the rows that meet an expression.

        Returns:
            (Q, k) scores, falling, equal ones by rising row, and (Q, k) int64 rows, fewer columns where no query has k
            results; -1 and minus infinity where a query has fewer than another.

        Raises:
            UserError: Queries of another width, or not finite; more results than Milvus returns.
        """
        queries = checked_queries(queries, self.table.dim)
        size = len(self.table) if limit is None else min(limit, len(self.table))
        k = min(k, size)
        if not k or not len(queries):
            return queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
        if k > MOST:
            raise UserError(f"{k} results per query are asked for, and Milvus returns {MOST} at most; ask for fewer.")
        count = min(MOST, max(2 * k, k + SPARE), size)
        scores = queries.new_full((len(queries), k), -torch.inf)
        rows = torch.full((len(queries), k), -1)
        left = torch.arange(len(queries))
        while len(left):
            near, found = self._candidates(queries[left], count, self._expression(size, among))
            if not found.shape[1]:
                break
            best, chosen = stable_order(table_scores(queries[left], self.table.take, found), found, k)
            chosen = torch.where(best == -torch.inf, -1, chosen)
            scores[left, : best.shape[1]], rows[left, : best.shape[1]] = best, chosen
            if not self.exact or found.shape[1] < count or count >= size:
                break
            tolerance = 2 * TOLERANCE * queries[left].norm(dim=1).clamp_min(1e-30)
            unclear = (near[:, -1] >= best[:, -1] - tolerance) & (found[:, -1] >= 0)  # others may be as near
            left = left[unclear]
            if len(left) and count == MOST:
                raise UserError(
                    f"'{self.table.name}' holds more than {MOST} images that are equally near to a query, which Milvus "
                    "cannot return; take the duplicates out of the gallery."
                )
            count = min(MOST, size, 4 * count)
        width = int((rows >= 0).sum(dim=1).max())
        return scores[:, :width], rows[:, :width]

    def neighbours(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k best rows (Q, k) and the defining score (Q,) of the last one; see :meth:`search`."""
        scores, rows = self.search(queries, k)
        return rows, scores[:, -1]

    def _candidates(self, queries: Tensor, count: int, expression: str) -> tuple[Tensor, Tensor]:
        """(Q, d) -> (Q, s) float32 scores of Milvus's and rows, falling; s at most ``count``, -1 where there is none."""
        params: dict[str, Any] = {"flat": {}, "ivf": {"nprobe": self.config.nprobe}, "hnsw": {"ef": self.config.ef}}[
            self.kind
        ]
        if self.kind == "hnsw":
            params = {"ef": max(self.config.ef, count)}
        scores, rows = queries.new_full((len(queries), count), -torch.inf), torch.full((len(queries), count), -1)
        step = max(1, min(_HITS // count, vector_batch(queries.shape[1]), MOST))
        with told(self.table.name):
            for start in range(0, len(queries), step):
                results = self.table.client.search(
                    self.table.collection,
                    data=list(queries[start : start + step].numpy()),
                    anns_field=self.table.field,
                    limit=count,
                    filter=expression,
                    search_params={"metric_type": "IP", "params": params},
                    output_fields=["row"],
                )
                for slot, hits in enumerate(results, start):
                    scores[slot, : len(hits)] = torch.tensor([hit["distance"] for hit in hits], dtype=torch.float32)
                    rows[slot, : len(hits)] = torch.tensor([hit["row"] for hit in hits], dtype=torch.long)
        width = int((rows >= 0).sum(dim=1).max())
        return scores[:, :width], rows[:, :width]


def living_rows(table: MilvusTable, gone: list[int]) -> Tensor:
    """Return (N,) bool, which rows of a table are there."""
    alive = torch.zeros(len(table), dtype=torch.bool)
    with told(table.name):
        for start in range(0, len(table), MOST):
            ids = list(range(start, min(start + MOST, len(table))))
            found = table.client.query(table.collection, ids=ids, output_fields=["row"])
            alive[torch.tensor([entity["row"] for entity in found], dtype=torch.long)] = True
    alive[torch.as_tensor(np.asarray(gone, np.int64))] = False
    return alive


__all__ = ["MilvusIndex", "MilvusTable", "living_rows"]
