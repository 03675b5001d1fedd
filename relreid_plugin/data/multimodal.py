"""Data sets whose samples are seen by several cameras at once: visible, near-infrared and thermal views of one scene.

A modality has a short name: ``R`` (visible), ``N`` (near infrared), ``T`` (thermal); a table may name others. A sample's
*source* is either the path of a strip (all modalities of the data set side by side, all equally wide) or a tuple of paths,
one for each modality, in the order of the data set's modalities.

Layouts (:func:`read_any` tells them apart):

========== ===========================================================================================================
strips     ``[rgbir/]{bounding_box_train,query,bounding_box_test}/ID_cC_….jpg`` (RGBNT100, RGBN300)
rgbnt201   ``{train_171,test}/{RGB,NI,TI}/ID_camC_….jpg``; every test sample is query and gallery
msvr310    ``{bounding_box_train,query3,bounding_box_test}/ID/{vis,ni,th}/ID_sSSS_vV_….jpg``
wmveid863  ``{train,query,test}/{vis,ni,th}/ID_camC_….jpg``, or ``{train,query,test}/ID/{vis,ni,th}/…vC….jpg``
released   ``{train,query,gallery}/{R,N,T}/ID/NAME.jpg``; ``test`` instead of ``query`` and ``gallery`` is both
table      a CSV file ``pid,split,[camid,][scene,]R,N,T``
========== ===========================================================================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from .labels import plain
from .multimodal_table import read_multimodal_table
from .names import NamePattern, ReadName, check_names
from .samples import (
    _STRIP_SPLITS,
    MODALITIES,
    MultimodalSplits,
    _assemble,
    _check_modalities,
    _existing,
    _list_images,
    _number_scenes,
    _require_samples,
    _Sample,
    _select,
    _split_folder,
    _subfolders,
)
from .strips import _guess_modalities, _strip_mistake
from .views import (
    ModalityStatistics,
    Source,
    check_samples,
    incomplete_sample,
    map_files,
    modality_statistics,
    raise_incomplete,
    read_views,
    statistics_yaml,
)

DATASET_FOLDERS: dict[str, tuple[str, ...]] = {
    "rgbnt100": ("RGBNT100",),
    "rgbn300": ("RGBN300",),
    "rgbnt201": ("RGBNT201",),
    "msvr310": ("MSVR310",),
    "wmveid863": ("WMVEID863", "MSVWild863"),
}
"""The folder of every published data set below ``data.root``, with other names that it is found under."""


_MSVR_SPLITS = {"train": "bounding_box_train", "query": "query3", "gallery": "bounding_box_test"}
_WMVEID_SPLITS = {"train": "train", "query": "query", "gallery": "test"}
_RGBNT201_FOLDERS = {"R": "RGB", "N": "NI", "T": "TI"}
_VIS_FOLDERS = {"R": "vis", "N": "ni", "T": "th"}

_STRIP_NAME = re.compile(r"(?P<identity>-?\d+)_c(?P<camera>\d+)")
_CAM_NAME = re.compile(r"(?P<identity>-?\d+)_cam(?P<camera>\d+)")
_SCENE_NAME = re.compile(r"(?P<identity>-?\d+)_s(?P<camera>\d+)_v\d+")  # the scene takes the camera's place
_CAMERA_IN_NAME = re.compile(r"(?:^|_)c(?:am)?(?P<camera>\d+)")
_VIEWPOINT_IN_NAME = re.compile(r"v(?P<camera>\d)")


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def find_folder(root: str | Path, names: Sequence[str]) -> Path:
    """Return the first folder ``<root>/<name>`` that exists; the case of letters counts only where both are there.

    Args:
        root: ``data.root``.
        names: The names that the folder is found under, the usual one first.

    Raises:
        UserError: There is none; the sentence says where it was looked for.
    """
    root = Path(root).expanduser()
    for name in names:
        if (root / name).is_dir():
            return root / name
    lowered = {name.lower() for name in names}
    if root.is_dir():
        for entry in sorted(os.listdir(root)):
            if entry.lower() in lowered and (root / entry).is_dir():
                return root / entry
    looked = " or ".join(f"'{root / name}'" for name in names)
    raise UserError(
        f"data set folder {looked} does not exist; put it there, or set 'data.root' to the folder that holds it."
    )


def find_dataset(root: str | Path, name: str) -> Path:
    """Return the folder or CSV file of a data set.

    Args:
        root: ``data.root``.
        name: A published data set (:data:`DATASET_FOLDERS`), a folder or CSV file in ``root``, or a path.

    Raises:
        UserError: There is none.
    """
    for place in (Path(root).expanduser() / name, Path(name).expanduser()):
        if place.is_dir() or place.is_file():
            return place
    return find_folder(root, DATASET_FOLDERS.get(name.lower(), (name,)))


def read_strips(
    folder: str | Path, modalities: Sequence[str], *, any_aspect: bool = False, pattern: NamePattern | None = None
) -> MultimodalSplits:
    """Read a data set of strips: RGBNT100, RGBN300 and the embedded vehicles.

    The header of every strip is read: the width must divide into one view per modality, each twice as wide as high
    (256 x 128) within 5 %.

    Args:
        folder: Holds ``rgbir/`` with ``bounding_box_train``, ``query`` and ``bounding_box_test``, or these three themselves.
        modalities: Names of the views from left to right.
        any_aspect: Take views of any shape; only the width must divide.
        pattern: How names are written instead of ``ID_cC_….jpg``.

    Raises:
        UserError: A folder is missing or empty, a name holds no identity and camera, or a strip has another number of views.
    """
    folder, modalities = _existing(folder), _check_modalities(modalities)
    base = folder / "rgbir" if (folder / "rgbir").is_dir() else folder
    splits: dict[str, list[_Sample]] = {}
    for split, name in _STRIP_SPLITS.items():
        place = _split_folder(base, name, "rgbir/{bounding_box_train,query,bounding_box_test} with strips ID_cC_….jpg")
        splits[split] = [
            _Sample(str(file), identity, camera)
            for file, identity, camera in _matched(
                _list_images(place), _STRIP_NAME, "ID_cC_….jpg, ID the identity and C the camera", pattern
            )
        ]
        _require_samples(splits[split], place)
    files = [sample.place for samples in splits.values() for sample in samples]
    reasons = map_files(lambda file: _strip_mistake(file, modalities, any_aspect), files, desc="reading strips")
    bad = [reason for reason in reasons if reason]
    if bad:
        more = f" ({len(bad) - 1} more of {len(files)} strips do not fit either)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}.")
    return _assemble(splits, modalities)


def read_rgbnt201(folder: str | Path, pattern: NamePattern | None = None) -> MultimodalSplits:
    """Read RGBNT201: ``{train_171,test}/{RGB,NI,TI}/ID_camC_….jpg``; query and gallery are both ``test``.

    Args:
        folder: The data set's folder.
        pattern: How names are written instead.

    Raises:
        UserError: A folder is missing or empty, a name is no ``ID_camC_…``, or a sample lacks a modality.
    """
    folder = _existing(folder)
    layout = "{train_171,test}/{RGB,NI,TI}/ID_camC_….jpg"
    train = _read_modality_folders(_split_folder(folder, "train_171", layout), _RGBNT201_FOLDERS, layout, pattern)
    test = _read_modality_folders(_split_folder(folder, "test", layout), _RGBNT201_FOLDERS, layout, pattern)
    return _assemble({"train": train, "query": test, "gallery": list(test)}, tuple(_RGBNT201_FOLDERS))


def read_msvr310(folder: str | Path, pattern: NamePattern | None = None) -> MultimodalSplits:
    """Read MSVR310: ``{bounding_box_train,query3,bounding_box_test}/ID/{vis,ni,th}/ID_sSSS_vV_….jpg``.

    The scene takes the camera's place (``group`` is ``scene``), as the data set's protocol discards gallery images of the
    query's identity and scene. Scenes are numbered 0, 1, … in the order of their numbers in the file names.

    Args:
        folder: The data set's folder.
        pattern: How names are written instead; its camera is the scene.

    Raises:
        UserError: A folder is missing or empty, a name is no ``ID_sSSS_vV_…`` or another identity's, or a sample lacks a
            modality.
    """
    folder = _existing(folder)
    layout = "{bounding_box_train,query3,bounding_box_test}/ID/{vis,ni,th}/ID_sSSS_vV_….jpg"
    splits: dict[str, list[_Sample]] = {}
    for split, name in _MSVR_SPLITS.items():
        place = _split_folder(folder, name, layout)
        groups = [{m: sub / low for m, low in _VIS_FOLDERS.items()} for sub in _subfolders(place)]
        paired = {paths[0]: paths for paths in _pair(groups)}
        samples = []
        form = "ID_sSSS_vV_….jpg, SSS the scene and V the camera"
        for file, identity, scene in _matched(map(Path, paired), _SCENE_NAME, form, pattern):
            folder_of = file.parent.parent.name
            if pattern is None and plain(folder_of) != plain(identity):
                raise UserError(
                    f"image '{file}' names identity {identity}, but lies in the folder of {folder_of}; move or rename it."
                )
            if scene is None:
                raise UserError(f"image '{file}' names no scene; it should be {form}.")
            samples.append(_Sample(paired[str(file)], identity, scene))
        _require_samples(samples, place)
        splits[split] = samples
    return _assemble(_number_scenes(splits), tuple(_VIS_FOLDERS), group="scene")


def read_wmveid863(folder: str | Path, pattern: NamePattern | None = None) -> MultimodalSplits:
    """Read WMVEID863: ``{train,query,test}/{vis,ni,th}/ID_camC_….jpg``.

    The data set is also handed on with a folder per identity, ``{train,query,test}/ID/{vis,ni,th}/…vC….jpg``, where ``v``
    and a digit give the camera; that is read too.

    Args:
        folder: The data set's folder.
        pattern: How names are written instead.

    Raises:
        UserError: A folder is missing or empty, a name holds no identity and camera, or a sample lacks a modality.
    """
    folder = _existing(folder)
    layout = "{train,query,test}/{vis,ni,th}/ID_camC_….jpg"
    splits: dict[str, list[_Sample]] = {}
    for split, name in _WMVEID_SPLITS.items():
        place = _split_folder(folder, name, layout)
        if any((place / low).is_dir() for low in _VIS_FOLDERS.values()):
            splits[split] = _read_modality_folders(place, _VIS_FOLDERS, layout, pattern)
        else:
            splits[split] = list(_read_viewpoints(place, pattern))
            _require_samples(splits[split], place)
            if pattern is None:
                _check_folders(splits[split])
    return _assemble(splits, tuple(_VIS_FOLDERS))


def read_released(folder: str | Path, pattern: NamePattern | None = None) -> MultimodalSplits:
    """Read the layout of the released GraFT: ``{train,query,gallery}/{R,N,T}/ID/NAME.jpg``.

    The modalities are those of R, N and T that ``train`` has a folder of. A folder ``test`` stands for ``gallery``, and for
    ``query`` as well where there is none. A camera is read from ``cC`` or ``camC`` in the names; all of them hold one, or
    none does.

    Args:
        folder: The data set's folder.
        pattern: How names are written instead.

    Raises:
        UserError: A folder is missing or empty, only some names hold a camera, or a sample lacks a modality.
    """
    folder = _existing(folder)
    layout = "{train,query,gallery}/{R,N,T}/ID/NAME.jpg (or test for query and gallery)"
    gallery = "gallery" if (folder / "gallery").is_dir() or not (folder / "test").is_dir() else "test"
    query = "query" if (folder / "query").is_dir() or gallery != "test" else "test"
    names = {"train": "train", "query": query, "gallery": gallery}
    train = _split_folder(folder, "train", layout)
    modalities = tuple(name for name in MODALITIES if (train / name).is_dir())
    if not modalities:
        raise UserError(f"folder '{train}' has none of the folders R, N and T; the layout is {layout}.")
    splits: dict[str, list[_Sample]] = {}
    for split, name in names.items():
        place = _split_folder(folder, name, layout)
        for modality in modalities:
            if not (place / modality).is_dir():
                raise UserError(f"folder '{place}' has no folder '{modality}', but '{train}' has; the layout is {layout}.")
        identities = sorted({sub.name for modality in modalities for sub in _subfolders(place / modality)})
        groups = [{modality: place / modality / identity for modality in modalities} for identity in identities]
        splits[split] = []
        for paths in _pair(groups):
            if pattern is not None:
                splits[split].append(_Sample(paths, *pattern.read(paths[0])))
                continue
            match = _CAMERA_IN_NAME.search(Path(paths[0]).stem)
            splits[split].append(_Sample(paths, Path(paths[0]).parent.name, match["camera"] if match else None))
        _require_samples(splits[split], place)
        if pattern is None:
            _check_folders(splits[split])
    return _assemble(splits, modalities, same_test=query == gallery)


def read_any(
    place: str | Path, modalities: Sequence[str] | None = None, pattern: NamePattern | None = None
) -> MultimodalSplits:
    """Read a data set in whichever of the layouts it has.

    Args:
        place: A folder or a CSV file.
        modalities: What the views of a strip are, from left to right; None: R, N or R, N, T by their number. Where each
            modality has a file of its own, the modalities to keep, in that order; None: all.
        pattern: How the names of files are written, where it is not the layout's own way; tables do not need it.

    Raises:
        UserError: No layout fits (the sentence lists them), or the layout's reader finds a mistake.
    """
    place = Path(place).expanduser()
    if place.suffix.lower() == ".csv":
        return _select(read_multimodal_table(place), modalities, place)
    place = _existing(place)
    layout = detect_layout(place)
    if layout == "strips":
        return read_strips(place, modalities if modalities is not None else _guess_modalities(place), pattern=pattern)
    if layout is None:
        raise UserError(
            f"folder '{place}' has no known layout; it should hold "
            "rgbir/{bounding_box_train,query,bounding_box_test}/ID_cC_….jpg (strips, as RGBNT100), "
            "{train_171,test}/{RGB,NI,TI} (RGBNT201), {bounding_box_train,query3,bounding_box_test}/ID/{vis,ni,th} "
            "(MSVR310), {train,query,test}/{vis,ni,th} (WMVEID863) or {train,query,gallery}/{R,N,T}/ID, or be a CSV file "
            "with one column per modality."
        )
    readers = {
        "rgbnt201": read_rgbnt201,
        "msvr310": read_msvr310,
        "wmveid863": read_wmveid863,
        "released": read_released,
    }
    return _select(readers[layout](place, pattern), modalities, place)


def detect_layout(folder: str | Path) -> str | None:
    """Return ``strips``, ``rgbnt201``, ``msvr310``, ``wmveid863``, ``released``, or None when no layout fits ``folder``."""
    folder = Path(folder)
    if (folder / "train_171").is_dir():
        return "rgbnt201"
    if (folder / "query3").is_dir():
        return "msvr310"
    train = folder / "train"
    if any((train / name).is_dir() for name in MODALITIES):
        return "released"
    if train.is_dir():
        for sub in [train, *_subfolders(train)[:1]]:
            if any((sub / name).is_dir() for name in _VIS_FOLDERS.values()):
                return "wmveid863"
    base = folder / "rgbir" if (folder / "rgbir").is_dir() else folder
    if all((base / name).is_dir() for name in _STRIP_SPLITS.values()) or (folder / "rgbir").is_dir():
        return "strips"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# From samples to splits


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _matched(
    files: Iterable[Path], regex: re.Pattern[str], form: str, pattern: NamePattern | None
) -> Iterator[tuple[Path, str, str | None]]:
    """Yield files with identity and camera, read from their names by the layout's ``regex`` or by the user's pattern."""
    for file in files:
        if pattern is not None:
            yield (file, *pattern.read(str(file)))
            continue
        match = regex.match(file.name)
        if match is None:
            raise UserError(
                f"image '{file}' has a name that does not say whom it shows; it should be {form}, or 'data.name_pattern' "
                "must say how names are written."
            )
        yield file, match["identity"], match["camera"]


def _check_folders(samples: Sequence[_Sample]) -> None:
    """Refuse folders of identities that are named like cameras."""
    check_names({"": [ReadName(sample.place, sample.identity, sample.identity, sample.camera) for sample in samples]})


def _read_modality_folders(
    place: Path, folders: Mapping[str, str], layout: str, pattern: NamePattern | None
) -> list[_Sample]:
    """Read ``place/<folder of the modality>/ID_camC_….jpg``."""
    for name in folders.values():
        _split_folder(place, name, layout)
    paired = {paths[0]: paths for paths in _pair([{m: place / name for m, name in folders.items()}])}
    form = "ID_camC_….jpg, ID the identity and C the camera"
    samples = [
        _Sample(paired[str(file)], identity, camera)
        for file, identity, camera in _matched(map(Path, paired), _CAM_NAME, form, pattern)
    ]
    _require_samples(samples, place)
    return samples


def _read_viewpoints(place: Path, pattern: NamePattern | None) -> Iterator[_Sample]:
    """Read ``place/ID/{vis,ni,th}/…vC….jpg``."""
    groups = [{m: sub / name for m, name in _VIS_FOLDERS.items()} for sub in _subfolders(place)]
    for paths in _pair(groups):
        file = Path(paths[0])
        if pattern is not None:
            yield _Sample(paths, *pattern.read(paths[0]))
            continue
        match = _CAMERA_IN_NAME.search(file.stem) or _VIEWPOINT_IN_NAME.search(file.stem)
        if match is None:
            raise UserError(f"image '{file}' does not name its camera; put vC (or _camC) into the name, C the camera.")
        yield _Sample(paths, file.parent.parent.name, match["camera"])


def _pair(groups: Iterable[Mapping[str, Path]]) -> list[tuple[str, ...]]:
    """Match the files of a split's modality folders by their names without the extension.

    Args:
        groups: The folder of each modality; one group per split, or per identity.

    Raises:
        UserError: A sample lacks a modality, or a modality has two files of one name.
    """
    paired: list[tuple[str, ...]] = []
    incomplete: list[str] = []
    for folders in groups:
        files: dict[str, dict[str, Path]] = {}
        for modality, folder in folders.items():
            for file in _list_images(folder) if folder.is_dir() else []:
                sample = files.setdefault(file.stem, {})
                if modality in sample:
                    raise UserError(
                        f"image '{file}' and '{sample[modality].name}' are both the {modality} image of one sample; "
                        "keep one of them."
                    )
                sample[modality] = file
        for sample in files.values():
            absent = [modality for modality in folders if modality not in sample]
            if absent:
                suffix = next(iter(sample.values())).name
                whole = {modality: str(sample.get(modality, folder / suffix)) for modality, folder in folders.items()}
                incomplete.append(incomplete_sample(whole, absent))
            else:
                paired.append(tuple(str(sample[modality]) for modality in folders))
    raise_incomplete(incomplete)
    return sorted(paired)


# ---------------------------------------------------------------------------------------------------------------------
# Strips


# ---------------------------------------------------------------------------------------------------------------------
# Tables


__all__ = [
    "DATASET_FOLDERS",
    "ModalityStatistics",
    "Source",
    "check_samples",
    "detect_layout",
    "find_dataset",
    "find_folder",
    "modality_statistics",
    "read_any",
    "read_msvr310",
    "read_released",
    "read_rgbnt201",
    "read_strips",
    "read_views",
    "read_wmveid863",
    "statistics_yaml",
]
