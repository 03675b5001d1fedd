"""The rules of the house: directions of imports, one door to the host, no method's name outside its wing, short files."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "relreid_plugin"
ROOMS = ("engine", "host", "metrics", "features", "report", "search", "serve")
METHODS = re.compile(r"graft|magformer|nformer|malaa|transreid|\brib\b|rib_", re.IGNORECASE)
RENDERERS = {"magformer/figures.py", "data/embedded/render.py", "data/embedded/vehicle_render.py"}
LONGEST = 500


def test_directions_of_imports():
    """The contracts of ``pyproject.toml``, by import-linter."""
    pytest.importorskip("importlinter")
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.parametrize("room", ROOMS)
def test_no_name_of_a_method_outside_its_wing(room):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if METHODS.search(line)
    ]
    assert not found, "\n".join(found)


def test_files_are_short():
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert set(long) <= RENDERERS, long


def test_only_the_host_room_names_the_host():
    found = [
        str(path.relative_to(ROOT))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "host" not in path.relative_to(PACKAGE).parts
        and re.search(r"^\s*(import|from) +(torchreid|pyppbox_torchreid)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not found
