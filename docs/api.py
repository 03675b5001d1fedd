"""Pages of the API reference: one per room of the package, with every module and what it offers."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "relreid_plugin"

HEAD = """\
# Python API

From the docstrings. Shapes, units, errors and the paper's equation stand there. The mathematics (layers, losses, samplers,
metrics) is plain PyTorch and NumPy and needs no torchreid.

"""


def rooms() -> list[Path]:
    """Return the packages right below the package that hold modules."""
    found = [path.parent for path in sorted(PACKAGE.glob("*/__init__.py"))]
    return [folder for folder in found if modules(folder) and folder.name not in ("cli", "configs")]


def modules(folder: Path) -> list[Path]:
    """Return the sources of a room that offer something by name, private modules left out."""
    return [path for path in sorted(folder.rglob("*.py")) if _offers(path) and not path.name.startswith("__main__")]


def _offers(path: Path) -> bool:
    if path.name.startswith("_") and path.name != "__init__.py":
        return False
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in nodes)


def dotted(path: Path) -> str:
    """A source -> the name of its module."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _section(name: str) -> str:
    return f"## {name.removeprefix('relreid_plugin.')}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"


def pages() -> dict[str, str]:
    """Return file name -> MyST Markdown, the index included."""
    out = {}
    singles = [path for path in sorted(PACKAGE.glob("*.py")) if _offers(path)]
    out["package.md"] = "# The package\n\n" + "\n".join(_section(dotted(path)) for path in singles)
    for folder in rooms():
        shown = [_section(dotted(path)) for path in modules(folder)]
        if folder / "__init__.py" not in modules(folder):
            shown.insert(0, _section(dotted(folder / "__init__.py")).split("\n", 2)[2])
        out[f"{folder.name}.md"] = f"# {folder.name}\n\n" + "\n".join(shown)
    listed = "\n".join(name.removesuffix(".md") for name in out)
    out["index.md"] = HEAD + f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    return out
