"""Who attends to whom in a gallery on disk: the graphs of a pass and the edges of queries, by feature and by camera.

Shape letters: N gallery rows, n rows of a block, d width, k neighbours, K slots of a graph row.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..features.arrays import RowTable
from ..metrics.cameras import UNKNOWN, CameraIndex, CameraLists, as_cameras
from ..metrics.neighbours import topk_neighbours
from ..metrics.reciprocal import inductive_mask, kth_scores
from .bycamera import search_by_camera
from .index import TableIndex
from .layers import _HELD, _SEARCHED, _STEP, _Journal, _spans

Arrays = Callable[[str, tuple[int, ...], str], Any]
"""Opens a file of a pass by its name, the shape of a row and its type; ``read(low, high)`` gives rows of it."""
Found = tuple[Tensor, Tensor, "Tensor | None"]
"""Rows (n, K), the kept ones (n, K), and what is added to their affinities (n, K), where anything is."""


def edges_of(encoder: Any, camids: np.ndarray | None, size: int) -> FeatureEdges | CameraEdges:
    """Return the edges of an encoder over a gallery of ``size`` rows.

    Args:
        encoder: Relation encoder with a ``rule`` for cameras, or none.
        camids: (N,) cameras of the gallery, where the encoder counts by camera.
        size: N.

    Raises:
        UserError: The encoder counts by camera and there are none.
    """
    if encoder.rule is None:
        return FeatureEdges(encoder.k)
    if camids is None:
        raise UserError("the relation encoder counts neighbours by camera; give the cameras of the gallery ('camids').")
    return CameraEdges(encoder.rule, as_cameras(camids, size, missing=UNKNOWN))


def kind_of_scan(index: TableIndex) -> str:
    """How an index without cells or links searches many rows."""
    return "scan" if index.config.index == "scan" else "flat"


class FeatureEdges:
    """The k nearest rows, kept where they are so in return.

    Args:
        k: Neighbours.

    Attributes:
        shape: Shape of a row's threshold.
    """

    shape: tuple[int, ...] = ()

    def __init__(self, k: int) -> None:
        self.k = k

    def header(self, size: int) -> dict[str, str]:
        """What a pass over the first ``size`` rows depends on beside features and encoder."""
        return {}

    def temporary(self) -> list[str]:
        """Files that a pass needs no more when it has ended."""
        return ["lists", "index", "mask"]

    def search(self, journal: _Journal, table: RowTable, index: TableIndex) -> None:
        """Write the graph (``index``, ``mask``) and the ``thresholds`` of a whole table."""
        _search_neighbours(journal, table, self.k, index)
        _make_graph(journal, min(self.k, len(table)))

    def settled(self, thresholds: Tensor, known: int | None = None) -> Tensor:
        """The thresholds of a table as queries compare with them, judged by its first ``known`` rows (``None``: all)."""
        return thresholds

    def graph(self, arrays: Arrays, size: int) -> Callable[[int, int], Found]:
        """Return what reads the graph of rows from ``low`` to ``high``."""
        slots = min(self.k, size) + 1
        indices, masks = arrays("index", (slots,), "int32"), arrays("mask", (slots,), "bool")
        return lambda low, high: (indices.read(low, high), masks.read(low, high), None)

    def of_queries(
        self, x: Tensor, own: Tensor, index: TableIndex, thresholds: Tensor, size: int, *, new: bool = False
    ) -> tuple[Found, Tensor | None, Tensor | None]:
        """Return the edges of queries, each alone with the first ``size`` rows.

        Args:
            x: (n, d) unit features.
            own: (n,) their cameras.
            index: Of the table.
            thresholds: (size, …) of its rows, settled ones.
            size: Rows.
            new: The queries will be rows of the table: their own thresholds are wanted.

        Returns:
            The edges, the queries' own thresholds, and where there is a rule the nearest rows of other cameras (n,).
        """
        scores, rows = index.search(x, self.k, limit=size)
        missing = rows < 0
        rows = torch.where(missing, rows[:, :1], rows).clamp_min(0)
        scores = torch.where(missing, scores[:, :1], scores)
        rows, order = rows.sort(dim=1)
        scores, missing = scores.gather(1, order), missing.gather(1, order)
        itself = x.double().square().sum(dim=1).float()
        mask = inductive_mask(scores, itself, scores, thresholds[rows], k=self.k, size=size) & ~missing
        mask &= torch.isfinite(scores)
        listed = torch.cat([scores, itself.unsqueeze(1)], dim=1)
        last = listed.topk(min(self.k, listed.shape[1]), dim=1).values[:, -1] if new else None
        return (rows, mask, None), last, None


class CameraEdges:
    """So many rows of other cameras and of the own one, by the rule of an encoder.

    Args:
        rule: Has ``other``, ``same``, ``depth``, ``columns``, ``thresholds``, ``settled``, ``edges``, ``joined``, ``first``.
        cameras: (N,) of the gallery.
    """

    def __init__(self, rule: Any, cameras: Tensor) -> None:
        self.rule, self.cameras = rule, cameras
        self.shape = (rule.columns,)

    def header(self, size: int) -> dict[str, str]:
        """As of :class:`FeatureEdges`."""
        return {"cameras": hashlib.sha256(self.cameras[:size].numpy().astype("<i8").tobytes()).hexdigest()[:32]}

    def temporary(self) -> list[str]:
        """As of :class:`FeatureEdges`."""
        return ["lists", "scores", "index", "mask", "bias"]

    def search(self, journal: _Journal, table: RowTable, index: TableIndex) -> None:
        """Write the graph (``index``, ``mask``, ``bias``) and the ``thresholds`` of a whole table."""
        size, (other, same) = len(table), self.rule.depth
        exact: CameraIndex | None = None
        if index.exact and index.alive is None and 2 * size * table.dim <= _HELD:  # the features, and again by camera
            config = dataclasses.replace(index.config, backend="torch", index=kind_of_scan(index))
            exact = CameraIndex(table.read(), self.cameras, config=config)
        names = ["thresholds", *(["lists", "scores"] if other + same else [])]
        for start, stop in _spans(0, size, _SEARCHED, "neighbours"):
            if journal.has(start, *names):
                continue
            x, own, rows = table.read(start, stop), self.cameras[start:stop], torch.arange(start, stop)
            wanted: dict[str, Any] = {"other": other, "same": same, "rows": rows}
            if exact is not None:
                lists = exact.search(x, own, **wanted)
            else:
                lists = search_by_camera(index, self.cameras, x, own, **wanted)
            if other + same:
                journal.put("lists", start, lists.index.int())
                journal.put("scores", start, lists.scores)
            journal.put("thresholds", start, self.rule.thresholds(lists))
        thresholds = self.settled(journal.array("thresholds", self.shape, "float32").read(0, size))
        read = self.lists(journal.array)
        for start, stop in _spans(0, size, _SEARCHED, "graph"):
            if journal.has(start, "index", "mask", "bias"):
                continue
            own = torch.arange(start, stop)
            parts = [self.rule.joined(read(int(some[0]), int(some[-1]) + 1), thresholds, some) for some in own.split(_STEP)]
            for name, part in zip(("index", "mask", "bias"), zip(*parts)):
                value = torch.cat(part)
                journal.put(name, start, value.int() if name == "index" else value)
        journal.flush()

    def settled(self, thresholds: Tensor, known: int | None = None) -> Tensor:
        """As of :class:`FeatureEdges`."""
        return self.rule.settled(thresholds, known)

    def lists(self, arrays: Arrays) -> Callable[[int, int], CameraLists]:
        """Return what reads the lists of rows from ``low`` to ``high``."""
        other, depth = self.rule.depth[0], sum(self.rule.depth)
        if not depth:  # every image stays alone
            return lambda low, high: CameraLists(
                torch.empty(high - low, 0, dtype=torch.long), torch.empty(high - low, 0), other
            )
        rows, scores = arrays("lists", (depth,), "int32"), arrays("scores", (depth,), "float32")
        return lambda low, high: CameraLists(rows.read(low, high).long(), scores.read(low, high), other)

    def graph(self, arrays: Arrays, size: int) -> Callable[[int, int], Found]:
        """As of :class:`FeatureEdges`."""
        slots = (self.rule.other + self.rule.same + 1,)
        parts = [arrays(name, slots, kind) for name, kind in (("index", "int32"), ("mask", "bool"), ("bias", "float32"))]
        return lambda low, high: (parts[0].read(low, high), parts[1].read(low, high), parts[2].read(low, high))

    def of_queries(
        self, x: Tensor, own: Tensor, index: TableIndex, thresholds: Tensor, size: int, *, new: bool = False
    ) -> tuple[Found, Tensor | None, Tensor | None]:
        """As of :class:`FeatureEdges`."""
        other, same = self.rule.depth if new else (self.rule.other, self.rule.same)
        lists = search_by_camera(index, self.cameras, x, own, other=other, same=same, limit=size)
        return (
            self.rule.edges(lists, thresholds),
            self.rule.thresholds(lists) if new else None,
            self.rule.first(lists, thresholds),
        )


def _search_neighbours(journal: _Journal, table: RowTable, k: int, index: TableIndex) -> None:
    """Every row's neighbour list (rows rising, int32) and the score of its last neighbour.

    Without an approximate index :func:`topk_neighbours` searches, which has the features in memory, or, where they are too
    large for that, the table is read once for every thousand rows.
    """
    size = len(table)
    held = table.read() if index.exact and index.alive is None and size * table.dim <= _HELD else None
    step = size if held is not None and size <= 4 * _SEARCHED else _SEARCHED  # a set with itself is half the work
    for start, stop in _spans(0, size, step, "neighbours"):
        if journal.has(start, "lists", "thresholds"):
            continue
        if held is not None:
            some = held if step == size else held[start:stop]
            config = dataclasses.replace(index.config, backend="torch", index=kind_of_scan(index))
            rows = topk_neighbours(some, held, k, config=config)
            journal.put("lists", start, rows.int())
            journal.put("thresholds", start, kth_scores(some, held, rows))
            continue
        rows, last = index.neighbours(table.read(start, stop), k)
        own = torch.arange(start, stop).unsqueeze(1)
        rows = torch.where(rows < 0, torch.where(rows[:, :1] < 0, own, rows[:, :1]), rows)
        journal.put("lists", start, rows.sort(dim=1).values.int())
        journal.put("thresholds", start, last)


def _make_graph(journal: _Journal, k: int) -> None:
    """The reciprocal graph: rows (N, k + 1), the last slot for rows that are not in their own list, and the kept slots."""
    lists = journal.array("lists", (k,), "int32")
    whole = lists.read(0, len(lists))
    for start, stop in _spans(0, len(lists), _SEARCHED, "graph"):
        if journal.has(start, "index", "mask"):
            continue
        indices, masks = [], []
        for low in range(start, stop, _STEP):
            rows = whole[low : min(low + _STEP, stop)]
            own = torch.arange(low, low + len(rows), dtype=torch.int32).unsqueeze(1)
            others = whole.index_select(0, rows.flatten()).view(*rows.shape, k)
            mask = (others == own.unsqueeze(2)).any(dim=2) & (rows != own)
            mask[:, 1:] &= rows[:, 1:] != rows[:, :-1]
            indices.append(torch.cat([rows, own], dim=1))
            masks.append(torch.cat([mask, torch.ones_like(own, dtype=torch.bool)], dim=1))
        journal.put("index", start, torch.cat(indices))
        journal.put("mask", start, torch.cat(masks))
    journal.flush()


__all__ = ["CameraEdges", "FeatureEdges", "edges_of", "kind_of_scan"]
