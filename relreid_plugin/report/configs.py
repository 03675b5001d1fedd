"""Configurations of runs as flat keys, and the keys in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from .scored import Subject

EMPTY = "–"
_NOT_COMPARED = ("data.save_dir",)


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the keys of a flat configuration whose values differ from another one's, with both."""
    return [(key, str(before.get(key, EMPTY)), str(value)) for key, value in after.items() if before.get(key) != value]


def flat(cfg: Any) -> dict[str, Any]:
    """Return a configuration as dotted key to value."""
    return dict(flat_items(yaml.safe_load(cfg.dump())))


def flat_items(value: Any, before: str = "") -> list[tuple[str, Any]]:
    """Return a tree of mappings as pairs of dotted key and value."""
    if not isinstance(value, dict):
        return [(before, value)]
    return [item for key, own in value.items() for item in flat_items(own, f"{before}.{key}" if before else str(key))]


def differences(found: Sequence[Subject]) -> list[tuple[str, list[str]]]:
    """Return the keys in which the configurations of runs differ, with the value of each."""
    flats = [flat(subject.cfg) if subject.cfg is not None else None for subject in found]
    keys = dict.fromkeys(key for values in flats if values is not None for key in values)
    out = []
    for key in keys:
        own = [EMPTY if values is None else str(values.get(key, EMPTY)) for values in flats]
        told = {value for value, values in zip(own, flats) if values is not None}
        if len(told) > 1 and key not in _NOT_COMPARED:
            out.append((key, own))
    return out
