"""One command averages the splits of a data set."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from relreid_plugin.cli import train as cli
from relreid_plugin.engine.runner import read_metrics
from relreid_plugin.errors import UserError
from relreid_plugin.experiments import splits as module

CONFIG = """
model: {name: bnneck_baseline, pretrained: False}
backbone: {name: "torchvision:shufflenet_v2_x0_5", output_stride: 0}
head: {feature_dim: 8}
loss: {name: composite}
data: {sources: [viper], targets: [viper], height: 32, width: 16, workers: 0, transforms: []}
train: {max_epoch: 1, batch_size: 8}
test: {ranks: [1, 5], rivals: []}
"""


@pytest.fixture
def viper(tmp_path):
    """A miniature of VIPeR: eight identities under two cameras."""
    rng = np.random.default_rng(0)
    for camera in ("cam_a", "cam_b"):
        folder = tmp_path / "data" / "viper" / "VIPeR" / camera
        folder.mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03d}_{45 * (camera == 'cam_b')}.bmp")
    config = tmp_path / "viper.yml"
    config.write_text(CONFIG + "  \n", encoding="utf-8")
    return SimpleNamespace(config=str(config), root=str(tmp_path / "data"), out=tmp_path / "out")


def test_splits_are_averaged_and_those_with_one_training_set_share_a_model(viper, capsys, monkeypatch):
    trained = []

    def in_this_process(parts, *, jobs, options=("--resume",)):
        left = [part for part in parts if not (part.folder / "metrics.json").is_file()]
        trained.append([part.folder.name for part in left])
        for part in left:
            part.folder.parent.mkdir(parents=True, exist_ok=True)
            part.folder.with_suffix(".yml").write_text(part.cfg.dump(), encoding="utf-8")
            assert cli.main(["--config-file", str(part.folder.with_suffix(".yml")), *options]) == 0

    monkeypatch.setattr(module, "train", in_this_process)
    spec = importlib.util.spec_from_file_location("tool_splits", ROOT / "tools" / "splits.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    command = [
        "--config-file",
        viper.config,
        "--splits",
        "0,1,2",
        "--out",
        str(viper.out),
        "--opts",
        "data.root",
        viper.root,
    ]
    assert tool.main(command) == 0, capsys.readouterr().err
    assert trained == [["split00", "split02"], ["split01"]]
    folders = [viper.out / f"split{number:02d}" for number in range(3)]
    scores = [100 * read_metrics(folder)["rows"][0]["mAP"] for folder in folders]
    weights = [(folder / "stage1" / "last.pth.tar").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    printed = capsys.readouterr().out
    cell = f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
    assert f"| image model | {cell} |" in printed and "over 3 splits" in printed
    record = json.loads((viper.out / "splits.json").read_text())
    assert record["splits"] == [0, 1, 2] and [100 * value for value in record["rows"][0]["mAP"]] == pytest.approx(scores)
    assert cell in (viper.out / "splits.md").read_text()
    # a second call trains nothing, and another configuration is not mixed in
    times = [(folder / "metrics.json").stat().st_mtime_ns for folder in folders]
    assert tool.main(command) == 0 and trained[2:] == [[], []]
    assert times == [(folder / "metrics.json").stat().st_mtime_ns for folder in folders]
    assert tool.main([*command, "train.lr", "0.5"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert tool.main([*command, "data.split_id", "3"]) == 2 and "is set by --splits" in capsys.readouterr().err


def test_the_number_of_splits_is_the_data_sets(viper, tmp_path):
    cfg = module.load_config(viper.config, ["data.root", viper.root])
    assert module.count_splits(cfg, tmp_path / "cache") == 20
    cfg = module.load_config(viper.config, ["data.sources", "['embedded_persons_tiny']", "data.root", str(tmp_path)])
    cfg.data.targets = ["embedded_persons_tiny"]
    with pytest.raises(UserError, match="one split each"):
        module.count_splits(cfg, tmp_path / "cache")


def test_which_splits():
    assert module.parse_splits("all", 3) == [0, 1, 2] and module.parse_splits("2", 3) == [0, 1]
    assert module.parse_splits("2,0", 3) == [2, 0]
    for wrong in ("4", "0", "0,3", "1,1", "x", "-1", "", "9" * 9, "9" * 30):
        with pytest.raises(UserError, match="--splits"):
            module.parse_splits(wrong, 3)


def test_stages_are_shared_by_links(tmp_path):
    from relreid_plugin.engine.folder import share_stages

    source, target = tmp_path / "a", tmp_path / "b"
    for name in (
        "stage1/last.pth.tar",
        "stage1/best.pth.tar",
        "stage2/last.pth.tar",
        "stage3/last.pth.tar",
        "bank/x.pt",
        "x.md",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (target / "stage1").mkdir(parents=True)
    (target / "stage1" / "last.pth.tar").write_text("of an older run")
    for _ in range(2):
        share_stages(source, target, [1, 3])
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {"stage1/last.pth.tar", "stage1/best.pth.tar", "stage3/last.pth.tar", "bank/x.pt"}
    assert all((target / name).samefile(source / name) for name in found)
