"""The commands that the pages show: run in this process, or only parsed by the command's own parser."""

from __future__ import annotations

import argparse
import re
import runpy
import sys

import pytest
from conftest import ROOT

from relreid_plugin.cli.main import COMMANDS, find, main
from relreid_plugin.cli.train import configuration
from relreid_plugin.errors import UserError


class Parsed(BaseException):
    """A script's parser has understood its command line; not an error that anything would turn into a sentence."""


def run_command_line(words: list[str]) -> int:
    """Run ``relreid …`` in this process and return its exit code."""
    assert words[0] == "relreid", f"{' '.join(words)}: neither run nor marked by <!-- not run: REASON -->"
    return main(words[1:])


def parse_command(words: list[str]) -> None:
    """Let the command's own parser read a command line, and go no further; overrides of keys are checked too.

    Raises:
        AssertionError: It does not understand it, or parses nothing.
    """
    if words[0] == "torchrun":
        words = ["relreid", *words[words.index("relreid_plugin") + 1 :]]
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    try:
        if words[0] == "relreid":
            name, rest = find(words[1:])
            command = COMMANDS[name].load()
            args = command.parser().parse_args(rest)
            made = getattr(args, "config_file", None) or ""  # a run's own file is there after the run only
            if command.name in ("train", "test", "ladder") and not made.startswith("runs/"):
                configuration(args)
        else:
            _parse_script(words)
    except (LookupError, SystemExit, UserError) as error:
        raise AssertionError(f"{' '.join(words)}: {error}") from None


def _parse_script(words: list[str]) -> None:
    assert words[0] == "python", f"{' '.join(words)}: neither run nor marked by <!-- not run: REASON -->"
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
        parse(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", words[1:])
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        try:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        except Parsed:
            return
    raise AssertionError(f"{' '.join(words)}: nothing was parsed")
