"""Diffusion on the graph of nearest neighbours (Iscen et al., "Efficient Diffusion on Region Manifolds", CVPR 2017).

Shapes: Q queries, G gallery images, N nodes of the graph, B queries solved at a time, n nodes of a truncated graph.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..errors import UserError
from .distance import pairwise_distance
from .lists import check_numbers, check_protocol, edges, inverse_root, ranked, unit_pair
from .ranking import _parallel

_BLOCK_VALUES = 1 << 21  # values of one of the solver's dense blocks: 16 MiB


def diffusion_scores(
    query: Tensor,
    gallery: Tensor,
    *,
    k: int = 50,
    k_query: int = 10,
    alpha: float = 0.99,
    gamma: float = 3.0,
    iterations: int = 20,
    tolerance: float = 1e-6,
    truncate: int = 0,
    protocol: str = "inductive",
) -> Tensor:
    """Scores of the gallery by diffusion from the queries.

    The graph joins images that are among each other's k nearest, by ``W_ij = max(s_ij, 0) ** gamma`` of their cosine s;
    ``S = D^-1/2 W D^-1/2`` with the row sums D. The scores f solve ``(I - alpha S) f = y`` by conjugate gradients from 0.

    ``inductive``, as published: the graph is the gallery's, and y holds ``max(s, 0) ** gamma`` of the query's k_query
    nearest images. ``transductive``: queries and gallery are one graph, and y is 1 at the query.

    Args:
        query: (Q, d), any length.
        gallery: (G, d), any length, on the same device.
        k: Neighbours of an image in the graph, itself among them.
        k_query: Neighbours that a query starts from (inductive).
        alpha: How far it spreads, in [0, 1).
        gamma: Exponent of the cosines.
        iterations: Most steps of the solver; the authors stop at 20.
        tolerance: A query's solution is finished when its residual is below this part of ``|y|``.
        truncate: Keep only that many images nearest to a query, with the graph between them (inductive; the authors take
            10000 of a million regions); 0: all. Costs O(truncate * k) per query in place of O(G k).
        protocol: ``inductive`` or ``transductive``.

    Returns:
        Scores (Q, G) float32 on the CPU; larger is nearer. Images that diffusion does not reach, whose f is 0, are ordered
        by their cosine behind all others: they get ``lowest - 2 + s``, with the query's lowest f or 0.

    Raises:
        UserError: Shapes that do not fit, features that are not finite, or parameters out of range.
    """
    inductive = check_protocol(protocol)
    check_numbers(1, k=k, k_query=k_query, iterations=iterations)
    check_numbers(0, gamma=gamma, tolerance=tolerance, truncate=truncate)
    if not 0 <= alpha < 1:
        raise UserError(f"alpha is {alpha}; it must lie in [0, 1).")
    if truncate and not inductive:
        raise UserError("truncate belongs to the inductive protocol; set it to 0, or protocol to 'inductive'.")
    with torch.no_grad():
        query, gallery = unit_pair(query, gallery)
        nodes = gallery if inductive else torch.cat([gallery, query])
        affinity = _affinity(nodes, k, gamma)
        if inductive:
            index, near = ranked(query, gallery, k_query)
            start = edges(index, len(nodes), near.clamp_min(0).pow(gamma))
        else:
            start = edges(len(gallery) + torch.arange(len(query)).unsqueeze(1), len(nodes))
        if 0 < truncate < len(gallery):
            kept = ranked(query, gallery, truncate)[0].sort(dim=1).values.cpu().numpy()
            scores = _truncated(affinity, start, kept, alpha, iterations, tolerance)
        else:
            scores = _whole(affinity, start, len(gallery), alpha, iterations, tolerance)
        return _ordered(scores, query, gallery)


def _affinity(features: Tensor, k: int, gamma: float) -> sparse.csr_array:
    """W (N, N) of mutual neighbours, without the diagonal."""
    index, scores = ranked(features, features, k)
    own = torch.arange(len(features), device=index.device).unsqueeze(1)
    forward = edges(index.masked_fill(index == own, -1), len(features), scores.clamp_min(0).pow(gamma))
    listed = forward.copy()
    listed.data[:] = 1
    mutual = forward.multiply(listed.T.tocsr()).tocsr()
    return mutual.maximum(mutual.T.tocsr()).tocsr()


def _whole(
    affinity: sparse.csr_array, start: sparse.csr_array, gallery: int, alpha: float, iterations: int, tolerance: float
) -> np.ndarray:
    """Solutions (Q, G) on the whole graph, a block of queries at a time."""
    inverse = inverse_root(affinity.sum(axis=1))
    spread = _both_sides(affinity, inverse, np.float32(alpha))
    result = np.empty((start.shape[0], gallery), np.float32)
    step = max(1, _BLOCK_VALUES // start.shape[1])

    def work(begin: int) -> None:
        right = start[begin : begin + step].T.toarray(order="C")  # (N, B)
        solved = _conjugate_gradients(lambda x: x - spread @ x, right, iterations, tolerance)
        result[begin : begin + step] = solved[:gallery].T

    _parallel(work, list(range(0, start.shape[0], step)))
    return result


def _both_sides(matrix: sparse.csr_array, inverse: np.ndarray, factor: np.float32) -> sparse.csr_array:
    diagonal = sparse.dia_array((inverse[None], [0]), shape=matrix.shape)
    return (diagonal @ matrix @ diagonal * factor).tocsr()


def _truncated(
    affinity: sparse.csr_array, start: sparse.csr_array, kept: np.ndarray, alpha: float, iterations: int, tolerance: float
) -> np.ndarray:
    """Solutions (Q, G) on the graphs between the kept images (Q, n) of every query, and 0 elsewhere.

    A block's graphs make one matrix of B blocks on the diagonal.
    """
    queries, size = kept.shape
    gallery = affinity.shape[0]
    result = np.zeros((queries, gallery), np.float32)
    degree = np.diff(affinity.indptr)
    step = max(1, _BLOCK_VALUES // max(gallery, size * (1 + int(degree.max(initial=0)))))

    def work(begin: int) -> None:
        rows = kept[begin : begin + step]
        count = len(rows)
        place = np.full((count, gallery), -1, np.int32)
        np.put_along_axis(place, rows, np.arange(size, dtype=np.int32)[None], axis=1)
        length = degree[rows.ravel()]
        at = np.arange(length.sum()) + np.repeat(affinity.indptr[rows.ravel()] - np.cumsum(length) + length, length)
        node = np.repeat(np.arange(count * size), length)  # of a query's kept images, all queries in a row
        other = place[node // size, affinity.indices[at]]
        inside = other >= 0
        node, other, weight = node[inside], other[inside], affinity.data[at[inside]]
        shape = (count * size, count * size)
        block = sparse.csr_array((weight, (node, other + node // size * size)), shape=shape)
        spread = _both_sides(block, inverse_root(block.sum(axis=1)), np.float32(alpha))
        right = np.take_along_axis(start[begin : begin + count].toarray(), rows, axis=1)
        solved = _conjugate_gradients(
            lambda x: x - (spread @ x.T.reshape(-1)).reshape(count, size).T, right.T, iterations, tolerance
        )
        np.put_along_axis(result[begin : begin + count], rows, solved.T, axis=1)

    _parallel(work, list(range(0, queries, step)))
    return result


def _conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray], right: np.ndarray, iterations: int, tolerance: float
) -> np.ndarray:
    """Solve for every column of ``right`` (n, B) by itself; a column that is done stays as it is."""
    solution, residual = np.zeros_like(right), right.copy()
    direction = residual.copy()
    squared = np.square(residual).sum(axis=0, dtype=np.float64)
    goal = tolerance**2 * squared
    for _ in range(iterations):
        going = squared > goal
        if not going.any():
            break
        image = product(direction)
        curvature = np.multiply(direction, image).sum(axis=0, dtype=np.float64)
        going &= curvature > 0
        length = np.divide(squared, curvature, out=np.zeros_like(squared), where=going).astype(right.dtype)
        solution += length * direction
        residual -= length * image
        before, squared = squared, np.where(going, np.square(residual).sum(axis=0, dtype=np.float64), 0)
        direction *= np.divide(squared, before, out=np.zeros_like(squared), where=before > 0).astype(right.dtype)
        direction += residual
    return solution


def _ordered(scores: np.ndarray, query: Tensor, gallery: Tensor) -> Tensor:
    """Put what diffusion did not reach behind the rest, by cosine."""
    result = torch.from_numpy(scores)
    step = max(1, _BLOCK_VALUES // len(gallery))
    for start in range(0, len(query), step):
        part = result[start : start + step]
        cosine = 1 - pairwise_distance(query[start : start + step], gallery, metric="cosine").cpu().float()
        lowest = part.amin(dim=1, keepdim=True).clamp_max(0)
        torch.where(part == 0, lowest - 2 + cosine, part, out=part)
    return result
