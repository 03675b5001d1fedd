"""Augmentation of samples with several views: one geometry for all views of a sample, erasing for each of its own.

Shapes: M modalities, H height, W width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError, did_you_mean

MULTIMODAL_TRANSFORMS = ("random_flip", "random_vflip", "random_crop", "pad_crop", "random_erase")

_ENLARGEMENT = 1.125
_ERASED_AREA = (0.02, 0.4)
_ERASED_ASPECT = 0.3
_ERASE_ATTEMPTS = 100


class MultimodalTransform:
    """Turn the views of a sample into one tensor, in training with augmentation.

    Views are resized (bicubic), normalised with the numbers of their modality, and stacked. In training:

    - ``random_flip``, ``random_vflip``: mirror left-right, top-bottom, with probability 0.5 each;
    - ``random_crop``: with probability 0.5, a window of 8/9 of height and width at a random place, scaled to full size (the
      host's enlarge-and-crop in one resampling);
    - ``pad_crop``: pad with black pixels on every side and cut out a window of full size at a random place;
    - ``random_erase``: after normalisation, with probability 0.5 for each view on its own, a random rectangle is set to 0
      (Zhong et al., Random Erasing Data Augmentation, AAAI 2020: area 2 % to 40 %, aspect 0.3 to 1/0.3).

    Geometry is drawn once per sample, so that all views are flipped and cropped alike (GraFT, section 5.2, with one erasing
    per view). All draws come from Python's global generator and none depends on the images.

    Args:
        height: Pixels.
        width: Pixels.
        names: Augmentations for training, in any order and case; the order in which they act is that of
            :data:`MULTIMODAL_TRANSFORMS`.
        mean: Per modality, the mean of pixels in [0, 1]: three numbers, or one for all channels.
        std: Per modality, the standard deviation: three numbers, or one for all channels.
        training: Augment; else the names have no effect.
        padding: Pixels that ``pad_crop`` adds on every side.

    Raises:
        UserError: An unknown name, or means and deviations that do not fit each other.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        names: Sequence[str] = (),
        mean: Sequence[Sequence[float]],
        std: Sequence[Sequence[float]],
        training: bool,
        padding: int = 10,
    ) -> None:
        self.height, self.width = height, width
        self.names = check_names(names)
        self.training = training
        self.padding = padding
        means, deviations = _channels("mean", mean), _channels("std", std)
        if len(means) != len(deviations):
            raise UserError(
                f"key 'multimodal.mean' has numbers for {len(means)} modalities, but 'multimodal.std' for "
                f"{len(deviations)}; give both for every modality."
            )
        if min(min(row) for row in deviations) <= 0:
            raise UserError("key 'multimodal.std' holds a number that is not above 0; measure it with relreid stats.")
        shape = (len(means), 3, 1, 1)
        deviation = torch.tensor(deviations, dtype=torch.float64).view(shape)
        self._scale = (1 / (255 * deviation)).float()
        self._shift = (-torch.tensor(means, dtype=torch.float64).view(shape) / deviation).float()

    def __call__(self, views: Sequence[Image.Image]) -> Tensor:
        """Transform a sample.

        Args:
            views: One RGB image per modality, of any sizes.

        Returns:
            Tensor (M, 3, H, W), float32.
        """
        if len(views) != len(self._scale):
            raise ValueError(f"{len(views)} views for the mean and std of {len(self._scale)} modalities")
        flip = self._active("random_flip") and random.random() < 0.5
        vflip = self._active("random_vflip") and random.random() < 0.5
        window = self._draw_window()
        pixels = np.stack([np.asarray(self._resize(view, window)) for view in views])  # (M, H, W, 3)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (M, 3, H, W), 8 bits
        axes = [axis for axis, turned in ((3, flip), (2, vflip)) if turned]
        if axes:
            images = images.flip(axes)
        if self._active("pad_crop"):
            left, top = random.randint(0, 2 * self.padding), random.randint(0, 2 * self.padding)
            images = F.pad(images, [self.padding] * 4)[..., top : top + self.height, left : left + self.width]
        result = torch.addcmul(self._shift, images.float(), self._scale).contiguous()
        if self._active("random_erase"):
            for view in result:
                if random.random() < 0.5:
                    self._erase(view)
        return result

    def _active(self, name: str) -> bool:
        return self.training and name in self.names

    def _draw_window(self) -> tuple[float, float, float, float]:
        """Return the part of every view that is kept, (left, top, right, bottom) as shares of width and height."""
        if not self._active("random_crop") or random.random() >= 0.5:
            return 0.0, 0.0, 1.0, 1.0
        size = 1 / _ENLARGEMENT
        left, top = random.random() * (1 - size), random.random() * (1 - size)
        return left, top, left + size, top + size

    def _resize(self, view: Image.Image, window: tuple[float, float, float, float]) -> Image.Image:
        width, height = view.size
        left, top, right, bottom = window
        box = (left * width, top * height, min(right, 1.0) * width, min(bottom, 1.0) * height)
        return view.convert("RGB").resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)

    def _erase(self, view: Tensor) -> None:
        """Set a random rectangle of one view (3, H, W) to 0, the mean after normalisation."""
        for _ in range(_ERASE_ATTEMPTS):
            area = random.uniform(*_ERASED_AREA) * self.height * self.width
            aspect = random.uniform(_ERASED_ASPECT, 1 / _ERASED_ASPECT)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height < self.height and 0 < width < self.width:
                top, left = random.randint(0, self.height - height), random.randint(0, self.width - width)
                view[:, top : top + height, left : left + width] = 0.0
                return

    def __repr__(self) -> str:
        names = ", ".join(self.names) if self.training else "no augmentation"
        return f"MultimodalTransform({self.height}x{self.width}, {len(self._scale)} modalities, {names})"


def check_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of augmentations in lower case and in the order in which they act.

    Raises:
        UserError: A name that is not in :data:`MULTIMODAL_TRANSFORMS`; the nearest one is given.
    """
    lowered = [names.lower()] if isinstance(names, str) else [str(name).lower() for name in names]
    for name in lowered:
        if name not in MULTIMODAL_TRANSFORMS:
            raise UserError(
                f"key 'data.transforms' holds '{name}', which is no transform of multimodal data"
                f"{did_you_mean(name, MULTIMODAL_TRANSFORMS)}"
            )
    return tuple(name for name in MULTIMODAL_TRANSFORMS if name in lowered)


def _channels(key: str, rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return three numbers per modality."""
    result = []
    for row in rows:
        numbers = [float(value) for value in (row if isinstance(row, Sequence) else [row])]
        if len(numbers) not in (1, 3) or not all(math.isfinite(value) for value in numbers):
            raise UserError(
                f"key 'multimodal.{key}' gives a modality the numbers {numbers}; it takes three (red, green, blue), or "
                "one for all."
            )
        result.append(numbers * 3 if len(numbers) == 1 else numbers)
    if not result:
        raise UserError(f"key 'multimodal.{key}' is empty; give numbers for every modality, or measure them.")
    return result
