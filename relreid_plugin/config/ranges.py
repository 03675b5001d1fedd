"""What every configuration key may hold: one table of ranges, lengths and choices.

:data:`RULES` has a rule for every key that is not true or false. A key without one is a defect that
``tests/config/test_ranges.py`` reports together with the line to add here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import UserError, did_you_mean, shown
from ..methods import methods

PROTOCOLS = ("inductive", "transductive")
RIVALS = ("aqe", "aqe-alpha", "rerank", "gnn", "gcr", "cajaccard", "nfc", "diffusion")

MOST = 1_000_000
"""Largest count (epochs, images, neighbours, …) that is taken for one and not for a slip of the keyboard."""
HUGE = 1e30
"""Largest real number: products of larger ones overflow float32."""
LAST_SEED = 2**32 - 1
"""Largest seed that python, numpy and torch all take."""


class Rule(Protocol):
    """What a value may be."""

    def complaint(self, value: Any) -> str:
        """Return what is wrong, as it goes on after "key 'x' "; empty where nothing is."""


@dataclass(frozen=True)
class Number:
    """A number in an interval; NaN and infinity lie in none.

    Attributes:
        low, high: The bounds.
        above, below: Whether the bound itself is excluded.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        return f"{'(' if self.above else '['}{_bound(self.low)}, {_bound(self.high)}{')' if self.below else ']'}"

    def __contains__(self, value: float) -> bool:
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def complaint(self, value: Any) -> str:
        """Outside, or no number at all."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in self:
            return f"must lie in {self}, got {shown(value)}"
        return ""


def _bound(value: float) -> str:
    return f"{value:g}" if math.isinf(value) or value != int(value) or abs(value) >= 1e16 else str(int(value))


@dataclass(frozen=True)
class Choice:
    """One of several words or numbers."""

    values: tuple[Any, ...]

    def complaint(self, value: Any) -> str:
        """None of them; the nearest one is named."""
        return "" if value in self.values else f"is {shown(value)}{did_you_mean(str(value), map(str, self.values))}"


@dataclass(frozen=True)
class Text:
    """Free text.

    Attributes:
        form: What it is, for the sentence.
        empty: Whether it may be empty.
        most: Characters that it may have.
    """

    form: str
    empty: bool = False
    most: int = 255

    def complaint(self, value: Any) -> str:
        """No text, empty, or characters that no path, name or file can hold."""
        if not isinstance(value, str):
            return f"must be {self.form}, got {shown(value)}"
        if not value.strip() and not self.empty:
            return f"must be {self.form}, but is empty"
        if len(value) > self.most:
            return f"must be {self.form} of at most {self.most} characters, got {len(value)}"
        if "\0" in value or not _encodes(value):
            return f"must be {self.form} in UTF-8 without NUL characters, got {shown(value)}"
        return ""


def _encodes(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Items:
    """A list.

    Attributes:
        rule: Of every element.
        sizes: Lengths that it may have.
        rising: Whether every element must be larger than the one before.
    """

    rule: Rule
    sizes: range | tuple[int, ...] = range(0, 1001)
    rising: bool = False

    def complaint(self, value: Any) -> str:
        """A wrong length, a wrong element, or a wrong order."""
        if not isinstance(value, (list, tuple)):
            return f"must be a list, got {shown(value)}"
        if len(value) not in self.sizes:
            return f"must have {_sizes(self.sizes)}, got {len(value)}: {shown(value)}"
        for item in value:
            said = self.rule.complaint(item)
            if said:
                return f"holds {shown(item)}: every element {said}" if said.startswith("must") else f"holds one that {said}"
        if self.rising and any(second <= first for first, second in zip(value, value[1:])):
            return f"must rise from element to element, got {shown(value)}"
        return ""


def _sizes(sizes: range | tuple[int, ...]) -> str:
    if isinstance(sizes, range):
        words = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    else:
        words = " or ".join(map(str, sizes))
    return f"{words} element{'' if words == '1' else 's'}"


def count(low: int = 1, high: int = MOST) -> Number:
    """A count of at least ``low``."""
    return Number(low, high)


WEIGHT = Number(0, HUGE)  # of a loss, or a decay
POSITIVE = Number(0, HUGE, above=True)
SHARE = Number(0, 1)
RATE = Number(0, 1, below=True)  # dropout, momentum, betas
SEED = Number(0, LAST_SEED)
PIXELS = Number(1, 8192)
EPOCHS = count(0)
LONGEST_PATH = 4096
FILE = Text("a file's path", empty=True, most=LONGEST_PATH)
NAMES = Items(Text("a name"))
DATA_SETS = Items(Text("the name of a data set, a folder or a file", most=LONGEST_PATH), range(1, 1001))
LAYERS = Items(Text("the name of a layer"))
CHANNEL_STD = Number(1e-6, 1000)
CHANNEL_MEAN = Number(-1000, 1000)
PIXEL_RANGE = Items(Number(-HUGE, HUGE), (0, 2), rising=True)

RULES: Mapping[str, Rule] = {
    "model.name": Text("the name of a model"),
    "model.load_weights": FILE,
    "model.resume": FILE,
    "data.split_rule": Choice(("", "image", "identity", "camera", "time")),
    "data.type": Choice(("image", "video", "features")),
    "data.root": Text("a folder's path", empty=True, most=LONGEST_PATH),
    "data.sources": DATA_SETS,
    "data.targets": DATA_SETS,
    "data.workers": Number(0, 1024),
    "data.split_id": Number(0, 9999),
    "data.height": PIXELS,
    "data.width": PIXELS,
    "data.transforms": NAMES,
    "data.k_tfm": Choice((1,)),  # more make lists of images, which no engine takes
    "data.norm_mean": Items(CHANNEL_MEAN, (3,)),
    "data.norm_std": Items(CHANNEL_STD, (3,)),
    "data.save_dir": Text("a folder's path", most=LONGEST_PATH),
    "data.check_images": Choice(("none", "header", "full")),
    "data.name_pattern": Text("a preset's name or a regular expression", empty=True, most=2000),
    "data.pixel_range": PIXEL_RANGE,
    "data.check_leakage": Choice(("none", "path", "content")),
    "sampler.train_sampler": Text("the name of a sampler"),
    "sampler.train_sampler_t": Text("the name of a sampler"),
    "sampler.num_instances": count(),
    "sampler.num_cams": count(-1),  # below 1: all
    "sampler.num_datasets": count(-1),
    "video.seq_len": count(),
    "video.sample_method": Choice(("evenly", "random", "all")),
    "video.pooling_method": Choice(("avg", "max")),
    "train.optim": Choice(("adam", "amsgrad", "sgd", "rmsprop", "radam", "adamw")),
    "train.lr": POSITIVE,
    "train.weight_decay": WEIGHT,
    "train.max_epoch": EPOCHS,
    "train.start_epoch": EPOCHS,
    "train.batch_size": count(),
    "train.fixbase_epoch": EPOCHS,
    "train.open_layers": LAYERS,
    "train.new_layers": LAYERS,
    "train.base_lr_mult": WEIGHT,
    "train.lr_scheduler": Choice(("single_step", "multi_step", "cosine", "none")),
    "train.stepsize": Items(count(), rising=True),
    "train.gamma": Number(0, 10, above=True),
    "train.print_freq": count(),
    "train.seed": SEED,
    "train.stages": Items(Number(1, 9), range(1, 10)),
    "train.val_fraction": RATE,
    "train.val_fold": Number(0, 999),
    "train.warmup_epochs": EPOCHS,
    "train.warmup_factor": SHARE,
    "train.precision": Choice(("float64", "float32", "bfloat16", "float16")),
    "train.accumulate": count(),
    "train.clip_norm": WEIGHT,
    "train.ema": RATE,
    "train.checkpoint_freq": count(),
    "train.loggers": Items(Choice(("csv", "tensorboard", "mlflow", "wandb")), range(0, 5)),
    "sgd.momentum": RATE,
    "sgd.dampening": SHARE,
    "rmsprop.alpha": RATE,
    "adam.beta1": RATE,
    "adam.beta2": RATE,
    "loss.name": Choice(("softmax", "triplet", "composite")),
    "loss.triplet.margin": WEIGHT,
    "loss.triplet.weight_t": WEIGHT,
    "loss.triplet.weight_x": WEIGHT,
    "loss.composite.ce": WEIGHT,
    "loss.composite.smoothing": RATE,
    "loss.composite.triplet": WEIGHT,
    "loss.composite.center": WEIGHT,
    "loss.composite.center_lr": WEIGHT,
    "test.batch_size": count(),
    "test.dist_metric": Choice(("euclidean", "cosine")),
    "test.ranks": Items(count(), range(1, 1001)),
    "test.eval_freq": count(-1),
    "test.start_eval": EPOCHS,
    "test.visrank_topk": Number(1, 1000),
    "test.rivals": Items(Choice(RIVALS), range(0, len(RIVALS) + 1)),
    "test.rival_protocol": Choice(("published", *PROTOCOLS)),
    "test.aqe.k": count(),
    "test.aqe.alpha": Number(0, 1000),
    "test.kreciprocal.k1": count(),
    "test.kreciprocal.k2": count(),
    "test.kreciprocal.lambda_value": SHARE,
    "test.aqe_alpha.k": count(),
    "test.aqe_alpha.alpha": Number(0, 1000),
    "test.gnn.k1": count(),
    "test.gnn.k2": count(),
    "test.gnn.alpha": Number(0, 1000),
    "test.gnn.layers": Number(1, 10),
    "test.gnn.lambda_value": SHARE,
    "test.gcr.k1": count(),
    "test.gcr.k2": count(),
    "test.gcr.beta1": Number(0.001, 1000),
    "test.gcr.beta2": Number(0.001, 1000),
    "test.gcr.scale": SHARE,
    "test.gcr.rounds": Number(1, 1000),
    "test.cajaccard.k1_intra": count(0),
    "test.cajaccard.k1_inter": count(0),
    "test.cajaccard.k2_intra": count(),
    "test.cajaccard.k2_inter": count(0),
    "test.cajaccard.lambda_value": SHARE,
    "test.nfc.k1": count(),
    "test.nfc.k2": count(),
    "test.diffusion.k": count(),
    "test.diffusion.k_query": count(),
    "test.diffusion.alpha": RATE,
    "test.diffusion.gamma": Number(0, 1000),
    "test.diffusion.iterations": count(),
    "test.diffusion.tolerance": SHARE,
    "test.diffusion.truncate": count(0),
    "backbone.name": Text("host:NAME, torchvision:NAME, timm:NAME or file:PATH"),
    "backbone.output_stride": Choice((0, 8, 16)),
    "backbone.weights": FILE,
    "head.feature_dim": Number(0, 8192),
    "head.neck_feature": Choice(("after", "before")),
    "vit.patch_size": Number(0, 1024),
    "vit.depth": Number(0, 1000),
    "vit.drop_path": RATE,
    "multimodal.modalities": Items(Text("the name of a modality"), range(1, 5)),
    "multimodal.test": Items(Text("modalities joined by '+'")),
    "multimodal.missing": Choice(("refuse", "skip", "without")),
    "multimodal.pixel_range": Items(PIXEL_RANGE, range(0, 5)),
    "multimodal.mean": Items(Items(CHANNEL_MEAN, (1, 3)), range(1, 5)),
    "multimodal.std": Items(Items(CHANNEL_STD, (1, 3)), range(1, 5)),
}
"""The keys of the house; every method has its own (:attr:`relreid_plugin.methods.Method.ranges`)."""


def all_rules() -> dict[str, Rule]:
    """Return the rules of all keys, those of the methods included; they may take further values of the house's keys."""
    rules = dict(RULES)
    for method in methods():
        rules.update(method.ranges)
        for key, more in method.choices.items():
            rule = rules[key]
            if not isinstance(rule, Choice):
                raise TypeError(f"method '{method.name}' adds choices to '{key}', which is no key of choices")
            rules[key] = replace(rule, values=(*rule.values, *more))
    return rules


def check_ranges(flat: Mapping[str, Any]) -> None:
    """Check every value alone.

    Args:
        flat: Values by dotted key.

    Raises:
        UserError: One sentence with the key, its value and what it may be.
    """
    rules = all_rules()
    for key, value in flat.items():
        rule = rules.get(key)
        said = rule.complaint(value) if rule is not None else ""
        if said:
            raise UserError(f"key '{key}' {said}{'' if said.endswith('?') else '.'}")
