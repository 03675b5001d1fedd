"""What every benchmark needs: synthetic features, peak memory, medians of alternated calls, tables, the machine's rates."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relreid_plugin.metrics.neighbours import normalise

DIM = 512
IMAGES_PER_IDENTITY = 10
SLOW_SECONDS = 20.0
"""A call that takes longer is timed and watched at once, not in a call of its own."""
TURN_SECONDS, TURN_CALLS = 0.05, 10
"""A turn of a quick form ends with either."""


def features(size: int, *, dim: int = DIM, noise: float = 0.5, seed: int = 0) -> Tensor:
    """Unit features, ten near-duplicates per identity.

    Args:
        size: Images N.
        dim: Width d.
        noise: Length of an image's deviation from its identity, as a multiple of the identity's length.
        seed: Of the draw.

    Returns:
        (N, d); row i shows identity ``i % identities(N)``.
    """
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(identities(size), dim, generator=generator)
    out = torch.empty(size, dim)
    for numbers in torch.arange(size).split(1 << 16):
        spread = torch.randn(len(numbers), dim, generator=generator)
        out[numbers[0] : numbers[-1] + 1] = normalise(spread.mul_(noise).add_(centers[numbers % len(centers)]))
    return out


def identities(size: int) -> int:
    """Identities among ``size`` images of :func:`features`."""
    return max(1, size // IMAGES_PER_IDENTITY)


def resident() -> float:
    """Memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def available_memory() -> float:
    """Memory that new work can take without swapping, MiB; infinite where the system does not say."""
    free = float("inf")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
        free = int(found[0]) / 1024 if found else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, (int(limit.read_text()) - int(used.read_text())) / 2**20)
    return free


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


def held_bytes(result: Any) -> int:
    """Bytes of the arrays in a result: tensors, arrays, and containers of them."""
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    if isinstance(result, np.ndarray):
        return result.nbytes
    if isinstance(result, Mapping):
        return sum(held_bytes(value) for value in result.values())
    if isinstance(result, list | tuple):
        return sum(held_bytes(value) for value in result)
    if is_dataclass(result) and not isinstance(result, type):
        return sum(held_bytes(getattr(result, each.name)) for each in fields(result))
    return 0


@dataclass
class Timed:
    """Calls of one form of the work.

    Attributes:
        result: Of the last call.
        times: Seconds of every timed call.
        mib: Peak memory above what was there before the call and above the result.
    """

    result: Any = None
    times: list[float] = field(default_factory=list)
    mib: float = 0.0

    @property
    def seconds(self) -> float:
        """Median."""
        return statistics.median(self.times)

    def call(self, function: Callable[[], Any], *, watch: bool = False, count: bool = True) -> float:
        """Call once, time it if ``count``, look at its memory if ``watch``; return the seconds."""
        self.result = None
        peak = Peak()
        if watch:
            peak.__enter__()
        begin = time.perf_counter()
        try:
            result = function()
            seconds = time.perf_counter() - begin
        finally:
            if watch:
                peak.__exit__()
        self.result = result
        if watch:
            self.mib = max(0.0, peak.mib - held_bytes(result) / 2**20)
        if count:
            self.times.append(seconds)
        return seconds


def alternate(forms: Mapping[str, Callable[[], Any]], repeats: int, *, once: Collection[str] = ()) -> dict[str, Timed]:
    """Time several forms of the same work in turns: first, second, first, second, …

    Quick forms take more turns than asked for, until they have had a second in all, and are called several times a turn, so
    that the memory which the other form left is not all that is timed. Memory is looked at in one more call of each, or in
    the last timed one of a form that takes longer than :data:`SLOW_SECONDS`.

    Args:
        forms: Functions without arguments, by name.
        repeats: Turns. With one turn no further ones are taken.
        once: Forms that are timed and watched in the first turn, and left out of the others.
    """
    timed = {name: Timed() for name in forms}
    turn, spent = 0, 0.0
    watched = set(once)
    while turn < repeats or (repeats > 1 and spent < len(forms) and turn < 20 * repeats):
        for name, function in forms.items():
            if name in once:
                if not turn:
                    timed[name].call(function, watch=True)
                continue
            last_of_slow = turn == repeats - 1 and turn > 0 and timed[name].seconds > SLOW_SECONDS
            seconds, calls = timed[name].call(function, watch=last_of_slow), 1
            while repeats > 1 and seconds < TURN_SECONDS and calls < TURN_CALLS:
                seconds, calls = seconds + timed[name].call(function), calls + 1
            spent += seconds
            if last_of_slow:
                watched.add(name)
        turn += 1
    for name, function in forms.items():
        if name not in watched:
            timed[name].call(function, watch=True, count=False)
    return timed


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Lay out a table as text; the first ``left`` columns are aligned to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def lay(line: Sequence[str]) -> str:
        cells = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([lay(lines[0]), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(lay, lines[1:])])


def largest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference of two tensors, without a copy of either in double precision."""
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a.split(4096), b.split(4096)))


def lowest_cosine(a: Tensor, b: Tensor) -> float:
    """Lowest cosine similarity of corresponding rows, (N, d) each."""
    pairs = zip(a.split(4096), b.split(4096))
    return min(float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1).min()) for x, y in pairs)


def matrix_rates(*, quick: bool = False) -> dict[str, float]:
    """Measured matrix-product rates of this machine, GFLOP/s: the best over the shapes that an encoder of width 512 has.

    Args:
        quick: One call of the smallest shape only.

    Returns:
        ``float32`` (torch), ``float32_numpy`` (numpy's own BLAS, at times the faster one) and ``bfloat16`` (torch).
    """
    best = dict.fromkeys(("float32", "float32_numpy", "bfloat16"), 0.0)
    shapes = ((2048, 512, 512), (2048, 512, 2048), (4096, 2048, 512), (2048, 2048, 2048))
    for rows, inner, columns in shapes[:1] if quick else shapes:
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        forms: dict[str, tuple[Callable[[Any, Any], Any], Any, Any]] = {
            "float32": (torch.mm, a, b),
            "float32_numpy": (np.matmul, a.numpy(), b.numpy()),
            "bfloat16": (torch.mm, a.bfloat16(), b.bfloat16()),
        }
        for name, (product, first, second) in forms.items():
            product(first, second)
            times = []
            for _ in range(1 if quick else 7):
                begin = time.perf_counter()
                product(first, second)
                times.append(time.perf_counter() - begin)
            best[name] = max(best[name], 2e-9 * rows * inner * columns / statistics.median(times))
    return best
