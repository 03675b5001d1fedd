"""One way to name a network anywhere: a folder, a file, or a prefix with a name behind it.

A prefix is added by :func:`register_opener`; what opens it is imported when it is first used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from ..backbones.opened import Opened, Request
from ..errors import UserError, did_you_mean

Opener = Callable[[str, Request], Opened]
"""Opens what is named behind a prefix, as (name, request)."""

PACKAGE_ENTRY = "relreid_plugin"
"""Name of the entry in a package's ``config.json`` that holds what this plug-in needs."""

_openers: dict[str, Opener | str] = {}
_endings: dict[str, str] = {}


def register_opener(prefix: str, opener: Opener | str, *, endings: Sequence[str] = ()) -> None:
    """Add a prefix, as ``onnx`` in ``onnx:model.onnx``.

    Args:
        prefix: Without the colon.
        opener: A function of (name, :class:`Request`), or ``module:function`` where it is imported on first use.
        endings: Endings of files, such as ``.onnx``, that are opened by it without the prefix too.

    Raises:
        ValueError: The prefix is taken by another opener.
    """
    if _openers.setdefault(prefix, opener) != opener:
        raise ValueError(f"the prefix '{prefix}' is taken")
    _endings.update(dict.fromkeys(endings, prefix))


def prefixes() -> list[str]:
    """Return the prefixes that are known, sorted."""
    return sorted(name for name in _openers if name not in ("run", "file"))


def _opener(prefix: str) -> Opener:
    found = _openers[prefix]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(import_module(module), attribute)
        _openers[prefix] = found
    return found  # type: ignore[return-value]


def is_run(place: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a run."""
    return os.path.isfile(os.path.join(os.fspath(place), "config.yml"))


def is_package(place: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that ``relreid package`` made: its ``config.json`` has an entry of this plug-in."""
    try:
        with open(os.path.join(os.fspath(place), "config.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and PACKAGE_ENTRY in found


def open_network(model: str | os.PathLike[str], request: Request | None = None) -> Opened:
    """Open a network by name.

    Args:
        model: ``PREFIX:NAME``, the folder of a run, a folder of the hub's layout, or a file of weights of a known family.
        request: What else the user says.

    Raises:
        UserError: It is none of these, or cannot be opened; the sentence says what may be named.
    """
    request = request or Request()
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise UserError(f"a model is named by a text or a path, got {model!r}.")
    name = os.fspath(model)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _openers and not os.path.exists(name):
        if not rest:
            raise UserError(f"'{name}' names no model behind '{prefix}:'.")
        return _opener(prefix)(rest, request)
    place = Path(name).expanduser()
    if is_run(place):
        return _opener("run")(str(place), request)
    if "package" in _openers and is_package(place):
        return _opener("package")(str(place), request)
    if place.suffix.lower() in _endings and place.is_file():
        return _opener(_endings[place.suffix.lower()])(str(place), request)
    if os.path.lexists(place):
        return _opener("file")(str(place), request)
    known = ", ".join(f"{each}:" for each in prefixes())
    if colon and len(prefix) > 1 and "/" not in prefix:
        raise UserError(f"model '{name}' begins with '{prefix}:'{did_you_mean(prefix, prefixes())}")
    raise UserError(
        f"model '{name}' does not exist; name the folder of a run, a file of weights, a folder of the hub's layout, or a "
        f"network by one of {known}."
    )


__all__ = ["PACKAGE_ENTRY", "Opener", "Request", "is_package", "is_run", "open_network", "prefixes", "register_opener"]
