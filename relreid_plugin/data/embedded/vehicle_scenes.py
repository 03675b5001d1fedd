"""The five-channel canvas of the vehicles, what their cameras look at, and what stands before a vehicle.

Every surface has one colour of five numbers: red, green, blue, near infrared, thermal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .scenes import smooth_noise
from .traits import Colour, generator

VIEW_HEIGHT, VIEW_WIDTH = 128, 256
"""Size of one stored view, pixels."""
SCALE = 2
"""Canvas pixels per stored pixel."""
CANVAS_HEIGHT, CANVAS_WIDTH = SCALE * VIEW_HEIGHT, SCALE * VIEW_WIDTH
SCENE_HEIGHT, SCENE_WIDTH = CANVAS_HEIGHT + 64, 3 * CANVAS_WIDTH
_EDGES = 2  # mask pixels per canvas pixel
_SCENE = 40


@dataclass(frozen=True)
class VehicleCamera:
    """One of the six cameras: what it looks at, from where, and how well."""

    scene: str  # street | highway | parking | underpass | depot | suburb
    yaws: tuple[float, ...]  # headings, degrees; 0: towards the camera, 90: to the picture's right
    pitch: float  # downward tilt, degrees
    gains: Colour  # colour cast
    gamma: float  # > 1: darker
    blur: float  # standard deviation of the lens blur, stored pixels
    noise: float  # standard deviation of sensor noise
    occlusion: float  # probability that something stands before a vehicle


VEHICLE_CAMERAS: tuple[VehicleCamera, ...] = (
    VehicleCamera("street", (90.0, 270.0, 50.0), 9.0, (1.04, 1.00, 0.93), 0.95, 0.35, 0.012, 0.25),
    VehicleCamera("highway", (40.0, 58.0, 320.0), 16.0, (0.97, 1.00, 1.05), 1.00, 0.55, 0.015, 0.12),
    VehicleCamera("parking", (90.0, 125.0, 235.0), 12.0, (1.00, 1.02, 0.98), 0.92, 0.40, 0.012, 0.30),
    VehicleCamera("underpass", (145.0, 215.0, 120.0), 14.0, (1.10, 1.00, 0.82), 1.25, 0.60, 0.024, 0.15),
    VehicleCamera("depot", (270.0, 308.0, 240.0), 10.0, (0.92, 1.00, 1.08), 1.10, 0.45, 0.018, 0.25),
    VehicleCamera("suburb", (60.0, 300.0, 100.0), 7.0, (1.02, 1.04, 0.94), 0.90, 0.50, 0.014, 0.30),
)

OCCLUDERS = ("pole", "bush", "sign", "person", "barrier")


def material(red: float, green: float, blue: float, near: float, thermal: float) -> np.ndarray:
    """Return a colour of five channels, ``(5, 1, 1)``."""
    return np.array([red, green, blue, near, thermal], dtype=np.float32)[:, None, None]


class Canvas:
    """Five channels that polygons are laid on.

    Args:
        pixels: ``(5, H, W)`` float32, drawn on in place.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def mask(self, polygon: np.ndarray) -> tuple[slice, slice, np.ndarray] | None:
        """Return where a polygon ``(n, 2)`` lies and how much of each pixel it covers, or ``None`` outside the canvas."""
        height, width = self.pixels.shape[1:]
        low, high = np.floor(polygon.min(axis=0)).astype(int), np.ceil(polygon.max(axis=0)).astype(int) + 1
        left, top = max(0, int(low[0])), max(0, int(low[1]))
        right, bottom = min(width, int(high[0])), min(height, int(high[1]))
        if left >= right or top >= bottom:
            return None
        picture = Image.new("L", (_EDGES * (right - left), _EDGES * (bottom - top)))
        points = (polygon - (left, top)) * _EDGES - 0.5
        ImageDraw.Draw(picture).polygon([(float(x), float(y)) for x, y in points], fill=255)
        cover = np.asarray(picture.reduce(_EDGES), dtype=np.float32) / 255.0
        return slice(top, bottom), slice(left, right), cover

    def lay(self, polygon: np.ndarray, colour: np.ndarray, alpha: float | np.ndarray = 1.0) -> None:
        """Cover a polygon with one colour ``(5, 1, 1)``; ``alpha`` is a number or one per channel, ``(5, 1, 1)``."""
        found = self.mask(polygon)
        if found is not None:
            ys, xs, cover = found
            part = self.pixels[:, ys, xs]
            part += (cover * np.asarray(alpha, dtype=np.float32)) * (colour - part)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: np.ndarray, alpha: float | np.ndarray = 1.0) -> None:
        """Cover an upright rectangle."""
        self.lay(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), colour, alpha)

    def disc(self, x: float, y: float, radius: float, colour: np.ndarray, *, tall: float = 1.0) -> None:
        """Cover an ellipse, ``tall`` times as high as wide."""
        turn = np.linspace(0.0, 2.0 * np.pi, 20, endpoint=False)
        self.lay(np.stack([x + radius * np.cos(turn), y + tall * radius * np.sin(turn)], axis=1), colour)


# --- surroundings ----------------------------------------------------------------------------------------------------

_SHADE = material(0.0, 0.0, 0.0, 0.0, 0.30)
_ASPHALT = material(0.36, 0.36, 0.37, 0.33, 0.44)
_PAVEMENT = material(0.56, 0.54, 0.51, 0.48, 0.42)
_LINE = material(0.86, 0.86, 0.82, 0.78, 0.41)
_SKY = material(0.70, 0.80, 0.90, 0.30, 0.06)
_LEAVES = material(0.17, 0.33, 0.13, 0.72, 0.24)
_GRASS = material(0.32, 0.46, 0.20, 0.78, 0.27)
_TRUNK = material(0.28, 0.20, 0.14, 0.40, 0.26)
_CONCRETE = material(0.60, 0.59, 0.57, 0.52, 0.36)
_STEEL = material(0.55, 0.57, 0.60, 0.50, 0.20)
_PANE = material(0.26, 0.33, 0.40, 0.16, 0.20)


def _dyed(rng: np.random.Generator, low: float, high: float, near: float, thermal: float) -> np.ndarray:
    """Return a material of a random muted colour."""
    red, green, blue = rng.uniform(low, high) + rng.normal(0.0, 0.05, 3)
    return material(float(red) * 1.04, float(green), float(blue) * 0.95, near, thermal)


def _tree(canvas: Canvas, rng: np.random.Generator, x: float, foot: float, size: float) -> None:
    canvas.box(x - 0.06 * size, foot - 0.6 * size, x + 0.06 * size, foot, _TRUNK)
    for _ in range(34):
        at, up = rng.normal(0.0, 0.30) * size, rng.normal(0.95, 0.26) * size
        leaf = _LEAVES * np.float32(rng.uniform(0.7, 1.3)) + material(0, 0, 0, 0, 0.01)
        leaf[4] = _LEAVES[4] + rng.normal(0.0, 0.015)
        canvas.disc(x + at, foot - up, float(rng.uniform(0.10, 0.2)) * size, leaf)


def _building(canvas: Canvas, rng: np.random.Generator, x0: float, x1: float, top: float, foot: float) -> None:
    wall = _dyed(rng, 0.42, 0.74, float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.33, 0.43)))
    canvas.box(x0, top, x1, foot, wall)
    step = 44.0
    for wx in np.arange(x0 + 14, x1 - 26, step):
        for wy in np.arange(top + 12, foot - 34, 50.0):
            pane = _PANE * np.float32(rng.uniform(0.7, 1.4))
            pane[4] = rng.choice((0.20, 0.24, 0.50), p=(0.5, 0.35, 0.15))
            canvas.box(wx, wy, wx + 24, wy + 30, pane)
            canvas.box(wx - 2, wy + 30, wx + 26, wy + 33, wall * np.float32(1.12))


@lru_cache(maxsize=16)
def vehicle_scene(world: int, camera: int) -> np.ndarray:
    """Return what a camera looks at, ``(5, 320, 1536)`` float32: callers must not write to it."""
    rng = generator(world, _SCENE, camera)
    kind = VEHICLE_CAMERAS[camera].scene
    pixels = np.empty((5, SCENE_HEIGHT, SCENE_WIDTH), dtype=np.float32)
    canvas = Canvas(pixels)
    pixels[:] = _SKY
    horizon = {"street": 150, "highway": 96, "parking": 130, "underpass": 118, "depot": 146, "suburb": 158}[kind]
    if kind == "street":
        x = 0.0
        while x < SCENE_WIDTH:
            width = float(rng.uniform(150, 260))
            _building(canvas, rng, x, x + width, float(rng.uniform(-40, 10)), horizon)
            x += width
        canvas.box(0, horizon - 14, SCENE_WIDTH, horizon + 14, _PAVEMENT)
        for x in rng.uniform(0, SCENE_WIDTH, 5):
            _tree(canvas, rng, float(x), horizon + 4, 78)
    elif kind == "highway":
        for x in np.arange(-60.0, SCENE_WIDTH + 100, 90.0):
            canvas.disc(x, horizon + 20, float(rng.uniform(70, 130)), _LEAVES * np.float32(rng.uniform(0.8, 1.2)), tall=0.45)
        canvas.box(0, horizon - 12, SCENE_WIDTH, horizon + 26, _GRASS)
        for x in np.arange(8.0, SCENE_WIDTH, 64.0):
            canvas.box(x, horizon + 2, x + 6, horizon + 34, _STEEL * np.float32(0.8))
        canvas.box(0, horizon + 4, SCENE_WIDTH, horizon + 18, _STEEL)
    elif kind == "parking":
        canvas.box(0, horizon - 46, SCENE_WIDTH, horizon, _GRASS)
        for x in np.arange(0.0, SCENE_WIDTH + 60, 104.0):
            _tree(canvas, rng, float(x + rng.uniform(-26, 26)), horizon - 4, float(rng.uniform(82, 120)))
        canvas.box(0, horizon - 8, SCENE_WIDTH, horizon, _CONCRETE)
    elif kind == "underpass":
        canvas.box(0, 0, SCENE_WIDTH, horizon, _CONCRETE * np.float32(0.72))
        for x in np.arange(0.0, SCENE_WIDTH, 170.0):
            canvas.box(x, 0, x + 34, horizon, _CONCRETE * np.float32(0.95))
            canvas.box(x + 70, 30, x + 132, 36, material(0.98, 0.92, 0.72, 0.9, 0.62))
        canvas.box(0, horizon - 34, SCENE_WIDTH, horizon - 26, material(0.80, 0.66, 0.18, 0.66, 0.36))
    elif kind == "depot":
        for x in np.arange(0.0, SCENE_WIDTH, 256.0):
            canvas.box(x, 10, x + 256, horizon, _dyed(rng, 0.40, 0.62, 0.45, 0.33))
            for line in np.arange(x, x + 256, 16.0):
                canvas.box(line, 10, line + 3, horizon, _SHADE, np.array([0.15, 0.15, 0.15, 0.15, 0.0])[:, None, None])
            door = material(0.30, 0.34, 0.38, 0.30, float(rng.choice((0.26, 0.46))))
            canvas.box(x + 60, 52, x + 180, horizon, door)
            for line in np.arange(60.0, horizon, 12.0):
                canvas.box(x + 60, line, x + 180, line + 2, _SHADE, 0.25)
    else:
        for x in np.arange(-40.0, SCENE_WIDTH, 250.0):
            left, roof = x + float(rng.uniform(0, 60)), _dyed(rng, 0.30, 0.45, 0.35, 0.28)
            _building(canvas, rng, left, left + 170, 62, horizon)
            canvas.lay(np.array([(left - 14, 64), (left + 85, 4), (left + 184, 64)]), roof)
            _tree(canvas, rng, left + 215, horizon, float(rng.uniform(80, 110)))
        for x in np.arange(0.0, SCENE_WIDTH, 9.0):
            leaf = _LEAVES * np.float32(rng.uniform(0.75, 1.25))
            leaf[4] = _LEAVES[4]
            canvas.disc(x, horizon - float(rng.uniform(2, 16)), float(rng.uniform(9, 15)), leaf)
    far = Image.Resampling.BILINEAR
    for channel in range(5):  # the background is out of focus
        soft = Image.fromarray(pixels[channel]).resize((SCENE_WIDTH // 2, SCENE_HEIGHT // 2), Image.Resampling.BOX)
        pixels[channel] = np.asarray(soft.resize((SCENE_WIDTH, SCENE_HEIGHT), far))
    canvas.box(0, horizon, SCENE_WIDTH, SCENE_HEIGHT, _ASPHALT)
    canvas.box(0, horizon, SCENE_WIDTH, horizon + 5, _PAVEMENT)
    if kind == "parking":
        for x in np.arange(-SCENE_WIDTH / 2, 1.5 * SCENE_WIDTH, 210.0):
            x0, x1 = SCENE_WIDTH / 2 + (x - SCENE_WIDTH / 2) * 0.8, SCENE_WIDTH / 2 + (x - SCENE_WIDTH / 2) * 1.12
            canvas.lay(np.array([(x0, horizon + 12), (x0 + 5, horizon + 12), (x1 + 9, 290), (x1, 290)]), _LINE)
    else:
        for x in np.arange(0.0, SCENE_WIDTH, 150.0):
            canvas.lay(np.array([(x, 266), (x + 80, 266), (x + 84, 274), (x + 2, 274)]), _LINE)
        canvas.box(0, horizon + 26, SCENE_WIDTH, horizon + 29, _LINE, 0.8)
    grain = 0.05 * smooth_noise(rng, SCENE_HEIGHT, SCENE_WIDTH, 3) + 0.05 * smooth_noise(rng, SCENE_HEIGHT, SCENE_WIDTH, 24)
    pixels[:4] *= 1.0 + grain
    pixels[4] += 0.25 * 0.05 * smooth_noise(rng, SCENE_HEIGHT, SCENE_WIDTH, 24)
    np.clip(pixels, 0.0, 1.0, out=pixels)
    pixels.setflags(write=False)
    return pixels


def draw_occluder(canvas: Canvas, kind: str, at: float, key: tuple[int, ...]) -> None:
    """Draw what stands before a vehicle.

    Args:
        canvas: Drawn on in place.
        kind: One of :data:`OCCLUDERS`; ``none``: nothing.
        at: Where, fraction of the picture's width.
        key: Seeds what it looks like.
    """
    rng = generator(*key)
    x = at * CANVAS_WIDTH
    if kind == "pole":
        half = float(rng.uniform(7, 12))
        canvas.box(x - half, -4, x + half, CANVAS_HEIGHT + 4, _STEEL * np.float32(0.75))
        canvas.box(x - half, -4, x - 0.4 * half, CANVAS_HEIGHT + 4, _STEEL * np.float32(1.1))
    elif kind == "bush":
        for _ in range(70):
            leaf = _LEAVES * np.float32(rng.uniform(0.6, 1.5))
            leaf[4] = _LEAVES[4] + rng.normal(0.0, 0.02)
            canvas.disc(
                x + rng.normal(0.0, 44.0), CANVAS_HEIGHT - abs(rng.normal(0.0, 30.0)), float(rng.uniform(7, 16)), leaf
            )
    elif kind == "sign":
        y, half = float(rng.uniform(0.25, 0.5)) * CANVAS_HEIGHT, float(rng.uniform(24, 34))
        canvas.box(x - 4, y, x + 4, CANVAS_HEIGHT + 4, _STEEL * np.float32(0.7))
        canvas.disc(x, y, half, material(0.80, 0.10, 0.12, 0.60, 0.22))
        canvas.disc(x, y, 0.76 * half, material(0.90, 0.90, 0.88, 0.82, 0.22))
        canvas.box(x - 0.5 * half, y - 0.14 * half, x + 0.5 * half, y + 0.14 * half, material(0.12, 0.12, 0.14, 0.14, 0.23))
    elif kind == "person":
        size = float(rng.uniform(0.62, 0.74)) * CANVAS_HEIGHT
        foot = 0.98 * CANVAS_HEIGHT
        coat = _dyed(rng, 0.10, 0.60, float(rng.uniform(0.3, 0.7)), 0.60)
        trousers = _dyed(rng, 0.08, 0.35, float(rng.uniform(0.2, 0.6)), 0.56)
        for leg in (-0.055, 0.055):
            canvas.lay(
                np.array([(x - 0.045 * size, foot - 0.5 * size), (x + 0.045 * size, foot - 0.5 * size),
                          (x + (leg + 0.035) * size, foot), (x + (leg - 0.035) * size, foot)]), trousers,
            )  # fmt: skip
        canvas.lay(
            np.array([(x - 0.09 * size, foot - 0.82 * size), (x + 0.09 * size, foot - 0.82 * size),
                      (x + 0.10 * size, foot - 0.44 * size), (x - 0.10 * size, foot - 0.44 * size)]), coat,
        )  # fmt: skip
        canvas.disc(x, foot - 0.91 * size, 0.055 * size, material(0.74, 0.55, 0.43, 0.62, 0.86), tall=1.25)
    elif kind == "barrier":
        top = float(rng.uniform(0.80, 0.86)) * CANVAS_HEIGHT
        for step in range(7):
            colour = material(0.85, 0.30, 0.12, 0.72, 0.33) if step % 2 else material(0.90, 0.90, 0.88, 0.82, 0.33)
            canvas.box(x + (step - 3.5) * 26, top, x + (step - 2.5) * 26, top + 22, colour)
        for foot in (-80.0, 80.0):
            canvas.box(x + foot - 5, top + 22, x + foot + 5, CANVAS_HEIGHT + 4, _STEEL)
