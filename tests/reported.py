"""Runs as the engine writes them, without training, and what a browser reads of a page."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import torch
from PIL import Image

from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.evaluator import Evaluator
from relreid_plugin.engine.scoring import EvaluationOptions
from relreid_plugin.features.banks import bank_features
from relreid_plugin.features.sets import TestFeatures

HOSTILE = "<script>alert('x')</script> & \"_q_\" </script>"
QUERIES, GALLERY, WIDTH = 12, 40, 8


def features_of(seed: int, folder):
    """Query and gallery as a run keeps them: three cameras, six identities, pictures for the half of them."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(6, WIDTH))
    out = {}
    for name, count, shift in (("query", QUERIES, 0), ("gallery", GALLERY, 1)):
        pids = np.arange(count) % 6
        cameras = (np.arange(count) // 6 + shift) % 3
        values = centres[pids] + 1.2 * rng.normal(size=(count, WIDTH))
        paths = [str(folder / f"{name}{row}.png") for row in range(count)]
        out[name] = {
            "key": "k",
            "features": torch.tensor(values, dtype=torch.float32),
            "pids": torch.from_numpy(pids),
            "camids": torch.from_numpy(cameras),
            "paths": paths,
            "identity_names": {3: HOSTILE},
        }
    return out


def write_run(folder, *, seed=1, lr=0.01, name="odd", noise=None, verification=False):
    """A finished run of an image model, as the engine writes it, with rivals and training records."""
    pictures = folder.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    sides = features_of(seed if noise is None else noise, pictures)
    for side in sides.values():
        for row, path in enumerate(side["paths"]):
            if row % 2 == 0:
                noise_of = np.random.default_rng(row).integers(0, 255, (96, 48, 3), np.uint8)
                Image.fromarray(noise_of).save(path)
    cfg = get_default_config()
    cfg.data.sources, cfg.data.targets, cfg.train.seed, cfg.train.lr = ["market1501"], [name], seed, lr
    cfg.data.save_dir, cfg.test.dist_metric = str(folder), "cosine"
    cfg.test.rivals, cfg.test.verification = ["aqe", "rerank"], verification
    ckpt.write_text(folder / "config.yml", cfg.dump())
    data = TestFeatures(bank_features(sides["query"]), bank_features(sides["gallery"]))
    evaluator = Evaluator(name, data, options=EvaluationOptions.of(cfg), parameters=1234)
    rows = [evaluator.baseline(), *evaluator.rivals()]
    for split, value in sides.items():
        ckpt.write_tensors(folder / "bank" / f"{name}-{split}.pt", value)
    history = {"stage1": [{"epoch": n, "lr": 0.1, "loss": 2.0 / n, "val_mAP": 0.3 + n / 10} for n in (1, 2, 3)]}
    metrics = {"rows": [row.as_dict() for row in rows], "history": history, "selected_epoch": {"stage1": 3}}
    ckpt.write_json(folder / "metrics.json", {**metrics, "notes": [f"a note {HOSTILE}"]})
    ckpt.write_json(folder / "environment.json", {"python": "3.11", "packages": {"torch": HOSTILE}})
    return folder


class Page(HTMLParser):
    """What a browser would read: cells by row, attributes, text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.cells, self.links, self.tags, self.scripts, self._open = {}, [], [], [], [], []
        self._row = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        own = dict(attrs)
        self.tags.append((tag, own))
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
        if tag == "tr":
            self._row = (own.get("data-target"), own.get("data-protocol"), own.get("data-method"))
        if "data-metric" in own:
            self._cell = (own, [])
            self.cells.append(self._cell)
            if tag == "td":
                self.rows.setdefault(self._row, {})[own["data-metric"]] = self._cell
        self._open.append(tag)

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self.cells:
            self.cells[-1][1].append(data)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._open.pop()
