"""What people said of pairs: a journal on the disk, and the training data that follow from it.

The journal is a file of JSON lines that only grows. An answer is acknowledged when its line is on the disk; a line that a
killed process wrote half of has no end and is cut off when the journal is opened next. The latest answer on a pair counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..data.labels import Label
from ..errors import UserError
from ..files import csv_text, make_folder, write_at, writing
from ..metrics.cameras import UNKNOWN

PAIR_COLUMNS = ("query", "image", "same", "time")
_TEST_SHARE = 4  # one of so many identities is for testing


@dataclass(frozen=True)
class Answer:
    """Whether a picture shows whom an image of the store shows.

    Attributes:
        query: File of the picture.
        image: File of the image.
        row: Its row in the store.
        same: The answer.
        label: The image's identity, -1 where unknown.
        camera: The image's camera, -1 where unknown.
        query_camera: The picture's camera, -1 where unknown.
        time: When it was given, ISO 8601.
    """

    query: str
    image: str
    row: int
    same: bool
    label: Label
    camera: Label
    query_camera: Label
    time: str


class Journal:
    """Answers in a file that only grows.

    Args:
        path: The file; made with the first answer.

    Raises:
        UserError: A whole line is no answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._latest: dict[tuple[str, str], Answer] = {}
        self._size = 0
        if path.is_file():
            self._read()

    def __len__(self) -> int:
        """Pairs with an answer."""
        return len(self._latest)

    def _read(self) -> None:
        data = self.path.read_bytes()
        self._size = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._size].splitlines(), 1):
            try:
                answer = Answer(**json.loads(line))
                if not isinstance(answer.query, str) or not isinstance(answer.image, str):
                    raise ValueError
            except (ValueError, TypeError):
                raise UserError(
                    f"'{self.path}', line {number} is no answer; take the line out, or put back a copy."
                ) from None
            self._latest[answer.query, answer.image] = answer

    def add(self, answers: Sequence[Answer]) -> None:
        """Append answers; they are on the disk when this returns.

        Raises:
            WriteError: They could not be written, and none of them is kept.
        """
        data = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers).encode()
        with writing(self.path):
            make_folder(self.path.parent)
            new = not self.path.exists()
            write_at(self.path, self._size, data, cut=True)  # half a line of a killed process, or of a full disk, goes
            if new and os.name == "posix":
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        self._size += len(data)
        for answer in answers:
            self._latest[answer.query, answer.image] = answer

    def answers(self) -> list[Answer]:
        """Return the latest answer on every pair, in the order in which the pairs came up."""
        return list(self._latest.values())


def pairs_table(answers: Iterable[Answer]) -> str:
    """Return answers as CSV: query, image, same (1 or 0), time."""
    return _table(PAIR_COLUMNS, ((each.query, each.image, int(each.same), each.time) for each in answers))


def training_table(answers: Sequence[Answer]) -> tuple[str, list[str]]:
    """Return the data set that follows from answers, as CSV ``path,pid,camid,split`` for ``data.root`` and training.

    Pictures that are the same as one another, directly or by way of others, are one identity: that of the labelled images
    among them, else a new one. Images of the store that have one label are the same. One identity of four is for testing
    (its pictures that were searched for are queries), the others are for training; which ones follows from their names.
    ``camid`` is there where all cameras are known.

    Args:
        answers: The latest answer on every pair.

    Returns:
        The table, and sentences on what was left out.
    """
    files = list(dict.fromkeys(name for each in answers for name in (each.query, each.image)))
    labels = list(dict.fromkeys(each.label for each in answers if each.label != UNKNOWN))
    node: dict[object, int] = {name: place for place, name in enumerate(files)}
    identity = {label: len(files) + place for place, label in enumerate(labels)}
    links = [(node[each.query], node[each.image]) for each in answers if each.same]
    links += [(node[each.image], identity[each.label]) for each in answers if each.label != UNKNOWN]
    ends = np.array(links, np.int64).reshape(-1, 2).T
    size = len(files) + len(labels)
    group = connected_components(coo_array((np.ones(len(links)), ends), shape=(size, size)), directed=False)[1]
    own, known = group[: len(files)], group[len(files) :]
    different = [(int(own[node[each.query]]), int(own[node[each.image]])) for each in answers if not each.same]
    refused = {one for one, two in different if one == two}
    mixed = set(np.flatnonzero(np.bincount(known, minlength=1) > 1).tolist())
    alone = set(np.flatnonzero(np.bincount(own, minlength=1) == 1).tolist())
    names: dict[int, str] = {}
    for place in sorted(set(own.tolist()) - refused - mixed - alone):
        first = files[int(np.flatnonzero(own == place)[0])]
        names[place] = f"feedback-{hashlib.sha256(first.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
    names.update((place, str(label)) for label, place in zip(labels, known.tolist()) if place in names)
    cameras = {each.image: each.camera for each in answers} | {each.query: each.query_camera for each in answers}
    tested = _for_testing(sorted(names.values()))
    queries = {each.query for each in answers}
    rows = []
    for name, place in zip(files, own.tolist()):
        if place in names:
            pid = names[place]
            split = "train" if pid not in tested else "query" if name in queries else "gallery"
            rows.append([name, pid, str(cameras[name]), split])
    with_cameras = all(row[2] != str(UNKNOWN) for row in rows)
    header = ("path", "pid", "camid", "split") if with_cameras else ("path", "pid", "split")
    table = _table(header, (row if with_cameras else [row[0], row[1], row[3]] for row in rows))
    return table, _left_out(refused, mixed - refused, alone - refused - mixed, with_cameras, {row[3] for row in rows})


def _for_testing(names: Sequence[str]) -> set[str]:
    """One name of four, at least one where there are two, chosen by their hashes."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest())
    return set(order[: max(len(order) // _TEST_SHARE, int(len(order) > 1))])


def _left_out(refused: set[int], mixed: set[int], alone: set[int], with_cameras: bool, splits: set[str]) -> list[str]:
    found = []
    if refused:
        found.append(f"{len(refused)} groups of pictures are left out, as an answer calls two of them different")
    if mixed:
        found.append(f"{len(mixed)} groups of pictures are left out, as they hold images of two identities of the store")
    if alone:
        found.append(f"{len(alone)} pictures are left out, as they are the same as no other")
    if not with_cameras:
        found.append("there is no camid, as some cameras are unknown")
    missing = [split for split in ("train", "query", "gallery") if split not in splits]
    if missing:
        found.append(f"no image is in {' or '.join(missing)}: answers on more identities are needed to train")
    return found


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return csv_text([header, *rows])


__all__ = ["Answer", "Journal", "pairs_table", "training_table"]
