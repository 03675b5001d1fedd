"""Reading torchreid's checkpoints and plain weight files without running code out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UserError


def _numpy_globals() -> list[Any]:
    """Return what a pickled numpy scalar refers to, under the names of numpy 1 and 2; torchreid stores ``rank1`` as one."""
    scalar = np.float32(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    return [np.dtype, *dtypes, *((scalar, name) for name in names)]


def load_host_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of torchreid's, or a file that holds a state dict alone.

    torchreid's own loader fails on its own checkpoints since torch 2.6 (``weights_only`` does not know the numpy scalar
    that they hold). Here that scalar is allowed and nothing else, so that a file cannot run code.

    Args:
        path: Local file.

    Returns:
        A dict with ``state_dict`` (names without ``module.``, tensors on the CPU) and whatever else the file holds:
        ``epoch``, ``rank1``, ``optimizer``, ``scheduler``.

    Raises:
        UserError: The file is missing, damaged, or no checkpoint.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist.")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except UnicodeDecodeError:  # written by Python 2
                content = torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")
    except Exception as error:  # unpickling a damaged or foreign file raises all kinds of exceptions
        reason = str(error).strip().split("\n")[0].split(". ")[0][:160].rstrip(" .") or type(error).__name__
        raise UserError(f"'{path}' cannot be loaded as a checkpoint of torchreid or a state dict ({reason}).") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}, not a checkpoint of torchreid or a state dict.")
    checkpoint = dict(content) if isinstance(content.get("state_dict"), dict) else {"state_dict": content}
    weights = checkpoint["state_dict"]
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"'{path}' holds no state dict (names and tensors), so it is no checkpoint of torchreid.")
    checkpoint["state_dict"] = {name.removeprefix("module."): value for name, value in weights.items()}
    return checkpoint


def load_matching_weights(model: nn.Module, path: str | Path) -> tuple[list[str], list[str]]:
    """Load the layers of a checkpoint that fit ``model`` by name and shape.

    Args:
        model: The model; changed in place.
        path: See :func:`load_host_checkpoint`.

    Returns:
        The names of the tensors that were loaded, and of those in the file that were skipped.

    Raises:
        UserError: The file cannot be read, or nothing in it fits.
    """
    weights = load_host_checkpoint(path)["state_dict"]
    bare = model.module if isinstance(model, nn.DataParallel) else model
    own = bare.state_dict()
    loaded = [name for name, value in weights.items() if name in own and own[name].shape == value.shape]
    skipped = [name for name in weights if name not in set(loaded)]
    if not loaded:
        raise UserError(
            f"checkpoint '{path}' is one of another model: none of its {len(weights)} layers fits {type(bare).__name__} "
            "by name and shape."
        )
    bare.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    return loaded, skipped
