"""Ranking and re-ranking beside torchreid's own functions: time, peak memory, equality.

Run ``python benchmarks/ranking.py`` from the root of the repository (``OMP_NUM_THREADS=2`` for two threads everywhere).
The features are synthetic: ten near-duplicates per identity, unit length, 512 dimensions. The host's Python ranking takes
a minute at full size, so it gets the first 200 queries, and its time is scaled, unless ``--full`` is given.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relreid_plugin.functional.distance import pairwise_distance
from relreid_plugin.functional.ranking import evaluate_features, evaluate_ranking
from relreid_plugin.functional.reranking import k_reciprocal_rerank, k_reciprocal_rerank_features

MARKET = (3368, 15913)  # queries and gallery images of Market-1501
SMALL = (1000, 4000)


def resident() -> float:
    """Memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Peak:
    """Largest growth of the process's memory inside a ``with`` block, MiB; looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        gc.collect()
        if sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # freed memory that the allocator keeps would hide growth
        self.start = self.top = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.top = max(self.top, resident())

    def __exit__(self, *_: object) -> None:
        self.top = max(self.top, resident())
        self.done.set()
        self.thread.join()

    @property
    def mib(self) -> float:
        return self.top - self.start


def measure(function: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """Result, median seconds and peak MiB (of one more, watched call)."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    del result
    with Peak() as peak:
        result = function()
    return result, statistics.median(times), peak.mib


def scene(queries: int, gallery: int, noise: float = 0.05) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Features of queries and gallery; identities and cameras of both."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    pids = rng.permutation(np.arange(queries + gallery) // 10)
    centres = torch.nn.functional.normalize(torch.randn(pids.max() + 1, 512, generator=generator), dim=1)
    features = centres[torch.from_numpy(pids)] + noise * torch.randn(queries + gallery, 512, generator=generator)
    features = torch.nn.functional.normalize(features, dim=1)
    camids = rng.integers(0, 6, queries + gallery)
    labels = [pids[:queries], pids[queries:], camids[:queries], camids[queries:]]
    return features[:queries], features[queries:], labels


def argsort_loop(distances: np.ndarray, labels: list[np.ndarray]) -> float:
    """mAP with one argsort and a few vector operations per query: what compiled rankings do, their sort included."""
    q_pids, g_pids, q_cams, g_cams = labels
    total = []
    for row, pid, cam in zip(distances, q_pids, q_cams):
        order = np.argsort(row)
        match = g_pids[order] == pid
        match = match[~(match & (g_cams[order] == cam))]
        ranks = np.flatnonzero(match) + 1
        if len(ranks):
            total.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    return float(np.mean(total))


def ranking_rows(repeats: int, full: bool) -> list[dict[str, Any]]:
    from torchreid.reid.metrics.rank import eval_market1501

    query, gallery, labels = scene(*MARKET)
    distances = pairwise_distance(query, gallery).numpy()
    used = MARKET[0] if full else 200
    q_pids, g_pids, q_cams, g_cams = labels
    part = (q_pids[:used], g_pids, q_cams[:used], g_cams)
    begin = time.perf_counter()
    cmc, mean_ap = eval_market1501(distances[:used], *part, 50)
    host = (time.perf_counter() - begin) * MARKET[0] / used
    ours = evaluate_ranking(distances[:used], *part)
    gap = max(abs(ours.mAP - mean_ap), float(np.abs(ours.cmc - cmc).max()))
    begin = time.perf_counter()
    loop_map = argsort_loop(distances, labels)
    loop = time.perf_counter() - begin
    result, seconds, peak = measure(lambda: evaluate_ranking(distances, *labels), repeats)
    note = "" if full else f", {used} queries scaled"
    rows = [
        row("ranking 3,368 x 15,913", f"host, Python{note}", host, seconds, peak, gap, 1e-6),
        row("ranking 3,368 x 15,913", "one argsort per query", loop, seconds, peak, abs(loop_map - result.mAP), 1e-6),
    ]
    _, product, _ = measure(lambda: pairwise_distance(query, gallery), repeats)
    streamed, seconds, peak = measure(lambda: evaluate_features(query, gallery, *labels), repeats)
    gap = abs(streamed.mAP - result.mAP)
    rows.append(row("the same from features", "matrix, then argsort", product + loop, seconds, peak, gap, 1e-6))
    return rows


def reranking_rows(size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    from torchreid.reid.utils.rerank import re_ranking

    query, gallery, _ = scene(*size)
    pairs = ((query, gallery), (query, query), (gallery, gallery))
    matrices = [pairwise_distance(x, y).numpy() for x, y in pairs]
    output = size[0] * size[1] * 4 / 2**20
    ours, seconds, peak = measure(lambda: k_reciprocal_rerank(*matrices), repeats)
    with Peak() as host_peak:
        begin = time.perf_counter()
        want = re_ranking(*matrices)
        host = time.perf_counter() - begin
    title = f"re-ranking {size[0]:,} x {size[1]:,}"
    first = row(title, "host", host, seconds, peak - output, float(np.abs(ours - want).max()), 1e-5)
    first["reference_mib"] = host_peak.mib - output
    again, seconds, peak = measure(lambda: k_reciprocal_rerank_features(query, gallery), repeats)
    share = float((np.abs(ours - again) > 1e-5).mean())
    second = row(f"{title} from features", "host without the matrix product", host, seconds, peak - output, share, 1e-3)
    return [first, second]


def row(
    work: str, reference: str, reference_s: float, seconds: float, peak: float, gap: float, limit: float
) -> dict[str, Any]:
    return {
        "work": work,
        "reference": reference,
        "reference_s": reference_s,
        "seconds": seconds,
        "ratio": reference_s / seconds,
        "peak_mib": max(0.0, peak),
        "difference": float(gap),
        "equal": bool(gap <= limit),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls, of which the median is shown")
    parser.add_argument("--full", action="store_true", help="host ranking on all queries, and re-ranking at 3,368 x 15,913")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    rows = ranking_rows(args.repeats, args.full)
    for size in (SMALL, MARKET) if args.full else (SMALL,):
        rows += reranking_rows(size, args.repeats)
    head = f"{'work':<42}{'reference':<36}{'reference s':>12}{'s':>9}{'ratio':>8}{'peak MiB':>10}{'difference':>12}  equal"
    print(f"{args.threads} threads; peak MiB is memory above the inputs and the result.")
    print("Difference is the largest one; for re-ranking from features the share beyond 1e-5 (near-ties in float32).")
    print(f"{head}\n{'-' * len(head)}")
    for r in rows:
        print(
            f"{r['work']:<42}{r['reference']:<36}{r['reference_s']:>12.3f}{r['seconds']:>9.3f}{r['ratio']:>7.1f}x"
            f"{r['peak_mib']:>10.0f}{r['difference']:>12.1e}  {'yes' if r['equal'] else 'NO'}"
        )
        if "reference_mib" in r:
            print(f"{'':<42}{'host peak MiB':<36}{r['reference_mib']:>12.0f}")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0 if all(r["equal"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
