"""Images that attend to the stored states of a refined gallery, wherever these are: queries, and images that are appended.

Shape letters: N gallery rows, n rows, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .edges import CameraEdges, FeatureEdges
from .layers import _device, _own_states, _query_layer
from .passes import embedded, inputs_of

Edges = FeatureEdges | CameraEdges


@torch.no_grad()
def refine_rows(
    encoder: Any,
    queries: Tensor,
    cameras: Tensor,
    edges: Edges,
    index: Any,
    thresholds: Any,
    layers: Any,
    size: int,
    *,
    refined: Any,
) -> Tensor:
    """Refine queries, each as if it were alone with the gallery.

    Args:
        encoder: Relation encoder in evaluation mode.
        queries: (n, d) unit features.
        cameras: (n,) of them.
        edges: Who attends to whom.
        index: Of the gallery's inputs.
        thresholds: (N, …) of the gallery's rows, or what is indexed like them.
        layers: Stored states, or a function that makes them of the edges (rows, mask, bias).
        size: Gallery rows that are refined.
        refined: Table of their refined features.

    Returns:
        (n, d) unit test features, on the CPU.
    """
    first = inputs_of(encoder, queries)
    (rows, mask, bias), _, nearest = edges.of_queries(first, cameras, index, thresholds, size)
    x, device = first.to(_device(encoder)), _device(encoder)
    with encoder.autocast(device):
        for block, layer in zip(encoder.blocks, layers(rows, mask) if callable(layers) else layers):
            x = _query_layer(block, layer, x, rows, mask, bias)
    return encoder.add_anchor(embedded(encoder, x, first), nearest if encoder.anchor else None, refined.take).cpu()


@torch.no_grad()
def states_of_rows(
    encoder: Any, features: Tensor, cameras: Tensor, edges: Edges, index: Any, thresholds: Any, layers: Any, size: int
) -> dict[str, Tensor]:
    """Refine images as if they were queries and return what later queries need of them.

    Args:
        encoder, cameras, edges, index, thresholds, layers, size: See :func:`refine_rows`.
        features: (n, d) unit features.

    Returns:
        The rows of ``thresholds``, ``refined``, ``inputs`` (with a head), and every layer's ``keys`` and ``values``.
    """
    made: dict[str, Tensor] = {}
    first = inputs_of(encoder, features)
    if encoder.head is not None:
        made["inputs"] = first
    (rows, mask, bias), own, _ = edges.of_queries(first, cameras, index, thresholds, size, new=True)
    assert own is not None
    made["thresholds"] = own
    x, device = first.to(_device(encoder)), _device(encoder)
    with encoder.autocast(device):
        for number, (block, layer) in enumerate(zip(encoder.blocks, layers(rows, mask) if callable(layers) else layers)):
            keys, values = _own_states(block, layer.to_key, x)
            made[f"keys{number}"], made[f"values{number}"] = keys.cpu(), values.cpu()
            x = _query_layer(block, layer, x, rows, mask, bias)
    made["refined"] = embedded(encoder, x, first).cpu()
    return made


__all__ = ["Edges", "refine_rows", "states_of_rows"]
