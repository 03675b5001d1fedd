"""What a command is: its options, its help with examples, and its work."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..options import OptionParser
from .running import run_command

GO_ON = "Runs that are done are used again; a command that was stopped goes on where it was."

_PLACES = {"DIR", "FEATURES", "FILE", "FOLDER", "IMAGE", "MODEL", "OUT", "PNG", "RUN", "SOURCE", "STORE", "TABLE"}


@dataclass(frozen=True)
class Command:
    """One command of ``relreid``.

    Attributes:
        name: What comes after ``relreid``, such as ``train`` or ``tables rib``.
        description: What it does, one or two sentences.
        arguments: Adds its options to a parser.
        work: Does it. Heavy modules are imported in here, not beside it.
        examples: Command lines for ``--help``.
        epilog: What else there is to know.
        parser_class: Class of the parser.
        go_on: With what the command goes on after an interruption.
    """

    name: str
    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    work: Callable[[argparse.Namespace], Any]
    examples: Sequence[str] = ()
    epilog: str = ""
    parser_class: type[argparse.ArgumentParser] = OptionParser
    go_on: str = "the same command"

    def parser(self, prog: str | None = None) -> argparse.ArgumentParser:
        """Return a parser of the command's options.

        Args:
            prog: Name in the usage; ``None``: that of the script.
        """
        parser = self.parser_class(
            prog=prog,
            description=filled(self.description),
            epilog=self._ending(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.arguments(parser)
        return parser

    def _ending(self) -> str:
        parts = ["examples:\n" + "\n".join(f"  {line}" for line in self.examples)] if self.examples else []
        return "\n\n".join([*parts, *([filled(self.epilog)] if self.epilog else [])])

    def main(self, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
        """Run the command line ``argv`` and return the exit code."""

        def work() -> None:
            parser = self.parser(prog)
            args = parser.parse_args(argv)
            _refuse_empty(parser, args)
            self.work(args)

        return run_command(work, go_on=self.go_on)


def _refuse_empty(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse '' for a file or folder, which is what an unset variable of a shell gives: it would be this folder."""
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not _PLACES & set(str(action.metavar).split("|")) or value == action.default:
            continue
        if "" in (value if isinstance(value, list) else [value]):
            name = action.option_strings[-1] if action.option_strings else action.metavar
            parser.error(f"{name} is empty; name a file or folder, or '.' for this one")


def filled(text: str) -> str:
    """Return ``text`` in lines as wide as the terminal."""
    return textwrap.fill(text, max(20, shutil.get_terminal_size().columns - 2))


def add_overrides(parser: argparse.ArgumentParser, about: str = "overrides, such as data.root FOLDER") -> None:
    """Add ``--opts KEY VALUE …``."""
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", default=[], help=about)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Add ``--jobs`` and ``--opts`` of a grid of runs."""
    from ..options import integer

    parser.add_argument("--jobs", metavar="N", type=integer(1, 256), default=1, help="runs at a time (default: 1)")
    add_overrides(parser, "overrides for all runs")
