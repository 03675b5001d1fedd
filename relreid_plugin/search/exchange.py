"""Rows of a table that lies in several processes, each with a part of it: asked for by number, and read block by block.

Every function is called by all processes alike, as often in one as in another; who needs nothing asks for no rows.

Shape letters: N rows of all processes, n of one, W processes, Q queries, d width, k results, s candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..collective import rank, world
from ..metrics.candidates import TOLERANCE
from .exact import SPARE, stable_order

_BLOCK = 8192  # rows that one process shows the others at a time
_QUERIES = 2048  # rows that are scored together

Rows = Callable[[Tensor], Tensor]
"""Own rows by their number among the own ones, (m,) int64 -> (m, …)."""
Barred = Callable[[Tensor, Tensor], Tensor]
"""Which rows of the table may not be found for which: (q,) and (m,) int64 row numbers -> (q, m) bool."""


def part_of(size: int, number: int | None = None) -> tuple[int, int]:
    """Return first row, and row behind the last one, of a process's part of ``size`` rows (``None``: this one)."""
    number, count = rank() if number is None else number, world()
    return number * size // count, (number + 1) * size // count


def most(value: int) -> int:
    """Return the largest of all processes' values."""
    wanted = torch.tensor([value])
    dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
    return int(wanted)


def _swap(parts: list[Tensor]) -> list[Tensor]:
    """What every process has for this one, from what this one has for every process; (m, …) each."""
    sizes = torch.tensor([len(part) for part in parts])
    theirs = torch.empty_like(sizes)
    dist.all_to_all_single(theirs, sizes)
    counts = theirs.tolist()
    sent = torch.cat(parts)
    received = sent.new_empty((sum(counts), *sent.shape[1:]))
    dist.all_to_all_single(received, sent.contiguous(), counts, sizes.tolist())
    return list(received.split(counts))


def exchange(rows: Tensor, size: int, own: Rows) -> Tensor:
    """Return chosen rows, wherever they are.

    Args:
        rows: (m,) int64 numbers in the whole table, different ones and rising.
        size: N.
        own: Reads the rows that this process has.

    Returns:
        (m, …), in the order of ``rows``.
    """
    bounds = torch.tensor([part_of(size, number)[1] for number in range(world())])
    owner = torch.bucketize(rows, bounds, right=True)
    asked = _swap(list(rows.split(torch.bincount(owner, minlength=world()).tolist())))
    low = part_of(size)[0]
    found = [own(part - low) for part in asked]
    shape, dtype = found[0].shape[1:], found[0].dtype
    width = int(np.prod(shape)) * found[0].element_size()
    raw = [part.contiguous().flatten().view(torch.uint8).view(len(part), width) for part in found]
    return torch.cat(_swap(raw)).flatten().view(dtype).view(len(rows), *shape)


def shown_blocks(size: int, width: int, own: Rows) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows (m, d)) of the whole table; every process shows its rows to all others, block by block.

    Args:
        size: N.
        width: d.
        own: Reads the rows that this process has.
    """
    for number in range(world()):
        low, high = part_of(size, number)
        for start in range(low, high, _BLOCK):
            stop = min(start + _BLOCK, high)
            if number == rank():
                block = own(torch.arange(start - low, stop - low)).contiguous()
            else:
                block = torch.empty(stop - start, width)
            dist.broadcast(block, number)
            yield start, block


def neighbours(
    size: int, width: int, k: int, own: Rows, *, alive: Tensor | None = None, barred: Barred | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k best rows of the whole table for every own row, as one process finds them.

    Float32 scores choose candidates, which are scored in float64 when their block comes by again; where near-ties could hide
    behind the last candidate, the table is searched in float64 for these rows.

    Args:
        size: N.
        width: d.
        k: At most N.
        own: Reads the rows that this process has.
        alive: (N,) bool, the rows that may be found; ``None``: all.
        barred: What of them may not be found for some rows only.

    Returns:
        (n, k) int64 rows by falling score, equal ones by rising row, -1 where there are fewer; and (n, k) their scores.
    """
    low, high = part_of(size)
    closed = _closed(alive, barred)
    mine, count = own(torch.arange(high - low)), min(size, k + SPARE)
    scores = torch.full((high - low, count), -torch.inf)
    rows = torch.full((high - low, count), -1)
    for start, block in shown_blocks(size, width, own):
        columns = torch.arange(start, start + len(block))
        for first in range(0, high - low, _QUERIES):
            part = slice(first, first + _QUERIES)
            near = mine[part] @ block.t()
            if closed is not None:
                near.masked_fill_(closed(torch.arange(low, high)[part], columns), -torch.inf)
            new, where = near.topk(min(count, len(block)), dim=1)
            both = torch.cat([scores[part], new], dim=1), torch.cat([rows[part], where + start], dim=1)
            scores[part], order = both[0].topk(count, dim=1)
            rows[part] = both[1].gather(1, order)
    rows[scores == -torch.inf] = -1
    exact = torch.full_like(scores, -torch.inf)
    for start, block in shown_blocks(size, width, own):
        doubles = block.double()
        for first in range(0, high - low, _QUERIES):
            part = slice(first, first + _QUERIES)
            query, slot = ((rows[part] >= start) & (rows[part] < start + len(block))).nonzero(as_tuple=True)
            chosen = doubles.index_select(0, rows[part][query, slot] - start)
            products = torch.linalg.vecdot(mine[part].index_select(0, query).double(), chosen)
            exact[first + query, slot] = products.float()
    last_near = scores[:, -1].clone()
    rows = rows.masked_fill(exact == -torch.inf, size)  # behind all rows of equal score
    exact, rows = stable_order(exact, rows, k)
    tolerance = 2 * TOLERANCE * mine.norm(dim=1).clamp_min(1e-30)
    hidden = (last_near > -torch.inf) & (last_near >= exact[:, -1] - tolerance)
    unclear = hidden.nonzero().flatten() if count < size else torch.empty(0, dtype=torch.long)
    if most(len(unclear)):
        exact[unclear], rows[unclear] = _decided(mine[unclear].double(), unclear + low, size, width, k, own, closed)
    return rows.masked_fill(rows == size, -1), exact


def _closed(alive: Tensor | None, barred: Barred | None) -> Barred | None:
    """What may not be found at all, and what not for some rows; ``None``: everything may."""
    if alive is None:
        return barred
    if barred is None:
        return lambda rows, columns: ~alive[columns]
    return lambda rows, columns: barred(rows, columns) | ~alive[columns]


def _decided(
    queries: Tensor, own_rows: Tensor, size: int, width: int, k: int, own: Rows, closed: Barred | None
) -> tuple[Tensor, Tensor]:
    best, found = torch.full((len(queries), k), -torch.inf), torch.full((len(queries), k), size)
    for start, block in shown_blocks(size, width, own):
        scores = (queries @ block.double().t()).float()
        columns = torch.arange(start, start + len(block))
        numbers = columns.expand(len(queries), -1)
        if closed is not None:
            dead = closed(own_rows, columns)
            scores = scores.masked_fill(dead, -torch.inf)
            numbers = numbers.masked_fill(dead, size)
        best, found = stable_order(torch.cat([best, scores], dim=1), torch.cat([found, numbers], dim=1), k)
    return best, found


def gathered(value: Any) -> list[Any]:
    """Return the value of every process."""
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


__all__ = ["exchange", "gathered", "most", "neighbours", "part_of", "shown_blocks"]
