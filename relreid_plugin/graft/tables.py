"""GraFT's ablations from one configuration: fusion, modalities, triplet schemes, token index (paper, Tables 5 to 8)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ..config.defaults import load_config, merge_from_list
from ..engine.checkpoint import write_json, write_text
from ..engine.grid import Part, Variant, collect, mean_std, plan, score_table, train
from ..engine.table import markdown
from ..errors import UserError, did_you_mean
from ..locks import folder_lock
from .build import graft
from .ffd import SCHEMES
from .model import FUSIONS
from .scores import TITLES

TOKENS = (0, 5, 10, 15, 20, 25)
"""Indices of the data token in the paper's section 6, and the first one."""
TABLES = ("fusion", "modalities", "schemes", "tokens", "triplets")
TRIPLETS = (("FFF", "raw"), ("FFF", "unit"), ("FFD", "raw"), ("FFD", "unit"), ("FFD", "centred"))
"""Schemes and tokens of the table ``triplets``; between fused tokens alone, centred distances are the raw ones."""
NO_TRIPLET = ("loss.composite.triplet", "0", "graft.finetune.triplet", "0")


def modality_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every selection, the smallest first, each in the order of ``modalities``."""
    return [subset for size in range(1, len(modalities) + 1) for subset in combinations(modalities, size)]


def count_tokens(cfg: Any) -> int:
    """Return how many data tokens an image has, by a forward pass of the untrained backbone."""
    model = graft(2, pretrained=False, cfg=cfg)
    backbone: Any = model.backbones[0]
    with torch.no_grad():
        channels = 3 * len(model.modalities) if model.fusion == "early" else 3
        return backbone.eval().forward_features(torch.zeros(1, channels, cfg.data.height, cfg.data.width)).shape[1]


def token_indices(count: int) -> list[int]:
    """Return the paper's indices, or as many spread over the tokens where there are fewer than 26."""
    if count > max(TOKENS):
        return list(TOKENS)
    return sorted({round(step * (count - 1) / (len(TOKENS) - 1)) for step in range(len(TOKENS))})


def graft_variants(cfg: Any, table: str) -> list[Variant]:
    """Return the rows of one of the paper's tables.

    Args:
        cfg: A configuration with ``model.name graft``.
        table: ``fusion``: the fusion token and four rivals (Table 5); ``modalities``: every selection (Tables 6 and 7);
            ``schemes``: what anchor, positive and negative are (Table 8); ``tokens``: the data token's index (section 6);
            ``triplets``: without a triplet loss, and with it in the settings in which it may act.

    Raises:
        UserError: Another model, or an unknown table.
    """
    if cfg.model.name != "graft":
        raise UserError(f"this table needs a configuration with 'model.name graft', not '{cfg.model.name}'.")
    if table == "fusion":
        order = [name for name in reversed(FUSIONS) if name != "graft"] + ["graft"]
        return [Variant(name, TITLES[name], ("graft.fusion", name)) for name in order]
    if table == "modalities":
        return [_selection(cfg, subset) for subset in modality_subsets(list(cfg.multimodal.modalities))]
    if table == "schemes":
        return [Variant(scheme, scheme, ("graft.scheme", scheme)) for scheme in SCHEMES]
    if table == "tokens":
        indices = token_indices(count_tokens(cfg))
        return [Variant(f"token{index}", f"data token {index}", ("graft.token_index", str(index))) for index in indices]
    if table == "triplets":
        rows = [
            Variant(f"{scheme}-{tokens}", f"{scheme}, {tokens} tokens", ("graft.scheme", scheme, "graft.tokens", tokens))
            for scheme, tokens in TRIPLETS
        ]
        return [Variant("none", "no triplet loss", NO_TRIPLET), *rows]
    raise UserError(f"command line: there is no table '{table}'{did_you_mean(table, TABLES)}")


def triplet_signal(part: Part, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what a run says about its triplets: those of the first epoch of stage 1 and of the last one of stage 2."""
    history = [record for records in metrics["history"].values() for record in records if "triplet/near" in record]
    return (
        {
            f"{when}_{name}": record[f"triplet/{name}"]
            for when, record in (("first", history[0]), ("last", history[-1]))
            for name in ("near", "far", "active", "pull")
        }
        if history
        else {}
    )


def triplet_table(records: Sequence[dict[str, Any]]) -> str:
    """Return what shows whether a triplet loss acts, in the first epoch and the last one, the mean over the seeds.

    Distances of anchors to their positives and their negatives, triplets whose positive is not nearer, and the gradient as a
    share of the soft margin's largest.
    """
    header = [f"{name}, {when}" for when in ("first", "last") for name in ("D(a, p)", "D(a, n)", "violated", "gradient")]
    rows = []
    for variant in dict.fromkeys(record["variant"] for record in records):
        record = next(record for record in records if record["variant"] == variant)
        signals = [signal for signal in record["signal"] if signal]
        cells = [record["title"]]
        for name in [f"{when}_{name}" for when in ("first", "last") for name in ("near", "far", "active", "pull")]:
            mean = mean_std([signal[name] for signal in signals])[0] if signals else None
            share = name.endswith(("active", "pull"))
            cells.append("-" if mean is None else f"{100 * mean:.1f} %" if share else f"{mean:.2f}")
        rows.append(cells)
    return markdown(["method", *header], rows)


def _selection(cfg: Any, subset: Sequence[str]) -> Variant:
    names = list(cfg.multimodal.modalities)
    overrides = ["multimodal.modalities", str(list(subset)), "multimodal.test", "[]"]
    for key in ("mean", "std", "pixel_range"):
        rows = cfg.multimodal[key]
        if len(rows) > 1:
            overrides += [f"multimodal.{key}", str([rows[names.index(name)] for name in subset])]
    return Variant("".join(subset), "+".join(subset), tuple(overrides))


def graft_report(
    config_file: str,
    tables: Sequence[str],
    seeds: Sequence[int],
    *,
    out: Path,
    jobs: int = 1,
    overrides: Sequence[str] = (),
) -> str:
    """Train what is not trained yet, and write ``<table>.md`` and ``<table>.json``.

    A run that two tables share (all modalities, the fusion token, FFD, the first token) is trained once.

    Args:
        config_file: Configuration with ``model.name graft``.
        tables: Some of :data:`TABLES`.
        seeds: Seeds.
        out: Folder of runs and tables.
        jobs: Runs at a time.
        overrides: ``KEY VALUE …`` for all runs.

    Returns:
        The tables, as Markdown.

    Raises:
        UserError: A configuration does not fit, or a run fails.
    """
    cfg = load_config(config_file, overrides)
    plans = {
        table: plan(
            config_file,
            [_shared(cfg, variant) for variant in graft_variants(cfg, table)],
            seeds,
            folder=out,
            overrides=overrides,
        )
        for table in dict.fromkeys(tables)
    }
    every = {part.folder: part for parts in plans.values() for part in parts}
    sections = []
    with folder_lock(out):
        train(list(every.values()), jobs=jobs)
        for table, parts in plans.items():
            records = collect(parts, triplet_signal if table == "triplets" else None)
            text = score_table(records)
            if table == "triplets":
                text += "\n\n" + triplet_table(records)
            write_json(out / f"{table}.json", {"table": table, "seeds": list(seeds), "records": records})
            write_text(out / f"{table}.md", text + "\n")
            sections.append(f"## {table}\n\n{text}")
    return "\n\n".join(sections)


def _shared(cfg: Any, variant: Variant) -> Variant:
    """The row as it is, but in the folder ``default`` when it changes nothing."""
    base, changed = cfg.clone(), cfg.clone()
    merge_from_list(changed, list(variant.overrides))
    changed.multimodal.test = base.multimodal.test = []
    same = base == changed
    return Variant("default", variant.title, ("multimodal.test", "[]")) if same else variant
