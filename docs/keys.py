"""Reference of the configuration keys, out of the sources that declare them.

A key is declared as ``cfg.relation.k = 20  # neighbours per image``; whole-line comments right below go on with the
comment. ``python docs/keys.py`` prints the page.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "relreid_plugin"

HEAD = """\
# Configuration keys

Every key, its default and its comment, as the sources declare them. Keys are set in a YAML file or as `KEY VALUE` at the end
of a command; an unknown key, a wrong type or a value out of range stops the command with one sentence.

torchreid's own keys have torchreid's own names and meanings.
"""


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        name: With dots, such as ``relation.k``.
        default: Its default value, as Python.
        comment: What it does; empty where the name says it all.
        file: The source, below the package.
    """

    name: str
    default: str
    comment: str
    file: str


def sources() -> list[Path]:
    """Return the files that declare keys: the house's, then one per wing."""
    return [PACKAGE / "config" / "defaults.py", *sorted(PACKAGE.glob("*/config.py"))]


def read_keys(path: Path) -> list[Key]:
    """Return the keys that a source declares, in its order."""
    text = path.read_text(encoding="utf-8")
    comments: dict[int, tuple[bool, str]] = {}  # line -> (the line holds nothing else, comment)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (not token.line[: token.start[1]].strip(), token.string.lstrip("#").strip())
    keys = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        name = _dotted(node.targets[0])
        if name is None or _is_node(node.value):
            continue
        last = node.end_lineno or node.lineno
        parts = [comments[line][1] for line in range(node.lineno, last + 1) if line in comments]
        while parts and comments.get(last + 1, (False, ""))[0] and not comments[last + 1][1].startswith("---"):
            last += 1
            parts.append(comments[last][1])
        keys.append((node.lineno, Key(name, ast.unparse(node.value), " ".join(parts), str(path.relative_to(PACKAGE)))))
    return [key for _, key in sorted(keys, key=lambda pair: pair[0])]


def _dotted(node: ast.expr) -> str | None:
    """``cfg.a.b`` -> ``a.b``; anything else: None."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if names and isinstance(node, ast.Name) and node.id == "cfg" else None


def _is_node(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("CN", "CfgNode")


def all_keys() -> list[Key]:
    """Return every declared key."""
    return [key for path in sources() for key in read_keys(path)]


def page() -> str:
    """Return the reference page as MyST Markdown, one section per first word of a key."""
    keys = all_keys()
    parts = [HEAD]
    for group in dict.fromkeys(key.name.split(".")[0] for key in keys):
        parts.append(f"## {group}\n")
        for key in keys:
            if key.name.split(".")[0] == group:
                parts.append(f"```{{confval}} {key.name}\n:default: `{key.default}`\n\n{prose(key.comment)}\n```\n")
    return "\n".join(parts)


def prose(comment: str) -> str:
    """A comment as Markdown: code stays code, nothing else in it is read as markup."""
    parts = re.split(r"(`[^`]+`)", comment)
    return "".join(
        part if position % 2 else re.sub(r"([\\`*_\[\]<|$])", r"\\\1", part) for position, part in enumerate(parts)
    )


if __name__ == "__main__":
    print(page())
