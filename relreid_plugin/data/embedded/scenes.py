"""Backgrounds of the six cameras and the things that stand before a person."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .traits import CAMERAS, CLOTH, Colour, generator

SCENE_HEIGHT, SCENE_WIDTH = 320, 960
_SCENE = 10


def _rgb(colour: Colour, light: float = 1.0) -> tuple[int, int, int]:
    value = np.clip(np.asarray(colour) * light * 255.0, 0, 255).astype(int)
    return int(value[0]), int(value[1]), int(value[2])


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Return smooth noise in blobs of ``cell`` pixels: ``(height, width)`` float32, mean 0, deviation somewhat below 1."""
    grid = rng.standard_normal((height // cell + 2, width // cell + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _car(draw: ImageDraw.ImageDraw, x: float, y: float, length: float, colour: Colour) -> None:
    """Draw a car whose wheels stand at height ``y``."""
    h = length * 0.30
    draw.polygon(
        [
            (x + 0.16 * length, y - 0.95 * h),
            (x + 0.30 * length, y - 1.55 * h),
            (x + 0.68 * length, y - 1.55 * h),
            (x + 0.86 * length, y - 0.95 * h),
        ],
        fill=(46, 56, 66),
    )
    draw.rounded_rectangle((x, y - h, x + length, y - 0.18 * h), radius=h * 0.3, fill=_rgb(colour))
    draw.rectangle((x + 2, y - 0.55 * h, x + length - 2, y - 0.47 * h), fill=_rgb(colour, 0.7))
    for at in (0.22, 0.78):
        centre, r = x + at * length, 0.34 * h
        draw.ellipse((centre - r, y - 1.5 * r, centre + r, y + 0.5 * r), fill=(22, 22, 24))
        draw.ellipse((centre - 0.5 * r, y - r, centre + 0.5 * r, y), fill=(130, 130, 132))


def _floor_lines(draw: ImageDraw.ImageDraw, top: float, colour: tuple[int, int, int], step: int, vanish: float) -> None:
    """Draw a tiled floor from height ``top`` down, in perspective."""
    depth, y = 6.0, top
    while y < SCENE_HEIGHT:
        draw.line((0, y, SCENE_WIDTH, y), fill=colour)
        y += depth
        depth *= 1.35
    for x in range(-SCENE_WIDTH, 2 * SCENE_WIDTH, step):
        draw.line((SCENE_WIDTH / 2 + (x - SCENE_WIDTH / 2) * vanish, top, x, SCENE_HEIGHT), fill=colour)


def _street(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x = 0
    while x < SCENE_WIDTH:
        width = int(rng.integers(110, 220))
        wall = rng.uniform(0.45, 0.85, 3) * (1.0, 0.95, 0.88)
        draw.rectangle((x, 0, x + width, 150), fill=_rgb(tuple(wall)))
        for wx in range(x + 14, x + width - 30, 40):
            for wy in (10, 78):
                draw.rectangle((wx, wy, wx + 22, wy + 46), fill=_rgb((0.30, 0.36, 0.42), rng.uniform(0.6, 1.3)))
                draw.rectangle((wx - 2, wy + 46, wx + 24, wy + 50), fill=(210, 206, 196))
        x += width
    draw.rectangle((0, 150, SCENE_WIDTH, 178), fill=(108, 108, 110))
    for x in range(-30, SCENE_WIDTH, 190):
        colours = ("red", "grey", "white", "navy", "black", "sky", "green")
        _car(draw, x + rng.uniform(0, 50), 176, rng.uniform(100, 140), CLOTH[colours[int(rng.integers(len(colours)))]])
    draw.rectangle((0, 180, SCENE_WIDTH, 190), fill=(158, 154, 148))
    draw.rectangle((0, 188, SCENE_WIDTH, SCENE_HEIGHT), fill=(146, 141, 134))
    _floor_lines(draw, 190, (128, 124, 118), 60, 0.5)


def _park(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, SCENE_WIDTH, SCENE_HEIGHT), fill=(176, 200, 214))
    for _ in range(260):
        x, y, r = rng.uniform(0, SCENE_WIDTH), rng.uniform(0, 120), rng.uniform(14, 46)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_rgb((0.20, 0.36, 0.16), rng.uniform(0.6, 1.5)))
    for _ in range(13):
        x, w = rng.uniform(0, SCENE_WIDTH), rng.uniform(6, 15)
        draw.rectangle((x, 20, x + w, 170), fill=_rgb((0.30, 0.23, 0.17), rng.uniform(0.7, 1.2)))
    draw.rectangle((0, 140, SCENE_WIDTH, SCENE_HEIGHT), fill=(92, 126, 62))
    for _ in range(1500):
        x, y = rng.uniform(0, SCENE_WIDTH), rng.uniform(140, SCENE_HEIGHT)
        draw.line(
            (x, y, x + rng.uniform(-2, 2), y - rng.uniform(3, 8)), fill=_rgb((0.34, 0.50, 0.22), rng.uniform(0.7, 1.3))
        )
    draw.polygon([(0, 236), (SCENE_WIDTH, 208), (SCENE_WIDTH, 292), (0, SCENE_HEIGHT)], fill=(178, 162, 136))


def _mall(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, SCENE_WIDTH, SCENE_HEIGHT), fill=(222, 214, 200))
    x = 10
    while x < SCENE_WIDTH:
        width = int(rng.integers(90, 160))
        draw.rectangle((x, 0, x + width, 104), fill=(70, 62, 56))
        draw.rectangle((x + 4, 4, x + width - 4, 100), fill=_rgb((0.93, 0.88, 0.74), rng.uniform(0.75, 1.05)))
        for _ in range(9):
            ix, iy = x + rng.uniform(8, width - 26), rng.uniform(16, 84)
            draw.rectangle(
                (ix, iy, ix + rng.uniform(6, 18), iy + rng.uniform(8, 16)), fill=_rgb(tuple(rng.uniform(0.15, 0.95, 3)))
            )
        x += width + 22
    draw.rectangle((0, 104, SCENE_WIDTH, SCENE_HEIGHT), fill=(206, 196, 180))
    _floor_lines(draw, 104, (174, 164, 150), 52, 0.45)


def _wall(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, SCENE_WIDTH, SCENE_HEIGHT), fill=(158, 140, 130))
    for row, y in enumerate(range(0, 212, 13)):
        for x in range(-30 + 17 * (row % 2), SCENE_WIDTH, 34):
            draw.rectangle((x, y, x + 32, y + 11), fill=_rgb((0.55, 0.31, 0.24), rng.uniform(0.75, 1.2)))
    for _ in range(7):
        left, top = rng.uniform(0, SCENE_WIDTH), rng.uniform(20, 110)
        w, h = rng.uniform(30, 60), rng.uniform(40, 74)
        draw.rectangle((left, top, left + w, top + h), fill=_rgb(tuple(rng.uniform(0.2, 0.9, 3))))
        draw.rectangle((left + 6, top + 8, left + w - 6, top + 0.4 * h), fill=_rgb(tuple(rng.uniform(0.2, 0.9, 3))))
    draw.rectangle((0, 212, SCENE_WIDTH, 226), fill=(96, 96, 98))
    draw.rectangle((0, 226, SCENE_WIDTH, SCENE_HEIGHT), fill=(126, 126, 130))
    for x in range(0, SCENE_WIDTH, 74):
        draw.line((x, 226, x - 30, SCENE_HEIGHT), fill=(104, 104, 108), width=2)


def _plaza(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, SCENE_WIDTH, SCENE_HEIGHT), fill=(196, 194, 190))
    draw.rectangle((0, 0, SCENE_WIDTH, 60), fill=(168, 172, 176))
    _floor_lines(draw, 60, (172, 168, 164), 90, 0.6)
    for _ in range(90):
        x, y = rng.uniform(0, SCENE_WIDTH), rng.uniform(62, SCENE_HEIGHT)
        draw.rectangle(
            (x, y, x + rng.uniform(20, 60), y + rng.uniform(8, 24)), fill=_rgb((0.74, 0.72, 0.70), rng.uniform(0.84, 1.08))
        )
    for _ in range(8):
        x, y = rng.uniform(0, SCENE_WIDTH), rng.uniform(60, 150)
        draw.rectangle((x, y, x + 44, y + 26), fill=(132, 120, 108))
        draw.ellipse((x + 2, y - 26, x + 42, y + 10), fill=_rgb((0.30, 0.44, 0.26), rng.uniform(0.7, 1.3)))


def _station(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, SCENE_WIDTH, SCENE_HEIGHT), fill=(78, 88, 92))
    for x in range(0, SCENE_WIDTH, 24):
        draw.line((x, 0, x, 120), fill=(92, 104, 108))
    for y in range(0, 120, 16):
        draw.line((0, y, SCENE_WIDTH, y), fill=(92, 104, 108))
    for _ in range(9):
        left = rng.uniform(0, SCENE_WIDTH)
        draw.rectangle((left, 18, left + 62, 84), fill=_rgb(tuple(rng.uniform(0.3, 1.0, 3))))
        draw.rectangle((left + 6, 26, left + 40, 40), fill=(236, 236, 232))
    draw.rectangle((0, 120, SCENE_WIDTH, 150), fill=(34, 36, 40))
    draw.rectangle((0, 150, SCENE_WIDTH, SCENE_HEIGHT), fill=(112, 116, 116))
    draw.rectangle((0, 158, SCENE_WIDTH, 170), fill=(206, 172, 60))
    _floor_lines(draw, 172, (98, 102, 102), 64, 0.7)
    for x in range(60, SCENE_WIDTH, 240):
        draw.rectangle((x, 0, x + 30, 200), fill=(136, 146, 146))
        draw.rectangle((x, 0, x + 8, 200), fill=(160, 170, 170))


_SCENES: dict[str, Callable[[ImageDraw.ImageDraw, np.random.Generator], None]] = {
    "street": _street,
    "park": _park,
    "mall": _mall,
    "wall": _wall,
    "plaza": _plaza,
    "station": _station,
}


@lru_cache(maxsize=12)
def scene(world: int, camera: int) -> Image.Image:
    """Return the panorama that camera ``camera`` of the world ``world`` looks at, RGB, 320 x 960 pixels."""
    rng = generator(world, _SCENE, camera)
    picture = Image.new("RGB", (SCENE_WIDTH, SCENE_HEIGHT), (140, 140, 140))
    _SCENES[CAMERAS[camera].scene](ImageDraw.Draw(picture), rng)
    grain = 5.0 * smooth_noise(rng, SCENE_HEIGHT, SCENE_WIDTH, 3) + 9.0 * smooth_noise(rng, SCENE_HEIGHT, SCENE_WIDTH, 60)
    values = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32) + grain[:, :, None]
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def occluder_layer(kind: str, key: tuple[int, ...], at: float, height: int, width: int) -> Image.Image:
    """Return a transparent layer with something that stands before the person.

    Args:
        kind: ``bench``, ``bush``, ``pole``, ``bicycle``, ``car`` or ``sign``.
        key: Seed of what it looks like.
        at: Where it stands, -1: left edge, +1: right edge.
        height: Height of the layer, pixels.
        width: Width of the layer, pixels.

    Returns:
        RGBA image ``height`` x ``width``.
    """
    rng = generator(*key)
    layer = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(layer)
    x = (0.5 + 0.5 * at) * width
    if kind == "pole":
        w = rng.uniform(0.09, 0.2) * width
        metal = rng.uniform(0.25, 0.6)
        draw.rectangle((x - w / 2, 0, x + w / 2, height), fill=_rgb((metal, metal, metal * 1.03)))
        draw.rectangle((x - w / 2, 0, x - w / 4, height), fill=_rgb((metal, metal, metal), 1.3))
    elif kind == "bench":
        wood = rng.uniform(0.7, 1.3)
        top = rng.uniform(0.62, 0.72) * height
        for step in range(4):
            y = top + step * 0.045 * height
            draw.rectangle((x - 0.75 * width, y, x + 0.75 * width, y + 0.03 * height), fill=_rgb((0.48, 0.33, 0.2), wood))
        for leg in (-0.6, 0.6):
            draw.rectangle((x + leg * width - 4, top, x + leg * width + 4, height), fill=(48, 48, 50))
    elif kind == "bush":
        for _ in range(70):
            bx, r = x + rng.normal(0, 0.3) * width, rng.uniform(6, 16)
            by = height * (1.0 - abs(rng.normal(0, 0.14)))
            draw.ellipse((bx - r, by - r, bx + r, by + r), fill=_rgb((0.20, 0.40, 0.17), rng.uniform(0.6, 1.5)))
    elif kind == "bicycle":
        y, r, frame = 0.88 * height, 0.11 * height, _rgb(tuple(rng.uniform(0.1, 0.9, 3)))
        left, right = x - 0.42 * width, x + 0.42 * width
        for wx in (left, right):
            draw.ellipse((wx - r, y - r, wx + r, y + r), outline=(26, 26, 28), width=4)
        seat, bar, crank = (x - 0.18 * width, y - 1.5 * r), (x + 0.28 * width, y - 1.5 * r), (x - 0.04 * width, y)
        for a, b in ((left, y), seat), (seat, bar), (bar, crank), (crank, seat), ((left, y), crank), (bar, (right, y)):
            draw.line((*a, *b), fill=frame, width=4)
        draw.line((seat[0], seat[1], seat[0] - 2, seat[1] - 10), fill=(30, 30, 30), width=4)
        draw.line((bar[0], bar[1], bar[0] - 8, bar[1] - 14), fill=(30, 30, 30), width=4)
    elif kind == "car":
        _car(draw, x - 0.9 * width, height * rng.uniform(0.97, 1.04), 1.8 * width, tuple(rng.uniform(0.1, 0.9, 3)))
    elif kind == "sign":
        y, w, h = rng.uniform(0.5, 0.68) * height, rng.uniform(0.3, 0.45) * width, 0.17 * height
        board = tuple(rng.uniform(0.2, 0.95, 3))
        draw.rectangle((x - 3, y, x + 3, height), fill=(70, 70, 74))
        draw.rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=_rgb(board))
        draw.rectangle((x - 0.35 * w, y - 0.2 * h, x + 0.35 * w, y), fill=(238, 238, 234))
    return layer
