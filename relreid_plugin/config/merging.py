"""Merging of files and ``KEY VALUE`` overrides into a configuration, every value in the type of its key."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from ..errors import UserError, did_you_mean, shown
from ..reading import is_regular, read_yaml
from .packaged import find_config, near_config

_LONGEST = 10_000  # characters of a value on the command line that is no text


def _flat(cfg: CN, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CN):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _describe(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number"
    if isinstance(value, list):
        inner = _describe(value[0]).split(" ", 1)[-1] if value else "value"
        return f"a list ({inner}s)"
    return "a string"


def _literal(text: str, default: Any, key: str, where: str) -> Any:
    """The Python literal that ``text`` writes, or ``text`` itself."""
    if len(text) > _LONGEST:
        raise UserError(f"{where}: key '{key}' has a value of {len(text):,} characters; {_LONGEST:,} are read.")
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # about words that are no literal, such as 3x
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    if lowered[:1] in ("[", "(") and isinstance(default, list):
        raise UserError(
            f"{where}: key '{key}' holds a list that cannot be read, {shown(text)}; write it like \"['a','b']\" or [1,2], "
            "in quotes for the shell."
        )
    return text


def _coerce(value: Any, default: Any, key: str, where: str, *, inside: bool = False) -> Any:
    """Return ``value`` in the type of ``default``, or raise :class:`UserError` naming the key."""
    if isinstance(value, str) and not isinstance(default, str):
        value = _literal(value, default, key, where)
    hint = "; put it in quotes" if isinstance(default, str) and isinstance(value, (bool, int, float)) else ""
    wrong = UserError(f"{where}: key '{key}' must be {_describe(default)} like {default!r}, got {shown(value)}{hint}.")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong
        return value
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong
        try:
            return float(value)
        except OverflowError:
            raise wrong from None
    if isinstance(default, list):
        if isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, list):
            if inside or (default and type(value) is not type(default[0])):
                raise wrong
            value = [value]
        if default:
            value = [_coerce(item, default[0], key, where, inside=True) for item in value]
        return value
    if not isinstance(value, str):
        raise wrong
    return value


def _merge_dict(cfg: CN, values: Mapping[str, Any], where: str, prefix: str, root: CN) -> None:
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in cfg:
            flat = _flat(root)
            if full in flat:
                first, *rest = full.split(".")
                nested = "".join(f"{{{part}: " for part in rest) + "…" + "}" * len(rest)
                raise UserError(f"{where}: key '{full}' is written with dots; in a file write '{first}: {nested}'.")
            nodes = {name.rsplit(".", 1)[0] for name in flat if "." in name}
            raise UserError(f"{where}: unknown key {shown(full)}{did_you_mean(full, set(flat) | nodes)}")
        if isinstance(cfg[key], CN):
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: key '{full}' must hold keys of its own ({', '.join(cfg[key])}), got {shown(value)}."
                )
            _merge_dict(cfg[key], value, where, f"{full}.", root)
        else:
            cfg[key] = _coerce(value, cfg[key], full, where)


def merge_from_file(cfg: CN, path: str | Path) -> None:
    """Merge a YAML file into ``cfg``.

    Args:
        cfg: A node from :func:`~relreid_plugin.config.defaults.get_default_config`; changed in place.
        path: A torchreid or plug-in YAML file, or the name of a packaged one.

    Raises:
        UserError: The file is missing, is no YAML mapping (:func:`~relreid_plugin.reading.read_yaml`), has an unknown key
            (the nearest valid one is named) or a value of the wrong type.
    """
    path = find_config(path)
    if not is_regular(path) and not _exists(path):
        near = near_config(path) if _exists(path.parent) and path.parent.is_dir() else ""
        raise UserError(f"configuration file '{shown(str(path), 300)[1:-1]}' does not exist{near or '.'}")
    _merge_dict(cfg, read_yaml(path), str(path), "", cfg)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def merge_from_list(cfg: CN, opts: Sequence[Any]) -> None:
    """Merge ``KEY VALUE …`` pairs from the command line into ``cfg``, checked like :func:`merge_from_file`.

    Of a key that comes several times, the last value counts (:func:`repeated_keys`).
    """
    if len(opts) % 2:
        raise UserError(f"command line: overrides come as KEY VALUE pairs, but '{opts[-1]}' stands alone.")
    flat = _flat(cfg)
    for key, value in zip(opts[::2], opts[1::2]):
        if not isinstance(key, str):
            raise UserError(f"command line: overrides come as KEY VALUE pairs, but {shown(key)} is no key.")
        if key.startswith("-"):
            raise UserError(f"command line: unknown option '{key}' (options go before KEY VALUE overrides).")
        if key not in flat:
            raise UserError(f"command line: {_unknown(key, value, flat, cfg)}")
        *parents, leaf = key.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        node[leaf] = _coerce(value, node[leaf], key, "command line")


def _unknown(key: str, value: Any, flat: Mapping[str, Any], cfg: CN) -> str:
    """What is wrong with a key that does not exist."""
    if "=" in key and key.split("=", 1)[0] in flat:
        name, _, text = key.partition("=")
        return f"'{key}' has an equals sign; write '{name} {text}'."
    if str(value) in flat:
        return f"'{key}' is no key, but '{value}' behind it is one: a value or a key before them is missing or too many."
    if any(name.startswith(f"{key}.") for name in flat):
        below = [name for name in flat if name.startswith(f"{key}.")]
        return f"key '{key}' holds keys of its own; write one of {', '.join(below[:8])}{', …' if len(below) > 8 else ''}."
    return f"unknown key {shown(key)}{did_you_mean(key, flat)}"


def repeated_keys(opts: Sequence[Any]) -> dict[str, Any]:
    """Return the keys that come more than once among ``KEY VALUE …`` with different values, and the value that counts."""
    pairs = list(zip(opts[::2], opts[1::2]))
    last = dict(pairs)
    return {key: last[key] for key, value in pairs if value != last[key]}
