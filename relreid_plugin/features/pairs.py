"""Queries and gallery that belong together, made ready to be scored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..data.split import NO_CAMERAS_NOTE
from ..errors import UserError
from .columns import merged_names
from .sets import Features, TestFeatures, common_model


def test_set(query: Features, gallery: Features) -> tuple[TestFeatures, list[str]]:
    """Return a test set under the Market-1501 protocol, and notes on what was done.

    Images without an identity are left out. Where no image has a camera, queries get camera 0 and gallery images camera 1,
    so that none is discarded.

    Args:
        query: With identities.
        gallery: The same.

    Raises:
        UserError: Widths or models differ, no identity is known, only some images have cameras, or no query has a match.
    """
    if query.dim != gallery.dim:
        raise UserError(
            f"query {query.called} have width {query.dim} and gallery {gallery.called} {gallery.dim}; one model makes both."
        )
    common_model([query, gallery])
    merged_names([query.identity_names, gallery.identity_names], "identities")
    merged_names([query.camera_names, gallery.camera_names], "cameras")
    (query, first), (gallery, second) = query.known(), gallery.known()
    notes = [note for note in (first, second) if note]
    if not both_have_cameras(query, gallery):
        query = replace(query, camids=np.zeros(len(query), np.int64))
        gallery = replace(gallery, camids=np.ones(len(gallery), np.int64))
        notes.append(NO_CAMERAS_NOTE)
    if not np.isin(query.pids, gallery.pids).any():
        raise UserError(
            f"no query of {query.called} has an image of its identity in {gallery.called}; do they number alike?"
        )
    return TestFeatures(query, gallery), notes


def both_have_cameras(query: Features, gallery: Features) -> bool:
    """Whether queries and gallery have cameras, or neither has.

    Raises:
        UserError: One side alone has them, or some images of a side.
    """
    if query.has_cameras != gallery.has_cameras:
        with_, without = (query, gallery) if query.has_cameras else (gallery, query)
        raise UserError(f"{with_.called} have cameras and {without.called} have none; give both, or neither.")
    return query.has_cameras


test_set.__test__ = False  # type: ignore[attr-defined]
