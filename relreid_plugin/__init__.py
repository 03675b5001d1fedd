"""relreid_plugin: relation models, attention and losses for person and object re-identification, beside torchreid."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .moved import install as _find_moved_modules

if TYPE_CHECKING:
    from .extractor import load_extractor

__version__ = "0.1.0"

_find_moved_modules()

_registered = False
_PLACES = {"evaluate": "functions", "rerank": "functions", "load_extractor": "extractor"}
"""Function to its module, which is imported when the function is asked for: it needs torch, which this package does not."""


def __getattr__(name: str) -> Any:
    """Import what is only sometimes needed."""
    if name in _PLACES:
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    if name in ("relations", "search"):  # the package of searching is a function too
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def register() -> None:
    """Register the plug-in's models and data sets with torchreid and work around the host's defects, once.

    After it, ``torchreid``'s own ``build_model`` and data managers know the plug-in's names.

    Raises:
        UserError: torchreid, or a package it needs, is not installed; the sentence holds the command that installs it.
    """
    global _registered
    if _registered:
        return
    from .engine.models import register_models
    from .host import apply_patches, register_datasets
    from .methods import methods

    apply_patches()
    register_datasets()
    register_models()
    for method in methods():
        method.register()
    _registered = True


__all__ = ["load_extractor", "register"]
