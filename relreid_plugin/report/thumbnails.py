"""Small pictures inside the page, within a limit of bytes; what is left out is counted."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data.overlays import overlay
from ..errors import UserError

Read = Callable[[str], Image.Image]

HEIGHT = 112
"""Pixels; the width is at most twice that."""
_QUALITY = 72


class Thumbnails:
    """The pictures of a page: every file once.

    Args:
        budget: Bytes of the page that they may take.

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
        self.missing: dict[str, None] = {}
        self._numbers: dict[tuple[str, str], int] = {}

    def add(self, paths: Iterable[str], read: Read, kind: str = "") -> None:
        """Read files in the order of their worth; from the first one that does not fit on, none is taken.

        Args:
            paths: The files.
            read: Returns a file's picture, small already.
            kind: Tells several pictures of the same file.
        """
        wanted = [path for path in dict.fromkeys(paths) if path and (path, kind) not in self._numbers]
        for path in tqdm(wanted, desc="thumbnails", leave=False, disable=None if len(wanted) > 1 else True):
            if self.left_out:
                self.left_out += 1
                continue
            if not Path(path).is_file():
                self.missing.setdefault(path)
                self._numbers[path, kind] = -1
                continue
            try:
                text = encoded(read(path))
            except UserError as error:
                self.unreadable.append(str(error))
                self._numbers[path, kind] = -1
                continue
            if len(text) + 4 > self.budget:
                self.left_out += 1
                continue
            self.budget -= len(text) + 4
            self._numbers[path, kind] = len(self.pictures)
            self.pictures.append(text)

    def number(self, path: str, kind: str = "") -> int:
        """Return the number of a file's picture, -1 without one."""
        return self._numbers.get((path, kind), -1)

    def sentences(self) -> list[str]:
        """Return what is missing, in words."""
        out = []
        if self.left_out:
            out.append(
                f"{self.left_out} of {self.left_out + len(self.pictures)} pictures are left out, as the page would be "
                "larger than its limit; raise it by --limit MB."
            )
        if self.missing:
            out.append(f"{len(self.missing)} pictures are not there; the first: '{next(iter(self.missing))}'.")
        if self.unreadable:
            out.append(f"{len(self.unreadable)} pictures could not be read; the first: {self.unreadable[0]}")
        return out


def small(picture: Image.Image) -> Image.Image:
    """Return a picture at the size of the page."""
    copy = picture.convert("RGB")
    copy.thumbnail((2 * HEIGHT, HEIGHT), Image.Resampling.BILINEAR)
    return copy


def is_stacked(pictures: Sequence[Image.Image]) -> bool:
    """Whether several pictures of a sample are shown one below the other: they are wider than high."""
    return pictures[0].width > pictures[0].height


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return several pictures of a sample as one, in cells of the first one's shape, at the size of the page."""
    width, height = pictures[0].size
    scale = HEIGHT / max(width, height)
    cell = (max(1, round(scale * width)), max(1, round(scale * height)))
    step = (0, cell[1]) if is_stacked(pictures) else (cell[0], 0)
    last = len(pictures) - 1
    out = Image.new("RGB", (cell[0] + last * step[0], cell[1] + last * step[1]))
    for place, picture in enumerate(pictures):
        resized = picture.convert("RGB").resize(cell, Image.Resampling.BILINEAR)
        out.paste(resized, (place * step[0], place * step[1]))
    return out


def overlaid(picture: Image.Image, weights: np.ndarray) -> Image.Image:
    """Return a picture under weights (h, w) in [0, 1] that are stretched over it."""
    grid = Image.fromarray(weights.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    values = overlay(np.asarray(picture, np.float64)[None] / 255, np.asarray(grid, np.float64)[None])[0]
    return Image.fromarray((255 * values).round().astype(np.uint8))


def encoded(picture: Image.Image) -> str:
    """Return a picture as base64 of a JPEG file."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
