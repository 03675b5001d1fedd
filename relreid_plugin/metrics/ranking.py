"""CMC, mAP and mINP of a retrieval, from distances or from features.

Shapes: Q queries, G gallery images, P gallery images of a query's identity, R ranks of the CMC curve.

Two gallery images at the same distance are ranked in *stable gallery order*: the lower gallery index first. A score
therefore never depends on a sorting algorithm.

No row is ever argsorted. The rank of a positive is the number of gallery images nearer than it, plus the number of ties
with a lower index, minus the discarded images ahead of it, plus one; a query has few positives, so these numbers are
counted by comparing its row of distances with the distance of each of its positives, a block of rows at a time, on as
many threads as torch uses. Identities with very many positives sort the values of the row once and find the positives
by binary search.

A gallery image that is the query itself (the same file) is junk for that query: neither a match nor a stranger. Which
images are the same file is told by numbers, ``query_files`` and ``gallery_files``; a pair that shares a number is found by
sorting, never by comparing all pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError
from .distance import distance_to, pairwise_distance
from .matches import Array, ArrayLike
from .matches import Labels as _Labels

NO_MATCH = (
    "no query has a match in the gallery; a match has the query's identity, another camera (where there are cameras) and is "
    "another file."
)
_COUNT_LIMIT = 64  # positives per query up to which counting beats sorting the row
_LANE = 255  # 64-bit words of flags that are added up: the sum of each of their bytes must fit into a byte
_BLOCK_VALUES = 2**20  # distances compared at a time by one thread: stays in its cache
_STREAM_VALUES = 2**23  # distances computed at a time from features: 32 MiB in float32


@dataclass(frozen=True)
class RankingResult:
    """Scores of one evaluation; all of them are fractions in [0, 1].

    Attributes:
        mAP: Mean of ``ap`` over the valid queries.
        mINP: Mean of ``inp`` over the valid queries.
        cmc: Share of valid queries with a match among the first r images, r = 1 … R; (R,) float64.
        ap: Average precision per query, (Q,) float64, NaN for a query without a match.
        inp: Inverse negative penalty per query, (Q,) float64, NaN for a query without a match.
        num_queries: Q.
        num_valid_queries: Queries with at least one match that is not discarded.
        num_gallery: G.
        first: Rank of the first match per query, (Q,) int64, 0 for a query without a match; ``None`` where it is drawn anew
            (:func:`evaluate_cuhk03`).
    """

    mAP: float
    mINP: float
    cmc: Array
    ap: Array
    inp: Array
    num_queries: int
    num_valid_queries: int
    num_gallery: int
    first: Array | None = None

    def rank(self, r: int) -> float:
        """CMC at rank ``r`` (1 is the first); constant beyond the end of the gallery.

        Raises:
            UserError: ``r`` is below 1, or lies beyond the stored curve and within the gallery.
        """
        if r < 1:
            raise UserError(f"rank {r} does not exist; the first rank is 1.")
        if r <= len(self.cmc):
            return float(self.cmc[r - 1])
        if r >= self.num_gallery or self.cmc[-1] >= 1:
            return 1.0
        raise UserError(f"rank {r} was not computed; evaluate with max_rank={r} or more.")


def evaluate_ranking(
    distances: ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike | None = None,
    gallery_camids: ArrayLike | None = None,
    *,
    query_files: ArrayLike | None = None,
    gallery_files: ArrayLike | None = None,
    max_rank: int = 50,
    chunk: int | None = None,
) -> RankingResult:
    """CMC, mAP and mINP under the protocol of Market-1501 (Zheng et al., ICCV 2015).

    Gallery images of the query's identity *and* camera are discarded; pass scene numbers in place of cameras for a
    protocol that discards by scene. So is the query's own file, whatever its labels in the gallery. Queries without a
    match that is left are not counted. INP is the number of positives over the rank of the last of them (Ye et al., TPAMI
    2021, "AGW"). Ties: lower gallery index first.

    Args:
        distances: (Q, G), smaller is nearer; numpy or torch, any real type. Infinity is allowed, NaN is not.
        query_pids: Identity per query, (Q,).
        gallery_pids: Identity per gallery image, (G,).
        query_camids: Camera (or scene) per query, (Q,); None: nothing is discarded.
        gallery_camids: Camera (or scene) per gallery image, (G,); given if and only if ``query_camids`` is.
        query_files: Number of the file per query, (Q,); None: no gallery image is a query's own.
        gallery_files: Number of the file per gallery image, (G,); a gallery image with the query's number is discarded.
        max_rank: R, length of the CMC curve; may exceed G.
        chunk: Rows compared at a time by one thread; None: as many as stay in a cache. No effect on the result.

    Raises:
        UserError: Shapes that do not fit, NaN distances, or no query with a match.
    """
    matrix = _as_matrix(distances)
    labels = _Labels.build(query_pids, gallery_pids, query_camids, gallery_camids, matrix.shape, query_files, gallery_files)
    _check_positive(max_rank=max_rank, chunk=chunk)
    rows = _block_rows(labels.num_gallery, chunk)
    blocks = [labels.order[start : start + rows] for start in range(0, labels.num_queries, rows)]
    first, ap, inp = labels.empty_scores()

    def work(block: Array) -> None:
        first[block], ap[block], inp[block] = _score_block(_take_rows(matrix, block), block, labels)

    _parallel(work, blocks)
    return _summarise(_cmc(first, max_rank), ap, inp, labels, first)


def evaluate_features(
    query_features: torch.Tensor,
    gallery_features: torch.Tensor,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike | None = None,
    gallery_camids: ArrayLike | None = None,
    *,
    query_files: ArrayLike | None = None,
    gallery_files: ArrayLike | None = None,
    metric: str = "euclidean",
    max_rank: int = 50,
    chunk: int | None = None,
) -> RankingResult:
    """:func:`evaluate_ranking` straight from features; the (Q, G) matrix never exists.

    The scores are those of ``evaluate_ranking(pairwise_distance(query_features, gallery_features, metric=metric), …)``.

    Args:
        query_features: (Q, d).
        gallery_features: (G, d), on the same device.
        query_pids: Identity per query, (Q,).
        gallery_pids: Identity per gallery image, (G,).
        query_camids: Camera (or scene) per query, (Q,); None: nothing is discarded.
        gallery_camids: Camera (or scene) per gallery image, (G,).
        query_files: See :func:`evaluate_ranking`.
        gallery_files: As there.
        metric: See :func:`~relreid_plugin.metrics.distance.pairwise_distance`.
        max_rank: R, length of the CMC curve; may exceed G.
        chunk: Queries whose distances are held at a time; None: about 32 MiB of distances.

    Raises:
        UserError: Shapes that do not fit, NaN features, an unknown metric, or no query with a match.
    """
    pairwise_distance(query_features[:1], gallery_features[:1], metric=metric)  # complains before any work is done
    with torch.inference_mode():
        distances = distance_to(gallery_features, metric=metric, dtype=query_features.dtype)
    shape = (query_features.shape[0], gallery_features.shape[0])
    labels = _Labels.build(query_pids, gallery_pids, query_camids, gallery_camids, shape, query_files, gallery_files)
    _check_positive(max_rank=max_rank, chunk=chunk)
    held = chunk or max(16, _STREAM_VALUES // max(1, labels.num_gallery))
    rows = _block_rows(labels.num_gallery, None)
    first, ap, inp = labels.empty_scores()
    with torch.inference_mode():
        buffer = distances(query_features[:0]).new_empty(min(held, labels.num_queries), labels.num_gallery)
        for start in range(0, labels.num_queries, held):
            queries = labels.order[start : start + held]
            picked = query_features[torch.from_numpy(queries).to(query_features.device)]
            matrix = _as_matrix(distances(picked, buffer[: len(queries)]))

            def work(span: slice, queries: Array = queries, matrix: ArrayLike = matrix) -> None:
                block = queries[span]
                first[block], ap[block], inp[block] = _score_block(matrix[span], block, labels)

            _parallel(work, [slice(begin, begin + rows) for begin in range(0, len(queries), rows)])
    return _summarise(_cmc(first, max_rank), ap, inp, labels, first)


def evaluate_cuhk03(
    distances: ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike | None = None,
    gallery_camids: ArrayLike | None = None,
    *,
    query_files: ArrayLike | None = None,
    gallery_files: ArrayLike | None = None,
    num_repeats: int = 10,
    seed: int = 0,
    max_rank: int = 50,
    chunk: int | None = None,
) -> RankingResult:
    """Single-gallery-shot scores for the classic split of CUHK03 (Li et al., CVPR 2014).

    For the CMC every query keeps, per repeat, one random gallery image of each identity, and the curve is the mean over
    the repeats. AP and INP use the whole gallery, as in :func:`evaluate_ranking`.

    Args:
        distances: (Q, G), smaller is nearer; numpy or torch.
        query_pids: Identity per query, (Q,).
        gallery_pids: Identity per gallery image, (G,).
        query_camids: Camera per query, (Q,); None: nothing is discarded.
        gallery_camids: Camera per gallery image, (G,).
        query_files: See :func:`evaluate_ranking`. A draw that falls on the query's own file under another identity leaves
            that identity out.
        gallery_files: As there.
        num_repeats: Draws per query.
        seed: Seed of the draws; the same seed gives the same curve for any ``chunk``.
        max_rank: R, length of the CMC curve.
        chunk: Rows at a time; None: as many as stay in a cache.

    Raises:
        UserError: Shapes that do not fit, NaN distances, or no query with a match.
    """
    matrix = _as_matrix(distances)
    labels = _Labels.build(query_pids, gallery_pids, query_camids, gallery_camids, matrix.shape, query_files, gallery_files)
    _check_positive(max_rank=max_rank, chunk=chunk, num_repeats=num_repeats)
    files = {"query_files": query_files, "gallery_files": gallery_files}
    full = evaluate_ranking(
        matrix, query_pids, gallery_pids, query_camids, gallery_camids, **files, max_rank=max_rank, chunk=chunk
    )
    starts = np.flatnonzero(np.r_[True, np.diff(labels.sorted_pids) > 0])  # of each identity in sorted_gallery
    sizes = np.diff(np.r_[starts, labels.num_gallery])
    rows = _block_rows(max(labels.num_gallery, num_repeats * len(starts)), chunk)
    generator = np.random.default_rng(seed)
    hits = np.zeros(max_rank + 1)
    for begin in range(0, labels.num_queries, rows):
        block = np.arange(begin, min(begin + rows, labels.num_queries))
        draw = generator.random((len(block), num_repeats, len(starts) + 1))  # one more for the positive
        _, _, pos = labels.listed(block)
        valid = pos.any(1)
        block, draw = block[valid], draw[valid]
        if not len(block):
            continue
        row = np.arange(len(block))[:, None]
        values = _to_numpy(_take_rows(matrix, block))
        shot = labels.sorted_gallery[starts + (draw[:, :, :-1] * sizes).astype(np.int64)]  # (B, repeats, identities)
        images, _, pos = labels.listed(block)
        ranked_pos = np.argsort(~pos, axis=1, kind="stable")
        pick = (draw[:, :, -1] * pos.sum(1, keepdims=True)).astype(np.int64)  # (B, repeats)
        target = images[row, ranked_pos[row, pick]]
        near = values[row, target][:, :, None]
        others = values[row[:, :, None], shot]
        ahead = (others < near) | ((others == near) & (shot < target[:, :, None]))
        ahead &= labels.gallery_pids[labels.sorted_gallery[starts]] != labels.query_pids[block, None, None]
        if labels.query_files is not None and labels.gallery_files is not None:
            ahead &= labels.gallery_files[shot] != labels.query_files[block, None, None]
        hits += np.bincount(np.minimum(ahead.sum(2), max_rank).ravel(), minlength=max_rank + 1)
    cmc = np.cumsum(hits[:max_rank]) / (full.num_valid_queries * num_repeats)
    return _summarise(cmc, full.ap, full.inp, labels)


def _score_block(block: ArrayLike, queries: Array, labels: _Labels) -> tuple[Array, Array, Array]:
    """First matching rank, AP and INP for the rows ``block`` (B, G) of ``queries`` (B,)."""
    if bool(np.isnan(block.max()) if isinstance(block, np.ndarray) else torch.isnan(block.max())):
        raise UserError("distances contain NaN; check the features for NaN or infinity.")
    images, real, pos = labels.listed(queries)  # (B, P)
    found = pos.sum(1)
    width = int(found.max(initial=0))
    if not width:
        nan = np.full(len(queries), np.nan)
        return np.zeros(len(queries), np.int64), nan, nan
    values = _gather(block, images)
    # by distance, then by gallery index: within a row the images are in gallery order and the padding comes last
    by_value = np.argsort(np.where(real, values, np.inf), axis=1, kind="stable")
    pos = np.take_along_axis(pos, by_value, 1)
    junk_ahead = np.cumsum(np.take_along_axis(real, by_value, 1) & ~pos, axis=1)
    front = np.argsort(~pos, axis=1, kind="stable")[:, :width]  # positives to the front, still by distance
    by_value = np.take_along_axis(by_value, front, 1)
    images = np.take_along_axis(images, by_value, 1)
    values = np.take_along_axis(values, by_value, 1)
    slot = np.arange(width)
    real = slot < found[:, None]
    position = _positions(block, images, values, real)
    rank = position - np.take_along_axis(junk_ahead, front, 1) + 1
    precision = np.where(real, (slot + 1) / np.maximum(rank, 1), 0.0)
    valid = found > 0
    last = rank[np.arange(len(rank)), np.maximum(found, 1) - 1]
    first = np.where(valid, rank[:, 0], 0)
    total = np.cumsum(precision, axis=1)[:, -1]  # in order, so that it does not depend on the padding
    ap = np.where(valid, total / np.maximum(found, 1), np.nan)
    inp = np.where(valid, found / np.maximum(last, 1), np.nan)
    return first, ap, inp


def _positions(block: ArrayLike, images: Array, values: Array, real: Array) -> Array:
    """Zero-based stable position of ``images`` (B, P) at distances ``values`` among all G of their row."""
    if isinstance(block, torch.Tensor):
        return _positions_on_device(block, images, real)
    if images.shape[1] > _COUNT_LIMIT:
        return _positions_by_sorting(block, images, values)
    gallery = block.shape[1]
    words = -(-gallery // 8)
    runs = -(-words // _LANE)
    flags = np.zeros((len(block), 8 * runs * -(-words // runs)), dtype=bool)
    view = flags[:, :gallery]
    columns = np.arange(gallery)
    position = np.zeros(images.shape, np.int64)
    for slot in range(images.shape[1]):
        rows = np.flatnonzero(real[:, slot])
        stop = int(rows[-1]) + 1  # queries come by falling number of images, so the tail has nothing left
        part, value, out = block[:stop], values[:stop, slot, None], view[:stop]
        np.less(part, value, out=out)
        position[:stop, slot] = _count_true(flags[:stop], runs)
        np.less_equal(part, value, out=out)
        ties = _count_true(flags[:stop], runs) - position[:stop, slot]
        tied = np.flatnonzero((ties > 1) & real[:stop, slot])
        if len(tied):
            lower = (block[tied] == value[tied]) & (columns < images[tied, slot, None])
            position[tied, slot] += lower.sum(1)
    return position


def _count_true(flags: Array, runs: int) -> Array:
    """True values per row of a contiguous (B, 8 * runs * n) bool array with n <= 255: eight bytes are added at a time."""
    sums = flags.view(np.uint64).reshape(len(flags), runs, -1).sum(2)
    return sums.view(np.uint8).reshape(len(flags), -1).sum(1, dtype=np.int64)


def _positions_by_sorting(block: Array, images: Array, values: Array) -> Array:
    """:func:`_positions` for many positives per row: values sorted, positives found by binary search."""
    ordered = torch.from_numpy(np.sort(block, axis=1))
    wanted = torch.from_numpy(np.ascontiguousarray(values))
    position = torch.searchsorted(ordered, wanted).numpy()
    ties = torch.searchsorted(ordered, wanted, right=True).numpy() - position
    tied = np.flatnonzero((ties > 1).any(1))
    if len(tied):
        order = np.argsort(block[tied], axis=1, kind="stable")
        inverse = np.empty_like(order)
        np.put_along_axis(inverse, order, np.arange(block.shape[1])[None], 1)
        position[tied] = np.take_along_axis(inverse, images[tied], 1)
    return position


def _positions_on_device(block: torch.Tensor, images: Array, real: Array) -> Array:
    """:func:`_positions` for distances that live on an accelerator."""
    index = torch.from_numpy(images).to(block.device)
    values = block.gather(1, index)
    columns = torch.arange(block.shape[1], device=block.device)
    position = torch.empty_like(index)
    for slot in range(images.shape[1]):
        value, image = values[:, slot, None], index[:, slot, None]
        position[:, slot] = ((block < value) | ((block == value) & (columns < image))).sum(1)
    return position.cpu().numpy()


def _gather(block: ArrayLike, images: Array) -> Array:
    if isinstance(block, torch.Tensor):
        return block.gather(1, torch.from_numpy(images).to(block.device)).cpu().numpy()
    return np.take_along_axis(block, images, 1)


def _summarise(cmc: Array, ap: Array, inp: Array, labels: _Labels, first: Array | None = None) -> RankingResult:
    valid = ~np.isnan(ap)
    return RankingResult(
        mAP=float(ap[valid].mean()),
        mINP=float(inp[valid].mean()),
        cmc=cmc,
        ap=ap,
        inp=inp,
        num_queries=labels.num_queries,
        num_valid_queries=int(valid.sum()),
        num_gallery=labels.num_gallery,
        first=first,
    )


def _cmc(first: Array, max_rank: int) -> Array:
    """CMC curve (R,) from the first matching rank per query (0: no match)."""
    first = first[first > 0]
    if not len(first):
        raise UserError(NO_MATCH)
    return np.cumsum(np.bincount(np.minimum(first, max_rank + 1), minlength=max_rank + 2)[1 : max_rank + 1]) / len(first)


def _as_matrix(distances: ArrayLike) -> ArrayLike:
    """Distances as a numpy matrix, or as a tensor where they live on an accelerator."""
    if not isinstance(distances, (np.ndarray, torch.Tensor)):
        raise UserError(f"distances is a {type(distances).__name__}; pass a numpy array or a torch.Tensor of shape (Q, G).")
    if len(distances.shape) != 2 or 0 in distances.shape:
        raise UserError(f"distances has shape {tuple(distances.shape)}; pass a matrix (Q, G) that is not empty.")
    if isinstance(distances, torch.Tensor):
        distances = distances.detach()
        if distances.device.type != "cpu":
            return distances
        distances = (distances.float() if distances.dtype == torch.bfloat16 else distances).numpy()
    if distances.dtype.kind not in "fiub":
        raise UserError(f"distances has type {distances.dtype}; pass real numbers.")
    return distances


def _take_rows(matrix: ArrayLike, rows: Array) -> ArrayLike:
    """Rows of the matrix, contiguous and of a type that numpy compares fast."""
    if isinstance(matrix, torch.Tensor):
        return matrix[torch.from_numpy(rows).to(matrix.device)]
    block = matrix[rows]
    if block.dtype in (np.float32, np.float64):
        return block
    return block.astype(np.float32 if block.dtype == np.float16 or block.dtype.itemsize < 3 else np.float64)


def _to_numpy(block: ArrayLike) -> Array:
    return block.float().cpu().numpy() if isinstance(block, torch.Tensor) else block


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1.")


def _block_rows(gallery: int, chunk: int | None) -> int:
    return chunk or max(1, min(64, _BLOCK_VALUES // max(1, gallery)))


def _parallel(work: Callable, items: list) -> None:
    """Run ``work`` over ``items`` on torch's number of threads; numpy lets go of the interpreter lock in its loops."""
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, items):
            pass
