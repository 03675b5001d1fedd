"""One recipe on many data sets: a ladder for each of them, and one table of what relations gain and lose there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.defaults import get_default_config, load_config, merge_from_file, merge_from_list, validate
from ..config.targets import pair_targets
from ..engine import checkpoint as ckpt
from ..engine.table import markdown
from ..errors import UserError
from .fair import CONTROL, IMAGE, Difference
from .ladder import OWN, run_ladder

RECIPE = ["relation.recipe", "held-out", "relation.train.max_epoch", "0"]
"""What makes the committed recipe out of a configuration with a relation stage."""


@dataclass(frozen=True)
class Place:
    """A data set with the configuration that it is met with.

    Attributes:
        name: Of its folder of runs.
        config_file: Configuration with a relation stage.
        data: Source and target, a folder, a table or a registered name; empty: those of the configuration.
    """

    name: str
    config_file: str
    data: str = ""


def places(words: Sequence[str]) -> list[Place]:
    """Read ``CONFIG`` and ``CONFIG=DATA``.

    Raises:
        UserError: Two of them would share a folder of runs.
    """
    out: dict[str, Place] = {}
    for word in words:
        config_file, _, data = word.partition("=")
        name = Path(data).stem if data else Path(config_file).stem
        if name in out:
            raise UserError(
                f"'{word}': its runs would go where those of '{out[name].config_file}={out[name].data}' go ('{name}'); give "
                "one of the two another name, by a link or a copy."
            )
        out[name] = Place(name, config_file, data)
    return list(out.values())


def configured(place: Place, out: Path, *, weights: str, overrides: Sequence[str]) -> Any:
    """Return the configuration of a data set's ladder.

    Args:
        place: The data set.
        out: Folder of all ladders.
        weights: ``model.load_weights`` of the sets that are named beside their configuration; empty: none.
        overrides: ``KEY VALUE …`` of all.
    """
    own = [*RECIPE, *overrides, "data.save_dir", str(out / place.name)]
    if not place.data:
        return load_config(place.config_file, own)
    cfg = get_default_config()
    merge_from_file(cfg, place.config_file)
    cfg.data.sources = cfg.data.targets = [place.data]
    merge_from_list(cfg, [*(["model.load_weights", weights] if weights else []), *own])
    validate(cfg)
    pair_targets(cfg)
    return cfg


def across(
    words: Sequence[str],
    *,
    seeds: Sequence[int],
    out: Path,
    weights: str = "",
    rivals: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Run the ladder of every data set, go on where a stopped call ended, and return the table as Markdown.

    Args:
        words: ``CONFIG``, a configuration with a relation stage and its own data, or ``CONFIG=DATA``.
        seeds: Of the relation stage.
        out: Every ladder goes to a folder of its own in it; the table to ``relations.md`` and ``relations.json``.
        weights: ``model.load_weights`` of the sets ``CONFIG=DATA``.
        rivals: As in :func:`~relreid_plugin.magformer.ladder.run_ladder`.
        overrides: ``KEY VALUE …`` of all ladders.

    Raises:
        UserError: A configuration is wrong; all are checked before the first run starts.
    """
    configs = {place.name: configured(place, out, weights=weights, overrides=overrides) for place in places(words)}
    rows: list[dict[str, Any]] = []
    for name, cfg in configs.items():
        result = run_ladder(cfg, rungs=[OWN], seeds=seeds, rivals=rivals)
        rows += [_summary(name, cfg, result, verdict) for verdict in result["verdicts"]]
    if not rows:
        raise UserError(f"no test set of {', '.join(configs)} could be judged.")
    text = across_markdown(rows)
    ckpt.write_json(out / "relations.json", {"rows": rows, "seeds": list(seeds), "table": text})
    ckpt.write_text(out / "relations.md", text + "\n")
    return text


def _summary(name: str, cfg: Any, result: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
    """A line of the table; scores are means over the seeds, inductive, with nothing done to the features."""
    target = verdict["target"]
    scores = {
        row["features"]: {key: row["mean"][key] for key in ("mAP", "1")}
        for row in result["rows"]
        if row["target"] == target and row["protocol"] == "inductive" and not row["rival"]
    }
    return {
        "set": name,
        "target": target,
        "network": cfg.model.name,
        **{key: scores[key] for key in (IMAGE, CONTROL, OWN)},
        **{key: verdict[key] for key in ("gain", "inductive", "reranked", "floor", "harmless")},
    }


def across_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the lines of :func:`across` as Markdown: mAP / R1 in percent, differences in mAP with 95 % intervals."""
    header = [
        "set",
        "image model",
        "control",
        "MagFormer",
        "- control",
        "- best inductive row",
        "- best re-ranked control",
        "harm",
    ]
    cells = []
    for row in rows:
        scores = [f"{100 * row[key]['mAP']:.1f} / {100 * row[key]['1']:.1f}" for key in (IMAGE, CONTROL, OWN)]
        best, rival = row["inductive"]
        reranked = "-" if row["reranked"] is None else f"{Difference(**row['reranked'][0])} ({row['reranked'][1]})"
        lost = f"{100 * row['floor'][0]:+.1f} mAP, {100 * row['floor'][1]:+.1f} R1"
        cells.append(
            [
                f"{row['set']} ({row['network']})"
                + ("" if Path(row["target"]).stem in row["set"] else f", {row['target']}"),
                *scores,
                str(Difference(**row["gain"])),
                f"{Difference(**best)} ({rival})",
                reranked,
                "none" if row["harmless"] else lost,
            ]
        )
    above = [
        f"{sum(Difference(**best).mean > 0 for best in found)} of {len(rows)} above the best {name}"
        for name, found in (
            ("inductive row without relations", [row["inductive"][0] for row in rows]),
            ("re-ranked control", [row["reranked"][0] for row in rows if row["reranked"] is not None]),
        )
    ]
    harmed = sum(not row["harmless"] for row in rows)
    text = (
        f"mAP / R1. {above[0]}, {above[1]}; {harmed} harmed (more than 0.3 mAP, or any R1, below the better of "
        "image model and control). Intervals: 95 %, paired bootstrap over the queries; n.s.: may be no difference."
    )
    return markdown(header, cells, align="l" + "l" * 7) + "\n\n" + text


__all__ = ["Place", "across", "across_markdown", "configured", "places"]
