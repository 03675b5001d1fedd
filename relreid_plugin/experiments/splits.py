"""A configuration on every split of its data sets (VIPeR, classic CUHK03, …), and the mean over them as one table."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.defaults import load_config
from ..engine import checkpoint as ckpt
from ..engine.folder import share_stages
from ..engine.grid import Part, Variant, check_folder, train
from ..engine.runner import read_metrics
from ..engine.table import TITLES, markdown, millions, score_cells, score_columns, score_header
from ..errors import UserError
from ..host import apply_patches, open_dataset, resolve_dataset
from ..host.registry import dataset_table

_LAST = re.compile(r"between 0 and (\d+)")
_COUNT = re.compile(r"len\(splits\) \((\d+)\)")
_BEYOND = 10**6  # a split that no data set has


def _names(cfg: Any) -> list[str]:
    """The configuration's data sets whose class takes the number of a split."""
    found = []
    for name in dict.fromkeys([*cfg.data.sources, *cfg.data.targets]):
        resolve_dataset(name, cfg.data.root, data_type=cfg.data.type, download=cfg.data.download)
        cls = dataset_table(cfg.data.type)[name]
        if isinstance(cls, type) and "split_id" in inspect.signature(cls).parameters:
            found.append(name)
    if "cuhk03" in found and not cfg.cuhk03.classic_split:
        found.remove("cuhk03")  # one fixed split
    return found


def _open(cfg: Any, name: str, split: int, cache_dir: Path) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # the host describes the data set at length
        return open_dataset(
            name,
            root=cfg.data.root,
            cache_dir=cache_dir,
            data_type=cfg.data.type,
            split_id=split,
            verbose=False,
            cuhk03_labeled=cfg.cuhk03.labeled_images,
            cuhk03_classic_split=cfg.cuhk03.classic_split,
        )


def count_splits(cfg: Any, cache_dir: Path) -> int:
    """Return how many splits the data sets of a configuration have.

    Args:
        cfg: A configuration.
        cache_dir: Where split files go if the data set's folder must not be written to.

    Raises:
        UserError: A data set is missing, none has splits, or one does not say how many.
    """
    apply_patches()
    names, counts = _names(cfg), []
    for name in names:
        try:
            _open(cfg, name, _BEYOND, cache_dir)
        except UserError as error:
            last, count = _LAST.search(str(error)), _COUNT.search(str(error))
            if not (last or count):
                raise
            counts.append(int(last[1]) + 1 if last else int(count[1]) if count else 0)
        else:
            raise UserError(f"data set '{name}' does not say how many splits it has; name them by --splits 0,1,2.")
    if not counts:
        raise UserError(
            f"data sets {', '.join(cfg.data.sources)} have one split each; several belong to viper, prid, grid, ilids, "
            "cuhk01, cuhk03 with 'cuhk03.classic_split True', and some video data sets."
        )
    return min(counts)


def parse_splits(text: str, available: int) -> list[int]:
    """Return the splits that an option names: ``all``, a number of first ones like ``10``, or a list like ``0,2,4``.

    Raises:
        UserError: Something else, or a split that is not there.
    """
    if text == "all":
        return list(range(available))
    words = text.split(",")
    if not all(word.isdecimal() and len(word) < 10 for word in words):
        raise UserError(f"command line: --splits takes all, a number like 10, or a list like 0,2,4, got '{text}'.")
    numbers = [int(word) for word in words]
    chosen = numbers if "," in text else list(range(min(numbers[0], available + 1)))
    if not chosen or len(set(chosen)) < len(chosen) or max(chosen) >= available:
        raise UserError(f"command line: --splits {text}: the data sets have {available} splits, 0 to {available - 1}.")
    return chosen


def plan(
    config_file: str, splits: Sequence[int], *, folder: Path, overrides: Sequence[str]
) -> tuple[list[Part], dict[int, int]]:
    """Return the run of every split, and which splits need no training of their own.

    Two splits with the same training data differ in testing only (VIPeR's 2n and 2n + 1: query and gallery swapped): the
    second is tested with the model of the first.

    Args:
        config_file: YAML configuration.
        splits: Their numbers.
        folder: Runs go to ``<folder>/split<number>``.
        overrides: ``KEY VALUE …``.

    Returns:
        The runs in the order of ``splits``, and place of a run to the place of the one whose model it takes.

    Raises:
        UserError: A configuration is wrong, or a folder holds a run of another configuration.
    """
    parts: list[Part] = []
    same: dict[int, int] = {}
    seen: dict[Any, int] = {}
    for number in splits:
        place = folder / f"split{number:02d}"
        cfg = load_config(config_file, [*overrides, "data.split_id", str(number), "data.save_dir", str(place)])
        part = Part(Variant(place.name, f"split {number}", ()), cfg.train.seed, place, cfg)
        check_folder(part)
        trained = tuple(
            (name, tuple(sorted(_open(cfg, name, number, folder / "cache").train)))
            for name in _names(cfg)
            if name in cfg.data.sources
        )
        first = seen.setdefault(trained, len(parts))
        if first != len(parts) and not cfg.data.combineall and not cfg.data.load_train_targets:
            same[len(parts)] = first
        parts.append(part)
    return parts, same


def run_splits(
    config_file: str, *, splits: str = "all", out: Path, jobs: int = 1, overrides: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Train and test a configuration on several splits; runs that are done are used again.

    Args:
        config_file: YAML configuration.
        splits: See :func:`parse_splits`.
        out: Runs go to ``<out>/split<number>``, the table to ``splits.md`` and ``splits.json``.
        jobs: Runs at a time.
        overrides: ``KEY VALUE …`` for all of them.

    Returns:
        One record per row of the table: ``target``, ``protocol``, ``method``, ``mean``, ``std``, ``parameters``, ``metric``,
        ``splits``.

    Raises:
        UserError: No splits, or a run fails; its own sentence is handed on.
    """
    for key, option in (("data.split_id", "--splits"), ("data.save_dir", "--out")):
        if key in overrides[::2]:
            raise UserError(f"command line: '{key}' is set by {option}; leave it out.")
    cfg = load_config(config_file, overrides)
    chosen = parse_splits(splits, count_splits(cfg, out / "cache"))
    parts, same = plan(config_file, chosen, folder=out, overrides=overrides)
    train([part for place, part in enumerate(parts) if place not in same], jobs=jobs)
    for place, first in same.items():
        if not (parts[place].folder / "metrics.json").is_file():
            share_stages(parts[first].folder, parts[place].folder, cfg.train.stages)
    train([parts[place] for place in same], jobs=jobs, options=("--eval-only",))
    records = collect(parts, chosen)
    ckpt.write_json(out / "splits.json", {"rows": records, "splits": chosen, "config": cfg.dump()})
    ckpt.write_text(out / "splits.md", splits_table(records) + "\n")
    return records


def _merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one method over splits -> means and standard deviations."""
    names = ["mAP", "mINP", *records[0]["cmc"]]
    values = np.array([[row["mAP"], row["mINP"], *row["cmc"].values()] for row in records])
    deviation = values.std(axis=0, ddof=1) if len(records) > 1 else np.zeros(len(names))
    return {
        "protocol": records[0]["protocol"],
        "mean": dict(zip(names, values.mean(axis=0).tolist())),
        "std": dict(zip(names, deviation.tolist())),
        "parameters": records[0]["parameters"],
        "metric": records[0].get("metric", ""),
        "runs": len(records),
    }


def collect(parts: Sequence[Part], splits: Sequence[int]) -> list[dict[str, Any]]:
    """Return means and sample standard deviations of every row over the splits.

    Raises:
        UserError: The runs do not have the same rows.
    """
    tables = [
        {(row["target"], row["protocol"], row["method"]): row for row in read_metrics(p.folder)["rows"]} for p in parts
    ]
    for part, table in zip(parts, tables):
        if list(table) != list(tables[0]):
            raise UserError(f"'{part.folder}' has other rows than '{parts[0].folder}'; delete it, and it is made anew.")
    return [
        {
            "target": target,
            "method": method,
            **_merge([table[target, protocol, method] for table in tables]),
            "splits": list(splits),
            "mAP": [table[target, protocol, method]["mAP"] for table in tables],
        }
        for target, protocol, method in tables[0]
    ]


def splits_table(records: Sequence[dict[str, Any]]) -> str:
    """Return the means as Markdown, one table per test set and protocol: percent, mean ± standard deviation."""
    tables = []
    for target, protocol in dict.fromkeys((record["target"], record["protocol"]) for record in records):
        members = [record for record in records if (record["target"], record["protocol"]) == (target, protocol)]
        columns, count = score_columns(members[0]["mean"]), len(members[0]["splits"])
        title = f"**{target}**, {TITLES[protocol]}, mean ± standard deviation over {count} splits"
        rows = [
            [
                record["method"],
                *score_cells(record["mean"], record["std"] if count > 1 else None, columns),
                millions(record["parameters"]),
            ]
            for record in members
        ]
        tables.append(markdown(["method", *score_header(columns), "params"], rows, title=title))
    return "\n\n".join(tables)
