"""A store and the searcher over it as a model's run wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..metrics.neighbours import SearchConfig
from .engines import Store
from .gallery import GallerySearcher

if TYPE_CHECKING:
    from .extractor import FeatureExtractor


def open_searcher(
    store: Store,
    extractor: FeatureExtractor,
    config: SearchConfig,
    *,
    relations: bool,
    full: bool = False,
    verify: bool = False,
    complete: bool = False,
) -> GallerySearcher:
    """Return a searcher with everything made that is missing: the index, and with relations the refined gallery.

    Args:
        store: The gallery.
        extractor: The model that made it.
        config: Kind of index and search parameters.
        relations: Refine queries and gallery by the run's relation encoder.
        full: Refine the whole gallery anew.
        verify: Compare every file of the store with its checksum first.
        complete: Refuse a store whose extraction was interrupted.

    Raises:
        UserError: See :class:`~relreid_plugin.search.gallery.GallerySearcher`.
    """
    searcher = GallerySearcher(
        store,
        encoder=extractor.encoder() if relations else None,
        search=config,
        model=extractor.fingerprint,
        verify=verify,
        complete=complete,
    )
    if relations:
        states = searcher.refine(full=full)
        if states.rows > states.base_rows:
            print(
                f"note: {states.rows - states.base_rows} of {states.rows} gallery images were appended and refined as "
                "if they were queries, which is approximate; --full refines all anew."
            )
    searcher.update()
    return searcher


__all__ = ["open_searcher"]
