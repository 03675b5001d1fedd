"""Reading torchreid's checkpoints and plain weight files without running code out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..backbones.files import read_weight_file
from ..backbones.weights import best_fit, load_into, state_dicts
from ..collective import bare_model
from ..errors import UserError


def load_host_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of torchreid's, or a file that holds a state dict alone.

    torchreid's own loader fails on its own checkpoints since torch 2.6 (``weights_only`` does not know the numpy scalar
    that they hold). Here numbers of numpy are read, and objects of other classes are passed over, so that a file cannot run
    code.

    Args:
        path: Local file.

    Returns:
        A dict with ``state_dict`` (names without ``module.``, tensors on the CPU) and whatever else the file holds:
        ``epoch``, ``rank1``, ``optimizer``, ``scheduler``.

    Raises:
        UserError: The file is missing, damaged, or no checkpoint.
    """
    file = read_weight_file(path)
    found = state_dicts(file.content)
    if not found:
        raise UserError(f"'{path}' holds no state dict (names and tensors), so it is no checkpoint of torchreid.")
    place, weights = found[0]
    checkpoint = dict(file.content) if place else {}
    checkpoint["state_dict"] = {name.removeprefix("module."): value for name, value in weights.items()}
    return checkpoint


def load_matching_weights(model: nn.Module, path: str | Path) -> tuple[list[str], list[str]]:
    """Load a weight file that fits ``model``; only classifiers of other classes are left out.

    Args:
        model: The model; changed in place.
        path: See :func:`load_host_checkpoint`.

    Returns:
        The names of the tensors that were loaded, and of those in the file that were skipped.

    Raises:
        UserError: The file cannot be read, or does not fit.
    """
    file, label = read_weight_file(path), f"weight file '{path}'"
    bare = bare_model(model)
    _, given = best_fit(bare, file, label=label)
    report = load_into(model, file, label=label)
    loaded = set(report.loaded)
    names = [name.removeprefix(report.prefix) for name in given]
    return report.loaded, [name for name in names if name not in loaded]
