"""A run from end to end on toy pictures: which keys reach which row, file, epoch and weight."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from wiring import (
    Toy,
    assert_same_weights,
    execute,
    naive_scores,
    saved,
    seed_all,
    toy_config,
    write_pictures,
)

from relreid_plugin.config.defaults import load_config
from relreid_plugin.engine import checkpoint
from relreid_plugin.engine.evaluator import EvaluationOptions, Evaluator, inference_parameters
from relreid_plugin.engine.folder import write_results
from relreid_plugin.engine.runner import Run, environment, logged, open_run, read_metrics, set_seed
from relreid_plugin.errors import UserError
from relreid_plugin.host import HOST, build_datamanager
from relreid_plugin.magformer.stage import build_encoder

BOTH = ("train.stages", [1, 2], "relation.attention", "magformer", "relation.bank.refresh", 0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture
def configure(pictures, tmp_path):
    """``configure(folder name, KEY, VALUE, …)``: a configuration below the test's folder."""
    return lambda name, *pairs: toy_config(pictures, tmp_path / name, *pairs)


def features_of(state, records, cfg):
    """Features of pictures by the weights of a checkpoint, one at a time."""
    model = Toy(state["num_classes"])
    model.load_state_dict(state["state_dict"])
    model.eval()
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (cfg.data.norm_mean, cfg.data.norm_std))
    rows = []
    for record in records:
        picture = Image.open(record[0]).convert("RGB").resize((cfg.data.width, cfg.data.height), Image.BILINEAR)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            rows.append(model((pixels - mean)[None] / std)[0])
    return torch.stack(rows)


def ranked(query, gallery, query_records, gallery_records, metric="euclidean"):
    """(mAP, mINP, CMC) of features and records."""
    distances = torch.cdist(query.double(), gallery.double())
    if metric == "cosine":
        distances = 1 - torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(gallery).t()
    labels = [np.array([item[part] for item in items]) for part in (1, 2) for items in (query_records, gallery_records)]
    return naive_scores(distances, *labels)


# --- rows ------------------------------------------------------------------------------------------------------------------
CASES = {
    "metric": ({"test.dist_metric": "cosine"}, {"metric": "cosine"}),
    "normalised": ({"test.normalize_feature": True}, {"normalise": True}),
    "ranks": ({"test.ranks": [2, 3]}, {"ranks": (2, 3)}),
    "rivals": ({"test.rivals": ["rerank"]}, {"rivals": ("rerank",)}),
    "aqe": ({"test.aqe.k": 2, "test.aqe.alpha": 3.0}, {"aqe_k": 2, "aqe_alpha": 3.0}),
    "rerank": (
        {"test.kreciprocal.k1": 5, "test.kreciprocal.k2": 2, "test.kreciprocal.lambda_value": 0.7},
        {"k1": 5, "k2": 2, "lambda_value": 0.7},
    ),
    "all rivals": (
        {
            "test.rivals": ["diffusion", "aqe-alpha", "gnn", "gcr", "cajaccard", "nfc"],
            "test.rival_protocol": "inductive",
            "test.aqe_alpha.k": 2,
            "test.gnn.k1": 4,
            "test.gcr.rounds": 1,
            "test.cajaccard.k1_inter": 3,
            "test.nfc.k2": 3,
            "test.diffusion.k": 5,
        },
        {
            "rivals": ("aqe-alpha", "gnn", "gcr", "cajaccard", "nfc", "diffusion"),
            "rival_protocol": "inductive",
            "rival_settings": {
                "aqe-alpha": {"k": 2},
                "gnn": {"k1": 4},
                "gcr": {"rounds": 1},
                "cajaccard": {"k1_inter": 3},
                "nfc": {"k2": 3},
                "diffusion": {"k": 5},
            },
        },
    ),
    "every row": ({"test.rerank": True, "test.kreciprocal.k1": 4}, {"rerank_all": True, "k1": 4}),
    "classic": ({"cuhk03.use_metric_cuhk03": True}, {"cuhk03_metric": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_key_of_the_test_reaches_its_rows(configure, case):
    keys, options = CASES[case]
    cfg = configure("run", *BOTH, *[item for pair in keys.items() for item in pair])
    run, result = execute(cfg)
    (name,) = cfg.data.targets
    evaluator = Evaluator(
        name, result.stage1_features[name], options=EvaluationOptions(**options), parameters=run.parameters
    )
    encoder = build_encoder(cfg, dim=8, num_classes=8)
    encoder.load_state_dict(saved(run.folder, 2)["state_dict"])
    wanted = [evaluator.baseline(), *evaluator.rivals()]
    for protocol in ("inductive", "transductive"):
        wanted.append(evaluator.relation(encoder, protocol=protocol, name="+ MagFormer"))

    def comparable(row):
        return {key: value for key, value in row.as_dict().items() if key != "seconds"}

    assert [comparable(row) for row in result.rows] == [comparable(row) for row in wanted]
    plain = Evaluator(name, result.stage1_features[name], options=EvaluationOptions(), parameters=run.parameters)
    assert [comparable(row) for row in [plain.baseline(), *plain.rivals()]] != [comparable(row) for row in wanted[:3]]
    assert run.parameters == sum(value.numel() for value in Toy(8).embedding.parameters())


def test_protocols_come_in_their_order_with_the_methods_name(configure):
    for attention, name in (("nformer", "+ NFormer"), ("malaa", "+ MALAA"), ("magformer", "+ MagFormer")):
        cfg = configure(attention, *BOTH, "relation.attention", attention, "test.rivals", [])
        cfg.relation.protocols = ["transductive", "inductive"] if attention == "malaa" else ["transductive"]
        _, result = execute(cfg)
        found = [(row.protocol, row.method) for row in result.rows]
        assert found == [("inductive", "image model"), *((protocol, name) for protocol in cfg.relation.protocols)]


def test_features_are_those_of_the_chosen_weights(configure, pictures):
    cfg = configure("run", "data.norm_mean", [0.3, 0.4, 0.5], "data.norm_std", [0.2, 0.25, 0.5], "test.batch_size", 5)
    run, result = execute(cfg)
    sets = run.datamanager.test_dataset[str(pictures)]
    kept = result.stage1_features[str(pictures)]
    state = saved(run.folder, 1)
    for part in ("query", "gallery"):
        found, records = getattr(kept, part), sets[part]
        assert torch.allclose(found.features, features_of(state, records, cfg), atol=1e-4)
        assert found.paths == [record[0] for record in records]
        assert found.pids.tolist() == [record[1] for record in records]
        assert found.camids.tolist() == [record[2] for record in records]
    row = result.rows[0]
    wanted = ranked(kept.query.features, kept.gallery.features, sets["query"], sets["gallery"])
    assert (row.mAP, row.mINP) == pytest.approx(wanted[:2], abs=1e-9) and row.cmc == pytest.approx(wanted[2])
    assert state["normalisation"] == {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.5], "height": 16, "width": 8}
    assert not run.engine.model.training


def test_several_targets_are_tested_in_order(configure, pictures, tmp_path):
    other = write_pictures(tmp_path / "other", seed=3)
    cfg = configure("run", "data.targets", [str(other), str(pictures)], "test.rivals", [], "test.eval_freq", 1)
    run, result = execute(cfg)
    assert [row.target for row in result.rows] == list(result.stage1_features) == [str(other), str(pictures)]
    assert result.rows[0].mAP != result.rows[1].mAP
    names = [f"{name}/{score}" for name in cfg.data.targets for score in ("mAP", "R1")]
    assert [name for name in result.history["stage1"][0] if "/" in name] == names
    assert run.rows is result.rows and run.history is result.history


# --- validation, monitoring and the choice of an epoch ---------------------------------------------------------------------
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_held_out_identities_choose_the_epoch(configure, metric, monkeypatch):
    written = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda path, state: (written.append((path.name, state["epoch"])), save(path, state))
    )
    keys = [
        "train.val_fraction",
        0.4,
        "train.max_epoch",
        4,
        "train.lr",
        0.05,
        "test.eval_freq",
        1,
        "test.dist_metric",
        metric,
    ]
    cfg = configure("run", *keys, "train.checkpoint_freq", 3)
    run, result = execute(cfg)
    scores = [record["val_mAP"] for record in result.history["stage1"]]
    chosen = scores.index(max(scores)) + 1
    best, last = saved(run.folder, 1, "best"), saved(run.folder, 1)
    assert (best["epoch"], last["epoch"]) == (chosen, 4) and run.selected == {"stage1": chosen}
    assert best["best_score"] == last["best_score"] == max(scores) and last["best_epoch"] == chosen
    assert best["rank1"] == result.history["stage1"][chosen - 1]["val_R1"] == best["history"][-1]["val_R1"]
    assert [epoch for name, epoch in written if name == "last.pth.tar"] == [3, 4]
    risen = [epoch for epoch in range(1, 5) if scores[epoch - 1] > max([-1.0, *scores[: epoch - 1]])]
    assert [epoch for name, epoch in written if name == "best.pth.tar"] == risen
    # the score is that of the held-out identities
    query, gallery = run.datamanager.val_query, run.datamanager.val_gallery
    wanted = ranked(features_of(best, query, cfg), features_of(best, gallery, cfg), query, gallery, metric)
    record = result.history["stage1"][chosen - 1]
    assert record["val_mAP"] == pytest.approx(wanted[0]) and record["val_R1"] == pytest.approx(wanted[2]["1"])
    assert all(torch.equal(value, best["state_dict"][name]) for name, value in run.bare.state_dict().items())
    assert "rank1" in last and len(result.history["stage1"]) == 4


def test_when_there_is_a_validation(configure):
    def epochs(*keys):
        cfg = configure("-".join(map(str, keys[1::2])), "train.val_fraction", 0.4, "train.max_epoch", 5, *keys)
        return ["val_mAP" in record for record in execute(cfg)[1].history["stage1"]]

    assert epochs("test.eval_freq", 2) == [False, True, False, True, True]
    assert epochs("test.eval_freq", 2, "test.start_eval", 3) == [False, False, False, True, True]
    assert epochs("test.eval_freq", 1, "test.start_eval", 2) == [False, True, True, True, True]
    assert epochs("test.eval_freq", 0) == epochs("test.eval_freq", -1) == [False] * 5


def test_monitoring_records_the_scores_of_the_epoch_and_changes_nothing(configure, pictures, capsys):
    short, _ = execute(configure("short", "train.max_epoch", 1))
    _, once = execute(configure("once", "train.max_epoch", 1, "test.dist_metric", "cosine"))
    capsys.readouterr()
    keys = ("train.max_epoch", 3, "test.dist_metric", "cosine")
    run, result = execute(configure("watched", *keys, "test.eval_freq", 1))
    assert f"test after epoch 1: {pictures}/mAP {once.rows[0].mAP:.1%}, {pictures}/R1" in capsys.readouterr().out
    execute(configure("quiet", *keys))
    first, second, last = result.history["stage1"]
    assert first[f"{pictures}/mAP"] == pytest.approx(once.rows[0].mAP, abs=1e-9)
    assert first[f"{pictures}/R1"] == pytest.approx(once.rows[0].cmc["1"])
    assert f"{pictures}/mAP" in second and f"{pictures}/mAP" not in last
    assert not (run.folder / "stage1" / "best.pth.tar").exists()
    quiet, watched = (saved(run.folder.parent / name, 1)["state_dict"] for name in ("quiet", "watched"))
    assert_same_weights(watched, quiet, tolerance=0.0)
    assert short.selected == {"stage1": 1}


def scalars(folder, stage):
    """Scalars of a stage's TensorBoard events: tag to [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / f"stage{stage}" / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, pytest.approx(e.value, abs=1e-5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_events_and_lines(configure, pictures, capsys):
    run, result = execute(configure("run", "train.max_epoch", 3, "test.eval_freq", 1, "train.print_freq", 2))
    said = capsys.readouterr().out
    history = result.history["stage1"]
    found = scalars(run.folder, 1)
    assert found[f"Test/{pictures}/mAP"] == [(epoch, history[epoch - 1][f"{pictures}/mAP"]) for epoch in (1, 2)]
    assert found[f"Test/{pictures}/R1"] == [(epoch, history[epoch - 1][f"{pictures}/R1"]) for epoch in (1, 2)]
    assert "epoch: [1/3][2/" in said and "epoch: [3/3][2/" in said and "epoch: [1/3][1/" not in said
    for record in history:
        losses = ", ".join(f"{name} {record[name]:.3f}" for name in ("loss", "ce", "triplet", "center", "acc"))
        assert f"epoch {record['epoch']}/3: {losses}, lr 1.00e-02, eta 0:00:0" in said
    run, result = execute(configure("held", "train.val_fraction", 0.4, "test.eval_freq", 1))
    history = result.history["stage1"]
    found = scalars(run.folder, 1)
    assert found["Validation/mAP"] == [(epoch, history[epoch - 1]["val_mAP"]) for epoch in (1, 2)]
    assert found["Validation/rank1"] == [(epoch, history[epoch - 1]["val_R1"]) for epoch in (1, 2)]
    lines = capsys.readouterr().out
    assert f"validation after epoch 1: mAP {history[0]['val_mAP']:.1%}, R1 {history[0]['val_R1']:.1%} (held-out" in lines


# --- stage 2 ---------------------------------------------------------------------------------------------------------------
def test_stage_2_chooses_its_epoch_under_the_first_protocol(configure):
    for protocols in (["inductive"], ["transductive", "inductive"]):
        keys = ["train.val_fraction", 0.4, "test.eval_freq", 1, "relation.train.eval_freq", 1]
        keys += ["relation.train.max_epoch", 3, "relation.train.lr", 0.05, "relation.protocols", protocols]
        cfg = configure(protocols[0], *BOTH, *keys, "train.checkpoint_freq", 2)
        run, result = execute(cfg)
        scores = [record["val_mAP"] for record in result.history["stage2"]]
        best = saved(run.folder, 2, "best")
        assert best["epoch"] == scores.index(max(scores)) + 1 == run.selected["stage2"]
        assert (best["kind"], best["dim"], best["num_classes"], best["max_epoch"]) == ("relation", 8, 5, 3)
        stage_1 = saved(run.folder, 1, "best")
        query, gallery = run.datamanager.val_query, run.datamanager.val_gallery
        encoder = build_encoder(cfg, dim=8, num_classes=5).eval()
        encoder.load_state_dict(best["state_dict"])
        with torch.no_grad():
            parts = [features_of(stage_1, records, cfg) for records in (query, gallery)]
            if protocols[0] == "inductive":
                states = encoder.refine_gallery(parts[1])
                refined = encoder.refine_queries(parts[0], states), states.refined
            else:
                refined = encoder(torch.cat(parts)).split([len(query), len(gallery)])
        assert max(scores) == pytest.approx(ranked(*refined, query, gallery, "cosine")[0], abs=1e-6)
        tested = run.refiner()
        assert all(torch.equal(value, best["state_dict"][name]) for name, value in tested.state_dict().items())
        assert not tested.training and result.history["stage2"] == saved(run.folder, 2)["history"]
        names = {path.name for path in (run.folder / "bank").iterdir()}
        assert {"train.pt", "val-query.pt", "val-gallery.pt"} < names


def test_stage_2_without_a_validation(configure):
    for name, keys in {
        "not-held-out": ["relation.train.eval_freq", 1],
        "not-asked": ["train.val_fraction", 0.4, "relation.train.eval_freq", 0],
    }.items():
        run, result = execute(configure(name, *BOTH, *keys, "relation.train.max_epoch", 2))
        assert all("val_mAP" not in record for record in result.history["stage2"])
        assert not (run.folder / "stage2" / "best.pth.tar").exists() and run.selected["stage2"] == 2


def test_every_key_of_the_encoder(configure):
    keys = ["relation.num_layers", 3, "relation.num_heads", 4, "relation.num_landmarks", 6, "relation.k", 7]
    keys += ["relation.neighbours", "affinity", "relation.mlp_ratio", 2.5, "relation.dropout", 0.35]
    keys += ["relation.landmarks", "farthest", "relation.landmark_seed", 11, "relation.precision", "bfloat16"]
    keys += ["relation.search.backend", "faiss", "relation.search.index", "ivf", "relation.search.nlist", 5]
    keys += ["relation.search.nprobe", 3, "relation.search.ef", 17, "relation.search.precision", "int8"]
    keys += ["relation.init", "diffusion"]
    for attention in ("nformer", "malaa", "magformer"):
        encoder = build_encoder(configure("x", *keys, "relation.attention", attention), dim=16, num_classes=9)
        block = encoder.blocks[1]
        assert len(encoder.blocks) == 3 and encoder.dim == 16 and encoder.neck.classifier.out_features == 9
        assert (encoder.k, encoder.num_landmarks, encoder.neighbours) == (7, 6, "affinity")
        assert (encoder.landmarks, encoder.landmark_seed, encoder.precision) == ("farthest", 11, "bfloat16")
        assert (block.attn.num_heads, block.attn.k, block.attn.neighbours) == (4, 7, "affinity")
        assert (block.attn.magnitude, block.attn.differential) == (attention != "nformer", attention == "magformer")
        assert block.fc1.out_features == 40 and block.attn.dropout.p == 0.35
        assert float(block.attn.value.weight.diagonal().mean()) == pytest.approx(1.0, abs=0.05)  # diffusion
        search = encoder.search
        assert (search.backend, search.index, search.nlist, search.nprobe) == ("faiss", "ivf", 5, 3)
        assert (search.ef, search.precision) == (17, "int8")


def test_encoder_weights_to_start_from(configure, tmp_path):
    first, _ = execute(configure("first", *BOTH))
    weights = first.folder / "stage2" / "last.pth.tar"
    started = ["relation.load_weights", weights, "relation.train.max_epoch", 0]
    second, result = execute(configure("second", *BOTH, *started))
    assert_same_weights(saved(second.folder, 2)["state_dict"], saved(first.folder, 2)["state_dict"], tolerance=0.0)
    assert result.rows[-1].mAP == read_metrics(first.folder)["rows"][-1]["mAP"]
    # without a stage 2 of its own, a run is tested with them
    shutil.rmtree(second.folder / "stage2")
    run, again = execute(configure("second", *BOTH, "relation.load_weights", weights), stages=[])
    assert again.rows[-1].mAP == result.rows[-1].mAP and run.selected["stage2"] == 1
    assert again.history["stage2"] == saved(first.folder, 2)["history"]
    with pytest.raises(UserError, match="no stage-2 checkpoint in .*second/stage2'; train it first"):
        execute(configure("second", *BOTH), stages=[])
    other, _ = execute(configure("other", *BOTH, "train.seed", 2))
    shutil.rmtree(other.folder / "stage2")
    with pytest.raises(UserError, match="belongs to another image model than that of .*other/stage1'"):
        execute(configure("other", *BOTH, "relation.load_weights", weights), stages=[])


def test_an_encoder_that_does_not_fit_is_found_before_stage_1(configure):
    with pytest.raises(UserError, match="keys of 'relation' do not fit features of width 8: dim=8 must be a multiple of 6"):
        execute(configure("run", *BOTH, "relation.num_heads", 3))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_rng_state(state)
    with_check, _ = execute(configure("both", *BOTH))
    without, _ = execute(configure("first", "train.stages", [1]))
    assert_same_weights(saved(with_check.folder, 1)["state_dict"], saved(without.folder, 1)["state_dict"], tolerance=0.0)


# --- the feature bank --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_bank_is_used_again_while_nothing_changed(configure, monkeypatch):
    cfg = configure("run", *BOTH)
    execute(cfg)
    bank = {path: path.stat().st_mtime_ns for path in (cfg_folder(cfg) / "bank").iterdir()}
    assert len(bank) == 3

    def changed(*keys):
        execute(configure("run", *BOTH, *keys), stages=[])
        now = {path: path.stat().st_mtime_ns for path in bank}
        differs = sorted(path.name.rsplit("-", 1)[-1] for path in bank if now[path] != bank[path])
        bank.update(now)
        return differs

    both = ["gallery.pt", "query.pt"]
    assert changed() == [] == changed("test.batch_size", 3)
    assert changed("data.norm_mean", [0.1, 0.2, 0.3]) == both == changed()
    assert changed("data.norm_std", [0.3, 0.2, 0.3]) == both == changed()
    assert changed("data.height", 24) == both == changed()
    assert changed("data.width", 12) == both == changed()
    for path in bank:
        path.write_bytes(b"damaged")
        bank[path] = path.stat().st_mtime_ns
    assert changed() == both and changed() == []


def cfg_folder(cfg):
    from pathlib import Path

    return Path(cfg.data.save_dir)


def test_the_augmented_bank_depends_on_transforms_seed_and_workers(configure):
    def key(name, *keys):
        execute(configure(name, *BOTH, "relation.bank.refresh", 1, "train.max_epoch", 0, *keys))
        folder = cfg_folder(configure(name))
        return torch.load(folder / "bank" / "train.pt", weights_only=True)["key"]

    keys = [key("a"), key("b", "data.transforms", ["random_erase"]), key("c", "relation.train.max_epoch", 2)]
    assert len(set(keys)) == 3 and key("again") == keys[0]


@pytest.mark.slow
def test_a_refreshed_bank_and_one_that_stays(configure, monkeypatch):
    from relreid_plugin.magformer.stage import BankDataManager

    seen = []
    replace = BankDataManager.replace
    monkeypatch.setattr(
        BankDataManager, "replace", lambda self, bank: (seen.append(bank.features.clone()), replace(self, bank))[1]
    )
    for refresh, wanted in ((0, 0), (1, 4), (2, 2), (3, 2)):
        seen.clear()
        keys = ["relation.bank.refresh", refresh, "relation.train.max_epoch", 4, "data.transforms", ["random_erase"]]
        execute(configure(f"run{refresh}", *BOTH, *keys))
        assert len(seen) == wanted
        assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:]))
    # going on in the middle of a period takes the period's bank
    keys = ["relation.bank.refresh", 3, "relation.train.max_epoch", 2, "data.transforms", ["random_erase"]]
    seen.clear()
    execute(configure("halves", *BOTH, *keys))
    execute(configure("halves", *BOTH, *keys, "relation.train.max_epoch", 4), resume=True)
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


# --- going on --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage,step", [(1, 4), (2, 3)])
def test_interrupted_and_resumed_equals_straight(configure, monkeypatch, capsys, stage, step):
    from relreid_plugin.engine.image import CompositeEngine
    from relreid_plugin.magformer.stage import RelationEngine

    keys = [*BOTH, "relation.bank.refresh", 1, "train.max_epoch", 3, "relation.train.max_epoch", 3]
    keys += ["train.lr_scheduler", "cosine", "relation.train.lr_scheduler", "cosine", "relation.dropout", 0.2]
    keys += ["loss.composite.center", 0.1, "train.val_fraction", 0.4, "test.eval_freq", 1, "relation.train.eval_freq", 1]
    straight, wanted = execute(configure("straight", *keys))
    cls = CompositeEngine if stage == 1 else RelationEngine
    calls, original = [], cls.forward_backward

    def stop(self, data):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward_backward", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(configure("broken", *keys), resume=True)
    capsys.readouterr()
    resumed, found = execute(configure("broken", *keys), resume=True)
    said = capsys.readouterr().out
    assert f"resuming stage {stage} after epoch 1 from '{resumed.folder / f'stage{stage}' / 'last.pth.tar'}'" in said
    assert ("stage 1 is complete (3 epochs)" in said) == (stage == 2)
    for number in (1, 2):
        one, two = saved(straight.folder, number), saved(resumed.folder, number)
        assert_same_weights(two["state_dict"], one["state_dict"], tolerance=0.0)
        assert one["history"] == two["history"]
        assert one["best_score"] == two["best_score"] and one["best_epoch"] == two["best_epoch"]
        assert one["scheduler"]["last_epoch"] == two["scheduler"]["last_epoch"] == 3
        assert torch.equal(one["extra"]["loss"]["center.centers"], two["extra"]["loss"]["center.centers"])
        assert torch.equal(one["rng"]["torch"], two["rng"]["torch"])
    assert [row.mAP for row in found.rows] == [row.mAP for row in wanted.rows]


def test_a_finished_run_is_only_tested(configure, capsys):
    keys = [*BOTH, "train.max_epoch", 1]
    _, first = execute(configure("run", *keys))
    capsys.readouterr()
    run, again = execute(configure("run", *keys), resume=True)
    said = capsys.readouterr().out
    assert "is finished; this is its table" in said and "took" not in said
    assert [row.mAP for row in again.rows] == [row.mAP for row in first.rows]


def test_stages_one_after_the_other(configure, capsys):
    _, both = execute(configure("both", *BOTH))
    cfg = configure("parts", *BOTH)
    run, first = execute(cfg, stages=[1])
    assert "+ MagFormer" not in [row.method for row in first.rows] and run.selected == {"stage1": 2}
    run, second = execute(configure("parts", *BOTH), stages=[2])
    assert [row.mAP for row in second.rows] == [row.mAP for row in both.rows]
    assert run.selected == {"stage1": 2, "stage2": 1}
    run, alone = execute(configure("parts", "train.stages", [1], "relation.attention", "magformer"), stages=[])
    assert "+ MagFormer" not in [row.method for row in alone.rows] and run.refiner() is None
    run, alone = execute(configure("parts", *BOTH), stages=[])
    assert [row.mAP for row in alone.rows] == [row.mAP for row in both.rows]
    said = capsys.readouterr().out
    parameters = inference_parameters(build_encoder(cfg, dim=8, num_classes=8))
    assert f"stage 2: magformer, {parameters / 1e6:.2f}M parameters, 32 features, 2 steps of 12 per epoch, 1 epochs" in said
    assert "stage 1: wiring_toy, 0.00M parameters, 2 epochs" in said


def test_stages_without_epochs_keep_what_they_started_from(configure):
    run, result = execute(configure("run", *BOTH, "train.max_epoch", 0, "relation.train.max_epoch", 0))
    seed_all(1)
    assert_same_weights(saved(run.folder, 1)["state_dict"], Toy(8).state_dict(), tolerance=0.0)
    assert [saved(run.folder, stage)["epoch"] for stage in (1, 2)] == [0, 0] and len(result.rows) == 5
    assert saved(run.folder, 1)["rank1"] == 0.0


# --- weights from elsewhere ----------------------------------------------------------------------------------------------
def test_weights_to_start_from(configure, tmp_path, capsys):
    trained, _ = execute(configure("trained", "train.seed", 7))
    source = trained.folder / "stage1" / "last.pth.tar"
    keys = ["model.pretrained", True, "train.max_epoch", 0]
    run, _ = execute(configure("plain", *keys))
    assert run.bare.asked == {"loss": "triplet", "pretrained": True, "num_cameras": 2}
    run, _ = execute(configure("softmax", "loss.name", "softmax", "train.max_epoch", 0))
    assert run.bare.asked["loss"] == "softmax" and run.bare.asked["pretrained"] is False
    run, _ = execute(configure("loaded", *keys, "model.load_weights", source))
    assert run.bare.asked["pretrained"] is False
    assert_same_weights(saved(run.folder, 1)["state_dict"], saved(trained.folder, 1)["state_dict"], tolerance=0.0)
    assert "loaded" in capsys.readouterr().out
    run, _ = execute(configure("loaded", *keys), stages=[])
    assert run.bare.asked["pretrained"] is False
    tested, result = execute(configure("tested", "model.load_weights", source), stages=[])
    assert result.rows[0].mAP == read_metrics(trained.folder)["rows"][0]["mAP"] and "stage1" not in tested.selected
    assert not (tested.folder / "stage1").exists()


def test_a_checkpoint_to_go_on_from(configure, tmp_path, capsys):
    straight, _ = execute(configure("straight", "train.max_epoch", 3))
    half, _ = execute(configure("half", "train.max_epoch", 2))
    source = half.folder / "stage1" / "last.pth.tar"
    run, result = execute(configure("on", "train.max_epoch", 3, "model.resume", source))
    assert f"resuming stage 1 after epoch 2 from '{source}'" in capsys.readouterr().out
    assert_same_weights(saved(run.folder, 1)["state_dict"], saved(straight.folder, 1)["state_dict"], tolerance=0.0)
    assert len(result.history["stage1"]) == 3
    _, tested = execute(configure("tested", "model.resume", source), stages=[])
    assert tested.rows[0].mAP == read_metrics(half.folder)["rows"][0]["mAP"]
    with pytest.raises(UserError, match="'model.resume' names '.*none.pth', which does not exist"):
        execute(configure("none", "model.resume", tmp_path / "none.pth"))


# --- frozen layers -----------------------------------------------------------------------------------------------------
def test_layers_that_train_alone_at_first(configure):
    seed_all(1)
    start = Toy(8).state_dict()

    def moved(name, *keys):
        run, _ = execute(configure(name, *keys))
        state = saved(run.folder, 1)["state_dict"]
        return sorted({key.split(".")[0] for key, value in state.items() if not torch.equal(value, start[key])})

    assert moved("base", "train.max_epoch", 1, "train.fixbase_epoch", 1) == ["classifier"]
    other = ["train.open_layers", ["embedding"]]
    assert moved("other", "train.max_epoch", 1, "train.fixbase_epoch", 1, *other) == ["embedding"]
    assert moved("then", "train.max_epoch", 2, "train.fixbase_epoch", 1) == ["classifier", "embedding"]


def test_what_is_frozen_stays_frozen(configure, monkeypatch):
    init = Toy.__init__

    def frozen(self, num_classes):
        init(self, num_classes)
        self.embedding.bias.requires_grad_(False)

    monkeypatch.setattr(Toy, "__init__", frozen)
    seed_all(1)
    start = Toy(8)
    for fix in (0, 1):
        run, _ = execute(configure(f"run{fix}", "train.fixbase_epoch", fix, "train.max_epoch", 3))
        assert torch.equal(run.bare.embedding.bias, start.embedding.bias) and not run.bare.embedding.bias.requires_grad
        assert not torch.equal(run.bare.embedding.weight, start.embedding.weight)


# --- cameras ---------------------------------------------------------------------------------------------------------------
class Watching(Toy):
    """A toy that takes cameras, and notes which."""

    uses_cameras = True
    seen: list = []

    def forward(self, images, cameras):
        Watching.seen.append((self.training, cameras.tolist()))
        return super().forward(images)


def test_cameras_reach_a_model_that_asks_for_them(configure, pictures, tmp_path, monkeypatch):
    import wiring

    monkeypatch.setattr(wiring, "Toy", Watching)
    monkeypatch.setattr(Watching, "seen", [])
    execute(configure("known"))
    assert {camera for _, cameras in Watching.seen for camera in cameras} == {0, 1}
    assert any(training for training, _ in Watching.seen) and any(not training for training, _ in Watching.seen)
    other = write_pictures(tmp_path / "other", seed=1)
    Watching.seen.clear()
    execute(configure("unknown", "data.targets", [str(other)], "test.eval_freq", 1, "train.max_epoch", 3))
    assert {camera for training, cameras in Watching.seen for camera in cameras if not training} == {-1}
    assert {camera for training, cameras in Watching.seen for camera in cameras if training} == {0, 1}
    Watching.seen.clear()
    keys = ["data.targets", [str(other), str(pictures)], "test.eval_freq", 1]
    execute(configure("mixed", *keys))
    tested = [set(cameras) for training, cameras in Watching.seen if not training]
    assert tested == [{-1}, {-1}, {0, 1}, {0, 1}] * 2
    Watching.seen.clear()
    execute(configure("two-sources", "data.sources", [str(pictures), str(other)]))
    assert {camera for training, cameras in Watching.seen for camera in cameras if not training} == {0, 1}
    # what was extracted with cameras is not taken for what was extracted without
    key = torch.load(next((tmp_path / "known" / "bank").iterdir()), weights_only=True)["key"]
    assert key != torch.load(next((tmp_path / "two-sources" / "bank").iterdir()), weights_only=True)["key"]


# --- the folder --------------------------------------------------------------------------------------------------------
def test_what_lies_in_the_folder(configure, tmp_path):
    cfg = configure("run", *BOTH)
    leftovers = [tmp_path / "run" / part / ".last.1.tmp" for part in ("", "stage1", "stage2", "bank")]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run, result = execute(cfg)
    assert not any(path.exists() for path in leftovers)
    assert load_config(tmp_path / "run" / "config.yml") == run.cfg
    assert saved(run.folder, 1)["config"] == (tmp_path / "run" / "config.yml").read_text() == saved(run.folder, 2)["config"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows"] == [row.as_dict() for row in result.rows]
    assert metrics["history"] == result.history and metrics["selected_epoch"] == {"stage1": 2, "stage2": 1}
    assert read_metrics(tmp_path / "run") == metrics and metrics["notes"] == []
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["python"] == environment()["python"]
    table = (tmp_path / "run" / "table.md").read_text()
    assert "+ MagFormer" in table and table.endswith("\n")
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"run folder: {run.folder} (configuration: config.yml)" in log and "tested: stage1 epoch 2, stage2 epoch 1" in log
    assert not (tmp_path / "run" / "test.log").exists()
    text = (tmp_path / "run" / "config.yml").read_text()
    execute(configure("run", *BOTH, "test.batch_size", 3), stages=[])
    assert (tmp_path / "run" / "config.yml").read_text() == text
    assert (tmp_path / "run" / "train.log").read_text() == log
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert list((tmp_path / "run" / "tests").rglob("test.log"))  # another key than the run's: results of their own


def test_guards_of_the_folder(configure, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="'data.save_dir' is '.*file', which is a file; name a folder"):
        execute(configure("file"))
    for stages in ([2], []):
        with pytest.raises(UserError, match=r"no stage-1 checkpoint in '.*none/stage1'; train it first"):
            execute(configure("none", *BOTH), stages=stages)
    assert not (tmp_path / "none").exists()
    execute(configure("run", *BOTH))
    for stage in (1, 2):
        with pytest.raises(UserError, match=f"already holds a run of stage {stage}; go on with --resume"):
            execute(configure("run", *BOTH), stages=[stage])
    with pytest.raises(UserError, match="'neverwhere'"):
        execute(configure("fresh", "data.sources", ["neverwhere"]))
    assert not (tmp_path / "fresh").exists()
    with pytest.raises(UserError, match="'neverwhere'"):
        execute(configure("run", *BOTH, "data.targets", ["neverwhere"]), stages=[])
    assert (tmp_path / "run" / "stage1" / "last.pth.tar").is_file()
    run = Run(configure("run", *BOTH, "train.stages", [2, 1]))
    assert run.stages == [1, 2] and Run(configure("run"), stages=[]).stages == []


def test_a_folder_that_holds_no_run(tmp_path):
    for call in (open_run, read_metrics):
        with pytest.raises(UserError, match="holds no"):
            call(tmp_path)


def test_numbers_that_are_none_are_null(configure, monkeypatch):
    from relreid_plugin.engine.base import EngineMixin

    forward = EngineMixin.forward_backward
    values = iter([float("nan"), float("inf"), 1.0])
    monkeypatch.setattr(
        EngineMixin, "forward_backward", lambda self, data: {**forward(self, data), "odd": next(values, 1.0)}
    )
    run, result = execute(configure("run", "train.max_epoch", 1, "train.batch_size", 16))
    monkeypatch.undo()
    result.history["stage1"][0]["odd"] = float("inf")
    write_results(run)
    record = read_metrics(run.folder)["history"]["stage1"][0]
    assert record["odd"] is None and record["epoch"] == 1


# --- looking into a run ------------------------------------------------------------------------------------------------
def test_opening_a_run(configure, pictures, tmp_path, capsys):
    run, result = execute(configure("run", *BOTH, "test.dist_metric", "cosine"))
    shutil.copytree(pictures, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "bounding_box_train")  # the training data is not needed
    (tmp_path / "moved" / "bounding_box_train").mkdir()
    capsys.readouterr()
    opened = open_run(tmp_path / "run")
    assert capsys.readouterr().out == "" and not opened.engine.model.training and opened.stages == []
    assert opened.datamanager.num_train_pids == 8 and opened.datamanager.label_map == run.datamanager.label_map
    assert_same_weights(opened.bare.state_dict(), saved(tmp_path / "run", 1)["state_dict"], tolerance=0.0)
    name = str(pictures)
    kept = result.stage1_features[name]
    features = opened.target_features(name)
    assert torch.equal(features.query.features, kept.query.features)
    assert float(opened.score(features).mAP) == pytest.approx(result.rows[0].mAP)
    seen = []

    def darker(images, files):
        seen.extend(files)
        return images * 0.0

    altered = opened.target_features(name, darker)
    assert seen == kept.query.paths and torch.equal(altered.gallery.features, kept.gallery.features)
    assert torch.allclose(altered.query.features, altered.query.features[:1].expand(12, -1))
    assert torch.equal(opened.target_features(name).query.features, kept.query.features)
    with pytest.raises(UserError, match=f"'elsewhere' is no test set of run '{tmp_path / 'run'}'"):
        opened.target_features("elsewhere")
    with pytest.raises(KeyError):
        opened.datamanager.test_dataset["elsewhere"]
    assert len(opened.datamanager.test_dataset) == 1 and list(opened.datamanager.test_dataset) == [name]
    assert open_run(tmp_path / "run", ["test.batch_size", "3"]).cfg.test.batch_size == 3


# --- odds and ends -----------------------------------------------------------------------------------------------------
def test_seeds():
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    set_seed(5)
    first = draw()
    seed_all(5)
    assert draw() == first
    set_seed(2**32 + 5)
    assert draw()[1] == first[1]


def test_what_is_printed_is_logged(tmp_path, capsys):
    console = sys.stdout
    with logged(tmp_path / "deep" / "run.log"):
        print("one")
        sys.stdout.flush()
        assert sys.stdout.isatty() is False and sys.stdout.write("two\n") == 4
    print("three")
    assert sys.stdout is console
    with pytest.raises(ZeroDivisionError), logged(tmp_path / "deep" / "run.log"):
        print("four")
        _ = 1 / 0
    assert sys.stdout is console
    text = (tmp_path / "deep" / "run.log").read_text()
    assert text.startswith("one\ntwo\nfour\nTraceback") and text.endswith("ZeroDivisionError: division by zero\n")
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"


def test_the_environment():
    import os
    import platform

    found = environment()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] in torch.__version__
    assert {"torch", "torchvision", "torchreid", "timm", "numpy", "scipy"} <= set(found["packages"])
    assert found["platform"] == platform.platform() and found["threads"] == torch.get_num_threads()
    assert found["cpus"] == os.cpu_count() and found["command"] == sys.argv and found["host_layout"] == HOST.layout
    assert (found["cuda"] is None) == (not torch.cuda.is_available())


def test_the_label_map_names_the_identities(configure, pictures, tmp_path):
    cfg = configure("run", "train.max_epoch", 1)
    run, _ = execute(cfg)
    manager = build_datamanager(cfg, tmp_path / "cache")
    assert saved(run.folder, 1)["label_map"] == manager.label_map and saved(run.folder, 1)["num_classes"] == 8
