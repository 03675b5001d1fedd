"""Configurations: the keys with their defaults, ranges and combinations, merged from YAML files and the command line."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .defaults import get_default_config, load_config, merge_from_file, merge_from_list, validate

__all__ = ["get_default_config", "load_config", "merge_from_file", "merge_from_list", "validate"]


def __getattr__(name: str) -> Any:
    """Take a name from :mod:`.defaults` on first use; a command's ``--help`` needs none of it."""
    if name.startswith("__"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    defaults = import_module(f"{__name__}.defaults")  # "from . import" would ask this function for it
    try:
        return getattr(defaults, name)
    except AttributeError:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'") from None
