"""Tables of samples of several images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from .files import printable, why_not_regular
from .labels import plain
from .rows import SPLITS as _TABLE_SPLITS
from .rows import Rows
from .samples import MultimodalSplits, _assemble, _Sample
from .views import incomplete_sample

_TABLE_COLUMNS = ("pid", "camid", "split", "scene")

_TABLE_LAYOUT = (
    "a CSV file with the columns pid, split and one per modality (R, N, T); camid and scene may follow, and split is train, "
    "query or gallery"
)


def read_multimodal_table(path: str | Path) -> MultimodalSplits:
    """Read a data set from a CSV file with one column of paths for each modality.

    Columns: ``pid`` (any text; -1 is junk), ``split`` (train, query or gallery), ``camid`` (an integer from 0 or any text;
    may be missing or empty), ``scene`` (any text; may be missing, and takes the camera's place where it is there). Every
    other column is a modality named by its header, in the order of the columns; its paths are relative to the CSV file's
    folder, or absolute. Rows keep their order.

    Args:
        path: The CSV file; :class:`~relreid_plugin.data.rows.Rows` says what it may look like.

    Raises:
        UserError: The file is missing or no CSV file, a column is missing, or a row is wrong or lacks a modality; the
            sentence names the file and the line.
    """
    rows = Rows(path, ("pid", "split"), ("camid", "scene"), layout=_TABLE_LAYOUT)
    splits: dict[str, list[_Sample]] = {split: [] for split in _TABLE_SPLITS}
    scenes: dict[str, list[str]] = {split: [] for split in _TABLE_SPLITS}
    modalities = _table_modalities(rows)
    for row in rows:
        split, sample = _parse_row(rows, row, modalities)
        splits[split].append(sample)
        if "scene" in rows.header:
            if not row["scene"]:
                raise UserError(
                    f"{rows.where}: the column 'scene' is empty; give every row a scene, or leave the column out."
                )
            scenes[split].append(plain(row["scene"]))
    for split, samples in splits.items():
        if not samples:
            raise UserError(f"{path}: no row has the split '{split}'; every split needs samples.")
    if "scene" not in rows.header:
        return _assemble(splits, modalities, ordered=True, first_camera=0)
    names = sorted({scene for values in scenes.values() for scene in values})
    numbers = {scene: str(number) for number, scene in enumerate(names)}
    for split, samples in splits.items():
        splits[split] = [replace(sample, camera=numbers[scene]) for sample, scene in zip(samples, scenes[split])]
    return _assemble(splits, modalities, group="scene", ordered=True, first_camera=0)


def _table_modalities(rows: Rows) -> tuple[str, ...]:
    names = [name for name in rows.header if name and name not in _TABLE_COLUMNS]
    if not names or "path" in map(str.casefold, names):
        found = "a column 'path'" if names else "no column of a modality"
        raise UserError(f"{rows.path}, line 1: the header has {found}; it should be {_TABLE_LAYOUT}.")
    return tuple(names)


def _parse_row(rows: Rows, row: dict[str, str], modalities: tuple[str, ...]) -> tuple[str, _Sample]:
    identity = rows.value(row, "pid")
    split, camera = rows.split(row), rows.camera(row)
    there = next((f"'{row[name]}' ({name})" for name in modalities if row[name]), "nothing")
    for name in modalities:
        if not row[name]:
            raise UserError(f"{rows.where}: the {name} image is not given, though {there} is; fill in the column '{name}'.")
    paths = {name: rows.file(row, name) for name in modalities}
    absent = [name for name, file in paths.items() if not os.path.lexists(file)]
    for name, file in paths.items():
        if name not in absent and (reason := why_not_regular(file)):
            raise UserError(f"{rows.where}: the {name} image '{printable(file)}' {reason}.")
    if absent:
        raise UserError(
            f"{rows.where}: {incomplete_sample(paths, absent)} (paths are relative to the folder of the CSV file)."
        )
    return split, _Sample(tuple(paths.values()), identity, camera)
