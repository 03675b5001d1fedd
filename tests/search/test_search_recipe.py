"""Galleries on disk under the relation recipe are the batch: head, neighbours by camera, averaging blocks, residual."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap

import numpy as np
import pytest
import torch
import warm
import yaml
from conftest import MARKET, ROOT, TINY
from test_search import BLOCK, DIM, clusters, count_writes, refined

from relreid_plugin.cli.search import REFINE, SEARCH
from relreid_plugin.cli.train import main as train
from relreid_plugin.errors import UserError
from relreid_plugin.magformer.cameras import CameraRule
from relreid_plugin.magformer.discriminant import discriminant_projection
from relreid_plugin.magformer.encoder import GalleryStates, RelationEncoder
from relreid_plugin.metrics.cameras import UNKNOWN, CameraIndex
from relreid_plugin.metrics.neighbours import SearchConfig, faiss_available, normalise
from relreid_plugin.search import FeatureExtractor, FeatureStore, GallerySearcher, StoreWriter, bycamera, edges
from relreid_plugin.search.bycamera import search_by_camera
from relreid_plugin.search.index import TableIndex
from relreid_plugin.search.layers import encoder_fingerprint

GALLERY, QUERIES = clusters(8, seed=1), clusters(2, seed=2)
CAMERAS = np.arange(len(GALLERY)) * 7 // 15 % 4
ASKED = np.arange(len(QUERIES)) % 6 - 1  # an unknown one, and one that the gallery does not have
RULE = {"other": 3, "same": 2, "reciprocity": 2, "temperature": 0.3, "offset": 0.4}


def recipe_encoder(*, head=True, rule=RULE, **options):
    torch.manual_seed(5)
    given = {"num_layers": 2, "k": 6, "init": "identity", "block": "average", "neighbours": "camera", "residual": 0.5}
    encoder = RelationEncoder(DIM, 4, head=head, rule=CameraRule(**rule), **{**given, **options})
    if head:
        train_set = clusters(6, seed=9)
        encoder.head.set(discriminant_projection(train_set, torch.arange(len(train_set)) % 15, shrinkage=1.0))
    with torch.no_grad():
        encoder.neck.bn.running_mean.normal_(std=0.05)
    return encoder.eval()


def store_of(folder, *parts, dtype=None):
    for features, camids in parts or ((GALLERY, CAMERAS),):
        with StoreWriter(folder, dim=DIM, chunk_rows=32, dtype=dtype) as writer:
            writer.add(features, np.arange(len(features)) % 15, camids)
    return FeatureStore(folder)


CASES = {
    "recipe": {},
    "no head": {"head": False},
    "no residual": {"residual": 0.0},
    "one-sided, no temperature": {"rule": {**RULE, "reciprocity": 0, "temperature": 0.0}},
    "alone": {"rule": {**RULE, "other": 0, "same": 0}},
    "other cameras only": {"rule": {**RULE, "same": 0}},
    "own camera only": {"rule": {**RULE, "other": 0}},
    "more than there are": {"rule": {**RULE, "other": 200, "same": 100}},
    "transformer": {"block": "transformer", "init": "diffusion"},
    "head and feature neighbours": {"neighbours": "feature", "block": "transformer", "init": "diffusion"},
    "anchor": {"anchor": 0.7},
    "anchor, own camera only": {"anchor": 0.7, "rule": {**RULE, "other": 0}},
    "company enough": {"anchor": 0.7, "rule": {**RULE, "support": -1.0, "least": 1.0}},
    "too little company": {"anchor": 0.7, "rule": {**RULE, "support": 1.0, "least": 0.01}},
    "scan": {"search": SearchConfig(index="scan")},
}


@pytest.mark.parametrize("case", CASES)
def test_online_search_is_the_batch_evaluation(tmp_path, case):
    encoder = recipe_encoder(**CASES[case])
    searcher = GallerySearcher(store_of(tmp_path / "s"), encoder=encoder)
    searcher.refine(block_rows=BLOCK)
    states = encoder.refine_gallery(GALLERY, CAMERAS)
    wanted = encoder.refine_queries(QUERIES, states, ASKED)
    assert (refined(searcher) - states.refined).abs().max() < 1e-6
    assert (searcher.refine_queries(QUERIES, ASKED) - wanted).abs().max() < 1e-6
    for query in (0, 5, 8):  # one at a time
        part = slice(query, query + 1)
        assert (searcher.refine_queries(QUERIES[part], ASKED[part]) - wanted[query]).abs().max() < 1e-6
    unknown = encoder.refine_queries(QUERIES, states)
    assert (searcher.refine_queries(QUERIES) - unknown).abs().max() < 1e-6
    result = searcher.search(QUERIES, 7, camids=ASKED)
    best = (wanted.double() @ states.refined.double().t()).topk(7)
    assert np.abs(result.scores.numpy() - best.values.numpy()).max() < 1e-6
    again = GallerySearcher(tmp_path / "s", encoder=encoder, automatic=False, verify=True)
    assert torch.equal(again.refine_queries(QUERIES, ASKED), searcher.refine_queries(QUERIES, ASKED))
    if case == "recipe":
        assert (wanted - unknown).abs().max() > 0.01 and reads_everything(searcher, encoder)


def reads_everything(searcher, encoder):
    """The gallery's refined features differ from the features, and from those without each part of the recipe."""
    for change in ({"head": False}, {"residual": 0.0}, {"rule": {**RULE, "reciprocity": 0}}, {"neighbours": "feature"}):
        other = recipe_encoder(**change)
        assert encoder_fingerprint(other) != encoder_fingerprint(encoder)
        assert (other.refine_gallery(GALLERY, CAMERAS).refined - refined(searcher)).abs().max() > 1e-3, change
    return True


def test_larger_than_memory_is_the_same(tmp_path, monkeypatch):
    encoder = recipe_encoder()
    states = encoder.refine_gallery(GALLERY, CAMERAS)
    monkeypatch.setattr(edges, "_HELD", 0)
    monkeypatch.setattr(edges, "_SEARCHED", 50)
    monkeypatch.setattr(edges, "_STEP", 17)
    searcher = GallerySearcher(store_of(tmp_path / "s"), encoder=encoder)
    searcher.refine(block_rows=BLOCK)
    assert (refined(searcher) - states.refined).abs().max() < 1e-6


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("head", [True, False])
def test_an_index_that_misses_nothing_changes_nothing(tmp_path, kind, head):
    gallery, cameras = clusters(12, seed=1), np.arange(180) % 5
    encoder = recipe_encoder(head=head)
    search = SearchConfig(index=kind, nlist=3, nprobe=3)
    searcher = GallerySearcher(store_of(tmp_path / "s", (gallery, cameras)), encoder=encoder, search=search)
    states = encoder.refine_gallery(gallery, cameras)
    assert (refined(searcher) - states.refined).abs().max() < 1e-6
    assert not searcher.input_index.exact
    wanted = encoder.refine_queries(QUERIES, states, ASKED)
    assert (searcher.refine_queries(QUERIES, ASKED) - wanted).abs().max() < 1e-6
    searcher.warm()
    grown = GallerySearcher(store_of(tmp_path / "s", (QUERIES, ASKED)), encoder=encoder, search=search)
    found = grown.search(QUERIES, 1, camids=ASKED).rows.flatten()
    assert (found == torch.arange(180, 210)).float().mean() > 0.9 and grown.states.base_rows == 180


@pytest.mark.parametrize("rows", [None, torch.arange(9)])
def test_lists_by_camera_are_those_of_the_gallery_in_memory(tmp_path, rows):
    store = store_of(tmp_path / "s")
    index, cameras = TableIndex(store, SearchConfig()), torch.from_numpy(CAMERAS)
    queries, own = normalise(QUERIES)[:9], torch.from_numpy(ASKED)[:9]
    if rows is not None:
        queries, own = store.read(0, 9), cameras[:9]
    found = search_by_camera(index, cameras, queries, own, other=5, same=4, rows=rows)
    wanted = CameraIndex(store.read(), cameras).search(queries, own, other=5, same=4, rows=rows)
    filled = wanted.scores > -torch.inf
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.index[filled], wanted.index[filled])
    assert found.other == wanted.other == 5
    few = search_by_camera(index, cameras, queries, own, other=5, same=4, limit=40)
    assert int(few.index.max()) < 40
    part = bycamera.RowPart(store, torch.tensor([3, 31, 32, 90]))
    assert torch.equal(torch.cat([block for _, block in part.blocks(stop=3)]), store.read()[[3, 31, 32]])


# --- appended images --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_appended_images_are_refined_as_queries_and_seen_by_later_ones(tmp_path):
    new, cameras, encoder = clusters(3, seed=4), np.arange(45) % 5, recipe_encoder()
    GallerySearcher(store_of(tmp_path / "s"), encoder=encoder).refine(block_rows=BLOCK)
    before = refined(GallerySearcher(tmp_path / "s", encoder=encoder)).clone()
    searcher = GallerySearcher(store_of(tmp_path / "s", (new, cameras)), encoder=encoder)
    states = searcher.refine(block_rows=20)
    assert (states.rows, states.base_rows) == (165, 120)
    assert torch.equal(refined(searcher)[:120], before)

    base = encoder.refine_gallery(GALLERY, CAMERAS)
    assert (refined(searcher)[120:] - encoder.refine_queries(new, base, cameras)).abs().max() < 1e-6
    head = encoder.inputs(new)
    lists = base.index.search(head, cameras, other=encoder.rule.depth[0], same=encoder.rule.depth[1])
    thresholds = torch.cat([base.thresholds, encoder.rule.thresholds(lists)])
    x, layers = head, []
    slots = encoder.rule.edges(base.index.search(head, cameras, other=3, same=2), base.thresholds)
    for block, layer in zip(encoder.blocks, base.layers):
        keys = (x @ layer.key_projection).view(len(x), block.attn.num_maps, -1)
        values = block.attn.value(x).view(len(x), block.attn.num_heads, -1)
        sides = (layer.query_projection, layer.key_projection)
        layers.append(type(layer)(*sides, torch.cat([layer.keys, keys]), torch.cat([layer.values, values])))
        named = dict(zip(("index", "mask", "bias"), slots))
        x = block.feed_forward(x, block.attn.attend_to_gallery(x, layer, **named))
    both, every = torch.cat([base.features, head]), np.concatenate([CAMERAS, cameras])
    grown = GalleryStates(both, both, layers, thresholds, CameraIndex(both, every))
    wanted = encoder.refine_queries(QUERIES, grown, ASKED)
    assert (searcher.refine_queries(QUERIES, ASKED) - wanted).abs().max() < 1e-6
    exact = encoder.refine_gallery(torch.cat([GALLERY, new]), every)
    assert (refined(searcher) - exact.refined).abs().max() > 1e-3  # approximate indeed
    searcher.refine(full=True, block_rows=BLOCK)
    assert (refined(searcher) - exact.refined).abs().max() < 1e-6


# --- killed, and of other cameras -------------------------------------------------------------------------------------
KILLED = """
    import os, signal, sys, torch
    sys.path[:0] = ["tests", "tests/search"]
    torch.set_num_threads(1)
    from test_search_recipe import BLOCK, GallerySearcher, recipe_encoder
    from relreid_plugin.search import layers
    real, limits, calls = layers.write_rows, [int(word) for word in sys.argv[2].split(",")], []
    def write_rows(path, first, value):
        calls.append(path)
        if len(calls) > limits[0]:
            path.open("ab").write(b"torn")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, first, value)
    layers.write_rows = write_rows
    encoder = recipe_encoder()
    for limit in limits:
        limits[0] = limit
        calls.clear()
        child = os.fork()
        if not child:
            GallerySearcher(sys.argv[1], encoder=encoder).refine(block_rows=BLOCK)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def kill_refinement(folder, *files):
    command = [warm.python(), "-c", textwrap.dedent(KILLED), str(folder), ",".join(map(str, files))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return signal.SIGKILL


def test_a_refinement_that_is_killed_again_and_again_goes_on(tmp_path, monkeypatch):
    encoder, written = recipe_encoder(), count_writes(monkeypatch)
    whole = GallerySearcher(store_of(tmp_path / "whole"), encoder=encoder)
    whole.refine(block_rows=BLOCK)
    total = len(written)
    assert {name.split(".")[0].rstrip("0123456789") for name in written} == {
        *("inputs", "lists", "scores", "thresholds", "index", "mask", "bias", "keys", "values", "x", "refined")
    }
    store_of(tmp_path / "s")
    kill_refinement(tmp_path / "s", 2, 4, 4, 9, 3)  # in the head, the graph, and both layers; the last block is done again
    with pytest.raises(UserError, match="was not refined yet"):
        _ = GallerySearcher(tmp_path / "s", encoder=encoder, automatic=False).states
    written.clear()
    searcher = GallerySearcher(tmp_path / "s", encoder=encoder)
    searcher.refine(block_rows=BLOCK)
    assert len(written) == total - 20 > 0
    assert torch.equal(refined(searcher), refined(whole))
    assert torch.equal(searcher.refine_queries(QUERIES, ASKED), whole.refine_queries(QUERIES, ASKED))
    files = {path.name for path in searcher.states.pass_folder.glob("*.bin")}
    assert files == {"inputs.bin", "refined.bin", "thresholds.bin", "keys0.bin", "keys1.bin", "values0.bin", "values1.bin"}

    for name in ("whole", "s"):
        store_of(tmp_path / name, (clusters(3, seed=4), np.arange(45) % 5))
    kill_refinement(tmp_path / "s", 3)  # while it refines the new images
    grown, expected = (GallerySearcher(tmp_path / name, encoder=encoder) for name in ("s", "whole"))
    for one in (grown, expected):
        one.refine(block_rows=BLOCK)
    assert torch.equal(refined(grown), refined(expected)) and grown.states.rows == 165
    grown.states.verify()


def test_states_of_other_cameras_are_refused(tmp_path):
    encoder = recipe_encoder()
    searcher = GallerySearcher(store_of(tmp_path / "s"), encoder=encoder)
    folder = searcher.refine().folder
    other = store_of(tmp_path / "t", (GALLERY, CAMERAS + 1 - 2 * (CAMERAS % 2)))
    folder.rename(tmp_path / "t" / folder.name)
    with pytest.raises(UserError, match="belong to other cameras than the store's; make a full pass"):
        GallerySearcher(other, encoder=encoder, automatic=False).search(QUERIES)
    with pytest.raises(UserError, match="give the cameras of the gallery"):
        edges.edges_of(encoder, None, 3)


def test_a_gallery_without_cameras_is_one_camera_and_said_to_be(tmp_path, capsys):
    encoder, some = recipe_encoder(), CAMERAS.copy()
    some[:20] = UNKNOWN
    for name, camids, unknown in (("s", None, 120), ("t", some, 20)):
        searcher = GallerySearcher(store_of(tmp_path / name, (GALLERY, camids)), encoder=encoder)
        states = encoder.refine_gallery(GALLERY, camids)
        assert (refined(searcher) - states.refined).abs().max() < 1e-6
        assert capsys.readouterr().out.count(f"{unknown} of 120 gallery images have no camera") == 1


# --- a run with the recipe --------------------------------------------------------------------------------------------


def test_a_run_with_the_recipe_is_served(tmp_path, tiny_root, capsys):
    config = {**TINY, "relation": {**TINY["relation"], "recipe": "held-out", "train": {"max_epoch": 0}}}
    chosen = {"neighbours": [3], "rounds": [2], "reciprocity": [1], "gain": 0.0, "first": 0.0, "shrinkage": [1.0]}
    config["relation"]["select"] = {**chosen, "temperature": [0.3], "soft": [0.0], "keep": [0.0], "identities": 4}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    words = ["--config-file", tmp_path / "config.yml", "--root", tiny_root, "data.save_dir", tmp_path / "run"]
    assert train([str(word) for word in words]) == 0
    extractor = FeatureExtractor(tmp_path / "run")
    encoder = extractor.encoder()
    assert encoder.block == "average" and encoder.rule is not None
    store = extractor.store(tmp_path / "s", extractor.test_records("embedded_persons_tiny"))
    files = sorted((tiny_root / "embedded_persons_tiny" / MARKET / "query").glob("*.jpg"))
    assert REFINE.main([str(tmp_path / "run"), str(tmp_path / "s")]) == 0
    asked = ["-k", "5", "--relations", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert SEARCH.main([str(tmp_path / "run"), str(tmp_path / "s"), *map(str, files[:3]), *asked]) == 0
    assert "note" not in capsys.readouterr().out
    data = extractor.run.target_features("embedded_persons_tiny")
    states = encoder.refine_gallery(data.gallery.features, data.gallery.camids)
    assert (GallerySearcher(store, encoder=encoder).states.refined.read() - states.refined).abs().max() < 1e-4
    asked[-1] = str(tmp_path / "without")
    (tmp_path / "holiday.jpg").write_bytes(files[0].read_bytes())
    assert SEARCH.main([str(tmp_path / "run"), str(tmp_path / "s"), str(tmp_path / "holiday.jpg"), *asked]) == 0
    assert "note: the camera of 1 of 1 queries is unknown" in capsys.readouterr().out
