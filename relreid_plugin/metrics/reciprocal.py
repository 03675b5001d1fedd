"""Neighbour lists as graphs: who is whose neighbour in return, and whether a query would be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import exact_scores


@dataclass(frozen=True)
class ReciprocalGraph:
    """Neighbour lists with the reciprocal mask M of METHODS 1 (paper eqs. 3 and 4), N rows, K slots.

    Attributes:
        index: (N, K) int64, neighbours sorted by rising row number; unused slots point at the row itself.
        mask: (N, K) bool, True where the edge is reciprocal; the diagonal is always True. The masked graph is symmetric.
        reverse: (N, K) int64, flat position in the (N, K) layout of the opposite edge j -> i of an edge i -> j; the slot's
            own position where ``mask`` is False. ``None``: left out; only gradients need it, which are slower without.
        bias: (N, K) added to the affinities of the edges; ``None``: nothing.
    """

    index: Tensor
    mask: Tensor
    reverse: Tensor | None
    bias: Tensor | None = None

    def to(self, device: torch.device | str) -> ReciprocalGraph:
        """Return the graph on another device."""
        reverse = None if self.reverse is None else self.reverse.to(device)
        bias = None if self.bias is None else self.bias.to(device)
        return ReciprocalGraph(self.index.to(device), self.mask.to(device), reverse, bias)


def reciprocal_graph(neighbours: Tensor, *, reverse: bool = True) -> ReciprocalGraph:
    """Build the symmetric graph of reciprocal neighbours.

    Args:
        neighbours: (N, k) row numbers, each row sorted, from :func:`topk_neighbours` of a set with itself.
        reverse: Also find the position of every opposite edge.

    Returns:
        The graph; M_ij = 1 iff j is in row i and i in row j, and M_ii = 1.
    """
    size, slots = neighbours.shape
    device = neighbours.device
    numbers = torch.arange(size, device=device).unsqueeze(1)
    step = max(1, (1 << 20) // slots)
    complete = all(bool((rows == own).any(dim=1).all()) for rows, own in zip(neighbours.split(step), numbers.split(step)))
    slots += not complete
    index = torch.empty(size, slots, dtype=torch.long, device=device)
    for start in range(0, size, step):  # a row without its own number gets it, the others an unused slot
        rows = slice(start, start + step)
        found, own = neighbours[rows], numbers[rows]
        if not complete:
            extra = torch.where((found == own).any(dim=1, keepdim=True), size, own)
            found = torch.cat([found, extra], dim=1).sort(dim=1).values
        index[rows] = found
    mask = torch.empty(size, slots, dtype=torch.bool, device=device)
    opposite = torch.empty_like(index) if reverse else None
    flat = index.view(-1)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        own, base = numbers[rows], index[rows] * slots
        place = torch.zeros_like(base)  # entries of the neighbour's list below the own number, by bisection
        for jump in (1 << bit for bit in reversed(range(slots.bit_length()))):
            probe = place + jump
            below = (probe <= slots) & (flat[(base + probe - 1).clamp_max_(flat.numel() - 1)] < own)
            place = torch.where(below, probe, place)
        place = (base + place.clamp_max_(slots - 1)).clamp_max_(flat.numel() - 1)
        mask[rows] = (flat[place] == own) & ~_unused(index[rows], size)
        if opposite is not None:
            here = torch.arange(start * slots, start * slots + place.numel(), device=device).view_as(place)
            opposite[rows] = torch.where(mask[rows], place, here)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        index[rows] = torch.where(_unused(index[rows], size), numbers[rows], index[rows])
    return ReciprocalGraph(index=index, mask=mask, reverse=opposite)


def _unused(index: Tensor, size: int) -> Tensor:
    """Return where sorted rows (n, K) hold ``size`` or a number for the second time."""
    unused = index == size
    unused[:, 1:] |= index[:, 1:] == index[:, :-1]
    return unused


def kth_scores(queries: Tensor, gallery: Tensor, neighbours: Tensor) -> Tensor:
    """Return the defining score of every query's least similar neighbour, (Q,) float32.

    A new gallery row would enter a query's list iff its score is above this value (it comes last among equals).

    Args:
        queries: (Q, d).
        gallery: (N, d), the searched rows.
        neighbours: (Q, k) from :func:`topk_neighbours`.
    """
    out = torch.empty(queries.shape[0], dtype=torch.float32, device=queries.device)
    step = 4096
    for start in range(0, queries.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = exact_scores(queries[rows], gallery, neighbours[rows]).amin(dim=1)
    return out


def inductive_mask(forward: Tensor, own: Tensor, backward: Tensor, thresholds: Tensor, *, k: int, size: int) -> Tensor:
    """Return which gallery neighbours a query keeps when it is alone with the gallery.

    The set is the gallery followed by the query. Gallery row j is kept iff j is among the query's k nearest of that set
    (the query itself included) and the query would be among the k nearest of j.

    Args:
        forward: (Q, s) scores of the query with its s = min(k, N) nearest gallery rows, by rising gallery index.
        own: (Q,) score of the query with itself.
        backward: (Q, s) scores of these gallery rows with the query.
        thresholds: (Q, s) the gallery rows' own k-th scores (see :func:`kth_scores`).
        k: Neighbours per image.
        size: Gallery rows N.

    Returns:
        (Q, s) bool.
    """
    if size < k:
        return torch.ones_like(forward, dtype=torch.bool)
    order = forward.sort(dim=1, descending=True, stable=True).indices
    last = torch.zeros_like(forward, dtype=torch.bool).scatter_(1, order[:, -1:], True)
    displaced = last & (own.unsqueeze(1) > forward)
    return ~displaced & (backward > thresholds)
