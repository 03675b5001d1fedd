"""Whom queries look at in a gallery: the attention of every layer, as the inductive protocol computes it.

Shape letters: L layers, Q queries, H heads, k neighbours, d width.
"""

from __future__ import annotations

import numpy as np
import torch

from ..engine.attended import strongest
from ..errors import UserError
from ..features.sets import TestFeatures
from .cameras import UNKNOWN, as_cameras
from .encoder import RelationEncoder

MOST = 6
CHUNK = 2048


@torch.no_grad()
def query_attention(encoder: RelationEncoder, data: TestFeatures, *, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """Return the gallery images with the largest weights of every query, the query itself among them.

    Args:
        encoder: In evaluation mode.
        data: Query and gallery features (·, d) of the image model.
        most: Images of a query and layer beside itself.

    Returns:
        Images and weights, (L, Q, min(k, most) + 1) each, see :class:`relreid_plugin.engine.attended.Attended`.

    Raises:
        UserError: ``relation.neighbours affinity``: every map of it has neighbours of its own.
    """
    if encoder.neighbours == "affinity":
        raise UserError("with 'relation.neighbours affinity' every head has neighbours of its own, and no list is shown.")
    device = next(encoder.parameters()).device
    states = encoder.refine_gallery(data.gallery.features.to(device), data.gallery.camids)
    cameras = as_cameras(data.query.camids, len(data.query), missing=UNKNOWN)
    layers: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in encoder.blocks]
    for part, own in zip(data.query.features.to(device).split(CHUNK), cameras.split(CHUNK)):
        x = encoder.inputs(part)
        index, mask, bias = encoder.query_edges(x, states, own)
        with encoder.autocast(device):
            for found, block, layer in zip(layers, encoder.blocks, states.layers):
                seen = block.attn.attend_to_gallery(x, layer, index=index, mask=mask, bias=bias, return_attention=True)
                weights = seen.weights.float().mean(dim=1).cpu().numpy()
                found.append(strongest(seen.index.cpu().numpy(), weights, seen.mask.cpu().numpy(), most))
                x = block.feed_forward(x, seen.output)
    lists, weights = zip(*((np.concatenate(parts) for parts in zip(*found)) for found in layers))
    return np.stack(lists), np.stack(weights)


__all__ = ["MOST", "query_attention"]
