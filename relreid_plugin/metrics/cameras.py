"""Neighbours counted by camera: so many of other cameras, so many of the image's own.

Shapes: Q queries, N gallery images, d width, K slots per row.

Images of one camera look alike, so that the nearest images of a query are mostly those of its own camera: near duplicates of
itself and strangers before the same wall. Searched for themselves, the nearest images of *other* cameras are what links an
identity across cameras. Equal scores are taken in gallery order; no query changes another's neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .candidates import exact_scores
from .neighbours import SearchConfig, topk_neighbours

UNKNOWN = -1
"""Camera of a query without a camera label: every gallery image then is one of another camera."""


ALONE = (
    "too few gallery images have another one near them, fewer than in galleries in which relations gained; every image "
    "stays alone ('relation.camera.least')"
)
"""What is said of a gallery without company."""


def stays_alone(thresholds: Tensor | None) -> bool:
    """Whether nobody reaches the thresholds (N, 2) of any gallery image."""
    if thresholds is None or thresholds.dim() != 2 or not len(thresholds):
        return False
    return bool((thresholds == torch.inf).all())


@dataclass(frozen=True)
class CameraLists:
    """Nearest gallery images by camera, best first.

    Attributes:
        index: (Q, K) int64 gallery rows: those of other cameras, then those of the own one; empty slots hold 0.
        scores: (Q, K) float32, minus infinity in empty slots.
        other: How many slots are those of other cameras.
    """

    index: Tensor
    scores: Tensor
    other: int

    def cut(self, other: int, same: int) -> CameraLists:
        """The best ``other`` and ``same`` of them."""
        slots = [*range(min(other, self.other)), *range(self.other, min(self.other + same, self.index.shape[1]))]
        return CameraLists(self.index[:, slots], self.scores[:, slots], min(other, self.other))

    def thresholds(self, other: int, same: int) -> Tensor:
        """(Q, 2) scores of the neighbours at places ``other`` and ``same``; minus infinity where there are none."""
        columns = []
        for place, first, last in ((other, 0, self.other), (same, self.other, self.index.shape[1])):
            inside = 0 < place <= last - first
            missing = self.scores.new_full((len(self.scores),), -torch.inf)
            columns.append(self.scores[:, first + place - 1] if inside else missing)
        return torch.stack(columns, dim=1)


def as_cameras(camids: Sequence[int] | np.ndarray | Tensor | None, size: int, *, missing: int) -> Tensor:
    """Return (N,) int64 camera numbers, ``missing`` everywhere where there are none.

    Raises:
        UserError: Not one per image.
    """
    if camids is None:
        return torch.full((size,), missing)
    cameras = torch.as_tensor(np.asarray(camids.cpu() if isinstance(camids, Tensor) else camids)).long().flatten()
    if len(cameras) != size:
        raise UserError(f"{len(cameras)} camera numbers do not fit {size} images.")
    return cameras


class CameraIndex:
    """A gallery that is searched camera by camera.

    Args:
        gallery: (N, d).
        camids: (N,) cameras; ``None``: all images are of one camera.
        config: Search backend.
    """

    def __init__(
        self, gallery: Tensor, camids: Sequence[int] | np.ndarray | Tensor | None, *, config: SearchConfig | None = None
    ) -> None:
        self.gallery = gallery
        self.camids = as_cameras(camids, len(gallery), missing=UNKNOWN)
        self.config = config or SearchConfig()
        self._blocks: list[tuple[int, Tensor, Tensor]] = []
        for camera in self.camids.unique().tolist():
            rows = (self.camids == camera).nonzero().flatten().to(gallery.device)
            self._blocks.append((camera, rows, gallery if len(rows) == len(gallery) else gallery[rows]))

    def search(
        self,
        queries: Tensor,
        camids: Sequence[int] | np.ndarray | Tensor | None,
        *,
        other: int,
        same: int,
        rows: Tensor | None = None,
    ) -> CameraLists:
        """Return the nearest images of other cameras and of the query's own.

        Args:
            queries: (Q, d).
            camids: (Q,) cameras; ``None``, or :data:`UNKNOWN`: every gallery image is one of another camera. Where the
                queries are gallery images, those without a camera count as one camera.
            other: Neighbours of other cameras.
            same: Neighbours of the own camera.
            rows: (Q,) gallery rows of the queries, which are not their own neighbours; ``None``: not in the gallery.

        Raises:
            UserError: Not one camera per query, or features that are not finite.
        """
        cameras = as_cameras(camids, len(queries), missing=UNKNOWN)
        width = other + same
        index = torch.zeros(len(queries), width, dtype=torch.long, device=queries.device)
        scores = torch.full((len(queries), width), -torch.inf, device=queries.device)
        for camera in cameras.unique().tolist() if width else []:
            chosen = (cameras == camera).nonzero().flatten().to(queries.device)
            part = queries if len(chosen) == len(queries) else queries[chosen]
            own = None if rows is None else rows[chosen]
            for near, slots in ((False, slice(0, other)), (True, slice(other, width))):
                count = slots.stop - slots.start
                found = self._nearest(part, camera, own, count, same=near) if count else None
                if found is not None:
                    index[chosen, slots.start : slots.start + found[0].shape[1]] = found[0]
                    scores[chosen, slots.start : slots.start + found[1].shape[1]] = found[1]
        return CameraLists(index, scores, other)

    def _nearest(
        self, part: Tensor, camera: int, own: Tensor | None, count: int, *, same: bool
    ) -> tuple[Tensor, Tensor] | None:
        """The ``count`` nearest (rows, scores) of the images in the blocks of the own, or of the other cameras."""
        known = camera != UNKNOWN or own is not None
        index, scores = [], []
        for number, rows, block in self._blocks:
            if (known and number == camera) != same:
                continue
            spare = int(same and own is not None)
            found = topk_neighbours(part, block, count + spare, config=self.config)
            value, found = exact_scores(part, block, found), rows[found]
            if spare and own is not None:
                value = value.masked_fill(found == own.unsqueeze(1), -torch.inf)
            index.append(found)
            scores.append(value)
        if not index:
            return None
        found, order = torch.cat(index, dim=1).sort(dim=1)
        value, best = torch.cat(scores, dim=1).gather(1, order).sort(dim=1, descending=True, stable=True)
        best, value = best[:, :count], value[:, :count]
        return found.gather(1, best).masked_fill(value == -torch.inf, 0), value
