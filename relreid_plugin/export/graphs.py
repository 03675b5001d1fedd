"""What is exported: a module with the names of its inputs and outputs, and what the file says of it.

Shape letters: B images, M modalities, h x w pixels, H x W pixels of a photo, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, did_you_mean
from .resizing import Resize

FORMAT = 1


@dataclass
class Graph:
    """A module that is exported.

    Attributes:
        module: Takes the inputs in order; in evaluation mode, on the CPU.
        inputs: Examples by name.
        outputs: Names.
        dynamic: Name of an input or output to its axes of any length, with a name for each.
        about: What the file says of itself.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    dynamic: dict[str, dict[int, str]]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(value.numel() * value.element_size() for value in self.module.state_dict().values())


class ImageGraph(nn.Module):
    """Images, and what else a network reads, to features.

    Args:
        network: Maps images to (B, d), in evaluation mode.
        present: Modalities that are given, for networks of several ones; ``None``: all, or a network of single images.
        preprocessing: Turns photos into what the network takes; ``None``: that is given.
    """

    def __init__(
        self, network: nn.Module, *, present: Sequence[str] | None = None, preprocessing: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing
        self.present = None if present is None else tuple(present)

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """(B, 3, h, w) or (B, M, 3, h, w) normalised, or photos (B, H, W, 3) of bytes, and rows (B,) -> (B, d)."""
        if self.preprocessing is not None:
            images = self.preprocessing(images)
        if self.present is not None:
            return self.network(images, self.present)
        return self.network(images) if cameras is None else self.network(images, cameras)


class Preprocessing(nn.Module):
    """Resize, scale and normalise photos as the extractor does.

    Args:
        size: (h, w).
        mean, std: Of red, green and blue on the scale [0, 1].
        interpolation: See :class:`~relreid_plugin.export.resizing.Resize`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], *, interpolation: str = "bilinear"
    ) -> None:
        super().__init__()
        self.resize = Resize(size, interpolation=interpolation)
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1), persistent=False)

    def forward(self, photos: Tensor) -> Tensor:
        """(B, H, W, 3) bytes, RGB -> (B, 3, h, w) float32."""
        return (self.resize(photos.permute(0, 3, 1, 2).float()) / 255.0 - self.mean) / self.std


def image_graph(
    network: nn.Module,
    *,
    size: tuple[int, int],
    mean: Sequence[Any],
    std: Sequence[Any],
    interpolation: str = "bilinear",
    with_preprocessing: bool = False,
    subset: Sequence[str] = (),
    about: dict[str, Any] | None = None,
) -> Graph:
    """Return the graph of an image model.

    Args:
        network: In evaluation mode, on the CPU. With ``modalities`` it takes (B, M, 3, h, w); with ``uses_cameras`` also
            rows of its camera embedding, where -1, and any row that it does not have, is an unknown camera.
        size: (h, w).
        mean, std: For every channel, or for every modality.
        interpolation: How photos are resized.
        with_preprocessing: Take photos of any size as bytes.
        subset: Modalities that are given; empty: all.
        about: Further entries of what the file says of itself.

    Raises:
        UserError: An unknown modality, or preprocessing of several modalities.
    """
    modalities = list(getattr(network, "modalities", ()))
    present = _subset(modalities, subset)
    height, width = size
    preprocessing = None
    if with_preprocessing:
        if modalities:
            raise UserError(
                "photos of several modalities differ in depth and size and are read one by one; leave out "
                "--with-preprocessing for a multimodal model."
            )
        preprocessing = Preprocessing(size, mean, std, interpolation=interpolation)
        images = torch.randint(0, 256, (2, height + 9, width + 5, 3), dtype=torch.uint8)
        axes = {0: "batch", 1: "height", 2: "width"}
    else:
        shape = (2, len(present), 3, height, width) if modalities else (2, 3, height, width)
        images, axes = torch.randn(shape), {0: "batch"}
    inputs = {"images": images}
    dynamic = {"images": axes, "features": {0: "batch"}}
    cameras = bool(getattr(network, "uses_cameras", False))
    if cameras:
        inputs["cameras"] = torch.tensor([0, -1])
        dynamic["cameras"] = {0: "batch"}
    module = ImageGraph(network, present=present if modalities else None, preprocessing=preprocessing).eval()
    with torch.inference_mode():
        found = module(*inputs.values())
    said = {
        "format": FORMAT,
        "kind": "image",
        "height": height,
        "width": width,
        "mean": [_plain(each) for each in mean],
        "std": [_plain(each) for each in std],
        "interpolation": interpolation,
        "preprocessing": with_preprocessing,
        "channels": "RGB",
        "modalities": list(present),
        "dim": int(found.shape[1]),
        "inputs": list(inputs),
        "outputs": ["features"],
        **(about or {}),
    }
    return Graph(module, inputs, ["features"], dynamic, said)


def _subset(modalities: Sequence[str], subset: Sequence[str]) -> list[str]:
    if not subset:
        return list(modalities)
    if not modalities:
        raise UserError("--modalities names parts of a sample, but this model takes single images; leave it out.")
    for name in subset:
        if name not in modalities:
            raise UserError(f"--modalities: '{name}' is none of the model's modalities{did_you_mean(name, modalities)}")
    if len(set(subset)) < len(subset):
        raise UserError(f"--modalities names '{'+'.join(subset)}'; name every modality once.")
    return [name for name in modalities if name in subset]


def _plain(value: Any) -> Any:
    return [float(each) for each in value] if isinstance(value, (list, tuple)) else float(value)


__all__ = ["FORMAT", "Graph", "ImageGraph", "Preprocessing", "image_graph"]
