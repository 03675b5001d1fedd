"""Re-ranking the nearest images of every query by one of the rivals, each query alone with its candidates.

Shape letters: Q queries, s candidates per query, d width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..features.arrays import RowTable
from ..metrics.cameras import UNKNOWN
from ..metrics.rivals import Rival
from .exact import stable_order


def rerank_candidates(
    queries: Tensor,
    table: RowTable,
    rows: Tensor,
    rival: Rival,
    *,
    cameras: tuple[np.ndarray, np.ndarray] | None = None,
    protocol: str | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Order every query's candidates by a rival's distances in the set of the query and its candidates, and nothing else.

    So a query's scores depend on no other query, whatever the protocol.

    Args:
        queries: (Q, d) unit features.
        table: Features of the gallery.
        rows: (Q, s) candidates, -1 where there is none.
        rival: The method.
        cameras: Of the queries (Q,) and of the candidates (Q, s), for rivals that know cameras; one that can do without
            does so for queries where one of them is -1, unknown. ``None``: all are unknown.
        protocol: One of the rival's; ``None``: the published one.
        settings: See :meth:`~relreid_plugin.metrics.rivals.Rival.distances`.

    Returns:
        (Q, s) scores, 1 - distance, falling, and (Q, s) rows; equal scores by rising row, empty slots last.

    Raises:
        UserError: A rival that needs cameras where some are unknown, or what it complains of itself.
    """
    known = cameras_known(rows, cameras)
    if rival.needs_cameras and not known.all():
        raise UserError(
            f"'{rival.name}' re-ranks by cameras, which are unknown for {int((~known).sum())} of {len(rows)} queries or for "
            "images among their nearest; let file names say them ('data.name_pattern'), or re-rank by another method."
        )
    scores, order = torch.full(rows.shape, -torch.inf), torch.full_like(rows, -1)
    for number, candidates in enumerate(rows):  # each query has a gallery of its own
        found, slots = candidates.sort()
        found, slots = found[found >= 0], slots[found >= 0]
        if not len(found):
            continue
        given: dict[str, Any] = {}
        if rival.cameras != "none" and cameras is not None and known[number]:
            own, theirs = cameras
            given = {"query_cameras": own[number : number + 1], "gallery_cameras": theirs[number][slots.numpy()]}
        query = queries[number : number + 1]
        distances = rival.distances(query, table.take(found), **given, protocol=protocol, **settings)
        best, chosen = stable_order(1 - distances, found.unsqueeze(0), len(found))
        scores[number, : len(found)], order[number, : len(found)] = best[0], chosen[0]
    return scores, order


def cameras_known(rows: Tensor, cameras: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Return for which queries (Q,) the cameras of themselves and of all candidates are known; as in the function above."""
    if cameras is None:
        return np.zeros(len(rows), bool)
    own, theirs = cameras
    return (own != UNKNOWN) & ((theirs != UNKNOWN) | (rows.numpy() < 0)).all(axis=1)


__all__ = ["cameras_known", "rerank_candidates"]
