"""Writing an embedded data set once, atomically, and the person data set in the layout of Market-1501."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ...errors import UserError, did_you_mean
from ...files import is_abandoned, shown, try_lock, unlock, write_error
from ...processes import end_with
from ...reading import read_text
from .render import render_person
from .traits import CAMERAS, generator, sample_identity, sample_shot

GENERATOR = "relreid_plugin embedded persons"
GENERATOR_VERSION = 3
"""Goes up with every change of a rendered byte; a folder of another version is generated anew."""
MARKET_FOLDER = "Market-1501-v15.09.15"
SPLITS = ("bounding_box_train", "query", "bounding_box_test")
JPEG_QUALITY = 90

_ASSIGNMENT, _PRESENCE, _QUERIES, _STRAY = 20, 21, 22, 23
_TURN = 0.2  # seconds between looks at what others are building
_STRAYS = 50_000  # person numbers from here on only appear in failed detections


@dataclass(frozen=True)
class EmbeddedPersonsSpec:
    """Size of an embedded person data set.

    Raises:
        UserError: A number is out of range; the message names it.
    """

    num_train_ids: int = 110
    num_test_ids: int = 110
    num_distractors: int = 100  # failed detections in the gallery, pid 0: they count as wrong
    num_junk: int = 12  # badly cut boxes in the gallery, pid -1: they are ignored
    min_cameras: int = 3  # cameras that see an identity
    max_cameras: int = 6
    min_shots: int = 2  # shots of an identity by a camera
    max_shots: int = 4

    def __post_init__(self) -> None:
        if self.num_train_ids < 1 or self.num_test_ids < 1 or self.num_train_ids + self.num_test_ids > 1501:
            raise UserError(
                "EmbeddedPersonsSpec: num_train_ids and num_test_ids must be at least 1 and together at most 1501 "
                f"(Market-1501's identity numbers), got {self.num_train_ids} and {self.num_test_ids}."
            )
        if not 2 <= self.min_cameras <= self.max_cameras <= len(CAMERAS):
            raise UserError(
                f"EmbeddedPersonsSpec: 2 <= min_cameras <= max_cameras <= {len(CAMERAS)} must hold, "
                f"got {self.min_cameras} and {self.max_cameras}."
            )
        if not 2 <= self.min_shots <= self.max_shots <= 9:
            raise UserError(
                "EmbeddedPersonsSpec: 2 <= min_shots <= max_shots <= 9 must hold, "
                f"got {self.min_shots} and {self.max_shots}."
            )
        if self.num_distractors < 0 or self.num_junk < 0:
            raise UserError(
                "EmbeddedPersonsSpec: num_distractors and num_junk must not be negative, "
                f"got {self.num_distractors} and {self.num_junk}."
            )


SPECS: dict[str, EmbeddedPersonsSpec] = {
    "embedded_persons": EmbeddedPersonsSpec(),
    "embedded_persons_tiny": EmbeddedPersonsSpec(num_train_ids=8, num_test_ids=8, num_distractors=6, num_junk=2),
}
"""The named data sets; a name is also the folder's."""


@dataclass(frozen=True)
class PlannedImage:
    """One image to render: where it goes and the key it is rendered from."""

    split: str
    name: str
    person: int  # person number; -1: nobody
    camera: int  # index into CAMERAS
    shot: int
    stray: bool  # a failed detection


def plan_embedded_persons(spec: EmbeddedPersonsSpec, seed: int = 0) -> list[PlannedImage]:
    """Return all images of the data set, sorted by split and name, without rendering any.

    Train and test identities share no number. A test identity gives one query for each of two or three of the cameras
    that saw it; all its other images are in the gallery, so every query has matches by other cameras.
    """
    count = spec.num_train_ids + spec.num_test_ids
    order = generator(seed, _ASSIGNMENT, spec.num_train_ids, spec.num_test_ids).permutation(count) + 1
    train_ids = {int(pid) for pid in order[: spec.num_train_ids]}
    plan: list[PlannedImage] = []
    for pid in range(1, count + 1):
        rng = generator(seed, _PRESENCE, pid)
        cameras = rng.permutation(len(CAMERAS))[: int(rng.integers(spec.min_cameras, spec.max_cameras + 1))]
        query_rng = generator(seed, _QUERIES, pid)
        query_cameras = cameras[: int(query_rng.integers(2, 4))]
        for camera in sorted(int(c) for c in cameras):
            shots = int(rng.integers(spec.min_shots, spec.max_shots + 1))
            frame = int(rng.integers(1, 100_000))
            chosen = int(query_rng.integers(shots)) if camera in query_cameras else -1
            for shot in range(shots):
                name = f"{pid:04d}_c{camera + 1}s1_{frame + 25 * shot:06d}_{shot + 1:02d}.jpg"
                split = "bounding_box_train" if pid in train_ids else ("query" if shot == chosen else "bounding_box_test")
                plan.append(PlannedImage(split, name, pid, camera, shot, False))
    for label, number in (("0000", spec.num_distractors), ("-1", spec.num_junk)):
        for index in range(number):
            rng = generator(seed, _STRAY, int(label == "-1"), index)
            camera, frame = int(rng.integers(len(CAMERAS))), int(rng.integers(1, 100_000))
            nobody = bool(rng.random() < 0.3)
            person = -1 if nobody else _STRAYS + int(rng.integers(400))
            name = f"{label}_c{camera + 1}s1_{frame:06d}_{index:02d}.jpg"
            plan.append(PlannedImage("bounding_box_test", name, person, camera, index, True))
    return sorted(plan, key=lambda item: (item.split, item.name))


def _write_image(job: tuple[str, int, PlannedImage]) -> None:
    folder, seed, item = job
    who = None if item.person < 0 else sample_identity(seed, item.person)
    shot = sample_shot(seed, _STRAYS if who is None else item.person, item.camera, item.shot, stray=item.stray)
    Image.fromarray(render_person(who, shot)).save(
        Path(folder) / MARKET_FOLDER / item.split / item.name, "JPEG", quality=JPEG_QUALITY
    )


def _render_all(write: Callable[[Any], None], jobs: Sequence[Any], workers: int, label: str, verbose: bool) -> None:
    disable = None if verbose else True

    def progress(done: Iterable[None]) -> Iterator[None]:
        return iter(tqdm(done, total=len(jobs), desc=f"rendering {label}", unit="img", disable=disable))

    if workers <= 1:
        for _ in progress(map(write, jobs)):
            pass
        return
    context, parent = get_context("fork"), os.getpid()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with, initargs=(parent,)) as pool:
        try:
            for _ in progress(pool.map(write, jobs, chunksize=16)):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _default_workers(images: int) -> int:
    """Return 1 for a small set or where processes cannot be forked, else up to 4 of the cores this process may use."""
    if images < 400 or "fork" not in get_all_start_methods():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(4, cores)


def _digest(folder: Path) -> str:
    """Return the SHA-256 of all images' bytes below ``folder``, one after the other in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.jpg"), key=lambda p: p.relative_to(folder).as_posix()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_record(folder: Path, maker: str) -> dict | None:
    """Return what ``dataset.json`` says, or ``None`` when the generator ``maker`` did not make this folder."""
    try:
        record = json.loads(read_text(folder / "dataset.json"))
    except (UserError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("generator") == maker else None


def _is_current(folder: Path, wanted: dict, images: str) -> bool:
    """Tell whether ``folder`` holds the wanted data set with all its files."""
    record = _read_record(folder, wanted["generator"])
    if record is None or any(record.get(key) != value for key, value in wanted.items()):
        return False
    return all(len(list((folder / images / split).glob("*.jpg"))) == count for split, count in wanted["counts"].items())


def _is_free(folder: Path) -> bool:
    """Tell whether nothing, or an empty folder, stands at ``folder``."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


def _refuse_foreign(folder: Path, maker: str) -> None:
    if not _is_free(folder) and _read_record(folder, maker) is None:
        raise UserError(
            f"'{folder}' exists but was not made by the generator of the embedded data set; "
            "move it away or choose another data.root."
        )


_own: set[Path] = set()  # folders that this process is building


@contextmanager
def _sibling(folder: Path, purpose: str) -> Iterator[Path]:
    """Give a new hidden folder beside ``folder``, locked while it is used, and remove whatever is left of it in the end."""
    handle = None
    while handle is None:
        path = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{purpose}-{time.time_ns():020d}-", dir=folder.parent))
        _own.add(path)
        if sys.platform == "win32":
            break
        with suppress(FileNotFoundError):  # taken for a leftover before it was locked
            handle = os.open(path, os.O_RDONLY)
            try_lock(handle)
            if not path.exists():
                unlock(handle)
                handle = None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _own.discard(path)
        if handle is not None:
            unlock(handle)


def _others(folder: Path) -> list[Path]:
    """What other processes are building beside ``folder``; what killed ones left is removed."""
    found = []
    for path in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*-*")):
        if path in _own:
            continue
        try:
            if is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                found.append(path)
        except OSError:
            continue
    return found


def _wait_for_others(folder: Path, own: Path, verbose: bool) -> None:
    """Wait until no process builds ``folder`` that began before this one did."""
    said = not verbose
    while any(path.name < own.name for path in _others(folder) if f".{folder.name}.new-" in path.name):
        if not said:
            print(f"another process is rendering '{folder}'; waiting for it", file=sys.stderr)
            said = True
        time.sleep(_TURN)


def _publish(built: Path, folder: Path, wanted: dict, images: str) -> None:
    """Move a complete data set to its final place, unless someone else has put the same one there meanwhile."""
    for _ in range(3):
        if _is_current(folder, wanted, images):
            return
        _refuse_foreign(folder, wanted["generator"])
        try:
            if _is_free(folder):
                os.rename(built, folder)
                return
            with _sibling(folder, "old") as grave:
                os.rename(folder, grave / folder.name)
                try:
                    os.rename(built, folder)
                except OSError:
                    if _is_free(folder):
                        os.rename(grave / folder.name, folder)
                    raise
                return
        except OSError:
            if not built.exists():
                raise
    if not _is_current(folder, wanted, images):
        raise OSError(f"cannot rename '{built}' to '{folder}'")


def write_once(
    folder: Path,
    wanted: dict,
    images: str,
    write: Callable[[Any], None],
    jobs: Callable[[Path], Sequence[Any]],
    *,
    workers: int | None = None,
    verbose: bool = True,
) -> Path:
    """Return ``folder`` with the wanted data set in it, rendering it unless it is there already.

    The folder is built beside its final place and renamed when complete; ``dataset.json`` in it holds ``wanted`` and a
    SHA-256 of all images. A complete folder of the same record is used as it is; another one made by the same generator
    is replaced once the new one is complete. Where another process is building it already, that one is waited for.

    Args:
        folder: Where the data set goes.
        wanted: The record: ``generator``, ``version``, whatever else the bytes depend on, and ``counts``, the number of
            images per split.
        images: Folder below ``folder`` that holds the splits.
        write: Renders one image from its job.
        jobs: Maps the folder being built to the jobs of all images.
        workers: Processes that render; ``None``: up to 4, fewer for a small set. The bytes do not depend on it.
        verbose: Show a progress bar when standard error is a terminal.

    Raises:
        UserError: ``folder`` cannot be written, or was not made by the generator (it is left untouched).
    """
    if _is_current(folder, wanted, images):
        return folder
    _refuse_foreign(folder, wanted["generator"])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _others(folder)
        with _sibling(folder, "new") as temporary:
            _wait_for_others(folder, temporary, verbose)
            if _is_current(folder, wanted, images):
                return folder
            built = temporary / folder.name
            for split in wanted["counts"]:
                (built / images / split).mkdir(parents=True)
            todo = jobs(built)
            _render_all(write, todo, _default_workers(len(todo)) if workers is None else workers, folder.name, verbose)
            record = wanted | {"sha256": _digest(built / images)}
            (built / "dataset.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            _publish(built, folder, wanted, images)
    except OSError as error:
        found = write_error(error, folder)
        reason = str(found or error).rstrip(".")
        raise UserError(
            f"cannot write the embedded data set to '{shown(folder)}': {reason}; choose a data.root that is writable and "
            "has room."
        ) from error
    return folder


def ensure_embedded_persons(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    spec: EmbeddedPersonsSpec = SPECS["embedded_persons"],
    name: str = "embedded_persons",
    workers: int | None = None,
    verbose: bool = True,
) -> Path:
    """Return the folder of the embedded person data set, rendering it on first use.

    A complete folder of the same version, seed and sizes is used as it is; see :func:`write_once`.

    Args:
        root: Folder that holds data sets; made when missing.
        seed: World seed, not negative.
        spec: Sizes.
        name: Name of the folder under ``root``.
        workers: Processes that render; ``None``: up to 4, fewer for a small set. The bytes do not depend on it.
        verbose: Show a progress bar when standard error is a terminal.

    Returns:
        ``root/name``, which holds ``Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}``.

    Raises:
        UserError: ``seed`` is negative, ``root`` cannot be written, or ``root/name`` was not made by the generator (it
            is left untouched).
    """
    if seed < 0:
        raise UserError(f"the seed of the embedded data set must not be negative, got {seed}.")
    folder = Path(root).expanduser().absolute() / name
    plan = plan_embedded_persons(spec, seed)
    wanted = {
        "generator": GENERATOR,
        "version": GENERATOR_VERSION,
        "seed": seed,
        "spec": asdict(spec),
        "counts": {split: sum(item.split == split for item in plan) for split in SPLITS},
    }
    return write_once(
        folder,
        wanted,
        MARKET_FOLDER,
        _write_image,
        lambda built: [(str(built), seed, item) for item in plan],
        workers=workers,
        verbose=verbose,
    )


def ensure_embedded(name: str, root: str | os.PathLike[str], *, seed: int = 0, verbose: bool = True) -> Path:
    """Return the folder of a named embedded data set (a key of :data:`SPECS`) under ``root``, rendering it on first use.

    Raises:
        UserError: The name is unknown, or as :func:`ensure_embedded_persons` does.
    """
    if name not in SPECS:
        raise UserError(f"there is no embedded data set '{name}'{did_you_mean(name, SPECS)}")
    return ensure_embedded_persons(root, seed=seed, spec=SPECS[name], name=name, verbose=verbose)
