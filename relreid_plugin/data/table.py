"""Data sets in a CSV file: ``path,pid,camid,split``."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .files import why_not_regular
from .rows import SPLITS, Rows
from .split import FolderSplits, Record, number_identities, one_record_per_file

LAYOUT = "a CSV file with the header path,pid,camid,split (camid may be missing; split is train, query or gallery)"


def read_table(path: str | Path) -> FolderSplits:
    """Read a data set from a CSV file.

    Columns: ``path`` (relative to the CSV file's folder, or absolute), ``pid`` (any text; -1 is junk), ``camid`` (an
    integer from 0 or any text; the column may be missing or empty) and ``split`` (train, query or gallery). Others are
    passed over.

    Args:
        path: The CSV file; :class:`~relreid_plugin.data.rows.Rows` says what it may look like.

    Raises:
        UserError: The file is missing or no CSV file, a column is missing, or a row is wrong; the sentence names the file
            and the line.
    """
    rows = Rows(path, ("path", "pid", "split"), ("camid",), layout=LAYOUT)
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    with_camera = without = 0
    for row in rows:
        split, record = _parse_row(rows, row)
        if record.camera is None:
            without = without or rows.line
        else:
            with_camera = with_camera or rows.line
        splits[split].append(record)
    if with_camera and without:
        raise UserError(f"{path}, line {without}: no camid, but line {with_camera} has one; give all or none.")
    for split, records in splits.items():
        if not records:
            raise UserError(f"{path}: no row has the split '{split}'; every split needs images.")
    splits, notes = one_record_per_file(splits)
    numbered = number_identities(splits, first_camera=0)
    numbered.notes[:0] = notes
    return numbered


def _parse_row(rows: Rows, row: dict[str, str]) -> tuple[str, Record]:
    for column in ("path", "pid", "split"):
        rows.value(row, column)
    split, camera, file = rows.split(row), rows.camera(row), rows.file(row, "path")
    reason = why_not_regular(file)
    if reason:
        raise UserError(f"{rows.where}: image '{file}' {reason} (paths are relative to the folder of the CSV file).")
    return split, Record(file, row["pid"], camera)
