"""Whole runs on a GPU: equal to the processor's, in every precision, and by two processes with NCCL. ``pytest -m cuda``.

Pieces on a card are compared in ``test_devices.py``, which also runs them on a card that is only pretended.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

from relreid_plugin.features import Features, write

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]


def train(config, folder, *words, processes=1):
    """Run the training command in a process of its own; what its metrics say."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "relreid_plugin", "train", "--config-file", str(config)]
    options = [*map(str, words), "data.save_dir", str(folder)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A configuration of two stages on given features."""
    place, draw = tmp_path_factory.mktemp("cuda"), np.random.default_rng(0)
    for name, identities, images, first in (("train", 12, 6, 0), ("query", 8, 2, 100), ("gallery", 8, 4, 100)):
        pids = np.repeat(np.arange(identities), images)
        rows = np.random.default_rng(first).normal(size=(identities, 16))[pids] + draw.normal(size=(len(pids), 16))
        write(Features.of(rows, pids + first, np.tile(np.arange(images) % 3, identities)), place / f"{name}.npz")
    data = {"type": "features", "workers": 0, "root": str(place), "sources": ["train.npz"]}
    relation = {"attention": "magformer", "num_layers": 2, "k": 4, "bank": {"refresh": 0}}
    values = {
        "model": {"name": "bnneck_baseline"},
        "head": {"feature_dim": 0},
        "data": {**data, "targets": ["query.npz", "gallery.npz"]},
        "sampler": {"train_sampler": "RandomIdentitySampler"},
        "loss": {"name": "composite", "composite": {"triplet": 1.0}},
        "train": {"stages": [1, 2], "max_epoch": 2, "batch_size": 16, "lr": 0.001, "val_fraction": 0.3, "loggers": []},
        "test": {"dist_metric": "cosine", "eval_freq": 1},
        "relation": {**relation, "dropout": 0.0, "train": {"max_epoch": 2, "features_per_step": 32, "steps_per_epoch": 3}},
    }
    (place / "config.yml").write_text(yaml.safe_dump(values))
    return place / "config.yml"


def losses(metrics):
    return [
        record[name] for stage in ("stage1", "stage2") for record in metrics["history"][stage] for name in ("ce", "triplet")
    ]


def test_a_run_on_a_card_is_the_processors(given, tmp_path):
    card = train(given, tmp_path / "card", "use_gpu", True)
    processor = train(given, tmp_path / "processor", "use_gpu", False)
    np.testing.assert_allclose(losses(card), losses(processor), rtol=1e-2)
    assert [row["method"] for row in card["rows"]] == [row["method"] for row in processor["rows"]]
    for mine, theirs in zip(card["rows"], processor["rows"]):
        assert mine["mAP"] == pytest.approx(theirs["mAP"], abs=0.05), mine["method"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_on_a_card(given, tmp_path, precision):
    whole = train(given, tmp_path / "float32")
    half = train(given, tmp_path / precision, "train.precision", precision, "relation.precision", "bfloat16")
    np.testing.assert_allclose(losses(half), losses(whole), rtol=0.1)


@pytest.mark.parametrize("switch", ["train.channels_last", "train.compile"])
def test_images_on_a_card(tiny_config, tmp_path, switch):
    words = ["train.max_epoch", 1, "relation.train.max_epoch", 1, "data.workers", 2]
    card = train(tiny_config, tmp_path / "run", *words, switch, True)
    again = train(tiny_config, tmp_path / "run", "--eval-only", *words, switch, True, "use_gpu", False)
    for mine, theirs in zip(card["rows"], again["rows"]):
        assert mine["mAP"] == pytest.approx(theirs["mAP"], abs=0.01), mine["method"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_by_nccl_are_one(given, tmp_path):
    one = train(given, tmp_path / "one", "data.sample_seeds", True)
    two = train(given, tmp_path / "two", "data.sample_seeds", True, processes=2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-3)
