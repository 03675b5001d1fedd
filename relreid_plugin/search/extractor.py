"""Features of image files by any model into a store; the image model of a finished run knows its test sets and cameras too.

Shape letters: n images, d width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config.defaults import get_default_config
from ..data.files import RealFiles, printable, walk_files, why_not_regular
from ..data.images import is_image_name, read_image
from ..data.labels import Label, as_label
from ..data.names import NamePattern, name_pattern, read_market_name
from ..data.ranges import Range
from ..engine.inference import SPLITS, Placed, data_config, labelled_images
from ..engine.samples import SampleExtractor
from ..engine.scoring import EvaluationOptions
from ..errors import UserError, did_you_mean
from ..extractor import load_extractor
from ..features.arrays import CHUNK_ROWS
from ..features.extractor import Extractor
from ..features.files import write
from ..features.sets import Features
from ..features.store import FeatureStore, StoreWriter
from ..metrics.neighbours import SearchConfig
from ..metrics.rivals import Rival, rival_named
from ..options import MOST_PROCESSES, check_integer
from ..processes import usable_cores
from .milvus import MilvusStore, MilvusWriter, is_milvus

Record = tuple[str, Label, Label]
"""An image file, its identity and its camera: numbers or names, -1 where unknown."""


def list_images(sources: str | Path | Iterable[str | Path]) -> list[str]:
    """Return image files: those named, and all those below the folders that are named, in sorted order.

    Links to folders are followed, every real folder once; a file that is reached under several names is listed under the
    first one. What that leaves out is printed with counts. What is named like an image and is no regular file is listed:
    reading it says so, or passes it over.

    Args:
        sources: A file or folder, or several.

    Raises:
        UserError: Something does not exist, is no regular file and not named like an image, or a folder holds no image or
            cannot be read.
    """
    names = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found: list[str] = []
    notes: list[str] = []
    for name in names:
        place = Path(name)
        if place.is_dir():
            below, more = walk_files(place, is_image_name)
            if not below:
                raise UserError(f"folder '{printable(name)}' holds no image.")
            found.extend(below)
            notes.extend(more)
        elif (reason := why_not_regular(place)) and not (os.path.lexists(place) and is_image_name(place.name)):
            raise UserError(f"'{printable(name)}' {reason}; name image files or folders of images.")
        else:
            found.append(str(place))
    listed = list(dict.fromkeys(found))
    real = RealFiles()
    firsts = {path: real.first_name(path) for path in listed}
    further = [path for path in listed if firsts[path] != path]
    if further:
        notes.append(
            f"{len(further)} of {len(listed)} files are further names of files that are there already, and count once "
            f"('{printable(further[0])}' is the file '{printable(firsts[further[0]])}')"
        )
    for note in notes:
        print(f"note: {note}")
    return [path for path in listed if firsts[path] == path]


def name_labels(path: str, pattern: NamePattern | None = None) -> Record:
    """Return (path, identity, camera) as named ``ID_cC_….jpg``, as they stand there; -1 where there is none.

    Args:
        path: The file.
        pattern: How it is named instead.

    Returns:
        Identities and cameras as :func:`~relreid_plugin.data.labels.as_label` gives them. A name that begins with a camera
        says nothing without a pattern.
    """
    found = read_market_name(os.path.basename(path)) if pattern is None else pattern.find(path)
    if found is None:
        return path, -1, -1
    return path, as_label(found[0]), -1 if found[1] is None else as_label(found[1])


class FeatureExtractor:
    """A model, ready for image files.

    Args:
        model: The folder of a run (``data.save_dir``), or any other model as
            :func:`~relreid_plugin.extractor.load_extractor` takes it.
        overrides: ``KEY VALUE …`` over a run's configuration, such as ``data.root``.
        batch_size: Images at a time; 0: as fits the device.
        workers: Lanes on a CPU, decoding threads on a GPU; ``None``: as many as torch has threads.
        cameras_known: For runs with a camera embedding: whether cameras are those of the training set, by what is written
            in file names and tables, or by number in records.
        **naming: ``weights``, ``size`` and what else :func:`~relreid_plugin.extractor.load_extractor` takes.

    Attributes:
        run: The run; None for other models.
        extractor: What gives the features.
        fingerprint: Hash of the model's weights and of how it reads images; stores carry it.
        pixel_range: The run's ``data.pixel_range`` as (low, high), or None.

    Raises:
        UserError: There is no such model, a run of tracklets or several modalities, or the batch size is negative.
    """

    def __init__(
        self,
        model: Path | str,
        overrides: Sequence[str] = (),
        *,
        batch_size: int = 0,
        workers: int | None = None,
        cameras_known: bool = False,
        **naming: Any,
    ) -> None:
        self.model = os.fspath(model)
        self.cameras_known = cameras_known
        self.extractor: Extractor | SampleExtractor = load_extractor(
            model, overrides=overrides, batch_size=batch_size, workers=workers, **naming
        )
        self.pixel_range: Range | None = self.extractor.pixel_range
        self.run: Any = self.extractor.opened.run
        if self.run is None and cameras_known:
            raise UserError(f"model '{model}' is no run, and knows no cameras.")
        self._samples: dict[str, Any] = {}
        self._several = isinstance(self.extractor, SampleExtractor)
        plain_run = self.run is not None and not self._several
        self.fingerprint = self._run_fingerprint() if plain_run else self.extractor.fingerprint
        self._encoder: Any = None

    def _run_fingerprint(self) -> str:
        """Hash of a run's weights and of how it reads images."""
        cfg = self.run.cfg
        reading = f"{cfg.data.height}x{cfg.data.width}|{cfg.data.norm_mean}|{cfg.data.norm_std}"
        if self.pixel_range:
            reading += f"|range {self.pixel_range}"
        if self.run.engine.reads_cameras:
            reading += f"|cameras {self.cameras_known}"
        return hashlib.sha256(f"{self.run.fingerprint}|{reading}".encode()).hexdigest()[:20]

    def _require_run(self, what: str) -> Any:
        """The run; a sentence where the model is none."""
        if self.run is None:
            raise UserError(f"model '{self.model}' is no run, and has no {what}; name the folder of a run.")
        return self.run

    @property
    def modalities(self) -> tuple[str, ...]:
        """The pictures of a sample, for a model that takes several; empty for one that takes one."""
        return tuple(self.extractor.modalities) if isinstance(self.extractor, SampleExtractor) else ()

    def encoder(self) -> Any:
        """Return the run's relation encoder in evaluation mode.

        Raises:
            UserError: The run has no second stage, or the model is none.
        """
        run = self._require_run("relation encoder")
        if self._encoder is None:
            self._encoder = run.refiner()
        if self._encoder is None:
            raise UserError(
                f"run '{self.run.folder}' has no relation encoder; search without relations, or name a run with stage 2."
            )
        return self._encoder

    def search_config(self) -> SearchConfig:
        """Return the run's keys ``relation.search`` as a search configuration; that of other models is the default."""
        if self.run is None:
            return SearchConfig()
        return SearchConfig(**self.run.cfg.relation.search)

    def rerank_settings(self, name: str) -> tuple[Rival, str, dict[str, Any]]:
        """Return a re-ranking, the protocol and the parameters that the run's keys ``test`` give it; a model that is no run
        has the defaults.

        Args:
            name: In :data:`~relreid_plugin.metrics.rivals.RIVALS`.
        """
        rival = rival_named(name)
        options = EvaluationOptions.of(get_default_config()) if self.run is None else self.run.options()
        return rival, rival.protocol(options.rival_protocol), options.settings(name)

    def test_records(self, target: str, split: str = "gallery") -> list[Record]:
        """Return (path, identity, camera) of a test set's images; cameras by number as the data set has them, or by name.

        Args:
            target: One of the run's ``data.targets``.
            split: ``query`` or ``gallery``.

        Raises:
            UserError: No such test set, or the model is no run.
        """
        manager = self._require_run("test sets").datamanager
        sets = manager.test_dataset
        if target not in sets:
            raise UserError(f"'{target}' is no test set of run '{self.run.folder}'{did_you_mean(target, list(sets))}")
        items = sets[target][split]
        identities = {number: as_label(name) for number, name in manager.identity_names.get(target, {}).items()}
        cameras = manager.camera_names.get(target, {}).items()
        named = {number: as_label(name) for number, name in cameras if isinstance(as_label(name), str)}
        return [
            (self._known(source), identities.get(pid, int(pid)), named.get(camid, int(camid)))
            for source, pid, camid, *_ in items
        ]

    def data_records(self, name: str, split: str, overrides: Sequence[str] = (), *, cache_dir: Path | str) -> list[Placed]:
        """Return images of a data set, with their splits where several are asked for.

        Args:
            name: One of the run's ``data.targets``; of other models, and for training images, any data set of single images:
                a registered name, a folder, or a CSV file.
            split: ``train``, ``query``, ``gallery``, ``test`` (the latter two) or ``all``.
            overrides: ``KEY VALUE …`` that say where and how it is read, such as ``data.root``; a run knows it.
            cache_dir: Where what cannot be written beside the data is put.

        Raises:
            UserError: No such data set or split.
        """
        if split in ("query", "gallery") and self.run is not None:
            return [(*record, "") for record in self.test_records(name, split)]
        if self._several:
            raise UserError(
                f"samples of several modalities are extracted one split at a time; name query or gallery of '{name}'."
            )
        cfg = data_config(overrides) if self.run is None else self.run.cfg
        found = labelled_images(cfg, name, Path(cache_dir), split)
        return found if len(SPLITS[split]) > 1 else [(*record, "") for *record, _ in found]  # type: ignore[misc]

    def _known(self, source: Any) -> str:
        """The file that stands for a sample: its own, or the first of its pictures, by which the others are found again."""
        if isinstance(source, str):
            if hasattr(source, "modalities"):
                self._samples[os.path.abspath(source)] = source
            return str(source)
        path = os.path.abspath(source[0])
        self._samples[path] = dict(zip(source.modalities, source))
        return path

    def _sample(self, path: str) -> Any:
        """What the extractor is given for a file."""
        sample = self._samples.get(path, path)
        if isinstance(sample, dict):
            return {name: sample[name] for name in self.extractor.modalities}  # type: ignore[union-attr]
        return sample

    def features(self, images: str | Path | Iterable[str | Path]) -> Tensor:
        """Return features of image files or of all images below folders, (n, d) float32 in the order of :func:`list_images`.

        Raises:
            UserError: A missing file, an empty folder, or an image that cannot be read.
        """
        return self._extract(self._labelled(list_images(images)), "extracting", written=True)

    @property
    def name_pattern(self) -> NamePattern | None:
        """How files are named: the run's ``data.name_pattern``."""
        if self.run is None:
            return None
        return name_pattern(self.run.cfg.data.name_pattern)

    def _labelled(self, files: Sequence[str]) -> list[Record]:
        """Records of files by their names; says how many do not match the run's pattern."""
        pattern = self.name_pattern
        records = [name_labels(path, pattern) for path in files]
        odd = [path for path, pid, _ in records if pid == -1] if pattern is not None else []
        if odd and pattern is not None:
            print(
                f"note: the names of {len(odd)} of {len(records)} images do not match 'data.name_pattern {pattern.key}', "
                f"the first is '{odd[0]}'; who they show is unknown."
            )
        return records

    def _camera_rows(self, records: Sequence[Any], *, written: bool) -> list[int] | None:
        """Rows of the model's camera embedding; cameras are as written in names, or numbers of the training set."""
        if not self.cameras_known or self._several or not self.run.engine.reads_cameras:
            return None
        cameras = self.run.cameras
        cameras_of = [record[2] for record in records]
        names = {str(camid) for camid in cameras_of if written or isinstance(camid, str)} - {"-1"}
        named = cameras.named_rows(sorted(names))
        numbers = torch.tensor([camid if isinstance(camid, int) else -1 for camid in cameras_of], dtype=torch.int64)
        rows = cameras.training_rows()(numbers).tolist()
        return [named.get(str(camid), row if not written else -1) for camid, row in zip(cameras_of, rows)]

    def _extract(self, records: Sequence[Any], label: str, *, written: bool) -> Tensor:
        paths: list[Any] = [path for path, *_ in records]
        if self._several:
            paths = [self._sample(path) for path in paths]
        rows = self._camera_rows(records, written=written)
        with tqdm(total=len(paths), desc=label, leave=False, disable=None, dynamic_ncols=True) as bar:
            found = []
            for part in self.extractor.stream(paths, cameras=rows):
                found.append(part)
                bar.update(len(part))
        return torch.cat(found) if found else torch.zeros(0, self.extractor.dim)

    def store(
        self,
        folder: Path | str,
        images: str | Path | Iterable[str | Path] | Sequence[Record | Placed],
        *,
        dtype: str | None = None,
        chunk_rows: int = CHUNK_ROWS,
        shard: tuple[int, int] = (0, 1),
        skip_broken: bool = False,
        progress: bool = True,
    ) -> FeatureStore | MilvusStore:
        """Write features of images to a store, or append those that it does not have yet.

        A killed extraction is taken up by calling this again: images whose path is in the store are passed over. Until then
        the store can be searched, with a note of how many images are there (:attr:`FeatureStore.shortage`).

        Args:
            folder: The store, or its name in Milvus.
            images: Files and folders, labelled by their names (:func:`name_labels` with the run's pattern), or records
                (path, identity, camera), the latter two numbers or names, with a split behind them or without.
            dtype: See :class:`~relreid_plugin.features.store.StoreWriter`.
            chunk_rows: Rows per chunk, and so at most what a kill loses.
            shard: (number, count): take every count-th image from ``number`` on, into the folder ``shard-NUMBER-of-COUNT``
                of ``folder``.
            skip_broken: Pass over files that are no whole images, with a line for each; else the first one is an error.
            progress: Show a progress bar on a terminal.

        Returns:
            The store (the shard, where there are several).

        Raises:
            UserError: An image cannot be read, or the store belongs to another model.
        """
        records, written = self._as_records(images)
        number, count = shard
        check_integer("the number of shards", count, 1, MOST_PROCESSES)
        check_integer(f"the shard's number among {count}", number, 0, count - 1)
        check_integer("the number of rows per chunk", chunk_rows, 1, 10**8)
        place = Path(folder)
        if count > 1:
            place = place / f"shard-{number:03d}-of-{count:03d}"
            records = records[number::count]
        folders = {os.path.dirname(path) for path, *_ in records}
        root = os.path.commonpath(folders) if folders and len({os.path.isabs(name) for name in folders}) == 1 else ""
        writing: dict[str, Any] = {"dim": self.extractor.dim, "model": self.fingerprint}
        in_milvus = is_milvus(folder)
        stored: MilvusWriter | StoreWriter
        if in_milvus:
            stored = MilvusWriter(str(folder), **writing, batch=chunk_rows)
        else:
            stored = StoreWriter(place, **writing, dtype=dtype, chunk_rows=chunk_rows, root=root, shard=shard)
        with stored as writer:
            known = writer.known_paths()
            missing = [record for record in records if record[0] not in known]
            writer.plan(len(writer) + len(missing))
            bar = tqdm(
                total=len(records), initial=len(records) - len(missing), unit="img", disable=None if progress else True
            )
            with bar:
                for start in range(0, len(missing), chunk_rows):
                    part = missing[start : start + chunk_rows]
                    bar.update(len(part))
                    part = self._readable(part, skip_broken)
                    if part:
                        found = self._extract(part, f"chunk {start // chunk_rows + 1}", written=written)
                        paths, pids, camids, splits = zip(*part)
                        writer.add(found, pids, camids, paths, splits)
            writer.flush()
            writer.plan(len(writer))
        return MilvusStore(str(folder)) if in_milvus else FeatureStore(place)

    def write(
        self,
        path: Path | str,
        images: str | Path | Iterable[str | Path] | Sequence[Record | Placed],
        *,
        skip_broken: bool = False,
    ) -> Features:
        """Write features of images to a file as the network gives them, whole or not at all.

        Args:
            path: ``….npz``, ``….npy`` (with ``….csv`` beside it) or ``….parquet``.
            images, skip_broken: As for :meth:`store`.

        Returns:
            What was written.

        Raises:
            UserError: An image cannot be read, none is left, or the file has another ending.
        """
        records, written = self._as_records(images)
        records = self._readable(records, skip_broken)
        if not records:
            raise UserError(f"'{path}' is not written: there is no image to extract.")
        found = self._extract(records, "extracting", written=written)
        paths, pids, camids, splits = (list(column) for column in zip(*records))
        split = splits if any(splits) else None
        features = Features.of(found, pids, camids, paths, splits=split, model=self.fingerprint)
        write(features, path)
        return features

    def _readable(self, records: list[Placed], skip_broken: bool) -> list[Placed]:
        """The records that can be extracted; says which are passed over."""
        return self._complete(_whole_images(records, self.pixel_range) if skip_broken else records)

    def _complete(self, records: list[Placed]) -> list[Placed]:
        """The records of samples that have all their pictures, where others shall be skipped; says how many have not."""
        if not isinstance(self.extractor, SampleExtractor) or self.extractor.missing != "skip":
            return records
        there = [each for each in records if not self.extractor.lacks(self._sample(each[0]))]
        if len(there) < len(records):
            print(f"note: {len(records) - len(there)} of {len(records)} samples lack a modality and are skipped")
        return there

    def _as_records(self, images: Any) -> tuple[list[Placed], bool]:
        """Records with absolute paths and splits (empty: none), and whether they were read from names.

        A store is searched, and appended to, from other folders than it was made from.
        """
        items: list[Any] = [images] if isinstance(images, (str, Path)) else list(images)
        written = not items or not isinstance(items[0], tuple)
        if written:
            items = self._labelled(list_images(items))
        found = [(*item, "")[:4] for item in items]
        return [(os.path.abspath(path), _label(pid), _label(camid), split) for path, pid, camid, split in found], written


def _label(value: Any) -> Label:
    return as_label(value) if isinstance(value, str) else int(value)


def _whole_images(records: Sequence[Placed], pixel_range: Range | None) -> list[Placed]:
    """The records whose files can be read; says which cannot."""

    def complaint(record: Placed) -> str:
        try:
            read_image(record[0], pixel_range)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        complaints = list(pool.map(complaint, records))
    for sentence in filter(None, complaints):
        print(f"note: passed over: {sentence.split('; ')[0]}")
    return [record for record, sentence in zip(records, complaints) if not sentence]
