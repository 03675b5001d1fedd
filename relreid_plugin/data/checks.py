"""Checking at load time that every image can be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .files import Unreadable
from .images import IMAGE_EXTENSIONS, Header, Picture, header_of, is_image_name, load_picture, opened, read_image
from .ranges import RANGE_KEY, needs_range

CHECK_MODES = ("none", "header", "full")

_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 64

Judge = Callable[[str, Header, Picture | None], None]
"""Takes a file, its header and, where it was decoded, its picture; raises
:class:`~relreid_plugin.data.files.Unreadable` where they do not please."""


def check_images(
    paths: Iterable[str | Path],
    mode: str = "header",
    *,
    pixel_range: Sequence[float] | None = None,
    key: str = RANGE_KEY,
    progress: bool = True,
) -> None:
    """Check that image files are there, whole, and of a depth that can be read.

    Args:
        paths: Image files; a file named twice is checked once.
        mode: ``header``: open every file, read its header, and look for the mark at the end of a JPEG or PNG file (a file
            without it is decoded to decide); ``full``: decode every file; ``none``: nothing.
        pixel_range: (low, high) for files of more than 8 bits per channel; none: such files are refused. Whether their
            values lie in it only ``full`` finds out.
        key: The key of the range, for the sentences.
        progress: Show a progress bar on a terminal.

    Raises:
        UserError: The first file (in the order given) that is missing, no regular file, empty, no image, truncated or too
            deep, its reason, and how many more there are.
    """

    def judge(_file: str, header: Header, picture: Picture | None) -> None:
        if header.depth and not pixel_range:
            raise Unreadable(*needs_range(header.depth, key))
        if header.depth and picture is not None:
            picture.to_rgb(pixel_range, key=key)

    check_each(paths, mode, judge, progress=progress)


def check_each(paths: Iterable[str | Path], mode: str, judge: Judge, *, progress: bool = True) -> list[Header]:
    """:func:`check_images` with a judge of one's own.

    Returns:
        The header of every file, in the order in which files are first named; none in the mode ``none``.
    """
    if mode not in CHECK_MODES:
        raise ValueError(f"mode must be one of {', '.join(CHECK_MODES)}, got {mode!r}")
    files = list(dict.fromkeys(str(path) for path in paths))
    if mode == "none" or not files:
        return []
    workers = min(8, 2 * (os.cpu_count() or 1))
    disable = None if progress else True
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(partial(_check, mode=mode, judge=judge), files)
        results = list(tqdm(found, total=len(files), desc="checking images", unit="img", disable=disable))
    bad = [(file, result) for file, result in zip(files, results) if isinstance(result, Unreadable)]
    if bad:
        more = f" ({len(bad) - 1} more of {len(files)} images are bad)" if len(bad) > 1 else ""
        raise UserError(bad[0][1].sentence(bad[0][0], more))
    return [result for result in results if isinstance(result, Header)]


def _check(path: str, mode: str, judge: Judge) -> Header | Unreadable:
    try:
        with opened(path) as image:
            header = header_of(image, path)
            ends_well = image is not None and _ends_well(path, image)
        picture = load_picture(path) if mode == "full" or not ends_well else None
        judge(path, header, picture)
    except Unreadable as error:
        return error
    return header


def _ends_well(path: str, image: Image.Image) -> bool:
    """Whether the end of a file shows that it is whole; where it does not, the file may be whole all the same."""
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        if image.format in ("BMP", "DIB"):
            return not _is_short_bitmap(size, image)
        mark = _END_MARKS.get(image.format or "")
        stream.seek(max(0, size - _TAIL_BYTES))
        return mark is not None and mark in stream.read()


def _is_short_bitmap(size: int, image: Image.Image) -> bool:
    """Whether an uncompressed bitmap's file of ``size`` bytes is shorter than its pixels."""
    bits = {"1": 1, "L": 8, "P": 8, "RGB": 24, "RGBA": 32}.get(image.mode, 0)
    rows = (image.width * bits + 31) // 32 * 4 * image.height
    return bits == 0 or bool(image.info.get("compression")) or size < rows


__all__ = ["CHECK_MODES", "IMAGE_EXTENSIONS", "check_each", "check_images", "is_image_name", "read_image"]
