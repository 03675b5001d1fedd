"""Distances between two sets of features."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UserError, did_you_mean

METRICS = ("euclidean", "cosine", "sqeuclidean")
_CACHED_VALUES = 1 << 19  # distances that are finished at a time: 2 MiB in float32


def pairwise_distance(x: torch.Tensor, y: torch.Tensor, *, metric: str = "euclidean") -> torch.Tensor:
    """Distance of every row of ``x`` to every row of ``y``.

    ``euclidean`` is the true Euclidean distance. torchreid returns the *squared* one under that name, which is called
    ``sqeuclidean`` here; both give the same ranking. Distances come from one matrix product, so in float32 the
    Euclidean distance of two equal unit vectors is only zero up to about 5e-4.

    Args:
        x: Features, (n, d). Half precision and integers are raised to float32.
        y: Features, (m, d), on the device of ``x``.
        metric: ``euclidean``, ``sqeuclidean`` or ``cosine`` (1 - cosine similarity, in [0, 2]; a zero vector is at
            distance 1 of everything).

    Returns:
        Distances, (n, m), never negative; float64 if either input is, float32 otherwise.

    Raises:
        UserError: A shape, type or metric that makes no sense.
    """
    return distance_to(y, metric=metric, dtype=_float_type(x, "x"))(x)


def distance_to(
    y: torch.Tensor, *, metric: str = "euclidean", dtype: torch.dtype | None = None
) -> Callable[..., torch.Tensor]:
    """Prepare ``y`` once and return the function ``x -> pairwise_distance(x, y)``, for use on blocks of ``x``.

    Args:
        y: Features, (m, d).
        metric: See :func:`pairwise_distance`.
        dtype: Compute in this type if it is wider than that of ``y``.

    Returns:
        A function from features (n, d), and a tensor (n, m) for the result where one is at hand, to distances (n, m).

    Raises:
        UserError: A shape, type or metric that makes no sense, here or in the returned function.
    """
    if metric not in METRICS:
        raise UserError(f"metric '{metric}' is unknown{did_you_mean(metric, METRICS)}.")
    dtype = torch.float64 if dtype == torch.float64 else _float_type(y, "y")
    y = y.to(dtype)
    if metric == "cosine":
        y = F.normalize(y, dim=1)
    norms = y.square().sum(1)

    def distances(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        _float_type(x, "x")
        if x.shape[1] != y.shape[1]:
            raise UserError(f"x has {x.shape[1]} dimensions and y has {y.shape[1]}; both need features of the same model.")
        x = x.to(dtype)
        if metric == "cosine":
            x = F.normalize(x, dim=1)
        result = _product(x if metric == "cosine" else -2 * x, y, out)
        own = x.square().sum(1, keepdim=True)
        step = max(1, len(x) if result.requires_grad else _CACHED_VALUES // max(1, len(y)))
        for start in range(0, len(x), step):  # all passes over rows that are in a cache
            part = result[start : start + step]
            if metric == "cosine":
                part.neg_().add_(1).clamp_(0, 2)
            else:  # |x - y|^2 = |x|^2 - 2 x.y + |y|^2
                part.add_(norms).add_(own[start : start + step]).clamp_(min=0)
                if metric == "euclidean":
                    part.sqrt_()
        return result

    return distances


def _product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ y.T``. Without gradients on a CPU numpy does it: its BLAS is up to 1.8 times as fast as torch's on AMD; on an
    Intel processor torch's is Intel's own, and the faster one."""
    full = torch.get_float32_matmul_precision() == "highest"  # torch may multiply float32 in bfloat16 else
    plain = x.device.type == "cpu" and y.device.type == "cpu" and not (x.requires_grad or y.requires_grad)
    if plain and not (full and _intel()):
        return torch.from_numpy(np.matmul(x.numpy(), y.numpy().T, out=None if out is None else out.numpy()))
    return torch.mm(x, y.t(), out=out) if out is not None else x @ y.t()


@functools.cache
def _intel() -> bool:
    """Whether the processor is one of Intel's."""
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = platform.processor()
    return "GenuineIntel" in said


def _float_type(value: torch.Tensor, name: str) -> torch.dtype:
    """Check features (n, d) and return the type to compute in."""
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{name} is a {type(value).__name__}; pass a torch.Tensor of shape (n, d).")
    if value.dim() != 2:
        raise UserError(f"{name} has shape {tuple(value.shape)}; pass features of shape (n, d).")
    if value.is_complex() or value.dtype == torch.bool:
        raise UserError(f"{name} has type {value.dtype}; pass real features.")
    return torch.float64 if value.dtype == torch.float64 else torch.float32
