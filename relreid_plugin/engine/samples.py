"""Features of samples of several pictures by the network of a run, one row for each sample.

Shape letters: n samples, B of a batch, M modalities, h x w pixels, d width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.opened import Opened, Reading
from ..data.multimodal_transforms import MultimodalTransform
from ..data.photos import read_photo
from ..data.ranges import modality_ranges
from ..data.views import read_views
from ..errors import UserError, did_you_mean
from ..features.extractor import PRECISIONS, check_precision, imitated, in_order, lane_pool
from ..options import check_integer

MISSING = ("refuse", "skip", "without")
BATCH = 16
Views = tuple[Tensor, tuple[str, ...]]
"""The views of a sample that are there, (m, 3, h, w) normalised, and their modalities."""


class SampleExtractor:
    """The network of a run over several modalities, ready for samples.

    A sample is a mapping of modalities to pictures, a tuple of pictures in the order of ``multimodal.modalities``, or the
    file of a strip with all views side by side. A picture is anything that :mod:`relreid_plugin.data.photos` lists; None, or
    a file that does not exist, is one that the sample lacks. ``multimodal.missing`` says what becomes of such samples:
    ``refuse`` them, ``skip`` them, or test them ``without``.

    Args:
        opened: The run's network.
        name: How it was named.
        batch_size: Samples at a time; 0: 16.
        workers: Threads that decode; ``None``: as many as torch has.
        precision: ``float32``, or ``bfloat16`` and ``float16`` by autocast.
        **plain: What else extractors of single pictures take, and this one does not.

    Attributes:
        modalities: Their names, in order.
        strip: The views of a strip, from left to right: those of the strips that the run was trained on.
        dim: Width d of its features.
        skipped: How many samples the last call has skipped.

    Raises:
        UserError: An option that belongs to single pictures.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        name: str = "",
        batch_size: int = 0,
        workers: int | None = None,
        precision: str = "float32",
        **plain: Any,
    ) -> None:
        for option, usual in (("pixel_range", None), ("channels_last", True), ("device", "auto")):
            if plain.get(option, usual) != usual:
                raise UserError(f"run '{name}' is one of several modalities, and does not take '{option}'.")
        self.opened, self.name, self.precision = opened, name, check_precision(precision)
        self.run, self.notes = opened.run, list(opened.notes)
        multimodal = self.run.cfg.multimodal
        self.modalities = tuple(multimodal.modalities)
        self.missing, self.skipped = str(multimodal.missing), 0
        first = self.run.datamanager.train_loader.dataset.data[0][0]
        self.strip = tuple(getattr(first, "modalities", ())) if isinstance(first, str) else self.modalities
        self.batch_size = check_integer("batch_size (0: 16)", batch_size, 0, 65536) or BATCH
        self.workers = torch.get_num_threads() if workers is None else check_integer("workers", workers, 0, 1024)
        count = len(self.modalities)
        mean, std = (list(rows) * count if len(rows) == 1 else list(rows) for rows in (multimodal.mean, multimodal.std))
        self._transforms = {
            slot: MultimodalTransform(*opened.reading.size, mean=[mean[slot]], std=[std[slot]], training=False)
            for slot in range(count)
        }
        self._ranges = modality_ranges(self.modalities, multimodal.pixel_range)
        self.normalisation = (mean, std)
        self.pixel_range = None
        self.run.bare.eval()
        self.device = next(self.run.bare.parameters()).device
        self.notes += filter(None, [imitated(self.precision, self.device)])
        height, width = opened.reading.size
        self.dim = self._forward([(torch.zeros(count, 3, height, width), self.modalities)]).shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that views are resized to."""
        return self.opened.reading.size

    @property
    def reading(self) -> Reading:
        """How views are resized."""
        return self.opened.reading

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of how samples are read."""
        return self.opened.fingerprint()

    def __call__(self, samples: Any, crops: Any = None, *, bgr: bool = False, batch_size: int = 0) -> Tensor:
        """Return features of samples, one row for each that is not skipped, in their order.

        Args:
            samples: One sample, or a list or iterator of them.
            crops: None; boxes belong to single pictures.
            bgr: Arrays and tensors begin with blue.
            batch_size: Samples at a time; 0: as the extractor was made.

        Returns:
            (n, d) float32 on the CPU.

        Raises:
            UserError: A picture that cannot be read, or a sample that lacks one and shall be refused.
        """
        found = list(self.stream(samples, crops, bgr=bgr, batch_size=batch_size))
        return torch.cat(found) if found else torch.zeros(0, self.dim)

    def stream(
        self, samples: Any, crops: Any = None, *, bgr: bool = False, batch_size: int = 0, cameras: Any = None
    ) -> Iterator[Tensor]:
        """Yield the features of batches, (B, d), in order; the arguments are those of a call."""
        if crops is not None or cameras is not None:
            raise UserError(f"run '{self.name}' is one of several modalities; leave out crops and cameras.")
        batch = check_integer("batch_size", batch_size, 0, 65536) or self.batch_size
        self.skipped = 0
        several: Iterable[Any] = [samples] if _is_sample(samples) else samples
        if not isinstance(several, Iterable):
            raise UserError(f"samples are a {type(samples).__name__}, not mappings, tuples of pictures or files of strips.")
        parts = _batches(enumerate(several), batch)
        with lane_pool(max(1, min(self.workers, 16)), 0) as pool:
            for views in in_order(pool, lambda part: [self._read(item, index, bgr) for index, item in part], parts, 4):
                there = [each for each in views if each is not None]
                self.skipped += len(views) - len(there)
                if there:
                    yield self._forward(there)

    def lacks(self, sample: Any) -> list[str]:
        """Return the modalities that a sample lacks; none of a strip."""
        if isinstance(sample, (str, os.PathLike)):
            return []
        pictures = self._named(sample, 0)
        return [name for name in self.modalities if _lacks(pictures.get(name))]

    # --- reading ------------------------------------------------------------------------------------------------------
    def _read(self, sample: Any, index: int, bgr: bool) -> Views | None:
        """The views of a sample that are there; None where it is skipped."""
        if isinstance(sample, (str, os.PathLike)):
            views_there = getattr(sample, "modalities", self.strip)
            found = read_views(os.fspath(sample), views_there, self.modalities, ranges=self._ranges)
            pictures: dict[str, Any] = dict(zip(self.modalities, found))
        else:
            pictures = self._named(sample, index)
        present = tuple(name for name in self.modalities if not _lacks(pictures.get(name)))
        absent = [name for name in self.modalities if name not in present]
        if not present:
            raise UserError(f"sample {index} has none of {', '.join(self.modalities)}; leave it out.")
        if absent and self.missing == "refuse":
            raise UserError(
                f"sample {index} lacks {' and '.join(absent)}{_where(pictures, absent)}; add it, or set "
                "'multimodal.missing' to 'skip' or 'without'."
            )
        if absent and self.missing == "skip":
            return None
        views = []
        for name in present:
            picture = read_photo(pictures[name], bgr=bgr, pixel_range=self._ranges[name], index=index)
            views.append(self._transforms[self.modalities.index(name)]([picture])[0])
        return torch.stack(views), present

    def _named(self, sample: Any, index: int) -> dict[str, Any]:
        if isinstance(sample, Mapping):
            for name in sample:
                if name not in self.modalities:
                    raise UserError(f"sample {index} has the modality '{name}'{did_you_mean(str(name), self.modalities)}")
            return dict(sample)
        if isinstance(sample, tuple) and len(sample) == len(self.modalities):
            return dict(zip(self.modalities, sample))
        raise UserError(
            f"sample {index} is a {type(sample).__name__}; give a mapping, a tuple of pictures of "
            f"{', '.join(self.modalities)} (None for one that it lacks), or the file of a strip."
        )

    # --- the network --------------------------------------------------------------------------------------------------
    def _forward(self, views: list[Views]) -> Tensor:
        """Features of samples, (B, d); those that lack the same modalities together."""
        found = torch.zeros(len(views), 0)
        dtype = PRECISIONS[self.precision]
        mixed = contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        for present in dict.fromkeys(names for _, names in views):
            rows = [row for row, (_, names) in enumerate(views) if names == present]
            images = torch.stack([views[row][0] for row in rows]).to(self.device)
            with torch.inference_mode(), mixed:
                bare = self.run.bare
                output = bare(images) if present == self.modalities else bare(images, present)
            if not bool(torch.isfinite(output).all()):
                raise UserError(f"features of '{self.name}' hold NaN or infinity; its weights are damaged.")
            if not found.shape[1]:
                found = torch.zeros(len(views), output.shape[1])
            found[rows] = output.float().cpu()
        return found


def _is_sample(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike, Mapping, tuple))


def _lacks(picture: Any) -> bool:
    """Whether a picture is none: not given, or a file that does not exist."""
    if picture is None:
        return True
    return isinstance(picture, (str, os.PathLike)) and not os.path.lexists(picture)


def _where(pictures: Mapping[str, Any], absent: list[str]) -> str:
    """The first file that is missing, for a sentence."""
    for name in absent:
        if isinstance(pictures.get(name), (str, os.PathLike)):
            return f" ('{Path(pictures[name])}' does not exist)"
    return ""


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    part: list[Any] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


__all__ = ["MISSING", "SampleExtractor"]
