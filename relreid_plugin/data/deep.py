"""Pictures of more than 8 bits per channel: finding them by their headers, and decoding them without loss.

Pillow opens many of them and reduces some to 8 bits without a word (colours of 16 bits): its mode alone does not tell.

Shape letters: h x w pixels, c channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..errors import needed
from .files import Unreadable, detail

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""

_CONVERT = "save it as 8 bits, or as PNG or TIFF of one or three channels"
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_COLOURS = {(1, 1): 1, (1, 2): 1, (2, 3): 3, (2, 4): 3}  # (1: black is 0 | 2: RGB, channels) -> without transparency


def describe(dtype: np.dtype) -> str:
    """Return how values are stored, in words."""
    bits = 8 * dtype.itemsize
    if dtype.kind == "u":
        return f"{bits} bits per channel"
    return f"{'signed' if dtype.kind == 'i' else 'floating-point'} values of {bits} bits"


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an open file, 1 to 8; broken EXIF data counts as none."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # parsers raise all kinds of exceptions on broken data
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def turn(values: np.ndarray, number: int) -> np.ndarray:
    """Turn values (h, w, c) upright, as :data:`TURNS` turns pictures."""
    if number > 4:
        values = values.swapaxes(0, 1)
    if number in (3, 4, 7, 8):
        values = values[::-1]
    if number in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def from_bytes(values: np.ndarray) -> Image.Image:
    """Return values (h, w, 1 or 3) of 8 bits as an RGB picture."""
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3))))


# ---------------------------------------------------------------------------------------------------------------------
# Headers


def depth_of(image: Image.Image, path: str | Path) -> str:
    """Return how an open file stores its values, in words; empty for 8 bits or fewer.

    Raises:
        Unreadable: Values of more bits in a file of a kind that cannot be decoded without loss.
    """
    if image.format == "TIFF":
        return _tiff_depth(image, path)
    raw = list(_raw_modes(image))
    if image.mode == "F":
        depth = "floating-point values of 32 bits"
    elif image.mode.startswith("I") or any(";16" in str(mode) for mode in raw) or _largest_value(image, raw) > 255:
        depth = "16 bits per channel"
    elif image.format in ("JPEG2000", "AVIF", "SGI"):
        bits = _compressed_bits(image.format, Path(path).read_bytes())
        depth = f"{bits} bits per channel" if bits > 8 else ""
    else:
        depth = ""
    exact = image.format == "PNG" or (image.format == "PPM" and (image.mode == "F" or "I;16B" in raw))
    if depth and not exact:
        raise Unreadable(f"has {depth}, which cannot be read from {image.format} files", _CONVERT)
    return depth


def is_grey(image: Image.Image) -> bool:
    """Whether an open file has one channel, not counting transparency."""
    return image.mode.split(";")[0] in ("1", "L", "LA", "La", "I", "F") or "LA;16B" in _raw_modes(image)


def _raw_modes(image: Image.Image) -> Iterable[Any]:
    """What a file's decoders are told: modes, and the largest value of a PPM file."""
    for tile in getattr(image, "tile", []):
        yield from tile[3] if isinstance(tile[3], tuple) else (tile[3],)


def _largest_value(image: Image.Image, raw: Iterable[Any]) -> int:
    return max((mode for mode in raw if isinstance(mode, int) and image.format == "PPM"), default=0)


def _tiff_depth(image: Any, path: str | Path) -> str:
    bits, kinds, channels = (image.tag_v2.get(tag, (1,)) for tag in (258, 339, 277))
    deepest, kind = max(bits), max(kinds)
    if np.max(channels) > 4:
        raise Unreadable(f"is a TIFF file of {np.max(channels)} channels, and which are meant cannot be told", _CONVERT)
    if deepest <= 8 and kind not in (2, 3):
        return ""
    return describe(tiff_page(path).dtype)


def _compressed_bits(form: str, data: bytes) -> int:
    """Bits per channel in the headers of formats that Pillow reduces to 8."""
    if form == "SGI":
        return 8 * data[3]
    if form == "AVIF":
        place = data.find(b"av1C")
        return 8 if place < 0 or not data[place + 6] & 0x40 else 12 if data[place + 6] & 0x20 else 10
    place = data.find(b"\xff\x4f\xff\x51")  # JPEG 2000: start of the codestream, sizes of the channels
    channels = int.from_bytes(data[place + 40 : place + 42], "big")
    sizes = data[place + 42 : place + 42 + 3 * channels : 3]
    return 8 if place < 0 or not sizes else max((size & 0x7F) + 1 for size in sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def read_deep(image: Image.Image, path: str | Path) -> np.ndarray:
    """Return the values (h, w, c) of an open file that :func:`depth_of` says is deep, upright, without transparency.

    Raises:
        Unreadable: The file is broken.
    """
    if image.format == "TIFF":
        return read_tiff(path)
    grey = is_grey(image)
    image.load()  # whole, or an error
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)[..., np.newaxis]
        values = values.astype(np.uint16) if values.dtype.kind == "i" else values
    else:  # a PNG file of several channels: Pillow would reduce it
        cv2 = needed("cv2", f"'{path}', a PNG file of 16 bits per channel,")
        decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None or decoded.dtype != np.uint16 or decoded.shape[:2] != (image.height, image.width):
            raise Unreadable("has 16 bits per channel and cannot be decoded", _CONVERT)
        values = decoded[..., :1] if grey else decoded[..., 2::-1]
    return turn(values, orientation(image))


def is_tiff(path: str | Path) -> bool:
    """Whether a file begins like a TIFF file."""
    with open(path, "rb") as stream:
        return stream.read(4) in TIFF_MARKS


@dataclass(frozen=True)
class TiffPage:
    """The one page of a TIFF file.

    Attributes:
        shape: (h, w), (h, w, c) or, plane by plane, (c, h, w).
        dtype: Of its values.
        colours: Channels without transparency.
        planes: Whether the channels follow one another.
        orientation: As stored, 1 to 8.
        place: Where in the file the orientation is stored, and in which order of bytes; None where it is not.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    colours: int
    planes: bool
    orientation: int
    place: tuple[int, str] | None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        height, width = self.shape[1:] if self.planes else self.shape[:2]
        return (height, width) if self.orientation > 4 else (width, height)


def tiff_page(path: str | Path) -> TiffPage:
    """Return what a TIFF file's tags say of its one picture.

    Raises:
        Unreadable: The file is broken, has several pages, or is of a kind that is not read.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            pages = _real_pages(file)
            page = pages[0]
            photometric, samples, bits = page.photometric, page.samplesperpixel, page.bitspersample
            tag = page.tags.get(274)
            turned = tag is not None and tag.value in range(1, 9)
            result = TiffPage(
                shape=tuple(page.shape),
                dtype=np.dtype(page.dtype if page.dtype is not None else np.void),
                colours=_TIFF_COLOURS.get((int(photometric), samples), 0),
                planes=samples > 1 and int(page.planarconfig) == 2,
                orientation=int(tag.value) if turned else 1,
                place=(tag.valueoffset, "little" if file.byteorder == "<" else "big") if turned else None,
            )
    except Exception as error:  # broken files
        raise Unreadable(f"cannot be decoded ({detail(error)})") from None
    if len(pages) > 1:
        raise Unreadable(*several_pictures(len(pages)))
    known = result.colours and result.dtype.kind in "uif" and bits == 8 * result.dtype.itemsize
    if not known or len(result.shape) != (2 if samples == 1 else 3):
        raise Unreadable(
            f"is a TIFF file of a kind that is not read (channels: {samples}, bits per channel: {bits}, photometric "
            f"interpretation: {getattr(photometric, 'name', photometric)})",
            _CONVERT,
        )
    return result


def _real_pages(file: Any) -> list[Any]:
    """The pages that are no reduced copies or masks; pages that lead back to earlier ones end the list."""
    pages: list[Any] = []
    seen: set[int] = set()
    for page in file.pages:
        if page.offset in seen:
            break
        seen.add(page.offset)
        if not (page.is_reduced or page.is_mask):
            pages.append(page)
    return pages


def several_pictures(count: int) -> tuple[str, str]:
    """Return reason and remedy of a file that holds several pictures."""
    return (
        f"holds {count} pictures, and which one is meant cannot be told",
        "save the one that is meant in a file of its own",
    )


def read_tiff(path: str | Path) -> np.ndarray:
    """Return the values (h, w, c) of a TIFF file of any depth, upright, without transparency.

    Raises:
        Unreadable: As :func:`tiff_page`, or its values cannot be decoded.
    """
    import tifffile

    page = tiff_page(path)
    try:
        values = tifffile.imread(path, key=0)
    except Exception as error:  # a compression that needs another package, or a broken file
        decoded = None if page.planes else _decode_by_opencv(path, page)
        if decoded is None:
            raise Unreadable(f"cannot be decoded ({detail(error)})", _CONVERT) from None
        values = decoded
    values = np.moveaxis(values, 0, -1) if page.planes else values
    values = values[..., np.newaxis] if values.ndim == 2 else values
    return turn(values[..., : page.colours], page.orientation)


def _decode_by_opencv(path: str | Path, page: TiffPage) -> np.ndarray | None:
    """Values of a page in the order of the file, or None."""
    cv2 = needed("cv2", f"'{path}', a TIFF file of this kind,")
    data = bytearray(Path(path).read_bytes())
    if page.place is not None:  # OpenCV turns some kinds and leaves others
        start, order = page.place
        data[start : start + 2] = b"\1\0" if order == "little" else b"\0\1"
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != page.dtype or decoded.shape != page.shape:
        return None
    return decoded if decoded.ndim == 2 else decoded[..., 2::-1]
