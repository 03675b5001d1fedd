"""Steps of stage 2: neighbourhoods of a feature bank (METHODS 1, sampling)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset


class NeighbourhoodDataset(Dataset):
    """Every item is one training step: n of the n*u nearest features of a random anchor, u uniform.

    Item i of epoch e depends on (seed, e, i) only, so that a resumed run draws what the other run would have drawn.

    Args:
        features: (N, d) unit features.
        labels: (N,) identities.
        features_per_step: n; cut to N.
        steps: Items per epoch; 0 is max(1, N / 30).
        spread: Range of u.
        noise: Expected norm of Gaussian noise added to every drawn feature (beyond the paper; 0 is none).
        seed: Seed of all draws.
        cameras: (N,) cameras; ``None``: all images are of one.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        features_per_step: int = 2048,
        steps: int = 0,
        spread: tuple[float, float] = (1.0, 2.0),
        noise: float = 0.0,
        seed: int = 1,
        cameras: Tensor | None = None,
    ) -> None:
        self.features, self.labels = features, labels
        self.cameras = torch.zeros_like(labels) if cameras is None else cameras
        self.count = min(features_per_step, len(features))
        self.steps = steps or max(1, len(features) // 30)
        self.spread, self.noise, self.seed = spread, noise, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``features`` (n, d), ``pids`` (n,) and ``camids`` (n,) of step ``index``."""
        if index >= self.steps:
            raise IndexError(index)
        number = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + index
        generator = torch.Generator().manual_seed(number % 2**64)
        size = len(self.features)
        anchor = int(torch.randint(size, (1,), generator=generator))
        share = float(torch.rand(1, generator=generator))
        low, high = self.spread
        pool_size = min(size, max(self.count, int(self.count * (low + (high - low) * share))))
        scores = self.features @ self.features[anchor]
        pool = scores.topk(pool_size).indices if pool_size < size else torch.arange(size)
        chosen = pool[torch.randperm(pool_size, generator=generator)[: self.count]]
        features = self.features[chosen]
        if self.noise > 0:
            noise = torch.randn(features.shape, generator=generator) * (self.noise / features.shape[1] ** 0.5)
            features = features + noise
        return {"features": features, "pids": self.labels[chosen], "camids": self.cameras[chosen]}
