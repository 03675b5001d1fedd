"""What a data set looks like: its numbers, its duplicates, labels that look wrong, and a contact sheet.

Near duplicates are told by the difference hash of imagehash: 256 bits, whether brightness rises from one field to the next.
Copies that were scaled, compressed or lightened again differ in a few of them, different pictures in a hundred.

Shape letters: N images, B of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from ..errors import UserError, needed
from ..metrics.matches import has_match
from ..processes import usable_cores
from .embedded.sheet import save_sheet
from .images import read_image
from .labels import numeric_order, plain
from .ranges import Range
from .samefile import file_numbers, same_content
from .split import FolderSplits

HASH_BITS = 256
NEAR = 16
"""Bits in which near duplicates differ at most."""
_BLOCK = 1024  # images that are compared with all others at once
_WRONG, _PLAIN = (200, 50, 40), (120, 120, 120)


@dataclass(frozen=True)
class Entry:
    """An image of a data set.

    Attributes:
        path: Its file.
        identity: As written, numbers without leading zeros.
        camera: As written, or None.
        split: ``train``, ``query`` or ``gallery``.
    """

    path: str
    identity: str
    camera: str | None
    split: str


@dataclass(frozen=True)
class Overview:
    """What was found; places are positions in the list of entries.

    Attributes:
        entries: The images.
        sizes: (N, 2) width and height, 0 where a file cannot be read.
        copies: Groups of images with the same bytes.
        near: Groups of images that look the same and have other bytes.
        unreadable: Sentences on files that cannot be read.
        unmatched: Queries without a match in the gallery.
    """

    entries: list[Entry]
    sizes: np.ndarray
    copies: list[list[int]]
    near: list[list[int]]
    unreadable: list[str]
    unmatched: list[int]

    def numbers(self) -> dict[str, Any]:
        """Return everything in numbers and names, for JSON."""
        entries = self.entries
        per_identity = Counter(entry.identity for entry in entries)
        cameras: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            if entry.camera is not None:
                cameras[entry.camera].append(entry)
        read = self.sizes[self.sizes[:, 0] > 0]
        return {
            "images": len(entries),
            "splits": {
                split: {"images": len(own), "identities": len({entry.identity for entry in own})}
                for split in ("train", "query", "gallery")
                if (own := [entry for entry in entries if entry.split == split])
            },
            "identities": {"count": len(per_identity), "images": _spread(list(per_identity.values()))},
            "cameras": {
                name: {"images": len(own), "identities": len({entry.identity for entry in own})}
                for name, own in sorted(cameras.items())
            },
            "width": _spread(read[:, 0]),
            "height": _spread(read[:, 1]),
            "unreadable": self.unreadable,
            "copies": [[entries[place].path for place in group] for group in self.copies],
            "near_duplicates": [[entries[place].path for place in group] for group in self.near],
            "suspicious": {
                "copies_of_two_identities": self._mixed(self.copies),
                "near_duplicates_of_two_identities": self._mixed(self.near),
                "identities_with_one_image": sorted(name for name, count in per_identity.items() if count == 1),
                "cameras_with_one_identity": sorted(
                    name for name, own in cameras.items() if len({entry.identity for entry in own}) == 1
                ),
                "queries_without_a_match": [entries[place].path for place in self.unmatched],
            },
        }

    def _mixed(self, groups: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self.entries[place].path for place in group] for group in self.mixed(groups)]

    def mixed(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the groups that hold images of more than one identity."""
        return [list(group) for group in groups if len({self.entries[place].identity for place in group}) > 1]

    def text(self) -> str:
        """Return the numbers as lines."""
        found = self.numbers()
        suspicious = found["suspicious"]
        lines = [f"{found['images']} images of {found['identities']['count']} identities"]
        lines += [
            f"  {name}: {part['images']} images, {part['identities']} identities" for name, part in found["splits"].items()
        ]
        lines.append(f"images per identity: {_said(found['identities']['images'])}")
        lines += [
            f"  camera {name}: {part['images']} images, {part['identities']} identities"
            for name, part in found["cameras"].items()
        ]
        if not found["cameras"]:
            lines.append("no camera labels")
        lines.append(f"width: {_said(found['width'])}; height: {_said(found['height'])}")
        lines.append(f"{len(found['copies'])} groups of copies, {len(found['near_duplicates'])} groups of near duplicates")
        named = {name.replace("_", " "): values for name, values in suspicious.items() if values}
        if found["unreadable"]:
            named = {"files that cannot be read": found["unreadable"], **named}
        for name, values in named.items():
            first = values[0] if isinstance(values[0], str) else " and ".join(values[0][:2])
            lines.append(f"suspicious: {len(values)} {name}, such as {first}")
        return "\n".join(lines)


def _spread(values: Any) -> dict[str, float]:
    found = np.asarray(values)
    if not len(found):
        return {}
    return {"min": int(found.min()), "median": float(np.median(found)), "max": int(found.max())}


def _said(spread: dict[str, float]) -> str:
    return f"{spread['min']} to {spread['max']}, median {spread['median']:g}" if spread else "unknown"


def entries_of(splits: FolderSplits) -> list[Entry]:
    """Return the images of a data set that was read, with labels as they are written."""
    cameras = splits.camera_names

    def camera(number: int) -> str | None:
        return cameras.get(number, str(number)) if splits.has_cameras else None

    found = [
        Entry(path, plain(splits.train_identities[label]), camera(camid), "train") for path, label, camid in splits.train
    ]
    for split, items in (("query", splits.query), ("gallery", splits.gallery)):
        found += [Entry(path, splits.identity_names.get(pid, str(pid)), camera(camid), split) for path, pid, camid in items]
    return found


def look(entries: Sequence[Entry], *, near: int = NEAR, pixel_range: Range | None = None, progress: bool = True) -> Overview:
    """Read every image and count.

    Args:
        entries: The images.
        near: Bits of 256 in which near duplicates differ at most; 0: only pictures with the same hash.
        pixel_range: See :func:`~relreid_plugin.data.images.read_image`.
        progress: Show a progress bar on a terminal.

    Raises:
        UserError: There are no images, or imagehash is not installed.
    """
    if not entries:
        raise UserError("the data set holds no image.")
    imagehash = needed("imagehash", "near duplicates")
    bits = np.zeros((len(entries), HASH_BITS), bool)
    sizes = np.zeros((len(entries), 2), np.int64)

    def read(place: int) -> str:
        try:
            picture = read_image(entries[place].path, pixel_range)
        except UserError as error:
            return str(error)
        sizes[place] = picture.size
        bits[place] = imagehash.dhash(picture, hash_size=16).hash.reshape(-1)
        return ""

    with ThreadPoolExecutor(usable_cores()) as pool:
        todo = pool.map(read, range(len(entries)))
        said = list(tqdm(todo, total=len(entries), desc="reading", leave=False, disable=None if progress else True))
    paths = [entry.path for entry in entries]
    copies = same_content(paths, lambda group: True, progress=progress)
    whole = np.flatnonzero(sizes[:, 0] > 0)
    groups = [whole[group].tolist() for group in near_groups(bits[whole], near)]
    same = {place: number for number, group in enumerate(copies) for place in group}
    looks = [group for group in groups if len({same.get(place, -1 - place) for place in group}) > 1]
    return Overview(list(entries), sizes, copies, looks, [text for text in said if text], _unmatched(entries))


def near_groups(bits: np.ndarray, near: int) -> list[list[int]]:
    """Return the groups of rows that are connected by pairs which differ in at most ``near`` bits.

    Args:
        bits: (N, b) bool.
        near: The most bits.
    """
    signs = np.where(bits, np.float32(1), np.float32(-1))  # (N, b): the product of two rows is b - 2 x their distance
    ones, others = [], []
    for start in range(0, len(signs), _BLOCK):
        found = np.argwhere(signs[start : start + _BLOCK] @ signs[start:].T >= bits.shape[1] - 2 * near)
        found = found[found[:, 0] < found[:, 1]]
        ones.append(found[:, 0] + start)
        others.append(found[:, 1] + start)
    if not ones:
        return []
    one, other = np.concatenate(ones), np.concatenate(others)
    links = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(signs), len(signs)))
    group = connected_components(links, directed=False)[1]
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    return sorted(part.tolist() for part in parts if len(part) > 1)


def _unmatched(entries: Sequence[Entry]) -> list[int]:
    """Places of the queries that have no gallery image of their identity, another camera and another file."""
    query = [place for place, entry in enumerate(entries) if entry.split == "query"]
    gallery = [place for place, entry in enumerate(entries) if entry.split == "gallery"]
    if not query or not gallery:
        return []
    sides = (query, gallery)
    identities, cameras = (_numbered([getattr(entry, name) for entry in entries]) for name in ("identity", "camera"))
    pids, camids = ([labels[side] for side in sides] for labels in (identities, cameras))
    if entries[0].camera is None:  # none is discarded
        camids = [np.zeros(len(query), np.int64), np.ones(len(gallery), np.int64)]
    numbers = file_numbers(*([entries[place].path for place in side] for side in sides))
    own: dict[str, Any] = {} if numbers is None else {"query_files": numbers[0], "gallery_files": numbers[1]}
    return np.array(query)[~has_match(*pids, *camids, **own)].tolist()


def _numbered(labels: Sequence[str | None]) -> np.ndarray:
    return np.unique([str(label) for label in labels], return_inverse=True)[1]


def draw(found: Overview, path: Path, *, identities: int = 12, shots: int = 10, pixel_range: Range | None = None) -> None:
    """Write a contact sheet: a row of pictures for some identities, and one for each suspicious group of duplicates.

    Args:
        found: What was found.
        path: PNG file.
        identities: Rows, evenly over the identities in the order of their names; and so many suspicious groups at most.
        shots: Pictures in a row, evenly over its images.
        pixel_range: See :func:`~relreid_plugin.data.images.read_image`.

    Raises:
        WriteError: The file cannot be written.
    """
    own: dict[str, list[int]] = defaultdict(list)
    for place, entry in enumerate(found.entries):
        own[entry.identity].append(place)
    rows = [(name, own[name], _PLAIN) for name in _evenly(sorted(own, key=numeric_order), identities)]
    groups = found.mixed(found.copies) + found.mixed(found.near)
    rows += [("two labels", group, _WRONG) for group in groups[:identities]]
    width, height, left, gap, caption = 64, 128, 92, 6, 14
    sheet = Image.new("RGB", (left + shots * (width + gap), 8 + len(rows) * (height + caption + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, (name, places, colour) in enumerate(rows):
        top = 4 + number * (height + caption + gap)
        pen.text((4, top + height // 2 - 12), f"{name[:14]}\n{len(places)} images", fill=colour, font=font)
        for column, place in enumerate(_evenly(places, shots)):
            entry, x = found.entries[place], left + column * (width + gap)
            if found.sizes[place, 0]:
                picture = ImageOps.contain(read_image(entry.path, pixel_range), (width, height))
                sheet.paste(picture, (x + (width - picture.width) // 2, top + (height - picture.height) // 2))
            pen.rectangle((x - 1, top - 1, x + width, top + height), outline=colour)
            said = entry.identity if colour == _WRONG else "" if entry.camera is None else f"cam {entry.camera}"
            pen.text((x, top + height + 1), f"{said} {entry.split}"[:13], fill=colour, font=font)
    save_sheet(sheet, path, colours=192)


def _evenly(values: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the values, from the first to the last."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))
    return [values[place] for place in chosen]


__all__ = ["HASH_BITS", "NEAR", "Entry", "Overview", "draw", "entries_of", "look", "near_groups"]
