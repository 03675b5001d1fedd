"""Defects of the host, mended from outside. Each patch says what breaks without it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layout import HOST
from .pictures import patch_read_image

_USER_ERROR = re.compile(r"^(?:[\w.]*\.)?UserError: (?P<sentence>.+)$", re.MULTILINE)
_applied = False


def apply_patches() -> None:
    """Mend the host in this process; calling it again does nothing."""
    global _applied
    if _applied:
        return
    patch_read_image()
    _patch_dataset_sum()
    _patch_numpy_bool()
    _patch_traced_sizes()
    _applied = True


def worker_init(_worker_id: int) -> None:
    """Mend the host in a loader process that does not share this one's memory (start methods spawn and forkserver)."""
    apply_patches()


def clean_worker_error(error: BaseException) -> str:
    """Return the sentence of a :class:`UserError`, also of one that a loader process raised.

    torch raises a loader process's exception anew with the process's whole traceback as its message; the sentence is the
    last line of it.
    """
    text = str(error)
    found = _USER_ERROR.findall(text)
    return found[-1].strip() if found else text


def _patch_dataset_sum() -> None:
    """Adding data sets loses ``k_tfm`` and a data set's own way to read a sample.

    ``Dataset.__add__`` makes a plain ``ImageDataset`` with ``k_tfm=1``. The sum keeps ``k_tfm``, and where both data sets
    share a ``__getitem__`` of their own, also the class and attributes of the first.
    """
    base = HOST.data.Dataset
    plain = (HOST.data.ImageDataset.__getitem__, HOST.data.VideoDataset.__getitem__)
    host_add = base.__add__

    def add(self: Any, other: Any) -> Any:
        merged = host_add(self, other)
        merged.k_tfm = self.k_tfm
        if type(self).__getitem__ not in plain and type(self).__getitem__ is type(other).__getitem__:
            merged.__class__ = type(self)
            vars(merged).update({name: value for name, value in vars(self).items() if name not in vars(merged)})
        return merged

    base.__add__ = add


def _patch_numpy_bool() -> None:
    """``eval_cuhk03`` uses ``np.bool``, which numpy 1.24 took away and numpy 2 brought back as ``np.bool_``."""
    if not hasattr(np, "bool"):
        np.bool = np.bool_  # type: ignore[misc,assignment]


def _patch_traced_sizes() -> None:
    """ShuffleNet V2 asks ``x.data`` for its size, and HACNN writes into a table of zeros: both fix the size of a batch in
    every network that is traced or exported.
    """
    models: Any = HOST.models  # the original layout under another name has fewer
    if hasattr(models, "shufflenetv2"):
        models.shufflenetv2.channel_shuffle = channel_shuffle
    if hasattr(models, "hacnn"):
        models.hacnn.HACNN.transform_theta = transform_theta


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h, w): channel i of group g goes to place i * groups + g."""
    batch, _, height, width = x.size()
    return x.view(batch, groups, -1, height, width).transpose(1, 2).reshape(batch, -1, height, width)


def transform_theta(self: Any, theta_i: Tensor, region_idx: int) -> Tensor:
    """(B, 2) shifts -> (B, 2, 3) affine maps of a region: its scale beside the shift."""
    scale = self.scale_factors[region_idx].to(theta_i.device)
    return torch.cat([scale.expand(theta_i.size(0), 2, 2), theta_i.unsqueeze(2)], dim=2)
