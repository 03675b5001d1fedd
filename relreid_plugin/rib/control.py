"""Controls for RIB's claims: gates that are drawn and not learned, and label smoothing that sharpens as the bound does.

A gain of learned gates is one of learning only where it is above gates that keep as many channels, under the same noise, at
places that nobody chose; a gain of the bound only where it is above a change of the label smoothing of like strength.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 0.01
"""Probabilities of a drawn gate stay this far from 0, 1/2 and 1, so that its logits are finite and not 0."""


def random_logits(
    channels: int, keep: float, keep_noise: float | None, *, open_at: float, generator: torch.Generator
) -> Tensor:
    """Draw the logits of a gate that keeps given shares of its channels, at random places.

    round(keep * channels) of them, drawn without replacement, lie above 0. Under logistic noise those are open with
    probability (1 + s) / 2 and the others with s / 2, where s = 2 keep_noise - keep; so ``keep_noise`` of all are open. Any
    gate that keeps ``keep`` without noise keeps between keep / 2 and (1 + keep) / 2 with it.

    Args:
        channels: D.
        keep: Share of channels kept in testing.
        keep_noise: Share kept under the noise of training; ``None``: an open channel is so with probability ``open_at``.
        open_at: See ``keep_noise``.
        generator: Of the draw, on the CPU.

    Returns:
        (D,) float32.
    """
    kept = round(keep * channels)
    share = kept / channels
    spread = 2 * open_at - 1 if keep_noise is None else 2 * keep_noise - share
    spread = min(max(spread, 2 * LEAST), 1 - 2 * LEAST)
    logits = torch.full((channels,), _logit(spread / 2))
    logits[torch.randperm(channels, generator=generator)[:kept]] = _logit((1 + spread) / 2)
    return logits


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def smoothed_entropy(smoothing: float, classes: int) -> float:
    """Entropy, in nats, of the prediction that fits labels smoothed by ``smoothing`` over C ``classes`` best."""
    rest = smoothing / classes
    top = 1 - smoothing + rest
    others = -(classes - 1) * rest * math.log(rest) if rest > 0 else 0.0
    return others - (top * math.log(top) if top > 0 else 0.0)


def smoothing_of_like_strength(change: float, *, smoothing: float, classes: int) -> float:
    """Return the label smoothing that changes the entropy of the best prediction as much as something else changed it.

    Args:
        change: Change of the entropy of the predictions in training, in nats.
        smoothing: Label smoothing from which it is changed.
        classes: C, at least 2.

    Returns:
        Between 0 and 0.99, by bisection to 1e-6; the end of that range where the change is out of reach.
    """
    wanted = smoothed_entropy(smoothing, classes) + change
    low, high = 0.0, 0.99
    if wanted <= smoothed_entropy(low, classes):
        return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        if smoothed_entropy(middle, classes) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


__all__ = ["random_logits", "smoothed_entropy", "smoothing_of_like_strength"]
