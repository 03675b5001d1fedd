"""Any picture in: every kind of it gives the same row, and what is none gives one sentence."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision import transforms as T

from relreid_plugin.backbones.opened import Opened, Reading
from relreid_plugin.data.photos import is_photo
from relreid_plugin.errors import UserError
from relreid_plugin.features.extractor import Extractor

READING = Reading((16, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


class Grid(nn.Module):
    """Every channel's mean in four parts: a feature that tells orders of channels, of rows and of pictures apart."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, images):
        return self.pool(images).flatten(1)


@pytest.fixture(scope="module")
def extractor():
    return Extractor(Opened(Grid(), READING, "grid", identity="grid"), batch_size=4)


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    return [
        generator.integers(0, 256, (generator.integers(9, 40), generator.integers(9, 40), 3), np.uint8) for _ in range(11)
    ]


def expected(pictures):
    transform = T.Compose([T.Resize(READING.size), T.ToTensor(), T.Normalize(READING.mean, READING.std)])
    return Grid()(torch.stack([transform(Image.fromarray(each)) for each in pictures]))


def encoded(picture, form="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, form, **options)
    return stream.getvalue()


def test_rows_are_those_of_torchvisions_transform(extractor, pictures):
    assert torch.equal(extractor(pictures), expected(pictures))
    assert extractor.dim == 12 and extractor.size == (16, 8) and extractor.normalisation == (READING.mean, READING.std)


@pytest.mark.parametrize("lanes", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_rows_do_not_depend_on_batches_and_lanes(pictures, lanes, batch):
    own = Extractor(Opened(Grid(), READING, "grid", identity="grid"), workers=lanes)
    before = torch.get_num_threads()
    for images in (pictures, iter(pictures)):
        assert torch.allclose(own(images, batch_size=batch), expected(pictures), atol=1e-6)
    assert torch.get_num_threads() == before


def test_every_kind_of_picture_gives_the_same_row(extractor, pictures, tmp_path):
    picture = pictures[0]
    wanted = expected([picture])
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture))
    alpha = np.dstack([picture, np.full(picture.shape[:2], 7, np.uint8)])
    for kind in (
        str(path),
        path,
        path.read_bytes(),
        memoryview(path.read_bytes()),
        io.BytesIO(path.read_bytes()),
        encoded(picture, "TIFF"),
        Image.fromarray(picture),
        Image.fromarray(alpha, "RGBA"),
        picture,
        np.asfortranarray(picture),
        alpha,
        torch.from_numpy(picture).permute(2, 0, 1),
        torch.from_numpy(alpha).permute(2, 0, 1),
        picture[np.newaxis],
        torch.from_numpy(picture).permute(2, 0, 1)[None],
    ):
        assert torch.equal(extractor(kind), wanted)
    assert torch.equal(extractor(picture[..., ::-1], bgr=True), wanted)
    assert torch.equal(extractor(alpha[..., [2, 1, 0, 3]], bgr=True), wanted)
    assert torch.equal(extractor(str(path), bgr=True), wanted), "files know their colours"
    assert not torch.allclose(extractor(picture[..., ::-1]), wanted)


def test_grey_is_three_equal_channels(extractor, pictures):
    grey = pictures[0][..., 0]
    wanted = expected([np.dstack([grey] * 3)])
    for kind in (grey, grey[..., None], Image.fromarray(grey), torch.from_numpy(grey.copy()), encoded(grey)):
        assert torch.equal(extractor(kind), wanted)


def test_pictures_are_turned_upright(extractor, pictures, tmp_path):
    turned = Image.fromarray(pictures[0]).rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    for kind in (stream.getvalue(), tmp_path / "a.png", Image.open(io.BytesIO(stream.getvalue()))):
        assert torch.equal(extractor(kind), expected(pictures[:1]))


def test_deep_values_need_their_range(extractor, pictures):
    deep = pictures[0].astype(np.uint16) * 257
    own = Extractor(Opened(Grid(), READING, "grid", identity="grid"), pixel_range=(0, 65535))
    assert torch.equal(own(deep), expected(pictures[:1]))
    assert torch.equal(own(pictures[0]), expected(pictures[:1])), "a range leaves 8 bits alone"
    scaled = Extractor(Opened(Grid(), READING, "grid", identity="grid"), pixel_range=(0, 1))
    assert torch.equal(scaled(torch.from_numpy(pictures[0]).permute(2, 0, 1).float() / 255), expected(pictures[:1]))
    with pytest.raises(UserError, match=r"image 0 \(an array .* uint16\) has 16 bits per channel .*'pixel_range'"):
        extractor(deep)
    with pytest.raises(UserError, match="outside the range"):
        scaled(deep)


def test_none_gives_no_row(extractor):
    for none in ([], (), iter([]), np.zeros((0, 9, 9, 3), np.uint8), torch.zeros(0, 3, 9, 9, dtype=torch.uint8)):
        found = extractor(none)
        assert found.shape == (0, 12) and found.dtype == torch.float32
    assert extractor([], crops=[]).shape == (0, 12)
    assert extractor(np.zeros((9, 9, 3), np.uint8), crops=np.zeros((0, 4))).shape == (0, 12)


def test_crops_are_rows_of_their_own(extractor, pictures):
    frames = [pictures[0], pictures[1]]
    boxes = [[[1, 2, 6, 8], [-5, 3.4, 7.2, 900]], [[0, 0, 5, 5]]]
    height = frames[0].shape[0]
    wanted = expected([frames[0][2:8, 1:6], frames[0][3:height, 0:8], frames[1][0:5, 0:5]])
    assert torch.equal(extractor(frames, crops=boxes), wanted)
    assert torch.equal(extractor(frames[0], crops=np.array(boxes[0])), wanted[:2])
    assert torch.equal(extractor(frames[0], crops=torch.tensor(boxes[0])), wanted[:2])
    assert torch.equal(extractor(frames, crops=iter([[], boxes[1]])), wanted[2:])

    class Detections:
        xyxy = np.array(boxes[0], np.float32)

    assert torch.equal(extractor(frames[0], crops=Detections()), wanted[:2])
    many = np.tile([[1, 2, 6, 8]], (9, 1))  # more than a batch
    assert torch.allclose(extractor(frames[0], crops=many), wanted[:1].expand(9, -1))


@pytest.mark.parametrize(
    "boxes, sentence",
    [
        ([[4, 2, 4, 8]], r"box 0 of frame 0 is empty"),
        ([[1, 2, 6, 8], [6, 2, 1, 8]], r"box 1 of frame 0 is inverted"),
        ([[900, 2, 950, 8]], r"box 0 of frame 0 lies outside the frame"),
        ([[1, 2, float("nan"), 8]], r"box 0 of frame 0 holds NaN"),
        ([[1, 2, 6]], r"crops of frame 0 must be boxes"),
        ("boxes", r"crops of frame 0 must be boxes"),
        ([["a", 1, 2, 3]], r"crops of frame 0 must be boxes"),
    ],
)
def test_boxes_that_are_none_are_refused(extractor, pictures, boxes, sentence):
    with pytest.raises(UserError, match=sentence):
        extractor(pictures[0], crops=boxes)


def test_frames_and_crops_are_as_many(extractor, pictures):
    with pytest.raises(UserError, match="2 frames and crops for 1"):
        extractor(pictures[:2], crops=[[[0, 0, 5, 5]]])


@pytest.mark.parametrize(
    "image, sentence",
    [
        (None, "images are a NoneType"),
        ({"a": 1}, "images are a dict"),
        ([None], r"image 0 \(a NoneType\) is not a path"),
        ([[1]], r"image 0 \(a list\) is not a path"),
        ("missing.jpg", "image 'missing.jpg' does not exist"),
        (".", r"image '\.' is a folder"),
        (b"", "image 0 .* is empty"),
        (b"text", "image 0 .* is not an image"),
        (np.zeros((3, 9, 9), np.uint8), r"image 0 .* has its channels first"),
        (np.zeros((0, 9, 3), np.uint8), "image 0 .* has no pixels"),
        (np.zeros((9, 9, 2), np.uint8), "image 0 .* is no picture"),
        (np.zeros((9, 9, 3), bool), "image 0 .* holds no pixel values"),
        (np.zeros(9, np.uint8), "image 0 .* is no picture"),
        (np.zeros((1, 1, 1, 1, 1)), "images are an array of shape"),
        (torch.zeros(9, 9, 3), "image 0 .* has its channels not first"),
        (torch.zeros(3, 9, 9), "image 0 .* floating-point values"),
        (io.StringIO("text"), "image 0 .* is a file of text"),
    ],
)
def test_what_is_no_picture_is_refused(extractor, image, sentence):
    with pytest.raises(UserError, match=sentence):
        extractor(image)


def test_the_first_picture_that_is_none_is_named(pictures):
    own = Extractor(Opened(Grid(), READING, "grid", identity="grid"), batch_size=2, workers=3)
    with pytest.raises(UserError, match="image 3 "):
        own([*pictures[:3], b"", *pictures[:3], None])


def test_features_that_are_no_numbers_are_refused():
    class Broken(Grid):
        def forward(self, images):
            return super().forward(images) / 0

    with pytest.raises(UserError, match="1 of 1 features of 'broken' hold NaN or infinity"):
        Extractor(Opened(Broken(), READING, "broken", identity="x"))(np.zeros((9, 9, 3), np.uint8))


def test_lower_precision_is_near_and_said_so(pictures):
    layer = nn.Sequential(nn.Flatten(), nn.Linear(16 * 8 * 3, 5))
    torch.manual_seed(0)
    exact, low = (Extractor(Opened(layer, READING, "linear"), precision=each) for each in ("float32", "bfloat16"))
    found = low(pictures)
    assert found.dtype == torch.float32 and not torch.equal(found, exact(pictures))
    assert torch.allclose(found, exact(pictures), atol=0.1)
    with pytest.raises(UserError, match="precision is 'float8'"):
        Extractor(Opened(layer, READING, "linear"), precision="float8")
    with pytest.raises(UserError, match="device is 'tpu'"):
        Extractor(Opened(layer, READING, "linear"), device="tpu")


# --- odd inputs -------------------------------------------------------------------------------------------------------
SIDES = st.integers(0, 12)
DTYPES = st.sampled_from(["uint8", "uint16", "int8", "int64", "float16", "float32", "float64", "bool", "complex64"])
SHAPES = st.lists(SIDES, max_size=5).map(tuple) | st.tuples(SIDES, SIDES, st.sampled_from([1, 2, 3, 4]))
ARRAYS = st.builds(
    lambda shape, dtype, fill: np.full(shape, fill).astype(dtype), SHAPES, DTYPES, st.sampled_from([0, 1, 200, 1e9])
)


def _tensor(values):
    return torch.from_numpy(values)


@functools.cache
def _whole(kind):
    return encoded(np.full((9, 7, 3), 90, np.uint8), kind)


def _cut(data, kind, keep):
    whole = _whole(kind)
    return whole[: int(len(whole) * keep)] + data


ODD = st.one_of(
    ARRAYS,
    ARRAYS.map(_tensor),
    st.builds(_cut, st.binary(max_size=3), st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"]), st.floats(0, 1)),
    st.binary(max_size=40),
    st.text(max_size=12),
    st.sampled_from([None, 3, 2.5, object(), {"a": 1}, {1, 2}, io.StringIO("x"), io.BytesIO(b"x"), Path("nowhere.jpg"), ""]),
    st.builds(
        lambda mode: Image.new(mode, (5, 4)),
        st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "LAB"]),
    ),
)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    images=ODD | st.lists(ODD, max_size=3), crops=st.none() | st.lists(st.lists(st.floats(-9, 9), max_size=5), max_size=3)
)
def test_odd_inputs_give_a_row_each_or_one_sentence(extractor, images, crops):
    if crops is None:
        expected_rows = 1 if is_photo(images) else len(images) if hasattr(images, "__len__") else None
    else:
        expected_rows = len(crops) if is_photo(images) else None
    try:
        found = extractor(images, crops=crops)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert found.dtype == torch.float32 and found.shape[1] == 12 and bool(torch.isfinite(found).all())
    if expected_rows is not None and crops is None:
        assert len(found) == expected_rows
