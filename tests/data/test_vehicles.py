"""The embedded vehicle data set: who shares which cue, which band shows it, determinism, layout, writing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relreid_plugin.data.embedded import (
    VEHICLE_SPECS,
    EmbeddedVehiclesSpec,
    Vehicle,
    VehicleShot,
    ensure_embedded_vehicles,
    plan_embedded_vehicles,
    render_vehicle,
    sample_vehicle_shot,
    vehicle_table,
    vehicles_sheet,
    write_embedded_vehicles,
)
from relreid_plugin.data.embedded.vehicle_render import BODIES, HEATS, INKS, LIVERIES
from relreid_plugin.data.embedded.vehicle_scenes import OCCLUDERS, VEHICLE_CAMERAS
from relreid_plugin.errors import UserError

SMALL = EmbeddedVehiclesSpec(num_train_ids=2, num_test_ids=2, num_cameras=2, max_shots=2, num_queries=1)
CUES = ("livery", "ink", "heat")
NAME = re.compile(r"^(\d{4})_c([1-6])_\d{6}_\d{2}\.jpg$")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedded_vehicles(tmp_path_factory.mktemp("root"), spec=SMALL, workers=1, verbose=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def clear(shot: VehicleShot) -> VehicleShot:
    """Return a shot in which every band sees well."""
    return dataclasses.replace(shot, night=False, veil="none", hot_day=False, occluder="none")


def views(who: Vehicle, shot: VehicleShot) -> list[np.ndarray]:
    return np.split(render_vehicle(who, shot), 3, axis=1)


# --- who shares what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", VEHICLE_SPECS)
def test_no_vehicle_is_told_by_fewer_than_three_cues(name, seed):
    train, test = vehicle_table(VEHICLE_SPECS[name], seed)
    assert len(set(train + test)) == len(train + test)
    for split in (train, test):
        assert len({(who.livery, who.ink, who.heat) for who in split}) == len(split)
        for cue in CUES:
            values = Counter((who.body, getattr(who, cue)) for who in split)
            assert min(values.values()) >= 3, f"a body type and a value of {cue} that too few vehicles share"
        for pair in combinations(CUES, 2):
            held = Counter(tuple(getattr(who, cue) for cue in pair) for who in split)
            assert max(held.values()) <= 2
            shared = sum(count for count in held.values() if count == 2)
            assert shared >= 0.6 * len(split), f"{pair} alone tells too many vehicles apart"


@pytest.mark.parametrize("seed", range(3))
def test_default_splits_use_every_value_of_every_cue_evenly(seed):
    for split in vehicle_table(VEHICLE_SPECS["embedded_vehicles"], seed):
        assert {who.body for who in split} == set(BODIES)
        for cue, cues in zip(CUES, (LIVERIES, INKS, HEATS)):
            counts = Counter(getattr(who, cue) for who in split)
            assert set(counts) == set(range(len(cues)))
            assert 6 <= min(counts.values()) and max(counts.values()) <= 8
            assert all(len({who.body for who in split if getattr(who, cue) == value}) >= 2 for value in counts)


def test_the_largest_split_keeps_pairs_of_cues_shared_by_two():
    train, _ = vehicle_table(EmbeddedVehiclesSpec(num_train_ids=128, num_test_ids=8))
    for pair in combinations(CUES, 2):
        assert set(Counter(tuple(getattr(who, cue) for cue in pair) for who in train).values()) == {2}


def test_bands_fail_independently():
    shots = [sample_vehicle_shot(0, pid, camera, shot) for pid in range(400) for camera in range(3) for shot in range(2)]
    failed = np.array([(shot.night, shot.veil != "none", shot.hot_day) for shot in shots], dtype=np.float64)
    np.testing.assert_allclose(failed.mean(axis=0), (0.40, 0.35, 0.35), atol=0.04)
    assert np.abs(np.corrcoef(failed.T) - np.eye(3)).max() < 0.06
    assert (failed.sum(axis=1) == 0).any() and {shot.occluder for shot in shots} == {"none", *OCCLUDERS}


# --- which band shows what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("camera", range(len(VEHICLE_CAMERAS)))
def test_a_cue_changes_its_own_band_and_no_other(camera):
    shot = clear(sample_vehicle_shot(0, 7, camera, 0))
    body = list(BODIES)[camera]
    base = Vehicle(body, 0, 0, 0)
    plain = views(base, shot)
    for band, cue in enumerate(CUES):
        changed = views(dataclasses.replace(base, **{cue: 3}), shot)
        for other in range(3):
            difference = np.abs(changed[other].astype(int) - plain[other]).max(axis=2)
            if other == band:
                assert (difference > 30).mean() > 0.02, f"{cue} hardly shows"
            else:
                assert not difference.any(), f"{cue} shows in band {other}"


@pytest.mark.parametrize("condition", [{"night": True}, {"veil": "flare"}, {"veil": "haze"}, {"hot_day": True}])
def test_a_failure_spoils_its_own_band_and_no_other(condition):
    shot = clear(sample_vehicle_shot(0, 3, 1, 0))
    failing = dataclasses.replace(shot, **condition)
    band = {"night": 0, "veil": 1, "hot_day": 2}[next(iter(condition))]
    who, cue = Vehicle("suv", 0, 0, 0), CUES[band]
    twin = dataclasses.replace(who, **{cue: 3})
    for other in range(3):
        assert np.array_equal(views(who, shot)[other], views(who, failing)[other]) == (other != band)

    def contrast(where: VehicleShot) -> float:
        return float(np.abs(views(who, where)[band].astype(float) - views(twin, where)[band]).mean())

    assert contrast(failing) < 0.75 * contrast(shot)


@pytest.mark.parametrize("yaw, lamps", [(35.0, "head"), (145.0, "tail")])
def test_night_is_dark_and_only_lamps_are_bright(yaw, lamps):
    for camera in range(len(VEHICLE_CAMERAS)):
        shot = dataclasses.replace(clear(sample_vehicle_shot(0, camera, camera, 0)), yaw=yaw)
        day, night = (
            views(Vehicle("sedan", camera, 0, 0), dataclasses.replace(shot, night=dark))[0].astype(float)
            for dark in (False, True)
        )
        assert np.median(night) < 28 and np.median(day) > 3 * np.median(night)
        bright = night.max(axis=2) > 130
        assert 0.0005 < bright.mean() < 0.15
        red, _, blue = night[bright].mean(axis=0)
        assert (red > 2 * blue) == (lamps == "tail")


def test_every_pair_of_values_of_a_cue_differs_in_view():
    shot = clear(sample_vehicle_shot(0, 1, 0, 0))
    for band, (cue, cues) in enumerate(zip(CUES, (LIVERIES, INKS, HEATS))):
        seen = [
            views(dataclasses.replace(Vehicle("van", 0, 0, 0), **{cue: k}), shot)[band].astype(int) for k in range(len(cues))
        ]
        for a, b in combinations(range(len(cues)), 2):
            assert (np.abs(seen[a] - seen[b]).max(axis=2) > 25).mean() > 0.01, f"{cue} {a} and {b} look alike"


@pytest.mark.parametrize("body", BODIES)
def test_body_types_show_in_every_band(body):
    shot = clear(sample_vehicle_shot(0, 2, 2, 0))
    other = views(Vehicle(next(name for name in BODIES if name != body), 1, 1, 1), shot)
    for view, against in zip(views(Vehicle(body, 1, 1, 1), shot), other):
        assert (np.abs(view.astype(int) - against).max(axis=2) > 25).mean() > 0.02


@pytest.mark.parametrize("yaw", range(0, 360, 30))
def test_every_heading_gives_a_vehicle_inside_the_picture(yaw):
    shot = dataclasses.replace(clear(sample_vehicle_shot(0, 4, 1, 0)), yaw=float(yaw), shift=(0.0, 0.0), scale=0.9)
    difference = views(Vehicle("wagon", 3, 0, 0), shot)[0].astype(int) - views(Vehicle("wagon", 4, 0, 0), shot)[0]
    rows, cols = np.nonzero(np.abs(difference).max(axis=2) > 40)
    assert len(rows) > 400
    assert rows.min() > 2 and rows.max() < 125 and cols.min() > 2 and cols.max() < 253


@pytest.mark.parametrize("occluder", OCCLUDERS)
def test_an_occluder_stands_before_the_vehicle_in_every_band(occluder):
    shot = clear(sample_vehicle_shot(0, 5, 4, 0))
    free, hidden = (
        views(Vehicle("bus", 0, 0, 0), dataclasses.replace(shot, occluder=kind, occluder_at=0.5))
        for kind in ("none", occluder)
    )
    for before, after in zip(free, hidden):
        assert (np.abs(before.astype(int) - after).max(axis=2) > 15).mean() > 0.01


def test_infrared_views_are_grey_and_the_visible_one_is_not():
    visible, near, thermal = views(Vehicle("hatchback", 3, 2, 1), clear(sample_vehicle_shot(0, 6, 0, 0)))
    for view in (near, thermal):
        assert view.shape == (128, 256, 3) and (view == view[:, :, :1]).all()
    assert (np.ptp(visible.astype(int), axis=2) > 60).mean() > 0.05


# --- the plan and the files ------------------------------------------------------------------------------------------


def test_default_plan_has_the_promised_sizes():
    plan = plan_embedded_vehicles(VEHICLE_SPECS["embedded_vehicles"])
    ids, cameras, shots, queries = defaultdict(set), defaultdict(set), Counter(), defaultdict(list)
    for item in plan:
        pid, camera = (int(group) for group in NAME.match(item.name).groups())
        assert (pid, camera) == (item.identity, item.camera + 1)
        ids[item.split].add(pid)
        cameras[pid].add(camera)
        shots[pid, camera] += 1
        if item.split == "query":
            queries[pid].append(camera)
    assert len({(item.split, item.name) for item in plan}) == len(plan)
    assert len(ids["bounding_box_train"]) == len(ids["query"]) == 60 and ids["query"] == ids["bounding_box_test"]
    assert ids["bounding_box_train"] | ids["query"] == set(range(1, 121))
    assert {len(seen) for seen in cameras.values()} == {4} and set(shots.values()) == {2, 3}
    assert all(len(set(seen)) == 2 == len(seen) for seen in queries.values())


def test_strips_have_the_layout_of_rgbnt100(small):
    record = json.loads((small / "dataset.json").read_text())
    images = sorted((small / "rgbir").rglob("*.jpg"))
    assert record["sha256"] == hashlib.sha256(b"".join(path.read_bytes() for path in images)).hexdigest()
    assert {s: len(list((small / "rgbir" / s).iterdir())) for s in record["counts"]} == record["counts"]
    assert (
        set(record["counts"]) == {"bounding_box_train", "query", "bounding_box_test"} and min(record["counts"].values()) > 0
    )
    for path in images:
        assert NAME.match(path.name)
        with Image.open(path) as strip:
            assert strip.size == (768, 128) and strip.mode == "RGB" and strip.format == "JPEG"


def test_bytes_depend_on_the_seed_alone(small, tmp_path):
    assert contents(write_embedded_vehicles(tmp_path / "a", spec=SMALL, workers=2, verbose=False)) == contents(small)
    other = write_embedded_vehicles(tmp_path / "b", seed=1, spec=SMALL, workers=1, verbose=False)
    assert contents(other) != contents(small)
    item = plan_embedded_vehicles(SMALL)[-1]
    strip = render_vehicle(item.vehicle, sample_vehicle_shot(0, item.identity, item.camera, item.shot))
    with Image.open(small / "rgbir" / item.split / item.name) as stored:
        assert np.abs(np.asarray(stored).astype(int) - strip).mean() < 6.0


def test_a_complete_folder_is_reused_and_a_damaged_one_completed(small, tmp_path):
    folder = write_embedded_vehicles(tmp_path, spec=SMALL, workers=1, verbose=False)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_embedded_vehicles(tmp_path, spec=SMALL, workers=1, verbose=False)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    next((folder / "rgbir" / "query").iterdir()).unlink()
    write_embedded_vehicles(tmp_path, spec=SMALL, workers=1, verbose=False)
    assert contents(folder) == contents(small) and list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_persons_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "embedded_vehicles_tiny"
    folder.mkdir()
    (folder / "dataset.json").write_text('{"generator": "relreid_plugin embedded persons"}')
    before = contents(folder)
    with pytest.raises(UserError, match="was not made by the generator"):
        ensure_embedded_vehicles("embedded_vehicles_tiny", tmp_path, verbose=False)
    assert contents(folder) == before


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no embedded data set 'embedded_vehicle'.*embedded_vehicles"):
        ensure_embedded_vehicles("embedded_vehicle", tmp_path)
    with pytest.raises(UserError, match="seed"):
        ensure_embedded_vehicles("embedded_vehicles_tiny", tmp_path, seed=-1)
    with pytest.raises(UserError, match="holds no strips"):
        vehicles_sheet(tmp_path, tmp_path / "sheet.png")
    for wrong in ({"num_test_ids": 129}, {"num_cameras": 7}, {"min_shots": 1}, {"num_queries": 5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            EmbeddedVehiclesSpec(**wrong)
    assert not any(tmp_path.iterdir())


def test_the_sheet_shows_two_strips_per_identity(small, tmp_path):
    vehicles_sheet(small, tmp_path / "made" / "sheet.png", num_ids=3)
    with Image.open(tmp_path / "made" / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 2 * 768 and sheet.height > 3 * 128
        pixels = np.asarray(sheet.convert("RGB"))
    assert (pixels[18:, 40:] < 250).any(axis=2).mean() > 0.9
