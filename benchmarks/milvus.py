"""A gallery in Milvus beside the same one on disk: written, killed, resumed, searched, filtered, appended to, deleted from.

``OMP_NUM_THREADS=2 python benchmarks/milvus.py`` from the root of the repository; ``--uri http://localhost:19530`` runs the
same against a server. Every answer is compared with the exact search of the store on disk (the same rows, scores to 1e-6);
the command fails where one differs. 100,000 images of width 512 with 4 layers need 5 GiB of disk.

Features are synthetic (ten near-duplicates per identity, six cameras, a minute between images), the relation encoder is an
untrained MagFormer. The writer and the uploader are processes of their own that are killed by SIGKILL half-way.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import IMAGES_PER_IDENTITY
from search import BLOCK, make_encoder, rows

from relreid_plugin.engine.checkpoint import write_json
from relreid_plugin.errors import UserError
from relreid_plugin.features.store import FeatureStore, StoreWriter
from relreid_plugin.search.engines import FileEngine, engine_of
from relreid_plugin.search.filters import Filter
from relreid_plugin.search.gallery import GallerySearcher, SearchResult
from relreid_plugin.search.milvus import MilvusStore
from relreid_plugin.search.milvus.copying import copy_store
from relreid_plugin.search.milvus.states import states_key, upload

K = 10
_BEGAN = 1_700_000_000  # when the first image was taken
_STEP = 60


def write(folder: Path, start: int, stop: int, dim: int) -> None:
    """Append images ``start`` … ``stop`` to the store on disk; their files are empty and a minute apart."""
    photos = folder.parent / "photos"
    photos.mkdir(exist_ok=True)
    with StoreWriter(folder, dim=dim, model="synthetic") as writer:
        for low in range(start, stop, BLOCK):
            high = min(stop, low + BLOCK)
            numbers = torch.arange(low, high)
            paths = [str(photos / f"{number:09d}.jpg") for number in numbers.tolist()]
            for number, path in zip(numbers.tolist(), paths):
                Path(path).touch()
                os.utime(path, (_BEGAN + _STEP * number, _BEGAN + _STEP * number))
            labels = (numbers // IMAGES_PER_IDENTITY).tolist(), (numbers % 6).tolist()
            writer.add(rows(low, high, dim, 0.5), *labels, paths)


def opened(name: str) -> MilvusStore:
    """Open the gallery, as soon as a killed process has let go of it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return MilvusStore(name)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def killed(options: list[str], step: str, wanted: int) -> int:
    """Run a step in a process of its own and kill it when it has committed so many rows; returns how many it said."""
    process = subprocess.Popen([sys.executable, __file__, *options, "--step", step], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= wanted:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return int(line)
    raise SystemExit(f"{step} ended before it could be killed")


def step_of(args: argparse.Namespace, place: Path) -> None:
    """One step in a process of its own, which says after every commit how many rows are in."""
    from relreid_plugin.search.milvus import client

    put = client.Documents.write

    def write_and_say(self: Any, key: str, value: Any) -> None:
        put(self, key, value)
        if isinstance(value, dict) and "rows" in value:
            print(value["rows"], flush=True)

    client.Documents.write = write_and_say  # type: ignore[method-assign]
    store = FeatureStore(place / "store")
    if args.step == "copy":
        copy_store(store, args.name)
    else:
        upload(FileEngine(store).states(make_encoder(args.dim), verify=False, camids=None), MilvusStore(args.name))


class Comparison:
    """Searches both galleries and keeps what it found."""

    def __init__(self, folder: Path, name: str, queries: torch.Tensor, encoder: Any) -> None:
        self.folder, self.name, self.queries, self.encoder = folder, name, queries, encoder
        self.lines: list[list[str]] = []
        self.record: dict[str, Any] = {}

    def __call__(self, what: str, *, relations: bool = False, among: Filter | None = None) -> None:
        """Compare one search of all queries, one query at a time; a sentence and exit where the answers differ."""
        found: list[SearchResult] = []
        times = []
        for store in (self.folder, self.name):
            searcher = GallerySearcher(store, encoder=self.encoder if relations else None)
            searcher.update()
            searcher.search(self.queries[:1], K, among=among)
            begin = time.perf_counter()
            parts = [searcher.search(query[None], K, among=among) for query in self.queries]
            times.append(1e3 * (time.perf_counter() - begin) / len(self.queries))
            whole = searcher.search(self.queries, K, among=among)
            if any(part.rows.tolist()[0] != row for part, row in zip(parts, whole.rows.tolist())):
                raise SystemExit(f"{what}: one query at a time and all at once differ in '{store}'")
            found.append(whole)
        different = int((found[0].rows != found[1].rows).sum())
        worst = float((found[0].scores - found[1].scores).abs().max())
        self.lines.append([what, str(different), f"{worst:.1e}", f"{times[0]:.1f}", f"{times[1]:.1f}"])
        self.record[what] = {"different": different, "worst": worst, "disk_ms": times[0], "milvus_ms": times[1]}
        print("  ".join(self.lines[-1]), flush=True)
        if different or worst > 1e-6:
            raise SystemExit(f"{what}: Milvus and the exact search differ in {different} rows, scores by {worst:.1e}")


def held(gallery: MilvusStore) -> int:
    """Entities that Milvus holds, committed or not."""
    return int(list(gallery.client.query(gallery.collection, filter="", output_fields=["count(*)"]))[0]["count(*)"])


def run(args: argparse.Namespace, place: Path) -> None:
    """All steps, in order."""
    seconds: dict[str, float] = {}
    counts: list[str] = []

    def timed(name: str, begin: float) -> None:
        seconds[name] = time.perf_counter() - begin
        print(f"{name}: {seconds[name]:.1f} s", flush=True)

    folder, encoder = place / "store", make_encoder(args.dim)
    options = [f"--size={args.size}", f"--dim={args.dim}", f"--folder={place}", f"--name={args.name}"]
    write(folder, 0, args.size, args.dim)
    begin = time.perf_counter()
    states = GallerySearcher(folder, encoder=encoder).refine()
    timed("refine on disk", begin)

    begin = time.perf_counter()
    said = killed(options, "copy", args.size // 2)
    gallery = opened(args.name)
    counts.append(f"copy killed at {said}: {len(gallery)} committed, {held(gallery)} held")
    assert said <= len(gallery) <= held(gallery) < args.size
    gallery = copy_store(FeatureStore(folder), args.name)
    timed("copy, killed and resumed", begin)
    counts.append(f"resumed: {len(gallery)} committed, {held(gallery)} held")
    assert len(gallery) == gallery.living == held(gallery) == args.size

    compare = Comparison(folder, args.name, rows(args.size, args.size + args.queries, args.dim, 0.5), encoder)
    own = rows(0, args.queries, args.dim, 0.6)
    compare.queries = torch.cat([own, compare.queries])
    compare("image features")
    release(args.name)

    begin = time.perf_counter()
    said = killed(options, "upload", args.size // 2)
    gallery = opened(args.name)
    progress = gallery.documents.read(f"{states_key(encoder)}/upload")["rows"]
    counts.append(f"upload killed at {said}: {progress} committed, none visible")
    assert said <= progress < args.size and gallery.documents.read(states_key(encoder)) is None
    upload(states, gallery)
    timed("upload, killed and resumed", begin)
    compare("relations", relations=True)
    filters = {
        "one camera": Filter(cameras=("3",)),
        "ten identities": Filter(labels=tuple(map(str, range(10)))),
        "a week": Filter(since=_BEGAN + 86_400.0 * 7, until=_BEGAN + 86_400.0 * 14),
    }
    for what, chosen in filters.items():
        compare(what, among=chosen)
    compare("relations, two cameras", relations=True, among=Filter(cameras=("1", "2")))

    write(folder, args.size, args.size + args.more, args.dim)
    begin = time.perf_counter()
    copy_store(FeatureStore(folder), args.name)
    timed(f"append {args.more}", begin)
    begin = time.perf_counter()
    GallerySearcher(args.name, encoder=encoder).refine()
    timed(f"refine {args.more} appended", begin)
    compare("image features, appended")
    compare("relations, appended", relations=True)

    gone = list(range(0, args.size + args.more, (args.size + args.more) // args.more))[: args.more]
    engine_of(folder).delete(gone)
    begin = time.perf_counter()
    count = engine_of(args.name).delete(gone)
    timed(f"delete {count}", begin)
    gallery = MilvusStore(args.name)
    counts.append(f"appended and deleted: {gallery.living} living, {held(gallery)} held")
    assert gallery.living == held(gallery) == engine_of(folder).living
    compare("image features, deleted")
    compare("relations, deleted", relations=True)
    gallery.verify()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = table(args, compare.lines, seconds, counts, memory, place)
    print("\n" + text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        write_json(args.json, {"seconds": seconds, "counts": counts, "searches": compare.record, "peak_mib": memory})


def release(name: str) -> None:
    """Let go of an embedded file, so that another process can open it."""
    file = MilvusStore(name).place.file
    if file is not None:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(str(file))


def table(
    args: argparse.Namespace,
    lines: list[list[str]],
    seconds: dict[str, float],
    counts: list[str],
    memory: float,
    place: Path,
) -> str:
    """What was found, as text."""
    head = ["search", "different rows", "worst score", "disk ms", "Milvus ms"]
    width = max(len(line[0]) for line in lines)
    out = [
        f"{args.size:,} images of width {args.dim}, {len(make_encoder(args.dim).blocks)} layers, {2 * args.queries} queries "
        f"one at a time, k = {K}, {torch.get_num_threads()} threads, {'a server' if args.uri else 'embedded'}",
        f"{head[0]:<{width}}" + "".join(f"{name:>16}" for name in head[1:]),
    ]
    out += [f"{line[0]:<{width}}" + "".join(f"{value:>16}" for value in line[1:]) for line in lines]
    out += [f"{name}: {value:.1f} s" for name, value in seconds.items()]
    out += counts
    for name, path in (("store and states on disk", place / "store"), ("Milvus", place / "gallery.db")):
        if path.exists():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            out.append(f"{name}: {size / 2**30:.2f} GiB")
    return "\n".join([*out, f"peak memory of this process: {memory:,.0f} MiB"])


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="images (default: 100000)")
    parser.add_argument("--dim", type=int, default=512, help="width (default: 512)")
    parser.add_argument("--queries", type=int, default=50, help="queries that are in the gallery, and as many that are not")
    parser.add_argument("--more", type=int, default=1000, help="images that are appended, and deleted (default: 1000)")
    parser.add_argument("--uri", default="", help="a server instead of an embedded file")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the table into this file, too")
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    parser.add_argument("--step", choices=("copy", "upload"), help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        return step_of(args, args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        place = args.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        args.name = f"milvus:{args.uri}#benchmark" if args.uri else f"milvus:{place / 'gallery.db'}"
        run(args, place)


if __name__ == "__main__":
    main()
