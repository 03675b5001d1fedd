"""Which paths are the same file (through links, other spellings, another case), and which files have the same bytes."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

_PART_BYTES = 4096  # read from the middle of files of the same size before whole files are compared


def first_path(source: Any) -> str:
    """Return the file that stands for a sample: an image's path, the first one of a tracklet or of several modalities."""
    return str(source) if isinstance(source, str) else str(source[0])


class FileNumbers:
    """Numbers 0, 1, … for files as they come; paths of the same file get the same number.

    Symbolic and hard links, other spellings of a path, and another case where the file system does not tell cases apart are
    the file itself. A path that leads nowhere is compared as it is spelled, links resolved.

    Attributes:
        paths: The first path of every number.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._known: dict[str, int] = {}
        self._inodes: dict[Hashable, list[int]] = defaultdict(list)

    def __call__(self, path: str) -> int:
        """Return the number of a file."""
        number = self._known.get(path)
        if number is None:
            number = self._known[path] = self._look(path)
        return number

    def many(self, paths: Iterable[str]) -> np.ndarray:
        """Return the numbers of files, (n,) int64."""
        return np.array([self(path) for path in paths], dtype=np.int64)

    def _look(self, path: str) -> int:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            key: Hashable = os.path.normcase(os.path.realpath(path))
            linked = True
        else:
            key, linked = (status.st_dev, status.st_ino), status.st_nlink > 1
        for number in self._inodes[key]:
            # some file systems give one inode to several files: without hard links the resolved names decide
            if linked or _resolved(self.paths[number]) == _resolved(path):
                return number
        self.paths.append(path)
        self._inodes[key].append(len(self.paths) - 1)
        return len(self.paths) - 1


def _resolved(path: str) -> str:
    return os.path.realpath(path).casefold()


def file_numbers(query: Sequence[str], gallery: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Number the files of queries and gallery images: equal numbers are the same file.

    Args:
        query: Q paths.
        gallery: G paths.

    Returns:
        (Q,) and (G,) int64, or None when no query is a gallery image too.
    """
    numbers = FileNumbers()
    queries, images = numbers.many(query), numbers.many(gallery)
    return (queries, images) if np.isin(queries, images).any() else None


def same_content(paths: Sequence[str], wanted: Callable[[list[int]], bool], *, progress: bool = True) -> list[list[int]]:
    """Return the groups of files with the same bytes, as positions in ``paths``, in order.

    Sizes are compared first, then 4 KiB from the middle of files of the same size, then the whole of what is still equal;
    what is not a regular file is passed over.

    Args:
        paths: Different files.
        wanted: Whether a group of positions that may be equal is of interest; others are not read.
        progress: Show a progress bar on a terminal.
    """
    sizes: dict[Hashable, list[int]] = defaultdict(list)
    for position, path in enumerate(paths):
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode):
            sizes[status.st_size].append(position)
    groups = _interesting(sizes, wanted)
    groups = _split(groups, paths, _middle, wanted, progress)
    return sorted(_split(groups, paths, _whole, wanted, progress))


def _interesting(groups: dict[Hashable, list[int]], wanted: Callable[[list[int]], bool]) -> list[list[int]]:
    return [group for key, group in groups.items() if key is not None and len(group) > 1 and wanted(group)]


def _split(
    groups: list[list[int]],
    paths: Sequence[str],
    digest: Callable[[str], bytes | None],
    wanted: Callable[[list[int]], bool],
    progress: bool,
) -> list[list[int]]:
    """Split groups by a digest of their files; unreadable files leave them."""
    members = [position for group in groups for position in group]
    if not members:
        return []
    bar = {"total": len(members), "desc": "comparing images", "unit": "img", "leave": False}
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        found = pool.map(digest, (paths[position] for position in members))
        digests = dict(zip(members, tqdm(found, disable=None if progress else True, **bar)))
    out: list[list[int]] = []
    for group in groups:
        parts: dict[Hashable, list[int]] = defaultdict(list)
        for position in group:
            parts[digests[position]].append(position)
        out += _interesting(parts, wanted)
    return out


def _middle(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(0, (size - _PART_BYTES) // 2))
            return stream.read(_PART_BYTES) or None
    except OSError:
        return None


def _whole(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as stream:
            digest = hashlib.blake2b(digest_size=16)
            while block := stream.read(1 << 20):
                digest.update(block)
            return digest.digest()
    except OSError:
        return None
