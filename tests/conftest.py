"""Fixtures: a tiny rendered data set, a tiny configuration, and the training command in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # workers share the cores
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # before the libraries are loaded, and for the commands that tests start

import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))

TINY = {
    "model": {"name": "bnneck_baseline", "pretrained": False},
    "backbone": {"name": "timm:test_resnet", "output_stride": 0},
    "head": {"feature_dim": 32},
    "data": {
        "sources": ["embedded_persons_tiny"],
        "targets": ["embedded_persons_tiny"],
        "height": 64,
        "width": 32,
        "transforms": ["random_flip", "pad_crop", "random_erase"],
        "workers": 0,
    },
    "sampler": {"train_sampler": "RandomIdentitySampler", "num_instances": 4},
    "loss": {"name": "composite", "composite": {"triplet": 1.0}},
    "train": {
        "stages": [1, 2],
        "max_epoch": 2,
        "batch_size": 16,
        "val_fraction": 0.25,
        "lr": 0.001,
        "warmup_epochs": 1,
        "lr_scheduler": "cosine",
    },
    "test": {"dist_metric": "cosine", "eval_freq": 1},
    "relation": {
        "attention": "magformer",
        "num_layers": 2,
        "k": 5,
        "bank": {"refresh": 0},
        "train": {"max_epoch": 2, "features_per_step": 32, "steps_per_epoch": 3, "eval_freq": 1},
    },
}


MARKET = "Market-1501-v15.09.15"

LONGEST = "rib distributed package docs methods without_host milvus train_net resume_keys resume".split()
"""Files that a worker shall not begin when the others have nothing left to do (``--no-loadscope-reorder``)."""


def pytest_configure():
    torch.set_num_threads(THREADS)
    if hasattr(signal, "SIGHUP"):  # which nohup ignores, here and in every command that tests start
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@pytest.fixture(autouse=True)
def _threads_and_precision_are_left_alone():
    """The last digits depend on them, and other tests compare those."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


@pytest.fixture
def one_thread():
    """Small tensors are not worth more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """A data root with the tiny embedded persons."""
    from relreid_plugin.data.embedded import ensure_embedded

    root = tmp_path_factory.mktemp("data")
    ensure_embedded("embedded_persons_tiny", root, verbose=False)
    return root


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, tiny_root):
    """The file of the tiny configuration."""
    config = json.loads(json.dumps(TINY))
    config["data"]["root"] = str(tiny_root)
    path = tmp_path_factory.mktemp("config") / "tiny.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_config):
    """A finished run of both stages; tests copy it before they change it."""
    from relreid_plugin.cli.train import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["--config-file", str(tiny_config), "data.save_dir", str(folder)]) == 0
    return folder


LOOKING = [
    *("model.name", "bnneck_baseline", "backbone.name", "timm:test_resnet", "head.feature_dim", 8),
    *("data.height", 64, "data.width", 32, "test.dist_metric", "cosine", "test.rivals", "[]", "train.max_epoch", 1),
]


@pytest.fixture(scope="session")
def looking_runs(tmp_path_factory):
    """The pictures, a run with RIB's bound and one without."""
    wiring = pytest.importorskip("wiring")
    place = tmp_path_factory.mktemp("looking")
    data = wiring.write_pictures(place / "data")
    runs = place / "bound", place / "plain"
    for folder, eta in zip(runs, (1, 0)):
        wiring.execute(wiring.toy_config(data, folder, *LOOKING, "rib.ibb.eta", eta))
    return data, *runs


@pytest.fixture(scope="session")
def vehicle_run(tmp_path_factory):
    """A run of three modalities that was tested with some of them missing, too."""
    wiring = pytest.importorskip("wiring")
    place = tmp_path_factory.mktemp("vehicles")
    keys = ["multimodal.test", ["R+N+T", "R", "N+T"], "test.dist_metric", "cosine", "test.rivals", ["aqe"]]
    wiring.execute(wiring.graft_config(wiring.write_vehicles(place / "data"), place / "run", *keys))
    return place / "run"


@pytest.fixture(scope="session")
def reported_runs(tmp_path_factory):
    """Two runs that differ in a key, and their report."""
    from reported import write_run

    from relreid_plugin.cli.main import main

    place = tmp_path_factory.mktemp("report")
    first, second = write_run(place / "first", verification=True), write_run(place / "second", lr=0.02, noise=5)
    out = place / "report.html"
    assert main(["report", str(first), str(second), "--out", str(out)]) == 0
    return first, second, out


@pytest.fixture
def command(capsys):
    """Run the training command in this process: (exit code, standard output, standard error)."""
    from relreid_plugin.cli.train import main

    def run(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def comparable(folder):
    """A run's metrics without times."""
    metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    for row in metrics["rows"]:
        row.pop("seconds")
    return metrics


def without_cameras(folder):
    """Take the cameras out of the names of a folder's pictures, and leave out those of nobody."""
    for path in sorted(folder.rglob("*.jpg")):
        identity, rest = path.name.split("_", 1)
        if identity == "-1":
            path.unlink()
        else:
            path.rename(path.with_name(f"{identity}_{rest.replace('c', 'k')}"))


def copy_data(tiny_root, target):
    """The tiny embedded persons as a folder of one's own."""
    shutil.copytree(tiny_root / "embedded_persons_tiny" / MARKET, target)
    return target
