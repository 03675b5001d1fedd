"""Exporting a run's relation encoder: refine a gallery, and refine queries against its states.

A graph has no search: who uses it gives neighbour lists, by :func:`~relreid_plugin.metrics.neighbours.topk_neighbours` or by
an index of unit features. :class:`ExportedRelations` does so.

Shape letters: N gallery images, Q queries, d width, k neighbours, L layers, p landmarks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones.runtimes import Runtime, companions, open_runtime
from ..engine.scoring import EvaluationOptions
from ..errors import UserError
from ..features.sets import TestFeatures
from ..files import write_json
from ..magformer.encoder import GalleryStates, RelationEncoder
from ..magformer.halves import STATES, GalleryHalf, QueryHalf, require_halves
from ..metrics.candidates import exact_scores
from ..metrics.neighbours import normalise, topk_neighbours
from ..metrics.reciprocal import inductive_mask, kth_scores
from .exporting import Request, bounds, kept_if_proven, machine, proof_path
from .graphs import FORMAT, Graph
from .proof import as_json, compare, doubts, judge
from .writers import OPSET, write_graph

PARTS = ("gallery", "queries")
_ROWS = 4096


def relation_graph(encoder: RelationEncoder, part: str, *, about: dict[str, Any] | None = None) -> Graph:
    """Return the graph of one half.

    Args:
        encoder: In evaluation mode, on the CPU.
        part: ``gallery`` or ``queries``.
        about: Further entries of what the file says of itself.

    Raises:
        UserError: The encoder is none of those that are exported.
    """
    require_halves(encoder)
    rows, count, landmarks = encoder.k + 3, 3, encoder.num_landmarks
    features = normalise(torch.randn(max(rows, landmarks + 1), encoder.dim))
    neighbours = topk_neighbours(features, features, encoder.k)
    chosen = landmark_rows(encoder, len(features))
    gallery = GalleryHalf(encoder).eval()
    names = state_names(len(encoder.blocks))
    said = {
        "format": FORMAT,
        "kind": f"relation {part}",
        "dim": encoder.dim,
        "k": encoder.k,
        "layers": len(encoder.blocks),
        "landmarks": landmarks,
        "landmark_seed": encoder.landmark_seed,
        **(about or {}),
    }
    if part == "gallery":
        inputs = {"features": features, "neighbours": neighbours, "landmarks": chosen}
        dynamic = {name: {0: "gallery"} for name in ("features", "neighbours", "refined")}
        dynamic |= {name: {0: "gallery"} for name in names if name.startswith(("keys", "values"))}
        graph = Graph(gallery, inputs, ["refined", *names], dynamic, said)
    else:
        with torch.no_grad():
            _, *states = gallery(features, neighbours, chosen)
        inputs = {
            "queries": normalise(torch.randn(count, encoder.dim)),
            "neighbours": neighbours[:count],
            "mask": torch.rand(count, encoder.k) > 0.5,
            **dict(zip(names, states)),
        }
        dynamic = {name: {0: "queries"} for name in ("queries", "neighbours", "mask", "refined")}
        dynamic |= {name: {0: "gallery"} for name in names if name.startswith(("keys", "values"))}
        graph = Graph(QueryHalf(encoder).eval(), inputs, ["refined"], dynamic, said)
    said["inputs"], said["outputs"] = list(graph.inputs), graph.outputs
    return graph


def state_names(layers: int) -> list[str]:
    """Return the names of a gallery's states, layer by layer."""
    return [f"{name}{layer}" for layer in range(layers) for name in STATES]


def landmark_rows(encoder: RelationEncoder, size: int) -> Tensor:
    """Return (L, p) rows of every layer's landmarks in a gallery of ``size`` images.

    Raises:
        UserError: The gallery has fewer images than landmarks.
    """
    return seeded_landmarks(len(encoder.blocks), encoder.num_landmarks, size, encoder.landmark_seed)


def seeded_landmarks(layers: int, count: int, size: int, seed: int) -> Tensor:
    """Return the rows (layers, count) that the encoder draws in testing, see :meth:`RelationEncoder.landmark_rows`.

    Raises:
        UserError: The gallery has fewer images than landmarks.
    """
    if size < count:
        raise UserError(f"a gallery of {size} images has fewer than the {count} landmarks of the exported encoder.")
    rows = []
    for layer in range(layers):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        rows.append(torch.randperm(size, generator=generator)[:count])
    return torch.stack(rows)


class ExportedRelations:
    """A relation encoder out of its two files.

    Args:
        gallery: File of the gallery's half.
        queries: File of the queries' half.

    Raises:
        UserError: The files are no two halves of one encoder.
    """

    def __init__(self, gallery: Path | str, queries: Path | str) -> None:
        self.halves: dict[str, Runtime] = {"gallery": open_runtime(gallery), "queries": open_runtime(queries)}
        for part, runtime in self.halves.items():
            if runtime.about.get("kind") != f"relation {part}":
                raise UserError(
                    f"'{runtime.path}' is not the {part} half of a relation encoder; export it by --part {part}."
                )
        self.about = self.halves["gallery"].about
        if self.halves["queries"].about.get("weights") != self.about.get("weights"):
            raise UserError(f"'{gallery}' and '{queries}' are halves of different relation encoders; export both anew.")

    def refine_gallery(self, gallery: Tensor) -> GalleryStates:
        """Refine features (N, d) that look at each other; see :meth:`RelationEncoder.refine_gallery`.

        Raises:
            UserError: Fewer images than landmarks, or features of another width.
        """
        return gallery_states(self.halves["gallery"], _checked(gallery, self.about))

    def refine_queries(self, queries: Tensor, states: GalleryStates) -> Tensor:
        """Refine features (Q, d), each alone with the gallery; see :meth:`RelationEncoder.refine_queries`."""
        return query_features(self.halves["queries"], _checked(queries, self.about), states)


def _checked(features: Tensor, about: dict[str, Any]) -> Tensor:
    if features.dim() != 2 or features.shape[1] != about["dim"]:
        raise UserError(f"features are of shape {tuple(features.shape)}; the exported encoder takes (N, {about['dim']}).")
    return normalise(features.float())


def gallery_states(runtime: Runtime, features: Tensor) -> GalleryStates:
    """Refine unit features (N, d) by the file of the gallery's half."""
    about = runtime.about
    lists = topk_neighbours(features, features, about["k"])
    chosen = seeded_landmarks(about["layers"], about["landmarks"], len(features), about["landmark_seed"])
    found = runtime({"features": features.numpy(), "neighbours": lists.numpy(), "landmarks": chosen.numpy()})
    return states_of(features, found, kth_scores(features, features, lists), about["layers"])


def states_of(features: Tensor, found: dict[str, np.ndarray], thresholds: Tensor, layers: int) -> GalleryStates:
    """Return a gallery's states out of a graph's outputs."""
    from ..magformer.attention import LayerStates

    parts = {name: torch.from_numpy(value) for name, value in found.items()}
    kept = []
    for layer in range(layers):
        to_query, to_key, keys, values = (parts[f"{name}{layer}"] for name in STATES)
        kept.append(LayerStates(to_query, to_key, keys, values))
    return GalleryStates(features, parts["refined"], kept, thresholds)


def query_features(runtime: Runtime, queries: Tensor, states: GalleryStates) -> Tensor:
    """Refine unit features (Q, d) by the file of the queries' half."""
    about, gallery = runtime.about, states.features
    if not len(queries):
        return queries
    thresholds = states.thresholds
    assert thresholds is not None
    kept = [getattr(layer, name).contiguous().numpy() for layer in states.layers for name in STATES]
    inputs = dict(zip(state_names(about["layers"]), kept))
    parts = []
    for some in queries.split(_ROWS):
        lists = topk_neighbours(some, gallery, about["k"])
        forward = exact_scores(some, gallery, lists)
        own = some.double().square().sum(dim=1).float()
        mask = inductive_mask(forward, own, forward, thresholds[lists], k=about["k"], size=len(gallery))
        found = runtime({"queries": some.numpy(), "neighbours": lists.numpy(), "mask": mask.numpy(), **inputs})
        parts.append(torch.from_numpy(found["refined"]))
    return torch.cat(parts)


def export_relations(run: Any, part: str, request: Request) -> dict[str, Any]:
    """Export one half of a run's relation encoder, with its proof beside it.

    Both halves are needed to refine; each is proven with the encoder itself as the other one, on the features of a test set.

    Args:
        run: An open run.
        part: ``gallery`` or ``queries``.
        request: What and how.

    Returns:
        The proof.

    Raises:
        UserError: No relation encoder, or one that is not exported, or a file that does not give the same ranking.
    """
    request.check()
    if request.precision != "float32" or request.images or request.with_preprocessing or request.subset:
        raise UserError("a relation encoder takes features, and is exported in float32, without options of images.")
    encoder = run.refiner()
    if encoder is None:
        raise UserError(f"run '{run.folder}' has no relation encoder; name a run with stage 2.")
    encoder = encoder.cpu().eval()
    from ..engine.checkpoint import fingerprint

    about = {"precision": "float32", "licence": request.licence, "weights": fingerprint(encoder)}
    graph = relation_graph(encoder, part, about=about)
    if encoder.precision != "float32":
        print(f"note: 'relation.precision {encoder.precision}' belongs to this machine; the file computes in float32.")
        encoder.precision = "float32"
    name = request.target or run.cfg.data.targets[0]
    features = run.features.test(name)
    with kept_if_proven(request.out) as path:
        write_graph(graph, path, request.kind, exporter=request.exporter)
        proof = _prove(run, encoder, part, request, graph, path, features, name)
        write_json(proof_path(path), proof)
    return proof


def _prove(
    run: Any,
    encoder: RelationEncoder,
    part: str,
    request: Request,
    graph: Graph,
    path: Path,
    features: TestFeatures,
    name: str,
) -> dict[str, Any]:
    runtime = open_runtime(path, threads=torch.get_num_threads())
    query, gallery = (normalise(side.features.float()) for side in (features.query, features.gallery))
    states = encoder.refine_gallery(gallery)
    wanted = encoder.refine_queries(query, states)
    if part == "gallery":
        other = gallery_states(runtime, gallery)
        found = encoder.refine_queries(query, dataclasses.replace(states, layers=other.layers)), other.refined
    else:
        found = query_features(runtime, query, states), states.refined
        alone = query_features(runtime, query[:1], states)
        if not torch.allclose(alone, found[0][:1], atol=1e-4):
            raise UserError(f"'{request.out}' was not written: its features of a query depend on the others.")
    own = _refined(features, wanted, states.refined)
    comparison = compare(own, _refined(features, *found), options=EvaluationOptions(metric="cosine"))
    reasons = judge(comparison, "float32")
    if reasons:
        raise UserError(
            f"'{request.out}' was not written: on test set '{name}' it is not the same encoder: {'; '.join(reasons)}."
        )
    return {
        "file": request.out.name,
        "kind": request.kind,
        "opset": OPSET if request.kind != "torchscript" else None,
        "about": graph.about,
        "compared_on": f"features of test set '{name}', inductive protocol",
        **as_json(comparison),
        "notes": doubts(comparison),
        "bounds": bounds("float32"),
        "images_per_second": {},
        "bytes": sum(each.stat().st_size for each in (path, *companions(path))),
        **machine(runtime),
    }


def _refined(features: TestFeatures, *parts: Tensor) -> TestFeatures:
    sides: Sequence[Any] = (features.query, features.gallery)
    return TestFeatures(*(dataclasses.replace(side, features=part) for side, part in zip(sides, parts)))


__all__ = ["PARTS", "ExportedRelations", "export_relations", "landmark_rows", "relation_graph", "state_names"]
