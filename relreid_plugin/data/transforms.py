"""Training augmentation beside the host's list.

The host builds its transforms from names and skips a name it does not know without a word. Here names are checked first, the
host builds the ones it knows, and the plug-in's own are put into the composition that it built.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps
from torchvision import transforms as T

from ..errors import UserError, did_you_mean

HOST_TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")
PLUGIN_TRANSFORMS = ("pad_crop",)


class PadCrop:
    """Pad an image with black pixels and crop a window of its own size at a random place.

    Args:
        padding: Pixels added on every side.
    """

    def __init__(self, padding: int = 10) -> None:
        self.padding = padding

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a crop of the size of ``image``, a PIL image."""
        width, height = image.size
        left, top = random.randint(0, 2 * self.padding), random.randint(0, 2 * self.padding)
        padded = ImageOps.expand(image, border=self.padding, fill=0)
        return padded.crop((left, top, left + width, top + height))

    def __repr__(self) -> str:
        return f"PadCrop(padding={self.padding})"


def split_transform_names(names: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Sort the names of ``data.transforms`` into the host's and the plug-in's.

    Args:
        names: Names, in any case.

    Returns:
        The host's names and the plug-in's names, in lower case.

    Raises:
        UserError: A name that neither knows; the nearest one is given.
    """
    lowered = [names.lower()] if isinstance(names, str) else [str(name).lower() for name in names]
    known = HOST_TRANSFORMS + PLUGIN_TRANSFORMS
    for name in lowered:
        if name not in known:
            raise UserError(f"key 'data.transforms' holds '{name}', which is no known transform{did_you_mean(name, known)}")
    return [n for n in lowered if n in HOST_TRANSFORMS], [n for n in lowered if n in PLUGIN_TRANSFORMS]


def add_plugin_transforms(compose: T.Compose, names: Sequence[str]) -> None:
    """Put the plug-in's transforms into a composition of the host's, after resizing and flipping.

    Args:
        compose: The host's training transform; changed in place, so data sets that hold it see the change.
        names: Names out of :data:`PLUGIN_TRANSFORMS`.
    """
    place = 0
    while place < len(compose.transforms) and isinstance(compose.transforms[place], (T.Resize, T.RandomHorizontalFlip)):
        place += 1
    if "pad_crop" in names and not any(isinstance(step, PadCrop) for step in compose.transforms):
        compose.transforms.insert(place, PadCrop())


def reset_transforms(datamanager: Any) -> None:
    """Empty what transforms remember from image to image; call it before every epoch.

    The host's ``RandomPatch`` collects patches. Loader processes start every epoch with none, but without such processes
    (``data.workers 0``) the pool lives on from epoch to epoch and a resumed run could not have it.

    Args:
        datamanager: A data manager of the host's with ``transform_tr``.
    """
    for step in getattr(datamanager.transform_tr, "transforms", []):
        pool = getattr(step, "patchpool", None)
        if pool is not None:
            pool.clear()
