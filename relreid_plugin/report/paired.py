"""Two runs on the same queries as one list of queries for the page's script: won, lost, and both ranked lists of each.

Shapes: Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .scored import Subject
from .side_by_side import Line, compare

_OF_QUERY = ("ap", "rank", "index", "state", "distance")


@dataclass(frozen=True)
class Pair:
    """Two runs with scores of the same queries of a test set.

    Attributes:
        first, other: The runs.
        target: The test set.
        lines: Of their comparison.
    """

    first: Subject
    other: Subject
    target: str
    lines: list[Line]

    def lists(self, lists: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
        """Return :func:`paired_lists` of the lists by names of run and test set."""
        names = self.first.name, self.other.name
        return paired_lists(lists[names[0], self.target], lists[names[1], self.target], names)


def pairs(found: list[Subject]) -> list[Pair]:
    """Return the first run with every other one, by test set, where the same queries have scores in both."""
    out = []
    for other in found[1:]:
        if not set(found[0].targets) & set(other.targets):
            continue
        lines, _ = compare([found[0], other], seeds=False)
        for target in dict.fromkeys(line.target for line in lines if line.pairs is not None):
            out.append(Pair(found[0], other, target, [line for line in lines if line.target == target]))
    return out


def headline_ways(lists: dict[str, Any]) -> list[int]:
    """Return which rows of a test set stand for its run: the first one and the last one of the same protocol."""
    protocol = lists["ways"][0]["protocol"]
    alike = [number for number, way in enumerate(lists["ways"]) if way["protocol"] == protocol and not way["aside"]]
    return list(dict.fromkeys([alike[-1], alike[0]]))


def paired_lists(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    """Return the lists of two runs on the same queries, before and after.

    Args:
        first, second: Of :func:`relreid_plugin.report.lists.query_lists`.
        names: What the runs are called.

    Returns:
        The same form, with the first run's rows before the second's; the second's queries are put into the first's order.
    """
    place = {key: row for row, key in enumerate(_keys(second, ""))}
    rows = [place.get(key, row) for row, key in enumerate(_keys(first, ""))]  # without paths they have one order
    gallery: dict[tuple[Any, ...], int] = {}
    moved = [[gallery.setdefault(key, len(gallery)) for key in _keys(lists, "g")] for lists in (first, second)]
    images = list(gallery)
    out = {
        **{name: first[name] for name in ("order", "pid", "cam", "path", "matches", "thumb")},
        **{name: [image[column] for image in images] for column, name in enumerate(("gpath", "gpid", "gcam"))},
        "gthumb": [-1] * len(images),
        "ways": [],
        **{name: [] for name in _OF_QUERY},
        "looks": [],
        "overlays": [],
        "views": first["views"] if first["views"] == second["views"] else None,
        "maps": [],
        "unseen": [],
    }
    orders = list(range(len(rows))), rows
    for name, lists, order, goal in zip(names, (first, second), orders, moved):
        for row, number in enumerate(lists["gthumb"]):
            out["gthumb"][goal[row]] = max(number, out["gthumb"][goal[row]])
        chosen = headline_ways(lists)
        for way in chosen if lists is first else reversed(chosen):
            out["ways"].append({**lists["ways"][way], "name": f"{name}: {lists['ways'][way]['name']}"})
            for part in _OF_QUERY:
                out[part].append([lists[part][way][query] for query in order])
            out["index"][-1] = [_moved(items, goal) for items in out["index"][-1]]
        for look in lists["looks"]:
            layers = [
                {
                    "index": [_moved(layer["index"][query], goal) for query in order],
                    "weight": [layer["weight"][query] for query in order],
                }
                for layer in look["layers"]
            ]
            out["looks"].append({"title": f"{name}: {look['title']}", "layers": layers})
        places = {own: query for query, own in enumerate(order)}
        for one in lists["overlays"]:
            shown = [(places[own], thumb) for own, thumb in zip(one["query"], one["thumb"]) if own in places]
            own = {"query": [query for query, _ in shown], "thumb": [thumb for _, thumb in shown]}
            out["overlays"].append({"title": f"{name}: {one['title']}", "about": one["about"], **own})
    return out


def _keys(lists: dict[str, Any], side: str) -> list[tuple[Any, ...]]:
    """What tells the images of the queries, or with ``g`` of the gallery."""
    return list(zip(lists[f"{side}path"], lists[f"{side}pid"], lists[f"{side}cam"]))


def _moved(items: list[int], goal: list[int]) -> list[int]:
    return [goal[item] if item >= 0 else item for item in items]


__all__ = ["Pair", "headline_ways", "paired_lists", "pairs"]
