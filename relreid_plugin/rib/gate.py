"""Binary gates with a straight-through gradient (RIB, DCS-Attention; METHODS 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNIFORM_MARGIN = 1e-7
"""Uniform draws are kept this far from 0 and 1, so that the noise is finite."""


def logistic_noise(shape: Sequence[int], *, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Draw logistic noise, which is the difference of two independent Gumbel draws.

    Args:
        shape: Shape of the result.
        generator: Generator on ``device``; the global one is left alone.
        device: Where the noise is drawn.

    Returns:
        float32, finite.
    """
    return torch.rand(tuple(shape), generator=generator, device=device).logit_(UNIFORM_MARGIN)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shifted = wide if noise is None else wide + noise
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.sigmoid(shifted / temperature))
            ctx.temperature = temperature
        return (shifted > 0).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (soft,) = ctx.saved_tensors
        return (grads[0] * (soft * (1 - soft) / ctx.temperature)).to(grads[0].dtype), None, None


def straight_through_gate(logits: Tensor, *, noise: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return a hard gate whose gradient is that of the soft gate sigmoid((logits + noise) / temperature).

    Args:
        logits: theta, any shape.
        noise: Logistic noise of the same shape (training); ``None`` for the rule theta > 0 (testing).
        temperature: tau of the soft gate.

    Returns:
        Exactly 0 or 1, in the type and shape of ``logits``; the gate itself is computed in float32 or wider.
    """
    return _StraightThrough.apply(logits, noise, temperature)  # type: ignore[no-untyped-call]
