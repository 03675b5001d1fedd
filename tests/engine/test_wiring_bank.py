"""Banks of features on disk: what their key and file name are made of, and when they are used again."""

from __future__ import annotations

import hashlib
import os
import sys

import numpy as np
import pytest
import torch

from relreid_plugin.engine import bank, checkpoint
from relreid_plugin.features.sets import Features
from relreid_plugin.files import WriteError


def test_a_key_is_made_of_weights_reading_and_files(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    if sys.platform == "linux":
        names[2] = os.fsdecode(b"\xff.png")  # a name that is no text
    for size, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * (size + 1))
        os.utime(tmp_path / name, ns=(5, 1_000_000_007 + size))
    a, b, c = (str(tmp_path / name) for name in names)
    text = b"weights|how"
    for path, size, time, pid, camid in (
        (a, 1, 1_000_000_007, 4, 2),
        (b, 2, 1_000_000_008, 5, 3),
        (c, 3, 1_000_000_009, 5, 3),
    ):
        text += f"{path}|{size}|{time}|{pid}|{camid}".encode(errors="surrogateescape")
    key = bank.bank_key("weights", [(a, 4, 2, 9), ((b, c), 5, 3, 9)], "how")
    assert key == hashlib.sha256(text).hexdigest()[:20]


def test_the_file_of_a_set(tmp_path):
    assert bank.bank_file(tmp_path, "market1501-query") == tmp_path / "market1501-query.pt"
    assert bank.bank_file(tmp_path, "C:/data/own") == tmp_path / "C__data_own.pt"
    assert bank.bank_file(tmp_path, f"x{os.sep}y").name == "x_y.pt"
    start, end = "s" * 20, "e" * 20
    fits = start + "m" * 120 + end
    assert bank.bank_file(tmp_path, fits).name == f"{fits}.pt"
    for name in (start + "/" * 121 + end, start + "é" * 61 + end, start + "\udcff" * 121 + end):
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        assert bank.bank_file(tmp_path, name) == tmp_path / f"{start}-{digest}-{end}.pt"
    assert bank.bank_file(tmp_path, start + "é" * 60 + end).name == start + "é" * 60 + end + ".pt"


def features(value=1.0):
    pids = np.arange(12)[::2]  # not contiguous
    return Features(torch.full((6, 3), value), pids, pids[::-1], [f"{i}.png" for i in range(6)], {4: "four"})


def same(found, wanted):
    assert torch.equal(found.features, wanted.features) and found.paths == wanted.paths
    for name in ("pids", "camids"):
        assert isinstance(getattr(found, name), np.ndarray)
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist()
    assert found.identity_names == wanted.identity_names


def test_used_again_while_the_key_is_the_same(tmp_path, capsys):
    calls = []

    def extract(value):
        return lambda: calls.append(value) or features(value)

    same(bank.load_or_extract(tmp_path, "a/set", "one", extract(1.0)), features(1.0))
    assert [path.name for path in tmp_path.glob("*.pt")] == ["a_set.pt"]
    same(bank.load_or_extract(tmp_path, "a/set", "one", extract(2.0)), features(1.0))
    same(bank.load_or_extract(tmp_path, "a/set", "two", extract(3.0)), features(3.0))
    same(bank.load_or_extract(tmp_path, "a/set", "two", extract(4.0)), features(3.0))
    same(bank.load_or_extract(tmp_path, "other", "two", extract(5.0)), features(5.0))
    assert calls == [1.0, 3.0, 5.0] and capsys.readouterr().out == ""
    stored = checkpoint.read_tensors(tmp_path / "a_set.pt")
    assert stored.keys() == {"key", "features", "pids", "camids", "paths", "identity_names"} and stored["key"] == "two"
    stored.pop("identity_names")  # as older versions wrote it
    assert bank.bank_features(stored).identity_names == {}


def test_what_cannot_be_read_is_extracted_again_and_said(tmp_path, capsys):
    path = tmp_path / "set.pt"
    bank.load_or_extract(tmp_path, "set", "key", features)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError) as damage:
        checkpoint.read_tensors(path)
    same(bank.load_or_extract(tmp_path, "set", "key", lambda: features(2.0)), features(2.0))
    said = capsys.readouterr().out
    assert said == f"feature bank '{path}' cannot be read ({damage.value}); extracting it again.\n"
    checkpoint.write_tensors(path, {"key": "key"})
    same(bank.load_or_extract(tmp_path, "set", "key", lambda: features(3.0)), features(3.0))
    assert capsys.readouterr().out == f"feature bank '{path}' cannot be read (KeyError); extracting it again.\n"
    same(bank.load_or_extract(tmp_path, "set", "key", lambda: features(4.0)), features(3.0))


@pytest.mark.parametrize("optional", [False, True, None])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_that_takes_no_file(tmp_path, monkeypatch, capsys, optional, read_only):
    error = WriteError("cannot write")
    error.read_only = read_only

    def refuse(path, value):
        raise error

    monkeypatch.setattr(checkpoint, "write_tensors", refuse)
    options = {} if optional is None else {"optional": optional}
    if optional and read_only:
        same(bank.load_or_extract(tmp_path, "set", "key", features, **options), features())
        assert capsys.readouterr().out == "note: features are not kept: cannot write\n"
    else:
        with pytest.raises(WriteError, match="cannot write"):
            bank.load_or_extract(tmp_path, "set", "key", features, **options)
