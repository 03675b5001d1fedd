"""Batches that a network cannot train on, found out before the first one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UserError


def smallest_batch(loader: Any) -> int:
    """Return the number of items in the smallest batch of an epoch.

    Args:
        loader: A training loader with a sampler of known length.
    """
    items, size = len(loader.sampler), int(loader.batch_size)
    return min(items, size) if loader.drop_last or items <= size else (items % size or size)


def check_batches(
    model: nn.Module, loader: Any, *, identities: int, classified: Callable[[int], int] = lambda items: items
) -> None:
    """Raise when nothing can be learned: one identity, or batches that put a single vector through a batch normalisation.

    Args:
        model: The model.
        loader: Its training loader.
        identities: Training identities.
        classified: Items of a batch -> vectors that reach the normalisation.

    Raises:
        UserError: A single identity, or such a batch.
    """
    if identities < 2:
        raise UserError(
            f"'data.sources' give {identities} training identit{'y' if identities == 1 else 'ies'} (less those held out by "
            "'train.val_fraction'), but 2 are needed to tell apart."
        )
    items = smallest_batch(loader)
    if classified(items) < 2 and any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        least = next(count for count in range(2, 100) if classified(count) >= 2)
        raise UserError(
            f"a training batch has {items} image{'' if items == 1 else 's'} ('train.batch_size', or all that train), but "
            f"batch normalisation needs {least}; raise 'train.batch_size', or train on more images."
        )
