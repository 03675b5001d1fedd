"""The currency: features of images with who they show, where they were seen, and where they came from.

Runs, stores, npz, npy with CSV and parquet files are read into :class:`Features` by
:func:`relreid_plugin.features.files.read`, and written from it; metrics, re-ranking, relations, search and export take it.

Shape letters: N images, n some of them, Q queries, G gallery images, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .columns import label_column, merged_names, path_column, split_column, time_column, vectors


@dataclass(frozen=True)
class Features:
    """Features of one set of images. :meth:`of` makes them from whatever arrays there are, with every check.

    Attributes:
        features: (N, d) float32, on the CPU.
        pids: (N,) identities; -1 where unknown.
        camids: (N,) cameras; -1 where unknown.
        paths: N image files, or none.
        identity_names: What is written for every identity that is not itself the number that is written.
        camera_names: The same for cameras.
        times: (N,) seconds, float64, or ``None``.
        splits: (N,) ``train``, ``query`` or ``gallery``, or ``None``: they belong to none.
        source: Where they came from, in words; empty: from memory.
        model: Fingerprint of what made them; empty: unknown. Features of two models are never compared.

    Raises:
        UserError: The parts have different lengths, or the features are no matrix.
    """

    features: Tensor
    pids: np.ndarray
    camids: np.ndarray
    paths: list[str]
    identity_names: dict[int, str] = field(default_factory=dict)
    camera_names: dict[int, str] = field(default_factory=dict)
    times: np.ndarray | None = None
    splits: np.ndarray | None = None
    source: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        count = len(self.features)
        if self.features.dim() != 2:
            raise UserError(
                f"{self.called} have the shape {tuple(self.features.shape)}; (N, d) is needed, one row per image."
            )
        parts = {
            "identities": self.pids,
            "cameras": self.camids,
            "paths": self.paths or None,
            "times": self.times,
            "splits": self.splits,
        }
        for name, part in parts.items():
            if part is not None and len(part) != count:
                raise UserError(f"{self.called}: {count} features come with {len(part)} {name}; every row needs its own.")

    @classmethod
    def of(
        cls,
        features: Any,
        identities: Any = None,
        cameras: Any = None,
        paths: Any = None,
        *,
        times: Any = None,
        splits: Any = None,
        source: str = "",
        model: str = "",
    ) -> Features:
        """Make features from arrays, tensors or lists, and refuse what does not fit.

        Args:
            features: (N, d) numbers of any real type; they become float32.
            identities: (N,) numbers or names, -1 where unknown; ``None``: all unknown. Digits are numbers: "7" is 7.
            cameras: The same of cameras.
            paths: N image files; ``None``: unknown.
            times: (N,) seconds, or dates and times; ``None``: unknown.
            splits: (N,) ``train``, ``query`` or ``gallery``; ``None``: none.
            source: Where they came from, for sentences.
            model: Fingerprint of what made them; empty: unknown.

        Raises:
            UserError: Rows that are not finite, columns of other lengths or kinds, missing values; counted.

        Example:
            >>> import numpy as np
            >>> from relreid_plugin.features import Features
            >>> found = Features.of(np.eye(3), identities=["anna", "ben", "anna"], cameras=[1, 1, 2])
            >>> found.shown(found.pids), found.features.shape
            (['anna', 'ben', 'anna'], torch.Size([3, 3]))
        """
        if isinstance(features, Features):
            return features
        called = f"features of '{source}'" if source else "features"
        files = path_column(paths, called)
        values = vectors(features, called, files)
        pids, identity_names = label_column(identities, "identities", called, len(values), files)
        camids, camera_names = label_column(cameras, "cameras", called, len(values), files)
        return cls(
            values,
            pids,
            camids,
            files,
            identity_names,
            camera_names,
            time_column(times, called),
            split_column(splits, called),
            source,
            model,
        )

    @property
    def called(self) -> str:
        """What sentences call them."""
        return f"features of '{self.source}'" if self.source else "features"

    @property
    def dim(self) -> int:
        """Width d."""
        return int(self.features.shape[1])

    @property
    def has_cameras(self) -> bool:
        """Whether every image has a camera.

        Raises:
            UserError: Some have one and others have none.
        """
        unknown = int((self.camids < 0).sum())
        if 0 < unknown < len(self):
            raise UserError(
                f"{self.called}: {unknown} of {len(self)} images have no camera; give all images a camera, or none."
            )
        return not unknown

    def shown(self, pids: Iterable[int]) -> list[int | str]:
        """Return identities as they are shown: by name, or by number where a number is written."""
        return [self.identity_names.get(int(pid), int(pid)) for pid in pids]

    def shown_cameras(self, camids: Iterable[int]) -> list[int | str]:
        """Return cameras as they are shown."""
        return [self.camera_names.get(int(camid), int(camid)) for camid in camids]

    def take(self, rows: Sequence[int] | np.ndarray | Tensor) -> Features:
        """Return chosen rows: (n,) numbers of rows, or (N,) whether to take each."""
        index = np.asarray(rows)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64).reshape(-1)
        return replace(
            self,
            features=self.features[torch.from_numpy(index)],
            pids=self.pids[index],
            camids=self.camids[index],
            paths=[self.paths[row] for row in index.tolist()] if self.paths else [],
            times=None if self.times is None else self.times[index],
            splits=None if self.splits is None else self.splits[index],
        )

    def part(self, split: str) -> Features:
        """Return the rows of a split.

        Args:
            split: ``train``, ``query`` or ``gallery``.

        Raises:
            UserError: There are no splits, or none of this name.
        """
        if self.splits is None:
            raise UserError(f"{self.called} have no column 'split'; add one, or divide them by a rule.")
        mine = self.splits == split
        if not mine.any():
            there = ", ".join(sorted(set(self.splits.tolist())))
            raise UserError(f"{self.called} have no rows of split '{split}' (there are: {there}).")
        return replace(self.take(mine), splits=None)

    def with_split(self, split: str) -> Features:
        """Return the same rows, all of one split."""
        return replace(self, splits=np.full(len(self), split, "<U7"))

    def known(self) -> tuple[Features, str]:
        """Return the rows whose identity is known, and a sentence on what was left out (empty: nothing).

        Raises:
            UserError: No identity is known.
        """
        unknown = self.pids == -1
        count = int(unknown.sum())
        if not count:
            return self, ""
        if count == len(self):
            raise UserError(f"{self.called}: the identities of all {count} images are unknown; they are needed here.")
        return self.take(~unknown), f"{count} of {len(self)} {self.called} have no identity (-1) and are left out"

    def __len__(self) -> int:
        return len(self.pids)


def common_model(parts: Sequence[Features]) -> str:
    """Return the fingerprint of the model that made all of some features; empty: it is unknown.

    Raises:
        UserError: Two models made them.
    """
    known = {part.model: part for part in parts if part.model}
    if len(known) > 1:
        (one, first), (two, second) = list(known.items())[:2]
        raise UserError(
            f"{first.called} were made by another model ({one}) than {second.called} ({two}), and cannot be compared; "
            "extract both by one model."
        )
    return next(iter(known), "") if all(part.model for part in parts) else ""


FeatureSet = Features
"""The name of :class:`Features` in older code."""


def joined(parts: Sequence[Features], *, source: str = "") -> Features:
    """Return several sets one after the other.

    Raises:
        UserError: Their widths or models differ, or some have paths, times or splits and others have none.
    """
    widths = sorted({part.dim for part in parts})
    if len(widths) > 1:
        names = ", ".join(f"{part.source or 'features'}: {part.dim}" for part in parts)
        raise UserError(f"features of different widths cannot be put together ({names}); one model makes all of them.")

    def column(name: str) -> np.ndarray | None:
        values = [getattr(part, name) for part in parts]
        missing = sum(value is None for value in values)
        if 0 < missing < len(values):
            raise UserError(f"{missing} of {len(values)} sets of features have no {name}; give all of them, or none.")
        return None if missing else np.concatenate(values)

    paths = [path for part in parts for path in part.paths]
    return Features(
        torch.cat([part.features for part in parts]),
        np.concatenate([part.pids for part in parts]),
        np.concatenate([part.camids for part in parts]),
        paths if all(part.paths or not len(part) for part in parts) else [],
        merged_names([part.identity_names for part in parts], "identities"),
        merged_names([part.camera_names for part in parts], "cameras"),
        column("times"),
        column("splits"),
        source,
        common_model(parts),
    )


@dataclass(frozen=True)
class TestFeatures:
    """Query and gallery of a test set."""

    __test__ = False

    query: Features
    gallery: Features
