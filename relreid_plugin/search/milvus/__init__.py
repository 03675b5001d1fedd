"""Galleries in Milvus: embedded in a file by milvus-lite, or on a server or cluster, by the same client and code.

A gallery ``NAME`` is these collections; row numbers are primary keys, so that whatever is written twice is there once::

    NAME              row, feature, pid, camid, identity, camera, path, split, time
    NAME_manifest     key, value: the gallery's head (rows, deleted, model, …) and the heads of its layer states
    NAME_ENCODER_P    row, refined, states, (inputs,) pid, camid, time: a refined gallery, one per encoder and pass P

The head is one entity, written after what it names: rows that it does not count are found by nobody and are written again by
the next writer, rows that it calls deleted are found by nobody even before Milvus has taken them away. So the counts of a
gallery whose writer was killed are right. One process writes at a time; a second one is refused when it commits.
"""

from __future__ import annotations

from .client import PREFIX, is_milvus
from .states import MilvusStates
from .store import MilvusStore, MilvusWriter

__all__ = ["PREFIX", "MilvusStates", "MilvusStore", "MilvusWriter", "is_milvus"]
