"""The one exception type that stands for a mistake of the user's, and sentences for what a machine runs out of."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from importlib import import_module, util
from typing import Any

INSTALL_HOST = "pip install torchreid==0.2.5 scipy opencv-python-headless gdown tensorboard six h5py imageio"
"""What installs the host and the packages that it needs and does not declare; the same as the extra ``train``."""
PACKAGES = {
    "PIL": "Pillow",
    "imagehash": "ImageHash",
    "jinja2": "Jinja2",
    "cv2": "opencv-python-headless",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
    "faiss": "faiss-cpu",
    "pytorch_grad_cam": "grad-cam",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "milvus_lite": "milvus-lite",
    "yaml": "PyYAML",
}
"""Module to the package that brings it, where their names differ."""


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


def is_installed(module: str) -> bool:
    """Whether a module is there to be imported; nothing is imported."""
    try:
        return util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def needed(module: str, what: str) -> Any:
    """Import a module of a package that may not be installed, and return it.

    Args:
        module: Its name.
        what: What needs it, the beginning of the sentence.

    Raises:
        UserError: It is not installed, or cannot be loaded; the sentence says what to run.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(_not_imported(error, what, module)) from error


def _not_imported(error: ImportError, what: str, module: str) -> str:
    missing = isinstance(error, ModuleNotFoundError)
    name = ((error.name if missing else module) or module).partition(".")[0]
    package = PACKAGES.get(name, name)
    if missing and (error.name or module) in (name, module):
        way = INSTALL_HOST if name == "torchreid" else f"pip install {package}"
        return f"{what} needs the package '{package}', which is not installed; run '{way}'."
    return (
        f"{what} needs the package '{package}', which is installed and cannot be loaded ({' '.join(str(error).split())}); "
        f"run 'pip install --upgrade --force-reinstall {package}'."
    )


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
    """Return one sentence for an error that is no defect of the program.

    It may be a limit of the machine or the data, or a package that is not installed.

    Args:
        error: What was raised, by torch, numpy or Python itself.

    Returns:
        The sentence with the keys to change, or ``None`` for any other error.
    """
    words = " ".join(str(error).split())
    if isinstance(error, ImportError):
        root = (error.name or "").partition(".")[0]
        own = root in ("", __name__.partition(".")[0]) or root in sys.stdlib_module_names
        return None if own else _not_imported(error, "this", root)
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
