"""Packages in the hub's layout: read back here, and their backbones by torchreid, timm and torchvision."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from relreid_plugin.backbones.networks import pooled_output
from relreid_plugin.cli.main import main
from relreid_plugin.engine.runner import open_run
from relreid_plugin.errors import UserError
from relreid_plugin.export import package as packages
from relreid_plugin.export.package import backbone_features, example_images, read_package

NETWORKS = {
    "timm": ["backbone.name", "timm:resnet10t"],
    "torchreid": ["backbone.name", "host:osnet_x0_25", "data.height", "128", "data.width", "64"],
    "timm, a transformer": "model.name vit_baseline backbone.name timm:vit_tiny_patch16_224 vit.depth 1".split(),
}


@pytest.fixture(scope="module")
def packaged(tmp_path_factory, tiny_run):
    out = tmp_path_factory.mktemp("package") / "tiny"
    assert main(["package", str(tiny_run), "--out", str(out), "--licence", "cc-by-4.0", "--title", "Tiny persons"]) == 0
    return out


def card_lines(folder):
    """The last block of the card: the backbone."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)[-1].replace("FOLDER", str(folder)), text


def run_card(folder, images):
    found = {}
    exec(card_lines(folder)[0], found)
    with torch.inference_mode():
        return pooled_output(found["backbone"](images))


def test_the_model_out_of_a_package_is_the_runs(packaged, tiny_run):
    run = open_run(tiny_run, ["use_gpu", "False"])
    images = example_images(run)
    package = read_package(packaged)
    with torch.inference_mode():
        assert torch.equal(package.model(images), run.bare(images))
        assert torch.allclose(run_card(packaged, images), backbone_features(run.bare, images), atol=1e-6)
    assert sorted(path.name for path in packaged.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "relation.safetensors",
    ]  # fmt: skip
    assert package.cfg.data.root == "reid-data" and package.cfg.data.height == 64
    assert set(load_file(packaged / "relation.safetensors")) == set(run.refiner().state_dict())
    text = (packaged / "config.json").read_text(encoding="utf-8")
    assert str(tiny_run) not in text and json.loads(text)["num_features"] == 32
    assert json.loads(text)["input_size"] == [3, 64, 32] and json.loads(text)["mean"] == [0.485, 0.456, 0.406]


def test_the_card_says_what_the_run_says(packaged, tiny_run):
    text = card_lines(packaged)[1]
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "relreid_plugin"
    assert head["datasets"] == ["embedded_persons_tiny"] and "# Tiny persons" in text
    rows = json.loads((tiny_run / "metrics.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert f"| {row['method']} | {100 * row['mAP']:.1f} | {100 * row['cmc']['1']:.1f} |" in text
    assert "with timm (tried when this card was written)" in text


def test_a_package_is_a_weight_file(packaged, tiny_config, tmp_path, command):
    code, out, err = command(
        "--config-file", tiny_config, "data.save_dir", tmp_path / "again", "model.load_weights", packaged,
        "train.stages", "[1]", "train.max_epoch", "0",
    )  # fmt: skip
    assert code == 0, err
    state = torch.load(tmp_path / "again" / "stage1" / "last.pth.tar", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in load_file(packaged / "model.safetensors").items())


@pytest.mark.slow
@pytest.mark.parametrize("library", NETWORKS)
def test_other_libraries_load_the_backbone(library, tmp_path, tiny_config, command):
    run_folder, out = tmp_path / "run", tmp_path / "package"
    code, _, err = command(
        "--config-file", tiny_config, "data.save_dir", run_folder, "train.max_epoch", "0", "train.stages", "[1]",
        "test.rivals", "[]", *NETWORKS[library],
    )  # fmt: skip
    assert code == 0, err
    assert main(["package", str(run_folder), "--out", str(out), "--licence", "mit"]) == 0
    text = card_lines(out)[1]
    assert f"with {library.split(',')[0]} (tried when this card was written)" in text
    run = open_run(run_folder, ["use_gpu", "False"])
    images = example_images(run)
    with torch.inference_mode():
        wanted = backbone_features(run.bare, images)
        assert torch.allclose(run_card(out, images), wanted, atol=1e-5) and float(wanted.std()) > 0


def test_what_is_refused_leaves_nothing(tmp_path, packaged, tiny_run, monkeypatch, capsys):
    words = ["package", str(tiny_run), "--licence", "mit", "--out"]
    assert main([*words, str(packaged)]) == 2 and "is there already" in capsys.readouterr().err
    load = packages.ckpt.load_weights

    def damaged(model, state, *, path):
        load(model, state, path=path)
        if str(path).endswith(".safetensors"):
            with torch.no_grad():
                next(model.parameters()).mul_(1.01)

    monkeypatch.setattr(packages.ckpt, "load_weights", damaged)
    monkeypatch.setattr(packages, "_untrue", lambda *_: "")
    assert main([*words, str(tmp_path / "other")]) == 2
    assert "gives other features" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no package of this plug-in"):
        read_package(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yml").write_text("{}")
    assert main(["package", str(tmp_path / "run"), "--licence", "mit", "--out", str(tmp_path / "x")]) == 2
    assert "was not tested" in capsys.readouterr().err
