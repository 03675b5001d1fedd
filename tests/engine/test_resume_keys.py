"""A run goes on with keys that may change, as a straight run would, and with no others; a finished one is left alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, comparable
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from relreid_plugin.config.defaults import _flat, get_default_config, merge_from_list
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine import resume
from relreid_plugin.errors import UserError
from relreid_plugin.graft.schedule import sqrt_lambda
from relreid_plugin.host import build_optimizer, build_scheduler


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tiny_run, tmp_path):
    """A finished run of one's own."""
    return shutil.copytree(tiny_run, tmp_path / "run")


# --- schedules ----------------------------------------------------------------------------------------------------------


def trained(epochs, upto, *, keys=(), steps=0, state=None):
    """Learning rates of a training of ``epochs`` epochs until ``upto``, and its state; goes on from ``state``."""
    cfg = get_default_config()
    merge_from_list(cfg, ["train.max_epoch", str(epochs), "train.lr", "0.0123", *keys])
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, cfg)
    if steps:
        scheduler = LambdaLR(optimizer, sqrt_lambda(epochs * steps, warmup_steps=5))
    else:
        scheduler = build_scheduler(optimizer, cfg)
    begin = 0
    if state is not None:
        resume.restore_schedule(optimizer, scheduler, state, rebuild=state["max_epoch"] != epochs)
        begin = state["epoch"]
    rates = []
    for _ in range(begin, upto):
        for _ in range(steps or 1):
            rates.append(optimizer.param_groups[-1]["lr"])
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            if steps:
                scheduler.step()
        if not steps:
            scheduler.step()
    found = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "epoch": upto, "max_epoch": epochs}
    return rates, found


@pytest.mark.parametrize(
    "keys,steps",
    [
        (["train.lr_scheduler", "cosine"], 0),
        (["train.lr_scheduler", "cosine", "train.warmup_epochs", "3"], 0),
        (["train.lr_scheduler", "multi_step", "train.stepsize", "[3,7]"], 0),
        (["train.lr_scheduler", "single_step", "train.stepsize", "[4]"], 0),
        (["train.lr_scheduler", "none"], 0),
        (["train.lr_scheduler", "cosine", "train.staged_lr", "True", "train.new_layers", "[]"], 0),
        ([], 7),
    ],
    ids=["cosine", "cosine-warm-up", "multi_step", "single_step", "none", "staged", "per-step"],
)
@pytest.mark.parametrize("before,done,after", [(5, 5, 11), (5, 2, 11), (11, 4, 6), (5, 0, 9), (6, 3, 6)])
def test_other_epochs_have_the_schedule_of_a_straight_run(keys, steps, before, done, after):
    straight, _ = trained(after, after, keys=keys, steps=steps)
    _, state = trained(before, done, keys=keys, steps=steps)
    resumed, final = trained(after, after, keys=keys, steps=steps, state=state)
    assert resumed == straight[done * (steps or 1) :]
    assert final["scheduler"]["last_epoch"] == after * (steps or 1)


def test_a_longer_run_goes_on_as_a_straight_one(tiny_run, tiny_config, tmp_path, command, run):
    shutil.rmtree(run / "stage2")
    keys = ["train.max_epoch", "3", "train.stages", "[1]", "relation.attention", "none"]
    code, out, err = command("--config-file", tiny_config, "--resume", "data.save_dir", run, *keys)
    assert code == 0, err
    assert "going on with other keys" in out and "train.max_epoch 3 (was 2)" in out
    straight = tmp_path / "straight"
    assert command("--config-file", tiny_config, "data.save_dir", straight, *keys)[0] == 0
    first, second = (comparable(folder)["history"]["stage1"] for folder in (run, straight))
    assert first[:2] == comparable(tiny_run)["history"]["stage1"]
    assert [record["epoch"] for record in first] == [1, 2, 3] and first[2]["lr"] == second[2]["lr"]
    assert yaml.safe_load((run / "config.yml").read_text())["train"]["max_epoch"] == 3
    state = torch.load(run / "stage1" / "last.pth.tar", weights_only=True)
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    other = torch.load(straight / "stage1" / "last.pth.tar", weights_only=True)
    assert rates == [group["lr"] for group in other["optimizer"]["param_groups"]]


# --- keys ---------------------------------------------------------------------------------------------------------------


def checkpoint(kind="image", epoch=3, **overrides):
    cfg = get_default_config()
    merge_from_list(cfg, [str(word) for item in overrides.items() for word in item])
    return {"kind": kind, "config": cfg.dump(), "epoch": epoch, "num_classes": 2, "label_map": {"a": 0, "b": 1}}


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return [*value, *(value[:1] or ["x"])]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "relation", "finetune"])
def test_every_key_may_change_or_is_refused_by_name(kind, tmp_path):
    state = checkpoint(kind)
    epochs = {"image": "train.max_epoch", "relation": "relation.train.max_epoch", "finetune": "graft.finetune.max_epoch"}
    allowed = []
    for key, value in _flat(get_default_config()).items():
        cfg = get_default_config()
        *parents, leaf = key.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        node[leaf] = other(value)
        try:
            resume.check_keys(state, cfg, tmp_path / "last.pth.tar")
        except UserError as error:
            text = str(error)
            assert f"'{key}' was" in text and "data.save_dir FOLDER" in text and "last.pth.tar" in text
        else:
            allowed.append(key)
    for key in ("use_gpu", "data.root", "data.workers", "test.rerank", "test.aqe.k", "data.targets", epochs[kind]):
        assert key in allowed
    for key in "train.optim train.lr train.batch_size train.seed model.name data.sources loss.name data.height".split():
        assert key not in allowed
    assert ("relation.k" in allowed) == (kind != "relation")  # the relation stage comes last
    assert ("graft.finetune.lr" in allowed) == (kind == "image")
    assert "model.load_weights" not in allowed and "backbone.weights" not in allowed


def test_the_sentence_has_old_and_new_values(tmp_path):
    cfg = get_default_config()
    merge_from_list(cfg, ["train.optim", "sgd", "train.lr", "0.5", "train.seed", "7", "train.gamma", "0.5"])
    with pytest.raises(UserError) as caught:
        resume.check_keys(checkpoint(), cfg, tmp_path / "last.pth.tar")
    text = str(caught.value)
    assert "'train.optim' was 'adam' and is 'sgd'" in text and "'train.lr' was 0.0003 and is 0.5" in text
    assert "and 1 more" in text and "\n" not in text


def test_fewer_epochs_than_are_done_are_refused_and_first_weights_may_be_left_out(tmp_path):
    cfg = get_default_config()
    cfg.train.max_epoch = 2
    with pytest.raises(UserError, match="3 epochs behind it, more than 'train.max_epoch 2'"):
        resume.check_keys(checkpoint(), cfg, tmp_path)
    cfg.train.max_epoch = 3
    resume.check_keys(checkpoint(), cfg, tmp_path)
    started = checkpoint(**{"model.load_weights": "weights.pth", "model.pretrained": True})
    resume.check_keys(started, cfg, tmp_path)
    cfg.model.load_weights = "others.pth"
    with pytest.raises(UserError, match="'model.load_weights' was 'weights.pth' and is 'others.pth'"):
        resume.check_keys(started, cfg, tmp_path)


@pytest.mark.parametrize("kind", ["image", "finetune", "relation"])
def test_keys_of_other_stages_are_not_worth_a_line(kind, capsys):
    """A checkpoint says nothing of keys that its stage does not read; those that it reads are said."""
    cfg = get_default_config()
    other_epochs = {"train.max_epoch": 9, "graft.finetune.max_epoch": 8, "relation.train.max_epoch": 7}
    own = resume.epochs_key(kind)
    merge_from_list(cfg, [str(word) for item in {**other_epochs, "train.seed": 5}.items() for word in item])
    resume.note_changes(checkpoint(kind), cfg)
    said = capsys.readouterr().out
    assert f"{own} {other_epochs[own]} (was" in said and "train.seed 5 (was" in said
    assert not [key for key in other_epochs if key != own and f" {key} " in said]


def test_keys_of_other_versions(tmp_path):
    state = checkpoint()
    values = yaml.safe_load(state["config"])
    del values["train"]["warmup_factor"], values["rib"]
    values["train"]["of_an_older_version"] = 3
    state["config"] = yaml.safe_dump(values)
    cfg = get_default_config()
    resume.check_keys(state, cfg, tmp_path)
    cfg.train.warmup_factor = 0.5
    with pytest.raises(UserError, match="'train.warmup_factor' was 0.01 and is 0.5"):
        resume.check_keys(state, cfg, tmp_path)


def test_other_identities_are_refused(tmp_path):
    resume.check_data(checkpoint(), {"a": 0, "b": 1}, 2, "data", tmp_path)
    for labels in ({"a": 0}, {"a": 0, "c": 1}):
        with pytest.raises(UserError, match="other identities"):
            resume.check_data(checkpoint(), labels, len(labels), "data", tmp_path)


def test_every_listed_key_exists_and_its_page_lists_it():
    page = (ROOT / "docs" / "howto" / "resume.md").read_text(encoding="utf-8")
    keys = list(_flat(get_default_config()))
    rules = resume.resume_keys()
    groups = [rules.machine, rules.testing, rules.start, rules.later, rules.training, tuple(rules.epochs.values())]
    for pattern in [pattern for group in groups for pattern in group]:
        assert any(resume._matches(key, [pattern]) for key in keys), pattern
    for pattern in [*rules.machine, *rules.testing, *rules.start, *rules.epochs.values()]:
        assert f"`{pattern}`" in page, pattern


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["train.lr", "0.5"], ["'train.lr' was 0.001 and is 0.5"]),
        (["relation.train.lr", "0.5"], ["'relation.train.lr'", "stage2"]),
        (["train.max_epoch", "1"], ["2 epochs behind it"]),
        (["relation.train.max_epoch", "1"], ["2 epochs behind it"]),
        (["train.max_epoch", "5"], ["stage 2", "train.max_epoch 2"]),
        (["data.sources", "market1501"], ["'data.sources'"]),
    ],
    ids=lambda value: value[0] if value[0].islower() else None,
)
def test_refused_before_anything_is_written(run, tiny_config, command, overrides, words):
    before = contents(run)
    code, _, err = command("--config-file", tiny_config, "--resume", "data.save_dir", run, *overrides)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert contents(run) == before


def test_model_resume_has_the_same_rules(tiny_run, tiny_config, tmp_path, command):
    keys = ["train.stages", "[1]", "relation.attention", "none", "data.save_dir", tmp_path / "run"]
    keys += ["model.resume", tiny_run / "stage1" / "last.pth.tar"]
    code, _, err = command("--config-file", tiny_config, *keys, "train.weight_decay", "0.5")
    assert code == 2 and "'train.weight_decay' was 0.0005 and is 0.5" in err
    code, out, err = command("--config-file", tiny_config, *keys, "train.max_epoch", "3")
    assert code == 0 and "resuming stage 1 after epoch 2" in out, err


# --- finished runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["data.workers", "1", "train.print_freq", "3"], ["--stage", "1"]], ids=len)
def test_a_finished_run_is_not_rewritten(run, tiny_config, command, overrides):
    before = contents(run)
    flags, rest = (overrides, []) if overrides[:1] == ["--stage"] else ([], overrides)
    code, out, err = command("--config-file", tiny_config, "--resume", *flags, "data.save_dir", run, *rest)
    assert code == 0 and "is finished" in out, err
    assert "+ MagFormer" in out and "tested: stage1 epoch" in out
    assert contents(run) == before and not list(run.rglob("*.lock"))


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_other_tests_of_a_finished_run_have_a_folder_of_their_own(run, tiny_config, command, flag):
    before = contents(run)
    keys = ["data.save_dir", run, "test.rivals", "[]", "train.max_epoch", "2"]
    code, out, err = command("--config-file", tiny_config, flag, *keys)
    assert code == 0, err
    after = contents(run)
    assert {path: after[path] for path in before} == before
    (place,) = (run / "tests").iterdir()
    assert str(place) in out and {path.relative_to(place).parts[0] for path in after if path not in before} == {
        "config.yml",
        "environment.json",
        "metrics.json",
        "plots",
        "table.md",
        "test.log",
    }
    assert len(comparable(place)["rows"]) == 3 and len(comparable(run)["rows"]) == 5
    assert yaml.safe_load((place / "config.yml").read_text())["test"]["rivals"] == []


def test_keys_of_training_do_not_make_another_test(run, tiny_config, command):
    keys = ["data.save_dir", run, "train.lr", "0.7", "data.workers", "1", "model.pretrained", "True"]
    code, _, err = command("--config-file", tiny_config, "--eval-only", *keys)
    assert code == 0 and not (run / "tests").exists(), err


def test_a_run_killed_before_its_test_is_not_finished(run, tiny_config, tiny_run, command):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["history"]["stage2"].pop()  # of a shorter run, whose longer one was killed before its test
    metrics["rows"] = metrics["rows"][:1]
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert command("--config-file", tiny_config, "--resume", "data.save_dir", run)[0] == 0
    assert comparable(run) == comparable(tiny_run)
    (run / "metrics.json").write_text("{")
    assert command("--config-file", tiny_config, "--resume", "data.save_dir", run)[0] == 0
    assert comparable(run) == comparable(tiny_run)


# --- losses and weights that are not finite -----------------------------------------------------------------------------


def engine(tmp_path, summary):
    from relreid_plugin.engine.base import EngineMixin, StageContext

    class Host:
        def forward_backward(self, data):
            return summary

        def get_current_lr(self):
            return 0.5

    class Engine(EngineMixin, Host):
        epoch, batch_idx, train_loader, model = 1, 4, range(9), nn.Linear(2, 2)

    made = Engine()
    made.attach(StageContext(kind="image", folder=tmp_path, max_epoch=3))
    made._sums = {}
    return made


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_engine_stops_at_a_loss_that_is_not_finite(tmp_path, value):
    from relreid_plugin.engine import image
    from relreid_plugin.engine.base import EngineMixin
    from relreid_plugin.graft import stage as multimodal
    from relreid_plugin.magformer import stage as relation

    with pytest.raises(UserError) as caught:
        engine(tmp_path, {"loss_x": 1.0, "loss_t": value}).forward_backward(None)
    for words in ("epoch 2", "batch 5 of 9", "'loss_t'", "0.5", "no checkpoint"):
        assert words in str(caught.value)
    hosts = (image.SoftmaxEngine, image.TripletEngine, image.VideoSoftmaxEngine, image.VideoTripletEngine)
    for cls in (*hosts, image.CompositeEngine, relation.RelationEngine, multimodal.MultimodalEngine):
        assert cls.forward_backward is EngineMixin.forward_backward and cls.extract is EngineMixin.extract


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path):
    made = engine(tmp_path, {})
    made._require_finite_weights()
    ckpt.save(made.context.last, {"kind": "image"})
    with torch.no_grad():
        made.model.bias[0] = float("nan")
    with pytest.raises(UserError, match="1 of the model's tensors .* 'bias'.*the last checkpoint stays"):
        made._end_of_epoch()


def test_features_that_are_not_finite_are_counted(tmp_path):
    made = engine(tmp_path, {})
    made.use_gpu, made.extract_features = False, lambda images: images
    made.parse_data_for_eval = lambda data: (data["img"], data["pid"], data["camid"])
    images = torch.ones(3, 4)
    images[1, 2] = float("inf")
    loader = [{"img": images, "pid": torch.arange(3), "camid": torch.zeros(3), "impath": ["a.jpg", "b.jpg", "c.jpg"]}]
    with pytest.raises(UserError, match="1 of 3 features of 'query' hold NaN or infinity .first: 'b.jpg'"):
        made.extract(loader, label="query")
    images[1, 2] = 0.0
    assert len(made.extract(loader, label="query")) == 3


def test_an_engine_of_the_hosts_stops(tmp_path, tiny_config, command, monkeypatch):
    """torchreid's triplet engine, with a loss of NaN from the second epoch on: the first one's checkpoint stays."""
    from relreid_plugin.engine import image

    original, calls = image.TripletEngine.compute_loss, []

    def broken(self, criterion, outputs, targets):
        calls.append(self.epoch)
        return original(self, criterion, outputs, targets) * (float("nan") if self.epoch else 1.0)

    monkeypatch.setattr(image.TripletEngine, "compute_loss", broken)
    keys = ["model.name", "bnneck_baseline", "loss.name", "triplet", "train.stages", "[1]", "relation.attention", "none"]
    code, _, err = command("--config-file", tiny_config, *keys, "data.save_dir", tmp_path / "run")
    assert code == 2 and "the loss became nan in epoch 2, batch 1 of" in err and "'loss_t'" in err and err.count("\n") == 1
    assert ckpt.load(tmp_path / "run" / "stage1" / "last.pth.tar", kind="image")["epoch"] == 1
