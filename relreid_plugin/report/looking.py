"""What methods find by passes through the networks of runs: where they look, and what is measured when it is asked for."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from ..errors import UserError
from ..methods import Overlay, methods, takes_several
from .scored import Subject, Target

SHOWN = 12
"""Queries that are overlaid, the worst first."""

Looked = list[tuple[Overlay, list[int]]]
"""Overlays of a test set, each with the rows of its queries."""


def look_into(
    views: list[tuple[Subject, Target]], payloads: list[dict[str, Any]], *, most: int = SHOWN, measure: bool = False
) -> list[Looked]:
    """Return the overlays of every view; put what is measured into the subjects' panels, and what fails into ``unseen``.

    Of several runs on one test set, all show the queries that are the worst of the first one.

    Args:
        views: Runs and test sets.
        payloads: Of the page's script, one for each.
        most: Queries that are overlaid; 0: none.
        measure: Whether to measure what takes many passes.
    """
    found = [look for method in methods() if (look := method.looks()) is not None]
    wanting = [look for look in found if most and any(one.cfg is not None and look.wanted(one.cfg) for one, _ in views)]
    chosen: dict[str, list[str]] = {}
    out: list[Looked] = []
    for (subject, target), payload in zip(views, payloads):
        own: Looked = []
        out.append(own)
        if not payload or subject.opening is None or not _single(subject.cfg):
            continue
        paths = chosen.setdefault(target.name, [payload["path"][row] for row in payload["order"][:most]])
        place = {path: row for row, path in enumerate(payload["path"])}
        rows = [place[path] for path in paths if path in place]
        for look in wanting if rows else []:
            with _said(payload, "where the network looks"):
                own += [(one, rows) for one in look.overlays(subject.opening.run, target.name, target.data, rows)]
        for look in found if measure else []:
            with _said(payload, "what is measured"):
                subject.panels += look.measured(subject.opening.run, target.name, target.data)
    return out


def _single(cfg: Any) -> bool:
    """Whether a run's samples are single images."""
    return cfg is not None and cfg.data.type == "image" and not takes_several(cfg)


@contextlib.contextmanager
def _said(payload: dict[str, Any], what: str) -> Any:
    """What fails in the block is a sentence of the page; what it prints is not shown."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except UserError as error:
        payload["unseen"].append(f"{what}: {error}")


__all__ = ["SHOWN", "Looked", "look_into"]
