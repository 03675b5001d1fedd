"""Small pictures inside the page, within a limit of bytes; what is left out is counted."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..data.images import read_image
from ..errors import UserError

HEIGHT = 112
"""Pixels; the width is at most twice that."""
_QUALITY = 72


class Thumbnails:
    """The pictures of a page: every file once.

    Args:
        budget: Bytes of the page that they may take.
        pixel_range: See :func:`~relreid_plugin.data.images.read_image`.

    Attributes:
        pictures: Base64 of the JPEG files, by number.
        left_out: Files for which there was no room.
        missing: Files that are not there.
        unreadable: Sentences on those that could not be read.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.pictures: list[str] = []
        self.left_out = 0
        self.unreadable: list[str] = []
        self.missing: list[str] = []
        self._numbers: dict[str, int] = {}

    def add(self, paths: Iterable[str], pixel_range: Sequence[float] | None = None) -> None:
        """Read files in the order of their worth; from the first one that does not fit on, none is taken."""
        wanted = [path for path in dict.fromkeys(paths) if path and path not in self._numbers]
        for path in tqdm(wanted, desc="thumbnails", leave=False, disable=None):
            if self.left_out:
                self.left_out += 1
                continue
            if not Path(path).is_file():
                self.missing.append(path)
                self._numbers[path] = -1
                continue
            try:
                text = small(read_image(path, pixel_range))
            except UserError as error:
                self.unreadable.append(str(error))
                self._numbers[path] = -1
                continue
            if len(text) + 4 > self.budget:
                self.left_out += 1
                continue
            self.budget -= len(text) + 4
            self._numbers[path] = len(self.pictures)
            self.pictures.append(text)

    def number(self, path: str) -> int:
        """Return the number of a file's picture, -1 without one."""
        return self._numbers.get(path, -1)

    def sentences(self) -> list[str]:
        """Return what is missing, in words."""
        out = []
        if self.left_out:
            out.append(
                f"{self.left_out} of {self.left_out + len(self.pictures)} pictures are left out, as the page would be "
                "larger than its limit; raise it by --limit MB."
            )
        if self.missing:
            out.append(f"{len(self.missing)} pictures are not there; the first: '{self.missing[0]}'.")
        if self.unreadable:
            out.append(f"{len(self.unreadable)} pictures could not be read; the first: {self.unreadable[0]}")
        return out


def small(picture: Image.Image) -> str:
    """Return a picture as base64 of a small JPEG file."""
    copy = picture.convert("RGB")
    copy.thumbnail((2 * HEIGHT, HEIGHT), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    copy.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
