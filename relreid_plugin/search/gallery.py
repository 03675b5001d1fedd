"""Search a gallery on disk, with or without the relation encoder.

Three lines from a finished run to a ranking::

    extractor = FeatureExtractor("runs/mine")
    store = extractor.store("gallery", "photos/")
    result = GallerySearcher(store, encoder=extractor.encoder()).search(extractor.features(["query.jpg"]), k=10)

Shape letters: N gallery images, Q queries, d width, k results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.labels import Label
from ..errors import UserError
from ..metrics.cameras import UNKNOWN
from ..metrics.neighbours import SearchConfig, normalise
from ..metrics.rivals import rival_named
from ..options import check_integer
from .candidates import cameras_known, rerank_candidates
from .engines import FileEngine, Store, engine_of
from .filters import Filter
from .relations import BLOCK_ROWS


@dataclass(frozen=True)
class SearchResult:
    """Ranked gallery images of Q queries, best first.

    Attributes:
        scores: (Q, k) float32, larger is nearer: cosine, or 1 - distance after re-ranking; minus infinity where an
            approximate index found fewer than k.
        rows: (Q, k) int64 rows of the store; -1 where there is none.
        pids: (Q, k) identities, -1 where unknown.
        camids: (Q, k) cameras, -1 where unknown.
        paths: Q lists of k image files.
        identity_names: What the numbers in ``pids`` stand for that are no identities themselves.
        camera_names: The same for ``camids``.
    """

    scores: Tensor
    rows: Tensor
    pids: np.ndarray
    camids: np.ndarray
    paths: list[list[str]]
    identity_names: dict[int, str] = field(default_factory=dict)
    camera_names: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dicts(self) -> list[list[dict[str, Any]]]:
        """Return per query a list of ``rank``, ``score``, ``row``, ``pid``, ``camid``, ``path``, for JSON.

        Identities and cameras are numbers, or names where names are written; -1 where unknown.
        """
        return [
            [
                {
                    "rank": rank + 1,
                    "score": float(self.scores[query, rank]),
                    "row": int(self.rows[query, rank]),
                    "pid": _shown(self.pids[query, rank], self.identity_names),
                    "camid": _shown(self.camids[query, rank], self.camera_names),
                    "path": self.paths[query][rank],
                }
                for rank in range(self.rows.shape[1])
                if int(self.rows[query, rank]) >= 0
            ]
            for query in range(len(self))
        ]


def near_enough(scores: Tensor, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return results (Q, k) but those that score less than a threshold: rows are -1 there, scores minus infinity."""
    far = scores < threshold
    return scores.masked_fill(far, -float("inf")), rows.masked_fill(far, -1)


def _shown(number: np.integer, names: dict[int, str]) -> Label:
    return names.get(int(number), int(number))


class GallerySearcher:
    """Answer queries against a store: by cosine of the image features, or of features refined by a relation encoder.

    Indices and layer states lie beside the store and are made by :meth:`update`, or by the first search that needs them.

    Args:
        store: The gallery, its folder, or its name in Milvus (:func:`~relreid_plugin.search.engines.open_store`).
        encoder: Relation encoder of the run that made the features; ``None``: without relations.
        search: Index and its parameters; ``None``: the encoder's, exact without one. ``flat`` reads all features for every
            query; ``ivf`` and ``hnsw`` answer in milliseconds from a million images and may miss some.
        model: Fingerprint of the model that makes the query features (``FeatureExtractor.fingerprint``); checked against the
            store's.
        automatic: Bring indices and states up to date at the first search; ``False`` refuses to search then.
        verify: Compare all files with their SHA-256 first.
        complete: Refuse a store whose extraction was interrupted; else one line says how many images are there.

    Raises:
        UserError: No store, a damaged one, an empty one, or one of another model.
    """

    def __init__(
        self,
        store: Store | Path | str,
        *,
        encoder: Any = None,
        search: SearchConfig | None = None,
        model: str | None = None,
        automatic: bool = True,
        verify: bool = False,
        complete: bool = False,
    ) -> None:
        self._engine = engine_of(store)
        self.store: Any = self._engine.store
        if not self._engine.living:
            raise UserError(
                self.store.shortage or f"store '{self._engine.name}' is empty; extract features of some images first."
            )
        if complete and self.store.shortage:
            raise UserError(self.store.shortage)
        if model is not None and model != self.store.model:
            raise UserError(
                f"store '{self._engine.name}' holds features of another model ({self.store.model or '?'}, not {model}); "
                "extract the gallery with this run, or search with the run that made it."
            )
        self.encoder = None if encoder is None else encoder.eval()
        self.config = search or (encoder.search if encoder is not None else SearchConfig())
        self.automatic, self.verify = automatic, verify
        self._index: Any = None
        self._states: Any = None
        self._refined_index: Any = None
        self._input_index: Any = None
        self._noted = False
        if verify:
            self.store.verify()
        if self.store.shortage:
            print(f"note: {self.store.shortage}")

    @property
    def relation_folder(self) -> Path:
        """Where the layer states of a store on disk are; every encoder has a folder of its own.

        Raises:
            UserError: The gallery is in Milvus.
        """
        if not isinstance(self._engine, FileEngine):
            raise UserError(f"'{self._engine.name}' keeps its layer states in Milvus, not in a folder.")
        return self._engine.folder(self._require_encoder())

    def _require_encoder(self) -> Any:
        if self.encoder is None:
            raise UserError("there are no relations without an encoder: give the searcher one.")
        return self.encoder

    @property
    def reads_cameras(self) -> bool:
        """Whether the encoder counts neighbours by camera, so that queries want theirs."""
        return self.encoder is not None and self.encoder.rule is not None

    @property
    def index(self) -> Any:
        """The index of the image features."""
        if self._index is None:
            self._index = self._engine.index(self.config, build=self.automatic, verify=self.verify)
        return self._index

    def refine(self, *, full: bool = False, block_rows: int = BLOCK_ROWS) -> Any:
        """Refine the gallery on disk, or only the images that were appended since; goes on where a killed call was.

        Appended images are refined as if they were queries: they see the gallery and later queries see them, but the old
        images do not see them. That is approximate; ``full`` refines everything anew.

        Args:
            full: Make a full pass over all images.
            block_rows: Rows per file of states.

        Raises:
            UserError: The searcher has no encoder, or it does not fit the store.
        """
        states = self._engine.refine(
            self._require_encoder(),
            self.config,
            full=full,
            block_rows=block_rows,
            verify=self.verify,
            camids=self._camids(),
            build=self.automatic,
        )
        self._set_states(states)
        return states

    @property
    def states(self) -> Any:
        """The gallery's layer states, brought up to date where ``automatic`` allows it.

        Raises:
            UserError: The searcher has no encoder, or the states are missing or out of date.
        """
        if self._states is None:
            if self.automatic:
                return self.refine()
            states = self._engine.states(self._require_encoder(), verify=self.verify, camids=self._camids())
            if states.rows < len(self.store):
                raise UserError(
                    f"{len(self.store) - states.rows} images were appended to '{self._engine.name}' and are not refined "
                    "yet; refine the gallery first."
                )
            self._set_states(states)
        return self._states

    def _set_states(self, states: Any) -> None:
        self._states, self._refined_index, self._input_index = states, None, None

    def _camids(self) -> np.ndarray | None:
        if not self.reads_cameras:
            return None
        camids = self.store.camids
        unknown = int((camids == UNKNOWN).sum())
        if unknown and not self._noted:
            self._noted = True
            print(f"note: {unknown} of {len(camids)} gallery images have no camera; for relations they count as one camera.")
        return camids

    @property
    def input_index(self) -> Any:
        """The index of what the encoder searches for neighbours: the image features, or what its head makes of them."""
        states = self.states
        if states.inputs is self.store:
            return self.index
        if self._input_index is None:
            self._input_index = self._index_of("inputs")
        return self._input_index

    @property
    def refined_index(self) -> Any:
        """The index of the refined features."""
        states = self.states  # which forgets the index of other ones
        if self._refined_index is None and states is not None:
            self._refined_index = self._index_of("refined")
        return self._refined_index

    def _index_of(self, what: str) -> Any:
        return self._engine.index_of(what, self.states, self.config, build=self.automatic, verify=self.verify)

    def update(self) -> None:
        """Bring indices and states up to date now, so that the first query does not wait for them."""
        if self.encoder is None:
            _ = self.index
        else:
            _ = self.input_index, self.refined_index

    def warm(self) -> None:
        """Bring everything up to date and read what single queries need into the system's page cache.

        These are the indices and the layers' states: at a million images of width 512, 2 GiB for the features, 2 GiB for the
        refined ones and 2 GiB per layer. Without it, or with less memory, the first queries wait for the disk.
        """
        self.update()
        files = [self.index.file]
        if isinstance(self._engine, FileEngine) and self.encoder is not None:
            files = [self.input_index.file, self.refined_index.file, *self.states.online_files()]
        for path in filter(None, files):
            with path.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass

    def refine_queries(self, queries: Tensor, camids: np.ndarray | Sequence[int] | None = None) -> Tensor:
        """Return (Q, d) unit test features of queries (Q, d), each refined as if it were alone with the gallery.

        Args:
            queries: (Q, d).
            camids: (Q,) cameras as the store numbers them, -1 where unknown, for an encoder that reads cameras; ``None``:
                all unknown, and every gallery image is one of another camera.
        """
        return self.states.refine_queries(self._unit(queries), self.input_index, camids)

    def _require_whole(self, scores: Tensor, rows: Tensor) -> None:
        """Rows of unit length score at most 1; what scores more was damaged, without a look at the checksums."""
        strange = ~(scores <= 1.01)
        if bool(strange.any()):
            path = self.store.labels(rows[strange][:1])[2][0]
            raise UserError(
                f"'{self._engine.name}' is damaged: the feature of image '{path}' is not of unit length; find the file by "
                "relreid search --verify, and make it again or put back a copy."
            )

    def _unit(self, queries: Tensor) -> Tensor:
        if queries.dim() != 2 or queries.shape[1] != self.store.dim:
            raise UserError(
                f"queries of shape {tuple(queries.shape)} do not fit store '{self._engine.name}' of width {self.store.dim}; "
                "both need the same model."
            )
        return normalise(queries.detach().cpu().float())

    def search(
        self,
        queries: Tensor,
        k: int = 10,
        *,
        camids: np.ndarray | Sequence[int] | None = None,
        rerank: int = 0,
        by: str = "rerank",
        protocol: str | None = None,
        settings: Mapping[str, Any] | None = None,
        threshold: float | None = None,
        among: Tensor | Filter | None = None,
    ) -> SearchResult:
        """Rank the gallery for every query; no query changes another's result.

        Args:
            queries: (Q, d) image features, of any length.
            k: Results per query; cut to N.
            camids: (Q,) cameras as the store numbers them, -1 where unknown; ``None``: all unknown.
            rerank: Re-rank that many best images of every query among themselves and the query (at least k); 0: do not. With
                N it is the re-ranking of one query against the whole gallery.
            by: How: a name in :data:`~relreid_plugin.metrics.rivals.RIVALS` (``rerank`` is k-reciprocal encoding).
            protocol: Which form of it, ``inductive`` or ``transductive``; ``None``: the published one.
            settings: Its parameters in place of the papers' values, such as ``{"k1": 20}``.
            threshold: Results that score less are left out; a query may then have none, as one that is not in the gallery.
            among: The images that may be found: a filter, or (N,) bool for a store on disk; relations still see all. Deleted
                ones are never found.

        Raises:
            UserError: Queries of another width or not finite, options that make no sense, or a re-ranking that needs cameras
                where some are unknown.
        """
        check_integer("k", k, 1)
        check_integer("rerank", rerank, 0)
        chosen = self._engine.among(among)
        rival = rival_named(by)
        if settings and not rerank:
            raise UserError(f"settings of a re-ranking ({', '.join(settings)}) need 'rerank', a number of images.")
        queries = self._unit(queries)
        cameras = np.full(len(queries), UNKNOWN) if camids is None else np.asarray(camids, np.int64)
        if cameras.shape != (len(queries),):
            raise UserError(
                f"camids has shape {cameras.shape}; one camera for each of the {len(queries)} queries is needed."
            )
        table = self.store
        if self.encoder is None:
            index = self.index
        else:
            queries, table, index = self.refine_queries(queries, cameras), self.states.refined, self.refined_index
        scores, rows = index.search(queries, max(k, rerank) if rerank else k, among=chosen)
        self._require_whole(scores, rows)
        if rerank:
            given = None
            if rival.cameras != "none":
                given = (cameras, self.store.labels(rows.flatten())[1].reshape(rows.shape))
                left = int((~cameras_known(rows, given)).sum())
                if left and not rival.needs_cameras:
                    print(f"note: '{by}' re-ranks {left} of {len(queries)} queries without cameras: some are unknown.")
            scores, rows = rerank_candidates(
                queries, table, rows, rival, cameras=given, protocol=protocol, **(settings or {})
            )
        scores, rows = scores[:, :k], rows[:, :k]
        if threshold is not None:
            scores, rows = near_enough(scores, rows, threshold)
        pids, found_cameras, paths = self.store.labels(rows.flatten())
        width = rows.shape[1]
        listed = [paths[start : start + width] for start in range(0, len(paths), width)] if width else [[] for _ in rows]
        return SearchResult(
            scores,
            rows,
            pids.reshape(rows.shape),
            found_cameras.reshape(rows.shape),
            listed,
            self.store.identity_names,
            self.store.camera_names,
        )
