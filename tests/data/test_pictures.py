"""The one reader of pictures: orientation, depth, regular files, odd files, and the same file under several names."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from relreid_plugin import host
from relreid_plugin.config.defaults import get_default_config, validate
from relreid_plugin.data.checks import check_images
from relreid_plugin.data.files import Unreadable, one_per_file, printable, walk_files
from relreid_plugin.data.folder import read_market_folder
from relreid_plugin.data.images import is_image_name, read_header, read_image, read_picture
from relreid_plugin.data.multimodal import check_samples, modality_statistics, read_strips, read_views, statistics_yaml
from relreid_plugin.data.ranges import check_range, modality_ranges, parse_range_rows
from relreid_plugin.data.table import read_table
from relreid_plugin.errors import UserError
from relreid_plugin.graft.network import GraFTNetwork
from relreid_plugin.host.multimodal import Files
from relreid_plugin.search.extractor import list_images
from relreid_plugin.search.report import ranking_table

RNT = ("R", "N", "T")
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (6, 8), dtype=np.uint16)
DEEP_RGB = np.random.default_rng(2).integers(0, 65536, (6, 8, 3), dtype=np.uint16)

# how a camera that is held so stores what is upright, by the definition of EXIF: row 0 and column 0 of the stored picture
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),  # row 0 is the left side, column 0 the top
    6: lambda a: a.swapaxes(0, 1)[::-1],  # row 0 is the right side, column 0 the top
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],  # row 0 is the right side, column 0 the bottom
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],  # row 0 is the left side, column 0 the bottom
}


def exif(orientation: int) -> bytes:
    """EXIF data with an orientation alone."""
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def save(path: Path, pixels: np.ndarray, orientation: int = 1, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif(orientation), **options)
    return path


def png(path: Path, rows: np.ndarray, kind: int, extra: bytes = b"") -> Path:
    """Write a PNG file of 16 bits by hand: ``rows`` (h, w, c), its colour type, further chunks behind the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + extra + chunk(b"IEND", b"")
    )
    return path


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """What a range makes of values, pixel by pixel."""
    grey = np.array([[round(255 * (float(v) - low) / (high - low)) for v in row] for row in values.reshape(len(values), -1)])
    return np.broadcast_to(grey.reshape(*values.shape[:2], -1), (*values.shape[:2], 3)).astype(np.uint8)


# --- orientation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "lzw.tif", "a.jpg"])
def test_a_turned_twin_is_the_same_picture(tmp_path: Path, name: str, orientation: int) -> None:
    options = {"a.webp": {"lossless": True}, "lzw.tif": {"compression": "tiff_lzw"}, "a.jpg": {"quality": 100}}.get(name, {})
    file = save(tmp_path / name, STORED[orientation](PIXELS), orientation, **options)
    image = read_image(file)
    assert image.mode == "RGB" and read_header(file).size == image.size == (8, 6)
    if name != "a.jpg":  # blocks of a JPEG file lie otherwise in a turned picture
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
    else:
        with Image.open(file) as stored:
            np.testing.assert_array_equal(STORED[orientation](np.asarray(image)), np.asarray(stored))


@pytest.mark.parametrize("orientation", STORED)
def test_deep_twins_too(tmp_path: Path, orientation: int) -> None:
    stored, turned = STORED[orientation](DEEP), STORED[orientation](DEEP_RGB)
    files = {tmp_path / "grey.png": DEEP, tmp_path / "colour.png": DEEP_RGB, tmp_path / "late.png": DEEP_RGB}
    save(tmp_path / "grey.png", stored, orientation)
    late = exif(orientation)[6:]
    late = struct.pack(">I", len(late)) + b"eXIf" + late + struct.pack(">I", zlib.crc32(b"eXIf" + late))
    for name in ("colour.png", "late.png"):
        png(tmp_path / name, turned, 2, late)
    tag = [(274, "H", 1, orientation, True)]
    for name, values, options in (
        ("grey.tif", DEEP, {}),
        ("float.tif", DEEP / 65535, {"byteorder": ">"}),
        ("colour.tif", DEEP_RGB, {"photometric": "rgb"}),
        ("zip.tif", DEEP_RGB, {"photometric": "rgb", "compression": "zlib", "predictor": True}),
    ):
        tifffile.imwrite(tmp_path / name, np.ascontiguousarray(STORED[orientation](values)), extratags=tag, **options)
        files[tmp_path / name] = values
    Image.fromarray(np.ascontiguousarray(stored)).save(
        tmp_path / "lzw.tif", compression="tiff_lzw", tiffinfo={274: orientation}
    )
    files[tmp_path / "lzw.tif"] = DEEP
    for file, values in files.items():
        assert read_header(file).size == (8, 6), file
        pixels = read_picture(file).pixels
        np.testing.assert_array_equal(pixels, values.reshape(6, 8, -1), err_msg=file.name)


def test_a_png_with_its_orientation_behind_the_pixels(tmp_path: Path) -> None:
    data = save(tmp_path / "a.png", STORED[6](PIXELS), 6).read_bytes()
    at, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    (tmp_path / "b.png").write_bytes(data[:at] + data[at + length : end] + data[at : at + length] + data[end:])
    assert read_header(tmp_path / "b.png").size == (8, 6)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "b.png")), PIXELS)


@pytest.mark.parametrize(
    "broken", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", exif(6)[:-9], exif(0), exif(9), b"x" * 40]
)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_broken_exif_data_counts_as_none(tmp_path: Path, name: str, broken: bytes) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    Image.fromarray(PIXELS).save(tmp_path / name, exif=broken, quality=100, lossless=True)
    assert read_image(tmp_path / name).size == (8, 6) == read_header(tmp_path / name).size
    check_images([tmp_path / name], progress=False)


def test_a_strip_is_turned_before_it_is_divided(tmp_path: Path) -> None:
    views = [np.full((10, 20, 3), value, np.uint8) for value in (10, 120, 230)]
    strip = np.concatenate(views, axis=1)
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        save(tmp_path / split / "0001_c1_0.png", STORED[8](strip), 8)
        save(tmp_path / split / "0001_c2_0.tif", STORED[6](strip), 6)
    splits = read_strips(tmp_path, RNT)  # its check of widths sees 60x10, not 10x60
    assert len(splits.train) == 2
    for source, *_ in splits.train:
        assert [np.unique(np.asarray(view)).tolist() for view in read_views(source, RNT)] == [[10], [120], [230]]
    lying = save(tmp_path / "query/0001_c3_0.png", strip, 6)  # fits as it is stored, but not upright
    with pytest.raises(UserError, match=rf"{lying.name}' is 10 pixels wide|{lying.name}' of 10x60"):
        read_strips(tmp_path, RNT)


# --- depth --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_8_bits_are_as_they_are(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(40)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(file)
    assert not read_header(file).depth and read_header(file).grey == (mode in ("1", "L", "LA"))
    for pixel_range in (None, (0, 65535)):
        np.testing.assert_array_equal(np.asarray(read_image(file, pixel_range)), np.asarray(image.convert("RGB")))


def deep_files(folder: Path) -> dict[Path, np.ndarray]:
    """Files of more than 8 bits, each with its values (h, w, c)."""
    files: dict[Path, np.ndarray] = {}

    def tiff(name: str, values: np.ndarray, shown: np.ndarray | None = None, **options: object) -> None:
        tifffile.imwrite(folder / name, values, **options)
        files[folder / name] = values if shown is None else shown

    tiff("u16.tif", DEEP)
    tiff("u16-big-endian.tif", DEEP, byteorder=">")
    tiff("u16-bigtiff.tif", DEEP, bigtiff=True)
    tiff("s16.tif", DEEP.view(np.int16))
    tiff("s8.tif", (DEEP >> 8).astype(np.uint8).view(np.int8))
    tiff("u32.tif", DEEP.astype(np.uint32) * 65000)
    tiff("f16.tif", (DEEP / 65535).astype(np.float16))
    tiff("f32.tif", (DEEP / 65535).astype(np.float32))
    tiff("f64.tif", DEEP / 65535)
    tiff("rgb.tif", DEEP_RGB, photometric="rgb")
    tiff("rgb-planes.tif", np.moveaxis(DEEP_RGB, -1, 0), DEEP_RGB, photometric="rgb", planarconfig="separate")
    tiff("rgb-float.tif", (DEEP_RGB / 65535).astype(np.float32), photometric="rgb")
    with_alpha = np.dstack([DEEP, DEEP[::-1]])
    tiff("alpha.tif", with_alpha, DEEP, photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig")
    cv2.imwrite(str(folder / "rgb-lzw.tif"), DEEP_RGB[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    files[folder / "rgb-lzw.tif"] = DEEP_RGB
    (folder / "grey.pgm").write_bytes(b"P5 8 6 65535\n" + DEEP.astype(">u2").tobytes())
    files[folder / "grey.pgm"] = DEEP
    alpha = DEEP_RGB[..., :1][::-1]
    for name, rows, kind, channels in (
        ("grey.png", DEEP[..., None], 0, 1),
        ("rgb.png", DEEP_RGB, 2, 3),
        ("grey-alpha.png", np.dstack([DEEP[..., None], alpha]), 4, 1),
        ("rgb-alpha.png", np.dstack([DEEP_RGB, alpha]), 6, 3),
        ("16-bits.jpg", DEEP_RGB, 2, 3),  # the content counts, not the name
    ):
        files[png(folder / name, rows, kind)] = rows[..., :channels]
    return files


def test_deep_files_need_a_range(tmp_path: Path) -> None:
    for file, values in deep_files(tmp_path).items():
        assert read_header(file).depth and read_header(file).grey == (values.reshape(6, 8, -1).shape[2] == 1), file
        low, high = float(values.min()), float(values.max())
        for mode in ("header", "full"):
            with pytest.raises(UserError, match=r"has .*'data\.pixel_range'") as error:
                check_images([file], mode, progress=False)
            assert file.name in str(error.value) and "\n" not in str(error.value)
            check_images([file], mode, pixel_range=(low, high), progress=False)
        with pytest.raises(UserError, match=rf"{file.name}' has .*from .* to .*'data\.pixel_range'"):
            read_image(file)
        np.testing.assert_array_equal(
            np.asarray(read_image(file, (low, high))), scaled(values, low, high), err_msg=file.name
        )
        wide = (low - 1000, high + 500)
        np.testing.assert_array_equal(np.asarray(read_image(file, wide)), scaled(values, *wide), err_msg=file.name)


def test_nothing_is_clipped(tmp_path: Path) -> None:
    file = tmp_path / "thermal.png"
    Image.fromarray(np.array([[29000, 30000], [31000, 31001]], np.uint16)).save(file)
    for outside in ((29001, 40000), (0, 31000)):
        with pytest.raises(UserError) as error:
            read_image(file, outside)
        for part in ("thermal.png", "29000", "31001", f"[{outside[0]}, {outside[1]}]", "'data.pixel_range'"):
            assert part in str(error.value)
        check_images([file], "header", pixel_range=outside, progress=False)  # a header does not tell
        with pytest.raises(UserError, match="outside the range"):
            check_images([file], "full", pixel_range=outside, progress=False)
    assert np.asarray(read_image(file, (29000, 31001)))[..., 0].tolist() == [[0, 127], [255, 255]]
    tifffile.imwrite(tmp_path / "tenth.tif", np.array([[0.0, 0.1]], np.float32))  # 0.1 of 32 bits is above 0.1
    assert np.asarray(read_image(tmp_path / "tenth.tif", (0.0, 0.1)))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0.5, value]], np.float32))
    with pytest.raises(UserError, match=r"a\.tif' holds values that are no numbers"):
        read_image(tmp_path / "a.tif", (-1e9, 1e9))


def unread_files(folder: Path) -> dict[Path, str]:
    """Files that hold a picture which cannot be read as it is meant, and what their sentence says."""
    files: dict[Path, str] = {}

    def tiff(name: str, values: np.ndarray, reason: str, **options: object) -> None:
        tifffile.imwrite(folder / name, values, **options)
        files[folder / name] = reason

    tiff("pages.tif", np.stack([DEEP, DEEP]), "holds 2 pictures", photometric="minisblack")
    tiff("pages-8.tif", np.stack([PIXELS, PIXELS]), "holds 2 pictures", photometric="rgb")
    tiff("bands.tif", np.dstack([DEEP_RGB, DEEP, DEEP]), "channels: 5", photometric="minisblack", planarconfig="contig")
    tiff("bands-8.tif", np.dstack([PIXELS, PIXELS[..., :2]]), "5 channels", photometric="rgb", planarconfig="contig")
    tiff("white-is-0.tif", DEEP, "MINISWHITE", photometric="miniswhite")
    tiff("complex.tif", DEEP.astype(np.complex64), "a kind that is not read")
    (folder / "twelve.pgm").write_bytes(b"P5 8 6 4095\n" + (DEEP >> 4).astype(">u2").tobytes())
    files[folder / "twelve.pgm"] = "16 bits per channel"
    (folder / "rgb.ppm").write_bytes(b"P6 8 6 65535\n" + DEEP_RGB.astype(">u2").tobytes())
    files[folder / "rgb.ppm"] = "16 bits per channel"
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1])]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
        files[folder / name] = "holds 2 pictures"
    return files


def test_pictures_that_cannot_be_meant(tmp_path: Path) -> None:
    for file, reason in unread_files(tmp_path).items():
        for pixel_range in (None, (0, 65535)):
            with pytest.raises(UserError) as error:
                read_image(file, pixel_range)
            assert f"'{file}'" in str(error.value) and reason in str(error.value)
            with pytest.raises(UserError) as error:  # the header tells, before training
                check_images([file], pixel_range=pixel_range, progress=False)
            assert f"'{file}'" in str(error.value) and reason in str(error.value)


def test_previews_are_no_further_pictures(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(PIXELS, photometric="rgb")
        writer.write(PIXELS[::2, ::2], photometric="rgb", subfiletype=1)
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(DEEP)
        writer.write(DEEP[::2, ::2], subfiletype=1)
    Image.fromarray(PIXELS).save(tmp_path / "c.jpg", "MPO", save_all=True, append_images=[Image.fromarray(PIXELS[::-1])])
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif")), PIXELS)
    np.testing.assert_array_equal(read_picture(tmp_path / "b.tif").pixels[..., 0], DEEP)
    assert read_image(tmp_path / "c.jpg").size == (8, 6)
    check_images([tmp_path / name for name in ("a.tif", "c.jpg")], progress=False)


@pytest.mark.parametrize("value", [[1], [1, 2, 3], [2, 1], [1, 1], [0, "a"], [0, True], [0, float("nan")], "[0, 1]", 5])
def test_ranges_are_validated(value: object) -> None:
    with pytest.raises(UserError, match=r"key 'data\.pixel_range' must be \[low, high\]"):
        check_range("data.pixel_range", value)
    cfg = get_default_config()
    cfg.data.pixel_range = value
    with pytest.raises(UserError, match=r"data\.pixel_range"):
        validate(cfg)
    cfg = get_default_config()
    cfg.multimodal.pixel_range = [value, [], []]
    with pytest.raises(UserError, match=r"multimodal\.pixel_range"):
        validate(cfg)


def test_ranges_per_modality() -> None:
    assert check_range("data.pixel_range", []) is None and check_range("data.pixel_range", (0, 9)) == (0.0, 9.0)
    assert modality_ranges(RNT, []) == dict.fromkeys(RNT)
    assert modality_ranges(RNT, [[0, 9]]) == dict.fromkeys(RNT, (0.0, 9.0))
    assert modality_ranges(RNT, [[], [0, 1.5], []]) == {"R": None, "N": (0.0, 1.5), "T": None}
    assert parse_range_rows("[[], [0, 9]]") == [[], [0, 9]]
    with pytest.raises(UserError, match="R, N, T"):
        modality_ranges(RNT, [[], []])
    for text in ("5", "[[", "x"):
        with pytest.raises(UserError, match="--pixel-range"):
            parse_range_rows(text)


def test_deep_modalities(tmp_path: Path) -> None:
    colour, thermal = save(tmp_path / "r.png", PIXELS), tmp_path / "t.png"
    Image.fromarray(DEEP).save(thermal)
    files = (str(colour), str(thermal))
    ranges = modality_ranges(("R", "T"), [[], [0, 65535]])
    with pytest.raises(UserError, match=r"t\.png' has 16 bits.*'multimodal\.pixel_range' for T"):
        read_views(files, ("R", "T"))
    views = read_views(files, ("R", "T"), ("T", "R"), ranges=ranges)
    np.testing.assert_array_equal(np.asarray(views[0]), scaled(DEEP, 0, 65535))
    np.testing.assert_array_equal(np.asarray(views[1]), PIXELS)
    assert check_samples([files], ("R", "T"), wanted=["R"], progress=False)  # what is not read may be of any depth
    check_samples([files], ("R", "T"), "full", ranges=ranges, progress=False)
    with pytest.raises(UserError, match=r"t\.png' holds values.*outside.*'multimodal\.pixel_range' for T"):
        check_samples([files], ("R", "T"), "full", ranges={"T": (0, 100)}, progress=False)
    statistics = modality_statistics([files], ("R", "T"), ranges=ranges)
    assert statistics.mean[1] == pytest.approx([scaled(DEEP, 0, 65535).mean() / 255] * 3)
    assert "  pixel_range: [[], [0.0, 65535.0]]" in statistics_yaml(statistics)


def test_a_deep_strip_has_a_range_for_every_view(tmp_path: Path) -> None:
    strip = png(tmp_path / "s.png", np.concatenate([DEEP_RGB // 100, DEEP_RGB // 10, DEEP_RGB], axis=1), 2)
    rows = [[0, 655], [0, 6553], [0, 65535]]
    views = read_views(str(strip), RNT, ranges=modality_ranges(RNT, rows))
    for view, divisor, (low, high) in zip(views, (100, 10, 1), rows):
        np.testing.assert_array_equal(np.asarray(view), scaled(DEEP_RGB // divisor, low, high))
    with pytest.raises(UserError, match=r"'multimodal\.pixel_range' for N"):
        read_views(str(strip), RNT, ("R", "N"), ranges={"R": (0, 655)})
    with pytest.raises(UserError, match=r"'multimodal\.pixel_range' for N"):
        check_samples([str(strip)], RNT, ranges={"R": (0, 655)}, progress=False)


# --- files that are none ------------------------------------------------------------------------------------------------


def special_files(folder: Path) -> dict[Path, str]:
    """Things named like images that must not be opened, and what their sentence says."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "folder.jpg").mkdir()
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket is short
    server.bind("socket.jpg")
    os.chdir(here)
    server.close()
    return {
        folder / "pipe.jpg": "a FIFO",
        folder / "zero.jpg": "a device",
        folder / "socket.jpg": "a socket",
        folder / "dangling.jpg": "is a link to '.*gone.jpg', which does not exist",
        folder / "loop.jpg": "cannot be opened",
        folder / "folder.jpg": "is a folder",
    }


@pytest.fixture
def no_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a FIFO fails instead of waiting for ever."""
    original = Image.open

    def checked(file: object, *args: object, **kwargs: object) -> Image.Image:
        assert Path(str(file)).is_file()
        return original(file, *args, **kwargs)

    monkeypatch.setattr(Image, "open", checked)


def test_special_files_are_not_opened(tmp_path: Path, no_opening: None) -> None:
    for path, reason in special_files(tmp_path).items():
        for mode in ("header", "full"):
            with pytest.raises(UserError, match=rf"{path.name}' .*{reason}"):
                check_images([path], mode, progress=False)
        with pytest.raises(UserError, match=rf"{path.name}' .*{reason}"):
            read_image(path)
        with pytest.raises(UserError, match=rf"{path.name}' .*{reason}"):
            read_views((str(path),), ("T",))
        with pytest.raises(UserError):
            check_samples([(str(path),)], ("T",), progress=False)
        if path.name != "folder.jpg":
            assert list_images(path) == [str(path)]  # for its reader to say so
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("pipe.txt", "gone.jpg"):
        with pytest.raises(UserError, match=f"{name}' (is a FIFO|does not exist)"):
            list_images(tmp_path / name)


@pytest.mark.parametrize("kind", ["pipe.jpg", "dangling.jpg"])
def test_special_files_in_a_data_set_are_said(tmp_path: Path, kind: str, no_opening: None) -> None:
    """They are neither read nor passed over."""
    special_files(tmp_path)
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        save(tmp_path / "set" / split / "0001_c1_0.png", np.full((8, 48, 3), len(split), np.uint8))
    os.rename(tmp_path / kind, tmp_path / "set/query/0001_c2_0.jpg")
    paths = [item[0] for item in read_market_folder(tmp_path / "set").query]
    with pytest.raises(UserError, match="0001_c2_0.jpg' is"):
        check_images(paths, progress=False)
    with pytest.raises(UserError, match="0001_c2_0.jpg' is"):
        read_strips(tmp_path / "set", RNT)


def test_special_files_as_tables(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match=r"pipe\.csv' is a FIFO"):
        read_table(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.csv").write_text("path,pid,split\npipe.jpg,1,train\n")
    with pytest.raises(UserError, match=r"line 2: image '.*pipe\.jpg' is a FIFO"):
        read_table(tmp_path / "a.csv")


ODD = {
    "page.jpg": b"<!DOCTYPE html><html><body>not found</body></html>",
    "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "random.jpg": np.random.default_rng(3).bytes(3000),
    "zeros.png": bytes(3000),
    "short.tif": b"II*\0",
    "short.png": b"\x89PNG\r\n\x1a\n",
}


def test_odd_files(tmp_path: Path) -> None:
    for name, data in ODD.items():
        (tmp_path / name).write_bytes(data)
        for act in (read_image, read_picture, lambda file: check_images([file], progress=False)):
            with pytest.raises(UserError, match=f"{name}' (is not an image|cannot be decoded)") as error:
                act(tmp_path / name)
            assert "\n" not in str(error.value)
    for deep in deep_files(tmp_path):
        data = deep.read_bytes()
        deep.write_bytes(data[: len(data) - 150])
        with pytest.raises(UserError, match=deep.name):
            read_image(deep, (-1e10, 1e10))
    bomb = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bomb + struct.pack(">I", zlib.crc32(b"IHDR" + bomb))
    (tmp_path / "bomb.png").write_bytes(head + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")))
    with pytest.raises(UserError, match=r"bomb\.png' cannot be decoded \(Image size \(3600000000 pixels\)"):
        check_images([tmp_path / "bomb.png"], progress=False)


@pytest.mark.parametrize("values", [DEEP, DEEP / 65535, PIXELS], ids=["16", "float", "8"])
def test_pages_that_lead_back_are_no_further_pictures(tmp_path: Path, values: np.ndarray) -> None:
    """A reader that follows them comes to no end."""
    tifffile.imwrite(tmp_path / "a.tif", values)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    first = int.from_bytes(data[4:8], "little")
    end = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    data[end : end + 4] = data[4:8]  # the next page is the first one
    (tmp_path / "a.tif").write_bytes(data)
    check_images([tmp_path / "a.tif"], "full", pixel_range=(0, 65535), progress=False)
    assert read_image(tmp_path / "a.tif", (0, 65535)).size == (8, 6)
    (tmp_path / "b.tif").write_bytes(b"II*\0" + struct.pack("<IHI", 8, 0, 8))
    with pytest.raises(UserError, match=r"b\.tif' is a TIFF file of a kind that is not read"):
        read_image(tmp_path / "b.tif")


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "a.png")
    check_images([tmp_path / "a.png"], "full", progress=False)
    assert read_image(tmp_path / "a.png").size == size


@pytest.mark.parametrize("name", ["0001_c1_line\nbreak.png", "0001_c1_é日本🙂.png", os.fsdecode(b"0001_c1_\xff\xfe.png")])
def test_odd_names(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, PIXELS)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name)), PIXELS)
    assert list_images(tmp_path) == [str(tmp_path / name)]
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value) and str(error.value).encode()  # can be printed and logged
    assert printable("plain é") == "plain é" and printable("a\nb") == r"a\nb"


# --- the same file under several names ----------------------------------------------------------------------------------


def test_odd_names_in_a_table() -> None:
    name = os.fsdecode(b"a\xff\n.png")
    ranked = SimpleNamespace(as_dicts=lambda: [[{"rank": 1, "score": 1.0, "pid": -1, "path": name}]])
    table = ranking_table([name], ranked)
    assert len(table.splitlines()) == 2 and table.encode() and table.count(r"a\udcff\n.png") == 2


def test_folder_links_are_followed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    for number in range(3):
        for folder in ("a", "z"):
            save(photos / folder / f"{number}.png", np.full((4, 4, 3), number, np.uint8))
    real = sorted(str(path) for path in photos.rglob("*.png"))
    (photos / "again").symlink_to(photos)
    (photos / "a" / "up").symlink_to(photos)
    (photos / "b").symlink_to(photos / "z")
    save(tmp_path / "outside" / "o.png", PIXELS)
    (photos / "more").symlink_to(tmp_path / "outside")
    found, notes = walk_files(photos, is_image_name)
    assert found == sorted([*real, str(photos / "more" / "o.png")])
    assert len(notes) == 1 and notes[0].startswith("3 folder links")
    assert list_images(photos) == found
    assert "note: 3 folder links" in capsys.readouterr().out


def test_the_same_real_file_is_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = save(tmp_path / "photos" / "b.png", PIXELS)
    (first.parent / "a.png").symlink_to(first)
    os.link(first, first.parent / "c.png")
    save(tmp_path / "photos" / "twin.png", PIXELS)  # the same pixels in another file are another image
    assert list_images([tmp_path / "photos", first]) == [str(first.parent / "a.png"), str(first.parent / "twin.png")]
    assert "2 of 4 files are further names" in capsys.readouterr().out


def test_one_per_file_keeps_what_is_another_mistake(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a.png", PIXELS), tmp_path / "b.png"
    second.symlink_to(first)
    items = [(str(first), 1), (str(second), 1), (str(second), 2), ("gone.png", 1), (str(first), 1)]
    kept, notes = one_per_file(items, lambda item: item[0], lambda item: item[1], "images")
    assert kept == [items[0], items[2], items[3]]
    assert len(notes) == 1 and notes[0].startswith("2 of 5 images") and f"'{second}' is the file '{first}'" in notes[0]
    assert one_per_file(items[:1], lambda item: item[0], lambda item: item[1], "images") == (items[:1], [])


def test_a_data_set_counts_a_real_file_once(tmp_path: Path) -> None:
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        save(tmp_path / split / "0001_c1_0.png", np.full((8, 48, 3), len(split), np.uint8))
        (tmp_path / split / "0001_c1_1.png").symlink_to(tmp_path / split / "0001_c1_0.png")
    splits = read_market_folder(tmp_path)
    assert [len(part) for part in (splits.train, splits.query, splits.gallery)] == [1, 1, 1]
    assert [note.split(" further")[0] for note in splits.notes] == [
        f"1 of 2 {split} images are" for split in ("train", "query", "gallery")
    ]
    strips = read_strips(tmp_path, RNT)
    assert [len(part) for part in (strips.train, strips.query, strips.gallery)] == [1, 1, 1] and len(strips.notes) == 3
    rows = [
        f"{split}/0001_c1_{n}.png,1,{name}"
        for split, name in zip(("bounding_box_train", "query", "bounding_box_test"), ("train", "query", "gallery"))
        for n in range(2)
    ]
    (tmp_path / "a.csv").write_text("\n".join(["path,pid,split", *rows]))
    table = read_table(tmp_path / "a.csv")
    assert len(table.train) == len(table.query) == len(table.gallery) == 1 and len(table.notes) == 4


# --- the host and the run -----------------------------------------------------------------------------------------------


def test_the_hosts_data_sets_read_by_the_range(tmp_path: Path) -> None:
    host.apply_patches()
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    save(tmp_path / "turned.png", STORED[6](PIXELS), 6)
    items = [(str(tmp_path / "deep.png"), 0, 0, 0), (str(tmp_path / "turned.png"), 0, 0, 0)]
    dataset = host.data.ImageDataset(items, items, items, mode="query", verbose=False, transform=np.asarray)
    with pytest.raises(UserError, match=r"data\.pixel_range"):
        dataset[0]
    dataset.pixel_range = (0, 65535)
    np.testing.assert_array_equal(dataset[0]["img"], scaled(DEEP, 0, 65535))
    np.testing.assert_array_equal(dataset[1]["img"], PIXELS)
    other = host.data.ImageDataset(items, items, items, mode="query", verbose=False, transform=np.asarray)
    with pytest.raises(UserError, match=r"data\.pixel_range"):  # each by its own
        other[0]
    tracklets = [((items[0][0], items[1][0]), 0, 0, 0)]
    video = host.data.VideoDataset(
        tracklets, tracklets, tracklets, seq_len=2, mode="query", verbose=False, transform=lambda i: torch.zeros(1)
    )
    with pytest.raises(UserError, match=r"data\.pixel_range"):
        video[0]
    video.pixel_range = (0, 65535)
    assert video[0]["img"].shape == (2, 1)


@pytest.fixture(scope="module")
def extractors(tiny_run: Path):
    """The tiny run without a range, and with one of [0, 25500]."""
    from relreid_plugin.search import FeatureExtractor

    return FeatureExtractor(tiny_run), FeatureExtractor(tiny_run, ["data.pixel_range", "[0, 25500]"])


def test_descriptions_hold_the_range(extractors) -> None:
    """Banks and stores of another range are not taken for the same; those without one keep their keys."""
    plain, deep = extractors
    assert plain.fingerprint != deep.fingerprint and deep.pixel_range == (0.0, 25500.0) and plain.pixel_range is None
    described = [extractor.run.network.describe_input(extractor.run) for extractor in extractors]
    assert "range" not in described[0] and "25500" in described[1]


def test_pictures_of_ranked_lists(extractors, tmp_path: Path) -> None:
    """Drawings read as the model does."""
    turned, deep = save(tmp_path / "turned.png", STORED[6](PIXELS), 6), tmp_path / "deep.png"
    Image.fromarray(DEEP % 25500).save(deep)
    plain, ranged = (extractor.run for extractor in extractors)
    np.testing.assert_array_equal(np.asarray(plain.read_picture(str(turned))), PIXELS)
    np.testing.assert_array_equal(np.asarray(ranged.read_picture(str(deep))), scaled(DEEP % 25500, 0, 25500))
    with pytest.raises(UserError, match=r"deep\.png.*'data\.pixel_range'"):
        plain.read_picture(str(deep))
    cfg = get_default_config()
    cfg.multimodal.modalities, cfg.multimodal.pixel_range = ["T", "R"], [[0, 25500], []]
    source = Files((str(turned), str(deep)), ("R", "T"))
    drawn = GraFTNetwork(cfg).read_picture(None, source)
    np.testing.assert_array_equal(np.asarray(drawn), scaled(DEEP % 25500, 0, 25500))


def test_features_of_deep_and_turned_pictures(extractors, tiny_root: Path, tmp_path: Path) -> None:
    plain, ranged = extractors
    source = next((tiny_root / "embedded_persons_tiny").rglob("query/*.jpg"))
    pixels = np.asarray(Image.open(source).convert("RGB"))
    for orientation in STORED:
        save(tmp_path / "turned" / f"{orientation}.png", STORED[orientation](pixels), orientation)
    grey = np.asarray(Image.open(source).convert("L")).astype(np.uint16)
    for name, values in (("a", 100 * grey), ("b", 100 * grey[::-1])):
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "deep" / f"{name}.png")
    features = plain.features(tmp_path / "turned")
    assert (features == features[:1]).all()
    with pytest.raises(UserError, match=r"a\.png' has 16 bits.*'data\.pixel_range'"):
        plain.features(tmp_path / "deep")
    os.mkfifo(tmp_path / "deep" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png' is a FIFO"):
        ranged.features(tmp_path / "deep")
    store = ranged.store(tmp_path / "store", list_images(tmp_path / "deep"), skip_broken=True, progress=False)
    assert len(store) == 2
    (tmp_path / "deep" / "pipe.png").unlink()
    deep = ranged.features(tmp_path / "deep")
    assert not (deep[0] == deep[1]).all()
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "grey.png")
    assert torch.allclose(deep[0], plain.features(tmp_path / "grey.png")[0], atol=1e-5)


def test_a_run_finds_deep_files_before_it_trains(tiny_config: Path, tiny_root: Path, tmp_path: Path, command) -> None:
    from conftest import copy_data

    place = copy_data(tiny_root, tmp_path / "own")
    file = next((place / "query").glob("*.jpg"))
    Image.fromarray(DEEP).save(file, "PNG")
    args = ["--config-file", tiny_config, "--root", tmp_path, "-s", "own", "-t", "own", "data.save_dir", tmp_path / "run"]
    code, _, err = command(*args)
    assert code == 2 and file.name in err and "'data.pixel_range'" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_unreadable_sentences() -> None:
    assert Unreadable("is odd").sentence("a.png", " (2 more)") == (
        "image 'a.png' is odd (2 more); replace the file or take it out of the data set."
    )
