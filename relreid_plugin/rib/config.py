"""Keys of RIB and of the vision transformers beside it: defaults, ranges, and what does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode as CN

from ..config.idle import Rule as IdleRule
from ..config.ranges import LAYERS, POSITIVE, SEED, SHARE, WEIGHT, Choice, Items, Number, Rule, count
from ..errors import UserError, shown
from ..methods import BASELINE, ResumeKeys, single_models, takes_several


def add_config(cfg: Any) -> None:
    """Add the keys with their defaults."""
    cfg.vit.stride = 12  # transreid: pixels from patch to patch, overlapping below the patch size; 0: the patch size
    cfg.vit.camera_weight = 3.0  # transreid: factor of the camera embedding; 0: none
    cfg.vit.parts = 4  # transreid: parts of the jigsaw module; 0: none
    cfg.vit.shift = 5  # transreid: patches that the jigsaw module moves to the end
    cfg.vit.groups = 2  # transreid: groups that it shuffles across

    # --- RIB: informative attention weights (model.name: bnneck_baseline, vit_baseline, transreid) ----------------------
    cfg.rib = CN()
    cfg.rib.attention = "none"  # none | dcs (differentiable channel selection) | se | cbam (channel attention in a CNN)
    cfg.rib.places = []  # CNN: stages that get it, such as ['layer3','layer4']; []: dcs after the last two, se/cbam in all
    cfg.rib.reduction = 16  # se, cbam: channels divided by this in the bottleneck
    cfg.rib.dcs = CN()
    cfg.rib.dcs.init_bias = 2.0  # gate logit at the start: masks open in testing, sigmoid(bias) of them in training
    cfg.rib.dcs.temperature = [1.0, 0.3]  # of the soft gate, first and last epoch
    cfg.rib.dcs.schedule = "linear"  # between them: constant | linear | cosine | exponential
    cfg.rib.dcs.seed = 0  # seed of the gates' own noise
    cfg.rib.dcs.control = "none"  # none | random: gates drawn by the seed and not learned, to compare with
    cfg.rib.dcs.keep = []  # control random: share of channels kept in testing, one for all gates or one per gate
    cfg.rib.dcs.keep_noise = []  # the same under the noise of training; []: as learned gates start
    cfg.rib.dcs.lr_mult = 1.0  # learning rate of the gates over that of the network
    cfg.rib.dcs.reduction = 2  # CNN: width of the non-local block's values, channels divided by this
    cfg.rib.ibb = CN()
    cfg.rib.ibb.eta = 0.0  # weight of the information bottleneck bound in the loss; the paper: 1
    cfg.rib.ibb.warmup = 0.3  # share of the epochs in which it is measured, but not trained on
    cfg.rib.ibb.feature = "after"  # features it is about: after the BNNeck (what the classifier sees) | before
    cfg.rib.ibb.beta = 1.0  # sharpness of the soft assignment to class centroids
    cfg.rib.ibb.epsilon = 1e-8  # floor of Q before the logarithm
    cfg.rib.ibb.measure = False  # with eta 0: measure bound and estimate all the same


RANGES: Mapping[str, Rule] = {
    "vit.stride": Number(0, 1024),
    "vit.camera_weight": WEIGHT,
    "vit.parts": Number(0, 1000),
    "vit.shift": count(0),
    "vit.groups": count(),
    "rib.attention": Choice(("none", "dcs", "se", "cbam")),
    "rib.places": LAYERS,
    "rib.reduction": Number(1, 65536),
    "rib.dcs.init_bias": Number(0, 1000, above=True),  # above 0: masks start open
    "rib.dcs.temperature": Items(POSITIVE, (2,)),
    "rib.dcs.schedule": Choice(("constant", "linear", "cosine", "exponential")),
    "rib.dcs.seed": SEED,
    "rib.dcs.control": Choice(("none", "random")),
    "rib.dcs.keep": Items(SHARE),
    "rib.dcs.keep_noise": Items(SHARE),
    "rib.dcs.lr_mult": POSITIVE,
    "rib.dcs.reduction": Number(1, 65536),
    "rib.ibb.eta": WEIGHT,
    "rib.ibb.warmup": SHARE,
    "rib.ibb.feature": Choice(("after", "before")),
    "rib.ibb.beta": POSITIVE,
    "rib.ibb.epsilon": Number(0, 1, above=True, below=True),
}


def validate(cfg: Any) -> None:
    """Check values that do not go together."""
    rib, name = cfg.rib, cfg.model.name
    if takes_several(cfg) and (rib.attention != "none" or rib.ibb.eta > 0 or rib.ibb.measure):
        raise UserError(f"keys of 'rib' do not work with 'model.name {name}'; set 'rib.attention none' and 'rib.ibb.eta 0'.")
    if rib.attention != "none" and name not in single_models():
        raise UserError(
            f"'rib.attention {rib.attention}' works with 'model.name' {', '.join(single_models())}, not with '{name}'; "
            f"for a network of the host take 'model.name bnneck_baseline' and 'backbone.name host:{name}'."
        )
    if rib.attention in ("se", "cbam") and name != BASELINE:
        raise UserError(f"'rib.attention {rib.attention}' is for CNNs ('model.name bnneck_baseline'); '{name}' takes dcs.")
    if rib.places and rib.attention == "none":
        raise UserError("'rib.places' says where attention goes, but 'rib.attention' is 'none'; choose dcs, se or cbam.")
    if rib.attention == "dcs" and rib.dcs.control == "random" and not rib.dcs.keep:
        raise UserError(
            "'rib.dcs.control random' needs 'rib.dcs.keep', the share of channels that the drawn gates keep, such as [0.7]."
        )
    if len(set(rib.places)) < len(rib.places):
        raise UserError(f"key 'rib.places' names a layer twice: {shown(rib.places)}.")
    if (rib.ibb.eta > 0 or rib.ibb.measure) and cfg.loss.name != "composite":
        raise UserError(
            f"'rib.ibb' belongs to 'loss.name composite', not to '{cfg.loss.name}'; set 'loss.name composite', or "
            "'rib.ibb.eta 0' and 'rib.ibb.measure False'."
        )
    if name == "transreid" and cfg.loss.name != "composite":
        raise UserError(f"'model.name transreid' trains with 'loss.name composite', not with '{cfg.loss.name}'.")


RESUME = ResumeKeys(
    training=(
        *(f"rib.dcs.{name}" for name in ("init_bias", "temperature", "schedule", "seed", "lr_mult", "reduction")),
        "rib.ibb.*",
    )
)

IDLE: tuple[IdleRule, ...] = (
    IdleRule(
        ("vit.stride", "vit.camera_weight", "vit.parts", "vit.shift", "vit.groups"),
        lambda c: c.model.name == "transreid",
        "it belongs to 'model.name transreid'",
    ),
    IdleRule(
        ("vit.shift", "vit.groups"),
        lambda c: c.model.name != "transreid" or c.vit.parts > 0,
        "'vit.parts' is 0, so there is no jigsaw module",
    ),
    IdleRule(("rib.reduction",), lambda c: c.rib.attention in ("se", "cbam"), "it belongs to 'rib.attention' se and cbam"),
    IdleRule(("rib.dcs.",), lambda c: c.rib.attention == "dcs", "it belongs to 'rib.attention dcs'"),
    IdleRule(
        ("rib.dcs.keep", "rib.dcs.keep_noise"),
        lambda c: c.rib.attention != "dcs" or c.rib.dcs.control == "random",
        "it belongs to 'rib.dcs.control random'",
    ),
    IdleRule(
        ("rib.dcs.temperature", "rib.dcs.schedule", "rib.dcs.lr_mult"),
        lambda c: c.rib.attention != "dcs" or c.rib.dcs.control == "none",
        "'rib.dcs.control random' trains no gates",
    ),
    IdleRule(
        ("rib.dcs.reduction",),
        lambda c: c.rib.attention != "dcs" or c.model.name == BASELINE,
        "it belongs to the non-local blocks of a CNN",
    ),
    IdleRule(("rib.ibb.warmup",), lambda c: c.rib.ibb.eta > 0, "'rib.ibb.eta' is 0"),
    IdleRule(
        ("rib.ibb.feature", "rib.ibb.beta", "rib.ibb.epsilon"),
        lambda c: c.rib.ibb.eta > 0 or c.rib.ibb.measure,
        "'rib.ibb.eta' is 0, and 'rib.ibb.measure' is False",
    ),
)
