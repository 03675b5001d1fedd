"""The one reader of pictures: upright, RGB, 8 bits per channel, or a sentence that says why not.

- **Orientation.** The EXIF orientation is applied, whatever the format that carries it. Broken EXIF data counts as none.
- **Depth.** Files of up to 8 bits per channel are taken as they are: bilevel and palette pictures in their colours, one
  channel of grey three times, CMYK converted; transparency is dropped, the stored colours stay. Files of more (16 and 32
  bits, signed, floating point) need a range ``[low, high]``: low becomes 0, high 255, linearly, rounded to 8 bits. Nothing
  is clipped: a value outside is an error. A range does not touch files of 8 bits.
- **One picture per file.** Animations and files of several pages are refused; of the photos that phones store with a preview
  or a second view (MPO), the first is the photo.
- **Regular files only.** FIFOs, sockets and devices are told without opening them.

Shape letters: h x w pixels, c channels.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from .deep import (
    TIFF_MARKS,
    TURNS,
    depth_of,
    describe,
    from_bytes,
    is_grey,
    is_tiff,
    orientation,
    read_deep,
    read_tiff,
    several_pictures,
    tiff_page,
)
from .files import Unreadable, detail, why_not_regular
from .ranges import RANGE_KEY, needs_range

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

_EXIF_IFD, _TAKEN = 0x8769, 36867
_PHOTOS = ("JPEG", "MPO", "TIFF", "WEBP")
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "SGI", "PCX", "TGA")


@dataclass(frozen=True)
class Header:
    """What a file says of its picture before it is decoded.

    Attributes:
        size: (width, height) of the upright picture.
        depth: How its values are stored, in words; empty where they have 8 bits or fewer.
        grey: Whether there is one channel.
    """

    size: tuple[int, int]
    depth: str
    grey: bool


@dataclass(frozen=True)
class Picture:
    """An upright picture: RGB of 8 bits, or values (h, w, c) that need a range.

    Attributes:
        path: Its file.
        pixels: What was read.
    """

    path: str
    pixels: Image.Image | np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        pixels = self.pixels
        return pixels.size if isinstance(pixels, Image.Image) else (pixels.shape[1], pixels.shape[0])

    def columns(self, left: int, right: int) -> Picture:
        """Return the part between two columns, the right one outside."""
        if isinstance(self.pixels, Image.Image):
            return Picture(self.path, self.pixels.crop((left, 0, right, self.pixels.height)))
        return Picture(self.path, self.pixels[:, left:right])

    def to_rgb(self, pixel_range: Sequence[float] | None = None, *, key: str = RANGE_KEY) -> Image.Image:
        """Return RGB of 8 bits per channel.

        Args:
            pixel_range: (low, high), what becomes black and white in files of more than 8 bits; none: such files are
                refused.
            key: The key of the range, for the sentences.

        Raises:
            Unreadable: Values of more than 8 bits without a range, or outside it.
        """
        values = self.pixels
        if isinstance(values, Image.Image):
            return values
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise Unreadable("holds values that are no numbers (NaN or infinite)")
        lowest, highest = values.min(), values.max()
        if not pixel_range:
            raise Unreadable(*needs_range(f"{describe(values.dtype)} (from {lowest:.10g} to {highest:.10g})", key))
        low, high = float(pixel_range[0]), float(pixel_range[1])
        with np.errstate(over="ignore"):  # 0.1 is not the 0.1 of 32 bits
            ends = np.array([low, high], values.dtype if values.dtype.kind == "f" else np.float64)
        if lowest < ends[0] or highest > ends[1]:
            raise Unreadable(
                f"holds values from {lowest:.10g} to {highest:.10g}, outside the range [{low:.10g}, {high:.10g}] of {key}",
                "widen the range, since nothing is clipped, or take the file out of the data set",
            )
        return from_bytes(np.rint((values.astype(np.float64) - low) * (255.0 / (high - low))).astype(np.uint8))


class TooLarge(Unreadable):
    """A picture of more pixels than anybody would decode."""


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's; case does not matter, hidden files never count."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)


def read_image(path: str | Path, pixel_range: Sequence[float] | None = None, *, key: str = RANGE_KEY) -> Image.Image:
    """Read a picture upright, as RGB of 8 bits per channel.

    Args:
        path: The file.
        pixel_range: (low, high), what becomes black and white in files of more than 8 bits per channel; none: such files
            are refused.
        key: The key of the range, for the sentences.

    Raises:
        UserError: The file is missing, no regular file, or no whole picture of a known kind; or it has more than 8 bits
            without a range, or values outside it. The sentence names the file and the reason.
    """
    try:
        return load_picture(path).to_rgb(pixel_range, key=key)
    except Unreadable as error:
        sentence = error.sentence(path)
    raise UserError(sentence)


def read_picture(path: str | Path) -> Picture:
    """Read a picture upright, its values as they are.

    Raises:
        UserError: As :func:`read_image`, without regard to the range.
    """
    try:
        return load_picture(path)
    except Unreadable as error:
        sentence = error.sentence(path)
    raise UserError(sentence)


def load_picture(path: str | Path) -> Picture:
    """:func:`read_picture` that raises :class:`Unreadable`."""
    with opened(path) as image:
        if image is None:
            values = read_tiff(path)
            return Picture(str(path), from_bytes(values) if values.dtype == np.uint8 else values)
        if depth_of(image, path):
            return Picture(str(path), read_deep(image, path))
        return Picture(str(path), _upright(image))


def load_stream(stream: BinaryIO) -> Picture | None:
    """:func:`load_picture` of the content of a file; None for kinds whose decoders take files alone: TIFF, and those of more
    than 8 bits.

    Raises:
        Unreadable: It is no picture, one of several pages, or broken.
    """
    with _decoding():
        try:
            image = Image.open(stream, formats=_formats())
        except UnidentifiedImageError:
            stream.seek(0)
            if stream.read(4) in TIFF_MARKS:
                return None
            raise Unreadable("is not an image") from None
        with image:
            _require_one_picture(image)
            if image.format in ("TIFF", "JPEG2000", "AVIF", "SGI") or depth_of(image, ""):
                return None
            return Picture("", _upright(image))


def stream_size(stream: BinaryIO) -> tuple[int, int] | None:
    """(width, height) of an encoded picture as it is stored, from its beginning; None for what Pillow does not know.

    Raises:
        TooLarge: It names more pixels than Pillow opens.
        Unreadable: Its beginning is broken.
    """
    with _decoding():
        try:
            with Image.open(stream, formats=_formats()) as image:
                return image.size
        except UnidentifiedImageError:
            return None
        except Image.DecompressionBombError:
            raise TooLarge("has more pixels than can be opened", "make it smaller") from None


def taken_at(path: str | Path) -> float:
    """Return when a photo was taken, in seconds since 1970; NaN where the file is gone.

    That is what its EXIF data say (``DateTimeOriginal``, in this machine's time zone), else when the file was last changed.
    """
    try:
        if why_not_regular(path):  # opening a FIFO waits
            return os.stat(path).st_mtime
        with Image.open(path, formats=_formats()) as image:
            written = image.getexif().get_ifd(_EXIF_IFD).get(_TAKEN) if image.format in _PHOTOS else None
        if isinstance(written, str):
            return datetime.strptime(written.strip("\0 "), "%Y:%m:%d %H:%M:%S").timestamp()
    except Exception:  # no picture, or broken EXIF data: the file still has a time
        pass
    try:
        return os.stat(path).st_mtime
    except (OSError, ValueError):
        return math.nan


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # a PNG file may carry its orientation behind its pixels
    turn = TURNS.get(orientation(image))
    return (image if turn is None else image.transpose(turn)).convert("RGB")


def read_header(path: str | Path) -> Header:
    """Return what a file says of its picture; of most files only the beginning is read.

    Raises:
        Unreadable: The file is missing, no regular file, of several pages, or no picture of a known kind.
    """
    with opened(path) as image:
        return header_of(image, path)


def header_of(image: Image.Image | None, path: str | Path) -> Header:
    """:func:`read_header` of a file that :func:`opened` opened and that was not decoded."""
    if image is not None:
        return Header(_upright_size(image, path), depth_of(image, path), is_grey(image))
    page = tiff_page(path)
    return Header(page.size, "" if page.dtype == np.uint8 else describe(page.dtype), page.colours == 1)


# ---------------------------------------------------------------------------------------------------------------------
# Opening


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that are read, as far as this Pillow has them; their depth is known, and none runs another program."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image | None]:
    """Open a regular file that holds one picture; None stands for a TIFF file of a kind that Pillow does not know.

    Raises:
        Unreadable: The file cannot be opened, or what is done with it fails.
    """
    reason = why_not_regular(path)
    if reason:
        raise Unreadable(reason)
    with _decoding():
        if os.path.getsize(path) == 0:
            raise Unreadable("is empty (0 bytes)")
        try:
            image = Image.open(path, formats=_formats())
        except UnidentifiedImageError:
            if not is_tiff(path):
                raise Unreadable("is not an image") from None
            image = None  # type: ignore[assignment]
        if image is None:
            yield None
            return
        with image:
            _require_one_picture(image)
            yield image


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn what decoders raise into :class:`Unreadable`."""
    try:
        yield
    except Unreadable:
        raise
    except PermissionError:
        raise Unreadable("may not be read (permission denied)") from None
    except Exception as error:  # decoders raise all kinds of exceptions on broken files
        raise Unreadable(f"cannot be decoded ({detail(error)})") from None


def _require_one_picture(image: Image.Image) -> None:
    """Refuse animations and files of several pages; reduced copies of the first page (TIFF) are no pages."""
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format == "MPO":
        return
    if image.format == "TIFF":
        pages = 0
        for number in range(frames):
            image.seek(number)
            pages += not int(image.tag_v2.get(254, 0)) & 0b101  # type: ignore[attr-defined]  # reduced copy, mask
        image.seek(0)
        if pages <= 1:
            return
        frames = pages
    raise Unreadable(*several_pictures(frames))


def _upright_size(image: Image.Image, path: str | Path) -> tuple[int, int]:
    """(width, height) as :func:`load_picture` gives them, from the header."""
    width, height = image.size
    if image.format == "TIFF":  # some versions of Pillow turn the size of an unread file, some do not
        tags = image.tag_v2  # type: ignore[attr-defined]
        width, height = int(tags[256]), int(tags[257])
    elif image.format == "PNG" and "exif" not in image.info and not _may_be_turned(path):
        return width, height  # asking for EXIF data would decode the file
    return (height, width) if orientation(image) > 4 else (width, height)


def _may_be_turned(path: str | Path) -> bool:
    """Whether a PNG file has a chunk that may hold an orientation."""
    with open(path, "rb") as stream:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            if head[4:] in (b"eXIf", b"zTXt", b"tEXt", b"iTXt"):
                return True
            stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False
