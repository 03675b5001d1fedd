"""Galleries on disk: features, indices, refined layer states, and search.

**More than one process or machine.** ``torchrun -m relreid_plugin extract`` writes one shard per process
(``shard-000-of-004``, …), and the processes never talk to each other: machines without a common disk write to their own,
and the folders are put side by side afterwards. A folder of shards is opened like a store. Every shard keeps an index of
its own, built where the shard is, and one process searches all of them through faiss's ``IndexShards``, a thread per
shard. Where the shards do not fit into one machine's memory, the gallery goes into Milvus, which the searcher takes by name
in place of a folder (:mod:`relreid_plugin.search.milvus.store`). :mod:`relreid_plugin.search.sharded` refines a store by
several processes.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..features.store import FeatureStore, StoreWriter
from .gallery import GallerySearcher, SearchResult

if TYPE_CHECKING:
    from .extractor import FeatureExtractor

__all__ = ["FeatureExtractor", "FeatureStore", "GallerySearcher", "SearchResult", "StoreWriter"]


def __getattr__(name: str) -> Any:
    """Import the extractor on first use: it opens runs by torchreid, which nothing else here needs."""
    if name != "FeatureExtractor":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from .extractor import FeatureExtractor

    return FeatureExtractor


class _Search(ModuleType):
    """The package, which may be called as :func:`relreid_plugin.functions.search`."""

    def __call__(self, *args: Any, **options: Any) -> SearchResult:
        from ..functions import search

        return search(*args, **options)


sys.modules[__name__].__class__ = _Search
