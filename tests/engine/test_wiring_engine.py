"""What the plug-in's engines do around an epoch of the host's: records, checkpoints, going on, features."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from wiring import seed_all

from relreid_plugin.data.cameras import CameraRows
from relreid_plugin.engine import base
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.base import EngineMixin, ProgressLoader, StageContext
from relreid_plugin.errors import UserError
from relreid_plugin.host import HOST


class Net(nn.Module):
    """Two layers and a mask that is not finite from the start; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.asked: list[tuple] = []

    def forward(self, images, cameras=None):
        self.asked.append((images.clone(), cameras, self.training, torch.is_grad_enabled()))
        return self.head(self.body(images))


class Step(HOST.engine.Engine):
    """The host's engine with a step of gradient descent; what it reports is made up."""

    def __init__(self, manager, model, optimizer, scheduler) -> None:
        super().__init__(manager, False)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.register_model("model", model, optimizer, scheduler)
        self.said: list[dict] = []
        self.opened: list[tuple] = []

    def forward_backward(self, data):
        loss = self.model(data["img"]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.said.pop(0) if self.said else {"loss": 1.0}

    def train(self, print_freq=1, fixbase_epoch=2, open_layers="none"):
        self.opened.append((self.epoch, print_freq, fixbase_epoch, open_layers))
        super().train(print_freq=print_freq, fixbase_epoch=fixbase_epoch, open_layers=open_layers)


class Probe(EngineMixin, Step):
    pass


class Writer:
    """Stands for the loggers."""

    def __init__(self, names, folder, *, first_epoch, batches) -> None:
        self.names, self.folder, self.purge_step, self.scalars, self.ends = names, folder, first_epoch * batches, [], []
        self.flushed: list[int] = []

    def add_scalar(self, name, value, step) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed.append(len(self.scalars))

    def close(self) -> None:
        self.ends.append("closed")

    def abandon(self) -> None:
        self.ends.append("abandoned")


class Watcher:
    """An observer of epochs."""

    tag = "RIB"
    term = state_name = ""

    def __init__(self) -> None:
        self.begun: list[int] = []

    def begin(self, epoch: int) -> None:
        self.begun.append(epoch)

    def end(self) -> dict[str, float]:
        return {"seen": float(self.begun[-1] + 5)}


class Counter:
    """Anything with a state."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state) -> None:
        self.value = state["value"]


def batch(seed: int, size: int = 4):
    draw = torch.Generator().manual_seed(seed)
    return {
        "img": torch.randn(size, 2, generator=draw),
        "pid": torch.arange(size) + 10 * seed,
        "camid": torch.arange(size) + 100 * seed,
        "impath": [f"{seed}-{i}.png" for i in range(size)],
    }


@pytest.fixture(autouse=True)
def events(monkeypatch):
    monkeypatch.setattr(base, "Loggers", Writer)


def make(folder, *, epochs=3, batches=2, parallel=False, scheduled=True, extra=None, **context):
    """An engine attached to a stage in ``folder``."""
    torch.manual_seed(0)
    net = Net()
    model = nn.DataParallel(net) if parallel else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch) if scheduled else None
    manager = SimpleNamespace(
        train_loader=[batch(seed) for seed in range(batches)],
        test_loader={"a": {"query": [batch(5), batch(6, 3)], "gallery": [batch(7)]}},
        transform_tr=SimpleNamespace(transforms=[SimpleNamespace(patchpool=[1, 2])]),
        sources=[],
    )
    engine = Probe(manager, model, optimizer, scheduler)
    engine.attach(StageContext("image", folder, epochs, **context), **(extra or {}))
    engine.net = net
    return engine


def result(value):
    return SimpleNamespace(mAP=np.float32(value), rank=lambda rank: np.float32(value / 2 * rank))


# --- an epoch ----------------------------------------------------------------------------------------------------------
def test_a_progress_bar_is_a_loader(monkeypatch):
    asked = []
    monkeypatch.setattr(base, "tqdm", lambda items, **options: asked.append(options) or iter(items))
    loader = SimpleNamespace(dataset="pictures", batch_size=7)

    class Loader(list):
        dataset = "pictures"

    for label, said in (("plain", "plain"), (lambda: "made", "made")):
        bar = ProgressLoader(Loader([1, 2, 3]), label)
        assert len(bar) == 3 and list(bar) == [1, 2, 3] and bar.dataset == "pictures"
        assert asked.pop() == {"desc": said, "leave": False, "disable": None, "dynamic_ncols": True}
    assert ProgressLoader(loader, "x").batch_size == 7
    with pytest.raises(AttributeError):
        _ = ProgressLoader(loader, "x").neverwhere


def test_what_an_engine_starts_with(tmp_path, monkeypatch):
    engine = make(tmp_path, epochs=4, extra={"center": Counter(3)})
    assert engine.history == [] and engine.best_score is None and engine.best_epoch == 0
    assert engine.first_epoch == 0 and engine.max_epoch == 4
    assert engine.features == {} and engine.results == {}
    assert list(engine.extra_states) == ["center"] and engine.schedule_steps == 1 and engine.test() == 0.0
    assert set(engine.trainable) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert all(engine.trainable.values()) and engine.observers == [] and engine.observers is engine.observers
    asked = []
    monkeypatch.setattr(base, "tqdm", lambda items, **options: asked.append(options["desc"]) or iter(items))
    engine.epoch = 2
    assert len(list(engine.train_loader)) == 2 and asked == ["epoch 3/4"]
    assert not engine.reads_cameras
    engine.net.uses_cameras = True
    assert engine.reads_cameras
    parallel = make(tmp_path, parallel=True)
    assert not parallel.reads_cameras
    parallel.net.uses_cameras = True
    assert parallel.reads_cameras
    assert engine.save_model(1, 0.5, "folder") is None and not list(tmp_path.iterdir())


def test_records_events_and_lines(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 110.0, 126.0, 160.0])
    monkeypatch.setattr(base.time, "perf_counter", lambda: next(clock))
    engine = make(tmp_path, epochs=3)
    engine.said = [{"loss": 1.0, "ce": 4.0}, {"loss": 2.0, "ce": 5.0}, *({"loss": 4.0, "ce": 1.0} for _ in range(4))]
    watcher = Watcher()
    engine.observers.append(watcher)
    engine.fit(print_freq=7)
    assert watcher.begun == [0, 1, 2]
    assert engine.history == [
        {"epoch": 1, "lr": 0.04, "loss": 1.5, "ce": 4.5, "seen": 5.0},
        {"epoch": 2, "lr": 0.02, "loss": 4.0, "ce": 1.0, "seen": 6.0},
        {"epoch": 3, "lr": 0.01, "loss": 4.0, "ce": 1.0, "seen": 7.0},
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines == [
        "epoch 1/3: loss 1.500, ce 4.500, lr 4.00e-02, eta 0:00:20",
        "epoch 2/3: loss 4.000, ce 1.000, lr 2.00e-02, eta 0:00:13",
        "epoch 3/3: loss 4.000, ce 1.000, lr 1.00e-02, eta 0:00:00",
    ]
    assert (engine.writer.names, engine.writer.folder, engine.writer.purge_step) == (("tensorboard",), tmp_path, 0)
    own = [scalar for scalar in engine.writer.scalars if scalar[0].startswith("RIB")]
    assert own == [("RIB/seen", 5.0, 1), ("RIB/seen", 6.0, 2), ("RIB/seen", 7.0, 3)]
    assert engine.writer.ends == ["closed"]
    assert engine.opened == [(0, 7, 0, None), (1, 7, 0, None), (2, 7, 0, None)]
    assert engine.datamanager.transform_tr.transforms[0].patchpool == []


def test_what_the_host_is_told_to_run(tmp_path, monkeypatch):
    asked = []
    engine = make(tmp_path, epochs=5, batches=3)
    monkeypatch.setattr(Step, "run", lambda self, **options: asked.append(options), raising=False)
    engine.first_epoch = 2
    engine.fit(print_freq=4, open_layers=["head"])
    assert asked == [
        {
            "save_dir": str(tmp_path),
            "max_epoch": 5,
            "start_epoch": 2,
            "eval_freq": -1,
            "print_freq": 4,
            "open_layers": ["head"],
        }
    ]
    assert engine.writer.purge_step == 6 and engine.writer.ends == []
    engine.first_epoch, engine.writer = 5, None
    engine.fit()
    assert len(asked) == 1 and engine.writer is None

    def broken(self, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Step, "run", broken, raising=False)
    engine.first_epoch = 0
    with pytest.raises(KeyboardInterrupt):
        engine.fit()
    assert engine.writer.ends == ["abandoned"]


def test_the_hosts_epoch_is_called_with_its_own_defaults(tmp_path):
    engine = make(tmp_path)
    engine._started = 0.0
    engine.training_cameras = CameraRows({4: 0})
    engine.camera_rows = CameraRows({})
    engine.train()
    engine.epoch = 1
    engine.train(print_freq=3, fixbase_epoch=2, open_layers=["head"])
    assert engine.opened == [(0, 10, 0, None), (1, 3, 2, ["head"])]
    assert engine.camera_rows is engine.training_cameras
    assert engine.writer is None and len(engine.history) == 2  # without a writer there are no events


def test_the_time_that_is_left_counts_from_where_the_run_went_on(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(base.time, "perf_counter", lambda: next(clock))
    engine = make(tmp_path, epochs=6)
    engine.first_epoch = engine.epoch = 4
    engine.fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["0:00:10", "0:00:00"]
    assert [record["epoch"] for record in engine.history] == [5, 6] and engine.writer.purge_step == 8


@pytest.mark.parametrize(
    ("epochs", "every", "start", "validated", "tested"),
    [
        (5, 2, 0, [2, 4, 5], [2, 4]),
        (4, 2, 0, [2, 4], [2]),
        (5, 2, 3, [4, 5], [4]),
        (5, 2, 4, [4, 5], [4]),
        (3, 1, 5, [3], []),
        (3, 1, 0, [1, 2, 3], [1, 2]),
        (2, 0, 0, [], []),
        (2, -1, 0, [], []),
    ],
)
def test_when_it_validates_and_tests(tmp_path, capsys, epochs, every, start, validated, tested):
    def draws(value):
        torch.rand(3), np.random.rand(2)  # noqa: NPY002
        return value

    options = {"eval_freq": every, "start_eval": start}
    runs = {}
    for name, hooks in (
        ("validated", {"validate": lambda: draws(result(0.25))}),
        ("tested", {"monitor": lambda: draws({"mAP a": 0.5, "R1 a": 0.125})}),
        ("plain", {}),
        ("both", {"validate": lambda: draws(result(0.25)), "monitor": lambda: draws({"mAP a": 0.5})}),
    ):
        engine = make(tmp_path / name, epochs=epochs, **options, **hooks)
        seed_all(3)
        engine.fit()
        runs[name] = engine.history, engine.writer.scalars, capsys.readouterr().out, torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    assert len({run[3] for run in runs.values()}) == 1 and len({run[4] for run in runs.values()}) == 1
    history, scalars, out, *_ = runs["validated"]
    assert [record["epoch"] for record in history if "val_mAP" in record] == validated
    assert all((record["val_mAP"], record["val_R1"]) == (0.25, 0.125) for record in history if "val_mAP" in record)
    assert [line for line in out.splitlines() if "validation" in line] == [
        f"validation after epoch {epoch}: mAP 25.0%, R1 12.5% (held-out identities)" for epoch in validated
    ]
    wanted = [(name, value, e) for e in validated for name, value in (("mAP", 0.25), ("rank1", 0.125))]
    assert [(n.removeprefix("Validation/"), v, e) for n, v, e in scalars if n.startswith("Validation/")] == wanted
    history, scalars, out, *_ = runs["tested"]
    assert [record["epoch"] for record in history if "mAP a" in record] == tested
    assert all((record["mAP a"], record["R1 a"]) == (0.5, 0.125) for record in history if "mAP a" in record)
    assert [line for line in out.splitlines() if line.startswith("test after")] == [
        f"test after epoch {epoch}: mAP a 50.0%, R1 a 12.5%" for epoch in tested
    ]
    wanted = [(name, value, epoch) for epoch in tested for name, value in (("mAP a", 0.5), ("R1 a", 0.125))]
    assert [(n.removeprefix("Test/"), v, e) for n, v, e in scalars if n.startswith("Test/")] == wanted
    assert all(set(record) == {"epoch", "lr", "loss"} for record in runs["plain"][0])
    both = runs["both"][0]
    assert [record["epoch"] for record in both if "val_mAP" in record] == validated
    assert not any("mAP a" in record for record in both if record["epoch"] in validated)


def test_a_part_that_is_zero_for_a_whole_epoch_is_said_once(tmp_path, capsys):
    engine = make(tmp_path, epochs=3)  # of two batches
    zero = {"loss": 1.0, "triplet": 0.0, "ce": 1.0, "acc": 0.0}
    engine.said = [{**zero, "triplet": 0.5}, zero, zero, zero, zero, zero]
    engine.observers.append(
        SimpleNamespace(tag="x", begin=lambda epoch: None, end=lambda: {"share": 0.25}, shown=("share", "gone"))
    )
    engine.fit()
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("note")] == [
        "note: part 'triplet' of the loss was 0 in every batch of epoch 2: it trained nothing there"
    ]
    assert "epoch 1/3: loss 1.000, triplet 0.250, ce 1.000, acc 0.000, share 0.250, lr" in out


def test_an_epoch_of_one_batch(tmp_path):
    engine = make(tmp_path, epochs=1, batches=1)
    engine.said = [{"loss": 3.0}]
    engine.fit()
    assert engine.history == [{"epoch": 1, "lr": 0.04, "loss": 3.0}]


def test_hooks_without_a_writer(tmp_path):
    for hooks in ({"validate": lambda: result(0.25)}, {"monitor": lambda: {"mAP": 0.5}}):
        engine = make(tmp_path, epochs=2, eval_freq=1, **hooks)
        engine._started = 0.0
        engine.observers.append(Watcher())
        engine.train()
        assert engine.history[0].keys() >= {"seen", "val_mAP" if "validate" in hooks else "mAP"}


# --- checkpoints -------------------------------------------------------------------------------------------------------
def test_the_best_epoch_is_the_first_of_the_highest(tmp_path):
    scores = iter([0.25, 0.5, 0.5, 0.375])
    engine = make(tmp_path, epochs=4, eval_freq=1, validate=lambda: result(next(scores)))
    weights = []
    engine.observers.append(
        SimpleNamespace(tag="x", begin=lambda epoch: weights.append(copy.deepcopy(engine.net.state_dict())), end=lambda: {})
    )
    engine.fit()
    assert (engine.best_score, engine.best_epoch) == (0.5, 2)
    best, last = (torch.load(tmp_path / f"{name}.pth.tar", weights_only=True) for name in ("best", "last"))
    assert (engine.context.best, engine.context.last) == (tmp_path / "best.pth.tar", tmp_path / "last.pth.tar")
    assert best["epoch"] == 2 and best["rank1"] == 0.25 and best["best_score"] == 0.5 and best["best_epoch"] == 2
    assert torch.equal(best["state_dict"]["body.weight"], weights[2]["body.weight"])
    assert last["epoch"] == 4 and last["rank1"] == 0.1875 and (last["best_score"], last["best_epoch"]) == (0.5, 2)
    assert [record["val_mAP"] for record in last["history"]] == [0.25, 0.5, 0.5, 0.375] and len(best["history"]) == 2


@pytest.mark.parametrize(("every", "written"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_checkpoints_come_every_few_epochs_and_at_the_end(tmp_path, monkeypatch, every, written):
    saved = []
    monkeypatch.setattr(ckpt, "save", lambda path, state: saved.append((path.name, state["epoch"])))
    make(tmp_path, epochs=5, checkpoint_freq=every).fit()
    assert saved == [("last.pth.tar", epoch) for epoch in written]
    assert StageContext("image", tmp_path, 5).checkpoint_freq == 1


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_what_a_checkpoint_holds(tmp_path, parallel, scheduled):
    options = {"parallel": parallel, "scheduled": scheduled, "static": {"config": "text", "num_classes": 7}}
    engine = make(tmp_path, epochs=2, extra={"center": Counter(3)}, **options)
    engine.said = [{"loss": 3.0}] * 4
    engine.fit()
    state = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert set(state) == {
        *("format", "config", "num_classes", "kind", "state_dict", "epoch", "max_epoch", "rank1", "optimizer"),
        *("scheduler", "extra", "rng", "history", "best_score", "best_epoch", "processes", "sample_seeds"),
    }
    assert (state["processes"], state["sample_seeds"]) == (1, False)
    assert (state["config"], state["num_classes"], state["kind"]) == ("text", 7, "image")
    assert (state["epoch"], state["max_epoch"], state["rank1"]) == (2, 2, 0.0)
    assert state["extra"] == {"center": {"value": 3}} and state["history"] == engine.history
    assert state["best_score"] is None and state["best_epoch"] == 0
    assert list(state["state_dict"]) == list(engine.net.state_dict())
    assert torch.equal(state["state_dict"]["head.weight"], engine.net.head.weight)
    assert state["optimizer"]["state"][0]["momentum_buffer"].shape == (3, 2)
    assert (state["scheduler"] is None) != scheduled and (not scheduled or state["scheduler"]["last_epoch"] == 2)
    assert torch.equal(state["rng"]["torch"], torch.get_rng_state())


@pytest.mark.parametrize("parallel", [False, True])
def test_going_on_is_as_if_it_had_not_ended(tmp_path, parallel, monkeypatch):
    straight = make(tmp_path / "straight", epochs=4, parallel=parallel, extra={"center": Counter(3)})
    straight.fit()
    first = make(tmp_path / "half", epochs=4, parallel=parallel, extra={"center": Counter(3)}, eval_freq=0)

    class Killed(Exception):
        pass

    def killed(epoch):
        if epoch == 2:
            raise Killed

    first.observers.append(SimpleNamespace(tag="x", begin=killed, end=lambda: {}))
    seed_all(5)
    with pytest.raises(Killed):
        first.fit()
    drawn = torch.rand(1).item()
    state = torch.load(tmp_path / "half" / "last.pth.tar", weights_only=True)
    state.update(best_score=0.5, best_epoch=1, extra={"center": {"value": 8}})
    second = make(tmp_path / "half", epochs=4, parallel=parallel, extra={"center": Counter(3)})
    asked = []
    original = base.restore_schedule
    monkeypatch.setattr(
        base, "restore_schedule", lambda *args, **rest: asked.append((args, rest)) or original(*args, **rest)
    )
    second.restore(copy.deepcopy(state), tmp_path / "half" / "last.pth.tar")
    assert torch.rand(1).item() == drawn
    assert (second.best_score, second.best_epoch, second.first_epoch, second.epoch) == (0.5, 1, 2, 2)
    assert second.extra_states["center"].value == 8 and second.history == state["history"]
    assert asked[0][0][:2] == (second.optimizer, second.scheduler) and asked[0][1] == {"rebuild": False}
    assert asked[0][0][2]["epoch"] == 2
    second.fit()
    assert [record["epoch"] for record in second.history] == [1, 2, 3, 4]
    for name, value in straight.net.state_dict().items():
        assert torch.equal(second.net.state_dict()[name], value), name
    assert [record["lr"] for record in second.history] == [record["lr"] for record in straight.history]
    longer = make(tmp_path / "more", epochs=6, extra={"center": Counter(3)})
    longer.restore(copy.deepcopy(state), tmp_path)
    assert asked[-1][1] == {"rebuild": True}
    with pytest.raises(UserError, match=r"checkpoint '.*here\.tar' belongs to another model"):
        state["state_dict"].pop("body.bias")
        make(tmp_path / "other").restore(state, tmp_path / "here.tar")


@pytest.mark.parametrize("steps", [1, 3])
def test_epochs_that_were_trained_elsewhere(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(Probe, "schedule_steps", property(lambda self: steps))
    engine = make(tmp_path, epochs=5)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.skip_epochs(2)
    assert (engine.first_epoch, engine.epoch) == (2, 2)
    assert engine.get_current_lr() == pytest.approx(0.08 * 0.5 ** (2 * steps))
    plain = make(tmp_path, scheduled=False)
    plain.skip_epochs(1)
    assert (plain.first_epoch, plain.epoch, plain.get_current_lr()) == (1, 1, 0.08)


# --- what stops a run --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite(tmp_path, value):
    engine = make(tmp_path, epochs=3)
    engine.said = [{"loss": 1.0}] * 3 + [{"loss": 1.0, "triplet": value}]
    message = (
        rf"^the loss became {value} in epoch 2, batch 2 of 2 \(part 'triplet'\); lower the learning rate \(it is 0\.04\) or "
        rf"lengthen the warm-up; the last checkpoint stays \('{tmp_path / 'last.pth.tar'}'\)\.$"
    )
    with pytest.raises(UserError, match=message):
        engine.fit()
    assert engine.writer.ends == ["abandoned"]
    early = make(tmp_path / "early")
    early.said = [{"loss": value}]
    with pytest.raises(
        UserError, match=r"in epoch 1, batch 1 of 2 \(part 'loss'\).*it is 0\.08.*; no checkpoint was written yet\.$"
    ):
        early.fit()
    assert "batch 1 of 2" in str(make(tmp_path / "none").explosion("loss", value))  # before the first batch


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    engine = make(tmp_path, epochs=3, parallel=True)
    forward = Step.forward_backward

    def spoil(epoch):
        if epoch == 1:
            engine.net.head.bias.data[1] = float("nan")
            engine.net.body.weight.data[0, 0] = float("inf")

    engine.observers.append(SimpleNamespace(tag="x", begin=spoil, end=lambda: {}))
    message = (
        r"^4 of the model's tensors hold NaN or infinity after epoch 2 \(first: 'body\.weight'\); lower the learning rate "
        rf"\(it is 0\.02\) or lengthen the warm-up; the last checkpoint stays \('{tmp_path / 'last.pth.tar'}'\)\.$"
    )
    with pytest.raises(UserError, match=message):
        engine.fit()
    assert torch.load(tmp_path / "last.pth.tar", weights_only=True)["epoch"] == 1 and forward is Step.forward_backward


def test_layers_open_after_the_first_epochs_unless_frozen(tmp_path):
    engine = make(tmp_path, epochs=3)
    engine.net.body.bias.requires_grad_(False)
    engine.attach(StageContext("image", tmp_path, 4))
    trained = []
    engine.observers.append(
        SimpleNamespace(
            tag="x",
            begin=lambda epoch: None,
            end=lambda: trained.append({n for n, p in engine.net.named_parameters() if p.requires_grad}) or {},
        )
    )
    engine.fit(fixbase_epoch=2, open_layers=["head"])
    head = {"head.weight", "head.bias"}
    assert trained == [head, head, head | {"body.weight"}, head | {"body.weight"}]
    trained.clear()
    engine.first_epoch, engine.model = 0, engine.net.eval()
    engine.fit(fixbase_epoch=2)  # without layers nothing is closed
    assert trained == [head | {"body.weight"}] * 4
    assert all(asked[2] for asked in engine.net.asked)
    engine.set_model_mode("eval")
    engine.two_stepped_transfer_learning(3, 2, ["head"])
    assert engine.net.training
    seen = []

    class Below(Step):
        def two_stepped_transfer_learning(self, *args):
            seen.append(args)

    class Above(EngineMixin, Below):
        pass

    other = make(tmp_path)
    other.__class__ = Above
    other.two_stepped_transfer_learning(1, 2, ["head"], "model")
    other.two_stepped_transfer_learning(1, 2, ["head"])
    other.two_stepped_transfer_learning(2, 2, ["head"], "model")
    other.two_stepped_transfer_learning(0, 2, None, "model")
    assert seen == [(1, 2, ["head"], "model"), (1, 2, ["head"], None)]


# --- features ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cameras", [False, True])
def test_features_of_a_test_set(tmp_path, monkeypatch, cameras):
    bars = []
    monkeypatch.setattr(base, "tqdm", lambda items, **options: bars.append(options) or iter(items))
    engine = make(tmp_path)
    engine.net.uses_cameras = cameras
    engine.camera_rows = CameraRows({500: 3, 501: 0, 601: 2})
    engine.net.train()
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda *args: torch.rand(1) * 0 + forward(*args).double())
    seed_all(4)
    wanted = torch.rand(1).item()
    seed_all(4)
    found = engine.extract_target("a")
    assert torch.rand(1).item() == wanted and not engine.net.training
    query, gallery = batch(5), batch(6, 3)
    images = torch.cat([query["img"], gallery["img"]])
    assert found.query.features.dtype == torch.float32 and not found.query.features.requires_grad
    assert torch.allclose(found.query.features, engine.net.head(engine.net.body(images)), atol=1e-6)
    assert found.query.pids.tolist() == [50, 51, 52, 53, 60, 61, 62]
    assert found.query.camids.tolist() == [500, 501, 502, 503, 600, 601, 602]
    assert found.query.paths == [*query["impath"], *gallery["impath"]]
    assert found.gallery.pids.tolist() == [70, 71, 72, 73] and len(found.gallery.features) == 4
    rest = {"leave": False, "disable": None, "dynamic_ncols": True}
    assert bars == [{"desc": "a query", **rest}, {"desc": "a gallery", **rest}]
    asked = [None if rows is None else rows.tolist() for _, rows, *_ in engine.net.asked]
    assert asked == ([[3, 0, -1, -1], [-1, 2, -1], [-1] * 4] if cameras else [None] * 3)
    assert not any(training or gradients for *_, training, gradients in engine.net.asked)


def test_features_of_changed_images_and_of_tracklets(tmp_path):
    engine = make(tmp_path)
    told = []

    def double(images, files):
        told.append(files)
        return images * 2

    loader = [batch(1), batch(2)]
    found = engine.extract(loader, label="x", alter=double)
    assert told == [loader[0]["impath"], loader[1]["impath"]] and all(type(files) is list for files in told)
    images = torch.cat([item["img"] for item in loader])
    assert torch.allclose(found.features, engine.net.head(engine.net.body(images * 2)), atol=1e-6)
    assert engine.net.training  # the mode is left as it is

    class Tracklets(list):
        dataset = SimpleNamespace(data=[(("a0", "a1"), 1, 2), ("b0", 1, 2), (("c0",), 1, 2), (("d0",), 1, 2)])

    unnamed = {name: value for name, value in batch(1).items() if name != "impath"}
    assert engine.extract(Tracklets([unnamed]), label="x").paths == ["a0", "b0", "c0", "d0"]
    assert engine.extract([unnamed], label="x").paths == []
    bare = Tracklets([unnamed])
    bare.dataset = SimpleNamespace()
    assert engine.extract(bare, label="x").paths == []


def test_features_that_are_not_finite(tmp_path):
    engine = make(tmp_path)
    first, second = batch(1), batch(2)
    second["img"][1, 0] = float("nan")
    second["img"][3, 1] = float("inf")
    with pytest.raises(
        UserError,
        match=r"^2 of 8 features of 'a set' hold NaN or infinity \(first: '2-1\.png'\); the image model is damaged",
    ):
        engine.extract([first, second], label="a set")
    second["impath"] = second["impath"][:1]  # fewer names than images: the first broken one has none
    with pytest.raises(UserError, match=r"^2 of 4 features of 'a set' hold NaN or infinity; the image model"):
        engine.extract([second], label="a set")
    unnamed = {name: value for name, value in second.items() if name != "impath"}
    with pytest.raises(UserError, match=r"^2 of 4 features of 'a set' hold NaN or infinity; the image model"):
        engine.extract([unnamed], label="a set")


def test_rows_of_cameras(tmp_path):
    engine = make(tmp_path)
    engine.camera_rows = CameraRows({7: 1, 9: 0})
    rows = engine.batch_cameras({"camid": [9, 8, 7]}, torch.zeros(3, 2, device="cpu"))
    assert rows.tolist() == [0, -1, 1] and rows.device.type == "cpu"
    asked = SimpleNamespace(device=torch.device("meta"))
    assert engine.batch_cameras({"camid": torch.tensor([9])}, asked).device.type == "meta"
