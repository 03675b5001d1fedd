"""k-reciprocal re-ranking with sparse products (Zhong et al., CVPR 2017).

Shapes: Q queries, G gallery images, N = Q + G, B rows held at a time, k = k1.

Distances are read once, B rows at a time. What is kept of a row is its k1 + 1 nearest, its largest distance (the
normaliser) and, for queries, the distances to the gallery, which are part of the result. Everything after that has a few
non-zeros per row: reciprocal neighbours are ``A * A.T`` of the neighbour matrix A, the 2/3 test and the expansion are sparse
products, local query expansion is one, and the Jaccard distance is a sum of minima over the columns of the encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy import sparse

from ..errors import UserError
from .distance import distance_to
from .ranking import Array, ArrayLike, _parallel

_ROW_VALUES = 2**23  # distances held at a time: 32 MiB
_TILE = 64  # rows of a tile that is transposed inside the cache
_PAIR_VALUES = 2**22  # feature values gathered at a time
_MERGE_VALUES = 2**18  # pairs of non-zeros merged at a time by one thread
_GROUP = 16  # distances whose minimum stands for them in the search

Rows = Iterator[tuple[int, torch.Tensor]]
Pairs = Callable[[Array, Array], Array]


def k_reciprocal_rerank(
    query_gallery: ArrayLike,
    query_query: ArrayLike,
    gallery_gallery: ArrayLike,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Array:
    """Re-ranked distances from distances; the numbers of the authors' code, without an N x N copy.

    Distances are squared and divided by the largest of their row first, as in the authors' code: pass plain Euclidean
    distances. Equal distances are neighbours in the order of their index, queries before gallery.

    Args:
        query_gallery: Euclidean distances, (Q, G), numpy or torch.
        query_query: Euclidean distances, (Q, Q).
        gallery_gallery: Euclidean distances, (G, G).
        k1: Neighbours in which reciprocity is asked for; more than N - 1 means all.
        k2: Neighbours over which the encoding is averaged; 1 turns that off.
        lambda_value: Weight of the original distance, in [0, 1]; the rest is the Jaccard distance.

    Returns:
        Distances (Q, G) in [0, 1], float32; smaller is nearer.

    Raises:
        UserError: Shapes that do not fit, NaN, or parameters out of range.
    """
    cross, own, other = (
        _as_distances(name, value)
        for name, value in (
            ("query_gallery", query_gallery),
            ("query_query", query_query),
            ("gallery_gallery", gallery_gallery),
        )
    )
    queries, gallery = cross.shape
    for name, value, size in (("query_query", own, queries), ("gallery_gallery", other, gallery)):
        if value.shape != (size, size):
            raise UserError(f"{name} has shape {value.shape}; query_gallery {cross.shape} needs ({size}, {size}).")
    count = queries + gallery

    def rows() -> Rows:
        step = max(1, _ROW_VALUES // count)
        for begin, end, upper, lower in ((0, queries, own, None), (queries, count, cross, other)):
            for start in range(begin, end, step):
                stop = min(start + step, end)
                block = np.empty((stop - start, count), np.float32)
                columns = slice(start - begin, stop - begin)
                _square_transposed(upper[:, columns], block[:, :queries])
                if lower is None:
                    np.multiply(cross[columns], cross[columns], out=block[:, queries:], casting="same_kind")
                else:
                    _square_transposed(lower[:, columns], block[:, queries:])
                yield start, torch.from_numpy(block)

    def pairs(left: Array, right: Array) -> Array:
        out = np.empty(len(left), cross.dtype)
        in_query, to_query = left < queries, right < queries
        for mask, value, i, j in (
            (in_query & to_query, own, right, left),
            (in_query & ~to_query, cross, left, right - queries),
            (~in_query & to_query, cross, right, left - queries),
            (~in_query & ~to_query, other, right - queries, left - queries),
        ):
            out[mask] = value[i[mask], j[mask]]
        return np.square(out).astype(np.float32)

    return _rerank(rows(), pairs, queries, gallery, k1, k2, lambda_value)


def k_reciprocal_rerank_features(
    query: torch.Tensor,
    gallery: torch.Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    chunk: int | None = None,
) -> Array:
    """:func:`k_reciprocal_rerank` of the Euclidean distances between features, which never exist as an N x N matrix.

    Args:
        query: Features, (Q, d).
        gallery: Features, (G, d), on the same device.
        k1: See :func:`k_reciprocal_rerank`.
        k2: See :func:`k_reciprocal_rerank`.
        lambda_value: See :func:`k_reciprocal_rerank`.
        chunk: Rows of distances held at a time; None: about 32 MiB of them.

    Returns:
        Distances (Q, G) in [0, 1], float32, numpy.

    Raises:
        UserError: Shapes that do not fit, NaN, or parameters out of range.
    """
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk is {chunk}; it must be at least 1.")
    with torch.inference_mode():
        rows, pairs = _feature_rows(query, gallery, chunk)
        return _rerank(rows, pairs, len(query), len(gallery), k1, k2, lambda_value)


def _feature_rows(query: torch.Tensor, gallery: torch.Tensor, chunk: int | None) -> tuple[Rows, Pairs]:
    """Squared Euclidean distances between all features: blocks of rows, queries first, and a function of index pairs."""
    distance_to(gallery[:1])(query[:1])  # complains about shapes and types before any work is done
    features = torch.cat([query, gallery])
    features = features if features.dtype == torch.float64 else features.float()
    squared = distance_to(features, metric="sqeuclidean")
    step = chunk or max(16, _ROW_VALUES // max(1, len(features)))

    def rows() -> Rows:
        for begin, end in ((0, len(query)), (len(query), len(features))):
            for start in range(begin, end, step):
                yield start, squared(features[start : min(start + step, end)]).float()

    def pairs(left: Array, right: Array) -> Array:
        out = np.empty(len(left), np.float32)
        size = max(1, _PAIR_VALUES // max(1, features.shape[1]))
        for start in range(0, len(left), size):
            part = slice(start, start + size)
            i, j = (torch.from_numpy(index[part]).to(features.device) for index in (left, right))
            out[part] = (features[i] - features[j]).square_().sum(1).float().cpu().numpy()
        return out

    return rows(), pairs


def _rerank(rows: Rows, pairs: Pairs, queries: int, gallery: int, k1: int, k2: int, lambda_value: float) -> Array:
    """Re-rank from squared distances, given as blocks of rows in order and as a function of index pairs."""
    for name, number in (("k1", k1), ("k2", k2)):
        if number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1.")
    if not 0 <= lambda_value <= 1:
        raise UserError(f"lambda_value is {lambda_value}; it must lie in [0, 1].")
    if not queries or not gallery:
        raise UserError(f"re-ranking needs queries and gallery images; got {queries} and {gallery}.")
    count = queries + gallery
    keep = min(max(k1 + 1, k2), count)
    neighbours = np.empty((count, keep), np.int64)

    def take(own: slice, block: torch.Tensor) -> None:
        neighbours[own] = _nearest(block, keep)

    scale, result = _read(rows, queries, gallery, lambda_value, take)
    encoding = _encode(neighbours, scale, pairs, k1, k2)
    _add_jaccard(result, encoding, queries, 1 - lambda_value)
    return result


def _read(
    rows: Rows, queries: int, gallery: int, share: float, take: Callable[[slice, torch.Tensor], None]
) -> tuple[Array, Array]:
    """Read the distances once, divided by the largest of their row.

    Args:
        rows: Blocks of squared distances, in order.
        queries, gallery: Q and G.
        share: Weight of the queries' distances to the gallery.
        take: Called with the rows of every block and their divided distances (B, N), which it must not keep.

    Returns:
        The largest squared distance of every row (N,), and ``share`` times the queries' divided distances (Q, G).
    """
    scale = np.empty(queries + gallery, np.float32)
    result = np.empty((queries, gallery), np.float32)
    for start, block in rows:
        own = slice(start, start + len(block))
        largest = block.amax(1)
        if bool(torch.isnan(largest).any()):
            raise UserError("distances contain NaN; check the features for NaN or infinity.")
        largest[largest == 0] = 1  # identical features: every distance stays 0
        scale[own] = largest.cpu().numpy()
        block /= largest[:, None]
        take(own, block)
        if start < queries:
            torch.from_numpy(result[own]).copy_(block[:, queries:]).mul_(share)
    return scale, result


def _nearest(block: torch.Tensor, keep: int) -> Array:
    """Columns of the ``keep`` smallest values per row (B, N), ascending; ties by column."""
    rows, count = block.shape
    spare = min(keep + 1, count)  # one more shows a tie at the end
    groups = count // _GROUP
    if groups < 2 * spare:
        value, index = torch.topk(block, spare, dim=1, largest=False)
    else:
        # group j holds columns j, j + groups, j + 2 groups, …; the smallest values lie in groups with the smallest minima
        body = block[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
        _, group = torch.topk(body.amin(1), spare, dim=1, largest=False)
        column = (group[:, None] + groups * torch.arange(_GROUP, device=block.device)[:, None]).flatten(1)
        rest = torch.arange(groups * _GROUP, count, device=block.device).expand(rows, -1)
        column = torch.cat([column, rest], dim=1)
        value, picked = torch.topk(block.gather(1, column), spare, dim=1, largest=False)
        index = column.gather(1, picked)
    nearest = index[:, :keep].cpu().numpy()
    tied = torch.nonzero((value[:, 1:] == value[:, :-1]).any(1)).flatten()
    if len(tied):
        limit = value[tied, keep - 1]
        row, place = (part.cpu().numpy() for part in torch.nonzero(block[tied] <= limit[:, None], as_tuple=True))
        near = block[tied].cpu().numpy()[row, place]
        order = np.lexsort((near, row))  # stable: ties stay in the order of their column
        begin = np.searchsorted(row, np.arange(len(tied)))
        nearest[tied.cpu().numpy()] = place[order][begin[:, None] + np.arange(keep)]
    return nearest


def _encode(neighbours: Array, scale: Array, pairs: Pairs, k1: int, k2: int) -> sparse.csr_array:
    """Encoding V (N, N) of the k-reciprocal sets, averaged over k2 neighbours (local query expansion)."""
    count = len(neighbours)
    reciprocal = _reciprocal(neighbours[:, : k1 + 1])
    half = _reciprocal(neighbours[:, : int(np.around(k1 / 2)) + 1])
    # the half-size set of a member joins if more than 2/3 of it is in the set already
    shared = (reciprocal @ half.T.tocsr()).multiply(reciprocal).tocoo()
    joins = 3 * shared.data > 2 * np.diff(half.indptr)[shared.col]
    chosen = sparse.csr_array((shared.data[joins], (shared.row[joins], shared.col[joins])), shape=(count, count))
    members = (reciprocal + chosen @ half).tocsr()
    encoding = _weigh(members, scale, pairs)
    if k2 == 1:
        return encoding
    average = _neighbour_matrix(neighbours[:, :k2]).astype(np.float32)
    average.data /= min(k2, count)
    return (average @ encoding).tocsr()


def _weigh(members: sparse.csr_array, scale: Array, pairs: Pairs) -> sparse.csr_array:
    """``exp(-d)`` of every row's members (N, N), divided by the row's sum."""
    count = members.shape[0]
    row = np.repeat(np.arange(count), np.diff(members.indptr))
    weight = np.exp(-pairs(row, members.indices.astype(np.int64)) / scale[row])
    total = np.bincount(row, weights=weight, minlength=count).astype(np.float32)
    return sparse.csr_array((weight / total[row], members.indices, members.indptr), members.shape)


def _neighbour_matrix(neighbours: Array) -> sparse.csr_array:
    count, width = neighbours.shape
    data = np.ones(neighbours.size, np.int32)
    return sparse.csr_array((data, neighbours.ravel(), np.arange(count + 1) * width), shape=(count, count))


def _reciprocal(neighbours: Array) -> sparse.csr_array:
    """Who is among whose neighbours both ways, as a matrix of ones."""
    forward = _neighbour_matrix(neighbours)
    return forward.multiply(forward.T.tocsr()).tocsr()


def _add_jaccard(result: Array, encoding: sparse.csr_array, queries: int, share: float) -> None:
    """Add ``share`` times the Jaccard distance of the encodings to ``result`` (Q, G), in place."""
    gallery = result.shape[1]
    probe = encoding[:queries].tocsr()
    columns = encoding[queries:].tocsc()
    length = np.diff(columns.indptr).astype(np.int64)  # gallery images per column
    merged = np.r_[0, np.cumsum(length[probe.indices])][probe.indptr]  # pairs of non-zeros up to each query
    cuts = [0]
    while cuts[-1] < queries:
        following = int(np.searchsorted(merged, merged[cuts[-1]] + _MERGE_VALUES, side="right")) - 1
        cuts.append(min(max(following, cuts[-1] + 1), cuts[-1] + 64, queries))

    def work(span: tuple[int, int]) -> None:
        start, stop = span
        part = slice(probe.indptr[start], probe.indptr[stop])
        column, value = probe.indices[part], probe.data[part]
        row = np.repeat(np.arange(stop - start), np.diff(probe.indptr[start : stop + 1]))
        size = length[column]
        # every non-zero (q, j) meets all non-zeros of column j
        at = np.arange(size.sum()) + np.repeat(columns.indptr[column] - np.cumsum(size) + size, size)
        smaller = np.minimum(columns.data[at], np.repeat(value, size))
        where = columns.indices[at] + np.repeat(row * gallery, size)
        summed = np.bincount(where, weights=smaller, minlength=(stop - start) * gallery)
        overlap: Array = summed.astype(np.float32).reshape(-1, gallery)
        overlap /= 2 - overlap
        np.subtract(1, overlap, out=overlap)
        overlap *= share
        result[start:stop] += overlap

    _parallel(work, list(zip(cuts[:-1], cuts[1:])))


def _square_transposed(source: Array, out: Array) -> None:
    """``out = source.T ** 2``, tile by tile so that both sides stay in the cache."""

    def work(span: slice) -> None:
        for start in range(span.start, span.stop, _TILE):
            stop = min(start + _TILE, span.stop)
            tile = source[start:stop].T
            np.multiply(tile, tile, out=out[:, start:stop], casting="same_kind")

    size = -(-len(source) // torch.get_num_threads())
    _parallel(work, [slice(start, min(start + size, len(source))) for start in range(0, len(source), size)])


def _as_distances(name: str, value: ArrayLike) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype in (torch.bfloat16, torch.float16) else value.numpy()
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "fiu":
        raise UserError(f"{name} must be a matrix of distances, as a numpy array or a torch.Tensor.")
    return value if value.dtype in (np.float32, np.float64) else value.astype(np.float32)
