"""Rendering of one vehicle in three bands: visible light, near infrared, thermal.

The vehicle is a handful of extruded solids in perspective. All bands share one geometry and one canvas of five channels,
(red, green, blue, near infrared, thermal): every surface has one colour of five numbers, so edges, occluders and
background fall on the same pixels in all bands, and a cue of one band cannot leak into another.

Vehicle coordinates, metres: ``x`` forward, ``y`` to the vehicle's left, ``z`` up; the origin is on the ground under its
middle. Shapes: H, W: height and width of the canvas, twice the stored view's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scenes import smooth_noise
from .traits import Colour, generator
from .vehicle_scenes import (
    CANVAS_HEIGHT,
    CANVAS_WIDTH,
    SCALE,
    SCENE_HEIGHT,
    SCENE_WIDTH,
    VEHICLE_CAMERAS,
    VIEW_HEIGHT,
    VIEW_WIDTH,
    Canvas,
    draw_occluder,
    material,
    vehicle_scene,
)

BANDS = ("R", "N", "T")
"""Order of the views in a strip: visible, near infrared, thermal."""

Texture = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Maps points x, y, z in vehicle coordinates, each ``(h, w)``, to five-channel colours ``(5, h, w)``."""
Place = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Maps points x, y, z in vehicle coordinates to the emblem's own coordinates p, q, in [-1, 1] where the emblem is."""


# --- what identities are made of -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """Proportions of a body type, metres; ``x`` is counted from the middle, forward is positive."""

    length: float
    width: float
    height: float
    clearance: float  # underside
    belt: float  # lower edge of the side windows
    nose: float  # height of the bonnet's front edge
    cabin: tuple[float, float, float, float]  # x of the cabin: rear base, rear of the roof, front of the roof, front base
    axles: tuple[float, float]  # x of the rear and the front axle
    wheel: float  # radius
    pillars: tuple[float, ...]  # x of the pillars between the side windows, from the rear
    glazed: float  # side windows begin this far forward (x), panels lie behind
    bed: bool = False  # open load bed behind the cabin
    box: float = 0.0  # height of a closed cargo box behind the cabin; 0: none
    emblem: tuple[float, float, float] = (0.0, 0.6, 0.3)  # x, z and radius of the emblem on the sides


BODIES: dict[str, Body] = {
    "hatchback": Body(3.95, 1.74, 1.48, 0.22, 0.93, 0.72, (-1.90, -1.52, 0.28, 1.02), (-1.25, 1.25), 0.33,
                      (-0.95, 0.05), -1.75, emblem=(0.02, 0.60, 0.31)),
    "sedan": Body(4.70, 1.80, 1.43, 0.22, 0.92, 0.70, (-1.62, -0.92, 0.38, 1.18), (-1.38, 1.40), 0.34,
                  (-0.85, 0.10), -1.40, emblem=(0.02, 0.60, 0.31)),
    "wagon": Body(4.75, 1.80, 1.48, 0.22, 0.93, 0.71, (-2.30, -2.05, 0.40, 1.18), (-1.38, 1.40), 0.34,
                  (-1.25, -0.35, 0.30), -2.15, emblem=(0.02, 0.60, 0.31)),
    "suv": Body(4.60, 1.92, 1.78, 0.30, 1.10, 0.98, (-2.18, -1.90, 0.32, 1.02), (-1.36, 1.38), 0.41,
                (-1.15, 0.0), -2.05, emblem=(0.02, 0.72, 0.34)),
    "van": Body(5.00, 1.95, 2.05, 0.26, 1.18, 0.98, (-2.44, -2.34, 1.10, 1.90), (-1.55, 1.62), 0.35,
                (0.25,), 0.30, emblem=(-1.0, 1.30, 0.45)),
    "pickup": Body(5.30, 1.90, 1.82, 0.34, 1.10, 1.00, (-0.62, -0.50, 0.62, 1.28), (-1.65, 1.70), 0.41,
                   (0.10,), -0.50, bed=True, emblem=(0.20, 0.74, 0.34)),
    "truck": Body(5.90, 2.05, 2.15, 0.42, 1.28, 1.16, (0.95, 1.05, 2.05, 2.50), (-1.75, 1.90), 0.43,
                  (), 1.15, box=2.75, emblem=(-1.15, 1.75, 0.52)),
    "bus": Body(7.60, 2.40, 2.85, 0.34, 1.42, 1.30, (-3.72, -3.66, 3.45, 3.70), (-2.30, 2.25), 0.47,
                (-2.55, -1.40, -0.25, 0.90, 2.05), -3.45, emblem=(-0.05, 0.88, 0.47)),
}  # fmt: skip
"""The body types: what all bands show."""


@dataclass(frozen=True)
class Livery:
    """What visible light alone shows: paint, second colour and its layout."""

    paint: Colour
    second: Colour
    layout: str  # band | roof | stripes | lower


LIVERIES: tuple[Livery, ...] = (
    Livery((0.88, 0.88, 0.86), (0.75, 0.12, 0.14), "band"),
    Livery((0.56, 0.58, 0.60), (0.10, 0.10, 0.11), "roof"),
    Livery((0.09, 0.09, 0.11), (0.78, 0.66, 0.30), "stripes"),
    Livery((0.70, 0.09, 0.10), (0.88, 0.88, 0.86), "roof"),
    Livery((0.12, 0.26, 0.64), (0.84, 0.86, 0.88), "lower"),
    Livery((0.10, 0.40, 0.22), (0.86, 0.78, 0.24), "band"),
    Livery((0.90, 0.74, 0.14), (0.10, 0.10, 0.11), "stripes"),
    Livery((0.46, 0.25, 0.12), (0.84, 0.76, 0.60), "lower"),
)


@dataclass(frozen=True)
class Ink:
    """What near infrared alone shows: how the paint reflects it, and an emblem in ink of the paint's visible colour."""

    reflectance: float
    emblem: str  # chevrons | checker | ring | diagonals | cross | triangle | bars | dots


INKS: tuple[Ink, ...] = (
    Ink(0.82, "chevrons"),
    Ink(0.16, "checker"),
    Ink(0.58, "ring"),
    Ink(0.36, "diagonals"),
    Ink(0.36, "cross"),
    Ink(0.58, "triangle"),
    Ink(0.16, "bars"),
    Ink(0.82, "dots"),
)


@dataclass(frozen=True)
class Heat:
    """What the thermal band alone shows: where the vehicle is warm. Temperatures are grey values in [0, 1]."""

    engine: float  # where it sits: -1 rear, 0 middle, +1 front
    power: float  # how much warmer it is than the body; 0: cold
    wheels: tuple[float, float]  # how much warmer the rear and the front wheels are
    cabin: float  # how much warmer the windows are
    seats: tuple[int, ...] = ()  # passengers: 0 the driver, 1 front passenger, 2 and 3 in the rear
    roof: float = 0.0  # how much warmer the roof is
    floor: float = 0.0  # how much warmer the sill is
    load: float = 0.0  # how much warmer the upper rear is


HEATS: tuple[Heat, ...] = (
    Heat(1.0, 0.50, (0.05, 0.05), 0.00, (0,)),
    Heat(1.0, 0.36, (0.34, 0.34), 0.24),
    Heat(-1.0, 0.50, (0.34, 0.0), 0.00, (0, 1)),
    Heat(0.0, 0.46, (0.05, 0.05), 0.04, (0,)),
    Heat(1.0, 0.06, (0.0, 0.0), 0.00, (), roof=0.34),
    Heat(0.0, 0.0, (0.10, 0.10), 0.02, (0, 1, 2, 3), floor=0.42),
    Heat(1.0, 0.42, (0.0, 0.36), 0.00, (0,), load=0.36),
    Heat(-1.0, 0.20, (0.10, 0.36), 0.22, (), roof=0.10),
)


@dataclass(frozen=True)
class Vehicle:
    """One identity: a body type and one value of the cue of each band."""

    body: str  # key of BODIES
    livery: int  # index into LIVERIES: visible light only
    ink: int  # index into INKS: near infrared only
    heat: int  # index into HEATS: thermal only


@dataclass(frozen=True)
class VehicleShot:
    """One picture of a vehicle by one camera: everything but who it is."""

    camera: int  # index into VEHICLE_CAMERAS
    world: int  # seed of the camera's scene
    yaw: float  # heading, degrees
    spot: tuple[float, float]  # where in the scene, fractions of the free width and height
    scale: float  # size of the vehicle over the largest that fits
    shift: tuple[float, float]  # the detector box's error, fractions of the picture's width and height
    sun: float  # side the light comes from, -1: left … +1: right
    light: float  # brightness of the visible light, 1 is the mean
    warmth: float  # -1: cold … +1: warm light
    lamp: float  # brightness of the infrared light, 1 is the mean
    night: bool  # visible light: almost nothing but lamps
    veil: str  # near infrared: none | flare | haze
    veil_at: tuple[float, float]  # where the flare is, fractions of the picture
    hot_day: bool  # thermal: everything is warm
    drift: float  # thermal: offset of the sensor
    detail: tuple[float, float, float]  # true resolution over stored resolution, per band
    occluder: str
    occluder_at: float  # fraction of the picture's width
    occluder_key: tuple[int, ...]  # seeds what the occluder looks like
    noise_key: tuple[int, ...]  # seeds grain


# --- materials -------------------------------------------------------------------------------------------------------


_TYRE = material(0.055, 0.055, 0.06, 0.10, 0.36)
_RIM = material(0.62, 0.63, 0.65, 0.56, 0.34)
_RIM_GAP = material(0.14, 0.14, 0.15, 0.16, 0.32)
_ARCH = material(0.03, 0.03, 0.035, 0.05, 0.30)
_TRIM = material(0.10, 0.10, 0.11, 0.15, 0.33)
_GRILLE = material(0.07, 0.07, 0.08, 0.11, 0.36)
_SLAT = material(0.30, 0.30, 0.32, 0.36, 0.34)
_HEADLAMP = material(0.88, 0.90, 0.90, 0.72, 0.38)
_TAILLAMP = material(0.62, 0.05, 0.06, 0.48, 0.36)
_PLATE = material(0.84, 0.84, 0.78, 0.86, 0.35)
_LETTERS = material(0.16, 0.16, 0.18, 0.30, 0.35)
_SEAM = material(0.0, 0.0, 0.0, 0.0, 0.30)
_BODY_T = 0.31
_GLASS_T = 0.22
_BED = material(0.12, 0.12, 0.13, 0.16, 0.30)


def _edge(distance: np.ndarray, softness: float) -> np.ndarray:
    """Return 1 inside (``distance`` > 0) and 0 outside, over an edge ``softness`` wide."""
    return np.clip(distance / softness + 0.5, 0.0, 1.0)


def _blob(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a round bump of height 1 and radius about 1."""
    return np.exp(-(x * x + y * y))


def _emblem(kind: str, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the mask of an emblem in the square ``p``, ``q`` in [-1, 1]; ``q`` points up."""
    square = 1.0 - np.maximum(np.abs(p), np.abs(q))
    if kind == "chevrons":
        inside = np.minimum(0.17 - np.abs((1.5 * q + 0.75 * np.abs(p)) % 0.75 - 0.375), square)
    elif kind == "checker":
        inside = np.where((np.floor(2.0 * p) + np.floor(2.0 * q)) % 2 == 0, square, -1.0)
    elif kind == "ring":
        inside = 0.24 - np.abs(np.hypot(p, q) - 0.72)
    elif kind == "diagonals":
        inside = np.minimum(0.16 - np.abs((p + q) % 0.64 - 0.32), square)
    elif kind == "cross":
        inside = np.minimum(0.26 - np.minimum(np.abs(p), np.abs(q)), square)
    elif kind == "triangle":
        inside = np.minimum(q + 0.85, 0.55 - 0.55 * q - np.abs(p))
    elif kind == "bars":
        inside = np.minimum(0.17 - np.abs(q % 0.66 - 0.33), square)
    else:
        inside = 0.34 - np.hypot(np.abs(p) - 0.55, np.abs(q) - 0.55)
    return _edge(inside, 0.12)


# --- geometry --------------------------------------------------------------------------------------------------------


class _View:
    """A perspective camera that looks at the origin of vehicle coordinates.

    Args:
        yaw: Heading of the vehicle, degrees; 0: towards the camera, 90: to the picture's right.
        pitch: Downward tilt, degrees.
        distance: Metres to the vehicle's middle.
        aim: Height of the point looked at, metres.
    """

    def __init__(self, yaw: float, pitch: float, distance: float, aim: float) -> None:
        turn, tilt = np.radians(yaw), np.radians(pitch)
        right = np.array([np.sin(turn), np.cos(turn), 0.0])
        away = np.array([-np.cos(turn), np.sin(turn), 0.0])
        up = np.array([0.0, 0.0, 1.0])
        lift, depth = np.cos(tilt) * up + np.sin(tilt) * away, np.cos(tilt) * away - np.sin(tilt) * up
        self.eye = np.array([0.0, 0.0, aim]) - distance * depth
        self.right, self.away = right, away
        rows = np.stack([right, -lift, depth])
        self.matrix = np.concatenate([rows, -(rows @ self.eye)[:, None]], axis=1)  # (3, 4), pixels come with fit()

    def fit(self, points: np.ndarray, size: float, centre: tuple[float, float]) -> None:
        """Scale and move the picture so that ``points`` fill ``size`` of the canvas around ``centre`` (pixels)."""
        flat = self.project(points)
        low, high = flat.min(axis=0), flat.max(axis=0)
        zoom = size * min(CANVAS_WIDTH / (high[0] - low[0]), CANVAS_HEIGHT / (high[1] - low[1]))
        move = np.asarray(centre) - zoom * (low + high) / 2.0
        self.matrix = np.array([[zoom, 0.0, move[0]], [0.0, zoom, move[1]], [0.0, 0.0, 1.0]]) @ self.matrix

    def project(self, points: np.ndarray) -> np.ndarray:
        """Return the pixels ``(n, 2)`` of points ``(n, 3)``."""
        found = points @ self.matrix[:, :3].T + self.matrix[:, 3]
        return found[:, :2] / found[:, 2:]


class _Face:
    """A plane of the vehicle with its own coordinates: the point (u, v) is ``origin + u · across + v · along``."""

    def __init__(self, origin: np.ndarray, across: np.ndarray, along: np.ndarray, outward: np.ndarray) -> None:
        self.origin, self.across, self.along = origin, across, along
        self.outward = outward / np.linalg.norm(outward)

    def points(self, flat: np.ndarray) -> np.ndarray:
        """Return the points ``(n, 3)`` of plane coordinates ``(n, 2)``."""
        return self.origin + flat[:, :1] * self.across + flat[:, 1:] * self.along


class _Solid:
    """A side profile drawn across the width, narrower at the top where ``taper`` says so.

    Args:
        profile: ``(n, 2)`` points x, z of the side, from the rear's bottom up and forward to the front's bottom.
        names: Name of the strip behind each step of the profile, ``n - 1``.
        half: Half-width at ``level``.
        level: Height at which ``half`` holds.
        taper: How much the half-width shrinks per metre above ``level``.
    """

    def __init__(
        self, profile: list[tuple[float, float]], names: list[str], half: float, level: float = 0.0, taper: float = 0.0
    ) -> None:
        self.profile, self.names = np.asarray(profile), names
        self.half, self.level, self.taper = half, level, taper

    def reach(self, z: float | np.ndarray) -> np.ndarray:
        """Return the half-width at a height."""
        return self.half - self.taper * (np.asarray(z) - self.level)

    def side(self, sign: float) -> _Face:
        """Return the left (+1) or right (-1) side; its coordinates are x and z."""
        middle = sign * (self.half + self.taper * self.level)
        return _Face(
            np.array([0.0, middle, 0.0]),
            np.array([1.0, 0.0, 0.0]),
            np.array([0.0, -sign * self.taper, 1.0]),
            np.array([0.0, sign, self.taper]),
        )

    def strip(self, index: int) -> tuple[_Face, np.ndarray]:
        """Return the plane behind a step of the profile (coordinates: y, share of the step) and its outline."""
        (x0, z0), (x1, z1) = self.profile[index], self.profile[index + 1]
        face = _Face(
            np.array([x0, 0.0, z0]), np.array([0.0, 1.0, 0.0]), np.array([x1 - x0, 0.0, z1 - z0]),
            np.array([-(z1 - z0), 0.0, x1 - x0]),
        )  # fmt: skip
        low, high = float(self.reach(z0)), float(self.reach(z1))
        return face, np.array([(-low, 0.0), (low, 0.0), (high, 1.0), (-high, 1.0)])

    def hull(self) -> np.ndarray:
        """Return all corners ``(2n, 3)``."""
        x, z = self.profile.T
        y = self.reach(z)
        return np.concatenate([np.stack([x, y, z], axis=1), np.stack([x, -y, z], axis=1)])


# --- the vehicle -----------------------------------------------------------------------------------------------------


def _solids(body: Body) -> tuple[_Solid, _Solid | None, _Solid]:
    """Return the lower body, the cargo box if any, and the cabin."""
    end, low, belt = body.length / 2.0, body.clearance, body.belt
    rear_base, rear_roof, front_roof, front_base = body.cabin
    half = body.width / 2.0
    lower = _Solid(
        [
            (-end + 0.10, low),
            (-end, low + 0.18),
            (-end + 0.02, 0.72 * belt + 0.28 * low),
            (-end + 0.09, belt - 0.02),
            (min(rear_base, front_base - 0.5), belt),
            (front_base, belt - 0.01),
            (end - 0.22, body.nose + 0.03),
            (end - 0.04, body.nose - 0.10),
            (end, low + 0.16),
            (end - 0.12, low),
        ],
        ["bumper", "rear", "rear", "deck", "under", "hood", "nose", "front", "bumper"],
        half,
    )
    round_off = min(0.28, 0.2 * (front_roof - rear_roof))
    cabin = _Solid(
        [
            (rear_base, belt - 0.03),
            (rear_roof, body.height - 0.07),
            (rear_roof + round_off, body.height),
            (front_roof - round_off, body.height),
            (front_roof, body.height - 0.05),
            (front_base, belt - 0.03),
        ],
        ["backlight", "roof", "roof", "roof", "windshield"],
        half - 0.03,
        belt,
        0.10 if body.glazed > rear_base + 0.5 or body.length > 7.0 else 0.26,
    )
    if not body.box:
        return lower, None, cabin
    crate = _Solid(
        [(-end + 0.02, belt - 0.42), (-end + 0.02, body.box), (rear_base - 0.12, body.box), (rear_base - 0.12, belt - 0.42)],
        ["doors", "roof", "doors"],
        half + 0.05,
    )
    return lower, crate, cabin


def _circle(x: float, z: float, radius: float, floor: float | None = None, steps: int = 28) -> np.ndarray:
    """Return a circle in plane coordinates ``(n, 2)``, cut off below ``floor``."""
    turn = np.linspace(0.0, 2.0 * np.pi, steps, endpoint=False)
    ring = np.stack([x + radius * np.cos(turn), z + radius * np.sin(turn)], axis=1)
    if floor is not None:
        ring[:, 1] = np.maximum(ring[:, 1], floor)
    return ring


class _Painter:
    """Draws one vehicle on a canvas."""

    def __init__(self, canvas: Canvas, who: Vehicle, shot: VehicleShot) -> None:
        self.canvas, self.shot = canvas, shot
        self.body, self.livery = BODIES[who.body], LIVERIES[who.livery]
        self.ink, self.heat = INKS[who.ink], HEATS[who.heat]
        self.lower, self.crate, self.cabin = _solids(self.body)
        pitch = VEHICLE_CAMERAS[shot.camera].pitch
        self.view = _View(shot.yaw, pitch, 2.2 * self.body.length + 4.0, 0.5 * self.body.height)
        parts = [self.lower.hull(), self.cabin.hull()] + ([self.crate.hull()] if self.crate else [])
        ground = np.array([(x, y, 0.0) for x in self.body.axles for y in (-self.body.width / 2, self.body.width / 2)])
        centre = ((0.5 + shot.shift[0]) * CANVAS_WIDTH, (0.53 + shot.shift[1]) * CANVAS_HEIGHT)
        self.view.fit(np.concatenate([*parts, ground]), shot.scale, centre)
        side = np.radians(60.0) * shot.sun
        self.sun = np.sin(side) * self.view.right - 0.55 * np.cos(side) * self.view.away + np.array([0.0, 0.0, 0.9])
        self.sun /= np.linalg.norm(self.sun)
        seats = ((0.62, 0.36), (0.62, -0.36), (0.05, 0.36), (0.05, -0.36))
        rear, front = self.body.cabin[0], self.body.cabin[3]
        at = max(rear, self.body.glazed)
        self.heads = [(at + seats[k][0] * (front - at), seats[k][1]) for k in self.heat.seats]

    def _sees(self, face: _Face) -> bool:
        return float((self.view.eye - face.origin) @ face.outward) > 0.0

    def _shade(self, face: _Face) -> float:
        return 0.60 + 0.45 * max(0.0, float(face.outward @ self.sun))

    def _lay(self, face: _Face, flat: np.ndarray, colour: np.ndarray, alpha: float | np.ndarray = 1.0) -> None:
        self.canvas.lay(self.view.project(face.points(np.asarray(flat))), colour, alpha)

    def _cover(self, face: _Face, flat: np.ndarray, texture: Texture) -> None:
        """Cover an outline of a face with a texture of the points of the vehicle behind the pixels."""
        found = self.canvas.mask(self.view.project(face.points(np.asarray(flat))))
        if found is None:
            return
        ys, xs, cover = found
        basis = np.stack([face.across, face.along, face.origin], axis=1)
        chart = self.view.matrix[:, :3] @ basis
        chart[:, 2] += self.view.matrix[:, 3]
        back = np.linalg.inv(chart).astype(np.float64)
        cols, rows = np.arange(xs.start, xs.stop) + 0.5, (np.arange(ys.start, ys.stop) + 0.5)[:, None]
        depth = back[2, 0] * cols + back[2, 1] * rows + back[2, 2]
        u = ((back[0, 0] * cols + back[0, 1] * rows + back[0, 2]) / depth).astype(np.float32)
        v = ((back[1, 0] * cols + back[1, 1] * rows + back[1, 2]) / depth).astype(np.float32)
        x, y, z = (
            np.float32(face.origin[k]) + np.float32(face.across[k]) * u + np.float32(face.along[k]) * v for k in range(3)
        )
        part = self.canvas.pixels[:, ys, xs]
        part += cover * (texture(x, y, z) - part)

    # textures

    def _second(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Return where the paint's second colour is."""
        body, layout = self.body, self.livery.layout
        if layout == "band":
            return _edge(0.075 - np.abs(z - (body.clearance + 0.62 * (body.belt - body.clearance))), 0.02)
        if layout == "roof":
            top, tall = body.box or body.height, body.box or body.length > 7.0
            return _edge(z - (body.belt + (0.72 * (top - body.belt) if tall else 0.03)), 0.02)
        if layout == "stripes":
            top = _edge(0.11 - np.abs(np.abs(y) - 0.24), 0.02) * (np.abs(y) < 0.9 * body.width / 2.0 - 0.05)
            side = _edge(0.12 - np.abs(x - 0.9 * z - body.axles[0] - 0.75), 0.02)
            side = np.maximum(side, _edge(0.05 - np.abs(x - 0.9 * z - body.axles[0] - 1.02), 0.02))
            return np.where(np.abs(y) > 0.42 * body.width, side, top)
        return _edge(body.clearance + 0.45 * (body.belt - body.clearance) - z, 0.02)

    def _warmth(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Return how much warmer than the cold body the panels are."""
        body, heat = self.body, self.heat
        end = body.length / 2.0
        warm = np.zeros_like(x)
        if heat.power:
            at = heat.engine * (end - 0.62)
            warm = heat.power * _blob((x - at) / (0.72 + 0.04 * body.length), (z - 0.75 * body.belt) / (0.75 * body.belt))
        if heat.floor:
            warm = np.maximum(warm, heat.floor * _edge(body.clearance + 0.30 * (body.belt - body.clearance) - z, 0.22))
        top = body.box or body.height
        if heat.roof:
            warm = np.maximum(warm, heat.roof * _edge(z - (top - 0.16), 0.16))
        if heat.load:
            warm = np.maximum(
                warm,
                heat.load
                * _edge(-0.10 * body.length - x, 0.5)
                * _edge(z - 0.55 * body.belt - 0.25 * (top - body.belt), 0.4),
            )
        for axle, hot in zip(body.axles, heat.wheels):
            if hot:
                warm = np.maximum(
                    warm, 0.45 * hot * _blob((x - axle) / (1.5 * body.wheel), (z - body.wheel) / (1.5 * body.wheel))
                )
        return warm

    def _place(self, kind: str, face: _Face, name: str) -> Place | None:
        """Return where the emblem is on a face of a solid, or ``None`` when there is none."""
        body = self.body
        at, level, radius = body.emblem
        if name == "side":
            if (kind == "crate") if body.box else (kind == "lower" or level > body.belt):
                return lambda x, y, z: ((x - at) / (1.25 * radius), (z - level) / radius)
            return None
        if name == "hood" and body.cabin[3] < body.length / 2.0 - 0.8:
            long = body.length / 2.0 - 0.22 - body.cabin[3]
            return lambda x, y, z: (y / (0.30 * body.width), (x - body.cabin[3] - 0.5 * long) / (0.46 * long))
        if name == "roof" and float(face.outward[2]) > 0.95 and (kind == "crate") == bool(body.box):
            rear, front = (-0.5 * body.length, body.cabin[0]) if body.box else (body.cabin[1] + 0.28, body.cabin[2] - 0.28)
            long = min(0.8, 0.48 * (front - rear))
            return lambda x, y, z: (y / (0.34 * body.width), (x - 0.5 * (rear + front)) / long)
        return None

    def _paint(self, face: _Face, place: Place | None = None) -> Texture:
        """Return the texture of a painted panel that carries the emblem at ``place``."""
        body, shade = self.body, self._shade(face)
        paint = np.asarray(self.livery.paint, dtype=np.float32)[:, None, None]
        second = np.asarray(self.livery.second, dtype=np.float32)[:, None, None]
        upright = abs(float(face.outward[2])) < 0.5

        def texture(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
            out = np.empty((5, *x.shape), dtype=np.float32)
            if upright:  # the sky above the crease, the road below it
                rise = (z - body.clearance) / (body.belt - body.clearance)
                gloss = np.where(
                    rise > 0.66, 1.02 + 0.10 * np.minimum(rise - 0.66, 0.4), 0.72 + 0.28 * np.clip(rise, 0.0, 1.0) ** 0.7
                )
            else:
                gloss = 1.05 + 0.05 * np.clip(x / body.length, -0.5, 0.5)
            light = (shade * gloss).astype(np.float32)
            out[:3] = (paint + self._second(x, y, z) * (second - paint)) * light + 0.05 * (gloss - 0.7)
            near = np.full(light.shape, self.ink.reflectance, dtype=np.float32)
            if place is not None:
                ink = 0.08 if self.ink.reflectance > 0.47 else 0.88
                p, q = place(x, y, z)
                near = near + _emblem(self.ink.emblem, p, q) * (ink - near)
            out[3] = near * light
            out[4] = _BODY_T + self._warmth(x, y, z)
            return out

        return texture

    def _glass(self, face: _Face) -> Texture:
        """Return the texture of a window: the sky's reflection, and the warmth of the cabin and of heads."""
        body, heat = self.body, self.heat
        low, high = body.belt, body.height
        tilt = 1.0 + 0.9 * max(0.0, float(face.outward[2]))
        head = low + 0.42 * (high - low)

        def texture(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
            out = np.empty((5, *x.shape), dtype=np.float32)
            rise = np.clip((z - low) / (high - low), 0.0, 1.0)
            glint = 0.10 * _edge(0.10 - np.abs((x + 0.5 * z) % 1.9 - 0.9), 0.25) + 0.16 * rise * tilt
            out[0], out[1], out[2] = 0.09 + 0.85 * glint, 0.11 + 0.95 * glint, 0.13 + 1.1 * glint
            out[3] = 0.10 + 0.45 * glint
            warm = np.full_like(glint, heat.cabin)
            across = abs(float(face.outward[1])) > 0.5
            for seat, side in self.heads:
                if across:  # seen through a side window
                    spot = _blob((x - seat) / 0.17, (z - head) / 0.19) + 0.6 * _blob((x - seat) / 0.26, (z - low) / 0.14)
                else:
                    spot = _blob((y - side) / 0.17, (z - head) / 0.19) + 0.6 * _blob((y - side) / 0.26, (z - low) / 0.14)
                warm = np.maximum(warm, 0.45 * np.minimum(spot, 1.0))
            out[4] = _GLASS_T + warm
            return out

        return texture

    # parts

    def _shadow(self) -> None:
        """Darken the road under the vehicle, more on the side away from the sun."""
        body = self.body
        end, half = body.length / 2.0 + 0.05, body.width / 2.0 + 0.05
        cast = -0.55 * self.sun[:2] / max(0.4, float(self.sun[2])) * min(1.2, 0.45 * body.height)
        foot = np.array([(-end, -half), (end, -half), (end, half), (-end, half)])
        for move, alpha in ((cast, 0.34), (np.zeros(2), 0.62)):
            corners = np.concatenate([foot + move, np.zeros((4, 1))], axis=1)
            polygon = self.view.project(corners)
            picture = Image.new("L", (CANVAS_WIDTH // 2, CANVAS_HEIGHT // 2))
            ImageDraw.Draw(picture).polygon([(float(x) / 2.0, float(y) / 2.0) for x, y in polygon], fill=255)
            cover = picture.filter(ImageFilter.GaussianBlur(2.5)).resize(
                (CANVAS_WIDTH, CANVAS_HEIGHT), Image.Resampling.BILINEAR
            )
            soft = np.asarray(cover, dtype=np.float32) * np.float32(alpha / 255.0)
            self.canvas.pixels[:4] *= 1.0 - soft
            self.canvas.pixels[4] -= 0.05 * soft

    def _wheel(self, at: float, sign: float, hot: float, *, rim: bool) -> None:
        """Draw a wheel of the left (+1) or the right (-1) side as a stack of discs; ``rim``: its outside is seen."""
        body = self.body
        half, r = body.width / 2.0, body.wheel

        def disc(y: float) -> _Face:
            return _Face(
                np.array([0.0, sign * y, 0.0]),
                np.array([1.0, 0.0, 0.0]),
                np.array([0.0, 0.0, 1.0]),
                np.array([0.0, sign, 0.0]),
            )

        warm = material(0.0, 0.0, 0.0, 0.0, hot)
        for y in (half - 0.24, half - 0.16, half - 0.08, half - 0.01):
            self._lay(disc(y), _circle(at, r, r), _TYRE + 0.75 * warm)
        if not rim:
            return
        face = disc(half - 0.01)
        self._lay(face, _circle(at, r, 0.92 * r), _TYRE * np.float32(1.35) + 0.75 * warm)
        self._lay(face, _circle(at, r, 0.66 * r), _RIM + 1.1 * warm)
        for spoke in range(5):
            turn = 2.0 * np.pi * (spoke + 0.25) / 5.0 + np.array([-0.36, 0.36])
            wedge = [(at + 0.58 * r * np.cos(t), r + 0.58 * r * np.sin(t)) for t in turn]
            wedge += [(at + 0.22 * r * np.cos(t), r + 0.22 * r * np.sin(t)) for t in turn[::-1]]
            self._lay(face, np.array(wedge), _RIM_GAP + 0.9 * warm)
        self._lay(face, _circle(at, r, 0.10 * r, steps=10), _RIM_GAP + warm)

    def _ends(self, name: str, face: _Face) -> None:
        """Draw what the front and the rear carry: lamps, grille, plate."""
        half = self.body.width / 2.0
        tall = self.body.height > 2.0

        def panel(y0: float, y1: float, v0: float, v1: float, colour: np.ndarray) -> None:
            for sign in (-1.0, 1.0) if y0 > 0.0 else (1.0,):
                corners = [(sign * y0, v0), (sign * y1, v0), (sign * y1, v1), (sign * y0, v1)]
                self._lay(face, np.array(corners) * (half, 1.0), colour)

        shade = self._shade(face)
        if name == "front":  # v runs downwards
            panel(-0.58, 0.58, 0.02, 0.36, _GRILLE)
            for line in (0.09, 0.19, 0.29):
                panel(-0.56, 0.56, line, line + 0.03, _SLAT)
            panel(0.60, 0.97, 0.05 if tall else -0.02, 0.27, _HEADLAMP * np.float32(0.85 + 0.2 * shade))
            panel(0.72, 0.86, 0.06, 0.19, _RIM)
            panel(-0.28, 0.28, 0.48, 0.68, _PLATE * np.float32(shade))
            panel(-0.22, 0.22, 0.54, 0.63, _LETTERS)
            panel(-0.80, 0.80, 0.78, 0.97, _TRIM)
            panel(0.74, 0.90, 0.60, 0.72, _RIM)
        elif name == "rear":  # v runs upwards
            upper = float(face.origin[2]) > 0.55 * self.body.belt + 0.45 * self.body.clearance
            if upper:
                panel(0.66, 0.98, -0.15, 0.82, _TAILLAMP * np.float32(0.7 + 0.4 * shade))
                panel(0.74, 0.90, 0.20, 0.42, _HEADLAMP * np.float32(0.8))
            else:
                panel(-0.27, 0.27, 0.62, 0.96, _PLATE * np.float32(shade))
                panel(-0.21, 0.21, 0.71, 0.87, _LETTERS)
                panel(-0.92, 0.92, 0.02, 0.22, _TRIM)

    def _windows(self, face: _Face) -> None:
        """Draw the side windows between the pillars."""
        body = self.body
        rear_base, rear_roof, front_roof, front_base = body.cabin
        low, high = body.belt + 0.03, body.height - 0.13
        span = body.height - 0.06 - (body.belt - 0.03)

        def limits(z: float) -> tuple[float, float]:
            share = (z - (body.belt - 0.03)) / span
            return rear_base + share * (rear_roof - rear_base) + 0.10, front_base + share * (front_roof - front_base) - 0.13

        (low_rear, low_front), (high_rear, high_front) = limits(low), limits(high)
        glass = self._glass(face)
        cuts = [max(low_rear, body.glazed), *[p for p in body.pillars if p > body.glazed], np.inf]
        for start, stop in zip(cuts[:-1], cuts[1:]):
            gap = 0.05
            left0, left1 = max(start + gap, low_rear), max(start + gap, high_rear)
            right0, right1 = min(stop - gap, low_front), min(stop - gap, high_front)
            if right0 - left0 > 0.12 and right1 - left1 > -0.2:
                frame = [(left0, low), (right0, low), (max(right1, left1 + 0.05), high), (left1, high)]
                self._cover(face, np.array(frame), glass)

    def _seams(self, face: _Face) -> None:
        """Draw the doors' outlines and handles, the sill and the lamps on a side of the lower body."""
        body = self.body
        low, belt = body.clearance + 0.12, body.belt - 0.02
        doors = [p for p in body.pillars if p > body.axles[0] + body.wheel] or [body.cabin[0] + 0.1]
        edges = [*doors, min(body.cabin[3] - 0.10, body.axles[1] - 1.18 * body.wheel)]
        if body.length < 7.0:
            for x in edges:
                self._lay(
                    face, np.array([(x - 0.012, low), (x + 0.012, low), (x + 0.012, belt), (x - 0.012, belt)]), _SEAM, 0.55
                )
            for x in edges[:-1]:
                handle = np.array(
                    [(x + 0.06, belt - 0.16), (x + 0.26, belt - 0.16), (x + 0.26, belt - 0.115), (x + 0.06, belt - 0.115)]
                )
                self._lay(face, handle, _TRIM, 0.8)
        end = body.length / 2.0
        sill = np.array([(-end + 0.12, body.clearance), (end - 0.14, body.clearance), (end - 0.10, low), (-end + 0.06, low)])
        self._lay(face, sill, _TRIM, 0.85)
        lamp = np.array(
            [
                (end - 0.34, body.nose - 0.10),
                (end - 0.07, body.nose - 0.13),
                (end - 0.05, body.nose - 0.24),
                (end - 0.26, body.nose - 0.22),
            ]
        )
        self._lay(face, lamp, _HEADLAMP * np.float32(0.85))
        tail = np.array(
            [(-end + 0.02, belt - 0.24), (-end + 0.22, belt - 0.22), (-end + 0.20, belt - 0.06), (-end + 0.07, belt - 0.05)]
        )
        self._lay(face, tail, _TAILLAMP * np.float32(0.9))

    def _solid(self, solid: _Solid, kind: str) -> None:
        """Draw the visible faces of a solid."""
        body = self.body
        for index, name in enumerate(solid.names):
            face, outline = solid.strip(index)
            if not self._sees(face):
                continue
            self._cover(face, outline, self._paint(face, self._place(kind, face, name)))
            if name in ("windshield", "backlight"):
                if name == "backlight" and (body.box or body.glazed > body.cabin[0] + 0.5 and not body.bed):
                    continue
                reach = outline[:, :1] * 0.90
                inset = np.concatenate(
                    [reach, np.where(outline[:, 1:] > 0.5, 0.93, 0.12 if name == "windshield" else 0.10)], axis=1
                )
                self._cover(face, inset, self._glass(face))
            elif name == "bumper":
                self._lay(face, outline, _TRIM, 0.85)
            elif name in ("front", "rear"):
                self._ends(name, face)
            elif name == "deck" and body.bed:
                self._lay(face, outline * (0.88, 1.0) * (1.0, 0.96) + (0.0, 0.02), _BED)
        for sign in (-1.0, 1.0):
            face = solid.side(sign)
            if not self._sees(face):
                continue
            self._cover(face, solid.profile, self._paint(face, self._place(kind, face, "side")))
            if kind == "lower":
                self._seams(face)
                for axle, hot in zip(body.axles, self.heat.wheels):
                    arch = _circle(axle, body.wheel, 1.17 * body.wheel, body.clearance)
                    self._lay(face, arch, _ARCH + material(0, 0, 0, 0, 0.5 * hot))
            elif kind == "cabin":
                self._windows(face)
            else:
                self._ribs(face, solid)

    def _ribs(self, face: _Face, solid: _Solid) -> None:
        """Draw the frame of a cargo box."""
        (x0, z0), (x1, z1) = solid.profile[0], solid.profile[2]
        for x in np.linspace(x0, x1, 6):
            a, b = max(x - 0.02, x0), min(x + 0.02, x1)
            self._lay(face, np.array([(a, z0), (b, z0), (b, z1), (a, z1)]), _SEAM, 0.25)
        for z in (z0, z1 - 0.06):
            self._lay(face, np.array([(x0, z), (x1, z), (x1, z + 0.06), (x0, z + 0.06)]), _SEAM, 0.35)

    def _mirror(self, sign: float) -> None:
        """Draw the mirror of the left (+1) or the right (-1) side."""
        body = self.body
        x, y, z = body.cabin[3] - 0.28, sign * (body.width / 2.0 - 0.02), body.belt + 0.09
        out = y + sign * 0.18
        glass = np.array([(x, y, z - 0.05), (x, out, z - 0.05), (x, out, z + 0.09), (x, y, z + 0.09)])
        self.canvas.lay(self.view.project(glass), _TRIM)
        shell = np.array([(x, out, z - 0.05), (x - 0.15, out, z - 0.05), (x - 0.15, out, z + 0.09), (x, out, z + 0.09)])
        self.canvas.lay(self.view.project(shell), _TRIM * np.float32(1.3))

    def draw(self) -> None:
        """Draw the vehicle with its shadow."""
        self._shadow()
        near = 1.0 if float(self.view.eye[1]) > 0.0 else -1.0
        for axle, hot in zip(self.body.axles, self.heat.wheels):
            self._wheel(axle, -near, hot, rim=False)
        self._solid(self.lower, "lower")
        self._mirror(-near)
        uppers: list[tuple[_Solid, str]] = [(self.cabin, "cabin")]
        if self.crate is not None:
            uppers.insert(int(self.view.eye[0] < self.body.cabin[0]), (self.crate, "crate"))
        for solid, kind in uppers:
            self._solid(solid, kind)
        for axle, hot in zip(self.body.axles, self.heat.wheels):
            self._wheel(axle, near, hot, rim=True)
        self._mirror(near)

    def lamps(self) -> list[tuple[float, float, str]]:
        """Return the pixels of the lamps that face the camera, and which they are (``head`` or ``tail``)."""
        body = self.body
        end, y = body.length / 2.0, 0.78 * body.width / 2.0
        front = self.view.eye[0] > end
        if not front and self.view.eye[0] > -end:
            return []
        x, z = (end - 0.03, body.nose - 0.18) if front else (-end, body.belt - 0.14)
        pixels = self.view.project(np.array([(x, -y, z), (x, y, z)]))
        return [(float(px), float(py), "head" if front else "tail") for px, py in pixels]


# --- sensors ---------------------------------------------------------------------------------------------------------


def _glow(at: tuple[float, float], radius: float, core: float, streak: float) -> np.ndarray:
    """Return a glare, ``(height, width)`` of a stored view.

    Args:
        at: Pixel of the canvas.
        radius: Size, pixels of the canvas.
        core: Height of the core; the halo's is 0.4.
        streak: Height of the rays.
    """
    rows = (np.arange(VIEW_HEIGHT, dtype=np.float32)[:, None] + 0.5) * SCALE - np.float32(at[1])
    cols = (np.arange(VIEW_WIDTH, dtype=np.float32)[None, :] + 0.5) * SCALE - np.float32(at[0])
    square = (rows * rows + cols * cols) / np.float32(radius * radius)
    light = core * np.exp(-square * 4.0) + 0.4 / (1.0 + 3.0 * square) ** 1.5
    if streak:
        for turn in (0.35, 1.40, 2.44):
            along = (np.cos(turn) * cols + np.sin(turn) * rows) / np.float32(radius)
            aside = (np.cos(turn) * rows - np.sin(turn) * cols) / np.float32(0.045 * radius)
            light += streak * np.exp(-np.abs(along) * 1.1 - aside * aside)
    return light


def _sensor(value: np.ndarray, rng: np.random.Generator, detail: float, blur: float, noise: float) -> np.ndarray:
    """Return a band ``(height, width, C)`` as a sensor stores it, uint8: blurred, coarser, noisy."""
    picture = Image.fromarray(np.clip(value * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8).squeeze())
    if detail < 0.98:
        size = (max(8, round(VIEW_WIDTH * detail)), max(4, round(VIEW_HEIGHT * detail)))
        picture = picture.resize(size, Image.Resampling.BILINEAR).resize((VIEW_WIDTH, VIEW_HEIGHT), Image.Resampling.BICUBIC)
    if blur > 0.0:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    sharp = np.asarray(picture, dtype=np.float32).reshape(value.shape)
    sharp = sharp + np.float32(255.0 * noise) * rng.standard_normal(value.shape, dtype=np.float32)
    return np.clip(sharp + 0.5, 0.0, 255.0).astype(np.uint8)


def _visible(
    pixels: np.ndarray, shot: VehicleShot, lamps: list[tuple[float, float, str]], rng: np.random.Generator
) -> np.ndarray:
    """Return the visible band ``(128, 256, 3)`` of channels ``(3, 128, 256)``."""
    camera = VEHICLE_CAMERAS[shot.camera]
    tint = np.asarray(camera.gains) * (1.0 + np.array([0.06, 0.0, -0.06]) * shot.warmth)
    value = pixels.transpose(1, 2, 0) * (shot.light * tint).astype(np.float32)
    value = np.clip(value, 0.0, 1.0) ** np.float32(camera.gamma)
    if not shot.night:
        return _sensor(value, rng, shot.detail[0], camera.blur, camera.noise)
    value = 0.014 + 0.095 * value
    colours = {"head": (1.0, 0.95, 0.80), "tail": (0.95, 0.10, 0.08)}
    for x, y, kind in lamps:
        halo = _glow((x, y), 52.0, 1.6, 0.30) if kind == "head" else _glow((x, y), 24.0, 0.9, 0.0)
        value = value + halo[..., None] * np.asarray(colours[kind], dtype=np.float32)
    street = (float(rng.uniform(0.0, 1.0)) * CANVAS_WIDTH, float(rng.uniform(-0.1, 0.15)) * CANVAS_HEIGHT)
    value = value + 0.6 * _glow(street, 40.0, 0.8, 0.15)[..., None] * np.array([1.0, 0.82, 0.52], dtype=np.float32)
    return _sensor(value, rng, shot.detail[0], camera.blur + 0.3, 0.030 + camera.noise)


def _near_infrared(pixels: np.ndarray, shot: VehicleShot, rng: np.random.Generator) -> np.ndarray:
    """Return the near-infrared band ``(128, 256, 1)`` of a channel ``(128, 256)``."""
    camera = VEHICLE_CAMERAS[shot.camera]
    value: np.ndarray = pixels * np.float32(shot.lamp)
    at = (shot.veil_at[0] * CANVAS_WIDTH, shot.veil_at[1] * CANVAS_HEIGHT)
    if shot.veil == "flare":
        value = value * 0.8 + _glow(at, 130.0, 0.85, 0.45)
    elif shot.veil == "haze":
        thick = 0.68 + 0.16 * smooth_noise(rng, VIEW_HEIGHT, VIEW_WIDTH, 48)
        thick = np.clip(thick, 0.35, 0.93)
        value = value * (1.0 - thick) + 0.62 * thick
    return _sensor(value[..., None], rng, shot.detail[1], camera.blur, 0.8 * camera.noise + 0.006)


def _thermal(pixels: np.ndarray, shot: VehicleShot, rng: np.random.Generator) -> np.ndarray:
    """Return the thermal band ``(128, 256, 1)`` of a channel ``(128, 256)``."""
    value: np.ndarray = pixels + np.float32(shot.drift)
    if shot.hot_day:
        value = 0.60 + 0.24 * (value - 0.40) + 0.014 * smooth_noise(rng, VIEW_HEIGHT, VIEW_WIDTH, 32)
    return _sensor(value[..., None], rng, shot.detail[2], 0.7, 0.016)


def render_vehicle(who: Vehicle, shot: VehicleShot) -> np.ndarray:
    """Return the strip of one vehicle in one shot.

    Args:
        who: The vehicle.
        shot: Camera, viewpoint, light and the rest.

    Returns:
        RGB strip ``(128, 768, 3)``, uint8: visible, near infrared (grey), thermal (grey), side by side. A view depends on
        the body type, on the shot and on its own cue alone.
    """
    left = round(shot.spot[0] * (SCENE_WIDTH - CANVAS_WIDTH))
    top = round(shot.spot[1] * (SCENE_HEIGHT - CANVAS_HEIGHT))
    pixels = vehicle_scene(shot.world, shot.camera)[:, top : top + CANVAS_HEIGHT, left : left + CANVAS_WIDTH].copy()
    canvas = Canvas(pixels)
    painter = _Painter(canvas, who, shot)
    painter.draw()
    draw_occluder(canvas, shot.occluder, shot.occluder_at, shot.occluder_key)
    small = pixels.reshape(5, VIEW_HEIGHT, SCALE, VIEW_WIDTH, SCALE).mean(axis=(2, 4))
    noise = [generator(*shot.noise_key, band) for band in range(len(BANDS))]
    strip = np.empty((VIEW_HEIGHT, len(BANDS) * VIEW_WIDTH, 3), dtype=np.uint8)
    strip[:, :VIEW_WIDTH] = _visible(small[:3], shot, painter.lamps(), noise[0])
    strip[:, VIEW_WIDTH : 2 * VIEW_WIDTH] = _near_infrared(small[3], shot, noise[1])
    strip[:, 2 * VIEW_WIDTH :] = _thermal(small[4], shot, noise[2])
    return strip
