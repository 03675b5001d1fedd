"""``relreid data convert``: identity-disjoint halves, queries with a match, and files that the package's reader takes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relreid_plugin.cli.main import main
from relreid_plugin.data.convert import divide, folders_training, grocery_training, read_folders, read_grocery
from relreid_plugin.data.folder import read_market_folder
from relreid_plugin.data.names import name_pattern

SPLITS = ("bounding_box_train", "query", "bounding_box_test")


def picture(path: Path, colour: int, size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour % 256, colour // 2 % 256, 80)).save(path)


def photos(folder: Path, *, cameras: bool) -> Path:
    """Six identities with 2 to 4 images (under two cameras each)."""
    for number, identity in enumerate(("anna's", "b-2", "c 3", "Ünal", "e", "f_6")):
        for image in range(2 + number % 3):
            place = folder / identity / (f"cam{image % 2}" if cameras else "")
            picture(place / f"{image}.{'png' if image else 'JPG'}", 31 * number + image)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.*"))
    }


@pytest.mark.parametrize("cameras", [True, False])
def test_folders(tmp_path, capsys, cameras):
    source = photos(tmp_path / "photos", cameras=cameras)
    before = contents(source)
    for out in ("one", "two"):
        assert main(["data", "convert", "folders", str(source), str(tmp_path / out), "--train", "0.5", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and contents(source) == before
    assert not list(tmp_path.glob(".*"))
    splits = read_market_folder(tmp_path / "one")
    names = {
        split: {Path(item[0]).name.split("_")[0] for item in getattr(splits, split)}
        for split in ("train", "query", "gallery")
    }
    assert len(names["train"]) == 3 and not names["train"] & (names["query"] | names["gallery"])
    assert names["query"] <= names["gallery"]
    total = sum(len(getattr(splits, split)) for split in names)
    assert total == len(before)
    assert f"train {len(splits.train)} images of 3" in text
    training = folders_training(sorted(path.name for path in source.iterdir()), 0.5, 3)
    written = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "one" / SPLITS[0]).iterdir()]
    assert sorted(written) == sorted(value for name, value in before.items() if name.split("/")[0] in training)
    other = tmp_path / "other"
    assert main(["data", "convert", "folders", str(source), str(other), "--seed", "4"]) == 0
    assert contents(other) != contents(tmp_path / "one")


def test_every_query_keeps_a_match(tmp_path):
    source = tmp_path / "s"
    layout = {"a": "112", "b": "12", "c": "11", "d": "1233", "e": "12", "f": "12"}
    for identity, cameras in layout.items():
        for number, camera in enumerate(cameras):
            picture(source / identity / camera / f"{number}.png", number)
    pictures = read_folders(source)
    splits = divide(pictures, {"e", "f"})
    found = {identity: [(p.camera, p.path.stem) for p in splits["query"] if p.identity == identity] for identity in "abcd"}
    # a: its image of camera 2 must stay for the query of camera 1; d: both images of camera 3 for the other two
    assert found == {"a": [(1, "0")], "b": [(1, "0")], "c": [], "d": [(1, "0"), (2, "1")]}
    for query in splits["query"]:
        left = [p for p in splits["gallery"] if p.identity == query.identity and p.camera != query.camera]
        assert left, query
    assert {p.identity for p in splits["train"]} == {"e", "f"}
    assert len(splits["train"] + splits["query"] + splits["gallery"]) == len(pictures)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: None, "is no folder"),
        (lambda f: picture(f / "a" / "0.png", 1), "images of 1 identities"),
        (lambda f: picture(f / "0.png", 1), "lies neither in"),
        (lambda f: (picture(f / "a" / "0.png", 1), picture(f / "b" / "c1" / "0.png", 1)), "lies beside folders of cameras"),
        (lambda f: (picture(f / "a" / "0.png", 1), picture(f / "b" / "0.png", 1)), "no query images would be left"),
    ],
)
def test_mistakes(tmp_path, capsys, make, sentence):
    make(tmp_path / "s")
    assert main(["data", "convert", "folders", str(tmp_path / "s"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_what_is_there_stays(tmp_path, capsys):
    source = photos(tmp_path / "photos", cameras=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert main(["data", "convert", "folders", str(source), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "out" / "mine.txt").read_text() == "x"


# --- GroceryStoreDataset ------------------------------------------------------------------------------------------------
def grocery(folder: Path, products: int = 81) -> Path:
    """A folder with the lists and the layout of the repository, small pictures in it."""
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number in range(products):
        kind = ("Fruit", "Packages", "Vegetables")[number % 3]
        product = f"Product-{(number * 37) % products:02d}"
        for split, count in (("train", 3), ("val", number % 2), ("test", 2)):
            for image in range(1, count + 1):
                path = f"{split}/{kind}/{product}/{product}_{image:03d}.jpg"
                picture(folder / "dataset" / path, number * 3 + image, (348, 348) if number % 5 else (348, 464))
                lines[split].append(f"{path}, {number}, 0")
    for split, rows in lines.items():
        (folder / "dataset" / f"{split}.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return grocery(tmp_path_factory.mktemp("grocery") / "GroceryStoreDataset")


def test_grocery(store, tmp_path, capsys):
    out = tmp_path / "reid-data" / "grocery"
    out.parent.mkdir()
    assert main(["data", "convert", "grocery", str(store), str(out)]) == 0
    assert "of 41" in capsys.readouterr().out
    splits = read_market_folder(out, name_pattern(""))
    names = {split: [path.name for path in sorted((out / split).iterdir())] for split in SPLITS}
    assert all(re.fullmatch(r"\d{4}_c[123]s1_\d{6}_00\.jpg", name) for rows in names.values() for name in rows)
    # the products of the published halves, by number
    known = "1 2 4 7 8 13 15 16 22 23 25 26 27 30 32 33 34 38 39 41 42 44 46 47 49 50 55 57 59 60 61 62 64"
    known += " 70 71 72 73 75 78 79 80"
    assert {int(name[:4]) for name in names[SPLITS[0]]} == set(map(int, known.split()))
    tested = set(range(1, 82)) - set(map(int, known.split()))
    assert {int(name[:4]) for name in names["query"]} == tested == {int(name[:4]) for name in names[SPLITS[2]]}
    assert len(splits.train) + len(splits.query) + len(splits.gallery) == len(list(store.rglob("*.jpg")))
    # numbers go through all files in the order of collection and path
    numbers = sorted(int(name[10:16]) for rows in names.values() for name in rows)
    assert numbers == list(range(1, len(numbers) + 1))
    listed = sorted(store.rglob("*.jpg"), key=lambda p: (("train", "val", "test").index(p.parts[-4]), str(p)))
    for split in SPLITS:
        for name in names[split][::17]:
            source = listed[int(name[10:16]) - 1]
            with Image.open(source) as image, Image.open(out / split / name) as small:
                assert min(small.size) == 144 and (small.width > small.height) == (image.width > image.height)
                far = np.abs(np.asarray(small, int)[0, 0] - np.asarray(image, int)[0, 0]).max()
                assert far < 12 and f"c{('train', 'val', 'test').index(source.parts[-4]) + 1}s1" in name


def test_grocery_training_needs_no_data():
    chosen = grocery_training([f"{number:04d}" for number in range(1, 82)])
    assert len(chosen) == 41 and {"0001", "0080"} <= chosen and "0003" not in chosen and "0081" not in chosen


def test_grocery_mistakes(store, tmp_path, capsys):
    assert main(["data", "convert", "grocery", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is no folder of GroceryStoreDataset" in capsys.readouterr().err
    assert main(["data", "convert", "grocery", str(store), str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "the halves of grocery are fixed" in capsys.readouterr().err
    folder = grocery(tmp_path / "small", 3) / "dataset"
    (folder / "val.txt").write_text("no list\n")
    assert main(["data", "convert", "grocery", str(folder), str(tmp_path / "out")]) == 2
    assert "val.txt', line 1" in capsys.readouterr().err
    (folder / "val.txt").write_text("val/Fruit/Gone/Gone_001.jpg, 0, 0\n")
    assert main(["data", "convert", "grocery", str(folder), str(tmp_path / "out")]) == 2
    assert "Gone_001.jpg' does not exist" in capsys.readouterr().err
    assert len(read_grocery(store)) == len(list(store.rglob("*.jpg")))
