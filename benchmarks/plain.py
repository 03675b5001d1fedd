"""The best plain dense form of the relation encoder: what a competent user writes with torch's own layers.

One reciprocal mask for all layers and heads; linear layers, layer norm, RMS norm and GELU as torch has them; landmarks (p
of them) first, so that an affinity is a product of width p; then attention over all N x N pairs in one of the ways of
:data:`WAYS`. The benchmark tries them and is judged by the fastest.

Shape letters: N images, d width, H heads, G query/key maps (H, or 2 H with two maps per head), e map width, c head width, p
landmarks, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(G, N, p) queries, scaled, and keys, (H, N, c) values, (N, N) mask, lambda or ``None`` -> (H, N, c)."""


def reciprocal_mask(lists: Tensor) -> Tensor:
    """Neighbour lists (N, k) -> (N, N) bool: both are in each other's list, or they are the same."""
    size = len(lists)
    found = torch.zeros(size, size, dtype=torch.bool).scatter_(1, lists, True)
    found.fill_diagonal_(True)
    return found & found.t()


def by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, share: Tensor | None) -> Tensor:
    """Affinities, ``masked_fill``, softmax and the product with the values, one head after the other."""
    hidden = ~mask
    maps = 1 if share is None else 2

    def weights(number: int) -> Tensor:
        scores = queries[number] @ keys[number].t()
        fill = scores.masked_fill if scores.requires_grad else scores.masked_fill_
        return fill(hidden, -torch.inf).softmax(dim=1)

    heads = []
    for head, value in enumerate(values):
        attended = weights(maps * head)
        if share is not None:
            attended = torch.addcmul(attended, weights(maps * head + 1), share, value=-1)
        heads.append(attended @ value)
    return torch.stack(heads)


def by_fused_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, share: Tensor | None, *, padded: bool
) -> Tensor:
    """``scaled_dot_product_attention``; with ``padded`` landmarks are filled up to the values' width by zeros.

    Torch has a kernel that never holds the affinities where queries, keys and values are of one width.
    """
    if padded:
        room = (0, values.shape[2] - queries.shape[2])
        queries, keys = F.pad(queries, room), F.pad(keys, room)
    fused = partial(F.scaled_dot_product_attention, attn_mask=mask, scale=1.0)

    def attended(part: slice) -> Tensor:
        return fused(queries[part].unsqueeze(0), keys[part].unsqueeze(0), values.unsqueeze(0))[0]

    if share is None:
        return attended(slice(None))
    return attended(slice(0, None, 2)) - share * attended(slice(1, None, 2))


WAYS: dict[str, Attend] = {
    "products": by_products,
    "fused": partial(by_fused_attention, padded=False),
    "fused, padded": partial(by_fused_attention, padded=True),
}
"""Ways to attend to all pairs, by name."""


def need(way: str, size: int, maps: int) -> float:
    """Memory that a way needs to refine N images, MiB: its N x N arrays, float32, and the masks.

    Args:
        way: A name in :data:`WAYS`.
        size: Images N.
        maps: Query/key maps G.
    """
    arrays = {"products": 2 + (maps > 2), "fused": maps + 1, "fused, padded": 1}[way]
    return (4.0 * arrays + 3.0) * size**2 / 2**20 + 25e3 * size / 2**20


class PlainEncoder(nn.Module):
    """An encoder's blocks, computed densely; parameters have the encoder's names.

    Args:
        encoder: A :class:`~relreid_plugin.magformer.encoder.RelationEncoder` without dropout; its parameters are shared.
        way: A name in :data:`WAYS`.
    """

    def __init__(self, encoder: Any, way: str) -> None:
        super().__init__()
        self.blocks: Any = encoder.blocks
        self.attend = WAYS[way]

    def forward(self, x: Tensor, lists: Tensor, rows: list[Tensor]) -> Tensor:
        """Refine images (N, d) by their neighbour lists (N, k) with every layer's landmarks."""
        mask = reciprocal_mask(lists)
        for block, landmarks in zip(self.blocks, rows):
            x = block.norm1(x + self._attended(block.attn, x, landmarks, mask))
            x = block.norm2(x + block.fc2(F.gelu(block.fc1(x), approximate="tanh")))
        return x

    def _attended(self, attn: Any, x: Tensor, landmarks: Tensor, mask: Tensor) -> Tensor:
        queries, keys = (self._maps(each(x), attn.num_maps) for each in (attn.query, attn.key))
        values = self._maps(attn.value(x), attn.num_heads)
        query_agents, key_agents = queries[:, landmarks], keys[:, landmarks]
        if attn.magnitude:
            query_agents = F.normalize(query_agents, dim=2) * attn.key_magnitude.unsqueeze(2)
            key_agents = F.normalize(key_agents, dim=2) * attn.query_magnitude.unsqueeze(2)
        near_queries = queries @ key_agents.transpose(1, 2) / math.sqrt(attn.map_dim)
        near_keys = keys @ query_agents.transpose(1, 2)
        share = attn.lambda_value() if attn.differential else None
        heads = self.attend(near_queries, near_keys, values, mask, share).transpose(0, 1)
        if attn.differential:
            heads = attn.norm(heads) * (1.0 - attn.lambda_init)
        return attn.proj(heads.reshape(len(x), -1))

    @staticmethod
    def _maps(x: Tensor, count: int) -> Tensor:
        """(N, d) -> (count, N, d / count)."""
        return x.view(len(x), count, -1).transpose(0, 1)
