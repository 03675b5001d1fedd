"""Weight files and damaged files in whole runs: one sentence before anything is trained, or said and right."""

from __future__ import annotations

import shutil

import pytest
import torch
import torchvision
from conftest import comparable
from safetensors.torch import save_file

from relreid_plugin.config.defaults import load_config
from relreid_plugin.magformer.stage import build_encoder


def flip(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("key", ["model.load_weights", "model.resume", "backbone.weights", "relation.load_weights"])
@pytest.mark.parametrize("kind", ["html", "foreign", "half"])
def test_a_file_that_does_not_fit_is_refused_before_training(tiny_run, tiny_config, tmp_path, command, key, kind):
    path, folder = tmp_path / "w.pth", tmp_path / "run"
    stage = 2 if key.startswith("relation") else 1
    state = torch.load(tiny_run / f"stage{stage}" / "last.pth.tar", weights_only=True)["state_dict"]
    if kind == "html":
        path.write_text("<html></html>")
    elif kind == "foreign":
        torch.save(torchvision.models.squeezenet1_0().state_dict(), path)
    else:
        torch.save(dict(list(state.items())[: len(state) // 2]), path)
    code, _, err = command("--config-file", tiny_config, "data.save_dir", folder, key, path)
    words = {"html": "web page", "foreign": "another", "half": "missing there"}
    assert code == 2 and err.count("\n") == 1 and f"{key}: '{path}'" in err and words[kind] in err, err
    assert not folder.exists()


def test_partial_weights_and_safetensors_of_every_key(tiny_run, tiny_config, tmp_path, command):
    first = torch.load(tiny_run / "stage1" / "best.pth.tar", weights_only=True)["state_dict"]
    second = torch.load(tiny_run / "stage2" / "last.pth.tar", weights_only=True)["state_dict"]
    del second["neck.bn.running_mean"]
    save_file(first, tmp_path / "first.safetensors")
    save_file({name: value.contiguous() for name, value in second.items()}, tmp_path / "second.safetensors")
    args = ["--config-file", tiny_config, "train.max_epoch", "0", "relation.train.max_epoch", "0"]
    args += ["relation.train.eval_freq", "-1", "test.rivals", "[]", "data.save_dir", tmp_path / "run"]
    args += ["model.load_weights", tmp_path / "first.safetensors", "backbone.weights", tmp_path / "first.safetensors"]
    args += ["relation.load_weights", tmp_path / "second.safetensors"]
    code, _, err = command(*args)
    assert code == 2 and "1 missing there ('neck.bn.running_mean')" in err
    code, out, err = command(*args, "model.partial_weights", "True")
    assert code == 0, err
    assert "PARTIAL: 1 missing there ('neck.bn.running_mean')" in out and "without 'backbone.body.'" in out
    stored = torch.load(tmp_path / "run" / "stage1" / "last.pth.tar", weights_only=True)["state_dict"]
    assert all(torch.equal(stored[name], value) for name, value in first.items())
    trained = torch.load(tmp_path / "run" / "stage2" / "last.pth.tar", weights_only=True)["state_dict"]
    assert all(torch.equal(trained[name], value) for name, value in second.items())
    (tmp_path / "first.safetensors").rename(tmp_path / "moved")  # a run's own checkpoint has the backbone
    args = ["--config-file", tmp_path / "run" / "config.yml", "--eval-only", "model.load_weights", tmp_path / "moved"]
    code, out, err = command(*args)
    assert code == 0 and "the run's own, not those of 'model.load_weights'" in out, err


def test_a_rung_of_the_ladder_is_not_another(tiny_run, tiny_config, tmp_path, command):
    cfg = load_config(tiny_config, ["relation.attention", "nformer"])
    torch.save(build_encoder(cfg, dim=32, num_classes=6).state_dict(), tmp_path / "nformer.pth")
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    shutil.rmtree(folder / "stage2")
    code, _, err = command(
        "--config-file",
        tiny_config,
        "--stage",
        "2",
        "data.save_dir",
        folder,
        "relation.load_weights",
        tmp_path / "nformer.pth",
    )
    assert code == 2 and "missing there" in err and "'blocks.0.attn" in err and not (folder / "stage2").exists()


@pytest.mark.parametrize("position", [0.0, 0.3, 0.999])
def test_a_damaged_checkpoint_is_refused_and_the_other_one_named(tiny_run, tiny_config, tmp_path, command, position):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    flip(folder / "stage1" / "best.pth.tar", position)
    code, _, err = command("--config-file", tiny_config, "--eval-only", "data.save_dir", folder)
    assert code == 2 and err.count("\n") == 1 and "best.pth.tar' cannot be read" in err and "damaged" in err
    assert "last.pth.tar', which is whole" in err


def test_a_damaged_bank_is_made_again_and_the_table_is_the_same(tiny_run, tiny_config, tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = comparable(folder)["rows"]
    for path in (folder / "bank").glob("*-query.pt"):
        flip(path)
    code, out, _ = command("--config-file", tiny_config, "--eval-only", "data.save_dir", folder)
    assert code == 0 and "extracting it again" in out and comparable(folder)["rows"] == before
