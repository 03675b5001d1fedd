"""Two runs that differ in a key, and their report."""

from __future__ import annotations

import pytest
from reported import write_run

from relreid_plugin.cli.main import main


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Two runs that differ in a key, and their report."""
    place = tmp_path_factory.mktemp("report")
    first, second = write_run(place / "first", verification=True), write_run(place / "second", lr=0.02, noise=5)
    out = place / "report.html"
    assert main(["report", str(first), str(second), "--out", str(out)]) == 0
    return first, second, out
