"""Which gallery images a ranking counts for a query: its matches, and the junk that is taken out.

Shapes: Q queries, G gallery images, B queries of a block, P gallery images listed for a query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import UserError

Array = np.ndarray
ArrayLike = np.ndarray | torch.Tensor

_LISTED_VALUES = 2**20  # gallery images listed at a time


@dataclass(frozen=True)
class Labels:
    """Identities and cameras, and the gallery sorted by identity."""

    query_pids: Array
    gallery_pids: Array
    query_groups: Array | None
    gallery_groups: Array | None
    sorted_gallery: Array  # (G,) gallery indices by identity, ascending within each
    sorted_pids: Array  # (G,) their identities
    begin: Array  # (Q,) where a query's identity begins in sorted_gallery
    size: Array  # (Q,) and how many images it has
    order: Array  # (Q,) queries by falling size: a block then holds queries with about as many positives
    query_files: Array | None = None
    gallery_files: Array | None = None
    own_gallery: Array | None = None  # (G,) gallery indices by file, ascending within each
    own_begin: Array | None = None  # (Q,) where a query's file begins in own_gallery
    own_size: Array | None = None  # (Q,) and how often it is there

    @property
    def num_queries(self) -> int:
        return len(self.query_pids)

    @property
    def num_gallery(self) -> int:
        return len(self.gallery_pids)

    @classmethod
    def build(
        cls,
        query_pids: ArrayLike,
        gallery_pids: ArrayLike,
        query_groups: ArrayLike | None,
        gallery_groups: ArrayLike | None,
        shape: tuple[int, ...],
        query_files: ArrayLike | None = None,
        gallery_files: ArrayLike | None = None,
    ) -> Labels:
        q_pids = _as_labels("query_pids", query_pids, shape[0])
        g_pids = _as_labels("gallery_pids", gallery_pids, shape[1])
        if (query_groups is None) != (gallery_groups is None):
            raise UserError("query_camids and gallery_camids go together; pass both or neither.")
        q_groups = None if query_groups is None else _as_labels("query_camids", query_groups, shape[0])
        g_groups = None if gallery_groups is None else _as_labels("gallery_camids", gallery_groups, shape[1])
        if (query_files is None) != (gallery_files is None):
            raise UserError("query_files and gallery_files go together; pass both or neither.")
        sorted_gallery, begin, size = _find_equal(q_pids, g_pids)
        sorted_pids = g_pids[sorted_gallery]
        order = np.argsort(-size, kind="stable")
        labels = cls(q_pids, g_pids, q_groups, g_groups, sorted_gallery, sorted_pids, begin, size, order)
        if query_files is None or gallery_files is None:
            return labels
        q_files = _as_labels("query_files", query_files, shape[0])
        g_files = _as_labels("gallery_files", gallery_files, shape[1])
        own_gallery, own_begin, own_size = _find_equal(q_files, g_files)
        if not own_size.any():
            return labels
        return replace(
            labels,
            query_files=q_files,
            gallery_files=g_files,
            own_gallery=own_gallery,
            own_begin=own_begin,
            own_size=own_size,
        )

    def listed(self, queries: Array) -> tuple[Array, Array, Array]:
        """Gallery images of the queries' identities, and their own files: indices, which are real, which are positives;
        each (B, P), in gallery order within a row and the padding last."""
        images, real = _slots(self.sorted_gallery, self.begin[queries], self.size[queries])
        pos = real
        if self.query_groups is not None and self.gallery_groups is not None:
            pos = pos & (self.gallery_groups[images] != self.query_groups[queries, None])
        if self.query_files is None or self.gallery_files is None:
            return images, real, pos
        pos = pos & (self.gallery_files[images] != self.query_files[queries, None])
        assert self.own_gallery is not None and self.own_begin is not None and self.own_size is not None
        own, there = _slots(self.own_gallery, self.own_begin[queries], self.own_size[queries])
        there = there & (self.gallery_pids[own] != self.query_pids[queries, None])  # the others are listed already
        if not there.any():
            return images, real, pos
        images, real = np.concatenate([images, own], axis=1), np.concatenate([real, there], axis=1)
        pos = np.concatenate([pos, np.zeros_like(there)], axis=1)
        order = np.argsort(np.where(real, images, self.num_gallery), axis=1, kind="stable")
        return tuple(np.take_along_axis(part, order, 1) for part in (images, real, pos))  # type: ignore[return-value]

    def empty_scores(self) -> tuple[Array, Array, Array]:
        """First matching rank (0: none), AP and INP per query, to be filled."""
        nan = np.full(self.num_queries, np.nan)
        return np.zeros(self.num_queries, np.int64), nan, nan.copy()


def has_match(
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike | None = None,
    gallery_camids: ArrayLike | None = None,
    *,
    query_files: ArrayLike | None = None,
    gallery_files: ArrayLike | None = None,
) -> Array:
    """Return which queries have a match that is not discarded, (Q,) bool, under the rules of :func:`evaluate_ranking`.

    Args:
        query_pids: Identity per query, (Q,).
        gallery_pids: Identity per gallery image, (G,).
        query_camids: Camera (or scene) per query, (Q,); None: nothing is discarded by camera.
        gallery_camids: Camera (or scene) per gallery image, (G,).
        query_files: See :func:`evaluate_ranking`.
        gallery_files: As there.

    Raises:
        UserError: Labels of different lengths.
    """
    shape = (len(query_pids), len(gallery_pids))
    labels = Labels.build(query_pids, gallery_pids, query_camids, gallery_camids, shape, query_files, gallery_files)
    found = np.zeros(shape[0], bool)
    rows = max(1, _LISTED_VALUES // max(1, int(labels.size.max(initial=1))))
    for start in range(0, shape[0], rows):
        block = labels.order[start : start + rows]
        found[block] = labels.listed(block)[2].any(1)
    return found


def _find_equal(queries: Array, gallery: Array) -> tuple[Array, Array, Array]:
    """Gallery indices (G,) sorted by label, ascending within each, and where (Q,) and how often (Q,) a query's label is in
    them."""
    order = np.argsort(gallery, kind="stable")
    ordered = gallery[order]
    begin = np.searchsorted(ordered, queries, side="left")
    return order, begin, np.searchsorted(ordered, queries, side="right") - begin


def _slots(order: Array, begin: Array, size: Array) -> tuple[Array, Array]:
    """The stretches ``order[begin : begin + size]`` of B queries as a padded matrix (B, P), and which entries are real."""
    slot = np.arange(int(size.max(initial=0)))
    real = slot < size[:, None]
    return (order[np.where(real, begin[:, None] + slot, 0)] if len(slot) else real * 0), real


def _as_labels(name: str, labels: ArrayLike, length: int) -> Array:
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.shape != (length,):
        raise UserError(f"{name} has shape {array.shape}; the distances need ({length},).")
    return array
