"""Layers that see the whole batch where several processes train on its parts: batch normalisation and noise.

:func:`share_batch` makes them of a model's own layers, in place; parameters, buffers and names stay. Outside of a training
step that is cut (:func:`relreid_plugin.collective.cutting`) they are the layers that they were.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..collective import current, draw


class _Normalise(torch.autograd.Function):
    """Batch normalisation with the statistics of all processes on a CPU; SyncBatchNorm's kernels are CUDA's only.

    What goes over the maps is torch's own: its pass for statistics, and its normalisation by given ones with its gradients,
    to which the part that flows through the statistics is added.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.numel() // wide.shape[1]
        mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)
        own = torch.cat([mean, variance * count, mean.new_tensor([count])]).double()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        means, squares, counts = torch.stack(parts).split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum()
        middle = (counts * means).sum(dim=0) / total
        spread = (squares + counts * (means - middle).square()).sum(dim=0) / total
        mean, variance = middle.to(wide.dtype), spread.to(wide.dtype)
        out = torch.native_batch_norm(wide, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.total, ctx.biased, ctx.eps = float(total), bias is not None, eps
        unbiased = spread * (total / (total - 1))
        ctx.mark_non_differentiable(middle, unbiased)
        return out.to(x.dtype), middle, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, variance = ctx.saved_tensors
        wide, factor = x.to(mean.dtype), torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        grad, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
            grads[0].to(mean.dtype), wide, factor, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        both = torch.cat([bias_grad, weight_grad])
        dist.all_reduce(both)
        first, second = (both / ctx.total).chunk(2)
        scale = (variance + ctx.eps).rsqrt()
        slope = -factor * scale.square() * second  # of (x - mean): what the scale passes on
        level = -factor * scale * first - slope * mean
        shape = [1, -1, *[1] * (x.dim() - 2)]
        grad.addcmul_(wide, slope.view(shape)).add_(level.view(shape))
        return (
            grad.to(x.dtype),
            None if weight is None else weight_grad.to(weight.dtype),
            bias_grad if ctx.biased else None,
            None,
        )


class _SharedNorm(_BatchNorm):
    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of the whole batch, in a step that is cut."""
        if not self.training or current() is None:
            return super().forward(input)
        if input.is_cuda:  # torch's own kernels; the class itself is refused by DDP for models on the CPU
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        self._check_input_dim(input)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        out, mean, variance = _Normalise.apply(input, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            tracked = self.num_batches_tracked
            share = 1.0 / float(tracked) if self.momentum is None and tracked is not None else float(self.momentum or 0.0)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(variance.to(self.running_var.dtype), share)
        return out


class SharedBatchNorm1d(_SharedNorm, nn.BatchNorm1d):
    """``BatchNorm1d`` over the batch of all processes."""


class SharedBatchNorm2d(_SharedNorm, nn.BatchNorm2d):
    """``BatchNorm2d`` over the batch of all processes."""


class SharedBatchNorm3d(_SharedNorm, nn.BatchNorm3d):
    """``BatchNorm3d`` over the batch of all processes."""


def _kept(shape: tuple[int, ...], like: Tensor, drop: float) -> Tensor:
    """0 with probability ``drop``, else 1 / (1 - drop), as torch draws it."""
    noise = like.new_empty(shape).bernoulli_(1.0 - drop)
    return noise.div_(1.0 - drop) if drop < 1.0 else noise


class SharedDropout(nn.Dropout):
    """``Dropout`` whose mask is cut out of that of the whole batch."""

    def forward(self, input: Tensor) -> Tensor:
        """See torch."""
        if not self.training or current() is None or self.p == 0:
            return super().forward(input)
        inner = sorted(range(input.dim()), key=lambda dim: -input.stride()[dim])  # torch draws in the order of the memory
        place = [inner.index(dim) for dim in range(input.dim())]
        kept = draw(input.shape, lambda shape: _kept(tuple(shape[dim] for dim in inner), input, self.p).permute(place))
        return input * kept


class SharedDropPath(DropPath):
    """timm's ``DropPath`` whose draws are cut out of those of the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        if not self.training or current() is None or not self.drop_prob:
            return super().forward(x)
        keep = 1.0 - self.drop_prob
        kept = draw((len(x), *[1] * (x.dim() - 1)), lambda shape: x.new_empty(shape).bernoulli_(keep))
        return x * (kept.div(keep) if keep > 0 and self.scale_by_keep else kept)


class SharedAttention(nn.MultiheadAttention):
    """``MultiheadAttention``, batch first, whose dropout is cut out of that of the whole batch."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        """See torch; with dropout, a cut batch and no masks the weights are computed here."""
        masked = args or any(options.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        plain = not masked and not options.get("need_weights", True) and not options.get("is_causal", False)
        here = plain and self.batch_first and self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn
        if not (self.training and self.dropout and here and current() is not None):
            return super().forward(query, key, value, *args, **options)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = [
            nn.functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases)
        ]
        weights = (heads[0] * self.head_dim**-0.5 @ heads[1].transpose(-2, -1)).softmax(dim=-1)  # (B, H, R, T)
        weights = weights * draw(weights.shape, lambda shape: _kept(shape, weights, self.dropout))
        seen = (weights @ heads[2]).permute(2, 0, 1, 3).flatten(2)  # (R, B, d), in memory as torch's
        return self.out_proj(seen).transpose(0, 1), None


_SHARED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    nn.BatchNorm3d: SharedBatchNorm3d,
    nn.Dropout: SharedDropout,
    DropPath: SharedDropPath,
    nn.MultiheadAttention: SharedAttention,
}


def share_batch(model: nn.Module) -> list[str]:
    """Let a model's batch normalisations and noise see the batch of all processes, in place.

    Args:
        model: Its layers of the classes above, but not of classes derived from them, change their class.

    Returns:
        Names of layers that it does not know how to share and that depend on the rest of the batch, or draw: batch
        normalisations and dropouts of other classes, and dropout inside of fused attention.
    """
    left = []
    for name, module in model.named_modules():
        shared = _SHARED.get(type(module))
        if shared is not None:
            module.__class__ = shared
        elif not isinstance(module, tuple(_SHARED.values())):
            drops = isinstance(module, _DropoutNd) and module.p > 0
            fused = getattr(module, "fused_attn", False) and getattr(getattr(module, "attn_drop", None), "p", 0) > 0
            if drops or fused or isinstance(module, _BatchNorm):
                left.append(name)
    return left


__all__ = [
    "SharedAttention",
    "SharedBatchNorm1d",
    "SharedBatchNorm2d",
    "SharedBatchNorm3d",
    "SharedDropPath",
    "SharedDropout",
    "share_batch",
]
