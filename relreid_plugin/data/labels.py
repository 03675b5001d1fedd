"""Identities and cameras as they are written, and the numbers that stand for them inside.

A label of digits is a number: ``007`` and ``7`` are the same one. Every other label is a name.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..errors import UserError

Label = int | str
"""A label as shown: a number, or the name of what is no number or has more than :data:`MAX_DIGITS` digits."""

MAX_DIGITS = 18
"""Numbers of up to so many digits stand for themselves in tables of 64-bit integers."""

_NUMBER = re.compile(r"-?[0-9]+")
_NAMED = 1 << 62  # numbers of names begin here, above everything of MAX_DIGITS digits


def is_number(text: str) -> bool:
    """Whether ``text`` is an integer in the digits 0–9, of any length."""
    return _NUMBER.fullmatch(text) is not None


def plain(text: str) -> str:
    """Return a number without leading zeros, and anything else as it is: two spellings of one number become the same."""
    if not is_number(text):
        return text
    digits = text.lstrip("-").lstrip("0")
    return f"-{digits}" if digits and text.startswith("-") else digits or "0"


def fits(label: str) -> bool:
    """Whether a label of :func:`plain` is a number that stands for itself."""
    return is_number(label) and len(label.lstrip("-")) <= MAX_DIGITS


def as_label(text: str) -> Label:
    """Return what is shown of a label as it is written: its number, or its name."""
    label = plain(text)
    return int(label) if fits(label) else label


def stored_number(label: Label) -> int:
    """Return the 64-bit integer that stands for a label in a feature store, the same one in every process.

    Numbers stand for themselves; a name becomes 62 bits of its SHA-256, above every number that stands for itself.
    """
    if not isinstance(label, str):
        return int(label)
    digest = hashlib.sha256(label.encode("utf-8", "surrogateescape")).digest()
    return _NAMED + int.from_bytes(digest[:8], "big") % _NAMED


def number_of(labels: Iterable[str]) -> dict[str, int] | None:
    """Return the number of every label where all of them stand for themselves, else None."""
    labels = list(labels)
    return {label: int(label) for label in labels} if all(map(fits, labels)) else None


def numeric_order(label: str) -> tuple[int, int, str]:
    """Sort key that orders labels of :func:`plain` as numbers of any length, and names behind them."""
    if not is_number(label):
        return 2, 0, label
    digits = label.lstrip("-")
    if not label.startswith("-"):
        return 1, len(digits), digits
    return 0, -len(digits), "".join(str(9 - int(digit)) for digit in digits)


def check_numbers(labels: Iterable[tuple[str, str]], what: str) -> None:
    """Refuse numbers in other digits than 0–9, and those below -1, which is what is unknown.

    Args:
        labels: Pairs (label as written, where).
        what: ``identity`` or ``camera``.

    Raises:
        UserError: The first such label, and where it is.
    """
    for text, where in labels:
        if not text.isascii() and text.lstrip("-").isdigit():
            raise UserError(f"{what} '{text}' of '{where}' is a number in digits other than 0-9; write it in these.")
        if text.startswith("-") and is_number(text) and plain(text) not in ("0", "-1"):
            raise UserError(
                f"{what} '{text}' of '{where}' is a number below -1; they are numbers from 0, or -1 where unknown."
            )


def spelling_notes(written: Mapping[str, str], what: str) -> list[str]:
    """Say which labels are spelled in more than one way.

    Args:
        written: Every label as written, with a file that has it.
        what: Plural, for the sentence: ``identities``.

    Returns:
        Sentences with counts and the first names: numbers that are one label, and names that are near but not the same.
    """
    numbers: dict[str, list[str]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for text in sorted(written):
        label = plain(text)
        numbers[label].append(text)
        loose = unicodedata.normalize("NFKC", label).casefold()
        loose = "".join(sign for sign in loose if unicodedata.category(sign) not in ("Cf", "Cc") and not sign.isspace())
        names[re.sub(r"(?<=[0-9])\.0+$", "", loose.removeprefix("+"))].append(label)
    notes = []
    one = [texts for texts in numbers.values() if len(texts) > 1]
    if one:
        notes.append(f"{_pair(one[0], written)} are one number and count as one of the {what}{_more(one, what)}")
    near = [sorted(set(labels)) for labels in names.values() if len(set(labels)) > 1]
    if near:
        first = {label: next(written[text] for text in written if plain(text) == label) for label in near[0]}
        notes.append(f"{_pair(near[0], first)} are alike, but count as different {what}{_more(near, what)}")
    return notes


def _pair(texts: list[str], written: Mapping[str, str]) -> str:
    return " and ".join(f"'{_visible(text)}' ('{written[text]}')" for text in texts[:2])


def _visible(text: str) -> str:
    """A label with its invisible signs as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _more(groups: list[list[str]], what: str) -> str:
    return f" ({len(groups) - 1} more {what} like that)" if len(groups) > 1 else ""
