"""Runs on given features: the same table from every form of file, kill and resume, rules of splits, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import comparable

from relreid_plugin.cli.main import main
from relreid_plugin.data.rules import divide
from relreid_plugin.engine import checkpoint
from relreid_plugin.engine.runner import open_run
from relreid_plugin.errors import UserError
from relreid_plugin.features import Features, read, write
from relreid_plugin.features.divided import divided, split_file

DIM = 12


def scene(identities, images, *, first=0, seed=0, noise=1.0):
    """Features of ``images`` images per identity under three cameras, of different lengths."""
    draw = np.random.default_rng(seed)
    pids = np.repeat(np.arange(identities), images)
    rows = draw.normal(size=(identities, DIM))[pids] + noise * draw.normal(size=(len(pids), DIM))
    rows *= np.exp(draw.uniform(-1, 1, (len(pids), 1)))
    return Features.of(
        rows, pids + first, np.tile(np.arange(images) % 3, identities), times=np.arange(len(pids)) % images + 0.5
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with train, query and gallery in npz files and a small configuration."""
    folder = tmp_path_factory.mktemp("given")
    write(scene(12, 6), folder / "train.npz")
    test = scene(8, 6, first=100, seed=1)
    asks = np.arange(len(test)) % 6 == 0
    write(test.take(asks), folder / "query.npz")
    write(test.take(~asks), folder / "gallery.npz")
    write(test, folder / "test.npz")
    config = {
        "model": {"name": "bnneck_baseline"},
        "head": {"feature_dim": 0},
        "data": {
            "type": "features",
            "workers": 0,
            "root": str(folder),
            "sources": ["train.npz"],
            "targets": ["query.npz", "gallery.npz"],
        },
        "sampler": {"train_sampler": "RandomIdentitySampler"},
        "loss": {"name": "composite", "composite": {"triplet": 1.0}},
        "train": {"stages": [1, 2], "max_epoch": 2, "batch_size": 16, "lr": 0.001, "val_fraction": 0.3},
        "test": {"dist_metric": "cosine", "eval_freq": 1},
        "relation": {
            "attention": "magformer",
            "num_layers": 1,
            "k": 4,
            "bank": {"refresh": 0},
            "train": {"max_epoch": 2, "features_per_step": 32, "steps_per_epoch": 2, "eval_freq": 1},
        },
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def whole_run(place):
    assert main(["train", "--config-file", str(place / "config.yml"), "data.save_dir", str(place / "run")]) == 0
    return place / "run"


def rows_of(folder):
    return json.loads((folder / "metrics.json").read_text())["rows"]


def average_precision(query, gallery):
    """mAP by loops in float64, cosine distance, Market-1501 protocol."""
    found = []
    for row, pid, camera in zip(query.features.double().numpy(), query.pids, query.camids):
        scores = []
        for other, own, seen in zip(gallery.features.double().numpy(), gallery.pids, gallery.camids):
            if pid != own or camera != seen:
                scores.append((-(row @ other) / np.sqrt((row @ row) * (other @ other)), pid == own))
        hits, precisions = 0, []
        for rank, (_, match) in enumerate(sorted(scores, key=lambda pair: pair[0]), 1):
            if match:
                hits += 1
                precisions.append(hits / rank)
        if precisions:
            found.append(np.mean(precisions))
    return float(np.mean(found))


def test_both_stages_train_and_every_row_is_there(place, whole_run, capsys):
    rows = {(row["method"], row["protocol"]): row for row in rows_of(whole_run)}
    names = ["BNNeck baseline", "+ average query expansion", "+ MagFormer", "features as given"]
    assert all((name, "inductive") in rows for name in names) and ("+ MagFormer", "transductive") in rows
    query, gallery = read(place / "query.npz"), read(place / "gallery.npz")
    given = rows["features as given", "inductive"]
    assert given["mAP"] == pytest.approx(average_precision(query, gallery), abs=1e-9) and given["queries"] == len(query)
    assert given["target"] == "query.npz+gallery.npz"
    assert rows["BNNeck baseline", "inductive"]["mAP"] != given["mAP"]
    run = open_run(whole_run)  # without the training features
    assert run.datamanager.num_train_pids == 8 and len(run.datamanager.train_loader.dataset) == 0
    baseline = run.target_features("query.npz+gallery.npz")
    assert rows["BNNeck baseline", "inductive"]["mAP"] == pytest.approx(
        average_precision(baseline.query, baseline.gallery), abs=1e-9
    )


def test_a_killed_run_goes_on_to_the_last_digit(place, whole_run, monkeypatch, capsys):
    command = ["train", "--config-file", str(place / "config.yml"), "data.save_dir", str(place / "killed")]
    real, saved = checkpoint.save, []

    def save(path, state):
        real(path, state)
        saved.append(path.parent.name)
        if [*saved[-2:], path.name] in (["stage1", "stage1", "last.pth.tar"], ["stage2", "stage2", "last.pth.tar"]):
            if saved.count(path.parent.name) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
    codes = [main(command), main([*command, "--resume"])]
    monkeypatch.undo()
    assert codes == [130, 130] and main([*command, "--resume"]) == 0
    assert comparable(place / "killed") == comparable(whole_run)


@pytest.mark.parametrize("form", ["npz", "npy", "parquet", "store"])
def test_every_form_gives_the_same_table(place, whole_run, form, tmp_path, capsys):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    ending = "" if form == "store" else f".{form}"
    for name in ("train", "query", "gallery"):
        write(read(place / f"{name}.npz"), tmp_path / f"{name}{ending}")
    names = [str(tmp_path / f"{name}{ending}") for name in ("train", "query", "gallery")]
    options = ["model.name", "features", "train.stages", "[1]", "train.max_epoch", "0", "relation.attention", "none"]
    base = ["train", "--config-file", str(place / "config.yml"), "-s", names[0], "-t", *names[1:]]
    assert main([*base, "data.save_dir", str(tmp_path / "run"), *options]) == 0
    rows = rows_of(tmp_path / "run")
    wanted = next(row for row in rows_of(whole_run) if row["method"] == "features as given")
    assert [row["method"] for row in rows] == ["features as given", "+ average query expansion", "+ k-reciprocal re-ranking"]
    for key in ("mAP", "mINP", "queries"):
        assert rows[0][key] == pytest.approx(wanted[key], abs=1e-12)
    assert rows[0]["cmc"] == wanted["cmc"]


def test_stage_2_on_the_features_as_they_are(place, tmp_path, capsys):
    command = ["train", "--config-file", str(place / "config.yml"), "-t", "test.npz", "data.save_dir", str(tmp_path / "run")]
    options = ["model.name", "features", "train.stages", "[2]", "relation.train.max_epoch", "1"]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().out
    assert (
        "divided by the rule 'image' (48 query, 48 gallery)" in said
        and split_file(place / "test.npz", "image", train=False).is_file()
    )
    rows = {row["method"]: row for row in rows_of(tmp_path / "run")}
    assert rows["features as given"]["parameters"] == 0 and rows["+ MagFormer"]["parameters"] > 0
    test = read(place / "test.npz")  # query and gallery are one: own images are discarded, under the same camera as well
    assert rows["features as given"]["mAP"] == pytest.approx(average_precision(test, test), abs=1e-9)


def test_what_needs_pictures_or_does_not_fit_is_refused(place, tmp_path, capsys):
    base = ["train", "--config-file", str(place / "config.yml"), "data.save_dir", str(tmp_path / "run")]
    write(scene(4, 6, first=100, seed=1).take(np.arange(24)), tmp_path / "other.npz")
    narrow = Features.of(np.eye(4), [100, 100, 101, 101], [0, 1, 0, 1])
    write(narrow, tmp_path / "narrow.npz")
    cases = {
        ("model.name", "osnet_x0_25"): "osnet_x0_25",
        ("test.visrank", "True"): "test.visrank",
        ("model.name", "features"): "nothing to train",
        ("-s", "missing.npz"): "missing.npz",
        ("-t", str(tmp_path / "narrow.npz"), "data.split_rule", "image"): "width 4",
        ("-t", "test.npz", "data.split_rule", "date"): "data.split_rule",
        ("-s", "test.npz", "-t", "test.npz", "data.split_rule", "image"): "leaves no training images",
    }
    for options, word in cases.items():
        order = sorted(range(0, len(options), 2), key=lambda index: not options[index].startswith("-"))
        words = [word for index in order for word in options[index : index + 2]]
        assert main([*base[:3], *words, *base[3:]]) == 2, options
        said = capsys.readouterr().err.strip()
        assert word in said and said.count("\n") == 0, said
        assert not (tmp_path / "run" / "stage1").exists()


# --- rules ------------------------------------------------------------------------------------------------------------
def parts_of(found, rule, *, train=False):
    return divide(found.pids, found.camids, found.times, rule, train=train, seed=1, what="'x'")


def test_rules_divide_as_they_say():
    found = scene(10, 6)
    parts = parts_of(found, "image")
    assert parts["query"].tolist() == parts["gallery"].tolist() == list(range(60)) and not len(parts["train"])
    lone = Features.of(np.eye(5), [1, 1, 2, 3, 3])
    assert parts_of(lone, "image")["query"].tolist() == [0, 1, 3, 4]
    parts = parts_of(found, "camera")
    assert sorted([*parts["query"], *parts["gallery"]]) == list(range(60))
    asked = list(zip(found.pids[parts["query"]], found.camids[parts["query"]]))
    assert len(set(asked)) == len(asked) == 30
    parts = parts_of(found, "identity", train=True)
    trained, tested = set(found.pids[parts["train"]]), set(found.pids[[*parts["query"], *parts["gallery"]]])
    assert len(trained) == 5 and len(tested) == 5 and not trained & tested
    parts = parts_of(found, "time", train=True)
    assert found.times[parts["query"]].min() > found.times[parts["gallery"]].max()
    assert parts["train"].tolist() == parts["gallery"].tolist() and len(parts["query"]) == 30


def test_rules_that_cannot_divide_are_refused():
    found = scene(10, 6)
    for rule, features, train, word in (
        ("time", Features.of(np.eye(4), [1, 1, 2, 2]), False, "times"),
        ("time", Features.of(np.eye(4), [1, 1, 2, 2], times=[5, 5, 5, 5]), False, "different times"),
        ("camera", found, True, "leaves no training images"),
        ("identity", scene(3, 4), True, "3 identities"),
        ("image", Features.of(np.eye(3), [1, 2, 3]), False, "no query with a match"),
    ):
        with pytest.raises(UserError, match=word):
            parts_of(features, rule, train=train)


def test_parts_are_the_same_next_time_and_those_of_other_features_are_refused(tmp_path):
    found = scene(10, 6)
    path = tmp_path / "x.npz"
    first, said = divided(found, path, "identity", train=True)
    assert "30 train" in said and split_file(path, "identity", train=True).is_file()
    place = split_file(path, "identity", train=True)
    content = json.loads(place.read_text())
    content["query"] = content["query"][:-1]  # what the file says counts, not what would be drawn
    place.write_text(json.dumps(content))
    again, said = divided(found, path, "identity", train=True)
    assert again["query"].tolist() == first["query"][:-1].tolist() and str(place) in said
    with pytest.raises(UserError, match=r"59"):
        divided(found.take(np.arange(59)), path, "identity", train=True)
    content["query"] = [77]
    place.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        divided(found, path, "identity", train=True)
    with pytest.raises(UserError, match="did you mean 'image'"):
        divided(found, path, "imgae")


def test_one_file_trains_and_tests_by_its_own_splits(place, tmp_path, capsys):
    found = scene(12, 6)
    splits = np.where(found.pids < 6, "train", np.where(np.arange(72) % 6 == 0, "query", "gallery"))
    write(Features.of(found.features, found.pids, found.camids, splits=splits), tmp_path / "all.npz")
    shutil.copy(place / "config.yml", tmp_path / "config.yml")
    command = [
        "train",
        "--config-file",
        str(tmp_path / "config.yml"),
        "--root",
        str(tmp_path),
        "-s",
        "all.npz",
        "-t",
        "all.npz",
    ]
    options = ["train.stages", "[1]", "relation.attention", "none", "train.max_epoch", "1", "train.val_fraction", "0"]
    assert main([*command, "data.save_dir", str(tmp_path / "run"), *options]) == 0
    rows = {row["method"]: row for row in rows_of(tmp_path / "run")}
    query, gallery = found.take(splits == "query"), found.take(splits == "gallery")
    assert rows["features as given"]["mAP"] == pytest.approx(average_precision(query, gallery), abs=1e-9)
    assert "trained on as well" not in capsys.readouterr().out


# --- functions on arrays ----------------------------------------------------------------------------------------------
def test_functions_on_arrays_give_the_numbers_of_the_table(place, whole_run):
    import relreid_plugin
    from relreid_plugin import relations

    rows = {(row["method"], row["protocol"]): row for row in rows_of(whole_run)}
    query, gallery = read(place / "query.npz"), read(place / "gallery.npz")
    arrays = query.features.numpy(), gallery.features.numpy()
    labels = {"identities": (query.pids, gallery.pids), "cameras": (query.camids, gallery.camids)}
    for found in (
        relreid_plugin.evaluate(place / "query.npz", str(place / "gallery.npz")),
        relreid_plugin.evaluate(query, gallery),
        relreid_plugin.evaluate(*arrays, **labels),
    ):
        row = rows["features as given", "inductive"]
        assert found.mAP == row["mAP"] and found.rank(1) == row["cmc"]["1"] and found.mINP == row["mINP"]
    for protocol in ("inductive", "transductive"):
        refined = relations.refine(query, gallery, encoder=whole_run, protocol=protocol)
        found = relreid_plugin.evaluate(refined.query, refined.gallery)
        assert found.mAP == pytest.approx(rows["+ MagFormer", protocol]["mAP"], abs=1e-12)
    run = open_run(whole_run)
    head = run.target_features("query.npz+gallery.npz")
    for by, name, protocol in (
        ("rerank", "+ k-reciprocal re-ranking", "transductive"),
        ("aqe", "+ average query expansion", "inductive"),
    ):
        found = relreid_plugin.evaluate(
            head.query, head.gallery, distances=relreid_plugin.rerank(head.query, head.gallery, by=by)
        )
        assert found.mAP == pytest.approx(rows[name, protocol]["mAP"], abs=1e-9)


def test_search_on_arrays_is_the_exact_order(place):
    import relreid_plugin

    query, gallery = read(place / "query.npz"), read(place / "gallery.npz")
    unit = [part.features.double() / part.features.double().norm(dim=1, keepdim=True) for part in (query, gallery)]
    scores = unit[0] @ unit[1].T
    found = relreid_plugin.search(query, gallery, 5)
    best = scores.sort(dim=1, descending=True)
    assert found.rows.tolist() == best.indices[:, :5].tolist() and len(found) == len(query)
    assert np.allclose(found.scores, best.values[:, :5], atol=1e-6)
    assert found.pids.tolist() == gallery.pids[found.rows.numpy()].tolist()
    middle = float(best.values[:, 2].median())
    cut = relreid_plugin.search(query.features.numpy(), gallery.features, 5, threshold=middle)
    assert (cut.rows >= 0).tolist() == (best.values[:, :5] >= middle).tolist()
    assert (cut.pids[cut.rows.numpy() < 0] == -1).all()


def test_functions_refuse_what_does_not_fit(place, whole_run):
    import relreid_plugin
    from relreid_plugin import relations

    query, gallery = read(place / "query.npz"), read(place / "gallery.npz")
    plain = query.features.numpy(), gallery.features.numpy()
    calls = {
        "identities of all": lambda: relreid_plugin.evaluate(*plain),
        "own identities": lambda: relreid_plugin.evaluate(query, gallery, identities=(query.pids, gallery.pids)),
        "a pair": lambda: relreid_plugin.evaluate(*plain, identities=query.pids),
        "width 3": lambda: relreid_plugin.search(plain[0][:, :3], plain[1]),
        r"\(2, 2\)": lambda: relreid_plugin.evaluate(query, gallery, distances=np.zeros((2, 2))),
        "manhattan": lambda: relreid_plugin.evaluate(query, gallery, metric="manhattan"),
        "did you mean 'gnn'": lambda: relreid_plugin.rerank(*plain, by="gn"),
        "needs the cameras": lambda: relreid_plugin.rerank(*plain, by="cajaccard"),
        "both, or neither": lambda: relreid_plugin.evaluate(query, Features.of(plain[1], gallery.pids)),
        "gallery.npz' have cameras and features of 'query' have none": lambda: relations.refine(
            plain[0], gallery, encoder=whole_run
        ),
        "have cameras and features of 'gallery' have none": lambda: relreid_plugin.rerank(query, plain[1], by="cajaccard"),
        "no run": lambda: relations.refine(query, gallery, encoder=place / "nowhere"),
        "one model makes": lambda: relations.refine(plain[0][:, :3], plain[1][:, :3], encoder=whole_run),
        "k takes": lambda: relreid_plugin.search(*plain, k=0),
    }
    for words, call in calls.items():
        with pytest.raises(UserError, match=words):
            call()


def test_functions_need_no_host(place, whole_run):
    import subprocess
    import sys

    code = f"""
import sys
sys.modules["torchreid"] = None
import relreid_plugin
from relreid_plugin import relations
query, gallery = {str(place / "query.npz")!r}, {str(place / "gallery.npz")!r}
refined = relations.refine(query, gallery, encoder={str(whole_run)!r})
print(relreid_plugin.evaluate(refined.query, refined.gallery).num_queries, len(relreid_plugin.search(query, gallery)))
print(relreid_plugin.rerank(query, gallery, by="gcr").shape)
assert "relreid_plugin.host" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "\n8 8\n" in f"\n{done.stdout}", done.stderr


# --- same or not ------------------------------------------------------------------------------------------------------
def test_verification_of_every_row_is_in_table_and_metrics(place, tmp_path, capsys):
    options = ["model.name", "features", "train.stages", "[1]", "train.max_epoch", "0", "relation.attention", "none"]
    command = ["train", "--config-file", str(place / "config.yml"), "data.save_dir", str(tmp_path / "run"), *options]
    assert main([*command, "test.verification", "True"]) == 0
    assert "EER   T@0.01  T@0.001 T@0.0001" in capsys.readouterr().out
    rows = {row["method"]: row["verification"] for row in rows_of(tmp_path / "run")}
    assert list(rows) == ["features as given", "+ average query expansion", "+ k-reciprocal re-ranking"]
    assert (tmp_path / "run" / "plots" / "roc.png").stat().st_size > 1000
    query, gallery = read(place / "query.npz"), read(place / "gallery.npz")
    unit = [part.features.double().numpy() for part in (query, gallery)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in unit]
    positive, negative = [], []
    for row, pid, camera in zip(unit[0], query.pids, query.camids):
        for other, own, seen in zip(unit[1], gallery.pids, gallery.camids):
            if pid != own:
                negative.append(row @ other)
            elif camera != seen:
                positive.append(row @ other)
    found = rows["features as given"]
    assert (found["positives"], found["negatives"]) == (len(positive), len(negative))
    rates = [(np.mean(negative >= t - 1e-9), np.mean(positive >= t - 1e-9)) for t in positive]
    assert found["eer"][0] == pytest.approx(min(max(fpr, 1 - tpr) for fpr, tpr in rates), abs=1e-9)
    assert found["tpr"]["0.01"][0] == pytest.approx(max([tpr for fpr, tpr in rates if fpr <= 0.01], default=0), abs=1e-9)
    assert rows["+ k-reciprocal re-ranking"]["eer"] != found["eer"]


def test_rows_without_verification_are_as_they_were(whole_run):
    assert all(row["verification"] == {} for row in rows_of(whole_run)) and not (whole_run / "plots" / "roc.png").exists()


@pytest.mark.parametrize("command", ["extract", "search", "compare", "gradcam", "occlusion"])
def test_commands_that_need_pictures_refuse_a_run_of_features(command, whole_run, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 16)).save("a.png")
    Image.new("RGB", (8, 16), (9, 9, 9)).save("b.png")
    write(scene(2, 3), tmp_path / "store")
    words = {
        "extract": [str(whole_run), "gallery", "a.png"],
        "search": [str(whole_run), "store", "a.png"],
        "compare": ["a.png", "b.png", "--model", str(whole_run)],
        "gradcam": [str(whole_run), "--count", "2", "--shown", "1"],
        "occlusion": [str(whole_run)],
    }
    assert main([command, *words[command]]) == 2
    said = capsys.readouterr().err
    assert "features" in said and said.count("\n") == 1
    assert not (tmp_path / "gallery").exists()
