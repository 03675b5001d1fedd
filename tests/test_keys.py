"""Every key of the configuration is read by something, and one that cannot act is said."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import ROOT

from relreid_plugin.config import _flat, get_default_config

PACKAGE = ROOT / "relreid_plugin"
DECLARES = {"config.py", "idle.py", "ranges.py"}  # they name keys without using their values


class Reads(ast.NodeVisitor):
    """Keys that a module reads, with local names for parts of the configuration followed.

    ``cfg``, ``self.cfg`` and the like are the root. ``train = cfg.train`` makes ``train.lr`` a read of ``train.lr``;
    ``cfg.sampler[key]`` with a string, or inside a loop over strings, and ``Class(**cfg.relation.search)`` count too.
    """

    def __init__(self, keys: set[str]) -> None:
        self.keys, self.read = keys, set()
        self.nodes = {key.rsplit(".", 1)[0] for key in keys if "." in key}
        self.nodes |= {node.rsplit(".", 1)[0] for node in self.nodes if "." in node}
        self.names: list[dict[str, set[str]]] = [{}]
        self.strings: list[dict[str, set[str]]] = [{}]

    # --- what an expression stands for: parts of the configuration, "" being the whole ---------------------------------
    def parts(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name):
            if node.id in ("cfg", "config", "c"):
                return {""}
            return set().union(*(scope.get(node.id, set()) for scope in self.names))
        if isinstance(node, ast.Attribute):
            if node.attr == "cfg":
                return {""}
            return self.extend(self.parts(node.value), {node.attr})
        if isinstance(node, ast.Subscript):
            return self.extend(self.parts(node.value), self.texts(node.slice))
        return set()

    def texts(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return {node.value}
        if isinstance(node, ast.Name):
            return set().union(*(scope.get(node.id, set()) for scope in self.strings))
        return set()

    def extend(self, parts: set[str], names: set[str]) -> set[str]:
        found = {f"{part}.{name}".lstrip(".") for part in parts for name in names}
        return {part for part in found if part in self.nodes or part in self.keys}

    # --- walking --------------------------------------------------------------------------------------------------------
    def note(self, node: ast.AST) -> None:
        self.read |= self.parts(node) & self.keys

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.note(node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Load):
            self.note(node)
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg is None:  # **relation.search hands on every key below it
            for part in self.parts(node.value):
                self.read |= {key for key in self.keys if part and key.startswith(f"{part}.")}
        self.generic_visit(node)

    def bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts):
                self.bind(one, other)
        elif isinstance(target, ast.Name):
            parts = {part for part in self.parts(value) if part in self.nodes}
            if parts:
                self.names[-1][target.id] = parts

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def bind_loop(self, target: ast.AST, values: ast.AST) -> None:
        if isinstance(target, ast.Name) and isinstance(values, (ast.Tuple, ast.List)):
            words = set().union(set(), *(self.texts(value) for value in values.elts))
            self.strings[-1].setdefault(target.id, set()).update(words)

    def visit_For(self, node: ast.For) -> None:
        self.bind_loop(node.target, node.iter)
        self.generic_visit(node)

    def scope(self, node: ast.AST) -> None:
        self.names.append({})
        self.strings.append({})
        self.generic_visit(node)
        self.names.pop()
        self.strings.pop()

    visit_FunctionDef = visit_Lambda = scope


def keys_read(files: list[Path]) -> set[str]:
    keys = set(_flat(get_default_config()))
    read: set[str] = set()
    for file in files:
        reads = Reads(keys)
        reads.visit(ast.parse(file.read_text(encoding="utf-8")))
        read |= reads.read
    return read


def test_every_key_is_read_by_something():
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in DECLARES]
    missing = sorted(set(_flat(get_default_config())) - keys_read(files))
    assert not missing, f"keys that nothing reads: {missing}"
