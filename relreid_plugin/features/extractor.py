"""Features of any pictures by any network: decoded, resized and seen by the network at once on all cores.

On a CPU, several lanes work side by side, each of which decodes a batch and then runs the network on it with its share of
the threads, so that no core waits for another. On a GPU, threads decode the batches that come next.

Shape letters: n pictures, B of a batch, h x w pixels, d width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..backbones.opened import Opened, Reading
from ..data.photos import clip_boxes, count_photos, each_photo, pair_crops, read_photo
from ..data.ranges import Range, check_range
from ..errors import UserError, did_you_mean, shown
from ..options import check_integer

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_BATCH, GPU_BATCH = 32, 128
MOST_LANES = 16
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def check_precision(value: str) -> str:
    """Return a key of :data:`PRECISIONS`.

    Raises:
        UserError: Another value.
    """
    if value not in PRECISIONS:
        raise UserError(f"precision is '{value}'{did_you_mean(value, PRECISIONS)}")
    return value


Decode = Callable[[], np.ndarray]
"""Decodes one picture, or the boxes of one frame: (k, h, w, 3) bytes."""


class Job(NamedTuple):
    """Pictures to decode.

    Attributes:
        decode: Decodes them.
        size: How many there are, k.
        camera: Row of the network's camera embedding for all of them; None: the network is told none.
    """

    decode: Decode
    size: int
    camera: int | None = None


class ImageExtractor(Protocol):
    """What stands for a network elsewhere: in search, comparison and export.

    Attributes:
        dim: Width d.
        size: (height, width) that pictures are resized to.
        normalisation: Mean and standard deviation of the channels.
        fingerprint: Hash of the weights and of how pictures are read.
    """

    dim: int
    size: tuple[int, int]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    fingerprint: str

    def __call__(self, images: Any, crops: Any = None, *, bgr: bool = False, batch_size: int = 0) -> Tensor:
        """Return features (n, d), float32 on the CPU."""


class Extractor:
    """A network that takes any pictures.

    Args:
        opened: The network, and how it wants its images.
        name: How it was named.
        batch_size: Pictures at a time; 0: 32 on a CPU, 128 on a GPU.
        workers: Lanes on a CPU, decoding threads on a GPU; ``None``: as many as torch has threads. 0 works in the calling
            thread alone.
        device: ``cpu``, ``cuda``, ``cuda:N``; ``auto``: a GPU where there is one.
        precision: ``float32``, or ``bfloat16`` and ``float16`` by autocast; features are float32 in any case.
        channels_last: Memory layout of images and weights: faster for CNNs on most machines.
        pixel_range: (low, high) that become black and white in pictures of more than 8 bits per channel.

    Attributes:
        name: How it was named.
        dim: Width d of its features.
        reading: How pictures are resized and normalised.
        notes: What was loaded, and what was left out.

    Raises:
        UserError: A device that is not there, an unknown precision, or a network that returns something else than features.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        name: str = "",
        batch_size: int = 0,
        workers: int | None = None,
        device: str = "auto",
        precision: str = "float32",
        channels_last: bool = True,
        pixel_range: Any = None,
    ) -> None:
        self.opened, self.name = opened, name or opened.title
        self.reading: Reading = opened.reading
        self.notes = list(opened.notes)
        self.pixel_range: Range | None = check_range(
            "pixel_range", list(opened.pixel_range) if pixel_range is None else pixel_range
        )
        self._range_key = "pixel_range" if opened.run is None else "data.pixel_range"
        self.batch_size = check_integer("batch_size (0: as fits the device)", batch_size, 0, 65536)
        if workers is not None:
            check_integer("workers", workers, 0, 1024)
        self.workers = workers
        self.precision, self.channels_last = check_precision(precision), bool(channels_last)
        self.device = find_device(device)
        self.notes += filter(None, [imitated(self.precision, self.device)])
        self._network = opened.network
        if isinstance(self._network, nn.Module):
            self._network.eval()
            layout = torch.channels_last if self.channels_last else torch.preserve_format
            self._network.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self.reading.mean, self.reading.std)
        )
        self.dim = self._width()
        self._fingerprint = ""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that pictures are resized to."""
        return self.reading.size

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of red, green and blue, on the scale [0, 1]."""
        return self.reading.mean, self.reading.std

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of how pictures are read; stores carry it."""
        if not self._fingerprint:
            self._fingerprint = self.opened.fingerprint()
        return self._fingerprint

    def __repr__(self) -> str:
        return f"Extractor('{self.name}', dim={self.dim}, size={self.size[0]}x{self.size[1]}, {self.device})"

    # --- pictures in --------------------------------------------------------------------------------------------------
    def __call__(
        self, images: Any, crops: Any = None, *, bgr: bool = False, batch_size: int = 0, cameras: Any = None
    ) -> Tensor:
        """Return features of pictures, one row for each, in their order.

        Args:
            images: One picture or a list, iterator, array or tensor of them, of any kind that
                :mod:`relreid_plugin.data.photos` lists.
            crops: Detections: with one frame, boxes (left, top, right, bottom) in pixels, (k, 4), a row for each; with a
                list of frames, such boxes for every one. They are grown to whole pixels and clipped to the frame.
            bgr: Arrays and tensors begin with blue, as OpenCV has them.
            batch_size: Pictures at a time; 0: as the extractor was made.
            cameras: For networks with a camera embedding, the row of every picture or frame, (n,); None: they are unknown.

        Returns:
            (n, d) float32 on the CPU; (0, d) for none. As the network gives them: not all networks normalise them.

        Raises:
            UserError: Something is no picture or cannot be read, a box is empty, inverted or outside its frame, or features
                are not finite; the sentence names it.
        """
        found = list(self.stream(images, crops, bgr=bgr, batch_size=batch_size, cameras=cameras))
        return torch.cat(found) if found else torch.zeros(0, self.dim)

    def stream(
        self, images: Any, crops: Any = None, *, bgr: bool = False, batch_size: int = 0, cameras: Any = None
    ) -> Iterator[Tensor]:
        """Yield the features of batches, (B, d), in order; the arguments are those of a call."""
        batch = check_integer("batch_size (0: as the extractor was made)", batch_size, 0, 65536) or self._batch
        if crops is None:
            count = count_photos(images)
            rows = self._rows(cameras, count)
            jobs: Iterable[Job] = (
                Job(self._photo(item, index, bgr), 1, row) for index, (item, row) in enumerate(zip(each_photo(images), rows))
            )
        else:
            frames = pair_crops(images, crops)
            count = sum(len(boxes) for _, boxes in frames)
            rows = self._rows(cameras, len(frames))
            jobs = (
                Job(
                    self._frame(frame, boxes[start : start + batch], start, index, bgr),
                    len(boxes[start : start + batch]),
                    row,
                )
                for index, ((frame, boxes), row) in enumerate(zip(frames, rows))
                for start in range(0, len(boxes), batch)
            )
        yield from self.batches(jobs, batch, count)

    def _rows(self, cameras: Any, count: int | None) -> Iterable[int | None]:
        """The camera of every picture."""
        if cameras is None:
            return itertools.repeat(None)
        values = np.asarray(cameras)
        if count is None:
            raise UserError(
                "cameras belong to a list of pictures, not to an iterator, whose length is known at its end only."
            )
        if values.shape != (count,) or values.dtype.kind not in "iu":
            raise UserError(f"cameras must be whole numbers, one for each of {count} pictures, got {shown(cameras)}.")
        return [int(each) for each in values]

    def _photo(self, item: Any, index: int, bgr: bool) -> Decode:
        def decode() -> np.ndarray:
            return self.pixels(self._read(item, bgr, index))[np.newaxis]

        return decode

    def _frame(self, frame: Any, boxes: np.ndarray, first: int, index: int, bgr: bool) -> Decode:
        def decode() -> np.ndarray:
            picture = self._read(frame, bgr, index)
            return np.stack(
                [self.pixels(picture.crop(box)) for box in clip_boxes(boxes, picture.size, index=index, first=first)]
            )

        return decode

    def _read(self, item: Any, bgr: bool, index: int) -> Image.Image:
        return read_photo(item, bgr=bgr, pixel_range=self.pixel_range, index=index, key=self._range_key)

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """Return a picture as :meth:`forward` takes it, (h, w, 3) bytes."""
        height, width = self.reading.size
        return np.asarray(picture.resize((width, height), _RESAMPLING[self.reading.interpolation]))

    def prepared(self, images: Any) -> Tensor:
        """Return pictures as the network sees them, (n, 3, h, w) float32 on the device, normalised.

        Args:
            images: A list of pictures, as for a call.
        """
        jobs = [Job(self._photo(item, index, False), 1) for index, item in enumerate(each_photo(images))]
        return self._normalised(decoded(jobs)[0])

    # --- batches ------------------------------------------------------------------------------------------------------
    @property
    def _batch(self) -> int:
        return self.batch_size or (CPU_BATCH if self.device.type == "cpu" else GPU_BATCH)

    def batches(self, jobs: Iterable[Job], batch: int, count: int | None = None) -> Iterator[Tensor]:
        """Yield the features of batches (B, d) in order.

        Args:
            jobs: What decodes pictures.
            batch: Pictures at a time.
            count: How many pictures there are, where it is known.

        Raises:
            UserError: The first picture that cannot be read.
        """
        threads = torch.get_num_threads()
        lanes = min(threads if self.workers is None else self.workers, MOST_LANES)
        if self.device.type == "cpu" and not self.opened.threads:
            lanes = min(lanes, 1)
        if count is not None and lanes > 1 and count < lanes * batch:
            batch = max(1, -(-count // lanes)) if count > 2 * lanes else batch
        parts = grouped(jobs, batch)
        first = list(itertools.islice(parts, 2))
        if lanes < 1 or (len(first) < 2 and self.device.type == "cpu"):
            yield from (self.forward(*decoded(part)) for part in itertools.chain(first, parts))
            return
        work: Callable[[list[Job]], Any] = self._lane if self.device.type == "cpu" else decoded
        share = max(1, threads // lanes) if self.device.type == "cpu" else 0
        with lane_pool(lanes, share) as pool:
            for done in in_order(pool, work, itertools.chain(first, parts), 2 * lanes):
                yield done if isinstance(done, Tensor) else self.forward(*done)

    def _lane(self, part: list[Job]) -> Tensor:
        return self.forward(*decoded(part))

    def forward(self, pixels: np.ndarray | Tensor, cameras: Tensor | None = None) -> Tensor:
        """Return the features of resized pictures.

        Args:
            pixels: (B, h, w, 3) bytes.
            cameras: (B,) rows of the camera embedding; None: the network is told none.

        Returns:
            (B, d) float32 on the CPU.

        Raises:
            UserError: Features are not finite.
        """
        with torch.inference_mode():
            images = self._normalised(pixels)
            found = self.features(images if self.channels_last else images.contiguous(), cameras)
        if not bool(torch.isfinite(found).all()):
            broken = int((~torch.isfinite(found).all(dim=1)).sum())
            raise UserError(
                f"{broken} of {len(found)} features of '{self.name}' hold NaN or infinity; its weights are damaged, or it "
                f"does not work in {self.precision}."
            )
        return found.clone()

    def _normalised(self, pixels: np.ndarray | Tensor) -> Tensor:
        """(B, h, w, 3) bytes -> (B, 3, h, w) float32, channels last in memory."""
        images = torch.as_tensor(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return images.float().div_(255).sub_(self._mean).div_(self._std)

    def features(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Return the features of images that are ready.

        Args:
            images: (B, 3, h, w) float32, normalised.
            cameras: (B,) rows of the camera embedding; None: the network is told none.

        Returns:
            (B, d) float32 on the CPU.
        """
        dtype = PRECISIONS[self.precision]
        mixed = contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        with torch.inference_mode(), mixed:
            found = self._network(images) if cameras is None else self._with_cameras(images, cameras)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            raise UserError(f"'{self.name}' does not return one feature per image; name a network that does.")
        return found.float().cpu()

    def _with_cameras(self, images: Tensor, cameras: Tensor) -> Tensor:
        try:
            return self._network(images, cameras.to(self.device))  # type: ignore[call-arg]
        except TypeError:
            raise UserError(f"'{self.name}' has no camera embedding; leave out the cameras.") from None

    def _width(self) -> int:
        height, width = self.reading.size
        try:
            return self.features(torch.zeros(1, 3, height, width, device=self.device)).shape[1]
        except (RuntimeError, AssertionError, ValueError) as error:
            first = " ".join(str(error).split())[:160].rstrip(" .")
            raise UserError(
                f"'{self.name}' does not take images of {height}x{width} ({first}); give another size."
            ) from error


# --- work in order ----------------------------------------------------------------------------------------------------
def grouped(jobs: Iterable[Job], batch: int) -> Iterator[list[Job]]:
    """Yield jobs in groups of at most ``batch`` pictures each; a job is never divided."""
    part: list[Job] = []
    held = 0
    for job in jobs:
        if part and held + job.size > batch:
            yield part
            part, held = [], 0
        part.append(job)
        held += job.size
    if part:
        yield part


def decoded(part: list[Job]) -> tuple[np.ndarray, Tensor | None]:
    """Return the pictures of several jobs, (B, h, w, 3) bytes, and their cameras, (B,)."""
    pixels = np.concatenate([job.decode() for job in part])
    if part[0].camera is None:
        return pixels, None
    return pixels, torch.tensor([job.camera for job in part for _ in range(job.size)])


@contextlib.contextmanager
def lane_pool(lanes: int, share: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads with ``share`` threads of torch's each (0: as they are); those of the caller stay what they are."""
    before = torch.get_num_threads()
    started = Barrier(lanes + 1)

    def prepare() -> None:
        if share:
            torch.set_num_threads(share)
        started.wait()

    pool = ThreadPoolExecutor(lanes, "relreid-lane", initializer=prepare)
    try:
        for _ in range(lanes):
            pool.submit(int)
        started.wait()
        if share:
            torch.set_num_threads(before)  # torch's number is that of the process for threads that begin, else the thread's
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], parts: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Yield ``work(part)`` in the order of the parts, of which ``ahead`` are in work or done; the first error ends it."""
    waiting: deque[Future] = deque()
    for part in parts:
        waiting.append(pool.submit(work, part))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def find_device(name: str) -> torch.device:
    """Return a device by name; ``auto`` is a GPU where there is one.

    Raises:
        UserError: An unknown name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"device is '{name}'; name 'cpu', 'cuda', 'cuda:N' or 'auto'.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is '{name}'; name 'cpu', 'cuda', 'cuda:N' or 'auto'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}' is not there: {torch.cuda.device_count()} GPUs are found; 'cpu' works anywhere.")
    return device


def imitated(precision: str, device: torch.device) -> str:
    """Return a sentence where a processor imitates products of a precision, many times slower than float32; else ''."""
    able = {"bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported}
    if device.type != "cpu" or precision not in able or able[precision]():
        return ""
    return f"this processor has no {precision} products and imitates them, many times slower than float32"


__all__ = ["PRECISIONS", "Extractor", "ImageExtractor", "check_precision", "find_device", "imitated"]
