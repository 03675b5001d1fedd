"""The embedded person data set: determinism, layout, atomic writing, and what a picture shows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import warm
from PIL import Image

from relreid_plugin.data import embedded
from relreid_plugin.data.embedded import (
    SPECS,
    EmbeddedPersonsSpec,
    contact_sheet,
    dataset,
    ensure_embedded,
    ensure_embedded_persons,
    plan_embedded_persons,
    render_person,
    sample_identity,
    sample_shot,
)
from relreid_plugin.errors import UserError

REPO = Path(__file__).resolve().parents[2]
SMALL = EmbeddedPersonsSpec(num_train_ids=2, num_test_ids=2, num_distractors=3, num_junk=1)
NAME = re.compile(r"^(-1|\d{4})_c([1-6])s1_\d{6}_\d{2}\.jpg$")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_embedded_persons(tmp_path_factory.mktemp("root"), spec=SMALL, workers=1, verbose=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def break_after(monkeypatch: pytest.MonkeyPatch, count: int, error: type[BaseException]) -> None:
    """Let rendering fail after ``count`` images."""
    calls = []

    def failing(who, shot):
        calls.append(1)
        if len(calls) > count:
            raise error("stopped")
        return render_person(who, shot)

    monkeypatch.setattr(dataset, "render_person", failing)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_default_plan_has_the_promised_sizes():
    plan = plan_embedded_persons(SPECS["embedded_persons"])
    split = defaultdict(list)
    for item in plan:
        split[item.split].append(item)
    train = {item.person for item in split["bounding_box_train"]}
    test = {item.person for item in split["query"]}
    gallery = [item for item in split["bounding_box_test"] if not item.stray]
    assert len(train) == len(test) == 110 and not train & test
    assert {item.person for item in gallery} == test
    assert 250 <= len(split["query"]) <= 330
    assert 1150 <= len(gallery) <= 1500
    assert 1350 <= len(split["bounding_box_train"]) <= 1700
    assert sum(item.name.startswith("0000_") for item in plan) == 100
    assert sum(item.name.startswith("-1_") for item in plan) == 12
    assert len({(item.split, item.name) for item in plan}) == len(plan)
    assert all(NAME.match(item.name) for item in plan)


def test_every_identity_is_seen_by_several_cameras_and_every_query_has_a_match_elsewhere():
    plan = [item for item in plan_embedded_persons(SPECS["embedded_persons"], seed=3) if not item.stray]
    shots: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for item in plan:
        shots[item.person][item.camera] += 1
    assert {len(cameras) for cameras in shots.values()} == {3, 4, 5, 6}
    assert {n for cameras in shots.values() for n in cameras.values()} == {2, 3, 4}
    queries = [(item.person, item.camera) for item in plan if item.split == "query"]
    assert len(set(queries)) == len(queries)
    seen = {(item.person, item.camera) for item in plan if item.split == "bounding_box_test"}
    assert all(any(p == person and c != camera for p, c in seen) for person, camera in queries)


def test_identities_are_confusable_on_purpose():
    people = [sample_identity(0, pid) for pid in range(1, 221)]
    outfits = {(p.upper, tuple(np.round(p.upper_colour, 0)), p.lower) for p in people}
    assert len(outfits) < 110  # many share garment, cut and rough colour …
    assert len(set(people)) == 220  # … and none is a twin


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_ids": 0},
        {"num_train_ids": 1500},
        {"min_cameras": 1},
        {"max_cameras": 7},
        {"min_shots": 1},
        {"num_junk": -1},
    ],
)
def test_sizes_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        EmbeddedPersonsSpec(**change)


# --- the bytes -------------------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_process_count_or_run(small, tmp_path):
    again = ensure_embedded_persons(tmp_path, spec=SMALL, workers=2, verbose=False)
    assert contents(again) == contents(small)


def test_bytes_depend_on_seed(small, tmp_path):
    other = ensure_embedded_persons(tmp_path, spec=SMALL, seed=1, workers=1, verbose=False)
    assert (
        json.loads((other / "dataset.json").read_text())["sha256"]
        != json.loads((small / "dataset.json").read_text())["sha256"]
    )


def test_an_image_depends_on_its_key_alone():
    def picture(identity, camera, shot):
        return render_person(sample_identity(0, identity), sample_shot(0, identity, camera, shot))

    first = picture(5, 2, 1)
    picture(9, 3, 0)
    assert first.shape == (128, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, picture(5, 2, 1))
    for other in (picture(6, 2, 1), picture(5, 3, 1), picture(5, 2, 2)):
        assert np.abs(first.astype(int) - other).mean() > 4.0


def test_record_and_images(small):
    record = json.loads((small / "dataset.json").read_text())
    images = sorted((small / dataset.MARKET_FOLDER).rglob("*.jpg"), key=lambda p: p.relative_to(small).as_posix())
    assert record["sha256"] == hashlib.sha256(b"".join(p.read_bytes() for p in images)).hexdigest()
    assert record["version"] == embedded.GENERATOR_VERSION and record["seed"] == 0
    assert record["spec"] == dataclasses.asdict(SMALL)
    assert {s: len(list((small / dataset.MARKET_FOLDER / s).iterdir())) for s in dataset.SPLITS} == record["counts"]
    for path in images:
        with Image.open(path) as picture:
            assert picture.size == (64, 128) and picture.mode == "RGB" and picture.format == "JPEG"


def test_host_reads_the_layout(small):
    market = pytest.importorskip("torchreid.reid.data.datasets.image.market1501")
    persons = type("Persons", (market.Market1501,), {"dataset_dir": small.name})(root=str(small.parent), verbose=False)
    counts = json.loads((small / "dataset.json").read_text())["counts"]
    assert persons.num_train_pids == 2 and len(persons.train) == counts["bounding_box_train"]
    assert len(persons.query) == counts["query"] and len(persons.gallery) == counts["bounding_box_test"] - SMALL.num_junk
    ids = {item[1] for item in persons.gallery}
    assert 0 in ids and {item[1] for item in persons.query} == ids - {0}


# --- what a picture shows ----------------------------------------------------------------------------------------------


def change_share(identity, shot, **changes) -> float:
    """Return the share of pixels that a change of traits changes clearly."""
    bare = dataclasses.replace(shot, occluder="none", shift=(0.0, 0.0), scale=0.9, shadow=0.0, walking=0.3, light=1.0)
    before = render_person(identity, bare).astype(int)
    after = render_person(dataclasses.replace(identity, **changes), bare).astype(int)
    return float((np.abs(before - after).max(axis=2) > 60).mean())


def test_a_backpack_is_seen_from_behind_and_a_print_from_the_front():
    who = dataclasses.replace(
        sample_identity(0, 1),
        upper="tshirt",
        upper_colour=(0.9, 0.9, 0.9),
        upper_accent=(0.1, 0.1, 0.1),
        upper_pattern="plain",
        bag="none",
        bag_colour=(0.05, 0.05, 0.05),
        scarf=False,
        hair_style="short",
        back_print=False,
    )
    shot = sample_shot(0, 1, 0, 0)
    front, back = dataclasses.replace(shot, yaw=0.0), dataclasses.replace(shot, yaw=180.0)
    assert change_share(who, back, bag="backpack") > 0.05
    assert change_share(who, front, bag="backpack") < 0.5 * change_share(who, back, bag="backpack")
    assert change_share(who, front, upper_pattern="logo") > 0.005
    assert change_share(who, back, upper_pattern="logo") == 0.0


def test_shots_of_one_pass_are_alike_and_cameras_differ():
    same, across = [], []
    for pid in range(1, 9):
        who = sample_identity(0, pid)
        views = [[render_person(who, sample_shot(0, pid, c, s)).astype(float) for s in range(2)] for c in range(6)]
        same += [np.abs(a - b).mean() for a, b in views]
        across += [np.abs(views[c][0] - views[(c + 1) % 6][0]).mean() for c in range(6)]
    assert np.mean(same) < 0.6 * np.mean(across)


def test_a_picture_without_a_person_shows_the_scene():
    shot = dataclasses.replace(sample_shot(0, 1, 1, 0), occluder="none", shift=(0.0, 0.0), scale=0.9)
    empty, taken = render_person(None, shot).astype(int), render_person(sample_identity(0, 1), shot).astype(int)
    changed = np.abs(empty - taken).max(axis=2) > 40
    assert changed[20:110, 22:42].mean() > 0.5 and changed[:, :6].mean() < 0.1


# --- writing -----------------------------------------------------------------------------------------------------------


def test_a_complete_folder_is_reused_untouched(small, monkeypatch):
    stamps = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    break_after(monkeypatch, 0, RuntimeError)
    assert ensure_embedded_persons(small.parent, spec=SMALL, verbose=False) == small
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == stamps


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_generation_that_fails_leaves_nothing(small, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        break_after(patch, 5, error)
        with pytest.raises(error):
            ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
    assert list(tmp_path.iterdir()) == []
    assert contents(ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)) == contents(small)


def test_a_killed_generation_leaves_nothing_that_looks_complete(small, tmp_path):
    script = (
        "import os, sys\n"
        "from relreid_plugin.data.embedded import EmbeddedPersonsSpec, dataset\n"
        "dataset._digest = lambda folder: os._exit(9)\n"
        "spec = EmbeddedPersonsSpec(num_train_ids=2, num_test_ids=2, num_distractors=3, num_junk=1)\n"
        "dataset.ensure_embedded_persons(sys.argv[1], spec=spec, workers=1, verbose=False)\n"
    )
    assert subprocess.run([warm.python(), "-c", script, str(tmp_path)], cwd=REPO, timeout=60).returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".embedded_persons.new-")
    os.utime(left, (0, 0))
    folder = ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
    assert contents(folder) == contents(small)
    assert list(tmp_path.iterdir()) == [folder]


def test_another_version_is_replaced_only_once_the_new_one_is_complete(small, tmp_path, monkeypatch):
    folder = ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
    record = json.loads((folder / "dataset.json").read_text()) | {"version": -1}
    (folder / "dataset.json").write_text(json.dumps(record))
    old = contents(folder)
    with monkeypatch.context() as patch:
        break_after(patch, 5, RuntimeError)
        with pytest.raises(RuntimeError):
            ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
    assert contents(folder) == old and list(tmp_path.iterdir()) == [folder]
    ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
    assert contents(folder) == contents(small) and list(tmp_path.iterdir()) == [folder]


def test_a_damaged_folder_is_completed(small, tmp_path):
    folder = ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
    next((folder / dataset.MARKET_FOLDER / "query").iterdir()).unlink()
    ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
    assert contents(folder) == contents(small)


@pytest.mark.parametrize("record", [None, "{}", "no json", '{"generator": "somebody else"}'])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, record):
    folder = tmp_path / "embedded_persons"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    if record is not None:
        (folder / "dataset.json").write_text(record)
    before = contents(folder)
    with pytest.raises(UserError, match="was not made by the generator"):
        ensure_embedded_persons(tmp_path, spec=SMALL, verbose=False)
    assert contents(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_the_first_of_two_generations_wins(small, tmp_path, monkeypatch):
    render_all, inner = dataset._render_all, []

    def overtaken(*args):
        render_all(*args)
        if not inner:
            inner.append(1)
            ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
            inner.append({p: p.stat().st_ino for p in (tmp_path / "embedded_persons").rglob("*")})

    monkeypatch.setattr(dataset, "_render_all", overtaken)
    folder = ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
    assert {p: p.stat().st_ino for p in folder.rglob("*")} == inner[1]
    assert contents(folder) == contents(small) and list(tmp_path.iterdir()) == [folder]


def test_generations_at_the_same_time_do_not_clash(small, tmp_path):
    errors = []

    def generate():
        try:
            ensure_embedded_persons(tmp_path, spec=SMALL, workers=1, verbose=False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert contents(tmp_path / "embedded_persons") == contents(small)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the embedded data set"):
        ensure_embedded_persons(tmp_path / "file" / "root", spec=SMALL, verbose=False)


def test_names_and_seeds_are_checked(tmp_path):
    with pytest.raises(UserError, match="did you mean 'embedded_persons_tiny'"):
        ensure_embedded("embedded_person_tiny", tmp_path)
    with pytest.raises(UserError, match="must not be negative, got -1"):
        ensure_embedded("embedded_persons", tmp_path, seed=-1)
    assert list(tmp_path.iterdir()) == []


# --- contact sheet and command line --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_line_writes_the_tiny_set_and_its_sheet(tmp_path):
    command = [warm.python(), str(REPO / "tools" / "make_embedded.py"), "--root", str(tmp_path)]
    done = subprocess.run(
        [*command, "--name", "embedded_persons_tiny", "--sheet", str(tmp_path / "sheet.png")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "embedded_persons_tiny" / "dataset.json").read_text())
    assert record["spec"] == dataclasses.asdict(SPECS["embedded_persons_tiny"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 12 * 64 and sheet.height > 8 * 128
    wrong = subprocess.run([*command, "--name", "vehicles"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: there is no embedded data set 'vehicles'")


def test_contact_sheet_needs_images(tmp_path):
    with pytest.raises(UserError, match="holds no images in the layout of Market-1501"):
        contact_sheet(tmp_path, tmp_path / "sheet.png")
