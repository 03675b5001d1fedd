"""How a training step computes and when it updates, for every engine: precision, accumulation, clipping, averaged weights.

The engines, the host's own among them, compute a loss in float32 from what the network returns, call ``backward`` and step
their optimiser. In a step that is not plain, :class:`Updates` stands between: the network they call runs under autocast and
hands back float32, and what flows back into it is multiplied by the loss scale; when an update is due, the gradients in the
optimiser that they step are unscaled, averaged over the update's batches and clipped. So no engine knows of any of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.hooks import RemovableHandle

from ..collective import bare_model, world
from ..errors import UserError

PRECISIONS = {"float64": None, "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""``train.precision`` to autocast's type; in ``float64`` the weights are so too, and nothing is cast."""
SMALLEST_SCALE = 2.0**-16
"""Gradients that are not finite at this loss scale are so at any."""


@dataclass(frozen=True)
class Practice:
    """What a training step does beyond the plain one.

    Attributes:
        precision: One of :data:`PRECISIONS`, of the network's forward pass; ``float16`` trains under a loss scale, and in
            ``float64`` weights, losses and the optimiser are of that type as well.
        accumulate: Batches of an update.
        clip_norm: Largest norm of the gradients of all parameters; 0: any.
        ema: Decay of the averaged weights; 0: there are none.
        compile: Compile the network's pass in training.
        channels_last: Convolutions see their images channels last.
    """

    precision: str = "float32"
    accumulate: int = 1
    clip_norm: float = 0.0
    ema: float = 0.0
    compile: bool = False
    channels_last: bool = False

    @classmethod
    def of(cls, cfg: Any, *, network: bool = True) -> Practice:
        """Return what the keys of ``train`` ask for.

        Args:
            cfg: Configuration.
            network: The network trains, not an encoder behind it, which is neither compiled nor made of convolutions.
        """
        train = cfg.train
        return cls(
            precision=train.precision,
            accumulate=train.accumulate,
            clip_norm=train.clip_norm,
            ema=train.ema,
            compile=train.compile and network,
            channels_last=train.channels_last and network,
        )


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def _mapped(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors in lists and tuples, changed."""
    if isinstance(values, Tensor):
        return change(values)
    return type(values)(_mapped(value, change) for value in values) if isinstance(values, (list, tuple)) else values


def _wide(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the pass of a network in float64: what it is given in float32 becomes float64."""
    wide = next(module.parameters()).dtype == torch.float64  # a copy may be in float32

    def widened(value: Tensor) -> Tensor:
        return value.double() if wide and value.dtype == torch.float32 else value

    return _mapped(args, widened), {name: _mapped(value, widened) for name, value in options.items()}


class _Network:
    """The network as a step calls it; whatever else is asked of it, the bare one answers."""

    def __init__(self, updates: Updates, network: nn.Module) -> None:
        self._updates, self._network = updates, network

    def __getattr__(self, name: str) -> Any:
        return getattr(bare_model(self._network), name)

    def __call__(self, images: Tensor, *args: Any, **options: Any) -> Any:
        return self._updates.forward(self._network, images, *args, **options)


class _Optimizer:
    """The optimiser as a step sees it: gradients are kept, and steps left out, until an update is due."""

    def __init__(self, updates: Updates, optimizer: torch.optim.Optimizer) -> None:
        self._updates, self._optimizer = updates, optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._updates.first:
            self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        self._updates.update(self._optimizer)


class Updates:
    """The steps of one engine.

    Args:
        practice: What they do.

    Attributes:
        practice: The same.
        window: Batches of the running update so far; the last update of an epoch may have fewer than the others.
        made: Whether the last batch ended in an update of the weights.
        skipped: Updates of this epoch that were left out, since gradients overflowed under the loss scale.
    """

    def __init__(self, practice: Practice = Practice()) -> None:
        self.practice = practice
        self.window, self.made, self.skipped = 1, True, 0
        self._batch, self._updates, self._final = 0, 0, False
        self._scaler: torch.amp.GradScaler | None = None
        self._network: nn.Module | None = None
        self._averaged: dict[str, Tensor] | None = None
        self._averages = 0
        self._compiled: tuple[nn.Module, Any] | None = None
        self._widened: RemovableHandle | None = None

    @property
    def first(self) -> bool:
        """Whether the running batch is the first one of its update."""
        return (self._batch - 1) % self.practice.accumulate == 0

    @property
    def last(self) -> bool:
        """Whether the running batch is the last one of its update."""
        return self._batch % self.practice.accumulate == 0 or self._final

    def updates_of(self, batches: int) -> int:
        """Return how many updates an epoch of so many batches makes."""
        return -(-batches // self.practice.accumulate)

    # --- before and after an epoch -------------------------------------------------------------------------------------
    def widen(self, engine: Any) -> None:
        """In float64, make the engine's network and losses so; before a checkpoint is restored and an optimiser steps."""
        if self.practice.precision != "float64" or self._widened is not None:
            return
        for holder in (engine, *engine.observers):
            for value in vars(holder).values():
                if isinstance(value, nn.Module):
                    value.double()
        self._widened = bare_model(engine.model).register_forward_pre_hook(_wide, with_kwargs=True)

    def narrow(self, engine: Any) -> None:
        """After training in float64, make the network float32 again, as tests and everything behind it take it."""
        if self._widened is not None:
            self._widened.remove()
            self._widened = None
            bare_model(engine.model).float()

    def start(self, engine: Any, *, mined: bool) -> None:
        """Get ready to train: averaged weights begin as the weights are, and what an accumulated batch is not is said.

        Args:
            engine: The engine; its model has the weights that it starts or goes on from.
            mined: Its loss looks for the hardest pairs of a batch.

        Raises:
            UserError: What cannot be done in several processes.
        """
        practice, model = self.practice, bare_model(engine.model)
        if practice.compile and world() > 1:
            raise UserError(
                "'train.compile True' works with one process, not with torchrun's several; set it to False, or start one."
            )
        self._network = model
        if practice.ema and self._averaged is None:
            self._averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if practice.accumulate > 1:
            for note in self._notes(model, len(engine.train_loader), mined):
                print(f"note: {note}")

    def _notes(self, model: nn.Module, batches: int, mined: bool) -> Iterator[str]:
        count = self.practice.accumulate
        norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
        if norms:
            yield (
                f"'train.accumulate {count}' is no batch of {count} times the size to the model's {norms} batch "
                "normalisations: each takes its statistics from one batch."
            )
        if mined:
            yield f"'train.accumulate {count}' mines the hardest triplets of a batch, not of an update's {count}."
        if count > batches:
            yield f"'train.accumulate {count}' is more than the {batches} batches of an epoch, which make one update."

    def begin(self) -> None:
        """Begin an epoch."""
        self._batch, self._updates, self.skipped, self._final = 0, 0, 0, False

    def watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield an epoch's batches; where they are accumulated one ahead, since some samplers give fewer than they say."""
        if self.practice.accumulate == 1:
            yield from batches
            return
        nothing = object()
        iterator = iter(batches)
        here = next(iterator, nothing)
        while here is not nothing:
            behind = next(iterator, nothing)
            self._final = behind is nothing
            yield here
            here = behind

    def end(self) -> dict[str, float]:
        """Return what the epoch's record shall hold: under a loss scale, the scale and the updates that it left out."""
        if self._scaler is None:
            return {}
        if self.skipped and self.skipped == self._updates:
            print(
                f"note: gradients overflowed in all {self.skipped} updates of the epoch: nothing was learned in it, and the "
                f"loss scale is {self._scaler.get_scale():.4g} now"
            )
        return {"scale": self._scaler.get_scale(), "skipped": float(self.skipped)}

    # --- a step --------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def step(self, engine: Any) -> Iterator[None]:
        """Let an engine's step in the block compute and update as the practice says."""
        if self.practice == Practice():
            yield
            return
        self._batch += 1
        self.window = 1 + (self._batch - 1) % self.practice.accumulate
        model, optimizer = engine.model, engine.optimizer
        engine.model, engine.optimizer = _Network(self, model), _Optimizer(self, optimizer)
        try:
            yield
        finally:
            engine.model, engine.optimizer = model, optimizer

    def forward(self, network: nn.Module, images: Tensor, *args: Any, **options: Any) -> Any:
        """Return what the network returns for a batch, in float32 (float64), with scaled gradients.

        Raises:
            UserError: It cannot be compiled.
        """
        practice, device = self.practice, images.device.type
        if practice.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = PRECISIONS[practice.precision]
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            outputs = self._callable(network)(images, *args, **options)
        factor = self._factor(images.device)

        def handed_back(value: Tensor) -> Tensor:
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            return value if factor is None or not value.requires_grad else _Scaled.apply(value, factor)  # type: ignore[no-untyped-call,no-any-return]

        return _mapped(outputs, handed_back)

    def _callable(self, network: nn.Module) -> Any:
        if not self.practice.compile:
            return network
        if self._compiled is None or self._compiled[0] is not network:
            self._compiled = (network, _said(torch.compile(network)))
        return self._compiled[1]

    def _factor(self, device: torch.device) -> Tensor | None:
        """The loss scale; ``None``: there is none."""
        if self.practice.precision != "float16":
            return None
        if self._scaler is None:
            self._scaler = torch.amp.GradScaler(device.type)
        return self._scaler.scale(torch.ones((), device=device))

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimiser if an update is due.

        Raises:
            UserError: Gradients are not finite at any loss scale.
        """
        self.made = self.last
        if not self.made:
            return
        self._updates += 1
        scaler, limit = self._scaler, self.practice.clip_norm
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
        if self.window > 1:
            torch._foreach_div_([value.grad for value in parameters], float(self.window))
        if limit:
            torch.nn.utils.clip_grad_norm_(parameters, limit)
        if scaler is None:
            optimizer.step()
        else:
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            self.made = scaler.get_scale() >= before
            self.skipped += not self.made
            if scaler.get_scale() < SMALLEST_SCALE:
                raise UserError(
                    f"gradients are not finite at a loss scale of {before:.2g} either, so 'train.precision float16' cannot "
                    "train this; set it to 'bfloat16' or 'float32', or lower the learning rate."
                )
        if self.made:
            self._average()

    # --- averaged weights ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _average(self) -> None:
        """Let the averaged weights follow: average <- d average + (1 - d) weights, d = min(decay, (1 + n) / (10 + n)).

        n counts updates from 0, so that a short run does not keep its first weights. Parameters and the running statistics
        of batch normalisations are averaged, other buffers taken as they are.
        """
        if self._averaged is None or self._network is None:
            return
        decay = min(self.practice.ema, (1 + self._averages) / (10 + self._averages))
        self._averages += 1
        names, weights = _averaged_names(self._network), self._network.state_dict()
        followed = [name for name in weights if name in names]
        get_ema_multi_avg_fn(decay)([self._averaged[name] for name in followed], [weights[name] for name in followed], None)
        for name, value in weights.items():
            if name not in names:
                self._averaged[name].copy_(value)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averaged weights in the network in the block, where there are any."""
        if self._averaged is None or self._network is None:
            yield
            return
        weights = {name: value.detach().clone() for name, value in self._network.state_dict().items()}
        self._network.load_state_dict(self._averaged)
        try:
            yield
        finally:
            self._network.load_state_dict(weights)

    def settle(self) -> None:
        """Put the averaged weights into the network for good, where there are any."""
        if self._averaged is not None and self._network is not None:
            self._network.load_state_dict(self._averaged)

    # --- checkpoints ---------------------------------------------------------------------------------------------------
    def entries(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Return a checkpoint's entries: ``state_dict``, which is what is tested, and what is needed to go on.

        Args:
            weights: The network's own.
        """
        if self._averaged is None and self._scaler is None:
            return {"state_dict": weights}
        scaler = {} if self._scaler is None else {"scaler": self._scaler.state_dict()}
        if self._averaged is None:
            return {"state_dict": weights, "updates": scaler}
        averaged = {name: value.clone() for name, value in self._averaged.items()}
        return {"state_dict": averaged, "updates": {**scaler, "trained": weights, "averages": self._averages}}

    def restore(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Go on from a checkpoint whose ``state_dict`` is in the model already."""
        self._network, found = model, state.get("updates", {})
        if "scaler" in found:
            self._scaler = torch.amp.GradScaler(next(model.parameters()).device.type)
            self._scaler.load_state_dict(found["scaler"])
        if "trained" in found:
            self._averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
            self._averages = found["averages"]
            model.load_state_dict(found["trained"])


def _averaged_names(model: nn.Module) -> set[str]:
    """Parameters, and the statistics of batch normalisations."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            names |= {f"{prefix}.running_mean".lstrip("."), f"{prefix}.running_var".lstrip(".")}
    return names


def _said(compiled: Any) -> Callable[..., Any]:
    """Let a compiled network say in a sentence what its compiler cannot do."""

    def call(*args: Any, **options: Any) -> Any:
        try:
            return compiled(*args, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"torch.compile cannot compile this network here ({reason}); set 'train.compile False'."
            ) from error

    return call


__all__ = ["PRECISIONS", "Practice", "Updates"]
