"""What reports show by networks: Grad-CAM of the worst queries, scores of covered ones, pictures and worth of modalities."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reported import Page

pytest.importorskip("torchreid")

from relreid_plugin.cli.main import main
from relreid_plugin.data.images import read_image
from relreid_plugin.data.overlays import overlay
from relreid_plugin.engine.runner import open_run
from relreid_plugin.features.sets import TestFeatures
from relreid_plugin.files import write_json
from relreid_plugin.graft.scores import modality_tables
from relreid_plugin.report import lists, plots, thumbnails
from relreid_plugin.report.looking import look_into
from relreid_plugin.report.scored import read_subject
from relreid_plugin.rib import looks
from relreid_plugin.rib.occlusion import load_queries, stress_test


def written(out, *arguments):
    """A report's page and its script's data."""
    assert main(["report", *map(str, arguments), "--out", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    return page, json.loads(page.scripts[0])


def picture(data, number):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["pictures"][number]))), np.float64)


def tables(page, name):
    """The cells of a method's table, as written and as shown."""
    text = page.split(f'data-table="{name}"')[1].split("</table>")[0]
    found = Page(text)
    return [float(own["data-cell"]) for tag, own in found.tags if tag == "td"], text


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch):
    """Curves and maps take longer than all the rest."""
    monkeypatch.setattr(plots, "svg", lambda figure, name, label: "")
    monkeypatch.setattr(lists, "identity_maps", lambda target, names: ([], []))


def looked(folder, **options):
    """What the report's script gets of a run's network, without the page."""
    views = [(subject, target) for subject in [read_subject(folder)] for target in subject.targets.values()]
    payloads = [lists.query_lists(target, 3) for _, target in views]
    return look_into(views, payloads, **options)[0], payloads[0]


@pytest.fixture
def gradcam():
    return pytest.importorskip("pytorch_grad_cam")


# --- where networks look ------------------------------------------------------------------------------------------------
def test_gradcam_of_the_worst_queries(gradcam, looking_runs, tmp_path):
    _, bound, plain = looking_runs
    page, data = written(tmp_path / "r.html", bound, plain, "--overlays", 3)
    first, second, both = data["views"]
    assert first["overlays"][0]["query"] == first["order"][:3] and first["overlays"][0]["title"] == "Grad-CAM"
    shown = [[view["path"][row] for row in view["overlays"][0]["query"]] for view in (first, second)]
    assert shown[0] == shown[1]  # the same queries in both runs
    assert [one["title"] for one in both["overlays"]] == ["bound: Grad-CAM", "plain: Grad-CAM"]
    for one in both["overlays"]:
        assert [both["path"][row] for row in one["query"]] == shown[0]
    from relreid_plugin.rib.gradcam import cams, identity_features

    for folder, view in ((bound, first), (plain, second)):
        run = open_run(folder)
        name = run.cfg.data.targets[0]
        images, _, pids, cameras = load_queries(run, name, len(view["path"]))
        wanted = identity_features(run, run.target_features(name).gallery, images, pids, cameras, view["path"])
        maps = cams(run, images, cameras, wanted)
        for row, number in zip(view["overlays"][0]["query"], view["overlays"][0]["thumb"]):
            own = thumbnails.small(read_image(view["path"][row]))
            grid = Image.fromarray(maps[row]).resize(own.size, Image.Resampling.BILINEAR)
            drawn = Image.fromarray((255 * overlay(np.asarray(own)[None] / 255, np.asarray(grid)[None])[0]).astype(np.uint8))
            wanted_picture = picture({"pictures": [thumbnails.encoded(drawn)]}, 0)
            found = picture(data, number)
            assert found.shape == wanted_picture.shape and np.abs(found - wanted_picture).mean() < 2
    assert np.ptp(maps) > 0.5
    for folder, most in ((bound, 0), (plain, 3)):  # none are wanted; no run of the method is beside it
        overlays, payload = looked(folder, most=most)
        assert overlays == [] and not payload["unseen"]


def test_what_is_missing_for_gradcam_is_said(gradcam, looking_runs, tmp_path, monkeypatch, capsys):
    data, bound, _ = looking_runs
    moved = data.rename(data.with_name("moved"))
    try:
        _, found = written(tmp_path / "r.html", bound)
    finally:
        moved.rename(data)
    assert found["views"][0]["overlays"] == [] and found["pictures"] == []
    (note,) = found["views"][0]["unseen"]
    assert note.startswith("where the network looks: the image '") and note.endswith("is not there.")
    assert note.split("'")[0] in (tmp_path / "r.html").read_text(encoding="utf-8")
    run = tmp_path / "run"
    shutil.copytree(bound, run)
    shutil.rmtree(run / "stage1")
    (note,) = looked(run)[1]["unseen"]
    assert note.startswith("where the network looks: ") and "stage1" in note
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    (note,) = looked(bound)[1]["unseen"]
    assert "pip install grad-cam" in note


def test_covered_queries_are_scored_once(looking_runs, tmp_path, monkeypatch):
    _, bound, _ = looking_runs
    folder = tmp_path / "run"
    shutil.copytree(bound, folder)
    out = tmp_path / "r.html"
    metrics = json.loads((folder / "metrics.json").read_text())
    target = metrics["rows"][0]["target"]
    page, data = written(out, folder, "--measure", "--overlays", 0)
    (kept,) = [json.loads(path.read_text()) for path in (folder / "occlusion").iterdir()]
    assert not data["views"][0]["unseen"] and kept["fractions"] == list(looks.FRACTIONS)
    assert kept["mAP"][0] == pytest.approx(metrics["rows"][0]["mAP"], abs=1e-6)
    curve = stress_test({"run": [folder]}, fractions=kept["fractions"], target=target)[1][0]
    assert kept["mAP"] == pytest.approx(curve.mAP[0], abs=1e-6) and kept["rank1"] == pytest.approx(curve.rank1[0], abs=1e-6)
    assert len(set(kept["mAP"])) > 2
    cells, text = tables(out.read_text(encoding="utf-8"), "Queries covered by blocks of random colours")
    assert cells == [value for pair in zip(kept["mAP"], kept["rank1"]) for value in pair]
    assert all(f">{100 * value:.1f}<" in text for value in cells)
    subject = read_subject(folder)
    run, features = subject.opening.run, subject.targets[target].data

    def fail(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(run.features, "bank", fail)
    assert looks.covered_scores(run, target, features) == kept
    with pytest.raises(AssertionError):  # other features are measured again
        other = TestFeatures(features.query, features.gallery.take(np.arange(len(features.gallery) - 1)))
        looks.covered_scores(run, target, other)
    part = looks.covered_scores(run, target, features, fractions=(0.0,), most=5)
    assert (part["queries"], part["of"]) == (5, len(features.query))


# --- samples of several images --------------------------------------------------------------------------------------------
def test_modalities_are_pictures_of_their_own(vehicle_run, tmp_path):
    page, data = written(tmp_path / "r.html", vehicle_run)
    view = data["views"][0]
    assert view["views"] == {"names": ["R", "N", "T"], "stacked": True} and not view["unseen"]
    for side in ("", "g"):
        strip = Image.open(view[f"{side}path"][0]).convert("RGB")
        found = picture(data, view[f"{side}thumb"][0])
        assert found.shape == (168, 112, 3)
        for place in range(3):
            cell = strip.crop((32 * place, 0, 32 * (place + 1), 16)).resize((112, 56), Image.Resampling.BILINEAR)
            assert np.abs(found[56 * place : 56 * (place + 1)] - np.asarray(cell)).mean() < 12
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    rows = [row for row in json.loads((vehicle_run / "metrics.json").read_text())["rows"] if row["method"] != "GraFT"]
    rows = [row for row in rows if row["method"].startswith("GraFT, ")]
    cells, shown = tables(text, "Tests with modalities missing")
    assert cells == [value for row in rows for value in (row["mAP"], row["cmc"]["1"], row["mAP"] - rows[0]["mAP"])]
    assert len(rows) == 3 and "N+T (without R)" in shown and "mAP against R+N+T" in shown
    assert all(f">{100 * value:.1f}<" in shown for value in cells)
    headlines = [own["data-value"] for tag, own in page.tags if tag == "b" and own.get("data-metric") == "mAP"]
    assert headlines == [str(rows[0]["mAP"])]  # a question to the run is no result of it


def test_tests_with_modalities_missing_have_lists_of_their_own(vehicle_run):
    (target,) = read_subject(vehicle_run).targets.values()
    rows = json.loads((vehicle_run / "metrics.json").read_text())["rows"]
    assert [one.row.method for one in target.scored] == [
        "GraFT, R+N+T",
        "+ average query expansion",
        "GraFT, R (without N, T)",
        "GraFT, N+T (without R)",
    ]
    assert [one.aside for one in target.scored] == [False, False, True, True]
    for row in rows:
        assert np.nanmean(target.find(row).result.ap) == pytest.approx(row["mAP"], abs=1e-6)
    bank = torch.load(vehicle_run / "bank" / "rgbnt100-R-query.pt", weights_only=True)
    assert torch.equal(target.scored[2].query, bank["features"])


def test_the_table_of_trainings_beside_a_run(vehicle_run, tmp_path, capsys):
    folder = tmp_path / "default-seed1"
    shutil.copytree(vehicle_run, folder)
    records = [
        {
            "title": title,
            "target": "rgbnt100",
            "mean": {"mAP": score, "1": score / 2},
            "seeds": [1, 2],
            "runs": [f"x/{name}"],
        }
        for title, score, name in (("R", 0.25, "R-seed1"), ("R+N+T", 0.75, "default-seed1"))
    ]
    write_json(tmp_path / "modalities.json", {"records": records})
    metrics = json.loads((folder / "metrics.json").read_text())
    _, found = modality_tables(folder, metrics)
    assert found.title == "Trained on fewer modalities, means over 2 seeds" and found.target == "rgbnt100"
    assert found.columns == ("trained on", "mAP", "R1", "mAP against R+N+T")
    assert found.rows == [("R", 0.25, 0.125, -0.5), ("R+N+T", 0.75, 0.375, 0.0)]
    write_json(tmp_path / "modalities.json", {"records": records[:1]})  # another run's
    assert [table.title for table in modality_tables(folder, metrics)] == ["Tests with modalities missing"]
    (tmp_path / "modalities.json").write_text("{")
    assert main(["report", str(folder), "--out", str(tmp_path / "r.html")]) == 2
    assert "modalities.json' is damaged" in capsys.readouterr().err


def test_several_pictures_become_one():
    wide = [Image.new("RGB", (64, 32), colour) for colour in ("red", "lime")]
    tall = [Image.new("RGB", (10, 40), colour) for colour in ("red", "lime", "blue")]
    assert thumbnails.is_stacked(wide) and not thumbnails.is_stacked(tall)
    found = np.asarray(thumbnails.sheet(wide))
    assert found.shape == (112, 112, 3) and (found[:56] == (255, 0, 0)).all() and (found[56:] == (0, 255, 0)).all()
    found = np.asarray(thumbnails.sheet(tall))
    assert found.shape == (112, 84, 3) and (found[:, 56:] == (0, 0, 255)).all() and (found[:, :28] == (255, 0, 0)).all()
