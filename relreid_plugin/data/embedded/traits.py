"""What a rendered person, camera and shot are made of, and how each is drawn from a seed.

Every draw comes from its own generator, keyed by what it belongs to: ``(seed, identity)`` for the traits of a person,
``(seed, identity, camera)`` for what the shots of one pass through a camera share, and ``(seed, identity, camera, shot)``
for the rest. So an image depends on its key alone, never on how many others are rendered or in which order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]
"""Red, green, blue in [0, 1]."""

NUM_LOOKS = 60
"""Outfits in circulation. Far fewer than identities, so that several persons differ only in details."""

_IDENTITY, _LOOK, _TRACK, _SHOT = range(4)

CLOTH: dict[str, Colour] = {
    "black": (0.09, 0.09, 0.10),
    "charcoal": (0.24, 0.25, 0.27),
    "grey": (0.52, 0.53, 0.54),
    "white": (0.90, 0.90, 0.88),
    "navy": (0.12, 0.16, 0.34),
    "blue": (0.20, 0.38, 0.72),
    "sky": (0.55, 0.72, 0.88),
    "red": (0.74, 0.14, 0.15),
    "wine": (0.42, 0.10, 0.18),
    "green": (0.15, 0.45, 0.24),
    "olive": (0.38, 0.38, 0.20),
    "beige": (0.78, 0.69, 0.54),
    "brown": (0.40, 0.27, 0.18),
    "yellow": (0.90, 0.76, 0.20),
    "pink": (0.88, 0.56, 0.64),
    "purple": (0.42, 0.26, 0.54),
}
_UPPER = {
    "black": 16, "charcoal": 7, "grey": 10, "white": 14, "navy": 8, "blue": 8, "sky": 5, "red": 8,
    "wine": 3, "green": 5, "olive": 4, "beige": 5, "brown": 3, "yellow": 3, "pink": 4, "purple": 3,
}  # fmt: skip
_LOWER = {
    "black": 22,
    "charcoal": 10,
    "grey": 8,
    "navy": 14,
    "blue": 12,
    "beige": 8,
    "brown": 5,
    "olive": 5,
    "white": 5,
    "sky": 3,
    "wine": 2,
}
_ACCENT = {
    "white": 14,
    "black": 12,
    "red": 8,
    "yellow": 8,
    "sky": 8,
    "navy": 8,
    "green": 6,
    "pink": 6,
    "grey": 6,
    "beige": 4,
    "purple": 4,
}
_BAG = {
    "black": 14,
    "navy": 5,
    "red": 6,
    "brown": 7,
    "grey": 5,
    "blue": 5,
    "yellow": 4,
    "green": 4,
    "pink": 4,
    "beige": 4,
    "purple": 3,
}
_SHOE = {"black": 14, "white": 12, "brown": 7, "grey": 6, "red": 4, "blue": 3, "beige": 3}
SKIN: tuple[Colour, ...] = (
    (0.95, 0.79, 0.68),
    (0.88, 0.70, 0.56),
    (0.78, 0.58, 0.43),
    (0.62, 0.43, 0.30),
    (0.45, 0.30, 0.21),
    (0.32, 0.21, 0.15),
)
HAIR: tuple[Colour, ...] = (
    (0.07, 0.06, 0.06),
    (0.20, 0.13, 0.09),
    (0.38, 0.25, 0.15),
    (0.76, 0.61, 0.36),
    (0.55, 0.24, 0.12),
    (0.66, 0.65, 0.64),
)

UPPER_TYPES = ("tshirt", "shirt", "jacket", "hoodie", "coat", "vest", "dress")
UPPER_PATTERNS = ("plain", "hstripes", "vstripes", "checks", "dots", "logo", "two_tone", "band", "raglan")
LOWER_TYPES = ("trousers", "shorts", "skirt")
LOWER_PATTERNS = ("plain", "side_stripe", "checks", "worn_knees")
HAIR_STYLES = ("short", "bald", "bob", "long", "ponytail", "bun", "afro")
HATS = ("none", "cap", "beanie", "sunhat")
BAGS = ("none", "backpack", "shoulder", "handbag", "tote")
OCCLUDERS = ("none", "bench", "bush", "pole", "bicycle", "car", "person", "sign")


def generator(*key: int) -> np.random.Generator:
    """Return a generator that depends on ``key`` (non-negative integers) alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _pick(rng: np.random.Generator, weights: dict[str, int]) -> str:
    total = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(total, rng.integers(total[-1]), side="right"))]


def _one_of(rng: np.random.Generator, names: tuple[str, ...], weights: tuple[int, ...]) -> str:
    return _pick(rng, dict(zip(names, weights)))


def _shade_of(rng: np.random.Generator, colour: Colour, spread: float = 0.035) -> Colour:
    """Return ``colour`` a little lighter or darker and a little off in hue."""
    value = np.clip(np.asarray(colour) * (1.0 + rng.normal(0.0, 2.0 * spread)) + rng.normal(0.0, spread, 3), 0.03, 0.96)
    return float(value[0]), float(value[1]), float(value[2])


@dataclass(frozen=True)
class Identity:
    """The traits of one person that no camera and no shot changes. Colours are in [0, 1]."""

    height: float  # body height, 1 is the mean
    build: float  # width of the body, 1 is the mean
    hips: float  # width of hips over shoulders, 1 is the mean
    skin: Colour
    hair_style: str
    hair: Colour
    hat: str
    hat_colour: Colour
    glasses: bool
    beard: bool
    scarf: bool
    scarf_colour: Colour
    upper: str
    upper_pattern: str
    upper_colour: Colour
    upper_accent: Colour
    upper_scale: float  # size of the pattern, 1 is the mean
    inner_colour: Colour  # under an open jacket or coat
    opening: float  # half-angle of an open jacket, degrees; 0: closed
    logo: int  # which emblem the logo pattern carries, 0 … 3
    back_print: bool  # whether the emblem is printed on the back too
    lower: str
    lower_pattern: str
    lower_colour: Colour
    lower_accent: Colour
    lower_fit: float  # width of the trouser legs, 1 is the mean
    tights: bool  # dark tights under a skirt, a dress or shorts
    shoe_colour: Colour
    sole_colour: Colour
    boots: bool
    bag: str
    bag_colour: Colour
    bag_accent: Colour
    bag_side: int  # +1: the person's left, -1: right
    stride: float  # amplitude of the walk, 1 is the mean
    lean: float  # forward lean of the upper body


def sample_identity(seed: int, identity: int) -> Identity:
    """Return the person number ``identity`` of the world ``seed``.

    The outfit's main colours and cut come from one of :data:`NUM_LOOKS` looks; pattern, accents, shoes, bag, hair and
    body are the person's own.
    """
    rng = generator(seed, _IDENTITY, identity)
    look = generator(seed, _LOOK, int(rng.integers(NUM_LOOKS)))
    upper = _one_of(look, UPPER_TYPES, (26, 18, 18, 14, 10, 5, 9))
    upper_colour = CLOTH[_pick(look, _UPPER)]
    lower = _one_of(look, LOWER_TYPES, (68, 18, 14))
    lower_colour = CLOTH[_pick(look, _LOWER)]

    if rng.random() < 0.25:
        upper = _one_of(rng, UPPER_TYPES, (26, 18, 18, 14, 10, 5, 9))
    pattern = _one_of(rng, UPPER_PATTERNS, (30, 11, 7, 9, 6, 14, 8, 8, 7))
    accent = CLOTH[_pick(rng, _ACCENT)]
    while np.abs(np.subtract(accent, upper_colour)).sum() < 0.45:
        accent = CLOTH[_pick(rng, _ACCENT)]
    hair_style = _one_of(rng, HAIR_STYLES, (36, 6, 12, 16, 12, 8, 5))
    lower_accent = CLOTH[_pick(rng, _ACCENT)]
    return Identity(
        height=float(np.clip(rng.normal(1.0, 0.05), 0.86, 1.12)),
        build=float(np.clip(rng.normal(1.0, 0.13), 0.76, 1.36)),
        hips=float(np.clip(rng.normal(1.0, 0.09), 0.82, 1.22)),
        skin=_shade_of(rng, SKIN[int(rng.integers(len(SKIN)))], 0.015),
        hair_style=hair_style,
        hair=_shade_of(rng, HAIR[int(rng.choice(len(HAIR), p=(0.34, 0.24, 0.18, 0.12, 0.05, 0.07)))], 0.015),
        hat=_one_of(rng, HATS, (78, 11, 6, 5)),
        hat_colour=_shade_of(rng, CLOTH[_pick(rng, _ACCENT)]),
        glasses=bool(rng.random() < 0.2),
        beard=bool(hair_style in ("short", "bald") and rng.random() < 0.25),
        scarf=bool(rng.random() < 0.1),
        scarf_colour=_shade_of(rng, CLOTH[_pick(rng, _ACCENT)]),
        upper=upper,
        upper_pattern=pattern,
        upper_colour=_shade_of(rng, upper_colour),
        upper_accent=_shade_of(rng, accent),
        upper_scale=float(rng.uniform(0.75, 1.4)),
        inner_colour=_shade_of(rng, CLOTH[_pick(rng, _ACCENT)]),
        opening=float(rng.uniform(12.0, 32.0)) if rng.random() < 0.6 else 0.0,
        logo=int(rng.integers(4)),
        back_print=bool(rng.random() < 0.35),
        lower=lower,
        lower_pattern=_one_of(rng, LOWER_PATTERNS, (72, 12, 7, 9)),
        lower_colour=_shade_of(rng, lower_colour),
        lower_accent=_shade_of(rng, lower_accent),
        lower_fit=float(rng.uniform(0.82, 1.35)),
        tights=bool(rng.random() < 0.3),
        shoe_colour=_shade_of(rng, CLOTH[_pick(rng, _SHOE)]),
        sole_colour=CLOTH["white"] if rng.random() < 0.5 else CLOTH["charcoal"],
        boots=bool(rng.random() < 0.15),
        bag=_one_of(rng, BAGS, (38, 26, 15, 12, 9)),
        bag_colour=_shade_of(rng, CLOTH[_pick(rng, _BAG)]),
        bag_accent=_shade_of(rng, CLOTH[_pick(rng, _ACCENT)]),
        bag_side=1 if rng.random() < 0.5 else -1,
        stride=float(rng.uniform(0.75, 1.25)),
        lean=float(rng.normal(0.01, 0.012)),
    )


@dataclass(frozen=True)
class Camera:
    """One of the six cameras: what it does to light, colour and sharpness, what it looks at, and from where."""

    scene: str  # street | park | mall | wall | plaza | station
    gains: Colour  # colour cast
    gamma: float  # > 1: darker
    brightness: float
    contrast: float
    saturation: float
    haze: float  # share of veiling light
    blur: float  # standard deviation of the lens blur, pixels
    detail: tuple[float, float]  # range of the true resolution over the stored one
    noise: float  # standard deviation of sensor noise
    jpeg: tuple[int, int]  # range of the quality of the camera's own compression
    yaws: tuple[float, ...]  # headings of the passers-by, degrees; 0: towards the camera, 90: to the picture's right
    pitch: float  # downward tilt, degrees
    occluders: tuple[str, ...]  # what may stand before a person
    occlusion: float  # probability that something does


CAMERAS: tuple[Camera, ...] = (
    Camera("street", (1.05, 1.00, 0.92), 0.95, 0.02, 1.04, 1.05, 0.02, 0.35, (0.75, 1.0), 0.010, (70, 90),
           (0.0, 20.0, 180.0, 315.0), 8.0, ("car", "pole", "person"), 0.18),
    Camera("park", (0.93, 1.04, 0.93), 1.08, -0.02, 1.10, 1.12, 0.0, 0.40, (0.65, 1.0), 0.014, (60, 85),
           (70.0, 110.0, 250.0, 350.0), 10.0, ("bush", "bench", "bicycle"), 0.24),
    Camera("mall", (1.10, 1.02, 0.82), 0.92, 0.04, 0.94, 0.95, 0.05, 0.45, (0.65, 0.95), 0.012, (60, 85),
           (170.0, 190.0, 140.0, 45.0), 16.0, ("person", "sign", "bench"), 0.18),
    Camera("wall", (0.91, 0.98, 1.10), 1.18, -0.03, 0.97, 0.86, 0.04, 0.40, (0.55, 0.85), 0.020, (45, 70),
           (90.0, 270.0, 60.0, 200.0), 7.0, ("pole", "bicycle", "person"), 0.22),
    Camera("plaza", (1.0, 1.0, 1.0), 0.90, 0.06, 0.90, 0.88, 0.09, 0.60, (0.45, 0.8), 0.010, (55, 80),
           (315.0, 45.0, 0.0, 135.0), 20.0, ("person", "sign", "bush"), 0.22),
    Camera("station", (0.87, 1.04, 1.02), 1.22, -0.01, 1.06, 0.78, 0.02, 0.55, (0.5, 0.8), 0.024, (40, 65),
           (0.0, 180.0, 225.0, 330.0), 14.0, ("pole", "person", "sign"), 0.22),
)  # fmt: skip


@dataclass(frozen=True)
class Shot:
    """One picture of a person by one camera: everything but who it is."""

    camera: int  # index into CAMERAS
    world: int  # seed of the camera's scene
    yaw: float  # heading, degrees
    phase: float  # phase of the walk, radians
    walking: float  # amplitude of the walk; near 0: standing
    arms: str  # swing | phone | pockets
    spot: tuple[float, float]  # where in the scene, fractions of the free width and height
    zoom: float  # size of the scene
    light: float  # brightness of the light, 1 is the mean
    warmth: float  # -1: cold … +1: warm light
    sun: float  # side the light comes from, -1: left … +1: right
    shadow: float  # share of the picture under a shadow's edge, from the left (< 0: from the right)
    scale: float  # body height over picture height
    shift: tuple[float, float]  # the detector box's error, fractions of the picture's width and height
    detail: float  # true resolution over stored resolution
    jpeg: int  # quality of the camera's own compression
    motion: float  # motion blur, pixels
    occluder: str
    occluder_at: float  # where, -1: left … +1: right
    occluder_key: tuple[int, ...]  # seeds what the occluder looks like
    noise_key: tuple[int, ...]  # seeds grain and folds
    bag_shift: float  # how far the bag hangs from its usual place


def sample_shot(seed: int, identity: int, camera: int, shot: int, *, stray: bool = False) -> Shot:
    """Return shot number ``shot`` of the pass of ``identity`` through ``camera``.

    The shots of one pass share their spot, heading, light and occluder up to a little jitter.

    Args:
        seed: World seed.
        identity: Person number.
        camera: Index into :data:`CAMERAS`.
        shot: Number of the shot within the pass.
        stray: Draw the box of a failed detection: far off the body or much too large or small.
    """
    spec = CAMERAS[camera]
    track = generator(seed, _TRACK, identity, camera)
    rng = generator(seed, _SHOT, identity, camera, shot)

    heading = spec.yaws[int(track.integers(len(spec.yaws)))] + track.normal(0.0, 14.0)
    if track.random() < 0.15:
        heading = track.uniform(0.0, 360.0)
    walking = float(track.uniform(0.55, 1.1)) if track.random() < 0.82 else float(track.uniform(0.0, 0.2))
    phase = track.uniform(0.0, 2.0 * np.pi) + shot * track.uniform(0.9, 2.2)
    spot = (float(track.random()), float(track.random()))
    light, warmth, sun = track.normal(1.0, 0.10), track.normal(0.0, 0.40), track.uniform(-1.0, 1.0)
    shadow = float(track.uniform(0.25, 1.0) * (1 if track.random() < 0.5 else -1)) if track.random() < 0.3 else 0.0
    arms = _one_of(track, ("swing", "phone", "pockets"), (76, 12, 12))
    occluder, occluder_at = "none", track.uniform(-0.9, 0.9)
    if track.random() < spec.occlusion:
        occluder = spec.occluders[int(track.integers(len(spec.occluders)))]
    occluder_key = (seed, _TRACK, identity, camera, 1)
    drift = track.normal(0.0, 0.5)
    bag_shift = float(track.normal(0.0, 1.0))
    scale = 0.90 * track.uniform(0.95, 1.05)

    scale = scale * rng.uniform(0.96, 1.05)
    shift = [float(rng.normal(0.0, 0.045)), float(rng.normal(0.0, 0.018))]
    cut = rng.random()
    if cut < 0.10:  # the box ends above the feet
        scale *= rng.uniform(1.10, 1.28)
        shift[1] += 0.5 * (scale - 0.90)
    elif cut < 0.18:  # the box is too generous
        scale *= rng.uniform(0.80, 0.90)
    if stray:
        scale *= rng.uniform(0.45, 2.4)
        shift = [float(rng.uniform(0.35, 0.75) * (1 if rng.random() < 0.5 else -1)), float(rng.uniform(-0.35, 0.35))]
    if rng.random() < 0.2:  # gone past what stood in the way
        occluder = "none"
    return Shot(
        camera=camera,
        world=seed,
        yaw=float((heading + rng.normal(0.0, 7.0)) % 360.0),
        phase=float(phase + rng.normal(0.0, 0.2)),
        walking=walking,
        arms=arms,
        spot=(float(np.clip(spot[0] + 0.02 * shot * drift, 0.0, 1.0)), spot[1]),
        zoom=float(rng.uniform(0.97, 1.03)),
        light=float(np.clip(light + rng.normal(0.0, 0.03), 0.55, 1.5)),
        warmth=float(warmth + rng.normal(0.0, 0.08)),
        sun=float(sun),
        shadow=shadow,
        scale=float(scale),
        shift=(shift[0], shift[1]),
        detail=float(rng.uniform(*spec.detail)),
        jpeg=int(rng.integers(spec.jpeg[0], spec.jpeg[1] + 1)),
        motion=float(max(0.0, rng.normal(-0.5, 1.2))),
        occluder=occluder,
        occluder_at=float(occluder_at + 0.12 * shot * drift),
        occluder_key=occluder_key,
        noise_key=(seed, _SHOT, identity, camera, shot, 1),
        bag_shift=bag_shift,
    )
