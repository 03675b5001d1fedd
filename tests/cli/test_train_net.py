"""The training command: what it leaves, and what it says of a mistake."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, comparable, copy_data, without_cameras


def copy_of(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    return folder


# --- what a run leaves --------------------------------------------------------------------------------------------------


def test_two_stages_leave_everything_in_one_folder(tiny_run):
    metrics = comparable(tiny_run)
    methods = [(row["protocol"], row["method"]) for row in metrics["rows"]]
    assert methods == [
        ("inductive", "image model"),
        ("inductive", "+ average query expansion"),
        ("transductive", "+ k-reciprocal re-ranking"),
        ("inductive", "+ MagFormer"),
        ("transductive", "+ MagFormer"),
    ]
    for row in metrics["rows"]:
        assert 0.0 <= row["mAP"] <= 1.0 and set(row["cmc"]) == {"1", "5", "10", "20"} and row["parameters"] > 0
    assert len(metrics["history"]["stage1"]) == 2 and "val_mAP" in metrics["history"]["stage2"][0]
    for name in ("config.yml", "environment.json", "train.log", "table.md", "plots/stage1.png", "plots/stage2.png"):
        assert (tiny_run / name).stat().st_size > 0, name
    assert list((tiny_run / "stage1" / "tensorboard").iterdir())
    assert not list(tiny_run.rglob("*.tmp"))
    log = (tiny_run / "train.log").read_text(encoding="utf-8")
    assert "inductive: every query alone with the gallery" in log and "epoch 2/2" in log


def test_a_checkpoint_holds_what_inference_needs(tiny_run):
    state = torch.load(tiny_run / "stage1" / "last.pth.tar", weights_only=True)
    assert state["normalisation"]["height"] == 64 and len(state["label_map"]) == state["num_classes"] == 6
    assert "backbone" in state["config"] and state["epoch"] == 2
    relation = torch.load(tiny_run / "stage2" / "last.pth.tar", weights_only=True)
    assert relation["dim"] == 32 and relation["kind"] == "relation"


def test_testing_twice_gives_the_same_rows_and_uses_the_bank_again(tiny_run, tiny_config, tmp_path, command):
    folder = copy_of(tiny_run, tmp_path)
    before = comparable(folder)["rows"]
    banks = {path: path.stat().st_mtime_ns for path in (folder / "bank").iterdir()}
    assert banks
    for _ in range(2):
        code, out, _ = command("--config-file", tiny_config, "--eval-only", "data.save_dir", folder)
        assert code == 0 and "+ MagFormer" in out
        assert comparable(folder)["rows"] == before
    assert {path: path.stat().st_mtime_ns for path in (folder / "bank").iterdir()} == banks


@pytest.mark.parametrize("key", ["model.load_weights", "model.resume"])
def test_weights_from_a_file_are_tested_without_a_run(tiny_run, tiny_config, tmp_path, command, key):
    weights = tiny_run / "stage1" / "best.pth.tar"
    args = ["--eval-only", "train.stages", "[1]", "relation.attention", "none", "data.save_dir", tmp_path / "run"]
    code, _, err = command("--config-file", tiny_config, *args, key, weights)
    assert code == 0, err
    expected = [row for row in comparable(tiny_run)["rows"] if "MagFormer" not in row["method"]]
    assert comparable(tmp_path / "run")["rows"] == expected


def test_stage_by_stage_equals_both_at_once(tiny_run, tiny_config, tmp_path, command):
    folder = tmp_path / "stages"
    code, out, _ = command("--config-file", tiny_config, "--stage", "1", "data.save_dir", folder)
    assert code == 0 and "+ MagFormer" not in out
    assert command("--config-file", tiny_config, "--stage", "2", "data.save_dir", folder)[0] == 0
    assert comparable(folder)["rows"] == comparable(tiny_run)["rows"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["relation.attention", "nformer"],
        ["relation.attention", "malaa", "relation.landmarks", "farthest"],
        ["relation.neighbours", "affinity", "relation.train.max_epoch", "1"],
        ["relation.init", "diffusion", "relation.precision", "bfloat16"],
        ["relation.protocols", "['transductive']", "relation.k", "500"],
        ["relation.search.backend", "torch", "test.rivals", "[]"],
        ["relation.search.index", "hnsw", "test.rerank", "True"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_switch_trains_and_tests(tiny_run, tiny_config, tmp_path, command, overrides):
    folder = copy_of(tiny_run, tmp_path)
    shutil.rmtree(folder / "stage2")
    code, out, err = command("--config-file", tiny_config, "--stage", "2", "data.save_dir", folder, *overrides)
    assert code == 0, err
    rows = comparable(folder)["rows"]
    protocols = {row["protocol"] for row in rows if row["method"].startswith("+ ") and "expansion" not in row["method"]}
    assert "transductive" in protocols and all(0 <= row["mAP"] <= 1 for row in rows)


def test_torchreid_yaml_runs_in_the_hosts_engine(tiny_root, tmp_path, command):
    config = tmp_path / "im_osnet.yaml"
    config.write_text(
        "model:\n  name: 'osnet_x0_25'\n  pretrained: True\n"
        "data:\n  type: 'image'\n  sources: ['market1501']\n  targets: ['market1501']\n  height: 256\n  width: 128\n"
        "  combineall: False\n  transforms: ['random_flip', 'random_erase']\n  save_dir: 'log/osnet'\n"
        "loss:\n  name: 'softmax'\n  softmax:\n    label_smooth: True\n"
        "train:\n  optim: 'amsgrad'\n  lr: 0.003\n  max_epoch: 180\n  batch_size: 128\n  fixbase_epoch: 10\n"
        "  open_layers: ['classifier']\n  lr_scheduler: 'single_step'\n  stepsize: [60]\n"
        "test:\n  batch_size: 300\n  dist_metric: 'euclidean'\n  normalize_feature: False\n  evaluate: False\n"
        "  eval_freq: -1\n  rerank: False\n"
    )
    folder = tmp_path / "run"
    args = ["--config-file", config, "--root", tiny_root, "-s", "embedded_persons_tiny", "-t", "embedded_persons_tiny"]
    small = ["model.pretrained", "False", "data.height", "64", "data.width", "32", "train.max_epoch", "2"]
    small += ["train.fixbase_epoch", "1", "data.workers", "0", "train.batch_size", "32", "data.save_dir", folder]
    code, out, err = command(*args, *small)
    assert code == 0, err
    assert "image model" in out and len(comparable(folder)["history"]["stage1"]) == 2


def test_triplet_engine_and_periodic_tests(tiny_root, tiny_config, tmp_path, command):
    folder = tmp_path / "run"
    overrides = ["model.name", "osnet_x0_25", "loss.name", "triplet", "loss.triplet.weight_x", "1.0", "train.stages", "[1]"]
    overrides += ["train.val_fraction", "0", "relation.attention", "none", "data.save_dir", folder]
    code, out, err = command("--config-file", tiny_config, *overrides)
    assert code == 0, err
    assert "embedded_persons_tiny/mAP" in comparable(folder)["history"]["stage1"][0]


def test_a_folder_without_cameras_discards_nothing(tiny_root, tiny_config, tmp_path, command):
    data = copy_data(tiny_root, tmp_path / "products")
    without_cameras(data)
    args = ["--root", tmp_path, "-s", "products", "-t", "products", "data.save_dir", tmp_path / "run", "train.stages", "[1]"]
    code, out, err = command("--config-file", tiny_config, *args, "train.max_epoch", "1", "relation.attention", "none")
    assert code == 0, err
    assert "camera" in out and "discard" in out


def test_a_csv_file_trains_and_tests(tiny_root, tiny_config, tmp_path, command):
    data = copy_data(tiny_root, tmp_path / "images")
    splits = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "pid", "camid", "split"])
        for path in sorted(data.rglob("*.jpg")):
            identity, camera = path.name.split("_")[:2]
            if identity != "-1":
                writer.writerow([path.relative_to(tmp_path), identity, camera[1], splits[path.parent.name]])
    args = ["--root", tmp_path, "-s", "mine.csv", "-t", "mine.csv", "data.save_dir", tmp_path / "run"]
    code, _, err = command("--config-file", tiny_config, *args)
    assert code == 0, err
    assert comparable(tmp_path / "run")["rows"][0]["queries"] > 0


@pytest.mark.slow
def test_a_small_gallery_with_unmatched_and_single_images(tiny_root, tiny_config, tmp_path, command):
    data = copy_data(tiny_root, tmp_path / "small")
    for folder, keep in (("query", 4), ("bounding_box_test", 9)):
        files = [path for path in sorted((data / folder).glob("*.jpg")) if not path.name.startswith(("-1", "0000"))]
        chosen = set(files[:: max(1, len(files) // keep)])
        for path in (data / folder).glob("*.jpg"):
            if path not in chosen:
                path.unlink()
    args = ["--root", tmp_path, "-s", "embedded_persons_tiny", "small", "-t", "small", "data.save_dir", tmp_path / "run"]
    code, out, err = command("--config-file", tiny_config, "--root", tmp_path, *args[2:], "data.root", tmp_path)
    assert code == 0, err
    assert len(comparable(tmp_path / "run")["rows"]) == 5


def test_the_batch_norm_bias_of_the_neck_stays_fixed(tiny_run):
    for stage, key in (("stage1", "neck.bn.bias"), ("stage2", "neck.bn.bias")):
        state = torch.load(tiny_run / stage / "last.pth.tar", weights_only=True)["state_dict"]
        assert float(state[key].abs().sum()) == 0.0


def test_the_script_itself(tiny_config, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(ROOT / "tools" / "train_net.py")]
    done = subprocess.run([*script, "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--config-file" in done.stdout
    args = ["--config-file", str(tiny_config), "relation.kk", "3"]
    done = subprocess.run([*script, *args], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- mistakes -----------------------------------------------------------------------------------------------------------


def check_sentence(result, folder, *words):
    code, _, err = result
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert not folder.exists(), "a run that could not start leaves no folder"


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["relation.kk", "3"], ["relation.kk", "'relation.k'"]),
        (["relation.k", "many"], ["relation.k", "integer", "many"]),
        (["relation.k"], ["relation.k", "stands alone"]),
        (["relation.neighbours", "afinity"], ["relation.neighbours", "'affinity'"]),
        (["relation.num_heads", "3"], ["relation", "multiple"]),
        (["train.val_fraction", "1.5"], ["train.val_fraction", "1.5"]),
        (["model.name", "resnet5O"], ["model.name", "'resnet50'"]),
        (["backbone.name", "torchvision:resnet5"], ["backbone.name", "resnet50"]),
        (["backbone.name", "timm:resnet10x"], ["backbone.name", "timm"]),
        (["data.transforms", "['random_flipp']"], ["data.transforms", "'random_flip'"]),
        (["data.sources", "['market15']"], ["market15", "magformer_embedded.yml", "bounding_box_train"]),
        (["data.sources", "['market1501']"], ["market1501", "data.root", "magformer_embedded.yml"]),
        (["model.load_weights", "nothing.pth"], ["nothing.pth", "does not exist"]),
        (["model.resume", "nothing.pth"], ["nothing.pth", "does not exist"]),
        (["loss.name", "softmax"], ["bnneck_baseline", "composite"]),
        (["--stage", "2"], ["stage-1 checkpoint", "model.load_weights"]),
        (["--eval-only"], ["stage-1 checkpoint"]),
    ],
    ids=lambda value: "-".join(value)[:50].replace("/", "_"),
)
def test_one_sentence_and_nothing_half_written(tiny_config, tmp_path, command, overrides, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    flags, rest = (overrides, []) if overrides[0].startswith("--") else ([], overrides)
    check_sentence(command("--config-file", tiny_config, *flags, "data.save_dir", folder, *rest), folder, *words)


@pytest.mark.parametrize(
    "text,words",
    [
        ("train: {max_epochs: 3}", ["train.max_epochs", "'train.max_epoch'"]),
        ("train: {lr: fast}", ["train.lr", "number", "fast"]),
        ("train: 3", ["train", "keys of its own"]),
        ("- 1", ["mapping"]),
        ("train: [", ["not a YAML file"]),
    ],
)
def test_mistakes_in_the_file(tmp_path, command, text, words):
    config = tmp_path / "bad.yml"
    config.write_text(text)
    check_sentence(command("--config-file", config), tmp_path / "run", "bad.yml", *words)


def test_missing_file_names_the_nearest(tiny_config, tmp_path, command):
    check_sentence(command("--config-file", tiny_config.with_name("tinny.yml")), tmp_path / "run", "tiny.yml")


def test_empty_split(tiny_root, tiny_config, tmp_path, command):
    data = copy_data(tiny_root, tmp_path / "mine")
    shutil.rmtree(data / "query")
    (data / "query").mkdir()
    args = ["--root", tmp_path, "-s", "mine", "-t", "mine", "data.save_dir", tmp_path / "run"]
    check_sentence(command("--config-file", tiny_config, *args), tmp_path / "run", "query", "no images")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_unreadable_image_is_found_at_load_time(tiny_root, tiny_config, tmp_path, command, damage):
    data = copy_data(tiny_root, tmp_path / "mine")
    victim = sorted((data / "bounding_box_train").glob("*.jpg"))[4]
    content = victim.read_bytes()
    victim.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image"}[damage])
    args = ["--root", tmp_path, "-s", "mine", "-t", "mine", "data.save_dir", tmp_path / "run"]
    check_sentence(command("--config-file", tiny_config, *args), tmp_path / "run", victim.name)


def test_unreadable_image_in_a_loader_process_is_one_sentence_too(tiny_root, tiny_config, tmp_path, command):
    data = copy_data(tiny_root, tmp_path / "mine")
    victim = sorted((data / "bounding_box_train").glob("*.jpg"))[4]
    victim.write_bytes(victim.read_bytes()[:900])
    args = ["--root", tmp_path, "-s", "mine", "-t", "mine", "data.save_dir", tmp_path / "run"]
    code, _, err = command("--config-file", tiny_config, *args, "data.check_images", "none", "data.workers", "2")
    assert code == 2 and err.count("\n") == 1 and victim.name in err


@pytest.mark.parametrize("overrides", [["head.feature_dim", "64"], ["backbone.name", "torchvision:resnet18"]])
def test_checkpoint_of_another_model(tiny_run, tiny_config, tmp_path, command, overrides):
    folder = copy_of(tiny_run, tmp_path)
    before = (folder / "metrics.json").read_bytes()
    code, _, err = command("--config-file", tiny_config, "--eval-only", "data.save_dir", folder, *overrides)
    assert code == 2 and "another model" in err and err.count("\n") == 1
    assert (folder / "metrics.json").read_bytes() == before


def test_stage_2_of_another_image_model(tiny_run, tiny_config, tmp_path, command):
    folder = copy_of(tiny_run, tmp_path)
    for name in ("last", "best"):
        path = folder / "stage1" / f"{name}.pth.tar"
        state = torch.load(path, weights_only=True)
        state["state_dict"]["embedding.bias"] += 1.0
        torch.save(state, path)
    code, _, err = command("--config-file", tiny_config, "--eval-only", "data.save_dir", folder)
    assert code == 2 and "another image model" in err


def test_damaged_and_foreign_checkpoints(tiny_run, tiny_config, tmp_path, command):
    folder = copy_of(tiny_run, tmp_path)
    path = folder / "stage1" / "best.pth.tar"
    if not path.exists():
        path = folder / "stage1" / "last.pth.tar"
    path.write_bytes(path.read_bytes()[:2000])
    code, _, err = command("--config-file", tiny_config, "--eval-only", "data.save_dir", folder)
    assert code == 2 and "cannot be read" in err and path.name in err
    torch.save({"some": torch.zeros(2)}, path)
    code, _, err = command("--config-file", tiny_config, "--eval-only", "data.save_dir", folder)
    assert code == 2 and "not written by this plug-in" in err


def test_a_folder_with_a_run_is_not_overwritten(tiny_run, tiny_config, tmp_path, command):
    folder = copy_of(tiny_run, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, err = command("--config-file", tiny_config, "data.save_dir", folder)
    assert code == 2 and "--resume" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_weights_out_of_reach(tiny_config, tmp_path, command, monkeypatch):
    import urllib.error

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    keys = ["backbone.name", "torchvision:shufflenet_v2_x0_5", "model.pretrained", "True"]
    result = command("--config-file", tiny_config, *keys, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", "model.pretrained False", "backbone.weights")


def test_faiss_absent_is_a_stated_fallback_or_a_sentence(tiny_run, tiny_config, tmp_path, command, monkeypatch):
    monkeypatch.setattr("relreid_plugin.metrics.neighbours.faiss_available", lambda: False)
    monkeypatch.setattr("relreid_plugin.magformer.stage.faiss_available", lambda: False)
    folder = copy_of(tiny_run, tmp_path)
    code, out, _ = command("--config-file", tiny_config, "--eval-only", "data.save_dir", folder)
    assert code == 0 and "faiss is not installed" in out
    assert comparable(folder)["rows"] == comparable(tiny_run)["rows"]
    result = command("--config-file", tiny_config, "relation.search.backend", "faiss", "data.save_dir", tmp_path / "new")
    check_sentence(result, tmp_path / "new", "pip install faiss-cpu")


def test_a_loss_that_explodes_is_named(tiny_config, tmp_path, command):
    args = ["train.lr", "1e30", "train.warmup_epochs", "0", "data.save_dir", tmp_path / "run"]
    code, _, err = command("--config-file", tiny_config, *args)
    assert code == 2 and "learning rate" in err and not (tmp_path / "run" / "stage1" / "last.pth.tar").exists()


@pytest.mark.slow
def test_the_ladder_reuses_stage_1(tiny_run, tiny_config, tmp_path, capsys):
    from relreid_plugin.cli.ladder import main

    folder = copy_of(tiny_run, tmp_path)
    args = ["--config-file", str(tiny_config), "--rungs", "nformer,magformer", "--seeds", "1,2", "--rivals", "aqe,gnn"]
    assert main([*args, "data.save_dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "stage 1 is complete" in out and "NFormer: LAA + RNS" in out and "control: every image alone" in out
    result = json.loads((folder / "ladder.json").read_text())
    plain = [row for row in result["rows"] if row["protocol"] == "inductive" and not row["rival"]]
    assert [row["features"] for row in plain] == ["image model", "control", "nformer", "magformer"]
    held = [row for row in result["rows"] if row["rival"] == "aqe-held-out"]
    assert [row["features"] for row in held] == ["image model", "control", "nformer", "magformer"]
    assert all(len(row["setting"]) == 2 for row in held[1:])
    nformer = plain[2]
    parts = [comparable(folder / "ladder" / f"nformer-seed{seed}") for seed in (1, 2)]
    rows = [row for part in parts for row in part["rows"] if row["method"] == "+ NFormer" and row["protocol"] == "inductive"]
    scores = [row["mAP"] for row in rows]
    assert nformer["mean"]["mAP"] == pytest.approx(sum(scores) / 2)
    assert main([*args[:3], "nformr", "data.save_dir", str(folder)]) == 2
    assert "did you mean 'nformer'" in capsys.readouterr().err


REAL = Path(os.environ.get("RELREID_DATA", "") or "reid-data")


@pytest.mark.skipif(not (REAL / "viper").is_dir(), reason="RELREID_DATA names no folder with VIPeR")
def test_viper_through_the_hosts_loader(tiny_config, tmp_path, command):
    before = sorted(path.name for path in (REAL / "viper").iterdir())
    args = ["--root", REAL, "-s", "viper", "-t", "viper", "data.save_dir", tmp_path / "run", "train.max_epoch", "1"]
    code, out, err = command("--config-file", tiny_config, *args, "sampler.num_instances", "2", "test.eval_freq", "-1")
    assert code == 0, err
    assert comparable(tmp_path / "run")["rows"][0]["queries"] == 316
    assert sorted(path.name for path in (REAL / "viper").iterdir()) == before


def test_an_interrupted_command_says_how_it_goes_on(tiny_config, tmp_path, command, monkeypatch, capsys):
    from relreid_plugin.cli.train import run_command
    from relreid_plugin.engine.runner import Run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "execute", interrupted)
    code, _, err = command("--config-file", tiny_config, "data.save_dir", tmp_path / "run")
    assert (code, err) == (130, "interrupted; go on with --resume\n")
    assert run_command(interrupted) == 130
    assert capsys.readouterr().err == "interrupted; go on with the same command\n"
