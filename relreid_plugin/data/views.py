"""The views of a multimodal sample: checking their files, reading them, and statistics of their pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import UserError, did_you_mean
from .checks import CHECK_MODES, check_each
from .files import Unreadable
from .images import Header, Picture, read_picture
from .ranges import Range, needs_range, range_key

Source = str | tuple[str, ...]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def check_samples(
    sources: Iterable[Source],
    modalities: Sequence[str],
    mode: str = "header",
    *,
    wanted: Sequence[str] | None = None,
    ranges: Mapping[str, Range | None] | None = None,
    progress: bool = True,
) -> list[str]:
    """Check that the files of all samples are there, whole, and of the kind that their modality needs.

    Args:
        sources: Strips, or tuples with one path per modality; a file named twice is checked once.
        modalities: The data set's modalities.
        mode: ``header``, ``full`` or ``none``, as for :func:`relreid_plugin.data.checks.check_images`.
        wanted: The modalities that are read; None: all. Others may be of any depth.
        ranges: Per modality, what becomes black and white in files of more than 8 bits.
        progress: Show a progress bar on a terminal.

    Returns:
        Sentences that a user should see: how many files of other modalities than R are grey-scale.

    Raises:
        UserError: The first file that is missing (with the modality and a file of the sample that is there), damaged, of
            more than 8 bits per channel without a range, or grey-scale where it must hold the colours of R; and how many
            more there are.
    """
    if mode not in CHECK_MODES:
        raise ValueError(f"mode must be one of {', '.join(CHECK_MODES)}, got {mode!r}")
    if mode == "none":
        return []
    modalities = tuple(modalities)
    ranges = ranges or {}
    shown: dict[str, set[str]] = {}  # the modalities that a file shows
    strips: set[str] = set()
    incomplete: list[str] = []
    for source in dict.fromkeys(source if isinstance(source, str) else tuple(source) for source in sources):
        if isinstance(source, str):
            shown[source] = set(modalities)
            strips.add(source)
            continue
        _check_length(source, modalities)
        for name, path in zip(modalities, source):
            shown.setdefault(path, set()).add(name)
        absent = [name for name, path in zip(modalities, source) if not os.path.lexists(path)]
        if absent:
            incomplete.append(incomplete_sample(dict(zip(modalities, source)), absent))
    raise_incomplete(incomplete)

    def judge(file: str, header: Header, picture: Picture | None) -> None:
        needed = [name for name in modalities if name in shown[file] and (wanted is None or name in wanted)]
        for name in needed if header.depth else []:
            if not ranges.get(name):
                raise Unreadable(*needs_range(header.depth, range_key(name)))
            if picture is not None:
                view = _view(picture, modalities.index(name), len(modalities)) if file in strips else picture
                view.to_rgb(ranges[name], key=range_key(name))
        if header.grey and "R" in needed:
            raise Unreadable(
                "is grey-scale, but shows R (visible) and must hold colour",
                "replace it, or leave R out of 'multimodal.modalities'",
            )

    headers = dict(zip(shown, check_each(shown, mode, judge, progress=progress)))
    others = [header for file, header in headers.items() if "R" not in shown[file]]
    grey = sum(header.grey for header in others)
    if not grey:
        return []
    names = ", ".join(name for name in modalities if name != "R")
    return [f"{grey} of {len(others)} files of {names} are grey-scale: their one channel is used three times"]


def read_views(
    source: Source,
    modalities: Sequence[str],
    wanted: Sequence[str] | None = None,
    *,
    ranges: Mapping[str, Range | None] | None = None,
) -> list[Image.Image]:
    """Read a sample's views, upright.

    A strip is opened and decoded once, turned upright, and then divided; of separate files, only the wanted ones are opened.

    Args:
        source: A strip's path, or one path per modality.
        modalities: The data set's modalities: the views of a strip from left to right, or the order of the paths.
        wanted: The modalities to return, in this order; None: all.
        ranges: Per modality, what becomes black and white in files of more than 8 bits per channel.

    Returns:
        One RGB image of 8 bits per wanted modality.

    Raises:
        UserError: A file is missing or no image, has more than 8 bits without a range or values outside it, a strip does
            not divide into equal views, or a wanted modality is not there.
    """
    modalities = tuple(modalities)
    wanted = modalities if wanted is None else tuple(wanted)
    require_known(wanted, modalities)
    places = [modalities.index(name) for name in wanted]
    if isinstance(source, str):
        strip = read_picture(source)
        if strip.size[0] % len(modalities):
            raise UserError(f"{uneven(source, strip.size, modalities)}.")
        views = [_view(strip, place, len(modalities)) for place in places]
    else:
        _check_length(source, modalities)
        views = [read_picture(source[place]) for place in places]
    ranges = ranges or {}
    return [_to_rgb(view, ranges.get(name), name) for name, view in zip(wanted, views)]


def _check_length(source: Sequence[str], modalities: tuple[str, ...]) -> None:
    if len(source) != len(modalities):
        raise ValueError(f"a source has {len(source)} paths for the {len(modalities)} modalities {', '.join(modalities)}")


def _to_rgb(view: Picture, pixel_range: Range | None, modality: str) -> Image.Image:
    try:
        return view.to_rgb(pixel_range, key=range_key(modality))
    except Unreadable as error:
        sentence = error.sentence(view.path)
    raise UserError(sentence)


def _view(strip: Picture, place: int, count: int) -> Picture:
    width = strip.size[0] // count
    return strip.columns(place * width, (place + 1) * width)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass
class ModalityStatistics:
    """Mean and standard deviation of pixels in [0, 1].

    Attributes:
        modalities: Names of the modalities.
        mean: Per modality, the mean of red, green and blue.
        std: Per modality, the standard deviation of red, green and blue.
        samples: Number of samples that were read.
        ranges: Per modality, what was black and white in files of more than 8 bits.
    """

    modalities: tuple[str, ...]
    mean: list[list[float]]
    std: list[list[float]]
    samples: int
    ranges: Mapping[str, Range | None] = field(default_factory=dict)


def modality_statistics(
    sources: Iterable[Source],
    modalities: Sequence[str],
    *,
    ranges: Mapping[str, Range | None] | None = None,
    progress: bool = False,
) -> ModalityStatistics:
    """Compute the mean and standard deviation of every modality and channel over all pixels of the samples.

    The images are read one after another and counted into histograms of integers, from which float64 numbers follow without
    rounding on the way; memory does not grow with the data set. Every pixel counts alike: a larger image weighs more.

    Args:
        sources: Strips, or tuples with one path per modality.
        modalities: The data set's modalities.
        ranges: As for :func:`read_views`.
        progress: Show a progress bar on a terminal.

    Raises:
        UserError: There are no samples, or a file cannot be read.
    """
    modalities = tuple(modalities)
    items = list(sources)
    if not items:
        raise UserError("there are no samples to take statistics of; name a data set with training samples.")
    counts = np.zeros((len(modalities), 3, 256), dtype=np.int64)

    def count(source: Source) -> list[list[int]]:
        return [view.histogram() for view in read_views(source, modalities, ranges=ranges)]

    for histograms in _imap(count, items, desc="reading pixels", progress=progress):
        counts += np.asarray(histograms, dtype=np.int64).reshape(counts.shape)
    values = np.arange(256, dtype=np.float64) / 255
    pixels = counts.sum(axis=2).astype(np.float64)  # (M, 3)
    mean = (counts * values).sum(axis=2) / pixels
    variance = (counts * (values - mean[..., None]) ** 2).sum(axis=2) / pixels
    return ModalityStatistics(modalities, mean.tolist(), np.sqrt(variance).tolist(), len(items), dict(ranges or {}))


def statistics_yaml(statistics: ModalityStatistics, *, digits: int = 4) -> str:
    """Return the statistics as lines of a configuration file.

    Args:
        statistics: What :func:`modality_statistics` returned.
        digits: Digits after the point.

    Raises:
        UserError: A channel of a modality is constant, so that nothing can be divided by its deviation.
    """
    for name, deviations in zip(statistics.modalities, statistics.std):
        if min(round(value, digits) for value in deviations) <= 0:
            raise UserError(f"modality {name} is constant over all samples; check that its images are not black.")

    def rows(table: list[list[float]]) -> str:
        return "[" + ", ".join("[" + ", ".join(f"{value:.{digits}f}" for value in row) + "]" for row in table) + "]"

    lines = [
        "multimodal:",
        f"  modalities: {list(statistics.modalities)}",
        f"  mean: {rows(statistics.mean)}",
        f"  std: {rows(statistics.std)}",
    ]
    if any(statistics.ranges.values()):
        lines.append(f"  pixel_range: {[list(statistics.ranges.get(name) or ()) for name in statistics.modalities]}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


def require_known(wanted: Sequence[str], modalities: tuple[str, ...], whose: str = "the data set") -> None:
    for name in wanted:
        if name not in modalities:
            raise UserError(
                f"key 'multimodal.modalities' asks for '{name}', which {whose} does not have{did_you_mean(name, modalities)}"
            )


def incomplete_sample(paths: Mapping[str, str], absent: Sequence[str]) -> str:
    missing = " and ".join(f"its {name} image '{paths[name]}'" for name in absent)
    there = next((name for name in paths if name not in absent), None)
    if there is None:
        return f"a sample has none of its images: {missing} are missing" if len(absent) > 1 else f"{missing} is missing"
    return f"sample '{paths[there]}' ({there}) is incomplete: {missing} {'is' if len(absent) == 1 else 'are'} missing"


def raise_incomplete(incomplete: Sequence[str]) -> None:
    if incomplete:
        more = f" ({len(incomplete) - 1} more samples are incomplete)" if len(incomplete) > 1 else ""
        raise UserError(f"{incomplete[0]}{more}; add the file, or take the sample out of every modality.")


def uneven(file: str, size: tuple[int, int], modalities: tuple[str, ...]) -> str:
    return (
        f"strip '{file}' is {size[0]} pixels wide, which does not divide into the {len(modalities)} views "
        f"{', '.join(modalities)}; make all views equally wide, or change 'multimodal.modalities'"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Work in threads: files are read while others are decoded


def _imap(
    function: Callable[[_Item], _Result], items: Sequence[_Item], *, desc: str, progress: bool = True, ahead: int = 256
) -> Iterator[_Result]:
    """Yield the results in order, with a progress bar on a terminal; no more than ``ahead`` of them wait to be taken."""
    workers = min(8, 2 * (os.cpu_count() or 1))
    disable = None if progress else True
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(items), desc=desc, unit="img", disable=disable) as bar:
        for start in range(0, len(items), ahead):
            for result in pool.map(function, items[start : start + ahead]):
                bar.update()
                yield result


def map_files(
    function: Callable[[_Item], _Result], items: Sequence[_Item], *, desc: str, progress: bool = True
) -> list[_Result]:
    return list(_imap(function, items, desc=desc, progress=progress))
