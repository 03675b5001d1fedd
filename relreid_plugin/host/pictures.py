"""The host's data sets read pictures as the plug-in does: upright, in one documented depth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..data.images import read_image
from ..data.ranges import Range
from .layout import HOST

_range: ContextVar[Range | None] = ContextVar("pixel_range", default=None)


def patch_read_image() -> None:
    """Give the host the plug-in's reader.

    The host's tries for ever to read a corrupt file, leaves photos as the camera lay, and makes values of 16 bits white; the
    plug-in's raises a ``UserError`` that names the file. Data sets get an attribute ``pixel_range``: None, or what becomes
    black and white in files of more than 8 bits (``data.pixel_range``).
    """
    for module in (HOST.data.datasets.dataset, HOST.utils.tools, HOST.utils):
        module.read_image = _read_image  # type: ignore[attr-defined,union-attr]
    HOST.data.Dataset.pixel_range = None
    for cls in (HOST.data.ImageDataset, HOST.data.VideoDataset):
        cls.__getitem__ = _with_range(cls.__getitem__)


def _read_image(path: str) -> Any:
    """Read a picture with the range of the data set that asks for it."""
    return read_image(path, _range.get())


def _with_range(getitem: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    @functools.wraps(getitem)
    def read_item(self: Any, index: int) -> Any:
        token = _range.set(self.pixel_range)
        try:
            return getitem(self, index)
        finally:
            _range.reset(token)

    return read_item
