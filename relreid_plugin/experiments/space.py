"""What a search may try: keys of the configuration with lists of values or ranges, checked before anything runs.

A key's values are written as

- ``a,b,c``: one of these, each in the type of the key; lists in brackets, ``[1.0,0.3],[1.0,0.5]``;
- ``LOW..HIGH``: any number in between, whole ones where the key holds whole ones; ``LOW..HIGH:STEP`` in steps from LOW on;
- ``log:LOW..HIGH``: the same on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..config.defaults import _flat, merge_from_list
from ..config.ranges import all_rules, check_ranges
from ..engine.resume import resume_keys
from ..errors import UserError, shown
from ..reading import read_yaml

OWN = {
    "data.save_dir": "--out",
    "train.val_fraction": "--folds",
    "train.val_fold": "--folds",
    "train.seed": "--opts, one for all trials, since it draws the held-out identities",
    "train.stages": "--opts, since trials are compared by the same stage",
    "data.sources": "--opts, since trials are compared on the same identities",
    "data.targets": "--opts, and no trial looks at test sets",
    "test.evaluate": "other commands",
    "test.eval_freq": "--opts, since trials are compared at the same epochs",
    "test.start_eval": "--opts, since trials are compared at the same epochs",
}
"""Keys that are not searched, to what they are set by."""


@dataclass(frozen=True)
class Choices:
    """One of several values, two at least."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


@dataclass(frozen=True)
class Interval:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        low, high: The bounds, whole numbers for a key that holds such.
        log: Whether they are drawn on a logarithmic scale.
        step: Distance of neighbouring numbers; ``None``: any number, or any whole one.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low}..{self.high}{'' if self.step is None else f':{self.step}'}"


Values = Choices | Interval


def _pieces(text: str) -> list[str]:
    """The parts of ``text`` between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _number(key: str, text: str, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"search of '{key}': {shown(text.strip())} is not {kind}, which the key holds.")
    return value


def _interval(key: str, text: str, default: Any) -> Interval:
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        raise UserError(
            f"search of '{key}': the key holds no number, so it has no range {shown(text)}; list its values, a,b."
        )
    whole, log = isinstance(default, int), text.startswith("log:")
    low, _, rest = text.removeprefix("log:").partition("..")
    high, colon, step = rest.partition(":")
    found = Interval(
        _number(key, low, whole),
        _number(key, high, whole),
        log,
        _number(key, step, whole) if colon else None,
    )
    if not found.low < found.high:
        raise UserError(f"search of '{key}': a range goes from the lower number to the higher one, got {shown(text)}.")
    if log and (found.low <= 0 or colon):
        wrong = "has no steps" if colon else "begins above 0"
        raise UserError(f"search of '{key}': a logarithmic range {wrong}, got {shown(text)}.")
    if found.step is not None and not 0 < found.step <= found.high - found.low:
        raise UserError(f"search of '{key}': a step is above 0 and fits into the range, got {shown(text)}.")
    if found.step is not None:  # the last number that the steps meet
        steps = math.floor((found.high - found.low) / found.step + 1e-9)
        found = Interval(found.low, found.low + steps * found.step, log, found.step)
    return found


def _values(cfg: Any, key: str, given: Any) -> Values:
    """The values that were written for a known key, in its type and range."""
    default = _flat(cfg)[key]
    if isinstance(given, str) and (".." in given or given.startswith("log:")) and not isinstance(default, (str, list)):
        interval = _interval(key, given.strip(), default)
        for bound in (interval.low, interval.high):
            check_ranges({key: bound})
        return interval
    words = _pieces(given) if isinstance(given, str) else given
    if not isinstance(words, (list, tuple)):
        words = [words]
    values: list[Any] = []
    for word in words:
        copy = cfg.clone()
        merge_from_list(copy, [key, word])
        value = _flat(copy)[key]
        check_ranges({key: value})
        if value in values:
            raise UserError(f"search of '{key}': {shown(value)} comes twice.")
        values.append(value)
    if len(values) < 2:
        raise UserError(f"search of '{key}': one value, {shown(given)}, is no search; set it by --opts {key} VALUE.")
    return Choices(tuple(values))


@dataclass(frozen=True)
class Space:
    """Keys to their values.

    Attributes:
        keys: In the order in which they were given.
    """

    keys: Mapping[str, Values]

    @property
    def finite(self) -> bool:
        """Whether all values of all keys are listed."""
        return all(isinstance(values, Choices) for values in self.keys.values())

    def grid(self) -> list[dict[str, Any]]:
        """Return all combinations of a :attr:`finite` space; the last key changes first."""
        listed = [values.values for values in self.keys.values() if isinstance(values, Choices)]
        return [dict(zip(self.keys, combination)) for combination in product(*listed)]

    def largest(self, key: str, otherwise: int) -> int:
        """Return the largest value that a key of whole numbers takes; ``otherwise`` where it is not searched."""
        values = self.keys.get(key)
        if values is None:
            return otherwise
        return int(max(values.values) if isinstance(values, Choices) else values.high)

    def described(self) -> dict[str, str]:
        """Return what is searched, as text."""
        return {key: str(values) for key, values in self.keys.items()}


def read_space(cfg: Any, searched: Sequence[str] = (), file: str | Path | None = None) -> Space:
    """Return the search space of a command line and a file.

    Args:
        cfg: The configuration that the trials are made from.
        searched: ``KEY=VALUES`` each.
        file: YAML file of keys, written with dots, to values: a text as on the command line, or a list.

    Raises:
        UserError: No key, one that there is not, one that is not searched, one given twice, or values of another type or
            outside the key's range.
    """
    pairs: list[tuple[str, Any]] = list(read_yaml(Path(file)).items()) if file else []
    for text in searched:
        key, sign, values = text.partition("=")
        if not sign or not key.strip() or not values.strip():
            raise UserError(f"command line: --search takes KEY=VALUES, such as train.lr=log:1e-4..1e-2, got {shown(text)}.")
        pairs.append((key.strip(), values.strip()))
    if not pairs:
        raise UserError("command line: nothing is searched; name keys by --search KEY=VALUES or --space FILE.")
    known, rules, found = _flat(cfg), all_rules(), dict[str, Values]()
    for key, given in pairs:
        if key not in known:
            merge_from_list(cfg.clone(), [key, given])  # says what is wrong
        machine = [own for own in resume_keys().machine if own == key]
        if key in OWN or machine:
            why = f"it is set by {OWN[key]}" if key in OWN else "it changes no score"
            raise UserError(f"search of '{key}': the key is not searched; {why}.")
        if key in found:
            raise UserError(f"search of '{key}': the key comes twice.")
        if key not in rules and not isinstance(known[key], bool):
            raise UserError(f"search of '{key}': the key has no range to check values by.")
        found[key] = _values(cfg, key, given)
    return Space(found)
