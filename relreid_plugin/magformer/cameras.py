"""Which neighbours by camera an image attends to (:mod:`relreid_plugin.metrics.cameras` searches them).

Shapes: Q queries, N gallery images, K slots per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..metrics.cameras import UNKNOWN, CameraIndex, CameraLists, as_cameras
from ..metrics.neighbours import normalise
from ..metrics.reciprocal import ReciprocalGraph


@dataclass(frozen=True)
class CameraRule:
    """Which neighbours an image attends to, and how its similarity to them counts.

    Attributes:
        other: Neighbours of other cameras.
        same: Neighbours of the own camera.
        reciprocity: 0: all of them; r: those that would have the image among their r * other (r * same) nearest images of
            such cameras.
        temperature: An edge's affinity is raised by (similarity - offset) / temperature; 0: by nothing.
        offset: Similarity at which a neighbour weighs as much as the image itself.
        support: Similarity to its nearest neighbour at which a gallery image counts as one that has company.
        least: Share of the gallery's images that must have company; in a gallery with less every image stays alone. 0: every
            gallery will do.
    """

    other: int = 3
    same: int = 3
    reciprocity: int = 1
    temperature: float = 0.0
    offset: float = 0.5
    support: float = field(default=0.0, repr=False)  # not shown: states of a gallery are known by what is shown
    least: float = field(default=0.0, repr=False)

    @property
    def depth(self) -> tuple[int, int]:
        """Neighbours of other and of the own camera that gallery images must know of."""
        reach = max(1, self.reciprocity)
        return self.other * reach, self.same * reach

    @property
    def columns(self) -> int:
        """Columns of :meth:`thresholds`."""
        return 3 if self.least else 2

    def thresholds(self, lists: CameraLists) -> Tensor:
        """Scores that an image must reach to be a gallery image's neighbour, from lists of :attr:`depth`.

        Returns:
            (N, 2); with :attr:`least` (N, 3), the last column being the similarity to the nearest neighbour.
        """
        found = lists.thresholds(self.other * self.reciprocity, self.same * self.reciprocity)
        return torch.cat([found, self.nearest(lists).unsqueeze(1)], dim=1) if self.least else found

    def nearest(self, lists: CameraLists) -> Tensor:
        """(N,) similarity to the nearest neighbour; minus infinity where there is none."""
        scores = lists.cut(self.other, self.same).scores
        return scores.amax(dim=1) if scores.shape[1] else scores.new_full((len(scores),), -torch.inf)

    def company(self, thresholds: Tensor) -> float:
        """Share of a gallery's images that have company, from :meth:`thresholds` (N, 3); 1 without :attr:`least`."""
        return float((thresholds[:, 2] >= self.support).double().mean()) if self.least and len(thresholds) else 1.0

    def settled(self, thresholds: Tensor, known: int | None = None) -> Tensor:
        """(N, 2) thresholds of a gallery; nobody reaches those of one without company, so that every image stays alone.

        Args:
            thresholds: From :meth:`thresholds`.
            known: The first rows by which that is judged; ``None``: all.
        """
        found = thresholds[:, :2]
        return torch.full_like(found, torch.inf) if self.company(thresholds[:known]) < self.least else found

    @staticmethod
    def first(lists: CameraLists, thresholds: Tensor) -> Tensor:
        """(Q,) row of the nearest gallery image of another camera; -1: there is none, or the gallery has no company.

        Args:
            lists: Of queries.
            thresholds: (N, 2), settled ones.
        """
        if not lists.other:
            return torch.full((len(lists.index),), -1)
        rows = lists.index[:, 0]
        return torch.where((lists.scores[:, 0] > -torch.inf) & (thresholds[rows, 0] < torch.inf), rows, -1)

    def edges(self, lists: CameraLists, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return index, mask and bias (Q, other + same) of the edges to a gallery with settled ``thresholds`` (N, 2)."""
        lists = lists.cut(self.other, self.same)
        index, scores = lists.index, lists.scores
        kind = (torch.arange(index.shape[1], device=index.device) >= lists.other).long().expand_as(index)
        mask = (scores > -torch.inf) & (scores >= thresholds[index, kind])
        bias = (scores - self.offset) / self.temperature if self.temperature else torch.zeros_like(scores)
        return index, mask, bias.masked_fill(~mask, 0.0)

    def joined(self, lists: CameraLists, thresholds: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the edges of gallery images, themselves in the last slot.

        Args:
            lists: (n, …) of :attr:`depth`.
            thresholds: (N, 2) of the whole gallery, settled ones.
            own: (n,) their own rows.

        Returns:
            index, mask and bias (n, other + same + 1); slots outside the mask hold the image itself.
        """
        slots, mask, bias = self.edges(lists, thresholds)
        own = own.unsqueeze(1)
        slots = torch.cat([torch.where(mask, slots, own), own], dim=1)
        mask = torch.cat([mask, torch.ones_like(own, dtype=torch.bool)], dim=1)
        return slots, mask, torch.cat([bias, bias.new_zeros(len(own), 1)], dim=1)

    def graph(self, index: CameraIndex) -> tuple[ReciprocalGraph, Tensor]:
        """Return the gallery's graph, (N, other + same + 1) with the image itself last; and settled thresholds (N, 2)."""
        gallery = index.gallery
        own = torch.arange(len(gallery), device=gallery.device)
        other, same = self.depth
        lists = index.search(gallery, index.camids, other=other, same=same, rows=own)
        thresholds = self.settled(self.thresholds(lists))
        slots, mask, bias = self.joined(lists, thresholds, own)
        return ReciprocalGraph(slots, mask, None, bias), thresholds


def anchored(x: Tensor, nearest: Tensor, share: float, gallery: Callable[[Tensor], Tensor]) -> Tensor:
    """Return refined queries (Q, d) with a share of their nearest gallery image; beyond the paper.

    Args:
        x: (Q, d) unit features.
        nearest: (Q,) gallery rows, see :meth:`CameraRule.first`; where it is -1 nothing is done.
        share: Of the image, in the sum that is scaled to unit length.
        gallery: From rows (n,) to their unit features (n, d).
    """
    if not bool((nearest >= 0).any()):
        return x
    there = (nearest >= 0).to(x.device).unsqueeze(1)
    return torch.where(there, normalise(x + share * gallery(nearest.clamp_min(0)).to(x)), x)


__all__ = ["UNKNOWN", "CameraIndex", "CameraLists", "CameraRule", "anchored", "as_cameras"]
