"""Features of a test set with their labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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
        identity_names: What is written for every identity that is not itself the number that is written.
    """

    features: Tensor
    pids: np.ndarray
    camids: np.ndarray
    paths: list[str]
    identity_names: dict[int, str] = field(default_factory=dict)

    def shown(self, pids: Iterable[int]) -> list[int | str]:
        """Return identities as they are shown: by name, or by number where a number is written."""
        return [self.identity_names.get(int(pid), int(pid)) for pid in pids]

    def __len__(self) -> int:
        return len(self.pids)


@dataclass(frozen=True)
class TestFeatures:
    """Query and gallery of a test set."""

    __test__ = False

    query: FeatureSet
    gallery: FeatureSet
