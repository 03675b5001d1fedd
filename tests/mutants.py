"""Mutation tests of the code that wires things, by mutmut (``make mutants``; docs/development.md).

``python tests/mutants.py [PATTERN …]`` goes on where the last call stopped, tests what was not killed once more, and prints
the rate of every module and the mutants that live. ``mutants/`` holds the state; without it everything is tested anew.
``--sample 200 --seed 0`` draws 200 of the mutants, each equally likely, and estimates the rate of all from them; a larger
sample of the same seed holds the smaller one.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import random
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

os.environ["PYTEST_XDIST_WORKER"] = "mutants"  # one thread per process, see conftest.py
os.environ["OMP_NUM_THREADS"] = "1"

import libcst as cst
from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.mutation import file_mutation
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.mutators import operator_string
from mutmut.state import state
from mutmut.stats import save_stats, status_by_exit_code
from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir, setup_source_paths, walk_mutatable_files
from mutmut.utils.format_utils import mangled_name_from_mutant_name
from mutmut.workers.isolation import ForkServerRunner

REASONS = Path("docs/mutants.md")
SENTENCES = {"print", "UserError", "ValueError", "KeyError", "IndexError", "did_you_mean", "cast"}
"""Calls whose arguments are words for the reader (or the type checker); they are left as they are."""


def without_no_grad(node: cst.FunctionDef) -> cst.FunctionDef:
    """A function under ``@torch.no_grad()`` as one without: mutmut leaves decorated functions alone."""
    if len(node.decorators) == 1 and cst.Module([]).code_for_node(node.decorators[0].decorator) == "torch.no_grad()":
        return node.with_changes(decorators=[])
    return node


def prepare_mutmut() -> None:
    """What mutmut has no key for: which nodes it changes, and that short tests come first."""
    file_mutation.NEVER_MUTATE_FUNCTION_CALLS |= SENTENCES
    skip = file_mutation.MutationVisitor._skip_node_and_children

    def skip_less(self: Any, node: cst.CSTNode) -> bool:
        return skip(self, without_no_grad(node) if isinstance(node, cst.FunctionDef) else node)

    def one_string(node: cst.BaseString) -> Iterable[cst.BaseString]:
        yield from list(operator_string(node))[:1]  # "XX…XX"; other cases are the same change once more

    operators = file_mutation.mutation_operators
    operators[operators.index((cst.BaseString, operator_string))] = (cst.BaseString, one_string)
    file_mutation.MutationVisitor._skip_node_and_children = skip_less
    submit = ForkServerRunner.submit

    def shortest_first(self: Any, name: str, tests: list[str], *limits: Any) -> None:
        submit(self, name, sorted(tests, key=lambda test: state().duration_by_test.get(test, 0.0)), *limits)

    ForkServerRunner.submit = shortest_first


def forget(patterns: list[str]) -> None:
    """Take back what tests that changed since could decide otherwise: all verdicts but kills, and what they cover."""
    stats = Path("mutants/mutmut-stats.json")
    if not stats.is_file():
        return
    measured = stats.stat().st_mtime
    changed = {path.as_posix() for path in Path("tests").rglob("*.py") if path.stat().st_mtime > measured}
    sources = any(path.stat().st_mtime > measured for path in Path("relreid_plugin").rglob("*.py"))
    if sources or changed - {path.as_posix() for path in Path("tests").rglob("test_*.py")}:
        stats.unlink()
    elif changed:  # what they cover is measured again, as that of new tests
        known = json.loads(stats.read_text(encoding="utf-8"))
        durations, covered = known["duration_by_test"], known["tests_by_mangled_function_name"]
        known["duration_by_test"] = {test: value for test, value in durations.items() if test.split("::")[0] not in changed}
        for name, tests in covered.items():
            covered[name] = [test for test in tests if test.split("::")[0] not in changed]
        stats.write_text(json.dumps(known), encoding="utf-8")
        os.utime(stats, (measured, measured))  # until the end of the measurement
    selection = Path("mutants/selection.json")
    asked = json.dumps(config().pytest_add_cli_args_test_selection)
    other = not selection.is_file() or selection.read_text(encoding="utf-8") != asked
    selection.write_text(asked, encoding="utf-8")
    if not patterns and (sources or changed or other):
        mutmut._reset_mutant_results(lambda key, code: not dead(code))


def dead(code: int | None) -> bool:
    """Whether an exit code means that the tests noticed."""
    return status_by_exit_code[code] in ("killed", "timeout", "segfault")


def interval(hits: int, draws: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson 1927)."""
    if not draws:
        return 0.0, 1.0
    share, scale = hits / draws, 1 + z * z / draws
    centre = (share + z * z / (2 * draws)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / draws + z * z / (4 * draws * draws))
    return max(0.0, centre - half), min(1.0, centre + half)


def draw(names: Iterable[str], patterns: list[str], count: int, seed: int) -> list[str]:
    """Return ``count`` of the mutants that a pattern matches (none: all), each equally likely."""
    found = sorted(name for name in names if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    random.Random(seed).shuffle(found)
    return found[:count]


def test_sample(patterns: list[str], count: int, seed: int, workers: int) -> list[str]:
    """Test the drawn mutants that have no verdict yet, one line each; return all that were drawn."""
    mutmut.set_mutant_under_test("mutant_generation")
    Path("mutants").mkdir(exist_ok=True)
    with mutmut.CatchOutput(spinner_title="Generating mutants"):
        copy_src_dir()
        copy_also_copy_files()
        setup_source_paths()
        mutmut.create_mutants(workers)
    runner = mutmut.get_mutant_runner(workers)
    mutmut.collect_or_load_stats(runner, apply_config_invalidation=True)
    save_stats()
    known, _ = mutmut.collect_source_file_mutation_data(mutant_names=())
    data = {name: part for part, name, _ in known}
    drawn = draw(data, patterns, count, seed)
    waiting = [name for name in drawn if data[name].exit_code_by_key[name] is None]
    print(f"\n{len(data)} mutants, {len(drawn)} drawn, {len(waiting)} to be tested", flush=True)

    def take() -> None:
        result = runner.wait_for_result()
        mutmut._register_mutant_result(result, data)
        line = change(result.mutant_name, Path(data[result.mutant_name].path))
        print(f"{status_by_exit_code[result.exit_code]:10s} {data[result.mutant_name].path}  {line}", flush=True)

    runner.startup()
    try:
        for name in waiting:
            tests = state().tests_by_mangled_function_name.get(mangled_name_from_mutant_name(name), set())
            seconds = sum(state().duration_by_test[test] for test in tests)
            while not runner.has_capacity():
                take()
            limit = math.ceil((seconds + config().timeout_constant) * config().timeout_multiplier * 2)
            runner.submit(name, list(tests), limit, seconds)
            while not tests and runner.pending_count():
                take()
        runner.signal_work_complete()
        while runner.pending_count():
            take()
    finally:
        runner.shutdown()
    return drawn


def change(name: str, path: Path) -> str:
    """``function: old -> new`` in one line."""
    lines = get_diff_for_mutant(name, path=path).split("\n")[3:]
    parts = ["".join(line[1:].strip() + " " for line in lines if line.startswith(sign)).strip() for sign in "-+"]
    function = name.rpartition(".")[2].split("__mutmut")[0].removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return f"{function}: {parts[0]} -> {parts[1]}"


def report(drawn: Collection[str] | None = None) -> float:
    """Print rates and survivors, of all mutants or of those that were drawn; return the share that was killed."""
    known = REASONS.read_text(encoding="utf-8") if REASONS.is_file() else ""
    total = killed = 0
    living: list[str] = []
    print(f"\n{'module':44s} {'mutants':>8s} {'killed':>8s} {'rate':>7s}")
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        codes = {name: code for name, code in data.exit_code_by_key.items() if drawn is None or name in drawn}
        checked = {name: code for name, code in codes.items() if code is not None}
        hits = sum(map(dead, checked.values()))
        if checked:
            missing = f" ({len(codes) - len(checked)} not tested)" if len(checked) < len(codes) else ""
            print(f"{str(path):44s} {len(checked):8d} {hits:8d} {hits / len(checked):7.1%}{missing}")
        total, killed = total + len(checked), killed + hits
        for name, code in checked.items():
            if not dead(code):
                line, verdict = change(name, path), status_by_exit_code[code]
                mark = "" if f"`{line}`" in known else "new  "
                living.append(f"{mark}{path}  {line}" + ("" if verdict == "survived" else f"  [{verdict}]"))
    rate = killed / max(1, total)
    print(f"{'all':44s} {total:8d} {killed:8d} {rate:7.1%}\n")
    if drawn is not None:
        low, high = interval(killed, total)
        print(f"of all mutants, {low:.1%} to {high:.1%} are killed (95 % interval of a random sample of {total})\n")
    print(f"living mutants: {len(living)}; those without a reason in {REASONS} are marked new")
    print("\n".join(living))
    return rate


def main(arguments: list[str]) -> int:
    """Run, report, and fail below the share that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("patterns", nargs="*", help="names of mutants, such as '*backbones.losses*'; none: all")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--least", type=float, default=0.9, help="exit with 1 below this share of killed mutants")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    parser.add_argument("--tests", nargs="+", help="only these files of tests; kills of others stay")
    parser.add_argument("--sample", type=int, help="only so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args(arguments)
    if not Path("setup.py").is_file():
        parser.error("call it from the repository's root")
    prepare_mutmut()
    if options.tests:
        fingerprint = config().config_fingerprint()
        config().config_fingerprint = lambda: fingerprint  # what is known of other tests and their kills stays
        config().pytest_add_cli_args_test_selection = options.tests
    drawn = None
    if options.sample is not None:
        if not options.report:
            forget([])
            drawn = test_sample(options.patterns, options.sample, options.seed, options.workers)
        else:
            known, _ = mutmut.collect_source_file_mutation_data(mutant_names=())
            drawn = draw([name for _, name, _ in known], options.patterns, options.sample, options.seed)
    elif not options.report:
        forget(options.patterns)
        mutmut._run(options.patterns, options.workers)
    return int(report(None if drawn is None else set(drawn)) < options.least)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
