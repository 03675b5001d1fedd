"""``relreid calibrate`` on features, and searches that leave out who is not in the gallery."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch

from relreid_plugin.cli.compare import verifier_of
from relreid_plugin.cli.main import main
from relreid_plugin.errors import UserError
from relreid_plugin.features import Features, write
from relreid_plugin.features.verifier import Verifier
from relreid_plugin.search import FeatureExtractor, GallerySearcher, StoreWriter


def scene(identities=12, images=6, seed=0):
    draw = np.random.default_rng(seed)
    pids = np.repeat(np.arange(identities), images)
    rows = draw.normal(size=(identities, 8))[pids] + 0.8 * draw.normal(size=(len(pids), 8))
    return Features.of(rows, pids, np.tile(np.arange(images) % 3, identities))


def test_calibrate_writes_the_verifier_of_labelled_features(tmp_path, capsys):
    pytest.importorskip("sklearn")
    data = scene()
    query, gallery = data.take(np.arange(72) % 6 == 0), data.take(np.arange(72) % 6 != 0)
    write(query, tmp_path / "q.npz")
    write(gallery, tmp_path / "g.npz")
    write(
        Features.of(data.features, data.pids, data.camids, splits=np.where(np.arange(72) % 6 == 0, "query", "gallery")),
        tmp_path / "a.npz",
    )
    out = tmp_path / "v.json"
    assert (
        main(["calibrate", "--on", str(tmp_path / "q.npz"), str(tmp_path / "g.npz"), "--fmr", "0.05", "--out", str(out)])
        == 0
    )
    assert "threshold" in capsys.readouterr().out
    expected = Verifier.fit(query, gallery, false_match_rate=0.05)
    found = Verifier.load(out)
    assert (found.threshold, found.parameters, found.pairs) == (expected.threshold, expected.parameters, expected.pairs)
    assert (
        main(["calibrate", "--on", str(tmp_path / "a.npz"), "--fmr", "0.05", "--method", "logistic", "--out", str(out)]) == 0
    )
    assert Verifier.load(out).threshold == expected.threshold and Verifier.load(out).method == "logistic"


def test_a_verifier_is_that_of_one_model(tmp_path, capsys):
    pytest.importorskip("sklearn")
    write(dataclasses.replace(scene(), model="one"), tmp_path / "a.npz")
    assert main(["calibrate", "--on", str(tmp_path / "a.npz"), "--fmr", "0.05", "--out", str(tmp_path / "v.json")]) == 0
    capsys.readouterr()
    made = verifier_of("m", str(tmp_path / "v.json"), dim=8, model="one")
    assert made.model == "one" and not capsys.readouterr().out
    with pytest.raises(UserError, match=r"another model, or of pictures read in another way \(one, not two\)"):
        verifier_of("m", str(tmp_path / "v.json"), dim=8, model="two")
    dataclasses.replace(made, model="").save(tmp_path / "old.json")
    assert verifier_of("m", str(tmp_path / "old.json"), dim=8, model="two").threshold == made.threshold
    assert "does not say on which model's features" in capsys.readouterr().out
    with pytest.raises(UserError, match="calibrated on features of width 8"):
        verifier_of("m", str(tmp_path / "v.json"), dim=9, model="one")


def test_a_run_is_calibrated_on_its_own_features(tiny_run, tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "v.json"
    assert main(["calibrate", str(tiny_run), "--fmr", "0.2", "--out", str(out)]) == 0
    own = FeatureExtractor(str(tiny_run)).fingerprint
    assert Verifier.load(out).model == own
    foreign = dataclasses.replace(scene(), model="one")
    write(foreign, tmp_path / "a.npz")
    assert main(["calibrate", str(tiny_run), "--on", str(tmp_path / "a.npz"), "--out", str(out)]) == 2
    assert "were made by another model (one) than run" in capsys.readouterr().err
    assert Verifier.load(out).model == own


def test_calibrate_refuses_what_it_cannot_use(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write(scene(), tmp_path / "a.npz")
    for words, said in (
        ([], "name a run"),
        (["--out", "v.json"], "labelled features by --on"),
        ([str(tmp_path / "run")], "holds no run"),
        (["--on", *["a.npz"] * 3, "--out", "v.json"], "one file of features, or queries and gallery"),
        (["--on", str(tmp_path / "b.npz"), "--out", "v.json"], "b.npz"),
        (["--on", str(tmp_path / "a.npz"), "--fmr", "2", "--out", "v.json"], "--fmr"),
    ):
        with pytest.raises(SystemExit) if "2" in words else contextlib.nullcontext():
            assert main(["calibrate", *words]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "run" / "config.yml").write_text("")
    assert main(["calibrate", str(tmp_path / "run")]) == 2
    assert "held-out identities" in capsys.readouterr().err


def test_a_threshold_leaves_out_what_scores_less(tmp_path):
    rows = torch.eye(5)
    with StoreWriter(tmp_path / "s", dim=5) as writer:
        writer.add(rows, np.arange(5), np.zeros(5, int), [f"{row}.jpg" for row in range(5)])
    queries = torch.tensor([[1.0, 1, 0, 0, 0], [0.2, 1, 0.1, 0, 0], [1.0, 1, 1, 1, 1]])
    searcher = GallerySearcher(tmp_path / "s")
    plain = searcher.search(queries, 3)
    found = searcher.search(queries, 3, threshold=0.6)
    assert found.rows.tolist() == [[0, 1, -1], [1, -1, -1], [-1, -1, -1]]
    kept = found.rows >= 0
    assert torch.equal(found.scores[kept], plain.scores[kept]) and bool(torch.isinf(found.scores[~kept]).all())
    assert [len(line) for line in found.as_dicts()] == [2, 1, 0]
    assert found.pids.tolist() == [[0, 1, -1], [1, -1, -1], [-1, -1, -1]]
    from relreid_plugin.search.report import ranking_table

    assert "not in the gallery" in ranking_table(["a", "b", "c"], found).splitlines()[-1]
    json.dumps(found.as_dicts())
