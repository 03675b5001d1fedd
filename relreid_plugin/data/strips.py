"""Strips, which hold the views of a sample side by side: how many there are, and what a wrong one seems to be."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .files import Unreadable
from .images import read_header, read_picture
from .samples import _STRIP_SPLITS, MODALITIES, _list_images, _require_samples, _split_folder
from .views import uneven

VIEW_ASPECT = 2.0
"""Width over height of a view in a strip: 256 x 128 pixels."""

_ASPECT_TOLERANCE = 0.05


def _strip_mistake(file: str, modalities: tuple[str, ...], any_aspect: bool) -> str:
    """Return what is wrong with the size of a strip, or nothing."""
    try:
        width, height = read_header(file).size
    except Unreadable as error:
        return error.sentence(file).removesuffix(".")
    count = len(modalities)
    fits = _has_view_aspect(width / count, height)
    if width % count == 0 and (fits or any_aspect):
        return ""
    seems = _count_views(width, height)
    if not any_aspect and seems and seems != count:
        return _other_views(file, (width, height), modalities, seems)
    if width % count:
        return uneven(file, (width, height), modalities)
    return (
        f"strip '{file}' of {width}x{height} pixels gives {count} views of {width // count}x{height}, but a view is twice "
        "as wide as high (256x128); make strips of such views"
    )


def _has_view_aspect(width: float, height: int) -> bool:
    return abs(width / height / VIEW_ASPECT - 1) <= _ASPECT_TOLERANCE


def _count_views(width: int, height: int) -> int:
    """Return how many views of the usual shape a strip holds, 0 where that does not come out even."""
    count = round(width / (VIEW_ASPECT * height))
    return count if count and width % count == 0 and _has_view_aspect(width / count, height) else 0


def _other_views(file: str, size: tuple[int, int], modalities: tuple[str, ...], seems: int) -> str:
    names = list(MODALITIES)[:seems]
    example = f", such as [{', '.join(names)}]" if len(names) == seems else ""
    return (
        f"strip '{file}' of {size[0]}x{size[1]} pixels seems to have {seems} view{'s' if seems > 1 else ''}, but is read as "
        f"{', '.join(modalities)}; name {seems} in 'multimodal.modalities'{example}, and a data set with as many "
        "(rgbnt100 has three, rgbn300 two)"
    )


def _guess_modalities(folder: Path) -> tuple[str, ...]:
    """Name the views of a data set of strips by their number in its first training strip."""
    base = folder / "rgbir" if (folder / "rgbir").is_dir() else folder
    place = _split_folder(base, _STRIP_SPLITS["train"], "rgbir/{bounding_box_train,query,bounding_box_test}")
    files = _list_images(place)
    _require_samples(files, place)
    size = read_picture(files[0]).size
    seems = _count_views(*size)
    if not 2 <= seems <= len(MODALITIES):
        raise UserError(
            f"image '{files[0]}' of {size[0]}x{size[1]} pixels is no strip of two or three views of 256x128; name the views "
            "in 'multimodal.modalities'."
        )
    return tuple(MODALITIES)[:seems]
