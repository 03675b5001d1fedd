"""What stages ask of engines, optimisers and checkpoints, with engines and networks that only note what they are told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from wiring import settings, toy_checkpoint

from relreid_plugin.data.cameras import CameraTable
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine import network as networks
from relreid_plugin.engine import stages
from relreid_plugin.engine.base import StageContext
from relreid_plugin.engine.stages import ImageStage, Stage, take_weights, train_engine
from relreid_plugin.errors import UserError

BEST, LAST = "best.pth.tar", "last.pth.tar"


# --- any stage -------------------------------------------------------------------------------------------------------
def test_a_stage_and_its_folder(tmp_path):
    stage = Stage()
    stage.number, stage.kind = 3, "image"
    run = SimpleNamespace(stage_folder=lambda number: tmp_path / f"stage{number}", history={}, selected={})
    folder = tmp_path / "stage3"
    assert stage.name == "stage3" and stage.folder(run) == folder
    assert stage.tested_path(run) == folder / LAST and stage.newest(run) is None
    toy_checkpoint(folder / LAST, epoch=4)
    assert stage.tested_path(run) == folder / LAST and stage.newest(run)["epoch"] == 4
    toy_checkpoint(folder / BEST, epoch=2)
    assert stage.tested_path(run) == folder / BEST and stage.newest(run)["epoch"] == 4
    stage.note_tested(run, {"epoch": 2, "history": ["old"]}, {"epoch": 4, "history": ["new"]})
    assert run.history == {"stage3": ["new"]} and run.selected == {"stage3": 2}
    stage.kind = "relation"
    with pytest.raises(UserError, match="holds the image model, but the relation model is wanted"):
        stage.newest(run)
    assert stage.rows(run, None) == [] and stage.check(run) is stage.load(run) is stage.refiner(run) is None
    assert (Stage.number, Stage.refines) == (1, False)
    with pytest.raises(NotImplementedError):
        stage.train(run)


class Engine:
    """An engine that notes what it is asked, in order."""

    def __init__(self, context=None):
        self.calls, self.first_epoch, self.history = [], 0, []
        self.types = []  # made float64 before how many calls; float32 again
        self.updates = SimpleNamespace(
            widen=lambda engine: self.types.append(("widen", engine is self, [call[0] for call in self.calls])),
            narrow=lambda engine: self.types.append(("narrow", engine is self)),
        )
        if context is not None:
            self.context = context

    def attach(self, context, **extra):
        self.calls.append(("attach", context, extra))
        self.context = context

    def restore(self, state, path):
        self.calls.append(("restore", state["epoch"], path))
        self.first_epoch, self.history = state["epoch"], state["history"]

    def skip_epochs(self, count):
        self.calls.append(("skip", count))
        self.first_epoch = count

    def fit(self, **options):
        self.calls.append(("fit", options))

    def state(self, epoch):
        self.calls.append(("state", epoch))
        return {"kind": self.context.kind, "epoch": epoch, "state_dict": {}}

    @property
    def did(self):
        return [name for name, *_ in self.calls]


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is 7 seconds after the one before."""
    seconds = iter(range(100, 10_000, 7))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))


def later(tmp_path, engine, *, resume=False, max_epoch=3, belongs=None, **options):
    """Train a later stage by :func:`train_engine`."""
    stage, cfg = Stage(), settings("train.print_freq", 5)
    stage.number, stage.kind = 2, "finetune"
    context = StageContext(kind="finetune", folder=tmp_path / "stage2", max_epoch=max_epoch)
    run = SimpleNamespace(resume=resume, cfg=cfg)
    announce = lambda: engine.calls.append(("announce",))  # noqa: E731
    belongs = belongs or (lambda state, path: engine.calls.append(("belongs", state["epoch"], path)))
    train_engine(run, stage, engine, {"loss": 1}, context, announce=announce, belongs=belongs, **options)
    return context


def test_a_later_stage_from_its_start(tmp_path, capsys, clock):
    engine = Engine()
    context = later(tmp_path, engine, resume=True, start_eval=2)
    assert engine.calls == [
        ("attach", context, {"loss": 1}),
        ("announce",),
        ("fit", {"print_freq": 5, "start_eval": 2}),
    ]
    assert capsys.readouterr().out == "stage 2 took 7 s\n" and not context.last.exists()
    assert engine.types == [("widen", True, ["attach"])]


def test_a_later_stage_goes_on(tmp_path, capsys, clock):
    cfg = settings("train.print_freq", 5)
    last = tmp_path / "stage2" / LAST
    toy_checkpoint(last, kind="finetune", epoch=2, cfg=cfg)
    engine = Engine()
    later(tmp_path, engine, resume=True)
    assert engine.calls[1:] == [("belongs", 2, last), ("restore", 2, last), ("announce",), ("fit", {"print_freq": 5})]
    assert capsys.readouterr().out == f"resuming stage 2 after epoch 2 from '{last}'\nstage 2 took 7 s\n"
    # which keys are others now is said
    toy_checkpoint(last, kind="finetune", epoch=2, cfg=settings("train.print_freq", 6))
    later(tmp_path, Engine(), resume=True)
    assert "going on with other keys: train.print_freq 5 (was 6)" in capsys.readouterr().out
    # nothing left to do
    toy_checkpoint(last, kind="finetune", epoch=3, cfg=cfg)
    engine = Engine()
    later(tmp_path, engine, resume=True)
    assert engine.did == ["attach", "belongs", "restore"]
    assert "stage 2 is complete (3 epochs)\n" in capsys.readouterr().out
    # without --resume it starts anew
    engine = Engine()
    later(tmp_path, engine)
    assert engine.did == ["attach", "announce", "fit"]
    # over other weights it does not go on
    engine = Engine()

    def other(state, path):
        raise UserError("other weights")

    with pytest.raises(UserError, match="other weights"):
        later(tmp_path, engine, resume=True, belongs=other)
    assert engine.did == ["attach"]
    toy_checkpoint(last, kind="image", epoch=3, cfg=cfg)
    with pytest.raises(UserError, match="holds the image model, but the finetune model"):
        later(tmp_path, Engine(), resume=True)


def test_a_later_stage_without_epochs_keeps_what_it_has(tmp_path):
    engine = Engine()
    context = later(tmp_path, engine, max_epoch=0)
    assert engine.did == ["attach", "announce", "fit", "state"] and engine.calls[-1] == ("state", 0)
    assert ckpt.load(context.last, kind="finetune")["epoch"] == 0
    engine = Engine()
    later(tmp_path, engine, max_epoch=0)
    assert engine.did == ["attach"]


# --- stage 1 ---------------------------------------------------------------------------------------------------------
class Network:
    """A network's side of a run that notes in which order it is asked."""

    trains, build_model = True, networks.Network.build_model

    def __init__(self, alone=False):
        self.alone, self.calls = alone, []
        self.manager = SimpleNamespace(
            num_train_pids=6, val_query=[], val_gallery=[], label_map={"0001": 0}, train_loader="loader"
        )
        self.engine = Engine()

    def open_data(self, run):
        self.calls.append("data")
        return self.manager

    def camera_table(self, run):
        self.calls.append("cameras")
        return CameraTable.of([(0, "a", "1"), (4, "a", "5")], ["a"])

    def stands_alone(self, run):
        return self.alone

    def build_engine(self, run):
        self.calls.append("engine")
        return self.engine, {"loss": "centers"}

    def data_notes(self, run):
        return [f"{run.cameras.size} cameras"]

    def classified(self, items):
        return items // 3

    def prepare_weights(self, model, file):
        pass


def image_run(tmp_path, *keys, stages=(1,), resume=False, network=None):
    """A run as stage 1 sees it."""
    cfg = settings("model.name", "bnneck_baseline", *keys)
    first = ImageStage()
    run = SimpleNamespace(cfg=cfg, stages=list(stages), resume=resume, network=network or Network(), first=first, watch=None)
    run.stage_folder = lambda number: tmp_path / f"stage{number}"
    run.features = SimpleNamespace(validate="validate", monitor="monitor")
    run.history, run.selected, run.planned, run.notes = {}, {}, [first], []

    def place():
        run.network.calls.append("place")
        run.bare = run.model

    run.place_model, run.static = place, lambda: {"config": cfg.dump()}
    return run


@pytest.fixture
def asked(monkeypatch):
    """What building stage 1 asks of the rest, by name; the model is a linear layer with a classifier."""
    calls = {name: [] for name in ("model", "weights", "batches", "seeds")}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Linear(3, 2), nn.Linear(2, 6)

    def build(*values, **options):
        calls["model"].append((values, options))
        return Model()

    monkeypatch.setattr(networks, "build_model", build)
    monkeypatch.setattr(stages, "take_weights", lambda *values, **options: calls["weights"].append((values, options)))
    monkeypatch.setattr(stages, "check_batches", lambda *values, **options: calls["batches"].append((values, options)))
    monkeypatch.setattr(stages, "set_seed", lambda seed: calls["seeds"].append(seed))
    return calls


def test_building_stage_1(tmp_path, asked, capsys):
    keys = ["train.seed", 9, "train.max_epoch", 5, "train.checkpoint_freq", 4, "test.eval_freq", 3, "test.start_eval", 2]
    run = image_run(tmp_path, *keys)
    run.first.build(run)
    assert run.network.calls == ["data", "cameras", "place", "engine"] and asked["seeds"] == [9, 9]
    ((values, options),) = asked["model"]
    assert values == ("bnneck_baseline", 6, "softmax", True, False) and options == {"cfg": run.cfg, "num_cameras": 2}
    assert run.parameters == 3 * 2 + 2 and run.engine is run.network.engine and asked["weights"] == []
    rows = run.engine.training_cameras(torch.tensor([4, 0, 1]))
    assert rows.tolist() == [1, 0, -1]
    ((name, context, extra),) = run.engine.calls
    assert name == "attach" and extra == {"loss": "centers"}
    assert context == StageContext(
        kind="image",
        folder=tmp_path / "stage1",
        max_epoch=5,
        checkpoint_freq=4,
        eval_freq=3,
        start_eval=2,
        static={"config": run.cfg.dump()},
        monitor="monitor",
    )
    (((bare, loader), options),) = asked["batches"]
    assert bare is run.bare and loader == "loader"
    assert options == {"identities": 6, "classified": run.network.classified}
    assert run.notes[-1] == "2 cameras" and "2 cameras" not in capsys.readouterr().out


def test_stage_1_says_which_keys_are_idle(tmp_path, asked, capsys):
    run = image_run(tmp_path, "train.warmup_factor", 0.5)
    run.first.build(run)
    assert len(run.notes) == 2 and "train.warmup_factor" in run.notes[0]
    assert capsys.readouterr().out == f"note: {run.notes[0]}\n"


def test_held_out_identities_validate_stage_1(tmp_path, asked):
    run = image_run(tmp_path)
    run.network.manager.val_query = [("a.png", 0, 0)]
    run.first.build(run)
    assert (run.engine.context.validate, run.engine.context.monitor) == ("validate", None)


def test_the_loss_decides_what_the_model_returns(tmp_path, asked):
    for loss, wanted in (("softmax", "softmax"), ("triplet", "triplet"), ("composite", "triplet")):
        run = image_run(tmp_path, "loss.name", loss, "sampler.train_sampler", "RandomIdentitySampler")
        run.first.build(run)
        assert asked["model"][-1][0][2] == wanted


def test_what_is_checked_before_stage_1(tmp_path, asked):
    def build(stages, *keys):
        run = image_run(tmp_path, *keys, stages=stages)
        checked = []
        for number in (2, 3):
            stage = Stage()
            stage.number = number
            stage.check = lambda run, number=number: checked.append(number)
            run.planned.append(stage)
        asked["batches"].clear()
        run.first.build(run)
        return len(asked["batches"]), checked

    assert build([1]) == (1, []) and build([]) == (0, []) and build([1], "train.max_epoch", 0) == (0, [])
    assert build([1], "train.max_epoch", 1) == (1, [])
    both = ("train.stages", [1, 2], "relation.attention", "magformer")
    assert build([1, 2], *both) == (1, [2]) and build([2], *both) == (0, [2]) and build([], *both) == (0, [2])


HERE = [(True, [1], False), (False, [], False), (False, [2], False), (False, [1], True)]


@pytest.mark.parametrize("resume,stages,alone", HERE)
def test_its_own_checkpoint_has_the_weights(tmp_path, asked, resume, stages, alone):
    keys = ["backbone.weights", "w.pth", "model.resume", "r.pth"]
    network = Network(alone)
    run = image_run(tmp_path, *keys, stages=stages, resume=resume, network=network)
    if not alone:
        assert not run.first.will_restore(run)
        toy_checkpoint(tmp_path / "stage1" / LAST)
    assert run.first.will_restore(run)
    run.first.build(run)
    ((values, options),) = asked["model"]
    assert values[3] is False and options["cfg"].backbone.weights == "" and run.cfg.backbone.weights == "w.pth"
    assert asked["weights"] == []


def test_a_run_that_starts_anew_takes_other_weights(tmp_path, asked):
    toy_checkpoint(tmp_path / "stage1" / LAST)  # there, but neither resumed nor tested
    run = image_run(tmp_path, "backbone.weights", "w.pth", "model.load_weights", "l.pth", "model.resume", "r.pth")
    assert not run.first.will_restore(run)
    run.first.build(run)
    ((values, options),) = asked["model"]
    assert values[3] is False and options["cfg"] is run.cfg
    (first, one), (second, two) = asked["weights"]
    assert first == (run, run.model, "model.load_weights") and one == {}
    assert second == (run, run.bare, "model.resume") and two == {"only_check": True}
    run = image_run(tmp_path, "model.pretrained", False)
    run.first.build(run)
    assert asked["model"][-1][0][3] is False


def trained(run, tmp_path, *, max_epoch=3):
    """Stage 1 of a run, trained by an engine that only takes notes."""
    context = StageContext(kind="image", folder=tmp_path / "stage1", max_epoch=max_epoch)
    run.engine, run.datamanager, run.parameters = Engine(context), run.network.manager, 1_250_000
    run.model = run.bare = nn.Linear(3, 2)
    run.first.train(run)
    return run.engine


def test_training_stage_1(tmp_path, capsys, clock):
    keys = ["test.start_eval", 4, "train.print_freq", 7, "train.fixbase_epoch", 2, "train.open_layers", ["body"]]
    run = image_run(tmp_path, *keys, "train.max_epoch", 3)
    engine = trained(run, tmp_path)
    options = {"start_eval": 4, "print_freq": 7, "fixbase_epoch": 2, "open_layers": ["body"]}
    assert engine.calls == [("fit", options)]
    assert capsys.readouterr().out == "stage 1: bnneck_baseline, 1.25M parameters, 3 epochs\nstage 1 took 7 s\n"


def test_stage_1_goes_on(tmp_path, capsys, clock):
    last = tmp_path / "stage1" / LAST
    run = image_run(tmp_path, "train.max_epoch", 3, resume=True)
    static = {"num_classes": 6, "label_map": {"0001": 0}}
    toy_checkpoint(last, epoch=2, cfg=run.cfg, **static)
    engine = trained(run, tmp_path)
    assert engine.did == ["restore", "fit"] and engine.calls[0] == ("restore", 2, last)
    assert engine.types == [("widen", True, [])]
    assert capsys.readouterr().out.startswith(f"resuming stage 1 after epoch 2 from '{last}'\n")
    assert trained(image_run(tmp_path, resume=False), tmp_path).did == ["fit"]
    # complete
    toy_checkpoint(last, epoch=3, cfg=run.cfg, **static)
    capsys.readouterr()
    assert trained(run, tmp_path).did == ["restore"]
    assert capsys.readouterr().out.endswith("stage 1 is complete (3 epochs)\n")
    # other keys, said; other data, refused
    toy_checkpoint(last, epoch=2, cfg=settings("model.name", "bnneck_baseline", "train.print_freq", 6), **static)
    assert trained(run, tmp_path).did == ["restore", "fit"]
    assert "train.print_freq" in capsys.readouterr().out
    for changed in ({"num_classes": 7}, {"label_map": {"0002": 0}}):
        toy_checkpoint(last, epoch=2, cfg=run.cfg, **{**static, **changed})
        with pytest.raises(UserError, match=rf"'{last}' was trained on other identities \(\d\) than 'data.root reid-data'"):
            trained(run, tmp_path)
    toy_checkpoint(last, kind="relation", epoch=2, cfg=run.cfg, **static)
    with pytest.raises(UserError, match="holds the relation model, but the image model"):
        trained(run, tmp_path)


def test_stage_1_goes_on_from_a_file(tmp_path, capsys, monkeypatch):
    source = tmp_path / "elsewhere.pth.tar"
    run = image_run(tmp_path, "train.max_epoch", 3, "model.resume", source)
    static = {"num_classes": 6, "label_map": {"0001": 0}}
    toy_checkpoint(source, epoch=1, cfg=run.cfg, **static)
    engine = trained(run, tmp_path)
    assert engine.did == ["restore", "fit"] and engine.calls[0] == ("restore", 1, source)
    assert f"resuming stage 1 after epoch 1 from '{source}'\n" in capsys.readouterr().out
    # with a checkpoint of its own, that one is gone on from
    last = tmp_path / "stage1" / LAST
    toy_checkpoint(last, epoch=2, cfg=run.cfg, **static)
    run.resume = True
    assert trained(run, tmp_path).calls[0] == ("restore", 2, last)
    run.resume = False
    assert trained(run, tmp_path).calls[0] == ("restore", 1, source)
    # other keys are refused, and other data
    toy_checkpoint(source, epoch=1, cfg=settings("train.seed", 5), **static)
    with pytest.raises(UserError, match=f"'{source}' is of a run with other keys"):
        trained(run, tmp_path)
    toy_checkpoint(source, epoch=1, cfg=run.cfg, num_classes=9, label_map={})
    with pytest.raises(UserError, match="was trained on other identities"):
        trained(run, tmp_path)
    # of a file of another program only the weights are taken
    torch.save({"state_dict": {}}, source)
    taken = []
    monkeypatch.setattr(stages, "take_weights", lambda *values, **options: taken.append((values, options)))
    assert trained(run, tmp_path).did == ["fit"]
    assert taken == [((run, run.model, "model.resume"), {})]
    assert f"'{source}' is no checkpoint of stage 1 of this plug-in: only its weights are taken" in capsys.readouterr().out
    source.unlink()
    with pytest.raises(UserError, match="does not exist"):
        trained(run, tmp_path)


def test_epochs_that_were_trained_elsewhere(tmp_path, capsys):
    engine = trained(image_run(tmp_path, "train.start_epoch", 2, "train.max_epoch", 3), tmp_path)
    assert engine.did == ["skip", "fit"] and engine.calls[0] == ("skip", 2)
    assert capsys.readouterr().out.startswith("stage 1 starts after epoch 2 ('train.start_epoch')\n")
    assert trained(image_run(tmp_path, "train.start_epoch", 1, "train.max_epoch", 3), tmp_path).did == ["skip", "fit"]
    run = image_run(tmp_path, "train.start_epoch", 2, "train.max_epoch", 3, resume=True)
    static = {"num_classes": 6, "label_map": {"0001": 0}}
    toy_checkpoint(tmp_path / "stage1" / LAST, epoch=1, cfg=run.cfg, **static)
    assert trained(run, tmp_path).did == ["restore", "fit"]
    toy_checkpoint(tmp_path / "stage1" / LAST, epoch=0, cfg=run.cfg, history=[{"epoch": 0}], **static)
    assert trained(run, tmp_path).did == ["restore", "fit"]  # what it was is known


def test_stage_1_without_epochs(tmp_path):
    engine = trained(image_run(tmp_path, "train.max_epoch", 0), tmp_path, max_epoch=0)
    assert engine.did == ["fit", "state"] and engine.calls[-1] == ("state", 0)
    assert ckpt.load(tmp_path / "stage1" / LAST, kind="image")["epoch"] == 0
    engine = trained(image_run(tmp_path, "train.max_epoch", 0), tmp_path, max_epoch=0)
    assert engine.did == []  # nothing is written over it


def loaded(run, tmp_path):
    """Stage 1 of a run with the weights that are tested."""
    run.engine = Engine(StageContext(kind="image", folder=tmp_path / "stage1", max_epoch=3))
    run.datamanager = run.network.manager
    torch.manual_seed(0)
    run.model = run.bare = nn.Linear(3, 2)
    run.first.load(run)
    return run


def test_the_weights_of_stage_1_that_are_tested(tmp_path, capsys, monkeypatch):
    load, read = ckpt.load, []
    monkeypatch.setattr(ckpt, "load", lambda path, kind: (read.append(path), load(path, kind=kind))[1])
    weights = {name: torch.full(shape, value) for name, shape, value in (("weight", (2, 3), 1.0), ("bias", (2,), 2.0))}
    better = {name: value + 5 for name, value in weights.items()}
    last, best = tmp_path / "stage1" / LAST, tmp_path / "stage1" / BEST
    toy_checkpoint(last, epoch=3, weights=weights, history=["a", "b", "c"])
    run = loaded(image_run(tmp_path), tmp_path)
    assert run.bare.bias[0].item() == 2.0 and run.selected == {"stage1": 3} and run.history == {"stage1": ["a", "b", "c"]}
    fingerprint = ckpt.fingerprint(run.bare)
    assert run.fingerprint == fingerprint and read == [last]  # once
    assert run.engine.types == [("narrow", True)]
    toy_checkpoint(best, epoch=1, weights=better, history=["a"])
    run = loaded(image_run(tmp_path), tmp_path)
    assert run.bare.bias[0].item() == 7.0 and run.selected == {"stage1": 1} and run.history == {"stage1": ["a", "b", "c"]}
    assert run.fingerprint == ckpt.fingerprint(run.bare) != fingerprint and capsys.readouterr().out == ""
    # weights from elsewhere beside them are not those that are tested: said, where nothing is trained
    for key in ("model.load_weights", "model.resume"):
        loaded(image_run(tmp_path, key, "w.pth", stages=[]), tmp_path)
        assert capsys.readouterr().out == (
            f"note: the weights that are tested are those of '{best}', the run's own, not those of '{key}'.\n"
        )
        loaded(image_run(tmp_path, key, "w.pth"), tmp_path)
        assert capsys.readouterr().out == ""
    loaded(image_run(tmp_path, stages=[]), tmp_path)
    assert capsys.readouterr().out == ""
    toy_checkpoint(best, epoch=1, weights={"weight": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=f"checkpoint '{best}' belongs to another model"):
        loaded(image_run(tmp_path), tmp_path)
    toy_checkpoint(best, kind="relation", weights=weights)
    with pytest.raises(UserError, match="holds the relation model, but the image model"):
        loaded(image_run(tmp_path), tmp_path)


def test_weights_from_elsewhere_are_tested(tmp_path, monkeypatch):
    run = loaded(image_run(tmp_path, "model.load_weights", "w.pth", stages=[]), tmp_path)
    assert run.fingerprint == ckpt.fingerprint(run.bare) and run.selected == {} and run.engine.did == []
    source = tmp_path / "r.pth"
    run = image_run(tmp_path, "model.resume", source, stages=[])
    toy_checkpoint(source, epoch=1, cfg=run.cfg, num_classes=6, label_map={"0001": 0})
    assert loaded(run, tmp_path).engine.calls == [("restore", 1, source)]
    assert run.fingerprint == ckpt.fingerprint(run.bare) and run.selected == {}


def test_what_a_weight_file_is_held_against(monkeypatch, capsys):
    noted = []

    def load(*values, **options):
        noted.append((values, options))
        return SimpleNamespace(sentence=lambda: "all of it")

    monkeypatch.setattr(stages, "load_weight_file", load)
    network, model = Network(), nn.Linear(1, 1)
    for partial in (False, True):
        cfg = settings("relation.load_weights", "w.pth", "model.partial_weights", partial)
        run = SimpleNamespace(cfg=cfg, network=network, datamanager=SimpleNamespace(num_train_pids=np.int64(6)))
        take_weights(run, model, "relation.load_weights")
        values, options = noted.pop()
        assert values == (model, "w.pth") and type(options["classes"]) is int
        assert options == {
            "key": "relation.load_weights",
            "partial": partial,
            "classes": 6,
            "prepare": network.prepare_weights,
            "only_check": False,
        }
    assert capsys.readouterr().out == "all of it\n" * 2
    take_weights(run, model, "relation.load_weights", only_check=True, classes=2)
    assert noted[0][1]["only_check"] is True and noted[0][1]["classes"] == 2 and capsys.readouterr().out == ""
