"""How long a command takes to its first answer: the list of commands, and the sentence on a wrong key.

Run ``python benchmarks/startup.py`` from the root of the repository. Every call is a fresh process; byte code is compiled
before, as an installation leaves it. An interpreter that does nothing is shown beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import Gate, Line, Row, Settings, main

ROOT = Path(__file__).resolve().parents[1]
CALLS = 15
WRONG = ("train", "--config-file", "magformer_embedded.yml", "train.max_epohc", "3")
"""A command line with a mistyped key, and the others that are timed."""
COMMANDS = {"relreid --help": (("--help",), 0, "usage: relreid"), "a wrong key": (WRONG, 2, "'train.max_epoch'?")}


def call(words: Sequence[str], code: int, said: str, environment: dict[str, str]) -> float:
    """Return the seconds of one command; it must end with ``code`` and say ``said``."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode != code or said not in done.stdout + done.stderr:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {(done.stderr or done.stdout)[-200:]}")
    return seconds


def startup(settings: Settings) -> list[Line]:
    """One line per command; the slowest call is in the values."""
    calls = settings.pick(CALLS, 1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPYCACHEPREFIX": folder, "PYTHONPATH": str(ROOT)}
        bare = [call(("-c", "pass"), 0, "", environment) for _ in range(calls)]
        for work, (words, code, said) in COMMANDS.items():
            whole = ("-m", "relreid_plugin", *words)
            call(whole, code, said, environment)
            times = [call(whole, code, said, environment) for _ in range(calls)]
            line = Line(f"first answer: {work}", seconds=statistics.median(times), equal=True)
            line.values = {"slowest": max(times), "interpreter": statistics.median(bare)}
            line.notes = [
                f"median of {calls} fresh processes, the slowest {max(times):.2f} s; an interpreter that does nothing "
                f"{statistics.median(bare):.2f} s"
            ]
            lines.append(line)
    return lines


ROWS = [
    Row(
        "startup",
        "first answer of a command",
        "first answer of relreid: --help, a wrong key",
        startup,
        must=(Gate("seconds", 0.3, at_most=True, text="0.3 s"),),
        aim=(Gate("seconds", 0.1, at_most=True, text="0.1 s"),),
    ),
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
