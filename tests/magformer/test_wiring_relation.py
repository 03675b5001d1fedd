"""The relation stage: encoder, optimiser, loss, schedule, bank, recipe, devices, and which checkpoint is tested."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from wiring import BASE, bare_manager, keys_of, note_moves, settings, toy_checkpoint

from relreid_plugin.engine.base import StageContext
from relreid_plugin.engine.evaluator import EvaluationOptions, Evaluator, Row
from relreid_plugin.engine.updates import Practice
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import Features, TestFeatures
from relreid_plugin.magformer import stage as relation
from relreid_plugin.magformer.recipe import with_recipe
from relreid_plugin.magformer.stage import RelationStage

BEST, LAST = "best.pth.tar", "last.pth.tar"
DIM = 12


def relation_settings(*pairs):
    return settings(*keys_of(BASE), "train.stages", [1, 2], "relation.attention", "magformer", *pairs)


@pytest.fixture
def moves(monkeypatch):
    """What is moved to the GPU."""
    return note_moves(monkeypatch)


def features(count=24, identities=6, seed=0, cameras=3):
    draw = torch.Generator().manual_seed(seed)
    pids = np.arange(count) % identities
    values = torch.randn(identities, DIM, generator=draw)[torch.from_numpy(pids)] + 0.3 * torch.randn(
        count, DIM, generator=draw
    )
    return Features(values * 3, pids, np.arange(count) // identities % cameras, [f"{seed}-{i}.png" for i in range(count)])


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
    run = SimpleNamespace(
        cfg=cfg, resume=resume, fingerprint="of the network", stages=[1, 2], selected={}, history={}, watch=None
    )
    run.datamanager = bare_manager(num_train_pids=6, train_loader=SimpleNamespace(dataset=data))
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
    assert engine.refresh is None and engine.terms == [] and engine.updates.practice == Practice()
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
