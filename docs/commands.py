"""Reference of the commands, out of the parsers that read their options."""

from __future__ import annotations

import argparse
import os
from unittest import mock

import keys

from relreid_plugin.cli.command import Command
from relreid_plugin.cli.main import COMMANDS, GROUPS

HEAD = """\
# Commands

One command, `relreid`, with subcommands; `relreid NAME --help` prints what stands here. A mistake ends a command with one
sentence and exit code 2; a defect of the program ends it with exit code 1. `relreid --print-completion bash` (`zsh`, `tcsh`)
prints the completion of a shell. `tools/*.py` in a clone are doors to the same commands.
"""


def all_commands() -> list[Command]:
    """Return every command."""
    return [entry.load() for entry in COMMANDS.values()]


def page() -> str:
    """Return the reference page as MyST Markdown, one section per command."""
    parts = [HEAD]
    with mock.patch.dict(os.environ, {"COLUMNS": "96"}):  # the same page in every terminal
        for title, group in GROUPS.items():
            parts.append(f"## {title[0].upper()}{title[1:]}\n")
            parts += [_section(f"relreid {name}", entry.load()) for name, entry in group.items()]
    return "\n".join(parts)


def _section(name: str, command: Command) -> str:
    parser = command.parser(name)
    parts = [f"### {name}\n\n{keys.prose(command.description)}\n", f"```text\n{parser.format_usage().strip()}\n```\n"]
    rows = [_row(parser, action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if rows:
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
