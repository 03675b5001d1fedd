"""Features as one type, read from and written to files of any extractor."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "Features": "sets",
    "TestFeatures": "sets",
    "joined": "sets",
    "read": "files",
    "write": "files",
    "form_of": "files",
}

__all__ = ["Features", "TestFeatures", "form_of", "joined", "read", "write"]


def __getattr__(name: str) -> Any:
    """Import a name's module when the name is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
