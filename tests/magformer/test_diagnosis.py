"""What relations have to work with: neighbours, attention and oracles against loops, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from relreid_plugin.cli.diagnose import DIAGNOSE
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import FeatureSet, TestFeatures
from relreid_plugin.magformer.attention import RelationAttentionOutput
from relreid_plugin.magformer.cameras import CameraRule
from relreid_plugin.magformer.diagnosis import (
    GALLERY,
    QUERIES,
    Part,
    as_part,
    attention_statistics,
    diagnose,
    neighbour_statistics,
    reach,
    refine,
    true_means,
)
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.search import StoreWriter

DIM = 12


def scene(identities=6, images=7, *, seed=0, noise=0.9, unknown=0):
    rng = np.random.default_rng(seed)
    centers, strips = np.random.default_rng(5).standard_normal((identities, DIM)), rng.standard_normal((3, DIM))
    pids = np.repeat(np.arange(identities), images)
    camids = np.tile(np.arange(images) % 3, identities)
    values = centers[pids] + 0.7 * strips[camids] + noise * rng.standard_normal((len(pids), DIM))
    pids[: unknown * 5 : 5] = -1
    return FeatureSet(torch.from_numpy(values).float(), pids, camids, [])


QUERY, SHOWN = scene(images=3, seed=1, unknown=1), scene(seed=2, unknown=2)
DATA = TestFeatures(QUERY, SHOWN)


def make_encoder(**options):
    torch.manual_seed(2)
    given = {"num_layers": 2, "k": 5, "init": "diffusion", **options}
    encoder = RelationEncoder(DIM, 3, **given)
    with torch.no_grad():
        for value in encoder.parameters():
            if value.dim() > 1:
                value += 0.2 * torch.randn_like(value)
    return encoder.eval()


def naive(attending, gallery, k, itself):
    """Counts by loops in float64."""
    unit = [one.features.double().numpy() for one in (attending, gallery)]
    x, z = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in unit)
    nearest = []
    for row in range(len(x)):
        order = [other for other in np.argsort(-(z @ x[row]), kind="stable") if not (itself and other == row)]
        nearest.append(order[:k])
    among = [[other for other in np.argsort(-(z @ z[row]), kind="stable") if other != row][:k] for row in range(len(z))]
    counts = {name: [] for name in ("nearest", "reciprocal")}
    matches, found = [], {name: [] for name in counts}
    for row in range(len(x)):
        if attending.pids[row] < 0:
            continue
        true = {
            other for other in range(len(z)) if gallery.pids[other] == attending.pids[row] and not (itself and other == row)
        }
        matches.append(true)
        for name in counts:
            kept = nearest[row]
            if name == "reciprocal":
                last = {other: z[among[other][-1]] @ z[other] for other in kept}
                kept = [other for other in kept if (row in among[other] if itself else z[other] @ x[row] > last[other])]
            own = attending.camids[row]
            kinds = [(other in true, gallery.camids[other] != own) for other in kept]
            counts[name] += kinds
            found[name].append(len(true & set(kept)))
    return matches, counts, found


@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("itself", [False, True])
def test_neighbours_are_counted(k, itself):
    attending = SHOWN if itself else QUERY
    matches, counts, found = naive(attending, SHOWN, k, itself)
    got = neighbour_statistics(attending, SHOWN, k=k, itself=itself)
    assert got["images"] == len(matches) and got["k"] == k
    assert got["matches"] == pytest.approx(np.mean([len(true) for true in matches]))
    for name, kinds in counts.items():
        assert got[f"{name}_kept"] == pytest.approx(len(kinds) / len(matches))
        for true, word in ((True, "true"), (False, "false")):
            for other, where in ((True, "other"), (False, "same")):
                share = sum(kind == (true, other) for kind in kinds) / len(kinds)
                assert got[f"{name}_{word}_{where}"] == pytest.approx(share), (name, word, where)
        assert got[f"{name}_true"] == pytest.approx(sum(kind[0] for kind in kinds) / len(kinds))
        assert got[f"{name}_found"] == pytest.approx(sum(found[name]) / sum(map(len, matches)))
        with_matches = [hits for hits, true in zip(found[name], matches) if true]
        assert got[f"{name}_none"] == pytest.approx(np.mean([hits == 0 for hits in with_matches]))
    assert 0 < got["reciprocal_kept"] < k and got["reciprocal_true"] >= got["nearest_true"] - 0.05


def test_matches_are_counted_by_camera():
    got = neighbour_statistics(SHOWN, SHOWN, k=3, itself=True)
    own, other, total = [], [], []
    for row in np.flatnonzero(SHOWN.pids >= 0):
        same = (SHOWN.pids == SHOWN.pids[row]) & (np.arange(len(SHOWN)) != row)
        total.append(same.sum())
        own.append((same & (SHOWN.camids == SHOWN.camids[row])).sum())
        other.append(total[-1] - own[-1])
    assert got["matches_other"] == pytest.approx(np.mean(other))
    hits = {name: got[f"nearest_true_{name}"] * 3 * len(total) for name in ("other", "same")}
    assert got["nearest_found_other"] == pytest.approx(hits["other"] / sum(other))
    assert got["nearest_found_same"] == pytest.approx(hits["same"] / sum(own))
    lone = FeatureSet(torch.eye(3), np.arange(3), np.zeros(3, int), [])
    assert neighbour_statistics(lone, lone, k=2, itself=True)["alone"] == 1.0
    with pytest.raises(UserError, match="no neighbours"):
        neighbour_statistics(lone, FeatureSet(torch.eye(3)[:1], np.zeros(1, int), np.zeros(1, int), []), k=1, itself=True)


def test_attention_is_measured():
    weights = torch.tensor([[[0.5, 0.25, 0.25, 0.0]], [[0.8, -0.2, 0.9, 0.9]]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    true = torch.tensor([[False, True, False, True], [False, False, True, True]])
    own = torch.tensor([[True, False, False, False]] * 2)
    got = attention_statistics(RelationAttentionOutput(weights, weights, weights, mask, mask), true, own)
    entropies = [-(0.5 * math.log(0.5) + 0.5 * math.log(0.25)), -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))]
    assert got["entropy"] == pytest.approx((entropies[0] / math.log(3) + entropies[1] / math.log(2)) / 2)
    assert got["divergence"] == pytest.approx((math.log(3) - entropies[0] + math.log(2) - entropies[1]) / 2)
    wanted = {"kept": 1.5, "itself": 0.65, "true": 0.125, "false": 0.225, "negative": 0.1}
    wanted |= {"uniform_itself": (1 / 3 + 1 / 2) / 2, "uniform_true": 1 / 6, "uniform_false": (1 / 3 + 1 / 2) / 2}
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


ENCODERS = {
    "paper": {},
    "recipe": {
        "block": "average",
        "neighbours": "camera",
        "rule": CameraRule(3, 2, 1, 0.3, 0.2),
        "residual": 0.5,
        "head": True,
    },
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_encoder_is_watched_and_left_as_it_is(kind):
    encoder = make_encoder(**ENCODERS[kind])
    states = encoder.refine_gallery(SHOWN.features, SHOWN.camids)
    found = refine(encoder, DATA)
    assert (found.gallery - states.refined).abs().max() < 1e-6
    wanted = encoder.refine_queries(QUERY.features, states, QUERY.camids)
    assert (found.query - wanted).abs().max() < 1e-6
    assert len(found.layers) == 2
    for layer in found.layers:
        for of in (QUERIES, GALLERY):
            assert layer[of]["itself"] + layer[of]["true"] + layer[of]["false"] == pytest.approx(1.0, abs=1e-5)
            assert layer[of]["true"] > 0.05 and layer[of]["false"] > 0.01
    best = refine(encoder, DATA, oracle=True)
    assert all(layer[of]["false"] == 0 < layer[of]["true"] for layer in best.layers for of in (QUERIES, GALLERY))
    maps = encoder.attention_maps(SHOWN.features, SHOWN.camids)
    own = maps[0].index == torch.arange(len(SHOWN)).unsqueeze(1)
    true = torch.from_numpy((SHOWN.pids[maps[0].index] == SHOWN.pids[:, None]) & (SHOWN.pids[:, None] >= 0))
    assert attention_statistics(maps[0], true & ~own, own) == pytest.approx(found.layers[0][GALLERY], abs=1e-5)


def test_oracles_reach_further():
    rows, layers = reach(Part("x", DATA, make_encoder()), k=6)
    assert len(layers) == 2 and list(rows)[0] == "alone"
    plain = rows["mean of reciprocal neighbours"]["mAP"]
    best = rows["oracle: mean of true neighbours"]["mAP"]
    assert rows["alone"]["mAP"] < best < 1 and plain < best
    assert rows["encoder"]["mAP"] < rows["oracle: encoder, true neighbours only"]["mAP"]
    means = true_means(SHOWN.features, SHOWN)
    for pid in range(6):
        own = SHOWN.pids == pid
        center = SHOWN.features[own].sum(dim=0)
        assert torch.allclose(means[own], (center / center.norm()).expand(own.sum(), DIM), atol=1e-6)
    assert torch.equal(means[SHOWN.pids < 0], SHOWN.features[SHOWN.pids < 0])
    assert "encoder" not in reach(Part("x", DATA), k=6)[0]
    with pytest.raises(UserError, match="affinity"):
        refine(make_encoder(neighbours="affinity"), DATA)


def test_the_mean_is_that_of_itself_and_its_neighbours():
    x, z = (one.features.double().numpy() for one in (QUERY, SHOWN))
    x, z = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (x, z))
    among = [np.argsort(-(z @ row), kind="stable")[:7] for row in z]  # itself first

    def averaged(row, own, of):
        listed = of[1:] if own is not None else of[:6]
        kept = [j for j in listed if (own in among[j] if own is not None else z[j] @ row > z[j] @ z[among[j][-1]])]
        total = row + z[kept].sum(axis=0)
        return total / np.linalg.norm(total)

    gallery = np.stack([averaged(row, number, among[number]) for number, row in enumerate(z)])
    query = np.stack([averaged(row, None, np.argsort(-(z @ row), kind="stable")) for row in x])
    from relreid_plugin.magformer.diagnosis import _scores

    wanted = _scores(torch.from_numpy(query).float(), torch.from_numpy(gallery).float(), DATA)
    assert reach(Part("x", DATA), k=6)[0]["mean of reciprocal neighbours"] == pytest.approx(wanted)


def test_labelled_features_are_divided():
    part = as_part("training", SHOWN)
    assert (len(part.data.query), len(part.data.gallery)) == (18, 22) and -1 not in part.data.gallery.pids
    result = diagnose([part, Part("test", DATA)], ks=[5, 3])
    assert [entry["name"] for entry in result["parts"]] == ["training", "test"]
    assert [(found["k"], found["of"]) for found in result["parts"][1]["neighbours"]] == [
        *((5, QUERIES), (5, GALLERY), (3, QUERIES), (3, GALLERY))
    ]
    assert result["parts"][0]["identities"] == 6
    lone = FeatureSet(torch.eye(3), np.arange(3), np.zeros(3, int), [])
    with pytest.raises(UserError, match="'x': no identity has images for queries and for the gallery"):
        as_part("x", lone)


# --- command ----------------------------------------------------------------------------------------------------------


def test_a_run_is_diagnosed(tiny_run, tmp_path, capsys):
    assert DIAGNOSE.main([str(tiny_run), "--out", str(tmp_path / "d")]) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    assert [entry["name"] for entry in result["parts"]] == ["training", "held-out", "embedded_persons_tiny"]
    assert all(len(entry["attention"]) == 2 for entry in result["parts"]) and result["k"] == [4]
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    row = next(row for row in metrics["rows"] if row["method"] == "+ MagFormer" and row["protocol"] == "inductive")
    assert result["parts"][2]["reach"]["encoder"]["mAP"] == pytest.approx(row["mAP"], abs=1e-6)
    assert (tmp_path / "d" / "diagnosis.md").read_text() in said + "\n" and "| held-out (2) | queries | 4 |" in said
    assert Image.open(tmp_path / "d" / "diagnosis.png").size[0] > 600


KEYS = ("features", "pids", "camids")


def test_features_in_stores_and_files_are_diagnosed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, part in (("query", QUERY), ("gallery", SHOWN)):
        with StoreWriter(name, dim=DIM) as writer:
            writer.add(part.features, part.pids, part.camids)
    assert DIAGNOSE.main(["query", "--gallery", "gallery", "--train", "gallery", "-k", "4,2"]) == 0
    assert "note: 1 of 18 images of 'query' have no identity and are left out" in capsys.readouterr().out
    result = json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())
    assert [entry["name"] for entry in result["parts"]] == ["training", "query"] and result["k"] == [4, 2]
    wanted = neighbour_statistics(QUERY, SHOWN, k=2)
    assert result["parts"][1]["neighbours"][2] == pytest.approx({"of": QUERIES, **wanted})
    assert result["parts"][1]["attention"] == [] and "attention" not in (tmp_path / "diagnosis/diagnosis.md").read_text()
    assert DIAGNOSE.main(["gallery"]) == 0
    arrays = {f"{name}_{key}": getattr(part, key) for name, part in (("query", QUERY), ("gallery", SHOWN)) for key in KEYS}
    np.savez("both.npz", **arrays)
    assert DIAGNOSE.main(["both.npz", "-k", "4,2", "--out", "npz"]) == 0
    again = json.loads((tmp_path / "npz" / "diagnosis.json").read_text())["parts"]
    assert [entry["name"] for entry in again] == ["both.npz"] and again[0]["neighbours"] == result["parts"][1]["neighbours"]
    capsys.readouterr()
    for words, sentence in (
        (["nothing"], "'nothing' does not exist"),
        (["query", "--target", "x"], "--target belongs to a run"),
        (["query", "-k", "0"], "-k takes different numbers"),
        (["query", "--out", "query/store.json"], "is a file; name a folder"),
    ):
        assert DIAGNOSE.main(words) == 2
        error = capsys.readouterr().err
        assert sentence in error and len(error.splitlines()) == 1
