"""Identities and cameras: names of files, tables as spreadsheets write them, numbers of any length, names shown as such."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MARKET, TINY
from PIL import Image

from relreid_plugin.config.defaults import load_config
from relreid_plugin.data import names as names_module
from relreid_plugin.data.cameras import UNKNOWN, CameraTable
from relreid_plugin.data.folder import read_market_folder
from relreid_plugin.data.labels import as_label, numeric_order, plain, spelling_notes, stored_number
from relreid_plugin.data.names import PRESETS, name_pattern, read_market_name
from relreid_plugin.data.table import read_table
from relreid_plugin.errors import UserError
from relreid_plugin.features.store import StoreWriter
from relreid_plugin.rib.transreid import CameraEmbedding
from relreid_plugin.search import FeatureStore
from relreid_plugin.search.extractor import name_labels


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8), (90, 40, 10)).save(path)
    return path


def folder(place: Path, train: list[str], query: list[str], gallery: list[str]) -> Path:
    for split, names in (("train", train), ("query", query), ("gallery", gallery)):
        for name in names:
            picture(place / split / name)
    return place


MARKET_NAMES = (["0001_c1_0.png", "0002_c2_0.png"], ["0003_c1_0.png"], ["0003_c2_0.png", "0004_c1_0.png"])


# --- names of files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    ["c1_000_01.png", "cam01_person01.png", "Cam-2_0001.png", "camera3_x_1.png", "C2s1_0001_1.png", "kamera1_ann.png"],
)
@pytest.mark.parametrize("split", [0, 1, 2])
def test_names_that_begin_with_a_camera_are_refused(tmp_path, first, split):
    names = [list(part) for part in MARKET_NAMES]
    names[split] = [first, first.replace("1", "7")] if split == 1 else [first]
    with pytest.raises(
        UserError, match=r"begins with a camera where the identity is expected.*name it ID_cC_.*camera-first"
    ):
        read_market_folder(folder(tmp_path, *names))


def test_folders_of_cameras_are_refused(tmp_path):
    for split in ("train", "query", "gallery"):
        picture(tmp_path / split / "cam1" / "0001_0.png")
        picture(tmp_path / split / "cam2" / "0001_1.png")
    with pytest.raises(UserError, match="begins with a camera"):
        read_market_folder(tmp_path)


@pytest.mark.parametrize("words", [("cat", "cow", "crab"), ("c3po", "c3pa", "camilla"), ("car12x", "camel", "c")])
def test_honest_names_are_identities(tmp_path, words):
    one, two, three = words
    names = ([f"{one}_c1_0.png", f"{two}_c2_0.png"], [f"{three}_c1_0.png"], [f"{three}_c2_0.png"])
    found = read_market_folder(folder(tmp_path, *names))
    assert found.train_identities == sorted([one, two]) and found.has_cameras
    assert found.identity_names[found.query[0][1]] == three and found.query[0][1] == found.gallery[0][1]


def test_cameras_in_another_form_are_not_passed_over(tmp_path):
    names = (["1_cam1.png", "2_cam2.png"], ["3_cam1.png"], ["3_cam2.png"])
    with pytest.raises(UserError, match="seems to name a camera, but not as _cC"):
        read_market_folder(folder(tmp_path, *names))


@pytest.mark.parametrize(
    ("preset", "name", "wanted"),
    [
        ("market", "0002_c1s1_000451_03.jpg", ("0002", "1")),
        ("duke", "0001_c2_f0046182.jpg", ("0001", "2")),
        ("msmt17", "0007_000_03_0303morning_0008_0.jpg", ("0007", "03")),
        ("veri", "0002_c002_00030600_0.jpg", ("0002", "002")),
        ("vehicleid", "0012/0000001.jpg", ("0012", None)),
        ("vehicleid", "0012_0000001.jpg", ("0012", None)),
        ("camera-first", "c1_0002_01.jpg", ("0002", "1")),
        ("camera_first", "cam01_person01.png", ("person01", "01")),
        ("Camera-First", "Camera-2-ann-3.png", ("ann", "2")),
    ],
)
def test_presets(preset, name, wanted):
    assert name_pattern(preset).read(f"/somewhere/{name}") == wanted
    assert set(PRESETS) == {"market", "duke", "msmt17", "veri", "vehicleid", "camera-first"}


def test_patterns_read_folders_and_are_kept_by_the_run(tmp_path, tiny_root, command):
    data = tmp_path / "own"
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        for file in sorted((tiny_root / "embedded_persons_tiny" / MARKET / split).glob("*.jpg")):
            identity, camera, *rest = file.name.split("_")
            target = data / split / f"c{camera[1]}_{identity}_{'_'.join(rest)}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    config = {**TINY, "data": {**TINY["data"], "sources": [str(data)], "targets": [str(data)]}}
    config["train"] = {**TINY["train"], "stages": [1], "max_epoch": 0}
    config["relation"] = {}
    path = tmp_path / "own.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    code, _, err = command("--config-file", path, "data.save_dir", tmp_path / "none")
    assert code == 2 and "begins with a camera" in err and not (tmp_path / "none").exists()
    run = tmp_path / "run"
    code, _, err = command("--config-file", path, "data.save_dir", run, "data.name_pattern", "camera-first")
    assert code == 0, err
    expression = r"c(?P<camera>\d+)_(?P<identity>-?\d+)_"
    code, _, err = command("--config-file", path, "data.save_dir", tmp_path / "regex", "data.name_pattern", expression)
    assert code == 0, err
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8"))["rows"][0] for name in ("run", "regex")
    )
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert load_config(run / "config.yml").data.name_pattern == "camera-first"
    plain_names = read_market_folder(tiny_root / "embedded_persons_tiny" / MARKET)
    found = read_market_folder(data, name_pattern("camera-first"))
    for split in ("train", "query", "gallery"):
        assert sorted(item[1:] for item in getattr(found, split)) == sorted(item[1:] for item in getattr(plain_names, split))
    assert found.train_identities == plain_names.train_identities


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("markt", "which is no preset"),
        ("c(?P<camera>", "is no regular expression"),
        (r"c(?P<camera>\d+)", "has no group"),
        (r"(?P<identity>\d+)(?P<scene>x)", "has a group 'scene', which nothing reads"),
        (r"(?P<identity>a" + "a" * 600 + ")", "500 are allowed"),
    ],
)
def test_patterns_that_are_none_are_refused(key, message):
    with pytest.raises(UserError, match=message):
        name_pattern(key)


def test_a_name_that_does_not_match_is_named_and_slow_patterns_end(monkeypatch):
    with pytest.raises(UserError, match=r"image '/a/x\.jpg' does not match 'data\.name_pattern duke' \(names like 0001_c2_"):
        name_pattern("duke").read("/a/x.jpg")
    monkeypatch.setattr(names_module, "MATCH_SECONDS", 0.1)
    slow = name_pattern(r"(?P<identity>(x+)+\2)+y")
    with pytest.raises(UserError, match="takes more than .* s for the name.*without repetitions inside repetitions"):
        slow.read("/a/" + "x" * 50 + "zy.jpg")
    assert name_pattern("") is None and read_market_name("c1_0002_01.jpg") is None


# --- numbers and names --------------------------------------------------------------------------------------------------


def table(place: Path, rows: list[tuple[str, str, str]], *, head="path,pid,camid,split", separator=",", encoding="utf-8"):
    for name, _, _ in rows:
        picture(place / name)
    splits = ["train", "train", "query", "gallery", "gallery"]
    lines = [head, *(",".join([*row, split]) for row, split in zip(rows, splits))]
    file = place / "set.csv"
    file.write_bytes("\r\n".join(lines).replace(",", separator).encode(encoding))
    return file


ROWS = [("a.png", "1", "0"), ("b.png", "2", "1"), ("c.png", "3", "0"), ("d.png", "3", "1"), ("e.png", "4", "0")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("head", ["path,pid,camid,split", "Path,PID,CamID,Split", " path , pid , camid , split "])
def test_tables_as_spreadsheets_write_them(tmp_path, separator, encoding, head):
    found = read_table(table(tmp_path, ROWS, head=head, separator=separator, encoding=encoding))
    assert [item[1:] for item in found.train] == [(0, 0), (1, 1)]
    assert found.query[0][1:] == (3, 0) and [item[1:] for item in found.gallery] == [(3, 1), (4, 0)]


def test_text_is_numbered_and_its_names_are_kept(tmp_path):
    rows = [(name, f"p{pid}", ("Süd", "Nord")[int(camera)]) for name, pid, camera in ROWS]
    found = read_table(table(tmp_path, rows))
    assert found.train_identities == ["p1", "p2"] and found.camera_names == {0: "Nord", 1: "Süd"}
    assert found.identity_names == {1: "p1", 2: "p2", 3: "p3", 4: "p4"}
    assert found.query[0][1:] == (3, 1) and found.gallery[0][1:] == (3, 0)


def test_numbers_of_any_length_are_ranked(tmp_path):
    long = "9" * 30
    rows = [(name, f"{pid}{long}", f"{camera}{long}") for name, pid, camera in ROWS]
    found = read_table(table(tmp_path, rows))
    assert found.query[0][1] == found.gallery[0][1] != found.gallery[1][1]
    assert {item[2] for item in (*found.train, *found.query, *found.gallery)} == {0, 1}
    assert found.identity_names[found.query[0][1]] == f"3{long}"
    names = ([f"1{long}_c{long}_0.png", f"2{long}_c1_0.png"], [f"3{long}_c1_0.png"], [f"3{long}_c{long}_0.png"])
    assert read_market_folder(folder(tmp_path / "names", *names)).gallery[0][2] == 1


def test_two_spellings_of_a_number_are_one_and_said(tmp_path):
    rows = [(*ROWS[0],), (*ROWS[1],), ("c.png", "007", "0"), ("d.png", "7", "01"), ("e.png", "4", "0")]
    found = read_table(table(tmp_path, rows))
    assert found.query[0][1] == found.gallery[0][1] == 7
    assert any("'007'" in note and "are one number" in note for note in found.notes)
    assert any("'01'" in note and "cameras" in note for note in found.notes)
    (note,) = spelling_notes({"Nord": "a", "nord": "b"}, "cameras")
    assert "are alike, but count as different cameras" in note


@pytest.mark.parametrize("other", ["+7", "7.0", " 7", "7\u200b", "\u202e7", "7 "])
def test_labels_that_look_alike_are_said(other):
    (note,) = spelling_notes({"7": "a", other: "b"}, "identities")
    assert "are alike, but count as different identities" in note and note.isprintable()


def test_a_name_of_two_lines_has_its_camera():
    assert read_market_name("a\nb_c3_0.jpg") == name_pattern("market").find("a\nb_c3_0.jpg") == ("a\nb", "3")


def test_a_split_of_junk_alone_is_refused(tmp_path):
    rows = [(name, "-1" if name in "d.png e.png" else pid, camera) for name, pid, camera in ROWS]
    with pytest.raises(UserError, match=r"all 2 gallery images have the identity -1, .* such as '.*d\.png'"):
        read_table(table(tmp_path, rows))


@pytest.mark.parametrize("name", ["camera", "CamIDs", "cam_id"])
def test_cameras_under_another_name_are_not_passed_over(tmp_path, name):
    with pytest.raises(UserError, match=f"line 1: the column '{name}' is not read; name it camid"):
        read_table(table(tmp_path, ROWS, head=f"path,pid,{name},split"))


def test_a_table_of_many_columns_is_read_at_once(tmp_path):
    file = table(tmp_path, ROWS)
    head, *rows = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([",".join([head, *map(str, range(30000))]), *rows]), encoding="utf-8")
    start = time.process_time()
    assert len(read_table(file).train) == 2
    assert time.process_time() - start < 3  # minutes where every name is counted among all


def test_backslashes_are_folders(tmp_path):
    picture(tmp_path / "pictures" / "a.png")
    file = table(tmp_path, ROWS)
    file.write_text(file.read_text(encoding="utf-8").replace("a.png", "pictures\\a.png"), encoding="utf-8")
    assert read_table(file).train[0][0] == str(tmp_path / "pictures" / "a.png")


@pytest.mark.parametrize("split", range(3))
@pytest.mark.parametrize("label", ["-5", "-007", "-" + "9" * 30])
def test_numbers_below_minus_one_are_refused_in_names_as_in_features(tmp_path, split, label):
    names = [["1_c1_a.png"], ["2_c1_a.png"], ["2_c2_a.png", "-1_c1_b.png", "-0_c1_b.png", "−5_c1_b.png"]]
    read_market_folder(folder(tmp_path / "good", *names))
    names[split].append(f"{label}_c1_a.png")
    with pytest.raises(UserError, match=f"identity '{label}' of '.*{label}_c1_a.png' is a number below -1; .* or -1 where"):
        read_market_folder(folder(tmp_path / "bad", *names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("1,0,train", "1,0,train,more"), "line 2: 5 cells for 4 columns"),
        (("camid,split", "camid,split,pid"), "line 1: the header has the column 'pid' twice"),
        (("1,0,train", ",0,train"), "line 2: the column 'pid' is empty"),
        (("1,0,train", "NaN,0,train"), "line 2: the column 'pid' holds 'NaN'"),
        (("1,0,train", "1,-1,train"), "line 2: camid must be an integer from 0, or a name, got '-1'"),
        (("1,0,train", "1,0.5,train"), "got '0.5'"),
        (("1,0,train", "²,0,train"), "is a number in digits other than 0-9"),
        (("1,0,train", "-5,0,train"), "identity '-5' of '.*' is a number below -1"),
        (("1,0,train", "1,0,training"), "unknown split 'training'"),
        (("a.png,1", '"a.png,1'), "a quote is not closed"),
        (("a.png", "a\0.png"), "NUL bytes"),
        (("path,pid", "file,pid"), "no column 'path' in the header"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_line(tmp_path, change, message):
    file = table(tmp_path, ROWS)
    file.write_bytes(file.read_bytes().replace(*(part.encode() for part in change), 1))
    with pytest.raises(UserError, match=message):
        read_table(file)


def test_plain_labels():
    assert [plain(text) for text in ("007", "-01", "0", "-0", "x07", "")] == ["7", "-1", "0", "0", "x07", ""]
    assert as_label("007") == 7 and as_label("9" * 19) == "9" * 19 and as_label("Nord") == "Nord"
    ordered = ["-12", "-3", "0", "7", "30", "9" * 25, "a"]
    assert sorted(reversed(ordered), key=numeric_order) == ordered
    numbers = [stored_number(label) for label in (5, "Nord", "Süd", "9" * 19)]
    assert numbers[0] == 5 and len(set(numbers)) == 4 and all(2**62 <= number < 2**63 for number in numbers[1:])


# --- stores -------------------------------------------------------------------------------------------------------------


def test_stores_keep_names_and_long_numbers(tmp_path):
    long = "9" * 25
    labels = [(3, 0), ("ann", "Nord"), (long, 99_999_999_999), ("ann", 1), (-1, -1)]
    with StoreWriter(tmp_path / "store", dim=4, model="m") as writer:
        pids, camids = zip(*labels)
        writer.add(torch.eye(5, 4), pids, camids, [str(tmp_path / f"{row}.jpg") for row in range(5)])
        writer.flush()
    store = FeatureStore(tmp_path / "store", verify=True)
    pids, camids, _ = store.labels(range(5))
    found = [
        (store.identity_names.get(int(pid), int(pid)), store.camera_names.get(int(camid), int(camid)))
        for pid, camid in zip(pids, camids)
    ]
    assert found == labels


def test_labels_of_search_results_are_those_of_the_names():
    assert name_labels("/a/0007_c2s1_3.jpg") == ("/a/0007_c2s1_3.jpg", 7, 2)
    assert name_labels("/a/ann_c2_3.jpg")[1:] == ("ann", 2)
    assert name_labels("/a/c1_000_01.jpg")[1:] == (-1, -1) and name_labels("/a/photo.jpg")[1:] == (-1, -1)
    assert name_labels("/a/c1_007_01.jpg", name_pattern("camera-first"))[1:] == (7, 1)


# --- cameras of TransReID -----------------------------------------------------------------------------------------------


def test_a_camera_that_training_never_saw_has_the_mean_embedding():
    embedding = CameraEmbedding(2, 8, weight=3.0)
    tables = CameraTable.of([(0, "a", "1"), (99_999_999_998, "a", "99999999999")], ["a"])
    assert tables.size == 2 and tables.training_rows()(torch.tensor([99_999_999_998, 0])).tolist() == [1, 0]
    rows = tables.test_rows("a", {0: "1", 5: "6", 7: "99999999999"})
    assert rows(torch.tensor([7, 5, 0, 3])).tolist() == [1, -1, 0, -1]  # 5 lies between trained ones
    assert tables.test_rows("b", {0: "1"})(torch.tensor([0])).tolist() == [-1] and UNKNOWN(torch.tensor([0])).tolist() == [
        -1
    ]
    with torch.no_grad():
        embedding.table.copy_(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
        found = embedding(torch.zeros(3, 2, 8), rows(torch.tensor([5, 0, 7])))
    assert torch.allclose(found[1:, 0], 3 * embedding.table, atol=1e-6)
    assert torch.allclose(found[0], found[1:].mean(dim=0), atol=1e-6)


def test_older_checkpoints_keep_their_numbering():
    older = CameraTable(None, 6, ("a",))
    assert older.training_rows()(torch.tensor([5, 0])).tolist() == [5, 0]
    assert older.test_rows("a", {})(torch.tensor([3])).tolist() == [3] and older.test_rows("b", {}) is UNKNOWN
    assert older.named_rows(["3", "x"]) == {"3": 3, "x": -1}


def test_a_camera_of_several_training_sets_is_refused():
    both = CameraTable.of([(0, "a", "1"), (1, "b", "1"), (2, "b", "2")], ["a", "b"])
    assert both.test_rows("b", {0: "1", 1: "2"})(torch.tensor([0, 1])).tolist() == [1, 2]
    assert both.named_rows(["2", "9"]) == {"2": 2, "9": -1}
    with pytest.raises(UserError, match="camera '1' is one of several training sets"):
        both.named_rows(["1"])


# --- a name that is also a registered data set's --------------------------------------------------------------------------


def test_a_folder_named_as_a_registered_data_set_is_said(tmp_path, tiny_root, command, monkeypatch):
    shutil.copytree(tiny_root / "embedded_persons_tiny" / MARKET, tmp_path / "cuhk01")
    config = {**TINY, "data": {**TINY["data"], "sources": ["cuhk01"], "targets": ["cuhk01"], "root": str(tmp_path)}}
    config["train"] = {**TINY["train"], "stages": [1], "max_epoch": 0}
    config["relation"] = {}
    path = tmp_path / "own.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code, _, err = command("--config-file", path, "data.save_dir", tmp_path / "run")
    assert code == 2 and "is the name of a registered data set, which is meant" in err and "'./cuhk01'" in err
    names = ["-s", "./cuhk01", "-t", "./cuhk01"] if sys.platform != "win32" else ["-s", ".\\cuhk01", "-t", ".\\cuhk01"]
    code, _, err = command("--config-file", path, *names, "data.save_dir", tmp_path / "run")
    assert code == 0, err
