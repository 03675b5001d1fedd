"""What is exported: the image model of a run, or a network that is named; its graph, its samples, and its own features.

Shape letters: B images, M modalities, h x w pixels, d width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..data.cameras import CameraRows
from ..data.ranges import Range, check_range
from ..engine.evaluator import inference_parameters
from ..engine.scoring import EvaluationOptions
from ..errors import UserError
from ..features.extractor import Extractor
from ..methods import takes_several
from .graphs import Graph, image_graph
from .samples import Batch, Item, Samples, batches, image_sets, run_samples

NAMED_BATCH = 32
"""Images of a batch of a network that is no run."""


class Subject(Protocol):
    """What is exported.

    Attributes:
        options: How its features are ranked in the proof.
        uses_cameras: Whether rows of a camera embedding are a second input.
        modalities: Of one sample; empty: single images.
        pixel_range: (low, high) that become black and white in pictures of more than 8 bits per channel.
    """

    options: EvaluationOptions
    uses_cameras: bool
    modalities: list[str]
    pixel_range: Range | None

    def graph(self, *, with_preprocessing: bool, subset: Sequence[str], about: dict[str, Any]) -> Graph:
        """Return what is written; ``about`` is added to what the file says of itself."""

    def samples(self, images: Sequence[str], target: str) -> AbstractContextManager[Samples]:
        """Give the images of a proof: folders, a data set, or those of its own choice."""

    def batches(self, items: Sequence[Item], cameras: CameraRows, *, batch_size: int = 0) -> Iterator[Batch]:
        """Yield samples in order, read and normalised as the model wants them."""

    def features(self, batch: Batch, present: Sequence[str] | None = None) -> Tensor:
        """Return its own features (B, d) float32, of the modalities ``present``."""


class RunSubject:
    """The image model of an open run.

    Args:
        run: The run.

    Raises:
        UserError: A run of tracklets, or of given features.
    """

    def __init__(self, run: Any) -> None:
        cfg = run.cfg
        if cfg.data.type == "features":
            run.network.require_pictures(run)
        if cfg.data.type != "image":
            raise UserError(f"run '{run.folder}' is one of tracklets, whose model is not exported; choose one of images.")
        self.run, self.cfg = run, cfg
        self.options = EvaluationOptions.of(cfg)
        self.uses_cameras = bool(getattr(run.bare, "uses_cameras", False))
        self.modalities = list(run.bare.modalities) if takes_several(cfg) else []
        self.pixel_range = check_range("data.pixel_range", cfg.data.pixel_range)

    def graph(self, *, with_preprocessing: bool, subset: Sequence[str], about: dict[str, Any]) -> Graph:
        """See :class:`Subject`."""
        run, cfg = self.run, self.cfg
        several = bool(self.modalities)
        run.bare.cpu()
        own = {
            "model": cfg.model.name,
            "backbone": cfg.backbone.name,
            "parameters": int(run.parameters),
            "weights": run.fingerprint,
            "pixel_range": list(cfg.data.pixel_range),
            "metric": cfg.test.dist_metric,
        }
        if self.uses_cameras:
            own["cameras"] = [list(each) for each in run.cameras.cameras or ()] or run.cameras.size
        return image_graph(
            run.bare.eval(),
            size=(cfg.data.height, cfg.data.width),
            mean=list(cfg.multimodal.mean if several else cfg.data.norm_mean),
            std=list(cfg.multimodal.std if several else cfg.data.norm_std),
            interpolation="bicubic" if several else "bilinear",
            with_preprocessing=with_preprocessing,
            subset=subset,
            about={**own, **about},
        )

    def samples(self, images: Sequence[str], target: str) -> AbstractContextManager[Samples]:
        """See :class:`Subject`."""
        return run_samples(self.run, images=images, target=target)

    def batches(self, items: Sequence[Item], cameras: CameraRows, *, batch_size: int = 0) -> Iterator[Batch]:
        """See :class:`Subject`."""
        return batches(self.run, items, cameras, batch_size=batch_size)

    def features(self, batch: Batch, present: Sequence[str] | None = None) -> Tensor:
        """As :meth:`EngineMixin.extract` computes them."""
        engine: Any = self.run.engine
        before = getattr(engine, "present", None)
        if present is not None:
            engine.present = present
        try:
            found = engine.model(batch.images, batch.rows) if engine.reads_cameras else engine.extract_features(batch.images)
        finally:
            if present is not None:
                engine.present = before
        return found.float().cpu()


class NamedSubject:
    """A network of a library, a checkpoint of a family, or a package, as extractors open them; cameras are unknown to it.

    Args:
        extractor: On the CPU, in float32.
        overrides: ``KEY VALUE …`` that say where data sets are.
        cache_dir: Where what cannot be written beside a data set is put.

    Raises:
        UserError: It is an exported file already.
    """

    def __init__(self, extractor: Extractor, overrides: Sequence[str] = (), *, cache_dir: Path = Path()) -> None:
        network = extractor.opened.network
        if not isinstance(network, nn.Module):
            raise UserError(
                f"model '{extractor.name}' is no network of torch ({extractor.opened.title}); export the model that it was "
                "made of."
            )
        self.extractor, self.network = extractor, network
        self.overrides, self.cache_dir = list(overrides), cache_dir
        self.options = EvaluationOptions(metric="cosine")
        self.uses_cameras = False
        self.modalities: list[str] = []
        self.pixel_range = extractor.pixel_range

    def graph(self, *, with_preprocessing: bool, subset: Sequence[str], about: dict[str, Any]) -> Graph:
        """See :class:`Subject`."""
        reading = self.extractor.reading
        own = {
            "model": os.path.basename(self.extractor.name.rstrip(os.sep)),
            "backbone": "",
            "parameters": inference_parameters(self.network),
            "weights": self.extractor.fingerprint,
            "pixel_range": list(self.pixel_range or ()),
            "metric": "cosine",
        }
        return image_graph(
            self.network.eval(),
            size=reading.size,
            mean=reading.mean,
            std=reading.std,
            interpolation=reading.interpolation,
            with_preprocessing=with_preprocessing,
            subset=subset,
            about={**own, **about},
        )

    def samples(self, images: Sequence[str], target: str) -> AbstractContextManager[Samples]:
        """Folders, a data set, or rendered persons."""
        return image_sets(images, target, self.overrides, self.cache_dir)

    def batches(self, items: Sequence[Item], cameras: CameraRows, *, batch_size: int = 0) -> Iterator[Batch]:
        """See :class:`Subject`."""
        step = batch_size or self.extractor.batch_size or NAMED_BATCH
        for start in range(0, len(items), step):
            part = items[start : start + step]
            paths = [str(item[0]) for item in part]
            pids, camids = (np.array([item[place] for item in part], np.int64) for place in (1, 2))
            images = self.extractor.prepared(paths).contiguous()
            yield Batch(images, pids, camids, torch.full((len(part),), -1), paths)

    def features(self, batch: Batch, present: Sequence[str] | None = None) -> Tensor:
        """As the extractor computes them."""
        return self.extractor.features(batch.images)


__all__ = ["NamedSubject", "RunSubject", "Subject"]
