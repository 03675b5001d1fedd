"""GraFT's two stages written out as loops, its rows from its own features, and what its keys change."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from wiring import (
    MODALITIES,
    Decayed,
    assert_same_weights,
    centred,
    cross_entropy,
    execute,
    graft_config,
    naive_scores,
    saved,
    seed_all,
    write_vehicles,
)

from relreid_plugin.engine.evaluator import inference_parameters
from relreid_plugin.errors import UserError
from relreid_plugin.graft.schedule import sqrt_lambda
from relreid_plugin.graft.triplets import TripletSampler
from relreid_plugin.host import build_datamanager, build_model


@pytest.fixture(scope="module")
def vehicles(tmp_path_factory):
    return write_vehicles(tmp_path_factory.mktemp("vehicles"))


def distance(a, b):
    return (a - b).square().sum(dim=-1).clamp_min(1e-12).sqrt()


def given(fused, data, pids):
    """FFD triplets in thirds: anchor and positive fused tokens, negative data tokens; log(1 + exp(d_ap - d_an))."""
    (a, p, _), (_, _, n) = fused.chunk(3), data.chunk(3)
    return torch.log1p(torch.exp(distance(a, p) - distance(a, n))).mean()


def mined(fused, data, pids):
    """DDF triplets mined in the batch, squared distances, by a loop."""
    terms = []
    for i, pid in enumerate(pids):
        others = torch.arange(len(pids)) != i
        near = (data[i] - data[(pids == pid) & others]).square().sum(dim=1).max()
        far = (data[i] - fused[pids != pid]).square().sum(dim=1).min()
        terms.append(F.softplus(near - far))
    return torch.stack(terms).mean()


def loop(model, batches, optimizer, centers, rates, weights, *, smoothing, center_lr, triplet, classified):
    """Epochs of batches with a learning rate per step; mean (loss, ce, triplet, center, accuracy) of the last epoch."""
    parameters, step = optimizer.parameters, 0
    for _ in range(rates["epochs"]):
        records = []
        for data in batches:
            logits, fused, tokens = model(data["img"], classified=classified)
            own = data["pid"][:classified]
            parts = [
                cross_entropy(logits, own, smoothing),
                triplet(fused, tokens, data["pid"]),
                centred(fused[:classified], own, centers),
            ]
            total = sum(weight * part for weight, part in zip(weights, parts))
            *gradients, of_centers = torch.autograd.grad(total, [*parameters, centers])
            optimizer.step(gradients, rates["of"](step))
            with torch.no_grad():
                centers -= center_lr * of_centers / weights[2]
            step += 1
            hits = 100 * (logits.argmax(dim=1) == own).double().mean()
            records.append([float(value.detach()) for value in (total, *parts, hits)])
    return torch.tensor(records).mean(dim=0).tolist()


KEYS = [
    *("graft.positives", 3),
    *("train.seed", 4, "train.max_epoch", 2, "train.lr", 0.01, "train.weight_decay", 0.3),
    *("adam.beta1", 0.6, "adam.beta2", 0.7, "train.lr_scheduler", "sqrt", "graft.warmup_steps", 2, "graft.cooldown", 0.4),
    *("loss.composite.ce", 0.7, "loss.composite.triplet", 2.0, "loss.composite.center", 0.2),
    *("loss.composite.center_lr", 0.3, "loss.softmax.label_smooth", False),
    *("graft.finetune.max_epoch", 2, "graft.finetune.lr", 0.002, "graft.finetune.weight_decay", 0.5),
    *("graft.finetune.ce", 0.4, "graft.finetune.triplet", 3.0, "graft.finetune.center", 0.1),
    *("graft.finetune.label_smoothing", 0.2),
]
MINED = [
    *("graft.sampling", "pk", "graft.scheme", "DDF", "graft.distance", "squared"),
    *("sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 3),
]


@pytest.mark.parametrize("sampling", ["triplets", "pk"])
def test_both_stages(vehicles, tmp_path, sampling):
    given_triplets = sampling == "triplets"
    cfg = graft_config(vehicles, tmp_path / "run", *KEYS, *([] if given_triplets else MINED))
    run, result = execute(cfg)

    seed_all(4)
    manager = build_datamanager(cfg, tmp_path / "cache")
    seed_all(4)
    model = build_model("graft", 4, "triplet", False, False, cfg=cfg)
    model.freeze_backbone()
    batches, classified = manager.train_loader, None
    if given_triplets:
        dataset = manager.train_loader.dataset
        sampler = TripletSampler([item[1] for item in dataset.train], triplets=4, positives=3)
        batches, classified = DataLoader(dataset, sampler=sampler, batch_size=12, drop_last=True), 4
    options = {"triplet": given if given_triplets else mined, "classified": classified}
    centers = torch.randn(4, 64, requires_grad=True)
    optimizer = Decayed([value for value in model.parameters() if value.requires_grad], (0.6, 0.7), 0.3)
    factor = sqrt_lambda(2 * len(batches), warmup_steps=2, cooldown=0.4)
    rates = {"epochs": 2, "of": lambda step: 0.01 * factor(step)}
    model.train()
    last = loop(model, batches, optimizer, centers, rates, (0.7, 2.0, 0.2), smoothing=0.0, center_lr=0.3, **options)
    first = saved(tmp_path / "run", 1)
    assert_same_weights(first["state_dict"], model.state_dict(), tolerance=1e-3)
    names = ("loss", "ce", "triplet", "center", "acc")
    assert [result.history["stage1"][-1][name] for name in names] == pytest.approx(last, rel=1e-2)
    assert result.history["stage1"][-1]["lr"] == pytest.approx(0.01 * factor(2 * len(batches)))

    seed_all(1_000_003 * 4 + 2)
    model.load_state_dict(first["state_dict"])
    model.freeze_backbone(False)
    centers = torch.randn(4, 64, requires_grad=True)
    optimizer = Decayed([value for value in model.parameters() if value.requires_grad], (0.9, 0.999), 0.5)
    rates = {"epochs": 2, "of": lambda step: 0.002}
    last = loop(model, batches, optimizer, centers, rates, (0.4, 3.0, 0.1), smoothing=0.2, center_lr=0.3, **options)
    second = saved(tmp_path / "run", 2)
    assert [result.history["stage2"][-1][name] for name in names] == pytest.approx(last, rel=2e-2)
    assert_same_weights(second["state_dict"], model.state_dict(), tolerance=3e-3)
    assert {record["lr"] for record in result.history["stage2"]} == {0.002}
    assert (first["kind"], second["kind"], second["epoch"]) == ("image", "finetune", 2)
    assert second["stage1"] and second["stage1"] != saved(tmp_path / "run", 1).get("stage1")
    assert result.rows[0].parameters == inference_parameters(model)


def test_rows_of_modalities_from_their_own_features(vehicles, tmp_path):
    keys = ["multimodal.test", ["N+T", "R+N+T", "R"], "test.dist_metric", "cosine", "test.rivals", ["aqe"]]
    run, result = execute(graft_config(vehicles, tmp_path / "run", *keys))
    methods = [row.method for row in result.rows]
    assert methods == [
        "GraFT, N+T (without R)",
        "+ average query expansion",
        "GraFT, R+N+T",
        "GraFT, R (without N, T)",
    ]
    model, sets = run.bare.eval(), run.datamanager.test_dataset["rgbnt100"]
    loaders = run.datamanager.test_loader["rgbnt100"]
    images = {part: torch.cat([batch["img"] for batch in loaders[part]]) for part in ("query", "gallery")}
    pids = {part: torch.tensor([item[1] for item in sets[part]]).numpy() for part in sets}
    cameras = {part: torch.tensor([item[2] for item in sets[part]]).numpy() for part in sets}
    for row, subset in zip((result.rows[0], *result.rows[2:]), (("N", "T"), MODALITIES, ("R",))):
        slots = [MODALITIES.index(name) for name in subset]
        with torch.no_grad():
            features = {part: model(value[:, slots], subset) for part, value in images.items()}
        if subset == ("N", "T"):
            kept = result.stage1_features["rgbnt100"]
            assert torch.allclose(kept.query.features, features["query"], atol=1e-5)
            assert torch.allclose(kept.gallery.features, features["gallery"], atol=1e-5)
        distances = 1 - features["query"] @ features["gallery"].t()
        wanted = naive_scores(distances, pids["query"], pids["gallery"], cameras["query"], cameras["gallery"])
        assert (row.mAP, row.mINP) == pytest.approx(wanted[:2], abs=1e-6)
    assert run.engine.present is None
    assert run.notes == ["rgbnt100: N+T tests without R.", "rgbnt100: R tests without N, T."]
    # the banks of subsets are their own, and used again
    names = sorted(path.name for path in (tmp_path / "run" / "bank").iterdir())
    assert names == [f"rgbnt100{part}-{side}.pt" for part in ("", "-NT", "-R") for side in ("gallery", "query")] or set(
        names
    ) == {f"rgbnt100{part}-{side}.pt" for part in ("", "-NT", "-R") for side in ("gallery", "query")}


def test_all_modalities_are_tested_without_a_list(vehicles, tmp_path):
    run, result = execute(graft_config(vehicles, tmp_path / "run", "train.stages", [1], "test.rivals", []))
    assert [row.method for row in result.rows] == ["GraFT, R+N+T"] and [view.subset for view in run.network.views()] == [()]
    assert result.history.keys() == {"stage1"} and not (tmp_path / "run" / "stage2").exists()
    # stage 1 alone: the backbone was frozen
    seed_all(1)
    manager = build_datamanager(graft_config(vehicles, tmp_path / "again"), tmp_path / "cache")
    assert manager.num_train_pids == 4
    seed_all(1)
    start = build_model("graft", 4, "triplet", False, False, cfg=run.cfg).state_dict()
    trained = saved(tmp_path / "run", 1)["state_dict"]
    moved = [name for name in start if not torch.equal(start[name], trained[name])]
    assert moved and not any(name.startswith("backbones") for name in moved)


def test_a_schedule_by_epochs(vehicles, tmp_path):
    keys = ["train.stages", [1], "train.max_epoch", 3, "train.lr_scheduler", "multi_step", "train.stepsize", [1, 2]]
    _, result = execute(graft_config(vehicles, tmp_path / "run", *keys, "train.gamma", 0.5))
    assert [record["lr"] for record in result.history["stage1"]] == pytest.approx([0.0005, 0.00025, 0.00025])


def test_a_batch_larger_than_an_epoch(vehicles, tmp_path, capsys):
    run, _ = execute(graft_config(vehicles, tmp_path / "run", "train.stages", [1], "train.batch_size", 300))
    assert "an epoch has 16 triplets, less than a batch of 100" in capsys.readouterr().out
    assert run.datamanager.train_loader.batch_size == 48
    run, _ = execute(graft_config(vehicles, tmp_path / "fits", "train.stages", [1], "train.batch_size", 48))
    assert "less than a batch" not in capsys.readouterr().out and run.datamanager.train_loader.batch_size == 48
    loader = run.datamanager.train_loader
    assert loader.drop_last and loader.num_workers == 0 and not loader.pin_memory


def test_held_out_identities_choose_the_epoch_of_both_stages(vehicles, tmp_path, monkeypatch):
    keys = ["train.val_fraction", 0.4, "train.max_epoch", 3, "graft.finetune.max_epoch", 3, "test.eval_freq", 1]
    _, result = execute(graft_config(vehicles, tmp_path / "run", *keys))
    for number, kind in ((1, "image"), (2, "finetune")):
        scores = [record["val_mAP"] for record in result.history[f"stage{number}"]]
        best = saved(tmp_path / "run", number, "best")
        assert best["kind"] == kind and best["epoch"] == scores.index(max(scores)) + 1
        assert best["best_score"] == max(scores)
    assert saved(tmp_path / "run", 2)["max_epoch"] == 3
    # stage 2 starts from the best of stage 1, and is tested from its own best
    run, again = execute(graft_config(vehicles, tmp_path / "run", *keys), stages=[])
    best = saved(tmp_path / "run", 2, "best")["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in run.bare.state_dict().items())
    assert [row.mAP for row in again.rows] == [row.mAP for row in result.rows]
    assert run.selected == {f"stage{i}": saved(tmp_path / "run", i, "best")["epoch"] for i in (1, 2)}


def test_tests_while_training_and_where_they_start(vehicles, tmp_path):
    keys = ["train.max_epoch", 4, "graft.finetune.max_epoch", 4, "test.eval_freq", 1, "test.start_eval", 2]
    _, result = execute(graft_config(vehicles, tmp_path / "run", *keys, "train.checkpoint_freq", 3))
    for stage in ("stage1", "stage2"):
        assert ["rgbnt100/mAP" in record for record in result.history[stage]] == [False, True, True, False]
    assert saved(tmp_path / "run", 2)["epoch"] == 4


def test_resuming_stage_2(vehicles, tmp_path, capsys):
    keys = ["graft.finetune.max_epoch", 2, "graft.dropout", 0.3]
    _, straight = execute(graft_config(vehicles, tmp_path / "straight", *keys))
    execute(graft_config(vehicles, tmp_path / "halves", "graft.dropout", 0.3))
    capsys.readouterr()
    _, resumed = execute(graft_config(vehicles, tmp_path / "halves", *keys), resume=True)
    said = capsys.readouterr().out
    assert "stage 1 is complete (1 epochs)" in said and "resuming stage 2 after epoch 1" in said
    assert_same_weights(
        saved(tmp_path / "halves", 2)["state_dict"], saved(tmp_path / "straight", 2)["state_dict"], tolerance=0.0
    )
    capsys.readouterr()
    execute(graft_config(vehicles, tmp_path / "halves", *keys), resume=True)
    assert "is finished; this is its table" in capsys.readouterr().out
    # over another stage 1 it does not go on
    state = saved(tmp_path / "halves", 1)
    state["state_dict"]["token"] += 1
    torch.save(state, tmp_path / "halves" / "stage1" / "last.pth.tar")
    (tmp_path / "halves" / "metrics.json").unlink()  # else the run is finished
    with pytest.raises(UserError, match="goes on from another stage 1"):
        execute(graft_config(vehicles, tmp_path / "halves", *keys), resume=True)


def test_stages_without_epochs(vehicles, tmp_path):
    keys = ["train.max_epoch", 0, "graft.finetune.max_epoch", 0]
    _, result = execute(graft_config(vehicles, tmp_path / "run", *keys))
    assert [saved(tmp_path / "run", stage)["epoch"] for stage in (1, 2)] == [0, 0] and math.isfinite(result.rows[0].mAP)


def test_what_is_missing_is_said(vehicles, tmp_path):
    with pytest.raises(UserError, match="'model.name graft' works with 'data.type image', not with 'video'"):
        execute(graft_config(vehicles, tmp_path / "video", "data.type", "video"))
    execute(graft_config(vehicles, tmp_path / "first", "train.stages", [1]))
    with pytest.raises(UserError, match=r"no stage-2 checkpoint in '.*stage2'; train it first"):
        execute(graft_config(vehicles, tmp_path / "first"), stages=[])
    with pytest.raises(UserError, match="no stage-1 checkpoint"):
        execute(graft_config(vehicles, tmp_path / "none"), stages=[2])


@pytest.mark.parametrize(
    "fusion,title",
    [
        ("early", "early fusion"),
        ("late", "late fusion (Multi-Stream ViT)"),
        ("cls", "vanilla fusion, CLS token"),
        ("average", "vanilla fusion, averaged tokens"),
    ],
)
def test_rivals_have_titles(vehicles, tmp_path, fusion, title):
    keys = ["graft.fusion", fusion, "train.max_epoch", 0, "train.stages", [1], "test.rivals", []]
    _, result = execute(graft_config(vehicles, tmp_path / "run", *keys))
    assert [row.method for row in result.rows] == [f"{title}, R+N+T"]
