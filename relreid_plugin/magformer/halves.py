"""The relation encoder's two halves as functions of tensors alone, for graphs that other runtimes run.

The encoder itself searches neighbours, works in blocks and writes in place; a graph does none of that. What is searched goes
in: neighbour lists, and the rows of the landmarks.

Shape letters: N gallery images, Q queries, d width, k neighbours, K = k + 1 slots, L layers, G maps, p landmarks, H heads,
c = d / H.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .operations import reciprocal_softmax

STATES = ("query_projection", "key_projection", "keys", "values")
"""What a layer keeps of a gallery, in the order of inputs and outputs."""


def require_halves(encoder: Any) -> None:
    """Refuse an encoder whose halves are no functions of features and neighbour lists.

    Raises:
        UserError: The reason, with the key.
    """
    if encoder.neighbours != "feature":
        raise UserError(
            f"a relation encoder with 'relation.neighbours {encoder.neighbours}' is not exported: its lists come from "
            f"{'every layer' if encoder.neighbours == 'affinity' else 'cameras'}, not from the features; 'feature' is."
        )
    if encoder.landmarks != "random":
        raise UserError(
            f"a relation encoder with 'relation.landmarks {encoder.landmarks}' is not exported: every layer chooses them by "
            "what the one before computed; 'random' is."
        )
    if encoder.head is not None:
        raise UserError(
            "a relation encoder with 'relation.head' is not exported: neighbours are searched behind the head, between two "
            "graphs; leave the head out."
        )


def gather_affinities(queries: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """(n, G, p), (N, G, p), (n, K) -> (n, G, K): inner products of every row with its gathered rows."""
    return (queries.unsqueeze(1) * keys[index]).sum(dim=3).transpose(1, 2)


def gather_values(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """(n, H, K), (N, H, c), (n, K) -> (n, H, c): weighted sums of gathered rows."""
    return (weights.transpose(1, 2).unsqueeze(3) * values[index]).sum(dim=1)


def reciprocal_lists(neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slots (N, K) and which of them are kept: rows in each other's lists, and the row itself.

    Args:
        neighbours: (N, k) rows, different ones within a list.
    """
    own = torch.ones_like(neighbours[:, :1]).cumsum(dim=0) - 1
    there = (neighbours[neighbours] == own.unsqueeze(2)).any(dim=2)
    itself = (neighbours == own).any(dim=1, keepdim=True)
    return torch.cat([neighbours, own], dim=1), torch.cat([there | (neighbours == own), ~itself], dim=1)


def after_attention(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Everything of a block after the attention, (n, d) each."""
    x = block.norm1(attended if block.average else x + attended)
    inner = F.gelu(F.linear(x, block.fc1.weight, block.fc1.bias), approximate="tanh")
    return block.norm2(x + F.linear(inner, block.fc2.weight, block.fc2.bias))


class GalleryHalf(nn.Module):
    """Refine a gallery and keep what queries need.

    Args:
        encoder: Relation encoder in evaluation mode.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        require_halves(encoder)
        self.encoder = encoder

    def forward(self, features: Tensor, neighbours: Tensor, landmarks: Tensor) -> tuple[Tensor, ...]:
        """Refine.

        Args:
            features: (N, d).
            neighbours: (N, k) rows of the k nearest by the inner product of unit features, the row itself among them.
            landmarks: (L, p) rows of every layer's landmarks.

        Returns:
            Unit test features (N, d); then for every layer what :data:`STATES` names: (d, G p), (d, G p), (N, G, p) and
            (N, H, c).
        """
        first = x = self.encoder.inputs(features)
        index, mask = reciprocal_lists(neighbours)
        states: list[Tensor] = []
        for layer, block in enumerate(self.encoder.blocks):
            attn = block.attn
            to_query, to_key = attn._projections(x[landmarks[layer]])
            queries, keys = attn._split(x, to_query), attn._split(x, to_key)
            values = attn.value(x).view(-1, attn.num_heads, attn.head_dim)
            maps = reciprocal_softmax(gather_affinities(queries, keys, index), mask)
            heads = gather_values(attn._combine(maps), values, index)
            x = after_attention(block, x, attn._finish(heads))
            states += [to_query, to_key, keys, values]
        return self.encoder.neck.embed(self.encoder.add_residual(x, first)), *states


class QueryHalf(nn.Module):
    """Refine every query as if it were alone with a gallery.

    Args:
        encoder: Relation encoder in evaluation mode.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        require_halves(encoder)
        self.encoder = encoder

    def forward(self, queries: Tensor, neighbours: Tensor, mask: Tensor, *states: Tensor) -> Tensor:
        """Refine.

        Args:
            queries: (Q, d).
            neighbours: (Q, k) gallery rows nearest to every query.
            mask: (Q, k) bool, those that would have the query among their own nearest, see
                :func:`~relreid_plugin.metrics.reciprocal.inductive_mask`.
            *states: For every layer what :class:`GalleryHalf` returned.

        Returns:
            Unit test features (Q, d).
        """
        first = x = self.encoder.inputs(queries)
        kept = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        for layer, block in enumerate(self.encoder.blocks):
            to_query, to_key, keys, values = states[layer * len(STATES) : (layer + 1) * len(STATES)]
            attn = block.attn
            own_queries, own_keys = attn._split(x, to_query), attn._split(x, to_key)
            own_values = attn.value(x).view(-1, attn.num_heads, attn.head_dim)
            scores = gather_affinities(own_queries, keys, neighbours)
            own = (own_queries * own_keys).sum(dim=2, keepdim=True)
            weights = attn._combine(reciprocal_softmax(torch.cat([scores, own], dim=2), kept))
            heads = (
                gather_values(weights[:, :, :-1] * mask.unsqueeze(1), values, neighbours) + weights[:, :, -1:] * own_values
            )
            x = after_attention(block, x, attn._finish(heads))
        return self.encoder.neck.embed(self.encoder.add_residual(x, first))


__all__ = ["STATES", "GalleryHalf", "QueryHalf", "reciprocal_lists", "require_halves"]
