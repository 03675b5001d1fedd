"""Nearest-neighbour search and reciprocal-neighbour graphs.

Shape letters: N gallery rows, Q query rows, d width, k neighbours, K slots of a graph row (k, or k + 1 where a row's own
entry is not among its k nearest).

Neighbour sets are defined exactly and independently of how the search was blocked, so that a row's set does not depend on
which other rows were searched in the same call: scores are inner products summed in float64 and rounded to float32, and
equal scores are ordered by the lower index. The fast search (faiss or a blocked matrix product) only has to be right up to
:data:`TOLERANCE`; rows whose k-th and (k+1)-th candidates are nearer than that are decided again by the definition.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

TOLERANCE = 4e-6
"""Largest float32 rounding difference of a unit-norm inner product that the candidate search may show."""

_BLOCK_ELEMENTS = 1 << 24
_POINTS_PER_CELL = 39  # training points that faiss wants per IVF cell


def faiss_available() -> bool:
    """Return whether faiss can be imported."""
    return importlib.util.find_spec("faiss") is not None


@dataclass(frozen=True)
class SearchConfig:
    """How neighbours are searched.

    Attributes:
        backend: ``auto`` (faiss when installed, else torch), ``faiss`` or ``torch``. CUDA tensors always use torch.
        index: ``flat`` (exact), ``ivf`` or ``hnsw`` (approximate, faiss only).
        nlist: IVF cells; 0 chooses ``4 * sqrt(N)``.
        nprobe: IVF cells visited per query.
        ef: HNSW search width.
    """

    backend: str = "auto"
    index: str = "flat"
    nlist: int = 0
    nprobe: int = 32
    ef: int = 128

    def resolve(self) -> str:
        """Return ``faiss`` or ``torch``.

        Raises:
            UserError: faiss is asked for, directly or by an approximate index, and is not installed.
        """
        if self.backend == "torch":
            return "torch"
        if faiss_available():
            return "faiss"
        if self.backend == "faiss" or self.index != "flat":
            raise UserError(
                f"relation.search asks for faiss (backend '{self.backend}', index '{self.index}'), which is not installed; "
                "run 'pip install faiss-cpu', or set 'relation.search.backend torch' and 'relation.search.index flat'."
            )
        return "torch"


def normalise(features: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Return the rows of ``features`` (N, d) scaled to unit length; zero rows stay zero."""
    return features / features.norm(dim=-1, keepdim=True).clamp_min(eps)


def exact_scores(queries: Tensor, gallery: Tensor, index: Tensor) -> Tensor:
    """Return the defining scores of chosen pairs.

    Args:
        queries: (Q, d).
        gallery: (N, d).
        index: (Q, s) gallery rows per query.

    Returns:
        (Q, s) float32: inner products summed in float64, then rounded.
    """
    out = torch.empty(index.shape, dtype=torch.float32, device=queries.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, 4 * index.shape[1] * queries.shape[1]))
    for start in range(0, index.shape[0], step):
        rows = slice(start, start + step)
        picked = gallery[index[rows]].double()
        out[rows] = torch.bmm(picked, queries[rows].double().unsqueeze(2)).squeeze(2).float()
    return out


def _stable_topk(scores: Tensor, index: Tensor, k: int) -> Tensor:
    """Return (rows, k) entries of ``index`` by falling score, ties by rising index."""
    index, order = index.sort(dim=1)
    scores = scores.gather(1, order)
    return index.gather(1, scores.sort(dim=1, descending=True, stable=True).indices[:, :k])


def _candidates_torch(queries: Tensor, gallery: Tensor, count: int) -> tuple[Tensor, Tensor]:
    step = max(1, min(4096, (2 * _BLOCK_ELEMENTS) // max(1, gallery.shape[0])))
    scores = torch.empty(queries.shape[0], count, dtype=queries.dtype, device=queries.device)
    index = torch.empty(queries.shape[0], count, dtype=torch.long, device=queries.device)
    transposed = gallery.t()
    for start in range(0, queries.shape[0], step):
        rows = slice(start, start + step)
        scores[rows], index[rows] = (queries[rows] @ transposed).topk(count, dim=1)
    return scores, index


def build_faiss_index(gallery: Tensor, config: SearchConfig) -> Any:
    """Return a faiss inner-product index over ``gallery`` (N, d) of the kind that ``config`` names."""
    import faiss

    data = gallery.detach().float().contiguous().numpy()
    size, width = data.shape
    index: Any
    if config.index == "flat" or (config.index == "ivf" and size < 4 * _POINTS_PER_CELL):
        index = faiss.IndexFlatIP(width)
    elif config.index == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = config.ef
    else:
        nlist = min(config.nlist or int(4 * size**0.5), size // _POINTS_PER_CELL)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, nlist, faiss.METRIC_INNER_PRODUCT)
        index.train(data)
        index.nprobe = min(config.nprobe, nlist)
    index.add(data)
    return index


def search_index(gallery: Tensor, config: SearchConfig) -> Any:
    """Return what :func:`topk_neighbours` can search again and again: a faiss index, or ``None`` where torch searches.

    Args:
        gallery: (N, d).
        config: Search backend.
    """
    exact_on_device = gallery.is_cuda and config.index == "flat"
    if config.resolve() == "torch" or exact_on_device or gallery.dtype != torch.float32:
        return None
    return build_faiss_index(gallery.cpu(), config)


def _candidates_faiss(queries: Tensor, index: Any, count: int) -> tuple[Tensor, Tensor]:
    scores, found = index.search(queries.detach().float().contiguous().numpy(), count)
    return torch.from_numpy(scores), torch.from_numpy(found)


def topk_neighbours(
    queries: Tensor, gallery: Tensor, k: int, *, config: SearchConfig | None = None, index: Any = None
) -> Tensor:
    """Return the k gallery rows with the largest inner product for every query.

    Args:
        queries: (Q, d) float32 or float64, on any device.
        gallery: (N, d), same type.
        k: Neighbours per query; cut to N.
        config: Search backend; ``None`` is :class:`SearchConfig`'s default.
        index: A faiss index over ``gallery`` from :func:`build_faiss_index`, to search it again without building it again.

    Returns:
        (Q, min(k, N)) int64, each row sorted by rising gallery index. With an exact backend the set is the one that the
        module's definition gives. With an approximate index a slot that the index could not fill repeats the row's first
        neighbour.

    Raises:
        UserError: The features are not finite, or the backend is not installed.
    """
    if not (bool(torch.isfinite(queries).all()) and bool(torch.isfinite(gallery).all())):
        raise UserError("features to search hold NaN or infinity; check the checkpoint or the feature bank they come from.")
    config = config or SearchConfig()
    size = gallery.shape[0]
    k = min(k, size)
    if queries.shape[0] == 0:
        return torch.empty(0, k, dtype=torch.long, device=queries.device)
    if k == size:
        return torch.arange(size, device=queries.device).expand(queries.shape[0], size).contiguous()
    approximate = config.index != "flat"
    backend = config.resolve()
    if queries.is_cuda and not approximate:
        backend = "torch"
    count = k if approximate else min(size, k + 12)
    if backend == "faiss" and queries.dtype == torch.float32:
        if index is None:
            index = build_faiss_index(gallery.cpu(), config)
        scores, found = _candidates_faiss(queries.cpu(), index, count)
        scores, found = scores.to(queries.device), found.to(queries.device)
        if approximate:
            return torch.where(found < 0, found[:, :1], found).clamp_min(0).sort(dim=1).values
    else:
        scores, found = _candidates_torch(queries, gallery, count)
    result = found[:, :k].sort(dim=1).values

    scale = queries.norm(dim=1) * gallery.norm(dim=1).max()
    tolerance = TOLERANCE * scale.clamp_min(1e-30)
    unclear = (scores[:, k - 1] - scores[:, k] <= tolerance).nonzero().flatten()
    if len(unclear):
        result[unclear] = _decide(queries[unclear], gallery, scores[unclear], found[unclear], k, tolerance[unclear])
    return result


def _decide(queries: Tensor, gallery: Tensor, scores: Tensor, found: Tensor, k: int, tolerance: Tensor) -> Tensor:
    """Return the defined top-k sets of rows whose candidates are too close to call."""
    out = torch.empty(queries.shape[0], k, dtype=torch.long, device=queries.device)
    size = gallery.shape[0]
    enough = (
        scores[:, -1] < scores[:, k - 1] - 2 * tolerance if scores.shape[1] < size else torch.ones_like(tolerance).bool()
    )
    easy = enough.nonzero().flatten()
    if len(easy):
        exact = exact_scores(queries[easy], gallery, found[easy])
        out[easy] = _stable_topk(exact, found[easy], k)
    hard = (~enough).nonzero().flatten()
    step = max(1, _BLOCK_ELEMENTS // max(1, size))
    gallery64 = gallery.double() if len(hard) else gallery
    for start in range(0, len(hard), step):
        rows = hard[start : start + step]
        full = (queries[rows].double() @ gallery64.t()).float()
        out[rows] = full.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return out.sort(dim=1).values


@dataclass(frozen=True)
class ReciprocalGraph:
    """Neighbour lists with the reciprocal mask M of METHODS 1 (paper eqs. 3 and 4), N rows, K slots.

    Attributes:
        index: (N, K) int64, neighbours sorted by rising row number; unused slots point at the row itself.
        mask: (N, K) bool, True where the edge is reciprocal; the diagonal is always True. The masked graph is symmetric.
        reverse: (N, K) int64, flat position in the (N, K) layout of the opposite edge j -> i of an edge i -> j; the slot's
            own position where ``mask`` is False.
    """

    index: Tensor
    mask: Tensor
    reverse: Tensor

    def to(self, device: torch.device | str) -> ReciprocalGraph:
        """Return the graph on another device."""
        return ReciprocalGraph(self.index.to(device), self.mask.to(device), self.reverse.to(device))


def reciprocal_graph(neighbours: Tensor) -> ReciprocalGraph:
    """Build the symmetric graph of reciprocal neighbours.

    Args:
        neighbours: (N, k) row numbers, each row sorted, from :func:`topk_neighbours` of a set with itself.

    Returns:
        The graph; M_ij = 1 iff j is in row i and i in row j, and M_ii = 1.
    """
    size, _ = neighbours.shape
    device = neighbours.device
    own = torch.arange(size, device=device).unsqueeze(1)
    index = neighbours
    missing = ~(index == own).any(dim=1, keepdim=True)
    if bool(missing.any()):
        extra = torch.where(missing, own, torch.full_like(own, size))
        index = torch.cat([index, extra], dim=1).sort(dim=1).values
    duplicate = torch.zeros_like(index, dtype=torch.bool)
    duplicate[:, 1:] = index[:, 1:] == index[:, :-1]
    unused = (index == size) | duplicate
    keys = (own * (size + 1) + index).flatten()
    position = torch.empty_like(keys)
    hit = torch.empty_like(keys, dtype=torch.bool)
    slots = index.shape[1]
    step = max(1, (1 << 22) // slots) * slots
    for start in range(0, keys.numel(), step):
        part = slice(start, start + step)
        rows = torch.arange(start, min(start + step, keys.numel()), device=device) // slots
        wanted = index.flatten()[part] * (size + 1) + rows
        found = torch.searchsorted(keys, wanted).clamp_max(keys.numel() - 1)
        position[part] = found
        hit[part] = keys[found] == wanted
    flat = torch.arange(keys.numel(), device=device)
    mask = hit.view_as(index) & ~unused
    reverse = torch.where(mask.flatten(), position, flat).view_as(index)
    return ReciprocalGraph(index=torch.where(unused, own, index), mask=mask, reverse=reverse)


def kth_scores(queries: Tensor, gallery: Tensor, neighbours: Tensor) -> Tensor:
    """Return the defining score of every query's least similar neighbour, (Q,) float32.

    A new gallery row would enter a query's list iff its score is above this value (it comes last among equals).

    Args:
        queries: (Q, d).
        gallery: (N, d), the searched rows.
        neighbours: (Q, k) from :func:`topk_neighbours`.
    """
    out = torch.empty(queries.shape[0], dtype=torch.float32, device=queries.device)
    step = 4096
    for start in range(0, queries.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = exact_scores(queries[rows], gallery, neighbours[rows]).amin(dim=1)
    return out


def inductive_mask(forward: Tensor, own: Tensor, backward: Tensor, thresholds: Tensor, *, k: int, size: int) -> Tensor:
    """Return which gallery neighbours a query keeps when it is alone with the gallery.

    The set is the gallery followed by the query. Gallery row j is kept iff j is among the query's k nearest of that set
    (the query itself included) and the query would be among the k nearest of j.

    Args:
        forward: (Q, s) scores of the query with its s = min(k, N) nearest gallery rows, by rising gallery index.
        own: (Q,) score of the query with itself.
        backward: (Q, s) scores of these gallery rows with the query.
        thresholds: (Q, s) the gallery rows' own k-th scores (see :func:`kth_scores`).
        k: Neighbours per image.
        size: Gallery rows N.

    Returns:
        (Q, s) bool.
    """
    if size < k:
        return torch.ones_like(forward, dtype=torch.bool)
    order = forward.sort(dim=1, descending=True, stable=True).indices
    last = torch.zeros_like(forward, dtype=torch.bool).scatter_(1, order[:, -1:], True)
    displaced = last & (own.unsqueeze(1) > forward)
    return ~displaced & (backward > thresholds)
