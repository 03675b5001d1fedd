"""Searches over keys: what may be searched, trials that survive a kill, pruning, and a whole search on small features."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys

import numpy as np
import pytest
import yaml

pytest.importorskip("optuna")

from relreid_plugin.cli.main import main
from relreid_plugin.config.defaults import get_default_config, load_config
from relreid_plugin.data.split import hold_out_identities
from relreid_plugin.engine.features import RunFeatures
from relreid_plugin.engine.runner import Run
from relreid_plugin.errors import UserError
from relreid_plugin.experiments import tuned, tuning
from relreid_plugin.experiments.space import Choices, Interval, read_space
from relreid_plugin.experiments.trials import Failed, Fold, Trial, best_trial, run_fold
from relreid_plugin.experiments.tuning import Plan
from relreid_plugin.features import Features, write
from relreid_plugin.locks import folder_lock

pytestmark = pytest.mark.usefixtures("one_thread")


def scene(identities, images, *, first=0, seed=0):
    draw = np.random.default_rng(seed)
    pids = np.repeat(np.arange(identities), images)
    rows = draw.normal(size=(identities, 8))[pids] + draw.normal(size=(len(pids), 8))
    return Features.of(rows, pids + first, np.tile(np.arange(images) % 3, identities))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of two stages on given features."""
    place = tmp_path_factory.mktemp("tune")
    write(scene(12, 6), place / "train.npz")
    for name, seed in (("query", 1), ("gallery", 2)):
        write(scene(4, 3, first=100, seed=seed), place / f"{name}.npz")
    data = {"type": "features", "workers": 0, "root": str(place), "sources": ["train.npz"]}
    relation = {"attention": "magformer", "num_layers": 1, "bank": {"refresh": 0}}
    values = {
        "model": {"name": "bnneck_baseline"},
        "head": {"feature_dim": 0},
        "data": {**data, "targets": ["query.npz", "gallery.npz"]},
        "sampler": {"train_sampler": "RandomIdentitySampler"},
        "loss": {"name": "composite"},
        "train": {"stages": [1, 2], "max_epoch": 2, "batch_size": 16, "lr": 0.01, "loggers": []},
        "test": {"dist_metric": "cosine"},
        "relation": {**relation, "train": {"max_epoch": 2, "features_per_step": 24, "steps_per_epoch": 1}},
    }
    path = place / "small.yml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


# --- what may be searched -----------------------------------------------------------------------------------------------


def test_the_ways_of_writing_values(tmp_path):
    cfg = get_default_config()
    words = [
        "train.lr=log:1e-4..1",
        "train.batch_size=16..70:16",
        "relation.k=3..9",
        "train.optim=sgd,adam",
        "rib.dcs.temperature=[1.0, 0.3],[1,0.5]",
        "sgd.nesterov=True,false",
    ]
    want = {
        "train.lr": Interval(1e-4, 1.0, True),
        "train.batch_size": Interval(16, 64, False, 16),
        "relation.k": Interval(3, 9),
        "train.optim": Choices(("sgd", "adam")),
        "rib.dcs.temperature": Choices(([1.0, 0.3], [1.0, 0.5])),
        "sgd.nesterov": Choices((True, False)),
    }
    assert dict(read_space(cfg, words).keys) == want
    (tmp_path / "space.yml").write_text("train.lr: log:1e-4..1\nrelation.k: [4, 8]\n")
    space = read_space(cfg, ["train.optim=sgd,adam"], tmp_path / "space.yml")
    assert list(space.keys.values()) == [want["train.lr"], Choices((4, 8)), want["train.optim"]] and not space.finite
    grid = read_space(cfg, ["relation.k=4,8", "train.optim=sgd,adam"])
    assert grid.finite and [tuple(values.values()) for values in grid.grid()] == [
        (4, "sgd"),
        (4, "adam"),
        (8, "sgd"),
        (8, "adam"),
    ]
    assert grid.largest("relation.k", 1) == 8 and space.largest("train.max_epoch", 7) == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--search KEY=VALUES"),
        (["train.lr"], "takes KEY=VALUES"),
        (["train.lrr=1,2"], "did you mean 'train.lr'"),
        (["rib=1,2"], "holds keys of its own"),
        (["train.lr=1"], "is no search"),
        (["train.lr=0.1,0.1"], "comes twice"),
        (["train.lr=0.1,0.2", "train.lr=0.3,0.4"], "comes twice"),
        (["train.lr=0.1,-0.2"], "key 'train.lr' must lie in"),
        (["train.lr=0.1,x"], "'train.lr' must be a number"),
        (["train.lr=0..1"], "key 'train.lr' must lie in"),
        (["train.lr=1..0.1"], "from the lower number"),
        (["train.lr=1..x"], "'x' is not a number"),
        (["train.lr=1..nan"], "'nan' is not a number"),
        (["train.weight_decay=log:0..1"], "begins above 0"),
        (["train.lr=log:0.1..1:0.1"], "has no steps"),
        (["train.lr=0.1..1:2"], "fits into the range"),
        (["train.batch_size=8..16.5"], "'16.5' is not a whole number"),
        (["train.optim=sgd,sgdd"], "did you mean 'sgd'"),
        (["sgd.nesterov=0..1"], "holds no number"),
        (["train.val_fraction=0.1,0.2"], "set by --folds"),
        (["data.targets=a,b"], "no trial looks at test sets"),
        (["data.workers=0,1"], "changes no score"),
    ],
)
def test_what_is_refused_before_anything_runs(words, said):
    with pytest.raises(UserError, match=said):
        read_space(get_default_config(), words)


def test_the_folds_hold_out_everybody_once():
    train = [(f"{label}-{camera}", label, camera, 0) for label in range(11) for camera in (0, 1)]
    held = [{item[1] for item in hold_out_identities(train, 1 / 3, 5, fold=fold).gallery} for fold in range(3)]
    assert sorted(len(fold) for fold in held) == [3, 4, 4] and set.union(*held) == set(range(11))
    assert hold_out_identities(train, 1 / 3, 5, fold=0) == hold_out_identities(train, 1 / 3, 5)
    with pytest.raises(UserError, match="train.val_fold 1"):
        hold_out_identities(train, 0.1, 5, fold=1)
    with pytest.raises(UserError, match="'train.val_fold 3' is beyond the last share.* is 2"):
        load_config("osnet_embedded.yml", ["train.val_fraction", str(1 / 3), "train.val_fold", "3"])


# --- trials, with training that only pretends ---------------------------------------------------------------------------


def pretend(monkeypatch, at=None, does=None):
    """Folds whose score falls with the distance of train.lr from 0.1; at the call ``at`` something happens instead."""
    calls = []

    def run_fold(cfg, report, *, shared=None):
        calls.append((cfg.train.lr, cfg.train.val_fold, cfg.data.save_dir))
        if len(calls) == at:
            does()
        score = 1 / (1 + abs(np.log10(cfg.train.lr) + 1)) - 0.01 * cfg.train.val_fold
        for epoch in (1, 2):
            report({"epoch": epoch, "val_mAP": score * epoch / 2, "val_R1": 0.5})
        return Fold(score, 0.5, 2)

    monkeypatch.setattr(tuning, "run_fold", run_fold)
    return calls


def planned(config, out, *words, **options):
    cfg = load_config(config)
    searched = words or ["train.lr=log:1e-4..1"]
    return Plan(config, [], read_space(cfg, searched), out, **{"trials": 8, "folds": 2, **options})


def gone(plan):
    """What a search leaves, without times."""
    return [{**vars(trial), "seconds": 0} for trial in tuning.search(plan, lambda search, picture: None).ended()]


def test_a_killed_search_goes_on_to_what_it_would_have_been(config, tmp_path, monkeypatch, capsys):
    whole = pretend(monkeypatch)
    want = gone(planned(config, tmp_path / "whole"))
    assert [trial["number"] for trial in want] == list(range(1, 9)) and len(
        {trial["values"]["train.lr"] for trial in want}
    ) > 5
    assert "pruned" in {trial["state"] for trial in want[5:]} and {trial["state"] for trial in want[:5]} == {"complete"}
    child = os.fork()
    if child == 0:
        pretend(
            monkeypatch, at=6, does=lambda: os.kill(os.getpid(), signal.SIGKILL)
        )  # in the second fold of the third trial
        try:
            gone(planned(config, tmp_path / "killed"))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    capsys.readouterr()
    calls = pretend(monkeypatch)
    assert gone(planned(config, tmp_path / "killed")) == want
    assert "2 of 8 trials are done already" in capsys.readouterr().out
    assert [call[:2] for call in calls] == [call[:2] for call in whole[4:]]
    # more trials go on, the same number makes none
    assert gone(planned(config, tmp_path / "killed", trials=9))[:8] == want and len(pretend(monkeypatch)) == 0
    # killed between the last word of a trial and its end in the study: it is not made again
    pretend(monkeypatch, at=1, does=lambda: 1 / 0)
    with monkeypatch.context() as patch:
        patch.setattr(tuning.Search, "_tell", lambda *_: os._exit(7))
        child = os.fork()
        if child == 0:
            pretend(monkeypatch)
            gone(planned(config, tmp_path / "late", trials=1))
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert gone(planned(config, tmp_path / "late", trials=1)) == want[:1]


def test_other_searches_and_writers_are_refused(config, tmp_path, monkeypatch):
    pretend(monkeypatch)
    out = tmp_path / "out"
    gone(planned(config, out, trials=1))
    for other in (
        planned(config, out, "train.lr=log:1e-4..0.5", trials=1),
        planned(config, out, trials=1, folds=3),
        planned(config, out, trials=1, metric="R1"),
        planned(config, out, trials=1, seed=2),
        Plan(config, ["train.max_epoch", "3"], read_space(load_config(config), ["train.lr=log:1e-4..1"]), out, 1, 2),
    ):
        with pytest.raises(UserError, match="holds another search"):
            gone(other)
    with folder_lock(out), pytest.raises(UserError, match="another process"):
        gone(planned(config, out, trials=1))
    half = (out / tuning.STUDY).read_bytes()
    (out / tuning.STUDY).write_bytes(half + b'{"op_code": 4, "wor')  # of a full disk
    assert len(gone(planned(config, out, trials=1))) == 1 and (out / tuning.STUDY).read_bytes().startswith(half)
    (out / tuning.STUDY).write_bytes(b"no journal\n" + half)
    with pytest.raises(UserError, match="cannot be opened as a study of Optuna"):
        gone(planned(config, out, trials=1))
    for options, said in (
        ({"sampler": "grid", "trials": None}, "has a range"),
        ({"sampler": "grid", "words": ["train.lr=0.1,1"]}, "leave out --trials"),
    ):
        with pytest.raises(UserError, match=said):
            gone(planned(config, tmp_path / "new", *options.pop("words", []), **options))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="one process"):
        gone(planned(config, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_failed_and_repeated_trials(config, tmp_path, monkeypatch):
    def fails():
        raise Failed("the loss became nan")

    calls = pretend(monkeypatch, at=3, does=fails)
    trials = gone(planned(config, tmp_path / "a", "train.lr=0.01,0.1", trials=5, sampler="random"))
    failed = [trial for trial in trials if trial["state"] == "failed"]
    assert [trial["problem"] for trial in failed] == ["the loss became nan"] and failed[0]["score"] is None
    again = [trial for trial in trials if trial["same_as"]]
    assert len(again) >= 2 and len(calls) <= 5  # a failed one is tried once more, others are not
    for trial in again:
        first = trials[trial["same_as"] - 1]
        assert (trial["values"], trial["score"], trial["folds"]) == (first["values"], first["score"], first["folds"])

    # where no trial could run, the first sentence ends the search, and the trial is made again
    def missing():
        raise UserError("data set 'x' is missing")

    pretend(monkeypatch, at=1, does=missing)
    with pytest.raises(UserError, match="data set 'x' is missing"):
        gone(planned(config, tmp_path / "b", trials=2))
    pretend(monkeypatch)
    assert [trial["state"] for trial in gone(planned(config, tmp_path / "b", trials=2))] == ["complete", "complete"]
    # values that do not go together fail their own trial alone
    words = ["train.start_epoch=0,2", "train.max_epoch=1,3"]
    states = [trial["state"] for trial in gone(planned(config, tmp_path / "c", *words, trials=None))]
    assert states == ["complete", "complete", "failed", "complete"]


def test_the_best_trial_of_a_metric_and_the_table(config, tmp_path):
    plan = planned(config, tmp_path, metric="R1")
    trials = [
        Trial(1, {"train.lr": 0.1}, "complete", 0.5, [Fold(0.9, 0.4, 1), Fold(0.8, 0.6, 2)], 3.0),
        Trial(2, {"train.lr": 0.2}, "complete", 0.7, [Fold(0.6, 0.6, 2), Fold(0.4, 0.8, 2)], 2.0),
        Trial(3, {"train.lr": 0.3}, "pruned", 0.8, [], 1.0),
        Trial(4, {"train.lr": 0.4}, "failed", None, [], 1.0, 0, "x"),
    ]
    assert best_trial(trials) is trials[1] and best_trial(trials[2:]) is None
    lines = tuned.trials_table(plan, trials).splitlines()
    assert lines[4] == "| 2 | 0.2 | 50.0 ± 14.1 | 70.0 ± 14.1 | 2, 2 | complete | 2 s |"
    assert [line.split(" | ")[0] for line in lines[5:]] == ["| 1", "| 3", "| 4"]
    rows = list(csv.DictReader(tuned.trials_csv(plan, trials).splitlines()))
    assert [row["R1"] for row in rows] == ["0.5", "0.7", "0.8", ""] and rows[1]["mAP 1"] == "0.4"
    assert rows[3]["problem"] == "x"


# --- the whole command --------------------------------------------------------------------------------------------------


def test_a_search_on_held_out_identities(config, tmp_path, monkeypatch, capsys):
    def tested(*_, **__):
        raise AssertionError("a test set is looked at")

    trained = []
    learn = Run.learn
    monkeypatch.setattr(
        Run, "learn", lambda run, watch=None: trained.append((run.folder.parent.name, run.stages)) or learn(run, watch)
    )
    out = tmp_path / "out"
    command = ["tune", "--config-file", config, "--search", "relation.k=2,8", "--folds", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(RunFeatures, "test", tested)
        patch.setattr(RunFeatures, "monitor", tested)
        assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    result = json.loads((out / "tune.json").read_text())
    one, two = result["trials"]
    assert result["sampler"] == "grid" and [one["values"], two["values"]] == [{"relation.k": 2}, {"relation.k": 8}]
    assert "trial 2 of 2: relation.k 8: mAP" in said and f"relreid train --config-file {out / 'best.yml'}" in said
    best = max(result["trials"], key=lambda trial: trial["score"])
    assert result["best"] == best["number"] and (out / "tune.md").read_text().strip() in said
    assert len(list(csv.reader((out / "tune.csv").open()))) == 3 and (out / "tune.png").read_bytes()[:4] == b"\x89PNG"
    # stage 1 reads no key that is searched: it is trained once per fold; no weights of trials are left
    each = [("stage1", [1]), ("trial001", [1, 2])]
    assert trained == [*each, *each, *((name.replace("001", "002"), stages) for name, stages in [*each, *each])]
    assert (out / "stage1" / "fold0" / "train.log").read_text().count("stage 1 took") == 1
    assert not list(out.glob("trial*/fold*/stage*")) and len(list(out.glob("trial*/fold*/train.log"))) == 4
    # every score is that of the same keys in a run of its own
    fold = ["train.val_fraction", "0.5", "train.val_fold", "1", "relation.k", "8"]
    alone = load_config(
        config, [*fold, "relation.train.eval_freq", "1", "test.eval_freq", "1", "data.save_dir", str(tmp_path / "r")]
    )
    from relreid_plugin import register

    register()
    history = learn(Run(alone))["stage2"]
    top = max(history, key=lambda record: record["val_mAP"])
    assert two["folds"][1] == {"mAP": top["val_mAP"], "R1": top["val_R1"], "epoch": top["epoch"]}
    assert two["folds"][0] != two["folds"][1]
    assert two["score"] == pytest.approx(np.mean([each["mAP"] for each in two["folds"]]))
    # the best keys are a configuration
    chosen = load_config(out / "best.yml")
    assert chosen.relation.k == best["values"]["relation.k"] and chosen.train.val_fraction == 0.0
    assert chosen.data.save_dir == str(out / "best") and chosen.relation.num_layers == 1
    # done: nothing is trained again
    trained.clear()
    assert main(command) == 0 and trained == []


def test_an_interrupted_fold_goes_on_from_its_checkpoint(config, tmp_path, capsys):
    class Stop(BaseException):
        pass

    cfg = load_config(config, ["train.stages", "[1]", "train.val_fraction", "0.5", "test.eval_freq", "1"])
    from relreid_plugin import register

    register()
    seen = {}

    def told(name, stop=0):
        def report(record):
            seen.setdefault(name, []).append((record["epoch"], record["val_mAP"]))
            if record["epoch"] == stop:
                raise Stop

        return report

    cfg.data.save_dir = str(tmp_path / "whole")
    whole = run_fold(cfg, told("whole"))
    cfg.data.save_dir = str(tmp_path / "stopped")
    with pytest.raises(Stop):
        run_fold(cfg, told("stopped", stop=1))
    assert run_fold(cfg, told("again")) == whole and seen["again"] == seen["whole"]
    assert "resuming stage 1 after epoch 1" in (tmp_path / "stopped" / "train.log").read_text()
    # weights that explode are the trial's own fault, a missing file is not
    cfg.train.lr, cfg.train.optim, cfg.data.save_dir = 1e25, "sgd", str(tmp_path / "exploded")
    with pytest.raises(Failed, match="learning rate"):
        run_fold(cfg, told("exploded"))
    cfg.data.sources, cfg.data.save_dir = ["none.npz"], str(tmp_path / "missing")
    with pytest.raises(UserError, match="none.npz"):
        run_fold(cfg, told("missing"))


def test_without_optuna(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(tuning, "is_installed", lambda name: name != "optuna")
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--config-file", config, "--search", "train.lr=0.1,1"]) == 2
    said = capsys.readouterr().err
    assert "the extra 'tune' brings" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
