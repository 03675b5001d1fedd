"""Checks of a whole configuration: every value in its range, and values that do not go together."""

from __future__ import annotations

from typing import Any

from ..data.names import name_pattern
from ..data.ranges import check_range, modality_ranges
from ..errors import UserError, did_you_mean, shown
from .merging import _flat
from .ranges import IMAGE_MODELS, MULTIMODAL_MODELS, check_ranges


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
    _validate_graft(cfg)
    _validate_rib(cfg)
    if cfg.relation.search.index in ("ivf", "hnsw") and cfg.relation.search.backend == "torch":
        raise UserError(
            f"'relation.search.index {cfg.relation.search.index}' needs faiss, but 'relation.search.backend' is 'torch'."
        )
    if cfg.relation.recipe != "none" and cfg.relation.neighbours == "affinity":
        raise UserError(
            "'relation.recipe held-out' counts neighbours by camera; it does not work with 'relation.neighbours affinity'."
        )
    if cfg.test.diffusion.truncate and cfg.test.rival_protocol == "transductive":
        raise UserError(
            f"'test.diffusion.truncate {cfg.test.diffusion.truncate}' keeps a part of the gallery's own graph, which "
            "'test.rival_protocol transductive' has not; set it to 0, or the protocol to 'inductive'."
        )
    low, high = cfg.relation.train.spread
    if low > high:
        raise UserError(f"key 'relation.train.spread' must be two rising numbers of at least 1, got [{low}, {high}].")
    video = cfg.video
    if cfg.data.type == "video" and video.sample_method == "all" and (cfg.train.batch_size, cfg.test.batch_size) != (1, 1):
        raise UserError(
            "'video.sample_method all' takes tracklets whole, which have different lengths; set 'train.batch_size 1' and "
            "'test.batch_size 1', or sample 'evenly'."
        )


def _validate_stages(cfg: Any) -> None:
    if sorted(set(cfg.train.stages)) not in ([1], [2], [1, 2]):
        raise UserError(f"key 'train.stages' must be [1], [2] or [1, 2], got {cfg.train.stages}.")
    if 2 in cfg.train.stages and cfg.relation.attention == "none" and cfg.model.name != "graft":
        raise UserError(
            "'train.stages' asks for stage 2, but 'relation.attention' is 'none'; choose nformer, malaa or magformer."
        )

    if cfg.train.start_epoch >= max(1, cfg.train.max_epoch):
        raise UserError(
            f"key 'train.start_epoch' is {cfg.train.start_epoch}, but training counts from 0 to 'train.max_epoch' "
            f"({cfg.train.max_epoch}); to go on with a run take --resume and leave the key at 0."
        )


def _validate_optimisation(cfg: Any) -> None:
    train, sgd = cfg.train, cfg.sgd
    for where, scheduler, stepsize in (
        ("train", train.lr_scheduler, train.stepsize),
        ("relation.train", cfg.relation.train.lr_scheduler, cfg.relation.train.stepsize),
    ):
        if scheduler in ("single_step", "multi_step") and not stepsize:
            raise UserError(
                f"'{where}.lr_scheduler {scheduler}' needs epochs in '{where}.stepsize', which is empty; 'none' keeps the "
                "learning rate."
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
        _require_weight(cfg.loss.triplet, "loss.triplet", ("weight_t", "weight_x"))
    if cfg.loss.name == "composite":
        _require_weight(cfg.loss.composite, "loss.composite", ("ce", "triplet", "center"))
    if cfg.relation.attention != "none":
        _require_weight(cfg.relation.loss, "relation.loss", ("ce", "triplet", "center"))
    _require_weight(cfg.graft.finetune, "graft.finetune", ("ce", "triplet", "center"))
    if train.precision != "float32" and cfg.loss.name != "composite":
        raise UserError(f"'train.precision {train.precision}' belongs to 'loss.name composite', not to '{cfg.loss.name}'.")


def _require_weight(node: Any, where: str, names: tuple[str, ...]) -> None:
    """Raise when all weights of a loss are 0, so that nothing would train."""
    if not any(node[name] for name in names):
        raise UserError(f"weights of '{where}' ({', '.join(names)}) are all 0; one must be above 0.")


def _validate_rib(cfg: Any) -> None:
    rib, name = cfg.rib, cfg.model.name
    if rib.attention != "none" and name not in IMAGE_MODELS:
        raise UserError(
            f"'rib.attention {rib.attention}' works with 'model.name' {', '.join(IMAGE_MODELS)}, not with '{name}'; for a "
            f"network of the host take 'model.name bnneck_baseline' and 'backbone.name host:{name}'."
        )
    if rib.attention in ("se", "cbam") and name != "bnneck_baseline":
        raise UserError(f"'rib.attention {rib.attention}' is for CNNs ('model.name bnneck_baseline'); '{name}' takes dcs.")
    if rib.places and rib.attention == "none":
        raise UserError("'rib.places' says where attention goes, but 'rib.attention' is 'none'; choose dcs, se or cbam.")
    if len(set(rib.places)) < len(rib.places):
        raise UserError(f"key 'rib.places' names a layer twice: {shown(rib.places)}.")
    if (rib.ibb.eta > 0 or rib.ibb.measure) and cfg.loss.name != "composite":
        raise UserError(
            f"'rib.ibb' belongs to 'loss.name composite', not to '{cfg.loss.name}'; set 'loss.name composite', or "
            "'rib.ibb.eta 0' and 'rib.ibb.measure False'."
        )
    if name == "transreid" and cfg.loss.name != "composite":
        raise UserError(f"'model.name transreid' trains with 'loss.name composite', not with '{cfg.loss.name}'.")


def _validate_modalities(cfg: Any) -> None:
    multimodal = cfg.multimodal
    names = multimodal.modalities
    modality_ranges(names, multimodal.pixel_range)
    if cfg.model.name in MULTIMODAL_MODELS and cfg.data.pixel_range:
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


def _validate_graft(cfg: Any) -> None:
    graft = cfg.graft
    _validate_modalities(cfg)
    if cfg.model.name != "graft":
        if cfg.train.lr_scheduler == "sqrt":
            raise UserError("'train.lr_scheduler sqrt' is stepped per batch and belongs to 'model.name graft'.")
        return
    if cfg.loss.name != "composite":
        raise UserError(f"'model.name graft' trains with 'loss.name composite', not with '{cfg.loss.name}'.")
    if cfg.relation.attention != "none":
        raise UserError("'model.name graft' has two stages of its own; set 'relation.attention none'.")
    if cfg.rib.attention != "none" or cfg.rib.ibb.eta > 0 or cfg.rib.ibb.measure:
        raise UserError("keys of 'rib' do not work with 'model.name graft'; set 'rib.attention none' and 'rib.ibb.eta 0'.")
    if graft.sampling == "pk" and cfg.sampler.train_sampler != "RandomIdentitySampler":
        raise UserError("'graft.sampling pk' needs 'sampler.train_sampler RandomIdentitySampler'.")
    if graft.sampling == "triplets" and cfg.train.batch_size % 3:
        raise UserError(
            f"'graft.sampling triplets' makes batches of triplets; 'train.batch_size {cfg.train.batch_size}' counts their "
            "images and must be a multiple of 3."
        )


def schedule_notes(cfg: Any) -> list[str]:
    """Return what in the schedules of a valid configuration is allowed, but probably not meant.

    Args:
        cfg: A validated configuration.
    """
    train, relation = cfg.train, cfg.relation.train
    notes = _schedule_notes("train", train, train.lr_scheduler) if 1 in train.stages else []
    if 2 in train.stages and cfg.relation.attention != "none":
        notes += _schedule_notes("relation.train", relation, relation.lr_scheduler)
    if 1 in train.stages and 0 < train.max_epoch <= train.fixbase_epoch:
        notes.append(
            f"'train.fixbase_epoch {train.fixbase_epoch}' is no less than 'train.max_epoch {train.max_epoch}': nothing but "
            f"{', '.join(train.open_layers)} ever trains."
        )
    return notes


def _schedule_notes(where: str, node: Any, scheduler: str) -> list[str]:
    notes, last = [], node.max_epoch
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
