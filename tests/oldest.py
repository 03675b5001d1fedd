"""Print pip constraints that pin everything setup.py asks for to its lower bound: ``python tests/oldest.py EXTRA…``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent.parent


def requirements(extras: list[str]) -> list[str]:
    """The base requirements of setup.py, and those of some extras."""
    found: dict = {}
    setuptools.setup = lambda **values: found.update(values)
    path = ROOT / "setup.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__file__": str(path), "__name__": "setup"})
    return [*found["install_requires"], *(line for extra in extras for line in found["extras_require"][extra])]


def lowest(requirement: str) -> str:
    """``name>=1.2`` -> ``name==1.2.*``; a third number is exact; a pin stays."""
    name, operator, version = re.fullmatch(r"([\w.-]+)(>=|==)([\d.]+)", requirement).groups()
    exact = operator == "==" or version.count(".") > 1
    return f"{name}=={version}" if exact else f"{name}=={version}.*"


if __name__ == "__main__":
    print("\n".join(dict.fromkeys(map(lowest, requirements(sys.argv[1:])))))
