"""Features without splits, divided by a rule that is written beside them, so that it is the same next time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..data.parts import SEED, keep_parts, split_file
from ..data.rules import RULES, Parts, divide
from ..errors import UserError, did_you_mean
from .sets import Features


def divided(features: Features, path: Path | str, rule: str, *, train: bool = False) -> tuple[Parts, str]:
    """Divide features by a rule, or as they were divided before.

    Args:
        features: With identities.
        path: Where they were read from; the parts are written beside it.
        rule: One of :data:`~relreid_plugin.data.rules.RULES`.
        train: Whether training images are needed.

    Returns:
        Rows of train, query and gallery, and a sentence that says how they were divided.

    Raises:
        UserError: See :func:`~relreid_plugin.data.rules.divide`; or the file of the parts is damaged or of other features.
    """
    if rule not in RULES:
        raise UserError(f"there is no rule '{rule}' to divide features by{did_you_mean(rule, RULES)}")
    what = f"'{features.source or path}'"
    kept = keep_parts(
        path,
        split_file(path, rule, train=train),
        rule=rule,
        labels=_digest(features),
        count=len(features),
        what="features",
        make=lambda: divide(features.pids, features.camids, features.times, rule, train=train, seed=SEED, what=what),
    )
    return kept.parts, kept.said


def _digest(features: Features) -> str:
    digest = hashlib.sha256()
    columns: list[Any] = [features.pids, features.camids]
    for column in columns + ([] if features.times is None else [features.times]):
        digest.update(np.ascontiguousarray(column).tobytes() + b"|")
    for name in features.paths:
        digest.update(os.path.basename(name).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:20]


__all__ = ["divided", "split_file"]
