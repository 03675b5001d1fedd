"""Neighbour lists beside one dense product with top-k: time, peak memory, equality; approximate lists of a million images.

Run ``python benchmarks/neighbours.py`` from the root of the repository (``--list`` names the rows, ``--million`` adds the
one that takes minutes). Features are synthetic: ten near-duplicates per identity, unit length, 512 dimensions; k = 20, so
that half of a list are images of other identities that are hardly nearer than the rest.
"""

from __future__ import annotations

import sys
import time

import torch
from common import Peak, alternate, features
from harness import Gate, Line, Row, Settings, main, ratio
from torch import Tensor

from relreid_plugin.metrics.candidates import TOLERANCE
from relreid_plugin.metrics.neighbours import SearchConfig, build_faiss_index, recall, topk_neighbours

K = 20
MARKET = 19281
SAMPLE = 2000
MINUTES = 10


def dense_lists(x: Tensor, k: int) -> Tensor:
    """(N, k) neighbours by one N x N product."""
    return (x @ x.t()).topk(k, dim=1).indices


def disagreement(x: Tensor, ours: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of rows whose sets differ, and how far the differing neighbours' similarities lie apart at most.

    Args:
        x: (N, d).
        ours, reference: (N, k) lists, in any order.
    """
    a, b = ours.sort(dim=1).values, reference.sort(dim=1).values
    rows = (a != b).any(dim=1).nonzero().flatten()
    apart = 0.0
    for row in rows.tolist():
        first, second = set(a[row].tolist()), set(b[row].tolist())
        odd = torch.tensor(sorted(first ^ second))
        scores = x[odd].double() @ x[row].double()
        apart = max(apart, float(scores.max() - scores.min()))
    return len(rows) / len(x), apart


def exact(settings: Settings) -> list[Line]:
    """Exact lists."""
    size = settings.pick(MARKET, 1500)
    x = features(size)
    timed = alternate({"ours": lambda: topk_neighbours(x, x, K), "reference": lambda: dense_lists(x, K)}, settings.repeats)
    ours, dense = timed["ours"], timed["reference"]
    share, apart = disagreement(x, ours.result, dense.result)
    line = Line(f"k-NN graph, N={size:,}, k={K}", "dense product, top-k", dense.seconds, ours.seconds, dense.mib, ours.mib)
    line.difference, line.equal = share, apart <= TOLERANCE
    line.values = {"apart": apart}
    line.notes = [
        f"difference: share of rows whose sets differ; the neighbours that differ are {apart:.0e} apart in similarity "
        f"(gate: {TOLERANCE:.0e}, near-ties of float32)"
    ]
    return [line]


def million(settings: Settings) -> list[Line]:
    """Approximate lists: all pairs by int8 products, and an IVF index."""
    size, sample = settings.pick(1_000_000, 20_000), settings.pick(SAMPLE, 200)
    x = features(size)
    picked = torch.linspace(0, size - 1, sample).long()
    wanted = torch.cat([(x[part] @ x.t()).topk(K, dim=1).indices for part in picked.split(200)])
    lines = []
    for index in ("scan", "ivf"):
        config = SearchConfig(index=index)
        line = Line(f"k-NN graph, N={size:,}, k={K}, {index}", "exact lists of a sample", variant=index == "ivf")
        with Peak() as peak:
            begin = time.perf_counter()
            if index == "scan":
                found = topk_neighbours(x, x, K, config=config)[picked]
                line.seconds = time.perf_counter() - begin
            else:
                made = build_faiss_index(x, config)
                built = time.perf_counter()
                found = topk_neighbours(x[picked], x, K, config=config, index=made)
                line.seconds = built - begin + (time.perf_counter() - built) * size / sample
        line.mib = peak.mib
        line.values = {"recall": recall(found, wanted), "recall10": recall(found, wanted[:, : K // 2])}
        line.notes = [
            f"recall@{K} {line.values['recall']:.4f} of {sample:,} rows; of their {K // 2} nearest "
            f"{line.values['recall10']:.4f}; {settings.threads} threads"
        ]
        lines.append(line)
    lines[1].notes[0] += f", nprobe {config.nprobe}; the index, and the search of {sample:,} rows scaled to all"
    return lines


ROWS = [
    Row(
        "knn-19281",
        "k-NN graph, 19,281",
        f"k-NN graph, N={MARKET:,}, k={K}",
        exact,
        must=(ratio(1.4), Gate("mib", MARKET**2 * 4 / 2**20, at_most=True, text="no N x N")),
        aim=(ratio(2.5),),
        needs=3500.0,
    ),
    Row(
        "knn-million",
        "k-NN graph, 1,000,000",
        f"k-NN graph, N=1,000,000, k={K}",
        million,
        must=(Gate("recall", 0.0, text="recall reported"),),
        aim=(Gate("recall", 0.97, text="recall 0.97"), Gate("seconds", 60.0 * MINUTES, at_most=True, text=f"{MINUTES} min")),
        needs=7500.0,
        when="million",
    ),
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
