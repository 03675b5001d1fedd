"""Stage 1: image engines. The host's own engines train the host's configurations; ``composite`` is the plug-in's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..backbones.losses import CompositeLoss
from ..collective import bare_model, gather
from ..errors import UserError
from ..host import HOST
from ..methods import methods
from .base import EngineMixin
from .distributed import average
from .observers import Observer
from .updates import Practice, Updates

_Engine: Any = HOST.engine.Engine
_ImageSoftmax: Any = HOST.engine.ImageSoftmaxEngine
_ImageTriplet: Any = HOST.engine.ImageTripletEngine
_VideoSoftmax: Any = HOST.engine.VideoSoftmaxEngine
_VideoTriplet: Any = HOST.engine.VideoTripletEngine


class _CompositeStep(_Engine):
    """One training step with the composite loss; class centers have an optimiser of their own.

    Where several processes train, every one computes the loss of the whole batch from what all of them gathered.

    Args:
        datamanager: The host's data manager.
        model: Model that trains returning (logits, features).
        optimizer: Its optimiser.
        scheduler: Its schedule.
        loss: The loss.
        center_optimizer: Optimiser of the class centers, or ``None`` without a center loss.
        terms: Further parts of the loss.
        use_gpu: Use CUDA when there is any.
    """

    whole_summary = True
    updates: Updates

    def __init__(
        self,
        datamanager: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: CompositeLoss,
        center_optimizer: torch.optim.Optimizer | None,
        terms: Sequence[Observer] = (),
        scheduler: Any = None,
        use_gpu: bool = True,
    ) -> None:
        super().__init__(datamanager, use_gpu)
        self.terms = list(terms)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.register_model("model", model, optimizer, scheduler)
        self.loss, self.center_optimizer = loss, center_optimizer
        self.mined = bool(loss.weights["triplet"])

    def step(
        self,
        logits: torch.Tensor | list[torch.Tensor],
        features: torch.Tensor | list[torch.Tensor],
        pids: torch.Tensor,
        images: torch.Tensor | None = None,
        term_features: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Losses of the whole batch, and :meth:`update`.

        Args:
            logits: (B, C), or a list with the global branch first; where several processes train, this one's rows.
            features: (B, d) before the BNNeck, or a list.
            pids: (B,).
            images: (B, 3, h, w), for the further parts of the loss.
            term_features: (B, d) that those are about.
        """
        logits, features, pids = gather(logits), gather(features), gather(pids)
        total, parts = self.loss(logits, features, pids)
        whole = logits if torch.is_tensor(logits) else logits[0]
        for term in self.terms:
            term.see(whole.detach(), pids)
            if images is None or term_features is None:
                break
            value = term.loss(gather(term_features), pids, gather(term.describe(images)))
            if value is not None:
                parts[term.term] = value.detach()
                if term.weight > 0:
                    total = total + term.weight * value
        return self.update(total, parts, whole, pids)

    def update(
        self, total: torch.Tensor, parts: dict[str, torch.Tensor], logits: torch.Tensor, pids: torch.Tensor
    ) -> dict[str, float]:
        """Backward pass and both optimiser steps.

        Args:
            total: The loss.
            parts: Its unweighted parts.
            logits: (B, C).
            pids: (B,).

        Returns:
            What the host prints and the history keeps.
        """
        if not bool(torch.isfinite(total)):
            name = next((name for name, value in parts.items() if not bool(torch.isfinite(value).all())), "loss")
            raise self.explosion(name, total.item())
        self.optimizer.zero_grad(set_to_none=True)
        if self.center_optimizer is not None and self.updates.first:
            self.center_optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        if self.center_optimizer is not None and self.updates.made:
            average(list(self.loss.parameters()))
            self.loss.unscale_center_gradients(batches=self.updates.window)
            self.center_optimizer.step()
        accuracy = (logits.detach().argmax(dim=1) == pids).float().mean()
        seen = {"loss": total, **parts, "acc": accuracy}
        numbers = torch.stack([value.detach().double() for value in seen.values()]).tolist()  # the host waits for them once
        return {name: 100.0 * value if name == "acc" else value for name, value in zip(seen, numbers)}

    def forward_backward(self, data: Any) -> dict[str, float]:
        """One batch of images."""
        images, pids = self.parse_data_for_train(data)
        if self.use_gpu:
            images, pids = images.cuda(non_blocking=True), pids.cuda(non_blocking=True)
        outputs = self.model(images, self.batch_cameras(data, images)) if self.reads_cameras else self.model(images)
        if not (isinstance(outputs, tuple) and len(outputs) in (2, 3)):
            raise UserError(
                "'loss.name composite' needs a model that trains returning one pair of logits and features; "
                "'model.name bnneck_baseline' does, with any backbone."
            )
        logits, features, *behind = outputs
        before = features if torch.is_tensor(features) else features[0]
        return self.step(logits, features, pids, images, behind[0] if behind else before)


class CompositeEngine(EngineMixin, _CompositeStep):
    """The plug-in's image engine."""


class SoftmaxEngine(EngineMixin, _ImageSoftmax):
    """The host's softmax engine with exact resume and stored features."""


class TripletEngine(EngineMixin, _ImageTriplet):
    """The host's triplet engine with exact resume and stored features."""

    mined = True


class VideoSoftmaxEngine(EngineMixin, _VideoSoftmax):
    """The host's softmax engine for tracklets."""


class VideoTripletEngine(EngineMixin, _VideoTriplet):
    """The host's triplet engine for tracklets."""

    mined = True


def build_image_engine(
    cfg: Any,
    datamanager: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    feature_dim: int | None,
) -> tuple[EngineMixin, dict[str, Any]]:
    """Build the engine that ``data.type`` and ``loss.name`` name.

    Args:
        cfg: Configuration.
        datamanager: The host's data manager.
        model: The model.
        optimizer: Its optimiser.
        scheduler: Its schedule.
        feature_dim: Width of the model's features; needed for ``composite``.

    Returns:
        The engine, and the further states that its checkpoints must hold.

    Raises:
        UserError: The combination does not exist.
    """
    common = {"scheduler": scheduler, "use_gpu": cfg.use_gpu}
    bare = bare_model(model)
    smooth = cfg.loss.softmax.label_smooth
    video = cfg.data.type == "video"
    if cfg.loss.name == "composite":
        if video or feature_dim is None:
            raise UserError(
                f"'loss.name composite' works with image models of the plug-in, not with 'data.type {cfg.data.type}' and "
                f"'model.name {cfg.model.name}'; use softmax or triplet."
            )
        weights = cfg.loss.composite
        loss = CompositeLoss(
            datamanager.num_train_pids,
            feature_dim,
            ce=weights.ce,
            triplet=weights.triplet,
            center=weights.center,
            margin=cfg.loss.triplet.margin,
            label_smoothing=weights.smoothing if smooth else 0.0,
        )
        observers = _observers(cfg, bare, datamanager, feature_dim)
        if cfg.use_gpu and torch.cuda.is_available():
            for module in [loss, *(observer.state for observer in observers)]:
                if isinstance(module, nn.Module):
                    module.cuda()
        states = loss.center_states(weights.center_lr)
        engine: Any = CompositeEngine(
            datamanager,
            model,
            optimizer,
            loss=loss,
            center_optimizer=states.get("center_optimizer"),
            terms=[observer for observer in observers if observer.term],
            **common,
        )
        return _complete(cfg, engine, observers, states)
    observers = _observers(cfg, bare, datamanager, None)
    if video:
        common["pooling_method"] = cfg.video.pooling_method
    if cfg.loss.name == "softmax":
        cls: Any = VideoSoftmaxEngine if video else SoftmaxEngine
        return _complete(cfg, cls(datamanager, model, optimizer, label_smooth=smooth, **common), observers, {})
    cls = VideoTripletEngine if video else TripletEngine
    triplet = cfg.loss.triplet
    return _complete(
        cfg,
        cls(
            datamanager,
            model,
            optimizer,
            margin=triplet.margin,
            weight_t=triplet.weight_t,
            weight_x=triplet.weight_x,
            label_smooth=smooth,
            **common,
        ),
        observers,
        {},
    )


def _observers(cfg: Any, model: nn.Module, datamanager: Any, feature_dim: int | None) -> list[Observer]:
    """What the methods watch stage 1 with."""
    classes = datamanager.num_train_pids
    return [
        observer
        for method in methods()
        for observer in method.observers(cfg, model, num_classes=classes, feature_dim=feature_dim)
    ]


def _complete(
    cfg: Any, engine: Any, observers: Sequence[Observer], states: dict[str, Any]
) -> tuple[EngineMixin, dict[str, Any]]:
    """Give an engine its updates, and let it tell the observers of its epochs; their states belong to its checkpoints."""
    engine.updates = Updates(Practice.of(cfg))
    engine.observers.extend(observers)
    states.update({observer.state_name: observer.state for observer in observers if observer.state_name})
    return engine, states
