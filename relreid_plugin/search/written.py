"""Cameras of query images as a store numbers them.

A store that was made from file names has the cameras that the names say; one that was made from a test set has the
numbers of the data set, which often begin elsewhere (``c1`` is camera 0 of Market-1501). What a name says is therefore
compared with what the store holds for its own images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.labels import Label, stored_number
from ..data.names import NamePattern
from ..errors import UserError
from ..features.store import FeatureStore
from ..metrics.cameras import UNKNOWN
from .engines import Store
from .extractor import name_labels

_SAMPLE = 64  # images of a camera whose names are read


def camera_numbers(store: Store, pattern: NamePattern | None = None) -> dict[Label, int] | None:
    """Return the store's number of every camera that the names of its images say.

    Args:
        store: The gallery.
        pattern: How files are named; ``None``: ``ID_cC_…``.

    Returns:
        Camera as written to the number in the store; ``None`` where its images have no cameras or their names say none.

    Raises:
        UserError: Names and store contradict each other: one camera in one has several in the other.
    """
    camids = store.camids
    found: dict[Label, int] = {}
    for camera in np.unique(camids).tolist():
        if camera == UNKNOWN:
            continue
        rows = np.flatnonzero(camids == camera)
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, _SAMPLE).astype(int))]
        written = {name_labels(path, pattern)[2] for path in store.labels(rows.tolist())[2]}
        written.discard(UNKNOWN)
        if not written:
            continue
        if len(written) > 1 or found.keys() & written:
            raise UserError(
                f"the file names in store '{_called(store)}' do not say the cameras that it holds (its camera "
                f"{store.camera_names.get(camera, camera)} is written {', '.join(sorted(map(str, written)))}), so that "
                "those of query images cannot be told; set 'data.name_pattern' so that it reads them, or search from "
                "Python with 'camids'."
            )
        found[written.pop()] = camera
    return found or None


def query_cameras(store: Store, queries: Sequence[str], pattern: NamePattern | None = None) -> np.ndarray:
    """Return the cameras (Q,) int64 of query images as the store numbers them, -1 where unknown.

    A camera that no gallery image has gets a number that no gallery image has.

    Args:
        store: The gallery.
        queries: Q image files.
        pattern: How they and the store's images are named; ``None``: ``ID_cC_…``.

    Raises:
        UserError: See :func:`camera_numbers`.
    """
    numbers = camera_numbers(store, pattern)
    written = [name_labels(path, pattern)[2] for path in queries]
    if numbers is None or set(written) == {UNKNOWN}:
        return np.full(len(queries), UNKNOWN, np.int64)
    used = set(np.unique(store.camids).tolist())
    known: dict[Label, int] = {UNKNOWN: UNKNOWN, **numbers}
    for camera in written:
        if camera not in known:
            number = stored_number(camera)
            known[camera] = number if number not in used else max(used) + 1
            used.add(known[camera])
    return np.array([known[camera] for camera in written], np.int64)


def _called(store: Store) -> str:
    return str(store.folder) if isinstance(store, FeatureStore) else store.name


__all__ = ["camera_numbers", "query_cameras"]
