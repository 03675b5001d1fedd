"""Checkpoints: written atomically, loadable without executing code, complete enough to go on to the last digit."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.opened import weights_hash as fingerprint
from ..backbones.weights import compare_names
from ..errors import UserError
from ..files import atomic_file, write_figure, write_json, write_text
from ..seal import damage, seal
from . import packing  # noqa: F401 (pruned checkpoints name what unpacks their tensors)
from .distributed import main, wait_for_all

FORMAT = 1


def write_tensors(path: Path, value: Any) -> None:
    """Write ``value`` by ``torch.save``, atomically and with a checksum (:mod:`relreid_plugin.seal`).

    Raises:
        WriteError: It cannot be written; the file that was there before still is.
    """
    with atomic_file(path) as temporary:
        torch.save(value, temporary)
        seal(temporary)


def read_tensors(path: Path) -> Any:
    """Read a file of ``torch.save`` onto the CPU without executing anything.

    Raises:
        ValueError: Its bytes are not those that were written.
        Exception: Whatever ``torch.load`` raises for a foreign file.
    """
    reason = damage(path)
    if reason:
        raise ValueError(reason)
    return torch.load(path, map_location="cpu", weights_only=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, with a checksum; of several processes the first one does, and all wait for it."""
    if main():
        write_tensors(path, {"format": FORMAT, **state})
    wait_for_all()


def _other_checkpoint(path: Path) -> str:
    """Half a sentence that names a whole checkpoint beside a damaged one, else the way without."""
    others = {"last.pth.tar": "best.pth.tar", "best.pth.tar": "last.pth.tar"}
    other = path.with_name(others.get(path.name, path.name))
    if other == path or not other.is_file() or damage(other):
        return "put back a copy of it, or train this stage again."
    if path.name == "best.pth.tar":
        return f"put back a copy of it, or take it away: then '{other}', which is whole, is used."
    return f"put back a copy of it, or put '{other}', which is whole, in its place."


def load(path: Path, *, kind: str) -> dict[str, Any]:
    """Read a checkpoint that this plug-in wrote.

    Args:
        path: The file.
        kind: ``image`` or ``relation``.

    Raises:
        UserError: Missing, damaged, foreign, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist.")
    try:
        reason = damage(path)
        if reason:
            raise UserError(f"checkpoint '{path}' cannot be read, it is damaged ({reason}): {_other_checkpoint(path)}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"checkpoint '{path}' cannot be read ({type(error).__name__}); it is damaged or no checkpoint: "
            f"{_other_checkpoint(path)}"
        ) from None
    if not isinstance(state, dict) or not {"format", "kind", "state_dict"} <= state.keys():
        way = "train the relation encoder by this plug-in" if kind == "relation" else "give weights by 'model.load_weights'"
        raise UserError(f"checkpoint '{path}' was not written by this plug-in; {way}.")
    if state["format"] != FORMAT:
        raise UserError(
            f"checkpoint '{path}' has format {state['format']}, this version of the plug-in reads format {FORMAT}."
        )
    if state["kind"] != kind:
        raise UserError(f"checkpoint '{path}' holds the {state['kind']} model, but the {kind} model is wanted here.")
    if path.name == "last.pth.tar" and int(state.get("best_epoch") or 0) not in (0, int(state.get("epoch") or 0)):
        _say_lost_best(path, int(state["epoch"]), int(state["best_epoch"]))
    return state


@functools.lru_cache(maxsize=64)
def _say_lost_best(last: Path, epoch: int, best_epoch: int) -> None:
    """Say once that the chosen checkpoint of a stage has gone: its features and scores are those of another epoch."""
    best = last.with_name("best.pth.tar")
    if not best.is_file():
        print(
            f"note: '{best}' of epoch {best_epoch}, which validation chose, is not there; '{last}' of epoch {epoch} is used "
            "instead: put back a copy for the scores that the run has."
        )


def load_weights(model: nn.Module, state: dict[str, Tensor], *, path: Path | str) -> None:
    """Load a complete state dict.

    Raises:
        UserError: It belongs to another model; the first difference is named.
    """
    own = model.state_dict()
    missing, extra, wrong = compare_names(own, state)
    if missing or extra or wrong:
        if wrong:
            key = wrong[0]
            detail = f"'{key}' is {tuple(state[key].shape)} there and {tuple(own[key].shape)} here"
        else:
            detail = f"'{missing[0]}' is missing there" if missing else f"'{extra[0]}' is unknown here"
        raise UserError(
            f"checkpoint '{path}' belongs to another model ({detail}; layers that differ: {len(missing + extra + wrong)}); "
            "use the configuration it was trained with, or another 'data.save_dir'."
        )
    model.load_state_dict(state)


def rng_state() -> dict[str, Any]:
    """Return the state of all random number generators in a form that needs no pickled code."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the host draws from the global generator)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave all random number generators as they were, so that a test or an extraction does not change the training."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def tested(folder: Path) -> Path:
    """Return the checkpoint in a stage's folder that is tested: the best validated one, else the last."""
    best = folder / "best.pth.tar"
    return best if best.is_file() else folder / "last.pth.tar"


__all__ = [
    "FORMAT",
    "atomic_file",
    "fingerprint",
    "load",
    "load_weights",
    "preserved_rng",
    "rng_state",
    "save",
    "read_tensors",
    "set_rng_state",
    "tested",
    "write_figure",
    "write_json",
    "write_tensors",
    "write_text",
]
