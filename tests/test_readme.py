"""The README's snippets run, and what it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from relreid_plugin.cli.train import parse
from relreid_plugin.config.defaults import _flat, get_default_config

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
COMMANDS = re.findall(r"^python tools/train_net\.py (.*--config-file.*)$", TEXT, flags=re.M)


@pytest.mark.parametrize("snippet", PYTHON, ids=lambda code: code.strip().splitlines()[0])
def test_python_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_training_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg, _ = parse(shlex.split(command))
    assert cfg.data.sources


def test_there_are_snippets_and_commands():
    assert len(PYTHON) >= 2 and len(COMMANDS) >= 3


def test_named_files_exist():
    names = set(re.findall(r"(?:configs|tools|docs|benchmarks)/[\w./]+\.(?:yml|py|png)", TEXT))
    assert len(names) > 5
    assert [name for name in sorted(names) if not (ROOT / name).is_file()] == []


def test_named_keys_exist():
    keys = set(_flat(get_default_config()))
    named = set(re.findall(r"`((?:relation|train|backbone|data|test|head|rib|vit|model|loss)\.[a-z_.]+)`", TEXT))
    assert len(named) > 12 and {name for name in named if not name.endswith((".yml", ".log"))} <= keys


def test_no_placeholder_is_left():
    assert "{{" not in TEXT
