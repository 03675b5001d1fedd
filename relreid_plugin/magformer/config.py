"""Keys of the relation encoder: defaults, ranges, and what does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode as CN

from ..config.idle import Rule as IdleRule
from ..config.ranges import (
    EPOCHS,
    FILE,
    MOST,
    POSITIVE,
    PROTOCOLS,
    RATE,
    SEED,
    SHARE,
    WEIGHT,
    Choice,
    Items,
    Number,
    Rule,
    count,
)
from ..config.validation import notes_of_schedule, require_steps, require_weight
from ..errors import UserError
from ..methods import ResumeKeys, first_stage

ATTENTIONS = ("none", "nformer", "malaa", "magformer")


def add_config(cfg: Any) -> None:
    """Add the keys with their defaults."""
    # --- relation encoder: stage 2 ------------------------------------------------------------------------------------
    cfg.relation = CN()
    cfg.relation.attention = "none"  # none | nformer | malaa | magformer (malaa + DiffAttn)
    cfg.relation.recipe = (
        "none"  # none: the keys below | held-out: chosen by held-out training identities, see relation.select
    )
    cfg.relation.neighbours = (
        "feature"  # feature: cosine of the inputs, once | affinity: eq. 3, per layer | camera: by camera
    )
    cfg.relation.protocols = ["inductive", "transductive"]  # who may look at whom in testing; the first one is the headline
    cfg.relation.num_layers = 4
    cfg.relation.num_heads = 2
    cfg.relation.mlp_ratio = 4.0
    cfg.relation.dropout = 0.1
    cfg.relation.k = 20  # neighbours per image
    cfg.relation.num_landmarks = 5
    cfg.relation.landmarks = "random"  # landmarks in testing: random (seeded draw) | farthest (farthest-point choice)
    cfg.relation.landmark_seed = 0  # seed of that draw
    cfg.relation.init = (
        "paper"  # paper | diffusion (beyond the paper: the untrained encoder averages reciprocal neighbours) |
    )
    # identity (values and outputs start as they come in)
    cfg.relation.block = "transformer"  # transformer | average (beyond the paper: starts as the weighted mean of neighbours)
    cfg.relation.residual = 0.0  # beyond the paper: share of the encoder's input in its output
    cfg.relation.anchor = 0.0  # beyond the paper: share of a query's nearest image of another camera in its result
    cfg.relation.precision = "float32"  # float32 | bfloat16 (autocast)
    cfg.relation.load_weights = ""  # checkpoint of a relation encoder to start from

    cfg.relation.search = CN()
    cfg.relation.search.backend = "auto"  # auto (torch for flat and scan, faiss for ivf and hnsw) | faiss | torch
    cfg.relation.search.index = "flat"  # flat (exact) | scan (all pairs by int8 products) | ivf | hnsw (faiss only)
    cfg.relation.search.nlist = 0  # ivf: number of cells; 0: about 4 * sqrt(N)
    cfg.relation.search.nprobe = 32  # ivf: cells visited per query
    cfg.relation.search.ef = 128  # hnsw: size of the search front
    cfg.relation.search.precision = "auto"  # products that choose candidates: auto | full | bfloat16 | int8 (torch)

    cfg.relation.head = CN()  # beyond the paper: a closed-form head before the graph
    cfg.relation.head.kind = "none"  # none | discriminant (whitened within identities, fitted on the training features)
    cfg.relation.head.shrinkage = 2.0  # share of the mean scatter added to every direction
    cfg.relation.head.dims = 0  # directions kept, the most telling first; 0: all
    cfg.relation.head.soft = 0.0  # dims 0: directions count by b / (b + soft), b their scatter between identities; 0: alike
    cfg.relation.head.keep = 0.0  # share of the features as they come in the similarity

    cfg.relation.camera = CN()  # relation.neighbours camera
    cfg.relation.camera.other = 3  # neighbours of other cameras
    cfg.relation.camera.same = 3  # neighbours of the image's own camera
    cfg.relation.camera.reciprocity = 1  # 0: one-sided; r: the image must be among r times as many neighbours of the other
    cfg.relation.camera.temperature = 0.0  # similarity in the affinity: (cosine - offset) / temperature; 0: none
    cfg.relation.camera.offset = 0.5  # cosine at which a neighbour weighs as much as the image itself
    cfg.relation.camera.support = 0.0  # cosine to its nearest neighbour at which a gallery image has company
    cfg.relation.camera.least = 0.0  # share of a gallery's images that must have company, else all stay alone

    cfg.relation.select = CN()  # relation.recipe held-out: what is tried, and on what
    cfg.relation.select.folds = 2  # training identities take turns in being held out, in so many parts
    cfg.relation.select.identities = 300  # the parts are drawn anew until so many identities took part (6 times at most)
    cfg.relation.select.images = 12000  # identities are drawn until they have so many images; 0: all
    cfg.relation.select.shrinkage = [0.5, 2.0, 8.0]  # heads, beside none
    cfg.relation.select.dims = [0]
    cfg.relation.select.soft = [0.0, 1.0, 3.0]
    cfg.relation.select.keep = [0.0, 0.25, 0.5]
    cfg.relation.select.neighbours = [0, 1, 2, 3, 5, 8]  # of other cameras and of the own one
    cfg.relation.select.rounds = [1, 2, 3]  # layers
    cfg.relation.select.reciprocity = [0, 1, 2]
    cfg.relation.select.temperature = [0.0, 0.3, 0.1]
    cfg.relation.select.gain = 2.0  # standard errors over the identities that a gain in mAP must exceed
    cfg.relation.select.first = 1.0  # standard errors that a head's change in R1 must reach, where first places are lost
    cfg.relation.select.kept = 2.0  # the same for relations, over the features behind the head

    cfg.relation.bank = CN()
    cfg.relation.bank.refresh = 1  # extract the training features anew, augmented, every this many epochs; 0: once, plain
    cfg.relation.bank.noise = 0.0  # expected norm of Gaussian noise added to the unit features in training

    cfg.relation.train = CN()
    cfg.relation.train.max_epoch = 160
    cfg.relation.train.features_per_step = 2048  # features of one neighbourhood
    cfg.relation.train.steps_per_epoch = 0  # 0: max(1, bank size / 30)
    cfg.relation.train.spread = [1.0, 2.0]  # a step draws n of its anchor's n*u nearest features, u uniform in this range
    cfg.relation.train.lr = 1.5e-4
    cfg.relation.train.betas = [0.9, 0.98]
    cfg.relation.train.weight_decay = 0.05
    cfg.relation.train.lr_scheduler = "none"  # none | cosine | multi_step
    cfg.relation.train.stepsize = [40, 70]
    cfg.relation.train.gamma = 0.1
    cfg.relation.train.warmup_epochs = 0
    cfg.relation.train.seed = 1  # seed of stage 2: initial weights, landmarks, draws (train.seed: stage 1 and splits)
    cfg.relation.train.eval_freq = 0  # epochs between validations on the held-out identities; 0: never
    cfg.relation.loss = CN()
    cfg.relation.loss.ce = 1.0
    cfg.relation.loss.triplet = 1.0
    cfg.relation.loss.margin = 0.3
    cfg.relation.loss.center = 0.0005
    cfg.relation.loss.center_lr = 0.5


RANGES: Mapping[str, Rule] = {
    "relation.attention": Choice(ATTENTIONS),
    "relation.recipe": Choice(("none", "held-out")),
    "relation.neighbours": Choice(("feature", "affinity", "camera")),
    "relation.protocols": Items(Choice(PROTOCOLS), range(1, 3)),
    "relation.num_layers": Number(1, 1000),
    "relation.num_heads": Number(1, 1024),
    "relation.mlp_ratio": Number(0.1, 1000),
    "relation.dropout": RATE,
    "relation.k": count(),
    "relation.num_landmarks": count(),
    "relation.landmarks": Choice(("random", "farthest")),
    "relation.landmark_seed": SEED,
    "relation.init": Choice(("paper", "diffusion", "identity")),
    "relation.block": Choice(("transformer", "average")),
    "relation.residual": Number(0, 1000),
    "relation.anchor": Number(0, 1000),
    "relation.head.kind": Choice(("none", "discriminant")),
    "relation.head.shrinkage": Number(0, 1e6, above=True),
    "relation.head.dims": count(0),
    "relation.head.soft": Number(0, 1e6),
    "relation.head.keep": SHARE,
    "relation.camera.other": count(0),
    "relation.camera.same": count(0),
    "relation.camera.reciprocity": count(0, 1000),
    "relation.camera.temperature": Number(0, 1000),
    "relation.camera.offset": Number(-1, 1),
    "relation.camera.support": Number(-1, 1),
    "relation.camera.least": SHARE,
    "relation.select.folds": count(2, 1000),
    "relation.select.identities": count(),
    "relation.select.images": count(0),
    "relation.select.shrinkage": Items(Number(0, 1e6, above=True), range(1, 101)),
    "relation.select.dims": Items(count(0), range(1, 101)),
    "relation.select.soft": Items(Number(0, 1e6), range(1, 101)),
    "relation.select.gain": Number(0, 100),
    "relation.select.first": Number(0, 100),
    "relation.select.kept": Number(0, 100),
    "relation.select.keep": Items(SHARE, range(1, 101)),
    "relation.select.neighbours": Items(count(0), range(1, 101)),
    "relation.select.rounds": Items(Number(1, 100), range(1, 101)),
    "relation.select.reciprocity": Items(count(0, 1000), range(1, 101)),
    "relation.select.temperature": Items(Number(0, 1000), range(1, 101)),
    "relation.precision": Choice(("float32", "bfloat16")),
    "relation.load_weights": FILE,
    "relation.search.backend": Choice(("auto", "faiss", "torch")),
    "relation.search.index": Choice(("flat", "scan", "ivf", "hnsw")),
    "relation.search.nlist": count(0, 10**7),
    "relation.search.nprobe": count(1, 10**7),
    "relation.search.ef": count(),
    "relation.search.precision": Choice(("auto", "full", "bfloat16", "int8")),
    "relation.bank.refresh": EPOCHS,
    "relation.bank.noise": WEIGHT,
    "relation.train.max_epoch": EPOCHS,
    "relation.train.features_per_step": count(2),  # one feature has no neighbour, and a batch of one no variance
    "relation.train.steps_per_epoch": count(0),
    "relation.train.spread": Items(Number(1, MOST), (2,)),
    "relation.train.lr": POSITIVE,
    "relation.train.betas": Items(RATE, (2,)),
    "relation.train.weight_decay": WEIGHT,
    "relation.train.lr_scheduler": Choice(("none", "cosine", "multi_step")),
    "relation.train.stepsize": Items(count(), rising=True),
    "relation.train.gamma": Number(0, 10, above=True),
    "relation.train.warmup_epochs": EPOCHS,
    "relation.train.seed": SEED,
    "relation.train.eval_freq": count(-1),
    "relation.loss.ce": WEIGHT,
    "relation.loss.triplet": WEIGHT,
    "relation.loss.margin": WEIGHT,
    "relation.loss.center": WEIGHT,
    "relation.loss.center_lr": WEIGHT,
}


def validate(cfg: Any) -> None:
    """Check values that do not go together."""
    relation = cfg.relation
    require_steps("relation.train", relation.train)
    if relation.attention != "none":
        require_weight(relation.loss, "relation.loss", ("ce", "triplet", "center"))
    if relation.search.index in ("ivf", "hnsw") and relation.search.backend == "torch":
        raise UserError(
            f"'relation.search.index {relation.search.index}' needs faiss, but 'relation.search.backend' is 'torch'."
        )
    if relation.recipe != "none" and relation.neighbours == "affinity":
        raise UserError(
            "'relation.recipe held-out' counts neighbours by camera; it does not work with 'relation.neighbours affinity'."
        )
    low, high = relation.train.spread
    if low > high:
        raise UserError(f"key 'relation.train.spread' must be two rising numbers of at least 1, got [{low}, {high}].")


def relates(cfg: Any) -> bool:
    """Whether a configuration's run has a relation stage."""
    return cfg.relation.attention != "none" and stage_number(cfg) in cfg.train.stages


def stage_number(cfg: Any) -> int:
    """Return the number of the relation stage in ``train.stages``: the one behind the network's."""
    return first_stage("magformer", cfg)


def schedule_notes(cfg: Any) -> list[str]:
    """Return what in the stage's schedule is allowed, but probably not meant."""
    return notes_of_schedule("relation.train", cfg.relation.train) if relates(cfg) else []


USES = {
    "train.warmup_factor": lambda c: relates(c) and c.relation.train.warmup_epochs > 0,
    "train.val_fraction": lambda c: relates(c) and c.relation.train.eval_freq > 0,
}

RESUME = ResumeKeys(
    testing=(
        "relation.protocols",
        "relation.landmarks",
        "relation.landmark_seed",
        "relation.search.backend",
        "relation.search.precision",
        "relation.train.eval_freq",
    ),
    start=("relation.load_weights",),
    later=("relation.*",),
    training=("relation.train.*", "relation.loss.*", "relation.bank.*", "relation.dropout", "relation.init"),
    epochs={"relation": "relation.train.max_epoch"},
)

IDLE: tuple[IdleRule, ...] = (
    IdleRule(
        ("relation.attention",),
        lambda c: stage_number(c) in c.train.stages,
        "it belongs to the relation stage, which 'train.stages' leaves out",
    ),
    IdleRule(
        (
            "relation.recipe",
            "relation.neighbours",
            "relation.block",
            "relation.residual",
            "relation.anchor",
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
    IdleRule(
        ("relation.anchor",),
        lambda c: not relates(c) or c.relation.neighbours == "camera" or c.relation.recipe != "none",
        "it belongs to 'relation.neighbours camera'",
    ),
    IdleRule(
        ("relation.landmark_seed",),
        lambda c: not relates(c) or c.relation.landmarks == "random",
        "it belongs to 'relation.landmarks random'",
    ),
    IdleRule(
        ("relation.train.stepsize", "relation.train.gamma"),
        lambda c: not relates(c) or c.relation.train.lr_scheduler == "multi_step",
        "it belongs to 'relation.train.lr_scheduler multi_step'",
    ),
    IdleRule(
        ("relation.train.eval_freq",),
        lambda c: not relates(c) or c.train.val_fraction > 0,
        "'train.val_fraction' is 0, so there is nothing to validate on",
    ),
    IdleRule(
        ("relation.loss.margin",),
        lambda c: not relates(c) or c.relation.loss.triplet > 0,
        "'relation.loss.triplet' is 0",
    ),
    IdleRule(
        ("relation.loss.center_lr",),
        lambda c: not relates(c) or c.relation.loss.center > 0,
        "'relation.loss.center' is 0",
    ),
)
