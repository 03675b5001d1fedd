"""The queries of a test set with their ranked lists, and whom they looked at, for the page's script.

Shapes: Q queries, L layers, K images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.attended import NOBODY, Attended
from ..engine.records import without_nan
from ..methods import Overlay
from . import measures
from .looking import Looked
from .maps import IdentityMap, identity_maps
from .scored import Scored, Subject, Target
from .thumbnails import Read, Thumbnails, overlaid
from .views import reader


def query_lists(target: Target, topk: int, identities: Sequence[str] = ()) -> dict[str, Any]:
    """Return queries and their ranked lists for the page's script; empty without scores by query.

    Args:
        target: A test set.
        topk: Images of a list.
        identities: Those on the map, see :func:`~relreid_plugin.report.maps.identity_maps`.
    """
    if target.evaluator is None or not target.scored:
        return {}
    data, scored = target.data, target.scored
    lists = [measures.ranked(target, one, topk) for one in scored]
    attended, notes = target.attended()
    maps, unmapped = identity_maps(target, identities)
    parts = [*(one.index for one in lists), *(one.index for one in attended), *(one.gallery for one in maps)]
    used = np.unique(np.concatenate([part.reshape(-1) for part in parts]))
    used = used[used >= 0]
    place = np.full(len(data.gallery) + 1, -1)
    place[used] = np.arange(len(used))
    gallery = data.gallery.take(used)
    ap = scored[0].result.ap
    order = np.argsort(np.where(np.isfinite(ap), ap, 2), kind="stable")
    payload = {
        "ways": [_way(one) for one in scored],
        "order": order.tolist(),
        "pid": data.query.shown(data.query.pids),
        "cam": data.query.shown_cameras(data.query.camids),
        "path": data.query.paths or [f"query {row}" for row in range(len(data.query))],
        "matches": measures.matches(data, target.evaluator.scorer).tolist(),
        "ap": [[None if np.isnan(value) else round(float(value), 6) for value in one.result.ap] for one in scored],
        "rank": [measures.first_ranks(one) for one in scored],
        "gpid": gallery.shown(gallery.pids),
        "gcam": gallery.shown_cameras(gallery.camids),
        "gpath": gallery.paths or [f"gallery {row}" for row in used.tolist()],
        "index": [place[one.index].tolist() for one in lists],
        "state": [one.state.tolist() for one in lists],
        "distance": [_rounded(one.distance) for one in lists],
        "looks": [_looks(one, place) for one in attended],
        "maps": [_map(one, place) for one in maps],
        "overlays": [],
        "views": None,
        "unseen": [*notes, *unmapped],
        "thumb": [-1] * len(data.query),
        "gthumb": [-1] * len(used),
    }
    found: dict[str, Any] = without_nan(payload)
    return found


def _looks(attended: Attended, place: np.ndarray) -> dict[str, Any]:
    """Whom the queries looked at, by layer and query; places of the gallery's images in the page, -1: the query itself."""
    layers = []
    for index, weight in zip(attended.index, attended.weight):
        there = index != NOBODY
        shown = np.where(index >= 0, place[np.maximum(index, 0)], -1)
        own = [(row[kept].tolist(), np.round(value[kept], 4).tolist()) for row, value, kept in zip(shown, weight, there)]
        layers.append({"index": [items for items, _ in own], "weight": [values for _, values in own]})
    return {"title": attended.title, "layers": layers}


def _map(one: IdentityMap, place: np.ndarray) -> dict[str, Any]:
    """A map for the page's script: places of the queries, then of the gallery's images, which go by their numbers there."""
    x, y = np.round(one.place, 4).T.tolist()
    return {"title": one.title, "query": one.query.tolist(), "gallery": place[one.gallery].tolist(), "x": x, "y": y}


def _way(scored: Scored) -> dict[str, Any]:
    row = scored.row
    return {"name": row.method, "protocol": row.protocol, "metric": row.metric, "aside": scored.aside}


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    rounded = np.round(values, 4)
    return [[value if np.isfinite(value) else None for value in row] for row in rounded.tolist()]


def without_pictures(looked: Looked) -> list[dict[str, Any]]:
    """Return overlays for the page's script; :func:`draw` puts their pictures in."""
    return [{"title": found.title, "about": found.about, "query": rows, "thumb": [-1] * len(rows)} for found, rows in looked]


def draw(
    views: list[tuple[Subject, Target]], payloads: list[dict[str, Any]], looked: list[Looked], pictures: Thumbnails
) -> None:
    """Read the pictures, those of the worst queries first, and note their numbers in the payloads."""
    for (subject, target), payload, overlays in zip(views, payloads, looked):
        if not payload or not (target.data.query.paths or target.data.gallery.paths):
            continue
        wanted: dict[str, None] = {}
        for one in payload["maps"]:
            wanted.update((payload["path"][item], None) for item in one["query"])
            wanted.update((payload["gpath"][item], None) for item in one["gallery"])
        for query in payload["order"]:
            wanted[payload["path"][query]] = None
            for index in payload["index"]:
                wanted.update((payload["gpath"][item], None) for item in index[query] if item >= 0)
            for look in payload["looks"]:
                for layer in look["layers"]:
                    wanted.update((payload["gpath"][item], None) for item in layer["index"][query] if item >= 0)
        read, payload["views"], note = reader(subject, target)
        payload["unseen"] += [note] if note else []
        for shown, (found, _) in zip(payload["overlays"], overlays):
            shown["thumb"] = [
                _overlaid(payload["path"][row], found, place, read, pictures) for place, row in enumerate(shown["query"])
            ]
        kind = json.dumps(payload["views"])
        pictures.add(wanted, read, kind)
        payload["thumb"] = [pictures.number(path, kind) for path in payload["path"]]
        payload["gthumb"] = [pictures.number(path, kind) for path in payload["gpath"]]


def _overlaid(path: str, found: Overlay, place: int, read: Read, pictures: Thumbnails) -> int:
    """The number of a query's picture under an overlay."""
    kind = str(id(found))
    pictures.add([path], lambda path: overlaid(read(path), found.maps[place]), kind)
    return pictures.number(path, kind)
