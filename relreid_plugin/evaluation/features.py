"""Features of a test set with their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class FeatureSet:
    """Image features of one set of images.

    Attributes:
        features: (N, d) float32, on the CPU.
        pids: (N,) identities.
        camids: (N,) cameras.
        paths: N image files.
    """

    features: Tensor
    pids: np.ndarray
    camids: np.ndarray
    paths: list[str]

    def __len__(self) -> int:
        return len(self.pids)


@dataclass(frozen=True)
class TestFeatures:
    """Query and gallery of a test set."""

    __test__ = False

    query: FeatureSet
    gallery: FeatureSet
