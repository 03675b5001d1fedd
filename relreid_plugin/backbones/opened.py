"""A network that is ready for images, and how it wants to see them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, did_you_mean

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PERSON = (256, 128)
"""(height, width) of persons, as most of the field trains."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Reading:
    """How a network wants its images: squeezed to a size, scaled to [0, 1], normalised.

    Attributes:
        size: (height, width), pixels.
        mean: Of the three channels, red first, on the scale [0, 1].
        std: Their standard deviations.
        interpolation: One of :data:`INTERPOLATIONS`.
    """

    size: tuple[int, int] = PERSON
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    interpolation: str = "bilinear"

    def describe(self) -> str:
        """Return all of it in one line."""
        return f"{self.size[0]}x{self.size[1]}|{list(self.mean)}|{list(self.std)}|{self.interpolation}"


@dataclass
class Opened:
    """A network that is ready.

    Attributes:
        network: (B, 3, h, w) float32, as :class:`Reading` says -> (B, d); a module in evaluation mode, or any callable.
        reading: How it wants its images.
        title: What it is, in words.
        notes: What a user should know: what was loaded, and what was left out.
        threads: Whether several threads may call it at once.
        identity: Hash of its weights; empty: that of the module's state.
        pixel_range: [low, high] that it was trained with, of pictures of more than 8 bits per channel; empty: none.
        run: The run that it is of, where it is of one.
        extractor: What makes its extractor, where it takes other things than single pictures.
    """

    network: Callable[[Tensor], Tensor]
    reading: Reading = field(default_factory=Reading)
    title: str = ""
    notes: list[str] = field(default_factory=list)
    threads: bool = True
    identity: str = ""
    pixel_range: Sequence[float] = ()
    run: Any = None
    extractor: Callable[..., Any] | None = None

    def fingerprint(self) -> str:
        """Return a hash of the weights and of how images are read; features of different ones are never compared."""
        if not self.identity:
            if not isinstance(self.network, nn.Module):
                raise ValueError("a network that is no module needs an identity")
            self.identity = weights_hash(self.network)
        return hashlib.sha256(f"{self.identity}|{self.reading.describe()}".encode()).hexdigest()[:20]


def weights_hash(model: nn.Module) -> str:
    """Return a short hash of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
    return digest.hexdigest()[:20]


def check_size(value: Any, *, key: str = "size") -> tuple[int, int]:
    """Return an image size as (height, width).

    Args:
        value: A pair, a whole number for a square, or ``256x128`` as text.
        key: What it is called in the sentence.

    Raises:
        UserError: It is something else, or not within 1 to 4096 pixels.
    """
    pair: Any = value
    if isinstance(value, str):
        parts = value.lower().replace(",", "x").split("x")
        pair = [int(part) if part.strip().isdigit() else part for part in parts]
        pair = pair * 2 if len(pair) == 1 else pair
    elif isinstance(value, int):
        pair = (value, value)
    good = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not good or any(isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= 4096 for side in pair):
        raise UserError(f"{key} must be (height, width) in pixels, such as 256x128, got {value!r}.")
    return int(pair[0]), int(pair[1])


def check_reading(
    base: Reading,
    *,
    size: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
) -> Reading:
    """Return a reading with what a user gives instead.

    Raises:
        UserError: A size, statistics or interpolation that cannot be.
    """
    chosen = base.interpolation if interpolation is None else str(interpolation)
    if chosen not in INTERPOLATIONS:
        raise UserError(f"interpolation is '{chosen}'{did_you_mean(chosen, INTERPOLATIONS)}")
    return Reading(
        base.size if size is None else check_size(size),
        base.mean if mean is None else _triple("mean", mean),
        base.std if std is None else _triple("std", std, positive=True),
        chosen,
    )


def _triple(name: str, values: Any, *, positive: bool = False) -> tuple[float, ...]:
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    good = len(numbers) == 3 and all(
        isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each) for each in numbers
    )
    if not good or (positive and min(numbers) <= 0):
        kind = "three positive numbers" if positive else "three numbers"
        raise UserError(f"{name} must be {kind} for red, green and blue on the scale [0, 1], got {values!r}.")
    return tuple(float(each) for each in numbers)


@dataclass(frozen=True)
class Request:
    """What a user says beside a network's name.

    Attributes:
        weights: A file of weights, or a folder of the hub's layout; empty: none is named.
        pretrained: Take the library's own weights, over the network or from its cache.
        size, mean, std, interpolation: How images are read instead; None: as the network wants them.
        overrides: ``KEY VALUE …`` over the configuration of a run.
        options: What the shapes in a checkpoint of a family do not tell, by name.
    """

    weights: str = ""
    pretrained: bool = False
    size: Any = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    overrides: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def reading(self, own: Reading) -> Reading:
        """Return how images are read: as the network wants them, but for what is given here.

        Raises:
            UserError: Values that cannot be.
        """
        return check_reading(own, size=self.size, mean=self.mean, std=self.std, interpolation=self.interpolation)

    def image_size(self, own: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width): what is given here, else ``own``."""
        return own if self.size is None else check_size(self.size)

    def refuse(self, what: str, *, but: Sequence[str] = ()) -> None:
        """Raise a sentence where something is given that ``what`` does not take.

        Args:
            what: What is opened, in words.
            but: Names of attributes that it takes.
        """
        for name in ("weights", "pretrained", "size", "mean", "std", "interpolation", "overrides", "options"):
            if name not in but and getattr(self, name) not in (None, "", (), False, {}):
                raise UserError(f"{what} does not take '{name}'; leave it out.")


__all__ = [
    "HALF",
    "IMAGENET",
    "INTERPOLATIONS",
    "PERSON",
    "Opened",
    "Reading",
    "Request",
    "check_reading",
    "check_size",
    "weights_hash",
]
