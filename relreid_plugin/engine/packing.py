"""What pruning computes on plain tensors: which units go, and how a tensor with many zeros is stored (METHODS 3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..moved import MOVED

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
RECORD_BYTES = 256
"""About what one more tensor costs in a file of torch, beside its values."""


def choose_units(scores: Tensor, sizes: Tensor, groups: Tensor, excess: int) -> Tensor:
    """Choose the units of lowest score to remove until ``excess`` parameters are gone; every group keeps its best unit.

    A unit that would take away more than is left to go, by the size of the smallest unit or more, waits until no smaller
    one is left, so that the result misses ``excess`` by less than the smallest unit wherever units of that size suffice.

    Args:
        scores: (U,) importance.
        sizes: (U,) parameters of each unit.
        groups: (U,) group of each unit, in [0, G).
        excess: Parameters to remove.

    Returns:
        (U,) mask of the units to remove; those of at least ``excess`` parameters, where there are so many.
    """
    removed = torch.zeros(len(scores), dtype=torch.bool)
    if excess <= 0 or not len(scores):
        return removed
    size_of, group_of, smallest = sizes.tolist(), groups.tolist(), int(sizes.min())
    left = torch.bincount(groups).tolist()
    waiting = torch.argsort(scores, stable=True).tolist()
    for patient in (True, False):
        later = []
        for unit in waiting:
            if excess <= 0:
                return removed
            group = group_of[unit]
            if left[group] == 1:
                continue
            if patient and size_of[unit] - excess >= smallest:
                later.append(unit)
                continue
            removed[unit] = True
            left[group] -= 1
            excess -= size_of[unit]
        waiting = later
    return removed


class Packed:
    """A tensor as the bits of what is not zero and the values there; ``torch.load`` gives the tensor itself back.

    Only :func:`unpack` is named in the file; a reader that loads weights only must know it
    (``torch.serialization.add_safe_globals``), as the plug-in's readers do.

    Args:
        bits: (ceil(n / 8),) uint8, one bit per entry.
        values: (k,) entries whose bit is set.
        shape: Of the tensor; n entries.
    """

    def __init__(self, bits: Tensor, values: Tensor, shape: tuple[int, ...]) -> None:
        self.bits, self.values, self.shape = bits, values, shape

    def __reduce__(self) -> tuple:
        return unpack, (self.bits, self.values, self.shape)


def pack(tensor: Tensor) -> Tensor | Packed:
    """Return the smaller of a tensor and its packed form, on the CPU, without other tensors that share its storage.

    Bits decide what is zero, so that a negative zero or a NaN comes back as it was.

    Args:
        tensor: Of any type; only floating point is packed.
    """
    dense = tensor.detach().cpu().contiguous()
    if dense.untyped_storage().nbytes() != dense.numel() * dense.element_size():
        dense = dense.clone()
    if not dense.is_floating_point() or not dense.numel():
        return dense
    flat = dense.flatten()
    mask = flat.view(_INTEGERS[dense.element_size()]) != 0
    bits = torch.from_numpy(np.packbits(mask.numpy()))
    if bits.numel() + int(mask.sum()) * dense.element_size() + RECORD_BYTES >= dense.numel() * dense.element_size():
        return dense
    return Packed(bits, flat[mask], tuple(dense.shape))


def unpack(bits: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of :class:`Packed`.

    Args:
        bits: (ceil(n / 8),) uint8.
        values: (k,).
        shape: n entries.

    Raises:
        ValueError: The parts do not belong together.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if bits.dtype != torch.uint8 or bits.numel() != (count + 7) // 8:
        raise ValueError(f"{bits.numel()} bytes of bits do not fit a tensor of shape {tuple(shape)}")
    mask = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(np.bool_))
    if int(mask.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values were stored for {int(mask.sum())} places")
    flat = torch.zeros(count, dtype=values.dtype)
    flat[mask] = values.cpu()
    return flat.view(tuple(shape))


__all__ = ["Packed", "choose_units", "pack", "unpack"]


# pruned checkpoints name the function that unpacks their tensors, those of earlier versions by the paths that it had then
_ROOT, _, _OWN = __name__.partition(".")
_BEFORE = [f"{_ROOT}.{old}.unpack" for old, new in MOVED.items() if new == _OWN]
torch.serialization.add_safe_globals([unpack, *((unpack, name) for name in _BEFORE)])
