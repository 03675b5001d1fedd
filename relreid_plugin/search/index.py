"""Search in a table on disk: exactly, or through a faiss index that lies beside it.

Scores are those of :mod:`relreid_plugin.functional.neighbours`: inner products summed in float64 and rounded to float32,
equal scores by the lower row. An approximate index (IVF, HNSW) only chooses candidates, which are scored anew.

Shape letters: N rows, Q queries, d width, k results.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..engine.checkpoint import atomic_file, write_json
from ..errors import UserError
from ..functional.neighbours import TOLERANCE, SearchConfig, exact_scores
from .store import FORMAT, FeatureStore, RowTable, check_digest, check_size, file_digest, read_manifest, writer_lock

_POINTS_PER_CELL = 39  # training points that faiss wants per IVF cell
_SAMPLE_PER_CELL = 64  # training points that are drawn per IVF cell
_SPARE = 12  # candidates beyond k, so that near-ties are decided by the definition
_QUERIES = 1024  # queries that one pass over a table serves


def stable_order(scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (Q, k) scores and rows by falling score, equal scores by rising row.

    Args:
        scores: (Q, s).
        rows: (Q, s).
        k: Cut to s.
    """
    rows, order = rows.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], rows.gather(1, order)[:, :k]


def table_scores(queries: Tensor, table: RowTable, rows: Tensor) -> Tensor:
    """Return the defining scores (Q, s) float32 of chosen pairs; rows of -1 score minus infinity.

    Args:
        queries: (Q, d).
        table: The table.
        rows: (Q, s) int64.
    """
    wanted, local = rows.clamp_min(0).unique(return_inverse=True)
    return exact_scores(queries, table.take(wanted), local).masked_fill_(rows < 0, -torch.inf)


def search_exact(queries: Tensor, table: RowTable, k: int, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the k best rows of a table, read file by file.

    Args:
        queries: (Q, d) float32.
        table: (N, d) of unit rows.
        k: Cut to N.
        limit: Search the first rows only.

    Returns:
        (Q, k) float32 scores, falling, and (Q, k) int64 rows.
    """
    size = len(table) if limit is None else min(limit, len(table))
    k = min(k, size)
    parts = [_search_some(part, table, k, size) for part in queries.split(_QUERIES)] if k else []
    if not parts:
        return queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
    return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def _search_some(queries: Tensor, table: RowTable, k: int, size: int) -> tuple[Tensor, Tensor]:
    count = min(size, k + _SPARE)
    scores = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long)
    for start, block in table.blocks(stop=size):
        new, where = (queries @ block.t()).topk(min(count, len(block)), dim=1)
        scores, rows = torch.cat([scores, new], dim=1), torch.cat([rows, where + start], dim=1)
        if scores.shape[1] > count:
            scores, order = scores.topk(count, dim=1)
            rows = rows.gather(1, order)
    best, found = stable_order(table_scores(queries, table, rows), rows, k)
    if count < size:  # rows beyond the candidates that may be as near as the k-th
        tolerance = 2 * TOLERANCE * queries.norm(dim=1).clamp_min(1e-30)
        unclear = (scores.amin(dim=1) >= best[:, -1] - tolerance).nonzero().flatten()
        if len(unclear):
            best[unclear], found[unclear] = _decide(queries[unclear], table, k, size)
    return best, found


def _decide(queries: Tensor, table: RowTable, k: int, size: int) -> tuple[Tensor, Tensor]:
    """Search by the definition, in float64."""
    best = queries.new_empty(len(queries), 0)
    found = torch.empty(len(queries), 0, dtype=torch.long)
    for start, block in table.blocks(stop=size):
        exact = (queries.double() @ block.double().t()).float()
        rows = torch.arange(start, start + len(block)).expand(len(queries), -1)
        best, found = stable_order(torch.cat([best, exact], dim=1), torch.cat([found, rows], dim=1), k)
    return best, found


class TableIndex:
    """What searches a table; made by :func:`open_index`.

    Args:
        table: (N, d) of unit rows.
        config: Search backend.
        faiss_index: A faiss index over the table's rows; ``None``: every search reads the whole table and is exact.
        base: The same index in main memory, where it can search a part of the rows.
    """

    def __init__(self, table: RowTable, config: SearchConfig, faiss_index: Any = None, *, base: Any = None) -> None:
        self.table, self.config, self.faiss_index, self._base = table, config, faiss_index, base

    @property
    def exact(self) -> bool:
        """Whether every search finds the true neighbours."""
        return self.faiss_index is None

    def search(self, queries: Tensor, k: int, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the k best rows.

        Args:
            queries: (Q, d) float32 unit features.
            k: Cut to N.
            limit: Search the first rows only.

        Returns:
            (Q, k) scores, falling, equal ones by rising row, and (Q, k) int64 rows; where an approximate index finds fewer,
            the row is -1 and the score minus infinity.

        Raises:
            UserError: Queries of another width, or not finite.
        """
        if queries.dim() != 2 or queries.shape[1] != self.table.dim:
            raise UserError(
                f"queries of shape {tuple(queries.shape)} do not fit a gallery of width {self.table.dim}; both need "
                "the same model."
            )
        if not bool(torch.isfinite(queries).all()):
            raise UserError("query features hold NaN or infinity; check the images and the checkpoint they come from.")
        queries = queries.detach().cpu().float().contiguous()
        size = len(self.table) if limit is None else min(limit, len(self.table))
        k = min(k, size)
        if self.faiss_index is None or not k or not len(queries):
            return search_exact(queries, self.table, k, limit=limit)
        if size < len(self.table) and self._base is None:
            return search_exact(queries, self.table, k, limit=limit)
        found = self._candidates(queries, min(size, max(2 * k, k + _SPARE)), size)
        return stable_order(table_scores(queries, self.table, found), found, k)

    def _candidates(self, queries: Tensor, count: int, size: int) -> Tensor:
        """(Q, d) -> (Q, count) rows, -1 where there is none."""
        if size == len(self.table):
            return torch.from_numpy(self.faiss_index.search(queries.numpy(), count)[1])
        chosen = _faiss().IDSelectorRange(0, size)
        if self.config.index == "hnsw":
            options = _faiss().SearchParametersHNSW(sel=chosen, efSearch=max(self.config.ef, count))
        else:
            options = _faiss().SearchParametersIVF(sel=chosen, nprobe=self._base.nprobe)
        return torch.from_numpy(self._base.search(queries.numpy(), count, params=options)[1])


def open_index(
    table: RowTable, path: Path, config: SearchConfig | None = None, *, build: bool = True, verify: bool = False
) -> TableIndex:
    """Open the index that lies beside a table; build it, or add the new rows to it, where it is not up to date.

    ``flat`` needs no index: the table's own files are searched exactly. So is a table with fewer rows than IVF can be
    trained on. Where ``table`` is a folder of shards, every shard has its own index and faiss's ``IndexShards`` searches
    them, each in a thread.

    Args:
        table: The rows.
        path: The index's file without its suffixes; ``.faiss`` and ``.json`` are added, and the kind of index.
        config: Kind of index and search parameters; ``None``: exact.
        build: Build or extend; ``False`` refuses an index that is missing or out of date.
        verify: Compare the index with its SHA-256.

    Raises:
        UserError: faiss is not installed, or the index is missing, stale or damaged and ``build`` is off.
    """
    config = config or SearchConfig()
    if config.index == "flat" or (config.index == "ivf" and len(table) < 4 * _POINTS_PER_CELL):
        return TableIndex(table, config)
    dataclasses.replace(config, backend="faiss").resolve()  # complains where it is not installed
    if isinstance(table, FeatureStore) and len(table.shards) > 1:
        stores = [FeatureStore(folder) for folder in table.shards]
        parts = [open_index(store, store.folder / path.name, config, build=build, verify=verify) for store in stores]
        if any(part.exact for part in parts):
            return TableIndex(table, config)
        sharded = _faiss().IndexShards(table.dim, True, True)  # threads, rows numbered on from shard to shard
        for part in parts:
            sharded.add_shard(part.faiss_index)
        return TableIndex(table, config, sharded)
    index = _current_index(table, path, config, build, verify)
    return TableIndex(table, config, _on_gpu(index, config), base=index)


def _faiss() -> Any:
    return importlib.import_module("faiss")


def _current_index(table: RowTable, path: Path, config: SearchConfig, build: bool, verify: bool) -> Any:
    manifest, data = path.with_name(f"{path.name}-{config.index}.json"), path.with_name(f"{path.name}-{config.index}.faiss")
    try:
        index, rows = _load(table, manifest, data, config, verify)
    except UserError as error:
        if not build:
            raise
        if manifest.is_file():
            print(f"note: the index is built anew: {error}")
        index, rows = None, 0
    if rows < len(table):
        if not build:
            raise UserError(f"index '{data}' covers {rows} of {len(table)} rows; let it be brought up to date.")
        with writer_lock(path.parent):
            if index is None:
                index = _train(table, config)
            blocks = table.blocks(start=rows, verify=True)
            with tqdm(total=len(table) - rows, desc="indexing", unit="row", leave=False, disable=None) as bar:
                for _, block in blocks:
                    index.add(block.numpy())
                    bar.update(len(block))
            with atomic_file(data) as temporary:
                _faiss().write_index(index, str(temporary))
            entry = {"rows": len(table), "table": table.fingerprint(), "index": config.index, "nlist": config.nlist}
            write_json(manifest, {"format": FORMAT, **entry, "bytes": data.stat().st_size, "digest": file_digest(data)})
    if config.index == "ivf":
        index.nprobe = min(config.nprobe, index.nlist)
    else:
        index.hnsw.efSearch = config.ef
    return index


def _load(table: RowTable, manifest: Path, data: Path, config: SearchConfig, verify: bool) -> tuple[Any, int]:
    entry = read_manifest(manifest, what="index")
    check_size(data, entry["bytes"])
    if verify:
        check_digest(data, entry["digest"])
    if entry["nlist"] != config.nlist:
        raise UserError(f"index '{data}' was built with nlist {entry['nlist']}, not {config.nlist}.")
    if entry["rows"] > len(table) or table.fingerprint(entry["rows"]) != entry["table"]:
        raise UserError(f"index '{data}' belongs to other features than those of the store.")
    try:
        return _faiss().read_index(str(data)), entry["rows"]
    except Exception:
        raise UserError(f"index '{data}' is damaged and cannot be read.") from None


def _train(table: RowTable, config: SearchConfig) -> Any:
    size, width = len(table), table.dim
    if config.index == "hnsw":
        return _faiss().IndexHNSWFlat(width, 32, _faiss().METRIC_INNER_PRODUCT)
    nlist = min(config.nlist or int(4 * size**0.5), size // _POINTS_PER_CELL)
    index = _faiss().IndexIVFFlat(_faiss().IndexFlatIP(width), width, nlist, _faiss().METRIC_INNER_PRODUCT)
    drawn = np.random.default_rng(0).choice(size, min(size, _SAMPLE_PER_CELL * nlist), replace=False)
    index.train(table.take(torch.from_numpy(np.sort(drawn))).numpy())
    return index


def _on_gpu(index: Any, config: SearchConfig) -> Any:
    """An IVF index on all GPUs, where faiss was built for them; HNSW has no such form."""
    if config.index != "ivf" or not hasattr(_faiss(), "index_cpu_to_all_gpus") or not _faiss().get_num_gpus():
        return index
    return _faiss().index_cpu_to_all_gpus(index)
