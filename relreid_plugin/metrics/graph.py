"""Re-ranking by graph networks without weights: GNN re-ranking and graph convolution re-ranking (GCR).

Shapes: Q queries, G gallery images, N = Q + G, d width. Both exist in two protocols. ``transductive`` is the published one:
queries and gallery are one graph. ``inductive``: the graph is the gallery's alone, with all that is computed from it, and
every query is attached to it by itself: by its neighbours, and by the gallery images whose lists it would enter; nothing
of the gallery changes, so that a query's scores do not depend on the other queries.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..errors import UserError
from .distance import pairwise_distance
from .lists import (
    Cameras,
    by_camera,
    camera_array,
    check_numbers,
    check_protocol,
    edges,
    entered,
    inverse_norms,
    inverse_root,
    others,
    ranked,
    scaled,
    unit_pair,
)
from .neighbours import normalise
from .ranking import _parallel

_BLOCK_VALUES = 1 << 22  # values of a dense block: 16 MiB


def gnn_rerank(
    query: Tensor,
    gallery: Tensor,
    *,
    k1: int = 26,
    k2: int = 7,
    alpha: float = 2.0,
    layers: int = 2,
    lambda_value: float = 0.0,
    protocol: str = "transductive",
) -> Tensor:
    """GNN re-ranking (Zhang et al., "Understanding Image Retrieval Re-Ranking: A Graph Neural Network Perspective", 2020).

    The features of the graph's nodes are their rows of the adjacency matrix: ``A_ij = 1`` for the k1 nearest j of i, itself
    among them. A layer makes A symmetric and sums the rows of the k2 nearest (with itself) by weight::

        B = A + A.T        A_i = unit(sum over j in the k2 nearest of i of max(s_ij, 0) ** alpha * B_j)

    with cosines s. These are the authors' steps; the paper makes A symmetric before the first layer only. The cosine of the
    rows after the last layer ranks the gallery.

    Args:
        query: (Q, d), any length.
        gallery: (G, d), any length, on the same device.
        k1: Neighbours of the adjacency matrix (the authors: 26 on Market-1501, 60 on VeRi-776).
        k2: Neighbours summed by a layer (7 and 10).
        alpha: Exponent of the cosines.
        layers: Layers.
        lambda_value: Weight of the cosine of the features themselves, in [0, 1]; the authors' later code has 0.3.
        protocol: ``transductive`` (published) or ``inductive``: see the module.

    Returns:
        Distances (Q, G) float32 on the CPU, 1 - score; smaller is nearer.

    Raises:
        UserError: Shapes that do not fit, features that are not finite, or parameters out of range.
    """
    inductive = check_protocol(protocol)
    check_numbers(1, k1=k1, k2=k2, layers=layers)
    check_numbers(0, alpha=alpha, lambda_value=lambda_value)
    if lambda_value > 1:
        raise UserError(f"lambda_value is {lambda_value}; it must lie in [0, 1].")
    with torch.no_grad():
        query, gallery = unit_pair(query, gallery)
        attach = _gnn_attached if inductive else _gnn_together
        scores = torch.from_numpy(attach(query, gallery, k1, k2, alpha, layers)).mul_(1 - lambda_value)
        if lambda_value:
            scores.add_(1 - pairwise_distance(query, gallery, metric="cosine").cpu().float(), alpha=lambda_value)
        return scores.neg_().add_(1)


def _gnn_graph(features: Tensor, k1: int, k2: int, alpha: float) -> tuple[sparse.csr_array, sparse.csr_array, Tensor]:
    """Adjacency (N, N), what a layer sums (N, N), and the score of every row's k1-th neighbour (N,)."""
    index, scores = ranked(features, features, max(k1, k2))
    adjacency = edges(index[:, :k1], len(features))
    passing = edges(index[:, :k2], len(features), scores[:, :k2].clamp_min(0).pow(alpha))
    full = scores[:, k1 - 1] if k1 <= len(features) else torch.full_like(scores[:, 0], -torch.inf)
    return adjacency, passing, full


def _gnn_together(query: Tensor, gallery: Tensor, k1: int, k2: int, alpha: float, layers: int) -> np.ndarray:
    """Scores (Q, G) of the transductive protocol."""
    rows, passing, _ = _gnn_graph(torch.cat([query, gallery]), k1, k2, alpha)
    for _ in range(layers):
        symmetric = (rows + rows.T).tocsr()
        rows = passing @ symmetric
        inverse = inverse_norms(rows)
        rows = scaled(rows, inverse)
    return _products(rows[: len(query)], symmetric, passing[len(query) :], inverse[len(query) :])


def _gnn_attached(query: Tensor, gallery: Tensor, k1: int, k2: int, alpha: float, layers: int) -> np.ndarray:
    """Scores (Q, G) of the inductive protocol.

    A query has a row over the gallery, an entry of its own in that row, and a column: the entries of the gallery's rows that
    stand for it. Rows and lengths of the gallery come from the gallery alone.
    """
    rows, passing, thresholds = _gnn_graph(gallery, k1, k2, alpha)
    index, scores = ranked(query, gallery, max(k1, k2) - 1)
    row = edges(index[:, : k1 - 1], len(gallery))
    summed = edges(index[:, : k2 - 1], len(gallery), scores[:, : k2 - 1].clamp_min(0).pow(alpha))
    itself = query.square().sum(1).pow(alpha).float().cpu().numpy()
    own, column = np.ones(len(query), np.float32), entered(query, gallery, thresholds)
    column.data[:] = 1
    for _ in range(layers):
        symmetric, both = (rows + rows.T).tocsr(), (row + column).tocsr()
        row = (summed @ symmetric + scaled(both, itself)).tocsr()
        own = np.asarray(summed.multiply(both).sum(axis=1)) + 2 * itself * own
        rows = passing @ symmetric
        inverse = inverse_norms(rows)
        rows = scaled(rows, inverse)
        column = scaled((passing @ both.T), inverse).T.tocsr()
        length = inverse_norms(row, own)
        row, own = scaled(row, length), own * length
    result = _products(row, symmetric, passing, inverse)
    where = column.tocoo()
    result[where.row, where.col] += own[where.row] * where.data
    return result


def _products(
    rows: sparse.csr_array, symmetric: sparse.csr_array, passing: sparse.csr_array, inverse: np.ndarray
) -> np.ndarray:
    """``rows @ (passing @ symmetric).T``, its columns multiplied by ``inverse``, (Q, G) float32, Q rows in blocks."""
    result = np.empty((rows.shape[0], passing.shape[0]), np.float32)
    step = max(1, _BLOCK_VALUES // rows.shape[1])

    def work(start: int) -> None:
        block = (rows[start : start + step] @ symmetric).T.toarray(order="C")
        np.multiply((passing @ block).T, inverse, out=result[start : start + step])

    _parallel(work, list(range(0, rows.shape[0], step)))
    return result


def graph_convolution(
    query: Tensor,
    gallery: Tensor,
    *,
    k1: int = 15,
    k2: int = 3,
    beta1: float = 0.2,
    beta2: float = 0.2,
    scale: float = 0.3,
    rounds: int = 3,
    query_cameras: Cameras | None = None,
    gallery_cameras: Cameras | None = None,
    protocol: str = "transductive",
) -> tuple[Tensor, Tensor]:
    """Features after graph convolution re-ranking (GCR; Zhang et al., "Graph Convolution Based Efficient Re-Ranking", 2023).

    A round replaces the features X by ``unit((1 - scale) * L1 X + scale * L2 X)``. L1 is the normalised affinity of the k1
    nearest (with the image itself), L2 that of the image and its k2 - 1 nearest from other cameras::

        S_ij = exp(s_ij / beta)        L_ij = S_ij / sqrt(sum over j of S_ij * sum over i of S_ij)

    with the cosines s of that round. Defaults are the authors' for Market-1501 (k1 is 13 for DukeMTMC-reID). Their
    camera-wise profile vectors, a whitening before it, are not part of this.

    Args:
        query: (Q, d), any length.
        gallery: (G, d), any length, on the same device.
        k1: Neighbours among all images.
        k2: Neighbours among other cameras' images.
        beta1: Temperature of the first.
        beta2: Temperature of the second.
        scale: Share of the second, in [0, 1].
        rounds: Rounds.
        query_cameras: (Q,); ``None``: ``scale`` is 0.
        gallery_cameras: (G,); given if and only if ``query_cameras`` is.
        protocol: ``transductive`` (published) or ``inductive``: see the module.

    Returns:
        Queries (Q, d) and gallery (G, d) of unit length, to be ranked by their cosine.

    Raises:
        UserError: Shapes that do not fit, features that are not finite, or parameters out of range.
    """
    inductive = check_protocol(protocol)
    check_numbers(1, k1=k1, k2=k2, rounds=rounds)
    check_numbers(0.001, beta1=beta1, beta2=beta2)
    if not 0 <= scale <= 1:
        raise UserError(f"scale is {scale}; it must lie in [0, 1].")
    if (query_cameras is None) != (gallery_cameras is None):
        raise UserError("query_cameras and gallery_cameras belong together; give both or neither.")
    with torch.no_grad():
        query, gallery = unit_pair(query, gallery)
        cameras = None
        if query_cameras is not None and gallery_cameras is not None:
            cameras = (
                camera_array(query_cameras, len(query), "query_cameras"),
                camera_array(gallery_cameras, len(gallery), "gallery_cameras"),
            )
        size = len(query)
        if not inductive:
            query, gallery = query[:0], torch.cat([query, gallery])
            cameras = None if cameras is None else (cameras[0][:0], np.concatenate(cameras))
        share = 0.0 if cameras is None else scale
        for _ in range(rounds):
            parts = []
            if share < 1:
                parts.append((1 - share, _convolved(query, gallery, k1, beta1, None)))
            if share > 0:
                parts.append((share, _convolved(query, gallery, k2, beta2, cameras)))
            sides = (torch.stack([weight * pair[side] for weight, pair in parts]).sum(0) for side in (0, 1))
            query, gallery = (normalise(side) for side in sides)
        return (query, gallery) if inductive else (gallery[:size], gallery[size:])


def _convolved(
    query: Tensor, gallery: Tensor, k: int, beta: float, cameras: tuple[np.ndarray, np.ndarray] | None
) -> tuple[Tensor, Tensor]:
    """``L X`` of the gallery (G, d), and of queries (Q, d) that are each alone with it."""

    def lists(rows: Tensor, own: np.ndarray | None) -> tuple[Tensor, Tensor]:
        if cameras is not None and own is not None:
            return by_camera(rows, gallery, k - 1, own, cameras[1], same=False)
        return others(gallery, k - 1) if rows is gallery else ranked(rows, gallery, k - 1)

    def itself(rows: Tensor) -> np.ndarray:
        return np.asarray(((rows.square().sum(1) - 1) / beta).exp().float().cpu().numpy())

    def weighted(index: Tensor, scores: Tensor) -> sparse.csr_array:
        return edges(index, len(gallery), ((scores - 1) / beta).exp())  # the 1 cancels in L

    own_cameras = (None, None) if cameras is None else cameras
    index, scores = lists(gallery, own_cameras[1])
    weights, own = weighted(index, scores), itself(gallery)
    column = inverse_root(weights.sum(axis=0) + own)
    values = gallery.cpu().numpy() * column[:, None]
    refined = (weights @ values + own[:, None] * values) * inverse_root(weights.sum(axis=1) + own)[:, None]
    refined_gallery = torch.from_numpy(refined).to(gallery)
    if not len(query):
        return query, refined_gallery
    weights, own = weighted(*lists(query, own_cameras[0])), itself(query)
    listed = own.copy()
    if k > 1:
        back = entered(query, gallery, scores[:, -1], cameras)
        back.data = np.exp((back.data - 1) / np.float32(beta))
        listed += np.asarray(back.sum(axis=1))
    refined = weights @ values + (own * inverse_root(listed))[:, None] * query.cpu().numpy()
    refined *= inverse_root(weights.sum(axis=1) + own)[:, None]
    return torch.from_numpy(refined).to(query), refined_gallery
