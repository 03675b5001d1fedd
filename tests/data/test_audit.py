"""What training and test data share, and which queries cannot be scored, is said before training."""

from __future__ import annotations

import csv
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from relreid_plugin import host
from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.data.audit import TestSet, audit_splits, check_matches
from relreid_plugin.data.samefile import FileNumbers, file_numbers, same_content
from relreid_plugin.errors import UserError


def image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    return path.with_suffix(".png").name


ROWS = [(pid, camera, "train") for pid in "abcd" for camera in (0, 1)]
ROWS += [(pid, 0, "query") for pid in "xyz"] + [(pid, 1, "gallery") for pid in "xyz"]


@pytest.fixture
def table(tmp_path):
    """Write a CSV data set: the clean one, with some rows changed or added; returns its name."""

    def write(name="set.csv", rows=(), drop=(), folder="images"):
        lines = []
        for number, (pid, camera, split) in enumerate(ROWS):
            file = f"{folder}/{number}.png"
            image(tmp_path / file, number)
            lines.append([file, pid, camera, split])
        lines = [line for number, line in enumerate(lines) if number not in drop] + [list(row) for row in rows]
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["path", "pid", "camid", "split"], *lines])
        return name

    return write


@pytest.fixture
def manager(tmp_path):
    """Build the data manager of a configuration."""

    def build(sources, targets=None, **changes):
        cfg = get_default_config()
        cfg.use_gpu, cfg.data.root, cfg.data.workers = False, str(tmp_path), 0
        cfg.data.sources = [sources] if isinstance(sources, str) else sources
        cfg.data.targets = cfg.data.sources if targets is None else targets
        cfg.data.height, cfg.data.width, cfg.train.batch_size = 16, 8, 4
        for key, value in changes.items():
            node, leaf = key.split("__")
            cfg[node][leaf] = value
        return host.build_datamanager(cfg, cache_dir=tmp_path / "cache")

    return build


def test_a_clean_set_is_passed_without_a_word(table, manager):
    assert manager(table()).notes == []


@pytest.mark.parametrize("kind", ["path", "spelling", "link", "hard link", "copy"])
def test_a_training_file_that_is_tested_on_is_said(table, manager, tmp_path, capsys, kind):
    file = "images/0.png"
    table()
    if kind == "spelling":
        file = "images/../images/./0.png"
    elif kind != "path":
        make = {"link": os.symlink, "hard link": os.link, "copy": shutil.copy}[kind]
        make(tmp_path / file, tmp_path / "images" / "again.png")
        file = "images/again.png"
    name = table(rows=[(file, "x", 1, "gallery")])
    built = manager(name)
    word = "copied from training images" if kind == "copy" else "trained on as well"
    (note,) = built.notes
    assert "test set 'set.csv': 1 image is " in note and word in note and "0.png" in note
    assert f"note: {note}" in capsys.readouterr().out
    assert len(manager(name, data__check_leakage="path").notes) == (0 if kind == "copy" else 1)
    assert manager(name, data__check_leakage="none").notes == []


def test_counts_and_first_names(table, manager):
    rows = [(f"images/{number}.png", "x", 1, "gallery") for number in range(6)]
    (note,) = manager(table(rows=rows)).notes
    assert "6 images are trained on as well" in note and "; 3 more)" in note


def test_another_test_set_with_the_training_files_is_named(table, manager):
    table("one.csv")
    table("two.csv", folder="copied")
    (note,) = manager("one.csv", ["one.csv", "two.csv"], data__check_leakage="path").notes or [""]
    assert note == ""
    notes = manager("one.csv", ["two.csv"]).notes
    assert notes == []  # copies of the test images only
    table("two.csv", rows=[("images/1.png", "x", 1, "gallery"), ("images/2.png", "y", 1, "gallery")])
    (note,) = manager("one.csv", ["two.csv"]).notes
    assert "'two.csv': 2 images are trained on as well" in note


def test_a_training_file_under_two_identities_is_refused(table, manager, tmp_path):
    with pytest.raises(UserError, match="1 training image is labelled as two identities: .*0.png' is 'a' and 'b'"):
        manager(table(rows=[("images/0.png", "b", 1, "train")]))
    os.symlink(tmp_path / "images" / "0.png", tmp_path / "images" / "again.png")
    with pytest.raises(UserError, match=r"0\.png' \(also '.*again\.png'\)"):
        manager(table(rows=[("images/again.png", "b", 1, "train")]), train__val_fraction=0.5)


def test_labels_that_contradict_each_other_elsewhere_are_said(table, manager, tmp_path):
    table()
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "copy.png")
    (note,) = manager(table(rows=[("images/copy.png", "b", 1, "train")])).notes
    assert "1 training image is there with the same bytes under two identities" in note and "copy.png" in note
    two, own = manager(table(rows=[("images/9.png", "x", 1, "gallery")])).notes  # a query of y, in the gallery as x
    assert "1 image is labelled as two identities" in two and "1 query is in the gallery too" in own
    two, twice = manager(table(rows=[("images/11.png", "y", 1, "gallery")])).notes
    assert "1 image is labelled as two identities" in two and "11.png" in two and "listed more than once" in twice


def test_a_file_that_is_listed_twice_is_said(table, manager):
    notes = manager(table(rows=[("images/0.png", "a", 1, "train"), ("images/../images/11.png", "x", 1, "gallery")])).notes
    assert len(notes) == 2
    assert "1 of 9 train images are further names of files that are there already" in notes[0]
    assert "1 of" in notes[1] and "gallery images are further names" in notes[1]


def test_identities_in_training_and_testing_are_said(table, manager):
    image_rows = [("images/0.png", "b", 1, "gallery")]
    notes = manager(table(rows=[*image_rows, ("images/8.png", "c", 0, "gallery")]), data__check_leakage="path").notes
    (note,) = [note for note in notes if "unseen identities" in note]
    assert "2 identities are trained on as well ('b'; 'c')" in note


def test_the_same_names_in_two_data_sets_are_not_one_identity(table, manager):
    table("one.csv")
    # the other one's test identities are called as the first one's training identities
    table("two.csv", folder="other", rows=[])
    assert manager(["one.csv"], ["two.csv"], data__check_leakage="path").notes == []


@pytest.mark.parametrize("key", ["sources", "targets"])
def test_a_data_set_named_twice_is_refused(table, manager, tmp_path, key):
    name = table()
    for other in (name, f"./{name}", str(tmp_path / name)):
        names = {"sources": [name], "targets": [name], key: [name, other]}
        with pytest.raises(UserError, match=f"key 'data.{key}' names .*name it once"):
            manager(names["sources"], names["targets"])


def test_no_match_at_all_is_refused_before_training(table, manager):
    with pytest.raises(UserError, match="'set.csv' no query has a match .*no gallery image has the identity of a query"):
        manager(table(drop=(11, 12, 13), rows=[("images/0.png", "v", 1, "gallery")]), data__check_leakage="none")
    rows = [(f"images/{number}.png", pid, 0, "gallery") for number, pid in zip((11, 12, 13), "xyz")]
    with pytest.raises(UserError, match="of the query's own camera"):
        manager(table(drop=(11, 12, 13), rows=rows))
    rows = [(f"images/{number}.png", pid, 1, "gallery") for number, pid in zip((8, 9, 10), "xyz")]
    with pytest.raises(UserError, match="the query itself"):
        manager(table(drop=(11, 12, 13), rows=rows))


def test_queries_without_a_match_are_counted(table, manager):
    (note,) = manager(table(drop=(11,))).notes
    assert "1 of 3 queries without a match" in note and "8.png" in note


def test_a_query_in_the_gallery_is_said_unless_its_camera_discards_it(table, manager):
    (note,) = manager(table(rows=[("images/8.png", "x", 1, "gallery")])).notes
    assert "1 query is in the gallery too" in note and "never counted as its match" in note
    assert manager(table(rows=[("images/8.png", "x", 0, "gallery")])).notes == []


def test_copies_of_queries_that_count_as_matches_are_said(table, manager, tmp_path):
    table()
    shutil.copy(tmp_path / "images" / "8.png", tmp_path / "images" / "copy.png")
    (note,) = manager(table(rows=[("images/copy.png", "x", 1, "gallery")])).notes
    assert "1 gallery image is copied from queries under another name and counted as matches" in note and "8.png" in note


def test_held_out_identities_have_a_match(table, manager):
    built = manager(table(), train__val_fraction=0.5)
    assert built.val_query and built.notes == []
    items = [("/a", 1, 0), ("/b", 1, 0)]
    with pytest.raises(UserError, match="'train.seed'"):
        check_matches("held-out identities", TestSet(items[:1], items[1:]), way_out="change 'train.seed'")


def test_samples_of_several_files_are_compared_as_a_whole():
    train = [(("/n/r1", "/n/blank"), 0, 0), (("/n/r2", "/n/blank"), 1, 0)]  # one blank picture for what is missing
    test = TestSet([(("/n/r3", "/n/blank"), 5, 0)], [(("/n/r4", "/n/t4"), 5, 1)])
    (note,) = audit_splits(train, ["a", "b"], {"set": test}, files=list)
    assert "1 image is trained on as well ('/n/blank')" in note
    with pytest.raises(UserError, match="'a' and 'b'"):
        audit_splits([*train, (("/n/r1", "/n/blank"), 1, 0)], ["a", "b"], {}, files=list)


def test_file_numbers_and_contents(tmp_path, monkeypatch):
    for name, text in (("a", "1" * 9000), ("b", "1" * 9000), ("c", "2" * 9000), ("d", "1" * 8999)):
        (tmp_path / name).write_text(text)
    (tmp_path / "e").write_text("3" + "1" * 8999)  # the same middle as a and b
    os.mkfifo(tmp_path / "f")
    paths = [str(tmp_path / name) for name in "abcdef"] + [str(tmp_path / "gone")]
    assert same_content(paths, lambda group: True) == [[0, 1]]
    assert same_content(paths, lambda group: False) == []
    os.link(tmp_path / "a", tmp_path / "h")
    os.symlink(tmp_path, tmp_path / "here")
    numbers = FileNumbers()
    assert numbers.many([paths[0], f"{tmp_path}/h", f"{tmp_path}/here/./a", paths[1], paths[0]]).tolist() == [0, 0, 0, 1, 0]
    assert file_numbers(paths[:2], paths[2:]) is None
    query, gallery = file_numbers(["/nowhere/q", paths[0]], ["/nowhere/../nowhere/q", "/nowhere/r"])
    assert query[0] == gallery[0] and len({query[1], *gallery}) == 3
    # file systems that give one number to all files
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: os.stat_result([*real(path, **k)[:1], 5, 5, 1, *real(path, **k)[4:]]))
    assert FileNumbers().many(paths[1:4]).tolist() == [0, 1, 2]
