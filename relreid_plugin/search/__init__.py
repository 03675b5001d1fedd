"""Galleries on disk: features, indices, refined layer states, and search.

**More than one process or machine.** ``torchrun tools/extract.py`` writes one shard per process (``shard-000-of-004``,
…), and the processes never talk to each other: machines without a common disk write to their own, and the folders are
put side by side afterwards. A folder of shards is opened like a store. Every shard keeps an index of its own, built
where the shard is, and one process searches all of them through faiss's ``IndexShards``, a thread per shard. Where the
shards do not fit into one machine's memory, their ``.faiss`` files are plain faiss indices that
``faiss.contrib.client_server`` serves over the network.
"""

from __future__ import annotations

from .extractor import FeatureExtractor
from .gallery import GallerySearcher, SearchResult
from .store import FeatureStore, StoreWriter

__all__ = ["FeatureExtractor", "FeatureStore", "GallerySearcher", "SearchResult", "StoreWriter"]
