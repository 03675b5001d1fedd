"""The order of a run and what it leaves: stages, rows, notes, the folder's files, tables and ranked lists."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from wiring import settings, toy_checkpoint

from relreid_plugin.data.cameras import CameraTable
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine import folder as folder_module
from relreid_plugin.engine import ranked, records, runner
from relreid_plugin.engine.evaluator import EvaluationOptions, Evaluator, Row
from relreid_plugin.engine.folder import guard, write_context, write_results
from relreid_plugin.engine.network import View
from relreid_plugin.engine.runner import Run, RunResult, open_run
from relreid_plugin.engine.scoring import Metric, Scorer
from relreid_plugin.engine.stages import ImageStage, Stage
from relreid_plugin.engine.table import markdown_table, text_table
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import Features, TestFeatures
from relreid_plugin.magformer.stage import RelationStage

LAST = "last.pth.tar"
BOTH = ("train.stages", [1, 2], "relation.attention", "magformer")


def row(method="image model", *, target="set", protocol="inductive", score=0.5, metric="", **more):
    scores = {"mAP": score, "mINP": score / 2, "cmc": {"1": score, "5": 0.75, "10": 0.875, "20": 1.0}}
    options = {"parameters": 1_250_000, "seconds": 1.234, "queries": 7, **scores, **more}
    return Row(target=target, protocol=protocol, method=method, metric=metric, **options)


def make_run(tmp_path, *keys, stages=None, resume=False):
    return Run(settings("data.save_dir", tmp_path / "run", *keys), stages=stages, resume=resume)


# --- what a run is made of -------------------------------------------------------------------------------------------
def test_a_run_of_a_configuration(tmp_path, monkeypatch):
    run = make_run(tmp_path, *BOTH)
    assert run.stages == [1, 2] and run.folder == run.results == tmp_path / "run" and run.resume is run.inference is False
    assert [type(stage) for stage in run.planned] == [ImageStage, RelationStage] and run.first is run.planned[0]
    assert [stage.number for stage in run.planned] == [1, 2] and run.features.run is run and run.network.cfg is run.cfg
    assert run.rows == run.notes == run._drawn == [] and run.history == run.selected == {}
    assert make_run(tmp_path, *BOTH, stages=[2, 1, 2]).stages == [1, 2] and make_run(tmp_path, stages=[]).stages == []
    assert make_run(tmp_path, resume=True).resume is True and len(make_run(tmp_path).planned) == 1
    assert run.stage_folder(2) == tmp_path / "run" / "stage2"
    run.cfg.train.stages = [1]
    assert run.asked() == [run.first]
    run.cfg.train.stages = [2]
    assert run.asked() == run.planned
    # a GPU that is not there is not used
    cfg = settings("data.save_dir", tmp_path)
    for there in (True, False):
        cfg.use_gpu = True
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert Run(cfg).cfg.use_gpu is there
    cfg.use_gpu = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Run(cfg).cfg.use_gpu is False


def test_where_the_model_goes(tmp_path, monkeypatch, capsys):
    moved = []
    monkeypatch.setattr(nn.Module, "cuda", lambda self: (moved.append(self), self)[1])
    run, model = make_run(tmp_path), nn.Linear(2, 2)

    def place(use, count):
        moved.clear()
        run.cfg.use_gpu, run.model = use, model
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        run.place_model()
        return type(run.model), [type(each) for each in moved], run.bare is model

    assert place(False, 2) == (nn.Linear, [], True)
    assert place(True, 1) == (nn.Linear, [nn.Linear], True)
    assert capsys.readouterr().out == ""
    assert place(True, 2) == (nn.Linear, [nn.Linear], True)  # a process has one GPU
    said = capsys.readouterr().out
    assert said.startswith(
        "note: one of 2 GPUs is used; for all of them: 'torchrun --nproc-per-node 2 -m relreid_plugin train"
    )


def test_what_every_checkpoint_holds(tmp_path):
    keys = ["data.norm_mean", [0.1, 0.2, 0.3], "data.norm_std", [0.4, 0.5, 0.6], "data.height", 20, "data.width", 10]
    run = make_run(tmp_path, *keys)
    run.datamanager = SimpleNamespace(label_map={"0001": 0}, num_train_pids=np.int64(6))
    run.cameras = CameraTable.of([(0, "a", "1")], ["a"])
    found = run.static()
    assert type(found["num_classes"]) is int and found == {
        "config": run.cfg.dump(),
        "label_map": {"0001": 0},
        "num_classes": 6,
        "cameras": [[0, "a", "1"]],
        "normalisation": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "height": 20, "width": 10},
    }
    run.cameras = CameraTable(None, 4, ("a",))
    assert "cameras" not in run.static()


def test_what_a_run_is_asked(tmp_path, monkeypatch):
    run = make_run(tmp_path, *BOTH, "test.dist_metric", "cosine")
    assert run.options().metric == "cosine"
    asked = []
    for name in ("altered", "cameras", "score"):
        monkeypatch.setattr(run.features, name, lambda *values, name=name: (asked.append((name, values)), name)[1])
    run.network.read_picture = lambda *values: (asked.append(("picture", values)), "picture")[1]
    assert run.target_features("set") == run.target_features("set", "alter") == "altered"
    assert (run.test_cameras("set"), run.score("features"), run.read_picture("item")) == ("cameras", "score", "picture")
    assert asked == [
        ("altered", ("set", None)),
        ("altered", ("set", "alter")),
        ("cameras", ("set",)),
        ("score", ("features",)),
        ("picture", (run, "item")),
    ]
    run.planned[1].encoder = "encoder"
    assert run.refiner() == "encoder"
    run.cfg.train.stages = [1]
    assert run.refiner() is None


# --- its order -------------------------------------------------------------------------------------------------------
class Noting(Stage):
    """A stage that notes in a list of the run what it is asked."""

    def __init__(self, log, number):
        self.log, self.number, self.kind = log, number, "image"

    def build(self, run):
        self.log.append(("build", self.number))
        run.datamanager, run.parameters = SimpleNamespace(notes=["of the data"]), 1_000

    def train(self, run):
        self.log.append(("train", self.number))

    def load(self, run):
        self.log.append(("load", self.number))
        run.selected[self.name] = 3 + self.number

    def rows(self, run, evaluator):
        self.log.append(("rows", self.number, evaluator.target))
        return [row(f"stage {self.number}", target=evaluator.target)]


def features(count=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    values = torch.eye(4)[torch.arange(count) % 4] + 0.8 * torch.randn(count, 4, generator=draw)
    paths = [f"{seed}/{i}.png" for i in range(count)]
    return Features(values, np.arange(count) % 4, np.full(count, seed), paths)


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """``noted(KEY, VALUE, …)``: a run of three stages that take notes, and the notes."""
    monkeypatch.setattr(folder_module, "plot_history", lambda history, folder: None)

    def build(*keys, stages=None, resume=False, count=3):
        log = []
        run = make_run(
            tmp_path, "data.targets", ["one", "two"], "test.rivals", ["aqe"], *BOTH, *keys, stages=stages, resume=resume
        )
        run.planned = [Noting(log, number) for number in range(1, count + 1)]
        run.first = run.planned[0]
        run.cfg.train.stages = list(range(1, count + 1))
        if stages is None:
            run.stages = list(range(1, count + 1))

        def test(name, view=None):
            log.append(("features", name, view.label))
            return TestFeatures(features(seed=0), features(16, seed=1 + (name == "two")))

        run.features = SimpleNamespace(test=test)
        return run, log

    return build


def test_stages_train_behind_the_weights_of_those_before(noted):
    run, log = noted()
    assert [stage.number for stage in run._through_stages()] == [1, 2, 3]
    assert log == [("train", 1), ("load", 1), ("train", 2), ("load", 2), ("train", 3), ("load", 3)]
    for stages, wanted in (
        ([2], [("load", 1), ("train", 2), ("load", 2)]),
        ([1], [("train", 1), ("load", 1)]),
        ([1, 3], [("train", 1), ("load", 1), ("load", 2), ("train", 3), ("load", 3)]),
        ([], [("load", 1), ("load", 2), ("load", 3)]),
    ):
        run, log = noted(stages=stages)
        found = [stage.number for stage in run._through_stages()]
        assert log == wanted and found == [number for name, number in wanted if name == "load"]
    run, log = noted(stages=[])
    run.cfg.train.stages = [1, 3]
    assert [stage.number for stage in run._through_stages()] == [1, 3]


def test_a_whole_run(noted, capsys, monkeypatch):
    run, log = noted("train.print_freq", 3)
    monkeypatch.setattr(runner, "schedule_notes", lambda cfg: ["a schedule"])
    result = run.execute()
    said = capsys.readouterr().out
    assert [name for name, *_ in log][:7] == ["build", "train", "load", "train", "load", "train", "load"]
    assert log[7:] == [
        entry
        for name in ("one", "two")
        for entry in (("features", name, "image model"), ("rows", 1, name), ("rows", 2, name), ("rows", 3, name))
    ]
    methods = ["image model", "+ average query expansion", "stage 1", "stage 2", "stage 3"]
    assert [(found.target, found.method) for found in result.rows] == [(t, m) for t in ("one", "two") for m in methods]
    assert result.rows is run.rows and result.history is run.history and result.folder == run.folder
    assert list(result.stage1_features) == ["one", "two"] and result.rows[0].parameters == 1_000
    wanted = Evaluator("one", result.stage1_features["one"], options=run.options(), parameters=1_000)
    assert result.rows[0].mAP == wanted.baseline().mAP and result.rows[1].mAP == wanted.rivals()[0].mAP
    lines = said.split("\n")
    assert lines[0] == f"run folder: {run.folder} (configuration: config.yml)" and lines[1] == "note: a schedule"
    assert said.endswith(
        "note: of the data\n\ntested: stage1 epoch 4, stage2 epoch 5, stage3 epoch 6\n\n"
        f"{text_table(run.rows)}\n\nrun folder: {run.folder}\n"
    )
    assert (run.folder / "train.log").read_text() == said and not (run.folder / "test.log").exists()
    assert (run.folder / "config.yml").read_text() == run.cfg.dump()
    assert RunResult([], {}, run.folder).stage1_features == {}


def test_a_test_of_a_run(noted, capsys):
    run, _ = noted()
    run.execute()
    toy_checkpoint(run.folder / "stage1" / LAST)
    capsys.readouterr()
    run, log = noted(stages=[])
    run.execute()
    said = capsys.readouterr().out
    assert log[0] == ("build", 1) and "train" not in {name for name, *_ in log} and "other keys" not in said
    assert (run.folder / "test.log").read_text() == said and run.results == run.folder
    config = (run.folder / "config.yml").read_bytes()
    run, log = noted("test.dist_metric", "cosine", stages=[])
    run.execute()
    said = capsys.readouterr().out
    assert run.results.parent == run.folder / "tests" and (run.results / "test.log").read_text() == said
    assert said.endswith(f"run folder: {run.folder}\nother keys than the run's; results: {run.results}\n")
    assert (run.results / "metrics.json").is_file() and (run.results / "config.yml").read_text() == run.cfg.dump()
    assert (run.folder / "config.yml").read_bytes() == config


def test_a_folder_that_was_made_for_nothing_goes(noted):
    run, _ = noted()

    def fail(run):
        raise UserError("no data")

    run.first.build = fail
    with pytest.raises(UserError, match="no data"):
        run.execute()
    assert not run.folder.exists()
    run.folder.mkdir()
    with pytest.raises(UserError, match="no data"):
        run.execute()
    assert run.folder.is_dir()  # it was there before


def test_two_runs_in_one_folder(noted):
    from relreid_plugin.locks import folder_lock

    run, log = noted()
    run.folder.mkdir()
    with folder_lock(run.folder), pytest.raises(UserError):
        run.execute()
    assert log == []


def test_a_finished_run_is_shown(noted, capsys, monkeypatch):
    first, _ = noted()
    done = first.execute()
    capsys.readouterr()
    metrics = records.read_metrics(first.folder)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    run, log = noted(resume=True)
    monkeypatch.setattr(runner, "guard", lambda run: metrics)
    found = run.execute()
    said = capsys.readouterr().out
    assert log == [] and found.rows == done.rows and found.folder == run.folder and found.history == first.history
    assert run.selected == first.selected and found.rows is run.rows and found.stage1_features == {}
    where = f"'{run.folder}' is finished; this is its table ('{run.folder / 'metrics.json'}'), and nothing was written\n"
    assert said.startswith(f"{where}note: of the data\n\ntested: stage1 epoch 4, ") and text_table(run.rows) in said
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    # with other keys of the test it is tested
    run, log = noted("test.dist_metric", "cosine", resume=True)
    run.execute()
    assert run.stages == [] and {name for name, *_ in log} == {"build", "load", "features", "rows"}
    assert run.results.parent == run.folder / "tests"


def test_views_of_a_test_set(noted, monkeypatch):
    run, log = noted("data.targets", ["one"], "test.visrank", True)
    drawn = []
    monkeypatch.setattr(
        runner, "draw_target", lambda run, evaluator, taken: (drawn.append((run, evaluator, list(taken))), "f")[1]
    )
    run.network.views = lambda: [View("whole"), View("half", "-A", ("A",), "half is there"), View("none")]
    run.first.build(run)
    kept = run.test([run.planned[1]])
    assert [found.method for found in run.rows] == ["whole", "+ average query expansion", "stage 2", "half", "none"]
    assert run.notes == ["one: half is there"] and list(kept) == ["one"] and run._drawn == ["f"]
    ((of, evaluator, taken),) = drawn
    assert of is run and evaluator.target == "one" and taken == [] and evaluator.data is kept["one"]
    assert [entry[2] for entry in log if entry[0] == "features"] == ["whole", "half", "none"]
    run.test([])
    assert drawn[1][2] == ["f"] and run._drawn == ["f", "f"]
    run.cfg.test.visrank = False
    run.test([])
    assert len(drawn) == 2


# --- opening a run ---------------------------------------------------------------------------------------------------
def test_a_run_is_opened(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=f"'{folder}' holds no run \\('{folder / 'config.yml'}' does not exist\\)"):
        open_run(folder)
    cfg = settings(*BOTH, "data.save_dir", "elsewhere", "test.batch_size", 9)
    folder.mkdir()
    (folder / "config.yml").write_text(cfg.dump())
    with pytest.raises(UserError, match="leave out the override 'data.save_dir'"):
        open_run(folder, ["data.save_dir", "x"])
    with pytest.raises(UserError, match="no stage-1 checkpoint"):
        open_run(folder)
    log, engine = [], SimpleNamespace(set_model_mode=lambda mode: log.append(mode))
    toy_checkpoint(folder / "stage1" / LAST)

    def build(self, run):
        print("at length")
        log.append(("build", run.inference))
        run.engine = engine

    monkeypatch.setattr(ImageStage, "build", build)
    monkeypatch.setattr(ImageStage, "load", lambda self, run: log.append("load"))
    monkeypatch.setattr(RelationStage, "load", lambda self, run: log.append("load 2"))
    run = open_run(str(folder), ["test.batch_size", "4"])
    assert log == [("build", True), "load", "eval"] and run.stages == [] and run.cfg.data.save_dir == str(folder)
    assert run.cfg.test.batch_size == 4 and open_run(folder).cfg.test.batch_size == 9 and run.inference is True
    monkeypatch.setattr(RelationStage, "refines", False)
    log.clear()
    open_run(folder)
    assert log == [("build", True), "load", "load 2", "eval"]


def test_opening_a_run_prints_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yml").write_text(settings().dump())
    toy_checkpoint(tmp_path / "stage1" / LAST)

    def build(self, run):
        print("at length")
        run.engine = SimpleNamespace(set_model_mode=lambda mode: None)

    monkeypatch.setattr(ImageStage, "build", build)
    monkeypatch.setattr(ImageStage, "load", lambda self, run: None)
    open_run(tmp_path)
    assert capsys.readouterr().out == ""


# --- the folder --------------------------------------------------------------------------------------------------------
def test_folders_that_are_refused(tmp_path):
    def refused(words, *keys, **options):
        with pytest.raises(UserError, match=words):
            guard(make_run(tmp_path, *keys, **options))

    folder = tmp_path / "run"
    folder.touch()
    refused(f"'data.save_dir' is '{folder}', which is a file; name a folder")
    folder.unlink()
    assert guard(make_run(tmp_path, *BOTH)) is None
    missing = f"no stage-1 checkpoint in '{folder / 'stage1'}'; train it first"
    refused(missing, *BOTH, stages=[2])
    refused(missing, stages=[])
    assert guard(make_run(tmp_path, "model.load_weights", "w.pth", stages=[])) is None
    gone = tmp_path / "gone.pth"
    refused(f"'model.resume' names '{gone}', which does not exist", "model.resume", gone)
    refused(f"'model.resume' names '{tmp_path}', which does not exist", "model.resume", tmp_path)
    gone.touch()
    assert guard(make_run(tmp_path, "model.resume", gone, stages=[])) is None
    toy_checkpoint(folder / "stage2" / LAST, kind="relation")
    refused(f"'{folder}' already holds a run of stage 2; go on with --resume", *BOTH)
    toy_checkpoint(folder / "stage1" / LAST)
    refused(f"'{folder}' already holds a run of stage 1; go on with --resume", *BOTH)
    assert guard(make_run(tmp_path, *BOTH, stages=[])) is None


def test_a_pruned_model_is_only_tested(tmp_path):
    run = make_run(tmp_path)
    run.network = SimpleNamespace(stands_alone=lambda of: of is run)
    with pytest.raises(UserError, match=f"'{run.folder}' holds a pruned model without its stage 1.*add --eval-only"):
        guard(run)
    run.stages = []
    assert guard(run) is None


def test_what_may_be_gone_on_with(tmp_path):
    cfg = settings(*BOTH, "data.save_dir", tmp_path / "run", "train.max_epoch", 3, "relation.train.max_epoch", 2)
    keys = [*BOTH, "train.max_epoch", 3, "relation.train.max_epoch", 2]
    first, second = (tmp_path / "run" / f"stage{number}" / LAST for number in (1, 2))

    def go_on(*more, stages=None):
        return guard(make_run(tmp_path, *keys, *more, stages=stages, resume=True))

    assert go_on() is None  # nothing there
    toy_checkpoint(first, epoch=2, cfg=cfg)
    assert go_on() is None
    with pytest.raises(UserError, match=f"'{first}' is of a run with other keys.*'train.seed' was 1 and is 5"):
        go_on("train.seed", 5)
    toy_checkpoint(first, epoch=3, cfg=cfg)
    toy_checkpoint(second, kind="relation", epoch=2, cfg=cfg)
    with pytest.raises(UserError, match=f"'{second}' is of a run with other keys.*'relation.k'"):
        go_on("relation.k", 7)
    with pytest.raises(UserError, match=f"would train stage 1 on from epoch 3, but stage 2 .'{second.parent}'"):
        go_on("train.max_epoch", 4)
    assert go_on("relation.train.max_epoch", 5) is None
    assert go_on() is None  # its metrics are missing
    metrics = {"rows": [1], "history": {"stage1": [1, 2, 3], "stage2": [1, 2]}}
    ckpt.write_json(tmp_path / "run" / "metrics.json", metrics)
    assert go_on() == metrics and go_on("relation.train.max_epoch", 3) is None
    assert go_on(stages=[1]) == metrics and go_on("relation.k", 7, stages=[1]) == metrics
    assert guard(make_run(tmp_path, *keys, stages=[], resume=True)) is None
    second.unlink()
    assert go_on() is None
    assert go_on("train.max_epoch", 4) is None  # no stage behind it was trained


def test_what_is_written_at_the_start(tmp_path):
    run = make_run(tmp_path, *BOTH)
    folders = [run.folder / part for part in ("", "stage1", "stage2", "bank", "plots")]
    leftovers = [folder / ".x.99999999.tmp" for folder in folders]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    write_context(run)
    assert not any(path.exists() for path in leftovers)
    assert (run.folder / "config.yml").read_text() == run.cfg.dump()
    assert json.loads((run.folder / "environment.json").read_text()).keys() >= {"python", "packages"}
    # a test by the run's own keys leaves them
    (run.folder / "config.yml").write_text("old")
    (run.folder / "environment.json").unlink()
    run.stages = []
    write_context(run)
    assert (run.folder / "config.yml").read_text() == "old" and not (run.folder / "environment.json").exists()
    (run.folder / "config.yml").unlink()
    write_context(run)
    assert (run.folder / "config.yml").is_file() and (run.folder / "environment.json").is_file()
    run.results = run.folder / "tests" / "a"
    write_context(run)
    assert (run.results / "config.yml").read_text() == run.cfg.dump() and (run.results / "environment.json").is_file()
    (run.folder / "config.yml").write_text("old")
    run.stages, run.results = [1], run.folder
    write_context(run)
    assert (run.folder / "config.yml").read_text() == run.cfg.dump()


def test_what_is_written_at_the_end(tmp_path, monkeypatch):
    plots, order = [], []
    monkeypatch.setattr(folder_module, "plot_history", lambda history, folder: plots.append((history, folder)))
    for name in ("write_text", "write_json"):
        write = getattr(ckpt, name)
        monkeypatch.setattr(ckpt, name, lambda path, value, write=write: (order.append(path.name), write(path, value)))
    run = make_run(tmp_path)
    run.results = tmp_path / "results"
    run.results.mkdir()
    run.rows, run.history, run.selected = [row(), row("x")], {"stage1": [{"loss": float("nan")}]}, {"stage1": 3}
    run.datamanager, run.notes = SimpleNamespace(notes=["of the data"]), ["of the run"]
    assert write_results(run) == ["of the data", "of the run"] and order == ["table.md", "metrics.json"]
    assert plots == [(run.history, run.results / "plots")]
    assert (run.results / "table.md").read_text() == markdown_table(run.rows) + "\n"
    assert json.loads((run.results / "metrics.json").read_text()) == {
        "rows": [found.as_dict() for found in run.rows],
        "history": {"stage1": [{"loss": None}]},
        "selected_epoch": {"stage1": 3},
        "notes": ["of the data", "of the run"],
    }
    run.datamanager = SimpleNamespace()
    assert write_results(run) == ["of the run"]


# --- reading it again ------------------------------------------------------------------------------------------------
def test_reading_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    with pytest.raises(UserError, match=f"'{tmp_path}' holds no finished run \\('{path}' does not exist\\)"):
        records.read_metrics(tmp_path)
    whole = {"rows": [row().as_dict()], "history": {}, "selected_epoch": {}, "notes": []}

    def read(**changed):
        ckpt.write_json(path, {**whole, **changed})
        return records.read_metrics(str(tmp_path))

    assert read() == whole
    for part in ("target", "protocol", "method", "mAP", "mINP", "cmc", "parameters"):
        short = row().as_dict()
        del short[part]
        with pytest.raises(UserError, match=f"'{path}' is damaged"):
            read(rows=[row().as_dict(), short])
    for changed in ({"rows": []}, {"rows": {}}, {"rows": [1]}, {"rows": None}, {"history": []}, {"selected_epoch": None}):
        with pytest.raises(UserError, match=f"'{path}' is damaged .its table or history is missing.; test the run again"):
            read(**changed)
    for part, value in (
        *(("target", 1), ("protocol", []), ("method", None), ("mAP", None), ("mAP", "x"), ("mAP", float("inf"))),
        *(("mAP", 1.5), ("mINP", -0.1), ("mINP", True), ("cmc", []), ("cmc", {}), ("cmc", {"1": 2}), ("cmc", {"x": 1})),
        *(("parameters", None), ("parameters", "x"), ("seconds", None), ("queries", -1), ("metric", 3), ("verification", 1)),
    ):
        with pytest.raises(UserError, match=f"'{path}' is damaged .'{part}' of a row is .*; test the run again"):
            read(rows=[row().as_dict(), {**row().as_dict(), part: value}])
    for changed in ({"notes": None}, {"notes": [1]}, {"history": {"stage1": 1}}, {"selected_epoch": {"stage1": "x"}}):
        with pytest.raises(UserError, match=f"'{path}' is damaged .*; test the run again"):
            read(**changed)
    for seconds in ("seconds", "metric"):
        older = row().as_dict()
        del older[seconds]
        assert read(rows=[older])["rows"] == [older]
    path.write_text("{")
    with pytest.raises(UserError, match=f"'{path}'.*metrics of a run.*relreid test|metrics of a run.*'{path}'"):
        records.read_metrics(tmp_path)


def test_numbers_that_are_none():
    nan, inf = float("nan"), float("inf")
    assert records.without_nan({"a": [nan, inf, -inf, 1.5, {"b": nan}], "c": "nan", "d": 3, "e": None, "f": True}) == {
        "a": [None, None, None, 1.5, {"b": None}],
        "c": "nan",
        "d": 3,
        "e": None,
        "f": True,
    }
    assert records.without_nan(0.0) == 0.0 and records.without_nan(nan) is None


# --- tables ----------------------------------------------------------------------------------------------------------
ROWS = [
    row(),
    row("+ something longer", target="other", score=0.25, queries=12, metric="cosine; single-gallery-shot CMC, 10 draws"),
    row("+ re-ranking", protocol="transductive", score=1.0, parameters=0, seconds=12.0),
    row("+ more", score=0.999),
]


def test_a_table_as_text():
    assert text_table([]) == markdown_table([]) == ""
    assert text_table(ROWS) == "\n".join(
        [
            "set · inductive: every query alone with the gallery · 7 queries",
            "  method                  mAP       R1       R5      R10     mINP   params     time",
            "  image model            50.0     50.0     75.0     87.5     25.0    1.25M   1.23 s",
            "  + more                 99.9     99.9     75.0     87.5     50.0    1.25M   1.23 s",
            "",
            "set · transductive: all queries and the gallery look at each other · 7 queries",
            "  method                  mAP       R1       R5      R10     mINP   params     time",
            "  + re-ranking          100.0    100.0     75.0     87.5     50.0    0.00M  12.00 s",
            "",
            "other · inductive: every query alone with the gallery · 12 queries · single-gallery-shot CMC",
            "  method                  mAP       R1       R5      R10     mINP   params     time",
            "  + something longer     25.0     25.0     75.0     87.5     12.5    1.25M   1.23 s",
        ]
    )


def test_a_table_as_markdown():
    assert markdown_table(ROWS[1:3]) == "\n".join(
        [
            "**other**, inductive: every query alone with the gallery · single-gallery-shot CMC",
            "",
            "| method | mAP | R1 | R5 | R10 | mINP | params | time |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            "| + something longer | 25.0 | 25.0 | 75.0 | 87.5 | 12.5 | 1.25M | 1.23 s |",
            "",
            "**set**, transductive: all queries and the gallery look at each other",
            "",
            "| method | mAP | R1 | R5 | R10 | mINP | params | time |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            "| + re-ranking | 100.0 | 100.0 | 75.0 | 87.5 | 50.0 | 0.00M | 12.00 s |",
        ]
    )
    odd = row(cmc={"2": 0.5, "3": 1.0})
    assert "| method | mAP | R2 | R3 | mINP |" in markdown_table([odd])
    assert "| image model | 50.0 | 50.0 | 100.0 | 25.0 |" in markdown_table([odd])


# --- ranked lists ----------------------------------------------------------------------------------------------------
def ranked_scene(folder, queries=5, count=9):
    draw = torch.Generator().manual_seed(2)

    def part(name, size, shift):
        items = []
        for i in range(size):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 12), (10 * i, 100 + shift, 50)).save(path)
            items.append((str(path), i % 3, (i + shift) % 2, 0))
        values = torch.randn(size, 4, generator=draw) * torch.arange(1, size + 1)[:, None]
        sets = Features(values, *(np.array([item[k] for item in items]) for k in (1, 2)), [item[0] for item in items])
        return items, sets

    return part("q", queries, 0), part("g", count, 1)


def naive_lists(data, metric, topk):
    """Nearest gallery images by a loop, without those of the query's identity and camera."""
    lists = []
    for feature, pid, camera in zip(data.query.features.double(), data.query.pids, data.query.camids):
        gallery = data.gallery.features.double()
        away = (gallery - feature).norm(dim=1)
        if metric == "cosine":
            away = 1 - (gallery @ feature) / gallery.norm(dim=1) / feature.norm()
        order = [int(i) for i in torch.argsort(away, stable=True)]
        junk = (data.gallery.pids == pid) & (data.gallery.camids == camera)
        left = [i for i in order if not junk[i]][:topk]
        lists.append([(i, bool(data.gallery.pids[i] == pid)) for i in left])
    return lists


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("chunk", [2**22, 20, 1])
def test_the_nearest_images_of_every_query(tmp_path, metric, chunk, monkeypatch):
    monkeypatch.setattr(ranked, "_CHUNK_VALUES", chunk)
    (_, query), (_, gallery) = ranked_scene(tmp_path)
    data = TestFeatures(query, gallery)
    scorer = Scorer(data, EvaluationOptions(metric=metric))
    for topk in (3, 9, 50):
        indices, matched = ranked.ranked_lists(scorer, query.features, gallery.features, scorer.metric(), topk)
        assert indices.shape == matched.shape == (5, min(topk, 9)) and matched.dtype == bool
        for found, hits, wanted in zip(indices, matched, naive_lists(data, metric, topk)):
            assert [(int(i), bool(hit)) for i, hit in zip(found, hits) if i >= 0] == wanted
            assert not hits[found < 0].any()
    calls = []
    distances = Scorer.distances
    monkeypatch.setattr(Scorer, "distances", lambda self, q, g, m: (calls.append(len(q)), distances(self, q, g, m))[1])
    ranked.ranked_lists(scorer, query.features, gallery.features, scorer.metric(), 3)
    assert calls == {2**22: [5], 20: [2, 2, 1], 1: [1] * 5}[chunk]
    calls.clear()
    again = ranked.ranked_lists(scorer, query.features, gallery.features, scorer.metric(rerank=True), 9)
    assert calls == [5]  # re-ranking sees all queries at once
    whole = scorer.distances(query.features, gallery.features, Metric(metric, rerank=True))
    for found, row_of, pid, camera in zip(again[0], whole, query.pids, query.camids):
        order = [i for i in torch.argsort(row_of.double(), stable=True).tolist()]
        wanted = [i for i in order if not (gallery.pids[i] == pid and gallery.camids[i] == camera)]
        assert [int(i) for i in found if i >= 0] == wanted


def test_pictures_of_ranked_lists(tmp_path, monkeypatch, capsys):
    (queries, query), (items, gallery) = ranked_scene(tmp_path / "data")
    data = TestFeatures(query, gallery)
    cfg = settings("test.visrank_topk", 4, "data.height", 20, "data.width", 10)
    run = SimpleNamespace(cfg=cfg, results=tmp_path, read_picture=lambda path: Image.open(path))
    run.datamanager = SimpleNamespace(test_dataset={"sets/made": {"query": queries, "gallery": items}})
    evaluator = Evaluator("sets/made", data, options=EvaluationOptions(), parameters=0)
    folder = tmp_path / "visrank_made"
    folder.mkdir()
    (folder / "old.jpg").touch()
    assert ranked.draw_target(run, evaluator) == folder
    assert capsys.readouterr().out == f"sets/made: ranked lists of 5 queries are in '{folder}'\n"
    assert sorted(path.name for path in folder.iterdir()) == [f"{i}.jpg" for i in range(5)]
    wanted = naive_lists(data, "euclidean", 4)
    colours = {True: (0, 160, 0), False: (220, 0, 0)}
    for number in range(5):
        sheet = np.asarray(Image.open(folder / f"{number}.jpg").convert("RGB")).astype(int)
        assert sheet.shape == (20, 10 + 24 + 4 * 16 - 6, 3)

        def near(y, x, colour, sheet=sheet):
            return np.abs(sheet[y, x] - colour).max() < 60

        assert (
            near(1, 1, (0, 0, 0))
            and near(10, 0, (0, 0, 0))
            and near(10, 5, (10 * number, 100, 50))
            and near(10, 22, (255, 255, 255))
        )
        for column, (index, hit) in enumerate(wanted[number]):
            left = 10 + 24 + 16 * column
            assert near(1, left + 4, colours[hit]) and near(10, left + 5, (10 * index, 101, 50))
        for column in range(len(wanted[number]), 4):
            assert near(10, 10 + 24 + 16 * column + 5, (255, 255, 255))
    # at another place of the same name
    taken = [folder, tmp_path / "visrank_made-2"]
    assert ranked.draw_target(run, evaluator, [folder]) == tmp_path / "visrank_made-2"
    assert ranked.draw_target(run, evaluator, taken) == tmp_path / "visrank_made-3"


def test_names_of_ranked_lists(tmp_path):
    paths = ["a/x.png", "b/x.png", "a/y.jpg", "a/x.jpg", "c/x.png", "c/x.bmp"]
    assert ranked._file_names(paths) == ["a_x", "b_x", "y", "a_x-2", "c_x", "c_x-2"]


def test_a_picture_that_cannot_be_written(tmp_path, monkeypatch):
    (queries, query), (items, gallery) = ranked_scene(tmp_path / "data", queries=1)
    lists = np.array([[0]]), np.array([[True]])

    def refuse(self, *values, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", refuse)
    path = tmp_path / "out" / "0.jpg"
    with pytest.raises(UserError, match=f"'{path}' cannot be written"):
        ranked.draw_ranked_lists(tmp_path / "out", lists, queries, items, read=Image.open, size=(20, 10))
    assert not path.exists() and os.listdir(path.parent) == [] and Path(path.parent).is_dir()
