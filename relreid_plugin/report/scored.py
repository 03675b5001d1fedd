"""What a report knows of a run, or of features without one: table, records, and every row's scores by query.

A run's own numbers come from its ``metrics.json``. Scores by query are computed again from its bank, in the way in which the
run scored them, and are taken only where their means are those of the file.

Shapes: Q queries, G gallery images, d width.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..config.defaults import get_default_config, load_config, merge_from_list, validate
from ..config.targets import PAIR
from ..engine.attended import Attended
from ..engine.evaluator import Evaluator, Row
from ..engine.records import read_metrics
from ..engine.scoring import EvaluationOptions, Metric
from ..errors import UserError
from ..features.banks import read_run
from ..features.divided import divided
from ..features.files import read
from ..features.pairs import test_set
from ..features.sets import Features, TestFeatures
from ..features.verifier import FILE, Verifier
from ..methods import Panel, Table, methods, takes_several
from ..metrics.ranking import RankingResult
from ..reading import read_json

if TYPE_CHECKING:
    from ..engine.runner import Run

SAME = 5e-4
"""How far a mean that is computed again may be from the file's: searches and sums differ in the last digits by machine."""


@dataclass(frozen=True)
class Scored:
    """One row with its scores by query.

    Attributes:
        row: As in the table.
        result: AP and first rank of every query.
        query, gallery: (Q, d) and (G, d), the features that were ranked; empty where a ranking is all there is.
        metric: How.
        aside: Whether the network saw a part of every sample alone: no result of the run, but a question to it.
    """

    row: Row
    result: RankingResult
    query: Tensor
    gallery: Tensor
    metric: Metric
    aside: bool = False


@dataclass
class Target:
    """One test set.

    Attributes:
        name: As the table has it.
        evaluator: Over its features; ``None``: they are not there, and ``why`` says so.
        scored: The rows that could be computed again, the image model's first.
        why: What is missing, in a sentence.
        looks: What tells whom its queries looked at, of every stage that may say so.
    """

    name: str
    evaluator: Evaluator | None = None
    scored: list[Scored] = field(default_factory=list)
    why: str = ""
    looks: list[Callable[[], Attended | None]] = field(default_factory=list)

    @property
    def data(self) -> TestFeatures:
        """Query and gallery."""
        if self.evaluator is None:
            raise UserError(self.why)
        return self.evaluator.data

    def find(self, row: dict[str, Any]) -> Scored | None:
        """Return the scores by query of a line of the table."""
        wanted = row["protocol"], row["method"]
        return next((one for one in self.scored if (one.row.protocol, one.row.method) == wanted), None)

    def attended(self) -> tuple[list[Attended], list[str]]:
        """Return whom the queries looked at, by stage, of the stages whose rows are here; and why some say nothing."""
        found, notes = [], []
        for look in self.looks:
            try:
                one = look()
            except UserError as error:
                notes.append(f"whom the queries looked at: {error}")
                continue
            if one is not None and any(scored.row.method.startswith(one.title) for scored in self.scored):
                found.append(one)
        return found, notes


class Opening:
    """A run that is opened when it is first looked into.

    Args:
        folder: Its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def run(self) -> Run:
        """The run.

        Raises:
            UserError: The host, the weights or data that it cannot do without are missing.
        """
        from ..engine.runner import open_run  # needs the host

        with contextlib.redirect_stdout(io.StringIO()):
            return open_run(self.folder)


@dataclass
class Subject:
    """What is reported: a run, or features.

    Attributes:
        name: How it is called.
        place: Where it is.
        cfg: Its configuration; ``None``: features without a run.
        rows: The table, as in ``metrics.json``.
        targets: Its test sets by name.
        history: Records per epoch by stage.
        selected: Tested epoch by stage.
        notes: What a user should know.
        environment: What the run was computed with.
        verifier: Calibrated threshold, where there is one.
        panels: What its methods add to the report.
        foreign: Whether these are results of another program.
        opening: Opens the run; ``None``: there is none.
    """

    name: str
    place: Path
    cfg: Any
    rows: list[dict[str, Any]]
    targets: dict[str, Target]
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    selected: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    verifier: Verifier | None = None
    panels: list[Panel | Table] = field(default_factory=list)
    foreign: bool = False
    opening: Opening | None = None


class Recorder(Evaluator):
    """An evaluator that keeps scores by query of every row.

    Attributes:
        scored: Of the rows so far.
    """

    def __init__(self, target: str, data: TestFeatures, *, options: EvaluationOptions, parameters: int) -> None:
        super().__init__(target, data, options=options, parameters=parameters)
        self.scored: list[Scored] = []

    def _row(
        self,
        result: RankingResult,
        metric: Metric,
        *about: Any,
        features: tuple[Tensor, Tensor],
        **more: Any,
    ) -> Row:
        row = super()._row(result, metric, *about, features=features, **more)
        self.scored.append(Scored(row, result, *features, metric))
        return row


def read_subject(place: Path | str) -> Subject:
    """Read a run's folder, or features in any form that is read.

    Raises:
        UserError: Neither of them, a run that is not finished, or features that cannot be scored.
    """
    path = Path(place)
    if path.is_dir() and (path / "config.yml").is_file():
        return _run(path)
    found = features_subject(str(place), features_config())
    found.notes.append(
        "these are features without a run; the table was computed for this report, with the defaults of 'test'."
    )
    return found


def subjects(places: list[str]) -> list[Subject]:
    """Read several, with a name of its own for each.

    Raises:
        UserError: One is named twice, or cannot be read.
    """
    resolved = [Path(place).resolve() for place in places]
    for place in places:
        if resolved.count(Path(place).resolve()) > 1:
            raise UserError(f"command line: '{place}' is named twice; leave one out.")
    found = [read_subject(place) for place in places]
    names = [subject.name for subject in found]
    for subject in found:
        if names.count(subject.name) > 1:
            subject.name = str(subject.place)
    return found


# --- runs ---------------------------------------------------------------------------------------------------------------
def _run(folder: Path) -> Subject:
    from .. import register

    metrics = read_metrics(folder)
    with contextlib.suppress(UserError):  # keys of the host need the host; what it is needed for later says so
        register()
    cfg = load_config(folder / "config.yml")
    environment = folder / "environment.json"
    about = read_json(environment, what="environment of a run", remedy="test the run again") if environment.is_file() else {}
    names = list(dict.fromkeys(row["target"] for row in metrics["rows"]))
    parts = _parts(cfg)
    targets = {name: _target(folder, cfg, name, metrics["rows"], next(iter(parts.values()))) for name in names}
    for target in targets.values():
        for label, part in list(parts.items())[1:]:
            _aside(folder, target, label, part)
    opening = Opening(folder)
    missing = [row for row in metrics["rows"] if targets[row["target"]].find(row) is None]
    if missing and any(target.evaluator is not None for target in targets.values()):
        _stage_rows(opening, targets)
    for target in targets.values():
        _check(target, metrics["rows"])
    verifier = Verifier.load(folder / FILE) if (folder / FILE).is_file() else None
    return Subject(
        folder.resolve().name,
        folder,
        cfg,
        metrics["rows"],
        targets,
        metrics["history"],
        metrics["selected_epoch"],
        list(metrics.get("notes", [])),
        about,
        verifier,
        [panel for method in methods() for panel in method.panels(folder, metrics)],
        opening=opening,
    )


def _parts(cfg: Any) -> dict[str, str]:
    """Names of the rows that the network has by what it sees of the samples, and what their banks are called by."""
    if takes_several(cfg):
        with contextlib.suppress(UserError):  # the host is missing
            from ..engine.network import build_network

            return {view.label: view.part for view in build_network(cfg).views()}
    return {"": ""}


def _bank(folder: Path, name: str) -> TestFeatures:
    from ..engine.bank import bank_file

    found = read_run(folder, bank_file(folder / "bank", f"{name}-query").name.removesuffix("-query.pt"))
    return test_set(found.part("query"), found.part("gallery"))[0]


def _target(folder: Path, cfg: Any, name: str, rows: list[dict[str, Any]], part: str) -> Target:
    """A test set with the rows of its image model and rivals, from the run's bank."""
    own = next(row for row in rows if row["target"] == name)
    try:
        data = _bank(folder, name + part)
    except UserError as error:
        return Target(name, why=str(error))
    recorder = Recorder(
        name, data, options=replace(EvaluationOptions.of(cfg), verification=False), parameters=int(own["parameters"])
    )
    recorder.baseline(own["method"].removesuffix(_ending(recorder)))
    recorder.rivals()
    return Target(name, recorder, recorder.scored)


def _ending(recorder: Recorder) -> str:
    from ..engine.evaluator import RERANKED

    return RERANKED if recorder.options.rerank_all else ""


def _aside(folder: Path, target: Target, label: str, part: str) -> None:
    """Add the row of a part of every sample, where its features are kept and are of the same samples."""
    if target.evaluator is None:
        return
    try:
        data = _bank(folder, target.name + part)
    except UserError:
        return
    sides = ((target.data.query, data.query), (target.data.gallery, data.gallery))
    if all(np.array_equal(own.pids, other.pids) and own.paths == other.paths for own, other in sides):
        recorder = Recorder(target.name, data, options=target.evaluator.options, parameters=target.evaluator.parameters)
        recorder.baseline(label)
        target.scored += [replace(one, aside=True) for one in recorder.scored]


def _stage_rows(opening: Opening, targets: dict[str, Target]) -> None:
    """Add the rows of stages that refine the features, by the tested weights of the run."""
    try:
        run = opening.run
        with contextlib.redirect_stdout(io.StringIO()):
            refining = [stage for stage in run.asked() if stage.refines]
            for target in targets.values():
                for stage in refining:
                    if target.evaluator is not None:
                        stage.rows(run, target.evaluator)
                        target.looks.append(partial(stage.attended, run, target.data))
    except UserError as error:
        for target in targets.values():
            target.why = target.why or f"later stages could not be opened: {error}"


def _check(target: Target, rows: list[dict[str, Any]]) -> None:
    """Leave out what is no row of the table, or has another mAP there: the bank belongs to other weights."""
    kept, wrong = [], []
    for one in target.scored:
        own = [row for row in rows if row["target"] == target.name and _key(row) == (one.row.protocol, one.row.method)]
        if own and own[0]["mAP"] is not None and abs(own[0]["mAP"] - one.row.mAP) <= SAME:
            kept.append(one)
        elif own:
            wrong.append(f"{one.row.method} ({one.row.protocol}): {one.row.mAP:.4f}, not {own[0]['mAP']:.4f}")
    target.scored[:] = kept
    if wrong:
        target.why = (
            f"the bank's features of '{target.name}' give another mAP than metrics.json, so nothing is shown by query "
            f"for {len(wrong)} rows ({'; '.join(wrong)}); test the run again."
        )
    if not kept:
        target.evaluator = None
        target.why = target.why or f"the bank's features of '{target.name}' belong to no row of metrics.json."


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["protocol"], row["method"]


# --- features -----------------------------------------------------------------------------------------------------------
def features_config(overrides: Sequence[str] = ()) -> Any:
    """Return the keys by which features are scored: ``test``, by cosine, and ``data.split_rule``.

    Raises:
        UserError: Another key, or a value that cannot be.
    """
    cfg = get_default_config()
    for key in overrides[::2]:
        if key.split(".")[0] != "test" and key != "data.split_rule":
            raise UserError(f"'{key}' does not act on features; they are scored by keys of test and by data.split_rule.")
    merge_from_list(cfg, ["test.dist_metric", "cosine", *overrides])
    validate(cfg)
    return cfg


def _sides(place: str, rule: str) -> tuple[Features, Features, list[str]]:
    """Queries, gallery and notes of one file, or of ``QUERY+GALLERY``."""
    path = Path(place)
    if PAIR in place and not path.exists():
        names = place.split(PAIR)
        if len(names) != 2:
            raise UserError(f"'{place}' names {len(names)} files; features are one file, or QUERY{PAIR}GALLERY.")
        return read(names[0]), read(names[1]), []
    found = read(path)
    if found.splits is not None:
        return found.part("query"), found.part("gallery"), []
    known, note = found.known()
    parts, said = divided(known, path, rule or "image")
    return known.take(parts["query"]), known.take(parts["gallery"]), [*([note] if note else []), said]


def features_subject(place: str, cfg: Any) -> Subject:
    """Score features without a run.

    Args:
        place: A file or store, or ``QUERY+GALLERY``.
        cfg: From :func:`features_config`.

    Raises:
        UserError: What cannot be read or scored.
    """
    query, gallery, notes = _sides(place, cfg.data.split_rule)
    data, more = test_set(query, gallery)
    notes += more
    options = EvaluationOptions.of(cfg)
    recorder = Recorder(Path(place).name, data, options=options, parameters=0)
    recorder.baseline("features as given")
    recorder.rivals()
    rows = [one.row.as_dict() for one in recorder.scored]
    name = Path(place).name
    return Subject(name, Path(place), None, rows, {name: Target(name, recorder, recorder.scored)}, notes=notes)
