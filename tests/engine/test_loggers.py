"""Loggers by name: what each writes, and that a run that goes on writes no step twice."""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from wiring import execute, toy_config, write_pictures

from relreid_plugin.engine.base import EngineMixin
from relreid_plugin.engine.loggers import IDS, Loggers, Value, read_csv
from relreid_plugin.errors import UserError


class Wandb(SimpleNamespace):
    """Stands for wandb: takes notes of its runs."""

    def __init__(self):
        super().__init__(runs=[])

    def Settings(self, **options):
        return options

    def init(self, **options):
        run = SimpleNamespace(options=options, logged=[], axes=[], ends=[])
        run.log = lambda values: run.logged.append(dict(values))
        run.define_metric = lambda name, step_metric: run.axes.append((name, step_metric))
        run.finish = lambda: run.ends.append("finished")
        self.runs.append(run)
        return run


class Mlflow(SimpleNamespace):
    """Stands for MLflow's client, and for its entities."""

    def __init__(self):
        super().__init__(logged=[], runs=[], ended=[], experiments={}, uris=[])

    def MlflowClient(self, tracking_uri):
        self.uris.append(tracking_uri)
        return self

    def Metric(self, key, value, timestamp, step):
        return key, value, step

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, artifact_location):
        assert artifact_location.endswith("/mlartifacts")
        self.experiments[name] = SimpleNamespace(experiment_id="7")
        return "7"

    def create_run(self, experiment, tags):
        self.runs.append((experiment, tags))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(self.runs)}"))

    def log_batch(self, run, metrics):
        assert len(metrics) <= 1000
        self.logged += [(run, *metric) for metric in metrics]

    def set_terminated(self, run):
        self.ended.append(run)


@pytest.fixture
def libraries(monkeypatch):
    wandb, mlflow = Wandb(), Mlflow()
    for name, module in (("wandb", wandb), ("mlflow", mlflow), ("mlflow.tracking", mlflow), ("mlflow.entities", mlflow)):
        monkeypatch.setitem(sys.modules, name, module)
    return wandb, mlflow


def test_a_run_that_goes_on_writes_every_step_once(tmp_path, libraries, monkeypatch):
    """Stopped in the second of three epochs, behind the first one's checkpoint: all loggers have what a straight run has."""
    wandb, mlflow = libraries
    data, found = write_pictures(tmp_path / "data"), {}
    step = EngineMixin.forward_backward
    for name in ("straight", "broken"):
        keys = [
            "train.loggers",
            "['csv','mlflow','wandb']",
            "train.max_epoch",
            3,
            "test.eval_freq",
            1,
            "train.val_fraction",
            0.3,
        ]
        cfg = toy_config(data, tmp_path / name, *keys, "test.rivals", "[]")
        wandb.runs.clear(), mlflow.logged.clear()
        if name == "broken":
            calls = []

            def stopped(self, batch, calls=calls, step=step):
                calls.append(1)
                if len(calls) == len(self.train_loader) + 2:
                    raise KeyboardInterrupt
                return step(self, batch)

            monkeypatch.setattr(EngineMixin, "forward_backward", stopped)
            with pytest.raises(KeyboardInterrupt):
                execute(cfg)
            monkeypatch.setattr(EngineMixin, "forward_backward", step)
            execute(cfg, resume=True)
        else:
            run, _ = execute(cfg)
        stage = tmp_path / name / "stage1"
        ids = json.loads((stage / IDS).read_text())
        values = read_csv(stage / "metrics.csv")
        logged = [entry for each in wandb.runs for entry in each.logged]
        assert {each.options["id"] for each in wandb.runs} == {ids["wandb"]} and {each[0] for each in mlflow.logged} == {
            ids["mlflow"]
        }
        assert all(each.options["mode"] == "offline" and each.ends == ["finished"] for each in wandb.runs)
        assert wandb.runs[0].options["dir"] == str(tmp_path / name) and len(wandb.runs) == (2 if name == "broken" else 1)
        assert not (stage / "tensorboard").exists()
        timeless = [value for value in values if value.name not in ("Train/time", "Train/data")]
        found[name] = timeless
        assert max(Counter((value.name, value.step) for value in values).values()) == 1
        of_mlflow = sorted((key, step, value) for _, key, value, step in mlflow.logged)
        assert of_mlflow == sorted(values)
        of_wandb = sorted(
            (key, entry.get("batch", entry.get("epoch")), value)
            for entry in logged
            for key, value in entry.items()
            if key not in ("batch", "epoch")
        )
        assert of_wandb == sorted(values)
    assert found["broken"] == found["straight"]
    batches = len(run.datamanager.train_loader)  # as the sampler says; it may draw fewer
    steps = {name: [value.step for value in found["straight"] if value.name == name] for name, *_ in found["straight"]}
    assert steps["Train/loss"] == steps["Train/lr"] and {step // batches for step in steps["Train/loss"]} == {0, 1, 2}
    assert steps["Validation/mAP"] == [1, 2, 3]
    assert mlflow.uris[0] == f"sqlite:///{tmp_path / 'straight' / 'mlflow.db'}"
    assert mlflow.runs == [("7", {"mlflow.runName": f"{name}/stage1"}) for name in ("straight", "broken")]
    assert mlflow.ended == ["run1", "run2", "run2"] and wandb.runs[0].axes == [("Train/*", "batch"), ("*", "epoch")]


def test_csv_leaves_out_what_is_made_again(tmp_path):
    first = Loggers(["csv"], tmp_path, first_epoch=0, batches=2)
    for step in range(4):
        first.add_scalar("Train/a,b", 0.1 * step, step)
    first.add_scalar("x", float("nan"), 1), first.add_scalar("x", 2, 2)
    first.flush()
    first.add_scalar("x", 5.0, 3)
    first.abandon()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("x,4,1.")
    assert len(read_csv(tmp_path / "metrics.csv")) == 6
    Loggers(["csv"], tmp_path, first_epoch=1, batches=2).close()
    rows = read_csv(tmp_path / "metrics.csv")
    assert rows[:2] == [Value("Train/a,b", 0, 0.0), Value("Train/a,b", 1, 0.1)] and len(rows) == 3
    assert rows[2][:2] == ("x", 1) and rows[2].value != rows[2].value


def test_mlflow_takes_finite_values_under_its_own_names(tmp_path, libraries):
    loggers = Loggers(["mlflow"], tmp_path, first_epoch=0, batches=1)
    for step in range(1001):
        loggers.add_scalar("RIB/kept/a:b", 1.0, step)
    loggers.add_scalar("x", float("inf"), 1)
    loggers.close()
    assert len(libraries[1].logged) == 1001 and libraries[1].logged[0][1] == "RIB/kept/a_b"


@pytest.mark.parametrize("name, package", [("mlflow", "mlflow"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_is_said(tmp_path, monkeypatch, name, package):
    for module in ("mlflow", "mlflow.tracking", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"'train.loggers' {name} needs the package '{package}'.*pip install {package}"):
        Loggers([name], tmp_path, first_epoch=0, batches=1)
    Loggers([], tmp_path, first_epoch=0, batches=1).close()
    assert list(tmp_path.iterdir()) == []
