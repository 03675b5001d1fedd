"""Completion of shells, written by shtab from the options of all commands; nothing of it runs when a command starts."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UserError, did_you_mean, needed

_FOLDERS = {"FOLDER", "RUN", "STORE", "D", "SOURCE"}
_FILES = {"F", "IMAGE", "PNG"}


def completion(shell: str) -> str:
    """Return the completion script of a shell.

    Args:
        shell: bash, zsh or tcsh.

    Raises:
        UserError: Another shell, or shtab is not installed.
    """
    from .main import SHELLS, full_parser

    if shell not in SHELLS:
        raise UserError(f"command line: --print-completion takes a shell, got '{shell}'{did_you_mean(shell, SHELLS)}")
    shtab = needed("shtab", "the completion of shells")
    parser = full_parser()
    _mark(parser, shtab)
    preamble: Any = {"bash": _bash_configs()}
    return str(shtab.complete(parser, shell, preamble=preamble))


def _bash_configs() -> str:
    from ..config.packaged import packaged_configs

    names = " ".join(f"{each.name}.yml" for each in packaged_configs())
    return f'_relreid_configs() {{\n  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}'


def _mark(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Say which options take files and folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _mark(child, shtab)
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in _FILES:
            action.complete = dict(shtab.FILE)  # type: ignore[attr-defined]
            if action.dest in ("config_file", "name"):
                action.complete["bash"] = "_relreid_configs"  # type: ignore[attr-defined]
