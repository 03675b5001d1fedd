"""Any picture that a program may hold, as RGB of 8 bits: files, their bytes, PIL images, arrays, tensors.

====================================== ===============================================================================
a path                                 the file, by :func:`~relreid_plugin.data.images.read_image`
``bytes`` or a binary file object      an encoded picture, by the same reader
a PIL image                            turned upright by its EXIF data, in RGB; transparency is dropped
an array (h, w), (h, w, 1 | 3 | 4)     ``uint8``: grey, RGB or RGBA, BGR where it is said so; transparency is dropped
a tensor (h, w), (1 | 3 | 4, h, w)     the same, with channels first
arrays and tensors of other types      need the range of values that becomes black and white
arrays and tensors of four dimensions  so many pictures
====================================== ===============================================================================

Shape letters: n pictures, h x w pixels, c channels, k boxes.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import UserError, shown
from .deep import TURNS, from_bytes, orientation
from .files import Unreadable, printable
from .images import Picture, TooLarge, load_picture, load_stream, read_header, stream_size
from .ranges import Range

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in whole pixels, the last two outside."""

KEY = "pixel_range"
_KINDS = "a path, bytes, a PIL image, an array or a tensor"


def is_photo(value: Any) -> bool:
    """Whether a value stands for one picture, not for several."""
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim < 4
    return isinstance(value, (str, os.PathLike, Image.Image, bytes, bytearray, memoryview)) or hasattr(value, "read")


def each_photo(images: Any) -> Iterator[Any]:
    """Yield the pictures of what a user gives: one, or an iterable, array or tensor of them.

    Raises:
        UserError: It is neither.
    """
    if is_photo(images):
        yield images
    elif isinstance(images, (np.ndarray, Tensor)):
        if images.ndim != 4:
            raise UserError(
                f"images are {_form(images)}; give pictures of two or three dimensions, or several in one of four."
            )
        yield from images
    elif isinstance(images, Iterable) and not isinstance(images, Mapping):
        yield from images
    else:
        raise UserError(f"images are a {type(images).__name__}, not {_KINDS}, or a list or iterator of them.")


def count_photos(images: Any) -> int | None:
    """Return how many pictures :func:`each_photo` will yield, None where that is known at the end only."""
    if is_photo(images):
        return 1
    return len(images) if hasattr(images, "__len__") else None


def called(item: Any, index: int) -> str:
    """Return how a sentence names a picture: by its file, else by its place in what was given."""
    if isinstance(item, (str, os.PathLike)):
        try:
            return f"image '{printable(os.fsdecode(os.fspath(item)))}'"
        except TypeError:
            pass
    return f"image {index} ({_form(item)})"


def _form(item: Any) -> str:
    if isinstance(item, (np.ndarray, Tensor)):
        kind = "an array" if isinstance(item, np.ndarray) else "a tensor"
        return f"{kind} of shape {tuple(item.shape)}, {str(item.dtype).removeprefix('torch.')}"
    if isinstance(item, (bytes, bytearray, memoryview)):
        return f"{len(item)} bytes"
    return f"a {type(item).__name__}"


def read_photo(
    item: Any, *, bgr: bool = False, pixel_range: Range | None = None, index: int = 0, key: str = KEY
) -> Image.Image:
    """Return one picture upright as RGB of 8 bits.

    Args:
        item: What the table of this module lists.
        bgr: Arrays and tensors of three and four channels begin with blue; other kinds know their colours themselves.
        pixel_range: (low, high) that become black and white in values of other types than 8 bits.
        index: Its place among others, for sentences.
        key: The range's name, for sentences.

    Raises:
        UserError: It is none of them, or cannot be read.
    """
    try:
        return _picture(item, bgr).to_rgb(pixel_range, key=f"'{key}'")
    except Unreadable as error:
        sentence = f"{called(item, index)} {error.reason}; {error.remedy}."
    raise UserError(sentence)


class TooManyPixels(UserError):
    """A picture that is larger than somebody wants to decode."""


def check_pixels(data: bytes, most: int) -> None:
    """Refuse an encoded picture of more than ``most`` pixels; nothing is decoded.

    Raises:
        TooManyPixels: It has more.
        UserError: It is no picture.
    """
    try:
        size = stream_size(io.BytesIO(data))
        if size is None:
            with _as_file(data) as path:
                size = read_header(path).size
    except Unreadable as error:
        kind = TooManyPixels if isinstance(error, TooLarge) else UserError
        raise kind(f"{called(data, 0)} {error.reason}; {error.remedy}.") from None
    if size[0] * size[1] > most:
        raise TooManyPixels(f"{called(data, 0)} has {size[0]}x{size[1]} pixels, more than {most:,}; make it smaller.")


@contextmanager
def _as_file(data: bytes) -> Iterator[Path]:
    """An encoded picture as a file, for kinds whose decoders take files alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(data)
        yield path


def _picture(item: Any, bgr: bool) -> Picture:
    if isinstance(item, (str, os.PathLike)):
        return load_picture(_path(item))
    if isinstance(item, (bytes, bytearray, memoryview)):
        return _from_encoded(bytes(item))
    if isinstance(item, Image.Image):
        return Picture("", _from_pil(item))
    if isinstance(item, Tensor):
        return _from_tensor(item, bgr)
    if isinstance(item, np.ndarray):
        return _from_array(item, bgr)
    if hasattr(item, "read"):
        data = item.read()
        if not isinstance(data, bytes):
            raise Unreadable("is a file of text", "open it by open(FILE, 'rb')")
        return _from_encoded(data)
    raise Unreadable(f"is not {_KINDS}", "convert it to one of these")


def _path(item: str | os.PathLike[Any]) -> str:
    path = os.fsdecode(os.fspath(item))
    if os.path.isdir(path):
        raise Unreadable("is a folder", "name its files; list_images(FOLDER) lists them")
    return path


def _from_encoded(data: bytes) -> Picture:
    if not data:
        raise Unreadable("is empty (0 bytes)", "give the content of an image file")
    picture = load_stream(io.BytesIO(data))
    if picture is not None:
        return picture
    with _as_file(data) as path:
        return load_picture(path)


def _from_pil(image: Image.Image) -> Image.Image | np.ndarray:
    if not image.width or not image.height:
        raise Unreadable("has no pixels", "leave it out")
    number = orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        from .deep import turn

        return turn(np.asarray(image)[..., np.newaxis], number)
    method = TURNS.get(number)
    try:
        return (image if method is None else image.transpose(method)).convert("RGB")
    except Exception as error:  # a file that PIL opened and cannot decode, a closed one, a mode without colours
        raise Unreadable(f"cannot be decoded ({' '.join(str(error).split())[:120]})", "open it again") from None


def _from_tensor(item: Tensor, bgr: bool) -> Picture:
    if item.is_sparse or item.is_quantized or item.is_meta or item.is_complex():
        raise Unreadable("holds no plain numbers", "give it as uint8")
    values = item.detach().cpu()
    if values.dtype.is_floating_point and str(values.dtype) not in ("torch.float16", "torch.float32", "torch.float64"):
        values = values.float()
    if values.ndim == 3:
        if values.shape[0] not in (1, 3, 4):
            raise Unreadable("has its channels not first", "give (channels, height, width), with 1, 3 or 4 channels")
        values = values.permute(1, 2, 0)
    return _from_array(values.numpy(), bgr)


def _from_array(values: np.ndarray, bgr: bool) -> Picture:
    if values.dtype.kind not in "uif":
        raise Unreadable("holds no pixel values", "give it as uint8")
    if values.ndim == 2:
        values = values[..., np.newaxis]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        first = values.ndim == 3 and values.shape[0] in (1, 3, 4)
        raise Unreadable(
            "has its channels first" if first else "is no picture",
            "give (height, width) or (height, width, channels), with 1, 3 or 4 channels"
            + (", by array.transpose(1, 2, 0)" if first else ""),
        )
    if 0 in values.shape:
        raise Unreadable("has no pixels", "leave it out")
    if values.shape[2] == 4:
        values = values[..., :3]
    if bgr and values.shape[2] == 3:
        values = values[..., ::-1]
    return Picture("", from_bytes(values) if values.dtype == np.uint8 else values)


# --- boxes ------------------------------------------------------------------------------------------------------------
def check_boxes(boxes: Any, *, index: int = 0) -> np.ndarray:
    """Return detections as an array (k, 4) of float64.

    Args:
        boxes: Left, top, right, bottom in pixels, (k, 4): a list, array or tensor, or an object with them in ``.xyxy``; one
            box of four numbers counts as (1, 4).
        index: The frame's place, for sentences.

    Raises:
        UserError: They have another form, or hold numbers that are not finite.
    """
    given = getattr(boxes, "xyxy", boxes)
    if isinstance(given, Tensor):
        given = given.detach().cpu().float().numpy() if not given.is_complex() else None
    try:
        values = np.asarray(given if given is not None else "none", dtype=np.float64)
    except (TypeError, ValueError):
        values = np.zeros((0, 0))
        given = None
    if values.size == 0 and given is not None:
        return np.zeros((0, 4))
    if values.ndim == 1 and len(values) == 4:
        values = values[np.newaxis]
    if values.ndim != 2 or values.shape[1] != 4:
        raise UserError(f"crops of frame {index} must be boxes (left, top, right, bottom), (k, 4), got {shown(boxes)}.")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values).all(axis=1)).argmax())
        raise UserError(f"box {bad} of frame {index} holds NaN or infinity: {values[bad].tolist()}.")
    return values


def clip_boxes(boxes: np.ndarray, size: tuple[int, int], *, index: int = 0, first: int = 0) -> list[Box]:
    """Return boxes in whole pixels within a frame: grown to whole pixels, then clipped.

    Args:
        boxes: (k, 4) of :func:`check_boxes`.
        size: (width, height) of the frame.
        index: The frame's place, for sentences.
        first: The place of the first box.

    Raises:
        UserError: A box is empty or inverted, or lies outside the frame.
    """
    found: list[Box] = []
    for number, (left, top, right, bottom) in enumerate(boxes.tolist(), first):
        if right <= left or bottom <= top:
            what = "inverted" if right < left or bottom < top else "empty"
            reason = f"is {what} (left, top, right, bottom: {left:g}, {top:g}, {right:g}, {bottom:g})"
            raise UserError(f"box {number} of frame {index} {reason}; give boxes as xyxy, and leave such ones out.")
        box = (
            max(0, math.floor(left)),
            max(0, math.floor(top)),
            min(size[0], math.ceil(right)),
            min(size[1], math.ceil(bottom)),
        )
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UserError(
                f"box {number} of frame {index} lies outside the frame of {size[0]}x{size[1]} pixels (left, top, right, "
                f"bottom: {left:g}, {top:g}, {right:g}, {bottom:g}); leave it out."
            )
        found.append(box)
    return found


def pair_crops(images: Any, crops: Any) -> list[tuple[Any, np.ndarray]]:
    """Return frames with their boxes.

    Args:
        images: One frame, or a list of frames.
        crops: The boxes of the one frame, or for every frame its own.

    Raises:
        UserError: Another number of frames than of sets of boxes, or boxes that are none.
    """
    if is_photo(images):
        return [(images, check_boxes(crops))]
    frames = list(each_photo(images))
    sets: Sequence[Any] = list(crops) if isinstance(crops, Iterable) else [crops]
    if len(sets) != len(frames):
        raise UserError(
            f"there are {len(frames)} frames and crops for {len(sets)}; give every frame its own boxes, (k, 4), "
            "an empty list where there are none."
        )
    return [(frame, check_boxes(boxes, index=index)) for index, (frame, boxes) in enumerate(zip(frames, sets))]


__all__ = [
    "Box",
    "TooManyPixels",
    "called",
    "check_boxes",
    "check_pixels",
    "clip_boxes",
    "count_photos",
    "each_photo",
    "is_photo",
    "pair_crops",
    "read_photo",
]
