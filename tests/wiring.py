"""A toy model on toy pictures: whole runs in a second, and features in which normalising makes a difference."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

import relreid_plugin
from relreid_plugin.config.defaults import get_default_config, load_config, merge_from_list, validate
from relreid_plugin.host import register_model

relreid_plugin.register()

IDENTITIES, TESTED, CAMERAS, SHOTS = 8, 6, 2, 2
SIZE = (16, 8)
"""Height and width of the pictures."""


class Toy(nn.Module):
    """Coarse pixels -> linear embedding -> classifier; test features have their own lengths."""

    feature_dim = 8

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(3 * 4 * 2, self.feature_dim)
        self.classifier = nn.Linear(self.feature_dim, num_classes, bias=False)

    def forward(self, images):
        """(B, 3, h, w) -> in training (logits, features), else features (B, 8)."""
        features = self.embedding(F.adaptive_avg_pool2d(images, (4, 2)).flatten(1))
        return (self.classifier(features), features) if self.training else features


def build_toy(num_classes, loss="triplet", pretrained=True, use_gpu=True, *, cfg=None, num_cameras=0):
    """The toy as a model of the host's factory."""
    model = Toy(num_classes)
    model.asked = {"loss": loss, "pretrained": pretrained, "num_cameras": num_cameras}
    return model


register_model("wiring_toy", build_toy)


def write_pictures(folder: Path, *, identities: int = IDENTITIES, tested: int = TESTED, seed: int = 0) -> Path:
    """A data set in the layout of Market-1501 whose identities are colours under noise."""
    draw = np.random.default_rng(seed)
    for split, first, count in (("bounding_box_train", 1, identities), ("test", 101, tested)):
        for pid in range(first, first + count):
            colour = draw.integers(60, 200, 3)
            for camera in range(1, CAMERAS + 1):
                for shot in range(SHOTS):
                    pixels = colour + draw.normal(0, 45, 3) + draw.normal(0, 40, (*SIZE, 3))
                    part = split if split != "test" else ("query" if shot == 0 else "bounding_box_test")
                    path = folder / part / f"{pid:04d}_c{camera}s1_{shot:06d}_00.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


BASE = {
    "use_gpu": False,
    "model": {"name": "wiring_toy", "pretrained": False},
    "data": {"height": SIZE[0], "width": SIZE[1], "transforms": ["random_flip"], "workers": 0},
    "sampler": {"train_sampler": "RandomIdentitySampler", "num_instances": 2},
    "loss": {"name": "composite", "composite": {"triplet": 1.0}},
    "train": {"stages": [1], "max_epoch": 2, "batch_size": 8, "lr": 0.01, "lr_scheduler": "none"},
    "relation": {
        "num_layers": 1,
        "k": 3,
        "num_landmarks": 2,
        "mlp_ratio": 1.0,
        "train": {"max_epoch": 1, "features_per_step": 12, "steps_per_epoch": 2},
    },
}


def defaults():
    """All keys with their defaults, on the CPU."""
    cfg = get_default_config()
    cfg.use_gpu = False
    return cfg


def settings(*pairs):
    """The defaults with ``KEY VALUE …`` over them."""
    cfg = defaults()
    merge_from_list(cfg, [str(item) for item in pairs])
    validate(cfg)
    return cfg


def keys_of(tree, prefix=""):
    """``KEY, VALUE, …`` of a configuration as a tree."""
    for key, value in tree.items():
        yield from keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else (f"{prefix}{key}", value)


def toy_config(data: Path, folder: Path, *pairs):
    """The configuration of a toy run in ``folder`` with ``KEY VALUE …`` over it."""
    config = copy.deepcopy(BASE)
    config["data"].update(sources=[str(data)], targets=[str(data)], save_dir=str(folder), root=str(folder.parent))
    path = folder.parent / f"{folder.name}.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_config(path, [str(item) for item in pairs])


def naive_scores(distances, query_pids, gallery_pids, query_cams, gallery_cams, ranks=(1, 5, 10, 20)):
    """(mAP, mINP, {rank: CMC}) by a loop over the queries; same identity under the same camera is left out."""
    precisions, inverse, firsts = [], [], []
    for row, pid, camera in zip(np.asarray(distances, dtype=np.float64), query_pids, query_cams):
        order = np.argsort(row, kind="stable")
        order = order[~((gallery_pids[order] == pid) & (gallery_cams[order] == camera))]
        hits = np.flatnonzero(gallery_pids[order] == pid) + 1
        if len(hits):
            precisions.append(np.mean(np.arange(1, len(hits) + 1) / hits))
            inverse.append(len(hits) / hits[-1])
            firsts.append(hits[0])
    return np.mean(precisions), np.mean(inverse), {str(r): np.mean(np.array(firsts) <= r) for r in ranks}


def unit(features):
    """Rows of length 1, in float64."""
    features = torch.as_tensor(features).double()
    return features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)


def seed_all(seed):
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the host draws from the global generator)
    torch.manual_seed(seed)


def execute(cfg, **options):
    """A run without its plots, which take longer than all the rest."""
    from relreid_plugin.engine import curves
    from relreid_plugin.engine.runner import Run

    plot, curves.plot_history = curves.plot_history, lambda *args: None
    try:
        run = Run(cfg, **options)
        return run, run.execute()
    finally:
        curves.plot_history = plot


def saved(folder, stage, name="last"):
    """A checkpoint of a run."""
    return torch.load(Path(folder) / f"stage{stage}" / f"{name}.pth.tar", weights_only=True)


def assert_same_weights(found, wanted, *, tolerance=2e-5):
    """Two state dicts with the same names and, but for rounding, the same values.

    The bias of attention's keys has no gradient but rounding, which Adam makes large: it is compared only where the
    tolerance is 0.
    """
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if tolerance and name.endswith(("in_proj_bias", "qkv.bias")):
            continue
        assert torch.allclose(found[name].double(), value.double(), atol=tolerance, rtol=1e-4), name


MODALITIES = ("R", "N", "T")


def write_vehicles(root: Path, *, identities: int = 4, tested: int = 4, seed: int = 0) -> Path:
    """A data set in the layout of RGBNT100 under ``root``: strips of three views whose identities are grey values."""
    draw = np.random.default_rng(seed)
    for split, first, count in (("bounding_box_train", 1, identities), ("test", 101, tested)):
        for pid in range(first, first + count):
            colours = draw.integers(60, 200, (3, 3))
            for camera in (1, 2):
                for shot in range(2):
                    views = [colour + draw.normal(0, 45, 3) + draw.normal(0, 40, (16, 32, 3)) for colour in colours]
                    part = split if split != "test" else ("query" if shot == 0 else "bounding_box_test")
                    path = root / "RGBNT100" / "rgbir" / part / f"{pid:04d}_c{camera}_{shot:06d}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(np.concatenate(views, axis=1).clip(0, 255).astype(np.uint8)).save(path)
    return root


GRAFT = {
    "use_gpu": False,
    "model": {"name": "graft", "pretrained": False},
    "backbone": {"name": "timm:test_vit"},
    "vit": {"patch_size": 16, "depth": 1, "drop_path": 0.0},
    "data": {"sources": ["rgbnt100"], "targets": ["rgbnt100"], "height": 16, "width": 32, "transforms": [], "workers": 0},
    "multimodal": {"mean": [[0.5]], "std": [[0.25]]},
    "graft": {"heads": 2, "feedforward": 16, "positives": 1, "finetune": {"max_epoch": 1, "lr": 0.001}},
    "loss": {"name": "composite", "composite": {"triplet": 1.0}},
    "train": {"stages": [1, 2], "max_epoch": 1, "batch_size": 12, "lr": 0.001, "optim": "adamw", "lr_scheduler": "none"},
}


def graft_config(root: Path, folder: Path, *pairs):
    """The configuration of a small run of GraFT in ``folder`` with ``KEY VALUE …`` over it."""
    config = copy.deepcopy(GRAFT)
    config["data"].update(save_dir=str(folder), root=str(root))
    path = folder.parent / f"{folder.name}.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_config(path, [str(item) for item in pairs])


def cross_entropy(logits, labels, smoothing):
    """Label smoothing as a mixture of the true class and all classes."""
    logs = logits - logits.exp().sum(dim=1, keepdim=True).log()
    own = logs[torch.arange(len(labels)), labels]
    return -((1 - smoothing) * own + smoothing * logs.mean(dim=1)).mean()


def centred(features, labels, centers):
    """Half the mean squared distance to the class centers."""
    return 0.5 * (features - centers[labels]).square().sum(dim=1).mean()


class Decayed:
    """AdamW by its formulas, without torch's own class.

    Args:
        parameters: What it trains.
        betas: Of the two moments.
        weight_decay: Decoupled, times the learning rate.
    """

    def __init__(self, parameters, betas, weight_decay):
        self.parameters, self.betas, self.weight_decay = list(parameters), betas, weight_decay
        self.first = [torch.zeros_like(value) for value in self.parameters]
        self.second = [torch.zeros_like(value) for value in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients, lr):
        """One step with a learning rate of its own."""
        self.steps += 1
        (one, two), t = self.betas, self.steps
        for value, gradient, first, second in zip(self.parameters, gradients, self.first, self.second):
            value.mul_(1 - lr * self.weight_decay)
            first.mul_(one).add_((1 - one) * gradient)
            second.mul_(two).add_((1 - two) * gradient.square())
            value.sub_(lr * (first / (1 - one**t)) / ((second / (1 - two**t)).sqrt() + 1e-8))


def toy_checkpoint(path, *, kind="image", epoch=1, cfg=None, weights=None, history=(), **static):
    """A checkpoint that holds what is named, and no more."""
    from relreid_plugin.engine import checkpoint

    state = {"kind": kind, "epoch": epoch, "max_epoch": 3, "state_dict": weights or {}, "history": list(history), **static}
    checkpoint.save(Path(path), {**state, "config": "" if cfg is None else cfg.dump()})


def note_moves(monkeypatch):
    """What is moved to the GPU, though there is none: it stays, and is noted with its options."""
    noted = []

    def move(self, *values, **options):
        noted.append((self, options))
        return self

    monkeypatch.setattr(torch.Tensor, "cuda", move)
    monkeypatch.setattr(nn.Module, "cuda", move)
    return noted


def bare_manager(**more):
    """What the host's engine reads of a data manager."""
    parts = {"num_train_pids": 5, "train_loader": [], "test_loader": {}, "val_query": [], "use_gpu": False}
    return SimpleNamespace(**{**parts, "sources": ["a"], "targets": ["a"], "data_type": "image", **more})
