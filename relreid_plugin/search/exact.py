"""The exact search of a table on disk, and the order that every search gives its results.

Shape letters: N rows, Q queries, d width, k results, s candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..features.arrays import RowTable
from ..metrics.candidates import TOLERANCE
from .bycamera import RowPart

SPARE = 12  # candidates beyond k, so that near-ties are decided by the definition
QUERIES = 1024  # queries that one pass over a table serves
_BLOCK_ELEMENTS = 1 << 22  # gathered numbers that are scored at once


def checked_queries(queries: Tensor, dim: int) -> Tensor:
    """Return queries (Q, d) as float32 in the memory of the CPU.

    Args:
        queries: (Q, d).
        dim: Width of the gallery.

    Raises:
        UserError: Another width, or features that are not finite.
    """
    if queries.dim() != 2 or queries.shape[1] != dim:
        raise UserError(
            f"queries of shape {tuple(queries.shape)} do not fit a gallery of width {dim}; both need the same model."
        )
    queries = queries.detach().cpu()
    if not (np.isfinite(queries.numpy()).all() if queries.dtype == torch.float32 else bool(torch.isfinite(queries).all())):
        raise UserError("query features hold NaN or infinity; check the images and the checkpoint they come from.")
    return queries.float().contiguous()


def stable_order(scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (Q, k) scores and rows by falling score, equal scores by rising row.

    Args:
        scores: (Q, s).
        rows: (Q, s).
        k: Cut to s.
    """
    rows, order = rows.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], rows.gather(1, order)[:, :k]


def table_scores(queries: Tensor, take: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return the defining scores (Q, s) float32 of chosen pairs; rows of -1 score minus infinity.

    Args:
        queries: (Q, d).
        take: Returns chosen rows of the table, (n,) int64 -> (n, d).
        rows: (Q, s) int64.
    """
    out = torch.empty(rows.shape, dtype=torch.float32)
    step = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1] * queries.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        picked = take(rows[part].clamp_min(0).flatten()).view(-1, rows.shape[1], queries.shape[1]).double()
        out[part] = torch.bmm(picked, queries[part].double().unsqueeze(2)).squeeze(2).float()
    return out.masked_fill_(rows < 0, -torch.inf)


def best_of_one(query: Tensor, take: Callable[[Tensor], Tensor], rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`stable_order` of :func:`table_scores` for one query, by numpy, whose calls take a fraction of torch's.

    Args:
        query: (1, d) float32.
        take, rows, k: As of these; rows are (1, s).

    Returns:
        (1, k) scores and rows.
    """
    found = rows[0].numpy()
    vectors = take(torch.from_numpy(np.maximum(found, 0))).numpy()
    scores = (vectors.astype(np.float64) @ query[0].numpy().astype(np.float64)).astype(np.float32)
    scores[found < 0] = -np.inf
    order = np.lexsort((found, -scores))[:k]
    return torch.from_numpy(scores[order]).unsqueeze(0), torch.from_numpy(found[order]).unsqueeze(0)


def search_exact(queries: Tensor, table: RowTable | RowPart, k: int, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the k best rows of a table, read file by file.

    Args:
        queries: (Q, d) float32.
        table: (N, d) of unit rows.
        k: Cut to N.
        limit: Search the first rows only.

    Returns:
        (Q, k) float32 scores, falling, and (Q, k) int64 rows.
    """
    size = len(table) if limit is None else min(limit, len(table))
    k = min(k, size)
    parts = [_search_some(part, table, k, size) for part in queries.split(QUERIES)] if k else []
    if not parts:
        return queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
    return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def _search_some(queries: Tensor, table: RowTable | RowPart, k: int, size: int) -> tuple[Tensor, Tensor]:
    return settle(queries, table, *scan(queries, table, min(size, k + SPARE), size), k, size)


def scan(queries: Tensor, table: RowTable | RowPart, count: int, size: int) -> tuple[Tensor, Tensor]:
    """(Q, count) best float32 scores in the first ``size`` rows, falling, and their rows; near-ties as they come."""
    scores = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long)
    for start, block in table.blocks(stop=size):
        new, where = (queries @ block.t()).topk(min(count, len(block)), dim=1)
        scores, rows = torch.cat([scores, new], dim=1), torch.cat([rows, where + start], dim=1)
        if scores.shape[1] > count:
            scores, order = scores.topk(count, dim=1)
            rows = rows.gather(1, order)
    return scores, rows


def settle(
    queries: Tensor, table: RowTable | RowPart, scores: Tensor, rows: Tensor, k: int, size: int
) -> tuple[Tensor, Tensor]:
    """The k best by the definition from the candidates of :func:`scan`."""
    best, found = stable_order(table_scores(queries, table.take, rows), rows, k)
    if rows.shape[1] < size:  # rows beyond the candidates that may be as near as the k-th
        tolerance = 2 * TOLERANCE * queries.norm(dim=1).clamp_min(1e-30)
        unclear = (scores.amin(dim=1) >= best[:, -1] - tolerance).nonzero().flatten()
        if len(unclear):
            best[unclear], found[unclear] = _decide(queries[unclear], table, k, size)
    return best, found


def _decide(queries: Tensor, table: RowTable | RowPart, k: int, size: int) -> tuple[Tensor, Tensor]:
    """Search by the definition, in float64."""
    best = queries.new_empty(len(queries), 0)
    found = torch.empty(len(queries), 0, dtype=torch.long)
    for start, block in table.blocks(stop=size):
        exact = (queries.double() @ block.double().t()).float()
        rows = torch.arange(start, start + len(block)).expand(len(queries), -1)
        best, found = stable_order(torch.cat([best, exact], dim=1), torch.cat([found, rows], dim=1), k)
    return best, found


__all__ = ["QUERIES", "SPARE", "best_of_one", "scan", "search_exact", "settle", "stable_order", "table_scores"]
