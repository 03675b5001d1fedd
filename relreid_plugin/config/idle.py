"""Settings that were changed and cannot act, because another key decides that they are not looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .defaults import IMAGE_MODELS, MULTIMODAL_MODELS, _flat, get_default_config

OWN_MODELS = (*IMAGE_MODELS, *MULTIMODAL_MODELS)


@dataclass(frozen=True)
class Rule:
    """When some keys act.

    Attributes:
        keys: Keys, or beginnings of keys that end with a dot.
        acts: Whether they do under a configuration.
        reason: What they belong to, as the end of "… has no effect: ".
    """

    keys: tuple[str, ...]
    acts: Callable[[Any], bool]
    reason: str

    def matches(self, key: str) -> bool:
        """Whether a key is one of the rule's."""
        return any(key == own or (own.endswith(".") and key.startswith(own)) for own in self.keys)


def _names(cfg: Any) -> list[str]:
    return [*cfg.data.sources, *cfg.data.targets]


def _samplers(cfg: Any) -> list[str]:
    if cfg.model.name in MULTIMODAL_MODELS and cfg.graft.sampling == "triplets":
        return []
    target = [cfg.sampler.train_sampler_t] if cfg.data.load_train_targets else []
    return [cfg.sampler.train_sampler, *target]


def _relations(cfg: Any) -> bool:
    return cfg.relation.attention != "none" and 2 in cfg.train.stages


def _ranked_by(cfg: Any, *rivals: str) -> bool:
    """Whether one of some re-rankings has a row of its own."""
    return not cfg.test.rerank and any(name in cfg.test.rivals for name in rivals)


def _rival(name: str) -> Rule:
    reason = f"'test.rivals' leaves out {name}, or 'test.rerank True' stands in for it"
    return Rule((f"test.{name}.",), lambda c: _ranked_by(c, name), reason)


def _fuses(cfg: Any) -> bool:
    return cfg.model.name in MULTIMODAL_MODELS


RULES: tuple[Rule, ...] = (
    Rule(("cuhk03.labeled_images", "cuhk03.classic_split"), lambda c: "cuhk03" in _names(c), "no data set is 'cuhk03'"),
    Rule(("market1501.",), lambda c: "market1501" in _names(c), "no data set is 'market1501'"),
    Rule(("video.",), lambda c: c.data.type == "video", "it belongs to 'data.type video'"),
    Rule(("data.k_tfm", "data.load_train_targets"), lambda c: c.data.type == "image", "it belongs to 'data.type image'"),
    Rule(
        ("data.norm_mean", "data.norm_std"),
        lambda c: not _fuses(c),
        "'model.name graft' takes 'multimodal.mean' and 'multimodal.std'",
    ),
    Rule(("sampler.train_sampler",), lambda c: bool(_samplers(c)), "'graft.sampling triplets' draws the batches"),
    Rule(("sampler.train_sampler_t",), lambda c: c.data.load_train_targets, "it belongs to 'data.load_train_targets True'"),
    Rule(
        ("sampler.num_instances",),
        lambda c: "RandomIdentitySampler" in _samplers(c),
        "it belongs to 'sampler.train_sampler RandomIdentitySampler'",
    ),
    Rule(
        ("sampler.num_cams",),
        lambda c: "RandomDomainSampler" in _samplers(c),
        "it belongs to 'sampler.train_sampler RandomDomainSampler'",
    ),
    Rule(
        ("sampler.num_datasets",),
        lambda c: "RandomDatasetSampler" in _samplers(c),
        "it belongs to 'sampler.train_sampler RandomDatasetSampler'",
    ),
    Rule(
        ("train.start_epoch",),
        lambda c: 1 in c.train.stages,
        "it belongs to stage 1, which 'train.stages' leaves out",
    ),
    Rule(("train.open_layers",), lambda c: c.train.fixbase_epoch > 0, "'train.fixbase_epoch' is 0"),
    Rule(("train.new_layers", "train.base_lr_mult"), lambda c: c.train.staged_lr, "it belongs to 'train.staged_lr True'"),
    Rule(
        ("train.stepsize", "train.gamma"),
        lambda c: c.train.lr_scheduler in ("single_step", "multi_step"),
        "it belongs to 'train.lr_scheduler' single_step and multi_step",
    ),
    Rule(
        ("train.warmup_epochs",),
        lambda c: c.train.lr_scheduler != "sqrt",
        "'train.lr_scheduler sqrt' warms up by 'graft.warmup_steps'",
    ),
    Rule(
        ("train.warmup_factor",),
        lambda c: c.train.warmup_epochs > 0 or (_relations(c) and c.relation.train.warmup_epochs > 0),
        "there are no warm-up epochs",
    ),
    Rule(
        ("train.val_fraction",),
        lambda c: c.test.eval_freq > 0 or (_relations(c) and c.relation.train.eval_freq > 0),
        "nothing is chosen by the held-out identities, since 'test.eval_freq' never validates",
    ),
    Rule(("test.start_eval",), lambda c: c.test.eval_freq > 0, "'test.eval_freq' never tests before the end"),
    Rule(("sgd.momentum",), lambda c: c.train.optim in ("sgd", "rmsprop"), "it belongs to 'train.optim' sgd and rmsprop"),
    Rule(("sgd.dampening", "sgd.nesterov"), lambda c: c.train.optim == "sgd", "it belongs to 'train.optim sgd'"),
    Rule(("rmsprop.",), lambda c: c.train.optim == "rmsprop", "it belongs to 'train.optim rmsprop'"),
    Rule(
        ("adam.",),
        lambda c: c.train.optim in ("adam", "amsgrad", "radam", "adamw"),
        "it belongs to 'train.optim' adam, amsgrad, radam and adamw",
    ),
    Rule(
        ("loss.triplet.margin",),
        lambda c: (
            c.loss.name == "triplet" or (c.loss.name == "composite" and c.loss.composite.triplet > 0 and not _fuses(c))
        ),
        "no triplet loss with a margin is trained on in stage 1",
    ),
    Rule(
        ("loss.triplet.weight_t", "loss.triplet.weight_x"),
        lambda c: c.loss.name == "triplet",
        "it belongs to 'loss.name triplet'; 'composite' has weights of its own",
    ),
    Rule(
        ("loss.composite.center_lr",),
        lambda c: (
            c.loss.name != "composite"
            or c.loss.composite.center > 0
            or (_fuses(c) and 2 in c.train.stages and c.graft.finetune.center > 0)
        ),
        "there is no center loss",
    ),
    Rule(("loss.composite.",), lambda c: c.loss.name == "composite", "it belongs to 'loss.name composite'"),
    Rule(("test.aqe.",), lambda c: "aqe" in c.test.rivals, "'test.rivals' leaves out aqe"),
    Rule(("test.aqe_alpha.",), lambda c: "aqe-alpha" in c.test.rivals, "'test.rivals' leaves out aqe-alpha"),
    *(_rival(name) for name in ("gnn", "gcr", "cajaccard", "nfc", "diffusion")),
    Rule(
        ("test.rival_protocol",),
        lambda c: _ranked_by(c, "gnn", "gcr", "nfc", "diffusion"),
        "no row is that of gnn, gcr, nfc or diffusion",
    ),
    Rule(
        ("test.diffusion.k_query",),
        lambda c: not _ranked_by(c, "diffusion") or c.test.rival_protocol != "transductive",
        "'test.rival_protocol' is transductive",
    ),
    Rule(
        ("test.kreciprocal.",),
        lambda c: c.test.rerank or "rerank" in c.test.rivals,
        "'test.rivals' leaves out rerank, and 'test.rerank' is False",
    ),
    Rule(("test.visrank_topk",), lambda c: c.test.visrank, "it belongs to 'test.visrank True'"),
    Rule(
        ("backbone.",),
        lambda c: c.model.name in OWN_MODELS,
        f"it belongs to the plug-in's models ({', '.join(OWN_MODELS)})",
    ),
    Rule(
        ("backbone.output_stride", "head.feature_dim"),
        lambda c: c.model.name == "bnneck_baseline",
        "it belongs to 'model.name bnneck_baseline'",
    ),
    Rule(
        ("head.neck_feature",),
        lambda c: c.model.name in IMAGE_MODELS,
        f"it belongs to 'model.name' {', '.join(IMAGE_MODELS)}",
    ),
    Rule(
        ("vit.patch_size", "vit.depth", "vit.drop_path"),
        lambda c: c.model.name in ("vit_baseline", "transreid", *MULTIMODAL_MODELS),
        "it belongs to vision transformers ('model.name' vit_baseline, transreid, graft)",
    ),
    Rule(
        ("vit.stride", "vit.camera_weight", "vit.parts", "vit.shift", "vit.groups"),
        lambda c: c.model.name == "transreid",
        "it belongs to 'model.name transreid'",
    ),
    Rule(
        ("vit.shift", "vit.groups"),
        lambda c: c.model.name != "transreid" or c.vit.parts > 0,
        "'vit.parts' is 0, so there is no jigsaw module",
    ),
    Rule(("rib.reduction",), lambda c: c.rib.attention in ("se", "cbam"), "it belongs to 'rib.attention' se and cbam"),
    Rule(("rib.dcs.",), lambda c: c.rib.attention == "dcs", "it belongs to 'rib.attention dcs'"),
    Rule(
        ("rib.dcs.reduction",),
        lambda c: c.rib.attention != "dcs" or c.model.name == "bnneck_baseline",
        "it belongs to the non-local blocks of a CNN",
    ),
    Rule(("rib.ibb.warmup",), lambda c: c.rib.ibb.eta > 0, "'rib.ibb.eta' is 0"),
    Rule(
        ("rib.ibb.feature", "rib.ibb.beta", "rib.ibb.epsilon"),
        lambda c: c.rib.ibb.eta > 0 or c.rib.ibb.measure,
        "'rib.ibb.eta' is 0, and 'rib.ibb.measure' is False",
    ),
    Rule(("multimodal.", "graft."), _fuses, "it belongs to 'model.name graft'"),
    Rule(
        ("graft.warmup_steps", "graft.cooldown"),
        lambda c: not _fuses(c) or c.train.lr_scheduler == "sqrt",
        "it belongs to 'train.lr_scheduler sqrt'",
    ),
    Rule(
        ("graft.heads", "graft.feedforward", "graft.dropout"),
        lambda c: not _fuses(c) or c.graft.fusion in ("graft", "cls", "average"),
        "'graft.fusion' early and late have no encoders",
    ),
    Rule(
        ("graft.positives",),
        lambda c: not _fuses(c) or c.graft.sampling == "triplets",
        "it belongs to 'graft.sampling triplets'",
    ),
    Rule(
        ("graft.finetune.",),
        lambda c: not _fuses(c) or 2 in c.train.stages,
        "it belongs to stage 2, which 'train.stages' leaves out",
    ),
    Rule(("relation.attention",), lambda c: 2 in c.train.stages, "it belongs to stage 2, which 'train.stages' leaves out"),
    Rule(
        (
            "relation.recipe",
            "relation.neighbours",
            "relation.block",
            "relation.residual",
            "relation.head.",
            "relation.camera.",
            "relation.select.",
            "relation.protocols",
            "relation.num_layers",
            "relation.num_heads",
            "relation.mlp_ratio",
            "relation.dropout",
            "relation.k",
            "relation.num_landmarks",
            "relation.landmarks",
            "relation.landmark_seed",
            "relation.init",
            "relation.precision",
            "relation.load_weights",
            "relation.bank.",
            "relation.train.",
            "relation.loss.",
        ),
        # where the attention is named and its stage left out, one sentence about that is enough
        lambda c: c.relation.attention != "none",
        "'relation.attention' is 'none'",
    ),
    Rule(
        ("relation.landmark_seed",),
        lambda c: not _relations(c) or c.relation.landmarks == "random",
        "it belongs to 'relation.landmarks random'",
    ),
    Rule(
        ("relation.train.stepsize", "relation.train.gamma"),
        lambda c: not _relations(c) or c.relation.train.lr_scheduler == "multi_step",
        "it belongs to 'relation.train.lr_scheduler multi_step'",
    ),
    Rule(
        ("relation.train.eval_freq",),
        lambda c: not _relations(c) or c.train.val_fraction > 0,
        "'train.val_fraction' is 0, so there is nothing to validate on",
    ),
    Rule(
        ("relation.loss.margin",),
        lambda c: not _relations(c) or c.relation.loss.triplet > 0,
        "'relation.loss.triplet' is 0",
    ),
    Rule(
        ("relation.loss.center_lr",),
        lambda c: not _relations(c) or c.relation.loss.center > 0,
        "'relation.loss.center' is 0",
    ),
)


def idle_settings(cfg: Any) -> list[str]:
    """Say which keys were changed from their defaults and do nothing under a configuration.

    Args:
        cfg: A validated configuration.

    Returns:
        One sentence per reason; empty where every changed key acts.
    """
    default = _flat(get_default_config())
    changed = {key: value for key, value in _flat(cfg).items() if key in default and value != default[key]}
    found: dict[str, list[str]] = {}
    for key, value in changed.items():
        # a key that is idle for two reasons is told once, by the wider one
        rule = next((rule for rule in RULES if rule.matches(key) and not rule.acts(cfg)), None)
        if rule is not None:
            found.setdefault(rule.reason, []).append(f"'{key} {value}'")
    return [_sentence(keys, reason) for reason, keys in found.items()]


def _sentence(keys: list[str], reason: str) -> str:
    if len(keys) == 1:
        return f"{keys[0]} has no effect: {reason}."
    reason = "they belong" + reason.removeprefix("it belongs") if reason.startswith("it belongs") else reason
    return f"{', '.join(keys)} have no effect: {reason}."
