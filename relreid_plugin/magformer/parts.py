"""A relation layer whose images are spread over several processes: each refines its rows by the neighbours of all.

Keys and values travel, (N, G, p) and (N, d) a layer, and their gradients back; queries, the feed-forward layers and the
norms stay where their rows are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..collective import Cut, all_sum
from ..metrics.neighbours import SearchConfig
from ..metrics.reciprocal import ReciprocalGraph, reciprocal_graph
from .attention import RelationAttention


def landmark_inputs(x: Tensor, landmarks: Tensor, cut: Cut) -> Tensor:
    """Return the landmarks' rows of the layer's input, (p', d), in every process.

    Args:
        x: (n, d), this process's rows.
        landmarks: (p',) row numbers in [0, N).
        cut: How the N rows are cut, in one run.
    """
    low, high = cut.bounds(cut.rank)
    here = (landmarks >= low) & (landmarks < high)
    rows = x[(landmarks - low).clamp(0, len(x) - 1)]
    return all_sum(torch.where(here.unsqueeze(1), rows, torch.zeros_like(rows)))


def own_rows(graph: ReciprocalGraph, cut: Cut) -> ReciprocalGraph:
    """Return the rows of a graph that are this process's; their neighbours are numbered as before."""
    rows = slice(*cut.bounds(cut.rank))
    return ReciprocalGraph(graph.index[rows], graph.mask[rows], None, None if graph.bias is None else graph.bias[rows])


def attend_in_parts(
    attention: RelationAttention,
    x: Tensor,
    landmarks: Tensor,
    cut: Cut,
    *,
    graph: ReciprocalGraph | None = None,
    search: SearchConfig | None = None,
) -> Tensor:
    """Return the attention's output for this process's rows, with the gradients of one process that has all of them.

    Args:
        attention: The layer.
        x: (n, d), this process's rows of its input.
        landmarks: (p',) row numbers in [0, N).
        cut: How the N rows are cut, in one run.
        graph: Graph of all N input features; ``None`` for ``affinity`` neighbours, whose graphs are made here.
        search: Search backend for those.

    Returns:
        (n, d).
    """
    to_query, to_key = attention._projections(landmark_inputs(x, landmarks, cut))
    queries, own_keys = attention._split(x, to_query), attention._split(x, to_key)
    keys = cut.gather(own_keys)
    values = cut.gather(attention.value(x)).view(cut.total, attention.num_heads, attention.head_dim)
    if attention.neighbours == "affinity":
        with torch.no_grad():
            everybody = cut.gather(queries.detach())
        lists = attention.affinity_graphs(everybody, keys, search=search or SearchConfig())
        graphs = [reciprocal_graph(one) for one in lists]
    elif graph is None:
        raise ValueError("feature neighbours need the graph of the input features.")
    else:
        graphs = [graph]
    heads, _ = attention._attend(queries, keys, values, [own_rows(one, cut) for one in graphs])
    return attention._finish(heads)


__all__ = ["attend_in_parts", "landmark_inputs", "own_rows"]
