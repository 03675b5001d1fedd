"""Exporting an image model: written beside its place, compared with the model, and moved when it is the same."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backbones.runtimes import KINDS, SUFFIXES, Runtime, companions, open_runtime
from ..errors import UserError, did_you_mean
from ..features.sets import FeatureSet, TestFeatures
from ..files import folder_beside, make_folder, write_json
from .graphs import Graph
from .proof import COSINE, LOSS, TIE, Comparison, as_json, compare, doubts, judge
from .samples import Batch, Samples, folder_samples, photos, some
from .subjects import NamedSubject, RunSubject, Subject
from .writers import OPSET, PRECISIONS, write_graph

CALIBRATION_IMAGES = 256
MOST_IMAGES = 1000
PROOF = ".proof.json"


@dataclass(frozen=True)
class Request:
    """What to export, and how to prove it.

    Attributes:
        kind: ``onnx``, ``openvino`` or ``torchscript``.
        out: The file.
        precision: ``float32``, ``fp16`` or ``int8``.
        with_preprocessing: Photos of any size go in instead of normalised images.
        subset: Modalities that go in; empty: all of the model.
        images: Folders to prove it on, instead of a test set.
        target: Test set to prove it on; empty: the run's first.
        most_images: How many are compared at most; 0: all.
        calibration: Folders of images for ``int8``.
        most_loss: Largest loss of mAP in points; ``None``: as :data:`~relreid_plugin.export.proof.LOSS` says.
        licence: What the file says of its licence.
        exporter: Of ONNX, ``auto``, ``trace`` or ``dynamo``.
    """

    kind: str
    out: Path
    precision: str = "float32"
    with_preprocessing: bool = False
    subset: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    target: str = ""
    most_images: int = MOST_IMAGES
    calibration: tuple[str, ...] = ()
    most_loss: float | None = None
    licence: str = "unspecified"
    exporter: str = "auto"

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            UserError: An unknown kind or precision, a file's name of another kind, or options without an effect.
        """
        if self.kind not in KINDS:
            raise UserError(f"--to takes {', '.join(KINDS)}, got '{self.kind}'{did_you_mean(self.kind, KINDS)}")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision '{self.precision}' is unknown{did_you_mean(self.precision, PRECISIONS)}")
        if SUFFIXES.get(self.out.suffix.lower()) != self.kind:
            endings = " or ".join(suffix for suffix, kind in SUFFIXES.items() if kind == self.kind)
            raise UserError(f"--out '{self.out}': a file of {self.kind} is named {endings}; give it that ending.")
        if self.out.is_dir():
            raise UserError(f"--out '{self.out}' is a folder; name a file.")
        if self.calibration and self.precision != "int8":
            raise UserError("--calibration belongs to --int8; leave it out, or add that.")
        if self.precision == "int8" and not self.calibration:
            raise UserError("--int8 needs images to take the ranges of activations from; name a folder by --calibration.")
        if self.most_loss is not None and self.precision == "float32":
            raise UserError("--max-loss belongs to --fp16 and --int8; float32 must give the same ranking.")
        if self.images and self.target:
            raise UserError("name images by --images, or a test set by --target, and not both.")


@contextmanager
def kept_if_proven(out: Path) -> Iterator[Path]:
    """Give the place of a file in a hidden folder beside ``out``; what the block wrote there is moved when it ends well.

    An error leaves nothing behind, and what stood at ``out`` before still does.
    """
    make_folder(out.parent)
    with folder_beside(out) as place:
        yield place / out.name
        made = sorted(place.iterdir(), key=lambda path: path.name == out.name)  # the file itself comes last
        for path in made:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, out.parent / path.name)


def proof_path(out: Path) -> Path:
    """Return the proof of an exported file."""
    return out.with_name(out.name + PROOF)


def export_run(run: Any, request: Request) -> dict[str, Any]:
    """Export the image model of an open run; see :func:`export_model`."""
    return export_model(RunSubject(run), request)


def export_named(extractor: Any, request: Request, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Export the network of an extractor; see :func:`export_model`.

    Args:
        extractor: From :func:`~relreid_plugin.extractor.load_extractor`, on the CPU.
        request: What and how.
        overrides: ``KEY VALUE …`` that say where data sets are.
    """
    return export_model(NamedSubject(extractor, overrides, cache_dir=request.out.parent), request)


def export_model(subject: Subject, request: Request) -> dict[str, Any]:
    """Export an image model, with its proof beside it.

    Args:
        subject: What is exported.
        request: What and how.

    Returns:
        The proof.

    Raises:
        UserError: It cannot be exported, or the file does not give the same ranking; then nothing is left behind.
    """
    from .. import __version__

    request.check()
    about = {
        "precision": request.precision,
        "licence": request.licence,
        "made_by": f"relreid_plugin {__version__}, torch {torch.__version__}",
    }
    graph = subject.graph(with_preprocessing=request.with_preprocessing, subset=request.subset, about=about)
    with subject.samples(request.images, request.target) as found:
        samples = some(found, request.most_images)
        calibration = calibration_batches(subject, request)
        with kept_if_proven(request.out) as path:
            write_graph(
                graph,
                path,
                request.kind,
                precision=request.precision,
                calibration=calibration,
                exporter=request.exporter,
            )
            proof = prove_images(subject, request, graph, path, samples)
            write_json(proof_path(path), proof)
    return proof


def calibration_batches(subject: Subject, request: Request) -> list[dict[str, np.ndarray]]:
    """Return the inputs that ``int8`` is calibrated with, none for other precisions."""
    if request.precision != "int8":
        return []
    if subject.modalities:
        raise UserError("--int8 is for models of single images; export this one in fp32, or with --fp16.")
    samples = folder_samples(request.calibration)
    items = some(dataclasses.replace(samples, query=[]), 0).gallery
    step = max(1, len(items) // CALIBRATION_IMAGES)
    found: list[dict[str, np.ndarray]] = []
    for batch in subject.batches(items[::step][:CALIBRATION_IMAGES], samples.cameras, batch_size=16):
        found.extend(given(subject, request, batch, list(range(len(batch.paths)))))
    return found


def given(subject: Subject, request: Request, batch: Batch, rows: list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs for rows of a batch; photos of one size at a time, whose places are put into ``rows``."""
    extra = {"cameras": batch.rows.numpy()} if subject.uses_cameras else {}
    if not request.with_preprocessing:
        yield {"images": _chosen(subject, request, batch.images.numpy()), **extra}
        return
    order: list[int] = []
    for places, pixels in photos(batch.paths, subject.pixel_range):
        order.extend(places)
        yield {"images": pixels, **{name: values[places] for name, values in extra.items()}}
    rows[:] = order


def _chosen(subject: Subject, request: Request, images: np.ndarray) -> np.ndarray:
    if not request.subset:
        return images
    slots = [slot for slot, name in enumerate(subject.modalities) if name in request.subset]
    return np.ascontiguousarray(images[:, slots])


@dataclass
class _Clock:
    """Seconds that something took, and on how many images; the first batch warms up and does not count."""

    seconds: float = 0.0
    images: int = 0
    warm: bool = False

    def run(self, count: int, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = work()
        if self.warm:
            self.seconds += time.perf_counter() - started
            self.images += count
        self.warm = True
        return found

    def rate(self) -> float | None:
        """Images per second; ``None``: there was one batch only."""
        return round(self.images / self.seconds, 1) if self.images and self.seconds else None


def prove_images(subject: Subject, request: Request, graph: Graph, path: Path, samples: Samples) -> dict[str, Any]:
    """Run an exported file beside the model and return the proof.

    The model is asked as it is asked elsewhere: by the run's engine, or the extractor.

    Raises:
        UserError: The file is not the same model.
    """
    runtime = open_runtime(path, threads=torch.get_num_threads())
    clocks = {"model": _Clock(), "exported": _Clock()}
    present = graph.module.present
    sizes: set[int] = set()
    with torch.inference_mode():
        pair = [_features(subject, request, runtime, samples, part, present, clocks, sizes) for part in ("query", "gallery")]
        _other_sizes(subject, request, runtime, samples, sizes)
    own, other = (TestFeatures(pair[0][side], pair[1][side]) for side in (0, 1))
    options = dataclasses.replace(subject.options, rerank_all=False, cuhk03_metric=False)
    comparison = compare(own, other, options=options)
    reasons = judge(comparison, request.precision, most_loss=request.most_loss)
    if reasons:
        raise UserError(
            f"'{request.out}' was not written: on {comparison.images} images ({samples.name}) it is not the same model: "
            f"{'; '.join(reasons)}. {_way_out(request)}"
        )
    return {
        "file": request.out.name,
        "kind": request.kind,
        "opset": OPSET if request.kind != "torchscript" else None,
        "about": graph.about,
        "compared_on": samples.name,
        "images_left_out": samples.left_out,
        "batch_sizes": sorted(sizes),
        **as_json(comparison),
        "notes": doubts(comparison),
        "bounds": bounds(request.precision, request.most_loss),
        "images_per_second": {"torch": clocks["model"].rate(), request.kind: clocks["exported"].rate()},
        "bytes": sum(each.stat().st_size for each in (path, *companions(path))),
        **machine(runtime),
    }


def bounds(precision: str, most_loss: float | None = None) -> dict[str, float]:
    """Return what the proof was judged by."""
    exact = precision == "float32"
    loss = LOSS[precision] if exact or most_loss is None else most_loss
    return {("min_cosine" if exact else "mean_cosine"): COSINE[precision], "mAP_points": loss, "tie": TIE}


def machine(runtime: Runtime) -> dict[str, Any]:
    """Return versions and threads."""
    return {
        "versions": {"runtime": runtime.version, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }


def _way_out(request: Request) -> str:
    if request.precision == "int8":
        return "Give more images by --calibration, allow a larger loss by --max-loss, or take --fp16."
    if request.precision == "fp16":
        return "Allow a larger loss by --max-loss, or export in float32."
    return f"Try --exporter {'trace' if request.exporter == 'dynamo' else 'dynamo'}, or another --to."


def _features(
    subject: Subject,
    request: Request,
    runtime: Runtime,
    samples: Samples,
    part: str,
    present: Any,
    clocks: dict[str, _Clock],
    sizes: set[int],
) -> tuple[FeatureSet, FeatureSet]:
    """Features of one part of the samples, by the model and by the file."""
    own, other, pids, camids, paths = [], [], [], [], []
    for batch in subject.batches(getattr(samples, part), samples.cameras):
        count = len(batch.paths)
        sizes.add(count)
        own.append(clocks["model"].run(count, partial(subject.features, batch, present)))
        rows = list(range(count))
        inputs = list(given(subject, request, batch, rows))
        found = clocks["exported"].run(count, partial(_run, runtime, inputs))
        other.append(torch.from_numpy(_placed(found, rows, request)).float())
        pids.append(batch.pids)
        camids.append(batch.camids)
        paths += batch.paths
    labels = np.concatenate(pids), np.concatenate(camids), paths
    return FeatureSet(torch.cat(own), *labels), FeatureSet(torch.cat(other), *labels)


def _run(runtime: Runtime, inputs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    return [runtime(each)["features"] for each in inputs]


def _placed(found: list[np.ndarray], rows: list[int], request: Request) -> np.ndarray:
    """Features of one batch in the order of its images."""
    features = np.concatenate(found)
    if len(features) != len(rows):
        raise UserError(
            f"'{request.out}' was not written: it gives {len(features)} features of {len(rows)} images, as the network "
            "fixes the size of a batch when it is exported."
        )
    placed = np.empty_like(features)
    placed[rows] = features
    return placed


def _other_sizes(subject: Subject, request: Request, runtime: Runtime, samples: Samples, sizes: set[int]) -> None:
    """A file whose batch is fixed fails here or gives other features: one image, and three."""
    items = samples.gallery[:3]
    whole = None
    for size in (1, len(items)):
        sizes.add(size)
        found = []
        for batch in subject.batches(items, samples.cameras, batch_size=size):
            rows = list(range(len(batch.paths)))
            inputs = list(given(subject, request, batch, rows))
            found.append(_placed(_run(runtime, inputs), rows, request))
        features = np.concatenate(found)
        scale = (1e-3 if request.precision == "float32" else 0.05) * float(np.abs(features).max())
        if whole is not None and not np.allclose(whole, features, rtol=0, atol=scale):
            raise UserError(f"'{request.out}' was not written: its features of an image depend on the size of the batch.")
        whole = features


__all__ = [
    "CALIBRATION_IMAGES",
    "MOST_IMAGES",
    "Comparison",
    "Request",
    "bounds",
    "export_model",
    "export_named",
    "export_run",
    "kept_if_proven",
    "proof_path",
    "prove_images",
]
