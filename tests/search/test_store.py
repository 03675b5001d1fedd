"""Feature stores and their indices: what is written is read, what is damaged is refused, what is killed goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import textwrap

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT

from relreid_plugin.errors import UserError
from relreid_plugin.features.arrays import ChunkedArray, Piece, write_rows
from relreid_plugin.features.store import FeatureStore, StoreWriter
from relreid_plugin.metrics.neighbours import SearchConfig, faiss_available
from relreid_plugin.search.exact import search_exact
from relreid_plugin.search.index import _search_by_cells, open_index

DIM = 16


def features(count, *, seed=0, dim=DIM):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() * 3


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def write(folder, rows, *, chunk_rows=10, **options):
    with StoreWriter(folder, dim=rows.shape[1], chunk_rows=chunk_rows, **options) as writer:
        start = len(writer)
        numbers = np.arange(start, start + len(rows))
        writer.add(rows, numbers * 2, numbers % 5, [f"/data/images/{number:05d} ü.jpg" for number in numbers])
    return FeatureStore(folder)


def run_killed(code, *args):
    """Run python code in a process that ends itself by SIGKILL."""
    done = subprocess.run(
        [warm.python(), "-c", textwrap.dedent(code), *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


# --- writing and reading ----------------------------------------------------------------------------------------------
def test_what_is_written_is_read(tmp_path):
    rows = features(37)
    store = write(tmp_path / "s", rows, root="/data/images")
    assert len(store) == 37 and store.dim == DIM
    assert [piece.rows for piece in store.array.pieces] == [10, 10, 10, 7]
    torch.testing.assert_close(store.read(), unit(rows), rtol=0, atol=1e-7)
    assert torch.equal(store.read(8, 22), store.read()[8:22])
    chosen = torch.tensor([36, 0, 9, 10, 9, 25])
    assert torch.equal(store.take(chosen), store.read()[chosen])
    assert store.pids.tolist() == [2 * i for i in range(37)] and store.camids.tolist() == [i % 5 for i in range(37)]
    pids, camids, paths = store.labels([31, -1, 4])
    assert pids.tolist() == [62, -1, 8] and camids.tolist() == [1, -1, 4]
    assert paths == ["/data/images/00031 ü.jpg", "", "/data/images/00004 ü.jpg"]
    assert list(store.iter_paths())[10] == "/data/images/00010 ü.jpg"
    assert b"/data/images" not in (tmp_path / "s" / "chunk-000000.labels").read_bytes()


def test_reading_within_a_chunk_copies_nothing_and_never_changes_the_file(tmp_path):
    store = write(tmp_path / "s", features(10))
    view = store.read(2, 5)
    assert view.data_ptr() == store.read(0, 10)[2:].data_ptr()
    view.zero_()
    FeatureStore(tmp_path / "s", verify=True)


@pytest.mark.parametrize(
    ("dtype", "bytes_per_value", "error"), [("float32", 4, 1e-7), ("float16", 2, 1e-3), ("bfloat16", 2, 8e-3)]
)
def test_types_of_a_store(tmp_path, dtype, bytes_per_value, error):
    rows = features(12)
    store = write(tmp_path / "s", rows, dtype=dtype, chunk_rows=12)
    assert (tmp_path / "s" / "chunk-000000.features").stat().st_size == 12 * DIM * bytes_per_value
    assert store.read().dtype == torch.float32
    assert (store.read() - unit(rows)).abs().max() < error
    assert (store.read().norm(dim=1) - 1).abs().max() < 1e-6


def test_appending_leaves_what_is_there_and_its_fingerprint(tmp_path):
    first, second = features(25), features(14, seed=1)
    before = write(tmp_path / "s", first)
    after = write(tmp_path / "s", second)
    assert len(before) == 25 and len(after) == 39
    torch.testing.assert_close(after.read(), unit(torch.cat([first, second])), rtol=0, atol=1e-7)
    assert after.fingerprint(25) == before.fingerprint() != after.fingerprint()
    assert after.fingerprint(26) is None
    assert after.labels([38])[2] == ["/data/images/00038 ü.jpg"]


def test_a_killed_writer_leaves_whole_chunks_and_the_next_one_goes_on(tmp_path):
    folder = tmp_path / "s"
    write(folder, features(10))
    run_killed(
        """
        import os, signal, sys, torch
        from relreid_plugin.features import store
        real, calls = store.write_tensor, []
        def write_tensor(path, value):
            calls.append(path)
            if len(calls) == 3:  # the third chunk is half written
                path.write_bytes(b"torn")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, value)
        store.write_tensor = write_tensor
        with store.StoreWriter(sys.argv[1], dim=16, chunk_rows=10) as writer:
            writer.add(torch.ones(40, 16), paths=[f"new{i}" for i in range(40)])
        """,
        folder,
    )
    assert (folder / "chunk-000003.features").read_bytes() == b"torn"
    left = FeatureStore(folder, verify=True)
    assert len(left) == 30
    torch.testing.assert_close(left.read(0, 10), unit(features(10)), rtol=0, atol=1e-7)
    with StoreWriter(folder, dim=DIM, chunk_rows=10) as writer:
        assert len(writer) == 30 and {"new0", "new19"} <= writer.known_paths() and "new20" not in writer.known_paths()
        writer.add(features(5, seed=3))
    store = FeatureStore(folder, verify=True)
    torch.testing.assert_close(store.read(30), unit(features(5, seed=3)), rtol=0, atol=1e-7)


def test_an_error_in_the_block_keeps_whole_chunks_only(tmp_path):
    with pytest.raises(RuntimeError):
        with StoreWriter(tmp_path / "s", dim=DIM, chunk_rows=10) as writer:
            writer.add(features(25))
            raise RuntimeError
    assert len(FeatureStore(tmp_path / "s")) == 20


def test_two_writers_are_refused(tmp_path):
    with StoreWriter(tmp_path / "s", dim=DIM):
        with pytest.raises(UserError, match="being written by another process"):
            StoreWriter(tmp_path / "s", dim=DIM).__enter__()
    with StoreWriter(tmp_path / "s", dim=DIM) as writer:
        writer.add(features(3))
    assert len(FeatureStore(tmp_path / "s")) == 3


def test_many_rows_are_taken_from_many_files(tmp_path):
    store = write(tmp_path / "s", features(95))
    chosen = torch.randint(0, 95, (200,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(store.take(chosen), store.read()[chosen])
    assert torch.equal(store.take(chosen[:0]), store.read()[:0])


def test_rows_of_one_file_are_pieces_of_an_array(tmp_path):
    rows, path = torch.arange(24.0).view(12, 2), tmp_path / "values.bin"
    pieces = [Piece(path, 5, write_rows(path, 0, rows[:5]), 0), Piece(path, 7, write_rows(path, 5, rows[5:]), 5)]
    array = ChunkedArray(pieces, (2,), "float32", growing=True)
    assert torch.equal(array.read(0, 12), rows) and array.read(3, 9).data_ptr() == array.read(0, 12)[3:].data_ptr()
    assert torch.equal(array.take(torch.tensor([11, 4, 5])), rows[[11, 4, 5]])
    write_rows(path, 12, rows)  # more is being appended
    array = ChunkedArray(pieces, (2,), "float32", growing=True)
    array.verify(0)
    array.verify(1)
    with pytest.raises(UserError, match="has 192 bytes, not 96"):
        ChunkedArray(pieces, (2,), "float32")
    write_rows(path, 6, -rows[:1])
    array.verify(0)
    with pytest.raises(UserError, match="does not hold what was written"):
        array.verify(1)
    os.truncate(path, 88)
    with pytest.raises(UserError, match="has 88 bytes, not 96"):
        ChunkedArray(pieces, (2,), "float32", growing=True)


def test_a_store_that_stays_short_of_its_plan_says_so(tmp_path):
    with StoreWriter(tmp_path / "s", dim=DIM, chunk_rows=10) as writer:
        writer.plan(25)
        writer.add(features(20))
        short = FeatureStore(tmp_path / "s")
        assert "holds 20 of 25 images" in short.shortage and "relreid extract with the same arguments" in short.shortage
        writer.add(features(5))
    assert FeatureStore(tmp_path / "s").shortage == ""
    assert write(tmp_path / "s", features(3)).planned == 28  # appended without a plan
    for number in (0, 1):
        with StoreWriter(tmp_path / "t" / f"shard-00{number}-of-002", dim=DIM, shard=(number, 2)) as writer:
            writer.plan(10)
            writer.add(features(10 - number))
    assert "holds 19 of 20 images" in FeatureStore(tmp_path / "t").shortage


# --- what is refused --------------------------------------------------------------------------------------------------
def damage(folder, kind):
    data = folder / "chunk-000001.features"
    if kind == "truncated":
        os.truncate(data, data.stat().st_size - 4)
    elif kind == "missing":
        data.unlink()
    elif kind == "labels":
        with (folder / "chunk-000000.labels").open("ab") as stream:
            stream.write(b"x")
    elif kind == "manifest":
        (folder / "store.json").write_text((folder / "store.json").read_text()[:50])
    elif kind == "keys":
        (folder / "store.json").write_text('{"format": 1, "dim": 16}')
    else:
        manifest = json.loads((folder / "store.json").read_text())
        (folder / "store.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("truncated", r"damaged: 'chunk-000001.features' has 636 bytes, not 640"),
        ("missing", r"damaged: 'chunk-000001.features' is missing"),
        ("labels", r"damaged: 'chunk-000000.labels' has"),
        ("manifest", r"store.json' is damaged"),
        ("keys", r"store.json' is damaged"),
        ("format", r"has format 99"),
    ],
)
def test_a_damaged_store_is_refused_when_it_is_opened(tmp_path, kind, sentence):
    write(tmp_path / "s", features(25))
    damage(tmp_path / "s", kind)
    with pytest.raises(UserError, match=sentence):
        FeatureStore(tmp_path / "s")
    with pytest.raises(UserError, match=sentence):
        write(tmp_path / "s", features(1))


@pytest.mark.parametrize("suffix", ["features", "labels"])
def test_changed_bytes_are_found_by_verification(tmp_path, suffix):
    store = write(tmp_path / "s", features(25))
    path = tmp_path / "s" / f"chunk-000001.{suffix}"
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)
    for verify in (False, True):
        with pytest.raises(UserError, match=f"'chunk-000001.{suffix}' does not hold what was written"):
            FeatureStore(tmp_path / "s", verify=verify)
    with pytest.raises(UserError, match="does not hold what was written"):
        store.verify()
    if suffix == "features":
        with pytest.raises(UserError, match="does not hold what was written"):
            list(store.blocks(verify=True))


def test_no_store(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        FeatureStore(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no store"):
        FeatureStore(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "file", features(1))


@pytest.mark.parametrize(
    ("options", "key"), [({"model": "b"}, "model"), ({"dtype": "float16"}, "dtype"), ({"shard": (1, 2)}, "shard")]
)
def test_a_writer_of_something_else_is_refused(tmp_path, options, key):
    write(tmp_path / "s", features(5), model="a")
    with pytest.raises(UserError, match=f"has {key} "):
        write(tmp_path / "s", features(5), **{"model": "a", **options})


def test_rows_that_do_not_fit_are_refused(tmp_path):
    with StoreWriter(tmp_path / "s", dim=DIM) as writer:
        with pytest.raises(UserError, match="width 16"):
            writer.add(features(2, dim=8))
        with pytest.raises(UserError, match="2 features come with 3 identities"):
            writer.add(features(2), pids=[1, 2, 3])
        bad = features(2)
        bad[1, 3] = float("nan")
        with pytest.raises(UserError, match="image 'b.jpg' holds NaN"):
            writer.add(bad, paths=["a.jpg", "b.jpg"])
    assert len(FeatureStore(tmp_path / "s")) == 0


# --- shards -----------------------------------------------------------------------------------------------------------
def test_shards_are_read_as_one_store(tmp_path):
    rows = features(30)
    write(tmp_path / "s" / "shard-000-of-002", rows[:17], shard=(0, 2))
    with pytest.raises(UserError, match=r"holds shards \[0\] of 2"):
        FeatureStore(tmp_path / "s")
    write(tmp_path / "s" / "shard-001-of-002", rows[17:], shard=(1, 2))
    store = FeatureStore(tmp_path / "s", verify=True)
    torch.testing.assert_close(store.read(), unit(rows), rtol=0, atol=1e-7)
    assert store.labels([20])[0].tolist() == [6]
    with pytest.raises(UserError, match="folder of shards"):
        write(tmp_path / "s", features(1))
    write(tmp_path / "t" / "shard-000-of-002", rows, shard=(0, 2), model="a")
    write(tmp_path / "t" / "shard-001-of-002", rows, shard=(1, 2), model="b")
    with pytest.raises(UserError, match="do not belong together: model is a and b"):
        FeatureStore(tmp_path / "t")


# --- search -----------------------------------------------------------------------------------------------------------
def oracle(queries, rows, k):
    """Scores in float64 rounded to float32, ties by the lower row."""
    scores = (queries.double() @ rows.double().t()).float().numpy()
    order = np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in scores])
    return np.take_along_axis(scores, order, 1), order


@pytest.mark.parametrize("k", [1, 7, 45, 100])
@pytest.mark.parametrize("ties", [False, True])
def test_exact_search_is_the_definition(tmp_path, k, ties):
    rows = features(60)
    if ties:
        rows = rows[torch.arange(60) % 3]  # twenty copies of three rows, over all chunks
    store = write(tmp_path / "s", rows)
    queries = unit(torch.cat([features(9, seed=5), rows[:3]]))
    scores, found = search_exact(queries, store, k)
    wanted, order = oracle(queries, store.read(), k)
    assert np.array_equal(found.numpy(), order) and np.allclose(scores.numpy(), wanted, atol=6e-8, rtol=0)
    limited = search_exact(queries, store, k, limit=23)[1]
    assert np.array_equal(limited.numpy(), oracle(queries, store.read(0, 23), k)[1])


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_is_saved_loaded_and_extended(tmp_path, kind, monkeypatch):
    from relreid_plugin.search import index as module

    config = SearchConfig(index=kind, nlist=4, nprobe=4)
    rows, more = features(300), features(40, seed=1)
    store = write(tmp_path / "s", rows, chunk_rows=64)
    queries = unit(features(20, seed=2))
    built = open_index(store, tmp_path / "s" / "features", config)
    scores, found = built.search(queries, 5)
    wanted, order = oracle(queries, store.read(), 5)
    assert (found.numpy() == order).mean() > 0.97 and np.allclose(
        scores[found.numpy() == order], wanted[found.numpy() == order]
    )
    assert int(built.search(queries, 5, limit=100)[1].max()) < 100

    trained = []
    real = module._train
    monkeypatch.setattr(module, "_train", lambda *args: trained.append(1) or real(*args))
    again = open_index(store, tmp_path / "s" / "features", config, build=False, verify=True)
    assert torch.equal(again.search(queries, 5)[1], found) and not trained

    grown = write(tmp_path / "s", more, chunk_rows=64)
    with pytest.raises(UserError, match="covers 300 of 340 rows"):
        open_index(grown, tmp_path / "s" / "features", config, build=False)
    extended = open_index(grown, tmp_path / "s" / "features", config)
    assert extended.faiss_index.ntotal == 340 and not trained
    assert extended.search(unit(more), 1)[1].flatten().tolist() == list(range(300, 340))

    other = write(tmp_path / "other", features(340, seed=9), chunk_rows=64)
    for file in (tmp_path / "s").glob("features-*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="belongs to other features"):
        open_index(other, tmp_path / "other" / "features", config, build=False)
    rebuilt = open_index(other, tmp_path / "other" / "features", config)
    assert trained and (rebuilt.search(queries, 5)[1].numpy() == oracle(queries, other.read(), 5)[1]).mean() > 0.97


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
def test_an_index_that_has_been_outgrown_is_built_anew(tmp_path, capsys):
    config, path = SearchConfig(index="ivf"), tmp_path / "s" / "features"
    store = write(tmp_path / "s", features(200), chunk_rows=64)
    assert open_index(store, path, config).faiss_index.nlist == 5
    store = write(tmp_path / "s", features(190, seed=1), chunk_rows=64)
    assert open_index(store, path, config).faiss_index.nlist == 5  # not twice as many yet
    assert "built anew" not in capsys.readouterr().out
    store = write(tmp_path / "s", features(20, seed=2), chunk_rows=64)
    with pytest.raises(UserError, match="covers 390 of 410 rows"):
        open_index(store, path, config, build=False)
    grown = open_index(store, path, config)
    assert (grown.faiss_index.nlist, grown.faiss_index.ntotal) == (10, 410)
    assert "made for 200 rows, there are 410 now, and 5 cells have become 10" in capsys.readouterr().out
    assert grown.search(store.read(), 1)[1].flatten().tolist() == list(range(410))
    open_index(store, path, config, build=False, verify=True)


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
@pytest.mark.parametrize("probes", [3, 8])
def test_a_search_by_cells_finds_what_faiss_finds(tmp_path, probes):
    store = write(tmp_path / "s", features(400), chunk_rows=64)
    index = open_index(store, tmp_path / "s" / "features", SearchConfig(index="ivf", nlist=8, nprobe=probes)).faiss_index
    queries = unit(features(50, seed=3))
    scores, rows = _search_by_cells(index, queries, 250)
    wanted, found = index.search(queries.numpy(), 250)
    assert (rows.numpy() == found).mean() > 0.99  # near-ties may change places
    assert np.array_equal(np.sort(rows.numpy(), axis=1), np.sort(found, axis=1)) or probes == 8
    assert np.allclose(scores.numpy(), wanted, atol=1e-6, rtol=0)
    assert (found < 0).any() == (probes == 3)  # cells that hold fewer than 250 rows


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
def test_hnsw_holds_half_of_the_bytes_and_scores_are_those_of_the_table(tmp_path):
    """The rows in the index are rounded, the scores not; a front that is narrower than the candidates is kept to."""
    import faiss

    store = write(tmp_path / "s", features(300, dim=64), chunk_rows=64)
    queries = unit(features(20, seed=2, dim=64))
    index = open_index(store, tmp_path / "s" / "features", SearchConfig(index="hnsw", ef=300))
    scores, found = index.search(queries, 5)
    wanted, order = oracle(queries, store.read(), 5)
    assert np.array_equal(found.numpy(), order) and np.array_equal(scores.numpy(), wanted)
    held = faiss.downcast_index(index.faiss_index.storage)
    assert held.sa_code_size() == 128 and not np.array_equal(held.reconstruct(3), store.read(3, 4)[0].numpy())
    asked, search = [], index.faiss_index.search
    index.faiss_index.search = lambda rows, count: asked.append(count) or search(rows, count)
    index.search(queries, 5)
    index.config = SearchConfig(index="hnsw", ef=9)
    index.search(queries, 5)
    index.search(queries, 10)
    assert asked == [17, 9, 10]


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 7])
def test_neighbours_are_those_of_the_search(tmp_path, kind, ties, k):
    if kind != "flat" and not faiss_available():
        pytest.skip("faiss is not installed")
    rows = features(240)
    rows = rows[torch.arange(240) % 60] if ties else rows  # four copies of each
    store = write(tmp_path / "s", rows, chunk_rows=64)
    index = open_index(store, tmp_path / "s" / "features", SearchConfig(index=kind, nlist=4, nprobe=4))
    found, last = index.neighbours(store.read(), k)
    wanted, order = oracle(store.read(), store.read(), k)
    same = (found.sort(dim=1).values.numpy() == np.sort(order, axis=1)).all(axis=1)
    assert same.all() if kind != "hnsw" else same.mean() > 0.9
    assert np.array_equal(last.numpy()[same], wanted[same, -1])


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
@pytest.mark.parametrize("options", [{"nlist": -1}, {"nprobe": 0}, {"ef": 0}])
def test_parameters_that_make_no_sense_are_refused(tmp_path, options):
    store = write(tmp_path / "s", features(200))
    with pytest.raises(UserError, match="an index needs nlist 0"):
        open_index(store, tmp_path / "s" / "features", SearchConfig(index="ivf", **options))


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
def test_a_damaged_index_is_refused_or_built_again(tmp_path):
    config = SearchConfig(index="ivf", nlist=4, nprobe=4)
    store = write(tmp_path / "s", features(200), chunk_rows=64)
    open_index(store, tmp_path / "s" / "features", config)
    path = tmp_path / "s" / "features-ivf.faiss"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="features-ivf.faiss' has"):
        open_index(store, tmp_path / "s" / "features", config, build=False)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="does not hold what was written"):
        open_index(store, tmp_path / "s" / "features", config, build=False)
    open_index(store, tmp_path / "s" / "features", config, verify=True)
    open_index(store, tmp_path / "s" / "features", config, build=False, verify=True)


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
def test_shards_are_searched_by_faiss(tmp_path):
    rows = features(400)
    write(tmp_path / "s" / "shard-000-of-002", rows[:230], shard=(0, 2), chunk_rows=64)
    write(tmp_path / "s" / "shard-001-of-002", rows[230:], shard=(1, 2), chunk_rows=64)
    store, queries = FeatureStore(tmp_path / "s"), unit(features(20, seed=2))
    sharded = open_index(store, tmp_path / "s" / "features", SearchConfig(index="ivf", nlist=4, nprobe=4))
    assert type(sharded.faiss_index).__name__ == "IndexShards"
    wanted = oracle(queries, store.read(), 5)[1]
    assert np.array_equal(sharded.search(queries, 5)[1].numpy(), wanted)
    assert np.array_equal(open_index(store, tmp_path / "s" / "features").search(queries, 5)[1].numpy(), wanted)
    assert np.array_equal(sharded.search(queries, 5, limit=250)[1].numpy(), oracle(queries, store.read(0, 250), 5)[1])


def test_queries_that_cannot_be_searched_are_refused(tmp_path):
    index = open_index(write(tmp_path / "s", features(20)), tmp_path / "s" / "features")
    with pytest.raises(UserError, match="width 16"):
        index.search(features(2, dim=8), 3)
    with pytest.raises(UserError, match="NaN"):
        index.search(torch.full((1, DIM), float("nan")), 3)
