"""Images that a proof compares on, and that int8 is calibrated with: of a run's test set, rendered ones, or any folder."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.cameras import UNKNOWN, CameraRows
from ..data.images import read_image
from ..data.ranges import Range
from ..engine.inference import data_config, open_images
from ..errors import UserError, did_you_mean
from ..host import make_loader
from ..methods import takes_several
from ..search.extractor import list_images, name_labels

EMBEDDED = "embedded_persons_tiny"
Item = tuple[Any, int, int, int]


@dataclass(frozen=True)
class Samples:
    """Images in two parts, of which one is searched for in the other.

    Attributes:
        name: What they are, in words.
        query, gallery: The host's tuples (path(s), identity, camera, data set).
        left_out: How many there were beyond those taken.
        cameras: Rows of a camera embedding for their cameras.
    """

    name: str
    query: list[Item]
    gallery: list[Item]
    left_out: int = 0
    cameras: CameraRows = UNKNOWN

    def __len__(self) -> int:
        return len(self.query) + len(self.gallery)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return ``count`` items at even distances, in order; all of them where there are no more."""
    if count >= len(items):
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, count).round()]


def some(samples: Samples, most: int) -> Samples:
    """Return a part of the samples: a quarter queries, their matches, and other gallery images, spread over the whole.

    Args:
        samples: All.
        most: How many are taken at most; 0: all.
    """
    if not most or len(samples) <= most:
        return samples
    query = spread(samples.query, max(1, most // 4))
    wanted = {item[1] for item in query}
    places = range(len(samples.gallery))
    matches = [place for place in places if samples.gallery[place][1] in wanted]
    others = [place for place in places if samples.gallery[place][1] not in wanted]
    room = most - len(query)
    kept = spread(matches, room)
    kept += spread(others, room - len(kept)) if room > len(kept) else []
    gallery = [samples.gallery[place] for place in sorted(kept)]
    return dataclasses.replace(samples, query=query, gallery=gallery, left_out=len(samples) - len(query) - len(gallery))


def folder_samples(sources: Sequence[str | Path]) -> Samples:
    """Return the images of folders, each searched for among all others; identities and cameras by names where they tell.

    Raises:
        UserError: No image, or a single one.
    """
    files = list_images(list(sources))
    if len(files) < 2:
        raise UserError(f"'{sources[0]}' holds a single image; two or more are needed to compare rankings.")
    known: dict[Any, int] = {}
    cameras: dict[Any, int] = {}
    items: list[Item] = []
    for path in files:
        _, pid, camid = name_labels(path)
        own = -1 if pid == -1 else known.setdefault(pid, len(known))
        items.append((path, own, -1 if camid == -1 else cameras.setdefault(camid, len(cameras)), 0))
    name = f"{len(files)} images of '{sources[0]}'" + (" and others" if len(sources) > 1 else "")
    if len(known) == 0:  # each image is an identity of its own: no match, but first places
        items = [(path, number, -1, 0) for number, (path, *_) in enumerate(items)]
    return Samples(name, items, items)


@contextmanager
def run_samples(run: Any, *, images: Sequence[str] = (), target: str = "") -> Iterator[Samples]:
    """Give the samples for a run's proof: named folders, else a test set of the run, else rendered persons.

    Args:
        run: An open run.
        images: Folders or files.
        target: One of the run's test sets; empty: the first one.

    Raises:
        UserError: No such test set, or images for a model of several modalities.
    """
    cfg = run.cfg
    if images:
        if takes_several(cfg):
            raise UserError("--images names single images, but this model takes several modalities; leave it out.")
        yield folder_samples(images)
        return
    targets = list(cfg.data.targets)
    if target and target not in targets:
        raise UserError(f"'{target}' is no test set of run '{run.folder}'{did_you_mean(target, targets)}")
    name = target or targets[0]
    try:
        sets = run.datamanager.test_dataset[name]
    except UserError as error:
        if target or takes_several(cfg):
            raise
        print(f"note: test set '{name}' cannot be read here, and rendered persons are compared instead ({error})")
    else:
        yield Samples(f"test set '{name}'", list(sets["query"]), list(sets["gallery"]), cameras=run.features.cameras(name))
        return
    with rendered() as found:
        yield found


@contextmanager
def image_sets(images: Sequence[str], target: str, overrides: Sequence[str], cache_dir: Path) -> Iterator[Samples]:
    """Give the samples for the proof of a network that is no run: named folders, else a data set, else rendered persons.

    Args:
        images: Folders or files.
        target: A registered data set, a folder with splits, or a CSV file; empty: none.
        overrides: ``KEY VALUE …`` that say where it is.
        cache_dir: Where what cannot be written beside it is put.

    Raises:
        UserError: No such data set.
    """
    if images:
        yield folder_samples(images)
    elif target:
        from .. import register

        register()
        dataset = open_images(data_config(overrides), target, cache_dir)
        yield Samples(f"test set '{target}'", list(dataset.query), list(dataset.gallery))
    else:
        with rendered() as found:
            yield found


@contextmanager
def rendered() -> Iterator[Samples]:
    """Give the rendered persons, for as long as the block lasts."""
    from ..data.embedded import MARKET_FOLDER, ensure_embedded

    with tempfile.TemporaryDirectory() as root:
        folder = ensure_embedded(EMBEDDED, Path(root), verbose=False) / MARKET_FOLDER
        parts = [
            [(path, pid, camid, 0) for path, pid, camid in map(name_labels, list_images([folder / part]))]
            for part in ("query", "bounding_box_test")
        ]
        yield Samples(f"rendered persons ('{EMBEDDED}')", *parts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Batch:
    """Some samples, as a network sees them.

    Attributes:
        images: (B, 3, h, w) or (B, M, 3, h, w) float32, normalised.
        pids, camids: (B,).
        rows: (B,) rows of the camera embedding, -1 where unknown.
        paths: B files.
    """

    images: Tensor
    pids: np.ndarray
    camids: np.ndarray
    rows: Tensor
    paths: list[str]


def batches(run: Any, items: Sequence[Item], cameras: CameraRows, *, batch_size: int = 0) -> Iterator[Batch]:
    """Yield samples in order, read and normalised as the run tests.

    Args:
        run: An open run.
        items: The host's tuples.
        cameras: Rows of the model's camera embedding.
        batch_size: 0: ``test.batch_size``.
    """
    cfg, manager = run.cfg, run.datamanager
    loader = make_loader(manager, items, manager.transform_te, batch_size or cfg.test.batch_size, cfg.data.workers)
    place = 0
    for data in loader:
        images = data["img"]
        part = items[place : place + len(images)]
        place += len(images)
        camids = np.asarray(data["camid"])
        files = [str(item[0] if isinstance(item[0], (str, Path)) else item[0][0]) for item in part]
        yield Batch(images, np.asarray(data["pid"]), camids, cameras(torch.as_tensor(camids)), files)


def photos(paths: Sequence[str], pixel_range: Range | None) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield photos of one size at a time: their places, and (B, H, W, 3) bytes."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    pixels = [np.asarray(read_image(path, pixel_range)) for path in paths]
    for place, photo in enumerate(pixels):
        sizes.setdefault(photo.shape, []).append(place)
    for places in sizes.values():
        yield places, np.stack([pixels[place] for place in places])


__all__ = ["Batch", "Samples", "batches", "folder_samples", "image_sets", "photos", "run_samples", "some", "spread"]
