"""What several processes that train together exchange: a global batch cut into rows, gathered again with gradients.

Without ``torch.distributed``, or outside of a training step, every function here hands back what it was given.

The convention behind all of it: every process computes the loss of the *whole* batch, L, from gathered outputs, and the
gradients of parameters are averaged over the W processes. What is gathered has the gradients of all processes added up in
the backward pass; so the average is the gradient of L, as one process has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> int:
    """Return how many processes work together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among them."""
    return dist.get_rank() if world() > 1 else 0


@dataclass(frozen=True)
class Cut:
    """How the rows of a global batch are cut across processes: every run of ``total / groups`` rows into W even parts.

    A process's rows are those of its part of every run, run after run: with three groups its anchors, then their positives,
    then their negatives. Parts differ by one row at most.

    Attributes:
        total: Rows of the global batch.
        groups: Runs that are cut alike.
        world: Processes W.
        rank: This one's number.
    """

    total: int
    groups: int = 1
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.total % self.groups:
            raise ValueError(f"{self.total} rows are not {self.groups} runs of the same length")

    def bounds(self, rank: int) -> tuple[int, int]:
        """Return where a process's part of every run begins and ends."""
        run = self.total // self.groups
        return rank * run // self.world, (rank + 1) * run // self.world

    def size(self, rank: int | None = None) -> int:
        """Return how many rows a process has (``None``: this one)."""
        low, high = self.bounds(self.rank if rank is None else rank)
        return self.groups * (high - low)

    def rows(self, rank: int | None = None) -> list[int]:
        """Return the numbers of a process's rows in the global batch (``None``: this one)."""
        low, high = self.bounds(self.rank if rank is None else rank)
        run = self.total // self.groups
        return [group * run + row for group in range(self.groups) for row in range(low, high)]

    def take(self, values: Tensor) -> Tensor:
        """Return this process's rows of a global batch.

        Args:
            values: (m * total, …), m rows in a row for every one of the batch.
        """
        whole = values.unflatten(0, (self.total, values.shape[0] // self.total))
        return whole[_numbers(self, self.rank).to(values.device)].flatten(0, 1)

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all processes in the order of the global batch, differentiable.

        Args:
            values: (m * size, …), this process's, m rows in a row for every one of the batch.
        """
        return _Gather.apply(values, self)  # type: ignore[no-untyped-call]

    def part(self, groups: int) -> Cut:
        """Return the cut of the first of ``groups`` runs alone."""
        return Cut(self.total // groups, self.groups // groups, self.world, self.rank)


@lru_cache(maxsize=256)
def _numbers(cut: Cut, rank: int) -> Tensor:
    return torch.tensor(cut.rows(rank), dtype=torch.long)


@lru_cache(maxsize=64)
def _order(cut: Cut) -> Tensor:
    """For every row of the global batch, its place behind the padded parts of all processes, one after the other."""
    most = max(cut.size(rank) for rank in range(cut.world))
    order = torch.empty(cut.total, dtype=torch.long)
    for number in range(cut.world):
        order[_numbers(cut, number)] = number * most + torch.arange(cut.size(number))
    return order


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, cut: Cut) -> Tensor:
        size = cut.size()
        ctx.cut, ctx.inner = cut, values.shape[0] // max(1, size)
        rows = values.detach().unflatten(0, (size, ctx.inner)).contiguous()
        most = max(cut.size(rank) for rank in range(cut.world))
        if size < most:
            rows = torch.cat([rows, rows.new_zeros(most - size, *rows.shape[1:])])
        parts = [torch.empty_like(rows) for _ in range(cut.world)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)[_order(cut).to(values.device)].flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return ctx.cut.take(grad), None


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        out = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad


def all_sum(values: Tensor) -> Tensor:
    """Return the sum over all processes, differentiable."""
    return values if world() == 1 else _AllSum.apply(values)  # type: ignore[no-untyped-call]


# --- the step that runs -----------------------------------------------------------------------------------------------
_current: list[Cut] = []


def current() -> Cut | None:
    """Return how the batch of the running training step is cut; ``None``: it is whole."""
    return _current[-1] if _current else None


@contextlib.contextmanager
def cutting(cut: Cut | None) -> Iterator[None]:
    """Train on one process's rows of a batch in the block; ``None``: on all of them."""
    if cut is None or cut.world == 1:
        yield
        return
    _current.append(cut)
    try:
        yield
    finally:
        _current.pop()


def gather(values: Any, *, first_of: int = 1) -> Any:
    """Return the rows of the whole batch from those of this process, differentiable; in order.

    Args:
        values: (m * rows, …), or a list of such.
        first_of: The rows are those of the first of so many runs of the batch only.
    """
    cut = current()
    if cut is None:
        return values
    if isinstance(values, (list, tuple)):
        return [gather(value, first_of=first_of) for value in values]
    return (cut if first_of == 1 else cut.part(first_of)).gather(values)


def draw(shape: Sequence[int], draws: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Draw noise for this process's rows out of that for the whole batch, so that all processes' generators stay alike.

    Args:
        shape: (m * rows, …), m rows in a row for every one of the batch.
        draws: Draws noise of a shape.
    """
    cut = current()
    if cut is None:
        return draws(tuple(shape))
    return cut.take(draws((shape[0] // cut.size() * cut.total, *shape[1:])))


def total(values: Tensor) -> Tensor:
    """Return the sum over all processes, without gradients."""
    if world() == 1:
        return values
    out = values.detach().clone()
    dist.all_reduce(out)
    return out


def bare_model(model: Any) -> Any:
    """Return a model without torch's wrapper for several devices or processes."""
    wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return model.module if wrapped else model


__all__ = ["Cut", "all_sum", "bare_model", "current", "cutting", "draw", "gather", "rank", "total", "world"]
