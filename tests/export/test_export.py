"""``relreid export`` from end to end, the proof, and what is refused with nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MARKET

from relreid_plugin.backbones import runtimes
from relreid_plugin.cli.main import main
from relreid_plugin.engine.scoring import EvaluationOptions
from relreid_plugin.errors import UserError
from relreid_plugin.export import exporting
from relreid_plugin.export.exporting import Request, _placed
from relreid_plugin.export.proof import Comparison, compare, cosines, doubts, judge
from relreid_plugin.export.samples import Samples, rendered, some
from relreid_plugin.features.sets import FeatureSet, TestFeatures

for needed in ("onnx", "onnxruntime"):
    pytest.importorskip(needed)


def features(seed=0, *, images=40, width=8, noise=0.0):
    """Query and gallery of ten identities with some spread, and with noise on top."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(10, width))
    pids = np.arange(images) % 10
    values = centres[pids] + 0.6 * generator.normal(size=(images, width))
    values = values + noise * np.random.default_rng(9).normal(size=values.shape)
    found = torch.from_numpy(values).float()
    cameras = np.arange(images) // 10 % 2
    part = images // 4
    sides = (slice(0, part), slice(part, images))
    return TestFeatures(*(FeatureSet(found[side], pids[side], cameras[side], []) for side in sides))


def test_a_comparison_counts_what_a_loop_counts():
    own, other = features(), features(noise=0.3)
    found = compare(own, other)
    values, wins, average = [], [], []
    for one, two in ((own.query, other.query), (own.gallery, other.gallery)):
        for a, b in zip(one.features.double().numpy(), two.features.double().numpy()):
            values.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for side in (own, other):
        gallery = side.gallery.features.double().numpy()
        gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
        firsts, precisions = [], []
        for row, pid, camera in zip(side.query.features.double().numpy(), side.query.pids, side.query.camids):
            order = [
                place
                for place in np.argsort(-(gallery @ (row / np.linalg.norm(row))), kind="stable")
                if not (side.gallery.pids[place] == pid and side.gallery.camids[place] == camera)
            ]
            firsts.append(order[0])
            hits = np.array([side.gallery.pids[place] == pid for place in order])
            precisions.append(np.mean([hits[: place + 1].mean() for place in np.flatnonzero(hits)]))
        wins.append(firsts)
        average.append(100 * np.mean(precisions))
    assert found.images == 40 and found.queries == 10 and found.ties == 0
    assert found.min_cosine == pytest.approx(min(values)) and found.mean_cosine == pytest.approx(np.mean(values))
    assert found.other_first == sum(a != b for a, b in zip(*wins)) > 0
    assert found.mAP == pytest.approx(tuple(average)) and found.mAP[0] != found.mAP[1]
    assert found.span[0] <= found.mAP[0] <= found.span[1] and found.span[1] - found.span[0] < 1


def test_what_is_accepted():
    same = compare(features(), features())
    assert judge(same, "float32") == judge(same, "int8") == doubts(same) == []
    assert same.min_cosine == pytest.approx(1) and same.other_first == 0 and same.mAP[0] == same.mAP[1]
    worse = compare(features(), features(noise=0.3))
    assert len(judge(worse, "float32")) == 3
    assert [reason.split()[0] for reason in judge(worse, "int8", most_loss=100)] == []
    lossy = Comparison(10, 0.95, 0.96, 5, 2, 0, (50.0, 47.0), (50.0, 40.0), (50.0, 50.0))
    assert judge(lossy, "int8") == ["mAP is 47.00 instead of 50.00, more than 2 points off"]
    assert judge(lossy, "int8", most_loss=3.5) == []
    assert [reason[:15] for reason in judge(lossy, "fp16", most_loss=3.5)] == ["the mean cosine"]
    gain = Comparison(10, 1.0, 1.0, 5, 0, 0, (50.0, 53.0), (50.0, 60.0), (50.0, 50.0))
    assert judge(gain, "float32") and not judge(gain, "fp16")


def test_ties_prove_nothing_and_that_is_said():
    own = features()
    flat = [FeatureSet(torch.ones_like(part.features), part.pids, part.camids, []) for part in (own.query, own.gallery)]
    shaken = [
        FeatureSet(part.features + 1e-7 * torch.randn(part.features.shape), part.pids, part.camids, []) for part in flat
    ]
    found = compare(TestFeatures(*flat), TestFeatures(*shaken))
    assert judge(found, "float32") == [] and "hardly apart" in doubts(found)[0] and found.other_first == 0
    unknown = [
        FeatureSet(part.features, np.arange(len(part)) + at, part.camids, [])
        for part, at in zip((own.query, own.gallery), (0, 99))
    ]
    found = compare(TestFeatures(*unknown), TestFeatures(*unknown))
    assert found.mAP is None and found.queries == 10 and "no mAP" in doubts(found)[0]


def test_odd_features_are_refused():
    own = features()
    broken = features()
    broken.query.features[0, 0] = float("nan")
    with pytest.raises(UserError, match="1 of 10 features of the exported file hold NaN"):
        compare(own, broken)
    with pytest.raises(UserError, match="of shape"):
        compare(own, features(width=4))
    assert (
        float(cosines(torch.zeros(1, 3), torch.zeros(1, 3))) == 1
        and float(cosines(torch.zeros(1, 3), torch.ones(1, 3))) == 0
    )
    assert EvaluationOptions().metric == "euclidean"  # the default of a comparison is another one: cosine


def test_some_samples_keep_the_matches():
    query = [(f"q{n}", n % 50, 0, 0) for n in range(100)]
    gallery = [(f"g{n}", n % 200, 1, 0) for n in range(1000)]
    part = some(Samples("all", query, gallery), 80)
    assert len(part.query) == 20 and len(part) == 80 and part.left_out == 1020
    chosen = {item[1] for item in part.query}
    assert sum(item[1] in chosen for item in part.gallery) == 60
    assert part.gallery == [item for item in gallery if item in part.gallery]
    few = some(Samples("all", query[:4], gallery), 40)
    assert len(few) == 40 and {item[1] for item in few.query} <= {item[1] for item in few.gallery}
    assert some(Samples("all", query, gallery), 0).left_out == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_run, tiny_root):
    return tmp_path_factory.mktemp("export")


def test_rendered_persons_are_compared_where_nothing_is_named(tiny_root, monkeypatch):
    monkeypatch.setattr("relreid_plugin.data.embedded.ensure_embedded", lambda name, root, **options: tiny_root / name)
    with rendered() as found:
        assert len(found.query) == 19 and len(found.gallery) == 91 and {item[1] for item in found.query} > {3}


def test_a_file_with_a_fixed_batch_is_refused_in_a_sentence():
    request = Request("onnx", Path("m.onnx"))
    assert _placed([np.ones((2, 4)), np.zeros((1, 4))], [2, 0, 1], request)[:, 0].tolist() == [1, 0, 1]
    with pytest.raises(UserError, match="2 features of 3 images"):
        _placed([np.ones((2, 4))], [0, 1, 2], request)


def test_a_run_becomes_a_file_with_its_proof(place, tiny_run, capsys):
    out = place / "model.onnx"
    assert main(["export", str(tiny_run), "--to", "onnx", "--out", str(out), "--licence", "MIT"]) == 0
    said = capsys.readouterr().out
    proof = json.loads((place / "model.onnx.proof.json").read_text())
    assert f"{proof['images']} images (test set 'embedded_persons_tiny')" in said and "first places differ" in said
    assert proof["min_cosine"] > 0.9999 and proof["other_first"] == 0 and 1 in proof["batch_sizes"]
    assert proof["about"]["licence"] == "MIT" and proof["images"] == 108 and proof["kind"] == "onnx"
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert proof["mAP"]["model"] == pytest.approx(100 * metrics["rows"][0]["mAP"], abs=0.01)
    assert set(proof["images_per_second"]) == {"torch", "onnx"} and "onnxruntime" in proof["versions"]["runtime"]
    assert sorted(path.name for path in place.iterdir()) == ["model.onnx", "model.onnx.proof.json"]
    about = runtimes.open_runtime(out).about
    assert about == proof["about"] and (about["height"], about["width"], about["dim"]) == (64, 32, 32)


@pytest.mark.parametrize("kind, file", [("onnx", "vit.onnx"), ("torchscript", "vit.pt")])
def test_any_named_model_becomes_a_file(kind, file, place, tiny_root, capsys):
    import timm

    from relreid_plugin.extractor import load_extractor

    torch.manual_seed(0)
    weights, photos = str(place / "vit.pth"), tiny_root / "embedded_persons_tiny" / MARKET / "query"
    torch.save(timm.create_model("test_vit", num_classes=0, img_size=(64, 32)).state_dict(), weights)
    words = ["export", "timm:test_vit", "--weights", weights, "--to", kind, "--out", str(place / file)]
    assert main([*words, "--images", str(photos)]) == 0, capsys.readouterr().err
    proof = json.loads((place / f"{file}.proof.json").read_text())
    assert proof["min_cosine"] > 0.9999 and proof["other_first"] == 0 and proof["mAP"] is not None
    assert proof["about"]["model"] == "timm:test_vit" and proof["about"]["parameters"] > 1e5
    own, other = load_extractor("timm:test_vit", weights=weights), load_extractor(f"{kind}:{place / file}")
    assert proof["about"]["weights"] == own.fingerprint and other.reading == own.reading
    images = [str(path) for path in sorted(photos.glob("*.jpg"))[:3]]
    torch.testing.assert_close(other(images), own(images), rtol=0, atol=1e-4)
    again = ["export", f"{kind}:{place / file}", "--to", "onnx", "--out", str(place / "again.onnx")]
    assert main(again) == 2 and "is no network of torch" in capsys.readouterr().err
    assert main([*words, "--part", "gallery"]) == 2 and "has no relation encoder" in capsys.readouterr().err
    assert main([*words, "--target", "nowhere"]) == 2 and "neither registered" in capsys.readouterr().err
    assert main([*words, "--opts", "train.lr", "1", "--target", "x"]) == 2 and "is a key of runs" in capsys.readouterr().err


def test_a_run_takes_no_network_of_another(tiny_run, tmp_path, capsys):
    words = ["export", str(tiny_run), "--to", "onnx", "--out", str(tmp_path / "x.onnx"), "--weights", "w.pth"]
    assert main(words) == 2 and "does not take 'weights'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_and_photos_of_any_size(place, tiny_run, tiny_root, capsys):
    folder = tiny_root / "embedded_persons_tiny"
    words = ["export", str(tiny_run), "--to", "onnx", "--with-preprocessing", "--images", str(folder), "--most", "40"]
    assert main([*words, "--out", str(place / "photos.onnx")]) == 0, capsys.readouterr().err
    proof = json.loads((place / "photos.onnx.proof.json").read_text())
    assert proof["images_left_out"] > 0 and proof["images"] == 40 and proof["mAP"] is not None
    runtime = runtimes.open_runtime(place / "photos.onnx")
    assert runtime({"images": np.zeros((2, 50, 40, 3), np.uint8)})["features"].shape == (2, 32)


def test_a_file_that_is_not_the_same_model_is_not_written(tmp_path, tiny_run, monkeypatch, capsys):
    write = exporting.write_graph

    def damaged(graph, *args, **options):
        with torch.no_grad():
            before = [value.clone() for value in graph.module.parameters()]
            for value in graph.module.parameters():
                value.add_(0.1 * torch.randn_like(value))
            write(graph, *args, **options)
            for value, old in zip(graph.module.parameters(), before):
                value.copy_(old)

    monkeypatch.setattr(exporting, "write_graph", damaged)
    out = tmp_path / "deep" / "model.onnx"
    (tmp_path / "deep").mkdir()
    out.write_bytes(b"of before")
    assert main(["export", str(tiny_run), "--to", "onnx", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "was not written" in said and "cosine" in said
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.onnx"] and out.read_bytes() == b"of before"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"kind": "onx"}, "did you mean 'onnx'"),
        ({"out": "model.xml"}, "named .onnx"),
        ({"precision": "int8"}, "--calibration"),
        ({"calibration": ("x",)}, "belongs to --int8"),
        ({"most_loss": 1.0}, "belongs to --fp16 and --int8"),
        ({"images": ("x",), "target": "y"}, "not both"),
        ({"precision": "int4"}, "unknown"),
    ],
)
def test_requests_that_do_not_go_together(changes, sentence, tmp_path):
    from pathlib import Path

    request = Request(
        **{"kind": "onnx", "out": Path("model.onnx"), **{k: Path(v) if k == "out" else v for k, v in changes.items()}}
    )
    with pytest.raises(UserError, match=sentence):
        request.check()


def test_mistakes_are_one_sentence(tmp_path, tiny_run, monkeypatch, capsys):
    words = ["export", str(tiny_run), "--to", "onnx", "--out", str(tmp_path / "model.onnx")]
    for more, sentence in (
        (["--target", "embedded_person_tiny"], "is no test set"),
        (["--modalities", "R"], "takes single images"),
        (["--images", str(tmp_path / "none")], "does not exist"),
    ):
        assert main([*words, *more]) == 2 and sentence in capsys.readouterr().err
    monkeypatch.setattr(runtimes, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert main(words) == 2
    assert "needs the package 'onnx', which is not installed; run pip install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
