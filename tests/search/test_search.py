"""Galleries refined and searched on disk, the feature extractor, and both commands."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import warm
from conftest import MARKET, ROOT
from PIL import Image

from relreid_plugin.engine.evaluator import EvaluationOptions, Evaluator
from relreid_plugin.errors import UserError
from relreid_plugin.features.arrays import write_rows
from relreid_plugin.features.sets import Features, TestFeatures
from relreid_plugin.magformer.encoder import GalleryStates, RelationEncoder
from relreid_plugin.metrics.candidates import exact_scores
from relreid_plugin.metrics.neighbours import SearchConfig, faiss_available, normalise
from relreid_plugin.metrics.ranking import evaluate_ranking
from relreid_plugin.metrics.reranking import k_reciprocal_rerank_features
from relreid_plugin.search import FeatureExtractor, FeatureStore, GallerySearcher, StoreWriter, layers
from relreid_plugin.search.extractor import list_images, name_labels

DIM, BLOCK = 16, 40


def clusters(per, *, seed):
    """Rows of 15 identities, ``per`` of each."""
    centers = torch.randn(15, DIM, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(15 * per, DIM, generator=torch.Generator().manual_seed(seed))
    return centers.repeat(per, 1) + 0.5 * noise


def make_encoder(**options):
    torch.manual_seed(3)
    encoder = RelationEncoder(DIM, 4, **{"num_layers": 3, "k": 6, "init": "diffusion", **options})
    with torch.no_grad():
        for value in encoder.parameters():
            if value.dim() > 1:
                value += 0.1 * torch.randn_like(value)
        encoder.neck.bn.running_mean.normal_(std=0.1)
    return encoder.eval()


def make_store(folder, *parts, **options):
    for part in parts:
        with StoreWriter(folder, dim=DIM, chunk_rows=32, **options) as writer:
            writer.add(part, np.arange(len(part)) % 15)
    return FeatureStore(folder)


def refined(searcher):
    return searcher.states.refined.read()


# --- equality with the batch evaluation -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "nformer"},
        {"attention": "malaa"},
        {},
        {"landmarks": "farthest"},
        {"k": 200},
        {"num_layers": 1},
        {"k": 1},
        {"search": SearchConfig(index="scan")},
    ],
)
def test_online_search_is_the_batch_evaluation(tmp_path, options):
    gallery, queries, encoder = clusters(8, seed=1), clusters(1, seed=2), make_encoder(**options)
    searcher = GallerySearcher(make_store(tmp_path / "s", gallery), encoder=encoder)
    searcher.refine(block_rows=BLOCK)
    states = encoder.refine_gallery(gallery)
    wanted = encoder.refine_queries(queries, states)
    assert (refined(searcher) - states.refined).abs().max() < 1e-6
    assert (searcher.refine_queries(queries) - wanted).abs().max() < 1e-6
    for query in (3, 11):  # one at a time
        assert (searcher.refine_queries(queries[query : query + 1]) - wanted[query]).abs().max() < 1e-6
    result = searcher.search(queries, 7)
    best = (wanted.double() @ states.refined.double().t()).topk(7)
    assert np.abs(result.scores.numpy() - best.values.numpy()).max() < 1e-6
    assert (result.rows == best.indices).all()
    assert result.pids.tolist() == (np.asarray(result.rows) % 15).tolist()
    assert (refined(searcher) - searcher.store.read()).abs().max() > 0.05  # the encoder does something


@pytest.mark.parametrize("relations", [False, True])
def test_ranking_the_whole_gallery_scores_as_the_evaluator(tmp_path, relations):
    gallery, queries, encoder = clusters(8, seed=1), clusters(2, seed=2), make_encoder()
    pids = [np.arange(len(rows)) % 15 for rows in (queries, gallery)]
    camids = [np.arange(len(rows)) // 15 % 3 for rows in (queries, gallery)]
    sets = [Features(rows, *labels, []) for rows, *labels in zip((queries, gallery), pids, camids)]
    evaluator = Evaluator("set", TestFeatures(*sets), options=EvaluationOptions(metric="cosine"), parameters=0)
    wanted = evaluator.refined_result(encoder, "inductive") if relations else evaluator.score(queries, gallery, "cosine")
    searcher = GallerySearcher(make_store(tmp_path / "s", gallery), encoder=encoder if relations else None)
    result = searcher.search(queries, len(gallery))
    distances = np.empty(result.rows.shape)
    np.put_along_axis(distances, result.rows.numpy(), 1 - result.scores.numpy(), 1)
    score = evaluate_ranking(distances, pids[0], pids[1], camids[0], camids[1])
    assert score.mAP == pytest.approx(wanted.mAP, abs=1e-9) and score.mINP == pytest.approx(wanted.mINP, abs=1e-9)
    assert 0.3 < wanted.mAP < 0.999


def test_half_precision_states_are_near_the_batch_evaluation(tmp_path):
    gallery, queries, encoder = clusters(8, seed=1), clusters(1, seed=2), make_encoder(precision="bfloat16")
    searcher = GallerySearcher(make_store(tmp_path / "s", gallery), encoder=encoder)
    searcher.refine(block_rows=BLOCK)
    states = encoder.refine_gallery(gallery)
    assert searcher.states.layers[0].values.dtype == "bfloat16"
    assert (refined(searcher) - states.refined).abs().max() < 2e-2
    assert (searcher.refine_queries(queries) - encoder.refine_queries(queries, states)).abs().max() < 2e-2


def test_a_half_precision_store_is_refined_as_it_reads(tmp_path):
    encoder, store = make_encoder(), make_store(tmp_path / "s", clusters(8, seed=1), dtype="float16")
    searcher = GallerySearcher(store, encoder=encoder)
    searcher.refine(block_rows=BLOCK)
    assert (refined(searcher) - encoder.refine_gallery(store.read()).refined).abs().max() < 1e-6


def test_without_relations_the_ranking_is_that_of_cosines(tmp_path):
    gallery, queries = clusters(8, seed=1), clusters(1, seed=2)
    result = GallerySearcher(make_store(tmp_path / "s", gallery)).search(queries, 9)
    best = (normalise(queries).double() @ normalise(gallery).double().t()).topk(9)
    assert (result.rows == best.indices).all() and (result.scores - best.values.float()).abs().max() < 1e-6
    first = result.as_dicts()[0][0]
    assert first["rank"] == 1 and first["row"] == int(best.indices[0, 0]) and first["pid"] == first["row"] % 15


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_that_misses_nothing_changes_nothing(tmp_path, kind):
    gallery, queries, encoder = clusters(12, seed=1), clusters(1, seed=2), make_encoder()
    store = make_store(tmp_path / "s", gallery)
    searcher = GallerySearcher(store, encoder=encoder, search=SearchConfig(index=kind, nlist=3, nprobe=3))
    result = searcher.search(queries, 5)
    assert not searcher.index.exact and not searcher.refined_index.exact
    exact = GallerySearcher(make_store(tmp_path / "t", gallery), encoder=encoder).search(queries, 5)
    assert (result.rows == exact.rows).all() and (result.scores - exact.scores).abs().max() < 1e-6
    searcher.warm()
    assert {path.stem for path in searcher.states.online_files()} == {
        f"{n}{i}" for n in ("keys", "values") for i in range(3)
    }
    assert searcher.index.file.is_file() and (searcher.search(queries, 5).rows == exact.rows).all()
    grown = GallerySearcher(
        make_store(tmp_path / "s", queries), encoder=encoder, search=SearchConfig(index=kind, nlist=3, nprobe=3)
    )
    assert grown.search(queries, 1).rows.flatten().tolist() == list(range(180, 195))


def test_reranking_of_the_whole_gallery_is_that_of_one_query_at_a_time(tmp_path):
    gallery, queries = clusters(6, seed=1), clusters(1, seed=2)
    searcher = GallerySearcher(make_store(tmp_path / "s", gallery))
    result = searcher.search(queries, 10, rerank=90, settings={"k1": 8, "k2": 3})
    for number, query in enumerate(normalise(queries)):
        distances = k_reciprocal_rerank_features(query[None], searcher.store.read(), k1=8, k2=3)[0]
        order = np.argsort(distances, kind="stable")[:10]
        assert result.rows[number].tolist() == order.tolist()
        assert np.abs(1 - distances[order] - result.scores[number].numpy()).max() < 1e-6
    short = searcher.search(queries, 10, rerank=20)
    plain = searcher.search(queries, 20)
    assert all(set(few) <= set(many) for few, many in zip(short.rows.tolist(), plain.rows.tolist()))


# --- appended images --------------------------------------------------------------------------------------------------
def appended_oracle(encoder, old, new):
    """Gallery states in which the new rows were refined as queries and are attended to."""
    states = encoder.refine_gallery(old)
    inputs = []

    def record(module, original):
        def attend(x, *args, **kwargs):
            inputs.append(x)
            return original(x, *args, **kwargs)

        return attend

    for block in encoder.blocks:
        block.attn.attend_to_gallery = record(block.attn, block.attn.attend_to_gallery)
    queries = encoder.refine_queries(new, states)
    for block in encoder.blocks:
        del block.attn.attend_to_gallery
    layers = []
    for block, layer, x in zip(encoder.blocks, states.layers, inputs):
        keys = (x @ layer.key_projection).view(len(x), block.attn.num_maps, -1)
        values = block.attn.value(x).view(len(x), block.attn.num_heads, -1)
        layers.append(
            type(layer)(
                layer.query_projection,
                layer.key_projection,
                torch.cat([layer.keys, keys]),
                torch.cat([layer.values, values]),
            )
        )
    unit = normalise(new)
    every = torch.arange(len(old)).expand(len(new), -1)
    scores = torch.cat([exact_scores(unit, normalise(old), every), torch.ones(len(new), 1)], dim=1)
    thresholds = torch.cat([states.thresholds, scores.topk(encoder.k).values[:, -1]])
    features = torch.cat([states.features, unit])
    return GalleryStates(features, torch.cat([states.refined, queries]), layers, thresholds, None)


@torch.no_grad()
def test_appended_images_are_refined_as_queries_and_seen_by_later_ones(tmp_path):
    old, new, queries, encoder = clusters(6, seed=1), clusters(3, seed=4), clusters(1, seed=2), make_encoder()
    GallerySearcher(make_store(tmp_path / "s", old), encoder=encoder).refine(block_rows=BLOCK)
    before = refined(GallerySearcher(tmp_path / "s", encoder=encoder)).clone()
    searcher = GallerySearcher(make_store(tmp_path / "s", new), encoder=encoder)
    states = searcher.refine(block_rows=20)
    assert (states.rows, states.base_rows) == (135, 90)
    oracle = appended_oracle(encoder, old, new)
    assert torch.equal(refined(searcher)[:90], before)
    assert (refined(searcher) - oracle.refined).abs().max() < 1e-6
    wanted = encoder.refine_queries(queries, oracle)
    assert (searcher.refine_queries(queries) - wanted).abs().max() < 1e-6
    exact = encoder.refine_gallery(torch.cat([old, new]))
    assert (refined(searcher) - exact.refined).abs().max() > 1e-3  # approximate indeed
    states = searcher.refine(full=True, block_rows=BLOCK)
    assert (states.rows, states.base_rows) == (135, 135)
    assert (refined(searcher) - exact.refined).abs().max() < 1e-6
    assert [path.name for path in searcher.relation_folder.glob("pass-*")] == [states.pass_folder.name]


def test_without_automatic_updates_nothing_out_of_date_is_searched(tmp_path):
    encoder, queries = make_encoder(), clusters(1, seed=2)
    store = make_store(tmp_path / "s", clusters(6, seed=1))
    with pytest.raises(UserError, match="was not refined yet"):
        GallerySearcher(store, encoder=encoder, automatic=False).search(queries)
    GallerySearcher(store, encoder=encoder).refine()
    assert len(GallerySearcher(store, encoder=encoder, automatic=False).search(queries, 4)) == 15
    grown = make_store(tmp_path / "s", queries)
    with pytest.raises(UserError, match="15 images were appended"):
        GallerySearcher(grown, encoder=encoder, automatic=False).search(queries)


# --- killed and damaged -----------------------------------------------------------------------------------------------
KILLED = """
    import os, signal, sys, torch
    sys.path[:0] = ["tests", "tests/search"]
    torch.set_num_threads(1)
    from test_search import BLOCK, GallerySearcher, make_encoder
    from relreid_plugin.search import layers
    real, calls, limit = layers.write_rows, [], int(sys.argv[2])
    def write_rows(path, first, value):
        calls.append(path)
        if len(calls) > limit:
            path.open("ab").write(b"torn")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, first, value)
    layers.write_rows = write_rows
    GallerySearcher(sys.argv[1], encoder=make_encoder()).refine(block_rows=BLOCK)
"""


def kill_refinement(folder, files):
    command = [warm.python(), "-c", textwrap.dedent(KILLED), str(folder), str(files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def count_writes(monkeypatch):
    written, real = [], layers.write_rows
    monkeypatch.setattr(layers, "write_rows", lambda *args: written.append(args[0].name) or real(*args))
    return written


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_refinement_goes_on(tmp_path, monkeypatch):
    old, new, encoder = clusters(8, seed=1), clusters(3, seed=4), make_encoder()
    whole = GallerySearcher(make_store(tmp_path / "whole", old), encoder=encoder)
    written = count_writes(monkeypatch)
    whole.refine(block_rows=BLOCK)
    total = len(written)
    make_store(tmp_path / "s", old)
    kill_refinement(tmp_path / "s", 17)  # in the second of three layers
    searcher = GallerySearcher(tmp_path / "s", encoder=encoder)
    with pytest.raises(UserError, match="was not refined yet"):
        _ = GallerySearcher(tmp_path / "s", encoder=encoder, automatic=False).states
    written.clear()
    searcher.refine(block_rows=BLOCK)
    assert len(written) == total - 17
    assert torch.equal(refined(searcher), refined(whole))
    assert torch.equal(searcher.refine_queries(new), whole.refine_queries(new))

    for name in ("whole", "s"):
        make_store(tmp_path / name, new)
    kill_refinement(tmp_path / "s", 10)  # while it refines the new images
    assert GallerySearcher(tmp_path / "s", encoder=encoder, automatic=False).store.fingerprint() is not None
    grown, expected = (GallerySearcher(tmp_path / name, encoder=encoder) for name in ("s", "whole"))
    for one in (grown, expected):
        one.refine(block_rows=BLOCK)
    assert torch.equal(refined(grown), refined(expected)) and grown.states.base_rows == 120
    grown.states.verify()


def test_a_pass_of_another_gallery_is_not_gone_on_with(tmp_path, monkeypatch):
    encoder = make_encoder()
    first = make_store(tmp_path / "s", clusters(8, seed=1))

    def stop(path, first, value):
        if path.name.startswith("keys1"):
            raise KeyboardInterrupt
        return write_rows(path, first, value)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "write_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            GallerySearcher(first, encoder=encoder).refine(block_rows=BLOCK)
    grown = make_store(tmp_path / "s", clusters(2, seed=4))
    searcher = GallerySearcher(grown, encoder=encoder)
    searcher.refine(block_rows=BLOCK)
    assert (refined(searcher) - encoder.refine_gallery(grown.read()).refined).abs().max() < 1e-6


def test_damaged_states_are_refused(tmp_path):
    encoder = make_encoder()
    store = make_store(tmp_path / "s", clusters(6, seed=1))
    states = GallerySearcher(store, encoder=encoder).refine(block_rows=BLOCK)
    path = states.pass_folder / "values1.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"damaged: 'values1.bin' has \d+ bytes"):
        GallerySearcher(store, encoder=encoder).search(clusters(1, seed=2))
    path.write_bytes(data[:-4] + bytes(4))
    for verify in (False, True):
        with pytest.raises(UserError, match="does not hold what was written"):
            GallerySearcher(store, encoder=encoder, verify=verify).search(clusters(1, seed=2))
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    other = make_store(tmp_path / "t", clusters(6, seed=9))
    folder = GallerySearcher(other, encoder=encoder).relation_folder
    shutil.copytree(states.folder, folder)
    with pytest.raises(UserError, match="belong to other features"):
        GallerySearcher(other, encoder=encoder).search(clusters(1, seed=2))


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_a_feature_that_was_changed_on_the_disk_is_noticed_where_it_wins(tmp_path, value):
    store = make_store(tmp_path / "s", clusters(2, seed=1))
    path = tmp_path / "s" / "chunk-000000.features"
    data = np.fromfile(path, "<f4").reshape(-1, DIM)
    data[7, 3] = value
    data.tofile(path)
    with pytest.raises(UserError, match="is not of unit length; find the file by relreid search --verify"):
        GallerySearcher(store).search(torch.eye(DIM)[3:4])


def test_bad_input(tmp_path):
    store, queries = make_store(tmp_path / "s", clusters(2, seed=1), model="a"), clusters(1, seed=2)
    with pytest.raises(UserError, match="of another model"):
        GallerySearcher(store, model="b")
    with pytest.raises(UserError, match="is empty"):
        GallerySearcher(make_store(tmp_path / "empty", clusters(1, seed=1)[:0]))
    with pytest.raises(UserError, match="of width 16"):
        GallerySearcher(store).search(queries[:, :8])
    with pytest.raises(UserError, match="k takes an integer"):
        GallerySearcher(store).search(queries, 0)
    with pytest.raises(UserError, match="no relations without an encoder"):
        GallerySearcher(store).refine()
    with pytest.raises(UserError, match="relation.neighbours feature"):
        GallerySearcher(store, encoder=make_encoder(neighbours="affinity")).search(queries)
    with pytest.raises(UserError, match="has width 32"):
        GallerySearcher(store, encoder=RelationEncoder(32, 4, num_layers=1)).search(queries)


# --- image files ------------------------------------------------------------------------------------------------------
def test_images_are_listed_and_labelled_by_name(tmp_path):
    for name in ("b/0002_c3s1_1.jpg", "b/a/0001_c1.PNG", "b/.hidden.jpg", "b/note.txt", "c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = list_images([tmp_path / "c.jpg", tmp_path / "b", tmp_path / "c.jpg"])
    assert [os.path.relpath(path, tmp_path) for path in found] == ["c.jpg", "b/0002_c3s1_1.jpg", "b/a/0001_c1.PNG"]
    assert [name_labels(path)[1:] for path in found] == [(-1, -1), (2, 3), (1, 1)]
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        list_images(tmp_path / "d")
    with pytest.raises(UserError, match="does not exist"):
        list_images(tmp_path / "e")


@pytest.fixture(scope="module")
def extractor(tiny_run):
    return FeatureExtractor(tiny_run)


@pytest.fixture(scope="module")
def gallery(extractor, tmp_path_factory):
    """The test set's gallery as a store, in small chunks."""
    folder = tmp_path_factory.mktemp("gallery") / "store"
    return extractor.store(folder, extractor.test_records("embedded_persons_tiny"), chunk_rows=16)


def test_search_is_over_the_features_that_the_run_was_evaluated_with(extractor, gallery, tiny_run):
    """The tiny model's features are too much alike for a ranking to mean anything; the numbers are compared."""
    stored = torch.load(tiny_run / "bank" / "embedded_persons_tiny-query.pt", weights_only=True)
    features = extractor.features(stored["paths"])
    torch.testing.assert_close(features, stored["features"], rtol=0, atol=1e-6)  # other batches
    raw = torch.load(tiny_run / "bank" / "embedded_persons_tiny-gallery.pt", weights_only=True)
    torch.testing.assert_close(gallery.read(), normalise(raw["features"]), rtol=0, atol=1e-6)  # smaller batches
    assert gallery.pids.tolist() == raw["pids"].tolist() and gallery.camids.tolist() == raw["camids"].tolist()
    encoder = extractor.encoder()
    states = encoder.refine_gallery(gallery.read())
    searcher = GallerySearcher(gallery, encoder=encoder, model=extractor.fingerprint)
    difference = searcher.refine_queries(features) - encoder.refine_queries(features, states)
    assert difference.abs().max() < 1e-4  # near-ties of features that are all alike may flip; see above for 1e-6


def test_extraction_goes_on_and_appends(extractor, gallery, tmp_path, monkeypatch):
    records = extractor.test_records("embedded_persons_tiny")
    real, calls = FeatureExtractor._extract, []

    def extract(self, part, label, **options):
        calls.append(len(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, part, label, **options)

    monkeypatch.setattr(FeatureExtractor, "_extract", extract)
    with pytest.raises(KeyboardInterrupt):
        extractor.store(tmp_path / "s", records[:-5], chunk_rows=16)
    assert len(FeatureStore(tmp_path / "s")) == 32
    extractor.store(tmp_path / "s", records[:-5], chunk_rows=16)
    store = extractor.store(tmp_path / "s", records, chunk_rows=16)
    assert sum(calls) == 16 + len(records)  # one chunk was begun twice
    assert list(store.iter_paths()) == [path for path, _, _ in records]
    torch.testing.assert_close(store.read(), gallery.read(), rtol=0, atol=1e-6)
    assert store.pids.tolist() == gallery.pids.tolist()


def test_an_interrupted_extraction_is_searched_with_a_note_or_refused(extractor, tmp_path, monkeypatch, capsys):
    records, queries = extractor.test_records("embedded_persons_tiny")[:40], clusters(2, seed=1).repeat(1, 2)
    real, calls = FeatureExtractor._extract, []

    def extract(self, part, label, **options):
        calls.append(len(part))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, part, label, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractor, "_extract", extract)
        with pytest.raises(KeyboardInterrupt):
            extractor.store(tmp_path / "s", records, chunk_rows=16)
    capsys.readouterr()
    assert len(GallerySearcher(tmp_path / "s").search(queries, 3)) == len(queries)
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 1 and notes[0].startswith("note: store") and "holds 16 of 40 images" in notes[0]
    with pytest.raises(UserError, match="holds 16 of 40 images.*relreid extract with the same arguments"):
        GallerySearcher(tmp_path / "s", complete=True)
    extractor.store(tmp_path / "s", records, chunk_rows=16)
    GallerySearcher(tmp_path / "s", complete=True)
    assert "note" not in capsys.readouterr().out


def test_broken_images_are_passed_over_on_demand(extractor, tiny_root, tmp_path, capsys):
    images = sorted((tiny_root / "embedded_persons_tiny" / MARKET / "query").glob("*.jpg"))[:5]
    for image in images:
        shutil.copy(image, tmp_path / image.name)
    (tmp_path / images[2].name).write_bytes(images[2].read_bytes()[:400])
    with pytest.raises(UserError, match=images[2].name):
        extractor.store(tmp_path / "s", tmp_path)
    store = extractor.store(tmp_path / "s", tmp_path, skip_broken=True)
    assert [os.path.basename(path) for path in store.iter_paths()] == [image.name for image in images if image != images[2]]
    assert store.shortage == "" and f"note: passed over: image '{tmp_path / images[2].name}'" in capsys.readouterr().out


def test_an_image_is_the_same_from_whatever_folder_it_is_named(extractor, tiny_root, tmp_path, monkeypatch):
    folder = tiny_root / "embedded_persons_tiny" / MARKET / "query"
    extractor.store(tmp_path / "s", folder)
    monkeypatch.chdir(folder)
    assert len(extractor.store(tmp_path / "s", ".")) == len(list(folder.glob("*.jpg")))


def test_a_run_needs_no_training_data_for_images(extractor, tiny_run, tiny_root, tmp_path):
    data = shutil.copytree(tiny_root / "embedded_persons_tiny", tmp_path / "data" / "embedded_persons_tiny")
    shutil.copytree(tiny_run, tmp_path / "run")
    moved = ["data.root", str(tmp_path / "data")]
    whole = FeatureExtractor(tmp_path / "run", moved).test_records("embedded_persons_tiny")
    assert [item[1:] for item in whole] == [item[1:] for item in extractor.test_records("embedded_persons_tiny")]
    shutil.rmtree(data)
    data.write_text("in the way of a new rendering")
    alone = FeatureExtractor(tmp_path / "run", moved)
    images = sorted((tiny_root / "embedded_persons_tiny" / MARKET / "query").glob("*.jpg"))
    assert alone.fingerprint == extractor.fingerprint
    assert torch.equal(alone.features(images), extractor.features(images))
    store = alone.store(tmp_path / "s", images)
    refined = GallerySearcher(store, encoder=alone.encoder(), model=alone.fingerprint).search(alone.features(images), 1)
    assert len(refined) == len(images)
    with pytest.raises(UserError, match="embedded_persons_tiny"):
        alone.test_records("embedded_persons_tiny")


def test_a_store_of_another_model_is_refused(extractor, tmp_path):
    make_store(tmp_path / "s", clusters(1, seed=1))
    with pytest.raises(UserError, match="write to another folder"):
        extractor.store(tmp_path / "s", extractor.test_records("embedded_persons_tiny")[:2])


def test_runs_without_relations(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    one = FeatureExtractor(folder, ["train.stages", "[1]"])
    with pytest.raises(UserError, match="has no relation encoder"):
        one.encoder()
    with pytest.raises(UserError, match="is no test set"):
        one.test_records("market1501")


# --- commands ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tools():
    path = list(sys.path)
    found = {name: runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"] for name in ("extract", "search")}
    sys.path[:] = path
    return found


@pytest.mark.slow
def test_commands(tools, tiny_run, tiny_root, tmp_path, capsys, monkeypatch):
    data = tiny_root / "embedded_persons_tiny" / MARKET
    images, store = sorted((data / "bounding_box_test").glob("*.jpg"))[:40], tmp_path / "store"
    assert tools["extract"]([str(tiny_run), str(store), *map(str, images[:30]), "--verify"]) == 0
    assert "30 images, width 32, float32" in capsys.readouterr().out
    query = next(iter(sorted((data / "query").glob("*.jpg"))))
    shutil.copytree(data / "query", tmp_path / "queries")
    search = [str(tiny_run), str(store), str(tmp_path / "queries"), "--out", str(tmp_path / "out")]
    assert tools["search"]([*search, "-k", "6"]) == 0
    out = capsys.readouterr().out
    assert query.name in out and "30 images" in out
    plain = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert [len(item["results"]) for item in plain["queries"]] == [6] * len(plain["queries"])
    assert Image.open(tmp_path / "out" / "ranking.png").size[0] > 6 * 64

    assert tools["search"]([*search, "-k", "6", "--relations", "--rerank", "20", "--verify"]) == 0
    capsys.readouterr()
    related = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert related["settings"]["relations"] and related["queries"] != plain["queries"]

    assert tools["extract"]([str(tiny_run), str(store), *map(str, images)]) == 0
    assert "40 images" in capsys.readouterr().out
    assert tools["search"]([*search[:2], "--relations"]) == 0
    assert "10 of 40 gallery images were appended" in capsys.readouterr().out
    assert tools["search"]([*search[:2], "--relations", "--full"]) == 0
    out = capsys.readouterr().out
    assert "were appended" not in out and "40 images, up to date" in out

    for rank in ("0", "1"):  # what torchrun sets
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert tools["extract"]([str(tiny_run), str(tmp_path / "shards"), *map(str, images)]) == 0
    shards = FeatureStore(tmp_path / "shards")
    assert sorted(shards.iter_paths()) == list(map(str, images)) and len(shards.shards) == 2


@pytest.mark.parametrize(
    ("tool", "arguments", "sentence"),
    [
        ("extract", ["RUN", "STORE"], "name image files or folders"),
        ("extract", ["RUN", "STORE", "EMPTY"], "holds no image"),
        ("extract", ["RUN", "STORE", "BROKEN"], "is not an image"),
        ("extract", ["RUN", "STORE", "--target", "nothing"], "is no test set"),
        ("extract", ["EMPTY", "STORE", "BROKEN"], "holds no run"),
        ("search", ["RUN", "STORE", "BROKEN"], "does not exist"),
        ("search", ["RUN", "FOREIGN", "BROKEN"], "holds features of another model"),
        ("search", ["RUN", "FOREIGN", "--full"], "--full belongs to --relations"),
        ("search", ["RUN", "FOREIGN", "--out", "BROKEN"], "is a file; name a folder"),
        ("extract", ["RUN", "STORE", "BROKEN", "--opts", "data.save_dir", "x"], "leave out the override 'data.save_dir'"),
    ],
)
def test_mistakes_are_one_sentence(tools, tiny_run, tmp_path, capsys, tool, arguments, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_text("no image")
    if "FOREIGN" in arguments:
        make_store(tmp_path / "foreign", clusters(2, seed=1), model="x")
    places = {"RUN": tiny_run, "STORE": tmp_path / "s", "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken.jpg"}
    places["FOREIGN"] = tmp_path / "foreign"
    assert tools[tool]([str(places.get(word, word)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and len(error.splitlines()) == 1
