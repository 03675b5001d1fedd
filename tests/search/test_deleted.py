"""Deleted rows: named in the manifest, found by no search, seen by no relation, gone from what reads a store."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_search import BLOCK, clusters, make_encoder, make_store, refined

from relreid_plugin.errors import UserError
from relreid_plugin.features.deleted import delete_rows
from relreid_plugin.features.files import read
from relreid_plugin.features.store import FeatureStore, StoreWriter
from relreid_plugin.metrics.neighbours import SearchConfig, faiss_available
from relreid_plugin.search import GallerySearcher

GONE = [0, 3, 40, 41, 119]


def kept_rows(count):
    return np.setdiff1d(np.arange(count), GONE)


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("rerank", [0, 30])
def test_no_search_finds_a_deleted_image(tmp_path, index, rerank):
    if index != "flat" and not faiss_available():
        pytest.skip("faiss is not installed")
    gallery, queries = clusters(20, seed=1), clusters(1, seed=2)[:4]
    store, kept, count = make_store(tmp_path / "s", gallery), kept_rows(300), 20 if rerank else 295
    config = SearchConfig(index=index, nlist=4, nprobe=4, ef=300)
    before = GallerySearcher(store, search=config).search(queries, 300)
    assert {int(row) for row in before.rows[0]} >= set(GONE)
    assert delete_rows(tmp_path / "s", GONE) == len(GONE) and delete_rows(tmp_path / "s", GONE[:2]) == 0
    found = GallerySearcher(tmp_path / "s", search=config).search(queries, count, rerank=rerank)
    alone = GallerySearcher(make_store(tmp_path / "t", gallery[kept])).search(queries, count, rerank=rerank)
    assert (kept[alone.rows.numpy()] == found.rows.numpy()).all()
    torch.testing.assert_close(found.scores, alone.scores, rtol=0, atol=1e-6)


def test_among_restricts_a_search_and_holds_with_deletions(tmp_path):
    gallery, queries = clusters(20, seed=1), clusters(1, seed=2)
    make_store(tmp_path / "s", gallery)
    delete_rows(tmp_path / "s", GONE)
    searcher = GallerySearcher(tmp_path / "s")
    among = torch.arange(300) % 3 == 0
    rows = searcher.search(queries, 300, among=among).rows
    wanted = [row for row in range(0, 300, 3) if row not in GONE]
    assert sorted(rows[4].tolist()) == wanted
    with pytest.raises(UserError, match=r"among has shape \(7,\)"):
        searcher.search(queries, among=among[:7])


@pytest.mark.parametrize("options", [{}, {"landmarks": "farthest"}, {"attention": "malaa"}])
def test_a_full_pass_is_that_of_a_gallery_without_the_deleted(tmp_path, options):
    gallery, queries, encoder = clusters(8, seed=1), clusters(1, seed=2), make_encoder(**options)
    kept = kept_rows(120)
    make_store(tmp_path / "s", gallery)
    delete_rows(tmp_path / "s", GONE)
    searcher = GallerySearcher(tmp_path / "s", encoder=encoder)
    searcher.refine(block_rows=BLOCK)
    states = encoder.refine_gallery(gallery[kept])
    assert (refined(searcher)[kept] - states.refined).abs().max() < 1e-6
    assert (searcher.refine_queries(queries) - encoder.refine_queries(queries, states)).abs().max() < 1e-6
    assert not set(GONE) & set(searcher.search(queries, 115).rows.flatten().tolist())


def test_queries_do_not_look_at_what_was_deleted_after_the_pass(tmp_path):
    """The gallery's own states stay until a full pass; the query's neighbours are living ones at once."""
    gallery, query, encoder = clusters(8, seed=1), clusters(1, seed=2)[:1], make_encoder()
    make_store(tmp_path / "s", gallery)
    searcher = GallerySearcher(tmp_path / "s", encoder=encoder)
    near = searcher.search(query, 4).rows[0].tolist()
    before = searcher.refine_queries(query)
    delete_rows(tmp_path / "s", near[:2])
    again = GallerySearcher(tmp_path / "s", encoder=encoder)
    assert (again.refine_queries(query) - before).abs().max() > 1e-3
    assert not set(near[:2]) & set(again.search(query, 118).rows[0].tolist())


def test_shards_lose_the_rows_that_they_hold(tmp_path):
    for shard in range(2):
        folder = tmp_path / "s" / f"shard-{shard:03d}-of-002"
        with StoreWriter(folder, dim=16, shard=(shard, 2)) as writer:
            writer.add(clusters(1, seed=shard), np.arange(15) + 100 * shard)
    assert delete_rows(tmp_path / "s", [14, 15, 29]) == 3
    store = FeatureStore(tmp_path / "s")
    assert store.deleted.tolist() == [14, 15, 29]
    assert read(tmp_path / "s").pids.tolist() == [*range(14), *range(101, 114)]
    assert FeatureStore(tmp_path / "s" / "shard-001-of-002").deleted.tolist() == [0, 14]


def test_a_store_keeps_its_deletions_when_it_grows(tmp_path):
    make_store(tmp_path / "s", clusters(2, seed=1))
    delete_rows(tmp_path / "s", [1])
    grown = make_store(tmp_path / "s", clusters(1, seed=2))
    assert grown.deleted.tolist() == [1] and len(grown) == 45 and len(read(tmp_path / "s")) == 44


def test_what_cannot_be_deleted_is_named(tmp_path):
    make_store(tmp_path / "s", clusters(1, seed=1))
    with pytest.raises(UserError, match="has no row 15; its rows are 0 to 14"):
        delete_rows(tmp_path / "s", [3, 15])
    with pytest.raises(UserError, match="has no row -1"):
        delete_rows(tmp_path / "s", [-1])
    assert not len(FeatureStore(tmp_path / "s").deleted)
    delete_rows(tmp_path / "s", range(15))
    with pytest.raises(UserError, match="is empty"):
        GallerySearcher(tmp_path / "s")
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "s")
