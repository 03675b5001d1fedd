"""Reference of the commands, out of the parsers that read their options."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
from unittest import mock

import keys

import relreid_plugin.cli
from relreid_plugin.cli.command import Command

HEAD = """\
# Commands

One command, `relreid`, with subcommands; `relreid NAME --help` prints what stands here. A mistake ends a command with one
sentence and exit code 2. A command that was stopped goes on where it was.
"""


def all_commands() -> list[Command]:
    """Return every command of the package by name."""
    found: dict[str, Command] = {}
    for info in pkgutil.iter_modules(relreid_plugin.cli.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"relreid_plugin.cli.{info.name}")
            found.update({value.name: value for value in vars(module).values() if isinstance(value, Command)})
    return [found[name] for name in sorted(found)]


def command_of(words: list[str]) -> tuple[Command, list[str]]:
    """Return the command that ``relreid WORD …`` names, and its arguments.

    Args:
        words: What comes after ``relreid``.

    Raises:
        LookupError: There is no such command.
    """
    for command in sorted(all_commands(), key=lambda each: -len(each.name.split())):
        name = command.name.split()
        if words[: len(name)] == name:
            return command, words[len(name) :]
    raise LookupError(f"there is no command 'relreid {' '.join(words[:2])}'")


def page() -> str:
    """Return the reference page as MyST Markdown, one section per command."""
    with mock.patch.dict(os.environ, {"COLUMNS": "96"}):  # the same page in every terminal
        return "\n".join([HEAD, *(_section(command) for command in all_commands())])


def _section(command: Command) -> str:
    parser = command.parser(f"relreid {command.name}")
    parts = [f"## relreid {command.name}\n\n{keys.prose(command.description)}\n"]
    parts.append(f"```text\n{parser.format_usage().strip()}\n```\n")
    rows = [_row(parser, action) for action in parser._actions if action.help is not argparse.SUPPRESS]
    parts.append("\n".join(["| argument | what |", "|---|---|", *rows]) + "\n")
    if command.examples:
        parts.append("```bash\n" + "\n".join(command.examples) + "\n```\n")
    if command.epilog:
        parts.append(keys.prose(command.epilog) + "\n")
    return "\n".join(parts)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    about = formatter._expand_help(action) if action.help else ""
    return f"| `{formatter._format_action_invocation(action)}` | {keys.prose(about)} |"
