"""Figures of finished runs: the numbers behind them against naive loops, and the pictures of two tiny runs."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image

pytest.importorskip("torchreid")
pytest.importorskip("sklearn")

from relreid_plugin.cli.train import main as train
from relreid_plugin.errors import UserError
from relreid_plugin.magformer import figures
from relreid_plugin.magformer.attention import RelationAttentionOutput
from relreid_plugin.magformer.stage import build_encoder
from relreid_plugin.metrics.neighbours import normalise

REPO = Path(__file__).resolve().parents[2]
NAME = "embedded_persons_tiny"


def _arguments(root: Path, folder: Path, attention: str, *, epochs: int = 1, options: tuple[str, ...] = ()) -> list[str]:
    settings = {
        "use_gpu": False,
        "model.name": "bnneck_baseline",
        "model.pretrained": False,
        "backbone.name": "torchvision:shufflenet_v2_x0_5",
        "data.height": 64,
        "data.width": 32,
        "data.workers": 0,
        "data.save_dir": folder,
        "head.feature_dim": 32,
        "train.batch_size": 16,
        "train.max_epoch": 1,
        "train.stages": "[1,2]",
        "loss.name": "composite",
        "relation.attention": attention,
        "relation.num_layers": 2,
        "relation.train.max_epoch": epochs,
        "relation.train.features_per_step": 64,
        "relation.train.steps_per_epoch": 2,
        "relation.bank.refresh": 0,
    }
    pairs = [str(word) for pair in settings.items() for word in pair]
    return ["--root", str(root / "data"), "-s", NAME, "-t", NAME, *options, *pairs]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A MALAA and a MagFormer run over the same image model."""
    root = tmp_path_factory.mktemp("figures")
    magformer, malaa = root / "magformer", root / "malaa"
    assert train(_arguments(root, magformer, "magformer")) == 0
    shutil.copytree(magformer, malaa)
    shutil.rmtree(malaa / "stage2")
    assert train(_arguments(root, malaa, "malaa", epochs=2, options=("--stage", "2"))) == 0
    return malaa, magformer


@pytest.fixture(scope="module")
def runs(folders) -> list[figures.RelationRun]:
    return figures.load_runs(list(folders))


@pytest.fixture(scope="module")
def drawn(folders, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "pictures"
    return out, figures.draw_figures(list(folders), out=out, identities=5)


def _silhouette(features: np.ndarray, labels: np.ndarray) -> float:
    """Rousseeuw's definition, one image at a time."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 1.0 - unit @ unit.T
    scores = []
    for i, label in enumerate(labels):
        same = [j for j in range(len(labels)) if labels[j] == label and j != i]
        inner = np.mean([distance[i, j] for j in same])
        outer = min(
            np.mean([distance[i, j] for j in range(len(labels)) if labels[j] == other]) for other in set(labels) - {label}
        )
        scores.append((outer - inner) / max(inner, outer))
    return float(np.mean(scores))


def _restyled(run: figures.RelationRun, **changes) -> figures.RelationRun:
    return dataclasses.replace(run, **changes)


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_pictures_and_json(drawn):
    out, numbers = drawn
    assert numbers["files"] == ["tsne.png", "attention.png", "loss.png"]
    for name in numbers["files"]:
        with Image.open(out / name) as picture:
            picture.load()
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20, name
    assert json.loads((out / "figures.json").read_text()) == numbers
    assert sorted(path.name for path in out.iterdir()) == sorted([*numbers["files"], "figures.json"])
    assert [run["label"] for run in numbers["runs"]] == ["MALAA", "MagFormer"]


def test_same_numbers_again(drawn, folders, tmp_path):
    assert figures.draw_figures(list(folders), out=tmp_path, identities=5) == drawn[1]


# --- feature space ----------------------------------------------------------------------------------------------------
def test_identities_are_the_most_frequent_queried_ones():
    gallery = np.array([0] * 9 + [7] * 3 + [4] * 5 + [5] * 3 + [6] * 2 + [8])
    query = np.array([8, 7, 5, 4, 6, 99])
    assert figures.choose_identities(gallery, query, count=3).tolist() == [4, 5, 7]
    assert figures.choose_identities(gallery, query, count=12).tolist() == [4, 5, 7, 6]
    with pytest.raises(UserError, match="--identities must be at least 2, got 1"):
        figures.choose_identities(gallery, query, count=1)
    with pytest.raises(UserError, match="has 1 queried identities"):
        figures.choose_identities(gallery, np.array([0, 8]), count=3)


def test_silhouette_of_image_and_refined_features(drawn, runs):
    space = drawn[1]["tsne"]
    assert [panel["title"] for panel in space["panels"]] == ["image model", "MALAA", "MagFormer"]
    gallery = runs[0].gallery
    rows = np.flatnonzero(np.isin(gallery.pids, space["identities"]))
    assert len(space["identities"]) == 5 and 0 not in space["identities"]
    assert space["pids"] == gallery.pids[rows].tolist()
    refined = [run.encoder.refine_gallery(run.gallery.features).refined for run in runs]
    for panel, features in zip(space["panels"], [normalise(gallery.features), *refined]):
        expected = _silhouette(features[torch.from_numpy(rows)].double().numpy(), gallery.pids[rows])
        assert panel["silhouette"] == pytest.approx(expected, abs=1e-6)
        assert np.asarray(panel["points"]).shape == (len(rows), 2) and np.isfinite(panel["points"]).all()


def test_every_image_model_gets_its_panel(runs):
    other = _restyled(runs[1], image_model="another", label="B")
    titles = [panel["title"] for panel in figures.feature_space([runs[0], other], identities=3)["panels"]]
    assert titles == ["image model of MALAA", "MALAA", "image model of B", "B"]


def test_without_scikit_learn(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        figures.feature_space(runs)


# --- attention --------------------------------------------------------------------------------------------------------
def test_attention_statistics_against_loops():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(9, 6, generator=generator) < 0.5
    mask[:, 0] = True
    mask[4, 1:] = False
    scores = 4 * torch.randn(9, 4, 6, generator=generator).masked_fill(~mask.unsqueeze(1), -math.inf)
    maps = scores.softmax(dim=2)
    weights = maps[:, 0::2] - 0.6 * maps[:, 1::2]
    output = RelationAttentionOutput(torch.empty(9, 1), weights, maps, torch.zeros(9, 6, dtype=torch.long), mask)
    edges = figures.bin_edges(float(weights.min()), float(weights.max()))
    for head, numbers in enumerate(figures.attention_statistics([output], edges=edges)[0]):
        values, entropies, ratios = [], [], []
        counts = [0] * (len(edges) - 1)
        for row in range(9):
            kept = [float(weights[row, head, slot]) for slot in range(6) if mask[row, slot]]
            size = sum(abs(value) for value in kept)
            entropy = -sum(abs(value) / size * math.log(abs(value) / size) for value in kept if value)
            entropies.append(entropy)
            if len(kept) > 1:
                ratios.append(entropy / math.log(len(kept)))
            values += kept
        for value in values:
            counts[max(i for i, edge in enumerate(edges[:-1]) if value >= edge)] += 1
        assert min(values) < 0
        assert numbers["counts"] == counts and numbers["weights"] == sum(counts) == len(values)
        assert numbers["share_above_half"] == pytest.approx(sum(value > 0.5 for value in values) / len(values))
        assert numbers["entropy"] == pytest.approx(np.mean(entropies), abs=1e-9)
        assert numbers["entropy_of_uniform"] == pytest.approx(np.mean(ratios), abs=1e-9)
        assert (numbers["min"], numbers["max"]) == (min(values), max(values))


@pytest.mark.parametrize(
    ("lowest", "highest", "first", "last"), [(0.1, 0.9, 0.0, 1.0), (-0.12, 0.4, -0.15, 1.0), (-0.1, 1.31, -0.1, 1.35)]
)
def test_bin_edges(lowest, highest, first, last):
    edges = figures.bin_edges(lowest, highest)
    assert (edges[0], edges[-1]) == (pytest.approx(first), pytest.approx(last))
    assert np.allclose(np.diff(edges), 0.05) and np.isclose(edges, 0.5).any()


def test_attention_of_runs(drawn, runs):
    attention = drawn[1]["attention"]
    plain, differential = attention["runs"]
    assert (plain["differential"], differential["differential"]) == (False, True)
    assert plain["lambda"] == [None, None]
    strengths = [block.attn.lambda_value().item() for block in runs[1].encoder.blocks]
    assert differential["lambda"] == pytest.approx(strengths)
    assert [len(heads) for heads in plain["layers"]] == [2, 2]
    x = normalise(runs[0].gallery.features)
    kept = runs[0].encoder.graph(x).mask
    assert plain["alone"] == pytest.approx(sum(int(row.sum()) == 1 for row in kept) / len(x))
    for entry in attention["runs"]:
        for heads in entry["layers"]:
            assert all(sum(head["counts"]) == head["weights"] == int(kept.sum()) for head in heads)
    table = figures.attention_table(attention).splitlines()
    assert len(table) == 1 + 2 * 2 * 2
    assert len({len(line) for line in table}) == 1
    assert f"{100 * differential['layers'][1][0]['share_above_half']:.2f}%" in table[7]


def test_the_bars_are_the_weights_of_the_encoders(drawn, runs, tmp_path, monkeypatch):
    attention, written = drawn[1]["attention"], []
    monkeypatch.setattr(figures.ckpt, "write_figure", lambda path, figure: written.append(figure))
    figures.plot_attention(attention, tmp_path / "attention.png")
    axes = iter(written[0].axes)
    edges = np.asarray(attention["edges"])
    for entry, run in zip(attention["runs"], runs):
        layers = run.encoder.attention_maps(run.gallery.features, run.gallery.camids)
        assert len(layers) == len(entry["layers"]) == 2
        for heads, layer in zip(entry["layers"], layers):
            assert len(heads) == layer.weights.shape[1] == 2
            for head, numbers in enumerate(heads):
                values = layer.weights[:, head][layer.mask].double().numpy()
                counts = np.histogram(values, bins=edges)[0]
                assert numbers["counts"] == counts.tolist() and numbers["weights"] == len(values) == counts.sum()
                assert (numbers["min"], numbers["max"]) == (values.min(), values.max())
                bars = next(axes).patches
                assert [bar.get_height() for bar in bars] == pytest.approx(100 * counts / len(values))
                assert [bar.get_x() for bar in bars] == pytest.approx(edges[:-1])
    assert next(axes, None) is None


def test_affinity_runs_have_no_attention_figure(runs, tmp_path, monkeypatch, capsys):
    run = _restyled(runs[0], encoder=build_encoder(_affinity(runs[0].cfg), dim=32, num_classes=8).eval())
    monkeypatch.setattr(figures, "load_runs", lambda folders, *, target: [run])
    numbers = figures.draw_figures([tmp_path], out=tmp_path / "out", identities=3)
    assert numbers["files"] == ["tsne.png", "loss.png"]
    assert numbers["attention"]["runs"] == [] and numbers["attention"]["skipped"] == ["MALAA"]
    assert not (tmp_path / "out" / "attention.png").exists()
    assert "no attention figure for MALAA: with affinity neighbours" in capsys.readouterr().out


def _affinity(cfg):
    cfg = cfg.clone()
    cfg.relation.neighbours = "affinity"
    return cfg


# --- loss -------------------------------------------------------------------------------------------------------------
def test_loss_curves(drawn, folders):
    loss = drawn[1]["loss"]
    assert loss["scale"] == "linear"
    for entry, folder in zip(loss["runs"], folders):
        records = json.loads((folder / "metrics.json").read_text())["history"]["stage2"]
        assert entry["epochs"] == [record["epoch"] for record in records]
        for name in ("loss", "ce", "triplet"):
            assert entry[name] == [record[name] for record in records]
    assert [len(entry["loss"]) for entry in loss["runs"]] == [2, 1]


def test_loss_scale_and_values_that_are_not_finite(runs, tmp_path):
    history = [{"epoch": i + 1, "loss": value, "triplet": 0.0} for i, value in enumerate([11.0, math.nan, 5.0, 1.0])]
    numbers = figures.loss_curves([_restyled(runs[0], history=history)])
    assert numbers["scale"] == "log"
    assert numbers["runs"][0]["loss"] == [11.0, None, 5.0, 1.0] and "ce" not in numbers["runs"][0]
    figures.plot_loss(numbers, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5000
    history[0]["loss"] = 10.0
    assert figures.loss_curves([_restyled(runs[0], history=history)])["scale"] == "linear"


# --- mistakes ---------------------------------------------------------------------------------------------------------
def test_labels_of_runs_of_one_rung(folders, tmp_path):
    copy = tmp_path / "again"
    shutil.copytree(folders[0], copy)
    assert [run.label for run in figures.load_runs([folders[0], copy])] == ["MALAA (malaa)", "MALAA (again)"]


def test_a_relation_stage_behind_others_is_found(folders, tmp_path):
    behind = tmp_path / "behind"
    shutil.copytree(folders[0], behind)
    (behind / "stage2").rename(behind / "stage3")
    with pytest.raises(UserError, match="has no stage 2"):
        figures.load_run(behind)
    shutil.copy(REPO / "configs" / "graft_magformer_embedded.yml", behind / "config.yml")
    assert figures.load_run(behind).epoch == figures.load_run(folders[0]).epoch


def test_mistakes_are_one_sentence(folders, tmp_path):
    def message(*, runs=(folders[0],), **options) -> str:
        with pytest.raises(UserError) as caught:
            figures.draw_figures(list(runs), **{"out": tmp_path / "out", **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(runs=[tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    assert "has no stage 2" in message(runs=[tmp_path / "empty"])
    assert "given twice" in message(runs=[folders[0], folders[0]])
    assert f"did you mean '{NAME}'" in message(target="embedded_person_tiny")
    (tmp_path / "file").write_text("")
    assert "is a file" in message(out=tmp_path / "file")
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    bank = other / "bank" / f"{NAME}-gallery.pt"
    stored = torch.load(bank, weights_only=True)
    torch.save({**stored, "pids": stored["pids"].flip(0)}, bank)
    assert "different galleries" in message(runs=[folders[0], other])
    torch.save({**stored, "features": stored["features"][:, :8]}, bank)
    assert "have width 8, but its stage 2 takes 32" in message(runs=[other])
    torch.save({**stored, "features": stored["features"] * math.nan}, bank)
    assert "not finite" in message(runs=[other])
    bank.write_bytes(b"no bank")
    assert "cannot be read" in message(runs=[other])
    bank.unlink()
    assert "run relreid test on it first" in message(runs=[other])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = REPO / "tools" / "figures.py"
    command = [warm.python(), str(script), str(folders[1]), "--out", str(tmp_path), "--identities", "3"]
    good = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert "mean cosine silhouette" in good.stdout and "weights > 0.5" in good.stdout
    assert (tmp_path / "tsne.png").is_file()
    main = runpy.run_path(str(script))["main"]
    assert main([str(folders[1]), "--target", "nothing"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --target 'nothing' is no test set") and len(message.splitlines()) == 1
