"""Optimisers and learning-rate schedules: the host's own, and what it lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..collective import bare_model
from ..errors import UserError, did_you_mean
from ..methods import methods
from .layout import HOST
from .schedules import warmup_lambda


def build_optimizer(model: nn.Module, cfg: Any) -> Optimizer:
    """Build the optimiser that ``train.optim`` names.

    ``adamw`` is torch's, over the parameter groups that the host makes; all others are the host's. With
    ``train.staged_lr`` the host's groups leave out parameters that belong to the model itself and to none of its layers;
    here they join the base layers.

    Args:
        model: The model.
        cfg: Configuration with torchreid's keys (``train``, ``sgd``, ``rmsprop``, ``adam``).

    Raises:
        UserError: ``train.new_layers`` or ``train.open_layers`` names no layer of the model, or the optimiser refuses a
            value.
    """
    train = cfg.train
    if train.staged_lr:
        _require_layers(model, cfg, "new_layers")
    if train.fixbase_epoch > 0:
        _require_layers(model, cfg, "open_layers")
    try:
        optimizer = HOST.optim.build_optimizer(
            model,
            optim="adam" if train.optim == "adamw" else train.optim,
            lr=train.lr,
            weight_decay=train.weight_decay,
            momentum=cfg.sgd.momentum,
            sgd_dampening=cfg.sgd.dampening,
            sgd_nesterov=cfg.sgd.nesterov,
            rmsprop_alpha=cfg.rmsprop.alpha,
            adam_beta1=cfg.adam.beta1,
            adam_beta2=cfg.adam.beta2,
            staged_lr=train.staged_lr,
            new_layers=list(train.new_layers),
            base_lr_mult=train.base_lr_mult,
        )
        grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        left_out = [parameter for parameter in model.parameters() if id(parameter) not in grouped]
        optimizer.param_groups[0]["params"].extend(left_out)
        if train.optim == "adamw":
            groups = [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups]
            betas = (cfg.adam.beta1, cfg.adam.beta2)
            optimizer = torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay, betas=betas)
    except ValueError as error:
        raise UserError(f"'train.optim {train.optim}' cannot be built: {error}.") from None
    for method in methods():
        method.group_parameters(cfg, optimizer, model)
    return optimizer


def _require_layers(model: nn.Module, cfg: Any, key: str) -> None:
    """Raise when ``train.KEY`` names what is no layer of the model."""
    bare = bare_model(model)
    children = [name for name, _ in bare.named_children()]
    for name in cfg.train[key]:
        if name not in children:
            raise UserError(
                f"key 'train.{key}' holds '{name}', which is no layer of model '{cfg.model.name}'"
                f"{did_you_mean(name, children)}"
            )


def build_scheduler(optimizer: Optimizer, cfg: Any) -> LRScheduler:
    """Build the schedule that ``train.lr_scheduler`` names; it is stepped once per epoch.

    Without warm-up, ``single_step``, ``multi_step`` and ``cosine`` are the host's. ``none`` keeps the learning rate. With
    ``train.warmup_epochs`` all four are :func:`relreid_plugin.host.schedules.warmup_lambda`.

    Args:
        optimizer: The optimiser.
        cfg: Configuration with the keys of ``train``.

    Raises:
        UserError: A schedule that cannot be built from ``train.stepsize``, ``train.max_epoch`` and the warm-up.
    """
    train = cfg.train
    try:
        factor = warmup_lambda(
            train.lr_scheduler,
            max_epoch=max(train.max_epoch, train.warmup_epochs + 1),
            stepsize=list(train.stepsize),
            gamma=train.gamma,
            warmup_epochs=train.warmup_epochs,
            warmup_factor=train.warmup_factor,
        )
    except ValueError as error:
        raise UserError(f"keys of 'train' make no schedule: {error}.") from None
    if train.warmup_epochs > 0 or train.lr_scheduler == "none":
        return LambdaLR(optimizer, factor)
    return HOST.optim.build_lr_scheduler(
        optimizer,
        lr_scheduler=train.lr_scheduler,
        stepsize=list(train.stepsize),
        gamma=train.gamma,
        max_epoch=max(train.max_epoch, 1),
    )
