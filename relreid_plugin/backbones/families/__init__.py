"""Checkpoints as the field publishes them: the family is told by the names of the tensors, and the network is built for it.

A family is a :class:`Family`: how its files are told, and what opens them. The names in a file are mapped onto the network
of timm or torchvision that computes the same, completely or not at all (:mod:`relreid_plugin.backbones.weights`). Depth,
width, grid of patches and what else the shapes tell is taken from the file; what they do not tell is taken as the authors'
released configurations have it, is said in a note, and can be given by ``options``.
"""

from __future__ import annotations

from typing import Any

from ...errors import UserError, did_you_mean
from ..describe import looks_like
from ..files import WeightFile, read_weight_file
from ..opened import Opened
from . import clipreid, fastreid, solider, strong, transreid
from .common import Family, plain_states

FAMILIES: tuple[Family, ...] = (
    clipreid.FAMILY,
    fastreid.FAMILY,
    solider.FAMILY,
    transreid.FAMILY,
    strong.FAMILY,
)


def find_family(file: WeightFile) -> tuple[Family, dict[str, Any]] | None:
    """Return the family that a file belongs to and the state dict in it, None where none is known.

    Args:
        file: The file.
    """
    for weights in plain_states(file.content):
        for family in FAMILIES:
            if family.detect(weights):
                return family, weights
    return None


def open_family(file: WeightFile, request: Any) -> Opened | None:
    """Open a file of a known family; None where none is known.

    Args:
        file: The file.
        request: A :class:`~relreid_plugin.features.opening.Request`.

    Raises:
        UserError: An option that the family does not take, or weights that do not fill its network.
    """
    found = find_family(file)
    if found is None:
        return None
    family, weights = found
    request.refuse(
        f"'{file.path}', a checkpoint of {family.title},", but=("size", "mean", "std", "interpolation", "options")
    )
    for name in request.options:
        if name not in family.options:
            valid = f"it takes {', '.join(family.options)}" if family.options else "it takes none"
            near = did_you_mean(name, family.options) if family.options else "."
            raise UserError(f"option '{name}' is none of a checkpoint of {family.title} ({valid}){near}")
    return family.open(file, weights, request)


def unknown_file(file: WeightFile) -> str:
    """Return the sentence for a file that no family and no network is known for."""
    states = plain_states(file.content)
    names = list(states[0]) if states else []
    what = looks_like(file.content, names)
    looks = (
        f"it looks like {what}" if what else f"its {len(names)} tensors begin with '{names[0]}'" if names else "it is empty"
    )
    known = "; ".join(family.title for family in FAMILIES)
    return (
        f"'{file.path}' is of no family that is known by its names: {looks}; name its network as 'host:NAME', 'timm:NAME' "
        f"or 'torchvision:NAME' and this file by 'weights' (known by their names: torchreid's models; {known})."
    )


__all__ = ["FAMILIES", "Family", "find_family", "open_family", "read_weight_file", "unknown_file"]
