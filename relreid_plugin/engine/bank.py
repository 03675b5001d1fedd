"""The feature bank: image features of a set of images, kept on disk and used again while nothing changed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluation.features import FeatureSet
from . import checkpoint as ckpt


def bank_key(model_fingerprint: str, records: list[tuple], description: str) -> str:
    """Return a key that changes with the model's weights, the image files (path, size, time) and how they are read.

    Args:
        model_fingerprint: From :func:`relreid_plugin.engine.checkpoint.fingerprint`.
        records: The host's tuples (path or paths, pid, camid, …).
        description: Transform, image size, augmentation and seed in words.
    """
    digest = hashlib.sha256(f"{model_fingerprint}|{description}".encode())
    for record in records:
        for path in [record[0]] if isinstance(record[0], str) else record[0]:
            status = os.stat(path)
            digest.update(f"{path}|{status.st_size}|{status.st_mtime_ns}|{record[1]}|{record[2]}".encode())
    return digest.hexdigest()[:20]


def bank_file(folder: Path, name: str) -> Path:
    """Return the file of the bank ``name``, which may be a path."""
    return folder / f"{re.sub(r'[/:]', '_', name.replace(os.sep, '_'))}.pt"


def read_bank(stored: dict[str, Any]) -> FeatureSet:
    """Return what a bank's file holds."""
    return FeatureSet(
        stored["features"],
        stored["pids"].numpy(),
        stored["camids"].numpy(),
        stored["paths"],
        dict(stored.get("identity_names", {})),
    )


def load_or_extract(folder: Path, name: str, key: str, extract: Callable[[], FeatureSet]) -> FeatureSet:
    """Return the stored features of ``name`` when they carry ``key``, else extract and store them.

    A stored bank that cannot be read counts as absent: it is extracted again.

    Args:
        folder: Folder of banks.
        name: Name of the set, such as ``train`` or ``market1501-query``.
        key: From :func:`bank_key`.
        extract: Called when there is nothing to use again.
    """
    path = bank_file(folder, name)
    if path.is_file():
        try:
            stored = torch.load(path, weights_only=True)
            if stored["key"] == key:
                return read_bank(stored)
        except Exception as error:
            print(f"feature bank '{path}' cannot be read ({type(error).__name__}); extracting it again.")
    bank = extract()
    with ckpt.atomic_file(path) as temporary:
        torch.save(
            {
                "key": key,
                "features": bank.features,
                "pids": torch.from_numpy(np.ascontiguousarray(bank.pids)),
                "camids": torch.from_numpy(np.ascontiguousarray(bank.camids)),
                "paths": bank.paths,
                "identity_names": bank.identity_names,
            },
            temporary,
        )
    return bank
