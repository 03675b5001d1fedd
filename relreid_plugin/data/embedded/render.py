"""Rendering of one picture: a jointed, textured figure before a scene, seen through a camera.

The figure is a stack of swept shapes in an orthographic view. A surface point is addressed by the angle around the body
(0: front, 90: the person's left, ±180: back) and by the height over the ground, so a print on the chest, an open jacket
or the straps of a bag turn with the person and vanish behind it.

Shapes: H, W: height and width of the stored picture; the figure is drawn at twice that size.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from .scenes import SCENE_HEIGHT, SCENE_WIDTH, occluder_layer, scene, smooth_noise
from .traits import CAMERAS, Colour, Identity, Shot, generator, sample_identity

HEIGHT, WIDTH = 128, 64
"""Size of the stored picture, pixels."""
_BYSTANDERS = 100_000  # person numbers from here on only ever stand in the way

Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps angles (degrees) and heights (body heights) to colours, ``(h, w, 3)`` or, when they are all the same, ``(3,)``."""
Texture = Pattern | np.ndarray
"""A pattern, or one colour ``(3,)``."""


def _wrap(angle: np.ndarray) -> np.ndarray:
    """Return ``angle``, degrees in [-540, 540), in [-180, 180)."""
    return np.where(angle >= 180.0, angle - 360.0, np.where(angle < -180.0, angle + 360.0, angle))


def _plain(colour: Colour) -> np.ndarray:
    """Return the texture of a surface of one colour, ``(3,)``."""
    return np.asarray(colour, dtype=np.float32)


def _mix(low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return ``low`` where ``share`` is 0 and ``high`` where it is 1."""
    return low + np.clip(share, 0.0, 1.0)[..., None] * (high - low)


def _edge(distance: np.ndarray, softness: float) -> np.ndarray:
    """Return 1 inside (``distance`` > 0) and 0 outside, over an edge ``softness`` wide."""
    return np.clip(distance / softness + 0.5, 0.0, 1.0)


def _emblem(kind: int, phi: np.ndarray, h: np.ndarray, centre: float, scale: float) -> np.ndarray:
    """Return the mask of a print of ``kind`` 0 … 3 around ``phi`` = 0."""
    x, y = phi / (34.0 * scale), (h - centre) / (0.055 * scale)
    if kind == 0:
        inside = 1.0 - np.hypot(x, y)
    elif kind == 1:
        inside = 1.0 - np.maximum(np.abs(x), 1.6 * np.abs(y))
    elif kind == 2:
        inside = np.minimum(1.0 - np.hypot(x, y), np.hypot(x, y) - 0.55) * 2.0
    else:
        inside = np.minimum(y + 1.0, 1.0 - y - 1.8 * np.abs(x))
    return _edge(inside, 0.25)


def _patterned(colour: Colour, accent: Colour, pattern: str, scale: float) -> Pattern:
    """Return a repeating pattern; a pattern that does not repeat counts as plain."""
    low, high = np.asarray(colour, dtype=np.float32), np.asarray(accent, dtype=np.float32)
    band, turn = 0.052 * scale, 26.0 * scale

    def wave(value: np.ndarray, period: float, soft: float) -> np.ndarray:
        return _edge(np.abs((value / period) % 1.0 - 0.5) - 0.25, soft)

    def texture(phi: np.ndarray, h: np.ndarray) -> np.ndarray:
        if pattern == "hstripes":
            return _mix(low, high, wave(h, band, 0.15) + 0.0 * phi)
        if pattern == "vstripes":
            return _mix(low, high, wave(phi, turn, 0.15) + 0.0 * h)
        if pattern == "checks":
            return _mix(low, high, 0.5 * (wave(h, band * 1.3, 0.15) + wave(phi, turn * 1.4, 0.15)))
        if pattern == "dots":
            x, y = (phi / turn) % 1.0 - 0.5, (h / band) % 1.0 - 0.5
            return _mix(low, high, _edge(0.3 - np.hypot(x, y), 0.2))
        return low

    return texture


def _upper_texture(who: Identity) -> Pattern:
    """Return the texture of the upper garment with what is worn over it (straps)."""
    base = _patterned(who.upper_colour, who.upper_accent, who.upper_pattern, who.upper_scale)
    accent, inner = np.asarray(who.upper_accent, dtype=np.float32), np.asarray(who.inner_colour, dtype=np.float32)
    strap = np.asarray(who.bag_colour, dtype=np.float32)
    opens = who.upper in ("jacket", "coat", "hoodie")

    def texture(phi: np.ndarray, h: np.ndarray) -> np.ndarray:
        colour = np.broadcast_to(base(phi, h), np.broadcast_shapes(phi.shape, h.shape) + (3,))
        flat = 0.0 * phi
        if who.upper_pattern == "two_tone":
            colour = _mix(colour, accent, _edge(h + flat - 0.69, 0.006))
        elif who.upper_pattern == "band":
            colour = _mix(colour, accent, _edge(0.03 * who.upper_scale - np.abs(h - 0.67) + flat, 0.006))
        elif who.upper_pattern == "logo":
            colour = _mix(colour, accent, _emblem(who.logo, phi, h, 0.70, who.upper_scale))
            if who.back_print:
                colour = _mix(colour, accent, _emblem(who.logo, _wrap(phi + 180.0), h, 0.70, 1.2 * who.upper_scale))
        if opens and who.opening > 0.0:
            colour = _mix(colour, inner, _edge(who.opening - np.abs(phi) + 30.0 * (0.66 - h), 3.0) * (h > 0.44))
        elif opens:
            colour = _mix(colour, 0.55 * colour, 0.9 * _edge(2.5 - np.abs(phi) + 0.0 * h, 3.0))
        if who.upper == "shirt":
            colour = _mix(colour, 0.7 * colour, _edge(1.5 - np.abs(phi) + 0.0 * h, 3.0))
        if who.upper == "dress":
            colour = _mix(colour, 0.6 * accent, _edge(0.010 - np.abs(h - 0.60) + flat, 0.006))
        if who.bag == "backpack":
            near = _edge(8.0 - np.abs(np.abs(phi) - 36.0), 3.0) * (np.abs(phi) < 90.0)
            colour = _mix(colour, strap, near * _edge(h - 0.64, 0.01))
        elif who.bag == "shoulder":
            line = who.bag_side * ((0.80 - h) / 0.30 * 95.0 - 40.0)
            front = _edge(6.0 - np.abs(_wrap(phi - line)), 3.0) * (np.abs(phi) < 95.0)
            back = _edge(6.0 - np.abs(_wrap(phi - 180.0 + line)), 3.0) * (np.abs(phi) >= 95.0)
            colour = _mix(colour, strap, (front + back) * (h > 0.50))
        return colour

    return texture


def _lower_texture(who: Identity) -> Pattern:
    pattern = "checks" if who.lower_pattern == "checks" else "plain"
    base = _patterned(who.lower_colour, who.lower_accent, pattern, 0.8)
    accent = np.asarray(who.lower_accent, dtype=np.float32)
    pale = np.clip(np.asarray(who.lower_colour, dtype=np.float32) * 1.25 + 0.18, 0.0, 1.0)

    def texture(phi: np.ndarray, h: np.ndarray) -> np.ndarray:
        colour = np.broadcast_to(base(phi, h), np.broadcast_shapes(phi.shape, h.shape) + (3,))
        if who.lower_pattern == "side_stripe":
            colour = _mix(colour, accent, _edge(16.0 - np.abs(np.abs(phi) - 90.0) + 0.0 * h, 6.0))
        elif who.lower_pattern == "worn_knees":
            colour = _mix(colour, pale, _edge(0.05 - np.abs(h - 0.30), 0.04) * _edge(55.0 - np.abs(phi), 30.0))
        return colour

    return texture


class _Figure:
    """A person being drawn: joints in body coordinates, shapes on the canvas.

    Body coordinates: ``a`` to the person's left, ``b`` forward, ``h`` up, in units of the mean body height.

    Args:
        canvas: Float picture ``(height, width, 3)`` in [0, 1], drawn on in place.
        folds: Brightness of the cloth's folds, ``(height, width)``.
        feet: x and y of the ground under the person, pixels.
        size: Pixels per body height.
        yaw: Heading, degrees.
        pitch: Downward tilt of the camera, degrees.
        sun: Side the light comes from, -1 … +1.
    """

    def __init__(
        self,
        canvas: np.ndarray,
        folds: np.ndarray,
        feet: tuple[float, float],
        size: float,
        yaw: float,
        pitch: float,
        sun: float,
    ) -> None:
        self.canvas, self.folds, self.feet, self.size, self.sun, self.yaw = canvas, folds, feet, size, sun, yaw % 360.0
        self.cos, self.sin = float(np.cos(np.radians(yaw))), float(np.sin(np.radians(yaw)))
        self.drop, self.rise = float(np.sin(np.radians(pitch))), float(np.cos(np.radians(pitch)))
        self.parts: list[tuple[float, Callable[[], None]]] = []

    def depth(self, a: float, b: float) -> float:
        """Return how far a point lies towards the camera."""
        return b * self.cos - a * self.sin

    def at(self, a: float, b: float, h: float) -> tuple[float, float]:
        """Return the pixel of a point."""
        x = self.feet[0] + self.size * (a * self.cos + b * self.sin)
        y = self.feet[1] - self.size * (h * self.rise - self.depth(a, b) * self.drop)
        return float(x), float(y)

    def width(self, across: float | np.ndarray, along: float | np.ndarray) -> np.ndarray:
        """Return the half-width seen, pixels, of an elliptic section with these half-axes."""
        return self.size * np.sqrt((np.asarray(across) * self.cos) ** 2 + (np.asarray(along) * self.sin) ** 2)

    def _window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice, np.ndarray, np.ndarray] | None:
        height, width = self.canvas.shape[:2]
        left, right = max(0, int(x0) - 1), min(width, int(x1) + 3)
        top, bottom = max(0, int(y0) - 1), min(height, int(y1) + 3)
        if left >= right or top >= bottom:
            return None
        rows = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5
        cols = np.arange(left, right, dtype=np.float32)[None, :] + 0.5
        return slice(top, bottom), slice(left, right), rows, cols

    def _paint(
        self, ys: slice, xs: slice, mask: np.ndarray, across: np.ndarray, h: np.ndarray, texture: Texture, fold: float
    ) -> None:
        """Blend a shape in: ``across`` is -1 at its left edge and +1 at its right edge, ``h`` the height over the ground."""
        across = np.clip(across, -1.0, 1.0)
        if isinstance(texture, np.ndarray):
            colour = texture
        else:
            colour = texture(_wrap(np.degrees(np.arcsin(across)) - self.yaw), h)
        shade = 0.66 + 0.32 * np.sqrt(1.0 - across**2) + 0.17 * self.sun * across
        if fold:
            shade = shade * (1.0 + fold * (self.folds[ys, xs] - 1.0))
        region = self.canvas[ys, xs]
        region += mask[:, :, None] * (colour * shade[:, :, None] - region)

    def limb(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        r0: float,
        r1: float,
        h0: float,
        h1: float,
        texture: Texture,
        fold: float = 1.0,
    ) -> None:
        """Draw a tapered capsule between two pixels, radii in body heights."""
        r0, r1 = r0 * self.size, r1 * self.size
        big = max(r0, r1)
        window = self._window(
            min(start[0], end[0]) - big,
            min(start[1], end[1]) - big,
            max(start[0], end[0]) + big,
            max(start[1], end[1]) + big,
        )
        if window is None:
            return
        ys, xs, rows, cols = window
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = max(float(np.hypot(dx, dy)), 1e-3)
        px, py = cols - start[0], rows - start[1]
        t = np.clip((px * dx + py * dy) / length**2, 0.0, 1.0)
        radius = r0 + (r1 - r0) * t
        mask = np.clip(radius - np.hypot(px - t * dx, py - t * dy) + 0.5, 0.0, 1.0)
        across = (px * dy - py * dx) / (length * radius)
        self._paint(ys, xs, mask, across, h0 + (h1 - h0) * t, texture, fold)

    def stack(
        self,
        heights: np.ndarray,
        across: np.ndarray,
        along: np.ndarray,
        forward: np.ndarray,
        texture: Texture,
        fold: float = 1.0,
    ) -> None:
        """Draw an upright body of elliptic sections: half-axes and forward offset at rising ``heights``."""
        ys_at = self.feet[1] - self.size * (heights * self.rise - forward * self.cos * self.drop)
        half = self.width(across, along)
        centre = self.feet[0] + self.size * forward * self.sin
        window = self._window(
            float((centre - half).min()), float(ys_at.min()), float((centre + half).max()), float(ys_at.max())
        )
        if window is None:
            return
        ys, xs, rows, cols = window
        order = np.argsort(ys_at)
        y = rows[:, 0]
        w = np.interp(y, ys_at[order], half[order]).astype(np.float32)[:, None]
        c = np.interp(y, ys_at[order], centre[order]).astype(np.float32)[:, None]
        h = np.interp(y, ys_at[order], heights[order]).astype(np.float32)[:, None]
        ends = np.clip(np.minimum(rows - float(ys_at.min()), float(ys_at.max()) - rows) + 0.5, 0.0, 1.0)
        mask = np.clip(w - np.abs(cols - c) + 0.5, 0.0, 1.0) * ends
        self._paint(ys, xs, mask, (cols - c) / np.maximum(w, 0.5), h, texture, fold)

    def ball(self, centre: tuple[float, float], rx: float, ry: float, texture: Texture, power: float = 2.0) -> None:
        """Draw an ellipse (``power`` 2) or a rounded box (larger), half-axes in pixels; ``h`` runs from -1 (top) to 1."""
        window = self._window(centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry)
        if window is None:
            return
        ys, xs, rows, cols = window
        x, y = (cols - centre[0]) / rx, (rows - centre[1]) / ry
        q = (np.abs(x) ** power + np.abs(y) ** power) ** (1.0 / power)
        mask = np.clip((1.0 - q) * min(rx, ry) + 0.5, 0.0, 1.0)
        self._paint(ys, xs, mask, x, y, texture, 0.3)

    def add(self, depth: float, draw: Callable[[], None]) -> None:
        """Queue a part; parts nearer to the camera are drawn later."""
        self.parts.append((depth, draw))

    def draw(self) -> None:
        """Draw the queued parts."""
        for _, part in sorted(self.parts, key=lambda item: item[0]):
            part()


def _add_legs(figure: _Figure, who: Identity, phase: float, walking: float) -> None:
    build, lower = who.build, _lower_texture(who)
    bare = _plain((0.12, 0.11, 0.13)) if who.tights else _plain(who.skin)
    trousers = who.lower == "trousers" and who.upper != "dress"
    shorts = who.lower == "shorts" and who.upper != "dress"
    fit = who.lower_fit if trousers else 1.0
    ankles = []
    for side in (1.0, -1.0):
        swing = phase + (0.0 if side > 0 else np.pi)
        thigh = np.radians(23.0) * walking * np.sin(swing)
        knee = np.radians(42.0) * walking * max(0.0, np.sin(swing + 2.1)) + np.radians(4.0)
        a = 0.052 * side * (0.5 * build + 0.5) * who.hips
        hip = (a, 0.0, 0.50)
        mid = (a, 0.235 * np.sin(thigh), 0.50 - 0.235 * np.cos(thigh))
        low = (a * 0.9, mid[1] + 0.225 * np.sin(thigh - knee), mid[2] - 0.225 * np.cos(thigh - knee))
        ankles.append((hip, mid, low, thigh - knee))
    ground = min(low[2] for _, _, low, _ in ankles) - 0.035
    for hip, mid, low, tilt in ankles:
        top, knee_at, foot = ((a, b, h - ground) for a, b, h in (hip, mid, low))
        depth = figure.depth(*foot[:2]) - 10.0

        def leg(top=top, knee_at=knee_at, foot=foot, tilt=tilt) -> None:
            p0, p1, p2 = figure.at(*top), figure.at(*knee_at), figure.at(*foot)
            skin_or_cloth = lower if trousers else bare
            width = (0.75 + 0.25 * build) * (0.6 + 0.4 * fit)
            flex = 0.6 * min(0.0, tilt)
            toe = figure.at(foot[0], foot[1] + 0.085 * np.cos(0.6 * tilt), foot[2] - 0.028 + 0.085 * np.sin(flex))
            heel = figure.at(foot[0], foot[1] - 0.022, foot[2] - 0.018)
            sole0, sole1 = ((x, y + 0.010 * figure.size) for x, y in (heel, toe))
            figure.limb(sole0, sole1, 0.023, 0.017, 0.0, 0.0, _plain(who.sole_colour), 0.0)
            figure.limb(heel, toe, 0.026, 0.019, 0.0, 0.0, _plain(who.shoe_colour), 0.0)
            figure.limb(p0, p1, 0.062 * width, 0.045 * width, 0.5, 0.27, skin_or_cloth)
            hem = 0.036 * width * (fit if trousers else 0.85)
            figure.limb(p1, p2, 0.044 * width, hem, 0.27, 0.05, skin_or_cloth)
            if shorts:
                cut = (p0[0] + 0.86 * (p1[0] - p0[0]), p0[1] + 0.86 * (p1[1] - p0[1]))
                figure.limb(p0, cut, 0.068 * width, 0.060 * width, 0.5, 0.3, lower)
            if who.boots:
                shaft = (p2[0] + 0.42 * (p1[0] - p2[0]), p2[1] + 0.42 * (p1[1] - p2[1]))
                figure.limb(shaft, p2, 0.042 * width, 0.034 * width, 0.0, 0.0, _plain(who.shoe_colour), 0.2)

        figure.add(depth, leg)

    heights = np.array([0.44, 0.48, 0.52, 0.57])
    lateral = np.array([0.082, 0.100, 0.098, 0.088]) * build * who.hips
    if who.upper != "dress":
        if who.lower == "skirt":
            heights = np.array([0.30, 0.40, 0.50, 0.57])
            lateral = np.array([0.128, 0.120, 0.102, 0.086]) * build * who.hips
        figure.add(-5.0, lambda: figure.stack(heights, lateral, 0.78 * lateral, 0.0 * heights, lower))


def _add_torso(figure: _Figure, who: Identity) -> None:
    heights = np.array([0.50, 0.58, 0.70, 0.78, 0.805, 0.825, 0.845])
    lateral = np.array([0.098 * who.hips, 0.090, 0.108, 0.117, 0.108, 0.078, 0.040]) * who.build
    along = np.array([0.080 * who.hips, 0.074, 0.084, 0.070, 0.062, 0.052, 0.036]) * (0.4 + 0.6 * who.build)
    hems = {"tshirt": 0.47, "shirt": 0.46, "jacket": 0.45, "hoodie": 0.45, "coat": 0.31, "vest": 0.47, "dress": 0.27}
    flare = {"coat": 1.16, "dress": 1.38}.get(who.upper, 1.03)
    thick = {"jacket": 1.07, "coat": 1.08, "hoodie": 1.10, "vest": 1.02}.get(who.upper, 1.0)
    heights = np.concatenate([[hems[who.upper]], heights])
    lateral = np.concatenate([[lateral[0] * flare], lateral]) * thick
    along = np.concatenate([[along[0] * flare], along]) * thick
    forward = who.lean * (heights - 0.45) / 0.4
    texture = _upper_texture(who)
    figure.add(0.0, lambda: figure.stack(heights, lateral, along, forward, texture))
    if who.upper == "hoodie":
        hood = figure.at(0.0, who.lean - 0.055, 0.835)
        radius = float(figure.width(0.062, 0.035))
        over = 0.012 if figure.cos < 0 else -0.02
        figure.add(over, lambda: figure.ball(hood, radius, 0.038 * figure.size, _plain(_darker(who.upper_colour, 0.82))))


def _darker(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _add_arms(
    figure: _Figure, who: Identity, phase: float, walking: float, arms: str
) -> dict[float, tuple[float, float, float]]:
    """Add both arms and return where each hand is, by side, in body coordinates."""
    cloth: Texture = _patterned(who.upper_colour, who.upper_accent, who.upper_pattern, who.upper_scale)
    if who.upper_pattern == "raglan":
        cloth = _plain(who.upper_accent)
    elif who.upper_pattern == "two_tone":
        cloth = _plain(who.upper_accent if who.upper in ("tshirt", "dress") else who.upper_colour)
    skin = _plain(who.skin)
    bare_upper, short = who.upper == "vest", who.upper in ("tshirt", "dress")
    thick = {"jacket": 1.2, "coat": 1.22, "hoodie": 1.22, "shirt": 1.08}.get(who.upper, 0.95) * (0.55 + 0.45 * who.build)
    hands = {}
    for side in (1.0, -1.0):
        swing = np.radians(26.0) * walking * np.sin(phase + (np.pi if side > 0 else 0.0))
        bend = np.radians(12.0) + 0.5 * max(0.0, swing)
        out = 0.018 * side
        if who.bag in ("handbag", "tote") and side == who.bag_side:
            swing, bend = 0.25 * swing, np.radians(6.0)
        elif arms == "phone" and side == -who.bag_side:
            swing, bend, out = np.radians(18.0), np.radians(118.0), -0.02 * side
        elif arms == "pockets":
            swing, bend, out = np.radians(-14.0), np.radians(42.0), 0.02 * side
        a = 0.104 * side * who.build
        shoulder = (a, who.lean, 0.782)
        elbow = (a + out, who.lean + 0.165 * np.sin(swing), 0.782 - 0.165 * np.cos(swing))
        wrist = (a + 1.2 * out, elbow[1] + 0.15 * np.sin(swing + bend), elbow[2] - 0.15 * np.cos(swing + bend))
        hands[side] = wrist
        depth = figure.depth(wrist[0], 0.5 * (wrist[1] + elbow[1])) + 0.015

        def arm(shoulder=shoulder, elbow=elbow, wrist=wrist) -> None:
            p0, p1, p2 = figure.at(*shoulder), figure.at(*elbow), figure.at(*wrist)
            tip = (p2[0] + 0.12 * (p2[0] - p1[0]), p2[1] + 0.12 * (p2[1] - p1[1]))
            figure.limb(p2, tip, 0.020, 0.018, 0.0, 0.0, skin, 0.0)
            sleeve = skin if short or bare_upper else cloth
            figure.limb(p1, p2, 0.026 * thick, 0.021 * thick, 0.63, 0.48, sleeve)
            figure.limb(p0, p1, 0.031 * thick, 0.026 * thick, 0.79, 0.63, sleeve)
            if short:
                cut = (p0[0] + 0.62 * (p1[0] - p0[0]), p0[1] + 0.62 * (p1[1] - p0[1]))
                figure.limb(p0, cut, 0.034 * thick, 0.034 * thick, 0.79, 0.69, cloth)

        figure.add(depth, arm)
    return hands


def _add_head(figure: _Figure, who: Identity) -> None:
    b, h = 0.022 + 2.0 * who.lean, 0.925
    centre = figure.at(0.0, b, h)
    rx, ry = float(figure.width(0.052, 0.062)), 0.068 * figure.size
    skin, hair = np.asarray(who.skin, dtype=np.float32), np.asarray(who.hair, dtype=np.float32)
    hat = np.asarray(who.hat_colour, dtype=np.float32)
    soft = 1.5 / ry
    back = figure.cos < 0.15
    locks = _plain(who.hair)

    def face(phi: np.ndarray, v: np.ndarray) -> np.ndarray:
        colour = np.broadcast_to(skin, np.broadcast_shapes(phi.shape, v.shape) + (3,))
        around = np.abs(phi)
        eyes = _edge(9.0 - np.abs(around - 24.0), 6.0) * _edge(0.09 - np.abs(v + 0.02), soft)
        colour = _mix(colour, 0.25 * skin, eyes)
        colour = _mix(colour, skin * (0.78, 0.55, 0.55), _edge(14.0 - around, 6.0) * _edge(0.06 - np.abs(v - 0.55), soft))
        if who.beard:
            cheek = np.interp(around, (0.0, 18.0, 30.0, 90.0), (0.36, 0.40, 0.48, 0.30))
            colour = _mix(
                colour, 0.5 * hair + 0.5 * skin * (0.6, 0.55, 0.5), _edge(88.0 - around, 10.0) * _edge(v - cheek, soft)
            )
        if who.glasses:
            frame = _edge(17.0 - np.abs(around - 24.0), 5.0) * _edge(0.17 - np.abs(v), soft)
            colour = _mix(
                colour,
                np.asarray((0.08, 0.08, 0.09)),
                np.maximum(frame, _edge(95.0 - around, 8.0) * _edge(0.05 - np.abs(v + 0.05), soft)),
            )
        if who.hair_style != "bald":
            line = np.interp(around, (0.0, 50.0, 75.0, 105.0, 180.0), (-0.52, -0.42, 0.10, 0.42, 0.60))
            colour = _mix(colour, hair, _edge(line - v, soft))
        if who.hat in ("cap", "beanie", "sunhat"):
            colour = _mix(colour, hat, _edge((-0.34 if who.hat == "cap" else -0.24) - v + 0.0 * phi, soft))
        return colour

    neck0, neck1 = figure.at(0.0, 0.6 * b, 0.82), figure.at(0.0, 0.9 * b, 0.885)
    neck_skin = _plain(_darker(who.skin, 0.88))
    figure.add(0.011 if not back else 0.004, lambda: figure.limb(neck0, neck1, 0.034, 0.031, 0.0, 0.0, neck_skin, 0.0))
    if who.scarf:
        figure.add(
            0.03,
            lambda: figure.ball(
                figure.at(0.0, 0.7 * b, 0.845),
                float(figure.width(0.062, 0.062)),
                0.026 * figure.size,
                _plain(who.scarf_colour),
            ),
        )

    if who.hair_style in ("bob", "long"):
        low = 0.855 if who.hair_style == "bob" else 0.735
        heights = np.array([low, low + 0.03, 0.90, 0.95, 0.985])
        lateral = np.array([0.040, 0.064, 0.070, 0.064, 0.035])
        along = np.array([0.026, 0.040, 0.052, 0.058, 0.035])
        offset = np.array([-0.045, -0.042, -0.020, 0.0, 0.0]) + 2.0 * who.lean
        figure.add(0.2 if back else -0.03, lambda: figure.stack(heights, lateral, along, offset, locks))
    elif who.hair_style == "ponytail":
        start, end = figure.at(0.0, b - 0.066, 0.945), figure.at(0.0, b - 0.092, 0.80)
        figure.add(0.2 if back else -0.03, lambda: figure.limb(start, end, 0.021, 0.013, 0.0, 0.0, locks, 0.5))
    elif who.hair_style == "bun":
        knot = figure.at(0.0, b - 0.035, 1.0)
        figure.add(0.055 if back else 0.045, lambda: figure.ball(knot, 0.030 * figure.size, 0.028 * figure.size, locks))
    if who.hair_style == "afro":
        figure.add(
            0.045,
            lambda: figure.ball(
                (centre[0] - 0.008 * figure.size * figure.sin, centre[1] - 0.25 * ry), 1.5 * rx, 1.22 * ry, locks
            ),
        )
    elif who.hair_style != "bald":
        figure.add(
            0.045,
            lambda: figure.ball(
                (centre[0] - 0.006 * figure.size * figure.sin, centre[1] - 0.12 * ry), 1.07 * rx, 1.0 * ry, locks
            ),
        )
    nose = figure.at(0.0, b + 0.066, h - 0.008)
    if figure.cos > -0.3:
        figure.add(
            0.049 if figure.cos < 0.4 else 0.06,
            lambda: figure.ball(nose, 0.011 * figure.size, 0.014 * figure.size, _plain(_darker(who.skin, 0.97))),
        )
    figure.add(0.05, lambda: figure.ball(centre, rx, ry, face))
    if who.hat == "cap":
        brim0, brim1 = figure.at(0.0, b + 0.035, h + 0.024), figure.at(0.0, b + 0.095, h + 0.018)
        figure.add(
            0.07 if not back else 0.03,
            lambda: figure.limb(brim0, brim1, 0.020, 0.014, 0.0, 0.0, _plain(_darker(who.hat_colour, 0.8)), 0.0),
        )
    if who.hat in ("cap", "beanie"):
        top = (centre[0], centre[1] - 0.62 * ry)
        figure.add(
            0.06, lambda: figure.ball(top, 0.99 * rx, (0.42 if who.hat == "cap" else 0.52) * ry, _plain(who.hat_colour))
        )
    elif who.hat == "sunhat":
        figure.add(
            0.06,
            lambda: figure.ball(
                (centre[0], centre[1] - 0.30 * ry), 2.0 * rx, 0.24 * ry, _plain(_darker(who.hat_colour, 0.9))
            ),
        )
        figure.add(
            0.061, lambda: figure.ball((centre[0], centre[1] - 0.62 * ry), 1.05 * rx, 0.45 * ry, _plain(who.hat_colour))
        )


def _add_bag(figure: _Figure, who: Identity, hands: dict[float, tuple[float, float, float]], shift: float) -> None:
    size, side = figure.size, float(who.bag_side)
    body, pocket = _plain(who.bag_colour), _plain(who.bag_accent)
    if who.bag == "backpack":
        b = who.lean - 0.115
        centre = figure.at(0.0, b, 0.695 + 0.008 * shift)
        rx, ry = float(figure.width(0.088, 0.056)), 0.115 * size
        depth = figure.depth(0.0, b)

        def backpack() -> None:
            figure.ball(centre, rx, ry, body, 3.5)
            if depth > 0.02:
                figure.ball((centre[0], centre[1] + 0.40 * ry), 0.72 * rx, 0.42 * ry, pocket, 4.0)
                figure.ball(
                    (centre[0], centre[1] - 0.40 * ry), 0.55 * rx, 0.05 * ry, _plain(_darker(who.bag_colour, 0.5)), 4.0
                )

        figure.add(depth + (0.03 if depth > 0.0 else -0.02), backpack)
    elif who.bag == "shoulder":
        a, b = 0.125 * side * who.build, -0.015 + 0.015 * shift
        centre = figure.at(a, b, 0.485)
        rx, ry = float(figure.width(0.036, 0.078)), 0.056 * size
        depth = figure.depth(a, b)

        def shoulder_bag() -> None:
            figure.ball(centre, rx, ry, body, 4.0)
            figure.ball((centre[0], centre[1] - 0.45 * ry), 0.95 * rx, 0.40 * ry, pocket, 4.0)

        figure.add(depth + 0.05 * (1.0 if depth > 0 else -1.0), shoulder_bag)
    elif who.bag in ("handbag", "tote"):
        if who.bag == "handbag":
            a, b, h = hands[side][0] + 0.012 * side, hands[side][1], hands[side][2] - 0.125
            rx, ry = float(figure.width(0.034, 0.080)), 0.055 * size
            hold = (a, b, h + 0.115)
        else:
            a, b, h = 0.145 * side * who.build, -0.035, 0.585
            rx, ry = float(figure.width(0.042, 0.088)), 0.088 * size
            hold = (0.095 * side * who.build, 0.0, 0.80)
        centre, top = figure.at(a, b, h), figure.at(*hold)
        depth = figure.depth(a, b)

        def carried() -> None:
            for offset in (-0.5, 0.5):
                figure.limb(top, (centre[0] + offset * rx, centre[1] - 0.8 * ry), 0.007, 0.007, 0.0, 0.0, pocket, 0.0)
            figure.ball(centre, rx, ry, body, 4.5)
            figure.ball((centre[0], centre[1] - 0.1 * ry), 0.45 * rx, 0.28 * ry, pocket, 2.0)

        figure.add(depth + 0.03 * (1.0 if depth > 0 else -1.0), carried)


def _draw_figure(
    canvas: np.ndarray,
    folds: np.ndarray,
    who: Identity,
    *,
    feet: tuple[float, float],
    size: float,
    yaw: float,
    pitch: float,
    sun: float,
    phase: float,
    walking: float,
    arms: str,
    bag_shift: float,
) -> None:
    """Draw one person on ``canvas`` in place; ``size`` is the pixels per mean body height."""
    figure = _Figure(canvas, folds, feet, size, yaw, pitch, sun)
    walking *= who.stride
    _add_legs(figure, who, phase, walking)
    _add_torso(figure, who)
    hands = _add_arms(figure, who, phase, walking, arms)
    _add_head(figure, who)
    _add_bag(figure, who, hands, bag_shift)
    figure.draw()


def _ground_shadow(canvas: np.ndarray, feet: tuple[float, float], size: float, sun: float) -> None:
    top, bottom = int(max(0.0, feet[1] - 0.05 * size)), int(max(0.0, feet[1] + 0.05 * size))
    canvas = canvas[top:bottom]
    rows = np.arange(top, top + canvas.shape[0], dtype=np.float32)[:, None] - feet[1]
    cols = np.arange(canvas.shape[1], dtype=np.float32)[None, :] - feet[0] + 0.08 * size * sun
    q = np.hypot(cols / (0.20 * size), rows / (0.035 * size))
    canvas *= (1.0 - 0.45 * np.clip(1.3 - q, 0.0, 1.0))[:, :, None]


def _camera_chain(canvas: np.ndarray, shot: Shot, rng: np.random.Generator) -> np.ndarray:
    """Return the stored picture of what stands before the lens: light, optics, sensor and the camera's own compression."""
    camera = CAMERAS[shot.camera]
    warmth = np.array([1.0 + 0.09 * shot.warmth, 1.0, 1.0 - 0.09 * shot.warmth], dtype=np.float32)
    image = 0.25 * (canvas[0::2, 0::2] + canvas[0::2, 1::2] + canvas[1::2, 0::2] + canvas[1::2, 1::2])
    if shot.shadow:
        x = (
            np.linspace(0.0, 1.0, WIDTH, dtype=np.float32)[None, :]
            + 0.25 * np.linspace(-1.0, 1.0, HEIGHT, dtype=np.float32)[:, None]
        )
        inside = _edge(shot.shadow - x if shot.shadow > 0 else x - 1.0 - shot.shadow, 0.08)
        image = image * (1.0 - 0.42 * inside[:, :, None])
    image = np.clip(image * shot.light * warmth * np.asarray(camera.gains, dtype=np.float32), 0.0, 1.2)
    image = (1.0 - camera.haze) * image + camera.haze * 0.85
    image = 0.5 + camera.contrast * (image + camera.brightness - 0.5)
    image = np.clip(image, 0.0, 1.0) ** camera.gamma
    grey = 0.30 * image[:, :, 0] + 0.59 * image[:, :, 1] + 0.11 * image[:, :, 2]
    image = grey[:, :, None] + camera.saturation * (image - grey[:, :, None])

    picture = Image.fromarray((np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8))
    small = (max(8, round(WIDTH * shot.detail)), max(16, round(HEIGHT * shot.detail)))
    if small != (WIDTH, HEIGHT):
        picture = picture.resize(small, Image.Resampling.BOX).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    if camera.blur > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(camera.blur))
    image = np.asarray(picture, dtype=np.float32)
    steps = int(round(shot.motion))
    if steps > 0:
        padded = np.pad(image, ((0, 0), (steps, 0), (0, 0)), mode="edge")
        image = sum(padded[:, i : i + WIDTH] for i in range(steps + 1)) / np.float32(steps + 1)
    image = image + 255.0 * camera.noise * rng.standard_normal(image.shape, dtype=np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=shot.jpeg)
    return np.asarray(Image.open(buffer), dtype=np.uint8)


def render_person(who: Identity | None, shot: Shot) -> np.ndarray:
    """Return the picture of one person in one shot.

    Args:
        who: The person, or ``None`` for a picture without one (a false detection).
        shot: Camera, pose, light and the rest.

    Returns:
        RGB picture ``(128, 64, 3)``, uint8.
    """
    height, width = 2 * HEIGHT, 2 * WIDTH
    camera = CAMERAS[shot.camera]
    rng = generator(*shot.noise_key)
    size = shot.scale * height
    zoom = float(np.clip(shot.zoom * (0.45 + 0.5 * shot.scale / 0.9), 0.6, 2.2))
    crop_w, crop_h = min(SCENE_WIDTH, width / zoom), min(SCENE_HEIGHT, height / zoom)
    left, top = shot.spot[0] * (SCENE_WIDTH - crop_w), (0.35 + 0.5 * shot.spot[1]) * (SCENE_HEIGHT - crop_h)
    view = scene(shot.world, shot.camera).resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, left + crop_w, top + crop_h)
    )
    canvas = np.asarray(view, dtype=np.float32) / 255.0
    folds = 1.0 + 0.055 * smooth_noise(rng, height, width, 14) + 0.035 * smooth_noise(rng, height, width, 5)
    feet = ((0.5 + shot.shift[0]) * width, (0.965 + shot.shift[1]) * height)

    def bystander(offset: float, nearer: float) -> None:
        other = generator(*shot.occluder_key)
        _draw_figure(
            canvas,
            folds,
            sample_identity(shot.world, _BYSTANDERS + int(other.integers(500))),
            feet=(feet[0] + offset * width, feet[1] + 0.08 * (nearer - 1.0) * size),
            size=size * nearer,
            yaw=float(other.uniform(0.0, 360.0)),
            pitch=camera.pitch,
            sun=shot.sun,
            phase=float(other.uniform(0.0, 6.0)),
            walking=0.6,
            arms="swing",
            bag_shift=0.0,
        )

    behind = shot.occluder == "person" and shot.occluder_at < 0.0
    if behind:
        bystander(0.45 * np.sign(shot.occluder_at + 0.45) + 0.1 * shot.occluder_at, 0.92)
    if who is not None:
        _ground_shadow(canvas, feet, size, shot.sun)
        _draw_figure(
            canvas,
            folds,
            who,
            feet=feet,
            size=size * who.height**0.5,
            yaw=shot.yaw,
            pitch=camera.pitch,
            sun=shot.sun,
            phase=shot.phase,
            walking=shot.walking,
            arms=shot.arms,
            bag_shift=shot.bag_shift,
        )
    if shot.occluder == "person" and not behind:
        bystander(0.5 * (1.0 if shot.occluder_at > 0.45 else -1.0), 1.08)
    elif shot.occluder not in ("none", "person"):
        layer = (
            np.asarray(occluder_layer(shot.occluder, shot.occluder_key, shot.occluder_at, height, width), dtype=np.float32)
            / 255.0
        )
        alpha = layer[:, :, 3:]
        canvas = canvas * (1.0 - alpha) + layer[:, :, :3] * alpha
    return _camera_chain(canvas, shot, rng)
