"""Reading images, and checking at load time that every image can be read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
CHECK_MODES = ("none", "header", "full")

_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 64


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's; case does not matter, hidden files never count."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        UserError: The file is missing or is no whole image; the sentence names the file and the reason.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise all kinds of exceptions on broken files
        reason = _reason(path, error)
    raise UserError(f"image '{path}' {reason}; replace the file or take it out of the data set.")


def check_images(paths: Iterable[str | Path], mode: str = "header", *, progress: bool = True) -> None:
    """Check that image files are there and whole.

    Args:
        paths: Image files; a file named twice is checked once.
        mode: ``header``: open every file, read its header, and look for the mark at the end of a JPEG or PNG file (a file
            without it is decoded to decide); ``full``: decode every file; ``none``: nothing.
        progress: Show a progress bar on a terminal.

    Raises:
        UserError: The first file (in the order given) that is missing, empty, no image or truncated, its reason, and how
            many more there are.
    """
    if mode not in CHECK_MODES:
        raise ValueError(f"mode must be one of {', '.join(CHECK_MODES)}, got {mode!r}")
    files = list(dict.fromkeys(str(path) for path in paths))
    if mode == "none" or not files:
        return
    check = _check_header if mode == "header" else _check_full
    workers = min(8, 2 * (os.cpu_count() or 1))
    disable = None if progress else True
    with ThreadPoolExecutor(workers) as pool:
        reasons = list(tqdm(pool.map(check, files), total=len(files), desc="checking images", unit="img", disable=disable))
    bad = [(file, reason) for file, reason in zip(files, reasons) if reason]
    if bad:
        more = f" ({len(bad) - 1} more of {len(files)} images are bad)" if len(bad) > 1 else ""
        raise UserError(f"image '{bad[0][0]}' {bad[0][1]}{more}; replace the file or take it out of the data set.")


def _reason(path: str | Path, error: Exception) -> str:
    """Return why ``path`` could not be read, as the end of a sentence that begins with the file."""
    if isinstance(error, PermissionError):
        return "may not be read (permission denied)"
    if not os.path.exists(path):
        return "does not exist"
    if os.path.isdir(path):
        return "is a folder"
    if os.path.getsize(path) == 0:
        return "is empty (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not an image"
    detail = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"cannot be decoded ({detail})"


def _check_full(path: str) -> str:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # decoders raise all kinds of exceptions on broken files
        return _reason(path, error)
    return ""


def _check_header(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            with Image.open(stream) as image:
                mark = _END_MARKS.get(image.format or "")
                if mark is not None:
                    size = stream.seek(0, os.SEEK_END)
                    stream.seek(max(0, size - _TAIL_BYTES))
                    if mark in stream.read():
                        return ""
                elif image.format in ("BMP", "DIB") and not _is_short_bitmap(path, image):
                    return ""
    except Exception as error:  # decoders raise all kinds of exceptions on broken files
        return _reason(path, error)
    return _check_full(path)


def _is_short_bitmap(path: str, image: Image.Image) -> bool:
    """Whether an uncompressed bitmap's file is shorter than its pixels."""
    bits = {"1": 1, "L": 8, "P": 8, "RGB": 24, "RGBA": 32}.get(image.mode, 0)
    rows = (image.width * bits + 31) // 32 * 4 * image.height
    return bits == 0 or bool(image.info.get("compression")) or os.path.getsize(path) < rows
