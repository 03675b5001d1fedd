"""YAML and JSON files that a user writes or damages: read whole, or refused in one sentence.

Only regular files are opened, of a size that such a file can have. YAML is PyYAML's safe subset with what it lets pass in
silence refused: keys that come twice, keys that are no text, numbers that YAML 1.1 reads in base 8 or 60, and aliases or a
nesting that no configuration needs.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, shown

MOST_BYTES = 1 << 20  # of a configuration
MOST_VALUES = 10_000  # in it, every alias counted as what it stands for
MOST_LEVELS = 32
_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_TAGS = {_STR, *(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "seq", "map"))}


def is_regular(path: Path | str) -> bool:
    """Tell whether ``path`` is a regular file (links are followed); never raises."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_text(path: Path | str, *, most_bytes: int | None = None) -> str:
    """Return the text of a regular UTF-8 file; a byte order mark is passed over.

    Args:
        path: The file.
        most_bytes: Largest size; ``None``: any.

    Raises:
        UserError: No regular file, too large, unreadable, or no UTF-8.
    """
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a device or pipe"
            raise UserError(f"'{path}' is {kind}, not a file.")
        if most_bytes is not None and state.st_size > most_bytes:
            raise UserError(f"'{path}' has {state.st_size:,} bytes, more than the {most_bytes:,} that such a file can have.")
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is no UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({getattr(error, 'strerror', None) or error}).") from None


# --- YAML -------------------------------------------------------------------------------------------------------------
class _Refused(yaml.MarkedYAMLError):
    """What PyYAML would take."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without silent surprises; dates stay text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if key is None or key_node.tag not in (_STR, _MERGE):
                what = "of several values" if key is None else shown(key)
                raise _Refused(None, None, f"key {what} is no text", key_node.start_mark)
            if key in seen:
                raise _Refused(None, None, f"key {shown(key)} comes twice, in lines {seen[key]} and {line}; keep one", None)
            seen[key] = line
        return node

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        digits = text.lstrip("+-")
        if ":" in digits or (digits[:1] == "0" and digits[1:2].isdigit()) or digits.startswith("0_"):
            base = "60" if ":" in digits else "8"
            raise _Refused(None, None, f"'{text}' is a number in base {base} to YAML; write it in base 10", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        text = self.construct_scalar(node)
        if ":" in text:
            raise _Refused(None, None, f"'{text}' is a number in base 60 to YAML; write it in base 10", node.start_mark)
        return super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _check_events(text: str) -> None:
    """Refuse what would take long, before anything is built from it: depth, size with aliases, tags, documents."""
    sizes: dict[str, int] = {}  # values below an anchor
    open_: list[tuple[str | None, int]] = []  # anchor, and values before it, of every collection that is open
    total = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        mark = event.start_mark
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Refused(None, None, "a second document starts; keep one", mark)
        elif isinstance(event, yaml.AliasEvent):
            name: str = event.anchor  # type: ignore[attr-defined]
            if name in sizes:
                total += sizes[name]
            elif any(anchor == name for anchor, _ in open_):
                raise _Refused(None, None, f"alias '*{name}' stands inside of what it repeats", mark)
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            total += 1
            if event.tag not in (None, "!", *_TAGS):
                raise _Refused(None, None, f"tag '{event.tag}' is not read; write plain values", mark)
            if isinstance(event, yaml.CollectionStartEvent):
                open_.append((event.anchor, total - 1))
                if len(open_) > MOST_LEVELS:
                    raise _Refused(None, None, f"values are nested more than {MOST_LEVELS} levels deep", mark)
            elif event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > MOST_VALUES:
            raise _Refused(None, None, f"more than {MOST_VALUES:,} values, aliases counted as what they stand for", mark)


def _yaml_complaint(error: Exception) -> str:
    """One clause: what, and in which line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    if not isinstance(error, _Refused) and "'\\t'" in str(error.problem):
        return f"{where}a tab; indent with spaces"
    context = f" {error.context}" if error.context and not isinstance(error, _Refused) else ""
    return f"{where}{error.problem}{context}"


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Return the mapping of a YAML file; an empty file is an empty one.

    Raises:
        UserError: No regular file of at most :data:`MOST_BYTES`, or no single YAML mapping of text keys, each once; the line
            is named.
    """
    text = read_text(path, most_bytes=MOST_BYTES)
    try:
        _check_events(text)
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a YAML file ({_yaml_complaint(error)}).") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a YAML mapping of keys to values, got {type(value).__name__} {shown(value)}.")
    return value


# --- JSON -------------------------------------------------------------------------------------------------------------
def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return values


def read_json(path: Path | str, *, what: str, remedy: str) -> dict[str, Any]:
    """Return the object of a JSON file that this package wrote.

    Args:
        path: The file.
        what: What it should hold, for the sentence.
        remedy: What to do where it does not, for the sentence.

    Raises:
        UserError: The file cannot be read, or holds no JSON object, each key once.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"'{path}' is damaged (no {what}: {said}); {remedy}.") from None
    return value
