"""Exported networks by name, ``onnx:model.onnx``, ``openvino:model.xml``, ``torchscript:model.pt``, as extractors take them.

Shape letters: B images, h x w pixels, d width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .opened import IMAGENET, Opened, Reading
from .runtimes import Runtime, open_runtime


class ExportedNetwork:
    """An exported network as a function of images.

    Args:
        runtime: The opened file.
        photos: It takes bytes, and resizes and normalises them itself.
    """

    def __init__(self, runtime: Runtime, *, photos: bool = False) -> None:
        self.runtime, self.photos = runtime, photos

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) float32 as the reading says -> (B, d); cameras, where it takes them, are unknown."""
        pixels = images.float().cpu()
        if self.photos:
            pixels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        given: dict[str, Any] = {self.runtime.inputs[0]: pixels.contiguous().numpy()}
        if "cameras" in self.runtime.inputs:
            given["cameras"] = np.full(len(images), -1, np.int64)
        return torch.from_numpy(self.runtime(given)[self.runtime.outputs[0]]).float()


def open_exported(name: str, request: Any, *, kind: str) -> Opened:
    """Open a file.

    Args:
        name: Its path.
        request: A :class:`~relreid_plugin.features.opening.Request`.
        kind: ``onnx``, ``openvino`` or ``torchscript``.

    Raises:
        UserError: It cannot be opened, is no image model, or takes several modalities.
    """
    runtime = open_runtime(Path(name).expanduser(), kind=kind)
    about = runtime.about
    if not about:
        return _foreign(runtime, name, request)
    if about.get("kind") != "image":
        raise UserError(f"'{name}' holds a {about.get('kind')} half of an encoder, not an image model.")
    if about["modalities"]:
        raise UserError(
            f"'{name}' takes samples of {'+'.join(about['modalities'])}, not single pictures; open it by "
            "relreid_plugin.backbones.runtimes.open_runtime."
        )
    request.refuse(f"'{name}', which says itself how it wants its images,")
    photos = bool(about["preprocessing"])
    mean, std = ((0.0,) * 3, (1.0,) * 3) if photos else (tuple(about["mean"]), tuple(about["std"]))
    return Opened(
        ExportedNetwork(runtime, photos=photos),
        Reading((about["height"], about["width"]), mean, std, about["interpolation"]),
        f"{kind} file '{name}' of '{about['model']}'",
        threads=False,
        identity=runtime.fingerprint(),
        pixel_range=list(about["pixel_range"]),
    )


def _foreign(runtime: Runtime, name: str, request: Any) -> Opened:
    """A file that was made elsewhere says nothing of its images."""
    request.refuse(f"'{name}'", but=("size", "mean", "std", "interpolation"))
    if len(runtime.inputs) != 1:
        raise UserError(f"'{name}' has {len(runtime.inputs)} inputs ({', '.join(runtime.inputs)}); images alone must go in.")
    if request.size is None:
        raise UserError(f"'{name}' was made elsewhere and does not say of which size its images are; give the size.")
    reading = request.reading(Reading(mean=IMAGENET[0], std=IMAGENET[1]))
    note = f"'{name}' was made elsewhere; its images are normalised by mean {list(reading.mean)} and std {list(reading.std)}"
    return Opened(
        ExportedNetwork(runtime),
        reading,
        f"{runtime.kind} file '{name}'",
        [note],
        threads=False,
        identity=runtime.fingerprint(),
    )


def open_onnx(name: str, request: Any) -> Opened:
    """Open ``onnx:FILE``; see :func:`open_exported`."""
    return open_exported(name, request, kind="onnx")


def open_openvino(name: str, request: Any) -> Opened:
    """Open ``openvino:FILE``; see :func:`open_exported`."""
    return open_exported(name, request, kind="openvino")


def open_torchscript(name: str, request: Any) -> Opened:
    """Open ``torchscript:FILE``; see :func:`open_exported`."""
    return open_exported(name, request, kind="torchscript")


__all__ = ["ExportedNetwork", "open_exported", "open_onnx", "open_openvino", "open_torchscript"]
