"""``relreid data show``: numbers, duplicates, suspicious labels and the contact sheet."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import numpy as np
import pytest
from conftest import MARKET
from PIL import Image, ImageEnhance

from relreid_plugin.cli.main import main
from relreid_plugin.data.overview import near_groups

imagehash = pytest.importorskip("imagehash")


def photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((48, 64), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Eleven images: a copy and a lightened one under other identities, a lone identity and camera, an unmatched query."""
    folder = tmp_path_factory.mktemp("shown")
    rows = [
        ("a1", "ann", "1", "train"),
        ("a2", "ann", "2", "train"),
        ("b1", "bob", "1", "train"),
        ("b2", "bob", "2", "train"),
        ("copy", "bob", "2", "train"),  # of a1
        ("light", "cleo", "9", "train"),  # of b1
        ("q1", "dan", "1", "query"),
        ("g1", "dan", "2", "gallery"),
        ("q2", "eva", "1", "query"),
        ("g2", "eva", "1", "gallery"),  # of the query's own camera
        ("small", "dan", "2", "gallery"),  # g1 again, smaller
    ]
    for number, (name, *_) in enumerate(rows):
        photo(number).save(folder / f"{name}.png")
    shutil.copy(folder / "a1.png", folder / "copy.png")
    ImageEnhance.Brightness(Image.open(folder / "b1.png")).enhance(1.1).save(folder / "light.jpg", quality=80)
    photo(7).resize((36, 48)).save(folder / "small.png")
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "pid", "camid", "split"])
        writer.writerows([f"{name}.jpg" if name == "light" else f"{name}.png", *rest] for name, *rest in rows)
    return folder


def test_a_table_is_shown(table, capsys, tmp_path):
    words = ["data", "show", str(table / "t.csv"), "--out", str(tmp_path / "s.png"), "--json", str(tmp_path / "s.json")]
    assert main(words) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "s.json").read_text())

    def names(value):
        return [names(each) for each in value] if isinstance(value, list) else value.rpartition("/")[2].partition(".")[0]

    assert found["images"] == 11 and found["identities"] == {"count": 5, "images": {"min": 1, "median": 2.0, "max": 3}}
    assert found["splits"]["train"] == {"images": 6, "identities": 3} and found["splits"]["query"]["images"] == 2
    assert found["cameras"]["1"] == {"images": 5, "identities": 4} and found["cameras"]["9"]["identities"] == 1
    assert found["width"] == {"min": 36, "median": 48.0, "max": 48} and found["height"]["max"] == 64
    assert [sorted(group) for group in names(found["copies"])] == [["a1", "copy"]]
    assert sorted(sorted(group) for group in names(found["near_duplicates"])) == [["b1", "light"], ["g1", "small"]]
    wrong = found["suspicious"]
    assert [sorted(group) for group in names(wrong["copies_of_two_identities"])] == [["a1", "copy"]]
    assert [sorted(group) for group in names(wrong["near_duplicates_of_two_identities"])] == [["b1", "light"]]
    assert wrong["identities_with_one_image"] == ["cleo"] and wrong["cameras_with_one_identity"] == ["9"]
    assert names(wrong["queries_without_a_match"]) == ["q2"]
    assert "11 images of 5 identities" in said and "images per identity: 1 to 3, median 2" in said
    assert "suspicious: 1 cameras with one identity, such as 9" in said
    sheet = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    rows = 5 + 2  # the identities, and the two suspicious groups framed in red
    assert sheet.shape[0] == 8 + rows * (128 + 14 + 6)
    frame = np.abs(sheet[:, 91] - (200, 50, 40)).sum(axis=1) < 60  # the left side of every row's first picture
    assert not frame[: 5 * 148].any() and frame[5 * 148 :].sum() == 2 * 130


def shown(name, root, out):
    words = ["--root", str(root), "--out", str(out / "s.png"), "--json", str(out / "s.json")]
    assert main(["data", "show", name, *words]) == 0
    return json.loads((out / "s.json").read_text())


def test_a_folder_with_a_broken_file(tiny_root, tmp_path, capsys):
    for place in (tiny_root / "embedded_persons_tiny" / MARKET).iterdir():
        if place.is_dir():
            (tmp_path / "set" / place.name).mkdir(parents=True)
            for file in sorted(place.glob("0*.jpg"))[:9]:
                shutil.copy(file, tmp_path / "set" / place.name)
    broken = sorted((tmp_path / "set" / "query").glob("*.jpg"))[0]
    broken.write_bytes(b"no picture")
    found = shown("set", tmp_path, tmp_path)
    assert found["images"] == 27 and len(found["unreadable"]) == 1 and broken.name in found["unreadable"][0]
    assert "suspicious: 1 files that cannot be read" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_a_name_of_the_host_is_its_folder(tiny_root, tmp_path):
    named = shown("embedded_persons_tiny", tiny_root, tmp_path)
    folder = shown(f"embedded_persons_tiny/{MARKET}", tiny_root, tmp_path)
    assert named["identities"] == folder["identities"] and named["splits"] == folder["splits"]
    assert [part["images"] for part in named["cameras"].values()] == [part["images"] for part in folder["cameras"].values()]


def test_groups_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    bits = rng.random((150, 64)) < 0.5
    bits[100:] = bits[:50] ^ (rng.random((50, 64)) < 0.05)
    near = 4
    group = list(range(150))
    for one in range(150):
        for other in range(one):
            if (bits[one] != bits[other]).sum() <= near:
                old, new = group[one], group[other]
                group = [new if each == old else each for each in group]
    wanted = [[place for place in range(150) if group[place] == name] for name in dict.fromkeys(group)]
    assert near_groups(bits, near) == sorted(each for each in wanted if len(each) > 1) and len(near_groups(bits, near)) > 20
    assert near_groups(bits[:0], near) == [] and near_groups(bits[:1], near) == []


def test_mistakes(table, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "s.png")
    assert main(["data", "show", "nothing", "--root", str(tmp_path), "--out", out]) == 2
    assert "'nothing'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert main(["data", "show", str(table / "t.csv"), "--out", out]) == 2
    assert "pip install ImageHash" in capsys.readouterr().err and not (tmp_path / "s.png").exists()
