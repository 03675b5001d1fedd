"""The store of a service: searched by many, written by one thread, reopened when it has changed.

Every search is over one :class:`View`, a store as it was opened. Whatever is enrolled or deleted goes through one thread, is
on the disk when its request is answered, and is followed by a new view.

Shape letters: N rows, d width.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.images import read_image, taken_at
from ..data.labels import Label, as_label, stored_number
from ..errors import UserError
from ..features.deleted import delete_rows
from ..features.store import MANIFEST, FeatureStore, StoreWriter
from ..features.verifier import Verifier
from ..files import atomic_file
from ..metrics.cameras import UNKNOWN
from ..metrics.neighbours import SearchConfig, normalise
from ..search.extractor import FeatureExtractor
from ..search.filters import Filter
from ..search.gallery import GallerySearcher
from ..search.opened import open_searcher
from .feedback import Answer, Journal

FOLDER = "serve"
"""Folder in the store for what the service writes beside features."""
_TIME_THREADS = 8


class NoSuchRow(UserError):
    """A row that the store does not have, or that was deleted."""


@dataclass(frozen=True)
class Wish:
    """What is wanted of a search; see :meth:`relreid_plugin.search.gallery.GallerySearcher.search`.

    Attributes:
        k: Results.
        relations: Refine by the relation encoder.
        rerank: Re-rank that many best images; 0: do not.
        by: How.
        camera: Camera of the picture as the store shows it; None: unknown.
        cameras: Only images of these cameras; none: of all.
        labels: Only images of these identities; none: of all.
        since, until: Only images taken between, in seconds since 1970; None: at any time.
        threshold: Leave out what scores less.
    """

    k: int = 10
    relations: bool = False
    rerank: int = 0
    by: str = "rerank"
    camera: str | None = None
    cameras: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None
    threshold: float | None = None


@dataclass
class Enrolment:
    """A picture that shall be in the store.

    Attributes:
        png: Its file.
        name: Name of the file.
        feature: (d,).
        label: Identity, -1 where unknown.
        camera: Camera, -1 where unknown.
        time: When it was taken, in seconds since 1970; None: now.
    """

    png: bytes
    name: str
    feature: Tensor
    label: Label = -1
    camera: Label = -1
    time: float | None = None


@dataclass
class View:
    """A store as it was opened, with what searches it.

    Attributes:
        store: The store.
        plain: Searches by image features.
        related: Searches by refined features; None without relations.
        earlier: When the images of the first rows were taken, as far as another view has found out.
    """

    store: FeatureStore
    plain: GallerySearcher
    related: GallerySearcher | None
    earlier: np.ndarray = field(default_factory=lambda: np.empty(0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @functools.cached_property
    def pids(self) -> np.ndarray:
        """(N,) identities as the store has them."""
        return self.store.pids

    @functools.cached_property
    def camids(self) -> np.ndarray:
        """(N,) cameras as the store has them."""
        return self.store.camids

    @functools.cached_property
    def living(self) -> np.ndarray:
        """(N,) bool, the rows that were not deleted."""
        alive = self.store.alive
        return np.ones(len(self.store), bool) if alive is None else alive.numpy()

    @functools.cached_property
    def camera_labels(self) -> list[Label]:
        """The cameras of all living images as they are shown, the unknown one left out."""
        names = self.store.camera_names
        numbers = np.unique(self.camids[self.living]).tolist()
        return [names.get(number, number) for number in numbers if number != UNKNOWN]

    @property
    def enrols(self) -> bool:
        """Whether images can be added: the store is none in shards."""
        return self.store.shards == [self.store.folder]

    def times(self) -> np.ndarray:
        """(N,) when the images were taken, NaN where unknown; read from their files at the first call."""
        with self._lock:
            known = len(self.earlier)
            if known < len(self.store):
                paths = self.store.labels(range(known, len(self.store)))[2]
                with ThreadPoolExecutor(_TIME_THREADS) as pool:
                    fresh = np.fromiter(pool.map(taken_at, paths, chunksize=256), np.float64, len(paths))
                self.earlier = np.concatenate([self.earlier, fresh])
            return self.earlier

    def living_row(self, row: int) -> int:
        """Return ``row``.

        Raises:
            NoSuchRow: There is none, or it was deleted.
        """
        if not 0 <= row < len(self.store) or not self.living[row]:
            raise NoSuchRow(f"there is no image {row}.")
        return row

    def among(self, wish: Wish) -> Tensor | None:
        """(N,) bool, the images that the filters of a wish let through; None for all."""
        chosen = Filter(wish.cameras, wish.labels, wish.since, wish.until)
        return torch.from_numpy(chosen.mask(self.pids, self.camids, self.times)) if chosen else None


class ServedGallery:
    """A store that is searched, added to and taken from while it is served.

    Args:
        folder: The store.
        extractor: The model that made it.
        config: Index of the searches.
        relations: Offer searches by refined features, too.
        verifier: Gives probabilities.
        prior: How likely a pair is one beforehand.

    Attributes:
        journal: What people said of pairs.

    Raises:
        UserError: See :class:`~relreid_plugin.search.gallery.GallerySearcher`; or a verifier of another width.
    """

    def __init__(
        self,
        folder: Path | str,
        extractor: FeatureExtractor,
        config: SearchConfig,
        *,
        relations: bool = False,
        verifier: Verifier | None = None,
        prior: float = 0.5,
    ) -> None:
        self.folder, self.extractor, self.config = Path(folder).absolute(), extractor, config
        self.relations, self.verifier, self.prior = relations, verifier, prior
        self.own = self.folder / FOLDER
        self.journal = Journal(self.own / "feedback.jsonl")
        self._lock = threading.Lock()
        self._manifests = [place / MANIFEST for place in FeatureStore(self.folder).shards]
        self._signature: tuple[Any, ...] = ()
        self._rows: dict[str, int] = {}
        self._seen = 0
        self.view = self._opened(None)
        self._clear()

    # --- views --------------------------------------------------------------------------------------------------------
    def _signed(self) -> tuple[Any, ...]:
        """What changes whenever the store does."""
        found = []
        for place in self._manifests:
            with contextlib.suppress(OSError):
                status = os.stat(place)
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(found)

    def _opened(self, before: View | None) -> View:
        signature = self._signed()
        store = FeatureStore(self.folder)
        plain = open_searcher(store, self.extractor, self.config, relations=False)
        related = open_searcher(store, self.extractor, self.config, relations=True) if self.relations else None
        for searcher in filter(None, (plain, related)):
            searcher.warm()
        view = View(store, plain, related)
        if before is not None:
            view.earlier = before.earlier
        own = str(self.own / "enrolled") + os.sep
        paths = store.labels(range(self._seen, len(store)))[2]
        self._rows.update((path, row) for row, path in enumerate(paths, self._seen) if path.startswith(own))
        self._seen, self._signature = len(store), signature
        return view

    @property
    def changed(self) -> bool:
        """Whether the store on the disk is another than the one that is searched."""
        return self._signed() != self._signature

    def reopen(self) -> None:
        """Search the store as it is on the disk now."""
        self.view = self._opened(self.view)

    def _clear(self) -> None:
        """Remove pictures that a killed service wrote and did not enrol, or deleted and did not remove."""
        known = {path for path, row in self._rows.items() if self.view.living[row]}
        known |= {answer.query for answer in self.journal.answers()}
        for path in self.own.glob("*/*.png"):
            if str(path) not in known:
                path.unlink(missing_ok=True)

    # --- reading ------------------------------------------------------------------------------------------------------
    def search(self, feature: Tensor, wish: Wish) -> dict[str, Any]:
        """Rank the store for a picture.

        Args:
            feature: (d,).
            wish: What is wanted.

        Returns:
            ``images``, the number of images that could have been found, and ``results``: ``rank``, ``score``, ``row``,
            ``label``, ``camera``, ``name``, ``probability`` and ``same``; None where unknown.

        Raises:
            UserError: Something is wished for that is not there.
        """
        view, queries = self.view, feature.unsqueeze(0)
        searcher = view.related if wish.relations else view.plain
        if searcher is None:
            raise UserError("this service offers no relations; start it with --relations.")
        given: dict[str, Any] = {}
        if wish.rerank:
            rival, protocol, settings = self.extractor.rerank_settings(wish.by)
            given = {"rerank": wish.rerank, "by": wish.by, "protocol": protocol, "settings": settings}
        if wish.camera is not None and (searcher.reads_cameras or (given and rival.cameras != "none")):
            given["camids"] = [stored_number(as_label(wish.camera))]
        among = view.among(wish)
        result = searcher.search(queries, wish.k, among=among, threshold=wish.threshold, **given)
        found = result.as_dicts()[0]
        chances: list[float | None] = [None] * len(found)
        same: list[bool | None] = [None] * len(found)
        if self.verifier is not None and found:
            others = view.store.take(torch.tensor([item["row"] for item in found]))
            scores = self.verifier.scores(normalise(queries).expand(len(found), -1), others)
            chances = self.verifier.probability(scores, prior=self.prior).tolist()
            same = self.verifier.same(scores).tolist()
        results = [
            {
                "rank": item["rank"],
                "score": item["score"],
                "row": item["row"],
                "label": _known(item["pid"]),
                "camera": _known(item["camid"]),
                "name": os.path.basename(item["path"]),
                "probability": chance,
                "same": answer,
            }
            for item, chance, answer in zip(found, chances, same)
        ]
        count = int(view.living.sum() if among is None else (among.numpy() & view.living).sum())
        return {"images": count, "results": results}

    def picture(self, row: int) -> Image.Image:
        """Return the image of a row.

        Raises:
            NoSuchRow: There is none, or its file is gone or cannot be read.
        """
        path = self.view.store.labels([self.view.living_row(row)])[2][0]
        try:
            return read_image(path, self.extractor.pixel_range)
        except UserError:
            raise NoSuchRow(f"the file of image {row} is gone or cannot be read.") from None

    # --- writing ------------------------------------------------------------------------------------------------------
    def write(self, items: Sequence[Enrolment | int | None]) -> list[Any]:
        """Enrol pictures and delete rows, all at once, and reopen the store; called by one thread.

        Args:
            items: Enrolments; rows to delete; None: only reopen.

        Returns:
            For an enrolment its row and whether it is new; for a row None; or the :class:`UserError` of an item.
        """
        results: list[Any] = [None] * len(items)

        def attempt(places: list[int], work: Callable[[list[int]], None]) -> None:
            try:
                if places:
                    work(places)
            except UserError as error:
                for place in places:
                    results[place] = error

        def enrol(places: list[int]) -> None:
            for place, found in zip(places, self._enrol([items[place] for place in places])):  # type: ignore[misc]
                results[place] = found

        def delete(places: list[int]) -> None:
            self._delete([items[place] for place in places], places, results)  # type: ignore[misc]

        if self.changed:
            self.reopen()
        attempt([place for place, item in enumerate(items) if isinstance(item, Enrolment)], enrol)
        attempt([place for place, item in enumerate(items) if isinstance(item, int)], delete)
        return results

    def _enrol(self, items: list[Enrolment]) -> list[tuple[int, bool]]:
        if not self.view.enrols:
            raise UserError("a store in shards takes no new images by the service; extract them by relreid extract.")
        living, paths = self.view.living, [str(self.own / "enrolled" / item.name) for item in items]
        there = {path for path in paths if path in self._rows and living[self._rows[path]]}
        fresh = {path: item for path, item in zip(paths, items) if path not in there}
        for path, item in fresh.items():
            with atomic_file(Path(path)) as temporary:
                temporary.write_bytes(item.png)
                if item.time is not None:
                    os.utime(temporary, (item.time, item.time))
        if fresh:
            with StoreWriter(self.folder, dim=self.view.store.dim, model=self.extractor.fingerprint) as writer:
                writer.add(
                    torch.stack([item.feature for item in fresh.values()]),
                    [item.label for item in fresh.values()],
                    [item.camera for item in fresh.values()],
                    list(fresh),
                )
            self.reopen()
        made = set(fresh)
        found = []
        for path in paths:
            found.append((self._rows[path], path in made))
            made.discard(path)
        return found

    def _delete(self, rows: list[int], places: list[int], results: list[Any]) -> None:
        wanted = []
        for row, place in zip(rows, places):
            try:
                wanted.append(self.view.living_row(row))
            except NoSuchRow as error:
                results[place] = error
        if len(set(wanted)) == int(self.view.living.sum()):
            raise UserError("the last image of a store cannot be deleted; delete the store's folder instead.")
        if wanted:
            files = [path for path in self.view.store.labels(wanted)[2] if path in self._rows]
            delete_rows(self.folder, wanted)
            for path in files:  # the service's own copies; other files belong to somebody else
                Path(path).unlink(missing_ok=True)
            self.reopen()

    def note(self, png: bytes, name: str, row: int, same: bool, camera: Label, time: str) -> Answer:
        """Keep an answer and its picture; both are on the disk when this returns.

        Args:
            png: File of the picture.
            name: Name of the file.
            row: The image that it was compared with.
            same: The answer.
            camera: The picture's camera, -1 where unknown.
            time: When it was given.

        Raises:
            NoSuchRow: There is no such image.
            WriteError: It could not be written.
        """
        view = self.view
        pids, camids, paths = view.store.labels([view.living_row(row)])
        store, number = view.store, (int(pids[0]), int(camids[0]))
        label, own = store.identity_names.get(number[0], number[0]), store.camera_names.get(number[1], number[1])
        path = self.own / "queries" / name
        with self._lock:
            if not path.is_file():
                with atomic_file(path) as temporary:
                    temporary.write_bytes(png)
            answer = Answer(str(path), paths[0], row, same, label, own, camera, time)
            self.journal.add([answer])
        return answer


def as_png(picture: Image.Image) -> bytes:
    """Return a picture as the file that is kept of it: without loss, and without what a camera wrote beside its pixels."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(stream, "PNG")
    return stream.getvalue()


def _known(label: Label) -> Label | None:
    return None if label == -1 else label


__all__ = ["FOLDER", "Enrolment", "NoSuchRow", "ServedGallery", "View", "Wish", "as_png"]
