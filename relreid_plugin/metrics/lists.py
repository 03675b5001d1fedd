"""Neighbour lists as the re-rankings need them: best first, within or across cameras, and as sparse matrices.

Shapes: Q queries, G gallery images, N images of a set searched in itself, d width, k neighbours. A slot of a list that
nothing fills (fewer images than k) holds row -1 and the score minus infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..errors import UserError, did_you_mean
from .distance import distance_to
from .neighbours import exact_scores, normalise, topk_neighbours

PROTOCOLS = ("inductive", "transductive")
Cameras = Sequence[int] | np.ndarray | Tensor

_BLOCK_VALUES = 1 << 22  # scores held at a time: 32 MiB in float64


def check_protocol(protocol: str) -> bool:
    """Return whether a protocol is ``inductive``.

    Raises:
        UserError: It is neither that nor ``transductive``.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol '{protocol}' is unknown{did_you_mean(protocol, PROTOCOLS)}.")
    return protocol == "inductive"


def check_numbers(low: float, **values: float) -> None:
    """Complain about the first of some named numbers that is below ``low``, infinite or NaN.

    Raises:
        UserError: One is.
    """
    for name, value in values.items():
        if not low <= value < float("inf"):
            raise UserError(f"{name} is {value}; it must be a finite number of at least {low}.")


def unit_pair(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries (Q, d) and gallery (G, d) at unit length, without gradients.

    They are float64 if either is, float32 otherwise; zero vectors stay zero.

    Raises:
        UserError: Shapes or types that do not fit, or no queries or gallery images.
    """
    distance_to(gallery[:1])(query[:1])
    if not len(query) or not len(gallery):
        raise UserError(f"re-ranking needs queries and gallery images; got {len(query)} and {len(gallery)}.")
    dtype = torch.float64 if torch.float64 in (query.dtype, gallery.dtype) else torch.float32
    return normalise(query.detach().to(dtype)), normalise(gallery.detach().to(dtype))


def camera_array(cameras: Cameras, count: int, name: str) -> np.ndarray:
    """Return cameras (count,) as an array.

    Raises:
        UserError: There are more or fewer.
    """
    array = cameras.cpu().numpy() if isinstance(cameras, Tensor) else np.asarray(cameras)
    if array.shape != (count,):
        raise UserError(f"{name} has shape {array.shape}; one camera for each of the {count} features is needed.")
    return array


def ranked(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k gallery rows with the largest inner product per query, best first; equal ones by row.

    A row's list does not depend on which other queries are searched with it.

    Args:
        queries: (Q, d).
        gallery: (G, d); the same tensor as ``queries`` for a set in itself, which takes half the time.
        k: Neighbours; cut to G.

    Returns:
        Rows (Q, k) int64 and scores (Q, k) float32.
    """
    if k < 1:
        return torch.empty(len(queries), 0, dtype=torch.long, device=queries.device), queries.new_empty(
            len(queries), 0
        ).float()
    index = topk_neighbours(queries, gallery, k)
    scores, order = exact_scores(queries, gallery, index).sort(dim=1, descending=True, stable=True)
    return index.gather(1, order), scores


def others(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return every row's k nearest other rows, as :func:`ranked` does; rows (N, k), filled up with -1."""
    index, scores = ranked(features, features, k + 1)
    own = index == torch.arange(len(features), device=index.device).unsqueeze(1)
    own[:, -1] |= ~own.any(dim=1)  # its duplicates crowd it out: the last one goes instead
    shape = (len(features), index.shape[1] - 1)
    return _filled(index[~own].view(shape), scores[~own].view(shape), k)


def by_camera(
    queries: Tensor, gallery: Tensor, k: int, query_cameras: np.ndarray, gallery_cameras: np.ndarray, *, same: bool
) -> tuple[Tensor, Tensor]:
    """Return every query's k nearest gallery rows of its own camera, or of the other cameras.

    Args:
        queries: (Q, d).
        gallery: (G, d).
        k: Neighbours.
        query_cameras: (Q,).
        gallery_cameras: (G,).
        same: Whether those of the own camera are meant.

    Returns:
        Rows (Q, k) int64 and scores (Q, k) float32, best first, filled up with -1 and minus infinity.
    """
    index = torch.full((len(queries), k), -1, device=queries.device)
    scores = torch.full((len(queries), k), -torch.inf, device=queries.device)
    for camera in np.unique(query_cameras):
        rows = torch.from_numpy(np.flatnonzero(query_cameras == camera)).to(queries.device)
        allowed = torch.from_numpy(np.flatnonzero((gallery_cameras == camera) == same)).to(queries.device)
        if len(allowed):
            found, values = ranked(queries[rows], gallery[allowed], k)
            index[rows], scores[rows] = _filled(allowed[found], values, k)
    return index, scores


def _filled(index: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    missing = (0, k - index.shape[1])
    pad = torch.nn.functional.pad
    return pad(index, missing, value=-1), pad(scores, missing, value=-torch.inf)


def edges(index: Tensor, columns: int, weights: Tensor | None = None) -> sparse.csr_array:
    """Return neighbour lists as a matrix; empty slots leave nothing.

    Args:
        index: (n, k) rows of the set, -1 where there is none.
        columns: Its size N.
        weights: (n, k); ``None``: ones.

    Returns:
        (n, N) float32.
    """
    used = (index >= 0).cpu().numpy()
    data = np.ones(used.shape, np.float32) if weights is None else weights.float().cpu().numpy()
    ends = np.r_[0, np.cumsum(used.sum(1))]
    return sparse.csr_array((data[used], index.cpu().numpy()[used], ends), shape=(len(index), columns))


def entered(
    queries: Tensor, gallery: Tensor, thresholds: Tensor, cameras: tuple[np.ndarray, np.ndarray] | None = None
) -> sparse.csr_array:
    """Return where a query would be among the neighbours of gallery images, each query alone with the gallery.

    Args:
        queries: (Q, d).
        gallery: (G, d).
        thresholds: (G,) scores of the gallery images' last neighbours, minus infinity where a list is not full.
        cameras: Of the queries (Q,) and the gallery (G,): lists hold images of other cameras only; ``None``: of all.

    Returns:
        (Q, G) float32, the scores of these pairs.
    """
    parts = []
    doubles, limits = gallery.double(), thresholds.to(gallery.device)
    for start in range(0, len(queries), step := max(1, _BLOCK_VALUES // len(gallery))):
        scores = (queries[start : start + step].double() @ doubles.t()).float()
        inside = scores > limits
        if cameras is not None:
            other = cameras[0][start : start + step, None] != cameras[1][None]
            inside &= torch.from_numpy(other).to(inside.device)
        row, column = (part.cpu().numpy() for part in inside.nonzero(as_tuple=True))
        data = scores[inside].cpu().numpy()
        parts.append(sparse.coo_array((data, (row, column)), shape=inside.shape).tocsr())
    return sparse.vstack(parts, format="csr")


def inverse_norms(matrix: sparse.csr_array, extra: np.ndarray | None = None) -> np.ndarray:
    """Return 1 / length of the rows (n,) float32, 0 for empty ones.

    Args:
        matrix: (n, N).
        extra: (n,) one more entry of every row.
    """
    squared = np.asarray(matrix.multiply(matrix).sum(axis=1), dtype=np.float64)
    return inverse_root(squared if extra is None else squared + np.square(extra, dtype=np.float64))


def inverse_root(values: np.ndarray) -> np.ndarray:
    """Return ``values ** -0.5`` as float32, 0 where a value is 0."""
    with np.errstate(divide="ignore"):
        result: np.ndarray = np.where(values > 0, 1 / np.sqrt(values), 0).astype(np.float32)
    return result


def scaled(matrix: Any, rows: np.ndarray) -> sparse.csr_array:
    """Return a sparse matrix with row i multiplied by ``rows[i]``."""
    return (sparse.dia_array((rows[None], [0]), shape=(len(rows), len(rows))) @ matrix).tocsr()
