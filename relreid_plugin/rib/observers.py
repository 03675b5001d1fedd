"""What RIB adds to an epoch: the gates' temperature and kept-channel rates, the bound's weight and diagnostics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.observers import Observer
from .bound import InformationBottleneckBound
from .dcs import ChannelSelection, temperature_at
from .information import input_descriptor

DESCRIPTOR_GRID = (16, 8)
"""Rows and columns that an input image is averaged to: its descriptor X in the bound (METHODS 2)."""


class GateObserver(Observer):
    """Anneals the temperature of a model's channel gates and reports the rate of channels they keep.

    Args:
        selection: The model's gates.
        max_epoch: Epochs of training.
        temperature: Temperature in the first and in the last epoch.
        schedule: How it goes from one to the other.
    """

    tag, state_name = "RIB", "gates"

    def __init__(
        self, selection: ChannelSelection, *, max_epoch: int, temperature: tuple[float, float], schedule: str
    ) -> None:
        self.selection, self.max_epoch, self.temperature, self.schedule = selection, max_epoch, temperature, schedule
        self.state = selection

    def begin(self, epoch: int) -> None:
        """Set the epoch's temperature and count anew."""
        start, end = self.temperature
        self.selection.set_temperature(temperature_at(epoch, self.max_epoch, start=start, end=end, schedule=self.schedule))
        self.selection.kept_rates(reset=True)

    def end(self) -> dict[str, float]:
        """``kept/<gate>``: rate under training noise; ``kept_test/<gate>``: rate of the test rule on the same tokens."""
        record = {}
        for name, rates in self.selection.kept_rates(reset=True).items():
            for mode, key in (("train", "kept"), ("test", "kept_test")):
                if mode in rates:
                    record[f"{key}/{name}"] = rates[mode]
        return record


def warmup_epochs(warmup: float, max_epoch: int) -> int:
    """Return the epochs in which the bound has no weight yet: a share of all, rounded up."""
    return math.ceil(warmup * max_epoch)


class BoundObserver(Observer):
    """The information bottleneck bound of a training run: its weight per epoch, its value per batch, its diagnostics.

    Args:
        bound: The bound.
        eta: Weight after the warm-up; 0: only measured.
        warmup: Share of the epochs in which the weight is 0.
        max_epoch: Epochs of training.
    """

    tag, state_name, term = "RIB", "bound", "ibb"

    def __init__(self, bound: InformationBottleneckBound, *, eta: float, warmup: float, max_epoch: int) -> None:
        self.bound, self.eta, self.state = bound, eta, bound
        self.warmup_epochs = warmup_epochs(warmup, max_epoch)
        self.weight = 0.0
        self._entropies: list[Tensor] = []

    def begin(self, epoch: int) -> None:
        """Choose the epoch's weight."""
        self.weight = self.eta if epoch >= self.warmup_epochs else 0.0
        self._entropies = []

    def see(self, logits: Tensor, labels: Tensor) -> None:
        """Take the entropies of the predicted identities, in nats."""
        logs = logits.float().log_softmax(dim=1)
        self._entropies.append(-(logs.exp() * logs).sum(dim=1))

    def describe(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, x), what the bound reads of the images."""
        return input_descriptor(images, DESCRIPTOR_GRID)

    def loss(self, features: Tensor, labels: Tensor, images: Tensor) -> Tensor | None:
        """Return the bound of a batch, or ``None`` while there are no centroids; ``images`` from :meth:`describe`."""
        return self.bound(features, labels, images)

    def end(self) -> dict[str, float]:
        """Put the epoch's centroids and Q in place; ``ibb``, ``ib_bound``, ``ib_estimate``, ``ib_holds``, …, ``eta``.

        ``entropy`` is the mean entropy of the identities that the network predicted for the epoch's training images.
        """
        found: dict[str, Any] | None = self.bound.end_epoch()
        if found is None:
            return {}
        if not found.get("ib_holds", 1.0):
            print(f"warning: the bound {found['ib_bound']:.6f} is below the estimate {found['ib_estimate']:.6f}")
        seen = {"entropy": float(torch.cat(self._entropies).double().mean())} if self._entropies else {}
        return {**found, **seen, "eta": self.weight}


def build_gate_observer(cfg: Any, model: nn.Module) -> GateObserver | None:
    """Return the observer of a model's channel gates, ``None`` when it has none."""
    if cfg.rib.attention != "dcs":
        return None
    start, end = cfg.rib.dcs.temperature
    return GateObserver(
        ChannelSelection(model), max_epoch=cfg.train.max_epoch, temperature=(start, end), schedule=cfg.rib.dcs.schedule
    )


def build_bound_observer(cfg: Any, *, num_classes: int, feature_dim: int) -> BoundObserver | None:
    """Return the bound of ``rib.ibb``, ``None`` when it is neither trained on nor measured."""
    ibb = cfg.rib.ibb
    if ibb.eta == 0 and not ibb.measure:
        return None
    rows, columns = DESCRIPTOR_GRID
    bound = InformationBottleneckBound(
        num_classes, feature_dim, input_dim=3 * rows * columns, beta=ibb.beta, epsilon=ibb.epsilon
    )
    return BoundObserver(bound, eta=ibb.eta, warmup=ibb.warmup, max_epoch=cfg.train.max_epoch)


def build_observers(cfg: Any, model: nn.Module, *, num_classes: int, feature_dim: int | None) -> list[Observer]:
    """Return what RIB watches stage 1 with: the bound, where the loss is the composite one, and the gates.

    Args:
        cfg: Configuration.
        model: The network; it is told which features the bound is about.
        num_classes: Training identities.
        feature_dim: Width of its features; ``None``: the loss is the host's.
    """
    observers: list[Observer] = []
    if feature_dim is not None:
        bound = build_bound_observer(cfg, num_classes=num_classes, feature_dim=feature_dim)
        if bound is not None:
            model.returns_neck = cfg.rib.ibb.feature == "after"  # type: ignore[assignment]
            observers.append(bound)
    gates = build_gate_observer(cfg, model)
    return observers if gates is None else [*observers, gates]
