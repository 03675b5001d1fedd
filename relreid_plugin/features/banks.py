"""The feature banks of runs: one sealed file of tensors per set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.labels import as_label, stored_number
from ..errors import UserError
from ..seal import damage
from .sets import Features, joined

FOLDER = "bank"
"""Folder of a run's banks."""
_KEYS = {"key", "features", "pids", "camids", "paths"}
_OWN = ("train", "val-query", "val-gallery")  # banks whose identities are labels 0 … C-1 of the training set


def bank_features(stored: dict[str, Any]) -> Features:
    """Return what a bank's file holds, as the run numbers it."""
    return Features(
        stored["features"],
        stored["pids"].numpy(),
        stored["camids"].numpy(),
        stored["paths"],
        dict(stored.get("identity_names", {})),
    )


def read_bank(path: Path) -> Features:
    """Read a bank's file as features that others can be compared with.

    Identities are those that are written; those of training images, which a run numbers anew, get names of their own.

    Raises:
        UserError: Damaged, or no bank.
    """
    try:
        reason = damage(path)
        stored = None if reason else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason, stored = type(error).__name__, None
    if stored is None:
        raise UserError(f"bank '{path}' cannot be read ({reason}); take it away, and the run extracts it again.")
    if not isinstance(stored, dict) or not stored.keys() >= _KEYS:
        raise UserError(
            f"'{path}' is no bank of features; name a store, an npz, npy or parquet file, or a file in a run's '{FOLDER}'."
        )
    raw = bank_features(stored)
    if path.stem in _OWN:
        names = {int(pid): f"training identity {int(pid)}" for pid in np.unique(raw.pids)}
    else:
        names = raw.identity_names
    labels = {number: as_label(name) for number, name in names.items()}
    numbers = {number: stored_number(label) for number, label in labels.items()}
    unique, own = np.unique(raw.pids, return_inverse=True)
    pids = np.array([numbers.get(int(pid), int(pid)) for pid in unique], np.int64)[own.reshape(-1)]
    return Features(
        raw.features,
        pids,
        raw.camids.astype(np.int64),
        raw.paths,
        {numbers[number]: label for number, label in labels.items() if isinstance(label, str)},
        source=str(path),
    )


def read_run(folder: Path, target: str = "") -> Features:
    """Read the test features in a run's banks, with the splits query and gallery.

    Args:
        folder: The run's folder.
        target: Its test set, as its files in the folder ``bank`` are called; empty: the only one.

    Raises:
        UserError: No bank, or several test sets and none named.
    """
    place = folder / FOLDER
    names = sorted(
        path.name.removesuffix("-query.pt")
        for path in place.glob("*-query.pt")
        if path.stem not in _OWN and (place / path.name.replace("-query.pt", "-gallery.pt")).is_file()
    )
    if not names:
        raise UserError(f"run '{folder}' keeps no features ('{place}' has no query and gallery); test it once.")
    if target and target not in names:
        raise UserError(f"run '{folder}' keeps no features of test set '{target}'; it has: {', '.join(names)}.")
    if not target and len(names) > 1:
        raise UserError(f"run '{folder}' keeps features of {len(names)} test sets ({', '.join(names)}); name one of them.")
    parts = []
    for split in ("query", "gallery"):
        found = read_bank(place / f"{target or names[0]}-{split}.pt")
        parts.append(found.with_split(split))
    return joined(parts, source=str(folder))
