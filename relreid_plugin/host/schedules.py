"""Learning-rate schedules in closed form: a factor for every epoch, warm-up included."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

SCHEDULES = ("none", "single_step", "multi_step", "cosine")


def warmup_lambda(
    scheduler: str = "none",
    *,
    max_epoch: int = 1,
    stepsize: int | Sequence[int] = (),
    gamma: float = 0.1,
    warmup_epochs: int = 0,
    warmup_factor: float = 0.01,
) -> Callable[[int], float]:
    """Return ``epoch -> factor of the learning rate`` for :class:`torch.optim.lr_scheduler.LambdaLR`.

    The factor at an epoch depends on nothing but the epoch, so a run that is resumed has the learning rates of one that
    was not interrupted, to the last digit. In the warm-up the factor rises linearly from ``warmup_factor`` (epoch 0) to 1
    (epoch ``warmup_epochs``) and multiplies the schedule. Milestones count epochs from the start of training, warm-up
    included; the cosine falls from 1 at the end of the warm-up to 0 at ``max_epoch``.

    Args:
        scheduler: One of :data:`SCHEDULES`.
        max_epoch: Epochs of the whole training (cosine).
        stepsize: Milestones in epochs (multi_step), or the period in epochs (single_step; the last one of a sequence).
        gamma: Factor at every milestone or period.
        warmup_epochs: Length of the warm-up; 0 for none.
        warmup_factor: Factor at epoch 0 of the warm-up.

    Raises:
        ValueError: An unknown scheduler, a period below 1, or a cosine that has no epoch left after the warm-up.

    Example:
        >>> factor = warmup_lambda("multi_step", stepsize=[4], warmup_epochs=2, warmup_factor=0.5)
        >>> [factor(epoch) for epoch in range(5)]
        [0.5, 0.75, 1.0, 1.0, 0.1]
    """
    if scheduler not in SCHEDULES:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULES)}, got {scheduler!r}")
    steps = [stepsize] if isinstance(stepsize, int) else list(stepsize)
    milestones = sorted(steps)
    if scheduler == "single_step" and (not steps or steps[-1] < 1):
        raise ValueError(f"single_step needs a period of at least 1 epoch, got {steps}")
    if scheduler == "cosine" and max_epoch <= warmup_epochs:
        raise ValueError(f"cosine needs more epochs ({max_epoch}) than the warm-up has ({warmup_epochs})")

    def factor(epoch: int) -> float:
        value = 1.0
        if scheduler == "single_step":
            value = gamma ** (epoch // steps[-1])
        elif scheduler == "multi_step":
            value = gamma ** bisect_right(milestones, epoch)
        elif scheduler == "cosine" and epoch > warmup_epochs:
            progress = min(1.0, (epoch - warmup_epochs) / (max_epoch - warmup_epochs))
            value = 0.5 * (1.0 + math.cos(math.pi * progress))
        if epoch < warmup_epochs:
            value *= warmup_factor + (1.0 - warmup_factor) * epoch / warmup_epochs
        return value

    return factor
