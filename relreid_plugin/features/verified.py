"""Files are compared with their checksums once, and again when anything was done to them since.

Reading a store of a million features to compare it takes seconds, a query milliseconds. So a folder keeps ``verified.json``:
size, times of change and inode of every file when it was last compared, and the checksums it was compared with. A file that
was written, copied or edited since has another time of change (the system sets it, no program can), and is compared when it
is opened next. Where the folder cannot be written, files are compared whenever they are opened. What a disk loses by itself,
without a write, is found by ``verify=True`` and ``--verify``, which compare everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_json
from ..reading import read_text

RECORD = "verified.json"
_TICK = 0.02  # seconds in which two changes may get the same time
_COARSE_TICK = 2.0  # on file systems without fractions of seconds
_THREADS = 4


@dataclass(frozen=True)
class Checked:
    """A file and its checksums.

    Attributes:
        path: The file.
        parts: (first byte, bytes, SHA-256) of every part; -1 bytes: to the end.
    """

    path: Path
    parts: tuple[tuple[int, int, str], ...]

    @property
    def expected(self) -> str:
        """One hash of all checksums."""
        return hashlib.sha256(repr(self.parts).encode()).hexdigest()[:16]


def file_digest(path: Path, *, start: int = 0, size: int = -1) -> str:
    """Return the SHA-256 of ``size`` bytes of a file from ``start`` on; -1: of all that follow."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        while size and (block := stream.read(1 << 22 if size < 0 else min(size, 1 << 22))):
            digest.update(block)
            size -= len(block) if size > 0 else 0
    return digest.hexdigest()


def check_digest(path: Path, digest: str, *, start: int = 0, size: int = -1) -> None:
    """Raise a :class:`UserError` where a file of a store, or ``size`` bytes of it, does not have the SHA-256 ``digest``."""
    if file_digest(path, start=start, size=size) != digest:
        raise UserError(
            f"'{path.parent}' is damaged: '{path.name}' does not hold what was written; make it again or put back a copy."
        )


def _identity(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _settled(identity: list[int]) -> bool:
    """Whether a change from now on would get another time than the last one."""
    changed = max(identity[1:3])
    tick = _COARSE_TICK if changed % 1_000_000 == 0 else _TICK
    return time.time() - changed / 1e9 > tick


def _recorded(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(UserError, ValueError, RecursionError):
        found = json.loads(read_text(folder / RECORD))
        if isinstance(found, dict):
            return found
    return {}


def _record(folder: Path, entries: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, UserError):  # a folder that cannot be written is compared every time
        write_json(folder / RECORD, entries)


def check_once(files: Sequence[Checked]) -> None:
    """Compare files with their checksums, but for those that were compared before and are unchanged since.

    Raises:
        UserError: A file does not hold what was written.
    """
    for folder in dict.fromkeys(file.path.parent for file in files):
        mine = [file for file in files if file.path.parent == folder]
        known = _recorded(folder)
        before = {file.path.name: _identity(file.path) for file in mine}
        due = [file for file in mine if known.get(file.path.name) != [*before[file.path.name], file.expected]]
        if not due:
            continue
        compare(due)
        fresh = {
            file.path.name: [*before[file.path.name], file.expected] for file in due if _settled(before[file.path.name])
        }
        if fresh:
            kept = {name: value for name, value in known.items() if (folder / name).is_file()}
            _record(folder, {**kept, **fresh})


def compare(files: Iterable[Checked]) -> None:
    """Compare files with their checksums.

    Raises:
        UserError: A file does not hold what was written.
    """

    def one(job: tuple[Path, tuple[int, int, str]]) -> None:
        check_digest(job[0], job[1][2], start=job[1][0], size=job[1][1])

    jobs = [(file.path, part) for file in files for part in file.parts]
    with ThreadPoolExecutor(min(_THREADS, max(1, len(jobs)))) as pool:
        for _ in pool.map(one, jobs):
            pass


def trust(files: Sequence[Checked]) -> None:
    """Note files that this process has just written, whose older parts it had compared before."""
    time.sleep(_TICK)
    for folder in dict.fromkeys(file.path.parent for file in files):
        settled = {}
        for file in files:
            if file.path.parent == folder and _settled(identity := _identity(file.path)):
                settled[file.path.name] = [*identity, file.expected]
        if settled:
            _record(folder, {**_recorded(folder), **settled})


__all__ = ["RECORD", "Checked", "check_digest", "check_once", "compare", "file_digest", "trust"]
