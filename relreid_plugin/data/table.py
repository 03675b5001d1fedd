"""Data sets in a CSV file: ``path,pid,camid,split``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .files import why_not_regular
from .rows import SPLITS, Rows
from .split import FolderSplits, Record, number_identities, one_record_per_file

LAYOUT = (
    "a CSV file with the header path,pid,camid,split (camid may be missing; split is train, query or gallery, and may be "
    "missing where 'data.split_rule' divides it)"
)

_CAMERAS = ("camera", "cameras", "cam", "cams", "camids", "cam_id", "camera_id", "cameraid")  # meant as camid


@dataclass(frozen=True)
class Table:
    """A table as it stands there.

    Attributes:
        splits: The records of every split; where it has none, all of them under an empty name.
        times: Seconds of every record in order, where it has no splits and a column ``time``.
    """

    splits: dict[str, list[Record]]
    times: list[float] | None = None


def read_rows(path: str | Path, *, unsplit: bool = False) -> Table:
    """Read a CSV file of images.

    Columns: ``path`` (relative to the CSV file's folder, or absolute), ``pid`` (any text; -1 is junk), ``camid`` (an
    integer from 0 or any text; the column may be missing or empty), ``split`` (train, query or gallery) and, where there
    are no splits, ``time`` (seconds, or dates and times in ISO 8601; it may be missing). Others are passed over, but not one
    that is called like a camera where there is no ``camid``.

    Args:
        path: The CSV file; :class:`~relreid_plugin.data.rows.Rows` says what it may look like.
        unsplit: The column ``split`` may be missing or empty.

    Raises:
        UserError: The file is missing or no CSV file, a column is missing, or a row is wrong; the sentence names the file
            and the line.
    """
    needed, more = (("path", "pid"), ("camid", "split", "time")) if unsplit else (("path", "pid", "split"), ("camid",))
    rows = Rows(path, needed, more, layout=LAYOUT)
    meant = next((name for name in rows.header if name.casefold() in _CAMERAS), "")
    if meant and "camid" not in rows.header:
        raise UserError(f"{rows.where}: the column '{meant}' is not read; name it camid, or take it out.")
    read = list(_parsed(rows))
    divided = not unsplit or any(split for split, *_ in read)
    with_camera, without = (next((line for *_, r, line in read if (r.camera is None) is none), 0) for none in (False, True))
    if with_camera and without:
        raise UserError(f"{path}, line {without}: no camid, but line {with_camera} has one; give all or none.")
    if not divided:
        times = [time for _, time, *_ in read] if "time" in rows.header else None
        return Table({"": [record for *_, record, _ in read]}, times)
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for split, _, record, line in read:
        if not split:
            raise UserError(f"{path}, line {line}: the column 'split' is empty.")
        splits[split].append(record)
    for split, records in splits.items():
        if not records:
            raise UserError(f"{path}: no row has the split '{split}'; every split needs images.")
    return Table(splits)


def read_table(path: str | Path) -> FolderSplits:
    """Read a data set with splits from a CSV file; see :func:`read_rows`."""
    return numbered_table(read_rows(path))


def numbered_table(table: Table) -> FolderSplits:
    """Number the identities of a table with splits."""
    splits, notes = one_record_per_file(table.splits)
    numbered = number_identities(splits, first_camera=0)
    numbered.notes[:0] = notes
    return numbered


def _parsed(rows: Rows) -> Iterator[tuple[str, float, Record, int]]:
    """Split (empty: none), time (NaN: none), record and line of every row."""
    for row in rows:
        for column in ("path", "pid"):
            rows.value(row, column)
        split = rows.split(row) if row.get("split") else ""
        time = rows.seconds(row, "time") if row.get("time") and not split else float("nan")
        camera, file = rows.camera(row), rows.file(row, "path")
        reason = why_not_regular(file)
        if reason:
            raise UserError(f"{rows.where}: image '{file}' {reason} (paths are relative to the folder of the CSV file).")
        yield split, time, Record(file, row["pid"], camera), rows.line
