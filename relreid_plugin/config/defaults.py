"""Configuration: torchreid's own keys, the plug-in's keys, and merging that names what is wrong.

torchreid ships its yacs defaults only inside the scripts of its repository, so the host's keys and default values are
declared here (:func:`host_defaults`) and any torchreid YAML file runs unchanged. :func:`add_plugin_config` adds the
plug-in's keys; nothing else in the package declares one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode as CN

from .merging import _flat, merge_from_file, merge_from_list
from .ranges import IMAGE_MODELS, MULTIMODAL_MODELS, PROTOCOLS, RELATION_ATTENTIONS
from .validation import validate

__all__ = [
    "IMAGE_MODELS",
    "MULTIMODAL_MODELS",
    "PROTOCOLS",
    "RELATION_ATTENTIONS",
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
    cfg.data.type = "image"  # image | video
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
    cfg.data.check_leakage = "content"  # files in training and testing: none | path (the same file) | content (also copies)
    cfg.data.name_pattern = ""  # how your own files are named; "": ID_cC_…; market | duke | msmt17 | veri | vehicleid |
    # camera-first | a regular expression with (?P<identity>…) and (?P<camera>…), from the beginning of the name
    cfg.data.check_images = "header"  # none | header (open every file, look for its end) | full (decode every file)
    cfg.data.pixel_range = []  # files of more than 8 bits: [low, high], what becomes black and white; []: such are refused

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
    cfg.multimodal.pixel_range = []  # files of more than 8 bits: [low, high] (or []) per modality, such as [[],[],[0,65535]]
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
    cfg.relation.select.first = 1.0  # standard errors that a change in R1 must reach, where there is one

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
    cfg.test.rivals = ["aqe", "rerank"]  # rows beside the model: aqe | aqe-alpha | rerank (k-reciprocal) | gnn | gcr |
    # cajaccard | nfc | diffusion (relreid_plugin.metrics.rivals); with test.rerank True aqe and aqe-alpha alone
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
    return cfg


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
