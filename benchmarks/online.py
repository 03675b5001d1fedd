"""One query at a time in a large gallery, on one thread, beside hnswlib and usearch; and the way to such a gallery.

Run ``python benchmarks/online.py`` from the root of the repository; ``pip install hnswlib usearch`` brings the libraries
(a row says what is missing). Features are like those of re-identification: ten images per identity, unit length, 512
dimensions whose variances fall as 1 / j behind a random rotation, for identities and for an image's deviation alike. Queries
are further images of the gallery's identities. Every library gets the narrowest search front that finds 95 % of the exact
ten nearest; then queries take turns, one by one. Building uses all threads.

``gallery-million`` writes, indexes and refines a gallery of a million images (20 GiB of disk).
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from common import DIM, IMAGES_PER_IDENTITY, Peak
from harness import Gate, LacksMemory, LacksPackage, Line, Row, Settings, main, ratio
from torch import Tensor

from relreid_plugin.features.store import FeatureStore, StoreWriter
from relreid_plugin.metrics.neighbours import SearchConfig, normalise, recall
from relreid_plugin.search.gallery import GallerySearcher

K = 10
RECALL = 0.95
FRONTS = (10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 2048)
"""Widths of the search front that are tried, rising."""
PROBES, TIMED, TURNS = 500, 100, 10
"""Queries that recall is measured on; queries per turn; turns."""
NOISE = 0.5
BLOCK = 1 << 16
EARLIER = {"write": 9.0, "index": 101.0, "refine": 301.0}
"""Seconds of a million images that an earlier version took on another machine."""
DISK_GIB = 24

Search = Callable[[Tensor], Tensor]
"""(1, d) query -> (1, k) rows."""


def scene(size: int, queries: int, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Unit features like those of re-identification.

    Args:
        size: Gallery images N.
        queries: Further images of its identities Q.
        dim: Width d.

    Returns:
        (N, d) and (Q, d); gallery row i shows identity ``i % (N / 10)``.
    """
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    shape = rotation * torch.arange(1, dim + 1).rsqrt().unsqueeze(1)
    centers = torch.randn(max(1, size // IMAGES_PER_IDENTITY), dim, generator=generator)

    def images(owners: Tensor) -> Tensor:
        drawn = torch.randn(len(owners), dim, generator=generator).mul_(NOISE).add_(centers[owners])
        return normalise(drawn @ shape)

    gallery = torch.cat([images(part % len(centers)) for part in torch.arange(size).split(BLOCK)])
    return gallery, images(torch.randint(len(centers), (queries,), generator=generator))


def exact(queries: Tensor, gallery: Tensor) -> Tensor:
    """(Q, k) rows of the nearest."""
    return torch.cat([(part @ gallery.t()).topk(K, dim=1).indices for part in queries.split(100)])


@dataclass
class Library:
    """An index of a library.

    Attributes:
        name: For the table.
        build_s: Seconds that it took to build.
        search: One query.
        widen: Sets the width of the search front.
        front: That width.
        recall: What it finds with it.
    """

    name: str
    build_s: float
    search: Search
    widen: Callable[[int], None]
    front: int = 0
    recall: float = 0.0

    def tune(self, queries: Tensor, wanted: Tensor) -> None:
        """Take the narrowest front that finds enough, or the widest."""
        for self.front in FRONTS:
            self.widen(self.front)
            self.recall = recall(torch.cat([self.search(query) for query in queries.split(1)]), wanted)
            if self.recall >= RECALL:
                return


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise LacksPackage(f"{name} is not installed: pip install hnswlib usearch faiss-cpu") from None


def hnswlib_index(gallery: Tensor, threads: int) -> Library:
    """hnswlib with 16 links and a building front of 200, as its documentation has them."""
    index = _library("hnswlib").Index(space="ip", dim=gallery.shape[1])
    begin = time.perf_counter()
    index.init_index(max_elements=len(gallery), M=16, ef_construction=200)
    index.add_items(gallery.numpy(), num_threads=threads)
    seconds = time.perf_counter() - begin

    def search(query: Tensor) -> Tensor:
        return torch.from_numpy(index.knn_query(query.numpy(), k=K, num_threads=1)[0].astype("int64"))

    return Library("hnswlib", seconds, search, index.set_ef)


def usearch_index(gallery: Tensor, threads: int) -> Library:
    """usearch with its default links, building front and type of numbers."""
    numbers = torch.arange(len(gallery)).numpy()
    index = import_module("usearch.index").Index(ndim=gallery.shape[1], metric="ip")
    begin = time.perf_counter()
    index.add(numbers, gallery.numpy(), threads=threads)
    seconds = time.perf_counter() - begin

    def search(query: Tensor) -> Tensor:
        return torch.from_numpy(index.search(query[0].numpy(), K, threads=1).keys.astype("int64")).unsqueeze(0)

    def widen(front: int) -> None:
        index.expansion_search = front

    return Library("usearch", seconds, search, widen)


def write_store(folder: Path, gallery: Tensor) -> FeatureStore:
    """A store of the gallery."""
    with StoreWriter(folder, dim=gallery.shape[1], model="synthetic") as writer:
        for numbers in torch.arange(len(gallery)).split(BLOCK):
            count = len(numbers)
            writer.add(gallery[numbers], [0] * count, [0] * count, [f"{number:09d}.jpg" for number in numbers.tolist()])
    return FeatureStore(folder)


def our_index(store: FeatureStore) -> tuple[Library, GallerySearcher]:
    """``relation.search.index hnsw`` beside the store; ``relation.search.ef`` is the front."""
    _library("faiss")
    begin = time.perf_counter()
    searcher = GallerySearcher(store, search=SearchConfig(index="hnsw"))
    index = searcher.index
    seconds = time.perf_counter() - begin

    def widen(front: int) -> None:
        index.faiss_index.hnsw.efSearch = front
        index.config = replace(index.config, ef=front)

    return Library("ours", seconds, lambda query: index.search(query, K)[1], widen), searcher


def take_turns(libraries: dict[str, Search], queries: Tensor, turns: int) -> dict[str, float]:
    """Median seconds of one query, some queries of every library in turn."""
    times: dict[str, list[float]] = {name: [] for name in libraries}
    for turn in range(turns):
        part = queries[turn * TIMED : (turn + 1) * TIMED]
        for name, search in libraries.items():
            search(part[:1])
            for query in part.split(1):
                begin = time.perf_counter()
                search(query)
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each) for name, each in times.items()}


def online(size: int, settings: Settings) -> list[Line]:
    """One query, ours beside both libraries, and with labels and files as a variant."""
    for name in ("faiss", "hnswlib", "usearch"):
        _library(name)
    turns = settings.pick(TURNS, 1)
    gallery, queries = scene(size, turns * TIMED)
    wanted = exact(queries[:PROBES], gallery)
    with tempfile.TemporaryDirectory() as folder:
        built = {"hnswlib": hnswlib_index(gallery, settings.threads), "usearch": usearch_index(gallery, settings.threads)}
        store = write_store(Path(folder, "store"), gallery)
        ours, searcher = our_index(store)
        torch.set_num_threads(1)
        import_module("faiss").omp_set_num_threads(1)
        for library in (*built.values(), ours):
            library.tune(queries[:PROBES], wanted)
        forms = {name: library.search for name, library in built.items()}
        forms |= {"ours": ours.search, "labels": lambda query: searcher.search(query, K).rows}
        seconds = take_turns(forms, queries, turns)
    work = f"one query, {size:,} x {DIM}, one thread"
    lines = []
    for name, other in built.items():
        line = Line(work, f"{name}, recall {other.recall:.3f}", seconds[name], seconds["ours"])
        line.values = {"recall": ours.recall, "reference_recall": other.recall}
        line.notes = [f"{name}: front {other.front}, built in {other.build_s:.0f} s"]
        line.variant = other.recall < RECALL and not settings.quick  # not the same work
        lines.append(line)
    lines[0].notes.append(f"ours: ef {ours.front}, recall@{K} {ours.recall:.3f}, built in {ours.build_s:.0f} s")
    labelled = Line(f"{work}, with labels and files", lines[0].reference, seconds["hnswlib"], seconds["labels"])
    labelled.variant = True
    return [*lines, labelled]


def gallery(settings: Settings) -> list[Line]:
    """Write, index, refine; beside what an earlier version took on another machine, which judges nothing."""
    from search import make_encoder, write

    size = settings.pick(1_000_000, 400)
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    if free < DISK_GIB and not settings.quick:
        raise LacksMemory(f"needs {DISK_GIB} GiB of disk, {free:.0f} GiB are free in '{tempfile.gettempdir()}'")
    config = SearchConfig(index="ivf")
    seconds, peaks = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "store")
        related: list[GallerySearcher] = []
        steps: dict[str, Callable[[], Any]] = {
            "write": lambda: write(place, size, DIM, NOISE),
            "index": lambda: GallerySearcher(FeatureStore(place), search=config).update(),
            "refine": lambda: related[0].refine(),
        }
        for name, step in steps.items():
            if name == "refine":
                related.append(GallerySearcher(FeatureStore(place), encoder=make_encoder(DIM), search=config))
            with Peak() as peak:
                begin = time.perf_counter()
                found = step()
                seconds[name] = found if name == "write" else time.perf_counter() - begin
            peaks[name] = peak.mib
    lines = []
    for name in steps:
        line = Line(f"gallery of {size:,} images: {name}", "earlier version, another machine", EARLIER[name], seconds[name])
        line.mib, line.variant = peaks[name], True
        lines.append(line)
    lines[0].notes = ["the reference was not measured here, so that nothing is judged by it"]
    return lines


MUST, AIM = (ratio(1), Gate("recall", RECALL, text="recall 0.95")), (ratio(2), Gate("recall", 0.98, text="recall 0.98"))
ROWS = [
    Row("online", "one query", "one query, 100,000 x 512", lambda s: online(s.pick(100_000, 600), s), MUST, AIM),
    Row(
        "online-million",
        "one query",
        "one query, 1,000,000 x 512",
        lambda s: online(s.pick(1_000_000, 600), s),
        MUST,
        AIM,
        needs=12000.0,
        when="million",
    ),
    Row(
        "gallery-million",
        "1M gallery",
        "gallery of a million images: write, index, refine",
        gallery,
        needs=8000.0,
        when="million",
    ),
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
