"""The embedded person data set: rendered by the package, deterministic by seed, in the layout of Market-1501.

``ensure_embedded("embedded_persons", root)`` writes it on first use and returns its folder.
"""

from __future__ import annotations

from .dataset import (
    GENERATOR_VERSION,
    SPECS,
    EmbeddedPersonsSpec,
    ensure_embedded,
    ensure_embedded_persons,
    plan_embedded_persons,
)
from .render import render_person
from .sheet import contact_sheet
from .traits import CAMERAS, Camera, Identity, Shot, sample_identity, sample_shot

__all__ = [
    "CAMERAS",
    "GENERATOR_VERSION",
    "SPECS",
    "Camera",
    "EmbeddedPersonsSpec",
    "Identity",
    "Shot",
    "contact_sheet",
    "ensure_embedded",
    "ensure_embedded_persons",
    "plan_embedded_persons",
    "render_person",
    "sample_identity",
    "sample_shot",
]
