"""What tracing needs: operators that torch's tracing exporter lacks, attention that fixes no batch size, and silence.

Shape letters: B samples, T tokens, S tokens that are looked at, H heads, d width.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError


def rms_norm(context: Any, x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    """Return torch's RMSNorm over the last axis in operators of ONNX, for the tracing exporter.

    Raises:
        UserError: It goes over several axes.
    """
    from torch.onnx import symbolic_helper

    if len(symbolic_helper._maybe_get_const(shape, "is")) != 1:
        raise UserError("an RMSNorm over several axes is not exported.")
    value = symbolic_helper._maybe_get_const(eps, "f")
    small = value if isinstance(value, float) else torch.finfo(torch.float32).eps
    squares = context.op("Mul", x, x)
    axis = context.op("Constant", value_t=torch.tensor([-1]))
    mean = context.op("ReduceMean", squares, axis, keepdims_i=1)
    root = context.op("Sqrt", context.op("Add", mean, context.op("Constant", value_t=torch.tensor(small))))
    found = context.op("Div", x, root)
    return found if symbolic_helper._is_none(weight) else context.op("Mul", found, weight)


def attention(layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what torch's attention layer returns in evaluation mode, in steps that keep the batch size open.

    Args:
        layer: Batch first, of one width, without masks and further rows.
        query: (B, T, d).
        key, value: (B, S, d).

    Returns:
        (B, T, d).
    """
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    width, heads = layer.embed_dim, layer.num_heads

    def part(number: int, x: Tensor) -> Tensor:
        rows = slice(number * width, (number + 1) * width)
        projected = F.linear(x, weight[rows], None if bias is None else bias[rows])
        return projected.unflatten(2, (heads, width // heads)).transpose(1, 2)

    seen = F.scaled_dot_product_attention(part(0, query), part(1, key), part(2, value))
    return layer.out_proj(seen.transpose(1, 2).flatten(2))


@contextlib.contextmanager
def open_batches() -> Iterator[None]:
    """Let attention layers of torch work by :func:`attention` while the block lasts, where that can stand for them."""
    own = nn.MultiheadAttention.forward
    fast = torch.backends.mha.get_fastpath_enabled()

    def forward(self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        given = [*args, *(each for name, each in options.items() if name not in ("need_weights", "average_attn_weights"))]
        masked = any(each is not None and each is not False for each in given)
        plain = self.batch_first and self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn
        if masked or not plain or options.get("need_weights", True) or self.training or query.dim() != 3:
            return own(self, query, key, value, *args, **options)
        return attention(self, query, key, value), None

    nn.MultiheadAttention.forward = forward  # type: ignore[method-assign]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        nn.MultiheadAttention.forward = own  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings, logs and prints to themselves while the block lasts, those of C++ too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _silent(1), _silent(2):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _silent(number: int) -> Iterator[None]:
    """Send what is written to a file descriptor nowhere."""
    stream = (sys.stdout, sys.stderr)[number - 1]
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    kept = os.dup(number)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, number)
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        os.dup2(kept, number)
        os.close(nowhere)
        os.close(kept)


__all__ = ["attention", "open_batches", "quiet", "rms_norm"]
