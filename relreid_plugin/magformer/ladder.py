"""Fair ladders from one stage 1: control, rungs and what a user would do instead, over the seeds of stage 2.

A rung is one switch of the configuration (paper Table 1), or the configuration as it stands. The control is the same
configuration with every image alone; image model, control and rungs are tested alone and under every rival of
:mod:`relreid_plugin.metrics.rivals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config.defaults import get_default_config, merge_from_list
from ..engine import checkpoint as ckpt
from ..engine.evaluator import Evaluator, inference_parameters
from ..engine.folder import share_stages
from ..engine.runner import Run, open_run
from ..errors import UserError, did_you_mean
from ..features.sets import TestFeatures
from ..locks import folder_lock
from ..metrics.rivals import rival_named
from .config import stage_number
from .encoder import RelationEncoder
from .fair import CONTROL, IMAGE, FairTable, fair_markdown, judge
from .recipe import fold_episodes, with_recipe
from .stage import METHOD_NAMES, build_encoder, fit_head

OWN = "own"
ALONE = ["relation.k", "1", "relation.camera.other", "0", "relation.camera.same", "0"]
"""What makes the control out of a configuration: every image alone."""

RUNGS: dict[str, tuple[str, list[str]]] = {
    OWN: ("", []),
    "nformer": ("NFormer: LAA + RNS", ["relation.attention", "nformer", "relation.init", "paper"]),
    "malaa": ("MALAA + RNS", ["relation.attention", "malaa", "relation.init", "paper"]),
    "magformer": ("MagFormer: MALAA + RNS + DiffAttn", ["relation.attention", "magformer", "relation.init", "paper"]),
    "affinity": (
        "MagFormer, affinity neighbours (eq. 3)",
        ["relation.attention", "magformer", "relation.init", "paper", "relation.neighbours", "affinity"],
    ),
    "diffusion": (
        "MagFormer, diffusion start (beyond the paper)",
        ["relation.attention", "magformer", "relation.init", "diffusion"],
    ),
}
"""Rung to its title and the overrides that make it; ``own``: the configuration as it stands."""


def default_rungs(cfg: Any) -> list[str]:
    """Return the rungs of a configuration: itself where it has a recipe, else those of the paper."""
    return [OWN] if cfg.relation.recipe != "none" else [rung for rung in RUNGS if rung != OWN]


def run_ladder(
    cfg: Any, *, rungs: Sequence[str], seeds: Sequence[int], rivals: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train stage 1, where there is one, then control and rungs for every seed; what is done is used again.

    Args:
        cfg: A configuration with stage 2; ``data.save_dir`` holds the whole ladder.
        rungs: Keys of :data:`RUNGS`; the control comes with them.
        seeds: Seeds of stage 2. Where nothing is trained (a recipe and no epoch), they draw the held-out identities.
        rivals: Names of the rivals; ``None``: all.

    Returns:
        ``{"rows": […], "verdicts": […], "seeds", "config", "table"}``, the table as Markdown; also written as
        ``ladder.json`` and ``ladder.md``.

    Raises:
        UserError: Unknown rung, or a configuration without stage 2.
    """
    for rung in rungs:
        if rung not in RUNGS:
            raise UserError(f"--rungs: unknown rung '{rung}'{did_you_mean(rung, RUNGS)}")
    for name in rivals or ():
        rival_named(name)
    number = stage_number(cfg)
    if number not in cfg.train.stages:
        raise UserError(
            f"the ladder needs a configuration with its relation stage, {number} ('train.stages [1, {number}]', or "
            f"[{number}] and a frozen model)."
        )
    folder = Path(cfg.data.save_dir)
    with folder_lock(folder):
        return _climb(cfg, folder, rungs, seeds, rivals)


def _image_run(cfg: Any, folder: Path) -> Run:
    """The image model of a ladder, trained or frozen, opened for its features."""
    base = cfg.clone()
    base.data.save_dir = str(folder)
    before = _before(cfg)
    base.train.stages, base.relation = before or [1], get_default_config().relation
    Run(base, stages=before, resume=True).execute()
    return open_run(folder)


def _before(cfg: Any) -> list[int]:
    """The stages in front of the relations that a configuration trains."""
    return [number for number in cfg.train.stages if number < stage_number(cfg)]


def _climb(
    cfg: Any, folder: Path, rungs: Sequence[str], seeds: Sequence[int], rivals: Sequence[str] | None
) -> dict[str, Any]:
    number, image_folder = stage_number(cfg), folder / "ladder" / "image-model"
    network = range(1, number)
    share_stages(folder, image_folder, network)
    image = _image_run(cfg, image_folder)
    tables = {}
    for name in cfg.data.targets:
        data = image.target_features(name)
        tables[name] = FairTable(name, data, image.options(), rivals=rivals)
    selected: dict[str, list[int]] = {}
    for rung in (CONTROL, *rungs):
        title, overrides = ("control: every image alone", ALONE) if rung == CONTROL else RUNGS[rung]
        for seed in seeds:
            part = folder / "ladder" / f"{rung}-seed{seed}"
            share_stages(image_folder, part, network)
            own = cfg.clone()
            keys = ["relation.train.seed", str(seed), "data.save_dir", str(part), "test.rivals", "[]"]
            merge_from_list(own, [*overrides, *keys])
            Run(own, stages=[number], resume=True).execute()
            share_stages(part, image_folder, network)
            run = open_run(part, training=True)
            parameters, encoder = run.parameters, run.refiner()
            selected.setdefault(rung, []).append(run.selected[f"stage{number}"])
            held = _held_out(run, encoder)
            if rung == CONTROL:
                for table in tables.values():
                    plain = table.data
                    table.add(
                        IMAGE,
                        IMAGE,
                        plain.query.features,
                        plain.gallery.features,
                        parameters=parameters,
                        held_out=[pair[0] for pair in held],
                        metric=None,
                    )
            total = parameters + inference_parameters(encoder)
            named = title or METHOD_NAMES[own.relation.attention].removeprefix("+ ") + _what(own)
            shown = named if rung == CONTROL else f"+ {named}"
            for name, table in tables.items():
                evaluator = Evaluator(name, run.target_features(name), options=table.options, parameters=0)
                refined = evaluator.refined_features(encoder, "inductive")
                table.add(rung, shown, *refined, parameters=total, held_out=[pair[1] for pair in held])
                if "transductive" in own.relation.protocols:
                    both = evaluator.refined_features(encoder, "transductive")
                    table.add_transductive(rung, shown, *both, parameters=total)
    return _write(cfg, folder, tables, rungs, seeds, selected)


def _what(cfg: Any) -> str:
    return f" (recipe {cfg.relation.recipe})" if cfg.relation.recipe != "none" else " (as configured)"


def _held_out(run: Run, encoder: RelationEncoder) -> list[tuple[TestFeatures, TestFeatures]]:
    """Held-out test sets, as the image model and as the encoder sees them; none where all identities were trained on.

    With a recipe and nothing trained the training identities take turns, and every turn has a head that is fitted without
    them.
    """
    cfg, held = run.cfg, None
    if cfg.train.val_fraction > 0:
        held = run.features.held_out()
    if held is not None:
        return [(held, _refined(held, encoder, run))]
    if cfg.relation.recipe == "none" or cfg.relation.train.max_epoch > 0:
        return []
    bank = run.features.bank("train", run.datamanager.train_loader.dataset.train)
    select, out = cfg.relation.select, []
    keys = ckpt.load(run.stage_folder(stage_number(cfg)) / "last.pth.tar", kind="relation").get("recipe", [])
    for episode in fold_episodes(
        bank, folds=select.folds, identities=select.identities, images=select.images, seed=cfg.relation.train.seed
    ):
        chosen = with_recipe(cfg, keys)
        own = build_encoder(chosen, dim=bank.features.shape[1], num_classes=encoder.num_classes)
        fit_head(chosen, own, episode.train)
        data = TestFeatures(episode.query, episode.gallery)
        out.append((data, _refined(data, own, run)))
    return out


def _refined(data: TestFeatures, encoder: RelationEncoder, run: Run) -> TestFeatures:
    evaluator = Evaluator("held-out", data, options=run.options(), parameters=0)
    query, gallery = evaluator.refined_features(encoder, "inductive")
    return TestFeatures(replace(data.query, features=query), replace(data.gallery, features=gallery))


def _write(
    cfg: Any,
    folder: Path,
    tables: dict[str, FairTable],
    rungs: Sequence[str],
    seeds: Sequence[int],
    selected: dict[str, list[int]],
) -> dict[str, Any]:
    rows, verdicts = [], []
    for name, table in tables.items():
        for row in table.rows.values():
            control = table.row(CONTROL)
            gain = None if control is None or row is control else asdict(table.difference(row, control))
            rows.append(
                {
                    "target": name,
                    **row.as_dict(table.options.ranks),
                    "over_control": gain,
                    "selected": selected.get(row.features, []),
                }
            )
        for rung in rungs:
            verdict = judge(table, rung)
            if verdict is not None:
                verdicts.append({"target": name, **asdict(verdict), "harmless": verdict.harmless})
    text = "\n\n".join(fair_markdown(table, rungs) for table in tables.values())
    text += "\n\n" + _about_seeds(cfg, seeds)
    result = {"rows": rows, "verdicts": verdicts, "seeds": list(seeds), "config": cfg.dump(), "table": text}
    ckpt.write_json(folder / "ladder.json", result)
    ckpt.write_text(folder / "ladder.md", text + "\n")
    return result


def _about_seeds(cfg: Any, seeds: Sequence[int]) -> str:
    text = f"Seeds {', '.join(map(str, seeds))} of stage 2"
    if cfg.relation.recipe != "none" and cfg.relation.train.max_epoch == 0:
        text += ", in which nothing is drawn but the held-out identities that choose head, neighbours and query expansions"
    return text + ". Intervals: 95 %, paired bootstrap over the queries; n.s.: may be no difference."


__all__ = ["RUNGS", "default_rungs", "run_ladder"]
