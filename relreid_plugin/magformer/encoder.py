"""The relation encoder: a transformer over image features (METHODS 1, stage 2).

Shape letters: N images, Q queries, d width, p landmarks, k neighbours, C classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.bnneck import BNNeck
from ..collective import current
from ..metrics.cameras import stays_alone
from ..metrics.candidates import exact_scores
from ..metrics.neighbours import SearchConfig, normalise, search_index, topk_neighbours
from ..metrics.reciprocal import ReciprocalGraph, inductive_mask, kth_scores, reciprocal_graph
from .attention import LayerStates, RelationAttentionOutput, RelationBlock
from .cameras import UNKNOWN, CameraIndex, CameraRule, anchored, as_cameras
from .discriminant import Projection
from .operations import farthest_points
from .parts import attend_in_parts

Cameras = Sequence[int] | np.ndarray | Tensor | None

RUNGS: dict[str, dict[str, bool]] = {
    "nformer": {"magnitude": False, "differential": False},
    "malaa": {"magnitude": True, "differential": False},
    "magformer": {"magnitude": True, "differential": True},
}
"""Rungs of the ablation ladder (paper Table 1) as switches of
:class:`~relreid_plugin.magformer.attention.RelationAttention`."""


def _full_precision(x: Tensor) -> Tensor:
    """Return what autocast left in half precision as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass
class GalleryStates:
    """A gallery that was refined alone and that queries can attend to.

    Attributes:
        features: (N, d) unit input features, after the head.
        refined: (N, d) unit test features of the gallery.
        layers: What every attention layer keeps of the gallery.
        thresholds: (N,) score of every gallery image's k-th neighbour; (N, 2) for camera neighbours; ``None`` for affinity
            neighbours.
        index: faiss index over ``features``; ``None`` where torch searches. For camera neighbours a
            :class:`~relreid_plugin.metrics.cameras.CameraIndex`.
    """

    features: Tensor
    refined: Tensor
    layers: list[LayerStates] = field(default_factory=list)
    thresholds: Tensor | None = None
    index: Any = None

    @property
    def alone(self) -> bool:
        """Whether nobody is anybody's neighbour, since the gallery's images have too little company."""
        return stays_alone(self.thresholds)


class RelationHead(nn.Module):
    """An affine map of unit features before the relations, from :mod:`relreid_plugin.magformer.discriminant`; not trained.

    Args:
        dim: Width d. It starts as the identity.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("weight", torch.eye(dim))

    def set(self, projection: Projection) -> None:
        """Take over a projection."""
        self.mean.copy_(projection.mean)
        self.weight.copy_(projection.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) unit features -> (N, d) unit features."""
        return normalise((x - self.mean) @ self.weight)


class RelationEncoder(nn.Module):
    """Refine image features by attention among images, with BNNeck and classifier for training.

    Args:
        dim: Feature width d.
        num_classes: Training identities C.
        attention: Rung of the ladder: ``nformer``, ``malaa`` or ``magformer``.
        num_layers: Blocks L.
        num_heads: Heads H.
        num_landmarks: Landmarks p.
        k: Neighbours per image.
        neighbours: ``feature``, ``affinity`` (paper eq. 3) or ``camera`` (beyond the paper: by camera, see ``rule``).
        mlp_ratio: MLP width as a multiple of d.
        dropout: Dropout after attention and MLP.
        landmarks: Choice of landmarks in testing, ``random`` (a draw that depends on ``landmark_seed``, the layer and N
            only) or ``farthest`` (farthest-point choice among the layer's inputs; independent of the gallery's order up to
            ties). In training they are drawn at random per layer and step.
        landmark_seed: Seed of the draw in testing.
        precision: ``float32`` or ``bfloat16`` (autocast; searches, softmax and norms stay in float32).
        init: ``paper``, ``diffusion`` or ``identity``, see :class:`~relreid_plugin.magformer.attention.RelationAttention`.
        search: Neighbour search.
        block: ``transformer`` or ``average`` (beyond the paper), see
            :class:`~relreid_plugin.magformer.attention.RelationBlock`.
        head: Whether there is a :class:`RelationHead` before the graph and the blocks (beyond the paper).
        rule: Neighbours, reciprocity and affinity by camera and similarity, for ``neighbours='camera'``.
        residual: Share of the input (after the head) that is added to the last block's output (beyond the paper); the sum is
            scaled to unit length. 0: nothing is done.
        anchor: Share of the nearest gallery image of another camera, by the features before the blocks, in a query's result
            (beyond the paper; with ``neighbours='camera'``, in the inductive protocol): what was first without relations
            tends to stay first. 0: nothing is done.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        attention: str = "magformer",
        num_layers: int = 4,
        num_heads: int = 2,
        num_landmarks: int = 5,
        k: int = 20,
        neighbours: str = "feature",
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        landmarks: str = "random",
        landmark_seed: int = 0,
        precision: str = "float32",
        init: str = "paper",
        search: SearchConfig | None = None,
        block: str = "transformer",
        head: bool = False,
        rule: CameraRule | None = None,
        residual: float = 0.0,
        anchor: float = 0.0,
    ) -> None:
        super().__init__()
        if attention not in RUNGS:
            raise ValueError(f"attention must be one of {sorted(RUNGS)}, got {attention!r}.")
        self.dim, self.num_classes, self.k = dim, num_classes, k
        self.num_landmarks, self.landmarks, self.landmark_seed = num_landmarks, landmarks, landmark_seed
        self.neighbours, self.precision = neighbours, precision
        self.search = search or SearchConfig()
        self.block, self.residual, self.anchor = block, residual, anchor
        self.rule = (rule or CameraRule()) if neighbours == "camera" else None
        self.head = RelationHead(dim) if head else None
        self.blocks: Any = nn.ModuleList(
            RelationBlock(
                dim,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                num_heads=num_heads,
                num_landmarks=num_landmarks,
                layer=layer + 1,
                neighbours=neighbours,
                k=k,
                init=init,
                average=block == "average",
                **RUNGS[attention],
            )
            for layer in range(num_layers)
        )
        self.neck = BNNeck(dim, num_classes)

    def graph(self, features: Tensor, cameras: Cameras = None) -> ReciprocalGraph | None:
        """Return the graph of unit features (N, d) after the head, or ``None`` with affinity neighbours.

        Args:
            features: (N, d).
            cameras: (N,) cameras, read with camera neighbours only; ``None``: all images are of one camera.
        """
        if self.neighbours == "affinity":
            return None
        with torch.no_grad():
            if self.rule is not None:
                return self.rule.graph(CameraIndex(features, cameras, config=self.search))[0]
            return reciprocal_graph(topk_neighbours(features, features, self.k, config=self.search))

    def landmark_rows(self, x: Tensor, layer: int, *, size: int | None = None) -> Tensor:
        """Return the rows (min(p, N),) of ``x`` (N, d) that are a layer's landmarks; drawn anew per call in training.

        Args:
            x: (N, d).
            layer: The layer, counted from 0.
            size: N, in training where ``x`` holds only some of the rows.
        """
        size = x.shape[0] if size is None else size
        count = min(self.num_landmarks, size)
        if self.training:
            rows = torch.randperm(size)[:count]
            return (rows.pin_memory() if x.is_cuda and torch.cuda.is_available() else rows).to(x.device, non_blocking=True)
        if self.landmarks == "farthest":
            return farthest_points(x.detach().float(), count)
        generator = torch.Generator().manual_seed(self.landmark_seed * 1_000_003 + layer)
        return torch.randperm(x.shape[0], generator=generator)[:count].to(x.device)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context that the blocks run in on ``device``: autocast for bfloat16, else none."""
        if self.precision == "bfloat16":
            return torch.autocast(device_type=device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def inputs(self, features: Tensor) -> Tensor:
        """Return what the graph and the first block see of features (N, d): unit features, after the head."""
        x = normalise(features)
        return x if self.head is None else self.head(x)

    def add_residual(self, x: Tensor, first: Tensor) -> Tensor:
        """Return the blocks' output x (N, d) with the share ``residual`` of their input ``first`` (N, d)."""
        return normalise(x + self.residual * first) if self.residual else x

    def add_anchor(self, x: Tensor, nearest: Tensor | None, gallery: Callable[[Tensor], Tensor]) -> Tensor:
        """Return refined queries x (Q, d) with the share ``anchor`` of their nearest gallery image.

        Args:
            x: (Q, d) unit test features.
            nearest: (Q,) gallery rows, see :meth:`~relreid_plugin.magformer.cameras.CameraRule.first`; ``None``: no anchor.
            gallery: From rows (n,) to their unit test features (n, d).
        """
        return x if nearest is None else anchored(x, nearest, self.anchor, gallery)

    def encode(
        self,
        features: Tensor,
        *,
        cameras: Cameras = None,
        graph: ReciprocalGraph | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Return refined features before BNNeck.

        In evaluation mode without gradients the rows are refined some at a time: above the result, one more (N, d) array is
        held, that of a layer's values.

        Args:
            features: (N, d) image features; they are L2-normalised here, in training and in testing alike.
            cameras: See :meth:`graph`.
            graph: Their graph, when it is known already.
            inplace: Write the result over ``features`` (float32, or float64), which saves a copy of them; in evaluation mode
                without gradients only.

        Returns:
            (N, d) float32 (float64 for float64 input).

        Raises:
            RuntimeError: ``inplace`` in training mode or with gradients.
        """
        differentiable = self.training or torch.is_grad_enabled()
        if inplace and differentiable:
            raise RuntimeError("inplace needs eval() and torch.no_grad(): the features would be lost to the gradients.")
        if inplace:
            x = features.div_(features.norm(dim=1, keepdim=True).clamp_min(1e-12))
            x = x if self.head is None else x.copy_(self.head(x))
        else:
            x = self.inputs(features)
        graph = graph if graph is not None or self.neighbours == "affinity" else self.graph(x, cameras)
        cut, size = current() if self.training else None, x.shape[0]
        x = x if cut is None else cut.take(x)
        first = x.clone() if self.residual and not differentiable else x
        with self.autocast(x.device):
            for layer, block in enumerate(self.blocks):
                landmarks = self.landmark_rows(x, layer, size=size)
                if cut is not None:
                    x = block.feed_forward(
                        x, attend_in_parts(block.attn, x, landmarks, cut, graph=graph, search=self.search)
                    )
                elif differentiable:
                    x = block.feed_forward(x, block.attn(x, landmarks, graph=graph, search=self.search))
                else:
                    block.refine_(x, landmarks, graph=graph, search=self.search)
        return self.add_residual(_full_precision(x), first)

    def forward(
        self, features: Tensor, *, cameras: Cameras = None, graph: ReciprocalGraph | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Refine a set of features that all look at each other (the transductive protocol).

        Args:
            features: (N, d).
            cameras: See :meth:`graph`.
            graph: Their graph, when it is known already.

        Returns:
            In training (logits (N, C), features (N, d) before BNNeck); else unit test features (N, d).
        """
        x = self.encode(features, cameras=cameras, graph=graph)
        if self.training:
            return self.neck.logits(x)[0], x
        return self.neck.embed(x)

    @torch.no_grad()
    def attention_maps(self, features: Tensor, cameras: Cameras = None) -> list[RelationAttentionOutput]:
        """Return every layer's attention for a set of features (N, d), in evaluation mode, not with affinity neighbours."""
        x = self.inputs(features)
        graph = self.graph(x, cameras)
        outputs = []
        for layer, block in enumerate(self.blocks):
            outputs.append(block.attn(x, self.landmark_rows(x, layer), graph=graph, return_attention=True))
            x = block.feed_forward(x, outputs[-1].output)
        return outputs

    @torch.no_grad()
    def refine_gallery(self, gallery: Tensor, cameras: Cameras = None) -> GalleryStates:
        """Refine a gallery alone, layer by layer, and keep what queries need (the inductive protocol).

        Args:
            gallery: (N, d).
            cameras: See :meth:`graph`.

        Returns:
            States whose ``refined`` are the gallery's unit test features.

        Raises:
            RuntimeError: The module is in training mode.
        """
        self._require_eval()
        features = self.inputs(gallery)
        x = features.clone()
        graph, thresholds, index = self.gallery_graph(features, cameras)
        layers = []
        with self.autocast(x.device):
            for layer, block in enumerate(self.blocks):
                layers.append(block.refine_(x, self.landmark_rows(x, layer), graph=graph, search=self.search))
        refined = self.neck.embed(self.add_residual(_full_precision(x), features))
        return GalleryStates(features, refined, layers, thresholds, index)

    @torch.no_grad()
    def gallery_graph(self, features: Tensor, cameras: Cameras = None) -> tuple[ReciprocalGraph | None, Tensor | None, Any]:
        """Return a gallery's graph, and what tells a query's edges: thresholds and index of :class:`GalleryStates`.

        Args:
            features: (N, d) unit features, after the head.
            cameras: See :meth:`graph`.
        """
        if self.rule is not None:
            index = CameraIndex(features, cameras, config=self.search)
            return *self.rule.graph(index), index
        if self.neighbours == "affinity":
            return None, None, None
        faiss_index = search_index(features, self.search)
        lists = topk_neighbours(features, features, self.k, config=self.search, index=faiss_index)
        return reciprocal_graph(lists, reverse=False), kth_scores(features, features, lists), faiss_index

    @torch.no_grad()
    def query_edges(
        self, x: Tensor, states: GalleryStates, cameras: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return index, mask and bias (Q, K) of queries' edges to a gallery; ``None`` with affinity neighbours.

        Args:
            x: (Q, d) unit features, after the head.
            states: Of the gallery.
            cameras: (Q,), see :meth:`refine_queries`.
        """
        return self._query_edges(x, states, cameras)[0]

    def _query_edges(
        self, x: Tensor, states: GalleryStates, cameras: Tensor
    ) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], Tensor | None]:
        """:meth:`query_edges`, and the rows of the queries' anchors, where there are any."""
        if states.thresholds is None:
            return (None, None, None), None
        if self.rule is not None:
            lists = states.index.search(x, cameras, other=self.rule.other, same=self.rule.same)
            nearest = self.rule.first(lists, states.thresholds) if self.anchor else None
            return self.rule.edges(lists, states.thresholds), nearest
        index = topk_neighbours(x, states.features, self.k, config=self.search, index=states.index)
        forward = exact_scores(x, states.features, index)
        own = x.double().square().sum(dim=1).float()
        size = states.features.shape[0]
        return (index, inductive_mask(forward, own, forward, states.thresholds[index], k=self.k, size=size), None), None

    @torch.no_grad()
    def refine_queries(
        self, queries: Tensor, states: GalleryStates, cameras: Cameras = None, *, chunk: int = 2048
    ) -> Tensor:
        """Refine every query as if it were alone with a gallery.

        Args:
            queries: (Q, d).
            states: From :meth:`refine_gallery`; not changed.
            cameras: (Q,) cameras, read with camera neighbours only; ``None``, or -1: every gallery image is one of
                another camera.
            chunk: Queries computed together; the result does not depend on it.

        Returns:
            (Q, d) unit test features.
        """
        self._require_eval()
        if not len(queries):
            return queries.new_empty(0, self.dim)
        known = as_cameras(cameras, len(queries), missing=UNKNOWN)
        parts = zip(queries.split(chunk), known.split(chunk))
        return torch.cat([self._refine_some(self.inputs(part), states, own) for part, own in parts])

    def _refine_some(self, x: Tensor, states: GalleryStates, cameras: Tensor) -> Tensor:
        (index, mask, bias), nearest = self._query_edges(x, states, cameras)
        first = x
        with self.autocast(x.device):
            for block, layer in zip(self.blocks, states.layers):
                x = block.feed_forward(x, block.attn.attend_to_gallery(x, layer, index=index, mask=mask, bias=bias))
        refined = self.neck.embed(self.add_residual(_full_precision(x), first))
        return self.add_anchor(refined, nearest, states.refined.__getitem__)

    def _require_eval(self) -> None:
        if self.training:
            raise RuntimeError("call eval() first: refining a gallery is defined for testing only.")
