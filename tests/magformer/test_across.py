"""One recipe on many data sets, by the real command."""

import json

import numpy as np
import pytest
import yaml

from relreid_plugin.cli.tables import RELATIONS
from relreid_plugin.errors import UserError
from relreid_plugin.magformer.across import Place, across_markdown, configured, places

SHORT = {
    "model": {"name": "features"},
    "data": {"type": "features", "workers": 0},
    "train": {"stages": [2], "val_fraction": 0.0, "batch_size": 16},
    "test": {"dist_metric": "cosine"},
    "relation": {"attention": "magformer", "select": {"folds": 2, "identities": 8, "images": 60}},
}


def write_features(path, images, *, seed):
    """Features of 24 identities with ``images`` images each, in two cameras, half of the identities trained on."""
    draw = np.random.default_rng(seed)
    pids = np.arange(24 * images) % 24
    features = draw.normal(size=(24, 16))[pids] + 0.9 * draw.normal(size=(len(pids), 16))
    camids = np.arange(len(pids)) // 24 % 2
    splits = np.where(pids < 12, "train", np.where(camids == 0, "query", "gallery"))
    np.savez(path, features=features.astype(np.float32), pids=pids, camids=camids, splits=splits)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("across")
    write_features(folder / "many.npz", 8, seed=0)
    write_features(folder / "pairs.npz", 2, seed=1)
    (folder / "short.yml").write_text(yaml.safe_dump(SHORT))
    sets = [f"{folder / 'short.yml'}={folder / name}" for name in ("many.npz", "pairs.npz")]
    assert not RELATIONS.main([*sets, "--seeds", "1", "--rivals", "aqe,rerank", "--out", str(folder / "out")])
    return folder / "out"


def test_every_set_has_a_line_with_the_numbers_of_its_own_ladder(table):
    found = json.loads((table / "relations.json").read_text())
    assert [row["set"] for row in found["rows"]] == ["many", "pairs"]
    for row in found["rows"]:
        ladder = json.loads((table / row["set"] / "ladder.json").read_text())
        assert "recipe: held-out" in ladder["config"]
        plain = {
            one["features"]: one["mean"] for one in ladder["rows"] if one["protocol"] == "inductive" and not one["rival"]
        }
        for features in ("image model", "control", "own"):
            assert row[features] == {key: plain[features][key] for key in ("mAP", "1")}
        verdict = ladder["verdicts"][0]
        assert (
            row["gain"] == verdict["gain"] and row["inductive"] == verdict["inductive"] and row["floor"] == verdict["floor"]
        )
        assert f"{100 * row['own']['mAP']:.1f} / {100 * row['own']['1']:.1f}" in found["table"]
    assert (table / "relations.md").read_text() == found["table"] + "\n"


def test_counts_below_the_table_are_those_of_its_lines():
    one = {"mAP": 0.5, "1": 0.6}
    up, down = {"mean": 0.02, "low": 0.01, "high": 0.03}, {"mean": -0.02, "low": -0.03, "high": 0.01}
    row = {"set": "a", "target": "a", "network": "n", "image model": one, "control": one, "own": one, "gain": up}
    rows = [
        {**row, "inductive": (up, "best"), "reranked": None, "floor": (0.02, 0.0), "harmless": True},
        {**row, "inductive": (down, "best"), "reranked": (up, "other"), "floor": (-0.02, -0.011), "harmless": False},
    ]
    text = across_markdown(rows)
    assert "1 of 2 above the best inductive row without relations, 1 of 2 above the best re-ranked control; 1 harmed" in text
    assert "+2.0 [+1.0, +3.0] (best)" in text and "-2.0 [-3.0, +1.0] n.s. (best)" in text and "-2.0 mAP, -1.1 R1" in text


def test_a_set_is_a_configuration_or_one_with_data_and_weights(tmp_path):
    assert places(["a/one.yml", "one.yml=x/cuhk", "one.yml=viper.csv"]) == [
        Place("one", "a/one.yml"),
        Place("cuhk", "one.yml", "x/cuhk"),
        Place("viper", "one.yml", "viper.csv"),
    ]
    with pytest.raises(UserError, match="x/cuhk.*'cuhk'"):
        places(["one.yml=x/cuhk", "two.yml=y/cuhk"])
    own, given = places(["magformer_embedded.yml", f"magformer_recipe.yml={tmp_path}"])
    cfg = configured(own, tmp_path, weights="w.pth", overrides=["relation.k", "7"])
    assert cfg.model.load_weights == "" and cfg.relation.recipe == "held-out" and cfg.relation.k == 7
    assert cfg.data.sources == ["embedded_persons"] and cfg.relation.train.max_epoch == 0
    cfg = configured(given, tmp_path, weights="w.pth", overrides=[])
    assert cfg.model.load_weights == "w.pth" and cfg.data.targets == [str(tmp_path)]
    assert cfg.data.save_dir == str(tmp_path / tmp_path.name)
