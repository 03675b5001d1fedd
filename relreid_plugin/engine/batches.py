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


def check_batches(model: nn.Module, loader: Any, *, classified: Callable[[int], int] = int) -> None:
    """Raise when a training batch puts a single vector through a normalisation over the batch, which has no variance then.

    Args:
        model: The model.
        loader: Its training loader.
        classified: Items of a batch -> vectors that reach the normalisation.

    Raises:
        UserError: Such a batch.
    """
    items = smallest_batch(loader)
    if classified(items) < 2 and any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        least = next(count for count in range(2, 100) if classified(count) >= 2)
        raise UserError(
            f"a training batch has {items} image{'' if items == 1 else 's'} ('train.batch_size', or all that train), too few "
            f"for batch normalisation, which needs {least}; raise 'train.batch_size', or train on more images."
        )
