"""How the pictures of a test set are read for the page: one per image, or all of a sample that has several."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import read_image
from ..data.samefile import first_path
from ..errors import UserError
from ..methods import takes_several
from .scored import Subject, Target
from .thumbnails import is_stacked, sheet, small


def reader(subject: Subject, target: Target) -> tuple[Callable[[str], Image.Image], dict[str, Any] | None, str]:
    """Return how pictures are read by their paths, what a sample's several pictures are, and why they are not shown.

    Returns:
        Path to a small picture; ``names`` of a sample's pictures and whether they are ``stacked`` (else side by side), or
        ``None`` where a sample is one picture; and a sentence, empty where nothing is missing.
    """
    cfg = subject.cfg
    span = None if cfg is None else list(cfg.data.pixel_range)

    def plain(path: str) -> Image.Image:
        return small(read_image(path, span or None))

    paths = target.data.query.paths
    if cfg is None or subject.opening is None or not takes_several(cfg) or not (paths and Path(paths[0]).is_file()):
        return plain, None, ""
    try:
        run = subject.opening.run
        with contextlib.redirect_stdout(io.StringIO()):
            sets = run.datamanager.test_dataset[target.name]
        sources = {first_path(item[0]): item[0] for items in sets.values() for item in items}
        first = run.network.read_pictures(run, sources[paths[0]])
    except (UserError, KeyError) as error:
        why = error if isinstance(error, UserError) else f"'{paths[0]}' is not in the data set any more."
        return plain, None, f"only the first picture of every sample is shown: {why}"

    def several(path: str) -> Image.Image:
        if path not in sources:
            raise UserError(f"'{path}' is not in the data set any more.")
        return sheet(list(run.network.read_pictures(run, sources[path]).values()))

    return several, {"names": list(first), "stacked": is_stacked(list(first.values()))}, ""


__all__ = ["reader"]
