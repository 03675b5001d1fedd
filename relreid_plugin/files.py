"""Files that are written whole or not at all, and one sentence for whatever keeps a file from being written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it would be larger than files may be here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is no folder",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.EISDIR: "it is a folder",
    errno.ENOENT: "no such file or folder",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
}
_WAYS_OUT = {
    errno.ENOSPC: "make room and run the command again",
    errno.EDQUOT: "make room and run the command again",
    errno.EMFILE: "raise 'ulimit -n' or lower 'data.workers', and run the command again",
    errno.ENFILE: "end other programs and run the command again",
}
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_WRITER_FAILED = re.compile(
    r"PytorchStreamWriter failed|unexpected pos|inline_container|iostream error|write error|open .* for writing"
)
_NUMBERED = re.compile(r"os error (\d+)")  # of the system's, as safetensors writes it
_NUL = re.compile(r"embedded null (byte|character)")
_STALE_SECONDS = 3600.0
_OWN_FOLDER = re.compile(r"\w{8}\.tmp")  # how tempfile names them


class WriteError(UserError, OSError):
    """A file that cannot be written.

    Attributes:
        read_only: Whether this process may not write there at all, now or later.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.read_only = code in _READ_ONLY


def shown(path: object) -> str:
    """Return a path for a sentence: one that is too long to read is cut in the middle."""
    text = str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= 240 else f"{text[:110]}…{text[-110:]}"


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error that an exception is or comes from."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


def write_error(error: BaseException, path: object = None, *, done: str = "written") -> WriteError | None:
    """Return the sentence for an exception that came from writing a file, ``None`` where it came from something else.

    Args:
        error: The exception. Those of the libraries that write count too: torch's archive writer and faiss tell of a full
            disk by a ``RuntimeError``, safetensors by an error of its own.
        path: The file; ``None``: the one that the exception names.
        done: What could not be done with it.
    """
    if isinstance(error, WriteError):
        return error
    numbered = _NUMBERED.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    if numbered:
        error = OSError(int(numbered[1]), os.strerror(int(numbered[1])))
    if isinstance(error, RuntimeError) and not _WRITER_FAILED.search(str(error)):
        return None
    if isinstance(error, ValueError) and not isinstance(error, UnicodeEncodeError) and not _NUL.search(str(error)):
        return None
    if not isinstance(error, (OSError, RuntimeError, ValueError)):
        return None
    found = _os_error(error)
    code = found.errno if found is not None else None
    if isinstance(error, UnicodeEncodeError):
        code, reason = errno.EINVAL, "it holds characters that cannot be written there"
    elif isinstance(error, ValueError):
        code, reason = errno.EINVAL, "the name holds a NUL character"
    elif found is not None:
        reason = _REASONS.get(found.errno or 0) or _last_line(found.strerror or str(found))
    elif isinstance(error, RuntimeError):
        code = errno.ENOSPC if path is not None and _is_full(Path(str(path)).parent) else None
        reason = _REASONS[code] if code else "writing ended early; there may be no room"
    else:
        reason = _last_line(str(error)) or type(error).__name__
    if path is None and isinstance(found, OSError):
        path = found.filename
    way_out = _WAYS_OUT.get(code or 0, _WAYS_OUT[errno.ENOSPC] if code is None else "name another place")
    what = f"'{shown(path)}'" if path is not None else "a file"
    return WriteError(f"{what} cannot be {done} ({reason}); {way_out}.", code)


def _last_line(text: str) -> str:
    """The last line: a loader process hands over its whole traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < 1 << 20
    except (OSError, ValueError):
        return False


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn whatever keeps ``path`` from being written in the block into a :class:`WriteError` that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = write_error(error, path)
        if found is None:
            raise
        raise found from None


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        WriteError: It cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


# --- whole or not at all ----------------------------------------------------------------------------------------------
@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that replaces it when the block ends without an error.

    The temporary file is locked while its writer lives, so that what a killed writer left can be told from what another one
    is writing: :func:`clear_leftovers` removes the former; so does the next writer of the same file.

    Raises:
        WriteError: The file cannot be written; what stood there before still does.
    """
    with writing(path):
        _require_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, path.name)
        temporary, handle = _temporary(path)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            with contextlib.suppress(PermissionError):
                temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if handle is not None:
                unlock(handle)


def _require_file(path: Path) -> None:
    """Refuse to put a file in the place of a device, pipe or socket: ``/dev/null`` would be gone for the whole machine."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing is there, or writing says why not
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise WriteError(f"'{shown(path)}' cannot be written (it is a device or pipe, no regular file); name another place.")


def _temporary(path: Path) -> tuple[Path, int | None]:
    """A new temporary file, and the handle that keeps it locked (``None`` where that is not possible)."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        if sys.platform == "win32":  # a lock would keep the block from writing, an open file cannot be removed anyway
            os.close(handle)
            return Path(name), None
        try_lock(handle)
        if os.fstat(handle).st_nlink:  # else someone took it for a leftover before it was locked
            return Path(name), handle
        unlock(handle)


def try_lock(handle: int) -> bool | None:
    """Lock an open file or folder until it is closed; ``None`` where its file system has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    _locked[handle] = _identity(handle)
    return True


def unlock(handle: int) -> None:
    """Close what :func:`try_lock` has locked."""
    _locked.pop(handle, None)
    os.close(handle)


def note_lock(handle: int) -> None:
    """Let processes that are forked from now on close ``handle``: else a lock would live as long as the last of them."""
    _locked[handle] = _identity(handle)


def forget_lock(handle: int) -> None:
    """The handle of :func:`note_lock` is closed."""
    _locked.pop(handle, None)


_locked: dict[int, tuple[int, int]] = {}


def _identity(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino


def _close_in_child() -> None:
    for handle, identity in _locked.items():
        with contextlib.suppress(OSError):
            if _identity(handle) == identity:
                os.close(handle)
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes a temporary file or folder any more; where there are no locks: since an hour."""
    handle = os.open(path, os.O_RDONLY)
    try:
        free = try_lock(handle)
        return free if free is not None else time.time() - os.fstat(handle).st_mtime > _STALE_SECONDS
    finally:
        unlock(handle)


def clear_leftovers(folder: Path, name: str = "", *, below: bool = False) -> None:
    """Remove the temporary files that killed writers left in ``folder``; those that are being written stay.

    Args:
        folder: The folder; it may be missing, and may be one that cannot be written to.
        name: Only those of this file; empty: all.
        below: Also in the folders below.
    """
    start = f".{name}." if name else "."
    walk = os.walk(folder) if below else [next(os.walk(folder), (str(folder), [], []))]
    for place, _, files in walk:
        for file in files:
            if file.startswith(start) and file.endswith(".tmp"):
                path = Path(place, file)
                with contextlib.suppress(OSError):
                    if is_abandoned(path):
                        path.unlink()


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Give a new hidden folder beside ``path`` for what is moved there when it is whole; it is gone when the block ends.

    It is locked while its writer lives, and what killed writers left there for the same ``path`` is removed.

    Raises:
        WriteError: The folder that ``path`` stands in cannot be written to.
    """
    with writing(path):
        for left in path.parent.iterdir():
            if left.name.startswith(f".{path.name}.") and _OWN_FOLDER.fullmatch(left.name[len(path.name) + 2 :]):
                with contextlib.suppress(OSError):
                    if left.is_dir() and is_abandoned(left):
                        shutil.rmtree(left, ignore_errors=True)
        place, handle = _folder(path)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            if handle is not None:
                unlock(handle)


def _folder(path: Path) -> tuple[Path, int | None]:
    """A new hidden folder, and the handle that keeps it locked (``None`` where that is not possible)."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        if sys.platform == "win32":
            return place, None
        with contextlib.suppress(FileNotFoundError):  # someone took it for a leftover before it was locked
            handle = os.open(place, os.O_RDONLY)
            try_lock(handle)
            if place.exists():
                return place, handle
            unlock(handle)


def write_at(path: Path, offset: int, data: bytes | memoryview, *, cut: bool = False) -> None:
    """Write bytes into a file, which is made where there is none, from ``offset`` on; they are on the disk on return.

    Args:
        path: The file.
        offset: Where the bytes begin.
        data: The bytes.
        cut: What stands behind ``offset`` so far is no part of the file.

    Raises:
        WriteError: They cannot be written; some of them may have been.
    """
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if cut:
                os.ftruncate(handle, offset)
            os.lseek(handle, offset, os.SEEK_SET)
            written = 0
            while written < len(data):
                written += os.write(handle, data[written:])
            os.fsync(handle)
        finally:
            os.close(handle)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV with line feeds; a text with commas or quotes is quoted."""
    import csv
    import io

    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_figure(path: Path, figure: Any, *, dpi: int = 120) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
