"""Galleries on disk at growing sizes: store, index, refinement by relations, single queries; time, memory, recall.

``OMP_NUM_THREADS=2 python benchmarks/search.py --relations --plot search.png`` from the root of the repository;
``--sizes 1000000 --relations --queries 1000`` is the whole way at a million images (at 512 dimensions 2 GiB of disk for the
store, its index, the refined features, their index, and each layer: 20 GiB together).

Features are synthetic: ten near-duplicates per identity, unit length. Queries come one at a time; the exact search reads the
whole table for each, the index (IVF by default) only chooses candidates, which are scored exactly. ``--relations`` refines
the gallery by an untrained MagFormer encoder (4 layers, k = 20) and answers queries against its stored layer states;
``--kill`` has another process begin that, kills it half-way, and goes on from what it left.

Recall is that of the k best against the exact ones, on a sample of the queries; for the relations, of the k best refined
features, and of the 20 neighbours that the refinement found. MiB is the peak of memory that a step holds on to; files that
are mapped into memory, whose pages the system takes back when it needs them, are in the JSON besides.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import IMAGES_PER_IDENTITY

from relreid_plugin.engine.checkpoint import write_figure, write_json
from relreid_plugin.features.store import FeatureStore, StoreWriter
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.metrics.neighbours import SearchConfig, normalise, recall
from relreid_plugin.search.exact import search_exact
from relreid_plugin.search.gallery import GallerySearcher
from relreid_plugin.search.index import TableIndex
from relreid_plugin.search.relations import BLOCK_ROWS

BLOCK = 8192
K = 20


class Memory:
    """Peak memory inside a ``with`` block, MiB, looked at every 5 ms: ``held`` above the start, and ``mapped`` files."""

    def __enter__(self) -> Memory:
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # freed memory that the allocator keeps would hide growth
        self.first = self.held, self.mapped = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    @staticmethod
    def _now() -> tuple[float, float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
        return found["RssAnon"], found["RssFile"]

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            held, mapped = self._now()
            self.held, self.mapped = max(self.held, held), max(self.mapped, mapped)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.held -= self.first[0]


def rows(start: int, stop: int, dim: int, noise: float) -> torch.Tensor:
    """Features of images ``start`` … ``stop``, the same for the same image whatever the block."""
    first, last = start // IMAGES_PER_IDENTITY, (stop - 1) // IMAGES_PER_IDENTITY
    centres = torch.stack(
        [torch.randn(dim, generator=torch.Generator().manual_seed(identity)) for identity in range(first, last + 1)]
    )
    own = centres[torch.arange(start, stop) // IMAGES_PER_IDENTITY - first]
    return normalise(own + noise * torch.randn(stop - start, dim, generator=torch.Generator().manual_seed(start)))


def write(folder: Path, size: int, dim: int, noise: float) -> float:
    """Write a store and return the seconds that it took, without making the features."""
    seconds = 0.0
    with StoreWriter(folder, dim=dim, model="synthetic") as writer:
        for start in range(0, size, BLOCK):
            stop = min(size, start + BLOCK)
            features = rows(start, stop, dim, noise)
            begin = time.perf_counter()
            numbers = torch.arange(start, stop)
            writer.add(
                features,
                (numbers // IMAGES_PER_IDENTITY).tolist(),
                (numbers % 6).tolist(),
                [f"{number:09d}.jpg" for number in numbers.tolist()],
            )
            seconds += time.perf_counter() - begin
        begin = time.perf_counter()
    return seconds + time.perf_counter() - begin


def make_encoder(dim: int) -> RelationEncoder:
    """The untrained encoder, always the same."""
    torch.manual_seed(0)
    return RelationEncoder(dim, 10, attention="magformer", k=K).eval()


def single_queries(searcher: GallerySearcher, queries: torch.Tensor, k: int) -> tuple[list[float], torch.Tensor]:
    """Milliseconds of every query, and the rows found."""
    searcher.search(queries[:1], k)
    times, found = [], []
    for query in queries:
        begin = time.perf_counter()
        found.append(searcher.search(query.unsqueeze(0), k).rows)
        times.append(1e3 * (time.perf_counter() - begin))
    return times, torch.cat(found)


def percentile(times: list[float], share: float) -> float:
    """The value that ``share`` of the times are not above."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def watched(record: dict[str, Any], name: str, function: Callable[[], Any]) -> Any:
    """Call ``function``; its seconds and memory go into the record."""
    with Memory() as memory:
        begin = time.perf_counter()
        result = function()
        record[f"{name}_seconds"] = time.perf_counter() - begin
    record[f"{name}_held_mib"], record[f"{name}_mapped_mib"] = memory.held, memory.mapped
    return result


def kill_half_way(store: Path, size: int, layers: int, options: list[str]) -> float:
    """Begin the refinement in another process, kill it half-way, and return the seconds that it had."""
    blocks = -(-size // BLOCK_ROWS)
    process = subprocess.Popen([sys.executable, __file__, "--refine", str(store), *options])
    begin = time.perf_counter()
    while process.poll() is None:
        time.sleep(0.05)
        written = sum(path.read_text().count("\n") for path in store.glob("relation-*/pass-*/journal.txt"))
        if written > 3 * blocks * layers // 2:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    return time.perf_counter() - begin


def neighbour_recall(index: TableIndex, picked: torch.Tensor) -> float:
    """Of the neighbour lists that a refinement would use."""
    queries = index.table.take(picked)
    return recall(index.neighbours(queries, K)[0], search_exact(queries, index.table, K)[1])


def run(size: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements at one size."""
    record: dict[str, Any] = {"size": size, "dim": args.dim, "threads": torch.get_num_threads()}
    place = folder / str(size)
    search = SearchConfig(index=args.index, nprobe=args.nprobe)
    write_seconds = watched(record, "write", lambda: write(place, size, args.dim, args.noise))
    record["write_seconds"] = write_seconds
    begin = time.perf_counter()
    store = FeatureStore(place)
    record["open_ms"] = 1e3 * (time.perf_counter() - begin)
    picked = torch.linspace(0, size - 1, args.queries).long()
    spread = torch.randn(args.queries, args.dim, generator=torch.Generator().manual_seed(7)) / args.dim**0.5
    queries = normalise(store.take(picked).float() + args.noise * spread)
    count = max(20, min(args.queries, 2_000_000 // size))
    sample = torch.linspace(0, args.queries - 1, min(count, args.queries)).long()
    times, reference = single_queries(GallerySearcher(store, search=SearchConfig(index="flat")), queries[sample], args.k)
    record["exact_ms"] = statistics.median(times)
    searcher = GallerySearcher(store, search=search)
    watched(record, "index", searcher.update)
    times, found = watched(record, "queries", lambda: single_queries(searcher, queries, args.k))
    record["index_ms"], record["index_p95_ms"] = statistics.median(times), percentile(times, 0.95)
    record["recall"] = recall(found[sample], reference)
    if args.relations:
        related = GallerySearcher(store, encoder=make_encoder(args.dim), search=search)
        if args.kill:
            options = ["--dim", str(args.dim), "--index", args.index, "--nprobe", str(args.nprobe)]
            record["killed_after_seconds"] = kill_half_way(place, size, len(related.encoder.blocks), options)
        states = watched(record, "refine", related.refine)
        watched(record, "refined_index", lambda: related.refined_index)
        watched(record, "warm", related.warm)
        times, found = watched(record, "related_queries", lambda: single_queries(related, queries, args.k))
        record["related_ms"], record["related_p95_ms"] = statistics.median(times), percentile(times, 0.95)
        refined = related.refine_queries(queries[sample])
        record["related_recall"] = recall(found[sample], search_exact(refined, states.refined, args.k)[1])
        record["neighbour_recall"] = neighbour_recall(related.index, picked[sample])
    record["process_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return record


COLUMNS = (
    ("gallery", "size", "{:,}"),
    ("write s", "write_seconds", "{:.2f}"),
    ("exact ms", "exact_ms", "{:.2f}"),
    ("index s", "index_seconds", "{:.1f}"),
    ("MiB", "index_held_mib", "{:.0f}"),
    ("query ms", "index_ms", "{:.2f}"),
    ("95%", "index_p95_ms", "{:.2f}"),
    ("recall", "recall", "{:.3f}"),
    ("refine s", "refine_seconds", "{:.1f}"),
    ("MiB", "refine_held_mib", "{:.0f}"),
    ("+index s", "refined_index_seconds", "{:.1f}"),
    ("warm s", "warm_seconds", "{:.1f}"),
    ("related ms", "related_ms", "{:.2f}"),
    ("95%", "related_p95_ms", "{:.2f}"),
    ("recall", "related_recall", "{:.3f}"),
    ("graph", "neighbour_recall", "{:.3f}"),
    ("process MiB", "process_mib", "{:.0f}"),
)


def table_row(cells: Iterable[str]) -> str:
    """Cells under their titles."""
    widths = [max(10 if title == "gallery" else 7, len(title) + 2) for title, *_ in COLUMNS]
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Draw how everything grows with the gallery."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = (("exact", "exact_ms", "-"), ("index", "index_ms", "-"), ("", "index_p95_ms", "--"))
    once = (("store", "write_seconds", "-"), ("index", "index_seconds", "-"), ("refined", "refine_seconds", "-"))
    memory = (("index", "index_held_mib", "-"), ("refined", "refine_held_mib", "-"))
    found = (("index", "recall", "-"), ("relations", "related_recall", "-"), ("graph", "neighbour_recall", "-"))
    relations = (("relations", "related_ms", "-"), ("", "related_p95_ms", "--"))
    panels: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
        ("one query, ms (dashed: 95%)", times + relations),
        ("once, s", once),
        ("memory held, MiB", memory),
        ("recall", found),
    )
    colours = {"exact": "tab:gray", "store": "tab:gray", "index": "tab:blue", "graph": "tab:green"}
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for axis, (title, lines) in zip(axes, panels):
        colour = "tab:gray"
        for label, key, style in lines:
            known = [record for record in records if key in record]
            colour = colours.get(label, "tab:red") if label else colour
            if known:
                axis.plot(
                    [record["size"] for record in known],
                    [record[key] for record in known],
                    style,
                    marker="o" if style == "-" else "",
                    markersize=4,
                    color=colour,
                    label=label or None,
                )
        axis.set_xscale("log")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("images in the gallery")
        axis.grid(alpha=0.3)
        if title == "recall":
            axis.set_ylim(0, 1.05)
        else:
            axis.set_yscale("log")
        axis.legend(frameon=False)
    threads = records[0]["threads"]
    figure.suptitle(f"Galleries on disk, {records[0]['dim']} dimensions, {threads} thread{'s'[: threads > 1]}", fontsize=12)
    write_figure(path, figure)
    plt.close(figure)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--noise", type=float, default=0.5, help="spread of an identity's images")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--index", choices=("ivf", "hnsw"), default="ivf")
    parser.add_argument("--nprobe", type=int, default=32, help="cells that a query visits (ivf)")
    parser.add_argument("--relations", action="store_true", help="also refine the gallery and query against its states")
    parser.add_argument("--kill", action="store_true", help="kill the refinement half-way once and go on")
    parser.add_argument("--folder", metavar="FOLDER", help="where the stores go (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--plot", metavar="FILE", help="also draw them into a PNG file")
    parser.add_argument("--refine", metavar="STORE", help="refine that store and end; what --kill runs and kills")
    args = parser.parse_args()
    if args.refine:
        search = SearchConfig(index=args.index, nprobe=args.nprobe)
        GallerySearcher(args.refine, encoder=make_encoder(args.dim), search=search).refine()
        return
    print(f"{torch.get_num_threads()} threads, {args.dim} dimensions, {args.index}, k = {args.k}; one query at a time")
    print(table_row(title for title, *_ in COLUMNS))
    records = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for size in args.sizes:
            record = run(size, args, Path(temporary))
            records.append(record)
            print(table_row(form.format(record[key]) if key in record else "-" for _, key, form in COLUMNS), flush=True)
    if args.json:
        write_json(Path(args.json), records)
    if args.plot:
        plot(records, Path(args.plot))


if __name__ == "__main__":
    main()
