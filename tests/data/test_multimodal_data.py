"""Multimodal data: readers of every layout, checks, views, transforms, statistics."""

from __future__ import annotations

import importlib.util
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from relreid_plugin.data import views
from relreid_plugin.data.multimodal import (
    check_samples,
    detect_layout,
    find_dataset,
    find_folder,
    modality_statistics,
    read_any,
    read_msvr310,
    read_released,
    read_rgbnt201,
    read_strips,
    read_views,
    read_wmveid863,
    statistics_yaml,
)
from relreid_plugin.data.multimodal_table import read_multimodal_table
from relreid_plugin.data.multimodal_transforms import MULTIMODAL_TRANSFORMS, MultimodalTransform
from relreid_plugin.data.samples import OWN_IMAGE_NOTE, SCENE_NOTE
from relreid_plugin.data.split import NO_CAMERAS_NOTE, hold_out_identities
from relreid_plugin.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RNT = ("R", "N", "T")
HALF = [[0.5], [0.5], [0.5]]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def put(path: Path, width: int = 8, height: int = 4, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(width, height, sum(map(ord, str(path.name))), mode).save(path)
    return path


def labels(part: list) -> list[tuple[int, int]]:
    return [item[1:] for item in part]


def sentence(error: pytest.ExceptionInfo[UserError], *parts: object) -> None:
    """The message is one sentence with all the parts in it."""
    text = str(error.value)
    for part in parts:
        assert str(part) in text, text
    assert "\n" not in text
    assert not re.search(r"\. [A-Z]", text), text


# ---------------------------------------------------------------------------------------------------------------------
# Trees


def strips(root: Path, views: int = 3, height: int = 4) -> Path:
    for split, names in {
        "bounding_box_train": (
            "0007_c2_000003_01.png",
            "0002_c1_000001_01.png",
            "0002_c3_000002_01.png",
            "-1_c1_000009_01.png",
        ),
        "query": ("0011_c1_000001_01.png",),
        "bounding_box_test": ("0011_c2_000001_01.png", "0013_c1_000001_01.png"),
    }.items():
        for name in names:
            put(root / "rgbir" / split / name, views * 2 * height, height)
    return root


def rgbnt201(root: Path) -> Path:
    for split, names in {
        "train_171": ("000003_cam2_0_00.jpg", "000003_cam1_0_01.jpg", "000001_cam4_1_00.jpg"),
        "test": ("000258_cam1_0_02.jpg", "000258_cam3_0_00.jpg", "000259_cam1_0_00.jpg"),
    }.items():
        for name in names:
            for folder in ("RGB", "NI", "TI"):
                put(root / split / folder / name)
    return root


def msvr310(root: Path) -> Path:
    for split, names in {
        "bounding_box_train": ("0004_s003_v1_002.jpg", "0004_s020_v2_001.jpg", "0001_s003_v8_000.jpg"),
        "query3": ("0311_s007_v1_000.jpg",),
        "bounding_box_test": ("0311_s020_v1_000.jpg", "0311_s007_v2_001.jpg"),
    }.items():
        for name in names:
            for folder in ("vis", "ni", "th"):
                put(root / split / name[:4] / folder / name)
    return root


def wmveid863(root: Path) -> Path:
    for split, names in {
        "train": ("000009_cam2_0_00.jpg", "000005_cam1_0_00.jpg"),
        "query": ("000600_cam1_0_00.jpg",),
        "test": ("000600_cam8_0_00.jpg", "000601_cam1_0_00.jpg"),
    }.items():
        for name in names:
            for folder in ("vis", "ni", "th"):
                put(root / split / folder / name)
    return root


def released(root: Path, splits: tuple[str, ...] = ("train", "query", "gallery"), camera: str = "_c2") -> Path:
    for split in splits:
        for identity in ("12", "5"):
            for folder in ("R", "N", "T"):
                put(root / split / folder / identity / f"x{camera}_{split}.png")
    return root


def table(root: Path, header: str, *rows: str) -> Path:
    for row in rows:
        for cell in row.split(","):
            if cell.endswith(".png"):
                put(root / cell)
    path = root / "set.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def test_strips(tmp_path: Path) -> None:
    splits = read_strips(strips(tmp_path), RNT)
    place = str(tmp_path / "rgbir" / "bounding_box_train") + "/"
    assert splits.train == [
        (place + "0002_c1_000001_01.png", 0, 0),
        (place + "0002_c3_000002_01.png", 0, 2),
        (place + "0007_c2_000003_01.png", 1, 1),
    ]
    assert labels(splits.query) == [(11, 0)] and labels(splits.gallery) == [(11, 1), (13, 0)]
    assert splits.modalities == RNT and splits.has_cameras and splits.group == "camera" and splits.notes == []
    assert splits.train_identities == ["0002", "0007"]
    assert len(splits.sources()) == 6
    assert read_strips(tmp_path / "rgbir", RNT) == splits


@pytest.mark.parametrize("views, given, asked", [(2, RNT, "[R, N]"), (3, ("R", "N"), "[R, N, T]"), (1, ("R", "N"), "[R]")])
def test_strips_with_another_number_of_views(tmp_path: Path, views: int, given: tuple[str, ...], asked: str) -> None:
    with pytest.raises(UserError) as error:
        read_strips(strips(tmp_path, views, 6), given)
    sentence(
        error,
        "bounding_box_train/-1_c1_000009_01.png",
        f"{views} view",
        "multimodal.modalities",
        f"such as {asked}",
        "6 more of 7",
    )


def test_one_strip_of_another_width_is_found(tmp_path: Path) -> None:
    bad = put(strips(tmp_path) / "rgbir/bounding_box_test/0013_c2_000001_01.png", 16, 4)
    with pytest.raises(UserError) as error:
        read_strips(tmp_path, RNT)
    sentence(error, bad, "16x4", "2 views")


def test_strips_of_another_aspect(tmp_path: Path) -> None:
    strips(tmp_path, 3, 20)
    odd = put(tmp_path / "rgbir/query/0011_c3_000001_01.png", 3 * 30, 20)
    with pytest.raises(UserError) as error:
        read_strips(tmp_path, RNT)
    sentence(error, odd, "30x20", "256x128")
    assert len(read_strips(tmp_path, RNT, any_aspect=True).query) == 2
    put(odd, 91, 20)
    with pytest.raises(UserError) as error:
        read_strips(tmp_path, RNT, any_aspect=True)
    sentence(error, odd, "91 pixels", "3 views", "multimodal.modalities")
    put(odd, 3 * 39, 20)  # 2.5 % narrower
    assert len(read_strips(tmp_path, RNT).query) == 2


def test_strips_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_strips(tmp_path / "none", RNT)
    sentence(error, tmp_path / "none", "data.root")
    strips(tmp_path)
    shutil.move(tmp_path / "rgbir/query", tmp_path / "rgbir/away")
    with pytest.raises(UserError) as error:
        read_strips(tmp_path, RNT)
    sentence(error, tmp_path / "rgbir", "'query'")
    (tmp_path / "rgbir/query").mkdir()
    with pytest.raises(UserError) as error:
        read_strips(tmp_path, RNT)
    sentence(error, tmp_path / "rgbir/query", "no images")
    put(tmp_path / "rgbir/query/name.png", 24, 4)
    with pytest.raises(UserError) as error:
        read_strips(tmp_path, RNT)
    sentence(error, "name.png", "ID_cC_")
    (tmp_path / "rgbir/query/name.png").unlink()
    (tmp_path / "rgbir/query/0001_c1_x.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        read_strips(tmp_path, RNT)
    sentence(error, "0001_c1_x.png", "empty (0 bytes)")
    with pytest.raises(UserError) as error:
        read_strips(tmp_path, ("R", "R"))
    sentence(error, "multimodal.modalities", "once")


def test_rgbnt201(tmp_path: Path) -> None:
    splits = read_rgbnt201(rgbnt201(tmp_path))
    names = [tuple(Path(path).relative_to(tmp_path).as_posix() for path in item[0]) for item in splits.train]
    assert names[0] == tuple(f"train_171/{folder}/000001_cam4_1_00.jpg" for folder in ("RGB", "NI", "TI"))
    assert labels(splits.train) == [(0, 3), (1, 0), (1, 1)]
    assert splits.query == splits.gallery and labels(splits.query) == [(258, 0), (258, 2), (259, 0)]
    assert splits.modalities == RNT and splits.train_identities == ["000001", "000003"]


def test_a_missing_modality_is_named(tmp_path: Path) -> None:
    rgbnt201(tmp_path)
    gone = tmp_path / "train_171/TI/000003_cam1_0_01.jpg"
    gone.unlink()
    with pytest.raises(UserError) as error:
        read_rgbnt201(tmp_path)
    sentence(error, f"'{gone}' is missing", "its T image", "train_171/RGB/000003_cam1_0_01.jpg", "(R)")
    (tmp_path / "train_171/RGB/000003_cam2_0_00.jpg").unlink()
    with pytest.raises(UserError) as error:
        read_rgbnt201(tmp_path)
    sentence(error, "1 more sample")
    shutil.rmtree(tmp_path / "train_171/NI")
    with pytest.raises(UserError) as error:
        read_rgbnt201(tmp_path)
    sentence(error, "'NI'", tmp_path / "train_171")


def test_files_pair_without_their_extension(tmp_path: Path) -> None:
    rgbnt201(tmp_path)
    jpeg = tmp_path / "test/NI/000259_cam1_0_00.jpg"
    png = put(jpeg.with_suffix(".png"))
    with pytest.raises(UserError) as error:
        read_rgbnt201(tmp_path)
    sentence(error, png.name, jpeg.name, "one of them")
    jpeg.unlink()
    assert read_rgbnt201(tmp_path).query[-1][0][1] == str(png)


def test_msvr310(tmp_path: Path) -> None:
    splits = read_msvr310(msvr310(tmp_path))
    # scenes 3, 7, 20 become 0, 1, 2
    assert labels(splits.train) == [(0, 0), (1, 0), (1, 2)]
    assert labels(splits.query) == [(311, 1)] and labels(splits.gallery) == [(311, 1), (311, 2)]
    assert splits.group == "scene" and splits.notes == [SCENE_NOTE] and splits.has_cameras
    folder = tmp_path / "query3/0311"
    assert splits.query[0][0] == tuple(str(folder / low / "0311_s007_v1_000.jpg") for low in ("vis", "ni", "th"))
    put(folder / "vis/0312_s001_v1_000.jpg")
    with pytest.raises(UserError) as error:
        read_msvr310(tmp_path)
    sentence(error, folder / "vis/0312_s001_v1_000.jpg", "its N image", "its T image", "are missing")
    for low in ("ni", "th"):
        put(folder / low / "0312_s001_v1_000.jpg")
    with pytest.raises(UserError) as error:
        read_msvr310(tmp_path)
    sentence(error, "names identity 0312", "folder of 0311")


@pytest.mark.parametrize("name", ["WMVEID863", "MSVWild863", "wmveid863"])
def test_wmveid863(tmp_path: Path, name: str) -> None:
    wmveid863(tmp_path / name)
    folder = find_dataset(tmp_path, "wmveid863")
    assert folder == tmp_path / name
    splits = read_wmveid863(folder)
    assert labels(splits.train) == [(0, 0), (1, 1)]
    assert labels(splits.query) == [(600, 0)] and labels(splits.gallery) == [(600, 7), (601, 0)]
    assert splits.train[0][0] == tuple(str(folder / "train" / low / "000005_cam1_0_00.jpg") for low in ("vis", "ni", "th"))
    assert splits.modalities == RNT and splits.group == "camera"


def test_wmveid863_with_a_folder_per_identity(tmp_path: Path) -> None:
    for split, identity, name in (
        ("train", "0021", "v3n0s1_1.jpg"),
        ("query", "0030", "v0n1_2.jpg"),
        ("test", "0030", "v7n1_3.jpg"),
    ):
        for low in ("vis", "ni", "th"):
            put(tmp_path / split / identity / low / name)
    splits = read_any(tmp_path)
    assert (labels(splits.train), labels(splits.query), labels(splits.gallery)) == ([(0, 3)], [(30, 0)], [(30, 7)])
    assert splits.train_identities == ["0021"]
    (tmp_path / "query/0030/ni/v0n1_2.jpg").rename(tmp_path / "query/0030/ni/x.jpg")
    with pytest.raises(UserError) as error:
        read_any(tmp_path)
    sentence(error, "its N image", "1 more sample")


def test_find_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_folder(tmp_path, ("WMVEID863", "MSVWild863"))
    sentence(error, tmp_path / "WMVEID863", tmp_path / "MSVWild863", "data.root")
    (tmp_path / "MSVWild863").mkdir()
    assert find_folder(tmp_path, ("WMVEID863", "MSVWild863")).name == "MSVWild863"
    (tmp_path / "WMVEID863").mkdir()
    assert find_folder(tmp_path, ("WMVEID863", "MSVWild863")).name == "WMVEID863"


def test_released(tmp_path: Path) -> None:
    splits = read_released(released(tmp_path))
    assert labels(splits.train) == [(1, 1), (0, 1)]  # sorted by path: 12, then 5; camera 2 is camid 1
    assert labels(splits.query) == [(12, 1), (5, 1)]
    assert splits.train_identities == ["5", "12"]
    assert splits.train[0][0] == tuple(str(tmp_path / "train" / m / "12" / "x_c2_train.png") for m in RNT)
    put(tmp_path / "query/R/12/plain.png")
    put(tmp_path / "query/N/12/plain.png")
    put(tmp_path / "query/T/12/plain.png")
    with pytest.raises(UserError) as error:
        read_released(tmp_path)
    sentence(error, "plain.png", "no camera", "x_c2_train.png")
    shutil.rmtree(tmp_path / "gallery/N")
    shutil.rmtree(tmp_path / "query/N")
    with pytest.raises(UserError) as error:
        read_released(tmp_path)
    sentence(error, tmp_path / "query", "'N'", tmp_path / "train")


def test_released_with_two_modalities_and_a_test_folder(tmp_path: Path) -> None:
    released(tmp_path, ("train", "test"), camera="")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / split / "T")
    splits = read_released(tmp_path)
    assert splits.modalities == ("R", "N") and not splits.has_cameras and splits.notes == [OWN_IMAGE_NOTE]
    assert splits.query == splits.gallery
    # under the protocol a query loses its own image and nothing else
    for number, (source, pid, camid) in enumerate(splits.query):
        own = [item for item in splits.gallery if item[1:] == (pid, camid)]
        assert own == [(source, pid, camid)] and camid == number


def test_released_without_cameras(tmp_path: Path) -> None:
    splits = read_released(released(tmp_path, camera=""))
    assert splits.notes == [NO_CAMERAS_NOTE]
    assert {item[2] for item in splits.query} == {0} and {item[2] for item in splits.gallery} == {1}


def test_table(tmp_path: Path) -> None:
    rows = (
        "red,train,3,a.png,b.png",
        "blue,train,0,c.png,d.png",
        "green,query,0,e.png,f.png",
        "green,gallery,1,g.png,h.png",
    )
    splits = read_multimodal_table(table(tmp_path, "pid,split,camid,N,sonar", *rows))
    assert splits.modalities == ("N", "sonar")
    assert splits.train == [
        ((str(tmp_path / "a.png"), str(tmp_path / "b.png")), 1, 3),
        ((str(tmp_path / "c.png"), str(tmp_path / "d.png")), 0, 0),
    ]
    assert splits.train_identities == ["blue", "red"]
    assert labels(splits.query) == [(2, 0)] and labels(splits.gallery) == [(2, 1)]


def test_table_with_scenes(tmp_path: Path) -> None:
    rows = ("1,train,a.png,0,night", "2,query,b.png,0,day", "2,gallery,c.png,0,night")
    splits = read_multimodal_table(table(tmp_path, "pid,split,R,camid,scene", *rows))
    assert splits.group == "scene" and SCENE_NOTE in splits.notes and splits.modalities == ("R",)
    assert [item[2] for item in (*splits.train, *splits.query, *splits.gallery)] == [1, 0, 1]


@pytest.mark.parametrize(
    "header, row, parts",
    [
        ("pid,R,N", "1,a.png,b.png", ("line 1", "'split'")),
        ("pid,split", "1,train", ("line 1", "no column of a modality")),
        ("path,pid,split", "a.png,1,train", ("line 1", "'path'")),
        ("pid,split,R,R", "1,train,a.png,b.png", ("line 1", "'R' twice")),
        ("pid,split,R,N", "1,train,a.png,", ("line 2", "the N image is not given", "'a.png' (R)")),
        ("pid,split,R,N", "1,train,a.png,gone.jpg", ("line 2", "its N image", "gone.jpg", "a.png' (R)")),
        ("pid,split,R,N", "1,trian,a.png,b.png", ("line 2", "did you mean 'train'")),
        ("pid,split,R,N", ",train,a.png,b.png", ("line 2", "'pid' is empty")),
        ("pid,split,R,N,camid", "1,train,a.png,b.png,-2", ("line 2", "'-2'")),
        ("pid,split,R,N,scene", "1,train,a.png,b.png,", ("line 2", "'scene' is empty")),
        ("pid,split,R,N", "1,train,a.png,b.png", ("'query'",)),
    ],
)
def test_table_mistakes(tmp_path: Path, header: str, row: str, parts: tuple[str, ...]) -> None:
    path = table(tmp_path, header, row)
    with pytest.raises(UserError) as error:
        read_multimodal_table(path)
    sentence(error, path, *parts)


@pytest.mark.parametrize("make, layout", [(strips, "strips"), (rgbnt201, "rgbnt201"), (msvr310, "msvr310")])
def test_any_layout(tmp_path: Path, make, layout: str) -> None:
    make(tmp_path)
    assert detect_layout(tmp_path) == layout
    read = {"strips": lambda place: read_strips(place, RNT), "rgbnt201": read_rgbnt201, "msvr310": read_msvr310}[layout]
    assert read_any(tmp_path) == read(tmp_path)


@pytest.mark.parametrize("make, layout", [(wmveid863, "wmveid863"), (released, "released")])
def test_any_layout_with_train(tmp_path: Path, make, layout: str) -> None:
    make(tmp_path)
    assert detect_layout(tmp_path) == layout
    assert read_any(tmp_path) == {"wmveid863": read_wmveid863, "released": read_released}[layout](tmp_path)


def test_any_names_the_views_of_strips(tmp_path: Path) -> None:
    assert read_any(strips(tmp_path / "a", 2)).modalities == ("R", "N")
    assert read_any(strips(tmp_path / "a", 2), ("N", "T")).modalities == ("N", "T")
    with pytest.raises(UserError) as error:
        read_any(strips(tmp_path / "b", 1))
    sentence(error, "8x4", "multimodal.modalities")


def test_any_selects_modalities(tmp_path: Path) -> None:
    whole, part = read_any(rgbnt201(tmp_path)), read_any(tmp_path, ("T", "R"))
    assert part.modalities == ("T", "R")
    assert [item[0] for item in part.train] == [(item[0][2], item[0][0]) for item in whole.train]
    assert labels(part.gallery) == labels(whole.gallery)
    with pytest.raises(UserError) as error:
        read_any(tmp_path, ("R", "S"))
    sentence(error, "multimodal.modalities", "'S'", tmp_path)


def test_any_without_a_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_any(tmp_path)
    sentence(error, tmp_path, "RGBNT100", "RGBNT201", "MSVR310", "WMVEID863", "{R,N,T}", "CSV")
    with pytest.raises(UserError, match="does not exist"):
        read_any(tmp_path / "set.csv")


def test_identities_can_be_held_out(tmp_path: Path) -> None:
    for identity in range(6):
        for camera in (1, 2, 3):
            put(tmp_path / f"bounding_box_train/{identity:04d}_c{camera}_0.png", 24, 4)
    put(tmp_path / "query/0009_c1_0.png", 24, 4)
    put(tmp_path / "bounding_box_test/0009_c2_0.png", 24, 4)
    splits = read_strips(tmp_path, RNT)
    held = hold_out_identities([(*item, 0) for item in splits.train], 0.34, 1)
    assert len(held.kept_labels) == 4 and len(held.query) + len(held.gallery) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def test_whole_samples_pass(tmp_path: Path) -> None:
    assert check_samples(read_rgbnt201(rgbnt201(tmp_path)).sources(), RNT, "full", progress=False) == []


@pytest.mark.parametrize("mode", ["header", "full"])
def test_check_finds_damage(tmp_path: Path, mode: str) -> None:
    sources = read_rgbnt201(rgbnt201(tmp_path)).sources()
    check_samples(sources, RNT, mode, progress=False)
    file = Path(sources[1][2])
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError) as error:
        check_samples(sources, RNT, mode, progress=False)
    sentence(error, file)
    assert check_samples(sources, RNT, "none") == []
    file.unlink()
    with pytest.raises(UserError) as error:
        check_samples(sources, RNT, mode, progress=False)
    sentence(error, f"its T image '{file}' is missing", f"'{sources[1][0]}' (R)")


def test_check_finds_16_bits(tmp_path: Path) -> None:
    deep = tmp_path / "t.png"
    Image.fromarray(np.arange(32, dtype=np.uint16).reshape(4, 8) * 2000).save(deep)
    colour = put(tmp_path / "r.png")
    with pytest.raises(UserError) as error:
        check_samples([(str(colour), str(deep))], ("R", "T"), progress=False)
    sentence(error, deep, "has 16 bits per channel;", "'multimodal.pixel_range' for T", "convert the file to 8 bits")
    tiff = tmp_path / "t.tif"
    Image.fromarray(np.arange(32, dtype=np.uint16).reshape(4, 8)).save(tiff)
    with pytest.raises(UserError, match="16 bits per channel"):
        check_samples([(str(colour), str(tiff))], ("R", "T"), progress=False)


def test_check_finds_16_bit_colour(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    strip = tmp_path / "s.png"
    cv2.imwrite(str(strip), np.random.default_rng(0).integers(0, 65536, (4, 24, 3), dtype=np.uint16))
    with pytest.raises(UserError, match="16 bits per channel"):
        check_samples([str(strip)], RNT, progress=False)


def test_check_of_grey_files(tmp_path: Path) -> None:
    colour, grey = put(tmp_path / "r.jpg"), put(tmp_path / "n.jpg", mode="L")
    assert check_samples([(str(colour), str(grey))], ("R", "N"), progress=False) == [
        "1 of 1 files of N are grey-scale: their one channel is used three times"
    ]
    with pytest.raises(UserError) as error:
        check_samples([(str(grey), str(colour))], ("R", "N"), progress=False)
    sentence(error, grey, "grey-scale", "colour")
    strip = put(tmp_path / "s.png", 24, 4, "L")
    with pytest.raises(UserError) as error:
        check_samples([str(strip)], RNT, progress=False)
    sentence(error, strip, "grey-scale")
    assert len(check_samples([str(strip)], ("N", "T", "S"), progress=False)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Views


def test_views_of_a_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strip = put(tmp_path / "s.png", 24, 4)
    pixels = np.asarray(Image.open(strip))
    opened: list[str] = []
    original = Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, *args, **kwargs: opened.append(str(path)) or original(path, *args, **kwargs)
    )
    views = read_views(str(strip), RNT, ("T", "R"))
    assert opened == [str(strip)]
    np.testing.assert_array_equal(np.asarray(views[0]), pixels[:, 16:])
    np.testing.assert_array_equal(np.asarray(views[1]), pixels[:, :8])
    assert len(read_views(str(strip), RNT)) == 3


def test_a_strip_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import JpegImagePlugin

    strip = put(tmp_path / "s.jpg", 24, 4)
    loads: list[int] = []
    original = JpegImagePlugin.JpegImageFile.load_prepare
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load_prepare", lambda self: loads.append(1) or original(self))
    read_views(str(strip), RNT)
    assert loads == [1]


def test_views_of_files(tmp_path: Path) -> None:
    files = tuple(
        str(put(tmp_path / f"{name}.png", 4 + number, 4, mode))
        for number, (name, mode) in enumerate(zip("RNT", ("RGB", "L", "RGB")))
    )
    views = read_views(files, RNT, ("N", "T"))
    assert [view.mode for view in views] == ["RGB", "RGB"] and [view.width for view in views] == [5, 6]
    Path(files[2]).unlink()
    assert len(read_views(files, RNT, ("R", "N"))) == 2  # a file that is not wanted is not opened
    with pytest.raises(UserError, match="does not exist"):
        read_views(files, RNT, ("T",))
    with pytest.raises(UserError) as error:
        read_views(files, RNT, ("R", "X"))
    sentence(error, "multimodal.modalities", "'X'")
    with pytest.raises(UserError) as error:
        read_views(files[0], RNT)
    sentence(error, files[0], "4 pixels", "3 views")


# ---------------------------------------------------------------------------------------------------------------------
# Transforms

MEAN = [[0.276, 0.271, 0.274], [0.346], [0.761, 0.329, 0.322]]
STD = [[0.176, 0.176, 0.168], [0.3], [0.257, 0.263, 0.215]]


def test_transform_for_testing() -> None:
    views = [picture(16, 8, seed) for seed in range(3)]
    state = random.getstate()
    result = MultimodalTransform(24, 20, names=MULTIMODAL_TRANSFORMS, mean=MEAN, std=STD, training=False)(views)
    assert random.getstate() == state
    assert result.shape == (3, 3, 24, 20) and result.dtype == torch.float32 and result.is_contiguous()
    for view, mean, std, tensor in zip(views, MEAN, STD, result):
        pixels = np.asarray(view.resize((20, 24), Image.Resampling.BICUBIC), dtype=np.float64) / 255
        np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), (pixels - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    "names", [("random_flip", "random_vflip"), ("pad_crop",), ("random_crop",), MULTIMODAL_TRANSFORMS[:4]]
)
def test_geometry_is_the_same_for_all_views(names: tuple[str, ...]) -> None:
    view = picture(40, 20)
    transform = MultimodalTransform(24, 32, names=names, mean=MEAN, std=STD, training=True)
    random.seed(4)
    seen = set()
    for _ in range(12):
        result = transform([view] * 3)
        pixels = [
            row * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
            for row, mean, std in zip(result, MEAN, STD)
        ]
        torch.testing.assert_close(pixels[1], pixels[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(pixels[2], pixels[0], atol=1e-5, rtol=0)
        seen.add(round(float(pixels[0][:, :4, :4].sum()), 3))
    assert len(seen) > 1


def test_flips() -> None:
    view = picture(12, 12)
    plain = MultimodalTransform(12, 12, mean=HALF, std=HALF, training=False)([view] * 3)
    horizontal = MultimodalTransform(12, 12, names=["Random_Flip"], mean=HALF, std=HALF, training=True)
    vertical = MultimodalTransform(12, 12, names="random_vflip", mean=HALF, std=HALF, training=True)
    random.seed(0)
    for transform, axis in ((horizontal, 3), (vertical, 2)):
        results = [transform([view] * 3) for _ in range(200)]
        turned = sum(torch.equal(result, plain.flip(axis)) for result in results)
        assert turned + sum(torch.equal(result, plain) for result in results) == 200
        assert 70 < turned < 130


def test_pad_crop_pads_with_black() -> None:
    white = Image.new("RGB", (16, 12), (255, 255, 255))
    transform = MultimodalTransform(12, 16, names=["pad_crop"], mean=HALF, std=HALF, training=True, padding=3)
    random.seed(1)
    offsets = set()
    for _ in range(600):
        result = transform([white] * 3)
        assert set(result.unique().round(decimals=5).tolist()) <= {-1.0, 1.0}
        lit = (result[0, 0] > 0).nonzero()
        top, left = lit.min(0).values.tolist()
        bottom, right = lit.max(0).values.tolist()
        assert bottom - top + 1 >= 9 and right - left + 1 >= 13
        offsets.add((top - (11 - bottom), left - (15 - right)))
    assert len(offsets) == 49


def test_random_crop_keeps_its_size_and_scale() -> None:
    ramp = Image.fromarray(np.repeat(np.arange(0, 180, 2, dtype=np.uint8)[None, :, None], 45, 0).repeat(3, 2))  # 90 x 45
    transform = MultimodalTransform(45, 90, names=["random_crop"], mean=[[0.0]], std=[[1 / 255]], training=True)
    random.seed(2)
    slopes = []
    for _ in range(100):
        row = transform([ramp])[0, 0, 20]
        slopes.append(float(row[80] - row[10]) / 70)
    cropped = [slope for slope in slopes if slope < 1.9]
    assert 30 < len(cropped) < 70
    np.testing.assert_allclose(cropped, 2 / 1.125, atol=0.05)


def test_erasing_is_drawn_for_every_view() -> None:
    views = [Image.new("RGB", (40, 40), (255, 255, 255))] * 3
    transform = MultimodalTransform(40, 40, names=["random_erase"], mean=HALF, std=HALF, training=True)
    random.seed(3)
    results = torch.stack([transform(views) for _ in range(300)])
    erased = results == 0
    counts = erased[:, :, 0].flatten(2).sum(2)  # (300, 3)
    share = (counts > 0).float().mean(0)
    assert ((share > 0.4) & (share < 0.6)).all()
    both = (counts[:, 0] > 0) & (counts[:, 1] > 0)
    assert 0.15 < both.float().mean() < 0.35
    assert not (erased[:, 0] == erased[:, 1]).flatten(1).all(1)[both].any()
    areas = counts[counts > 0] / 1600
    assert 0.015 < areas.min() and areas.max() < 0.42
    assert (erased.all(2) == erased.any(2)).all()  # all channels alike


def test_transform_is_deterministic_by_the_seed() -> None:
    views = [picture(16, 8, seed) for seed in range(3)]
    transform = MultimodalTransform(24, 20, names=MULTIMODAL_TRANSFORMS, mean=MEAN, std=STD, training=True)

    def draw(seed: int) -> torch.Tensor:
        random.seed(seed)
        return torch.stack([transform(views) for _ in range(5)])

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"names": ["random_flp"]}, ("data.transforms", "did you mean 'random_flip'")),
        ({"mean": HALF[:2]}, ("multimodal.mean", "2 modalities", "multimodal.std", "3")),
        ({"std": [[0.1], [0.0], [0.1]]}, ("multimodal.std", "above 0")),
        ({"mean": [[0.1, 0.2], [0.1], [0.1]]}, ("multimodal.mean", "[0.1, 0.2]")),
        ({"mean": [], "std": []}, ("multimodal.mean", "empty")),
    ],
)
def test_transform_mistakes(change: dict, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        MultimodalTransform(8, 8, **{"mean": HALF, "std": HALF, "training": True, **change})
    sentence(error, *parts)


def test_transform_wants_all_views() -> None:
    with pytest.raises(ValueError, match="2 views"):
        MultimodalTransform(8, 8, mean=HALF, std=HALF, training=True)([picture(8, 8)] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_statistics_of_strips_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views._imap, "__kwdefaults__", {**views._imap.__kwdefaults__, "ahead": 2})
    strips_of = [str(put(tmp_path / f"{number}_c1.png", 24, 4)) for number in range(5)]
    pixels = np.stack([np.asarray(Image.open(file), dtype=np.float64) for file in strips_of]) / 255
    statistics = modality_statistics(strips_of, RNT)
    assert statistics.samples == 5
    for place in range(3):
        view = pixels[:, :, 8 * place : 8 * place + 8].reshape(-1, 3)
        np.testing.assert_allclose(statistics.mean[place], view.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.std[place], view.std(0), rtol=1e-12)
    files = [(str(put(tmp_path / f"R/{n}.png", 8 + n, 4)), str(put(tmp_path / f"N/{n}.png", 6, 5, "L"))) for n in range(4)]
    statistics = modality_statistics(files, ("R", "N"))
    for place in range(2):
        flat = (
            np.concatenate(
                [np.asarray(Image.open(pair[place]).convert("RGB"), dtype=np.float64).reshape(-1, 3) for pair in files]
            )
            / 255
        )
        np.testing.assert_allclose(statistics.mean[place], flat.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.std[place], flat.std(0), rtol=1e-12)


def test_statistics_of_nothing_and_of_one_colour(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples"):
        modality_statistics([], RNT)
    black = tmp_path / "b.png"
    Image.new("RGB", (16, 4)).save(black)
    with pytest.raises(UserError, match="modality R is constant"):
        statistics_yaml(modality_statistics([str(black)], ("R", "N")))


def tool():
    spec = importlib.util.spec_from_file_location("modality_stats", ROOT / "tools/modality_stats.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strips(tmp_path / "RGBN300", 2)
    assert tool()(["--root", str(tmp_path), "--name", "rgbn300"]) == 0
    out = capsys.readouterr().out
    read = yaml.safe_load(out)["multimodal"]
    splits = read_strips(tmp_path / "RGBN300", ("R", "N"))
    expected = modality_statistics([item[0] for item in splits.train], ("R", "N"))
    assert read["modalities"] == ["R", "N"]
    np.testing.assert_allclose(read["mean"], expected.mean, atol=5e-5)
    np.testing.assert_allclose(read["std"], expected.std, atol=5e-5)
    MultimodalTransform(8, 8, mean=read["mean"], std=read["std"], training=False)
    assert tool()(["--root", str(tmp_path), "--name", "RGBN300", "--modalities", "R,N,T"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "2 views" in error
    assert tool()(["--root", str(tmp_path), "--name", "rgbnt100"]) == 2
    assert str(tmp_path / "RGBNT100") in capsys.readouterr().err
