"""Configuration: torchreid's own keys, the plug-in's keys, and merging that names what is wrong.

torchreid ships its yacs defaults only inside the scripts of its repository, so the host's keys and default values are
declared here (:func:`host_defaults`) and any torchreid YAML file runs unchanged. :func:`add_plugin_config` adds the
plug-in's keys; nothing else in the package declares one.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from .errors import UserError, did_you_mean

RELATION_ATTENTIONS = ("none", "nformer", "malaa", "magformer")
PROTOCOLS = ("inductive", "transductive")
MULTIMODAL_MODELS = ("graft",)
IMAGE_MODELS = ("bnneck_baseline", "vit_baseline", "transreid")


def host_defaults() -> CN:
    """Return torchreid's keys with torchreid's default values (torchreid 1.4.0, ``scripts/default_config.py``)."""
    cfg = CN()
    cfg.use_gpu = True  # use CUDA when there is any

    cfg.model = CN()
    cfg.model.name = "resnet50"  # a name in the host's model factory, the plug-in's models included
    cfg.model.pretrained = True  # ImageNet weights where the model has any
    cfg.model.load_weights = ""  # local file with weights to start from; layers that do not fit are skipped
    cfg.model.resume = ""  # checkpoint of the host or of this plug-in to go on from

    cfg.data = CN()
    cfg.data.type = "image"  # image | video
    cfg.data.root = "reid-data"  # folder that holds the data sets
    cfg.data.sources = ["market1501"]  # training sets: registered names, folders or CSV files
    cfg.data.targets = ["market1501"]  # test sets
    cfg.data.workers = 4  # loader processes
    cfg.data.split_id = 0  # which split, for data sets with several
    cfg.data.height = 256  # image height, pixels
    cfg.data.width = 128  # image width, pixels
    cfg.data.combineall = False  # train on train + query + gallery
    cfg.data.transforms = ["random_flip"]  # training augmentation, see host and plug-in transforms
    cfg.data.k_tfm = 1  # augmented copies of an image per sample
    cfg.data.norm_mean = [0.485, 0.456, 0.406]  # per-channel mean of pixels in [0, 1]
    cfg.data.norm_std = [0.229, 0.224, 0.225]  # per-channel standard deviation
    cfg.data.save_dir = "log"  # the run's folder
    cfg.data.load_train_targets = False  # also load the targets' training images, without labels

    cfg.market1501 = CN()
    cfg.market1501.use_500k_distractors = False  # add 500,000 distractors to the gallery
    cfg.cuhk03 = CN()
    cfg.cuhk03.labeled_images = False  # labelled instead of detected boxes
    cfg.cuhk03.classic_split = False  # the 20 splits of 2014 instead of 767/700
    cfg.cuhk03.use_metric_cuhk03 = False  # single-gallery-shot metric, for the classic split

    cfg.sampler = CN()
    cfg.sampler.train_sampler = "RandomSampler"  # sampler of the training loader
    cfg.sampler.train_sampler_t = "RandomSampler"  # sampler of the target training loader
    cfg.sampler.num_instances = 4  # images per identity (RandomIdentitySampler)
    cfg.sampler.num_cams = 1  # cameras per batch (RandomDomainSampler)
    cfg.sampler.num_datasets = 1  # data sets per batch (RandomDatasetSampler)

    cfg.video = CN()
    cfg.video.seq_len = 15  # images per tracklet
    cfg.video.sample_method = "evenly"  # evenly | random | all
    cfg.video.pooling_method = "avg"  # avg | max

    cfg.train = CN()
    cfg.train.optim = "adam"  # adam | amsgrad | sgd | rmsprop | radam
    cfg.train.lr = 0.0003
    cfg.train.weight_decay = 5e-4
    cfg.train.max_epoch = 60
    cfg.train.start_epoch = 0
    cfg.train.batch_size = 32
    cfg.train.fixbase_epoch = 0  # epochs that train only open_layers
    cfg.train.open_layers = ["classifier"]
    cfg.train.staged_lr = False  # smaller learning rate for all but new_layers
    cfg.train.new_layers = ["classifier"]
    cfg.train.base_lr_mult = 0.1  # learning-rate factor of the base layers under staged_lr
    cfg.train.lr_scheduler = "single_step"  # single_step | multi_step | cosine | none (plug-in) | sqrt (graft, per step)
    cfg.train.stepsize = [20]  # epochs at which the learning rate falls
    cfg.train.gamma = 0.1  # factor by which it falls
    cfg.train.print_freq = 20  # batches between progress lines
    cfg.train.seed = 1

    cfg.sgd = CN()
    cfg.sgd.momentum = 0.9
    cfg.sgd.dampening = 0.0
    cfg.sgd.nesterov = False
    cfg.rmsprop = CN()
    cfg.rmsprop.alpha = 0.99
    cfg.adam = CN()
    cfg.adam.beta1 = 0.9
    cfg.adam.beta2 = 0.999

    cfg.loss = CN()
    cfg.loss.name = "softmax"  # softmax | triplet (host's engines) | composite (plug-in)
    cfg.loss.softmax = CN()
    cfg.loss.softmax.label_smooth = True
    cfg.loss.triplet = CN()
    cfg.loss.triplet.margin = 0.3
    cfg.loss.triplet.weight_t = 1.0  # weight of the triplet loss (loss.name triplet)
    cfg.loss.triplet.weight_x = 0.0  # weight of the cross-entropy (loss.name triplet)

    cfg.test = CN()
    cfg.test.batch_size = 100
    cfg.test.dist_metric = "euclidean"  # euclidean | cosine
    cfg.test.normalize_feature = False  # L2-normalise features before distances
    cfg.test.ranks = [1, 5, 10, 20]  # CMC ranks to report
    cfg.test.evaluate = False  # only test
    cfg.test.eval_freq = -1  # epochs between tests; -1: only at the end
    cfg.test.start_eval = 0  # first epoch to test after
    cfg.test.rerank = False  # re-rank every test with k-reciprocal encoding
    cfg.test.visrank = False  # write pictures of ranked lists (with test.evaluate)
    cfg.test.visrank_topk = 10
    return cfg


def add_plugin_config(cfg: CN) -> None:
    """Add the plug-in's keys, with defaults that leave a torchreid configuration's meaning as it is."""
    # --- data -------------------------------------------------------------------------------------------------------
    cfg.data.download = False  # let the host try to download a data set that is missing
    cfg.data.check_images = "header"  # none | header (open every file, look for its end) | full (decode every file)

    # --- training ---------------------------------------------------------------------------------------------------
    cfg.train.stages = [1]  # [1]: the image model; [1, 2]: then the relation encoder on its frozen features
    cfg.train.val_fraction = 0.0  # share of the training identities held out to choose epochs and settings by
    cfg.train.warmup_epochs = 0  # linear learning-rate warm-up, epochs
    cfg.train.warmup_factor = 0.01  # learning-rate factor at the first epoch of the warm-up
    cfg.train.precision = "float32"  # composite loss: float32 | bfloat16 (autocast of the network; losses stay float32)
    cfg.train.checkpoint_freq = 1  # epochs between checkpoints (the last epoch always writes one)

    # --- image models of the plug-in (model.name: bnneck_baseline, vit_baseline, transreid) -----------------------------
    cfg.backbone = CN()
    cfg.backbone.name = "torchvision:resnet50"  # host:NAME | torchvision:NAME | timm:NAME
    cfg.backbone.output_stride = 16  # 16: last stage dilated instead of strided; 0: the architecture's own stride
    cfg.backbone.weights = ""  # local file of pretrained backbone weights, where the network cannot be reached
    cfg.head = CN()
    cfg.head.feature_dim = 512  # width of the embedding after the pooled feature; 0: no such layer
    cfg.head.neck_feature = "after"  # test feature before or after the BNNeck: after | before (TransReID)

    # --- vision transformers (model.name: vit_baseline, transreid; the network itself: backbone.name timm:NAME) ---------
    cfg.vit = CN()
    cfg.vit.patch_size = 0  # pixels; 0: the network's own
    cfg.vit.depth = 0  # blocks; 0: the network's own
    cfg.vit.drop_path = 0.1  # stochastic depth, rate of the last block
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
    cfg.rib.dcs.lr_mult = 1.0  # learning rate of the gates over that of the network
    cfg.rib.dcs.reduction = 2  # CNN: width of the non-local block's values, channels divided by this
    cfg.rib.ibb = CN()
    cfg.rib.ibb.eta = 0.0  # weight of the information bottleneck bound in the loss; the paper: 1
    cfg.rib.ibb.warmup = 0.3  # share of the epochs in which it is measured, but not trained on
    cfg.rib.ibb.feature = "after"  # features it is about: after the BNNeck (what the classifier sees) | before
    cfg.rib.ibb.beta = 1.0  # sharpness of the soft assignment to class centroids
    cfg.rib.ibb.epsilon = 1e-8  # floor of Q before the logarithm
    cfg.rib.ibb.measure = False  # with eta 0: measure bound and estimate all the same

    # --- several modalities per sample (model.name: graft) ------------------------------------------------------------
    cfg.multimodal = CN()
    cfg.multimodal.modalities = ["R", "N", "T"]  # trained on: a selection of the data set's modalities, 1 to 4
    cfg.multimodal.test = []  # tested with, one row each, such as ['R+N+T','R+N','R']; []: what was trained on
    cfg.multimodal.mean = [[0.485, 0.456, 0.406]]  # per modality in the order of modalities, or one for all; 3 or 1 numbers
    cfg.multimodal.std = [[0.229, 0.224, 0.225]]  # tools/modality_stats.py measures both
    cfg.graft = CN()
    cfg.graft.fusion = "graft"  # graft (fusion token) | cls | average | early | late
    cfg.graft.heads = 8  # heads of a modality encoder
    cfg.graft.feedforward = 2048  # width of its feed-forward layer
    cfg.graft.dropout = 0.1
    cfg.graft.token_index = 0  # data token that stands for a sample in the triplet loss
    cfg.graft.scheme = "FFD"  # anchor, positive, negative: F fused token, D data token
    cfg.graft.distance = "euclidean"  # of the triplet loss: euclidean (released) | squared (printed)
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

    # --- composite loss (loss.name: composite) ------------------------------------------------------------------------
    cfg.loss.composite = CN()
    cfg.loss.composite.ce = 1.0  # weight of the cross-entropy (label smoothing: loss.softmax.label_smooth)
    cfg.loss.composite.triplet = 0.0  # weight of the batch-hard triplet loss (margin: loss.triplet.margin)
    cfg.loss.composite.center = 0.0005  # weight of the center loss
    cfg.loss.composite.center_lr = 0.5  # SGD learning rate of the class centers

    # --- relation encoder: stage 2 ------------------------------------------------------------------------------------
    cfg.relation = CN()
    cfg.relation.attention = "none"  # none | nformer | malaa | magformer (malaa + DiffAttn)
    cfg.relation.recipe = "none"  # none: the keys below | held-out: chosen by held-out training identities, see relation.select
    cfg.relation.neighbours = "feature"  # feature: cosine of the inputs, once | affinity: eq. 3, per layer | camera: by camera
    cfg.relation.protocols = ["inductive", "transductive"]  # who may look at whom in testing; the first one is the headline
    cfg.relation.num_layers = 4
    cfg.relation.num_heads = 2
    cfg.relation.mlp_ratio = 4.0
    cfg.relation.dropout = 0.1
    cfg.relation.k = 20  # neighbours per image
    cfg.relation.num_landmarks = 5
    cfg.relation.landmarks = "random"  # landmarks in testing: random (seeded draw) | farthest (farthest-point choice)
    cfg.relation.landmark_seed = 0  # seed of that draw
    cfg.relation.init = "paper"  # paper | diffusion (beyond the paper: the untrained encoder averages reciprocal neighbours) |
    # identity (values and outputs start as they come in)
    cfg.relation.block = "transformer"  # transformer | average (beyond the paper: starts as the weighted mean of neighbours)
    cfg.relation.residual = 0.0  # beyond the paper: share of the encoder's input in its output
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
    cfg.relation.head.keep = 0.0  # share of the features as they come in the similarity

    cfg.relation.camera = CN()  # relation.neighbours camera
    cfg.relation.camera.other = 3  # neighbours of other cameras
    cfg.relation.camera.same = 3  # neighbours of the image's own camera
    cfg.relation.camera.reciprocity = 1  # 0: one-sided; r: the image must be among r times as many neighbours of the other
    cfg.relation.camera.temperature = 0.0  # similarity in the affinity: (cosine - offset) / temperature; 0: none
    cfg.relation.camera.offset = 0.5  # cosine at which a neighbour weighs as much as the image itself

    cfg.relation.select = CN()  # relation.recipe held-out: what is tried, and on what
    cfg.relation.select.folds = 2  # training identities take turns in being held out, in so many parts
    cfg.relation.select.identities = 300  # the parts are drawn anew until so many identities took part (6 times at most)
    cfg.relation.select.images = 12000  # identities are drawn until they have so many images; 0: all
    cfg.relation.select.shrinkage = [0.5, 2.0, 8.0]  # heads, beside none
    cfg.relation.select.dims = [15, 30, 60, 120, 0]
    cfg.relation.select.keep = [0.0, 0.25, 0.5]
    cfg.relation.select.neighbours = [0, 1, 2, 3, 5, 8]  # of other cameras and of the own one
    cfg.relation.select.rounds = [1, 2, 3]  # layers
    cfg.relation.select.reciprocity = [0, 1, 2]
    cfg.relation.select.temperature = [0.0, 0.3, 0.1]

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

    # --- rivals on the same features ----------------------------------------------------------------------------------
    cfg.test.rivals = ["aqe", "rerank"]  # rows beside the model: aqe | rerank
    cfg.test.aqe = CN()
    cfg.test.aqe.k = 5  # neighbours averaged into a query and into a gallery feature
    cfg.test.aqe.alpha = 0.0  # weight of a neighbour: similarity ** alpha
    cfg.test.kreciprocal = CN()
    cfg.test.kreciprocal.k1 = 20
    cfg.test.kreciprocal.k2 = 6
    cfg.test.kreciprocal.lambda_value = 0.3


def get_default_config() -> CN:
    """Return all keys, the host's and the plug-in's, with their defaults."""
    cfg = host_defaults()
    add_plugin_config(cfg)
    return cfg


def _flat(cfg: CN, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CN):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _describe(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number"
    if isinstance(value, list):
        inner = _describe(value[0]).split(" ", 1)[-1] if value else "value"
        return f"a list ({inner}s)"
    return "a string"


def _coerce(value: Any, default: Any, key: str, where: str) -> Any:
    """Return ``value`` in the type of ``default``, or raise :class:`UserError` naming the key."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            lowered = value.strip().lower()
            if lowered in ("true", "false"):
                value = lowered == "true"
    wrong = UserError(f"{where}: key '{key}' must be {_describe(default)} like {default!r}, got {value!r}.")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong
        return value
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong
        return float(value)
    if isinstance(default, list):
        if isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, list):
            if default and type(value) is not type(default[0]):
                raise wrong
            value = [value]
        if default:
            value = [_coerce(item, default[0], key, where) for item in value]
        return value
    if not isinstance(value, str):
        raise wrong
    return value


def _merge_dict(cfg: CN, values: dict[str, Any], where: str, prefix: str, root: CN) -> None:
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in cfg:
            nodes = {name.rsplit(".", 1)[0] for name in _flat(root) if "." in name}
            raise UserError(f"{where}: unknown key '{full}'{did_you_mean(full, set(_flat(root)) | nodes)}")
        if isinstance(cfg[key], CN):
            if not isinstance(value, dict):
                raise UserError(f"{where}: key '{full}' must hold keys of its own ({', '.join(cfg[key])}), got {value!r}.")
            _merge_dict(cfg[key], value, where, f"{full}.", root)
        else:
            cfg[key] = _coerce(value, cfg[key], full, where)


def merge_from_file(cfg: CN, path: str | Path) -> None:
    """Merge a YAML file into ``cfg``.

    Args:
        cfg: A node from :func:`get_default_config`; changed in place.
        path: A torchreid or plug-in YAML file.

    Raises:
        UserError: The file is missing, is no YAML mapping, has an unknown key (the nearest valid one is named) or a
            value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        near = ""
        if path.parent.is_dir():
            near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise UserError(f"configuration file '{path}' does not exist{near or '.'}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(error).split())}).") from None
    if values is None:
        return
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a YAML mapping of keys to values, got {type(values).__name__}.")
    _merge_dict(cfg, values, str(path), "", cfg)


def merge_from_list(cfg: CN, opts: list[str]) -> None:
    """Merge ``KEY VALUE …`` pairs from the command line into ``cfg``, checked like :func:`merge_from_file`."""
    if len(opts) % 2:
        raise UserError(f"command line: overrides come as KEY VALUE pairs, but '{opts[-1]}' stands alone.")
    flat = _flat(cfg)
    for key, value in zip(opts[::2], opts[1::2]):
        if key.startswith("-"):
            raise UserError(f"command line: unknown option '{key}' (options go before KEY VALUE overrides).")
        if key not in flat:
            raise UserError(f"command line: unknown key '{key}'{did_you_mean(key, flat)}")
        *parents, leaf = key.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        node[leaf] = _coerce(value, node[leaf], key, "command line")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CN:
    """Return the validated configuration of a YAML file and ``KEY VALUE …`` over it.

    Raises:
        UserError: As :func:`merge_from_file`, :func:`merge_from_list` and :func:`validate`.
    """
    cfg = get_default_config()
    merge_from_file(cfg, path)
    merge_from_list(cfg, list(overrides))
    validate(cfg)
    return cfg


_CHOICES: dict[str, tuple[str, ...]] = {
    "data.type": ("image", "video"),
    "data.check_images": ("none", "header", "full"),
    "loss.name": ("softmax", "triplet", "composite"),
    "test.dist_metric": ("euclidean", "cosine"),
    "train.lr_scheduler": ("single_step", "multi_step", "cosine", "none", "sqrt"),
    "train.optim": ("adam", "amsgrad", "sgd", "rmsprop", "radam", "adamw"),
    "train.precision": ("float32", "bfloat16"),
    "head.neck_feature": ("after", "before"),
    "rib.attention": ("none", "dcs", "se", "cbam"),
    "rib.ibb.feature": ("after", "before"),
    "rib.dcs.schedule": ("constant", "linear", "cosine", "exponential"),
    "graft.fusion": ("graft", "cls", "average", "early", "late"),
    "graft.scheme": ("FFF", "FFD", "FDF", "FDD", "DFF", "DFD", "DDF", "DDD"),
    "graft.distance": ("euclidean", "squared"),
    "graft.sampling": ("triplets", "pk"),
    "relation.attention": RELATION_ATTENTIONS,
    "relation.recipe": ("none", "held-out"),
    "relation.neighbours": ("feature", "affinity", "camera"),
    "relation.landmarks": ("random", "farthest"),
    "relation.init": ("paper", "diffusion", "identity"),
    "relation.block": ("transformer", "average"),
    "relation.head.kind": ("none", "discriminant"),
    "relation.precision": ("float32", "bfloat16"),
    "relation.search.backend": ("auto", "faiss", "torch"),
    "relation.search.index": ("flat", "scan", "ivf", "hnsw"),
    "relation.search.precision": ("auto", "full", "bfloat16", "int8"),
    "relation.train.lr_scheduler": ("none", "cosine", "multi_step"),
}
_LIST_CHOICES: dict[str, tuple[str, ...]] = {
    "relation.protocols": PROTOCOLS,
    "test.rivals": ("aqe", "rerank"),
}
_POSITIVE = (
    "data.height",
    "data.width",
    "train.batch_size",
    "test.batch_size",
    "train.print_freq",
    "train.checkpoint_freq",
    "vit.groups",
    "graft.heads",
    "graft.feedforward",
    "graft.positives",
    "rib.reduction",
    "rib.dcs.reduction",
    "relation.k",
    "relation.num_landmarks",
    "relation.num_layers",
    "relation.num_heads",
    "relation.train.features_per_step",
    "test.aqe.k",
    "test.kreciprocal.k1",
    "test.kreciprocal.k2",
)


def validate(cfg: CN) -> None:
    """Check values that a type cannot: choices, ranges and combinations.

    Raises:
        UserError: One sentence with the key, its value and the valid ones.
    """
    flat = _flat(cfg)
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"key '{key}' is {flat[key]!r}{did_you_mean(flat[key], choices)}")
    for key, choices in _LIST_CHOICES.items():
        for value in flat[key]:
            if value not in choices:
                raise UserError(f"key '{key}' holds {value!r}{did_you_mean(value, choices)}")
    for key in _POSITIVE:
        if flat[key] < 1:
            raise UserError(f"key '{key}' must be at least 1, got {flat[key]}.")
    if not 0.0 <= cfg.train.val_fraction < 1.0:
        raise UserError(f"key 'train.val_fraction' must lie in [0, 1), got {cfg.train.val_fraction}.")
    if not cfg.data.sources or not cfg.data.targets:
        raise UserError("keys 'data.sources' and 'data.targets' must each name at least one data set.")
    if sorted(set(cfg.train.stages)) not in ([1], [2], [1, 2]):
        raise UserError(f"key 'train.stages' must be [1], [2] or [1, 2], got {cfg.train.stages}.")
    if 2 in cfg.train.stages and cfg.relation.attention == "none" and cfg.model.name != "graft":
        raise UserError(
            "'train.stages' asks for stage 2, but 'relation.attention' is 'none'; choose nformer, malaa or magformer."
        )
    _validate_graft(cfg)
    _validate_rib(cfg)
    if not cfg.relation.protocols:
        raise UserError("key 'relation.protocols' must name at least one protocol: inductive, transductive.")
    if any(rank < 1 for rank in cfg.test.ranks) or not cfg.test.ranks:
        raise UserError(f"key 'test.ranks' must hold ranks of at least 1, got {cfg.test.ranks}.")
    if cfg.loss.name == "triplet" and cfg.loss.triplet.weight_x == 0 and cfg.train.fixbase_epoch > 0:
        raise UserError(
            "'train.fixbase_epoch' trains the classifier alone, but 'loss.triplet.weight_x' is 0 and gives it no gradient; "
            "set 'train.fixbase_epoch 0' or a weight above 0."
        )
    if cfg.relation.search.index in ("ivf", "hnsw") and cfg.relation.search.backend == "torch":
        raise UserError(
            f"'relation.search.index {cfg.relation.search.index}' needs faiss, but 'relation.search.backend' is 'torch'."
        )
    _validate_relation(cfg)
    spread = cfg.relation.train.spread
    if len(spread) != 2 or not 1.0 <= spread[0] <= spread[1]:
        raise UserError(f"key 'relation.train.spread' must be two rising numbers of at least 1, got {spread}.")


def _validate_relation(cfg: CN) -> None:
    """The switches beyond the paper."""
    head, camera, select = cfg.relation.head, cfg.relation.camera, cfg.relation.select
    if head.shrinkage <= 0 or head.dims < 0 or not 0 <= head.keep <= 1:
        raise UserError(
            "keys of 'relation.head': shrinkage must be above 0, dims not negative, keep in [0, 1]; got "
            f"{head.shrinkage}, {head.dims}, {head.keep}."
        )
    for key in ("other", "same", "reciprocity", "temperature"):
        if camera[key] < 0:
            raise UserError(f"key 'relation.camera.{key}' must not be negative, got {camera[key]}.")
    if cfg.relation.residual < 0:
        raise UserError(f"key 'relation.residual' must not be negative, got {cfg.relation.residual}.")
    for key in ("shrinkage", "dims", "keep", "neighbours", "rounds", "reciprocity", "temperature"):
        values, least = select[key], 1 if key == "rounds" else 0
        if not values or min(values) < least or (key == "shrinkage" and min(values) <= 0):
            low = "above 0" if key == "shrinkage" else f"of at least {least}"
            raise UserError(f"key 'relation.select.{key}' must hold numbers {low}, got {values}.")
    if max(select.keep) > 1:
        raise UserError(f"key 'relation.select.keep' must hold shares in [0, 1], got {select.keep}.")
    if select.folds < 2 or select.identities < 1 or select.images < 0:
        raise UserError(
            "keys of 'relation.select': folds must be at least 2, identities at least 1, images not negative; got "
            f"{select.folds}, {select.identities}, {select.images}."
        )
    if cfg.relation.recipe != "none" and cfg.relation.neighbours == "affinity":
        raise UserError("'relation.recipe held-out' counts neighbours by camera; it does not work with 'relation.neighbours affinity'.")


def _validate_rib(cfg: CN) -> None:
    rib, name = cfg.rib, cfg.model.name
    for key in ("patch_size", "depth", "stride", "camera_weight", "parts", "shift"):
        if cfg.vit[key] < 0:
            raise UserError(f"key 'vit.{key}' must not be negative, got {cfg.vit[key]}.")
    if not 0.0 <= cfg.vit.drop_path < 1.0:
        raise UserError(f"key 'vit.drop_path' must lie in [0, 1), got {cfg.vit.drop_path}.")
    if rib.attention != "none" and name not in IMAGE_MODELS:
        raise UserError(
            f"'rib.attention {rib.attention}' works with 'model.name' {', '.join(IMAGE_MODELS)}, not with '{name}'; for a "
            f"network of the host take 'model.name bnneck_baseline' and 'backbone.name host:{name}'."
        )
    if rib.attention in ("se", "cbam") and name != "bnneck_baseline":
        raise UserError(f"'rib.attention {rib.attention}' is for CNNs ('model.name bnneck_baseline'); '{name}' takes dcs.")
    if rib.places and rib.attention == "none":
        raise UserError("'rib.places' says where attention goes, but 'rib.attention' is 'none'; choose dcs, se or cbam.")
    if rib.dcs.init_bias <= 0:
        raise UserError(f"key 'rib.dcs.init_bias' must be above 0, so that masks start open, got {rib.dcs.init_bias}.")
    if len(rib.dcs.temperature) != 2 or min(rib.dcs.temperature) <= 0:
        raise UserError(f"key 'rib.dcs.temperature' must be two numbers above 0, got {rib.dcs.temperature}.")
    if rib.dcs.lr_mult <= 0:
        raise UserError(f"key 'rib.dcs.lr_mult' must be above 0, got {rib.dcs.lr_mult}.")
    ibb = rib.ibb
    if ibb.eta < 0 or ibb.beta <= 0 or not 0 < ibb.epsilon < 1 or not 0 <= ibb.warmup <= 1:
        raise UserError(
            "keys of 'rib.ibb': eta must not be negative, beta must be above 0, epsilon in (0, 1), warmup in [0, 1]; got "
            f"eta {ibb.eta}, beta {ibb.beta}, epsilon {ibb.epsilon}, warmup {ibb.warmup}."
        )
    if (ibb.eta > 0 or ibb.measure) and cfg.loss.name != "composite":
        raise UserError(
            f"'rib.ibb' belongs to 'loss.name composite', not to '{cfg.loss.name}'; set 'loss.name composite', or "
            "'rib.ibb.eta 0' and 'rib.ibb.measure False'."
        )
    if cfg.train.precision != "float32" and cfg.loss.name != "composite":
        raise UserError(
            f"'train.precision {cfg.train.precision}' belongs to 'loss.name composite', not to '{cfg.loss.name}'."
        )
    if name == "transreid" and cfg.loss.name != "composite":
        raise UserError(f"'model.name transreid' trains with 'loss.name composite', not with '{cfg.loss.name}'.")


def _validate_graft(cfg: CN) -> None:
    multimodal, graft = cfg.multimodal, cfg.graft
    names = multimodal.modalities
    if not 1 <= len(names) <= 4 or len(set(names)) < len(names) or any("+" in name or not name for name in names):
        raise UserError(f"key 'multimodal.modalities' must hold 1 to 4 different names, got {names}.")
    for subset in multimodal.test:
        for name in subset.split("+"):
            if name not in names:
                raise UserError(
                    f"key 'multimodal.test' holds '{subset}', but '{name}' is not trained on{did_you_mean(name, names)}"
                )
        if len(set(subset.split("+"))) < len(subset.split("+")):
            raise UserError(f"key 'multimodal.test' holds '{subset}', which names a modality twice.")
    for key in ("mean", "std"):
        rows = multimodal[key]
        if len(rows) not in (1, len(names)) or any(len(row) not in (1, 3) for row in rows):
            raise UserError(
                f"key 'multimodal.{key}' must hold one list of 3 (or 1) numbers, or one per modality ({', '.join(names)}), "
                f"got {rows}."
            )
    if cfg.model.name != "graft":
        if cfg.train.lr_scheduler == "sqrt":
            raise UserError("'train.lr_scheduler sqrt' is stepped per batch and belongs to 'model.name graft'.")
        return
    if cfg.loss.name != "composite":
        raise UserError(f"'model.name graft' trains with 'loss.name composite', not with '{cfg.loss.name}'.")
    if cfg.test.visrank:
        raise UserError("'test.visrank' draws single images and does not work with 'model.name graft'; set it to False.")
    if cfg.relation.attention != "none":
        raise UserError("'model.name graft' has two stages of its own; set 'relation.attention none'.")
    if cfg.rib.attention != "none" or cfg.rib.ibb.eta > 0 or cfg.rib.ibb.measure:
        raise UserError("keys of 'rib' do not work with 'model.name graft'; set 'rib.attention none' and 'rib.ibb.eta 0'.")
    if graft.token_index < 0 or not 0 <= graft.dropout < 1 or not 0 <= graft.cooldown <= 1 or graft.warmup_steps < 0:
        raise UserError(
            "keys of 'graft': token_index and warmup_steps must not be negative, dropout must lie in [0, 1), cooldown in "
            f"[0, 1]; got {graft.token_index}, {graft.warmup_steps}, {graft.dropout}, {graft.cooldown}."
        )
    weights = graft.finetune
    if min(weights.ce, weights.triplet, weights.center) < 0 or weights.ce + weights.triplet + weights.center == 0:
        raise UserError("weights of 'graft.finetune' must not be negative, and one of ce, triplet, center must be above 0.")
    if graft.sampling == "pk" and cfg.sampler.train_sampler != "RandomIdentitySampler":
        raise UserError("'graft.sampling pk' needs 'sampler.train_sampler RandomIdentitySampler'.")
    if graft.sampling == "triplets" and cfg.train.batch_size % 3:
        raise UserError(
            f"'graft.sampling triplets' makes batches of triplets; 'train.batch_size {cfg.train.batch_size}' counts their "
            "images and must be a multiple of 3."
        )
