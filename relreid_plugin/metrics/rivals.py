"""What else can be done with the features of queries and gallery: a table of all rivals with one way to call them.

Shapes: Q queries, G gallery images, d width.

Every rival says under which protocols it exists. ``inductive``: a query's distances do not depend on the other queries; all
that is computed of the gallery comes from the gallery alone. ``transductive``: queries are each other's neighbours, too.
The first one named is the published form. ::

    distances = RIVALS["gnn"].distances(query, gallery, protocol="inductive", k1=20)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, did_you_mean
from .camera_jaccard import camera_jaccard_rerank
from .centralisation import neighbour_centralisation
from .diffusion import diffusion_scores
from .distance import pairwise_distance
from .expansion import average_query_expansion, database_augmentation
from .graph import gnn_rerank, graph_convolution
from .lists import Cameras, unit_pair
from .reranking import k_reciprocal_rerank_features

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Rival:
    """One way to rank a gallery anew, from features alone.

    Attributes:
        name: As configurations name it.
        title: As a table's row does.
        source: The paper.
        protocols: Under which it exists, the published one first.
        cameras: ``none``: it knows no cameras; ``optional``: it uses them where they are given; ``needed``.
        settings: Its parameters with the paper's values.
        function: ``(query, gallery, cameras, protocol, **settings)`` to distances (Q, G), for unit features.
    """

    name: str
    title: str
    source: str
    protocols: tuple[str, ...]
    cameras: str
    settings: Mapping[str, Any]
    function: Callable[..., Tensor]

    @property
    def inductive(self) -> bool:
        """Whether there is a form in which a query's distances do not depend on the other queries."""
        return "inductive" in self.protocols

    @property
    def needs_cameras(self) -> bool:
        """Whether it cannot do without the images' cameras."""
        return self.cameras == "needed"

    def protocol(self, wanted: str | None = None) -> str:
        """Return ``wanted`` where it exists in this form, else the published protocol."""
        return wanted if wanted in self.protocols else self.protocols[0]

    def distances(
        self,
        query: Tensor,
        gallery: Tensor,
        *,
        query_cameras: Cameras | None = None,
        gallery_cameras: Cameras | None = None,
        protocol: str | None = None,
        **settings: Any,
    ) -> Tensor:
        """Return distances of the queries to the gallery; smaller is nearer, equal ones keep the gallery's order.

        Args:
            query: (Q, d), any length: rivals work on unit features.
            gallery: (G, d), on the same device.
            query_cameras: (Q,), where :attr:`cameras` says so.
            gallery_cameras: (G,).
            protocol: One of :attr:`protocols`; ``None``: the published one.
            settings: Values in place of those of :attr:`settings`.

        Returns:
            (Q, G) float32 on the CPU. Their unit is the rival's own and may be negative (diffusion).

        Raises:
            UserError: An unknown setting or protocol, missing cameras, or what the rival itself complains of.
        """
        for key in settings:
            if key not in self.settings:
                raise UserError(f"rival '{self.name}' has no setting '{key}'{did_you_mean(key, self.settings)}.")
        if protocol is not None and protocol not in self.protocols:
            raise UserError(f"rival '{self.name}' has no protocol '{protocol}'{did_you_mean(protocol, self.protocols)}.")
        if (query_cameras is None) != (gallery_cameras is None):
            raise UserError("query_cameras and gallery_cameras belong together; give both or neither.")
        if self.needs_cameras and query_cameras is None:
            raise UserError(f"rival '{self.name}' needs the cameras of queries and gallery; give both.")
        query, gallery = unit_pair(query, gallery)
        cameras = (query_cameras, gallery_cameras)
        chosen = {**self.settings, **settings}
        return self.function(query, gallery, cameras, protocol or self.protocols[0], **chosen)


def _cosine(query: Tensor, gallery: Tensor) -> Tensor:
    return pairwise_distance(query, gallery, metric="cosine").float().cpu()


def _expansion(query: Tensor, gallery: Tensor, cameras: Pair, protocol: str, **settings: Any) -> Tensor:
    return _cosine(average_query_expansion(query, gallery, **settings), database_augmentation(gallery, **settings))


def _kreciprocal(query: Tensor, gallery: Tensor, cameras: Pair, protocol: str, **settings: Any) -> Tensor:
    return torch.from_numpy(k_reciprocal_rerank_features(query, gallery, **settings))


def _gnn(query: Tensor, gallery: Tensor, cameras: Pair, protocol: str, **settings: Any) -> Tensor:
    return gnn_rerank(query, gallery, protocol=protocol, **settings)


def _gcr(query: Tensor, gallery: Tensor, cameras: Pair, protocol: str, **settings: Any) -> Tensor:
    named = {"query_cameras": cameras[0], "gallery_cameras": cameras[1]}
    return _cosine(*graph_convolution(query, gallery, **named, protocol=protocol, **settings))


def _camera_jaccard(query: Tensor, gallery: Tensor, cameras: Pair, protocol: str, **settings: Any) -> Tensor:
    return torch.from_numpy(camera_jaccard_rerank(query, gallery, *cameras, **settings))


def _nfc(query: Tensor, gallery: Tensor, cameras: Pair, protocol: str, **settings: Any) -> Tensor:
    return _cosine(*neighbour_centralisation(query, gallery, protocol=protocol, **settings))


def _diffusion(query: Tensor, gallery: Tensor, cameras: Pair, protocol: str, **settings: Any) -> Tensor:
    return diffusion_scores(query, gallery, protocol=protocol, **settings).neg_()


_ALL = (
    Rival(
        "aqe",
        "+ average query expansion",
        "Chum et al., ICCV 2007, on both sides (Arandjelović and Zisserman, CVPR 2012)",
        ("inductive",),
        "none",
        {"k": 5, "alpha": 0.0},
        _expansion,
    ),
    Rival(
        "aqe-alpha",
        "+ alpha query expansion",
        "Radenović et al., TPAMI 2018, on both sides",
        ("inductive",),
        "none",
        {"k": 10, "alpha": 3.0},
        _expansion,
    ),
    Rival(
        "rerank",
        "+ k-reciprocal re-ranking",
        "Zhong et al., CVPR 2017",
        ("transductive",),
        "none",
        {"k1": 20, "k2": 6, "lambda_value": 0.3},
        _kreciprocal,
    ),
    Rival(
        "gnn",
        "+ GNN re-ranking",
        "Zhang et al., arXiv 2012.07620, 2020",
        ("transductive", "inductive"),
        "none",
        {"k1": 26, "k2": 7, "alpha": 2.0, "layers": 2, "lambda_value": 0.0},
        _gnn,
    ),
    Rival(
        "gcr",
        "+ graph convolution re-ranking",
        "Zhang et al., TMM 2023",
        ("transductive", "inductive"),
        "optional",
        {"k1": 15, "k2": 3, "beta1": 0.2, "beta2": 0.2, "scale": 0.3, "rounds": 3},
        _gcr,
    ),
    Rival(
        "cajaccard",
        "+ camera-aware Jaccard re-ranking",
        "Chen et al., CVPR 2024",
        ("transductive",),
        "needed",
        {"k1_intra": 5, "k1_inter": 20, "k2_intra": 3, "k2_inter": 3, "lambda_value": 0.3},
        _camera_jaccard,
    ),
    Rival(
        "nfc",
        "+ neighbour feature centralisation",
        "Yuan et al., CVPR 2025",
        ("transductive", "inductive"),
        "none",
        {"k1": 2, "k2": 2},
        _nfc,
    ),
    Rival(
        "diffusion",
        "+ diffusion",
        "Iscen et al., CVPR 2017",
        ("inductive", "transductive"),
        "none",
        {"k": 50, "k_query": 10, "alpha": 0.99, "gamma": 3.0, "iterations": 20, "tolerance": 1e-6, "truncate": 0},
        _diffusion,
    ),
)

RIVALS: dict[str, Rival] = {rival.name: rival for rival in _ALL}
"""All rivals by name."""


def rival_named(name: str) -> Rival:
    """Return a rival.

    Raises:
        UserError: There is none of that name; the nearest one is named.
    """
    if name not in RIVALS:
        raise UserError(f"rival '{name}' is unknown{did_you_mean(name, RIVALS)}.")
    return RIVALS[name]
