"""Configuration: torchreid's own keys, the plug-in's keys, and merging that names what is wrong.

torchreid ships its yacs defaults only inside the scripts of its repository, so the host's keys and default values are
declared here (:func:`host_defaults`) and any torchreid YAML file runs unchanged. :func:`add_plugin_config` adds the
plug-in's own, and every method (:mod:`relreid_plugin.methods`) adds its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode as CN

from ..methods import methods
from .merging import _flat, merge_from_file, merge_from_list
from .targets import pair_targets
from .validation import validate

__all__ = [
    "_flat",
    "add_plugin_config",
    "get_default_config",
    "host_defaults",
    "load_config",
    "merge_from_file",
    "merge_from_list",
    "validate",
]


def host_defaults() -> CN:
    """Return torchreid's keys with torchreid's default values (torchreid 1.4.0, ``scripts/default_config.py``)."""
    cfg = CN()
    cfg.use_gpu = True  # use CUDA when there is any

    cfg.model = CN()
    cfg.model.name = "resnet50"  # a name in the host's model factory, the plug-in's models included
    cfg.model.pretrained = True  # ImageNet weights where the model has any
    cfg.model.load_weights = ""  # local file with weights to start from (torch, safetensors); all of them must fit
    cfg.model.partial_weights = False  # take what fits of any weight file, and say what does not
    cfg.model.resume = ""  # checkpoint of the host or of this plug-in to go on from

    cfg.data = CN()
    cfg.data.type = "image"  # image | video | features (plug-in: files of given features; see docs/howto/features.md)
    cfg.data.root = "reid-data"  # folder that holds the data sets
    cfg.data.sources = ["market1501"]  # training sets: registered names, folders or CSV files
    cfg.data.targets = ["market1501"]  # test sets
    cfg.data.workers = 4  # loader processes; with random transforms another number draws, and so trains, differently
    cfg.data.split_id = 0  # which split, for data sets with several
    cfg.data.height = 256  # image height, pixels
    cfg.data.width = 128  # image width, pixels
    cfg.data.combineall = False  # train on train + query + gallery
    cfg.data.transforms = ["random_flip"]  # training augmentation, see host and plug-in transforms
    cfg.data.k_tfm = 1  # augmented copies of an image per sample; the engines take 1
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
    cfg.train.start_epoch = 0  # stage 1: epochs taken for trained (model.load_weights); a checkpoint's own count goes before
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
    cfg.test.visrank = False  # draw every query's ranked list into visrank_<target>, after training or with --eval-only
    cfg.test.visrank_topk = 10  # gallery images of a list
    return cfg


def add_plugin_config(cfg: CN) -> None:
    """Add the plug-in's keys, with defaults that leave a torchreid configuration's meaning as it is."""
    # --- data -------------------------------------------------------------------------------------------------------
    cfg.data.download = False  # let the host try to download a data set that is missing
    cfg.data.sample_seeds = False  # every sample draws its augmentation from a seed of its own; on with several processes
    cfg.data.check_leakage = "content"  # files in training and testing: none | path (the same file) | content (also copies)
    cfg.data.name_pattern = ""  # how your own files are named; "": ID_cC_…; market | duke | msmt17 | veri | vehicleid |
    # camera-first | a regular expression with (?P<identity>…) and (?P<camera>…), from the beginning of the name
    cfg.data.split_rule = ""  # what has no splits: image (each asks for all others) | identity | camera | time
    cfg.data.check_images = "header"  # none | header (open every file, look for its end) | full (decode every file)
    cfg.data.pixel_range = []  # files of more than 8 bits: [low, high], what becomes black and white; []: such are refused

    # --- training ---------------------------------------------------------------------------------------------------
    cfg.train.stages = [1]  # 1: the network; further ones are those of the methods that the configuration names, in order
    cfg.train.val_fraction = 0.0  # share of the training identities held out to choose epochs and settings by
    cfg.train.val_fold = 0  # which of these shares is held out, counted from 0: with 1/k, k runs hold out everybody in turn
    cfg.train.warmup_epochs = 0  # linear learning-rate warm-up, epochs
    cfg.train.warmup_factor = 0.01  # learning-rate factor at the first epoch of the warm-up
    cfg.train.precision = "float32"  # of the network in training: float32 | bfloat16 | float16 (with a loss scale), whose
    # losses stay float32 | float64 (of losses and optimiser, too)
    cfg.train.accumulate = 1  # batches of an update, whose gradients are averaged
    cfg.train.clip_norm = 0.0  # largest norm of all gradients together; 0: any
    cfg.train.ema = 0.0  # decay per update of averaged weights, which are then validated, tested and exported; 0: none
    cfg.train.compile = False  # torch.compile the network's pass in training
    cfg.train.channels_last = False  # memory format of convolutions, in training and testing
    cfg.train.checkpointing = False  # transformer blocks recompute activations in the backward pass: less memory, more time
    cfg.train.loggers = ["tensorboard"]  # where a training's values go: csv | tensorboard | mlflow | wandb (offline)
    cfg.train.checkpoint_freq = 1  # epochs between checkpoints (the last epoch always writes one)

    # --- image models of the plug-in (model.name bnneck_baseline, and those of the methods) -------------------------------
    cfg.backbone = CN()
    cfg.backbone.name = "torchvision:resnet50"  # host:NAME | torchvision:NAME | timm:NAME | file:PATH
    cfg.backbone.output_stride = 16  # 16: last stage dilated instead of strided; 0: the architecture's own stride
    cfg.backbone.weights = ""  # local file of pretrained backbone weights, where the network cannot be reached
    cfg.head = CN()
    cfg.head.feature_dim = 512  # width of the embedding after the pooled feature; 0: no such layer
    cfg.head.neck_feature = "after"  # test feature before or after the BNNeck: after | before (TransReID)

    # --- vision transformers (the network itself: backbone.name timm:NAME) ------------------------------------------------
    cfg.vit = CN()
    cfg.vit.patch_size = 0  # pixels; 0: the network's own
    cfg.vit.depth = 0  # blocks; 0: the network's own
    cfg.vit.drop_path = 0.1  # stochastic depth, rate of the last block
    # --- several images per sample ------------------------------------------------------------------------------------
    cfg.multimodal = CN()
    cfg.multimodal.modalities = ["R", "N", "T"]  # trained on: a selection of the data set's modalities, 1 to 4
    cfg.multimodal.test = []  # tested with, one row each, such as ['R+N+T','R+N','R']; []: what was trained on
    cfg.multimodal.missing = (
        "refuse"  # a sample that lacks a picture, extracted: refuse | skip | without (tested without it)
    )
    cfg.multimodal.mean = [[0.485, 0.456, 0.406]]  # per modality in the order of modalities, or one for all; 3 or 1 numbers
    cfg.multimodal.std = [[0.229, 0.224, 0.225]]  # tools/modality_stats.py measures both
    cfg.multimodal.pixel_range = []  # files of more than 8 bits: [low, high] (or []) per modality, such as [[],[],[0,65535]]
    # --- composite loss (loss.name: composite) ------------------------------------------------------------------------
    cfg.loss.composite = CN()
    cfg.loss.composite.ce = 1.0  # weight of the cross-entropy (label smoothing: loss.softmax.label_smooth)
    cfg.loss.composite.smoothing = 0.1  # its label smoothing, where loss.softmax.label_smooth is on
    cfg.loss.composite.triplet = 0.0  # weight of the batch-hard triplet loss (margin: loss.triplet.margin)
    cfg.loss.composite.center = 0.0005  # weight of the center loss
    cfg.loss.composite.center_lr = 0.5  # SGD learning rate of the class centers

    # --- rivals on the same features ----------------------------------------------------------------------------------
    cfg.test.rivals = ["aqe", "rerank"]  # rows beside the model: aqe | aqe-alpha | rerank (k-reciprocal) | gnn | gcr |
    # cajaccard | nfc | diffusion (relreid_plugin.metrics.rivals); with test.rerank True aqe and aqe-alpha alone
    cfg.test.verification = False  # also EER and true-match rates at false-match rates, with intervals, and plots/roc.png
    cfg.test.rival_protocol = "published"  # published | inductive | transductive, for gnn, gcr, nfc and diffusion
    cfg.test.aqe = CN()
    cfg.test.aqe.k = 5  # neighbours averaged into a query and into a gallery feature
    cfg.test.aqe.alpha = 0.0  # weight of a neighbour: similarity ** alpha
    cfg.test.kreciprocal = CN()
    cfg.test.kreciprocal.k1 = 20
    cfg.test.kreciprocal.k2 = 6
    cfg.test.kreciprocal.lambda_value = 0.3
    cfg.test.aqe_alpha = CN()  # alpha query expansion (Radenović et al., TPAMI 2018)
    cfg.test.aqe_alpha.k = 10
    cfg.test.aqe_alpha.alpha = 3.0
    cfg.test.gnn = CN()  # GNN re-ranking (Zhang et al., 2020)
    cfg.test.gnn.k1 = 26  # neighbours of the adjacency matrix
    cfg.test.gnn.k2 = 7  # neighbours summed by a layer
    cfg.test.gnn.alpha = 2.0  # weight of a neighbour: similarity ** alpha
    cfg.test.gnn.layers = 2
    cfg.test.gnn.lambda_value = 0.0  # share of the features' own cosine
    cfg.test.gcr = CN()  # graph convolution re-ranking (Zhang et al., TMM 2023)
    cfg.test.gcr.k1 = 15  # neighbours among all images
    cfg.test.gcr.k2 = 3  # neighbours among other cameras' images
    cfg.test.gcr.beta1 = 0.2  # temperatures of the two
    cfg.test.gcr.beta2 = 0.2
    cfg.test.gcr.scale = 0.3  # share of other cameras' images
    cfg.test.gcr.rounds = 3
    cfg.test.cajaccard = CN()  # camera-aware Jaccard distance (Chen et al., CVPR 2024)
    cfg.test.cajaccard.k1_intra = 5  # reciprocal neighbours of the same camera, and of others
    cfg.test.cajaccard.k1_inter = 20
    cfg.test.cajaccard.k2_intra = 3  # neighbours averaged over, of the same camera and of others
    cfg.test.cajaccard.k2_inter = 3
    cfg.test.cajaccard.lambda_value = 0.3
    cfg.test.nfc = CN()  # neighbour feature centralisation (Yuan et al., CVPR 2025)
    cfg.test.nfc.k1 = 2
    cfg.test.nfc.k2 = 2
    cfg.test.diffusion = CN()  # diffusion on the graph (Iscen et al., CVPR 2017)
    cfg.test.diffusion.k = 50  # mutual neighbours in the graph
    cfg.test.diffusion.k_query = 10  # neighbours that a query starts from
    cfg.test.diffusion.alpha = 0.99  # how far it spreads
    cfg.test.diffusion.gamma = 3.0  # weight of an edge: similarity ** gamma
    cfg.test.diffusion.iterations = 20  # most steps of conjugate gradients
    cfg.test.diffusion.tolerance = 1e-6  # residual at which they stop
    cfg.test.diffusion.truncate = 0  # keep so many images nearest to a query; 0: all


def get_default_config() -> CN:
    """Return all keys, the host's and the plug-in's, with their defaults."""
    cfg = host_defaults()
    add_plugin_config(cfg)
    for method in methods():
        method.add_config(cfg)
    return cfg


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CN:
    """Return the validated configuration of a YAML file and ``KEY VALUE …`` over it.

    Raises:
        UserError: As :func:`~relreid_plugin.config.merging.merge_from_file`,
            :func:`~relreid_plugin.config.merging.merge_from_list` and :func:`~relreid_plugin.config.validation.validate`.
    """
    cfg = get_default_config()
    merge_from_file(cfg, path)
    merge_from_list(cfg, list(overrides))
    validate(cfg)
    pair_targets(cfg)
    return cfg
