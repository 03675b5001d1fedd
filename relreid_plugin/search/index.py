"""Search in a table on disk: exactly, or through a faiss index that lies beside it.

Scores are those of :mod:`relreid_plugin.metrics.neighbours`: inner products summed in float64 and rounded to float32,
equal scores by the lower row. An approximate index (IVF, HNSW) only chooses candidates, which are scored anew; HNSW holds
its rows in bfloat16 for that, half of what they take.

An IVF index stays on disk: its file is mapped into memory, and a query reads the cells that it visits. Many queries at once
(a gallery with itself) are searched cell by cell, a matrix product for all queries that visit a cell, several times faster
than one query after the other.

Shape letters: N rows, Q queries, d width, k results.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..engine.checkpoint import atomic_file
from ..errors import UserError, needed
from ..features.arrays import FORMAT, RowTable, check_size, read_manifest, write_manifest
from ..features.store import FeatureStore, writer_lock
from ..features.verified import Checked, check_digest, check_once, file_digest
from ..metrics.candidates import TOLERANCE
from ..metrics.neighbours import POINTS_PER_CELL, SearchConfig, ivf_cells
from .bycamera import RowPart
from .exact import QUERIES, SPARE, best_of_one, checked_queries, scan, search_exact, settle, stable_order, table_scores

_SAMPLE_PER_CELL = 64  # training points that are drawn per IVF cell
_CELL_QUERIES = 65_536  # queries that are searched cell by cell at a time
_QUERIES_PER_CELL = 8  # from that many on the matrix products of a search cell by cell pay
_GROWTH = 2  # an IVF index is built anew when there are more rows than that many times those it was trained for


class TableIndex:
    """What searches a table; made by :func:`open_index`.

    Args:
        table: (N, d) of unit rows.
        config: Search backend.
        faiss_index: A faiss index over the table's rows; ``None``: every search reads the whole table and is exact.
        base: The same index as it was read from its file, where it can search a part of the rows.
        file: That file.
        alive: (N,) bool, the rows that may be found; ``None``: all.
    """

    def __init__(
        self,
        table: RowTable,
        config: SearchConfig,
        faiss_index: Any = None,
        *,
        base: Any = None,
        file: Path | None = None,
        alive: Tensor | None = None,
    ) -> None:
        self.table, self.config, self.faiss_index, self._base, self.file = table, config, faiss_index, base, file
        self.alive = None if alive is None else alive[: len(table)]

    @property
    def exact(self) -> bool:
        """Whether every search finds the true neighbours."""
        return self.faiss_index is None

    def _take(self, rows: Tensor) -> Tensor:
        """Rows (n,) -> (n, d), out of the index where it holds them as they are: else the disk may have to be read."""
        if self._base is None or self.config.index == "hnsw":
            return self.table.take(rows)
        return torch.from_numpy(self._base.reconstruct_batch(rows.numpy()))

    def search(
        self, queries: Tensor, k: int, *, limit: int | None = None, among: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the k best rows.

        Args:
            queries: (Q, d) float32 unit features.
            k: Cut to N.
            limit: Search the first rows only.
            among: (N,) bool, search these rows only.

        Returns:
            (Q, k) scores, falling, equal ones by rising row, and (Q, k) int64 rows; where an approximate index finds fewer,
            the row is -1 and the score minus infinity.

        Raises:
            UserError: Queries of another width, or not finite.
        """
        queries = checked_queries(queries, self.table.dim)
        size = len(self.table) if limit is None else min(limit, len(self.table))
        if self.alive is not None:
            among = self.alive if among is None else among & self.alive
            among = torch.cat([among[:size], torch.zeros(len(among) - size, dtype=torch.bool)])
        if among is not None:
            return self._search_among(queries, k, among)
        k = min(k, size)
        if self._scans(size) or not k or not len(queries):
            return search_exact(queries, self.table, k, limit=limit)
        found = self._candidates(queries, min(size, self._scored(k)), size)[1]
        if len(queries) == 1:
            return best_of_one(queries, self._take, found, k)
        return stable_order(table_scores(queries, self._take, found), found, k)

    def _scored(self, k: int) -> int:
        """How many candidates are scored for the k best; a search front that is narrower has no more of them."""
        count = max(2 * k, k + SPARE)
        return max(k, min(count, self.config.ef)) if self.config.index == "hnsw" else count

    def of_camera(self, cameras: Tensor, camera: int | None, *, near: bool, size: int) -> Tensor | None:
        """Return which rows of the first ``size`` are of a camera, or are not, as :meth:`search` takes them.

        Args:
            cameras: (N,) of the rows.
            camera: The camera; ``None``: no row is of it.
            near: Rows of it; else the others.
            size: Rows.

        Returns:
            (N,) bool; ``None`` where there is no such row.
        """
        cameras = cameras[: len(self.table)]
        among = torch.full(cameras.shape, not near) if camera is None else (cameras == camera) == near
        among[size:] = False
        return among if bool(among.any()) else None

    def _search_among(self, queries: Tensor, k: int, among: Tensor) -> tuple[Tensor, Tensor]:
        rows = among.nonzero().flatten()
        k = min(k, len(rows))
        if self.faiss_index is None or self._base is None or not k or not len(queries):
            scores, found = search_exact(queries, RowPart(self.table, rows), k)
            return scores, rows[found]
        bits = np.packbits(among.numpy(), bitorder="little")
        chosen = _faiss().IDSelectorBitmap(bits)
        found = self._selected(queries, min(len(rows), max(2 * k, k + SPARE)), chosen)[1]
        return stable_order(table_scores(queries, self._take, found), found, k)

    def neighbours(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k best rows of many queries without scoring them all by the definition, which is what takes longest.

        Args:
            queries: (Q, d) float32 unit features.
            k: Cut to N.

        Returns:
            (Q, k) int64 rows by falling score, those of :meth:`search` but for the order, -1 where an approximate index
            finds fewer; and (Q,) float32, the defining score of the last one.

        Raises:
            UserError: As :meth:`search`.
        """
        queries = checked_queries(queries, self.table.dim)
        if self.alive is not None or (self.config.index == "hnsw" and not self.exact):
            scores, rows = self.search(queries, k)
            return rows, scores[:, -1]
        size = len(self.table)
        k, count = min(k, size), min(size, k + SPARE)
        parts = []
        for part in queries.split(QUERIES if self._scans(size) else _CELL_QUERIES):
            if self._scans(size):
                scores, rows = scan(part, self.table, count, size)
            else:
                scores, rows = self._candidates(part, count, size)
            found = rows[:, :k].clone()
            last = table_scores(part, self._take, found[:, -1:])[:, 0]
            tolerance = 2 * TOLERANCE * part.norm(dim=1).clamp_min(1e-30)
            near = scores[:, max(0, k - 2) : k + 1]  # which rows are in the list, and which is its last
            unclear = ((near[:, :-1] - near[:, 1:] <= tolerance.unsqueeze(1)).any(dim=1) | (found < 0).any(dim=1)).nonzero()
            if len(unclear):
                some = unclear.flatten()
                if self._scans(size):
                    best, found[some] = settle(part[some], self.table, scores[some], rows[some], k, size)
                else:
                    best, found[some] = stable_order(table_scores(part[some], self._take, rows[some]), rows[some], k)
                last[some] = best[:, -1]
            parts.append((found, last))
        return torch.cat([found for found, _ in parts]), torch.cat([last for _, last in parts])

    def _scans(self, size: int) -> bool:
        """Whether the first ``size`` rows are searched by reading them."""
        return self.faiss_index is None or (size < len(self.table) and self._base is None)

    def _candidates(self, queries: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
        """(Q, d) -> (Q, count) float32 scores and rows, -1 where there is none."""
        if size == len(self.table):
            if self.config.index == "ivf" and self.faiss_index is self._base:
                if len(queries) * self._base.nprobe >= _QUERIES_PER_CELL * self._base.nlist:
                    return _search_by_cells(self._base, queries, count)
            found = self.faiss_index.search(queries.numpy(), count)
        else:
            return self._selected(queries, count, _faiss().IDSelectorRange(0, size))
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def _selected(self, queries: Tensor, count: int, chosen: Any) -> tuple[Tensor, Tensor]:
        """What the index finds among rows that a selector of faiss's lets through."""
        if self.config.index == "hnsw":
            options = _faiss().SearchParametersHNSW(sel=chosen, efSearch=max(self.config.ef, count))
        else:
            options = _faiss().SearchParametersIVF(sel=chosen, nprobe=self._base.nprobe)
        found = self._base.search(queries.numpy(), count, params=options)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _search_by_cells(index: Any, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What an IVF index finds, cell by cell: the scores of all queries that visit a cell are one matrix product."""
    faiss, width = _faiss(), queries.shape[1]
    parts = []
    for part in queries.split(_CELL_QUERIES):
        cells = torch.from_numpy(index.quantizer.search(part.numpy(), index.nprobe)[1])
        cells, order = cells.flatten().sort()
        visitors = order.div_(index.nprobe, rounding_mode="floor")
        bounds = torch.searchsorted(cells, torch.arange(index.nlist + 1)).tolist()
        heap = faiss.ResultHeap(len(part), count, keep_max=True)
        for cell in range(index.nlist):
            some, size = visitors[bounds[cell] : bounds[cell + 1]], index.invlists.list_size(cell)
            if not len(some) or not size:
                continue
            raw = faiss.rev_swig_ptr(index.invlists.get_codes(cell), 4 * size * width)
            scores = part.index_select(0, some) @ torch.from_numpy(raw.view(np.float32).reshape(size, width)).t()
            heap.heaps.addn_query_subset_with_ids(  # 0: the same rows for every query
                len(some),
                faiss.swig_ptr(some.numpy()),
                size,
                faiss.swig_ptr(scores.numpy()),
                index.invlists.get_ids(cell),
                0,
            )
        heap.finalize()
        parts.append((torch.from_numpy(heap.D), torch.from_numpy(heap.I)))
    return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def open_index(
    table: RowTable,
    path: Path,
    config: SearchConfig | None = None,
    *,
    build: bool = True,
    verify: bool = False,
    alive: Tensor | None = None,
) -> TableIndex:
    """Open the index that lies beside a table; build it, or add the new rows to it, where it is not up to date.

    The cells of an IVF index are those of the rows that it was trained for; it is built anew when there are more than twice
    as many.

    ``flat`` needs no index: the table's own files are searched exactly. So it is with ``scan``, which is quicker only where
    a whole gallery is searched in itself, and with a table of fewer rows than IVF can be trained on. Where ``table`` is a
    folder of shards, every shard has its own index and faiss's ``IndexShards`` searches them, each in a thread.

    Args:
        table: The rows.
        path: The index's file without its suffixes; ``.faiss`` and ``.json`` are added, and the kind of index.
        config: Kind of index and search parameters; ``None``: exact.
        build: Build or extend; ``False`` refuses an index that is missing or out of date.
        verify: Compare the index with its SHA-256.
        alive: (N,) bool, the rows that may be found; ``None``: all.

    Raises:
        UserError: faiss is not installed, the parameters make no sense, or the index is missing, stale or damaged and
            ``build`` is off.
    """
    config = config or SearchConfig()
    if config.nlist < 0 or config.nprobe < 1 or config.ef < 1:
        raise UserError(
            f"an index needs nlist 0 (chosen by size) or more, nprobe and ef 1 or more, got {config.nlist}, {config.nprobe} "
            f"and {config.ef}."
        )
    if config.index in ("flat", "scan") or (config.index == "ivf" and len(table) < 4 * POINTS_PER_CELL):
        return TableIndex(table, config, alive=alive)
    dataclasses.replace(config, backend="faiss").resolve()  # complains where it is not installed
    if isinstance(table, FeatureStore) and len(table.shards) > 1:
        stores = [FeatureStore(folder) for folder in table.shards]
        parts = [open_index(store, store.folder / path.name, config, build=build, verify=verify) for store in stores]
        if any(part.exact for part in parts):
            return TableIndex(table, config, alive=alive)
        sharded = _faiss().IndexShards(table.dim, True, True)  # threads, rows numbered on from shard to shard
        for part in parts:
            sharded.add_shard(part.faiss_index)
        return TableIndex(table, config, sharded, alive=alive)
    index = _current_index(table, path, config, build, verify)
    file = path.with_name(f"{path.name}-{config.index}.faiss")
    return TableIndex(table, config, _on_gpu(index, config), base=index, file=file, alive=alive)


def _faiss() -> Any:
    return needed("faiss", "the index of a store")


def _current_index(table: RowTable, path: Path, config: SearchConfig, build: bool, verify: bool) -> Any:
    manifest, data = path.with_name(f"{path.name}-{config.index}.json"), path.with_name(f"{path.name}-{config.index}.faiss")
    entry: dict[str, Any] = {"rows": 0, "trained": 0}
    try:
        entry = _check(table, manifest, data, config, verify)
        index = _read(data, config, mapped=entry["rows"] == len(table))
    except UserError as error:
        if not build:
            raise
        if manifest.is_file():
            print(f"note: the index is built anew: {error}")
        index, entry["rows"] = None, 0
    if entry["rows"] < len(table):
        if not build:
            raise UserError(f"index '{data}' covers {entry['rows']} of {len(table)} rows; let it be brought up to date.")
        if index is not None and config.index == "ivf" and len(table) > _GROWTH * entry["trained"]:
            print(
                f"note: the index is built anew: it was made for {entry['trained']} rows, there are {len(table)} now, and "
                f"{index.nlist} cells have become {ivf_cells(len(table), config)}."
            )
            index, entry["rows"] = None, 0
        with writer_lock(path.parent):
            trained = entry["trained"] if index is not None else len(table)
            index = _train(table, config) if index is None else index
            _add(index, table, entry["rows"], config)
            with atomic_file(data) as temporary:
                write_index(index, temporary)
            entry = {"rows": len(table), "trained": trained, "table": table.fingerprint(), "index": config.index}
            entry.update(nlist=config.nlist, bytes=data.stat().st_size, digest=file_digest(data))
            write_manifest(manifest, {"format": FORMAT, **entry})
        index = _read(data, config, mapped=True)
    if config.index == "ivf":
        index.nprobe = min(config.nprobe, index.nlist)
    else:
        index.hnsw.efSearch = config.ef
    return index


def write_index(index: Any, path: Path) -> None:
    """Write a faiss index; unlike faiss's own file writer this one notices when the last bytes find no room.

    Raises:
        OSError: It cannot be written.
    """
    failure: list[OSError] = []
    with path.open("wb") as stream:

        def write(data: bytes) -> int:
            try:
                return stream.write(data)
            except OSError as error:
                failure.append(error)
                return 0

        try:
            _faiss().write_index(index, _faiss().PyCallbackIOWriter(write))
        except RuntimeError:
            if not failure:
                raise
        if failure:
            raise failure[0]


def _check(table: RowTable, manifest: Path, data: Path, config: SearchConfig, verify: bool) -> dict[str, Any]:
    """The manifest of an index that belongs to the table."""
    entry = read_manifest(manifest, what="index")
    if not {"rows", "trained", "table", "nlist", "bytes", "digest"} <= entry.keys():
        raise UserError(f"'{manifest}' is damaged (entries are missing); make the index again or put back a copy.")
    check_size(data, entry["bytes"])
    if verify:
        check_digest(data, entry["digest"])
    else:
        check_once([Checked(data, ((0, -1, entry["digest"]),))])
    if entry["nlist"] != config.nlist:
        raise UserError(f"index '{data}' was built with nlist {entry['nlist']}, not {config.nlist}.")
    if entry["rows"] > len(table) or table.fingerprint(entry["rows"]) != entry["table"]:
        raise UserError(f"index '{data}' belongs to other features than those of the store.")
    return entry


def _read(data: Path, config: SearchConfig, *, mapped: bool) -> Any:
    """Read an index; an IVF index that is not to be added to stays on disk."""
    try:
        index = _faiss().read_index(str(data), _faiss().IO_FLAG_MMAP if mapped and config.index == "ivf" else 0)
    except Exception:
        raise UserError(f"index '{data}' is damaged and cannot be read; take it away and let it be built again.") from None
    if config.index == "ivf" and mapped:
        lists = _faiss().downcast_InvertedLists(index.invlists)
        lists.prefetch_nthread = 0  # threads that are started for every query take longer than the query
        index.make_direct_map(True)
    return index


def _train(table: RowTable, config: SearchConfig) -> Any:
    size, width = len(table), table.dim
    if config.index == "hnsw":
        kinds = _faiss().ScalarQuantizer  # float16 for versions that have no bfloat16 yet
        kind = getattr(kinds, "QT_bf16", kinds.QT_fp16)
        return _faiss().IndexHNSWSQ(width, kind, 32, _faiss().METRIC_INNER_PRODUCT)
    nlist = ivf_cells(len(table), config)
    index = _faiss().IndexIVFFlat(_faiss().IndexFlatIP(width), width, nlist, _faiss().METRIC_INNER_PRODUCT)
    drawn = np.random.default_rng(0).choice(size, min(size, _SAMPLE_PER_CELL * nlist), replace=False)
    index.train(table.take(torch.from_numpy(np.sort(drawn))).numpy())
    return index


def _add(index: Any, table: RowTable, start: int, config: SearchConfig) -> None:
    """Add the table's rows from ``start`` on."""
    cells = []
    with tqdm(total=len(table) - start, desc="indexing", unit="row", leave=False, disable=None) as bar:
        for _, block in table.blocks(start=start, verify=True):
            if config.index == "hnsw":
                index.add(block.numpy())
            else:
                cells.append(index.quantizer.search(block.numpy(), 1)[1][:, 0])
            bar.update(len(block))
    if not cells:
        return
    wanted = np.bincount(np.concatenate(cells), minlength=index.nlist)
    for cell, more in enumerate(wanted.tolist()):  # lists that grow row by row take up to twice the memory
        size = index.invlists.list_size(cell)
        index.invlists.resize(cell, size + more)
        index.invlists.resize(cell, size)
    for chosen, (first, block) in zip(cells, table.blocks(start=start)):
        rows = np.arange(first, first + len(block))
        pointers = [_faiss().swig_ptr(array) for array in (block.contiguous().numpy(), rows, chosen)]
        index.add_core(len(block), *pointers)


def _on_gpu(index: Any, config: SearchConfig) -> Any:
    """An IVF index on all GPUs, where faiss was built for them; HNSW has no such form."""
    if config.index != "ivf" or not hasattr(_faiss(), "index_cpu_to_all_gpus") or not _faiss().get_num_gpus():
        return index
    return _faiss().index_cpu_to_all_gpus(index)
