"""Sparse relation attention over neighbour graphs.

Shape letters: N rows (images), K slots per row, G query/key maps, p landmarks, c value width.

Every tensor is O(N K) or O(N c): the kept entries of the affinity matrix are gathered, never the matrix. The two primitives
:func:`gather_dot` and :func:`gather_sum` are each other's derivatives; on a symmetric graph the gradient of the gathered
side is again a gather, through the reverse-edge map, so that the backward pass needs no scattered additions and gives the
same bytes on every run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = 1 << 18  # gathered numbers that are in work at once: 1 MiB, which stays in the cache of a core
_GELU_ELEMENTS = 1 << 18  # of a GELU that are in work at once
_LINEAR = 2 * math.sqrt(2 / math.pi)  # GELU by its tanh formula is x * sigmoid(_LINEAR * x + _CUBIC * x^3)
_CUBIC = 0.044715 * _LINEAR


def _dot(rows: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """(N, G, c), (M, G, c), (N, K) -> (N, G, K): inner products of every row with its gathered rows."""
    size, groups, width = rows.shape
    slots = index.shape[1]
    if not slots:
        return rows.new_zeros(size, groups, 0)
    table = values.flatten(1)
    out = rows.new_empty(size, slots, groups)
    step = max(1, _BLOCK_ELEMENTS // max(1, slots * groups * width))
    for start in range(0, size, step):
        part = slice(start, start + step)
        picked = table.index_select(0, index[part].flatten()).view(-1, slots, groups, width).to(rows.dtype)
        torch.sum(picked.mul_(rows[part].unsqueeze(1)), dim=3, out=out[part])
    return out.transpose(1, 2).contiguous()


def _sum(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """(N, G, K), (M, G, c), (N, K) -> (N, G, c): weighted sums of gathered rows."""
    size, groups, slots = weights.shape
    width = values.shape[2]
    if not slots:
        return values.new_zeros(size, groups, width)
    own = torch.arange(groups, device=index.device).view(1, groups, 1)
    flat = (index.unsqueeze(1) * groups + own).view(size * groups, slots)
    table, share = values.reshape(-1, width), weights.to(values.dtype).reshape(-1, slots)
    return F.embedding_bag(flat, table, per_sample_weights=share, mode="sum").view(size, groups, width)


def _scatter(weights: Tensor, rows: Tensor, index: Tensor, reverse: Tensor | None, mask: Tensor, size: int) -> Tensor:
    """Sum of ``weights`` (N, G, K) times ``rows`` (N, G, c) at the rows that are gathered, (size, G, c)."""
    if reverse is not None:
        return _sum(_transpose(weights, reverse, mask), rows, index)
    out = rows.new_zeros(size, *rows.shape[1:])
    for slot in range(index.shape[1]):  # a slot at a time: no (N, G, K, c)
        out.index_add_(0, index[:, slot], weights[:, :, slot, None].to(rows.dtype) * rows)
    return out


def _transpose(edges: Tensor, reverse: Tensor, mask: Tensor) -> Tensor:
    """(N, G, K) edge values -> the values of the opposite edges, zero outside the mask."""
    size, groups, slots = edges.shape
    flat = edges.transpose(1, 2).reshape(size * slots, groups)
    turned = flat[reverse.flatten()].view(size, slots, groups).transpose(1, 2)
    return (turned * mask.unsqueeze(1)).contiguous()


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, values, index, mask, reverse):
        ctx.save_for_backward(rows, values, index, mask, reverse)
        return _dot(rows, values, index) * mask.unsqueeze(1)

    @staticmethod
    def backward(ctx, grad):
        rows, values, index, mask, reverse = ctx.saved_tensors
        grad = (grad * mask.unsqueeze(1)).contiguous()
        grad_rows = _sum(grad, values, index) if ctx.needs_input_grad[0] else None
        grad_values = _scatter(grad, rows, index, reverse, mask, len(values)) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_values, None, None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, values, index, mask, reverse):
        weights = weights.to(values.dtype) * mask.unsqueeze(1)
        ctx.save_for_backward(weights, values, index, mask, reverse)
        return _sum(weights, values, index)

    @staticmethod
    def backward(ctx, grad):
        weights, values, index, mask, reverse = ctx.saved_tensors
        grad = grad.to(values.dtype).contiguous()
        grad_weights = _dot(grad, values, index) * mask.unsqueeze(1) if ctx.needs_input_grad[0] else None
        grad_values = _scatter(weights, grad, index, reverse, mask, len(values)) if ctx.needs_input_grad[1] else None
        return grad_weights, grad_values, None, None, None


def gather_dot(rows: Tensor, values: Tensor, index: Tensor, mask: Tensor, reverse: Tensor | None = None) -> Tensor:
    """Return affinities of kept edges.

    Args:
        rows: (N, G, p) landmark similarities of the attending rows.
        values: (N, G, p) landmark similarities of the attended rows.
        index: (N, K) int64, attended row per slot.
        mask: (N, K) bool, kept slots; with ``reverse`` the masked graph must be symmetric (see ``ReciprocalGraph``).
        reverse: (N, K) int64, flat position of the opposite edge, for the gradient of ``values``; without it that gradient
            is added up slot by slot, also for graphs that are not symmetric.

    Returns:
        (N, G, K), zero outside the mask. Differentiable in ``rows`` and ``values``.
    """
    return _GatherDot.apply(rows, values, index, mask, reverse)


def gather_sum(weights: Tensor, values: Tensor, index: Tensor, mask: Tensor, reverse: Tensor | None = None) -> Tensor:
    """Return weighted sums over kept edges: out[i, g] = sum_s weights[i, g, s] * values[index[i, s], g].

    Args:
        weights: (N, G, K).
        values: (N, G, c).
        index, mask, reverse: As in :func:`gather_dot`.

    Returns:
        (N, G, c). Differentiable in ``weights`` and ``values``.
    """
    return _GatherSum.apply(weights, values, index, mask, reverse)


def _parts(x: Tensor) -> list[slice] | None:
    """Rows of x (N, h) whose GELU is computed at a time in the cache; ``None`` where torch's own is as fast: on a GPU, and
    in half precision, which it computes in single."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return None
    step = max(1, _GELU_ELEMENTS // x.shape[1])
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _gate(x: Tensor, out: Tensor) -> Tensor:
    """``sigmoid(2 u)`` with u of GELU's tanh formula, so that GELU is x times it; torch's sigmoid takes a quarter of its
    tanh's time."""
    return torch.addcmul(x.new_tensor(_LINEAR), x, x, value=_CUBIC, out=out).mul_(x).sigmoid_()


def _gelu(x: Tensor, out: Tensor) -> Tensor:
    """GELU of x (N, h) by its tanh formula, into ``out``, which may be x."""
    parts = _parts(x)
    if parts is None:
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    gates = x.new_empty(len(x[parts[0]]), x.shape[1])
    for part in parts:
        torch.mul(x[part], _gate(x[part], gates[: len(x[part])]), out=out[part])
    return out


def _gelu_backward(x: Tensor, grad: Tensor, value: Tensor) -> None:
    """Multiply ``grad`` by the derivative of :func:`_gelu` at x, in place, and put GELU itself into ``value``; (N, h)."""
    parts = _parts(x)
    if parts is None:
        _gelu(x, value)
        torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
        return
    room = x.new_empty(3, len(x[parts[0]]), x.shape[1])
    for part in parts:
        rows, act = x[part], value[part]
        gates, rise, slope = room[:, : len(rows)]
        torch.mul(rows, _gate(rows, gates), out=act)
        torch.addcmul(act, act, gates, value=-1, out=rise)  # x s (1 - s)
        torch.addcmul(x.new_tensor(_LINEAR), rows, rows, value=3 * _CUBIC, out=slope)
        grad[part].mul_(gates.addcmul_(rise, slope))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, chunk):
        hidden = x.new_empty(x.shape[0], weight1.shape[0])
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            torch.addmm(bias1, x[part], weight1.t(), out=hidden[part])
        ctx.save_for_backward(x, hidden, weight1, weight2)
        ctx.chunk = chunk
        return _second_layer(hidden, weight2, bias2, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, weight1, weight2 = ctx.saved_tensors
        grad, size, chunk = grad.contiguous(), x.shape[0], ctx.chunk
        grad_x = torch.empty_like(x)
        grads1, grads2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        grad_bias1 = weight1.new_zeros(weight1.shape[0])
        rows = min(chunk, size)
        active, passed = hidden.new_empty(rows, hidden.shape[1]), hidden.new_empty(rows, hidden.shape[1])
        for start in range(0, size, chunk):
            part = slice(start, start + chunk)
            count = len(x[part])
            act, back = active[:count], passed[:count]
            torch.mm(grad[part], weight2, out=back)
            _gelu_backward(hidden[part], back, act)
            grads2.addmm_(grad[part].t(), act)
            grads1.addmm_(back.t(), x[part])
            grad_bias1 += back.sum(dim=0)
            torch.mm(back, weight1, out=grad_x[part])
        return grad_x, grads1, grad_bias1, grads2, grad.sum(dim=0), None


def _second_layer(hidden: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> Tensor:
    """(N, h) before the activation -> (N, d)."""
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    active = hidden.new_empty(min(chunk, hidden.shape[0]), hidden.shape[1])
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        act = active[: len(hidden[part])]
        _gelu(hidden[part], act)
        torch.addmm(bias, act, weight.t(), out=out[part])
    return out


def feed_forward(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, chunk: int = 1024) -> Tensor:
    """Return ``gelu(x W1^T + b1) W2^T + b2`` (GELU by its tanh formula), some rows at a time.

    The chunks' arrays stay in the processor's cache and are used again; for the gradients only the values before the
    activation are kept.

    Args:
        x: (N, d).
        weight1, bias1: (h, d) and (h,).
        weight2, bias2: (d, h) and (d,).
        chunk: Rows at a time.

    Returns:
        (N, d), once differentiable. Under autocast everything is in its type.
    """
    if not torch.is_grad_enabled():
        if x.shape[0] > chunk:
            return torch.cat([feed_forward(part, weight1, bias1, weight2, bias2, chunk=chunk) for part in x.split(chunk)])
        hidden = F.linear(x, weight1, bias1)
        return F.linear(_gelu(hidden, hidden), weight2, bias2)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight1, bias1, weight2, bias2 = (one.to(dtype) for one in (x, weight1, bias1, weight2, bias2))
    with torch.autocast(device, enabled=False):
        return _FeedForward.apply(x, weight1, bias1, weight2, bias2, chunk)


def reciprocal_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Reciprocal neighbour softmax (RNS, paper eq. 5) over the kept slots.

    The paper prints exp(-A); NFormer and the released code use exp(+A), as here.

    Args:
        scores: (N, G, K) affinities.
        mask: (N, K) bool; every row keeps at least its own slot.

    Returns:
        (N, G, K) in float32 (float64 for float64 input), rows sum to 1, zero outside the mask.
    """
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    return scores.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(dim=-1)


def landmark_projection(landmarks: Tensor, weight: Tensor, other: Tensor, *, maps: int, normalise: bool) -> Tensor:
    """Fold landmarks into the projection of the other side: ``x W_q (k_P / |k_P|)^T = x [W_q (k_P / |k_P|)^T]``.

    Args:
        landmarks: (p, d) landmark rows of the layer's input.
        weight: (maps * e, d) projection of the side that is folded (rows of ``nn.Linear.weight``).
        other: (maps * e, d) projection that turns landmarks into the opposite side.
        maps: Query/key maps G.
        normalise: Divide every landmark row by its norm, per map (MALAA); False is NFormer's landmark attention.

    Returns:
        (d, G * p): multiply the layer's input by it to get landmark similarities of all rows.
    """
    count, width = landmarks.shape
    agents = (landmarks @ other.t()).view(count, maps, -1)
    if normalise:
        agents = agents / agents.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    folded = torch.einsum("ged,pge->dgp", weight.view(maps, -1, width), agents)
    return folded.reshape(width, maps * count)


def farthest_points(features: Tensor, count: int) -> Tensor:
    """Return ``count`` row numbers spread over the data: the row farthest from the mean, then farthest-point sampling.

    Args:
        features: (N, d).
        count: Cut to N.
    """
    count = min(count, features.shape[0])
    chosen = [int((features - features.mean(dim=0)).square().sum(dim=1).argmax())]
    nearest = (features - features[chosen[0]]).square().sum(dim=1)
    while len(chosen) < count:
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(dim=1))
    return torch.tensor(chosen, device=features.device)
