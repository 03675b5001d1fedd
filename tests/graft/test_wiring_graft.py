"""GraFT's engine, stage and network: optimisers, losses, schedules, triplets, devices, views, pruned weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from wiring import GRAFT, bare_manager, keys_of, note_moves, settings, toy_checkpoint

from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.base import StageContext
from relreid_plugin.engine.network import View
from relreid_plugin.errors import UserError
from relreid_plugin.graft import network as graft_network
from relreid_plugin.graft import stage as graft_stage
from relreid_plugin.graft.ffd import GraFTLoss
from relreid_plugin.graft.network import GraFTNetwork
from relreid_plugin.graft.schedule import sqrt_lambda
from relreid_plugin.graft.stage import FinetuneStage, MultimodalEngine
from relreid_plugin.host.multimodal import Files, Strip

BEST, LAST = "best.pth.tar", "last.pth.tar"


def graft_settings(*pairs):
    return settings(*keys_of(GRAFT), *pairs)


@pytest.fixture
def moves(monkeypatch):
    """What is moved to the GPU."""
    return note_moves(monkeypatch)


# --- GraFT's engine --------------------------------------------------------------------------------------------------
class Fusing(nn.Module):
    """A model like GraFT's: (B, M, 3, h, w) -> in training (logits, fused, data tokens), else the mean of the pixels."""

    feature_dim, modalities = 4, ("R", "N", "T")

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbones, self.head = nn.Linear(3, 4), nn.Linear(4, 5, bias=False)
        self.classifier = nn.Linear(1, 1)
        self.calls, self.frozen = [], []

    def freeze_backbone(self, frozen=True):
        self.frozen.append(frozen)
        self.backbones.requires_grad_(not frozen)

    def forward(self, images, present=None, classified=None):
        self.calls.append((present, classified, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        tokens = self.backbones(images.mean(dim=(1, 3, 4)))
        if not self.training:
            return tokens
        return self.head(tokens[: len(images) if classified is None else classified]), tokens, tokens * 2


def loader(count=4, size=6):
    draw = torch.Generator().manual_seed(1)
    images, pids = torch.randn(size, 3, 3, 4, 4, generator=draw), torch.tensor([0, 1, 0, 1, 2, 3])[:size]
    return [{"img": images + i, "pid": pids, "camid": pids, "impath": [""] * size, "dsetid": pids} for i in range(count)]


def graft_run(tmp_path, *keys, resume=False, **more):
    cfg = graft_settings(*keys)
    model = Fusing()
    run = SimpleNamespace(
        watch=None,
        cfg=cfg,
        model=model,
        bare=model,
        datamanager=bare_manager(**{"train_loader": loader(), **more}),
        resume=resume,
    )
    run.stage_folder = lambda number: tmp_path / f"stage{number}"
    run.static, run.fingerprint = lambda: {"label_map": "map"}, "of stage 1"
    run.features = SimpleNamespace(validate="validate", monitor="monitor")
    run.selected, run.history, run.stages, run.parameters = {"stage1": 7}, {}, [1, 2], 0
    return run


def graft_engine(run, *, per_step=False, **weights):
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    weights = {"ce": 0.3, "triplet": 0.6, "center": 0.2, "label_smoothing": 0.1, **weights}
    return graft_stage.build_engine(run, optimizer, scheduler, per_step=per_step, center_lr=0.25, **weights)


@pytest.mark.parametrize("sampling", ["triplets", "pk"])
def test_the_engine_of_graft(tmp_path, sampling, moves):
    keys = ["graft.sampling", sampling, "graft.scheme", "DFD", "graft.distance", "squared", "train.precision", "bfloat16"]
    run = graft_run(tmp_path, *keys, "sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 3)
    engine, states = graft_engine(run, per_step=True)
    loss = engine.loss
    assert isinstance(loss, GraFTLoss) and (loss.mined, loss.scheme, loss.distance) == (sampling == "pk", "DFD", "squared")
    assert loss.weights == {"ce": 0.3, "triplet": 0.6, "center": 0.2} and loss.center.centers.shape == (5, 4)
    assert list(states) == ["loss", "center_optimizer"] and states["loss"] is loss
    assert engine.center_optimizer is states["center_optimizer"] and engine.center_optimizer.param_groups[0]["lr"] == 0.25
    assert engine.per_step is True and engine.updates.practice.precision == "bfloat16" and engine.model is run.model
    assert engine.datamanager is run.datamanager and engine.use_gpu is False and moves == []
    assert engine.scheduler.optimizer is engine.optimizer and engine.schedule_steps == 4
    engine, states = graft_engine(run, center=0.0)
    assert engine.per_step is False and states == {} and engine.center_optimizer is None and engine.schedule_steps == 1
    assert MultimodalEngine.per_step is False and MultimodalEngine.present is None


def test_grafts_loss_goes_to_the_gpu_where_there_is_one(tmp_path, moves, monkeypatch):
    run = graft_run(tmp_path)
    run.cfg.use_gpu = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine, _ = graft_engine(run)
    assert [moved for moved, _ in moves] == [engine.loss] and engine.use_gpu is True


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_graft(tmp_path, mined, precision, moves):
    run = graft_run(tmp_path, "train.precision", precision)
    engine, _ = graft_engine(run)
    engine.loss.mined, engine.use_gpu = mined, True
    engine.loss.center = None
    engine.center_optimizer = None
    seen = []
    fused_loss = engine.loss.fused_loss

    def watched(logits, fused, tokens, pids):
        seen.append((logits.dtype, fused.dtype, tokens.dtype, len(logits), pids))
        return fused_loss(logits, fused, tokens, pids)

    engine.loss.fused_loss = watched
    engine.context, engine._sums, engine.model = SimpleNamespace(), {}, engine.model.train()
    (data, *_) = engine.train_loader
    step = MultimodalEngine.forward_backward
    summary = step(engine, data)
    classified = 6 if mined else 2
    ((present, asked, autocast, kind),) = engine.model.calls
    assert (present, asked) == (None, classified) and autocast == (precision == "bfloat16")
    assert not autocast or kind == torch.bfloat16
    ((*kinds, rows, pids),) = seen
    assert kinds == [torch.float32] * 3 and rows == classified and torch.equal(pids, data["pid"])
    assert [options for _, options in moves] == [{"non_blocking": True}] * 2
    assert moves[0][0].shape == (6, 3, 3, 4, 4) and torch.equal(moves[1][0], data["pid"])
    moves.clear()
    engine.use_gpu = False
    step(engine, data)
    assert moves == [] and set(summary) == {"loss", "ce", "triplet", "acc"}
    logits = Fusing().train()(data["img"], classified=classified)[0]
    hits = (logits.argmax(dim=1) == data["pid"][:classified]).float().mean() * 100
    assert summary["acc"] == pytest.approx(float(hits)) and summary["loss"] == pytest.approx(
        0.3 * summary["ce"] + 0.6 * summary["triplet"], rel=1e-4
    )


def test_a_schedule_by_steps_or_by_epochs(tmp_path):
    for per_step in (True, False):
        run = graft_run(tmp_path)
        engine, _ = graft_engine(run, per_step=per_step)
        engine.context, engine._sums = SimpleNamespace(), {}
        engine.model.train()
        rates = [engine.get_current_lr()]
        for data in engine.train_loader[:2]:
            graft_stage._MultimodalStep.forward_backward(engine, data)
            rates.append(engine.get_current_lr())
        engine.update_lr()
        rates.append(engine.get_current_lr())
        assert rates == ([0.5, 0.25, 0.125, 0.125] if per_step else [0.5, 0.5, 0.5, 0.25])


@pytest.mark.parametrize("wrapped", [False, True])
def test_features_of_present_modalities(tmp_path, wrapped):
    run = graft_run(tmp_path)
    engine, _ = graft_engine(run)
    model, images = run.model.eval(), loader()[0]["img"]
    if wrapped:
        engine.model = nn.DataParallel(model)
    with torch.no_grad():
        assert torch.equal(engine.extract_features(images), model(images)) and model.calls[0][0] is None
        engine.present = ("T", "R")
        found = engine.extract_features(images)
        assert model.calls[-1][0] == ("T", "R") and torch.equal(found, model(images[:, [2, 0]], ("T", "R")))


# --- GraFT's stage 2 ---------------------------------------------------------------------------------------------------
FINETUNE = [
    *("graft.finetune.lr", 0.02, "graft.finetune.weight_decay", 0.3, "graft.finetune.ce", 0.7),
    *("graft.finetune.triplet", 0.8, "graft.finetune.center", 0.4, "graft.finetune.label_smoothing", 0.25),
    *("graft.finetune.max_epoch", 6, "loss.composite.center_lr", 0.125),
]


def test_the_optimiser_of_stage_2(tmp_path):
    run = graft_run(tmp_path, *FINETUNE)
    run.model.freeze_backbone()
    engine, states = FinetuneStage().build_engine(run)
    assert run.model.frozen == [True, False] and all(value.requires_grad for value in run.model.parameters())
    optimizer = engine.optimizer
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    assert [id(value) for value in group["params"]] == [id(value) for value in run.model.parameters()]
    assert isinstance(engine.scheduler, LambdaLR) and engine.scheduler.optimizer is optimizer
    assert [engine.scheduler.lr_lambdas[0](epoch) for epoch in (0, 1, 50)] == [1.0, 1.0, 1.0] and engine.per_step is False
    assert engine.loss.weights == {"ce": 0.7, "triplet": 0.8, "center": 0.4}
    assert states["center_optimizer"].param_groups[0]["lr"] == 0.125
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    parts = engine.loss.fused_loss(logits, torch.zeros(9, 4), torch.zeros(9, 4), torch.arange(9) % 5)[1]
    assert float(parts["ce"]) == pytest.approx(float(nn.functional.cross_entropy(logits, labels, label_smoothing=0.25)))


@pytest.mark.parametrize("held_out", [False, True])
def test_training_stage_2(tmp_path, monkeypatch, capsys, held_out):
    keys = ["train.seed", 4, "train.checkpoint_freq", 3, "test.eval_freq", 2, "test.start_eval", 5]
    run = graft_run(tmp_path, *FINETUNE, *keys, val_query=[("a", 0, 0)] if held_out else [])
    asked, seeds = [], []
    monkeypatch.setattr(graft_stage, "train_engine", lambda *values, **options: asked.append((values, options)))
    monkeypatch.setattr(graft_stage, "set_seed", seeds.append)
    stage = FinetuneStage()
    stage.number = 2
    stage.train(run)
    (((of, itself, engine, extra, context), options),) = asked
    assert of is run and itself is stage and engine is run.engine and extra["loss"] is engine.loss
    assert (
        seeds == [1_000_003 * 4 + 2] and set(options) == {"announce", "belongs", "start_eval"} and options["start_eval"] == 5
    )
    assert context == StageContext(
        kind="finetune",
        folder=tmp_path / "stage2",
        max_epoch=6,
        checkpoint_freq=3,
        eval_freq=2,
        start_eval=5,
        static={"label_map": "map", "stage1": "of stage 1"},
        validate="validate" if held_out else None,
        monitor=None if held_out else "monitor",
    )
    options["announce"]()
    run.selected.clear()
    stage.train(run)
    asked[1][1]["announce"]()
    said = "stage 2: everything trains, 6 epochs from stage 1, epoch"
    assert capsys.readouterr().out == f"{said} 7\n{said} 0\n"
    options["belongs"]({"stage1": "of stage 1"}, tmp_path / "x")
    with pytest.raises(
        UserError, match=f"checkpoint '{tmp_path / 'x'}' goes on from another stage 1 than that of '.*stage1'"
    ):
        options["belongs"]({"stage1": "another"}, tmp_path / "x")


def test_the_weights_of_stage_2_that_are_tested(tmp_path, monkeypatch):
    stage, run = FinetuneStage(), graft_run(tmp_path)
    stage.number, narrowed = 2, []
    run.engine = SimpleNamespace(updates=SimpleNamespace(narrow=narrowed.append))
    assert (stage.kind, stage.pruning, stage.refines) == ("finetune", None, False)
    with pytest.raises(UserError, match=f"no stage-2 checkpoint in '{tmp_path / 'stage2'}'; train it first"):
        stage.load(run)
    weights = {name: value + 1 for name, value in run.model.state_dict().items()}
    toy_checkpoint(tmp_path / "stage2" / LAST, kind="finetune", epoch=6, weights=weights, history=["a", "b"])
    stage.load(run)
    assert torch.equal(run.model.head.weight, weights["head.weight"]) and run.parameters == 0 and stage.pruning is None
    assert run.selected["stage2"] == 6 and run.history["stage2"] == ["a", "b"]
    assert run.fingerprint == ckpt.fingerprint(run.model) and narrowed == [run.engine]
    # pruned ones are fewer
    better, fitted = {name: value + 1 for name, value in weights.items()}, []
    monkeypatch.setattr(graft_stage, "fit_shapes", lambda model, state: fitted.append((model, state)))
    monkeypatch.setattr(graft_stage, "zero_weights", lambda model: 5 if model is run.bare else 0)
    best = tmp_path / "stage2" / BEST
    toy_checkpoint(best, kind="finetune", epoch=3, weights=better, history=["a"], pruning={"target": 0.5})
    stage.load(run)
    assert stage.pruning == {"target": 0.5} and run.selected["stage2"] == 3 and run.history["stage2"] == ["a", "b"]
    ((model, state),) = fitted
    assert model is run.bare and torch.equal(state["head.weight"], better["head.weight"])
    assert run.parameters == (3 * 4 + 4) + 4 * 5 - 5 and torch.equal(run.model.head.weight, better["head.weight"])
    toy_checkpoint(best, kind="image", weights=better)
    with pytest.raises(UserError, match="holds the image model, but the finetune model"):
        stage.load(run)
    toy_checkpoint(best, kind="finetune", weights={})
    with pytest.raises(UserError, match=f"checkpoint '{best}' belongs to another model"):
        stage.load(run)
    toy_checkpoint(best, kind="finetune", weights=better)
    toy_checkpoint(tmp_path / "stage2" / LAST, kind="image", weights=better)
    with pytest.raises(UserError, match="holds the image model, but the finetune model"):
        stage.load(run)


# --- GraFT's network ---------------------------------------------------------------------------------------------------
def test_a_network_of_several_images_needs_images():
    cfg = graft_settings()
    network = GraFTNetwork(cfg)
    assert network.cfg is cfg and network._pruned_weights is False
    cfg.data.type = "video"
    with pytest.raises(UserError, match="'model.name graft' works with 'data.type image', not with 'video'"):
        GraFTNetwork(cfg)


def test_a_pruned_model_stands_alone(tmp_path):
    def alone(*keys):
        run = graft_run(tmp_path, *keys)
        return GraFTNetwork(run.cfg).stands_alone(run)

    assert not alone()
    toy_checkpoint(tmp_path / "stage2" / LAST, kind="finetune")
    assert alone() and not alone("train.stages", [1])
    assert not alone("model.load_weights", "w") and not alone("model.resume", "w")
    toy_checkpoint(tmp_path / "stage1" / LAST)
    assert not alone()
    (tmp_path / "stage2" / LAST).unlink()
    assert not alone()


def weight_file(**content):
    return SimpleNamespace(path="w.pth", content=content)


def test_pruned_weights_make_the_model_smaller(tmp_path, monkeypatch, capsys):
    fitted, changed = [], [True]
    monkeypatch.setattr(graft_network, "fit_shapes", lambda model, state: (fitted.append((model, state)), changed[0])[1])
    network, model = GraFTNetwork(graft_settings()), Fusing()
    network.prepare_weights(model, weight_file(pruning={}, state_dict={"a": 1}))
    assert fitted == [(model, {"a": 1})] and network._pruned_weights is True
    assert capsys.readouterr().out == "'w.pth' has fewer heads and channels: so has the model now\n"
    changed[0] = False
    network.prepare_weights(model, weight_file(pruning={}, state_dict={"a": 1}))
    assert network._pruned_weights is True and len(fitted) == 2 and capsys.readouterr().out == ""
    for content in ({"pruning": {}}, {"pruning": {}, "state_dict": [1]}, {"state_dict": {"a": 1}}):
        network.prepare_weights(model, weight_file(**content))
        assert network._pruned_weights is False and len(fitted) == 2


@pytest.fixture
def parts(monkeypatch):
    """What the network of GraFT is built of, noted."""
    calls = SimpleNamespace(engines=[], weights=[], read=[], content={})
    monkeypatch.setattr(
        graft_network, "build_engine", lambda *values, **options: (calls.engines.append((values, options)), "engine")[1]
    )
    monkeypatch.setattr(graft_network, "take_weights", lambda *values: calls.weights.append(values))
    monkeypatch.setattr(graft_network, "zero_weights", lambda model: 3)

    def read(path, key):
        calls.read.append((path, key))
        return weight_file(**calls.content)

    monkeypatch.setattr(graft_network, "read_weight_file", read)
    return calls


def test_the_optimiser_of_stage_1(tmp_path, parts):
    keys = ["graft.sampling", "pk", "sampler.train_sampler", "RandomIdentitySampler", "train.lr", 0.03]
    keys += ["loss.composite.ce", 0.2, "loss.composite.triplet", 0.4, "loss.composite.center", 0.6]
    keys += ["loss.composite.center_lr", 0.75, "train.max_epoch", 5, "sampler.num_instances", 3]
    for scheduler in ("sqrt", "multi_step"):
        more = ["train.lr_scheduler", scheduler, "graft.warmup_steps", 3, "graft.cooldown", 0.5, "train.stepsize", [2]]
        for smooth in (True, False):
            run = graft_run(tmp_path, *keys, *more, "loss.softmax.label_smooth", smooth, "train.gamma", 0.5)
            before = run.datamanager.train_loader
            assert GraFTNetwork(run.cfg).build_engine(run) == "engine"
            ((of, optimizer, schedule), options) = parts.engines.pop()
            assert of is run and run.model.frozen == [True] and run.datamanager.train_loader is before
            assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["initial_lr"] == 0.03
            held = {id(value) for group in optimizer.param_groups for value in group["params"]}
            assert schedule.optimizer is optimizer and held == {id(value) for value in run.model.parameters()}
            assert options == {
                "per_step": scheduler == "sqrt",
                "center_lr": 0.75,
                "ce": 0.2,
                "triplet": 0.4,
                "center": 0.6,
                "label_smoothing": 0.1 if smooth else 0.0,
            }
            if scheduler == "sqrt":
                wanted = sqrt_lambda(5 * 4, warmup_steps=3, cooldown=0.5)
                assert [schedule.lr_lambdas[0](step) for step in range(20)] == [wanted(step) for step in range(20)]
    run = graft_run(tmp_path, *keys, "train.lr_scheduler", "sqrt", "train.max_epoch", 0)
    GraFTNetwork(run.cfg).build_engine(run)
    wanted = sqrt_lambda(1, warmup_steps=500, cooldown=0.1)
    assert [parts.engines[-1][0][2].lr_lambdas[0](step) for step in range(3)] == [wanted(step) for step in range(3)]
    assert parts.read == parts.weights == []


class Items(list):
    """A data set of (path, pid, camid, set)."""

    def __init__(self, count=12):
        super().__init__([(f"{i}.png", i // 4, 0, 0) for i in range(count)])
        self.train = list(self)


def test_triplets_are_drawn_in_stage_1(tmp_path, parts, capsys, monkeypatch):
    data = Items()
    run = graft_run(tmp_path, "train.batch_size", 9, "graft.positives", 2, "data.workers", 3)
    run.datamanager.train_loader = SimpleNamespace(dataset=data)
    run.datamanager.use_gpu = True
    monkeypatch.setattr(graft_network, "cap_workers", lambda count: min(count, 1))
    GraFTNetwork(run.cfg).build_engine(run)
    found = run.datamanager.train_loader
    sampler = found.sampler
    assert found.dataset is data and found.batch_size == 9 and (sampler.triplets, sampler.positives) == (3, 2)
    assert found.num_workers == 1 and found.pin_memory is True and found.drop_last is True
    assert found.worker_init_fn is graft_network.worker_init and capsys.readouterr().out == ""
    labels = [item[1] for item in data]
    drawn = list(sampler)
    for start in range(0, len(drawn), 9):
        for a, p, n in zip(*(drawn[start + 3 * role : start + 3 * role + 3] for role in range(3))):
            assert labels[a] == labels[p] != labels[n] and a != p
    # fewer than a batch
    run = graft_run(tmp_path, "train.batch_size", 90, "graft.positives", 2)
    run.datamanager.train_loader = SimpleNamespace(dataset=data)
    GraFTNetwork(run.cfg).build_engine(run)
    found = run.datamanager.train_loader
    assert (found.batch_size, found.sampler.triplets, found.pin_memory, found.num_workers) == (72, 24, False, 0)
    assert capsys.readouterr().out == "an epoch has 24 triplets, less than a batch of 30\n"
    run = graft_run(tmp_path, "train.batch_size", 72, "graft.positives", 2)
    run.datamanager.train_loader = SimpleNamespace(dataset=data)
    GraFTNetwork(run.cfg).build_engine(run)
    assert run.datamanager.train_loader.batch_size == 72 and capsys.readouterr().out == ""


def test_how_many_items_are_classified():
    assert [GraFTNetwork(graft_settings()).classified(items) for items in (12, 9, 2)] == [4, 3, 0]
    keys = ["graft.sampling", "pk", "sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 3]
    assert GraFTNetwork(graft_settings(*keys)).classified(12) == 12


def test_parameters_of_pruned_weights_from_a_file(tmp_path, parts):
    pk = ["graft.sampling", "pk", "sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 3]
    whole = (3 * 4 + 4) + 4 * 5

    def build(*keys, pruned, stages=(), content=None):
        run = graft_run(tmp_path, *pk, *keys)
        run.stages, parts.content = list(stages), content or {}
        parts.read.clear(), parts.weights.clear()
        network = GraFTNetwork(run.cfg)
        network._pruned_weights = pruned
        network.build_engine(run)
        return run, run.parameters

    assert build(pruned=False)[1] == 0 and parts.read == parts.weights == []
    assert build(pruned=True)[1] == whole - 3 and build(pruned=True, stages=[1])[1] == whole
    run, _ = build("model.load_weights", "w.pth", pruned=True, content={"pruning": {}})
    assert parts.read == parts.weights == []  # they are in the model already
    run, parameters = build("model.resume", "r.pth", pruned=True, content={"pruning": {}})
    assert parts.read == [("r.pth", "model.resume")] and parts.weights == [(run, run.bare, "model.resume")]
    assert parameters == whole - 3
    build("model.resume", "r.pth", pruned=False)
    assert parts.read == [("r.pth", "model.resume")] and parts.weights == []
    build("model.resume", "r.pth", "model.load_weights", "w.pth", pruned=False, content={"pruning": {}})
    assert parts.read == parts.weights == []


def test_views_of_modalities():
    def views(*keys):
        return GraFTNetwork(graft_settings(*keys)).views()

    assert views() == [View("GraFT, R+N+T")]
    assert views("multimodal.test", ["R+N+T", "T", "R+N", "N+R"]) == [
        View("GraFT, R+N+T"),
        View("GraFT, T (without R, N)", "-T", ("T",), "T tests without R, N."),
        View("GraFT, R+N (without T)", "-RN", ("R", "N"), "R+N tests without T."),
        View("GraFT, N+R (without T)", "-NR", ("N", "R"), "N+R tests without T."),
    ]
    assert views("multimodal.test", ["T+N+R"]) == [View("GraFT, T+N+R", "-TNR", ("T", "N", "R"))]
    assert views("graft.fusion", "late")[0].label == "late fusion (Multi-Stream ViT), R+N+T"


def test_a_view_is_seen_in_its_block():
    network, run = GraFTNetwork(graft_settings()), SimpleNamespace(engine=SimpleNamespace(present="x"))
    with network.seeing(run, View("x", "-T", ("T",))):
        assert run.engine.present == ("T",)
    assert run.engine.present is None
    with network.seeing(run, View()):
        assert run.engine.present is None
    with pytest.raises(ZeroDivisionError), network.seeing(run, View("x", "-T", ("T",))):
        _ = 1 / 0
    assert run.engine.present is None


def test_how_views_are_read(tmp_path, monkeypatch):
    run = SimpleNamespace(engine=SimpleNamespace(present=("T",)))
    keys = ["multimodal.modalities", ["N", "R"], "multimodal.mean", [[0.1], [0.2]], "multimodal.std", [[0.3], [0.4]]]
    cfg = graft_settings(*keys)
    assert GraFTNetwork(cfg).describe_input(run) == "['N', 'R']|[[0.1], [0.2]]|[[0.3], [0.4]]|('T',)"
    ranged = graft_settings(*keys, "multimodal.pixel_range", [[0, 1000], [0, 100]])
    assert GraFTNetwork(ranged).describe_input(run).endswith("|('T',)|range [[0, 1000], [0, 100]]")
    noted = []

    def read(source, modalities, wanted, ranges):
        noted.append((type(source), source, modalities, wanted, ranges))
        return ["first", "second"]

    monkeypatch.setattr(graft_network, "read_views", read)
    assert GraFTNetwork(ranged).read_picture(run, Strip("a.jpg", ("R", "N", "T"))) == "first"
    assert GraFTNetwork(cfg).read_picture(run, Files(("a.jpg", "b.jpg"), ("R", "N"))) == "first"
    (one, two) = noted
    assert one[:4] == (str, "a.jpg", ("R", "N", "T"), ["N"]) and two[:4] == (tuple, ("a.jpg", "b.jpg"), ("R", "N"), ["N"])
    assert one[4] == graft_network.modality_ranges(["N", "R"], [[0, 1000], [0, 100]]) and two[4] != one[4]
