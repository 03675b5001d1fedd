"""One frozen network through every door: pictures, a store, files, and its exported file give the same table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import MARKET

from relreid_plugin.cli.main import main
from relreid_plugin.errors import UserError
from relreid_plugin.features import Features, joined, read, write
from relreid_plugin.features.store import FeatureStore, StoreWriter
from relreid_plugin.functions import evaluate


def same_table(place, table):
    """Whether a table has the scores of another: of the features to the last digit; expansion and re-ranking sum over
    neighbours, of which nearly equal ones may change places where a batch was another."""
    rows = json.loads(place.read_text())["rows"]
    about = [[(row["protocol"], row["queries"], row["metric"]) for row in each] for each in (rows, table)]
    first, *others = zip(([row["mAP"], row["mINP"], *row["cmc"].values()] for row in rows), table)
    numbers = lambda row: [row["mAP"], row["mINP"], *row["cmc"].values()]  # noqa: E731
    close = [found == pytest.approx(numbers(wanted), abs=1e-3) for found, wanted in others]
    return about[0] == about[1] and first[0] == numbers(first[1]) and all(close)


def run(*words):
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(scope="module")
def frozen(place, tiny_config, tiny_root):
    """A run that tests a frozen network, whose features tell pictures apart: it is normalised by what it sees."""
    from relreid_plugin import host, register
    from relreid_plugin.config.defaults import load_config
    from relreid_plugin.data.images import read_image

    register()
    torch.manual_seed(0)
    own = [
        "backbone.name",
        "timm:test_efficientnet",
        "head.feature_dim",
        "0",
        "train.stages",
        "[1]",
        "relation.attention",
        "none",
    ]
    cfg = load_config(tiny_config, own)
    model = host.build_model(cfg.model.name, 8, "triplet", False, False, cfg=cfg)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    files = sorted((tiny_root / "embedded_persons_tiny" / MARKET / "bounding_box_train").glob("*.jpg"))[:48]
    pixels = np.stack([np.asarray(read_image(str(file), None).resize((32, 64))) for file in files])
    with torch.no_grad():
        model.train()(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    torch.save(model.state_dict(), place / "weights.pth")
    zero = ["model.load_weights", place / "weights.pth", "train.max_epoch", "0", "train.val_fraction", "0"]
    run("train", "--config-file", tiny_config, "data.save_dir", place / "run", *own, *zero)
    return place / "run"


@pytest.fixture(scope="module")
def small(place):
    """A network of timm's and its weights, as words of a command line."""
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=0, img_size=(64, 32)).state_dict(), place / "vit.pth")
    return ["timm:test_vit", "--weights", str(place / "vit.pth")]


def evaluated(place, *features, opts=()):
    run("evaluate", *features, "--json", place / "rows.json", *(["--opts", *opts] if opts else []))
    return place / "rows.json"


def test_every_door_gives_the_same_table(place, frozen, tiny_root):
    pytest.importorskip("onnxruntime")
    table = json.loads((frozen / "metrics.json").read_text())["rows"]
    assert len(table) == 3 and 0.1 < table[0]["mAP"] < 0.95
    target = ["--target", "embedded_persons_tiny"]
    for out, split in (("all.npz", "all"), ("store", "test"), ("query.parquet", "query"), ("gallery.parquet", "gallery")):
        run("extract", frozen, place / out, *target, "--split", split)
    run("export", frozen, "--to", "onnx", "--out", place / "model.onnx")
    onnx = ["extract", f"onnx:{place / 'model.onnx'}", place / "onnx.npz", *target, "--split", "test"]
    run(*onnx, "--opts", "data.root", tiny_root)
    for features in (["all.npz"], ["store"], ["query.parquet", "gallery.parquet"], ["onnx.npz"]):
        assert same_table(evaluated(place, *(place / name for name in features)), table), features
    keys = [
        "model.name",
        "features",
        "train.stages",
        "[1]",
        "train.max_epoch",
        "0",
        "train.val_fraction",
        "0",
        "train.batch_size",
        "16",
    ]
    again = ["-s", place / "all.npz", "-t", place / "all.npz", "data.save_dir", place / "given"]
    run("train", "--config-file", "magformer_features.yml", *again, *keys)
    assert same_table(place / "given" / "metrics.json", table)


def test_what_is_extracted_knows_its_labels_splits_and_model(place, small, tiny_root):
    folder = tiny_root / "embedded_persons_tiny" / MARKET
    for out, split in (("labels.npz", "all"), ("labels", "test")):
        run("extract", small[0], place / out, "--target", folder, "--split", split, *small[1:])
    found, stored = read(place / "labels.npz"), read(place / "labels")
    assert {split: int((found.splits == split).sum()) for split in ("train", "query", "gallery")} == {
        split: len(list((folder / name).glob("[0-9]*.jpg")))
        for split, name in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test"))
    }
    tested = found.take(found.splits != "train")
    assert stored.splits.tolist() == tested.splits.tolist() and stored.paths == tested.paths
    assert stored.pids.tolist() == tested.pids.tolist() and stored.model == found.model != ""
    names = [path.rsplit("/", 1)[1] for path in found.paths]
    assert found.shown(found.pids) == [int(name[:4]) for name in names]
    assert found.camids.tolist() == [int(name.split("_c")[1][0]) - 1 for name in names]
    torch.testing.assert_close(stored.features, torch.nn.functional.normalize(tested.features), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["x.npz", "--target", "FOLDER", "--verify"], "'x.npz' is a file; --dtype, --chunk, --verify"),
        (["x.npz", "--target", "FOLDERR"], "neither registered"),
        (["x.npz", "--target", "FOLDER", "--opts", "train.lr", "1"], "'train.lr' is a key of runs"),
        (["x.npz", "FOLDER", "--opts", "data.root", "y"], "does not take 'overrides'"),
    ],
)
def test_what_cannot_be_extracted(small, tiny_root, words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = str(tiny_root / "embedded_persons_tiny" / MARKET)
    words = [word.replace("FOLDER", folder) for word in words]
    assert main(["extract", small[0], *words, *small[1:]]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.glob("x.*"))


def test_a_data_set_of_several_pictures_is_refused(tmp_path, monkeypatch):
    from relreid_plugin.engine import inference
    from relreid_plugin.host.multimodal import MultimodalDataset

    monkeypatch.setattr(inference, "open_dataset", lambda *args, **more: object.__new__(MultimodalDataset))
    with pytest.raises(UserError, match="several images per sample"):
        inference.labelled_images(inference.data_config([]), "embedded_vehicles_tiny", tmp_path, "test")
    with pytest.raises(UserError, match="there is no split 'tset'; did you mean 'test'"):
        inference.labelled_images(inference.data_config([]), "embedded_vehicles_tiny", tmp_path, "tset")


def test_an_image_in_two_splits_has_one_row_only(small, tiny_root, tmp_path, capsys):
    image = sorted((tiny_root / "embedded_persons_tiny" / MARKET / "query").glob("*.jpg"))[0]
    rows = [f"{image},a,0,train", f"{image},b,0,query", f"{image},b,1,gallery"]
    (tmp_path / "mine.csv").write_text("\n".join(["path,pid,camid,split", *rows]) + "\n")
    words = ["extract", small[0], str(tmp_path / "x.npz"), "--target", str(tmp_path / "mine.csv"), *small[1:]]
    assert main([*words, "--split", "all"]) == 2
    assert "2 images of data set" in capsys.readouterr().err
    assert main([*words, "--split", "train"]) == 0
    assert (found := read(tmp_path / "x.npz")).shown(found.pids) == ["a"] and found.splits is None


def some_features(count=6, **more):
    draw = np.random.default_rng(0)
    return Features.of(draw.normal(size=(count, 4)), ["a", "b"] * (count // 2), **more)


def test_a_store_keeps_splits_over_chunks(tmp_path):
    splits = ["train"] * 3 + ["query"] + ["gallery"] * 2
    found = some_features(splits=splits, paths=[f"/x/{row}.jpg" for row in range(6)], model="one")
    with StoreWriter(tmp_path / "s", dim=4, chunk_rows=2) as writer:
        writer.add(found.features, found.shown(found.pids), None, found.paths, splits)
    store = FeatureStore(tmp_path / "s")
    assert store.splits.tolist() == splits and [store.labels([3])[2], store.labels([3])[1].tolist()] == [["/x/3.jpg"], [-1]]
    with StoreWriter(tmp_path / "s", dim=4) as writer:
        writer.add(found.features[:1])
    with pytest.raises(UserError, match="1 of 7 rows have no split"):
        read(tmp_path / "s")
    write(found, tmp_path / "t")
    assert read(tmp_path / "t").model == "one" and read(tmp_path / "t").splits.tolist() == splits


@pytest.mark.parametrize("name", ["x.npz", "x.parquet", "x.npy", "x"])
def test_the_model_is_kept_and_two_are_not_mixed(name, tmp_path):
    one, two = some_features(model="one"), some_features(model="two")
    write(one, tmp_path / name)
    found = read(tmp_path / name)
    assert found.model == ("" if name == "x.npy" else "one")
    if name != "x.npy":
        with pytest.raises(UserError, match="were made by another model"):
            joined([found, two])
        with pytest.raises(UserError, match="were made by another model"):
            evaluate(found, two)
        assert joined([found, one]).model == "one" and joined([found, some_features()]).model == ""


def test_evaluate_takes_keys_of_test_alone(tmp_path, capsys):
    query = some_features(8, cameras=[0, 0, 1, 1] * 2)
    write(query, tmp_path / "q.npz")
    capsys.readouterr()
    found = json.loads(
        evaluated(tmp_path, tmp_path / "q.npz", opts=["test.rivals", "['gnn']", "data.split_rule", "camera"]).read_text()
    )["rows"]
    said = capsys.readouterr().out
    assert len(found) == 2 and "divided by the rule 'camera'" in said
    for words, sentence in (
        (["--opts", "train.lr", "1"], "'train.lr' does not act on features"),
        (["b", "c"], "features are one file, or queries and gallery"),
    ):
        assert main(["evaluate", str(tmp_path / "q.npz"), *words]) == 2
        assert sentence in capsys.readouterr().err
