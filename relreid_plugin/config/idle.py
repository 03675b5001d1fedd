"""Settings that were changed and cannot act, because another key decides that they are not looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..methods import BASELINE, methods, own_models, several_models, single_models, takes_several
from .defaults import _flat, get_default_config


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
    reason: str | Callable[[], str]

    def matches(self, key: str) -> bool:
        """Whether a key is one of the rule's."""
        return any(key == own or (own.endswith(".") and key.startswith(own)) for own in self.keys)


def _names(cfg: Any) -> list[str]:
    return [*cfg.data.sources, *cfg.data.targets]


def _samplers(cfg: Any) -> list[str]:
    target = [cfg.sampler.train_sampler_t] if cfg.data.load_train_targets else []
    return [cfg.sampler.train_sampler, *target]


def _belongs(names: Callable[[], tuple[str, ...]]) -> Callable[[], str]:
    return lambda: f"it belongs to 'model.name' {', '.join(names())}"


def _ranked_by(cfg: Any, *rivals: str) -> bool:
    """Whether one of some re-rankings has a row of its own."""
    return not cfg.test.rerank and any(name in cfg.test.rivals for name in rivals)


def _rival(name: str) -> Rule:
    reason = f"'test.rivals' leaves out {name}, or 'test.rerank True' stands in for it"
    return Rule((f"test.{name}.",), lambda c: _ranked_by(c, name), reason)


def _trains_network(cfg: Any) -> bool:
    return cfg.data.type != "features" and (1 in cfg.train.stages or takes_several(cfg))


_PICTURES = (
    *(f"data.{name}" for name in ("height", "width", "transforms", "norm_mean", "norm_std", "name_pattern", "pixel_range")),
    *(f"data.{name}" for name in ("check_images", "download", "split_id", "combineall")),
)
"""Keys of reading pictures and data sets of pictures."""

_ONE_PICTURE = "it divides features and single images without splits"

RULES: tuple[Rule, ...] = (
    Rule(_PICTURES, lambda c: c.data.type != "features", "'data.type features' reads no pictures"),
    Rule(("data.split_rule",), lambda c: c.data.type in ("features", "image") and not takes_several(c), _ONE_PICTURE),
    Rule(("cuhk03.labeled_images", "cuhk03.classic_split"), lambda c: "cuhk03" in _names(c), "no data set is 'cuhk03'"),
    Rule(("market1501.",), lambda c: "market1501" in _names(c), "no data set is 'market1501'"),
    Rule(("video.",), lambda c: c.data.type == "video", "it belongs to 'data.type video'"),
    Rule(("data.k_tfm", "data.load_train_targets"), lambda c: c.data.type == "image", "it belongs to 'data.type image'"),
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
    Rule(
        ("train.compile", "train.checkpointing"),
        _trains_network,
        "no stage in 'train.stages' trains a network on pictures",
    ),
    Rule(
        ("train.channels_last",),
        lambda c: c.data.type != "features" and c.model.name not in own_models(),
        "it belongs to networks of convolutions",
    ),
    Rule(("train.open_layers",), lambda c: c.train.fixbase_epoch > 0, "'train.fixbase_epoch' is 0"),
    Rule(("train.new_layers", "train.base_lr_mult"), lambda c: c.train.staged_lr, "it belongs to 'train.staged_lr True'"),
    Rule(
        ("train.stepsize", "train.gamma"),
        lambda c: c.train.lr_scheduler in ("single_step", "multi_step"),
        "it belongs to 'train.lr_scheduler' single_step and multi_step",
    ),
    Rule(
        ("train.warmup_factor",),
        lambda c: c.train.warmup_epochs > 0,
        "there are no warm-up epochs",
    ),
    Rule(
        ("train.val_fraction",),
        lambda c: c.test.eval_freq > 0,
        "nothing is chosen by the held-out identities, since 'test.eval_freq' never validates",
    ),
    Rule(("train.val_fold",), lambda c: c.train.val_fraction > 0, "'train.val_fraction' holds nobody out"),
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
        lambda c: c.loss.name == "triplet" or (c.loss.name == "composite" and c.loss.composite.triplet > 0),
        "no triplet loss with a margin is trained on in stage 1",
    ),
    Rule(
        ("loss.triplet.weight_t", "loss.triplet.weight_x"),
        lambda c: c.loss.name == "triplet",
        "it belongs to 'loss.name triplet'; 'composite' has weights of its own",
    ),
    Rule(
        ("loss.composite.center_lr",),
        lambda c: c.loss.name != "composite" or c.loss.composite.center > 0,
        "there is no center loss",
    ),
    Rule(
        ("loss.composite.smoothing",),
        lambda c: c.loss.name != "composite" or (c.loss.softmax.label_smooth and c.loss.composite.ce > 0),
        "'loss.softmax.label_smooth' is False, or there is no cross-entropy",
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
        lambda c: c.model.name in (BASELINE, *own_models()) and c.data.type != "features",
        lambda: f"it belongs to the plug-in's models ({', '.join((*single_models(), *several_models()))})",
    ),
    Rule(
        ("backbone.output_stride", "head.feature_dim"),
        lambda c: c.model.name == BASELINE,
        f"it belongs to 'model.name {BASELINE}'",
    ),
    Rule(("head.neck_feature",), lambda c: c.model.name in single_models(), _belongs(single_models)),
    Rule(
        ("vit.patch_size", "vit.depth", "vit.drop_path"),
        lambda c: c.model.name in own_models(),
        lambda: f"it belongs to vision transformers ('model.name' {', '.join(own_models())})",
    ),
    Rule(("multimodal.",), takes_several, lambda: f"it belongs to 'model.name {', '.join(several_models())}'"),
)
"""The keys of the house; every method adds its own (:attr:`relreid_plugin.methods.Method.idle`)."""


def all_rules() -> list[Rule]:
    """Return the rules of the house's keys and of the methods'."""
    return [*RULES, *(rule for method in methods() for rule in method.idle)]


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
    rules = all_rules()
    for key, value in changed.items():
        # a key that is idle for two reasons is told once, by the wider one
        rule = next((rule for rule in rules if rule.matches(key) and not rule.acts(cfg)), None)
        if rule is None or any(uses(cfg) for method in methods() if (uses := method.uses.get(key))):
            continue
        reason = rule.reason if isinstance(rule.reason, str) else rule.reason()
        found.setdefault(reason, []).append(f"'{key} {value}'")
    return [_sentence(keys, reason) for reason, keys in found.items()]


def _sentence(keys: list[str], reason: str) -> str:
    if len(keys) == 1:
        return f"{keys[0]} has no effect: {reason}."
    reason = "they belong" + reason.removeprefix("it belongs") if reason.startswith("it belongs") else reason
    return f"{', '.join(keys)} have no effect: {reason}."
