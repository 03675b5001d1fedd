"""A changed byte is noticed when a file is read: checkpoints, banks, indices, stores; whole files stay readable."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from test_store import features, unit, write

from relreid_plugin.backbones import read_weight_file
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.bank import load_or_extract
from relreid_plugin.engine.packing import pack
from relreid_plugin.errors import UserError
from relreid_plugin.features import verified
from relreid_plugin.features.sets import Features
from relreid_plugin.features.store import FeatureStore
from relreid_plugin.metrics.neighbours import SearchConfig, faiss_available
from relreid_plugin.seal import damage, seal
from relreid_plugin.search.index import open_index


def content():
    torch.manual_seed(2)
    sparse = torch.randn(40) * (torch.rand(40) > 0.7)
    return {
        "kind": "image",
        "epoch": 3,
        "history": [{"loss": 0.5}],
        "state_dict": {"a": torch.randn(3, 5), "b": torch.arange(4), "packed": pack(torch.cat([sparse, torch.zeros(4000)]))},
        "extra": {"loss": {"centers": torch.randn(2, 3)}},
    }


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def flips(path, step):
    """Change single bytes of a file, one after the other, and put it back."""
    data = path.read_bytes()
    edges = {*range(0, 32, 3), *range(max(0, len(data) - 48), len(data), 2)}
    positions = sorted({*range(0, len(data), step), *edges} & set(range(len(data))))
    for number, position in enumerate(positions):
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << number % 8)]) + data[position + 1 :])
        yield position
    path.write_bytes(data)


@pytest.mark.parametrize("sealed", [True, False])
def test_any_changed_byte_of_a_checkpoint_is_noticed_or_changes_nothing(tmp_path, sealed):
    path = tmp_path / "last.pth.tar"
    if sealed:
        ckpt.save(path, content())
    else:
        torch.save({"format": ckpt.FORMAT, **content()}, path)  # as older versions write it
    whole = ckpt.load(path, kind="image")
    assert damage(path) == ""
    noticed, total = 0, 0
    for position in flips(path, 23):
        total += 1
        try:
            assert same(ckpt.load(path, kind="image"), whole), position
        except UserError as error:
            noticed += 1
            assert "\n" not in str(error) and "last.pth.tar" in str(error)
        if sealed and position < path.stat().st_size - 22:
            assert damage(path), position
    assert noticed > (0.95 if sealed else 0.3) * total


@pytest.mark.parametrize("sealed", [True, False])
def test_any_changed_byte_of_a_weight_file_is_noticed_or_changes_nothing(tmp_path, sealed):
    path, state = tmp_path / "w.pth", {"a": torch.randn(7, 3), "b": torch.ones(2)}
    torch.save(state, path)
    if sealed:
        seal(path)
    for position in flips(path, 17):
        try:
            assert same(read_weight_file(path).content, state), position
        except UserError as error:
            assert "\n" not in str(error)


def test_the_checksum_is_one_file_with_what_it_protects(tmp_path):
    path = tmp_path / "x.pt"
    ckpt.write_tensors(path, {"a": torch.ones(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    with pytest.raises(ValueError, match="no archive that can be sealed"):
        seal(path)
    with pytest.raises(ValueError, match="no archive that can be sealed"):
        (tmp_path / "text").write_text("x" * 100)
        seal(tmp_path / "text")


def test_files_without_sums_stay_readable(tmp_path):
    path = tmp_path / "last.pth.tar"
    plain = content()
    del plain["state_dict"]["packed"]  # only zip archives are written packed
    torch.save({"format": 1, **plain}, path, _use_new_zipfile_serialization=False)
    assert ckpt.load(path, kind="image")["epoch"] == 3
    if hasattr(torch.serialization, "set_crc32_options"):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"format": 1, **content()}, path)
        finally:
            torch.serialization.set_crc32_options(True)
        assert ckpt.load(path, kind="image")["epoch"] == 3


@pytest.mark.parametrize(("name", "other"), [("best", "last"), ("last", "best")])
def test_a_damaged_checkpoint_names_the_whole_one_beside_it(tmp_path, name, other):
    for part in (name, other):
        ckpt.save(tmp_path / f"{part}.pth.tar", content())
    path = tmp_path / f"{name}.pth.tar"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"damaged .*'.*{other}.pth.tar', which is whole"):
        ckpt.load(path, kind="image")
    beside = tmp_path / f"{other}.pth.tar"
    beside.write_bytes(beside.read_bytes()[:-200])
    with pytest.raises(UserError, match="put back a copy of it, or train this stage again"):
        ckpt.load(path, kind="image")


@pytest.mark.parametrize(("best_epoch", "there", "said"), [(3, False, 1), (3, True, 0), (5, False, 0), (0, False, 0)])
def test_a_chosen_checkpoint_that_has_gone_is_said_once(tmp_path, capsys, best_epoch, there, said):
    state = {"kind": "image", "state_dict": {}, "epoch": 5, "best_epoch": best_epoch}
    for name in ("last", "best") if there else ("last",):
        ckpt.save(tmp_path / f"{name}.pth.tar", state)
    for _ in range(2):
        ckpt.load(tmp_path / "last.pth.tar", kind="image")
    assert capsys.readouterr().out.count("of epoch 3, which validation chose, is not there") == said


def test_a_damaged_bank_is_extracted_again_and_said(tmp_path, capsys):
    bank, calls = Features(torch.randn(4, 3), np.arange(4), np.arange(4), list("abcd")), []

    def extract():
        calls.append(1)
        return bank

    def get():
        return load_or_extract(tmp_path, "train", "key", extract)

    get()
    path = tmp_path / "train.pt"
    for count, position in enumerate(flips(path, 400), start=2):
        if position % 3 and position > 64:
            continue
        assert torch.equal(get().features, bank.features), (count, position)
        assert "extracting it again" in capsys.readouterr().out or len(calls) > 1
    before = len(calls)
    get()
    assert len(calls) == before and before > 10


# --- stores -----------------------------------------------------------------------------------------------------------
def test_any_changed_byte_of_a_store_is_noticed_or_changes_nothing(tmp_path):
    write(tmp_path / "s", features(13), root="/data/images", model="m")
    store = FeatureStore(tmp_path / "s")
    whole = store.read(), store.pids, store.camids, list(store.iter_paths()), store.model, store.planned
    for file in sorted((tmp_path / "s").glob("*.features")) + sorted((tmp_path / "s").glob("*.labels")):
        for position in flips(file, 60):
            with pytest.raises(UserError, match="does not hold what was written"):
                FeatureStore(tmp_path / "s")
            assert position >= 0
    for position in flips(tmp_path / "s" / "store.json", 3):
        try:
            found = FeatureStore(tmp_path / "s")
        except UserError as error:
            assert "\n" not in str(error)
            continue
        again = found.read(), found.pids, found.camids, list(found.iter_paths()), found.model, found.planned
        assert all(np.array_equal(a, b) for a, b in zip(whole, again)), position


def test_manifests_of_older_versions_are_read(tmp_path):
    write(tmp_path / "s", features(13))
    path = tmp_path / "s" / "store.json"
    manifest = json.loads(path.read_text())
    assert len(manifest.pop("checksum")) == 8
    path.write_text(json.dumps(manifest))
    assert len(FeatureStore(tmp_path / "s")) == 13
    assert len(write(tmp_path / "s", features(2))) == 15 and "checksum" in path.read_text()


@pytest.mark.skipif(not faiss_available(), reason="faiss is not installed")
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_changed_byte_of_an_index_is_noticed(tmp_path, kind, capsys):
    store, config = write(tmp_path / "s", features(200), chunk_rows=64), SearchConfig(index=kind, nlist=4, nprobe=4)
    path = tmp_path / "s" / "features"
    wanted = open_index(store, path, config).search(unit(features(5, seed=1)), 3)[1]
    for _ in flips(tmp_path / "s" / f"features-{kind}.faiss", 4000):
        with pytest.raises(UserError, match="does not hold what was written"):
            open_index(store, path, config, build=False)
    data = bytearray((tmp_path / "s" / f"features-{kind}.faiss").read_bytes())
    data[1000] ^= 1
    (tmp_path / "s" / f"features-{kind}.faiss").write_bytes(data)
    again = open_index(store, path, config)
    assert "the index is built anew" in capsys.readouterr().out
    assert torch.equal(again.search(unit(features(5, seed=1)), 3)[1], wanted)


def test_files_are_compared_once_and_again_after_a_change(tmp_path, monkeypatch):
    write(tmp_path / "s", features(25))
    time.sleep(2 * verified._TICK)
    read, real = [], verified.file_digest
    monkeypatch.setattr(verified, "file_digest", lambda path, **part: read.append(path.name) or real(path, **part))

    def opened():
        read.clear()
        FeatureStore(tmp_path / "s")
        return sorted(read)

    (tmp_path / "s" / verified.RECORD).unlink(missing_ok=True)
    assert len(opened()) == 6 and opened() == []
    path = tmp_path / "s" / "chunk-000001.features"
    data, status = path.read_bytes(), path.stat()
    path.write_bytes(data)  # the same bytes
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # and a time of change that was put back
    time.sleep(2 * verified._TICK)
    assert opened() == [path.name] and opened() == []
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    time.sleep(2 * verified._TICK)
    read.clear()
    FeatureStore(tmp_path / "copy")
    assert len(read) == 6
    write(tmp_path / "s", features(3))
    time.sleep(2 * verified._TICK)
    assert set(opened()) <= {"chunk-000003.features", "chunk-000003.labels"} and opened() == []
    for text in ("", "[1]", '{"chunk-000001.features": 3}'):
        (tmp_path / "s" / verified.RECORD).write_text(text)
        assert len(opened()) == 8
    path.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="does not hold what was written"):
        FeatureStore(tmp_path / "s")


def test_a_folder_that_cannot_be_written_is_compared_every_time(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verified, "write_json", full)
    write(tmp_path / "s", features(12))
    time.sleep(2 * verified._TICK)
    for _ in range(2):
        assert len(FeatureStore(tmp_path / "s")) == 12
    assert not (tmp_path / "s" / verified.RECORD).exists()
