"""How methods' stages and networks are put together: optimisers, losses, schedules, samplers, devices, what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from wiring import BASE, GRAFT, settings, toy_checkpoint

from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.base import StageContext
from relreid_plugin.engine.evaluator import EvaluationOptions, Evaluator, Row
from relreid_plugin.engine.network import View
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import FeatureSet, TestFeatures
from relreid_plugin.graft import network as graft_network
from relreid_plugin.graft import stage as graft_stage
from relreid_plugin.graft.ffd import GraFTLoss
from relreid_plugin.graft.network import GraFTNetwork
from relreid_plugin.graft.schedule import sqrt_lambda
from relreid_plugin.graft.stage import FinetuneStage, MultimodalEngine
from relreid_plugin.host.multimodal import Files, Strip
from relreid_plugin.magformer import stage as relation
from relreid_plugin.magformer.recipe import with_recipe
from relreid_plugin.magformer.stage import RelationStage

BEST, LAST = "best.pth.tar", "last.pth.tar"
DIM = 12


def keys_of(tree, prefix=""):
    """``KEY, VALUE, …`` of a configuration as a tree."""
    for key, value in tree.items():
        yield from keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else (f"{prefix}{key}", value)


def graft_settings(*pairs):
    return settings(*keys_of(GRAFT), *pairs)


def relation_settings(*pairs):
    return settings(*keys_of(BASE), "train.stages", [1, 2], "relation.attention", "magformer", *pairs)


@pytest.fixture
def moves(monkeypatch):
    """What is moved to the GPU, though there is none: it stays, and is noted."""
    noted = []

    def move(self, *values, **options):
        noted.append((self, options))
        return self

    monkeypatch.setattr(torch.Tensor, "cuda", move)
    monkeypatch.setattr(nn.Module, "cuda", move)
    return noted


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


def manager(**more):
    """What the host's engine reads of a data manager."""
    parts = {"num_train_pids": 5, "train_loader": loader(), "test_loader": {}, "val_query": [], "use_gpu": False}
    return SimpleNamespace(**{**parts, "sources": ["a"], "targets": ["a"], "data_type": "image", **more})


def graft_run(tmp_path, *keys, resume=False, **more):
    cfg = graft_settings(*keys)
    model = Fusing()
    run = SimpleNamespace(cfg=cfg, model=model, bare=model, datamanager=manager(**more), resume=resume)
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
    assert engine.per_step is True and engine.precision == "bfloat16" and engine.model is run.model
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
    step = graft_stage._MultimodalStep.forward_backward
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
    stage.number = 2
    assert (stage.kind, stage.pruning, stage.refines) == ("finetune", None, False)
    with pytest.raises(UserError, match=f"no stage-2 checkpoint in '{tmp_path / 'stage2'}'; train it first"):
        stage.load(run)
    weights = {name: value + 1 for name, value in run.model.state_dict().items()}
    toy_checkpoint(tmp_path / "stage2" / LAST, kind="finetune", epoch=6, weights=weights, history=["a", "b"])
    stage.load(run)
    assert torch.equal(run.model.head.weight, weights["head.weight"]) and run.parameters == 0 and stage.pruning is None
    assert run.selected["stage2"] == 6 and run.history["stage2"] == ["a", "b"]
    assert run.fingerprint == ckpt.fingerprint(run.model)
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
    monkeypatch.setattr(graft_network, "cap_workers", lambda count: count + 1)  # no worker is started
    GraFTNetwork(run.cfg).build_engine(run)
    found = run.datamanager.train_loader
    sampler = found.sampler
    assert found.dataset is data and found.batch_size == 9 and (sampler.triplets, sampler.positives) == (3, 2)
    assert found.num_workers == 4 and found.pin_memory is True and found.drop_last is True
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
    assert (found.batch_size, found.sampler.triplets, found.pin_memory, found.num_workers) == (72, 24, False, 1)
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


# --- the relation stage ------------------------------------------------------------------------------------------------
def features(count=24, identities=6, seed=0, cameras=3):
    draw = torch.Generator().manual_seed(seed)
    pids = np.arange(count) % identities
    values = torch.randn(identities, DIM, generator=draw)[torch.from_numpy(pids)] + 0.3 * torch.randn(
        count, DIM, generator=draw
    )
    return FeatureSet(values * 3, pids, np.arange(count) // identities % cameras, [f"{seed}-{i}.png" for i in range(count)])


class Bank:
    """The features of a run, that notes which were asked for."""

    def __init__(self, held_out=None):
        self.asked, self._held_out = [], held_out

    def bank(self, name, records, augment=None):
        self.asked.append((name, records, augment))
        return features(seed=augment or 0)

    def held_out(self):
        self.asked.append("held out")
        return self._held_out


def relation_run(tmp_path, *keys, held_out=None, resume=False):
    cfg = relation_settings(*keys)
    data = SimpleNamespace(train=["records"])
    run = SimpleNamespace(cfg=cfg, resume=resume, fingerprint="of the network", stages=[1, 2], selected={}, history={})
    run.datamanager = manager(num_train_pids=6, train_loader=SimpleNamespace(dataset=data))
    run.stage_folder = lambda number: tmp_path / f"stage{number}"
    run.features, run.static = Bank(held_out), lambda: {"label_map": "map", "num_classes": 6, "config": cfg.dump()}
    run.options = lambda: EvaluationOptions.of(cfg)
    run.bare = SimpleNamespace(feature_dim=DIM)
    return run


def relation_stage():
    stage = RelationStage()
    stage.number = 2
    return stage


TRAIN = [
    *("relation.train.lr", 0.02, "relation.train.betas", [0.5, 0.8], "relation.train.weight_decay", 0.6),
    *("relation.train.lr_scheduler", "multi_step", "relation.train.stepsize", [3], "relation.train.gamma", 0.25),
    *("relation.train.warmup_epochs", 2, "train.warmup_factor", 0.1, "relation.train.max_epoch", 5),
    *("relation.train.features_per_step", 9, "relation.train.steps_per_epoch", 7, "relation.train.spread", [1.5, 3.0]),
    *("relation.bank.noise", 0.2, "relation.train.seed", 8, "relation.loss.ce", 0.6, "relation.loss.triplet", 2.0),
    *("relation.loss.margin", 0.8, "relation.loss.center", 0.1, "relation.loss.center_lr", 0.2),
]


def relation_engine(cfg, bank=None):
    encoder = relation.build_encoder(cfg, dim=DIM, num_classes=6)
    return relation.build_relation_engine(cfg, bank or features(), encoder, num_classes=6, name="the source")


@pytest.mark.parametrize("smooth", [True, False])
def test_the_engine_of_the_relation_stage(smooth, moves):
    cfg = relation_settings(*TRAIN, "loss.softmax.label_smooth", smooth)
    bank = features()
    engine, states = relation_engine(cfg, bank)
    (group,) = engine.optimizer.param_groups
    assert type(engine.optimizer) is torch.optim.AdamW and group["betas"] == (0.5, 0.8)
    assert (group["weight_decay"], group["initial_lr"]) == (0.6, 0.02) and engine.use_gpu is False and moves == []
    assert {id(value) for value in group["params"]} == {id(value) for value in engine.model.parameters()}
    factors = [engine.scheduler.lr_lambdas[0](epoch) for epoch in range(5)]
    assert factors == pytest.approx([0.1, 0.55, 1.0, 0.25, 0.25]) and engine.scheduler.optimizer is engine.optimizer
    loss = engine.loss
    assert loss.weights == {"ce": 0.6, "triplet": 2.0, "center": 0.1} and loss.margin == 0.8
    assert loss.center.centers.shape == (6, DIM) and states["loss"] is loss and len(states) == 2
    assert engine.center_optimizer is states["center_optimizer"]
    assert engine.center_optimizer.param_groups[0]["lr"] == 0.2
    logits, labels = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 0, 1, 1])
    ce = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1 if smooth else 0.0)
    assert torch.allclose(loss(logits, torch.randn(4, DIM), labels)[1]["ce"], ce)
    data, managed = engine.datamanager.dataset, engine.datamanager
    assert (data.count, data.steps, data.spread, data.noise, data.seed) == (9, 7, (1.5, 3.0), 0.2, 8)
    unit = nn.functional.normalize(bank.features)
    assert torch.allclose(data.features, unit) and data.labels.tolist() == bank.pids.tolist()
    assert data.cameras.tolist() == bank.camids.tolist() and data.labels.dtype == data.cameras.dtype == torch.int64
    assert managed.train_loader.batch_size is None and len(managed.train_loader) == 7
    assert managed.train_loader.num_workers == 0 and managed.train_loader.dataset is data
    assert managed.sources == managed.targets == ["the source"] and managed.test_loader == {}
    assert (managed.num_train_pids, managed.data_type, managed.transform_tr) == (6, "features", None)
    assert engine.refresh is None and engine.terms == [] and engine.precision == "float32"
    with pytest.raises(ValueError):  # the schedule needs an epoch behind its warm-up
        relation.warmup_lambda("cosine", max_epoch=2, warmup_epochs=2)
    engine, _ = relation_engine(
        relation_settings(*TRAIN, "relation.train.lr_scheduler", "cosine", "relation.train.max_epoch", 1)
    )
    factors = [engine.scheduler.lr_lambdas[0](epoch) for epoch in (0, 1, 2)]
    assert factors == pytest.approx([0.1, 0.55, 1.0])


def test_the_encoder_goes_to_the_gpu_where_there_is_one(moves, monkeypatch):
    cfg = relation_settings(*TRAIN)
    cfg.use_gpu = True
    engine, _ = relation_engine(cfg)
    assert moves == []  # there is none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine, _ = relation_engine(cfg)
    assert [moved for moved, _ in moves] == [engine.model, engine.loss] and engine.use_gpu is True


def test_a_step_of_the_relation_stage(moves):
    engine, _ = relation_engine(relation_settings(*TRAIN, "relation.attention", "nformer"))
    seen, encoder = [], engine.model

    def watched(values, cameras=None):
        seen.append((values, cameras))
        return nn.Module.__call__(encoder, values, cameras=cameras)

    data = engine.datamanager.dataset[0]
    engine.model = watched
    taken = []
    engine.step = lambda logits, refined, pids: taken.append((logits, refined, pids))
    step = relation._RelationStep.forward_backward
    step(engine, data)
    assert moves == [] and torch.equal(seen[0][0], data["features"]) and torch.equal(seen[0][1], data["camids"])
    ((logits, refined, pids),) = taken
    assert logits.shape == (9, 6) and logits.dtype == torch.float32 and refined.shape == (9, DIM)
    assert torch.equal(pids, data["pids"])
    engine.use_gpu = True
    step(engine, data)
    assert [options for _, options in moves] == [{"non_blocking": True}] * 2
    assert moves[0][0] is data["features"] and moves[1][0] is data["pids"]


def test_an_epoch_takes_its_bank(monkeypatch):
    engine, _ = relation_engine(relation_settings(*TRAIN))
    base, seen = [], []
    monkeypatch.setattr(relation.EngineMixin, "train", lambda self, **options: base.append(options))
    engine.epoch = 3
    engine.train()
    assert base == [{"print_freq": 10, "fixbase_epoch": 0, "open_layers": None}] and engine.datamanager.dataset.epoch == 3
    other = features(seed=5)
    engine.refresh = lambda epoch: (seen.append(epoch), other if epoch == 4 else None)[1]
    engine.epoch = 4
    engine.train(print_freq=2, fixbase_epoch=1, open_layers=["a"])
    data = engine.datamanager.dataset
    assert base[1] == {"print_freq": 2, "fixbase_epoch": 1, "open_layers": ["a"]} and data.epoch == 4
    assert torch.allclose(data.features, nn.functional.normalize(other.features))
    assert data.labels.tolist() == other.pids.tolist() and data.cameras.tolist() == other.camids.tolist()
    assert data.labels.dtype == data.cameras.dtype == torch.int64
    kept = data.features
    engine.epoch = 5
    engine.train()
    assert seen == [4, 5] and data.features is kept and data.epoch == 5


def test_a_head_is_fitted_on_the_training_features():
    cfg = relation_settings("relation.head.kind", "discriminant", "relation.head.shrinkage", 0.3)
    bank = features()
    encoder = relation.build_encoder(cfg, dim=DIM, num_classes=6)
    relation.fit_head(cfg, encoder, bank)
    head = cfg.relation.head
    wanted = relation.HeadChoice(head.shrinkage, head.dims, head.soft, head.keep).of(
        relation.Discriminant(bank.features, torch.from_numpy(bank.pids))
    )
    other = relation.build_encoder(cfg, dim=DIM, num_classes=6)
    other.head.set(wanted)
    assert all(torch.equal(a, b) for a, b in zip(encoder.head.state_dict().values(), other.head.state_dict().values()))
    assert any(float(value.abs().sum()) > 0 for value in encoder.head.state_dict().values())
    relation.fit_head(cfg, relation.build_encoder(relation_settings(), dim=DIM, num_classes=6), bank)  # none to fit


def test_what_a_recipe_is_chosen_on(monkeypatch, capsys):
    chosen, folded = [], []
    recipe = SimpleNamespace(sentence=lambda: "the recipe", overrides=lambda: ["relation.k", 9])
    monkeypatch.setattr(
        relation, "choose_recipe", lambda episodes, cfg, alone: (chosen.append((episodes, cfg, alone)), recipe)[1]
    )
    monkeypatch.setattr(relation, "fold_episodes", lambda bank, **options: (folded.append((bank, options)), ["folds"])[1])
    bank, held_out = features(), TestFeatures(features(seed=1), features(seed=2))
    assert relation.chosen_recipe(relation_settings(), bank, held_out) == [] and chosen == []
    keys = ["relation.recipe", "held-out", "relation.train.seed", 6]
    keys += ["relation.select.folds", 3, "relation.select.identities", 4, "relation.select.images", 5]
    cfg = relation_settings(*keys)
    assert relation.chosen_recipe(cfg, bank, held_out) == ["relation.k", 9]
    ((episodes, given, alone),) = chosen
    (episode,) = episodes
    assert episode.train is bank and episode.query is held_out.query and episode.gallery is held_out.gallery
    assert given is cfg and alone is False and folded == [] and capsys.readouterr().out == "the recipe\n"
    options = {"folds": 3, "identities": 4, "images": 5, "seed": 6}
    relation.chosen_recipe(cfg, bank, None)
    said = capsys.readouterr().out
    assert folded.pop() == (bank, options) and chosen[-1][0] == ["folds"]
    assert said.startswith("note: the recipe is chosen on identities that the image model was trained on")
    frozen = relation_settings(*keys, "train.stages", [2], "relation.k", 1)
    relation.chosen_recipe(frozen, bank, held_out)
    assert folded.pop() == (bank, options) and chosen[-1][2] is True and capsys.readouterr().out == "the recipe\n"


def test_whether_an_encoder_fits_is_known_before(tmp_path, monkeypatch):
    built, taken, resolved = [], [], []
    encoder = SimpleNamespace(search=SimpleNamespace(resolve=lambda: resolved.append(1)))

    def build(cfg, dim, num_classes):
        built.append((cfg, dim, num_classes))
        torch.rand(3)
        return encoder

    monkeypatch.setattr(relation, "build_encoder", build)
    monkeypatch.setattr(relation, "take_weights", lambda *values, **options: taken.append((values, options)))
    run, stage = relation_run(tmp_path), relation_stage()
    before = torch.get_rng_state()
    stage.check(run)
    assert built == [(run.cfg, DIM, 2)] and taken == [] and resolved == [1] and torch.equal(torch.get_rng_state(), before)
    run.bare = SimpleNamespace(feature_dim=DIM, test_dim=5)
    stage.check(run)
    assert built.pop()[1] == 5
    run.bare = SimpleNamespace()
    stage.check(run)
    assert len(built) == 1 and len(resolved) == 2
    run = relation_run(tmp_path, "relation.load_weights", "w.pth")
    stage.check(run)
    assert taken == [((run, encoder, "relation.load_weights"), {"only_check": True, "classes": 2})]
    run.stages = [1]
    stage.check(run)
    assert len(taken) == 1

    def refuse(*values, **options):
        raise ValueError("too wide")

    monkeypatch.setattr(relation, "build_encoder", refuse)
    with pytest.raises(UserError, match=f"keys of 'relation' do not fit features of width {DIM}: too wide"):
        stage.check(run)


@pytest.fixture
def training(monkeypatch):
    """What the relation stage hands to the loop that trains it."""
    asked = SimpleNamespace(calls=[], seeds=[], weights=[], heads=[])
    monkeypatch.setattr(relation, "train_engine", lambda *values, **options: asked.calls.append((values, options)))
    monkeypatch.setattr(relation, "set_seed", lambda seed: (asked.seeds.append(seed), torch.manual_seed(seed)))
    monkeypatch.setattr(relation, "take_weights", lambda *values: asked.weights.append(values))
    monkeypatch.setattr(relation, "fit_head", lambda *values: asked.heads.append(values))
    return asked


def test_training_the_relation_stage(tmp_path, training, capsys):
    run = relation_run(tmp_path, *TRAIN, "train.seed", 4, "train.checkpoint_freq", 3, "relation.bank.refresh", 0)
    stage = relation_stage()
    stage.train(run)
    (((of, itself, engine, extra, context), options),) = training.calls
    assert of is run and itself is stage and extra["loss"] is engine.loss and set(options) == {"announce", "belongs"}
    assert run.features.asked == [("train", ["records"], None), "held out"] and training.seeds == [1_000_003 * 4 + 8]
    assert context == StageContext(
        kind="relation",
        folder=tmp_path / "stage2",
        max_epoch=5,
        checkpoint_freq=3,
        eval_freq=run.cfg.relation.train.eval_freq,
        static={**run.static(), "image_model": "of the network", "dim": DIM},
    )
    torch.manual_seed(1_000_003 * 4 + 8)
    wanted = relation.build_encoder(run.cfg, dim=DIM, num_classes=6).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in engine.model.state_dict().items())
    assert (
        engine.refresh is None and training.weights == [] and engine.datamanager.sources == ["+".join(run.cfg.data.sources)]
    )
    ((cfg, encoder, bank),) = training.heads
    assert encoder is engine.model and len(bank) == 24 and cfg.relation.k == run.cfg.relation.k
    options["announce"]()
    count = sum(value.numel() for name, value in encoder.named_parameters() if "classifier" not in name)
    said = f"stage 2: magformer, {count / 1e6:.2f}M parameters, 24 features, 7 steps of 9 per epoch, 5 epochs\n"
    assert capsys.readouterr().out.startswith(said)
    path = tmp_path / "x"
    options["belongs"]({"image_model": "of the network"}, path)
    with pytest.raises(
        UserError, match=f"checkpoint '{path}' belongs to another image model than that of '.*stage1'; train stage 2"
    ):
        options["belongs"]({"image_model": "another"}, path)


def test_validation_of_the_relation_stage(tmp_path, training, monkeypatch):
    held_out = TestFeatures(features(seed=1), features(seed=2))
    for frequency, protocols in ((1, ["inductive", "transductive"]), (2, ["transductive"]), (0, ["inductive"])):
        keys = ["relation.train.eval_freq", frequency, "relation.protocols", protocols, "test.dist_metric", "euclidean"]
        run = relation_run(tmp_path, *TRAIN, *keys, held_out=held_out)
        relation_stage().train(run)
        (*_, engine, _, context), _ = training.calls.pop()
        assert context.eval_freq == frequency and (context.validate is None) == (frequency == 0)
        if frequency:
            engine.model.train()
            found = context.validate()
            assert not engine.model.training
            evaluator = Evaluator("x", held_out, options=run.options(), parameters=0)
            assert found.mAP == evaluator.refined_result(engine.model, protocols[0]).mAP
    run = relation_run(tmp_path, *TRAIN, "relation.train.eval_freq", 1)
    relation_stage().train(run)
    assert training.calls.pop()[0][4].validate is None


def test_a_bank_that_is_refreshed(tmp_path, training):
    run, stage = relation_run(tmp_path, *TRAIN, "relation.bank.refresh", 3), relation_stage()
    stage.train(run)
    (*_, engine, _, _), _ = training.calls.pop()
    assert run.features.asked[0] == ("train", ["records"], 0)
    run.features.asked.clear()
    found = [engine.refresh(epoch) for epoch in range(7)]
    assert [bank is None for bank in found] == [False, True, True, False, True, True, False]
    assert run.features.asked == [("train", ["records"], first) for first in (0, 3, 6)]
    again = relation_stage()
    assert again._refreshed_bank(run, ["records"], 5) is not None  # a run that goes on in the middle
    assert run.features.asked[-1] == ("train", ["records"], 3)
    run = relation_run(tmp_path, *TRAIN, "relation.bank.refresh", 1)
    again = relation_stage()
    assert all(again._refreshed_bank(run, ["records"], epoch) is not None for epoch in range(3))


def test_weights_and_recipe_to_start_from(tmp_path, training, monkeypatch):
    asked = []

    def choose(cfg, bank, held_out):
        asked.append((cfg, len(bank), held_out))
        torch.rand(2)
        return ["relation.k", 4]

    monkeypatch.setattr(relation, "chosen_recipe", choose)
    run = relation_run(tmp_path, *TRAIN, "relation.load_weights", "w.pth")
    relation_stage().train(run)
    (*_, engine, _, context), _ = training.calls.pop()
    assert asked == [(run.cfg, 24, None)] and context.static["recipe"] == ["relation.k", 4] and engine.model.k == 4
    assert training.weights == [(run, engine.model, "relation.load_weights")] and training.heads[0][0].relation.k == 4
    torch.manual_seed(1_000_003 * 1 + 8)
    wanted = relation.build_encoder(with_recipe(run.cfg, ["relation.k", 4]), dim=DIM, num_classes=6).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in engine.model.state_dict().items())
    # one that goes on has its own
    toy_checkpoint(tmp_path / "stage2" / LAST, kind="relation", recipe=["relation.k", 5])
    run.resume = True
    relation_stage().train(run)
    assert training.calls.pop()[0][2].model.k == 5 and len(asked) == 1
    toy_checkpoint(tmp_path / "stage2" / LAST, kind="relation")
    relation_stage().train(run)
    (*_, context), _ = training.calls.pop()
    assert "recipe" not in context.static and len(asked) == 1


def test_relations_of_tracklets_are_refused(tmp_path):
    run = relation_run(tmp_path)
    run.cfg.data.type = "video"
    with pytest.raises(UserError, match="stage 2 works on image data; set 'data.type image'"):
        relation_stage().train(run)


def encoder_checkpoint(path, cfg, *, epoch=1, scale=1.0, network="of the network", **more):
    torch.manual_seed(5)
    state = {name: value * scale for name, value in relation.build_encoder(cfg, dim=DIM, num_classes=6).state_dict().items()}
    toy_checkpoint(path, kind="relation", epoch=epoch, weights=state, image_model=network, dim=DIM, num_classes=6, **more)
    return state


def test_the_encoder_that_is_tested(tmp_path, moves):
    run, stage, folder = relation_run(tmp_path), relation_stage(), tmp_path / "stage2"
    assert (stage.kind, stage.refines, stage.encoder) == ("relation", True, None)
    missing = f"no stage-2 checkpoint in '{folder}'; train it first .*by 'train.stages \\[1\\]'"
    with pytest.raises(UserError, match=missing):
        stage.load(run)
    run.cfg.train.stages = [2]
    with pytest.raises(UserError, match=missing):
        stage.load(run)
    run.cfg.train.stages = [1, 2, 3]
    with pytest.raises(UserError, match=r"by 'train.stages \[1, 3\]'"):
        stage.load(run)
    state = encoder_checkpoint(folder / LAST, run.cfg, epoch=4, history=["a", "b"])
    encoder = stage.refiner(run)
    assert encoder is stage.encoder is stage.refiner(run) and not encoder.training and moves == []
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert run.selected == {"stage2": 4} and run.history == {"stage2": ["a", "b"]}
    better = encoder_checkpoint(folder / BEST, run.cfg, epoch=2, scale=1.5, history=["a"])
    stage.load(run)
    assert run.selected == {"stage2": 2} and run.history == {"stage2": ["a", "b"]}
    assert all(torch.equal(value, better[name]) for name, value in stage.encoder.state_dict().items())
    run.cfg.use_gpu = True
    stage.load(run)
    assert [moved for moved, _ in moves] == [stage.encoder]
    run.cfg.use_gpu = False
    encoder_checkpoint(folder / BEST, run.cfg, network="another")
    with pytest.raises(UserError, match=f"checkpoint '{folder / BEST}' belongs to another image model"):
        stage.load(run)
    toy_checkpoint(folder / BEST, kind="finetune")
    with pytest.raises(UserError, match="holds the finetune model, but the relation model"):
        stage.load(run)
    encoder_checkpoint(folder / BEST, relation_settings("relation.num_layers", 2))
    with pytest.raises(UserError, match=f"checkpoint '{folder / BEST}' belongs to another model"):
        stage.load(run)
    encoder_checkpoint(folder / BEST, run.cfg)
    toy_checkpoint(folder / LAST, kind="finetune")
    with pytest.raises(UserError, match="holds the finetune model, but the relation model"):
        stage.load(run)


def test_an_encoder_from_elsewhere_is_tested(tmp_path):
    source = tmp_path / "elsewhere.pth.tar"
    run, stage = relation_run(tmp_path, "relation.load_weights", source), relation_stage()
    state = encoder_checkpoint(
        source, with_recipe(run.cfg, ["relation.num_layers", 2]), epoch=3, recipe=["relation.num_layers", 2]
    )
    stage.load(run)
    assert len(stage.encoder.blocks) == 2 and run.selected == {"stage2": 3}
    assert all(torch.equal(value, state[name]) for name, value in stage.encoder.state_dict().items())
    # one of its own comes first
    encoder_checkpoint(tmp_path / "stage2" / LAST, run.cfg, epoch=1)
    stage.load(run)
    assert len(stage.encoder.blocks) == 1 and run.selected == {"stage2": 1}


def test_rows_of_the_relation_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(relation, "faiss_available", lambda: False)
    data = TestFeatures(features(seed=1), features(seed=2))
    for attention, title in (("nformer", "+ NFormer"), ("malaa", "+ MALAA"), ("magformer", "+ MagFormer")):
        keys = ["relation.attention", attention, "relation.protocols", ["transductive", "inductive"]]
        run, stage = relation_run(tmp_path, *keys), relation_stage()
        stage.encoder = relation.build_encoder(run.cfg, dim=DIM, num_classes=6).eval()
        rows = stage.rows(run, Evaluator("made", data, options=run.options(), parameters=100))
        assert [(row.method, row.protocol) for row in rows] == [(title, "transductive"), (title, "inductive")]
        assert all(isinstance(row, Row) and row.parameters > 100 for row in rows)


def test_missing_faiss_is_said(monkeypatch, capsys):
    for backend, resolved, there, said in (
        ("auto", "torch", False, True),
        ("auto", "torch", True, False),
        ("torch", "torch", False, False),
        ("auto", "faiss", False, False),
    ):
        monkeypatch.setattr(relation, "faiss_available", lambda there=there: there)
        encoder = SimpleNamespace(search=SimpleNamespace(resolve=lambda resolved=resolved: resolved))
        relation.note_search(relation_settings("relation.search.backend", backend), encoder)
        assert ("note: faiss is not installed" in capsys.readouterr().out) is said
