"""Attention and transformer layers whose tokens are images (METHODS 1; MagFormer sections 3.1 to 3.3, NFormer).

Shape letters: N images, Q queries, d width, H heads, G query/key maps (H, or 2H with differential attention), e map width
(d / G), p landmarks, K slots per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.candidates import exact_scores
from ..metrics.neighbours import SearchConfig, topk_neighbours
from ..metrics.reciprocal import ReciprocalGraph, inductive_mask, kth_scores, reciprocal_graph
from .operations import feed_forward, gather_dot, gather_sum, landmark_projection, reciprocal_softmax


@dataclass(frozen=True)
class RelationAttentionOutput:
    """Output of one attention layer with its attention map.

    Attributes:
        output: (N, d).
        weights: (N, H, K) attention weights per slot; with differential attention the difference of the two maps.
        maps: (N, G, K) the softmax maps before the difference.
        index: (N, K) attended image per slot.
        mask: (N, K) kept slots.
    """

    output: Tensor
    weights: Tensor
    maps: Tensor
    index: Tensor
    mask: Tensor


@dataclass
class LayerStates:
    """What one attention layer keeps of the gallery so that queries can attend to it later.

    Attributes:
        query_projection: (d, G * p) landmarks folded into the query side.
        key_projection: (d, G * p) landmarks folded into the key side.
        keys: (N, G, p) landmark similarities of the gallery images as attended rows.
        values: (N, H, c).
        queries: (N, G, p) landmark similarities as attending rows; kept for affinity neighbours only.
        thresholds: One (N,) vector per map: score of the least similar neighbour; for affinity neighbours only.
    """

    query_projection: Tensor
    key_projection: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor | None = None
    thresholds: list[Tensor] | None = None


class RelationAttention(nn.Module):
    """Landmark agent attention with reciprocal neighbour softmax.

    With ``magnitude`` the landmark rows are normalised and weighted by learned magnitudes (MALAA, paper eq. 1); without it
    this is NFormer's landmark agent attention. With ``differential`` two softmax maps per head are subtracted (DiffAttn).

    Args:
        dim: Feature width d.
        num_heads: Heads H; d must be a multiple of H, of 2H with ``differential``.
        num_landmarks: Landmarks p.
        layer: Number of the layer, counted from 1; it sets the initial lambda of DiffAttn.
        magnitude: Use MALAA.
        differential: Use DiffAttn.
        neighbours: ``feature`` and ``camera`` (one graph of the input features for all layers) or ``affinity`` (eq. 3: a
            graph of the layer's own affinities, per map).
        k: Neighbours per image for ``affinity``.
        dropout: Dropout on the output.
        init: ``paper`` (all projections normal with standard deviation 0.02), ``diffusion`` (beyond the paper: value and
            output projection start near the identity, so that the untrained layer averages reciprocal neighbours) or
            ``identity`` (they start at it).
        head_norm: Normalise every head of DiffAttn and scale it by 1 - lambda_init, as the paper does.

    Raises:
        ValueError: ``dim`` does not divide.
    """

    states_type = LayerStates
    """What it keeps of a gallery; who stores that elsewhere puts it together again."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 2,
        num_landmarks: int = 5,
        layer: int = 1,
        magnitude: bool = True,
        differential: bool = True,
        neighbours: str = "feature",
        k: int = 20,
        dropout: float = 0.1,
        init: str = "paper",
        head_norm: bool = True,
    ) -> None:
        super().__init__()
        self.num_maps = 2 * num_heads if differential else num_heads
        if dim % self.num_maps:
            raise ValueError(
                f"dim={dim} must be a multiple of {self.num_maps} ({num_heads} heads, differential={differential})."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.magnitude = magnitude
        self.differential = differential
        self.neighbours = neighbours
        self.k = k
        self.head_norm = head_norm
        self.map_dim = dim // self.num_maps
        self.head_dim = dim // num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        if magnitude:
            self.query_magnitude = nn.Parameter(torch.ones(self.num_maps, num_landmarks))
            self.key_magnitude = nn.Parameter(torch.ones(self.num_maps, num_landmarks))
        if differential:
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
            self.lambda_q1 = nn.Parameter(torch.randn(self.map_dim) * 0.1)
            self.lambda_k1 = nn.Parameter(torch.randn(self.map_dim) * 0.1)
            self.lambda_q2 = nn.Parameter(torch.randn(self.map_dim) * 0.1)
            self.lambda_k2 = nn.Parameter(torch.randn(self.map_dim) * 0.1)
            if head_norm:
                self.norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        for linear in (self.query, self.key, self.value, self.proj):
            nn.init.normal_(linear.weight, std=0.02)
        if init in ("diffusion", "identity"):
            with torch.no_grad():
                for linear in (self.value, self.proj):
                    linear.weight.mul_(0.25 if init == "diffusion" else 0.0).add_(torch.eye(dim))

    def lambda_value(self) -> Tensor:
        """Return the scalar lambda of differential attention."""
        first = (self.lambda_q1 * self.lambda_k1).sum().exp()
        second = (self.lambda_q2 * self.lambda_k2).sum().exp()
        return first - second + self.lambda_init

    def _projections(self, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """Landmark rows (p', d), p' <= p -> the two folded projections (d, G * p')."""
        sides = []
        for weight, other, name in (
            (self.query.weight, self.key.weight, "query_magnitude"),
            (self.key.weight, self.query.weight, "key_magnitude"),
        ):
            folded = landmark_projection(landmarks, weight, other, maps=self.num_maps, normalise=self.magnitude)
            if self.magnitude:
                folded = folded * getattr(self, name)[:, : landmarks.shape[0]].reshape(-1)
            sides.append(folded)
        return sides[0] / math.sqrt(self.map_dim), sides[1]

    def _split(self, x: Tensor, projection: Tensor) -> Tensor:
        return (x @ projection).view(x.shape[0], self.num_maps, -1)

    def _combine(self, maps: Tensor) -> Tensor:
        """(N, G, K) softmax maps -> (N, H, K) weights of the value sum."""
        if not self.differential:
            return maps
        first, second = maps[:, 0::2], maps[:, 1::2]
        return first - self.lambda_value().to(maps.dtype) * second

    def _finish(self, heads: Tensor) -> Tensor:
        """(N, H, c) -> (N, d)."""
        if self.differential and self.head_norm:
            heads = self.norm(heads.to(self.norm.weight.dtype)) * (1.0 - self.lambda_init)
        return self.dropout(self.proj(heads.reshape(heads.shape[0], self.dim)))

    def affinity_graphs(self, queries: Tensor, keys: Tensor, *, search: SearchConfig) -> list[Tensor]:
        """Return one (N, k) neighbour list per map from the layer's own affinities (paper eq. 3)."""
        plain = SearchConfig(backend="torch") if search.index in ("flat", "scan") else search
        return [
            topk_neighbours(queries[:, g].detach().contiguous(), keys[:, g].detach().contiguous(), self.k, config=plain)
            for g in range(self.num_maps)
        ]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, graphs: list[ReciprocalGraph]) -> tuple[Tensor, Tensor]:
        """One graph for all maps, or one per map -> head outputs (N, H, c) and maps (N, G, K) in the graphs' layouts."""
        if len(graphs) == 1:
            graph = graphs[0]
            scores = gather_dot(queries, keys, graph.index, graph.mask, graph.reverse)
            if graph.bias is not None:
                scores = scores + graph.bias.unsqueeze(1)
            maps = reciprocal_softmax(scores, graph.mask)
            weights = self._combine(maps).to(values.dtype)
            return gather_sum(weights, values, graph.index, graph.mask, graph.reverse), maps
        outputs, all_maps = [], []
        width = max(graph.index.shape[1] for graph in graphs)
        for g, graph in enumerate(graphs):
            head = g // 2 if self.differential else g
            part = slice(g, g + 1)
            scores = gather_dot(
                queries[:, part].contiguous(), keys[:, part].contiguous(), graph.index, graph.mask, graph.reverse
            )
            maps = reciprocal_softmax(scores, graph.mask)
            heads = values[:, head : head + 1].contiguous()
            outputs.append(gather_sum(maps.to(values.dtype), heads, graph.index, graph.mask, graph.reverse))
            all_maps.append(F.pad(maps, (0, width - maps.shape[2])))
        stacked = torch.cat(outputs, dim=1)
        if self.differential:
            stacked = stacked[:, 0::2] - self.lambda_value().to(stacked.dtype) * stacked[:, 1::2]
        return stacked, torch.cat(all_maps, dim=1)

    def forward(
        self,
        x: Tensor,
        landmarks: Tensor,
        *,
        graph: ReciprocalGraph | None = None,
        search: SearchConfig | None = None,
        return_attention: bool = False,
    ) -> Tensor | RelationAttentionOutput:
        """Let images attend to their reciprocal neighbours.

        Args:
            x: (N, d).
            landmarks: (p',) row numbers of the landmarks, p' <= p.
            graph: Graph of the input features; ignored for ``neighbours='affinity'``, needed else.
            search: Search backend for ``affinity``.
            return_attention: Return :class:`RelationAttentionOutput` (not for ``affinity`` neighbours).

        Returns:
            (N, d).
        """
        states, graphs = self.states(x, landmarks, graph=graph, search=search)
        assert states.queries is not None
        heads, maps = self._attend(states.queries, states.keys, states.values, graphs)
        output = self._finish(heads)
        if return_attention:
            if graph is None or len(graphs) > 1:
                raise ValueError("attention maps are returned for feature neighbours only.")
            return RelationAttentionOutput(output, self._combine(maps), maps, graph.index, graph.mask)
        return output

    def states(
        self,
        x: Tensor,
        landmarks: Tensor,
        *,
        graph: ReciprocalGraph | None = None,
        search: SearchConfig | None = None,
        chunk: int | None = None,
    ) -> tuple[LayerStates, list[ReciprocalGraph]]:
        """Compute what images need to attend to each other.

        Args:
            x, landmarks, graph, search: As in :meth:`forward`.
            chunk: Rows that are projected at a time (without gradients); ``None``: all at once, differentiable.

        Returns:
            The states, with queries, and with thresholds where ``chunk`` is given; and the graph, for ``affinity``
            neighbours one per map.

        Raises:
            ValueError: Feature neighbours without a graph.
        """
        size = x.shape[0]
        to_query, to_key = self._projections(x[landmarks])
        queries, keys = self._split(x, to_query), self._split(x, to_key)
        if chunk is None:
            values = self.value(x)
        else:
            first = self.value(x[:chunk])
            values = first.new_empty(size, self.dim)
            values[:chunk] = first
            for start in range(chunk, size, chunk):
                values[start : start + chunk] = self.value(x[start : start + chunk])
        states = LayerStates(to_query, to_key, keys, values.view(size, self.num_heads, self.head_dim), queries)
        if self.neighbours == "affinity":
            lists = self.affinity_graphs(queries, keys, search=search or SearchConfig())
            if chunk is not None:
                states.thresholds = [
                    kth_scores(queries[:, g].contiguous(), keys[:, g].contiguous(), one) for g, one in enumerate(lists)
                ]
            return states, [reciprocal_graph(one, reverse=chunk is None) for one in lists]
        if graph is None:
            raise ValueError("feature neighbours need the graph of the input features.")
        return states, [graph]

    def attend_rows(self, rows: slice, states: LayerStates, graphs: list[ReciprocalGraph]) -> Tensor:
        """Return the attention's output for some rows of the images that :meth:`states` was computed for, (n, d).

        Without gradients. Slots outside the mask read the row itself, which is in the processor's cache already.
        """
        assert states.queries is not None
        parts = []
        for graph in graphs:
            index, mask = graph.index[rows], graph.mask[rows]
            own = torch.arange(rows.start, rows.start + len(index), device=index.device).unsqueeze(1)
            bias = None if graph.bias is None else graph.bias[rows]
            parts.append(ReciprocalGraph(torch.where(mask, index, own), mask, own, bias))
        return self._finish(self._attend(states.queries[rows], states.keys, states.values, parts)[0])

    def attend_to_gallery(
        self,
        x: Tensor,
        states: LayerStates,
        *,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        return_attention: bool = False,
    ) -> Tensor | RelationAttentionOutput:
        """Let every query attend to stored gallery states and to itself, as if it were alone with the gallery.

        Args:
            x: (Q, d) queries at this layer.
            states: The layer's gallery states.
            index: (Q, k) gallery neighbours of the input features (``feature`` neighbours).
            mask: (Q, k) kept ones.
            bias: (Q, k) added to their affinities.
            return_attention: Return :class:`RelationAttentionOutput` with k + 1 slots, the query itself in the last one,
                numbered -1 (not for ``affinity`` neighbours).

        Returns:
            (Q, d).
        """
        queries, own_keys = self._split(x, states.query_projection), self._split(x, states.key_projection)
        own_values = self.value(x).view(x.shape[0], self.num_heads, self.head_dim)
        own_scores = (queries * own_keys).sum(dim=2)
        if index is not None and mask is not None:
            maps = _query_maps(queries, own_scores, states.keys, index, mask, bias)
            heads = _query_values(self._combine(maps), index, mask, states.values, own_values)
            if return_attention:
                slots, kept = F.pad(index, (0, 1), value=-1), F.pad(mask, (0, 1), value=True)
                return RelationAttentionOutput(self._finish(heads), self._combine(maps), maps, slots, kept)
        else:
            outputs = []
            for g in range(self.num_maps):
                own, head = slice(g, g + 1), g // 2 if self.differential else g
                picked, kept = self._affinity_neighbours(queries[:, g], own_keys[:, g], states, g)
                maps = _query_maps(queries[:, own], own_scores[:, own], states.keys[:, own], picked, kept)
                part = slice(head, head + 1)
                outputs.append(_query_values(maps, picked, kept, states.values[:, part], own_values[:, part]))
            heads = torch.cat(outputs, dim=1)
            if self.differential:
                heads = heads[:, 0::2] - self.lambda_value().to(heads.dtype) * heads[:, 1::2]
        return self._finish(heads)

    def _affinity_neighbours(self, queries: Tensor, own_keys: Tensor, states: LayerStates, g: int) -> tuple[Tensor, Tensor]:
        """Gallery neighbours of map g by the layer's affinity, and which of them the query keeps."""
        assert states.queries is not None and states.thresholds is not None
        keys, rows = states.keys[:, g].contiguous(), states.queries[:, g].contiguous()
        queries, own_keys = queries.contiguous(), own_keys.contiguous()
        picked = topk_neighbours(queries, keys, self.k, config=SearchConfig(backend="torch"))
        own = (queries.double() * own_keys.double()).sum(dim=1).float()
        kept = inductive_mask(
            exact_scores(queries, keys, picked),
            own,
            exact_scores(own_keys, rows, picked),
            states.thresholds[g][picked],
            k=self.k,
            size=keys.shape[0],
        )
        return picked, kept


def _query_maps(
    queries: Tensor, own_scores: Tensor, keys: Tensor, index: Tensor, mask: Tensor, bias: Tensor | None = None
) -> Tensor:
    """(Q, G, p) queries, (Q, G) scores with themselves, (N, G, p) gallery keys -> (Q, G, k + 1) maps, the query last."""
    scores = gather_dot(queries, keys, index, mask)
    if bias is not None:
        scores = scores + bias.unsqueeze(1)
    kept = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    return reciprocal_softmax(torch.cat([scores, own_scores.unsqueeze(2)], dim=2), kept)


def _query_values(weights: Tensor, index: Tensor, mask: Tensor, values: Tensor, own: Tensor) -> Tensor:
    """(Q, H, k + 1) weights over (N, H, c) gallery values and the query's own (Q, H, c) -> (Q, H, c)."""
    weights = weights.to(values.dtype)
    return gather_sum(weights[:, :, :-1], values, index, mask) + weights[:, :, -1:] * own


class UnitNorm(nn.Module):
    """Scales the rows of (N, d) to unit length; has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) -> (N, d)."""
        return F.normalize(x, dim=1)


class RelationBlock(nn.Module):
    """Post-norm transformer block: x <- LN(x + Attn(x)); x <- LN(x + MLP(x)).

    With ``average`` (beyond the paper) it is x <- unit(Attn(x)); x <- unit(x + MLP(x)) with an MLP that starts at zero: an
    image's share in its own attention replaces the residual, and with ``init='identity'`` the untrained block is the
    weighted mean of an image and its neighbours, which is query expansion.

    Args:
        dim: Width d.
        mlp_ratio: Width of the MLP as a multiple of d.
        dropout: Dropout after attention and MLP.
        average: See above; needs ``head_norm=False``, which it sets.
        attention: Keyword arguments of :class:`RelationAttention`.
    """

    def __init__(
        self, dim: int, *, mlp_ratio: float = 4.0, dropout: float = 0.1, average: bool = False, **attention
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.average = average
        self.attn = RelationAttention(dim, dropout=dropout, head_norm=not average, **attention)
        self.norm1 = UnitNorm() if average else nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norm2 = UnitNorm() if average else nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if average:
            nn.init.zeros_(self.fc2.weight)

    def feed_forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything of the block after the attention, (N, d) each."""
        x = self.norm1(attended if self.average else x + attended)
        inner = feed_forward(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.norm2(x + self.dropout(inner))

    @torch.no_grad()
    def refine_(
        self,
        x: Tensor,
        landmarks: Tensor,
        *,
        graph: ReciprocalGraph | None = None,
        search: SearchConfig | None = None,
        chunk: int = 1024,
    ) -> LayerStates:
        """Replace images by their refined form in place, some rows at a time (testing only, no gradients).

        Above ``x`` it needs the values of all images, (N, d), and what ``chunk`` rows need.

        Args:
            x: (N, d), overwritten.
            landmarks, graph, search: As in :meth:`RelationAttention.forward`.
            chunk: Rows at a time; the result depends on it by the rounding of matrix products only.

        Returns:
            The layer's states, for queries that attend to these images later.
        """
        states, graphs = self.attn.states(x, landmarks, graph=graph, search=search, chunk=chunk)
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            x[rows] = self.feed_forward(x[rows], self.attn.attend_rows(rows, states, graphs))
        if self.attn.neighbours != "affinity":
            states.queries = None
        return states
