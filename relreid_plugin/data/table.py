"""Data sets in a CSV file: ``path,pid,camid,split``."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from ..errors import UserError, did_you_mean
from .files import why_not_regular
from .split import FolderSplits, Record, number_identities, one_record_per_file

SPLITS = ("train", "query", "gallery")
LAYOUT = "a CSV file with the header path,pid,camid,split (camid may be missing; split is train, query or gallery)"


def read_table(path: str | Path) -> FolderSplits:
    """Read a data set from a CSV file.

    Columns: ``path`` (relative to the CSV file's folder, or absolute), ``pid`` (any text; -1 is junk), ``camid`` (an
    integer from 0; the column may be missing or empty) and ``split`` (train, query or gallery). Others are passed over.

    Args:
        path: The CSV file, UTF-8.

    Raises:
        UserError: The file is missing or no CSV file, a column is missing, or a row is wrong; the sentence names the file
            and the line.
    """
    path = Path(path)
    reason = why_not_regular(path)
    if reason:
        raise UserError(f"table '{path}' {reason}; it should be {LAYOUT}.")
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    lines_with_camera: list[int] = []
    lines_without: list[int] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            for column in ("path", "pid", "split"):
                if column not in header:
                    raise UserError(f"{path}, line 1: no column '{column}' in the header; it should be {LAYOUT}.")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                split, record = _parse_row(row, where, path.parent)
                (lines_without if record.camera is None else lines_with_camera).append(reader.line_num)
                splits[split].append(record)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error}).") from None
    if lines_with_camera and lines_without:
        raise UserError(
            f"{path}, line {lines_without[0]}: no camid, but line {lines_with_camera[0]} has one; give all or none."
        )
    for split, records in splits.items():
        if not records:
            raise UserError(f"{path}: no row has the split '{split}'; every split needs images.")
    splits, notes = one_record_per_file(splits)
    numbered = number_identities(splits, first_camera=0)
    numbered.notes[:0] = notes
    return numbered


def _parse_row(row: dict[str, str | None], where: str, folder: Path) -> tuple[str, Record]:
    values = {key: (row.get(key) or "").strip() for key in ("path", "pid", "camid", "split")}
    for column in ("path", "pid", "split"):
        if not values[column]:
            raise UserError(f"{where}: the column '{column}' is empty.")
    if values["split"] not in SPLITS:
        raise UserError(f"{where}: unknown split '{values['split']}'{did_you_mean(values['split'], SPLITS)}")
    camera: int | None = None
    if values["camid"]:
        if not values["camid"].isascii() or not values["camid"].isdigit():
            raise UserError(f"{where}: camid must be an integer from 0, got '{values['camid']}'.")
        camera = int(values["camid"])
    file = os.path.normpath(folder / values["path"])
    reason = why_not_regular(file)
    if reason:
        raise UserError(f"{where}: image '{file}' {reason} (paths are relative to the folder of the CSV file).")
    return values["split"], Record(file, values["pid"], camera)
