"""The commands that the pages show: run in this process, or only parsed by the command's own parser."""

from __future__ import annotations

import argparse
import importlib.util
import pkgutil
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

DOORS = {"stats": "modality_stats", "sweep": "eta", "train": "train_net"}


class Parsed(BaseException):
    """A parser has understood a command line; not an error that the command would turn into a sentence."""


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_door", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module


def _entry() -> str:
    """``module:function`` of the installed ``relreid``; empty before there is one."""
    found = re.search(r'"relreid = ([\w.]+:\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    return found[1] if found else ""


def is_here(words: list[str]) -> bool:
    """Whether a command line can be run: by ``relreid``, or else by its door in ``tools``."""
    door = words[2] if words[1] == "tables" else words[1]
    return words[0] != "relreid" or bool(_entry()) or (ROOT / "tools" / f"{DOORS.get(door, door)}.py").is_file()


def _main(words: list[str]) -> tuple[Callable[..., int], list[str]]:
    """The function behind a command line, and its arguments."""
    if words[0] == "python":
        return lambda *_: runpy.run_path(str(ROOT / words[1]), run_name="__main__"), words[2:]
    assert words[0] == "relreid", f"{' '.join(words)}: neither run nor marked by <!-- not run: REASON -->"
    if _entry():
        return pkgutil.resolve_name(_entry()), words[1:]
    name, rest = words[1], words[2:]
    if name == "tables":
        name, rest = rest[0], rest[1:]
    rest = [str(ROOT / "configs" / word) if (ROOT / "configs" / word).is_file() else word for word in rest]
    return _module(ROOT / "tools" / f"{DOORS.get(name, name)}.py").main, rest


def run_command_line(words: list[str]) -> int:
    """Run ``relreid …`` in this process and return its exit code."""
    main, rest = _main(words)
    return main(rest)


def parse_command(words: list[str]) -> None:
    """Let the command's own parser read a command line, and go no further.

    Raises:
        AssertionError: It does not understand it, or parses nothing.
    """
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    main, rest = _main(words)
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
        parse(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [words[1], *rest])  # scripts read them
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        try:
            main(rest)
        except Parsed:
            return
        except SystemExit as error:
            raise AssertionError(f"{' '.join(words)}: not understood ({error})") from None
    raise AssertionError(f"{' '.join(words)}: nothing was parsed")
