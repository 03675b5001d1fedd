"""Ranking and re-ranking beside compiled rankings and torchreid's own functions: time, peak memory, equality.

Run ``python benchmarks/ranking.py`` from the root of the repository (``--list`` names the rows). Features are synthetic: ten
images per identity, unit length, 512 dimensions. The ranking is judged beside a counting sort and a walk down the ranks in C
(``ranking_reference.c``, compiled on the fly), which no released ranking has, on as many threads as ours. What it has
reached it must keep beside what released compiled rankings do, on one thread as they run: numpy's argsort and a compiled
walk, or torchreid's own where it was compiled and is faster. torchreid's Python ranking takes a minute at full size, so it
gets the first 200 queries and its time is scaled.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, available_memory, features, identities
from harness import Line, Row, Settings, main, memory, ratio

from relreid_plugin.metrics.distance import pairwise_distance
from relreid_plugin.metrics.ranking import RankingResult, evaluate_features, evaluate_ranking
from relreid_plugin.metrics.reranking import k_reciprocal_rerank, k_reciprocal_rerank_features

MARKET = (3368, 15913)  # queries and gallery images of Market-1501
SMALL = (1000, 4000)
CAMERAS = 6
MAX_RANK = 50
BLOCK = 256  # queries whose orders are held at a time: whole matrices of orders are slower
NEAR, FAR = 1.13, 2.5  # noise of near-duplicates, and one that leaves the ranking mistakes to find
LIMIT, LIMIT_RERANK, LIMIT_SHARE = 1e-6, 1e-5, 1e-3
FLAGS = (("-O3", "-march=native"), ("-O3",))

Array = np.ndarray
Labels = list[Array]
"""Identities of queries and gallery, cameras of queries and gallery."""
Ranking = Callable[[Array, Labels], "Scores"]


@dataclass
class Scores:
    """What a ranking returns."""

    mAP: float
    mINP: float | None
    cmc: Array

    def gap(self, other: RankingResult | Scores) -> float:
        """Largest difference of mAP, CMC and, where there is one, mINP."""
        ranks = min(len(self.cmc), len(other.cmc))
        gaps = [abs(self.mAP - other.mAP), float(np.abs(self.cmc[:ranks] - other.cmc[:ranks]).max())]
        if self.mINP is not None and other.mINP is not None:
            gaps.append(abs(self.mINP - other.mINP))
        return max(gaps)


def scene(queries: int, gallery: int, *, noise: float) -> tuple[torch.Tensor, torch.Tensor, Labels]:
    """Features of queries and gallery; identities and cameras of both."""
    rng = np.random.default_rng(0)
    total = queries + gallery
    order = rng.permutation(total)
    rows = features(total, noise=noise)[torch.from_numpy(order)]
    pids = order % identities(total)
    cams = rng.integers(0, CAMERAS, total)
    return rows[:queries], rows[queries:], [pids[:queries], pids[queries:], cams[:queries], cams[queries:]]


def compiled_library(folder: Path) -> ctypes.CDLL | None:
    """Compile ``ranking_reference.c`` into a folder; ``None`` without a working compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source, library = Path(__file__).with_name("ranking_reference.c"), folder / "ranking_reference.so"
    for flags in FLAGS:
        command = [compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return ctypes.CDLL(str(library))
    return None


def _pointer(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def stable_order(distances: Array) -> Array:
    """Argsort of every row, ties in gallery order."""
    return np.argsort(distances, axis=1, kind="stable")


def numpy_order(distances: Array) -> Array:
    """Argsort of every row, ties in any order: the default, which released rankings take."""
    return np.argsort(distances, axis=1)


def compiled_order(library: ctypes.CDLL) -> Callable[[Array], Array]:
    """Argsort of every row by the compiled counting sort."""

    def order(distances: Array) -> Array:
        out = np.empty(distances.shape, dtype=np.int64)
        counts = (ctypes.c_int64(distances.shape[0]), ctypes.c_int64(distances.shape[1]))
        if library.argsort_rows(_pointer(distances), *counts, _pointer(out)):
            raise MemoryError
        return out

    return order


def compiled_walk(library: ctypes.CDLL) -> Callable[..., None]:
    """The walk down the ranks, compiled."""

    def walk(order: Array, labels: Labels, ap: Array, inp: Array, first: Array) -> None:
        counts = (ctypes.c_int64(order.shape[0]), ctypes.c_int64(order.shape[1]))
        library.walk(_pointer(order), *counts, *map(_pointer, labels), _pointer(ap), _pointer(inp), _pointer(first))

    return walk


def vector_walk(order: Array, labels: Labels, ap: Array, inp: Array, first: Array) -> None:
    """The walk down the ranks by a few vector operations per query."""
    q_pids, g_pids, q_cams, g_cams = labels
    for row, ranked in enumerate(order):
        match = g_pids[ranked] == q_pids[row]
        match = match[~(match & (g_cams[ranked] == q_cams[row]))]
        ranks = np.flatnonzero(match) + 1
        first[row] = ranks[0] if len(ranks) else 0
        ap[row] = np.mean(np.arange(1, len(ranks) + 1) / ranks) if len(ranks) else 0.0
        inp[row] = len(ranks) / ranks[-1] if len(ranks) else 0.0


def rank(
    distances: Array,
    labels: Labels,
    order: Callable[[Array], Array],
    walk: Callable[..., None],
    *,
    threads: int = 1,
) -> Scores:
    """Scores by one argsort per query.

    Args:
        distances: (Q, G) float32.
        labels: See :data:`Labels`.
        order: Argsort of rows.
        walk: Fills AP, INP and the first hit's rank of some queries.
        threads: That share the queries; more than one pays where order and walk are compiled.
    """
    count = len(distances)
    ap, inp, first = np.zeros(count), np.zeros(count), np.zeros(count, dtype=np.int64)
    q_pids, g_pids, q_cams, g_cams = (np.ascontiguousarray(each, dtype=np.int64) for each in labels)
    step = BLOCK // threads

    def work(start: int) -> None:
        part = slice(start, start + step)
        own = [q_pids[part], g_pids, q_cams[part], g_cams]
        walk(order(np.ascontiguousarray(distances[part])), own, ap[part], inp[part], first[part])

    starts = range(0, count, step)
    if threads == 1:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts))
    valid = first > 0
    cmc = (first[valid, None] <= np.arange(1, MAX_RANK + 1)).mean(axis=0)
    return Scores(float(ap[valid].mean()), float(inp[valid].mean()), cmc)


def host_compiled() -> Ranking | None:
    """torchreid's compiled ranking, where it was compiled; it has no mINP."""
    try:
        from torchreid.reid.metrics.rank_cylib.rank_cy import evaluate_cy
    except ImportError:
        return None

    def evaluate(distances: Array, labels: Labels) -> Scores:
        own = [np.asarray(each, dtype=np.int64) for each in labels]
        cmc, mean_ap = evaluate_cy(np.asarray(distances, dtype=np.float32), *own, MAX_RANK, False)
        return Scores(float(mean_ap), None, np.asarray(cmc))

    return evaluate


def references(folder: Path, distances: Array, labels: Labels, threads: int) -> dict[str, Ranking]:
    """Return the rankings to compare with, by name.

    The first one is judged: it sorts by counting, on several threads. The second one is what ours must keep its distance
    from: of torchreid's compiled ranking, where there is one, and numpy's argsort with a compiled walk, which is what
    released compiled rankings do, the one that is faster on some queries. Without a compiler there is one with a walk by
    vector operations.

    Args:
        folder: Where the compiled one is put.
        distances: (Q, G).
        labels: See :data:`Labels`.
        threads: Of the first one.
    """
    host, library = host_compiled(), compiled_library(folder)
    released: dict[str, Ranking] = {} if host is None else {"torchreid, compiled": host}
    own: dict[str, Ranking] = {}
    if library is not None:
        walk, order = compiled_walk(library), compiled_order(library)
        released["numpy's argsort, compiled walk"] = lambda d, each: rank(d, each, numpy_order, walk)
        own[f"counting sort in C, {threads} threads"] = lambda d, each: rank(d, each, order, walk, threads=threads)
    if not released:
        return {"no compiler: numpy's argsort, vector walk": lambda d, each: rank(d, each, numpy_order, vector_walk)}
    if len(released) > 1:
        q_pids, g_pids, q_cams, g_cams = labels
        some = slice(0, 2 * BLOCK)
        part = [q_pids[some], g_pids, q_cams[some], g_cams]
        tried = alternate({name: lambda form=form: form(distances[some], part) for name, form in released.items()}, 3)
        best = min(tried, key=lambda name: tried[name].seconds)
        released = {best: released[best]}
    return {**own, **released}


def compare(
    work: str,
    ours: Callable[[], RankingResult],
    others: Mapping[str, Callable[[], Scores]],
    wanted: Scores,
    repeats: int,
) -> list[Line]:
    """One line per reference.

    Args:
        work: What is computed.
        ours: Our scores.
        others: Scores of the references, by name.
        wanted: Scores with ties in gallery order, which ours must be equal to.
        repeats: See :func:`alternate`.
    """
    timed = alternate({"ours": ours, **others}, repeats)
    own = timed["ours"]
    gap = wanted.gap(own.result)
    lines: list[Line] = []
    for name in others:
        other = timed[name]
        line = Line(work, name, other.seconds, own.seconds, other.mib, own.mib, gap, gap <= LIMIT)
        line.values = {"reference_gap": other.result.gap(own.result)}
        lines.append(line)
    lines[0].notes = [
        "difference: from a stable argsort of the same distances (from the reference: "
        f"{lines[0].values['reference_gap']:.0e})"
    ]
    return lines


def ranking(settings: Settings) -> list[Line]:
    """Ranking of given distances: beside the counting sort, and what is to be kept."""
    query, gallery, labels = scene(*settings.pick(MARKET, (120, 900)), noise=FAR)
    distances = pairwise_distance(query, gallery).numpy()
    work = f"mAP/CMC/mINP {len(query):,}x{len(gallery):,}"
    wanted = rank(distances, labels, stable_order, vector_walk)
    with tempfile.TemporaryDirectory() as folder:
        forms = references(Path(folder), distances, labels, settings.threads)
        others = {name: partial(form, distances, labels) for name, form in forms.items()}
        lines = compare(work, lambda: evaluate_ranking(distances, *labels), others, wanted, settings.repeats)
    for line in lines[1:]:
        line.kept = True
    return [*lines, *_host_ranking(work, distances, labels, lines[0])]


def _host_ranking(work: str, distances: Array, labels: Labels, line: Line) -> list[Line]:
    """torchreid's Python ranking of some queries, scaled; nothing without torchreid."""
    try:
        from torchreid.reid.metrics.rank import eval_market1501
    except ImportError:
        return []
    used = min(200, len(distances))
    q_pids, g_pids, q_cams, g_cams = labels
    part = (q_pids[:used], g_pids, q_cams[:used], g_cams)
    begin = time.perf_counter()
    cmc, mean_ap = eval_market1501(distances[:used], *part, MAX_RANK)
    seconds = (time.perf_counter() - begin) * len(distances) / used
    gap = Scores(float(mean_ap), None, cmc).gap(evaluate_ranking(distances[:used], *part))
    other = Line(work, f"torchreid, Python ({used} queries, scaled)", seconds, line.seconds, mib=line.mib, variant=True)
    other.difference, other.equal = gap, gap <= LIMIT
    return [other]


def ranking_from_features(settings: Settings) -> list[Line]:
    """Ranking of features, without the matrix of distances."""
    query, gallery, labels = scene(*settings.pick(MARKET, (120, 900)), noise=FAR)
    work = f"the same from features, {len(query):,}x{len(gallery):,}"
    distances = pairwise_distance(query, gallery).numpy()
    wanted = rank(distances, labels, stable_order, vector_walk)

    def from_matrix(form: Ranking) -> Scores:
        return form(pairwise_distance(query, gallery).numpy(), labels)

    with tempfile.TemporaryDirectory() as folder:
        forms = references(Path(folder), distances, labels, settings.threads)
        del distances
        others = {f"matrix; {name}": partial(from_matrix, form) for name, form in forms.items()}
        lines = compare(work, lambda: evaluate_features(query, gallery, *labels), others, wanted, settings.repeats)
    lines.reverse()  # kept is what was reached beside released rankings
    lines[0].kept = True
    for line in lines[1:]:
        line.variant = True
    return lines


class _StableNumpy:
    """numpy, whose argsort leaves equal values in their order."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def argsort(values: Array) -> Array:
        return np.argsort(values, kind="stable")


def by_stable_sort(function: Callable[[], Array]) -> Array:
    """What torchreid's re-ranking gives where equal distances stay in gallery order.

    Its argsort leaves them in any order, and numpy's one for AVX-512 in another than that for AVX2.
    """
    module = import_module("torchreid.reid.utils.rerank")
    before, module.np = module.np, _StableNumpy()
    try:
        return function()
    finally:
        module.np = before


def reranking(size: tuple[int, int], settings: Settings) -> list[Line]:
    """Re-ranking of given distances, and straight from features as a variant."""
    query, gallery, _ = scene(*settings.pick(size, (80, 320)), noise=NEAR)
    matrices = [pairwise_distance(x, y).numpy() for x, y in ((query, gallery), (query, query), (gallery, gallery))]
    work = f"k-reciprocal re-ranking {len(query):,}x{len(gallery):,}"
    forms: dict[str, Callable[[], Array]] = {
        "ours": lambda: k_reciprocal_rerank(*matrices),
        "features": lambda: k_reciprocal_rerank_features(query, gallery),
    }
    total = sum(size) if not settings.quick else 400
    need, free = 6.2 * total**2 * 4 / 2**20, available_memory()
    reference, notes = "torchreid", []
    try:
        from torchreid.reid.utils.rerank import re_ranking

        if need < free:
            forms["reference"] = lambda: re_ranking(*matrices)
        else:
            reference = f"torchreid: needs {need / 1024:.1f} GiB"
            notes = [f"the reference needs {need / 1024:.1f} GiB, {free / 1024:.1f} GiB are available"]
    except ImportError:
        reference = "torchreid: not installed"
    timed = alternate(forms, settings.repeats)
    ours, streamed, other = timed["ours"], timed["features"], timed.get("reference")
    line = Line(work, reference, other and other.seconds, ours.seconds, other and other.mib, ours.mib, notes=notes)
    if other:
        line.difference = float(np.abs(ours.result - other.result).max())
        if line.difference > LIMIT_RERANK:
            share = float((np.abs(ours.result - other.result) > LIMIT_RERANK).mean())
            line.difference = float(np.abs(ours.result - by_stable_sort(forms["reference"])).max())
            line.notes.append(
                f"difference: from torchreid with a stable sort; its own, which leaves equal distances in any order, moves "
                f"{100 * share:.4f} % of the values by more than {LIMIT_RERANK:.0e} on this processor"
            )
        line.equal = line.difference <= LIMIT_RERANK
    share = float((np.abs(ours.result - streamed.result) > LIMIT_RERANK).mean())
    second = Line(f"{work}, from features", f"{reference}, product not timed", line.reference_s, streamed.seconds)
    second.reference_mib, second.mib, second.variant = line.reference_mib, streamed.mib, True
    second.difference, second.equal = share, share <= LIMIT_SHARE
    second.notes = [f"difference: share of values that differ by more than {LIMIT_RERANK:.0e} (near-ties of float32)"]
    return [line, second]


ROWS = [
    Row(
        "ranking",
        "ranking",
        "mAP/CMC/mINP 3,368x15,913",
        ranking,
        must=(ratio(2), memory(150)),
        aim=(ratio(4),),
        kept=(ratio(6),),
        needs=1500.0,
    ),
    Row(
        "ranking-features",
        "ranking",
        "the same from features, 3,368x15,913",
        ranking_from_features,
        kept=(ratio(3), memory(150)),
        needs=1500.0,
    ),
    Row(
        "reranking-1000",
        "k-reciprocal re-ranking",
        "k-reciprocal re-ranking 1,000x4,000",
        lambda settings: reranking(SMALL, settings),
        must=(ratio(15),),
        aim=(ratio(25),),
    ),
    Row(
        "reranking-market",
        "k-reciprocal re-ranking",
        "k-reciprocal re-ranking 3,368x15,913",
        lambda settings: reranking(MARKET, settings),
        must=(ratio(20), memory(512)),
        aim=(ratio(30),),
        needs=3500.0,
    ),
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
