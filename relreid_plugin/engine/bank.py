"""The feature bank: image features of a set of images, kept on disk and used again while nothing changed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..features.banks import bank_features
from ..features.sets import Features
from ..files import WriteError
from . import checkpoint as ckpt
from .distributed import from_main, main


def bank_key(model_fingerprint: str, records: list[tuple], description: str) -> str:
    """Return a key that changes with the model's weights, the image files (path, size, time) and how they are read.

    Args:
        model_fingerprint: From :func:`relreid_plugin.backbones.opened.weights_hash`.
        records: The host's tuples (path or paths, pid, camid, …).
        description: Transform, image size, augmentation and seed in words.
    """
    digest = hashlib.sha256(f"{model_fingerprint}|{description}".encode())
    for record in records:
        own = getattr(record[0], "fingerprint", None)  # a feature that is given, whatever file it lies in
        if own is not None:
            digest.update(own() + f"|{record[0]}|{record[1]}|{record[2]}".encode(errors="surrogateescape"))
            continue
        for path in [record[0]] if isinstance(record[0], str) else record[0]:
            status = os.stat(path)
            digest.update(
                f"{path}|{status.st_size}|{status.st_mtime_ns}|{record[1]}|{record[2]}".encode(errors="surrogateescape")
            )
    return digest.hexdigest()[:20]


def bank_file(folder: Path, name: str) -> Path:
    """Return the file of the set ``name``, which may be a path; one too long for a file's name is cut, with a hash."""
    plain = re.sub(r"[/:]", "_", name.replace(os.sep, "_"))
    if len(plain.encode("utf-8", "surrogateescape")) > 160:
        plain = f"{plain[:20]}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}-{plain[-20:]}"
    return folder / f"{plain}.pt"


def load_or_extract(
    folder: Path, name: str, key: str, extract: Callable[[], Features], *, optional: bool = False
) -> Features:
    """Return the stored features of ``name`` when they carry ``key``, else extract and store them.

    A stored bank that cannot be read, or whose checksum is wrong, counts as absent: it is extracted again, and that is said.

    Args:
        folder: Folder of banks.
        name: Name of the set, such as ``train`` or ``market1501-query``.
        key: From :func:`bank_key`.
        extract: Called when there is nothing to use again.
        optional: Go on without keeping the features where ``folder`` may not be written to.

    Raises:
        WriteError: The features cannot be kept.
    """
    path = bank_file(folder, name)
    found: list[Features] = []

    def usable() -> bool:
        """Whether the first of all processes can use what is there; it is read."""
        if path.is_file():
            try:
                stored = ckpt.read_tensors(path)
                if stored["key"] == key:
                    found.append(bank_features(stored))
            except Exception as error:
                reason = str(error) if isinstance(error, ValueError) else type(error).__name__
                print(f"feature bank '{path}' cannot be read ({reason}); extracting it again.")
        return bool(found)

    if from_main(usable):
        return found[0] if found else bank_features(ckpt.read_tensors(path))
    bank = extract()
    if not main():
        return bank
    try:
        _keep(path, key, bank)
    except WriteError as error:
        if not (optional and error.read_only):
            raise
        print(f"note: features are not kept: {error}")
    return bank


def _keep(path: Path, key: str, bank: Features) -> None:
    ckpt.write_tensors(
        path,
        {
            "key": key,
            "features": bank.features,
            "pids": torch.from_numpy(np.ascontiguousarray(bank.pids)),
            "camids": torch.from_numpy(np.ascontiguousarray(bank.camids)),
            "paths": bank.paths,
            "identity_names": bank.identity_names,
        },
    )
