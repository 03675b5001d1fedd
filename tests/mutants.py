"""Mutation tests of the code that wires things, by mutmut (``make mutants``; docs/development.md).

``python tests/mutants.py [PATTERN …]`` goes on where the last call stopped, tests what was not killed once more, and prints
the rate of every module and the mutants that live. ``mutants/`` holds the state; without it everything is tested anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["PYTEST_XDIST_WORKER"] = "mutants"  # one thread per process, see conftest.py
os.environ["OMP_NUM_THREADS"] = "1"

import libcst as cst
from mutmut import __main__ as mutmut
from mutmut.mutation import file_mutation
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.mutators import operator_string
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
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
    """Take back what tests that changed since could decide otherwise: all verdicts but kills, and who covers what."""
    stats = Path("mutants/mutmut-stats.json")
    if not stats.is_file():
        return
    tests = [path.stat().st_mtime for path in Path("tests").glob("*.py")]
    if max(tests) > stats.stat().st_mtime:
        stats.unlink()
    if not patterns:
        mutmut._reset_mutant_results(lambda key, code: status_by_exit_code[code] not in ("killed", "timeout"))


def change(name: str, path: Path) -> str:
    """``function: old -> new`` in one line."""
    lines = get_diff_for_mutant(name, path=path).split("\n")[3:]
    parts = ["".join(line[1:].strip() + " " for line in lines if line.startswith(sign)).strip() for sign in "-+"]
    function = name.rpartition(".")[2].split("__mutmut")[0].removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return f"{function}: {parts[0]} -> {parts[1]}"


def report() -> float:
    """Print rates and survivors; return the share of mutants that were killed."""
    known = REASONS.read_text(encoding="utf-8") if REASONS.is_file() else ""
    total = killed = 0
    living: list[str] = []
    print(f"\n{'module':44s} {'mutants':>8s} {'killed':>8s} {'rate':>7s}")
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        verdicts = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
        checked = {name: verdict for name, verdict in verdicts.items() if verdict != "not checked"}
        dead = sum(verdict in ("killed", "timeout", "segfault") for verdict in checked.values())
        if checked:
            missing = f" ({len(verdicts) - len(checked)} not tested)" if len(checked) < len(verdicts) else ""
            print(f"{str(path):44s} {len(checked):8d} {dead:8d} {dead / len(checked):7.1%}{missing}")
        total, killed = total + len(checked), killed + dead
        for name, verdict in checked.items():
            if verdict not in ("killed", "timeout", "segfault"):
                line = change(name, path)
                mark = "" if f"`{line}`" in known else "new  "
                living.append(f"{mark}{path}  {line}" + ("" if verdict == "survived" else f"  [{verdict}]"))
    rate = killed / max(1, total)
    print(f"{'all':44s} {total:8d} {killed:8d} {rate:7.1%}\n")
    print(f"living mutants: {len(living)}; those without a reason in {REASONS} are marked new")
    print("\n".join(living))
    return rate


def main(arguments: list[str]) -> int:
    """Run, report, and fail below the share that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("patterns", nargs="*", help="names of mutants, such as '*losses.metric*'; none: all")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--least", type=float, default=0.9, help="exit with 1 below this share of killed mutants")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    options = parser.parse_args(arguments)
    if not Path("setup.py").is_file():
        parser.error("call it from the repository's root")
    prepare_mutmut()
    if not options.report:
        forget(options.patterns)
        mutmut._run(options.patterns, options.workers)
    return int(report() < options.least)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
