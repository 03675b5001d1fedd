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

import importlib.util
import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

TOLERANCE = 4e-6
"""Largest float32 rounding difference of a unit-norm inner product that the candidate search may show."""

_BLOCK_ELEMENTS = 1 << 24
POINTS_PER_CELL = 39
"""Training points that faiss wants per IVF cell."""
_TILE_BYTES = 1 << 13  # of a tile's row
_INT8_TILE = 3  # times as long with int8 products: they are so quick that the overhead of a tile counts
_GROUP = 16  # columns of a tile that share one maximum
_CHUNK = 4096  # rows that are converted or scored at a time
_FEW = 256  # queries that do not repay a copy of the gallery in another precision
_CLIP = 4.5  # standard deviations of a rotated coordinate that int8 covers
_HALF_ULP = {torch.bfloat16: 2.0**-8}  # relative rounding error of a stored product that counts


def faiss_available() -> bool:
    """Return whether faiss can be imported."""
    return importlib.util.find_spec("faiss") is not None


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


def _defined_set(scores: Tensor, k: int) -> Tensor:
    """Return the columns (rows, k) of the k largest ``scores`` (rows, n), rising; of equal scores the first ones."""
    level = scores.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, ties = scores > level, scores == level
    wanted = k - above.sum(dim=1, keepdim=True)
    return (above | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= wanted))).nonzero()[:, 1].view(-1, k)


def _decide(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """Return the (Q, k) neighbours by the definition, from all products in float64."""
    size = gallery.shape[0]
    parts = [torch.empty(0, k, dtype=torch.long, device=queries.device)]
    for rows in queries.split(max(1, _BLOCK_ELEMENTS // size)):
        scores = torch.empty(len(rows), size, device=queries.device)
        for start in range(0, size, _CHUNK):
            columns = slice(start, start + _CHUNK)
            scores[:, columns] = rows.double() @ gallery[columns].double().t()
        parts += [_defined_set(part, k) for part in scores.split(max(1, len(rows) // 4))]
    return torch.cat(parts)


@dataclass(frozen=True)
class _Packed:
    """Features in the type that is multiplied: ``x`` is about ``data * unit``.

    Attributes:
        data: (N, d).
        unit: Value of 1 in ``data``.
        norm: (N,) float32, the rows' lengths.
        error: (N,) float32, the lengths of what the type cannot hold.
    """

    data: Tensor
    unit: float
    norm: Tensor
    error: Tensor


def _pack(features: Tensor, kind: torch.dtype) -> _Packed:
    """Return ``features`` (N, d) as ``kind``: as they are, bfloat16 or int8.

    int8 has one scale for all rows. A rotation by a random orthogonal matrix spreads every row evenly over the coordinates
    first; it leaves inner products as they are.
    """
    norm = features.norm(dim=1).float()
    if kind == features.dtype:
        reduced = kind == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        return _Packed(features, 1.0, norm, norm * (2.0**-7 if reduced else TOLERANCE / 2))
    dim, device = features.shape[1], features.device
    data, error, unit = torch.empty_like(features, dtype=kind), torch.empty_like(norm), 1.0
    if kind == torch.int8:
        unit = max(_CLIP / 127 * float(norm.max()) / math.sqrt(dim), 1e-30)
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))[0].to(device) / unit
    for start in range(0, len(features), _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = features[rows].float()
        if kind == torch.int8:
            part = part @ rotation
            data[rows] = part.round().clamp_(-127, 127)
        else:
            data[rows] = part
        error[rows] = (part - data[rows]).norm(dim=1) * unit
    return _Packed(data, unit, norm, error)


class _Candidates:
    """What was found above the rows' bars so far.

    Args:
        rows: Rows R.
        k: Neighbours.
        error: (R,) error of a row's products, in their unit: the part that does not depend on the product.
        relative: The part that grows with the product.
        kind: Type of the products.
    """

    def __init__(self, rows: int, k: int, error: Tensor, relative: float, kind: torch.dtype) -> None:
        device = error.device
        self.k, self.room, self.error, self.relative = k, _room(k), error, relative
        self.lowest = -math.inf if kind.is_floating_point else torch.iinfo(kind).min
        self.scores = torch.full((rows, self.room), self.lowest, dtype=kind, device=device)
        self.index = torch.zeros((rows, self.room), dtype=torch.int32, device=device)
        self.count = torch.zeros(rows, dtype=torch.long, device=device)
        self.bar = torch.full((rows,), -math.inf, dtype=torch.promote_types(kind, torch.float32), device=device)
        self.dropped = self.bar.clone()  # best product that found no room

    def lift(self, rows: Tensor, maxima: Tensor) -> None:
        """Raise the bars of ``rows`` (r,), given maxima (r, g) of groups to come, and keep what is above."""
        scores, index = self.scores[rows], self.index[rows]
        best = torch.cat([scores, maxima], dim=1).topk(self.k, dim=1, sorted=False).values.amin(dim=1).to(self.bar.dtype)
        size = best.abs().clamp_max_(torch.finfo(best.dtype).max)
        # 2.02: once up, once down, and 1% for the roundings of this line and of the definition itself
        bar = torch.maximum(self.bar[rows], best - 2.02 * (self.error[rows] + self.relative * size))
        kept = scores > bar.unsqueeze(1)
        row, slot = kept.nonzero(as_tuple=True)
        place = (row, kept.cumsum(dim=1)[row, slot] - 1)
        self.scores[rows] = torch.full_like(scores, self.lowest).index_put_(place, scores[row, slot])
        self.index[rows] = torch.zeros_like(index).index_put_(place, index[row, slot])
        self.count[rows], self.bar[rows] = kept.sum(dim=1), bar

    def offer(self, start: int, groups: Tensor, maxima: Tensor, first: int) -> None:
        """Take what is above the bars of a tile.

        Args:
            start: First row of the tile.
            groups: (r, g, s) products, any strides; the tile's column j is member j // g of group j % g.
            maxima: (r, g), those of the groups.
            first: Index of the tile's first column.
        """
        rows = slice(start, start + len(maxima))
        row, group = _where(maxima > self.bar[rows].unsqueeze(1))
        if not len(row):
            return
        found = row.bincount(minlength=len(maxima))
        count, fresh = self.count[rows] + found, self.bar[rows] == -math.inf
        if bool(((count > self.room * 3 // 4) | fresh).any()):
            some = ((count > self.room // 2) | fresh).nonzero().flatten()  # together with those that would come soon
            self.lift(some + start, maxima[some])
            still = (maxima[row, group] > self.bar[rows][row]).nonzero().flatten()
            row, group = row[still], group[still]
        value = groups[row, group]
        hit, member = (value > self.bar[rows][row].unsqueeze(1)).nonzero(as_tuple=True)
        row, order = row[hit].sort()
        hit, member = hit[order], member[order]
        column, value = group[hit] + member * groups.shape[1] + first, value[hit, member]
        found = row.bincount(minlength=len(maxima))
        place = torch.arange(len(row), device=row.device) + (self.count[rows] + found - found.cumsum(dim=0))[row]
        self.count[rows] += found
        row += start
        lost = place >= self.room
        if bool(lost.any()):
            self.count[rows].clamp_max_(self.room)
            self.dropped.scatter_reduce_(0, row[lost], value[lost].to(self.bar.dtype), "amax")
            row, column, value, place = row[~lost], column[~lost], value[~lost], place[~lost]
        place += row * self.room
        self.scores.view(-1)[place] = value
        self.index.view(-1)[place] = column.int()


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the set entries of ``mask`` in the order of its memory."""
    flipped = not mask.is_contiguous()
    mask = mask.t() if flipped else mask
    if mask.shape[1] % 8:
        row, column = mask.nonzero(as_tuple=True)
    else:  # few are set: 8 at once
        words = mask.view(torch.int64)
        row, word = words.nonzero(as_tuple=True)
        hit, byte = words[row, word].view(torch.bool).view(-1, 8).nonzero(as_tuple=True)
        row, column = row[hit], 8 * word[hit] + byte
    return (column, row) if flipped else (row, column)


def _room(k: int) -> int:
    """Candidates of a row that are kept at a time."""
    return 4 * k + 48


def _candidates(queries: Tensor, gallery: Tensor, k: int, kind: torch.dtype, *, certain: bool) -> _Candidates:
    """Search all pairs by products of type ``kind``; ``certain``: keep all that the definition may want."""
    same = queries is gallery
    there = _pack(gallery, kind)
    here = there if same else _pack(queries, kind)
    reach, blur = float(there.norm.max()), float(there.error.max())
    error = here.error * (reach + blur) + here.norm * blur  # Cauchy-Schwarz
    if kind != gallery.dtype:
        error = error + gallery.shape[1] * 2.0**-24 * here.norm * reach  # float32 sums
    if not certain:
        error = error / math.sqrt(gallery.shape[1])  # errors of independent signs
    error = error.clamp_min(1e-30).to(torch.promote_types(gallery.dtype, torch.float32)) / (here.unit * there.unit)
    product = torch.int32 if kind == torch.int8 else kind
    best = _Candidates(len(queries), k, error, _HALF_ULP.get(product, 0.0), product)

    side = _TILE_BYTES * (_INT8_TILE if kind == torch.int8 else 1) // product.itemsize
    height = min(side, len(queries) + -len(queries) % _GROUP)
    width = height if same else min(side * side // height // _GROUP * _GROUP, len(gallery) + -len(gallery) % _GROUP)
    buffer = torch.empty(height * width, dtype=product, device=queries.device)
    rows = range(0, len(queries), height)
    pairs: Iterable[tuple[int, int]] = itertools.product(rows, range(0, len(gallery), width))
    if same:  # the diagonal first: it sets the bars
        pairs = itertools.chain(zip(rows, rows), itertools.combinations(rows, 2))
    for i, j in pairs:
        left, right = _rows(here.data, i, height), _rows(there.data, j, width)
        tile = buffer[: len(left) * len(right)].view(len(left), len(right))
        (torch._int_mm if kind == torch.int8 else torch.mm)(left, right.t(), out=tile)
        tile[:, len(gallery) - j :], tile[len(queries) - i :] = best.lowest, best.lowest
        inner = tile.unflatten(1, (_group(len(right), k), -1))
        valid = slice(0, len(queries) - i)
        best.offer(i, inner.transpose(1, 2)[valid], inner.amax(dim=1)[valid], j)
        if same and i != j:
            outer = tile.unflatten(0, (_group(len(left), k), -1))
            valid = slice(0, len(gallery) - j)
            best.offer(j, outer.permute(2, 1, 0)[valid], outer.amax(dim=0).t()[valid], i)
    return best


def _rows(data: Tensor, start: int, count: int) -> Tensor:
    """Return rows of ``data``, filled up with zeros to whole groups."""
    part = data[start : start + count]
    return F.pad(part, (0, 0, 0, -len(part) % _GROUP)) if len(part) % _GROUP else part


def _group(columns: int, k: int) -> int:
    """Return how many of a tile's ``columns``, a multiple of ``_GROUP``, share a maximum, so that there are 2 k maxima."""
    size = _GROUP
    while size > 1 and columns < 2 * k * size:
        size //= 2
    return size


def _listed_scores(queries: Tensor, gallery: Tensor, index: Tensor, listed: Tensor) -> tuple[Tensor, float]:
    """Score chosen pairs quickly.

    Args:
        queries: (Q, d).
        gallery: (N, d).
        index: (Q, s) gallery rows per query.
        listed: (Q, s) bool, the pairs to score.

    Returns:
        (Q, s) float32 scores, minus infinity where not listed, and their largest error for rows of unit length.
    """
    if queries.is_cuda:
        return exact_scores(queries, gallery, index).masked_fill_(~listed, -math.inf), 0.0
    ends = F.pad(listed.sum(dim=1).cumsum(dim=0), (1, 0)).int()
    columns = index[listed]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            ends, columns, queries.new_zeros(len(columns)), (len(index), len(gallery)), check_invariants=False
        )
        values = torch.sparse.sampled_addmm(pattern, queries, gallery.t(), beta=0.0).values()
    scores = torch.full(index.shape, -math.inf)
    scores[listed] = values.float()
    return scores, 0.0 if queries.dtype == torch.float64 else TOLERANCE


def _choose(queries: Tensor, gallery: Tensor, k: int, best: _Candidates) -> tuple[Tensor, Tensor]:
    """Return the (Q, k) neighbours among the candidates and (Q,) whether a row has too few or has lost some."""
    result = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
    reach = gallery.norm(dim=1).max()
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, start + _CHUNK)
        some = queries[rows]
        best.lift(torch.arange(start, start + len(some), device=queries.device), best.scores[rows, :0])
        count = best.count[rows].unsqueeze(1)
        width = max(k, int(count.max()))
        index = best.index[rows, :width]
        listed = torch.arange(width, device=index.device) < count
        scores, error = _listed_scores(some, gallery, index, listed)
        top, slots = scores.topk(min(k + 1, width), dim=1)
        result[rows] = index.gather(1, slots[:, :k]).sort(dim=1).values
        unclear = top[:, k - 1] - top[:, -1] <= 2 * error * reach * some.norm(dim=1)
        unclear = unclear.nonzero().flatten() if width > k else unclear.new_empty(0, dtype=torch.long)
        index, order = index[unclear].masked_fill(~listed[unclear], len(gallery)).sort(dim=1)
        exact = exact_scores(some[unclear], gallery, index.clamp_max(len(gallery) - 1))
        exact.masked_fill_(index == len(gallery), -math.inf)
        result[unclear + start] = index.gather(1, _defined_set(exact, k)).long()
    return result, (best.count < k) | ~(best.dropped <= best.bar)


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
    import faiss

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


@dataclass(frozen=True)
class ReciprocalGraph:
    """Neighbour lists with the reciprocal mask M of METHODS 1 (paper eqs. 3 and 4), N rows, K slots.

    Attributes:
        index: (N, K) int64, neighbours sorted by rising row number; unused slots point at the row itself.
        mask: (N, K) bool, True where the edge is reciprocal; the diagonal is always True. The masked graph is symmetric.
        reverse: (N, K) int64, flat position in the (N, K) layout of the opposite edge j -> i of an edge i -> j; the slot's
            own position where ``mask`` is False. ``None``: left out; only gradients need it, which are slower without.
        bias: (N, K) added to the affinities of the edges; ``None``: nothing.
    """

    index: Tensor
    mask: Tensor
    reverse: Tensor | None
    bias: Tensor | None = None

    def to(self, device: torch.device | str) -> ReciprocalGraph:
        """Return the graph on another device."""
        reverse = None if self.reverse is None else self.reverse.to(device)
        bias = None if self.bias is None else self.bias.to(device)
        return ReciprocalGraph(self.index.to(device), self.mask.to(device), reverse, bias)


def reciprocal_graph(neighbours: Tensor, *, reverse: bool = True) -> ReciprocalGraph:
    """Build the symmetric graph of reciprocal neighbours.

    Args:
        neighbours: (N, k) row numbers, each row sorted, from :func:`topk_neighbours` of a set with itself.
        reverse: Also find the position of every opposite edge.

    Returns:
        The graph; M_ij = 1 iff j is in row i and i in row j, and M_ii = 1.
    """
    size, slots = neighbours.shape
    device = neighbours.device
    numbers = torch.arange(size, device=device).unsqueeze(1)
    step = max(1, (1 << 20) // slots)
    complete = all(bool((rows == own).any(dim=1).all()) for rows, own in zip(neighbours.split(step), numbers.split(step)))
    slots += not complete
    index = torch.empty(size, slots, dtype=torch.long, device=device)
    for start in range(0, size, step):  # a row without its own number gets it, the others an unused slot
        rows = slice(start, start + step)
        found, own = neighbours[rows], numbers[rows]
        if not complete:
            extra = torch.where((found == own).any(dim=1, keepdim=True), size, own)
            found = torch.cat([found, extra], dim=1).sort(dim=1).values
        index[rows] = found
    mask = torch.empty(size, slots, dtype=torch.bool, device=device)
    opposite = torch.empty_like(index) if reverse else None
    flat = index.view(-1)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        own, base = numbers[rows], index[rows] * slots
        place = torch.zeros_like(base)  # entries of the neighbour's list below the own number, by bisection
        for jump in (1 << bit for bit in reversed(range(slots.bit_length()))):
            probe = place + jump
            below = (probe <= slots) & (flat[(base + probe - 1).clamp_max_(flat.numel() - 1)] < own)
            place = torch.where(below, probe, place)
        place = (base + place.clamp_max_(slots - 1)).clamp_max_(flat.numel() - 1)
        mask[rows] = (flat[place] == own) & ~_unused(index[rows], size)
        if opposite is not None:
            here = torch.arange(start * slots, start * slots + place.numel(), device=device).view_as(place)
            opposite[rows] = torch.where(mask[rows], place, here)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        index[rows] = torch.where(_unused(index[rows], size), numbers[rows], index[rows])
    return ReciprocalGraph(index=index, mask=mask, reverse=opposite)


def _unused(index: Tensor, size: int) -> Tensor:
    """Return where sorted rows (n, K) hold ``size`` or a number for the second time."""
    unused = index == size
    unused[:, 1:] |= index[:, 1:] == index[:, :-1]
    return unused


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
