"""What relations have to work with: true neighbours, where attention puts its weight, and what it could reach at best.

Three questions are asked of every set of features, of queries against a gallery and of the gallery in itself:

1. *Neighbours*: how many true matches are among the k nearest and among the reciprocal ones, by camera.
2. *Attention*, per layer: how far from uniform it is, and how its weight falls on the image itself, on true and on false
   neighbours.
3. *Reach*: how the features rank alone, under the mean of their neighbours and under the encoder, and how they would rank if
   only true neighbours were attended to, or if every gallery image were the mean of its identity. These oracles read labels
   of the test set: they say what is left to gain, and are no method.

Shape letters: Q queries, N gallery images, n either of them, d width, k neighbours, K slots, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.split import as_test_set
from ..errors import UserError
from ..features.sets import FeatureSet, TestFeatures
from ..metrics.candidates import exact_scores
from ..metrics.neighbours import normalise, topk_neighbours
from ..metrics.ranking import evaluate_features
from ..metrics.reciprocal import ReciprocalGraph, kth_scores, reciprocal_graph
from .attention import RelationAttentionOutput
from .benches import attend
from .encoder import GalleryStates, RelationEncoder
from .figures import row_entropy

QUERIES, GALLERY = "queries", "gallery in itself"
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Part:
    """A set of features that is looked at.

    Attributes:
        name: How tables call it, such as ``training`` or the test set's name.
        data: Its queries and gallery.
        encoder: The encoder over them; ``None``: there is none.
    """

    name: str
    data: TestFeatures
    encoder: RelationEncoder | None = None


def as_part(name: str, features: FeatureSet, encoder: RelationEncoder | None = None, *, seed: int = 1) -> Part:
    """Divide labelled features into queries and gallery as held-out identities are, to look at them like a test set.

    Raises:
        UserError: No identity has images for both.
    """
    items = [(row, int(features.pids[row]), int(features.camids[row])) for row in range(len(features))]
    query, gallery = as_test_set([item for item in items if item[1] >= 0], np.random.default_rng(seed))
    if not query:
        raise UserError(f"'{name}': no identity has images for queries and for the gallery; there is nothing to look at.")
    sets = []
    for side in (query, gallery):
        rows = np.array([item[0] for item in side])
        chosen = FeatureSet(features.features[torch.from_numpy(rows)], features.pids[rows], features.camids[rows], [])
        sets.append(replace(chosen, camids=np.array([item[2] for item in side])))
    return Part(name, TestFeatures(*sets), encoder)


# --- neighbours -------------------------------------------------------------------------------------------------------


def neighbour_statistics(
    attending: FeatureSet, gallery: FeatureSet, *, k: int, itself: bool = False
) -> dict[str, float | int]:
    """Count true matches among the k nearest gallery images, and among those of them that are so in return.

    Rows of unknown identity (-1) attend to nothing here, and are nobody's match. Nothing is discarded by camera: what is
    counted is what relations see.

    Args:
        attending: (n, d) features that look at the gallery.
        gallery: (N, d).
        k: Neighbours; an image is not its own.
        itself: ``attending`` is the gallery.

    Returns:
        ``images``; ``k``; ``matches`` and ``matches_other``: true matches per image, and those of other cameras;
        ``alone``: share of images that have none. For ``nearest`` and ``reciprocal`` each, as ``nearest_kept`` and so on:
        ``kept``, neighbours per image; ``true_other``, ``true_same``, ``false_other``, ``false_same``, shares of all of
        them, true and false, of other cameras and of the own one; ``true``, the first two together; ``found``,
        ``found_other`` and ``found_same``, shares of all true matches that are among them; ``none``, share of images with
        matches that find none of them.
    """
    x, z = normalise(attending.features), normalise(gallery.features)
    pids, cams = torch.from_numpy(np.asarray(attending.pids)), torch.from_numpy(np.asarray(attending.camids))
    theirs, where = torch.from_numpy(np.asarray(gallery.pids)), torch.from_numpy(np.asarray(gallery.camids))
    count = min(k, len(z) - itself)
    if count < 1:
        raise UserError("a gallery of one image has no neighbours; give more.")
    index, nearest, reciprocal = _neighbours(x, z, count, itself)
    true = (theirs[index] == pids.unsqueeze(1)) & (pids >= 0).unsqueeze(1)
    other = where[index] != cams.unsqueeze(1)
    all_matches, same_matches = _matches(attending, gallery, itself)
    known = pids >= 0
    some = torch.from_numpy(all_matches > 0) & known
    total = {"": all_matches.sum(), "_other": (all_matches - same_matches).sum(), "_same": same_matches.sum()}
    out: dict[str, float | int] = {
        "images": int(known.sum()),
        "k": count,
        "matches": _mean(torch.from_numpy(all_matches)[known].double()),
        "matches_other": _mean(torch.from_numpy(all_matches - same_matches)[known].double()),
        "alone": _mean((~some)[known].double()),
    }
    for name, mask in (("nearest", nearest), ("reciprocal", reciprocal)):
        kept = mask & known.unsqueeze(1)
        size = max(1, int(kept.sum()))
        parts = {
            "true_other": kept & true & other,
            "true_same": kept & true & ~other,
            "false_other": kept & ~true & other,
            "false_same": kept & ~true & ~other,
        }
        sums = {key: int(part.sum()) for key, part in parts.items()}
        out[f"{name}_kept"] = _mean(kept[known].sum(dim=1).double())
        out.update({f"{name}_{key}": number / size for key, number in sums.items()})
        out[f"{name}_true"] = (sums["true_other"] + sums["true_same"]) / size
        hits = {"": sums["true_other"] + sums["true_same"], "_other": sums["true_other"], "_same": sums["true_same"]}
        out.update({f"{name}_found{key}": float(hit / total[key]) if total[key] else 0.0 for key, hit in hits.items()})
        out[f"{name}_none"] = _mean((~(kept & true).any(dim=1))[some].double())
    return out


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def _neighbours(x: Tensor, z: Tensor, k: int, itself: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, K), which of them are among the k nearest, and which of those are so in return; oneself is neither."""
    if itself:
        lists = topk_neighbours(z, z, min(k + 1, len(z)))
        graph = reciprocal_graph(lists, reverse=False)
        own = torch.arange(len(z)).unsqueeze(1)
        index = graph.index
        listed = (
            (index.unsqueeze(2) == lists.unsqueeze(1)).any(dim=2) if index.shape[1] != lists.shape[1] else index == lists
        )
        others = index != own
        return index, listed & others, graph.mask & others
    index = topk_neighbours(x, z, k)
    listed = torch.ones(index.shape, dtype=torch.bool)
    if len(z) <= k:
        return index, listed, listed
    limits = kth_scores(z, z, topk_neighbours(z, z, k + 1))  # an image comes first in its own list
    return index, listed, exact_scores(x, z, index) > limits[index]


def _matches(attending: FeatureSet, gallery: FeatureSet, itself: bool) -> tuple[np.ndarray, np.ndarray]:
    """True matches (n,) of every row in the gallery, and those of its own camera."""

    def counted(own: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        names, numbers = np.unique(theirs, return_counts=True, axis=0)
        both, place = np.unique(np.concatenate([names, own]), return_inverse=True, axis=0)
        table = np.zeros(len(both), np.int64)
        table[place.reshape(-1)[: len(names)]] = numbers
        return table[place.reshape(-1)[len(names) :]]

    columns = [np.stack([one.pids, one.camids], axis=1).astype(np.int64) for one in (attending, gallery)]
    known = (columns[0][:, 0] >= 0).astype(np.int64)
    own = int(itself) * known
    return counted(columns[0][:, :1], columns[1][:, :1]) * known - own, counted(*columns) * known - own


# --- attention --------------------------------------------------------------------------------------------------------


def attention_statistics(layer: RelationAttentionOutput, true: Tensor, own: Tensor) -> dict[str, float]:
    """Say how far a layer's attention is from uniform, and where its weight falls; means over rows and heads.

    Args:
        layer: Weights (n, H, K) and their mask.
        true: (n, K) slots that hold true matches.
        own: (n, K) slots that hold the image itself.

    Returns:
        ``kept``: neighbours per image. ``entropy``: of the absolute weights over that of uniform ones, over rows with two
        slots or more (1: uniform); ``divergence``: log(slots) minus the entropy, in nats, the Kullback-Leibler divergence
        from uniform. ``itself``, ``true``, ``false``: shares of the absolute weight; ``uniform_itself``, ``uniform_true``
        and ``uniform_false``: what they would be under uniform attention over the same slots. ``negative``: share of the
        absolute weight that is negative (differential attention).
    """
    mask = layer.mask
    kept = mask.sum(dim=1)
    weights = layer.weights.masked_fill(~mask.unsqueeze(1), 0.0).double()
    size = weights.abs()
    share = size / size.sum(dim=2, keepdim=True).clamp_min(_TOLERANCE)
    linked = kept >= 2
    most = kept.double().log()
    entropy = torch.stack([row_entropy(weights[:, head]) for head in range(weights.shape[1])], dim=1)
    ratio = entropy[linked] / most[linked].unsqueeze(1)
    flat = mask.double() / kept.unsqueeze(1)
    out = {
        "kept": float((kept - 1).double().mean()),
        "entropy": float(ratio.mean()) if len(ratio) else 1.0,
        "divergence": float((most.unsqueeze(1) - entropy).clamp_min(0).mean()),
        "negative": float((share * (weights < 0)).sum(dim=2).mean()),
    }
    for name, slots in (("itself", own), ("true", true & ~own), ("false", ~true & ~own)):
        slots = slots & mask
        out[name] = float((share * slots.unsqueeze(1)).sum(dim=2).mean())
        out[f"uniform_{name}"] = float((flat * slots).sum(dim=1).mean())
    return out


@dataclass(frozen=True)
class Refined:
    """Refined features, and what every layer attended to (statistics of queries, and of the gallery in itself)."""

    query: Tensor
    gallery: Tensor
    layers: list[dict[str, dict[str, float]]]


@torch.no_grad()
def refine(encoder: RelationEncoder, data: TestFeatures, *, oracle: bool = False) -> Refined:
    """Refine a test set inductively, as the encoder's row of a table does, and watch its attention.

    Args:
        encoder: In evaluation mode, with neighbours by feature or camera.
        data: Its features.
        oracle: Leave out the edges to false neighbours.

    Raises:
        UserError: An encoder with affinity neighbours: every map has a graph of its own.
    """
    if encoder.neighbours == "affinity":
        raise UserError(
            "with 'relation.neighbours affinity' every map has neighbours of its own; nothing is measured there."
        )
    query, gallery = data.query, data.gallery
    features, first = encoder.inputs(gallery.features), encoder.inputs(query.features)
    graph, thresholds, index = encoder.gallery_graph(features, gallery.camids)
    assert graph is not None
    own = graph.index == torch.arange(len(features)).unsqueeze(1)
    true = _true(graph.index, gallery, gallery) & ~own
    if oracle:
        graph = ReciprocalGraph(graph.index, graph.mask & (true | own), None, graph.bias)
    states = GalleryStates(features, features, [], thresholds, index)
    rows, kept, bias = encoder.query_edges(first, states, torch.from_numpy(np.asarray(query.camids)).long())
    assert rows is not None and kept is not None
    asked = _true(rows, query, gallery)
    if oracle:
        kept = kept & asked
    alone = torch.zeros(len(first), rows.shape[1] + 1, dtype=torch.bool)
    alone[:, -1] = True
    asked = torch.cat([asked, alone[:, -1:] & False], dim=1)
    x, z, layers = first, features, []
    with encoder.autocast(z.device):
        for number, block in enumerate(encoder.blocks):
            landmarks = encoder.landmark_rows(z, number)
            among = block.attn(z, landmarks, graph=graph, return_attention=True)
            stored = block.attn.states(z, landmarks, graph=graph)[0]
            to = block.attn.attend_to_gallery(x, stored, index=rows, mask=kept, bias=bias, return_attention=True)
            layers.append({QUERIES: attention_statistics(to, asked, alone), GALLERY: attention_statistics(among, true, own)})
            x, z = block.feed_forward(x, to.output), block.feed_forward(z, among.output)
    outputs = [encoder.neck.embed(encoder.add_residual(a.float(), b)) for a, b in ((x, first), (z, features))]
    return Refined(outputs[0], outputs[1], layers)


def _true(index: Tensor, attending: FeatureSet, gallery: FeatureSet) -> Tensor:
    pids, theirs = (torch.from_numpy(np.asarray(one.pids)) for one in (attending, gallery))
    return (theirs[index] == pids.unsqueeze(1)) & (pids >= 0).unsqueeze(1)


# --- reach ------------------------------------------------------------------------------------------------------------


def _scores(query: Tensor, gallery: Tensor, data: TestFeatures) -> dict[str, float]:
    labels = (data.query.pids, data.gallery.pids, data.query.camids, data.gallery.camids)
    result = evaluate_features(query, gallery, *labels, metric="cosine", max_rank=1)
    return {"mAP": float(result.mAP), "R1": float(result.rank(1)), "mINP": float(result.mINP)}


def _averaged(x: Tensor, z: Tensor, k: int, data: TestFeatures, *, oracle: bool) -> tuple[Tensor, Tensor]:
    """Queries and gallery as the plain mean of themselves and their reciprocal neighbours, or the true ones of them."""
    among, to = _neighbours(z, z, min(k, len(z) - 1), True), _neighbours(x, z, min(k, len(z)), False)
    sides = []
    for rows, (index, _, mask), own in ((x, to, data.query), (z, among, data.gallery)):
        mask = mask & _true(index, own, data.gallery) if oracle else mask
        sides.append(attend(rows, z, index, mask, torch.zeros(index.shape)))
    return sides[0], sides[1]


def true_means(z: Tensor, gallery: FeatureSet) -> Tensor:
    """Replace every gallery image (N, d) by the mean of its identity's, scaled to unit length; unknown ones stay."""
    own = torch.from_numpy(np.unique(gallery.pids, return_inverse=True)[1].reshape(-1))
    sums = z.new_zeros(int(own.max()) + 1, z.shape[1]).index_add_(0, own, z)
    known = torch.from_numpy(np.asarray(gallery.pids) >= 0).unsqueeze(1)
    return torch.where(known, normalise(sums)[own], z)


def reach(part: Part, *, k: int) -> tuple[dict[str, dict[str, float]], list[dict[str, dict[str, float]]]]:
    """Score a set alone, under relations and under oracles.

    Args:
        part: The set.
        k: Neighbours of the plain mean.

    Returns:
        Row to mAP, R1 and mINP: ``alone``, behind the head ``behind the head``, ``mean of reciprocal neighbours``, the
        ``encoder``, and the oracles ``oracle: …``; and the encoder's attention (empty without one).
    """
    data, encoder = part.data, part.encoder
    x, z = normalise(data.query.features), normalise(data.gallery.features)
    rows = {"alone": _scores(x, z, data)}
    if encoder is not None and encoder.head is not None:
        x, z = encoder.inputs(x), encoder.inputs(z)
        rows["behind the head"] = _scores(x, z, data)
    rows["mean of reciprocal neighbours"] = _scores(*_averaged(x, z, k, data, oracle=False), data)
    layers: list[dict[str, dict[str, float]]] = []
    if encoder is not None and encoder.neighbours != "affinity":
        found = refine(encoder, data)
        layers = found.layers
        rows["encoder"] = _scores(found.query, found.gallery, data)
        best = refine(encoder, data, oracle=True)
        rows["oracle: encoder, true neighbours only"] = _scores(best.query, best.gallery, data)
    rows["oracle: mean of true neighbours"] = _scores(*_averaged(x, z, k, data, oracle=True), data)
    rows["oracle: true mean of every gallery identity"] = _scores(x, true_means(z, data.gallery), data)
    return rows, layers


def diagnose(parts: Sequence[Part], *, ks: Sequence[int]) -> dict[str, Any]:
    """Measure several sets.

    Args:
        parts: The sets, such as training, held-out and test identities.
        ks: Neighbours that are counted; the first one is that of the plain mean.

    Returns:
        ``{"k": […], "parts": [{"name", "identities", "neighbours": [{"of", …}], "reach", "attention"}]}``, see
        :func:`neighbour_statistics`, :func:`reach` and :func:`attention_statistics`.
    """
    entries = []
    for part in parts:
        data = part.data
        lists = []
        for k in ks:
            for of, attending, itself in ((QUERIES, data.query, False), (GALLERY, data.gallery, True)):
                lists.append({"of": of, **neighbour_statistics(attending, data.gallery, k=k, itself=itself)})
        rows, layers = reach(part, k=ks[0])
        count = len(np.unique(data.gallery.pids[data.gallery.pids >= 0]))
        entry = {"name": part.name, "identities": count, "neighbours": lists, "reach": rows, "attention": layers}
        entries.append(entry)
    return {"k": list(ks), "parts": entries}


__all__ = [
    "Part",
    "Refined",
    "as_part",
    "attention_statistics",
    "diagnose",
    "neighbour_statistics",
    "reach",
    "refine",
    "true_means",
]
