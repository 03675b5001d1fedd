"""What commands read beside the configuration: numbers of options, and the environment that a launcher sets."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import UserError, shown

if TYPE_CHECKING:
    from .config.ranges import Number  # at run time where it is needed: a parser is built, and its help printed, without it

MOST_PROCESSES = 65_536
_MOST = 1_000_000  # config.ranges.MOST
_LAST_SEED = 2**32 - 1  # config.ranges.LAST_SEED


class OptionParser(argparse.ArgumentParser):
    """A parser that ends with one sentence on standard error and exit code 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and leave."""
        self.exit(2, f"error: command line: {' '.join(message.split())}; see --help.\n")


def _in_range(text: str, kind: Callable[[str], Any], valid: Number, noun: str) -> Any:
    try:
        value = kind(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"takes {noun} in {valid}, got {shown(text)}") from None
    if value not in valid:
        raise argparse.ArgumentTypeError(f"takes {noun} in {valid}, got {shown(text)}")
    return value


def _interval(low: float, high: float, above: bool = False, below: bool = False) -> Number:
    from .config.ranges import Number

    return Number(low, high, above, below)


def integer(low: int, high: int = _MOST) -> Callable[[str], int]:
    """Return an argparse ``type`` for integers in [low, high]."""
    return lambda text: _in_range(text, int, _interval(low, high), "an integer")


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """Return an argparse ``type`` for numbers between ``low`` and ``high``.

    See :class:`~relreid_plugin.config.ranges.Number`.
    """
    return lambda text: _in_range(text, float, _interval(low, high, above, below), "a number")


seed = integer(0, _LAST_SEED)
"""An argparse ``type`` for seeds."""


def check_integer(name: str, value: Any, low: int, high: int = _MOST) -> int:
    """Return ``value``, an integer in [low, high].

    Args:
        name: What it is, for the sentence.
        value: What a caller gave.
        low, high: The bounds.

    Raises:
        UserError: Something else.
    """
    valid = _interval(low, high)
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() not in valid:
        raise UserError(f"{name} takes an integer in {valid}, got {shown(value)}.")
    return int(value)


def parse_numbers(option: str, text: str, kind: type[int] | type[float], valid: Number | None = None) -> list[Any]:
    """Return the comma-separated numbers of an option.

    Args:
        option: Its name, for the sentence.
        text: What was given.
        kind: ``int`` or ``float``.
        valid: Range of every number (default: that of seeds).

    Raises:
        UserError: Something else, a number outside of the range, or the same number twice.
    """
    valid = valid or _interval(0, _LAST_SEED)
    try:
        values = [kind(word) for word in text.split(",")]
    except (ValueError, OverflowError):
        values = []
    if not values or any(value not in valid for value in values) or len(set(values)) < len(values):
        example = "1,2,3" if kind is int else "0.1,0.5"
        raise UserError(f"command line: {option} takes different numbers in {valid} like {example}, got {shown(text)}.")
    return values


@dataclass(frozen=True)
class Launch:
    """Which of several processes this one is.

    Attributes:
        rank: Its number among all.
        world: How many there are.
        local: Its number on this machine; 0 where the launcher does not say.
    """

    rank: int = 0
    world: int = 1
    local: int = 0


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` as torchrun sets them.

    Args:
        environment: Variables; ``None``: the process's own.

    Returns:
        One process alone where none of them is set.

    Raises:
        UserError: A variable that is no number, a rank outside of its world, or a rank without a world.
    """
    given = os.environ if environment is None else environment

    def read(name: str, default: int, low: int) -> int:
        text = given.get(name, "").strip()
        if not text:
            return default
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= MOST_PROCESSES:
            raise UserError(
                f"environment variable {name} must be an integer in [{low}, {MOST_PROCESSES}], got {shown(text)}; torchrun "
                "sets it, a single process needs none ('unset RANK WORLD_SIZE LOCAL_RANK')."
            )
        return value

    world, rank, local = read("WORLD_SIZE", 1, 1), read("RANK", 0, 0), read("LOCAL_RANK", -1, 0)
    if rank >= world:
        hint = "" if given.get("WORLD_SIZE", "").strip() else ", as it is not set"
        raise UserError(f"environment variable RANK is {rank}, but WORLD_SIZE is {world}{hint}; it must be below that.")
    if local >= world:
        raise UserError(f"environment variable LOCAL_RANK is {local}, but WORLD_SIZE is {world}; it must be below that.")
    if world > 1 and not given.get("RANK", "").strip():
        raise UserError(
            f"environment variable WORLD_SIZE is {world}, but RANK is not set: every process would take the first share; "
            "set RANK, or unset both."
        )
    return Launch(rank, world, max(local, 0))
