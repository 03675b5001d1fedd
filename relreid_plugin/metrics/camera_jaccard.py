"""Camera-aware Jaccard distance with sparse products (CA-Jaccard; Chen et al., CVPR 2024).

Shapes: Q queries, G gallery images, N = Q + G, B rows held at a time. It is k-reciprocal re-ranking
(:mod:`~relreid_plugin.metrics.reranking`) with other sets of neighbours, and works as that does: of a row of distances the
nearest ones are kept, those of the same camera and those of other cameras, and everything after that is sparse.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..errors import UserError
from .lists import Cameras, camera_array, check_numbers, edges
from .ranking import Array
from .reranking import Rows, _add_jaccard, _feature_rows, _nearest, _read, _weigh


def camera_jaccard_rerank(
    query: Tensor,
    gallery: Tensor,
    query_cameras: Cameras,
    gallery_cameras: Cameras,
    *,
    k1_intra: int = 5,
    k1_inter: int = 20,
    k2_intra: int = 3,
    k2_inter: int = 3,
    lambda_value: float = 0.3,
    chunk: int | None = None,
) -> Array:
    """Distances between features re-ranked with camera-aware sets of neighbours.

    With the squared Euclidean distance d, divided by the largest of its row, an image's set R is the union of

    - the images of its camera that are among each other's k1_intra + 1 nearest of that camera (itself among them), and
    - the images of other cameras that are among each other's k1_inter + 1 nearest of other cameras.

    ``V_ij = exp(-d_ij) / sum of exp(-d)`` for j in R. The row is then averaged over the k2_intra nearest of the same camera
    (itself among them) and the k2_inter nearest of other cameras, and the Jaccard distance of two rows is mixed with d as in
    :func:`~relreid_plugin.metrics.reranking.k_reciprocal_rerank`. Where a camera has fewer images than a number asks for,
    there are that many less. The defaults are those of the authors' command for re-ranking; their paper has k2_intra 2 and
    k2_inter 4 for clustering.

    Args:
        query: Features, (Q, d).
        gallery: Features, (G, d), on the same device.
        query_cameras: Camera of every query, (Q,).
        gallery_cameras: Camera of every gallery image, (G,).
        k1_intra: Neighbours of the same camera in which reciprocity is asked for; 0: the image alone.
        k1_inter: Neighbours of other cameras, less one.
        k2_intra: Neighbours of the same camera over which the encoding is averaged, the image itself among them.
        k2_inter: Neighbours of other cameras; may be 0.
        lambda_value: Weight of the original distance, in [0, 1].
        chunk: Rows of distances held at a time; None: about 32 MiB of them.

    Returns:
        Distances (Q, G) in [0, 1], float32, numpy.

    Raises:
        UserError: Shapes that do not fit, NaN, or parameters out of range.
    """
    check_numbers(0, k1_intra=k1_intra, k1_inter=k1_inter, k2_inter=k2_inter)
    check_numbers(1, k2_intra=k2_intra)
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk is {chunk}; it must be at least 1.")
    if not 0 <= lambda_value <= 1:
        raise UserError(f"lambda_value is {lambda_value}; it must lie in [0, 1].")
    cameras = np.concatenate(
        [
            camera_array(query_cameras, len(query), "query_cameras"),
            camera_array(gallery_cameras, len(gallery), "gallery_cameras"),
        ]
    )
    if not len(query) or not len(gallery):
        raise UserError(f"re-ranking needs queries and gallery images; got {len(query)} and {len(gallery)}.")
    cameras = np.unique(cameras, return_inverse=True)[1]
    with torch.inference_mode():
        rows, pairs = _feature_rows(query, gallery, chunk)
        wide = max(k1_intra + 1, k2_intra), max(k1_inter + 1, k2_inter)
        intra, inter, scale, result = _lists(rows, torch.from_numpy(cameras), wide, len(query), lambda_value)
        reciprocal = _reciprocal(intra[:, : k1_intra + 1]) + _reciprocal(inter[:, : k1_inter + 1])
        encoding = _weigh(reciprocal, scale, pairs)
        average = edges(torch.cat([intra[:, :k2_intra], inter[:, :k2_inter]], dim=1), len(cameras))
        average.data /= np.repeat(np.diff(average.indptr), np.diff(average.indptr)).astype(np.float32)
        _add_jaccard(result, (average @ encoding).tocsr(), len(query), 1 - lambda_value)
    return result


def _lists(
    rows: Rows, cameras: Tensor, wide: tuple[int, int], queries: int, share: float
) -> tuple[Tensor, Tensor, Array, Array]:
    """Read the distances once.

    Returns:
        Rows (N, k) of the nearest of the same camera and of other cameras, -1 where there are no more, the largest squared
        distance of every row (N,), and ``share`` times the queries' distances to the gallery (Q, G).
    """
    count = len(cameras)
    lists = tuple(torch.full((count, min(keep, count)), -1) for keep in wide)

    def take(own: slice, block: Tensor) -> None:
        same = (cameras[own, None] == cameras).to(block.device)
        for index, left_out in zip(lists, (~same, same)):
            part = block.masked_fill(left_out, torch.inf)
            found = torch.from_numpy(_nearest(part, index.shape[1]))
            void = part.gather(1, found.to(part.device)).isinf().cpu()
            index[own] = found.masked_fill_(void, -1)

    scale, result = _read(rows, queries, count - queries, share, take)
    return lists[0], lists[1], scale, result


def _reciprocal(index: Tensor) -> sparse.csr_array:
    forward = edges(index, len(index))
    return forward.multiply(forward.T.tocsr()).tocsr()
