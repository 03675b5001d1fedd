"""DCS-Attention: attention weights from a differentiable selection of channels (RIB; METHODS 2).

Shape letters: B images, T tokens, D channels, H heads, h x w feature map.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import collective
from ..errors import UserError
from .control import random_logits
from .gate import logistic_noise, straight_through_gate

SCHEDULES = ("constant", "linear", "cosine", "exponential")


def temperature_at(epoch: int, max_epoch: int, *, start: float, end: float, schedule: str = "linear") -> float:
    """Return the gates' temperature in an epoch.

    Args:
        epoch: Counted from 0.
        max_epoch: Epochs of training; the last one has ``end``.
        start: Temperature of the first epoch.
        end: Temperature of the last epoch.
        schedule: One of :data:`SCHEDULES`; ``constant`` stays at ``start``.

    Raises:
        ValueError: Unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "constant":
        return start
    progress = min(1.0, epoch / (max_epoch - 1)) if max_epoch > 1 else 1.0
    if schedule == "exponential":
        return start * (end / start) ** progress
    if schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return start + (end - start) * progress


class GateNoise:
    """Logistic noise for all gates of a model, from generators of its own: one per device, made on first use.

    A deep copy of a gate shares the noise of the original.

    Args:
        seed: Seed of the generators.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> GateNoise:
        return self

    def _generator(self, device: str) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def sample(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Draw noise of a shape, float32; for the rows of several processes as for one."""
        generator = self._generator(str(device))
        return collective.draw(shape, lambda whole: logistic_noise(whole, generator=generator, device=device))

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and the generators' states by device."""
        states = {device: generator.get_state() for device, generator in self._generators.items()}
        return {"seed": self.seed, "generators": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was; devices that this machine lacks are left out."""
        self.seed = state["seed"]
        self._generators.clear()
        for device, value in state["generators"].items():
            if torch.device(device).type == "cpu" or torch.cuda.is_available():
                self._generator(device).set_state(value.cpu())


class ChannelGate(nn.Module):
    """Per token, a binary mask over channels: hard in the forward pass, with the soft gate's gradient.

    theta = Linear(x); training: theta + noise > 0, with the gradient of sigmoid((theta + noise) / temperature); testing:
    theta > 0. The weight starts at zero and the bias above it, so all masks are open in testing and a share
    sigmoid(bias) of them in training.

    In training mode it counts how many channels it keeps, and how many the test-time rule would keep on the same tokens
    (see :class:`ChannelSelection`).

    As a control its logits can be drawn instead of learned (:meth:`ChannelSelection.draw`): the same for all tokens and
    images. The layer that would make them stays, with its parameters and its draws at the start, but is neither read nor
    trained.

    Args:
        dim: Width of the tokens.
        channels: Channels to choose from.
        init_bias: Bias at the start.
        noise: Noise that the gates of a model share; ``None`` for one of its own.

    Attributes:
        temperature: Temperature of the soft gate.
        drawn: (channels,) logits that were drawn; ``None``: they are learned.
        draws: Whether it draws from a generator of its own, which recomputed layers must put back (:func:`replayed`).
    """

    drawn: Tensor | None
    draws = True

    def __init__(self, dim: int, channels: int, *, init_bias: float = 2.0, noise: GateNoise | None = None) -> None:
        super().__init__()
        self.theta = nn.Linear(dim, channels)
        nn.init.zeros_(self.theta.weight)
        nn.init.constant_(self.theta.bias, init_bias)
        self.noise = noise if noise is not None else GateNoise()
        self.temperature = 1.0
        self.register_buffer("drawn", None)
        # device -> [kept with noise, kept without, all]; one object for all replicas of a data-parallel model
        self.counts: dict[torch.device, list[Any]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, channels) of zeros and ones."""
        logits = self.theta(x) if self.drawn is None else self.drawn.to(x.dtype).expand(*x.shape[:-1], -1)
        if not self.training:
            return straight_through_gate(logits.detach())
        noise = self.noise.sample(logits.shape, logits.device)
        mask = straight_through_gate(logits, noise=noise, temperature=self.temperature)
        self._count(mask.detach(), logits.detach())
        return mask

    @torch.no_grad()
    def _count(self, mask: Tensor, logits: Tensor) -> None:
        totals = self.counts.setdefault(mask.device, [0, 0, 0])
        totals[0] = totals[0] + mask.sum(dtype=torch.float64)
        totals[1] = totals[1] + (logits > 0).sum()
        totals[2] += mask.numel()


def replayed(block: nn.Module) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Return the contexts of a block's forward pass and of its recomputation, for torch's ``checkpoint``.

    In the second one the block's gates draw the noise that they are about to draw now, and count nothing.
    """
    gates = [module for module in block.modules() if isinstance(module, ChannelGate)]
    noises = list({id(gate.noise): gate.noise for gate in gates}.values())
    drawn = [noise.state_dict() for noise in noises]

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        states = [noise.state_dict() for noise in noises]
        counts = [{device: list(totals) for device, totals in gate.counts.items()} for gate in gates]
        for noise, state in zip(noises, drawn):
            noise.load_state_dict(state)
        try:
            yield
        finally:
            for noise, state in zip(noises, states):
                noise.load_state_dict(state)
            for gate, totals in zip(gates, counts):
                gate.counts.clear()
                gate.counts.update(totals)

    return contextlib.nullcontext(), again()


class _Selecting:
    """What the attentions of timm have in common once they select channels; mixed in before one of them."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def from_attention(cls, attention: nn.Module, *, init_bias: float = 2.0, noise: GateNoise | None = None) -> Any:
        """Return a DCS-Attention with the layers of a timm attention; only ``select.*`` is new in the state dict."""
        selecting: Any = copy.copy(attention)
        selecting._modules = dict(attention._modules)
        selecting.__class__ = cls
        channels = selecting.num_heads * selecting.head_dim
        gate = ChannelGate(selecting.proj.out_features, channels, init_bias=init_bias, noise=noise)
        selecting.select = gate.to(selecting.proj.weight.device, selecting.proj.weight.dtype)
        selecting.select.train(attention.training)
        return selecting

    def _attend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Select channels of queries and keys (B, H, T, d), attend, and project; ``x`` is the block's input (B, T, D)."""
        batch, tokens, _ = x.shape
        mask = self.select(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        query, key = query * mask, key * mask
        drop = self.attn_drop.p if self.training else 0.0
        if self.fused_attn:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal)
        else:
            scores = (query * self.scale) @ key.transpose(-2, -1)
            if is_causal:
                scores = scores + torch.full_like(scores[0, 0], float("-inf")).triu(1)
            elif attn_mask is not None:
                scores = (
                    scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
                )
            out = self.attn_drop(scores.softmax(dim=-1)) @ value
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, -1))
        gate = getattr(self, "gate", None)  # of the output, in newer versions of timm
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class DCSAttention(_Selecting, Attention):
    """timm's attention whose weights see only selected channels: softmax((Q * M)(K * M)^T / sqrt(d)) V.

    The mask M is drawn per token from the block's input, every head having its own channels; values keep all of them. The
    fused path stays. With all masks open it is timm's attention.

    Args:
        dim: Token width D.
        num_heads: Heads H.
        init_bias: See :class:`ChannelGate`.
        noise: See :class:`ChannelGate`.
        **options: Further options of :class:`timm.layers.Attention`.
    """

    select: ChannelGate

    def __init__(
        self, dim: int, num_heads: int = 8, *, init_bias: float = 2.0, noise: GateNoise | None = None, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.select = ChannelGate(dim, self.num_heads * self.head_dim, init_bias=init_bias, noise=noise)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, H, T, D / H)
        return self._attend(x, self.q_norm(query), self.k_norm(key), value, attn_mask, is_causal)


class _Rotary(_Selecting):
    """Channel selection for attentions with rotary position embeddings: channels are selected behind the rotation."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, tokens, _ = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, tokens, -1, self.head_dim).transpose(1, 2)

        if self.qkv is None:
            query, key, value = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        else:
            bias = self.qkv.bias
            if getattr(self, "q_bias", None) is not None:
                bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            query, key, value = (heads(part) for part in F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1))
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = self._rotate(query, rope).type_as(value), self._rotate(key, rope).type_as(value)
        groups = query.shape[1] // key.shape[1]  # of heads that share keys and values
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return self._attend(x, query, key, value, attn_mask, is_causal)

    def _rotate(self, heads: Tensor, rope: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        options = {"half": True} if getattr(self, "rotate_half", False) else {}
        return torch.cat([heads[:, :, :prefix], apply_rot_embed_cat(heads[:, :, prefix:], rope, **options)], dim=2)


class DCSAttentionRope(_Rotary, AttentionRope):
    """:class:`DCSAttention` for timm's attention with rotary position embeddings; made by ``from_attention``."""


class DCSEvaAttention(_Rotary, EvaAttention):
    """:class:`DCSAttention` for the attention of EVA, EVA-02 and DINOv3 in timm; made by ``from_attention``."""


SELECTING: dict[type[nn.Module], Any] = {
    Attention: DCSAttention,
    AttentionRope: DCSAttentionRope,
    EvaAttention: DCSEvaAttention,
}
"""timm's attention to the one that selects channels."""


def replace_attention(network: nn.Module, *, init_bias: float = 2.0, noise: GateNoise | None = None) -> list[str]:
    """Swap every attention of a timm vision transformer for DCS-Attention, in place; its weights stay.

    Args:
        network: The network.
        init_bias: See :class:`ChannelGate`.
        noise: Noise that all gates share; ``None`` makes one.

    Returns:
        Names of the attentions.

    Raises:
        UserError: The network has none of the attentions in :data:`SELECTING`.
    """
    noise = noise if noise is not None else GateNoise()
    found = {name: module for name, module in network.named_modules() if type(module) in SELECTING}
    if not found:
        raise UserError(
            f"'rib.attention dcs' finds no attention to replace in a {type(network).__name__}; 'backbone.name' must be a "
            "vision transformer of timm whose attention is global and plain or rotary, such as 'timm:vit_…', 'timm:deit_…' "
            "or 'timm:eva…'."
        )
    for name, attention in found.items():
        parent, _, leaf = name.rpartition(".")
        selecting = SELECTING[type(attention)].from_attention(attention, init_bias=init_bias, noise=noise)
        setattr(network.get_submodule(parent), leaf, selecting)
    return list(found)


class DCSNonLocal(nn.Module):
    """Residual non-local block with channel selection: X + W(A g(X)), A = softmax((X * M)(X * M)^T / sqrt(D)).

    Tokens are the places of the feature map; g reads all channels. W ends in a batch normalisation whose weight starts at
    zero, so that the block is the identity at the start.

    Args:
        channels: D.
        reduction: g has D / reduction channels.
        init_bias: See :class:`ChannelGate`.
        noise: See :class:`ChannelGate`.
    """

    def __init__(self, channels: int, *, reduction: int = 2, init_bias: float = 2.0, noise: GateNoise | None = None) -> None:
        super().__init__()
        width = max(1, channels // reduction)
        self.select = ChannelGate(channels, channels, init_bias=init_bias, noise=noise)
        self.value = nn.Linear(channels, width)
        self.proj = nn.Conv2d(width, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        batch, _, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, T, D)
        selected = (tokens * self.select(tokens)).unsqueeze(1)
        out = F.scaled_dot_product_attention(selected, selected, self.value(tokens).unsqueeze(1)).squeeze(1)
        out = out.transpose(1, 2).reshape(batch, -1, height, width)
        return x + self.bn(self.proj(out))


class ChannelSelection:
    """All channel gates of a model: their temperature, their noise, and the rates of channels they keep.

    Args:
        model: A model with :class:`ChannelGate` modules.

    Attributes:
        names: The gates' names in the model, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        gates = {name: module for name, module in model.named_modules() if isinstance(module, ChannelGate)}
        self.gates = {name.removesuffix(".select"): gate for name, gate in gates.items()}
        self.names = list(self.gates)
        self._noises = list({id(gate.noise): gate.noise for gate in self.gates.values()}.values())

    def draw(self, keep: Sequence[float], keep_noise: Sequence[float], *, open_at: float, seed: int) -> None:
        """Draw the logits of all gates instead of learning them, one gate after the other.

        Args:
            keep: Shares of channels that the gates keep in testing: one for all of them, or one per gate.
            keep_noise: The same under the noise of training; empty: an open channel is so with probability ``open_at``.
            open_at: See ``keep_noise``.
            seed: Of the draws; the global generator is left alone.

        Raises:
            UserError: The shares are more or fewer than the gates.
        """
        for key, shares in (("keep", keep), ("keep_noise", keep_noise)):
            if len(shares) not in ((1, len(self.gates)) if key == "keep" else (0, 1, len(self.gates))):
                raise UserError(
                    f"key 'rib.dcs.{key}' holds {len(shares)} shares, but the model has {len(self.gates)} gates; give 1 or "
                    f"{len(self.gates)}."
                )
        generator = torch.Generator().manual_seed(seed)
        for place, gate in enumerate(self.gates.values()):
            own = [shares[place if len(shares) > 1 else 0] if len(shares) else None for shares in (keep, keep_noise)]
            channels, device = gate.theta.out_features, gate.theta.weight.device
            logits = random_logits(channels, own[0] or 0.0, own[1], open_at=open_at, generator=generator)
            gate.drawn = logits.to(device)

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of all gates."""
        for gate in self.gates.values():
            gate.temperature = temperature

    def kept_rates(self, *, reset: bool = True) -> dict[str, dict[str, float]]:
        """Return the rates of kept channels since the last reset, by gate.

        Returns:
            ``train``: with the training noise; ``test``: by the rule of testing, on the same tokens. Gates that have not
            trained are left out.
        """
        rates = {}
        for name, gate in self.gates.items():
            totals = list(gate.counts.values())
            if totals:
                own = [float(sum(float(total[part]) for total in totals)) for part in range(3)]
                train, test, count = collective.total(torch.tensor(own, dtype=torch.float64)).tolist()
                rates[name] = {"train": train / count, "test": test / count}
            if reset:
                gate.counts.clear()
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the noise generators."""
        return {"noise": [noise.state_dict() for noise in self._noises]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the noise of :meth:`state_dict`."""
        for noise, value in zip(self._noises, state["noise"], strict=True):
            noise.load_state_dict(value)


def speed_up_gates(optimizer: Optimizer, model: nn.Module, factor: float) -> None:
    """Give the parameters of channel gates a group of their own, with ``factor`` times the learning rate.

    It is the first group: the host prints the learning rate of the last one.
    """
    gates = {id(value) for module in model.modules() if isinstance(module, ChannelGate) for value in module.parameters()}
    if not gates or factor == 1.0:
        return
    fast = []
    for group in optimizer.param_groups:
        fast += [value for value in group["params"] if id(value) in gates]
        group["params"] = [value for value in group["params"] if id(value) not in gates]
    base = optimizer.param_groups[-1]
    optimizer.add_param_group(
        {**{key: base[key] for key in base if key != "params"}, "params": fast, "lr": factor * base["lr"]}
    )
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())
