"""Search re-ranked by every rival: each query alone with its candidates, cameras as the store numbers them, the command."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from conftest import MARKET
from PIL import Image
from test_search import DIM, clusters, make_encoder

from relreid_plugin.cli.search import RIVALS, SEARCH
from relreid_plugin.errors import UserError
from relreid_plugin.metrics.camera_jaccard import camera_jaccard_rerank
from relreid_plugin.metrics.diffusion import diffusion_scores
from relreid_plugin.metrics.expansion import average_query_expansion, database_augmentation
from relreid_plugin.metrics.graph import gnn_rerank, graph_convolution
from relreid_plugin.metrics.neighbours import normalise
from relreid_plugin.metrics.reranking import k_reciprocal_rerank_features
from relreid_plugin.metrics.rivals import RIVALS as TABLE
from relreid_plugin.search import FeatureExtractor, FeatureStore, GallerySearcher, StoreWriter
from relreid_plugin.search.written import camera_numbers, query_cameras

GALLERY, QUERIES, WIDE = clusters(8, seed=1), clusters(2, seed=2), 40
CAMERAS = np.arange(len(GALLERY)) // 15 % 3
ASKED = np.arange(len(QUERIES)) // 15 % 2
SETTINGS = {
    "aqe": {"k": 4},
    "aqe-alpha": {"k": 6, "alpha": 2.0},
    "rerank": {"k1": 8, "k2": 3},
    "gnn": {"k1": 7, "k2": 3},
    "gcr": {"k1": 6},
    "cajaccard": {"k1_inter": 6},
    "nfc": {"k1": 3},
    "diffusion": {"k": 8, "k_query": 4},
}


def store_of(folder, features=GALLERY, camids=CAMERAS, paths=None):
    with StoreWriter(folder, dim=DIM, chunk_rows=32) as writer:
        writer.add(features, np.arange(len(features)) % 15, camids, paths)
    return FeatureStore(folder)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory):
    return GallerySearcher(store_of(tmp_path_factory.mktemp("rivals") / "s"))


def cosine(query, gallery):
    return 1 - normalise(query).double() @ normalise(gallery).double().t()


DIRECT = {  # the methods' own functions, not the table of rivals
    "aqe": lambda q, g, own, theirs, **s: cosine(average_query_expansion(q, g, **s), database_augmentation(g, **s)),
    "rerank": lambda q, g, own, theirs, **s: torch.from_numpy(k_reciprocal_rerank_features(q, g, **s)),
    "gnn": lambda q, g, own, theirs, **s: gnn_rerank(q, g, **s),
    "gcr": lambda q, g, own, theirs, **s: cosine(*graph_convolution(q, g, query_cameras=own, gallery_cameras=theirs, **s)),
    "cajaccard": lambda q, g, own, theirs, **s: torch.from_numpy(camera_jaccard_rerank(q, g, own, theirs, **s)),
    "diffusion": lambda q, g, own, theirs, **s: -diffusion_scores(q, g, **s),
}
DIRECT["aqe-alpha"] = DIRECT["aqe"]


def alone(searcher, number, name, protocol=None):
    """Rows and scores of one query by the method on it and its candidates alone."""
    query = normalise(QUERIES[number : number + 1])
    gallery = searcher.store.read()
    rows = np.sort(np.argsort(cosine(query, gallery)[0].numpy(), kind="stable")[:WIDE])
    own, theirs = ASKED[number : number + 1], CAMERAS[rows]
    more = {} if protocol is None else {"protocol": protocol}
    if name in DIRECT:
        distances = DIRECT[name](query, gallery[rows], own, theirs, **SETTINGS[name], **more)[0].numpy()
    else:
        distances = TABLE[name].distances(query, gallery[rows], **SETTINGS[name], **more)[0].numpy()
    order = np.argsort(distances, kind="stable")
    return rows[order], 1 - distances[order]


@pytest.mark.parametrize("name", RIVALS)
def test_a_query_is_alone_with_its_candidates(searcher, name):
    result = searcher.search(QUERIES, 10, camids=ASKED, rerank=WIDE, by=name, settings=SETTINGS[name])
    for number in (0, 7, 22):
        rows, scores = alone(searcher, number, name)
        np.testing.assert_allclose(result.scores[number].numpy(), scores[:10], rtol=5e-6, atol=2e-6)
        assert len(set(result.rows[number].tolist()) ^ set(rows[:10])) <= 2  # near-ties at the end may flip
        single = searcher.search(
            QUERIES[number : number + 1],
            10,
            camids=ASKED[number : number + 1],
            rerank=WIDE,
            by=name,
            settings=SETTINGS[name],
        )
        assert torch.equal(single.scores[0], result.scores[number]) and torch.equal(single.rows[0], result.rows[number])
    plain = searcher.search(QUERIES, 10)
    assert not torch.equal(result.rows, plain.rows)
    default = searcher.search(QUERIES, 10, camids=ASKED, rerank=WIDE, by=name)
    assert not torch.equal(result.scores, default.scores)  # the settings act


@pytest.mark.parametrize("name", [name for name, rival in TABLE.items() if len(rival.protocols) > 1])
def test_the_protocol_is_the_one_asked_for(searcher, name):
    found = []
    for protocol in TABLE[name].protocols:
        named = {"rerank": WIDE, "by": name, "protocol": protocol, "settings": SETTINGS[name]}
        found.append(searcher.search(QUERIES[:4], 8, camids=ASKED[:4], **named).scores)
        np.testing.assert_allclose(found[-1][3].numpy(), alone(searcher, 3, name, protocol)[1][:8], rtol=5e-6, atol=2e-6)
    assert not torch.equal(*found)
    published = searcher.search(QUERIES[:4], 8, camids=ASKED[:4], rerank=WIDE, by=name, settings=SETTINGS[name])
    assert torch.equal(published.scores, found[0])


def test_relations_are_re_ranked_after_the_encoder(tmp_path):
    encoder = make_encoder()
    searcher = GallerySearcher(store_of(tmp_path / "s"), encoder=encoder)
    result = searcher.search(QUERIES[:3], 5, rerank=20, by="nfc")
    query, refined = searcher.refine_queries(QUERIES[:3]), searcher.states.refined.read()
    for number in range(3):
        rows = torch.argsort(refined.double() @ query[number].double(), descending=True, stable=True)[:20].sort().values
        wanted = TABLE["nfc"].distances(query[number : number + 1], refined[rows])
        np.testing.assert_allclose(result.scores[number].numpy(), 1 - wanted[0].sort().values[:5].numpy(), atol=1e-6)


def test_cameras_that_are_unknown(searcher, tmp_path, capsys):
    with pytest.raises(UserError, match="'cajaccard' re-ranks by cameras, which are unknown for 30 of 30 queries"):
        searcher.search(QUERIES, rerank=20, by="cajaccard")
    some = ASKED.copy()
    some[4] = -1
    with pytest.raises(UserError, match="unknown for 1 of 30 queries"):
        searcher.search(QUERIES, rerank=20, by="cajaccard", camids=some)
    holes = CAMERAS.copy()
    holes[::2] = -1
    with pytest.raises(UserError, match="unknown for"):
        GallerySearcher(store_of(tmp_path / "s", camids=holes)).search(QUERIES, rerank=20, by="cajaccard", camids=ASKED)
    capsys.readouterr()
    mixed = searcher.search(QUERIES, 10, rerank=WIDE, by="gcr", camids=some)
    assert "'gcr' re-ranks 1 of 30 queries without cameras" in capsys.readouterr().out
    known = searcher.search(QUERIES, 10, rerank=WIDE, by="gcr", camids=ASKED)
    none = searcher.search(QUERIES, 10, rerank=WIDE, by="gcr")
    assert torch.equal(mixed.scores[:4], known.scores[:4]) and torch.equal(mixed.scores[4], none.scores[4])
    assert not torch.equal(known.scores, none.scores)


def test_mistakes_are_said(searcher):
    for options, words in (
        ({"rerank": 20, "by": "gccr"}, "rival 'gccr' is unknown; did you mean 'gcr'"),
        ({"rerank": 20, "by": "gcr", "settings": {"k3": 2}}, "no setting 'k3'"),
        ({"rerank": 20, "by": "aqe", "protocol": "transductive"}, "no protocol 'transductive'"),
        ({"settings": {"k1": 20}}, "need 'rerank'"),
        ({"rerank": 20, "camids": [1, 2]}, "one camera for each of the 30 queries"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            searcher.search(QUERIES, **options)


def test_few_candidates_and_empty_slots(tmp_path):
    searcher = GallerySearcher(store_of(tmp_path / "s", GALLERY[:3], CAMERAS[:3]))
    for name in RIVALS:
        result = searcher.search(QUERIES[:2], 9, camids=ASKED[:2], rerank=50, by=name)
        assert result.rows.shape == (2, 3) and sorted(result.rows[0].tolist()) == [0, 1, 2]


# --- cameras as written -----------------------------------------------------------------------------------------------


def test_cameras_of_queries_are_those_of_the_store(tmp_path):
    paths = [f"{row:04d}_c{camera + 1}s1_1.jpg" for row, camera in enumerate(CAMERAS)]
    by_number = store_of(tmp_path / "a", paths=paths)  # as a data set counts them: from 0
    assert camera_numbers(by_number) == {1: 0, 2: 1, 3: 2}
    asked = ["0001_c3s1_1.jpg", "0001_c1s1_1.jpg", "holiday.jpg", "0001_c9s1_1.jpg", "0002_c9s1_1.jpg"]
    assert query_cameras(by_number, asked).tolist() == [2, 0, -1, 9, 9]
    assert query_cameras(by_number, ["0001_c0s1_1.jpg"]).tolist() == [3]  # 0 is another camera's number in the store
    by_name = store_of(tmp_path / "b", camids=[int(camera) + 1 for camera in CAMERAS], paths=paths)
    assert query_cameras(by_name, asked[:3]).tolist() == [3, 1, -1]
    assert query_cameras(store_of(tmp_path / "c", camids=None, paths=paths), asked).tolist() == [-1] * 5
    assert query_cameras(store_of(tmp_path / "d"), asked).tolist() == [-1] * 5  # names that say nothing
    mixed = [paths[0], *paths[:-1]]
    with pytest.raises(UserError, match=r"do not say the cameras that it holds \(its camera 0 is written 1, 3\)"):
        query_cameras(store_of(tmp_path / "e", paths=mixed), asked)


# --- command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def album(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("album") / "store"
    extractor = FeatureExtractor(tiny_run)
    return extractor.store(folder, extractor.test_records("embedded_persons_tiny")).folder


def test_command(tiny_run, tiny_root, album, tmp_path, capsys, monkeypatch):
    real, asked = GallerySearcher.search, []
    monkeypatch.setattr(
        GallerySearcher, "search", lambda self, *args, **options: asked.append(options) or real(self, *args, **options)
    )
    query = sorted((tiny_root / "embedded_persons_tiny" / MARKET / "query").glob("*.jpg"))[0]
    words = [str(tiny_run), str(album), str(query), "-k", "4", "--out", str(tmp_path / "out")]
    found = {}
    for extra in (["--by", "gcr"], ["--by", "gcr", "--opts", "test.gcr.k1", "3"], ["--by", "cajaccard"], []):
        assert SEARCH.main([*words, "--rerank", "20", *extra]) == 0
        said = capsys.readouterr().out
        assert "a query's 20 best" in said and "other queries change nothing" in said and "note" not in said
        found[" ".join(extra)] = json.loads((tmp_path / "out" / "ranking.json").read_text())
    gcr = found["--by gcr"]["settings"]["reranking"]
    assert (gcr["name"], gcr["protocol"], gcr["k1"]) == ("gcr", "transductive", 15)
    assert found["--by gcr --opts test.gcr.k1 3"]["settings"]["reranking"]["k1"] == 3
    assert [options["settings"].get("k1") for options in asked] == [15, 3, None, 20]
    assert [options["by"] for options in asked] == ["gcr", "gcr", "cajaccard", "rerank"]
    assert asked[0]["camids"].tolist() == asked[2]["camids"].tolist() == [2]  # c3, which the data set counts from 0
    assert found[""]["settings"]["reranking"]["name"] == "rerank" and "k-reciprocal" in found[""]["settings"]["metric"]
    assert SEARCH.main([*words, "--rerank", "20", "--by", "gnn", "--opts", "test.rival_protocol", "inductive"]) == 0
    assert asked[-1]["protocol"] == "inductive"
    assert "inductive (it exists transductive and inductive)" in capsys.readouterr().out

    Image.open(query).save(tmp_path / "holiday.jpg")
    words[2] = str(tmp_path / "holiday.jpg")
    for extra, sentence in (
        (["--rerank", "20", "--by", "cajaccard"], "re-ranks by cameras, which are unknown for 1 of 1 queries"),
        (["--by", "gcr"], "--by belongs to --rerank"),
    ):
        assert SEARCH.main([*words, *extra]) == 2
        assert sentence in capsys.readouterr().err
    assert SEARCH.main([*words, "--rerank", "20", "--by", "gcr"]) == 0
    assert "'gcr' re-ranks 1 of 1 queries without cameras" in capsys.readouterr().out


def test_every_rival_can_be_named():
    assert tuple(TABLE) == RIVALS
