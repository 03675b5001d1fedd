"""What a split must not do in silence: share files or identities between training and testing, or label a file twice.

Legitimate everywhere in some data set or other, all of it is said with counts and first names, before anything is trained.
Refused is only what cannot be meant: one training file as two identities, and a test set in which no query has a match.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..metrics.matches import has_match
from .samefile import FileNumbers, file_numbers, first_path, same_content

CHECKS = ("none", "path", "content")
SHOWN = 3

Item = tuple[Any, ...]
"""``(path(s), pid, camid, …)``."""


@dataclass(frozen=True)
class TestSet:
    """Queries and gallery of one test set."""

    __test__ = False

    query: Sequence[Item]
    gallery: Sequence[Item]


def audit_splits(
    train: Sequence[Item],
    identities: Sequence[str],
    tests: Mapping[str, TestSet],
    *,
    check: str = "content",
    files: Callable[[Any], Sequence[str]] | None = None,
) -> list[str]:
    """Compare training and test data file by file.

    Args:
        train: Training items; their second entry is a label.
        identities: The name of every label.
        tests: Name of a test set to its items.
        check: ``none``: compare nothing; ``path``: find the same file, through links and other spellings too;
            ``content``: also files with the same bytes.
        files: The files of an item's first entry; ``None``: one, see :func:`~relreid_plugin.data.samefile.first_path`.

    Returns:
        Sentences for the user, with counts and first names.

    Raises:
        UserError: A training file stands under two identities.
    """
    if check not in CHECKS:
        raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {check!r}")
    if check == "none":
        return []
    files = files or (lambda source: [first_path(source)])
    number = FileNumbers()
    labels: dict[int, set[int]] = defaultdict(set)
    whole: dict[tuple[int, ...], dict[int, Item]] = defaultdict(dict)
    listed: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for item in train:
        key = tuple(number(path) for path in files(item[0]))
        whole[key].setdefault(item[1], item)
        listed[key].append(first_path(item[0]))
        for one in key:
            labels[one].add(item[1])
    _refuse_two_identities(whole, identities)
    notes = []
    again = [paths for paths in listed.values() if len(paths) > 1]
    if again:
        names = [f"'{paths[0]}'" + (f" as '{paths[1]}'" if paths[1] != paths[0] else "") for paths in again]
        notes.append(f"{_count(again, 'training image')} listed more than once and trained on as often ({_first(names)})")
    parts = {name: _numbered(test, number, files) for name, test in tests.items()}
    for name, part in parts.items():
        notes += _same_files(name, part, labels, number)
    if check == "content":
        notes += _copies(labels, parts, number)
    return notes


@dataclass(frozen=True)
class _Numbered:
    """A test set's files: number to the pairs of identity and camera that it has as a query, and as a gallery image."""

    query: dict[int, set[tuple[int, int]]]
    gallery: dict[int, set[tuple[int, int]]]
    twice: list[str]  # gallery images that are listed more than once

    def pids(self, one: int) -> set[int]:
        return {pid for part in (self.query, self.gallery) for pid, _ in part.get(one, ())}


def _numbered(test: TestSet, number: FileNumbers, files: Callable[[Any], Sequence[str]]) -> _Numbered:
    parts: list[dict[int, set[tuple[int, int]]]] = []
    twice: list[str] = []
    for items in (test.query, test.gallery):
        part: dict[int, set[tuple[int, int]]] = defaultdict(set)
        seen: set[tuple[int, ...]] = set()
        for item in items:
            key = tuple(number(path) for path in files(item[0]))
            for one in key:
                part[one].add((int(item[1]), int(item[2])))
            if key in seen:
                twice.append(first_path(item[0]))
            seen.add(key)
        parts.append(dict(part))
    return _Numbered(parts[0], parts[1], twice)


def _refuse_two_identities(whole: Mapping[tuple[int, ...], Mapping[int, Item]], identities: Sequence[str]) -> None:
    wrong = [items for items in whole.values() if len(items) > 1]
    if not wrong:
        return
    (one, first), (other, second) = list(wrong[0].items())[:2]
    paths = [first_path(first[0]), first_path(second[0])]
    where = f"'{paths[0]}'" + (f" (also '{paths[1]}')" if paths[1] != paths[0] else "")
    raise UserError(
        f"{_count(wrong, 'training image')} labelled as two identities: {where} is '{_name(identities, one)}' and "
        f"'{_name(identities, other)}'; take one of the labels out, or name a data set once in 'data.sources'."
    )


def _same_files(name: str, part: _Numbered, labels: Mapping[int, set[int]], number: FileNumbers) -> list[str]:
    notes = []
    everything = [*part.query, *(one for one in part.gallery if one not in part.query)]
    shared = [number.paths[one] for one in everything if one in labels]
    if shared:
        notes.append(
            f"test set '{name}': {_count(shared, 'image')} trained on as well ({_first(map(repr, shared))}); its scores say "
            "little about new images"
        )
    two = [number.paths[one] for one in everything if len(part.pids(one)) > 1]
    if two:
        notes.append(f"test set '{name}': {_count(two, 'image')} labelled as two identities ({_first(map(repr, two))})")
    if part.twice:
        notes.append(
            f"test set '{name}': {_count(part.twice, 'image')} listed more than once and counted as often "
            f"({_first(map(repr, part.twice))})"
        )
    # under its own identity and camera an image is discarded anyway, as where query and gallery are one set by protocol
    own = [number.paths[one] for one, seen in part.query.items() if part.gallery.get(one, seen) - seen]
    if own:
        notes.append(
            f"test set '{name}': {_count(own, 'query', 'queries')} in the gallery too ({_first(map(repr, own))}); a query's "
            "own file is never counted as its match"
        )
    return notes


def _copies(labels: Mapping[int, set[int]], parts: Mapping[str, _Numbered], number: FileNumbers) -> list[str]:
    """Sentences about different files with the same bytes."""

    def wanted(group: list[int]) -> bool:
        """Files of one training identity may repeat each other; anything else is looked at."""
        trained = [labels[one] for one in group if one in labels]
        return len(trained) < len(group) or len(set().union(*trained)) > 1

    trained: list[str] = []
    leaked: dict[str, list[str]] = defaultdict(list)
    counted: dict[str, list[str]] = defaultdict(list)
    two: dict[str, list[str]] = defaultdict(list)
    for group in same_content(number.paths, wanted):
        in_training = [one for one in group if one in labels]
        if len({label for one in in_training for label in labels[one]}) > 1:
            trained.append(_pair(number, in_training))
        for name, part in parts.items():
            tested = [one for one in group if one in part.query or one in part.gallery]
            if in_training:
                leaked[name] += [_pair(number, [one, in_training[0]]) for one in tested if one not in labels]
            if len({pid for one in tested for pid in part.pids(one)}) > 1:
                two[name].append(_pair(number, tested))
            matches = {
                image
                for query in tested
                for image in tested
                if image != query
                and any(
                    pid == own and camera != seen
                    for own, seen in part.query.get(query, ())
                    for pid, camera in part.gallery.get(image, ())
                )
            }
            counted[name] += [_pair(number, [image, next(one for one in group if one in part.query)]) for image in matches]
    notes = []
    if trained:
        notes.append(
            f"{_count(trained, 'training image')} there with the same bytes under two identities ({_first(trained)})"
        )
    for name in parts:
        if leaked[name]:
            notes.append(
                f"test set '{name}': {_count(leaked[name], 'image')} copied from training images ({_first(leaked[name])}); "
                "its scores say little about new images"
            )
        if two[name]:
            notes.append(
                f"test set '{name}': {_count(two[name], 'image')} there with the same bytes under two identities "
                f"({_first(two[name])})"
            )
        if counted[name]:
            notes.append(
                f"test set '{name}': {_count(counted[name], 'gallery image')} copied from queries under another name and "
                f"counted as matches ({_first(counted[name])})"
            )
    return notes


def shared_identities_note(name: str, identities: Sequence[str]) -> list[str]:
    """Say which identities of a data set are trained on and tested on."""
    if not identities:
        return []
    count = _count(identities, "identity", "identities")
    return [
        f"test set '{name}': {count} trained on as well ({_first(map(repr, identities))}); its scores are not those of "
        "unseen identities"
    ]


def check_matches(name: str, test: TestSet, *, group: str = "camera", way_out: str = "") -> list[str]:
    """Count the queries that have no match which the protocol keeps.

    Args:
        name: Of the test set, for the sentence.
        test: Its items.
        group: What the third entry of an item counts.
        way_out: What to do about it, for the error; empty: correct the data set.

    Returns:
        Sentences for the user.

    Raises:
        UserError: No query has a match.
    """
    query, gallery = test.query, test.gallery
    if not len(query) or not len(gallery):
        return []
    numbers = file_numbers([first_path(item[0]) for item in query], [first_path(item[0]) for item in gallery])
    labels = [np.array([item[entry] for item in items]) for entry in (1, 2) for items in (query, gallery)]
    own: dict[str, Any] = {} if numbers is None else {"query_files": numbers[0], "gallery_files": numbers[1]}
    found = has_match(*labels, **own)
    if found.all():
        return []
    rule = f"a match has the query's identity, another {group} and is another file"
    if not found.any():
        reason = "no gallery image has the identity of a query"
        if has_match(*labels[:2]).any():
            reason = f"all gallery images of their identities are of the query's own {group}, or the query itself"
        way_out = way_out or "correct its labels, or name another one in 'data.targets'"
        raise UserError(f"in test set '{name}' no query has a match ({reason}); {rule}; {way_out}.")
    lone = [first_path(item[0]) for item, matched in zip(query, found) if not matched]
    return [
        f"test set '{name}': {len(lone)} of {len(query)} queries without a match in the gallery, which are not scored "
        f"({_first(map(repr, lone))}); {rule}"
    ]


def _name(identities: Sequence[str], label: int) -> str:
    return identities[label] if 0 <= label < len(identities) else str(label)


def _count(found: Sequence[Any], one: str, many: str = "") -> str:
    """``3 images are``, ``1 image is``."""
    return f"{len(found)} {one} is" if len(found) == 1 else f"{len(found)} {many or one + 's'} are"


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return "; ".join(names[:SHOWN]) + (f"; {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _pair(number: FileNumbers, ones: Sequence[int]) -> str:
    return " = ".join(f"'{number.paths[one]}'" for one in ones[:2])
