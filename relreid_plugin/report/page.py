"""A report: one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.defaults import get_default_config
from ..engine.table import TITLES
from ..errors import UserError, needed
from ..files import write_text
from ..methods import Panel, Table
from ..metrics.bootstrap import interval
from ..metrics.rivals import RIVALS
from . import measures, plots
from .configs import EMPTY, changed, differences, flat, flat_items
from .lists import draw, query_lists, without_pictures
from .looking import SHOWN, look_into
from .paired import Pair, pairs
from .scored import Subject, Target, subjects
from .thumbnails import Thumbnails

LIMIT_MB = 60.0
TOPK = 10
_MB = 1_000_000
_CURVES = 4  # rows in a picture beside the first
_DIGITS, _SENTENCES = 7, 4000  # bytes of a picture's number, and of what is said on those left out


def write_report(places: Sequence[str], out: Path, **options: Any) -> list[str]:
    """Write the report of runs and features.

    Args:
        places: Folders of runs, or features in any form that is read; the first one is compared with every other one.
        out: The HTML file.
        **options: See :func:`write_page`.

    Returns:
        Sentences on what the page lacks.

    Raises:
        UserError: Something cannot be read or scored, Jinja2 is missing, or the page without pictures is beyond the limit.
    """
    needed("jinja2", "a report")
    return write_page(subjects(list(places)), out, **options)


def write_page(
    found: list[Subject],
    out: Path,
    *,
    limit: float = LIMIT_MB,
    topk: int = TOPK,
    identities: Sequence[str] = (),
    overlays: int = SHOWN,
    measure: bool = False,
) -> list[str]:
    """Write the report of runs and features that were read; see :func:`write_report`.

    Args:
        found: The runs and features.
        out: The HTML file.
        limit: Its largest size in millions of bytes; pictures are left out where it would be larger.
        topk: Images of a ranked list.
        identities: Those on the map; empty: those of the lowest mean AP.
        overlays: Queries, the worst first, that show where the network looks, where a method tells; 0: none.
        measure: Whether methods measure what takes many passes through the networks.
    """
    jinja2 = needed("jinja2", "a report")
    if not found:
        raise UserError("command line: a report needs a run or features; logs and rankings have no pictures.")
    views = [(subject, target) for subject in found for target in subject.targets.values()]
    payloads = [query_lists(target, topk, identities) for _, target in views]
    looked = look_into(views, payloads, most=overlays, measure=measure)
    for payload, own in zip(payloads, looked):
        if payload:
            payload["overlays"] = without_pictures(own)
    lists = {(subject.name, target.name): payload for (subject, target), payload in zip(views, payloads)}
    two = [pair for pair in pairs(found) if all(lists[subject.name, pair.target] for subject in (pair.first, pair.other))]
    pictures = Thumbnails(0)
    context = {**_context(found, views, payloads), "pairs": [_pair(f"p{number}", pair) for number, pair in enumerate(two)]}
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    env.filters |= {"percent": percent, "cell": cell}
    template = env.get_template("report.html")

    def render(missing: list[str]) -> str:
        both = [pair.lists(lists) for pair in two]
        data = json.dumps(
            {"views": [*payloads, *both], "pictures": pictures.pictures}, separators=(",", ":"), ensure_ascii=False
        )
        safe = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        return template.render(**context, missing=missing, data=jinja2.utils.markupsafe.Markup(safe))

    plain = len(render([]).encode("utf-8", "replace"))
    shown = [*payloads, *(pair.lists(lists) for pair in two)]
    numbers = sum(
        len(payload["path"]) + len(payload["gpath"]) + sum(len(one["query"]) for one in payload["overlays"])
        for payload in shown
        if payload
    )
    room = int(limit * _MB) - plain - _DIGITS * numbers - _SENTENCES
    if room < 0:
        raise UserError(
            f"the report takes {plain / _MB:.1f} MB without any picture, more than --limit {limit:g}; raise it, or report "
            "fewer runs at a time."
        )
    pictures.budget = room
    draw(views, payloads, looked, pictures)
    missing = pictures.sentences()
    text = render(missing)
    write_text(out, text.encode("utf-8", "replace").decode("utf-8"))
    return [*missing, *(target.why for _, target in views if target.why)]


def cell(value: str | float) -> str:
    """Return a cell of a method's table: fractions as percent, all else as it is."""
    return percent(value) if isinstance(value, float) else str(value)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as percent without a sign; a dash where there is none."""
    return EMPTY if value is None else f"{100 * value:.{digits}f}"


# --- the parts of the page ------------------------------------------------------------------------------------------------
def _context(found: list[Subject], views: list[tuple[Subject, Target]], payloads: list[dict[str, Any]]) -> dict[str, Any]:
    several = len({subject.name for subject, _ in views}) > 1
    names = [_tab(subject, target, several) for subject, target in views]
    return {
        "title": ", ".join(subject.name for subject in found),
        "views": [
            {**_view(f"v{number}", name, *view), **_extras(payload)}
            for number, (name, view, payload) in enumerate(zip(names, views, payloads))
        ],
        "runs": [_about(subject) for subject in found],
        "differences": differences(found),
        "names": [subject.name for subject in found],
        "css": _part("report.css"),
        "js": _part("report.js"),
    }


def _tab(subject: Subject, target: Target, several: bool) -> str:
    """What a test set's tab is called."""
    if several and len(subject.targets) > 1:
        return f"{subject.name} · {target.name}"
    return subject.name if several else target.name


def _part(name: str) -> Any:
    markup = needed("markupsafe", "a report").Markup
    return markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _safe(text: str) -> Any:
    return needed("markupsafe", "a report").Markup(text)


def _about(subject: Subject) -> dict[str, Any]:
    cfg = subject.cfg
    trained: list[tuple[str, str]] = [("place", str(subject.place))]
    if cfg is None:
        trained.append(("trained", "features without a run"))
    else:
        trained += [
            ("trained on", ", ".join(cfg.data.sources)),
            ("model", cfg.model.name),
            ("tested on", ", ".join(cfg.data.targets)),
            ("tested weights", ", ".join(f"{stage} epoch {epoch}" for stage, epoch in subject.selected.items()) or EMPTY),
            ("seed", str(cfg.train.seed)),
        ]
    keys = [] if cfg is None else changed(flat(get_default_config()), flat(cfg))
    environment = flat_items(subject.environment)
    return {"name": subject.name, "about": trained, "changed": keys, "environment": environment, "notes": subject.notes}


def _view(mark: str, name: str, subject: Subject, target: Target) -> dict[str, Any]:
    rows = [row for row in subject.rows if row["target"] == target.name]
    view: dict[str, Any] = {"id": mark, "name": name, "subject": subject.name, "target": target.name, "why": target.why}
    table, ranks = [], list(rows[0]["cmc"])
    for row in rows:
        scored = target.find(row)
        about: dict[str, Any] = {"row": row, "map": None, "first": None}
        if scored is not None:
            about["map"] = interval(scored.result.ap)
            if scored.result.first is not None:
                valid = np.isfinite(scored.result.ap)
                about["first"] = interval(np.where(valid, scored.result.first == 1, np.nan))
        table.append(about)
    view["ranks"] = ranks
    view["groups"] = [(TITLES[p], [one for one in table if one["row"]["protocol"] == p]) for p in TITLES]
    titles = {rival.title for rival in RIVALS.values()}
    asides = {one.row.method for one in target.scored if one.aside}
    own = [one for one in table if one["row"]["method"] not in titles | asides]
    own = [one for one in own if one["row"]["protocol"] == own[0]["row"]["protocol"]]
    view["headlines"] = [own[0], *([own[-1]] if len(own) > 1 else [])] if own else table[:1]
    view["rates"] = list(dict.fromkeys(rate for row in rows for rate in row.get("verification", {}).get("tpr", {})))
    view["history"] = [
        (stage, _safe(plots.history(records, stage, f"{mark}h{number}")))
        for number, (stage, records) in enumerate(subject.history.items())
        if records
    ]
    found = [one for one in subject.panels if one.target in ("", target.name)]
    panels = [one for one in found if isinstance(one, Panel)]
    view["panels"] = [(panel.title, _safe(plots.panel(panel, f"{mark}m{number}"))) for number, panel in enumerate(panels)]
    view["tables"] = [one for one in found if isinstance(one, Table)]
    view.update(_curves(mark, subject, target) if target.scored and target.evaluator is not None else {"curves": []})
    return view


def _curves(mark: str, subject: Subject, target: Target) -> dict[str, Any]:
    evaluator, verifier = target.evaluator, subject.verifier
    assert evaluator is not None
    scorer, data, first = evaluator.scorer, target.data, target.scored[0]
    if verifier is not None and verifier.dim not in (0, data.query.dim):
        verifier = None
    threshold = None if verifier is None else verifier.threshold
    pairs = measures.distributions(data, scorer, threshold)
    shown = [first, *sorted(target.scored[1:], key=lambda one: not one.aside)[-_CURVES:]]
    label = {id(one): f"{one.row.method} ({one.row.protocol})" for one in shown}
    curves = [("CMC", _safe(plots.cmc({label[id(one)]: one.result.cmc for one in shown}, f"{mark}c")))]
    point = None
    if pairs.same.sum() and pairs.different.sum():
        ways = [first, *(one for one in shown[-1:] if one is not first)]
        found = {label[id(one)]: scorer.verification(one.query, one.gallery, one.metric) for one in ways}
        if pairs.accepted is not None:
            rates = pairs.accepted[1] / pairs.different.sum(), pairs.accepted[0] / pairs.same.sum()
            point = (*rates, f"calibrated threshold of the image model's cosine: FPR {rates[0]:.2g}, TPR {rates[1]:.1%}")
        curves.append(("Precision and recall", _safe(plots.precision_recall(found, f"{mark}p"))))
        curves.append(("ROC", _safe(plots.roc(found, point, f"{mark}r"))))
    curves.append(("One identity and two", _safe(plots.histogram(pairs, threshold, f"{mark}d"))))
    by_camera, note = measures.by_camera(target, first)
    return {
        "curves": curves,
        "verifier": "" if verifier is None else verifier.sentence(),
        "cameras": pairs.cameras,
        "by_camera": _matrix(by_camera),
        "by_camera_note": note,
        "by_matches": measures.by_matches(first.result.ap, measures.matches(data, scorer)),
        "by_size": measures.by_size(first.result.ap, measures.image_sizes(data.query.paths)) if data.query.paths else [],
        "first": label[id(first)],
    }


def _extras(payload: dict[str, Any]) -> dict[str, Any]:
    """What the script's data say to the page itself: sentences, and the titles of the maps."""
    return {
        "unseen": payload.get("unseen", []),
        "maps": [one["title"] for one in payload.get("maps", [])],
        "overlays": [(one["title"], one["about"], len(one["query"])) for one in payload.get("overlays", [])],
    }


def _pair(mark: str, pair: Pair) -> dict[str, Any]:
    """What the page says of two runs on the same queries."""
    return {
        "id": mark,
        "name": f"{pair.first.name} → {pair.other.name}" + (f" · {pair.target}" if len(pair.other.targets) > 1 else ""),
        "first": pair.first.name,
        "other": pair.other.name,
        "target": pair.target,
        "lines": [line for line in pair.lines if line.pairs is not None],
    }


def _matrix(cells: list[tuple[str, str, int, float]]) -> dict[str, Any]:
    """Cells by query and gallery camera as a table: its columns, and rows of (queries, mAP), ``None`` without any."""
    columns = list(dict.fromkeys(other for _, other, _, _ in cells))
    found = {(own, other): (count, value) for own, other, count, value in cells}
    rows = sorted({own for own, _, _, _ in cells}, key=lambda name: (not name.isdigit(), name.zfill(9)))
    return {"columns": columns, "rows": [(own, [found.get((own, other)) for other in columns]) for own in rows]}
