"""Galleries on disk at growing sizes: writing, index, single queries with and without relations, recall, memory.

Run ``OMP_NUM_THREADS=2 python benchmarks/search.py --relations`` from the root of the repository. Features are synthetic:
ten near-duplicates per identity, unit length. Queries come one at a time; the exact search reads the whole table for each,
the index (IVF by default) only chooses candidates, which are scored exactly. Recall is that of its k best against the exact
ones.
``--relations`` also refines the gallery by an untrained MagFormer encoder (4 layers, k = 20) and answers queries against
its stored layer states. ``--sizes 1000000`` needs 2 GiB of disk per copy at 512 dimensions, 10 GiB more with relations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ranking import Peak

from relreid_plugin.functional.neighbours import SearchConfig, normalise
from relreid_plugin.models.relation import RelationEncoder
from relreid_plugin.search.gallery import GallerySearcher
from relreid_plugin.search.store import FeatureStore, StoreWriter

BLOCK = 8192
IMAGES_PER_IDENTITY = 10


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


def single_queries(searcher: GallerySearcher, queries: torch.Tensor, k: int) -> tuple[float, torch.Tensor]:
    """Median seconds of one query, and the rows found."""
    searcher.search(queries[:1], k)
    times, found = [], []
    for query in queries:
        begin = time.perf_counter()
        found.append(searcher.search(query.unsqueeze(0), k).rows)
        times.append(time.perf_counter() - begin)
    return statistics.median(times), torch.cat(found)


def run(size: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements at one size."""
    record: dict[str, Any] = {"size": size, "dim": args.dim}
    place = folder / str(size)
    record["write_seconds"] = write(place, size, args.dim, args.noise)
    begin = time.perf_counter()
    store = FeatureStore(place)
    record["open_seconds"] = time.perf_counter() - begin
    picked = torch.linspace(0, size - 1, args.queries).long()
    spread = torch.randn(args.queries, args.dim, generator=torch.Generator().manual_seed(7)) / args.dim**0.5
    queries = normalise(store.take(picked).float() + args.noise * spread)
    exact = GallerySearcher(store, search=SearchConfig(index="flat"))
    count = max(5, min(args.queries, 2_000_000 // size))
    record["flat_ms"], reference = single_queries(exact, queries[:count], args.k)
    with Peak() as peak:
        begin = time.perf_counter()
        searcher = GallerySearcher(store, search=SearchConfig(index=args.index, nprobe=args.nprobe))
        searcher.update()
        record["index_seconds"] = time.perf_counter() - begin
    record["index_peak_mib"] = peak.mib
    record["index_ms"], found = single_queries(searcher, queries, args.k)
    same = [len(set(a.tolist()) & set(b.tolist())) / args.k for a, b in zip(found, reference)]
    record["recall"] = sum(same) / len(same)
    if args.relations:
        torch.manual_seed(0)
        encoder = RelationEncoder(args.dim, 10, attention="magformer", k=20).eval()
        with Peak() as peak:
            begin = time.perf_counter()
            related = GallerySearcher(store, encoder=encoder, search=SearchConfig(index=args.index, nprobe=args.nprobe))
            related.update()
            record["refine_seconds"] = time.perf_counter() - begin
        record["refine_peak_mib"] = peak.mib
        record["relation_ms"], _ = single_queries(related, queries, args.k)
    for key in ("flat_ms", "index_ms", "relation_ms"):
        if key in record:
            record[key] *= 1e3
    return record


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
    parser.add_argument("--folder", metavar="FOLDER", help="where the stores go (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.dim} dimensions, {args.index}, k = {args.k}; one query at a time")
    print(
        f"{'gallery':>10}{'write s':>9}{'open ms':>9}{'exact ms':>10}{'index s':>9}{'MiB':>7}{'query ms':>10}{'recall':>8}"
        f"{'refine s':>10}{'MiB':>7}{'related ms':>12}"
    )
    records = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for size in args.sizes:
            record = run(size, args, Path(temporary))
            records.append(record)
            tail = (
                f"{record['refine_seconds']:>10.1f}{record['refine_peak_mib']:>7.0f}{record['relation_ms']:>12.2f}"
                if args.relations
                else f"{'-':>10}{'-':>7}{'-':>12}"
            )
            print(
                f"{size:>10,}{record['write_seconds']:>9.2f}{1e3 * record['open_seconds']:>9.2f}{record['flat_ms']:>10.2f}"
                f"{record['index_seconds']:>9.1f}{record['index_peak_mib']:>7.0f}{record['index_ms']:>10.2f}"
                f"{record['recall']:>8.3f}{tail}",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
