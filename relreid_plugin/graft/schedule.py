"""The learning rate of GraFT's stage 1, by steps."""

from __future__ import annotations

import math
from collections.abc import Callable


def sqrt_lambda(total_steps: int, *, warmup_steps: int = 500, cooldown: float = 0.1) -> Callable[[int], float]:
    """Return ``step -> factor``: linear warm-up, fall with 1 / sqrt(step), linear cool-down to 0 (GraFT, section 5.2).

    Like :func:`warmup_lambda` it depends on nothing but the step. The factor is 1 at the end of the warm-up; in the
    cool-down it falls in a line from what it was to 0 at ``total_steps``.

    Args:
        total_steps: Steps of the whole training.
        warmup_steps: Steps of the warm-up; shortened to what lies before the cool-down.
        cooldown: Share of all steps at the end.

    Raises:
        ValueError: No step, or a share outside [0, 1].
    """
    if total_steps < 1 or not 0.0 <= cooldown <= 1.0:
        raise ValueError(f"total_steps must be at least 1 and cooldown in [0, 1], got {total_steps} and {cooldown}")
    start = total_steps - round(cooldown * total_steps)  # of the cool-down
    warmup = max(1, min(warmup_steps, start))

    def before(step: int) -> float:
        return (step + 1) / warmup if step < warmup else math.sqrt(warmup / step)

    def factor(step: int) -> float:
        if step < start:
            return before(step)
        return before(start) * max(0.0, (total_steps - step) / max(1, total_steps - start))

    return factor
