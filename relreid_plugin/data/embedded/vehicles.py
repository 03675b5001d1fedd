"""The embedded vehicle data set: strips of visible, near-infrared and thermal views in the layout of RGBNT100.

Identities are told apart by four things: the body type, which all bands show, and one cue per band that only this band
shows. In a split the identities come in groups of eight: all combinations of two values of each cue on one body type. So
one band leaves four candidates, two bands leave two, three bands leave one; and no value or pair of values gives a group
away, because every value serves several groups and every pair of values one group only.

Whether the visible band sees night, near infrared a flare or haze and the thermal band a hot day is drawn independently for
every shot.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...errors import UserError, did_you_mean
from ..images import read_image
from .dataset import SPLITS, write_once
from .sheet import save_sheet
from .traits import generator
from .vehicle_render import BANDS, BODIES, HEATS, INKS, LIVERIES, Vehicle, VehicleShot, render_vehicle
from .vehicle_scenes import OCCLUDERS, VEHICLE_CAMERAS, VIEW_HEIGHT, VIEW_WIDTH

VEHICLE_GENERATOR = "relreid_plugin embedded vehicles"
VEHICLE_GENERATOR_VERSION = 1
"""Goes up with every change of a rendered byte; a folder of another version is generated anew."""
STRIP_FOLDER = "rgbir"
JPEG_QUALITY = 92

NIGHT, VEIL, HOT_DAY = 0.40, 0.35, 0.35
"""Share of the shots in which the visible, the near-infrared and the thermal band see little."""

_TABLE, _TRACK, _SHOT, _PRESENCE, _QUERIES = 50, 51, 52, 53, 54
_GROUP = 8  # identities of a group: two values of each of three cues
_MOST_IDS = 16 * _GROUP  # of a split: 4 x 4 disjoint blocks of two values
_CORNERS = ((0, 0, 0), (1, 1, 1), (0, 0, 1), (1, 1, 0), (0, 1, 0), (1, 0, 1), (1, 0, 0), (0, 1, 1))
_NAME = re.compile(r"(\d{4})_c(\d)_(\d{6})_(\d{2})\.jpg$")


@dataclass(frozen=True)
class EmbeddedVehiclesSpec:
    """Size of an embedded vehicle data set.

    Raises:
        UserError: A number is out of range; the message names it.
    """

    num_train_ids: int = 60
    num_test_ids: int = 60
    num_cameras: int = 4  # cameras that see an identity
    min_shots: int = 2  # shots of an identity by a camera
    max_shots: int = 3
    num_queries: int = 2  # queries of a test identity, each by another camera

    def __post_init__(self) -> None:
        if not (1 <= self.num_train_ids <= _MOST_IDS and 1 <= self.num_test_ids <= _MOST_IDS):
            raise UserError(
                f"EmbeddedVehiclesSpec: num_train_ids and num_test_ids must be from 1 to {_MOST_IDS}, "
                f"got {self.num_train_ids} and {self.num_test_ids}."
            )
        if not 2 <= self.num_cameras <= len(VEHICLE_CAMERAS):
            raise UserError(
                f"EmbeddedVehiclesSpec: num_cameras must be from 2 to {len(VEHICLE_CAMERAS)}, got {self.num_cameras}."
            )
        if not 2 <= self.min_shots <= self.max_shots <= 9:
            raise UserError(
                "EmbeddedVehiclesSpec: 2 <= min_shots <= max_shots <= 9 must hold, "
                f"got {self.min_shots} and {self.max_shots}."
            )
        if not 1 <= self.num_queries <= self.num_cameras:
            raise UserError(
                f"EmbeddedVehiclesSpec: num_queries must be from 1 to num_cameras ({self.num_cameras}), "
                f"got {self.num_queries}."
            )


VEHICLE_SPECS: dict[str, EmbeddedVehiclesSpec] = {
    "embedded_vehicles": EmbeddedVehiclesSpec(),
    "embedded_vehicles_tiny": EmbeddedVehiclesSpec(num_train_ids=6, num_test_ids=6, num_cameras=3, max_shots=2),
}
"""The named data sets; a name is also the folder's."""


def _draw_split(rng: np.random.Generator, count: int) -> list[Vehicle]:
    """Return ``count`` vehicles, group by group.

    The eight values of a cue are paired off into four blocks. A group has one block of each cue; the blocks of the third
    cue follow from those of the other two as in a Latin square, so no two groups share the blocks of two cues.
    """
    pairs = [rng.permutation(len(cue)).reshape(-1, 2) for cue in (LIVERIES, INKS, HEATS)]
    cells = [(a, (a + b) % 4, (2 * a + b) % 4) for b in range(4) for a in range(4)]
    types = rng.permutation(list(BODIES))
    groups = np.array_split(np.arange(count), -(-count // _GROUP))
    found = []
    for number, members in enumerate(groups):
        blocks = [pairs[cue][cells[number][cue]] for cue in range(3)]
        for corner in _CORNERS[: len(members)]:
            livery, ink, heat = (int(blocks[cue][corner[cue]]) for cue in range(3))
            found.append(Vehicle(str(types[number % len(types)]), livery, ink, heat))
    return found


def vehicle_table(spec: EmbeddedVehiclesSpec, seed: int = 0) -> tuple[list[Vehicle], list[Vehicle]]:
    """Return the train and the test vehicles; identity numbers count from 1 over both. No two are alike."""
    rng = generator(seed, _TABLE, spec.num_train_ids, spec.num_test_ids)
    train = _draw_split(rng, spec.num_train_ids)
    taken = set(train)
    while True:
        test = _draw_split(rng, spec.num_test_ids)
        if not taken.intersection(test):
            return train, test


def sample_vehicle_shot(seed: int, identity: int, camera: int, shot: int) -> VehicleShot:
    """Return shot number ``shot`` of the pass of an identity through a camera.

    The shots of one pass share their heading, spot and light up to a little jitter.

    Args:
        seed: World seed.
        identity: Identity number.
        camera: Index into :data:`VEHICLE_CAMERAS`.
        shot: Number of the shot within the pass.
    """
    spec = VEHICLE_CAMERAS[camera]
    track, rng = generator(seed, _TRACK, identity, camera), generator(seed, _SHOT, identity, camera, shot)
    heading = spec.yaws[int(track.integers(len(spec.yaws)))] + track.normal(0.0, 5.0)
    spot = (float(track.random()), float(track.random()))
    sun, light, warmth = track.uniform(-1.0, 1.0), track.normal(1.0, 0.10), track.normal(0.0, 0.6)
    lamp, drift = track.normal(1.0, 0.10), track.normal(0.0, 0.025)
    occluder = OCCLUDERS[int(track.integers(len(OCCLUDERS)))] if track.random() < spec.occlusion else "none"
    occluder_at = float(track.uniform(0.08, 0.92))
    if rng.random() < 0.25:
        occluder = "none"
    night = bool(rng.random() < NIGHT)
    veil = ("flare" if rng.random() < 0.5 else "haze") if rng.random() < VEIL else "none"
    hot_day = bool(rng.random() < HOT_DAY)
    return VehicleShot(
        camera=camera,
        world=seed,
        yaw=float((heading + rng.normal(0.0, 3.5)) % 360.0),
        spot=(float(np.clip(spot[0] + rng.normal(0.0, 0.01), 0.0, 1.0)), spot[1]),
        scale=float(rng.uniform(0.80, 0.96)),
        shift=(float(rng.normal(0.0, 0.02)), float(rng.normal(0.0, 0.02))),
        sun=float(sun),
        light=float(np.clip(light + rng.normal(0.0, 0.04), 0.65, 1.35)),
        warmth=float(warmth),
        lamp=float(np.clip(lamp + rng.normal(0.0, 0.05), 0.75, 1.25)),
        night=night,
        veil=veil,
        veil_at=(float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.3, 0.75))),
        hot_day=hot_day,
        drift=float(drift + rng.normal(0.0, 0.01)),
        detail=(float(rng.uniform(0.6, 1.0)), float(rng.uniform(0.6, 1.0)), float(rng.uniform(0.45, 0.7))),
        occluder=occluder,
        occluder_at=float(occluder_at + rng.normal(0.0, 0.04)),
        occluder_key=(seed, _TRACK, identity, camera, 1),
        noise_key=(seed, _SHOT, identity, camera, shot, 1),
    )


@dataclass(frozen=True)
class PlannedStrip:
    """One strip to render: where it goes and what is on it."""

    split: str
    name: str
    identity: int
    vehicle: Vehicle
    camera: int  # index into VEHICLE_CAMERAS
    shot: int


def plan_embedded_vehicles(spec: EmbeddedVehiclesSpec, seed: int = 0) -> list[PlannedStrip]:
    """Return all strips of the data set, sorted by split and name, without rendering any.

    A test identity gives one query for each of ``num_queries`` of its cameras; its other strips are in the gallery, so
    every query has matches by other cameras.
    """
    train, test = vehicle_table(spec, seed)
    numbers = generator(seed, _TABLE, 1, len(train), len(test)).permutation(len(train) + len(test)) + 1
    plan = []
    for index, vehicle in enumerate(train + test):
        pid = int(numbers[index])
        rng, query_rng = generator(seed, _PRESENCE, pid), generator(seed, _QUERIES, pid)
        cameras = rng.permutation(len(VEHICLE_CAMERAS))[: spec.num_cameras]
        query_cameras = cameras[: spec.num_queries] if index >= len(train) else cameras[:0]
        for camera in sorted(int(c) for c in cameras):
            shots, frame = int(rng.integers(spec.min_shots, spec.max_shots + 1)), int(rng.integers(1, 900_000))
            chosen = int(query_rng.integers(shots)) if camera in query_cameras else -1
            for shot in range(shots):
                split = "bounding_box_train" if index < len(train) else ("query" if shot == chosen else "bounding_box_test")
                name = f"{pid:04d}_c{camera + 1}_{frame + 25 * shot:06d}_{shot + 1:02d}.jpg"
                plan.append(PlannedStrip(split, name, pid, vehicle, camera, shot))
    return sorted(plan, key=lambda item: (item.split, item.name))


def _write_strip(job: tuple[str, int, PlannedStrip]) -> None:
    folder, seed, item = job
    shot = sample_vehicle_shot(seed, item.identity, item.camera, item.shot)
    Image.fromarray(render_vehicle(item.vehicle, shot)).save(
        Path(folder) / STRIP_FOLDER / item.split / item.name, "JPEG", quality=JPEG_QUALITY
    )


def write_embedded_vehicles(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    spec: EmbeddedVehiclesSpec = VEHICLE_SPECS["embedded_vehicles"],
    name: str = "embedded_vehicles",
    workers: int | None = None,
    verbose: bool = True,
) -> Path:
    """Return the folder of an embedded vehicle data set, rendering it on first use.

    Args:
        root: Folder that holds data sets; made when missing.
        seed: World seed, not negative.
        spec: Sizes.
        name: Name of the folder under ``root``.
        workers: Processes that render; ``None``: up to 4, fewer for a small set. The bytes do not depend on it.
        verbose: Show a progress bar when standard error is a terminal.

    Returns:
        ``root/name``, which holds ``rgbir/{bounding_box_train,query,bounding_box_test}``: JPEG strips, 768 x 128 pixels,
        of a visible, a near-infrared and a thermal view, 256 x 128 each.

    Raises:
        UserError: ``seed`` is negative, ``root`` cannot be written, or ``root/name`` was not made by the generator (it
            is left untouched).
    """
    if seed < 0:
        raise UserError(f"the seed of the embedded data set must not be negative, got {seed}.")
    plan = plan_embedded_vehicles(spec, seed)
    wanted = {
        "generator": VEHICLE_GENERATOR,
        "version": VEHICLE_GENERATOR_VERSION,
        "seed": seed,
        "spec": asdict(spec),
        "counts": {split: sum(item.split == split for item in plan) for split in SPLITS},
    }
    return write_once(
        Path(root).expanduser().absolute() / name,
        wanted,
        STRIP_FOLDER,
        _write_strip,
        lambda built: [(str(built), seed, item) for item in plan],
        workers=workers,
        verbose=verbose,
    )


def ensure_embedded_vehicles(name: str, root: str | os.PathLike[str], *, seed: int = 0, verbose: bool = True) -> Path:
    """Return the folder of a named data set (a key of :data:`VEHICLE_SPECS`) under ``root``, rendering it on first use.

    Raises:
        UserError: The name is unknown, or as :func:`write_embedded_vehicles` does.
    """
    if name not in VEHICLE_SPECS:
        raise UserError(f"there is no embedded data set '{name}'{did_you_mean(name, VEHICLE_SPECS)}")
    return write_embedded_vehicles(root, seed=seed, spec=VEHICLE_SPECS[name], name=name, verbose=verbose)


def vehicles_sheet(folder: str | os.PathLike[str], path: str | os.PathLike[str], *, num_ids: int = 8) -> None:
    """Write a PNG with one row per identity: its brightest and its darkest strip in visible light, a day and a night.

    Args:
        folder: Data set folder that holds ``rgbir``.
        path: PNG file to write.
        num_ids: Identities to show, spread over all.

    Raises:
        UserError: The folder holds no strips, or the sheet cannot be written.
    """
    found: dict[int, list[Path]] = defaultdict(list)
    for split in SPLITS:
        for strip in sorted((Path(folder) / STRIP_FOLDER / split).glob("*.jpg")):
            match = _NAME.search(strip.name)
            if match:
                found[int(match[1])].append(strip)
    if not found:
        raise UserError(f"'{folder}' holds no strips ({STRIP_FOLDER}/{SPLITS[0]}/0001_c1_….jpg).")
    everyone = sorted(found)
    ids = [everyone[k] for k in np.unique(np.linspace(0, len(everyone) - 1, num_ids).round().astype(int))]

    def brightness(strip: Path) -> float:
        return float(np.asarray(read_image(strip).convert("L"))[:, :VIEW_WIDTH].mean())

    left, top, gap, between = 40, 18, 3, 10
    width = len(BANDS) * VIEW_WIDTH
    sheet = Image.new("RGB", (left + 2 * (width + between), top + len(ids) * (VIEW_HEIGHT + gap)), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column in range(2):
        for band, title in enumerate(("visible", "near infrared", "thermal")):
            draw.text((left + column * (width + between) + band * VIEW_WIDTH, 3), title, fill=(0, 0, 0), font=font)
    for row, pid in enumerate(ids):
        y = top + row * (VIEW_HEIGHT + gap)
        draw.text((4, y + VIEW_HEIGHT // 2 - 6), f"{pid:04d}", fill=(0, 0, 0), font=font)
        strips = sorted(found[pid], key=lambda strip: (-brightness(strip), strip.name))
        for column, strip in enumerate((strips[0], strips[-1])):
            sheet.paste(read_image(strip), (left + column * (width + between), y))
    save_sheet(sheet, path, colours=224)
