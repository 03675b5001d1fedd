"""One writer per folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError
from .files import forget_lock, note_lock, shown, writing

RUN_LOCK = "run.lock"
"""Held by the process that trains or tests in a run's folder, or fills the folder of a grid."""
STORE_LOCK = "writer.lock"
"""Held by the process that writes a store, its index or its refined gallery."""


@contextmanager
def folder_lock(folder: Path, name: str = RUN_LOCK) -> Iterator[None]:
    """Hold ``folder``, which is made when missing, for writing.

    Processes that this one forks do not hold it, so it is free as soon as this one has ended.

    Args:
        folder: The folder.
        name: The lock's file in it; it is gone when the block ends.

    Raises:
        UserError: Another process, or another part of this one, holds it.
        WriteError: The folder cannot be written to.
    """
    lock = FileLock(str(folder / name))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"'{shown(folder)}' is being written by another process; wait until it has ended, or name another folder."
            ) from None
    handle = getattr(getattr(lock, "_context", None), "lock_file_fd", None)  # older versions leave it to forked processes
    if handle is not None:
        note_lock(handle)
    try:
        yield
    finally:
        if handle is not None:
            forget_lock(handle)
        with contextlib.suppress(OSError):  # while it is held: whoever waits for it takes a new one
            (folder / name).unlink(missing_ok=True)
        lock.release()
