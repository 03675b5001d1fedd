"""Rows of a benchmark: what each is judged by, a process of its own for each, one table for all.

A benchmark lists its rows and hands them to :func:`main`. Every row runs in a fresh process, so that neither memory nor
caches of one row show in another. The must and the aim of a row are gates on its numbers; equality with the reference is a
gate of its own and holds for variants and try-outs as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import available_memory, table

from relreid_plugin.errors import did_you_mean

HEAD = (
    *("work", "reference", "reference s", "ours s", "ratio", "must", "aim", "reference MiB", "our MiB", "memory must"),
    *("difference", "equal", "reached"),
)


class LacksMemory(Exception):
    """A row needs more memory than there is."""


class LacksPackage(Exception):
    """A row needs a package that is not installed."""


@dataclass(frozen=True)
class Settings:
    """How rows are run: threads, turns of alternated runs, small sizes for a try-out."""

    threads: int = 2
    repeats: int = 3
    quick: bool = False

    def pick(self, full: Any, quick: Any) -> Any:
        """Return the first, or the second for a try-out."""
        return quick if self.quick else full


@dataclass
class Line:
    """One line of the table; a row has one, and one more per variant.

    Attributes:
        work: What is computed.
        reference: Name of what it is compared with.
        reference_s: Median seconds of the reference; ``None`` where there is none.
        seconds: Our median seconds.
        reference_mib: Peak memory of the reference above inputs and result.
        mib: Ours.
        difference: Largest difference from the reference's result.
        equal: Whether the results are equal within the limit of the work.
        variant: Shown for comparison; not judged by must and aim.
        kept: Judged by what the row must keep instead of must and aim.
        values: Further numbers, by name; gates can look at them.
        notes: Sentences below the table.
    """

    work: str
    reference: str = "-"
    reference_s: float | None = None
    seconds: float | None = None
    reference_mib: float | None = None
    mib: float | None = None
    difference: float | None = None
    equal: bool | None = None
    variant: bool = False
    kept: bool = False
    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the reference."""
        return self.reference_s / self.seconds if self.reference_s and self.seconds else None

    def value(self, key: str) -> float | None:
        """Return a number by its name: an attribute, or one of ``values``."""
        return self.values[key] if key in self.values else getattr(self, key, None)


@dataclass(frozen=True)
class Gate:
    """A bound on one number of a line.

    Attributes:
        key: Name of the number, see :meth:`Line.value`.
        bound: The bound.
        at_most: Whether the number must be at most the bound; else at least.
        text: How the table shows the bound; default: the bound as a ratio.
    """

    key: str
    bound: float
    at_most: bool = False
    text: str = ""

    def passed(self, line: Line) -> bool | None:
        """Return whether a line passes; ``None`` when it lacks the number."""
        value = line.value(self.key)
        if value is None:
            return None
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return self.text or f"{self.bound:g}x"


def memory(mib: float) -> Gate:
    """Gate on our peak memory, MiB."""
    return Gate("mib", mib, at_most=True, text=f"{mib:.0f}")


def ratio(bound: float) -> Gate:
    """Gate on how many times as fast as the reference we are."""
    return Gate("ratio", bound)


@dataclass(frozen=True)
class Row:
    """A piece of work to measure.

    Attributes:
        name: For ``--rows``.
        target: The work's name in the table of targets, or empty.
        work: What is computed, in one line.
        measure: Function that measures it; may raise :class:`LacksMemory` or :class:`LacksPackage`.
        must: Gates that fail the run.
        aim: Gates beyond.
        kept: Gates on the lines beside another reference, reached once: they fail the run as well.
        needs: Memory that the row takes without its reference, MiB.
        when: ``default``, ``million`` (takes many minutes) or ``named`` (only with ``--rows``).
    """

    name: str
    target: str
    work: str
    measure: Callable[[Settings], list[Line]]
    must: tuple[Gate, ...] = ()
    aim: tuple[Gate, ...] = ()
    kept: tuple[Gate, ...] = ()
    needs: float = 1024.0
    when: str = "default"

    def gates(self, line: Line) -> tuple[tuple[Gate, ...], tuple[Gate, ...]]:
        """Return the gates that a line must pass, and those beyond."""
        if line.variant:
            return (), ()
        return (self.kept, ()) if line.kept else (self.must, self.aim)


@dataclass
class Outcome:
    """What came of a row.

    Attributes:
        row: The row.
        lines: Its lines.
        problem: Why there are none.
        failed: Whether the row broke down.
        others: How many of our cores other processes kept busy meanwhile, on the average.
    """

    row: Row
    lines: list[Line] = field(default_factory=list)
    problem: str = ""
    failed: bool = False
    others: float = 0.0


def judge(row: Row, line: Line, *, quick: bool) -> str:
    """Return what a line has reached.

    Returns:
        ``aim``, ``must``, ``kept``, ``NO`` (not equal, or a must missed), ``?`` (a number for the must is missing, because
        the reference could not run) or ``-`` (equal, and not judged: variants and try-outs).
    """
    if line.equal is False:
        return "NO"
    if line.variant or quick:
        return "-"
    musts, aims = row.gates(line)
    must = [gate.passed(line) for gate in musts]
    if False in must:
        return "NO"
    if None in must:
        return "?"
    aim = [gate.passed(line) for gate in aims]
    return "aim" if aim and all(aim) else "kept" if line.kept else "must"


def failed(outcomes: Sequence[Outcome], *, quick: bool) -> bool:
    """Return whether a row broke down, an equality gate failed, or a must was missed."""
    return any(o.failed or any(judge(o.row, line, quick=quick) == "NO" for line in o.lines) for o in outcomes)


def machine() -> dict[str, Any]:
    """Versions, processor and instruction sets."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []

    def entry(name: str) -> str:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "processor": entry("model name") or platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in entry("flags").split() if flag.startswith(("avx", "amx", "fma"))],
        "cores": len(_cores()),
        "memory_mib": round(available_memory()) if available_memory() < float("inf") else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(package) for name, package in (("torch", "torch"), ("numpy", "numpy"), ("faiss", "faiss-cpu"))},
    }


def _run_here(row: Row, settings: Settings, out: Path) -> int:
    """Measure a row in this process and write its lines, or what it lacks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    try:
        if not settings.quick:
            require(row.needs)
        answer: dict[str, Any] = {"lines": [asdict(line) for line in row.measure(settings)]}
    except (LacksMemory, LacksPackage) as problem:
        answer = {"problem": str(problem)}
    out.write_text(json.dumps(answer), encoding="utf-8")
    return 0


def require(mib: float) -> None:
    """Raise :class:`LacksMemory` unless so much memory is available."""
    free = available_memory()
    if free < mib:
        raise LacksMemory(f"needs {mib / 1024:.1f} GiB, {free / 1024:.1f} GiB are available")


def _cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _busy_seconds() -> tuple[float, float]:
    """Seconds that our cores have been busy, added up, and those of this process's children; zeros where unknown."""
    stat, names = Path("/proc/stat"), {f"cpu{number}" for number in _cores()}
    if not stat.is_file():
        return 0.0, 0.0
    ticks = 0
    for name, *counts in map(str.split, stat.read_text().splitlines()):
        if name in names:
            user, nice, system, _idle, _wait, *interrupts = map(int, counts[:7])
            ticks += user + nice + system + sum(interrupts)
    times = os.times()
    return ticks / os.sysconf("SC_CLK_TCK"), times.children_user + times.children_system


def run_apart(row: Row, settings: Settings, progress: Callable[[float], None]) -> Outcome:
    """Measure a row in a fresh process, and how busy other processes kept the machine meanwhile."""
    begin, before = time.perf_counter(), _busy_seconds()
    outcome = _run_child(row, settings, progress)
    all_busy, own = (after - start for after, start in zip(_busy_seconds(), before))
    outcome.others = max(0.0, all_busy - own) / (time.perf_counter() - begin)
    return outcome


def _run_child(row: Row, settings: Settings, progress: Callable[[float], None]) -> Outcome:
    threads = str(settings.threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, threads)}
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "lines.json"), Path(folder, "errors")
        command = [sys.executable, sys.argv[0], "--child", row.name, "--json", str(out)]
        command += ["--threads", threads, "--repeats", str(settings.repeats), *(["--quick"] if settings.quick else [])]
        begin = time.perf_counter()
        with errors.open("wb") as sink:
            process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
            try:
                while process.poll() is None:
                    progress(time.perf_counter() - begin)
                    try:
                        process.wait(timeout=0.5)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode or not out.is_file():
            said = errors.read_text(errors="replace").strip().splitlines() or ["no result"]
            killed = f"killed by signal {-process.returncode}"
            return Outcome(row, problem=killed if process.returncode < 0 else said[-1], failed=True)
        answer = json.loads(out.read_text(encoding="utf-8"))
    if "problem" in answer:
        return Outcome(row, problem=answer["problem"])
    return Outcome(row, lines=[Line(**line) for line in answer["lines"]])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _seconds(value: float | None) -> str:
    places = 1 if value is None or value >= 10 else 3 if value >= 0.1 else 4
    return _number(value, f".{places}f")


def _cells(row: Row, line: Line, *, quick: bool) -> list[str]:
    musts, aims = row.gates(line)
    must = [str(gate) for gate in musts if gate.key != "mib"]
    room = [str(gate) for gate in musts if gate.key == "mib"]
    aim = [str(gate) for gate in aims]
    equal = {True: "yes", False: "NO", None: "-"}[line.equal]
    return [
        *(line.work, line.reference, _seconds(line.reference_s), _seconds(line.seconds)),
        "-" if line.ratio is None else f"{line.ratio:.{2 if line.ratio < 10 else 1}f}x",
        *(", ".join(must) or "-", ", ".join(aim) or "-"),
        *(_number(line.reference_mib, ".0f"), _number(line.mib, ".0f"), ", ".join(room) or "-"),
        *(_number(line.difference, ".1e"), equal, judge(row, line, quick=quick)),
    ]


def report(outcomes: Sequence[Outcome], settings: Settings) -> str:
    """Lay out the table and the notes below it."""
    rows, notes = [], []
    for outcome in outcomes:
        row = outcome.row
        for line in outcome.lines:
            rows.append(_cells(row, line, quick=settings.quick))
            notes += [f"{line.work}: {note}" for note in line.notes]
        if outcome.others > max(0, len(_cores()) - settings.threads) + 0.25:
            busy = f"other processes kept {outcome.others:.1f} of {len(_cores())} cores busy"
            notes.append(f"{row.work}: DISTURBED: {busy}; times and ratios are not to be relied on")
        if outcome.problem:
            state = "FAILED" if outcome.failed else "not run"
            rows.append([row.work, *["-"] * (len(HEAD) - 2), state])
            notes.append(f"{row.work}: {state}: {outcome.problem}")
    return "\n".join([table(HEAD, rows, left=2), "", *notes]).rstrip()


def _record(outcome: Outcome, *, quick: bool) -> dict[str, Any]:
    row = outcome.row
    lines = [{**asdict(line), "ratio": line.ratio, "reached": judge(row, line, quick=quick)} for line in outcome.lines]
    gates = {side: [asdict(gate) for gate in getattr(row, side)] for side in ("must", "aim", "kept")}
    state = {"failed": outcome.failed, "problem": outcome.problem, "others": outcome.others}
    return {"name": row.name, "target": row.target, "work": row.work, **gates, **state, "lines": lines}


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows (see --list)")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--million", action="store_true", help="also the rows that take many minutes")
    parser.add_argument("--quick", action="store_true", help="small sizes, one run of each: a try-out, equality judged only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="alternated runs, of which the median is shown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number there")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def _listing(rows: Sequence[Row]) -> str:
    cells = [[row.name, row.work, row.target or "-", row.when] for row in rows]
    return table(("name", "work", "row of the targets", "when"), cells, left=4)


def _choose(rows: Sequence[Row], names: Sequence[str] | None, *, million: bool) -> list[Row] | str:
    """Return the rows to run, or one sentence on the name that is unknown."""
    known = {row.name: row for row in rows}
    for name in names or ():
        if name not in known:
            return f"row '{name}' is unknown{did_you_mean(name, list(known))}"
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    return [row for row in rows if row.when == "default" or (million and row.when == "million")]


def main(rows: Sequence[Row], description: str, argv: Sequence[str] | None = None) -> int:
    """Run rows as the command line asks for, and print their table.

    Returns:
        Exit code: 0; 1 when a row broke down, is not equal to its reference, or missed a must; 2 for a wrong command line.
    """
    args = _parser(description).parse_args(argv)
    if args.list:
        print(_listing(rows))
        return 0
    if args.threads < 1 or args.repeats < 1:
        print("--threads and --repeats must be at least 1.", file=sys.stderr)
        return 2
    chosen = _choose(rows, [args.child] if args.child else args.rows, million=args.million)
    if isinstance(chosen, str):
        print(chosen, file=sys.stderr)
        return 2
    if args.json and not args.json.absolute().parent.is_dir():
        print(f"--json {args.json}: the folder does not exist.", file=sys.stderr)
        return 2
    settings = Settings(args.threads, 1 if args.quick else args.repeats, args.quick)
    if args.child:
        return _run_here(chosen[0], settings, args.json)
    about, outcomes = machine(), []
    live = sys.stderr.isatty()
    for number, row in enumerate(chosen, start=1):
        head = f"[{number}/{len(chosen)}] {row.work}"
        print(head, end="" if live else " …\n", file=sys.stderr, flush=True)

        def progress(seconds: float, head: str = head) -> None:
            if live:
                print(f"\r{head} … {seconds:.0f} s", end="", file=sys.stderr, flush=True)

        begin = time.perf_counter()
        outcome = run_apart(row, settings, progress)
        outcomes.append(outcome)
        if args.json:  # after every row: a run that is broken off loses none
            records = [_record(each, quick=settings.quick) for each in outcomes]
            content = {**asdict(settings), "machine": about, "rows": records}
            args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        state = ", ".join(judge(row, line, quick=settings.quick) for line in outcome.lines) or outcome.problem
        start = "\r" if live else ""
        print(f"{start}{head}: {state} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "numpy", "faiss") if about[name])
    print(f"{settings.threads} threads on {about['processor']} ({about['instructions']}); {versions}")
    how = "one run of each at small sizes" if settings.quick else f"medians of {settings.repeats} alternated runs or more"
    print(f"{how}; MiB: peak memory above inputs and result\n")
    print(report(outcomes, settings))
    return 1 if failed(outcomes, quick=settings.quick) else 0
