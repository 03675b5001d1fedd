"""The table of a GPU: every piece of work beside its dense form on the same card, and how much of the card it uses.

Run ``python benchmarks/gpu.py`` from the root of the repository; it takes any card that torch can use, and ends with one
sentence and exit code 2 where there is none. First the card is measured: bytes per second of a large copy, and operations
per second of large matrix products in float32 (without TF32) and in bfloat16. A row's shares are what it needs at least,
operations and bytes that cannot be left out, divided by its time and by these rates; the larger of the two says how near
the card's limit it is. Times are medians of synchronised calls that alternate between both forms, after one of each; memory
is the peak that the allocator gave out above what was there before.

Features are synthetic as in the other benchmarks. The dense forms hold N x N matrices, and are left out where these do not
fit. ``--json`` keeps every number; results that differ from the dense form's end the command with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DIM, features, table
from neighbours import dense_lists, disagreement
from ranking import MARKET, MAX_RANK, scene
from relation import K, Problem, encoder_operations, gap
from torch import Tensor

from relreid_plugin.errors import did_you_mean
from relreid_plugin.metrics.graph import gnn_rerank
from relreid_plugin.metrics.neighbours import normalise, topk_neighbours
from relreid_plugin.metrics.ranking import evaluate_features, evaluate_ranking
from relreid_plugin.metrics.reciprocal import reciprocal_graph
from relreid_plugin.metrics.reranking import k_reciprocal_rerank_features

NO_CARD = "no GPU that torch can use was found, and this table is one of a GPU; benchmarks/targets.py measures a CPU."
HEAD = ("work", "dense form", "dense ms", "ours ms", "ratio", "dense MiB", "our MiB", "difference", "equal")
HEAD = (*HEAD, "of matrix rate", "of bandwidth")
LIMIT, LIMIT_HALF, LIMIT_RERANK, LIMIT_SCORE = 1e-4, 5e-2, 1e-4, 1e-5


@dataclass(frozen=True)
class Card:
    """A device and what it can do.

    Attributes:
        device: For torch.
        name: Of the card.
        bandwidth: Bytes per second of a copy, read and written.
        rates: Operations per second of matrix products, by type.
        quick: Whether sizes are small, for a try-out.
        repeats: Timed calls of each form.
    """

    device: torch.device
    name: str
    bandwidth: float
    rates: dict[str, float]
    quick: bool = False
    repeats: int = 7

    def pick(self, full: Any, quick: Any) -> Any:
        """Return the first, or the second for a try-out."""
        return quick if self.quick else full


@dataclass
class Result:
    """A line of the table.

    Attributes:
        work: What is computed.
        dense: Name of the dense form.
        seconds, dense_seconds: Medians; ``None`` where a form did not run.
        mib, dense_mib: Peak memory above what was there before.
        difference: Largest difference of the results.
        equal: Whether it is within the limit.
        operations, bytes: What the work needs at least.
        kind: Type whose matrix rate counts.
        note: Sentence below the table.
    """

    work: str
    dense: str = "-"
    seconds: float | None = None
    dense_seconds: float | None = None
    mib: float | None = None
    dense_mib: float | None = None
    difference: float | None = None
    equal: bool | None = None
    operations: float = 0.0
    bytes: float = 0.0
    kind: str = "float32"
    note: str = ""

    def shares(self, card: Card) -> tuple[float | None, float | None]:
        """Shares of the matrix rate and of the bandwidth."""
        if not self.seconds:
            return None, None
        rate = self.operations / self.seconds / card.rates[self.kind]
        return rate or None, self.bytes / self.seconds / card.bandwidth or None

    def cells(self, card: Card) -> list[str]:
        """What the table shows."""
        ratio = self.dense_seconds / self.seconds if self.dense_seconds and self.seconds else None
        shares = [_said(share and 100 * share, "{:.1f} %") for share in self.shares(card)]
        times = [_said(value and 1000 * value, "{:.3g}") for value in (self.dense_seconds, self.seconds)]
        memory = [_said(value, "{:.0f}") for value in (self.dense_mib, self.mib)]
        equal = {True: "yes", False: "NO", None: "-"}[self.equal]
        return [
            *(self.work, self.dense, *times, _said(ratio, "{:.3g}x"), *memory, _said(self.difference, "{:.1e}")),
            *(equal, *shares),
        ]


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


# --- measuring ----------------------------------------------------------------------------------------------------------
def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device, *, reset: bool = False) -> int:
    """Peak bytes that the allocator has given out; with ``reset`` what is given out now, from where the peak counts anew."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return torch.cuda.max_memory_allocated(device)


def clock(device: torch.device, function: Callable[[], Any]) -> tuple[float, Any]:
    """Call a function and return its seconds, all work of the device done, and its result."""
    _wait(device)
    begin = time.perf_counter()
    result = function()
    _wait(device)
    return time.perf_counter() - begin, result


def measure_card(device: torch.device, *, quick: bool = False, repeats: int = 7) -> Card:
    """Measure a card: the best of several copies, and of several matrix products per type."""
    size, side = (1 << 16, 128) if quick else (1 << 28, 8192)
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    times = [clock(device, partial(target.copy_, source))[0] for _ in range(3 + repeats)]
    bandwidth = 2 * source.numel() * source.element_size() / min(times[3:])
    rates = {}
    for kind in ("float32", "bfloat16"):
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, kind)) for _ in range(2))
        times = [clock(device, partial(torch.mm, a, b))[0] for _ in range(3 + repeats)]
        rates[kind] = 2 * side**3 / min(times[3:])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Card(device, name, bandwidth, rates, quick, repeats)


@dataclass
class Form:
    """One form of the work, timed: see :func:`compare`."""

    function: Callable[[], Any]
    times: list[float] = field(default_factory=list)
    mib: float | None = None
    result: Any = None
    problem: str = ""

    def call(self, device: torch.device, *, watch: bool = False) -> None:
        """Call it once; with ``watch`` its memory is looked at, and its time is not kept."""
        self.result = None
        before = _memory(device, reset=True) if watch else 0
        try:
            seconds, self.result = clock(device, self.function)
        except torch.cuda.OutOfMemoryError:
            self.problem = "does not fit into the card's memory"
            return
        if not watch:
            self.times.append(seconds)
        else:
            self.mib = (_memory(device) - before) / 2**20


def compare(card: Card, result: Result, ours: Callable[[], Any], dense: Callable[[], Any] | None = None) -> tuple[Any, Any]:
    """Time both forms in turns and note it in ``result``; return what they computed last."""
    forms = [Form(ours), *([] if dense is None else [Form(dense)])]
    for form in forms:
        form.call(card.device, watch=True)
    for _ in range(card.repeats):
        for form in forms:
            if not form.problem:
                form.call(card.device)
    result.seconds = statistics.median(forms[0].times) if forms[0].times else None
    result.mib = forms[0].mib
    if forms[0].problem:
        result.note = f"{result.work}: ours {forms[0].problem}"
    if dense is not None:
        result.dense_seconds = statistics.median(forms[1].times) if forms[1].times else None
        result.dense_mib = forms[1].mib
        if forms[1].problem:
            result.dense = f"{result.dense}: {forms[1].problem}"
    return forms[0].result, forms[-1].result if dense is not None else None


def judge(result: Result, difference: float, limit: float) -> None:
    """Note a difference and whether it is within a limit."""
    result.difference, result.equal = difference, difference <= limit


# --- the rows -----------------------------------------------------------------------------------------------------------
def image_features(card: Card) -> list[Result]:
    """A network's forward pass on images in memory, in float32 and bfloat16 with channels last."""
    import torchvision
    from torch.utils.flop_counter import FlopCounterMode

    name, batch, size = card.pick(("resnet50", 256, (256, 128)), ("resnet18", 2, (32, 16)))
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).eval().to(card.device)
    images = torch.randn(batch, 3, *size, device=card.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    weights = 4 * sum(value.numel() for value in network.parameters())
    last = network.to(memory_format=torch.channels_last)
    lines = []
    for kind in ("float32", "bfloat16"):
        work = f"features, {name}, {batch} images of {size[0]}x{size[1]}, {kind}"
        result = Result(work, "float32, channels first", operations=float(counter.get_total_flops()), kind=kind)
        result.bytes = weights + 4 * images.numel()
        laid = images.to(memory_format=torch.channels_last)

        def ours(kind: str = kind, laid: Tensor = laid) -> Tensor:
            with torch.no_grad(), torch.autocast(card.device.type, torch.bfloat16, enabled=kind == "bfloat16"):
                return last(laid).float()

        def plain() -> Tensor:
            with torch.no_grad():
                return network(images)

        found, wanted = compare(card, result, ours, plain)
        judge(result, float((found - wanted).abs().max() / wanted.abs().max()), LIMIT if kind == "float32" else LIMIT_HALF)
        lines.append(result)
    return lines


def neighbour_graph(card: Card) -> list[Result]:
    """Neighbour lists and their reciprocal graph."""
    size = card.pick(sum(MARKET), 300)
    x = normalise(features(size)).to(card.device)
    lists = Result(f"k-NN lists, N={size:,}, k={K}", "N x N product, top-k", operations=2.0 * size**2 * DIM)
    lists.bytes = 4.0 * size * DIM + 8.0 * size * K
    ours, dense = compare(card, lists, lambda: topk_neighbours(x, x, K), lambda: dense_lists(x, K))
    if dense is not None:
        _, apart = disagreement(x.cpu(), ours.cpu(), dense.cpu())
        judge(lists, apart, LIMIT)
    graph = Result(f"reciprocal graph, N={size:,}, k={K}", "N x N mask and its transpose")
    graph.bytes = (8.0 + 8.0 + 1.0) * size * K

    def mask() -> Tensor:
        out = torch.zeros(size, size, dtype=torch.bool, device=card.device).scatter_(1, ours, True)
        return out & out.t()

    found, wanted = compare(card, graph, lambda: reciprocal_graph(ours), mask)
    if wanted is not None:
        edges = torch.zeros_like(wanted)
        rows = torch.arange(size, device=card.device)[:, None].expand_as(found.index)
        edges[rows[found.mask], found.index[found.mask]] = True
        judge(graph, float((edges != wanted).sum()), 0.0)
    return [lists, graph]


def moved(problem: Problem, device: torch.device) -> Problem:
    """Put a problem of the relation encoder on a device."""
    problem.x, problem.lists, problem.weights = (value.to(device) for value in (problem.x, problem.lists, problem.weights))
    problem.rows[:] = [rows.to(device) for rows in problem.rows]
    for module in (problem.encoder, problem.half, problem.dense):
        module.to(device)
    return problem


def relations(card: Card, *, training: bool) -> list[Result]:
    """The relation encoder in testing, or a training step of it, in float32 and bfloat16."""
    size = card.pick(2048 if training else 7000, 60)
    lines = []
    for attention in ("nformer", "magformer"):
        problem = moved(Problem(attention, size, training=training, dim=card.pick(DIM, 32)), card.device)
        times = 3 if training else 1  # a backward pass has two products for one of the forward pass
        for kind, ours in (("float32", problem.ours), ("bfloat16", problem.in_bfloat16)):
            what = "training step" if training else "encoder"
            result = Result(f"{attention}, {what}, N={size:,}, {kind}", "released dense form", kind=kind)
            result.operations = times * encoder_operations(problem.encoder, size)
            own = sum(value.numel() for value in problem.encoder.parameters())
            result.bytes = times * 4.0 * (own + 2 * size * problem.encoder.dim)
            found, wanted = compare(card, result, ours, problem.reference)
            if wanted is not None:
                judge(result, gap(found, wanted), LIMIT if kind == "float32" else LIMIT_HALF)
            lines.append(result)
    return lines


def rankings(card: Card) -> list[Result]:
    """mAP, CMC and mINP from features, beside the whole matrix of distances."""
    queries, gallery = card.pick(MARKET, (30, 170))
    query, others, labels = scene(queries, gallery, noise=2.5)
    query, others = query.to(card.device), others.to(card.device)
    result = Result(f"mAP/CMC/mINP {queries:,}x{gallery:,} from features", "Q x G matrix, sorted on the card")
    result.operations, result.bytes = 2.0 * queries * gallery * DIM, 4.0 * (queries + gallery) * DIM

    def dense() -> Any:
        distances = torch.cdist(query, others, compute_mode="use_mm_for_euclid_dist")
        distances.argsort(dim=1, stable=True)
        return evaluate_ranking(distances, *labels, max_rank=MAX_RANK)

    found, wanted = compare(card, result, lambda: evaluate_features(query, others, *labels, max_rank=MAX_RANK), dense)
    if wanted is not None:
        judge(result, max(abs(found.mAP - wanted.mAP), float(np.abs(found.cmc - wanted.cmc).max())), LIMIT_SCORE)
    return [result]


def dense_k_reciprocal(query: Tensor, gallery: Tensor, *, k1: int = 20, k2: int = 6, share: float = 0.3) -> Tensor:
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017) by N x N matrices on the features' device.

    Args:
        query: (Q, d).
        gallery: (G, d).
        k1, k2: See :func:`~relreid_plugin.metrics.reranking.k_reciprocal_rerank`.
        share: Of the scaled distance in the result.

    Returns:
        (Q, G) distances.
    """
    x = torch.cat([query, gallery])
    distances = torch.cdist(x, x).square()
    distances /= distances.max(dim=1, keepdim=True).values
    order = distances.argsort(dim=1, stable=True)

    def mutual(k: int) -> Tensor:
        near = torch.zeros_like(distances).scatter_(1, order[:, : k + 1], 1.0)
        return near * near.t()

    near, half = mutual(k1), mutual(round(k1 / 2))
    joins = (near @ half.t() > 2 / 3 * half.sum(dim=1)) & (near > 0)
    members = (near + joins.to(near.dtype) @ half) > 0
    weights = torch.exp(-distances) * members
    weights /= weights.sum(dim=1, keepdim=True)
    if k2 > 1:
        weights = torch.stack([weights[row].mean(dim=0) for row in order[:, :k2]])
    shared = torch.stack([torch.minimum(row, weights[len(query) :]).sum(dim=1) for row in weights[: len(query)]])
    jaccard = 1 - shared / (2 - shared)
    return (1 - share) * jaccard + share * distances[: len(query), len(query) :]


def reranking(card: Card) -> list[Result]:
    """k-reciprocal re-ranking beside its dense form on the card, and GNN re-ranking, which was published for cards."""
    queries, gallery = card.pick(MARKET, (30, 170))
    query, others, _ = scene(queries, gallery, noise=1.13)
    query, others = query.to(card.device), others.to(card.device)
    total = queries + gallery
    lines = [Result(f"k-reciprocal re-ranking {queries:,}x{gallery:,}", "N x N matrices")]
    lines.append(Result(f"GNN re-ranking {queries:,}x{gallery:,}"))
    for line in lines:
        line.operations, line.bytes = 2.0 * total**2 * DIM, 4.0 * (total * DIM + queries * gallery)
    found, wanted = compare(
        card, lines[0], lambda: k_reciprocal_rerank_features(query, others), lambda: dense_k_reciprocal(query, others)
    )
    if wanted is not None:  # a near-tie that flips changes a few entries
        apart = np.abs(found - wanted.cpu().numpy())
        judge(lines[0], float(np.quantile(apart, 0.999)), LIMIT_RERANK)
    compare(card, lines[1], lambda: gnn_rerank(query, others))
    lines[1].note = "GNN re-ranking: its paper reports 9.4 ms for Market-1501 on a K40m (Zhang et al., 2020)"
    return lines


ROWS: dict[str, Callable[[Card], list[Result]]] = {
    "features": image_features,
    "graph": neighbour_graph,
    "encoder": lambda card: relations(card, training=False),
    "step": lambda card: relations(card, training=True),
    "ranking": rankings,
    "reranking": reranking,
}


def report(card: Card, results: Sequence[Result]) -> str:
    """Return the table, with the card's rates above it and notes below."""
    head = f"{card.name}; torch {torch.__version__}; copy {card.bandwidth / 1e9:.0f} GB/s; matrix products " + ", ".join(
        f"{kind} {rate / 1e12:.1f} TFLOP/s" for kind, rate in card.rates.items()
    )
    notes = [result.note for result in results if result.note]
    body = table(HEAD, [result.cells(card) for result in results], left=2)
    return "\n\n".join([head, body, *(["\n".join(notes)] if notes else [])])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", metavar="NAME", nargs="+", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--device", metavar="N", type=int, default=0, help="number of the card (default: 0)")
    parser.add_argument("--repeats", metavar="N", type=int, default=7, help="timed calls of each form (default: 7)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--json", metavar="FILE", help="keep every number")
    args = parser.parse_args(argv)
    wrong = next((name for name in args.rows if name not in ROWS), None)
    if wrong is not None or args.repeats < 1:
        said = f"there is no row '{wrong}'{did_you_mean(wrong, ROWS)}" if wrong else "--repeats takes an integer from 1 on"
        print(f"error: command line: {said}.", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"error: {NO_CARD}", file=sys.stderr)
        return 2
    if not 0 <= args.device < torch.cuda.device_count():
        print(f"error: --device {args.device}: there are {torch.cuda.device_count()} cards, from 0 on.", file=sys.stderr)
        return 2
    torch.cuda.set_device(args.device)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    card = measure_card(torch.device("cuda", args.device), quick=args.quick, repeats=args.repeats)
    results = []
    for name in args.rows:
        print(f"{name} …", file=sys.stderr, flush=True)
        results += ROWS[name](card)
        torch.cuda.empty_cache()
    print(report(card, results))
    if args.json:
        numbers = [{**asdict(each), "shares": each.shares(card)} for each in results]
        kept = {"card": card.name, "bandwidth": card.bandwidth, "rates": card.rates, "rows": numbers}
        Path(args.json).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return int(any(result.equal is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
