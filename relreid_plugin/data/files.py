"""Files and folders as they really are: regular or not, and the same one under several names."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import UserError

_Item = TypeVar("_Item")

OTHER_PICTURES = (
    *(".jfif", ".jpe", ".jif", ".jp2", ".j2k", ".jpx", ".jxl", ".gif", ".heic", ".heif", ".avif", ".ppm", ".pgm", ".pbm"),
    *(".tga", ".pcx", ".sgi", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".orf", ".rw2", ".exr", ".psd"),
)
"""Endings of pictures that are not looked for in folders: whoever has such files is told."""

REPLACE = "replace the file or take it out of the data set"

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Unreadable(Exception):
    """Why an image cannot be read.

    Attributes:
        reason: End of a sentence that begins with the file.
        remedy: What to do about it.
    """

    def __init__(self, reason: str, remedy: str = REPLACE) -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy

    def sentence(self, path: str | Path, more: str = "") -> str:
        """Return the whole sentence; ``more`` follows the reason."""
        return f"image '{printable(path)}' {self.reason}{more}; {self.remedy}."


def printable(path: str | os.PathLike[str]) -> str:
    """Return a path for a sentence: line breaks, control characters and bytes that are no text are written as escapes."""
    text = os.fspath(path)
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def why_not_regular(path: str | os.PathLike[str]) -> str:
    """Return why ``path`` is no regular file that could be opened, as the end of a sentence; empty where it is one.

    FIFOs, sockets and devices are told without opening them, which may never return. Links are followed.
    """
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        return "may not be read (permission denied)"
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            return f"is a link to '{printable(os.readlink(path))}', which does not exist"
        return "does not exist"
    except OSError as error:  # a link to itself, a name that is too long
        return f"cannot be opened ({error.strerror})"
    except ValueError:
        return "has a name that no file can have"
    if stat.S_ISREG(mode):
        return ""
    if stat.S_ISDIR(mode):
        return "is a folder"
    return f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, no regular file"


class RealFiles:
    """Tells further names of a file: links and hard links to one that was seen."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, str] = {}

    def first_name(self, path: str, label: Hashable = None) -> str:
        """Return the first name under which the file of ``path`` was seen with this label; ``path`` itself where it is new.

        A file that does not exist is new.
        """
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return path
        first = self._seen.setdefault((status.st_dev, status.st_ino, label), path)
        if first == path or status.st_nlink > 1:
            return first
        # some file systems give one number to several files: only the resolved path decides
        return first if os.path.realpath(first) == os.path.realpath(path) else path


def one_per_file(
    items: Iterable[_Item],
    files: Callable[[_Item], str | Sequence[str]],
    label: Callable[[_Item], Hashable],
    what: str,
) -> tuple[list[_Item], list[str]]:
    """Keep the first of the items that are the same real files under other names.

    Args:
        items: Images or samples of one split.
        files: The file of an item, or its files in order.
        label: The identity of an item; the same file under another identity stays, for it is another mistake.
        what: What the items are called in the note, such as ``training images``.

    Returns:
        The items that stay, and a note with counts and names where there are fewer.
    """
    real = RealFiles()
    kept: list[_Item] = []
    seen: set[Hashable] = set()
    further: list[tuple[str, str]] = []
    for item in items:
        named = files(item)
        paths = (named,) if isinstance(named, str) else tuple(named)
        firsts = tuple(real.first_name(path) for path in paths)
        key = (firsts, label(item))
        if key in seen:
            further.append((paths[0], firsts[0]))
        else:
            seen.add(key)
            kept.append(item)
    if not further:
        return kept, []
    name, first = further[0]
    again = "is listed again" if name == first else f"is the file '{printable(first)}'"
    return kept, [
        f"{len(further)} of {len(further) + len(kept)} {what} are further names of files that are there already, and count "
        f"once ('{printable(name)}' {again})"
    ]


def walk_files(folder: str | os.PathLike[str], wanted: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Return the files below a folder whose names are wanted, sorted by path; every real folder is walked once.

    Links to folders are followed after all real folders, so that a folder that is reached by its own path and by a link
    keeps its own. What is no regular file is returned too: its reader says so.

    Args:
        folder: Where to begin.
        wanted: Tells by a file's name.

    Returns:
        The paths, and notes: where links lead to folders that were walked already, and where there are pictures under other
        endings.

    Raises:
        UserError: A folder cannot be read.
    """
    found: list[str] = []
    walked: set[tuple[int, int]] = set()
    again: list[str] = []
    others: list[str] = []
    waiting, links = [os.fspath(folder)], list[str]()
    while waiting or links:
        place = waiting.pop() if waiting else links.pop(0)
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in walked:
                again.append(place)
                continue
            walked.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir():
                        (links if entry.is_symlink() else waiting).append(entry.path)
                    elif wanted(entry.name):
                        found.append(entry.path)
                    elif not entry.name.startswith(".") and entry.name.lower().endswith(OTHER_PICTURES):
                        others.append(entry.path)
        except OSError as error:
            raise UserError(f"folder '{printable(place)}' cannot be read ({error.strerror}).") from None
    notes = []
    if others:
        endings = ", ".join(sorted({os.path.splitext(path)[1].lower() for path in others}))
        notes.append(
            f"{len(others)} file{'s' if len(others) > 1 else ''} named like pictures of other kinds ({endings}) "
            f"{'are' if len(others) > 1 else 'is'} passed over ('{printable(min(others))}'); rename or convert them"
        )
    if again:
        notes.append(
            f"{len(again)} folder link{'s lead' if len(again) > 1 else ' leads'} to a folder that was read already, and "
            f"{'are' if len(again) > 1 else 'is'} not followed again ('{printable(again[0])}')"
        )
    return sorted(found), notes


def detail(error: Exception) -> str:
    """Return what a decoder complains of, without the point at the end."""
    return printable(" ".join(str(error).split()).rstrip(".") or type(error).__name__)
