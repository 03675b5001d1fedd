"""Pictures of ranked lists (``test.visrank``): one per query, the nearest gallery images beside it.

Shapes: Q queries, G gallery images, k shown of them.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.samefile import first_path
from ..errors import UserError
from .checkpoint import atomic_file
from .evaluator import Evaluator
from .scoring import Metric, Scorer

_RIGHT, _WRONG, _QUERY = (0, 160, 0), (220, 0, 0), (0, 0, 0)
_BORDER, _GAP, _QUERY_GAP = 3, 6, 24
_CHUNK_VALUES = 2**22  # distances held at a time, beside those of re-ranking


def draw_target(run: Any, evaluator: Evaluator, drawn: Sequence[Path] = ()) -> Path:
    """Draw the ranked lists of a test set, by the metric of the image model's row.

    Of a tracklet its first image is shown, of several modalities the first one that is trained on.

    Args:
        run: The run.
        evaluator: Of the test set.
        drawn: Folders that are taken by other test sets.

    Returns:
        The folder, ``visrank_<test set>`` in the run's; what an earlier test left there is removed.
    """
    name, data, scorer, cfg = evaluator.target, evaluator.data, evaluator.scorer, run.cfg
    folder = run.results / f"visrank_{Path(name).name}"
    for number in itertools.count(2):  # test sets at different places may have the same name
        if folder not in drawn:
            break
        folder = run.results / f"visrank_{Path(name).name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    sets, metric = run.datamanager.test_dataset[name], scorer.metric()
    lists = ranked_lists(scorer, data.query.features, data.gallery.features, metric, cfg.test.visrank_topk)
    size = (cfg.data.height, cfg.data.width)
    draw_ranked_lists(folder, lists, sets["query"], sets["gallery"], read=run.read_picture, size=size)
    print(f"{name}: ranked lists of {len(data.query)} queries are in '{folder}'")
    return folder


def ranked_lists(scorer: Scorer, query: Tensor, gallery: Tensor, metric: Metric, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest gallery images of every query, without those that the protocol discards for it.

    Args:
        scorer: Of the test set.
        query: (Q, d).
        gallery: (G, d).
        metric: How to rank them.
        topk: k.

    Returns:
        Gallery indices (Q, k), -1 where nothing is left, and whether they have the query's identity, (Q, k) bool.
    """
    topk = min(topk, len(gallery))
    chunk = max(1, _CHUNK_VALUES // len(gallery))
    whole = scorer.distances(query, gallery, metric) if metric.reranks else None
    indices, matched = [], []
    for start in range(0, len(query), chunk):
        rows = slice(start, start + chunk)
        part = scorer.distances(query[rows], gallery, metric) if whole is None else whole[rows]
        distances, junk = part.double().numpy().copy(), scorer.junk(rows)
        distances[junk] = np.inf
        order = np.argsort(distances, axis=1, kind="stable")[:, :topk]
        pids = scorer.labels["gallery_pids"][order] == scorer.labels["query_pids"][rows, None]
        left = ~np.take_along_axis(junk, order, 1)
        indices.append(np.where(left, order, -1))
        matched.append(pids & left)
    return np.concatenate(indices), np.concatenate(matched)


def draw_ranked_lists(
    folder: Path,
    lists: tuple[np.ndarray, np.ndarray],
    query: Sequence[tuple[Any, ...]],
    gallery: Sequence[tuple[Any, ...]],
    *,
    read: Callable[[Any], Image.Image],
    size: tuple[int, int],
) -> None:
    """Write one JPEG per query: the query in a black frame, then gallery images in green (its identity) or red ones.

    Args:
        folder: Where they go, named as the queries are.
        lists: From :func:`ranked_lists`.
        query: Q items of the data set.
        gallery: G items.
        read: The first entry of an item to its picture.
        size: (height, width) of a cell, pixels.

    Raises:
        UserError: A picture cannot be read, or written.
    """
    height, width = size
    indices, matched = lists
    names = _file_names([first_path(item[0]) for item in query])

    def cell(source: Any, colour: tuple[int, int, int]) -> Image.Image:
        frame = Image.new("RGB", (width, height), colour)
        inner = (max(1, width - 2 * _BORDER), max(1, height - 2 * _BORDER))
        frame.paste(read(source).convert("RGB").resize(inner, Image.Resampling.BILINEAR), (_BORDER, _BORDER))
        return frame

    step = width + _GAP
    for number, name in enumerate(tqdm(names, desc="ranked lists", leave=False, disable=None)):
        sheet = Image.new("RGB", (width + _QUERY_GAP + indices.shape[1] * step - _GAP, height), (255, 255, 255))
        sheet.paste(cell(query[number][0], _QUERY), (0, 0))
        shown = [(int(index), bool(match)) for index, match in zip(indices[number], matched[number]) if index >= 0]
        for column, (index, match) in enumerate(shown):
            picture = cell(gallery[index][0], _RIGHT if match else _WRONG)
            sheet.paste(picture, (width + _QUERY_GAP + column * step, 0))
        path = folder / f"{name}.jpg"
        try:
            with atomic_file(path) as temporary:
                sheet.save(temporary, "JPEG", quality=90)
        except OSError as error:
            raise UserError(f"picture '{path}' cannot be written ({error.strerror}).") from None


def _file_names(paths: Sequence[str]) -> list[str]:
    """A name for every query's picture: its file's, with its folder's before it where another query has the same."""
    stems = [Path(path).stem for path in paths]
    doubled = {stem for stem, count in Counter(stems).items() if count > 1}
    names: dict[str, int] = {}
    out = []
    for path, stem in zip(paths, stems):
        name = f"{Path(path).parent.name}_{stem}" if stem in doubled else stem
        count = names[name] = names.get(name, 0) + 1
        out.append(name if count == 1 else f"{name}-{count}")
    return out
