"""The comments of the keys, read from the source that declares them: ``cfg.data.root = "reid-data"  # folder …``.

Every module that declares keys is read the same way, those of the methods (``<method>/config.py``) too.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .defaults import get_default_config
from .merging import _flat

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        name: As in ``data.root``.
        default: Its default.
        value: Its value in a configuration.
        comment: What the source says of it; empty where its name says it all.
        section: The heading it stands under.
    """

    name: str
    default: Any
    value: Any
    comment: str
    section: str

    @property
    def changed(self) -> bool:
        """Whether the value is not the default."""
        return bool(self.value != self.default or type(self.value) is not type(self.default))


def key_sources() -> list[Path]:
    """Return the modules that declare keys: the defaults, and ``config.py`` of every method."""
    return [_PACKAGE / "config" / "defaults.py", *sorted(_PACKAGE.glob("*/config.py"))]


def read_comments(source: str) -> dict[str, tuple[str, str]]:
    """Return what a source says of the keys that it declares.

    A comment stands at the end of an assignment's line, inside its brackets, or in lines of its own right below it.
    A line ``# --- heading ---`` begins a section.

    Args:
        source: Python source with ``cfg.a.b = value`` statements.

    Returns:
        Key or node, as ``a.b``, to (comment, section).
    """
    comments: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("#").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found: dict[str, tuple[str, str]] = {}
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        section = ""
        below = function.lineno
        for statement in function.body:
            for line in range(below, statement.lineno):
                text = comments.get(line, "")
                if line in alone and text.startswith("---"):
                    section = text.strip("- ")
            below = end = statement.end_lineno or statement.lineno
            name = _declared(statement)
            if not name:
                continue
            while end + 1 in alone and not comments[end + 1].startswith("---"):
                end += 1
            words = [comments[line] for line in range(statement.lineno, end + 1) if line in comments]
            found[name] = (" ".join(words), section)
            below = end + 1
    return found


def _declared(statement: ast.stmt) -> str:
    """``a.b`` of ``cfg.a.b = …``; empty for anything else."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return ""
    parts: list[str] = []
    node: ast.expr = statement.targets[0]
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "cfg" else ""


def explain_keys(cfg: Any, sources: Sequence[Path] | None = None) -> list[Key]:
    """Return every key of a configuration in the order of declaration, with its comment.

    Args:
        cfg: From :func:`~relreid_plugin.config.defaults.load_config`.
        sources: Modules that declare keys; default: :func:`key_sources`.
    """
    comments: dict[str, tuple[str, str]] = {}
    for path in key_sources() if sources is None else sources:
        comments.update(read_comments(path.read_text(encoding="utf-8")))
    defaults, values = _flat(get_default_config()), _flat(cfg)
    keys = []
    for name, value in values.items():
        comment, section = comments.get(name, ("", ""))
        node = comments.get(name.rpartition(".")[0], ("", ""))
        keys.append(Key(name, defaults.get(name), value, comment or "", section or node[1]))
    return keys
