"""Checks of a whole configuration: every value in its range, and values that do not go together."""

from __future__ import annotations

from typing import Any

from ..data.names import name_pattern
from ..data.ranges import check_range, modality_ranges
from ..errors import UserError, did_you_mean, shown
from ..methods import last_stage, methods, takes_several
from .merging import _flat
from .ranges import check_ranges


def validate(cfg: Any) -> None:
    """Check values that a type cannot: choices, ranges, lengths (:mod:`relreid_plugin.config.ranges`) and combinations.

    Args:
        cfg: A node of :func:`~relreid_plugin.config.defaults.get_default_config`.

    Raises:
        UserError: One sentence with the key, its value and the valid ones.
    """
    check_ranges(_flat(cfg))
    name_pattern(cfg.data.name_pattern)
    check_range("data.pixel_range", cfg.data.pixel_range)
    _validate_stages(cfg)
    _validate_optimisation(cfg)
    _validate_modalities(cfg)
    for method in methods():
        method.validate(cfg)
    if cfg.test.diffusion.truncate and cfg.test.rival_protocol == "transductive":
        raise UserError(
            f"'test.diffusion.truncate {cfg.test.diffusion.truncate}' keeps a part of the gallery's own graph, which "
            "'test.rival_protocol transductive' has not; set it to 0, or the protocol to 'inductive'."
        )
    video = cfg.video
    if cfg.data.type == "video" and video.sample_method == "all" and (cfg.train.batch_size, cfg.test.batch_size) != (1, 1):
        raise UserError(
            "'video.sample_method all' takes tracklets whole, which have different lengths; set 'train.batch_size 1' and "
            "'test.batch_size 1', or sample 'evenly'."
        )


def _validate_stages(cfg: Any) -> None:
    last = last_stage(cfg)
    for stage in cfg.train.stages:
        if stage > last:
            hints = [hint for method in methods() if (hint := method.stage_hint(cfg))]
            why = " and ".join(hints) or "the methods that this configuration names have no more"
            raise UserError(f"'train.stages' asks for stage {stage}, but there are {last}: {why}.")
    if cfg.train.start_epoch >= max(1, cfg.train.max_epoch):
        raise UserError(
            f"key 'train.start_epoch' is {cfg.train.start_epoch}, but training counts from 0 to 'train.max_epoch' "
            f"({cfg.train.max_epoch}); to go on with a run take --resume and leave the key at 0."
        )


def _validate_optimisation(cfg: Any) -> None:
    train, sgd = cfg.train, cfg.sgd
    require_steps("train", train)
    if (train.val_fold + 1) * train.val_fraction > 1 + 1e-9:
        raise UserError(
            f"'train.val_fold {train.val_fold}' is beyond the last share of 'train.val_fraction {train.val_fraction:g}', "
            f"which is {int(1 / train.val_fraction + 1e-9) - 1}."
        )
    if train.optim == "sgd" and sgd.nesterov and (sgd.momentum == 0 or sgd.dampening != 0):
        raise UserError(
            f"'sgd.nesterov True' needs a 'sgd.momentum' above 0 and 'sgd.dampening 0', got {sgd.momentum}, {sgd.dampening}."
        )
    if train.fixbase_epoch > 0 and not train.open_layers:
        raise UserError("'train.fixbase_epoch' trains 'train.open_layers' alone, but that list is empty.")
    if cfg.loss.name == "triplet" and cfg.loss.triplet.weight_x == 0 and train.fixbase_epoch > 0:
        raise UserError(
            "'train.fixbase_epoch' trains the classifier alone, but 'loss.triplet.weight_x' is 0 and gives it no gradient; "
            "set 'train.fixbase_epoch 0' or a weight above 0."
        )
    if cfg.loss.name == "triplet":
        require_weight(cfg.loss.triplet, "loss.triplet", ("weight_t", "weight_x"))
    if cfg.loss.name == "composite":
        require_weight(cfg.loss.composite, "loss.composite", ("ce", "triplet", "center"))


def require_steps(where: str, node: Any) -> None:
    """Raise when a schedule in steps has none."""
    if node.lr_scheduler in ("single_step", "multi_step") and not node.stepsize:
        raise UserError(
            f"'{where}.lr_scheduler {node.lr_scheduler}' needs epochs in '{where}.stepsize', which is empty; 'none' keeps "
            "the learning rate."
        )


def require_weight(node: Any, where: str, names: tuple[str, ...]) -> None:
    """Raise when all weights of a loss are 0, so that nothing would train."""
    if not any(node[name] for name in names):
        raise UserError(f"weights of '{where}' ({', '.join(names)}) are all 0; one must be above 0.")


def _validate_modalities(cfg: Any) -> None:
    multimodal = cfg.multimodal
    names = multimodal.modalities
    modality_ranges(names, multimodal.pixel_range)
    if takes_several(cfg) and cfg.data.pixel_range:
        raise UserError(f"'model.name {cfg.model.name}' reads 'multimodal.pixel_range'; leave 'data.pixel_range' empty.")
    if len(set(names)) < len(names) or any("+" in name for name in names):
        raise UserError(f"key 'multimodal.modalities' must hold 1 to 4 different names without '+', got {shown(names)}.")
    for subset in multimodal.test:
        for name in subset.split("+"):
            if name not in names:
                raise UserError(
                    f"key 'multimodal.test' holds {shown(subset)}, but {shown(name)} is not trained on"
                    f"{did_you_mean(name, names)}"
                )
        if len(set(subset.split("+"))) < len(subset.split("+")):
            raise UserError(f"key 'multimodal.test' holds {shown(subset)}, which names a modality twice.")
    for key in ("mean", "std"):
        rows = multimodal[key]
        if len(rows) not in (1, len(names)):
            raise UserError(
                f"key 'multimodal.{key}' must hold one list of 3 (or 1) numbers, or one per modality ({', '.join(names)}), "
                f"got {shown(rows)}."
            )


def schedule_notes(cfg: Any) -> list[str]:
    """Return what in the schedules of a valid configuration is allowed, but probably not meant.

    Args:
        cfg: A validated configuration.
    """
    train = cfg.train
    notes = notes_of_schedule("train", train) if 1 in train.stages else []
    for method in methods():
        notes += method.schedule_notes(cfg)
    if 1 in train.stages and 0 < train.max_epoch <= train.fixbase_epoch:
        notes.append(
            f"'train.fixbase_epoch {train.fixbase_epoch}' is no less than 'train.max_epoch {train.max_epoch}': nothing but "
            f"{', '.join(train.open_layers)} ever trains."
        )
    return notes


def notes_of_schedule(where: str, node: Any) -> list[str]:
    """The notes on one node of the configuration that holds a schedule."""
    notes, last, scheduler = [], node.max_epoch, node.lr_scheduler
    if last and node.warmup_epochs >= last:
        notes.append(
            f"'{where}.warmup_epochs {node.warmup_epochs}' is no less than '{where}.max_epoch {last}': training ends before "
            f"the learning rate reaches '{where}.lr'."
        )
    if scheduler == "single_step" and len(node.stepsize) > 1:
        notes.append(f"'{where}.lr_scheduler single_step' takes the last number of '{where}.stepsize', {node.stepsize[-1]}.")
    if last and scheduler == "multi_step" and node.stepsize[-1] >= last:
        late = ", ".join(str(step) for step in node.stepsize if step >= last)
        notes.append(
            f"'{where}.stepsize' has {late}, which '{where}.max_epoch {last}' does not reach: the learning rate does not "
            "fall there."
        )
    return notes
