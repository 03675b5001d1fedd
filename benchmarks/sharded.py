"""A gallery refined by one process and by several: the same states, and what every step takes and sends.

``OMP_NUM_THREADS=1 python benchmarks/sharded.py`` from the root of the repository. Features are synthetic (ten
near-duplicates per identity), the relation encoder is an untrained MagFormer with 4 layers and k = 20. Seconds are those of
the slowest process; bytes are what all processes receive from each other, per image. The command fails where the refined
features differ by more than 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from search import make_encoder, write

from relreid_plugin.engine.checkpoint import write_json
from relreid_plugin.engine.distributed import joined
from relreid_plugin.features.store import FeatureStore
from relreid_plugin.options import read_launch
from relreid_plugin.search import exchange, sharded
from relreid_plugin.search.gallery import GallerySearcher

STEPS = {"_search": "neighbours", "_graph": "graph", "_projections": "landmarks", "_layer": "layers"}


def work(folder: Path, dim: int) -> None:
    """One of several processes; prints seconds and received bytes of every step."""
    seconds: Counter[str] = Counter()
    received: Counter[str] = Counter()
    running = [""]

    def timed(name: str, label: str) -> None:
        function = getattr(sharded.ShardedPass, name)

        def wrapped(*arguments: Any) -> Any:
            running[0], begin = label, time.perf_counter()
            result = function(*arguments)
            seconds[label] += time.perf_counter() - begin
            return result

        setattr(sharded.ShardedPass, name, wrapped)

    def counted(name: str, into: int) -> None:
        function = getattr(dist, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            got = arguments[into]
            if name == "broadcast":
                rows = len(got) if arguments[1] != dist.get_rank() else 0
            else:  # without what a process sends to itself
                rows = len(got) - (arguments[2][dist.get_rank()] if len(arguments) > 2 else 1)
            received[running[0]] += rows * got[:1].numel() * got.element_size()
            return function(*arguments, **options)

        setattr(dist, name, wrapped)

    for name, label in STEPS.items():
        timed(name, label)
    counted("broadcast", 0)
    counted("all_to_all_single", 0)
    with joined(read_launch(), use_gpu=False):
        begin = time.perf_counter()
        sharded.ShardedPass(FeatureStore(folder), make_encoder(dim)).run()
        seconds["whole pass"] = time.perf_counter() - begin
        every = exchange.gathered((dict(seconds), dict(received)))
        slowest = {name: max(each[name] for each, _ in every) for name in seconds}
        sent = {name: sum(each.get(name, 0) for _, each in every) for name in seconds}
        if dist.get_rank() == 0:
            write_json(folder / "measured.json", {"seconds": slowest, "received": sent})


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 20_000, 40_000], help="images")
    parser.add_argument("--dim", type=int, default=512, help="width (default: 512)")
    parser.add_argument("--processes", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, help="write the table into this file, too")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.dim)
    lines = [
        f"{args.dim} dimensions, 4 layers, {args.processes} processes of {torch.get_num_threads()} threads, gloo; seconds, "
        "and bytes received per image",
        f"{'images':>9}{'one process':>13}{'several':>10}"
        + "".join(f"{label:>13}{'bytes':>9}" for label in STEPS.values())
        + f"{'worst':>10}",
    ]
    print("\n".join(lines), flush=True)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            one, several = Path(temporary) / "one", Path(temporary) / "several"
            for folder in (one, several):
                write(folder, size, args.dim, 0.5)
            searcher = GallerySearcher(one, encoder=make_encoder(args.dim))
            begin = time.perf_counter()
            searcher.refine()
            alone = time.perf_counter() - begin
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.processes), __file__]
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            subprocess.run([*command, "--worker", str(several), "--dim", str(args.dim)], check=True, env=environment)
            found = json.loads((several / "measured.json").read_text(encoding="utf-8"))
            other = GallerySearcher(several, encoder=make_encoder(args.dim), automatic=False)
            worst = float((searcher.states.refined.read() - other.states.refined.read()).abs().max())
            lines.append(
                f"{size:>9,}{alone:>13.1f}{found['seconds']['whole pass']:>10.1f}"
                + "".join(
                    f"{found['seconds'][label]:>13.2f}{found['received'][label] / size:>9,.0f}" for label in STEPS.values()
                )
                + f"{worst:>10.1e}"
            )
            print(lines[-1], flush=True)
            if worst > 1e-6:
                raise SystemExit(f"refined features differ by {worst:.1e}")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
