"""The currency of features: every file form gives what was written, and what does not fit is refused in one sentence."""

from __future__ import annotations

import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch

from relreid_plugin.engine.bank import load_or_extract
from relreid_plugin.errors import UserError
from relreid_plugin.features import Features, form_of, joined, read, write
from relreid_plugin.features.store import FeatureStore, StoreWriter

N, DIM = 12, 5


def values(count=N, dim=DIM, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def whole(**changes):
    """A set with everything: names, numbers, a path with a line of another script, times and splits."""
    columns = {
        "identities": ["anna", "ben", "7", "007"] * 3,
        "cameras": [0, 1, 2] * 4,
        "paths": [f"/data/ü{row}, a.jpg" for row in range(N)],
        "times": np.arange(N) / 3,
        "splits": ["train"] * 6 + ["query"] * 2 + ["gallery"] * 4,
    }
    return Features.of(values(), **{**columns, **changes})


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.rstrip().endswith((".", "?")), sentence
    for word in words:
        assert word in sentence, sentence


def same(first, second):
    torch.testing.assert_close(first.features, second.features, rtol=0, atol=0)
    assert first.shown(first.pids) == second.shown(second.pids)
    assert first.shown_cameras(first.camids) == second.shown_cameras(second.camids)
    assert first.paths == second.paths
    for name in ("times", "splits"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None) and (one is None or (one == other).all())


# --- the type ---------------------------------------------------------------------------------------------------------
def test_labels_are_numbers_where_digits_are_written_and_names_elsewhere():
    found = whole()
    assert found.shown(found.pids[:4]) == ["anna", "ben", 7, 7]
    again = Features.of(values(2), identities=["ben", "zoe"])
    assert again.pids[0] == found.pids[1]  # the number of a name is the same everywhere
    assert Features.of(values(2), np.array([3.0, -1.0])).pids.tolist() == [3, -1]
    big = 12345678901234567890123
    assert Features.of(values(2), [big, 5]).shown(Features.of(values(2), [big, 5]).pids) == [str(big), 5]


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int8, bool, ">f4"])
def test_real_numbers_of_any_kind_become_float32(kind):
    rows = (values() * 3).astype(kind)
    found = Features.of(rows)
    assert found.features.dtype == torch.float32
    assert np.array_equal(found.features.numpy(), rows.astype(np.float32))
    assert Features.of(torch.from_numpy(values()).double()).features.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"features": values()[0]}, ("(5,)", "(N, d)")),
        ({"features": np.zeros((3, 0))}, ("(3, 0)",)),
        ({"features": values() * np.where(np.arange(N)[:, None] % 4, 1, np.nan)}, ("3 of 12", "row 0")),
        ({"features": np.full((2, 2), 1e300)}, ("2 of 2", "float32")),
        ({"features": values().astype(complex)}, ("complex",)),
        ({"features": [["a", "b"]]}, ("text",)),
        ({"features": [[1.0], [1.0, 2.0]]}, ("different lengths",)),
        ({"identities": np.arange(5)}, ("12 features", "5 identities")),
        ({"identities": np.array([1.5] * N)}, ("12 of 12", "1.5")),
        ({"identities": np.array([np.nan, *range(N - 1)])}, ("1 of 12", "row 0")),
        ({"identities": np.array([-3, *range(N - 1)])}, ("1 of 12", "-3")),
        ({"identities": ["", "nan", *"abcdefghij"]}, ("2 of 12", "row 0")),
        ({"identities": [None, *range(N - 1)]}, ("row 0", "missing")),
        ({"identities": [*"abcdefghijk", "１２"]}, ("identity '１２'", "digits other than 0-9")),
        ({"identities": [*"abcdefghijk", "NaN"], "paths": [f"{i}.jpg" for i in range(N)]}, ("'NaN'", "row 11, '11.jpg'")),
        ({"identities": np.zeros((N, 2), int)}, ("(12, 2)",)),
        ({"identities": np.zeros(N, bool)}, ("bool",)),
        ({"cameras": ["-2"] * N}, ("12 of 12", "-2")),
        ({"paths": list(range(N - 1))}, ("paths",)),
        ({"paths": ["a.jpg", "", *"abcdefghij"]}, ("1 of 12 paths", "row 1")),
        ({"times": [*["2024-05-01T10:00:00"] * (N - 1), "soon"]}, ("1 of 12", "soon")),
        ({"times": np.full(N, np.inf)}, ("12 of 12",)),
        ({"splits": ["train"] * (N - 1) + ["galery"]}, ("1 rows", "did you mean 'gallery'")),
    ],
)
def test_what_does_not_fit_is_refused_with_counts(arguments, words):
    refused(lambda: Features.of(**{"features": values(), **arguments}), *words)


def test_times_are_seconds():
    dates = ["1970-01-01T00:01:00", "1970-01-01T01:00:00+01:00", "90.5"]
    assert Features.of(values(3), times=dates).times.tolist() == [60.0, 0.0, 90.5]
    assert Features.of(values(1), times=np.array(["1970-01-02"], "datetime64[D]")).times.tolist() == [86400.0]


def test_rows_are_taken_and_put_together_again():
    found = whole()
    parts = [found.part(split) for split in ("train", "query", "gallery")]
    assert [len(part) for part in parts] == [6, 2, 4] and parts[1].paths == found.paths[6:8]
    back = joined([part.with_split(name) for part, name in zip(parts, ("train", "query", "gallery"))])
    same(back, found)
    assert found.take([3, 0]).times.tolist() == [1.0, 0.0] and found.take(torch.tensor([], dtype=torch.int64)).dim == DIM
    refused(lambda: joined([found, Features.of(values(2, 3))]), "5", "3")
    refused(lambda: joined([found, Features.of(values(2))]), "1 of 2", "times")
    refused(lambda: Features.of(values()).part("query"), "split")


def test_unknown_identities_are_left_out_with_a_sentence():
    found, note = whole(identities=np.array([-1, -1, *range(10)])).known()
    assert found.pids.tolist() == list(range(10)) and "2 of 12" in note
    refused(lambda: Features.of(values()).known(), "12")
    assert whole().known()[1] == ""
    refused(lambda: whole(cameras=np.array([-1, *range(11)])).has_cameras, "1 of 12")


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.parquet", "store"])
def test_every_form_gives_back_what_was_written(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    found = whole()
    read_again = read(write(found, tmp_path / name))
    expected = found
    if name == "store":  # unit rows, no times
        assert form_of(tmp_path / name) == "store"
        unit = found.features.double() / found.features.double().norm(dim=1, keepdim=True)
        torch.testing.assert_close(read_again.features.double(), unit, rtol=0, atol=1e-6)
        expected = Features.of(read_again.features, found.shown(found.pids), found.camids, found.paths, splits=found.splits)
    same(read_again, expected)
    assert read_again.source == str(tmp_path / name)


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.parquet"])
def test_bare_features_have_no_labels(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    found = read(write(Features.of(values()), tmp_path / name))
    assert (found.pids == -1).all() and (found.camids == -1).all() and not found.paths
    assert found.times is None and found.splits is None


def test_the_form_is_found_from_the_bytes(tmp_path):
    write(whole(), tmp_path / "x.npz").rename(tmp_path / "renamed.dat")
    same(read(tmp_path / "renamed.dat"), whole())
    write(whole(), tmp_path / "y.npy")
    same(read(tmp_path / "y.csv"), whole())


def test_other_names_of_columns_and_parts_of_one_file(tmp_path):
    rows = values()
    np.savez(tmp_path / "a.npz", Embeddings=rows, label=np.arange(N), cam=np.ones((N, 1), int), unrelated=np.eye(3))
    found = read(tmp_path / "a.npz")
    assert np.array_equal(found.features.numpy(), rows) and found.pids.tolist() == list(range(N))
    assert found.camids.tolist() == [1] * N
    parts = {"query_features": rows[:3], "query_pids": [1, 2, 3], "gallery_features": rows[3:], "gallery_pids": [4] * 9}
    np.savez(tmp_path / "b.npz", **parts)
    found = read(tmp_path / "b.npz")
    assert found.part("query").pids.tolist() == [1, 2, 3] and len(found.part("gallery")) == 9
    np.savez(tmp_path / "c.npz", arr_0=rows)
    assert np.array_equal(read(tmp_path / "c.npz").features.numpy(), rows)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def test_pickles_are_never_loaded(tmp_path):
    objects = np.array([Evil(), Evil()], dtype=object)
    np.savez(tmp_path / "a.npz", features=values(2), pids=objects)
    np.save(tmp_path / "b.npy", objects)
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save({"features": Evil()}, tmp_path / "d.pt")
    refused(lambda: read(tmp_path / "a.npz"), "a.npz", "'pids'", "pickle")
    refused(lambda: read(tmp_path / "b.npy"), "b.npy", "pickle")
    refused(lambda: read(tmp_path / "c.pkl"), "c.pkl", "pickle")
    refused(lambda: read(tmp_path / "d.pt"), "d.pt")


def test_broken_files_are_refused(tmp_path):
    np.savez(tmp_path / "twice.npz", features=values(), pids=np.arange(N), labels=np.arange(N))
    refused(lambda: read(tmp_path / "twice.npz"), "identities twice", "'pids'", "'labels'")
    with zipfile.ZipFile(tmp_path / "double.npz", "w") as archive, pytest.warns(UserWarning):
        for _ in range(2):
            with archive.open("features.npy", "w") as stream:
                np.save(stream, values())
    refused(lambda: read(tmp_path / "double.npz"), "twice")
    data = write(whole(), tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(data[: len(data) // 2])
    refused(lambda: read(tmp_path / "x.npz"), "x.npz", "damaged")
    broken = bytearray(data)
    broken[data.index(b"pids.npy") - 40] ^= 0x55  # within the features
    (tmp_path / "y.npz").write_bytes(bytes(broken))
    refused(lambda: read(tmp_path / "y.npz"), "y.npz", "damaged")
    np.savez(tmp_path / "none.npz", a=values(), b=values())
    refused(lambda: read(tmp_path / "none.npz"), "a, b", "features")
    np.savez(tmp_path / "empty.npz", features=np.zeros((0, 4)))
    refused(lambda: read(tmp_path / "empty.npz"), "0 rows")
    for name in ("missing.npz", "."):
        refused(lambda name=name: read(tmp_path / name), "npz")
    (tmp_path / "lone.csv").write_text("path,pid\na,1\n")
    refused(lambda: read(tmp_path / "lone.csv"), "lone.npy")
    refused(lambda: write(whole(), tmp_path / "x.mat"), ".mat")
    refused(lambda: read(tmp_path / "twice.npz", target="a"), "run")


def test_features_whole_and_in_parts_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", features=values(), query_features=values(2))
    refused(lambda: read(tmp_path / "x.npz"), "x.npz", "'features'", "'query_'")


def test_a_changed_name_of_an_array_is_noticed(tmp_path):
    data = write(whole(), tmp_path / "x.npz").read_bytes()
    for place in (data.index(b"camids.npy"), data.rindex(b"camids.npy")):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "x.npz").write_bytes(bytes(changed))
        refused(lambda: read(tmp_path / "x.npz"), "x.npz", "damaged")


def test_a_changed_byte_of_a_parquet_file_is_noticed_or_changes_nothing(tmp_path):
    first = whole()
    data = write(first, tmp_path / "x.parquet").read_bytes()
    for place in range(4, len(data), 31):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 7
        (tmp_path / "x.parquet").write_bytes(bytes(changed))
        try:
            found = read(tmp_path / "x.parquet")
        except UserError:
            continue
        torch.testing.assert_close(found.features, first.features, rtol=0, atol=0)


def test_text_that_a_file_cannot_hold_is_named(tmp_path):
    odd = whole(paths=[f"a\udcff{row}.jpg" for row in range(N)])
    for name in ("x.parquet", "x.npy"):
        refused(lambda name=name: write(odd, tmp_path / name), r"'a\udcff0.jpg'", "no UTF-8", "npz")
        assert not list(tmp_path.glob("x*"))
    same(read(write(odd, tmp_path / "x.npz")), odd)


def test_the_table_beside_an_npy_file(tmp_path):
    np.save(tmp_path / "x.npy", values())
    lines = [f"a{row}.jpg;{row % 3};c{row % 2};" for row in range(N)]
    (tmp_path / "x.csv").write_text("\n".join(["Path;PID;CamID;time", *lines]) + "\n")
    found = read(tmp_path / "x.npy")
    assert found.pids.tolist() == [row % 3 for row in range(N)] and found.times is None
    assert found.shown_cameras(found.camids[:2]) == ["c0", "c1"] and found.paths[5] == "a5.jpg"
    (tmp_path / "x.csv").write_text("\n".join(["path;pid;camid", *lines[:-1]]) + "\n")
    refused(lambda: read(tmp_path / "x.npy"), "12 rows", "11")
    (tmp_path / "x.csv").write_text("pid,path\n" + ",a\n" * 2 + "3,a\n" * 10)
    refused(lambda: read(tmp_path / "x.npy"), "2 of 12", "row 1", "pid")
    (tmp_path / "x.csv").write_text("pid,identity\n" + "1,1\n" * N)
    refused(lambda: read(tmp_path / "x.npy"), "identities twice")
    (tmp_path / "x.csv").write_text("a,b\n" + "1,1\n" * N)
    refused(lambda: read(tmp_path / "x.npy"), "no column")


def test_parquet_of_other_writers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows, path = values().astype(np.float64), tmp_path / "x.parquet"

    def save(**columns):
        parquet.write_table(pyarrow.table(columns), path)

    save(embedding=rows.tolist(), pid=pyarrow.array(["a", "b"] * 6).dictionary_encode(), day=list(range(N)))
    found = read(path)
    assert np.array_equal(found.features.numpy(), rows.astype(np.float32)) and found.shown(found.pids[:2]) == ["a", "b"]
    save(**{f"f{number}": rows[:, number] for number in reversed(range(DIM))}, pid=list(range(N)))
    assert np.array_equal(read(path).features.numpy(), rows.astype(np.float32))
    save(f0=rows[:, 0], f00=rows[:, 1], f1=rows[:, 2])
    refused(lambda: read(path), "f0, f00, f1", "features")
    save(embedding=[*rows[1:].tolist(), [1.0, 2.0]])
    refused(lambda: read(path), "1 of 12", "row 11", "width 2")
    save(embedding=[*rows[1:].tolist(), None])
    refused(lambda: read(path), "1 of 12")
    save(embedding=[*rows[1:].tolist(), [1.0, None, 2.0, 3.0, 4.0]])
    refused(lambda: read(path), "1 numbers")
    save(embedding=rows.tolist(), pid=[None, *range(11)])
    refused(lambda: read(path), "1 of 12", "pid")
    save(embedding=list(range(N)))
    refused(lambda: read(path), "int64", "list")
    save(pid=list(range(N)))
    refused(lambda: read(path), "features")
    table = pyarrow.table([rows.tolist(), list(range(N)), list(range(N))], names=["features", "pid", "pid"])
    parquet.write_table(table, path)
    refused(lambda: read(path), "'pid' twice")
    path.write_bytes(path.read_bytes()[:-20])
    refused(lambda: read(path), "damaged")


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and more")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(lambda: read(tmp_path / "x.parquet"), "pip install pyarrow")
    refused(lambda: write(whole(), tmp_path / "y.parquet"), "pip install pyarrow")
    assert not (tmp_path / "y.parquet").exists()


def test_shards_are_one_set_and_a_filled_store_is_not_written_into(tmp_path):
    rows = torch.from_numpy(values())
    for number in range(2):
        with StoreWriter(tmp_path / "s" / f"shard-{number}", dim=DIM, shard=(number, 2)) as writer:
            writer.add(rows[number::2], np.arange(N)[number::2])
    assert read(tmp_path / "s").pids.tolist() == [*range(0, N, 2), *range(1, N, 2)]
    write(whole(), tmp_path / "t")
    refused(lambda: write(whole(), tmp_path / "t"), "12 rows")
    assert len(FeatureStore(tmp_path / "t")) == N
    with StoreWriter(tmp_path / "u", dim=DIM):
        pass
    refused(lambda: read(tmp_path / "u"), "empty")


def test_a_run_and_its_banks(tmp_path):
    folder, parts = tmp_path / "run" / "bank", {}
    for name, labels in (("train", [0, 1, 0]), ("shop-query", [1, 2, 2]), ("shop-gallery", [1, 1, 2]), ("val-query", [5])):
        rows = torch.from_numpy(values(len(labels), seed=len(name)))
        paths = [f"{name}{row}.jpg" for row in range(len(labels))]
        parts[name] = Features(rows, np.array(labels), np.arange(len(labels)), paths, {1: "anna"} if "shop" in name else {})
        load_or_extract(folder, name, "key", lambda name=name: parts[name])
    found = read(tmp_path / "run")
    assert found.splits.tolist() == ["query"] * 3 + ["gallery"] * 3 and form_of(tmp_path / "run") == "run"
    assert found.shown(found.pids) == ["anna", 2, 2, "anna", "anna", 2] and found.source == str(tmp_path / "run")
    assert torch.equal(found.part("query").features, parts["shop-query"].features)
    assert torch.equal(read(folder / "shop-query.pt").features, parts["shop-query"].features)
    trained = read(folder / "train.pt")  # numbers of labels are those of no identity
    assert trained.shown(trained.pids) == ["training identity 0", "training identity 1", "training identity 0"]
    refused(lambda: read(tmp_path / "run", target="other"), "other", "shop")
    for part in ("query", "gallery"):
        (folder / f"mall-{part}.pt").write_bytes((folder / f"shop-{part}.pt").read_bytes())
    refused(lambda: read(tmp_path / "run"), "2 test sets", "mall, shop")
    assert len(read(tmp_path / "run", target="mall")) == 6
    torch.save({"state_dict": {}}, tmp_path / "last.pth.tar")
    refused(lambda: read(tmp_path / "last.pth.tar"), "no bank")
    (folder / "train.pt").write_bytes((folder / "train.pt").read_bytes()[:-100])
    refused(lambda: read(folder / "train.pt"), "train.pt")
    (tmp_path / "new" / "bank").mkdir(parents=True)
    refused(lambda: read(tmp_path / "new"), "keeps no features")
