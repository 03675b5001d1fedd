"""Dividing images that come without splits into queries and gallery, and into training images, by a rule.

Shape letters: N images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import UserError
from .split import as_test_set

RULES = ("image", "identity", "camera", "time")
"""``image``: every image asks for all the others (leave one image out). ``camera``: one query per identity and camera, the
others are the gallery, as in Market-1501. ``identity``: half of the identities train, the others are tested as by
``camera``. ``time``: the later half of the images asks, the earlier one is the gallery, and is trained on where that is
asked for."""
TRAINS = ("identity", "time")
"""Those that leave training images."""

Parts = dict[str, np.ndarray]
"""``train``, ``query`` and ``gallery``: rows, each (n,) int64 in rising order."""


def divide(
    pids: np.ndarray, camids: np.ndarray, times: np.ndarray | None, rule: str, *, train: bool, seed: int, what: str
) -> Parts:
    """Divide images by a rule; the same images, rule and seed give the same parts.

    Args:
        pids: (N,) identities, all known.
        camids: (N,) cameras, -1 where unknown.
        times: (N,) seconds, or ``None``.
        rule: One of :data:`RULES`.
        train: Whether training images are needed.
        seed: Draws identities and queries.
        what: What the images are, for sentences.

    Returns:
        The rows of every part. By ``image`` a row is query and gallery; by ``time`` gallery and training image.

    Raises:
        UserError: The rule needs cameras, times or more identities, leaves no training images, or no query has a match.
    """
    if train and rule not in TRAINS:
        raise UserError(
            f"{what} is trained on, and 'data.split_rule {rule}' leaves no training images; take "
            f"{' or '.join(TRAINS)}, or name another one to train on."
        )
    rows = np.arange(len(pids))
    divided: dict[str, Callable[[], Parts]] = {
        "image": lambda: _by_image(pids, rows),
        "camera": lambda: _by_camera(pids, camids, rows, seed),
        "identity": lambda: _by_identity(pids, camids, rows, seed, what),
        "time": lambda: _by_time(times, rows, train, what),
    }
    parts = divided[rule]()
    if not len(parts["query"]) or not np.isin(pids[parts["query"]], pids[parts["gallery"]]).any():
        raise UserError(f"'data.split_rule {rule}' finds no query with a match in {what} ({len(pids)} images).")
    return parts


def _none() -> np.ndarray:
    return np.zeros(0, np.int64)


def _by_image(pids: np.ndarray, rows: np.ndarray) -> Parts:
    _, own, counts = np.unique(pids, return_inverse=True, return_counts=True)
    return {"train": _none(), "query": rows[counts[own.reshape(-1)] > 1], "gallery": rows}


def _by_camera(pids: np.ndarray, camids: np.ndarray, rows: np.ndarray, seed: int) -> Parts:
    items = [(int(row), int(pids[row]), int(camids[row])) for row in rows]
    query, gallery = as_test_set(items, np.random.default_rng(seed))
    parts = [np.array(sorted(item[0] for item in side), np.int64) for side in (query, gallery)]
    return {"train": _none(), "query": parts[0], "gallery": parts[1]}


def _by_identity(pids: np.ndarray, camids: np.ndarray, rows: np.ndarray, seed: int, what: str) -> Parts:
    names = np.unique(pids)
    if len(names) < 4:
        raise UserError(f"{what} has {len(names)} identities, too few to train on half of them; 4 are needed.")
    chosen = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
    trains = np.isin(pids, chosen)
    return {**_by_camera(pids, camids, rows[~trains], seed), "train": rows[trains]}


def _by_time(times: np.ndarray | None, rows: np.ndarray, train: bool, what: str) -> Parts:
    if times is None:
        raise UserError(f"'data.split_rule time' needs times, which {what} has not; add a column 'time'.")
    later = times > np.median(times)
    if not later.any():
        raise UserError(f"'data.split_rule time' needs different times, and all of {what} are the same or nearly so.")
    return {"train": rows[~later] if train else _none(), "query": rows[later], "gallery": rows[~later]}
