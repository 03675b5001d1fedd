"""Galleries in Milvus: the same answers as a store on disk, whatever is appended, deleted, filtered or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import zlib

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from test_search import BLOCK, DIM, clusters, make_encoder, make_store

from relreid_plugin.cli.main import main
from relreid_plugin.errors import UserError
from relreid_plugin.features.deleted import delete_rows
from relreid_plugin.metrics.neighbours import SearchConfig
from relreid_plugin.search import FeatureStore, GallerySearcher, StoreWriter
from relreid_plugin.search.engines import engine_of
from relreid_plugin.search.filters import Filter

pytest.importorskip("pymilvus", reason="pymilvus is not installed")
pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")

from relreid_plugin.search.milvus import MilvusStore, MilvusWriter, states
from relreid_plugin.search.milvus.copying import copy_store
from relreid_plugin.search.milvus.store import HEAD

GONE = [3, 40, 41, 119]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One embedded Milvus for the tests of this file; each has galleries of other names in it."""
    from milvus_lite.server_manager import server_manager_instance as servers

    file = str(tmp_path_factory.mktemp("milvus") / "g.db")
    yield f"milvus:{file}"
    servers.release_server(file)


@pytest.fixture
def name(server, request):
    return f"{server}#g{zlib.crc32(request.node.name.encode())}"


def photographed(folder, features, *, first=0):
    """A store whose images exist, taken a day apart, of cameras 0 to 2, and with a name among its identities."""
    photos = folder.parent / "photos"
    photos.mkdir(exist_ok=True)
    paths = [photos / f"{row}.jpg" for row in range(first, first + len(features))]
    for row, path in enumerate(paths, first):
        path.write_bytes(b"")
        os.utime(path, (86_400 * row, 86_400 * row))
    pids = ["Ännchen 'A' \"B\"" if row % 15 == 4 else row % 15 for row in range(len(features))]
    with StoreWriter(folder, dim=DIM, chunk_rows=32, model="m") as writer:
        writer.add(features, pids, np.arange(len(features)) // 15 % 3, list(map(str, paths)))
    return FeatureStore(folder)


def assert_same(first, second):
    assert first.rows.tolist() == second.rows.tolist()
    torch.testing.assert_close(first.scores, second.scores, rtol=0, atol=1e-6)
    named = [[{**hit, "score": 0} for hit in query] for query in first.as_dicts()]
    assert named == [[{**hit, "score": 0} for hit in query] for query in second.as_dicts()]


def test_search_filters_appends_and_deletions_are_those_of_the_store(tmp_path, name):
    queries, encoder = clusters(1, seed=2), make_encoder()
    store = photographed(tmp_path / "s", clusters(8, seed=1))
    gallery = copy_store(store, name)
    assert (len(gallery), gallery.living, gallery.shortage) == (120, 120, "")
    filters = [
        Filter(cameras=("0", "2")),
        Filter(labels=("3", "Ännchen 'A' \"B\"")),
        Filter(since=86_400 * 30.5, until=86_400 * 90),
        Filter(cameras=("1",), labels=("7",), since=86_400 * 20),
        Filter(labels=("nobody",)),
    ]
    for step in range(3):
        if step == 1:
            store = photographed(tmp_path / "s", queries[:9], first=120)
            assert copy_store(store, name).living == 129
        if step == 2:
            engines = [engine_of(tmp_path / "s"), engine_of(name)]
            assert [engine.delete(GONE) for engine in engines] == [4, 4] and engine_of(name).delete(GONE[:2]) == 0
            assert [engine_of(each).living for each in (tmp_path / "s", name)] == [125, 125]
        files, milvus = GallerySearcher(tmp_path / "s", encoder=encoder), GallerySearcher(name, encoder=encoder)
        for chosen in [None, *filters]:
            assert_same(files.search(queries, 7, among=chosen), milvus.search(queries, 7, among=chosen))
            if chosen:
                assert engine_of(tmp_path / "s").rows_of(chosen) == engine_of(name).rows_of(chosen)
        assert (files.states.rows, files.states.base_rows) == (milvus.states.rows, milvus.states.base_rows)
        assert_same(
            GallerySearcher(tmp_path / "s").search(queries, 200, among=filters[2]),
            GallerySearcher(name).search(queries, 200, among=filters[2]),
        )
    milvus.store.verify()
    again = files.search(queries, 5)
    files.refine(full=True), milvus.refine(full=True)
    assert_same(files.search(queries, 5, rerank=20), milvus.search(queries, 5, rerank=20))
    assert (files.search(queries, 5).scores - again.scores).abs().max() > 1e-6  # the deleted are out of the states
    assert len(milvus.store.state_collections()) == 1 and not states.work_folder(milvus.store).exists()


@pytest.mark.parametrize(
    "options",
    [
        {"landmarks": "farthest", "precision": "bfloat16"},
        {"rule": {"support": -1.0, "least": 0.5}, "anchor": 0.7},
        {"rule": {"support": 1.5, "least": 0.5}, "anchor": 0.7},
    ],
    ids=["landmarks", "company", "alone"],
)
def test_states_of_a_store_are_uploaded_as_they_are(tmp_path, name, options):
    if "rule" in options:
        from relreid_plugin.magformer.cameras import CameraRule

        rule = CameraRule(3, 2, temperature=0.1, **options["rule"])
        options = {"rule": rule, "neighbours": "camera", "anchor": options["anchor"]}
    queries, encoder, cameras = clusters(1, seed=2), make_encoder(num_layers=2, **options), np.arange(15) % 4 - 1
    store = photographed(tmp_path / "s", clusters(8, seed=1))
    files = GallerySearcher(store, encoder=encoder)
    files.refine(block_rows=BLOCK)
    gallery = copy_store(store, name)
    first = states.upload(files.states, gallery)
    again = states.upload(files.states, gallery)
    assert first.collection == again.collection and again.rows == 120
    milvus = GallerySearcher(gallery, encoder=encoder, automatic=False)
    assert_same(files.search(queries, 6, camids=cameras), milvus.search(queries, 6, camids=cameras))
    assert (files.refine_queries(queries, cameras) - milvus.refine_queries(queries, cameras)).abs().max() < 1e-6


def test_near_ties_behind_the_last_candidate_are_found(tmp_path, name):
    row = torch.nn.functional.normalize(torch.arange(1.0, DIM + 1), dim=0)
    noise = torch.randn(200, DIM, generator=torch.Generator().manual_seed(0))
    gallery = torch.cat([row + 4e-8 * noise, -row.repeat(3, 1)])  # float32 orders them by its rounding
    copy_store(make_store(tmp_path / "s", gallery), name)
    assert_same(GallerySearcher(tmp_path / "s").search(row[None], 5), GallerySearcher(name).search(row[None], 5))


def test_an_index_that_misses_nothing_finds_the_same(tmp_path, name):
    store, queries = make_store(tmp_path / "s", clusters(8, seed=1)), clusters(1, seed=2)
    copy_store(store, name, index="hnsw")
    found = GallerySearcher(name, search=SearchConfig(index="hnsw", ef=200))
    assert not found.index.exact
    assert_same(GallerySearcher(store).search(queries, 5), found.search(queries, 5))


WRITER = """
import sys, time
from relreid_plugin.search.milvus import store
from relreid_plugin.search.milvus.copying import copy_store
from relreid_plugin.features.store import FeatureStore
slow = store.upsert
def upsert(*arguments):
    slow(*arguments)
    print("written", flush=True)
    time.sleep(float(sys.argv[3]))
store.upsert = upsert
copy_store(FeatureStore(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_writer_leaves_true_counts_and_is_taken_up(tmp_path):
    rows = torch.randn(1200, DIM, generator=torch.Generator().manual_seed(0))
    with StoreWriter(tmp_path / "s", dim=DIM, chunk_rows=200) as writer:
        writer.add(rows, np.arange(1200) % 15)
    name = f"milvus:{tmp_path / 'k.db'}"
    command = [warm.python(), "-c", WRITER, str(tmp_path / "s"), name, "0.3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)  # rows 400 to 599 are written and not committed
        process.wait()
    deadline = time.monotonic() + 20
    while True:
        try:
            gallery = MilvusStore(name)
            break
        except UserError:  # the killed process's lock goes with it
            assert time.monotonic() < deadline
            time.sleep(0.05)
    held = list(gallery.client.query("gallery", filter="", output_fields=["count(*)"]))[0]["count(*)"]
    assert (len(gallery), gallery.living, held) == (400, 400, 600)
    assert "holds 400 of 1200 images" in gallery.shortage
    found = GallerySearcher(gallery).search(rows[::100], 500).rows
    assert found.shape[1] == 400 and int(found.max()) == 399
    gallery = copy_store(FeatureStore(tmp_path / "s"), name)
    gallery.verify()
    held = list(gallery.client.query("gallery", filter="", output_fields=["count(*)"]))[0]["count(*)"]
    assert (len(gallery), gallery.living, held, gallery.shortage) == (1200, 1200, 1200, "")
    assert_same(GallerySearcher(tmp_path / "s").search(rows[:50], 9), GallerySearcher(gallery).search(rows[:50], 9))
    with MilvusWriter(name, dim=DIM) as writer:  # a deletion that was committed and not carried out
        writer.commit(gone=[7, 8], deleted=2)
    gallery = MilvusStore(name)
    assert gallery.living == 1198 and 7 not in GallerySearcher(gallery).search(rows[7:8], 1200).rows
    with MilvusWriter(name, dim=DIM):
        pass
    assert MilvusStore(name).gone == [] and int(MilvusStore(name).alive.sum()) == 1198


def test_a_killed_upload_and_a_killed_refinement_go_on(tmp_path, name, monkeypatch):
    store, encoder, queries = make_store(tmp_path / "s", clusters(8, seed=1)), make_encoder(), clusters(1, seed=2)
    files = GallerySearcher(store, encoder=encoder)
    gallery, first = copy_store(store, name), files.states
    monkeypatch.setattr(states, "_BLOCK", 32)
    real, calls = states.write_states, []

    def write_states(*arguments):
        calls.append(arguments[3].tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(states, "write_states", write_states)
    with pytest.raises(KeyboardInterrupt):
        states.upload(first, gallery)
    with pytest.raises(UserError, match="was not refined by this relation encoder"):
        GallerySearcher(gallery, encoder=encoder, automatic=False).search(queries)
    states.upload(first, gallery)
    assert [rows[0] for rows in calls] == [0, 32, 64, 64, 96]
    make_store(tmp_path / "s", clusters(5, seed=3))
    gallery = copy_store(FeatureStore(tmp_path / "s"), name)
    calls[:] = []
    with pytest.raises(KeyboardInterrupt):
        GallerySearcher(gallery, encoder=encoder).refine()
    milvus = GallerySearcher(gallery, encoder=encoder)
    assert milvus.refine().rows == 195 and [rows[0] for rows in calls] == [120, 152, 184, 184]
    files = GallerySearcher(tmp_path / "s", encoder=encoder)
    assert_same(files.search(queries, 9), milvus.search(queries, 9))


def test_mistakes_are_one_sentence(tmp_path, name, capsys):
    store = make_store(tmp_path / "s", clusters(2, seed=1))
    copy_store(store, name)
    with pytest.raises(UserError, match="are not the first ones of store"):
        copy_store(make_store(tmp_path / "t", clusters(2, seed=2)), name)
    with pytest.raises(UserError, match="has dim 16, but dim 8 is to be added"):
        MilvusWriter(name, dim=8).__enter__()
    with MilvusWriter(name, dim=DIM) as writer, pytest.raises(UserError, match="being written by another process"):
        with MilvusWriter(name, dim=DIM) as other:
            other.plan(31)
        writer.plan(32)
    with pytest.raises(UserError, match="not among rows that are listed"):
        GallerySearcher(name).search(clusters(1, seed=2), among=torch.ones(30, dtype=torch.bool))
    head = MilvusStore(name).documents
    head.write(HEAD, {**head.read(HEAD), "format": 99})
    with pytest.raises(UserError, match="format 99"):
        MilvusStore(name)
    for wrong, sentence in [
        ("milvus:gallery", "names no gallery"),
        (f"milvus:{tmp_path}/none.db", "does not exist"),
        (f"milvus:{tmp_path}/x.db#a-b", "no name of a collection"),
        (f"{name}x", "holds no gallery of that name"),
    ]:
        with pytest.raises(UserError, match=sentence):
            MilvusStore(wrong)
    assert main(["delete", str(tmp_path / "s")]) == 2 and "name rows, or images by" in capsys.readouterr().err
    assert main(["copy", str(tmp_path / "s"), "gallery"]) == 2 and "is no gallery in Milvus" in capsys.readouterr().err


def test_commands_on_both_engines(tmp_path, server, tiny_run, tiny_root, capsys):
    store, name = str(tmp_path / "s"), f"{server}#commands"
    gallery = ["--target", "embedded_persons_tiny", "--split", "gallery"]
    for out in (store, f"{name}_extracted"):
        assert main(["extract", str(tiny_run), out, *gallery]) == 0
    assert main(["copy", store, name, "--relations", str(tiny_run)]) == 0
    photo = str(next((tiny_root / "embedded_persons_tiny").rglob("query/*.jpg")))
    for command in (["--relations"], ["--camera", "1", "--rerank", "12"]):
        found = []
        for each in (store, name if "--relations" in command else f"{name}_extracted"):
            assert main(["search", str(tiny_run), each, photo, "--out", str(tmp_path / "o"), *command]) == 0
            found.append(json.loads((tmp_path / "o" / "ranking.json").read_text())["queries"][0]["results"])
            for hit in found[-1]:
                hit["score"] = round(hit["score"], 5)
        scores = [[hit["score"] for hit in each] for each in found]
        assert np.abs(np.array(scores[1]) - scores[0]).max() < 2e-5
        assert "--relations" in command or found[0] == found[1]  # refined features of this run tie
    capsys.readouterr()
    assert main(["search", str(tiny_run), name, photo, "--index", "ivf"]) == 2
    assert "was made with --index flat" in capsys.readouterr().err
    for each in (store, name):
        assert main(["delete", each, "--camera", "1", "--dry-run"]) == 0 and main(["delete", each, "--camera", "1"]) == 0
    said = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert said[:2] == said[2:] and not said[1].startswith("0 ")
    assert delete_rows(store, []) == 0
