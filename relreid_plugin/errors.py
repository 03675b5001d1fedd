"""The one exception type that stands for a mistake of the user's, and sentences for what a machine runs out of."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

INSTALL_HOST = "pip install torchreid==0.2.5 scipy opencv-python-headless gdown tensorboard six h5py imageio"
"""What installs the host and the packages that it needs and does not declare; the same as the extra ``train``."""


class UserError(Exception):
    """A wrong key, value, file or data set.

    The message is one sentence that names the file, key or value and the way out. Command-line tools print it on
    standard error and leave with exit code 2; no traceback is shown.
    """


def shown(value: Any, most: int = 80) -> str:
    """Return ``repr(value)`` for a sentence, cut to ``most`` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits, or a deeper nesting, than Python prints
        text = f"a {type(value).__name__} too long to print"
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice nearest to ``name``, or a list of all choices when none is near.

    Args:
        name: What the user wrote.
        choices: The valid spellings.
    """
    valid = sorted(str(choice) for choice in choices)
    lower = {choice.lower(): choice for choice in valid}
    near = difflib.get_close_matches(str(name).lower()[:200], list(lower), n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{lower[near[0]]}'?"
    listed = ", ".join(valid[:40]) + (", …" if len(valid) > 40 else "")
    return f"; valid ones: {listed}"


_FEWER = (
    "lower 'train.batch_size' or 'test.batch_size', 'data.height' and 'data.width', in stage 2 "
    "'relation.train.features_per_step', or 'data.workers'"
)
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|unable to allocate|ALLOC_FAILED"
    r"|std::bad_alloc|bad allocation|Invalid buffer size|Storage size calculation overflowed",
    re.IGNORECASE,
)
_WORKER = re.compile(r"DataLoader worker .*(killed|exited|crashed)", re.IGNORECASE)
_SMALL = re.compile(
    r"output size is too small|kernel size can't be greater than actual input|input size \(\d+ ?x ?\d+\)"
    r"|expected input to have non-zero size|non-empty .* tensor",
    re.IGNORECASE,
)
_SHARED = re.compile(
    r"out of shared memory|shared memory object|/dev/shm|torch_shm|unable to write to file </torch", re.IGNORECASE
)


def explain(error: BaseException) -> str | None:
    """Return one sentence for an error that is no defect of the program but a limit of the machine or the data.

    Args:
        error: What was raised, by torch, numpy or Python itself.

    Returns:
        The sentence with the keys to change, or ``None`` for any other error.
    """
    words = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and _SHARED.search(words):
        return "loader processes ran out of shared memory (/dev/shm); lower 'data.workers' (0 needs none) or enlarge it."
    if isinstance(error, RuntimeError) and _WORKER.search(words):
        return f"a loader process was ended from outside, mostly for want of memory; {_FEWER}."
    if type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "CUDA out of memory" in words):
        return (
            f"the GPU's memory is used up ({_asked(words)}); {_FEWER}, set 'train.precision bfloat16', or 'use_gpu False'."
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(words)):
        return f"the machine's memory is used up ({_asked(words)}); {_FEWER}."
    if isinstance(error, ValueError) and "Expected more than 1 value per channel" in words:
        return (
            "a training batch has a single value per channel, of which batch normalisation has no variance; raise "
            "'train.batch_size' to 2 or more, or 'data.height' and 'data.width'."
        )
    if isinstance(error, RuntimeError) and _SMALL.search(words):
        return f"images shrink to nothing in the network ({words[:160]}); raise 'data.height' and 'data.width'."
    return None


def _asked(words: str) -> str:
    """How much was asked for, as the library said it."""
    found = re.search(r"(?:allocate|allocated:?)\s+([\d.,]+ ?(?:[KMGTPE]i?B|bytes))", words, re.IGNORECASE)
    return f"{found[1]} more were asked for" if found else "no more could be had"
