"""What may change when a run goes on: keys, epochs, and what becomes of a run that is finished."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..config.defaults import _flat, get_default_config
from ..errors import UserError
from ..methods import ResumeKeys, methods
from ..reading import read_text

MACHINE = (
    "use_gpu",
    "data.root",
    "data.save_dir",
    "data.workers",
    "data.sample_seeds",
    "data.download",
    "data.check_images",
    "data.check_leakage",
    "train.print_freq",
    "train.checkpoint_freq",
    "train.loggers",
    "train.compile",
    "train.channels_last",
    "train.checkpointing",
    "multimodal.missing",
    "model.resume",
)
"""Keys that say where and how a run is computed. They may change."""

TESTING = (
    "data.targets",
    "test.*",
    "cuhk03.use_metric_cuhk03",
    "market1501.use_500k_distractors",
    "multimodal.test",
)
"""Keys of validating and testing. They may change, and hold from then on."""

START = ("model.pretrained", "model.load_weights", "backbone.weights")
"""Where the first weights came from. A run that goes on has its own: these may be left out, but not name others."""

LATER = ("train.stages",)
"""Keys that stage 1 does not read: they may change until a later stage has begun."""

TRAINING = (
    "train.*",
    "loss.*",
    "sampler.*",
    "sgd.*",
    "rmsprop.*",
    "adam.*",
    "data.transforms",
    "data.k_tfm",
    "data.load_train_targets",
    "vit.drop_path",
)
"""Keys that a test of trained weights does not read (``train.stages`` is one that it does)."""


@lru_cache(maxsize=1)
def resume_keys() -> ResumeKeys:
    """Return the rules of all keys, those of the methods included."""
    own = [method.resume for method in methods()]

    def joined(name: str, house: tuple[str, ...]) -> tuple[str, ...]:
        return (*house, *(key for keys in own for key in getattr(keys, name)))

    epochs = {"image": "train.max_epoch"}
    for keys in own:
        epochs.update(keys.epochs)
    return ResumeKeys(
        machine=joined("machine", MACHINE),
        testing=joined("testing", TESTING),
        start=joined("start", START),
        later=joined("later", LATER),
        training=joined("training", TRAINING),
        epochs=epochs,
    )


def epochs_key(kind: str) -> str:
    """Return the key of a stage's number of epochs. It may become more, and fewer down to those that are done.

    Args:
        kind: Of the stage's checkpoints.
    """
    return resume_keys().epochs[kind]


def other_stages(kind: str) -> tuple[str, ...]:
    """Return the keys that a stage does not read: those of the stages behind it, and the epochs of those before it.

    Args:
        kind: Of the stage's checkpoints; methods' stages follow each other in the order of the methods.
    """
    before, behind, found = ["train.max_epoch"], list(LATER), kind == "image"
    for method in methods():
        if found:
            behind += method.resume.later
        elif kind in method.resume.epochs:
            found = True
        else:
            before += method.resume.epochs.values()
    return (*behind, *(before if kind != "image" else ()))


def read_behind_first_stage(keys: Iterable[str]) -> bool:
    """Whether stage 1 reads none of some keys, so that runs which differ in them can share it."""
    return all(_matches(key, other_stages("image")) for key in keys)


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(key == pattern or (pattern.endswith("*") and key.startswith(pattern[:-1])) for pattern in patterns)


def flat_values(text: str) -> dict[str, Any]:
    """Return the values of all keys of this version from a configuration that a run wrote.

    Keys that were not there yet have their defaults, keys that are not there any more are left out.
    """
    values = _flat(get_default_config())
    found = yaml.safe_load(text)
    if isinstance(found, dict):
        old = _flatten(found)
        values.update({key: old[key] for key in values if key in old})
    return values


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def changed_keys(text: str, cfg: Any) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ between a run's configuration and ``cfg``: (old, new)."""
    old, new = flat_values(text), _flat(cfg)
    return {key: (old[key], new[key]) for key in new if old[key] != new[key]}


def check_keys(state: dict[str, Any], cfg: Any, path: Path) -> None:
    """Refuse to go on from a checkpoint with keys that may not change.

    Args:
        state: The checkpoint; it holds its configuration.
        cfg: The configuration to go on with.
        path: The checkpoint's file, for the sentence.

    Raises:
        UserError: The keys with their old and new values, and the way out.
    """
    epochs, keys = epochs_key(state["kind"]), resume_keys()
    allowed = (*keys.machine, *keys.testing, *other_stages(state["kind"]))
    refused = []
    for key, (old, new) in changed_keys(state["config"], cfg).items():
        if key == epochs or _matches(key, allowed) or (key in keys.start and not new):
            continue
        refused.append(f"'{key}' was {_said(old)} and is {_said(new)}")
    if refused:
        more = f", and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"'{path}' is of a run with other keys, which cannot change on the way: {', '.join(refused[:3])}{more}; put the "
            "old values back to go on, or train anew in another folder by 'data.save_dir FOLDER'."
        )
    done, wanted = int(state["epoch"]), int(_flat(cfg)[epochs])
    if wanted < done:
        raise UserError(
            f"'{path}' has {done} epochs behind it, more than '{epochs} {wanted}'; set it to {done} or more to go on, test "
            "what is there by --eval-only, or train anew in another folder by 'data.save_dir FOLDER'."
        )


def note_changes(state: dict[str, Any], cfg: Any) -> None:
    """Say which keys are others than those of a checkpoint, but for the places of files and keys of other stages."""
    quiet = ("use_gpu", "data.save_dir", "model.resume", *other_stages(state["kind"]))
    said = [
        f"{key} {_said(new)} (was {_said(old)})"
        for key, (old, new) in changed_keys(state["config"], cfg).items()
        if not _matches(key, quiet)
    ]
    if said:
        print(f"going on with other keys: {', '.join(said)}")


def _said(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def check_data(state: dict[str, Any], label_map: dict[Any, Any], num_classes: int, root: str, path: Path) -> None:
    """Refuse to go on with other training data.

    Raises:
        UserError: ``data.root`` holds other training identities than those of the checkpoint.
    """
    if int(state["num_classes"]) != num_classes or dict(state["label_map"]) != dict(label_map):
        raise UserError(
            f"'{path}' was trained on other identities ({state['num_classes']}) than 'data.root {root}' holds "
            f"({num_classes}); name the folder with the same data, or train anew by another 'data.save_dir FOLDER'."
        )


def check_second_stage(state: dict[str, Any], cfg: Any, second: Path) -> None:
    """Refuse to train stage 1 longer under a stage 2 that has begun on it.

    Args:
        state: The checkpoint of stage 1.
        cfg: The configuration to go on with.
        second: The newest checkpoint of a later stage, which may be missing.

    Raises:
        UserError: It is there.
    """
    if cfg.train.max_epoch > int(state["epoch"]) and second.is_file():
        stage = second.parent.name.removeprefix("stage")
        raise UserError(
            f"'train.max_epoch {cfg.train.max_epoch}' would train stage 1 on from epoch {state['epoch']}, but stage {stage} "
            f"('{second.parent}') was trained on it as it is; move that folder away to train it anew, or set "
            f"'train.max_epoch {state['epoch']}'."
        )


# --- schedules --------------------------------------------------------------------------------------------------------
def restore_schedule(optimizer: Optimizer, scheduler: Any, state: dict[str, Any], *, rebuild: bool) -> None:
    """Put optimiser and schedule where a checkpoint left them.

    Args:
        optimizer: As it was built.
        scheduler: Its schedule as it was built, or ``None``.
        state: The checkpoint.
        rebuild: The stage has another number of epochs than the checkpoint's: the learning rates are those that a run of
            that many epochs has from here on, to the last digit.
    """
    if scheduler is None or state["scheduler"] is None or not rebuild:
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None and state["scheduler"] is not None:
            scheduler.load_state_dict(state["scheduler"])
        return
    steps = int(state["scheduler"]["last_epoch"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimiser's own steps are in the checkpoint
        if isinstance(scheduler, LambdaLR):  # in closed form
            if steps:
                scheduler.last_epoch = steps - 1
                scheduler.step()
        else:
            for _ in range(steps):  # the host's cosine is a recursion
                scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


# --- finished runs ----------------------------------------------------------------------------------------------------
def other_tests(folder: Path, cfg: Any) -> Path:
    """Return where the results of a test go: the run's folder, or, where the test has other keys than the run, its own.

    So what a finished run's ``metrics.json`` says always belongs to its ``config.yml``.

    Args:
        folder: The run's folder.
        cfg: The configuration of the test.
    """
    text = _config_text(folder)
    if text is None or not (folder / "metrics.json").is_file():
        return folder
    keys = resume_keys()
    changed = {
        key: new
        for key, (_, new) in changed_keys(text, cfg).items()
        if not _matches(key, (*keys.machine, "model.pretrained"))
        and not (key.endswith(".train.eval_freq") and _matches(key, keys.testing))
        and (key == "train.stages" or _matches(key, keys.testing) or not _matches(key, keys.training))
    }
    for key in ("test.eval_freq", "test.start_eval", "test.evaluate"):
        changed.pop(key, None)
    if not changed:
        return folder
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return folder / "tests" / digest


def _config_text(folder: Path) -> str | None:
    try:
        return read_text(folder / "config.yml")
    except UserError:
        return None


def finished_metrics(folder: Path, states: dict[int, dict[str, Any]], cfg: Any) -> dict[str, Any] | None:
    """Return the metrics of a run that has nothing left to train or to test, else ``None``.

    Args:
        folder: The run's folder.
        states: The newest checkpoint of every stage that is to be trained.
        cfg: The configuration.
    """
    try:
        metrics = json.loads(read_text(folder / "metrics.json"))
        history = {stage: metrics["history"][f"stage{stage}"] for stage in states}
        assert isinstance(metrics["rows"], list) and metrics["rows"]
    except (UserError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return None
    for stage, state in states.items():
        epochs = _flat(cfg)[epochs_key(state["kind"])]
        if int(state["epoch"]) != epochs or len(history[stage]) != epochs:
            return None
    return metrics
