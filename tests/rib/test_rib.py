"""RIB through the training command: every attention and network, the bound in every record, exact resume, its commands."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import signal
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import warm
import yaml
from conftest import ROOT, TINY, comparable, copy_data, without_cameras
from killing import spawn

from relreid_plugin.config.defaults import get_default_config, merge_from_list, validate
from relreid_plugin.engine.grid import collect, load_config, plan, score_table
from relreid_plugin.errors import UserError
from relreid_plugin.rib.control import smoothing_of_like_strength
from relreid_plugin.rib.tables import eta_variants, rib_variants, signal_table

RIB = {
    "model": {"name": "vit_baseline", "pretrained": False},
    "backbone": {"name": "timm:vit_tiny_patch16_224", "output_stride": 0},
    "vit": {"patch_size": 16, "depth": 2, "stride": 8, "shift": 3},
    "train": {**TINY["train"], "stages": [1], "max_epoch": 4, "val_fraction": 0.0, "optim": "adamw"},
    "relation": {"attention": "none"},
    "rib": {"attention": "dcs", "dcs": {"lr_mult": 10.0}, "ibb": {"eta": 1.0, "warmup": 0.75}},
    "test": {"dist_metric": "cosine", "rivals": []},
}


@pytest.fixture(scope="module")
def rib_config(tmp_path_factory, tiny_root):
    """The file of a tiny RIB configuration."""
    return write_config(tmp_path_factory.mktemp("config"), tiny_root)


def write_config(folder, root):
    """Write a tiny RIB configuration on the tiny persons below ``root``."""
    config = {**json.loads(json.dumps(TINY)), **RIB}
    config["data"]["root"] = str(root)
    path = folder / "rib_tiny.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def tags(folder):
    """Scalars in a run's TensorBoard events of stage 1."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "stage1" / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


CASES = {
    "dcs-vit": [],
    "dcs-transreid-bfloat16": ["model.name", "transreid", "train.precision", "bfloat16"],
    "dcs-resnet18": ["model.name", "bnneck_baseline", "backbone.name", "host:resnet18"],
    "dcs-mobilenetv2": ["model.name", "bnneck_baseline", "backbone.name", "host:mobilenetv2_x1_0"],
    "se-resnet18": ["model.name", "bnneck_baseline", "backbone.name", "torchvision:resnet18", "rib.attention", "se"],
    "cbam-osnet-before-the-neck": [
        *["model.name", "bnneck_baseline", "backbone.name", "host:osnet_x0_25", "rib.attention", "cbam"],
        *["rib.ibb.feature", "before"],
    ],
}


REPEATED = ("dcs-mobilenetv2", "se-resnet18")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) if name in REPEATED else name for name in CASES]
)
def test_training_reports_gates_and_bound(name, rib_config, tmp_path, command):
    folder = tmp_path / name
    code, out, err = command("--config-file", rib_config, "data.save_dir", folder, *CASES[name])
    assert code == 0, err
    history = json.loads((folder / "metrics.json").read_text())["history"]["stage1"]
    assert [record["eta"] if "eta" in record else None for record in history] == [None, None, 0.0, 1.0]
    scalars = tags(folder)
    for record in history[2:]:
        assert record["ib_holds"] == 1.0 and record["ib_bound"] >= record["ib_estimate"]
        assert record["ib_bound"] == pytest.approx(record["ibb"] + record["input_entropy"], abs=1e-6)
        assert record["ib_estimate"] == pytest.approx(record["i_fx"] - record["i_fy"], abs=1e-6)
    for key in ("ibb", "ib_bound", "ib_estimate", "ib_holds", "eta"):
        assert scalars[f"RIB/{key}"] == pytest.approx([record[key] for record in history[2:]], abs=1e-6)
    gates = [key for key in history[-1] if key.startswith("kept/")]
    wanted = {"dcs-resnet18": 2, "dcs-mobilenetv2": 2, "se-resnet18": 0, "cbam-osnet-before-the-neck": 0}
    assert len(gates) == wanted.get(name, 3 if "transreid" in name else 2)  # TransReID: the jigsaw block has its own
    for gate in gates:
        assert 0.0 < history[-1][gate] < 1.0
        assert f"kept_test/{gate.removeprefix('kept/')}" in history[-1]
        assert scalars[f"RIB/{gate}"] == pytest.approx([record[gate] for record in history], abs=1e-6)
    extra = torch.load(folder / "stage1" / "last.pth.tar", weights_only=True)["extra"]
    assert "bound" in extra and ("gates" in extra) == bool(gates)
    assert extra["bound"]["epochs"] == 4


def test_the_bounds_weight_changes_training_only_after_the_warm_up(rib_config, tmp_path, command):
    losses = {}
    for eta in ("0", "5"):
        folder = tmp_path / eta
        keys = ["rib.ibb.eta", eta, "rib.ibb.measure", "True", "train.max_epoch", "5", "rib.ibb.warmup", "0.6"]
        code, _, err = command("--config-file", rib_config, "data.save_dir", folder, *keys)
        assert code == 0, err
        losses[eta] = [record["ce"] for record in json.loads((folder / "metrics.json").read_text())["history"]["stage1"]]
    assert losses["0"][:3] == losses["5"][:3]
    assert losses["0"][4] != losses["5"][4]


def test_gates_noise_has_its_own_seed(rib_config, tmp_path, command):
    kept = []
    for seed in ("0", "0", "1"):
        folder = tmp_path / str(len(kept))
        keys = ["rib.dcs.seed", seed, "train.max_epoch", "1"]
        assert command("--config-file", rib_config, "data.save_dir", folder, *keys)[0] == 0
        kept.append(json.loads((folder / "metrics.json").read_text())["history"]["stage1"][0])
    assert kept[0] == kept[1] and kept[0] != kept[2]


def test_without_camera_labels_the_embedding_is_off_and_said_so(tiny_root, rib_config, tmp_path, command):
    copy = copy_data(tiny_root, tmp_path / "mine")
    without_cameras(copy)
    folder = tmp_path / "run"
    keys = ["model.name", "transreid", "train.max_epoch", "1", "data.save_dir", folder]
    code, out, err = command("--config-file", rib_config, "-s", copy, "-t", copy, *keys)
    assert code == 0, err
    assert "note: the training data has no camera labels; the camera embedding is off." in out
    state = torch.load(folder / "stage1" / "last.pth.tar", weights_only=True)["state_dict"]
    assert not [key for key in state if key.startswith("cameras")]
    code, out, err = command("--config-file", rib_config, *keys[:4], "data.save_dir", tmp_path / "known")
    assert code == 0 and "camera embedding" not in out
    state = torch.load(tmp_path / "known" / "stage1" / "last.pth.tar", weights_only=True)["state_dict"]
    assert "cameras.table" in state


def test_cross_domain_by_configuration(tiny_root, rib_config, tmp_path, command):
    """Another test set: its cameras are unknown to the model, so they must not matter."""
    other = copy_data(tiny_root, tmp_path / "other")
    folder = tmp_path / "run"
    keys = ["model.name", "transreid", "train.max_epoch", "1", "data.save_dir", folder]
    code, out, err = command("--config-file", rib_config, "-t", "embedded_persons_tiny", other, *keys)
    assert code == 0, err
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert len(rows) == 2 and rows[0]["target"] != rows[1]["target"]
    banks = sorted((folder / "bank").glob("*query*.pt"))
    features = [torch.load(path, weights_only=True)["features"] for path in banks]
    assert features[0].shape == features[1].shape
    assert not torch.allclose(features[0], features[1], atol=1e-4)  # the mean embedding instead of the camera's own


@pytest.mark.slow
@pytest.mark.long
def test_killed_and_resumed_equals_not_killed(tmp_path, rib_config, command):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    base = ["--config-file", rib_config, "model.name", "transreid", "data.workers", "2", "data.save_dir"]
    assert command(*base, straight)[0] == 0
    steps = len(json.loads((straight / "metrics.json").read_text())["history"]["stage1"])
    assert steps == 4
    killed = spawn(tmp_path, "image", 11, *base, broken, "--resume")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    code, out, err = command(*base, broken, "--resume")
    assert code == 0, err
    assert "resuming stage 1 after epoch" in out
    assert comparable(broken) == comparable(straight)
    first, second = (torch.load(run / "stage1" / "last.pth.tar", weights_only=True) for run in (straight, broken))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    bounds = [state["extra"]["bound"] for state in (first, second)]
    assert all(torch.equal(value, bounds[1][name]) for name, value in bounds[0].items())
    noises = [state["extra"]["gates"]["noise"][0]["generators"]["cpu"] for state in (first, second)]
    assert torch.equal(*noises)


# --- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "overrides,words",
    [
        (["rib.attention", "dsc"], "did you mean 'dcs'"),
        (["rib.attention", "se"], "bnneck_baseline"),
        (["rib.places", "['layer3']"], "rib.places.*CNNs"),
        (["rib.attention", "none", "rib.places", "['layer3']"], "rib.attention.*none"),
        (["rib.dcs.init_bias", "-1"], "rib.dcs.init_bias"),
        (["rib.dcs.temperature", "[1.0]"], "rib.dcs.temperature"),
        (["rib.ibb.eta", "-0.5"], "rib.ibb.eta.*must lie in"),
        (["rib.ibb.feature", "afte"], "did you mean 'after'"),
        (["loss.name", "triplet"], "rib.ibb.*composite"),
        (["loss.name", "softmax", "rib.ibb.eta", "0"], "vit_baseline.*composite"),
        (["backbone.name", "timm:resnet10t"], "timm:resnet10t.*timm:vit"),
        (["backbone.name", "timm:swin_tiny_patch4_window7_224", "model.name", "bnneck_baseline"], "rib.attention dcs"),
        (["data.height", "8"], "smaller than a patch"),
        (["model.name", "transreid", "vit.parts", "40"], "vit.parts"),
        (["model.name", "osnet_x0_25"], "host:osnet_x0_25"),
    ],
)
def test_one_sentence(rib_config, tmp_path, command, overrides, words):
    import re

    code, _, err = command("--config-file", rib_config, "data.save_dir", tmp_path / "run", *overrides)
    assert code == 2 and re.search(words, err), err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- the ablation's commands ------------------------------------------------------------------------------------------
@dataclass
class Done:
    """What a command left: exit code, standard output, standard error."""

    returncode: int
    stdout: str
    stderr: str


def tool(name, *args):
    """One of the commands in tools/, in this process; trainings that it starts need not import the libraries."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), ROOT / "tools" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "executable", warm.python())
        code = module.main([str(arg) for arg in args])
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def rib_report(rib_config, tmp_path_factory):
    """The output and folder of tools/rib.py with two seeds of the tiny configuration."""
    out = tmp_path_factory.mktemp("rib")
    done = tool("rib.py", "--config-file", rib_config, "--seeds", "1,2", "--out", out, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    return done.stdout, out


@pytest.mark.slow
def test_rib_table_over_seeds(rib_report, rib_config):
    text, out = rib_report
    for title in ("baseline", "+ DCS", "+ DCS + IBB", "+ DCS, gates drawn", "+ DCS + label smoothing"):
        assert f"| {title} |" in text
    records = json.loads((out / "rib.json").read_text())["rib_tiny"]
    runs = {
        record["variant"]: [json.loads((ROOT / run / "metrics.json").read_text()) for run in record["runs"]]
        for record in records
    }
    assert list(runs) == ["baseline", "dcs", "dcs-ibb", "random", "smoothing"]
    for record in records:
        values = [metrics["rows"][0]["mAP"] for metrics in runs[record["variant"]]]
        assert record["mean"]["mAP"] == pytest.approx(np.mean(values))
        assert record["std"]["mAP"] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
        assert f"{100 * np.mean(values):.1f} ± {100 * abs(values[0] - values[1]) / np.sqrt(2):.1f}" in text
        assert record["signal"][0]["bound_holds"] == record["signal"][0]["epochs_measured"] == 2
    kept = {
        variant: [key for key in metrics[0]["history"]["stage1"][-1] if key.startswith("kept")]
        for variant, metrics in runs.items()
    }
    assert kept["baseline"] == [] and len(kept["dcs"]) == len(kept["dcs-ibb"]) == 4
    etas = {variant: metrics[0]["history"]["stage1"][-1]["eta"] for variant, metrics in runs.items()}
    assert etas == {"baseline": 0.0, "dcs": 0.0, "dcs-ibb": 1.0, "random": 0.0, "smoothing": 0.0}
    stress = json.loads((out / "rib_tiny-occlusion.json").read_text())
    assert stress["fractions"] == pytest.approx([0.1 * step for step in range(9)])
    for method, metrics in zip(stress["methods"], runs.values()):
        assert np.asarray(method["mAP"]).shape == (2, 9)
        assert [row[0] for row in method["mAP"]] == pytest.approx([each["rows"][0]["mAP"] for each in metrics])
    for picture in ("rib_tiny-information.png", "rib_tiny-occlusion.png", "rib_tiny-occlusion-examples.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert (out / "rib.md").read_text().strip() in text


@pytest.mark.slow
@pytest.mark.long
def test_rib_table_goes_on_with_what_is_done(rib_report, rib_config):
    text, out = rib_report
    done = tool("rib.py", "--config-file", rib_config, "--seeds", "1,2", "--out", out)
    assert done.returncode == 0 and "6 of 6 runs are done already" in done.stdout
    assert "4 of 4 runs are done already" in done.stdout  # the controls
    assert done.stdout.strip().endswith((out / "rib.md").read_text().strip())
    other = tool("rib.py", "--config-file", rib_config, "--seeds", "1", "--out", out, "--opts", "train.lr", "0.5")
    assert other.returncode == 2 and "another configuration" in other.stderr and "--out" in other.stderr


def test_rib_table_has_controls(rib_report, rib_config):
    """Drawn gates keep what the seed's learned ones keep; the smoothing is that of like strength."""
    _, out = rib_report
    records = {record["variant"]: record for record in json.loads((out / "rib.json").read_text())["rib_tiny"]}
    assert records["random"]["parameters"] == records["dcs"]["parameters"] == records["smoothing"]["parameters"]
    for learned, drawn in zip(records["dcs"]["signal"], records["random"]["signal"]):
        assert list(drawn["kept"].values()) == pytest.approx(list(learned["kept"].values()), abs=0.5 / 192 + 1e-4)
        assert list(drawn["kept_noise"].values()) == pytest.approx(list(learned["kept_noise"].values()), abs=0.03)
    folder = out / "rib_tiny"
    for seed in (1, 2):
        before, after = (
            json.loads((folder / f"{key}-seed{seed}" / "metrics.json").read_text())["history"]["stage1"][-1]["entropy"]
            for key in ("dcs", "dcs-ibb")
        )
        classes = torch.load(folder / f"dcs-seed{seed}" / "stage1" / "last.pth.tar", weights_only=True)["num_classes"]
        wanted = smoothing_of_like_strength(after - before, smoothing=0.1, classes=classes)
        assert records["smoothing"]["signal"][seed - 1]["smoothing"] == pytest.approx(wanted, abs=1e-4)
    path = folder / "dcs-seed1" / "metrics.json"
    kept = path.read_text()
    metrics = json.loads(kept)
    del metrics["history"]["stage1"][-1]["entropy"]
    path.write_text(json.dumps(metrics))
    old = tool("rib.py", "--config-file", rib_config, "--seeds", "1,2", "--out", out)
    path.write_text(kept)
    assert old.returncode == 2 and "earlier version" in old.stderr and "--out" in old.stderr


def test_a_run_that_fails_is_named(rib_config, tmp_path):
    done = tool(
        "rib.py",
        "--config-file",
        rib_config,
        "--seeds",
        "1",
        "--out",
        tmp_path,
        "--opts",
        "train.lr",
        "1e9",
        "train.warmup_epochs",
        "0",
        "train.optim",
        "sgd",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "baseline-seed1" in done.stderr and "learning rate" in done.stderr


@pytest.mark.slow
def test_eta_sweep(rib_config, tmp_path):
    done = tool(
        "eta.py",
        "--config-file",
        rib_config,
        "--etas",
        "1,0",
        "--out",
        tmp_path,
        "--jobs",
        "2",
        "--opts",
        "train.max_epoch",
        "3",
        "rib.ibb.warmup",
        "0.5",
    )
    assert done.returncode == 0, done.stderr
    for eta in ("0", "1"):
        assert f"| eta = {eta} |" in done.stdout
    result = json.loads((tmp_path / "eta.json").read_text())
    assert result["etas"] == [1, 0] and len(result["records"]) == 2
    assert (tmp_path / "eta.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name,option,value", [("rib.py", "--seeds", "1,x"), ("eta.py", "--etas", "1,1"), ("eta.py", "--etas", "-1")]
)
def test_numbers_on_the_command_line(name, option, value, tmp_path):
    done = tool(name, f"{option}={value}", "--out", tmp_path)
    assert done.returncode == 2 and option in done.stderr and done.stderr.count("\n") == 1


def test_the_table_needs_an_attention_and_a_weight(tmp_path):
    done = tool("rib.py", "--config-file", ROOT / "configs/magformer_embedded.yml", "--out", tmp_path)
    assert done.returncode == 2 and "rib.attention" in done.stderr


def test_variants_are_switches_of_one_configuration(rib_config, tmp_path):
    cfg = load_config(str(rib_config), [])
    parts = plan(str(rib_config), rib_variants(cfg), [3], folder=tmp_path, overrides=["train.max_epoch", "7"])
    baseline, attention, full = (part.cfg for part in parts)
    assert (baseline.rib.attention, attention.rib.attention, full.rib.attention) == ("none", "dcs", "dcs")
    assert (baseline.rib.ibb.eta, attention.rib.ibb.eta, full.rib.ibb.eta) == (0.0, 0.0, 1.0)
    assert all(part.cfg.train.seed == part.cfg.rib.dcs.seed == 3 and part.cfg.train.max_epoch == 7 for part in parts)
    assert [variant.key for variant in eta_variants([0.0, 0.25, 2.0])] == ["eta0", "eta0.25", "eta2"]


def test_tables_of_made_up_records():
    assert (
        score_table(
            [
                {
                    "title": "one",
                    "target": "set",
                    "mean": {"mAP": 0.5, "mINP": 0.25, "1": 0.75, "5": 0.8, "10": 0.9},
                    "std": {"mAP": 0.01, "mINP": 0.02, "1": 0.0, "5": 0.0, "10": 0.0},
                    "parameters": 1_500_000,
                    "seeds": [1, 2],
                }
            ]
        ).splitlines()[-1]
        == "| one | 50.0 ± 1.0 | 75.0 ± 0.0 | 80.0 ± 0.0 | 90.0 ± 0.0 | 25.0 ± 2.0 | 1.50M |"
    )
    signal_row = signal_table(
        [
            {
                "variant": "v",
                "title": "one",
                "signal": [
                    {
                        "ibb_warmup": 0.2,
                        "ibb_last": 0.1,
                        "bound_holds": 3,
                        "epochs_measured": 4,
                        "kept": {"a": 0.5, "b": 0.25},
                        "smoothing": 0.1,
                        "entropy": 1.0,
                    },
                    {
                        "ibb_warmup": 0.4,
                        "ibb_last": 0.1,
                        "bound_holds": 4,
                        "epochs_measured": 4,
                        "kept": {"a": 0.7, "b": 0.35},
                        "smoothing": 0.1,
                        "entropy": 2.0,
                    },
                ],
            }
        ]
    ).splitlines()[-1]
    assert signal_row == "| one | 0.3000 ± 0.1414 | 0.1000 ± 0.0000 | 7 of 8 epochs | 0.100 | 1.500 | 60.0 %, 30.0 % |"
    assert collect([]) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("rib_*.yml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_have_a_baseline(path):
    cfg = get_default_config()
    from relreid_plugin.config.defaults import merge_from_file

    merge_from_file(cfg, path)
    validate(cfg)
    assert cfg.rib.attention != "none" and cfg.rib.ibb.eta == 1.0
    merge_from_list(cfg, ["rib.attention", "none", "rib.ibb.eta", "0"])
    validate(cfg)


def test_unknown_model_for_attention_names_the_way_out():
    cfg = get_default_config()
    merge_from_list(cfg, ["rib.attention", "dcs", "model.name", "resnet50"])
    with pytest.raises(UserError, match="host:resnet50"):
        validate(cfg)


# --- looking into trained runs ----------------------------------------------------------------------------------------
def test_occlusion_command(rib_report, tmp_path):
    _, out = rib_report
    runs = out / "rib_tiny"
    base = f"base={runs / 'baseline-seed1'},{runs / 'baseline-seed2'}"
    done = tool(
        "occlusion.py", base, f"RIB={runs / 'dcs-ibb-seed1'}", "--fractions", "0,0.4", "--out", tmp_path, "--fill", "mean"
    )
    assert done.returncode == 0, done.stderr
    assert "| 40% |" in done.stdout and "base: mAP" in done.stdout
    result = json.loads((tmp_path / "occlusion.json").read_text())
    own = json.loads((runs / "dcs-ibb-seed1" / "metrics.json").read_text())["rows"][0]
    assert result["methods"][1]["mAP"][0][0] == pytest.approx(own["mAP"])
    assert result["methods"][1]["mAP"][0][1] != result["methods"][1]["mAP"][0][0]
    for name in ("occlusion.png", "occlusion-examples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_gradcam_command(rib_report, tmp_path):
    pytest.importorskip("pytorch_grad_cam")
    runs = rib_report[1] / "rib_tiny"
    options = ["--out", tmp_path, "--count", "8", "--shown", "3"]
    done = tool("gradcam.py", f"base={runs / 'baseline-seed1'}", f"RIB={runs / 'dcs-ibb-seed1'}", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gradcam.json").read_text())
    assert [row["label"] for row in result["runs"]] == ["base", "RIB"]
    assert all(0 <= row["on_occluder"] <= 1 and row["area"] == pytest.approx(0.4, abs=0.02) for row in result["runs"])
    assert (tmp_path / "gradcam.png").read_bytes().startswith(b"\x89PNG")


def test_gradcam_without_its_package_is_one_sentence(rib_report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    done = tool("gradcam.py", rib_report[1] / "rib_tiny" / "baseline-seed1", "--out", tmp_path / "cam", "--count", "2")
    assert done.returncode == 2 and not (tmp_path / "cam").exists()
    assert "'grad-cam', which is not installed; run 'pip install grad-cam'" in done.stderr


def test_information_command(rib_report, tiny_run, tmp_path):
    runs = rib_report[1] / "rib_tiny"
    done = tool("information.py", f"RIB={runs / 'dcs-ibb-seed1'}", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| yes |") == 2 and "holds in 2 of 2 epochs" in done.stdout
    assert (tmp_path / "information.png").read_bytes().startswith(b"\x89PNG")
    done = tool("information.py", tiny_run, "--out", tmp_path / "none")
    assert done.returncode == 2 and "rib.ibb.measure True" in done.stderr and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["occlusion.py", "gradcam.py", "information.py"])
def test_a_folder_without_a_run_is_named(name, tmp_path):
    done = tool(name, tmp_path / "nothing", "--out", tmp_path / "out")
    assert done.returncode == 2 and "nothing" in done.stderr and done.stderr.count("\n") == 1
