"""Keys of GraFT: defaults, ranges, and what does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode as CN

from ..config.idle import Rule as IdleRule
from ..config.ranges import EPOCHS, POSITIVE, RATE, SHARE, WEIGHT, Choice, Number, Rule, count
from ..config.validation import require_weight
from ..errors import UserError
from ..methods import ResumeKeys


def add_config(cfg: Any) -> None:
    """Add the keys with their defaults."""
    cfg.graft = CN()
    cfg.graft.fusion = "graft"  # graft (fusion token) | cls | average | early | late
    cfg.graft.heads = 8  # heads of a modality encoder
    cfg.graft.feedforward = 2048  # width of its feed-forward layer
    cfg.graft.dropout = 0.1
    cfg.graft.token_index = 0  # data token that stands for a sample in the triplet loss
    cfg.graft.scheme = "FFD"  # anchor, positive, negative: F fused token, D data token
    cfg.graft.distance = "euclidean"  # of the triplet loss: euclidean (released) | squared (printed)
    cfg.graft.tokens = (
        "raw"  # in the triplet loss: raw (as the paper) | unit (length 1) | centred (F and D each less its mean)
    )
    cfg.graft.sampling = "triplets"  # triplets (as the paper) | pk (RandomIdentitySampler's batches, mined in the batch)
    cfg.graft.positives = 8  # triplets: positives per anchor image and epoch
    cfg.graft.checkpointing = False  # recompute activations in the backward pass: less memory, more time
    cfg.graft.warmup_steps = 500  # stage 1, lr_scheduler sqrt: linear warm-up, steps
    cfg.graft.cooldown = 0.1  # stage 1, lr_scheduler sqrt: share of all steps of the linear fall to 0 at the end
    cfg.graft.finetune = (
        CN()
    )  # stage 2: everything trains; stage 1, with the backbone frozen, has the keys of train and loss
    cfg.graft.finetune.max_epoch = 60
    cfg.graft.finetune.lr = 5e-6  # constant
    cfg.graft.finetune.weight_decay = 1.3e-3
    cfg.graft.finetune.ce = 0.5  # weight of the cross-entropy
    cfg.graft.finetune.triplet = 0.5  # weight of the triplet loss
    cfg.graft.finetune.center = 0.0005  # weight of the center loss
    cfg.graft.finetune.label_smoothing = 0.1


RANGES: Mapping[str, Rule] = {
    "graft.fusion": Choice(("graft", "cls", "average", "early", "late")),
    "graft.heads": Number(1, 1024),
    "graft.feedforward": count(),
    "graft.dropout": RATE,
    "graft.token_index": count(0),
    "graft.scheme": Choice(("FFF", "FFD", "FDF", "FDD", "DFF", "DFD", "DDF", "DDD")),
    "graft.distance": Choice(("euclidean", "squared")),
    "graft.tokens": Choice(("raw", "unit", "centred")),
    "graft.sampling": Choice(("triplets", "pk")),
    "graft.positives": Number(1, 10_000),
    "graft.warmup_steps": count(0, 10**9),
    "graft.cooldown": SHARE,
    "graft.finetune.max_epoch": EPOCHS,
    "graft.finetune.lr": POSITIVE,
    "graft.finetune.weight_decay": WEIGHT,
    "graft.finetune.ce": WEIGHT,
    "graft.finetune.triplet": WEIGHT,
    "graft.finetune.center": WEIGHT,
    "graft.finetune.label_smoothing": RATE,
}


def validate(cfg: Any) -> None:
    """Check values that do not go together."""
    require_weight(cfg.graft.finetune, "graft.finetune", ("ce", "triplet", "center"))
    graft = cfg.graft
    if cfg.model.name != "graft":
        if cfg.train.lr_scheduler == "sqrt":
            raise UserError("'train.lr_scheduler sqrt' is stepped per batch and belongs to 'model.name graft'.")
        return
    if cfg.loss.name != "composite":
        raise UserError(f"'model.name graft' trains with 'loss.name composite', not with '{cfg.loss.name}'.")
    if graft.sampling == "pk" and cfg.sampler.train_sampler != "RandomIdentitySampler":
        raise UserError("'graft.sampling pk' needs 'sampler.train_sampler RandomIdentitySampler'.")
    if graft.sampling == "triplets" and cfg.train.batch_size % 3:
        raise UserError(
            f"'graft.sampling triplets' makes batches of triplets; 'train.batch_size {cfg.train.batch_size}' counts their "
            "images and must be a multiple of 3."
        )


def _fuses(cfg: Any) -> bool:
    return cfg.model.name == "graft"


USES = {"loss.composite.center_lr": lambda c: _fuses(c) and 2 in c.train.stages and c.graft.finetune.center > 0}

RESUME = ResumeKeys(later=("graft.finetune.*",), training=("graft.*",), epochs={"finetune": "graft.finetune.max_epoch"})

IDLE: tuple[IdleRule, ...] = (
    IdleRule(
        ("data.norm_mean", "data.norm_std"),
        lambda c: not _fuses(c),
        "'model.name graft' takes 'multimodal.mean' and 'multimodal.std'",
    ),
    IdleRule(
        ("sampler.train_sampler", "sampler.num_instances", "sampler.num_cams", "sampler.num_datasets"),
        lambda c: not (_fuses(c) and c.graft.sampling == "triplets"),
        "'graft.sampling triplets' draws the batches",
    ),
    IdleRule(("loss.triplet.margin",), lambda c: not _fuses(c), "no triplet loss with a margin is trained on in stage 1"),
    IdleRule(
        ("train.warmup_epochs",),
        lambda c: c.train.lr_scheduler != "sqrt",
        "'train.lr_scheduler sqrt' warms up by 'graft.warmup_steps'",
    ),
    IdleRule(("graft.",), _fuses, "it belongs to 'model.name graft'"),
    IdleRule(
        ("graft.warmup_steps", "graft.cooldown"),
        lambda c: not _fuses(c) or c.train.lr_scheduler == "sqrt",
        "it belongs to 'train.lr_scheduler sqrt'",
    ),
    IdleRule(
        ("graft.heads", "graft.feedforward", "graft.dropout"),
        lambda c: not _fuses(c) or c.graft.fusion in ("graft", "cls", "average"),
        "'graft.fusion' early and late have no encoders",
    ),
    IdleRule(
        ("graft.positives",),
        lambda c: not _fuses(c) or c.graft.sampling == "triplets",
        "it belongs to 'graft.sampling triplets'",
    ),
    IdleRule(
        ("graft.finetune.",),
        lambda c: not _fuses(c) or 2 in c.train.stages,
        "it belongs to stage 2, which 'train.stages' leaves out",
    ),
)
