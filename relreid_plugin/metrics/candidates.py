"""Candidates of the exact search: all pairs in tiles, by cheap products that are certain enough, decided by exact ones."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 4e-6
"""Largest float32 rounding difference of a unit-norm inner product that the candidate search may show."""

_BLOCK_ELEMENTS = 1 << 24

_TILE_BYTES = 1 << 13  # of a tile's row

_INT8_TILE = 3  # times as long with int8 products: they are so quick that the overhead of a tile counts

_GROUP = 16  # columns of a tile that share one maximum

_CHUNK = 4096  # rows that are converted or scored at a time

_FEW = 256  # queries that do not repay a copy of the gallery in another precision

_CLIP = 4.5  # standard deviations of a rotated coordinate that int8 covers

_HALF_ULP = {torch.bfloat16: 2.0**-8}  # relative rounding error of a stored product that counts


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
    chosen = above | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= wanted))
    if not scores.is_cuda:
        return chosen.nonzero()[:, 1].view(-1, k)
    place = torch.where(chosen, chosen.cumsum(dim=1) - 1, k)  # nonzero has the host wait for the number of rows, k is known
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(place)
    return columns.new_empty(len(scores), k + 1).scatter_(1, place, columns)[:, :k]


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
