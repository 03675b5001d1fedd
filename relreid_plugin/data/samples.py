"""Samples of several images: what the readers of layouts put together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import UserError
from .files import one_per_file
from .images import is_image_name
from .labels import numeric_order, plain
from .split import NO_CAMERAS_NOTE, Record, number_identities
from .views import Source, require_known

Sample = tuple[Source, int, int]

MODALITIES = {"R": "visible", "N": "near infrared", "T": "thermal"}

SCENE_NOTE = "a gallery image of the query's identity and scene is discarded (the scene stands in for the camera)"

OWN_IMAGE_NOTE = "no camera labels, and every test sample is query and gallery: a query's own image alone is discarded"

_STRIP_SPLITS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


@dataclass
class MultimodalSplits:
    """A multimodal data set.

    Attributes:
        modalities: Names of the modalities, in the order of the views in a strip or of the paths in a source.
        train: ``(source, label, camid)``; labels are 0 … C-1 in the sorted order of the identities.
        query: ``(source, pid, camid)``.
        gallery: ``(source, pid, camid)``.
        has_cameras: Whether camera (or scene) labels were given. Without them, queries have camera 0 and gallery images
            camera 1, so that nothing is discarded; where query and gallery are the same samples, each has a camera of its
            own, so that a query does not find itself.
        train_identities: The identity of every training label, as it is written in the data set.
        notes: Sentences that a user should see.
        group: What ``camid`` counts, ``camera`` or ``scene``; gallery images of the query's identity and group are
            discarded.
        shared_identities: Identities that are trained on and tested on, as they are written.
        identity_names: What is written for every ``pid`` that is not itself the number that is written.
    """

    modalities: tuple[str, ...]
    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]
    has_cameras: bool
    train_identities: list[str]
    notes: list[str] = field(default_factory=list)
    group: str = "camera"
    shared_identities: list[str] = field(default_factory=list)
    identity_names: dict[int, str] = field(default_factory=dict)

    def sources(self) -> list[Source]:
        """Return every source of the data set once, training samples first."""
        return list(dict.fromkeys(sample[0] for part in (self.train, self.query, self.gallery) for sample in part))


@dataclass(frozen=True)
class _Sample:
    source: Source
    identity: str
    camera: str | None

    @property
    def place(self) -> str:
        return self.source if isinstance(self.source, str) else self.source[0]


def _assemble(
    splits: dict[str, list[_Sample]],
    modalities: tuple[str, ...],
    *,
    group: str = "camera",
    ordered: bool = False,
    first_camera: int | None = None,
    same_test: bool = False,
) -> MultimodalSplits:
    """Number identities and cameras; ``first_camera`` None: 0 where a camera 0 is there, else 1."""
    if not ordered:
        splits = {split: sorted(samples, key=lambda sample: sample.source) for split, samples in splits.items()}
    splits, further = _one_per_file(splits)
    everything = [sample for samples in splits.values() for sample in samples]
    with_camera = next((sample for sample in everything if sample.camera is not None), None)
    without = next((sample for sample in everything if sample.camera is None), None)
    if with_camera is not None and without is not None:
        raise UserError(
            f"sample '{without.place}' has no camera, but '{with_camera.place}' has one; give all samples a camera, or none."
        )
    if first_camera is None:
        zero = any(sample.camera is not None and plain(sample.camera) == "0" for sample in everything)
        first_camera = 0 if group == "scene" or zero else 1
    sources = [sample.source for samples in splits.values() for sample in samples]
    numbers = iter(range(len(sources)))
    # the numbering works on records of paths: the place in `sources` stands for the path
    records = {
        split: [Record(str(next(numbers)), sample.identity, sample.camera) for sample in samples]
        for split, samples in splits.items()
    }
    places = [sample.place for samples in splits.values() for sample in samples]
    numbered = number_identities(records, first_camera=first_camera, places=places)
    train, query, gallery = (
        [(sources[int(key)], pid, camid) for key, pid, camid in part]
        for part in (numbered.train, numbered.query, numbered.gallery)
    )
    notes = [*further, *numbered.notes]
    if same_test and not numbered.has_cameras:
        own = {source: number for number, (source, _, _) in enumerate(gallery)}
        query = [(source, pid, own[source]) for source, pid, _ in query]
        gallery = [(source, pid, own[source]) for source, pid, _ in gallery]
        notes = [OWN_IMAGE_NOTE if note == NO_CAMERAS_NOTE else note for note in notes]
    if group == "scene":
        notes.append(SCENE_NOTE)
    return MultimodalSplits(
        modalities=modalities,
        train=train,
        query=query,
        gallery=gallery,
        has_cameras=numbered.has_cameras,
        train_identities=numbered.train_identities,
        notes=notes,
        group=group,
        shared_identities=numbered.shared_identities,
        identity_names=numbered.identity_names,
    )


def _one_per_file(splits: dict[str, list[_Sample]]) -> tuple[dict[str, list[_Sample]], list[str]]:
    """Let the same real files count once in a split, with a note for every split where they do not."""
    kept, notes = {}, list[str]()
    for split, samples in splits.items():
        kept[split], more = one_per_file(
            samples, lambda sample: sample.source, lambda sample: sample.identity, f"{split} samples"
        )
        notes += more
    return kept, notes


def _number_scenes(splits: dict[str, list[_Sample]]) -> dict[str, list[_Sample]]:
    """Number scenes 0, 1, … in their order over all splits."""
    scenes = {plain(sample.camera) for samples in splits.values() for sample in samples if sample.camera is not None}
    numbers = {scene: str(number) for number, scene in enumerate(sorted(scenes, key=numeric_order))}
    return {
        split: [replace(sample, camera=numbers[plain(sample.camera)]) for sample in samples if sample.camera is not None]
        for split, samples in splits.items()
    }


def _select(splits: MultimodalSplits, modalities: Sequence[str] | None, place: Path) -> MultimodalSplits:
    """Keep the modalities that are asked for, in their order; every source is a tuple."""
    if modalities is None or tuple(modalities) == splits.modalities:
        return splits
    kept = _check_modalities(modalities)
    require_known(kept, splits.modalities, f"data set '{place}'")
    places = [splits.modalities.index(name) for name in kept]

    def keep(part: list[Sample]) -> list[Sample]:
        return [(tuple(source[index] for index in places), pid, camid) for source, pid, camid in part]

    return replace(splits, modalities=kept, train=keep(splits.train), query=keep(splits.query), gallery=keep(splits.gallery))


def _check_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    names = (modalities,) if isinstance(modalities, str) else tuple(str(name) for name in modalities)
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"key 'multimodal.modalities' is [{', '.join(names)}]; it must name one or more modalities, each "
            "once, such as [R, N]."
        )
    return names


def _existing(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"data set folder '{folder}' does not exist; put the data set there, or set 'data.root'.")
    return folder


def _split_folder(folder: Path, name: str, layout: str) -> Path:
    if not (folder / name).is_dir():
        raise UserError(f"data set '{folder}' has no folder '{name}'; the layout is {layout}.")
    return folder / name


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [folder / name for name in sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))]


def _list_images(folder: Path) -> list[Path]:
    """List what is named like an image, also where it is no regular file: its reader says so."""
    with os.scandir(folder) as entries:
        return [folder / name for name in sorted(e.name for e in entries if is_image_name(e.name) and not e.is_dir())]


def _require_samples(samples: Sequence[object], place: Path) -> None:
    if not samples:
        raise UserError(f"folder '{place}' has no images; every split needs samples.")
