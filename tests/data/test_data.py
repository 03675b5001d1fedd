"""Readers of folders and tables, image checks, transforms and held-out identities, without the host."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from relreid_plugin.data.checks import check_images, read_image
from relreid_plugin.data.folder import read_market_folder
from relreid_plugin.data.split import NO_CAMERAS_NOTE, hold_out_identities
from relreid_plugin.data.table import read_table
from relreid_plugin.data.transforms import PadCrop, add_plugin_transforms, split_transform_names
from relreid_plugin.errors import UserError
from relreid_plugin.host.schedules import warmup_lambda

SPLITS = ("bounding_box_train", "query", "bounding_box_test")


def write_image(path: Path, color: tuple[int, int, int] = (200, 30, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(sum(color) + len(path.name))
    noise = (torch.rand(16, 8, 3, generator=generator) * 255).byte().numpy()
    Image.blend(Image.fromarray(noise), Image.new("RGB", (8, 16), color), 0.5).save(path)
    return path


def write_folder(
    root: Path, train: list[str], query: list[str], gallery: list[str], names: tuple[str, ...] = SPLITS
) -> Path:
    for split, files in zip(names, (train, query, gallery)):
        for file in files:
            write_image(root / split / file)
    return root


# --- folders ------------------------------------------------------------------------------------------------------------


def test_market_names(tmp_path: Path) -> None:
    train = ["0007_c2s1_1.jpg", "0002_c1s1_1.jpg", "0007_c1s1_0.jpg", "-1_c1s1_0.jpg"]
    root = write_folder(tmp_path, train, ["0011_c3s1_0.jpg"], ["0011_c1s1_0.jpg", "0000_c1s1_0.jpg", "-1_c2s2_1.jpg"])
    (root / "query" / "Thumbs.db").write_bytes(b"x")
    (root / "query" / "0003_c1s1_0.txt").write_text("x")
    splits = read_market_folder(root)
    place = str(root / "bounding_box_train") + "/"
    assert splits.train == [
        (place + "0002_c1s1_1.jpg", 0, 0),
        (place + "0007_c1s1_0.jpg", 1, 0),
        (place + "0007_c2s1_1.jpg", 1, 1),
    ]
    assert [item[1:] for item in splits.query] == [(11, 2)]
    assert [item[1:] for item in splits.gallery] == [(0, 0), (11, 0)]
    assert splits.train_identities == ["0002", "0007"]
    assert splits.has_cameras and not splits.notes


def test_extensions_and_short_folder_names(tmp_path: Path) -> None:
    files = ["1_c1_a.JPG", "1_c1_b.jpeg", "1_c1_c.png", "1_c1_d.bmp", "1_c1_e.webp", "1_c1_f.TIF"]
    write_folder(tmp_path, files, ["2_c1_a.png"], ["2_c2_a.png"], names=("train", "query", "gallery"))
    assert [Path(item[0]).name for item in read_market_folder(tmp_path).train] == files


def test_no_cameras(tmp_path: Path) -> None:
    write_folder(tmp_path, ["5_a.png", "4_a.png"], ["9_a.png"], ["9_b.png", "9_c.png"])
    splits = read_market_folder(tmp_path)
    assert [item[1:] for item in splits.train] == [(0, 0), (1, 0)]
    assert {item[2] for item in splits.query} == {0} and {item[2] for item in splits.gallery} == {1}
    assert splits.notes == [NO_CAMERAS_NOTE] and not splits.has_cameras


def test_mixed_cameras(tmp_path: Path) -> None:
    write_folder(tmp_path, ["5_c1_a.png"], ["9_a.png"], ["9_b.png"])
    with pytest.raises(UserError, match=r"5_c1_a\.png.*9_a\.png"):
        read_market_folder(tmp_path)


def test_identities_that_are_text(tmp_path: Path) -> None:
    write_folder(tmp_path, ["red_shoe_c1_a.png", "10_c2_a.png"], ["hat_c1_a.png"], ["hat_c2_a.png"])
    splits = read_market_folder(tmp_path)
    assert splits.train_identities == ["10", "red_shoe"]
    # sorted over all splits: 10 -> 1, hat -> 2, red_shoe -> 3
    assert splits.query[0][1] == splits.gallery[0][1] == 2
    assert [Path(path).name[:2] for path, label, _ in splits.train if label == 0] == ["10"]


def test_camera_zero_is_the_first(tmp_path: Path) -> None:
    write_folder(tmp_path, ["1_c0_a.png"], ["2_c0_a.png"], ["2_c3_a.png"])
    splits = read_market_folder(tmp_path)
    assert (splits.train[0][2], splits.gallery[0][2]) == (0, 3)


def test_one_folder_per_identity(tmp_path: Path) -> None:
    write_folder(tmp_path, ["b/x.png", "a/y.png"], ["c/0.png"], ["c/1.png", "c/2.png"])
    splits = read_market_folder(tmp_path)
    assert splits.train_identities == ["a", "b"] and len(splits.gallery) == 2


@pytest.mark.parametrize("split", SPLITS)
def test_missing_and_empty_split_folders(tmp_path: Path, split: str) -> None:
    write_folder(tmp_path, ["1_c1_a.png"], ["2_c1_a.png"], ["2_c2_a.png"])
    for file in (tmp_path / split).iterdir():
        file.unlink()
    with pytest.raises(UserError, match=f"{split}' has no images"):
        read_market_folder(tmp_path)
    (tmp_path / split).rmdir()
    with pytest.raises(UserError, match=f"no folder '{split}'"):
        read_market_folder(tmp_path)


def test_name_without_identity(tmp_path: Path) -> None:
    write_folder(tmp_path, ["img001.png"], ["2_a.png"], ["2_b.png"])
    with pytest.raises(UserError, match=r"img001\.png' does not name its identity"):
        read_market_folder(tmp_path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("train/0009/0009_c1_0.jpg", "1 image below .* is not read, .*0009_c1_0.jpg"),
        ("train/0009_c1_0.JFIF", "1 file named like pictures of other kinds .*jfif.* is passed over"),
        ("gallery/0009_c1_0.heic", "1 file named like pictures of other kinds .*heic"),
        ("query/.cache/0009_c1_0.jpg", ""),
        ("query/._0009_c1_0.jpg", ""),
    ],
)
def test_pictures_that_are_passed_over_are_said(tmp_path: Path, more: str, said: str) -> None:
    root = write_folder(tmp_path, ["0001_c1_0.jpg"], ["0002_c1_0.jpg"], ["0002_c2_0.jpg"], ("train", "query", "gallery"))
    (root / more).parent.mkdir(exist_ok=True)
    write_image(root / "picture.jpg").rename(root / more)
    notes = read_market_folder(root).notes
    assert len(notes) == bool(said) and all(re.match(said, note) for note in notes)


def test_pictures_below_the_folders_of_identities_are_said(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ["1/a.jpg", "1/more/b.jpg"], ["2/a.jpg"], ["2/a.jpg"], ("train", "query", "gallery"))
    assert any("1 image below" in note for note in read_market_folder(root).notes)


# --- tables -------------------------------------------------------------------------------------------------------------


def write_table(tmp_path: Path, *rows: str, header: str = "path,pid,camid,split") -> Path:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        write_image(tmp_path / "images" / name)
    path = tmp_path / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


GOOD_ROWS = ("images/a.png,x,0,train", "images/b.png,y,1,train", "images/c.png,z,0,query", "images/d.png,z,1,gallery")


def test_table(tmp_path: Path) -> None:
    path = write_table(tmp_path, *GOOD_ROWS)
    splits = read_table(path)
    assert splits.train == [(str(tmp_path / "images/a.png"), 0, 0), (str(tmp_path / "images/b.png"), 1, 1)]
    assert splits.train_identities == ["x", "y"] and splits.query[0][1:] == (3, 0) and splits.gallery[0][1:] == (3, 1)


def test_table_without_cameras_and_with_other_columns(tmp_path: Path) -> None:
    rows = [f"{row.split(',')[3]},{row.split(',')[0]},note,{row.split(',')[1]}" for row in GOOD_ROWS]
    splits = read_table(write_table(tmp_path, *rows, header="split,path,remark,pid"))
    assert not splits.has_cameras and splits.query[0][2] == 0 and splits.gallery[0][2] == 1


@pytest.mark.parametrize(
    ("number", "row", "message"),
    [
        (2, "images/a.png,x,0,trian", r"line 3: unknown split 'trian'; did you mean 'train'"),
        (2, "images/a.png,,0,train", r"line 3: the column 'pid' is empty"),
        (1, "images/a.png,x,-1,train", r"line 2: camid must be an integer from 0, or a name, got '-1'"),
        (4, "images/none.png,x,0,gallery", r"line 5: image '.*none\.png' does not exist"),
        (3, "images/c.png,z,,query", r"line 4: no camid, but line 2 has one"),
        (4, "images/d.png,z,1,query", r"no row has the split 'gallery'"),
    ],
)
def test_table_errors_name_the_line(tmp_path: Path, number: int, row: str, message: str) -> None:
    rows = list(GOOD_ROWS)
    rows[number - 1] = row
    with pytest.raises(UserError, match=message):
        read_table(write_table(tmp_path, *rows))


def test_table_without_a_column_or_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: no column 'pid'"):
        read_table(write_table(tmp_path, *GOOD_ROWS, header="path,person,camid,split"))
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"path,pid,split\n\xff\xfe\x00\n")
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        read_table(tmp_path / "binary.csv")


# --- image files --------------------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return broken files by kind, each with what its error must say."""
    big = Image.effect_noise((64, 64), 80).convert("RGB")
    out: dict[str, tuple[Path, str]] = {"missing": (folder / "missing.jpg", "does not exist")}
    for extension in ("jpg", "png", "bmp", "webp"):
        path = folder / f"cut.{extension}"
        big.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        out[f"cut {extension}"] = (path, "cannot be decoded")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image at all")
    out["empty"] = (folder / "empty.jpg", "is empty")
    out["text"] = (folder / "text.jpg", "is not an image")
    return out


@pytest.mark.parametrize("mode", ["header", "full"])
def test_check_images(tmp_path: Path, mode: str) -> None:
    good = [write_image(tmp_path / f"good.{extension}") for extension in ("jpg", "png", "bmp", "webp", "tif")]
    trailing = write_image(tmp_path / "trailing.jpg")
    trailing.write_bytes(trailing.read_bytes() + bytes(500))  # odd, but it decodes
    check_images([*good, trailing], mode)
    bad = broken_files(tmp_path)
    for path, reason in bad.values():
        with pytest.raises(UserError, match=f"{path.name}' {reason}"):
            check_images([*good, path], mode)
        with pytest.raises(UserError, match=f"{path.name}' {reason}"):
            read_image(path)
    paths = [path for path, _ in bad.values()]
    with pytest.raises(UserError, match=rf"{paths[0].name}.*\({len(paths) - 1} more of {len(paths) + 5} images are bad\)"):
        check_images([*good, *paths, paths[0]], mode)
    check_images(paths, "none")


def test_read_image_is_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 6), 7).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert image.mode == "RGB" and image.size == (4, 6) and image.getpixel((0, 0)) == (7, 7, 7)


# --- transforms ---------------------------------------------------------------------------------------------------------


def test_transform_names() -> None:
    assert split_transform_names(["Random_Flip", "pad_crop", "random_erase"]) == (
        ["random_flip", "random_erase"],
        ["pad_crop"],
    )
    assert split_transform_names([]) == ([], [])
    with pytest.raises(UserError, match="'random_earse'.*did you mean 'random_erase'"):
        split_transform_names(["random_earse"])


def test_pad_crop() -> None:
    image = Image.new("RGB", (12, 20), (255, 255, 255))
    random.seed(3)
    seen = set()
    for _ in range(60):
        crop = PadCrop(4)(image)
        assert crop.size == image.size
        box = crop.getbbox()  # the white part left
        assert box is not None
        seen.add((box[0] - (12 - box[2]), box[1] - (20 - box[3])))
    shifts = [shift for pair in seen for shift in pair]
    assert min(shifts) == -4 and max(shifts) == 4 and len(seen) > 20


def test_pad_crop_is_put_between_flip_and_tensor() -> None:
    compose = T.Compose([T.Resize((8, 4)), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.5], [0.5])])
    add_plugin_transforms(compose, ["pad_crop"])
    assert [type(step).__name__ for step in compose.transforms] == [
        "Resize",
        "RandomHorizontalFlip",
        "PadCrop",
        "ToTensor",
        "Normalize",
    ]


# --- held-out identities ------------------------------------------------------------------------------------------------


def fake_train(identities: int, cameras: int, seed: int = 0) -> list[tuple[str, int, int, int]]:
    rng = random.Random(seed)
    return [
        (f"{label:04d}_c{camera + 1}_{shot}.jpg", label, camera, 0)
        for label in range(identities)
        for camera in range(cameras)
        for shot in range(rng.randint(0 if camera else 1, 3))
    ]


@pytest.mark.parametrize("cameras", [1, 2, 5])
def test_hold_out(cameras: int) -> None:
    train = fake_train(20, cameras)
    split = hold_out_identities(train, 0.25, seed=3)
    held = {item[0].split("_")[0] for item in split.query + split.gallery}
    kept = {item[0].split("_")[0] for item in split.train}
    assert len(held) == 5 and not held & kept and len(kept) == 15
    # nothing is lost or doubled
    assert sorted(i[0] for i in split.train + split.query + split.gallery) == sorted(i[0] for i in train)
    # labels are 0 … n-1 in the order of the old ones
    assert sorted({item[1] for item in split.train}) == list(range(15))
    assert all(split.kept_labels[label] == int(path.split("_")[0]) for path, label, *_ in split.train)
    # every query has a match that the Market-1501 protocol keeps
    for _, pid, camid, _ in split.query:
        assert any(pid == other and camid != camera for _, other, camera, _ in split.gallery)
    assert len(split.query) >= 3


def test_hold_out_is_a_function_of_seed_and_data() -> None:
    train = fake_train(20, 3)
    assert hold_out_identities(train, 0.3, seed=1) == hold_out_identities(list(train), 0.3, seed=1)
    assert hold_out_identities(train, 0.3, seed=1) != hold_out_identities(train, 0.3, seed=2)


def test_hold_out_of_pairs_asks_under_one_camera() -> None:
    train = [(f"{label}_{camera}", label, camera, 0) for label in range(10) for camera in range(2)]
    split = hold_out_identities(train, 0.4, seed=0)
    assert [item[2] for item in split.query] == [0] * 4 and [item[2] for item in split.gallery] == [1] * 4


def test_hold_out_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"train\.val_fraction 0\.5.*only 3"):
        hold_out_identities([(str(i), i, 0, 0) for i in range(3)], 0.5, seed=0)
    with pytest.raises(UserError, match="nothing to validate on"):
        hold_out_identities([(str(i), i, i % 2, 0) for i in range(10)], 0.4, seed=0)


# --- schedules ----------------------------------------------------------------------------------------------------------


def test_warmup_numbers() -> None:
    factor = warmup_lambda("multi_step", stepsize=[40, 70], warmup_epochs=10, warmup_factor=0.01)
    expected = {0: 0.01, 5: 0.505, 9: 0.901, 10: 1.0, 39: 1.0, 40: 0.1, 69: 0.1, 70: 0.01, 500: 0.01}
    assert {epoch: factor(epoch) for epoch in expected} == pytest.approx(expected)
    single = warmup_lambda("single_step", stepsize=[7, 3], gamma=0.5)
    assert [single(epoch) for epoch in range(8)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    cosine = warmup_lambda("cosine", max_epoch=12, warmup_epochs=2, warmup_factor=0.5)
    assert [cosine(e) for e in (0, 1, 2, 7, 12, 20)] == pytest.approx([0.5, 0.75, 1.0, 0.5, 0.0, 0.0], abs=1e-12)
    assert {warmup_lambda()(epoch) for epoch in range(5)} == {1.0}


def test_warmup_refuses() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        warmup_lambda("linear")
    with pytest.raises(ValueError, match="period"):
        warmup_lambda("single_step", stepsize=[])
    with pytest.raises(ValueError, match="more epochs"):
        warmup_lambda("cosine", max_epoch=5, warmup_epochs=5)
