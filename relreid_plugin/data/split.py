"""Holding out training identities, and the records that data readers return."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from .files import one_per_file
from .labels import check_numbers, is_number, number_of, numeric_order, plain, spelling_notes


@dataclass
class FolderSplits:
    """A data set that was read from a folder or a table.

    Attributes:
        train: ``(path, label, camid)``; labels are 0 … n-1 in the sorted order of the identities.
        query: ``(path, pid, camid)``.
        gallery: ``(path, pid, camid)``.
        has_cameras: Whether camera labels were given. Without them, queries have camera 0 and gallery images camera 1, so
            that the Market-1501 protocol discards nothing.
        train_identities: The identity of every training label, as it is written in the data set.
        notes: Sentences that a user should see.
        shared_identities: Identities that are trained on and tested on, as they are written.
        identity_names: What is written for every ``pid`` that is not itself the number that is written.
        camera_names: What is written for every ``camid``, numbers without leading zeros; empty without camera labels.
        rule: How it was divided, where it has no splits of its own.
    """

    train: list[tuple[str, int, int]]
    query: list[tuple[str, int, int]]
    gallery: list[tuple[str, int, int]]
    has_cameras: bool
    train_identities: list[str]
    notes: list[str] = field(default_factory=list)
    shared_identities: list[str] = field(default_factory=list)
    identity_names: dict[int, str] = field(default_factory=dict)
    camera_names: dict[int, str] = field(default_factory=dict)
    rule: str = ""


@dataclass(frozen=True)
class Record:
    """One image of a data set before identities and cameras are numbered.

    Attributes:
        path: Image file.
        identity: As written, e.g. ``0002`` or ``red_shoe``.
        camera: As written, e.g. ``1`` or ``north``, or None.
    """

    path: str
    identity: str
    camera: str | None


NO_CAMERAS_NOTE = "no camera labels: every gallery image of a query's identity counts, none is discarded"


def number_identities(
    splits: dict[str, list[Record]], *, first_camera: int, places: Sequence[str] | None = None
) -> FolderSplits:
    """Turn records into the host's tuples.

    Identities that are all integers of up to 18 digits keep their numbers; else they are numbered 1, 2, … in sorted order
    over all splits (0 is left free, since the host takes identity 0 for a distractor). Identity -1 is junk and left out. So
    do cameras, less ``first_camera``; else they are numbered 0, 1, … in sorted order. Two spellings of one number (``7`` and
    ``007``) are one identity, or camera, and a note says so.

    Args:
        splits: Records of ``train``, ``query`` and ``gallery``, in the order to keep; all with a camera, or none.
        first_camera: Number of the first camera; it becomes camera 0.
        places: For messages: the file that a record's path, an index in text, stands for; None: the path itself.

    Raises:
        UserError: A number is written in other digits than 0–9, or all images of a split have the identity -1.
    """
    everything = [record for records in splits.values() for record in records]
    written, cameras_written = _first_places(everything, places)
    identities = {text: plain(text) for text in written}
    kept = {name: [r for r in records if identities[r.identity] != "-1"] for name, records in splits.items()}
    for name, records in splits.items():
        if records and not kept[name]:
            raise UserError(
                f"all {len(records)} {name} images have the identity -1, which is left out, such as '{records[0].path}'; "
                "give them the identities that they show."
            )
    names = _written_as({r.identity for records in kept.values() for r in records}, written)
    pids = _number_identities(names)
    cameras = {text: plain(text) for text in cameras_written}
    camids = _number_cameras(_written_as(cameras, cameras_written), first_camera)
    train_pids = sorted({pids[identities[record.identity]] for record in kept["train"]})
    labels = {pid: label for label, pid in enumerate(train_pids)}
    in_training = {pids[identities[record.identity]]: record.identity for record in reversed(kept["train"])}
    has_cameras = bool(everything) and everything[0].camera is not None

    def numbered(split: str, default: int) -> list[tuple[str, int, int]]:
        return [
            (r.path, pids[identities[r.identity]], default if r.camera is None else camids[cameras[r.camera]])
            for r in kept[split]
        ]

    query, gallery = numbered("query", 0), numbered("gallery", 1)
    return FolderSplits(
        train=[(path, labels[pid], camid) for path, pid, camid in numbered("train", 0)],
        query=query,
        gallery=gallery,
        has_cameras=has_cameras,
        train_identities=[in_training[pid] for pid in train_pids],
        notes=[
            *([] if has_cameras else [NO_CAMERAS_NOTE]),
            *spelling_notes(written, "identities"),
            *spelling_notes(cameras_written, "cameras"),
        ],
        shared_identities=_shared(in_training, query, gallery),
        identity_names={number: names[label] for label, number in pids.items() if label != str(number)},
        camera_names={number: label for label, number in camids.items()},
    )


def _shared(
    trained: dict[int, str], query: Sequence[tuple[str, int, int]], gallery: Sequence[tuple[str, int, int]]
) -> list[str]:
    """Names of trained identities (number to name) that are tested on; 0 is a distractor unless a query asks for it."""
    asked = {pid for _, pid, _ in query}
    tested = asked | {pid for _, pid, _ in gallery if pid != 0}
    return [trained[pid] for pid in sorted(trained) if pid in tested]


def one_record_per_file(splits: dict[str, list[Record]]) -> tuple[dict[str, list[Record]], list[str]]:
    """Let the same real file of an identity count once in a split, whatever names lead to it.

    Returns:
        The records that stay, and a note for every split that had more.
    """
    kept: dict[str, list[Record]] = {}
    notes: list[str] = []
    for split, records in splits.items():
        kept[split], more = one_per_file(records, lambda r: r.path, lambda r: plain(r.identity), f"{split} images")
        notes += more
    return kept, notes


def _first_places(records: Sequence[Record], places: Sequence[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Every identity and every camera as written, each with the first file that has it."""
    identities: dict[str, str] = {}
    cameras: dict[str, str] = {}
    for record in records:
        where = record.path if places is None else places[int(record.path)]
        identities.setdefault(record.identity, where)
        if record.camera is not None:
            cameras.setdefault(record.camera, where)
    check_numbers(identities.items(), "identity")
    check_numbers(cameras.items(), "camera")
    return identities, cameras


def _written_as(texts: Iterable[str], order: dict[str, str]) -> dict[str, str]:
    """The first spelling of every label, by its plain form."""
    wanted = set(texts)
    return {plain(text): text for text in reversed(order) if text in wanted}


def _number_identities(names: dict[str, str]) -> dict[str, int]:
    """The number of every plain label; ``names`` gives what is written for it."""
    own = number_of(names)
    if own is not None:
        return own
    if all(map(is_number, names)):
        ordered = sorted((label for label in names if label != "0"), key=numeric_order)
        return {**({"0": 0} if "0" in names else {}), **{label: number for number, label in enumerate(ordered, start=1)}}
    return {label: number for number, label in enumerate(sorted(names, key=names.__getitem__), start=1)}


def _number_cameras(names: dict[str, str], first: int) -> dict[str, int]:
    own = number_of(names)
    if own is not None:
        return {label: number - first for label, number in own.items()}
    return {label: number for number, label in enumerate(sorted(names, key=numeric_order))}


@dataclass
class ValidationSplit:
    """Training data with some identities held out.

    Attributes:
        train: The remaining training data, relabelled 0 … n-1 in the order of the old labels.
        query: Held-out queries, with the old labels as identities.
        gallery: Held-out gallery.
        kept_labels: The old label of every new one.
    """

    train: list[tuple[Any, ...]]
    query: list[tuple[Any, ...]]
    gallery: list[tuple[Any, ...]]
    kept_labels: list[int]


def hold_out_identities(train: Sequence[tuple[Any, ...]], fraction: float, seed: int, *, fold: int = 0) -> ValidationSplit:
    """Hold out whole training identities as a small test set in the Market-1501 manner.

    One image of every held-out identity and camera becomes a query and the others the gallery, as far as the query keeps a
    gallery image under another camera. Where all images have one camera (no camera labels), there is one query per
    identity; queries then get camera 0 and gallery images camera 1, so that nothing is discarded. Images of held-out
    identities that make no query are in the gallery.

    Args:
        train: Tuples ``(path(s), label, camid, dsetid)``.
        fraction: Share of the identities to hold out, in (0, 1).
        seed: Draws the identities and the queries; the same seed and data give the same split.
        fold: Which share of the drawn order is held out, counted from 0; shares of one seed have no identity in common, and
            with the fraction 1/k the folds 0 … k-1 hold out every identity once.

    Raises:
        UserError: Fewer than four identities, a fold that there is not, or no held-out identity that makes a query.
    """
    labels = sorted({item[1] for item in train})
    if len(labels) < 4:
        raise UserError(
            f"'train.val_fraction {fraction}' cannot hold out identities of a training set that has only {len(labels)}; "
            "set it to 0."
        )
    rng = np.random.default_rng(seed)
    first, last = _share(len(labels), fraction, fold)
    held = {labels[index] for index in rng.permutation(len(labels))[first:last]}
    rest = [item for item in train if item[1] not in held]
    kept_labels = [label for label in labels if label not in held]
    new_label = {label: index for index, label in enumerate(kept_labels)}
    query, gallery = as_test_set([item for item in train if item[1] in held], rng)
    if not query:
        raise UserError(
            f"'train.val_fraction {fraction}' holds out {len(held)} identities, but none has images under two cameras, so "
            "there is nothing to validate on; set it to 0 or hold out more."
        )
    return ValidationSplit(
        train=[(item[0], new_label[item[1]], *item[2:]) for item in rest],
        query=query,
        gallery=gallery,
        kept_labels=kept_labels,
    )


def _share(count: int, fraction: float, fold: int) -> tuple[int, int]:
    """The first place of a fold among ``count`` identities, and the one behind its last."""
    if fold == 0:
        return 0, min(max(2, round(fraction * count)), count - 2)
    first, last = round(fold * fraction * count), min(round((fold + 1) * fraction * count), count)
    if round(fraction * count) < 2 or not 2 <= last - first <= count - 2:
        raise UserError(
            f"'train.val_fold {fold}' holds out no two identities of {count} ('train.val_fraction {fraction:g}'); raise the "
            "fraction, that is take fewer folds."
        )
    return first, last


def as_test_set(
    items: Sequence[tuple[Any, ...]], rng: np.random.Generator
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Divide images into queries and gallery in the manner of :func:`hold_out_identities`, under which it is described.

    Args:
        items: Tuples ``(anything, label, camid, …)``.
        rng: Draws the queries.

    Returns:
        Queries and gallery; no queries where no identity makes one.
    """
    by_identity: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for item in items:
        by_identity[item[1]].append(item)
    one_camera = len({item[2] for item in items}) == 1
    query: list[tuple[Any, ...]] = []
    gallery: list[tuple[Any, ...]] = []
    for label in sorted(by_identity):
        chosen, others = _choose_queries(by_identity[label], one_camera, rng)
        query.extend(chosen)
        gallery.extend(others)
    if one_camera:
        query = [(item[0], item[1], 0, *item[3:]) for item in query]
        gallery = [(item[0], item[1], 1, *item[3:]) for item in gallery]
    return query, gallery


def _choose_queries(
    items: list[tuple[Any, ...]], one_camera: bool, rng: np.random.Generator
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return one identity's queries and gallery images; every query has a match that the protocol keeps."""
    order = rng.permutation(len(items))
    if one_camera:
        if len(items) < 2:
            return [], list(items)
        return [items[order[0]]], [items[index] for index in sorted(order[1:])]
    cameras = {item[2] for item in items}
    left = {camera: sum(item[2] == camera for item in items) for camera in cameras}
    queries: list[int] = []
    for camera in sorted(cameras):
        candidates = [index for index in order if items[index][2] == camera]
        # the query leaves the gallery: every query so far must keep a gallery image under another camera
        left[camera] -= 1
        asking = {items[index][2] for index in queries} | {camera}
        if all(any(left[other] for other in cameras if other != own) for own in asking):
            queries.append(candidates[0])
        else:
            left[camera] += 1
    chosen = set(queries)
    return [items[i] for i in sorted(chosen)], [items[i] for i in range(len(items)) if i not in chosen]
