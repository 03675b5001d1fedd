"""Methods: their registry, a fourth one from another package, and stages of several methods behind each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import tomllib
import warm
import yaml
from conftest import ROOT, TINY, comparable

from relreid_plugin import methods as registry
from relreid_plugin.config import load_config
from relreid_plugin.errors import UserError

PACKAGE = ROOT / "tests" / "fourth_method"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder for PYTHONPATH in which the fourth method is installed, as pip writes its entry points."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    lines = [
        f"[{group}]\n" + "".join(f"{a} = {b}\n" for a, b in points.items())
        for group, points in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(lines))
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (folder / "fourth_method").symlink_to(PACKAGE / "fourth_method")
    return folder


@pytest.fixture(scope="module")
def vehicles_root(tmp_path_factory):
    """A data root with the tiny embedded vehicles."""
    from relreid_plugin.data.embedded import ensure_embedded_vehicles

    root = tmp_path_factory.mktemp("vehicles")
    ensure_embedded_vehicles("embedded_vehicles_tiny", root, verbose=False)
    return root


def train(command, *arguments):
    """The training command in this process, which succeeds."""
    code, _, said = command(*map(str, arguments))
    assert code == 0, said


def run(installed, *arguments, check=True):
    path = os.pathsep.join([str(ROOT), str(installed)])
    command = [warm.python(), str(ROOT / "tools" / "train_net.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_fourth_method_trains_resumes_and_tests(installed, tiny_root, tmp_path):
    """Its model, loss, keys, stage and row, with another method's stage behind it; killed after its first epoch."""
    base = ["--config-file", PACKAGE / "fourth.yml", "--root", tiny_root]
    whole = tmp_path / "whole"
    said = run(installed, *base, "data.save_dir", whole).stdout
    metrics = json.loads((whole / "metrics.json").read_text())
    names = [row["method"] for row in metrics["rows"]]
    assert names[0] == "image model" and "+ whitening" in names and "+ MagFormer" in names
    assert names.index("+ whitening") > names.index("+ MagFormer")  # the order of the stages' numbers
    assert list(metrics["history"]) == ["stage1", "stage2", "stage3"] and len(metrics["history"]["stage3"]) == 2
    record = metrics["history"]["stage1"][0]
    assert record["spread_weight"] == 0.1 and record["spread"] != 0
    assert record["loss"] == pytest.approx(
        record["ce"] + record["triplet"] + 0.0005 * record["center"] + 0.1 * record["spread"], abs=1e-4
    )
    assert "has no effect" not in said

    part = tmp_path / "part"
    run(installed, *base, "data.save_dir", part, "fourth.epochs", "1")
    assert len(json.loads((part / "metrics.json").read_text())["history"]["stage3"]) == 1
    said = run(installed, *base, "--resume", "data.save_dir", part).stdout
    assert "resuming stage 3 after epoch 1" in said
    assert comparable(part) == comparable(whole)
    tested = run(installed, *base, "--eval-only", "data.save_dir", whole).stdout
    assert "+ whitening" in tested
    assert comparable(whole)["rows"] == comparable(part)["rows"]


@pytest.mark.slow
def test_what_the_fourth_method_refuses_and_says(installed, tiny_root, tmp_path):
    base = ["--config-file", PACKAGE / "fourth.yml", "--root", tiny_root, "data.save_dir", tmp_path / "run"]
    for wrong, said in (
        (["fourth.shrinkage", "2"], "key 'fourth.shrinkage' must lie in [0, 1]"),
        (["fourth.widht", "2"], "did you mean 'fourth.width'?"),
        (["loss.name", "triplet"], "'fourth.spread' belongs to 'loss.name composite'"),
        (["fourth.epochs", "0"], "'train.stages' asks for stage 3, but there are 2"),
    ):
        done = run(installed, *base, *wrong, check=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()
    idle = run(installed, *base, "train.stages", "[1]", "train.max_epoch", "0")
    assert "have no effect" in idle.stdout or "has no effect" in idle.stdout


def test_without_it_nothing_of_it_is_there(tiny_root, tmp_path):
    done = run(ROOT, "--config-file", PACKAGE / "fourth.yml", "--root", tiny_root, check=False)
    assert done.returncode == 2 and "'fourth'" in done.stderr


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("nowhere_at_all:METHOD", "cannot be imported: ModuleNotFoundError"),
        ("json:dumps", "is no relreid_plugin.methods.Method"),
        ("relreid_plugin.rib.method:METHOD", "methods 'rib' and 'rib' both name"),
    ],
)
def test_entry_points_that_are_wrong(point, said, tmp_path):
    information = tmp_path / "wrong-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[relreid_plugin.methods]\nwrong = {point}\n")
    done = run(tmp_path, "--config-file", ROOT / "configs" / "osnet_embedded.yml", check=False)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_own_methods():
    assert [method.name for method in registry.methods()] == ["rib", "graft", "magformer"]
    assert registry.single_models() == ("bnneck_baseline", "vit_baseline", "transreid")
    assert registry.several_models() == ("graft",) and registry.method_of("graft").name == "graft"
    assert registry.method_of("resnet50") is None
    assert registry.no_download_hint() == "'--config-file magformer_embedded.yml' runs without any download"
    assert registry.no_download_hint(several=True) == "'--config-file graft_embedded.yml' runs without any download"
    for method in registry.methods():
        assert (ROOT / "configs" / method.example).is_file()


def test_a_method_adds_its_data_sets(monkeypatch):
    import relreid_plugin

    class Recorder(registry.Method):
        name = "recorder"
        registered = 0

        def register(self):
            self.registered += 1

    recorder = Recorder()
    monkeypatch.setattr(relreid_plugin, "_registered", False)
    monkeypatch.setattr(registry, "methods", lambda: (recorder,))
    relreid_plugin.register()
    relreid_plugin.register()  # once is enough
    assert recorder.registered == 1


def test_stages_are_counted_as_they_are_built():
    """What the configuration is told before torch is imported is what a run has."""
    from relreid_plugin.engine.runner import Run

    for file in sorted((ROOT / "configs").glob("*.yml")):
        cfg = load_config(file)
        planned = Run(cfg, stages=[]).planned
        assert len(planned) == registry.last_stage(cfg), file.name
        assert [stage.number for stage in planned] == list(range(1, len(planned) + 1))
        assert set(cfg.train.stages) <= set(range(1, len(planned) + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "last"), [("[1,2,3]", 3), ("[1,3]", 3)])
def test_graft_then_magformer(command, vehicles_root, tmp_path, stages, last):
    """A relation stage behind GraFT's two, or behind its first one alone; resumed and tested it is the same."""
    cfg = yaml.safe_load((ROOT / "configs" / "graft_magformer_embedded.yml").read_text())
    cfg["data"].update(
        sources=["embedded_vehicles_tiny"], targets=["embedded_vehicles_tiny"], workers=0, height=32, width=64
    )
    cfg["train"].update(max_epoch=1, batch_size=16, val_fraction=0.25)
    cfg["vit"]["depth"] = 1
    cfg["graft"].update(feedforward=32, finetune={"max_epoch": 1})
    cfg["relation"].update(
        num_layers=1, k=4, train={"max_epoch": 2, "features_per_step": 16, "steps_per_epoch": 2, "eval_freq": 1}
    )
    cfg["multimodal"]["test"] = ["R+N+T", "R"]
    file = tmp_path / "both.yml"
    file.write_text(yaml.safe_dump(cfg))
    train(command, "--config-file", file, "--root", vehicles_root, "train.stages", stages, "data.save_dir", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    names = [row["method"] for row in metrics["rows"]]
    assert names[0] == "GraFT, R+N+T" and names.count("+ MagFormer") == 2 and names[-1].startswith("GraFT, R (without")
    assert f"stage{last}" in metrics["history"] and len(metrics["history"][f"stage{last}"]) == 2
    before = comparable(tmp_path / "run")
    train(
        command,
        "--config-file",
        file,
        "--root",
        vehicles_root,
        "train.stages",
        stages,
        "--eval-only",
        "data.save_dir",
        tmp_path / "run",
    )
    assert comparable(tmp_path / "run")["rows"] == before["rows"]
    shutil.rmtree(tmp_path / "run" / f"stage{last}")
    alone = ["--stage", last, "--root", vehicles_root, "train.stages", stages, "data.save_dir", tmp_path / "run"]
    train(command, "--config-file", file, *alone)
    assert comparable(tmp_path / "run")["rows"] == before["rows"]


@pytest.mark.slow
def test_transreid_with_gates_then_magformer(command, tiny_root, tmp_path):
    cfg = yaml.safe_load((ROOT / "configs" / "rib_dcs_transreid_magformer_embedded.yml").read_text())
    cfg["data"].update(sources=["embedded_persons_tiny"], targets=["embedded_persons_tiny"], workers=0)
    cfg["train"].update(max_epoch=3, batch_size=16, val_fraction=0.25, warmup_epochs=1)
    cfg["vit"]["depth"] = 2
    cfg["relation"].update(TINY["relation"])
    file = tmp_path / "both.yml"
    file.write_text(yaml.safe_dump(cfg))
    train(command, "--config-file", file, "--root", tiny_root, "data.save_dir", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [row["method"] for row in metrics["rows"]].count("+ MagFormer") == 2
    assert "ibb" in metrics["history"]["stage1"][-1] and len(metrics["history"]["stage2"]) == 2


def test_a_stage_too_many_names_the_key_that_adds_it():
    with pytest.raises(UserError, match="asks for stage 2, but there are 1: 'relation.attention' is 'none'; choose nformer"):
        load_config(ROOT / "configs" / "osnet_embedded.yml", ["train.stages", "[1,2]"])
    with pytest.raises(UserError, match="asks for stage 3, but there are 2: 'relation.attention' is 'none'"):
        load_config(ROOT / "configs" / "graft_embedded.yml", ["train.stages", "[1,2,3]"])
    with pytest.raises(UserError, match="asks for stage 4, but there are 3: the methods that this configuration names"):
        load_config(ROOT / "configs" / "graft_magformer_embedded.yml", ["train.stages", "[1,2,4]"])
