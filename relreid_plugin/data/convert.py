"""Data sets of the public made into the layout of Market-1501: identity-disjoint halves, queries, gallery.

The same source gives the same names, halves and queries everywhere, and the same pictures where Pillow and its JPEG
library are of the same version. Nothing in the source is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from ..files import writing
from ..reading import read_text
from .files import walk_files
from .images import is_image_name, read_image

SPLITS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
GROCERY_FILES = ("train.txt", "val.txt", "test.txt")
GROCERY_TRAINING = 41  # of the 81 products
GROCERY_SIDE = 144  # pixels of the short side
QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """One image of a data set to be converted.

    Attributes:
        path: The file.
        identity: What it shows.
        camera: Number of its camera, from 1.
        name: Name of the new file, without an ending.
    """

    path: Path
    identity: str
    camera: int
    name: str


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        folder: Where.
        counts: Split to (identities, images).
    """

    folder: Path
    counts: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        parts = [f"{split} {images} images of {identities}" for split, (identities, images) in self.counts.items()]
        return f"{self.folder}: {', '.join(parts)} identities"


def read_grocery(source: Path | str) -> list[Picture]:
    """Read a clone of GroceryStoreDataset (M. Klasson 2019): its 81 fine classes are the identities.

    The identities are numbered from 1 by the names of the products; the cameras 1, 2, 3 are the data set's own collections
    train, val, test.

    Args:
        source: The repository's folder, or ``dataset`` in it.

    Raises:
        UserError: It is another folder, or a file that its lists name is missing.
    """
    folder = Path(source)
    if (folder / "dataset").is_dir():
        folder = folder / "dataset"
    missing = [name for name in GROCERY_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"'{source}' is no folder of GroceryStoreDataset ('{folder / missing[0]}' does not exist); clone or unpack "
            "github.com/marcusklasson/GroceryStoreDataset and name its folder."
        )
    listed: list[tuple[int, str]] = []
    for camera, name in enumerate(GROCERY_FILES, 1):
        for number, line in enumerate(read_text(folder / name).splitlines(), 1):
            words = [word.strip() for word in line.split(",")]
            if len(words) == 3 and "/" in words[0]:
                listed.append((camera, words[0]))
            elif line.strip():
                raise UserError(f"'{folder / name}', line {number}: expected 'PATH, CLASS, COARSE CLASS', got {line!r:.80}.")
    listed.sort()
    products = sorted({Path(path).parent.name for _, path in listed})
    numbers = {product: f"{number:04d}" for number, product in enumerate(products, 1)}
    pictures = []
    for number, (camera, path) in enumerate(listed, 1):
        if not (folder / path).is_file():
            raise UserError(f"'{folder / path}' does not exist, but the lists in '{folder}' name it; download it anew.")
        identity = numbers[Path(path).parent.name]
        pictures.append(Picture(folder / path, identity, camera, f"{identity}_c{camera}s1_{number:06d}_00"))
    return pictures


def grocery_training(identities: Sequence[str]) -> set[str]:
    """Return the products to train on: 41 of 81, drawn with seed 0."""
    order = np.random.default_rng(0).permutation(len(identities))
    return {identities[index] for index in order[len(identities) - GROCERY_TRAINING :]}


def read_folders(source: Path | str) -> list[Picture]:
    """Read a folder with one folder of images per identity.

    ``SOURCE/IDENTITY/….jpg``, or ``SOURCE/IDENTITY/CAMERA/….jpg``, where every image lies in a camera's folder. Without
    cameras the images of an identity are taken for one camera's, and no match is discarded in testing.

    Raises:
        UserError: There is no folder, fewer than two identities, or images lie both beside and in folders of cameras.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"'{source}' is no folder; name the folder that holds one folder of images per identity.")
    paths, notes = walk_files(source, is_image_name)
    for note in notes:
        print(f"note: {note}")
    found = [Path(path) for path in paths]
    relative = [path.relative_to(source).parts for path in found]
    for path, parts in zip(found, relative):
        if len(parts) not in (2, 3):
            raise UserError(f"'{path}' lies neither in '{source}/IDENTITY' nor in '{source}/IDENTITY/CAMERA'.")
    depths = {len(parts) for parts in relative}
    if len(depths) > 1:
        odd = found[next(row for row, parts in enumerate(relative) if len(parts) == 2)]
        raise UserError(f"'{odd}' lies beside folders of cameras; put all images into folders of cameras, or none.")
    identities = sorted({parts[0] for parts in relative})
    if len(identities) < 2:
        raise UserError(f"'{source}' holds images of {len(identities)} identities; at least two are needed, a folder each.")
    with_cameras = depths == {3}
    cameras = sorted({parts[1] for parts in relative}) if with_cameras else []
    places = {identity: f"{number:0{max(4, len(str(len(identities))))}d}" for number, identity in enumerate(identities, 1)}
    pictures = []
    for number, (path, parts) in enumerate(zip(found, relative), 1):
        camera = cameras.index(parts[1]) + 1 if with_cameras else 0
        middle = f"_c{camera}" if camera else ""
        pictures.append(Picture(path, parts[0], camera, f"{places[parts[0]]}{middle}_{number:06d}"))
    return pictures


def folders_training(identities: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Return the identities to train on, drawn from the sorted ones; at least one is left on either side.

    Args:
        identities: All of them, sorted.
        fraction: Share of the identities.
        seed: Of the draw.
    """
    count = min(len(identities) - 1, max(1, round(fraction * len(identities))))
    order = np.random.default_rng(seed).permutation(len(identities))
    return {identities[index] for index in order[:count]}


def divide(pictures: Sequence[Picture], training: set[str]) -> dict[str, list[Picture]]:
    """Return the images of every split: training identities, and of the others a query per camera and the gallery.

    The first image of an identity under a camera is its query where the gallery keeps a match for it: an image under
    another camera, or, where there are no cameras, any other.
    """
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    others: dict[str, list[Picture]] = {}
    for picture in pictures:
        if picture.identity in training:
            splits["train"].append(picture)
        else:
            others.setdefault(picture.identity, []).append(picture)
    for members in others.values():
        chosen: list[Picture] = []
        for camera in sorted({picture.camera for picture in members}):
            first = next(picture for picture in members if picture.camera == camera)
            asking = [*chosen, first]
            left = [picture for picture in members if picture not in asking]
            if all(any(not ask.camera or other.camera != ask.camera for other in left) for ask in asking):
                chosen = asking
        splits["query"] += chosen
        splits["gallery"] += [picture for picture in members if picture not in chosen]
    return splits


def write_market(splits: dict[str, list[Picture]], folder: Path | str, *, side: int = 0, progress: bool = True) -> Converted:
    """Write splits in the layout of Market-1501, first beside the folder, which comes into being when it is complete.

    Args:
        splits: From :func:`divide`.
        folder: Where; it must not exist, or be empty.
        side: Pixels of the short side, as JPEG; 0: files are copied as they are.
        progress: Show a bar on a terminal.

    Raises:
        UserError: The folder holds something, a split has no image, or a file cannot be read or written.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"'{folder}' exists already; name a folder that does not, or delete it.")
    for split in SPLITS:
        if not splits[split]:
            raise UserError(
                f"no {split} images would be left in '{folder}'; a test identity needs two images, with cameras under "
                "two of them, and a training identity is needed too."
            )
    built = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(built, ignore_errors=True)
    jobs = [(picture, built / place) for split, place in SPLITS.items() for picture in splits[split]]
    try:
        with writing(folder):
            for place in SPLITS.values():
                (built / place).mkdir(parents=True)
            for picture, place in tqdm(jobs, desc=folder.name, unit="image", disable=None if progress else True):
                _write(picture, place, side)
            if folder.is_dir():
                folder.rmdir()
            built.rename(folder)
    finally:
        shutil.rmtree(built, ignore_errors=True)
    counts = {split: (len({picture.identity for picture in members}), len(members)) for split, members in splits.items()}
    return Converted(folder, counts)


def _write(picture: Picture, place: Path, side: int) -> None:
    if not side:
        shutil.copyfile(picture.path, place / f"{picture.name}{picture.path.suffix.lower()}")
        return
    image = read_image(picture.path)
    scale = side / min(image.size)
    size = (round(scale * image.width), round(scale * image.height))
    image.resize(size, Image.Resampling.LANCZOS).save(place / f"{picture.name}.jpg", quality=QUALITY)


def convert_grocery(source: Path | str, folder: Path | str, *, progress: bool = True) -> Converted:
    """Make the ``grocery`` data set of ``magformer_grocery.yml``: see :func:`read_grocery` and :func:`write_market`."""
    pictures = read_grocery(source)
    training = grocery_training(_identities(pictures))
    return write_market(divide(pictures, training), folder, side=GROCERY_SIDE, progress=progress)


def convert_folders(
    source: Path | str, folder: Path | str, *, fraction: float = 0.5, seed: int = 0, progress: bool = True
) -> Converted:
    """Make a data set of a folder per identity: see :func:`read_folders` and :func:`write_market`."""
    pictures = read_folders(source)
    training = folders_training(_identities(pictures), fraction, seed)
    return write_market(divide(pictures, training), folder, progress=progress)


def _identities(pictures: Iterable[Picture]) -> list[str]:
    return sorted({picture.identity for picture in pictures})


CONVERTERS: dict[str, Callable[..., Converted]] = {"grocery": convert_grocery, "folders": convert_folders}
