"""Sparse relation attention over neighbour graphs.

Shape letters: N rows (images), K slots per row, G query/key maps, p landmarks, c value width.

Every tensor is O(N K) or O(N c): the kept entries of the affinity matrix are gathered, never the matrix. The two primitives
:func:`gather_dot` and :func:`gather_sum` are each other's derivatives; on a symmetric graph the gradient of the gathered
side is again a gather, through the reverse-edge map, so that the backward pass needs no scattered additions and gives the
same bytes on every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22


def _row_step(slots: int, width: int) -> int:
    return max(1, _BLOCK_ELEMENTS // max(1, slots * width))


def _dot(rows: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """(N, G, c), (M, G, c), (N, K) -> (N, G, K): inner products of every row with its gathered rows."""
    size, groups, width = rows.shape
    slots = index.shape[1]
    out = rows.new_empty(size, groups, slots)
    step = _row_step(slots, groups * width)
    for start in range(0, size, step):
        part = slice(start, start + step)
        picked = values[index[part]]
        out[part] = torch.einsum("ngc,nkgc->ngk", rows[part], picked)
    return out


def _sum(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """(N, G, K), (M, G, c), (N, K) -> (N, G, c): weighted sums of gathered rows."""
    size, groups, slots = weights.shape
    width = values.shape[2]
    out = values.new_empty(size, groups, width)
    if width >= 32:
        for group in range(groups):
            table, share = values[:, group].contiguous(), weights[:, group].to(values.dtype).contiguous()
            out[:, group] = F.embedding_bag(index, table, per_sample_weights=share, mode="sum")
        return out
    step = _row_step(slots, groups * width)
    for start in range(0, size, step):
        part = slice(start, start + step)
        out[part] = torch.einsum("ngk,nkgc->ngc", weights[part].to(values.dtype), values[index[part]])
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
        grad_values = _sum(_transpose(grad, reverse, mask), rows, index) if ctx.needs_input_grad[1] else None
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
        grad_values = _sum(_transpose(weights, reverse, mask), grad, index) if ctx.needs_input_grad[1] else None
        return grad_weights, grad_values, None, None, None


def gather_dot(rows: Tensor, values: Tensor, index: Tensor, mask: Tensor, reverse: Tensor) -> Tensor:
    """Return affinities of kept edges.

    Args:
        rows: (N, G, p) landmark similarities of the attending rows.
        values: (N, G, p) landmark similarities of the attended rows.
        index: (N, K) int64, attended row per slot.
        mask: (N, K) bool, kept slots; the masked graph must be symmetric (see ``ReciprocalGraph``).
        reverse: (N, K) int64, flat position of the opposite edge.

    Returns:
        (N, G, K), zero outside the mask. Differentiable in ``rows`` and ``values``.
    """
    return _GatherDot.apply(rows, values, index, mask, reverse)


def gather_sum(weights: Tensor, values: Tensor, index: Tensor, mask: Tensor, reverse: Tensor) -> Tensor:
    """Return weighted sums over kept edges: out[i, g] = sum_s weights[i, g, s] * values[index[i, s], g].

    Args:
        weights: (N, G, K).
        values: (N, G, c).
        index, mask, reverse: As in :func:`gather_dot`.

    Returns:
        (N, G, c). Differentiable in ``weights`` and ``values``.
    """
    return _GatherSum.apply(weights, values, index, mask, reverse)


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
    """Fold landmarks into the projection of the other side: x W_q (k_P / |k_P|)^T = x [W_q (k_P / |k_P|)^T].

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
