"""Nearest-neighbour search and reciprocal-neighbour graphs.

Shape letters: N gallery rows, Q query rows, d width, k neighbours, K slots of a graph row (k, or k + 1 where a row's own
entry is not among its k nearest).

Neighbour sets are defined exactly and independently of how the search was blocked, so that a row's set does not depend on
which other rows were searched in the same call: scores are inner products summed in float64 and rounded to float32, and
equal scores are ordered by the lower index.

The exact search multiplies in tiles that stay in the cache, in bfloat16 where the processor is built for it. Every row has a
*bar*: its k-th best product so far, lowered by twice the largest error that a product may have. Nothing below the bar can
belong to the row's neighbours; what is above is kept, scored anew and decided by the definition. A tile is first reduced to
the maxima of groups of columns, and only groups whose maximum is above the bar are looked at. A set searched in itself needs
half of the tiles. Rows with more candidates than there is room for are searched again in full precision, then in float64.
The index ``scan`` is the same search over int8 products with a bar that is lowered by the likely instead of the largest
error: it may miss a neighbour now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, is_installed, needed
from .candidates import _CHUNK, _FEW, TOLERANCE, _candidates, _choose, _decide, _room
from .reciprocal import ReciprocalGraph as ReciprocalGraph
from .reciprocal import reciprocal_graph as reciprocal_graph

POINTS_PER_CELL = 39
"""Training points that faiss wants per IVF cell."""


def faiss_available() -> bool:
    """Return whether faiss can be imported."""
    return is_installed("faiss")


@dataclass(frozen=True)
class SearchConfig:
    """How neighbours are searched.

    Attributes:
        backend: ``auto`` (torch for ``flat`` and ``scan``, faiss for ``ivf`` and ``hnsw``), ``faiss`` or ``torch``. CUDA
            tensors use torch wherever it has the index.
        index: ``flat`` (exact), ``scan`` (every row by int8 products, nearly exact; for rows of similar norm; torch only),
            ``ivf`` or ``hnsw`` (approximate, faiss only).
        nlist: IVF cells; 0 chooses ``4 * sqrt(N)``.
        nprobe: IVF cells visited per query.
        ef: HNSW search width.
        precision: Of the products that choose torch's candidates: ``full`` (the features' own), ``bfloat16``, ``int8``, or
            ``auto``, the quickest that the processor is built for: bfloat16 for ``flat``, int8 for ``scan``. With ``flat``
            it changes the time, never the result; float64 features always use ``full``.
    """

    backend: str = "auto"
    index: str = "flat"
    nlist: int = 0
    nprobe: int = 32
    ef: int = 128
    precision: str = "auto"

    def resolve(self) -> str:
        """Return ``faiss`` or ``torch``.

        Raises:
            UserError: faiss is asked for, directly or by an approximate index, and is not installed, or cannot do it.
        """
        if self.index == "scan" and self.backend == "faiss":
            raise UserError("relation.search.index 'scan' is torch's; set 'relation.search.backend auto' for it.")
        if self.backend == "torch" or (self.backend == "auto" and self.index in ("flat", "scan")):
            return "torch"
        if faiss_available():
            return "faiss"
        raise UserError(
            f"relation.search asks for faiss (backend '{self.backend}', index '{self.index}'), which is not installed; "
            "run 'pip install faiss-cpu', or set 'relation.search.backend torch' and 'relation.search.index flat'."
        )


def normalise(features: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Return the rows of ``features`` (N, d) scaled to unit length; zero rows stay zero."""
    return features / features.norm(dim=-1, keepdim=True).clamp_min(eps)


def _kind(queries: Tensor, config: SearchConfig) -> torch.dtype:
    """Return the type that the candidates' products are multiplied in."""
    named = {"bfloat16": torch.bfloat16, "int8": torch.int8}
    if queries.dtype == torch.float64 or config.precision == "full":
        return queries.dtype
    if queries.is_cuda:  # its bfloat16 sums may be rounded on the way
        return torch.bfloat16 if config.index == "scan" else queries.dtype
    if config.precision in named:
        return named[config.precision]
    able = {name for name, present in getattr(torch.cpu, "get_capabilities", dict)().items() if present is True}
    if len(queries) < _FEW:
        return queries.dtype
    if config.index == "scan" and able & {"avx512_vnni", "avx_vnni_int8", "amx_int8"}:
        return torch.int8
    return torch.bfloat16 if able & {"avx512_bf16", "amx_bf16"} else queries.dtype


def _search_all(queries: Tensor, gallery: Tensor, k: int, config: SearchConfig) -> Tensor:
    """Return the (Q, k) neighbours from the products of all pairs."""
    if len(gallery) <= _room(k):
        return _decide(queries, gallery, k)
    certain = config.index != "scan"
    best = _candidates(queries, gallery, k, _kind(queries, config), certain=certain)
    result, doubtful = _choose(queries, gallery, k, best)
    if not certain:
        doubtful = best.count < k
    rows = doubtful.nonzero().flatten()
    if len(rows) and best.scores.dtype != queries.dtype:
        del best
        result[rows] = _search_all(queries[rows], gallery, k, SearchConfig(precision="full"))
    elif len(rows):
        result[rows] = _decide(queries[rows], gallery, k)
    return result


def ivf_cells(size: int, config: SearchConfig) -> int:
    """Return how many cells an IVF index of ``size`` rows gets."""
    return min(config.nlist or int(4 * size**0.5), size // POINTS_PER_CELL)


def build_faiss_index(gallery: Tensor, config: SearchConfig) -> Any:
    """Return a faiss inner-product index over ``gallery`` (N, d) of the kind that ``config`` names."""
    faiss = needed("faiss", "an index of faiss")

    data = gallery.detach().float().contiguous().numpy()
    size, width = data.shape
    index: Any
    if config.index == "flat" or (config.index == "ivf" and size < 4 * POINTS_PER_CELL):
        index = faiss.IndexFlatIP(width)
    elif config.index == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = config.ef
    else:
        nlist = ivf_cells(size, config)
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
    return build_faiss_index(gallery.cpu(), config) if _searched_by(gallery, config) == "faiss" else None


def _searched_by(features: Tensor, config: SearchConfig) -> str:
    """Return ``faiss`` or ``torch``; faiss knows float32 only."""
    exact_on_device = features.is_cuda and config.index == "flat"
    return "torch" if exact_on_device or features.dtype != torch.float32 else config.resolve()


def _search_faiss(queries: Tensor, gallery: Tensor, k: int, config: SearchConfig, index: Any) -> Tensor:
    """Return the (Q, k) neighbours that a faiss index finds; by the definition where it is exact."""
    index = index or build_faiss_index(gallery.cpu(), config)
    count = min(len(gallery), k + 12) if config.index == "flat" else k
    scores, found = (torch.from_numpy(part) for part in index.search(queries.detach().cpu().contiguous().numpy(), count))
    if config.index != "flat":
        found = torch.where(found < 0, found[:, :1], found).clamp_min(0)
        return found.sort(dim=1).values.to(queries.device)
    tolerance = 2 * TOLERANCE * gallery.norm(dim=1).max() * queries.norm(dim=1)
    unclear = ~(scores[:, k - 1] - scores[:, k] > tolerance)
    result = found[:, :k].sort(dim=1).values
    if bool(unclear.any()):
        result[unclear] = _search_all(queries[unclear], gallery, k, SearchConfig(precision="full"))
    return result


def topk_neighbours(
    queries: Tensor, gallery: Tensor, k: int, *, config: SearchConfig | None = None, index: Any = None
) -> Tensor:
    """Return the k gallery rows with the largest inner product for every query.

    A set is searched in itself in about half the time where ``queries`` and ``gallery`` are one and the same tensor. Beside
    the result, the exact search holds a bfloat16 copy of the features, 8 bytes for each of 4 k + 48 candidates of a row, and
    a few dozen MiB (``scan``: an int8 copy and 200 MiB).

    Args:
        queries: (Q, d) float32 or float64, on any device.
        gallery: (N, d), same type.
        k: Neighbours per query; cut to N.
        config: Search backend; ``None`` is :class:`SearchConfig`'s default.
        index: A faiss index over ``gallery`` from :func:`build_faiss_index`, to search it again without building it again.

    Returns:
        (Q, min(k, N)) int64, each row sorted by rising gallery index. With ``flat`` the set is the one that the module's
        definition gives. With an approximate index a slot that the index could not fill repeats the row's first neighbour.

    Raises:
        UserError: The features are not finite, or the backend is not installed.
    """
    for features in (queries,) if queries is gallery else (queries, gallery):
        if not all(bool(torch.isfinite(part).all()) for part in features.split(_CHUNK)):
            raise UserError(
                "features to search hold NaN or infinity; check the checkpoint or the feature bank they come from."
            )
    config = config or SearchConfig()
    size = gallery.shape[0]
    k = min(k, size)
    if queries.shape[0] == 0:
        return torch.empty(0, k, dtype=torch.long, device=queries.device)
    if k == size:
        return torch.arange(size, device=queries.device).expand(queries.shape[0], size).contiguous()
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        if _searched_by(queries, config) == "faiss":
            return _search_faiss(queries, gallery, k, config, index)
        return _search_all(queries, gallery, k, config)


def recall(found: Tensor, truth: Tensor) -> float:
    """Return the mean share of the true neighbours that were found.

    Args:
        found: (Q, s) row numbers.
        truth: (Q, k) row numbers, different ones within a row.
    """
    hits = sum(
        int((left.unsqueeze(1) == right.unsqueeze(2)).any(dim=2).sum())
        for left, right in zip(found.split(_CHUNK), truth.split(_CHUNK))
    )
    return hits / truth.numel()
