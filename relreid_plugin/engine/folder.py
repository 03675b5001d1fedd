"""The folder of a run: what may be written into it, what is there already, and what every run writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import atomic_file, clear_leftovers, make_folder
from . import checkpoint as ckpt
from .curves import plot_history, plot_roc
from .logs import environment
from .records import without_nan
from .resume import check_keys, check_second_stage, finished_metrics
from .table import markdown_table

if TYPE_CHECKING:
    from .runner import Run


def guard(run: Run) -> dict[str, Any] | None:
    """Refuse a folder that the run must not write to, or cannot go on in, before anything is written.

    Returns:
        The metrics of a run that has nothing left to train, else ``None``.

    Raises:
        UserError: The folder is a file, holds another run, or lacks what the run goes on from.
    """
    cfg, folder = run.cfg, run.folder
    if run.network.stands_alone(run):
        if run.stages:
            raise UserError(
                f"'{folder}' holds a pruned model without its stage 1, which can only be tested; add --eval-only, or "
                "choose another folder by 'data.save_dir FOLDER'."
            )
        return None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'data.save_dir' is '{folder}', which is a file; name a folder.")
    if run.network.trains and 1 not in run.stages and not (cfg.model.load_weights or cfg.model.resume):
        if not (run.stage_folder(1) / "last.pth.tar").is_file():
            raise UserError(
                f"no stage-1 checkpoint in '{run.stage_folder(1)}'; train it first (without --stage and "
                "--eval-only), name the run's folder by 'data.save_dir', or give weights by 'model.load_weights FILE'."
            )
    if cfg.model.resume and not Path(cfg.model.resume).is_file():
        raise UserError(f"'model.resume' names '{cfg.model.resume}', which does not exist.")
    if run.resume:
        return _check_resume(run)
    for stage in run.stages:
        if (run.stage_folder(stage) / "last.pth.tar").is_file():
            raise UserError(
                f"'{folder}' already holds a run of stage {stage}; go on with --resume, test it with --eval-only, "
                "or choose another folder by 'data.save_dir FOLDER'."
            )
    return None


def _check_resume(run: Run) -> dict[str, Any] | None:
    """Refuse keys that may not change (:mod:`relreid_plugin.engine.resume`)."""
    trained = [stage for stage in run.planned if stage.number in run.stages]
    found = {stage.number: state for stage in trained if (state := stage.newest(run)) is not None}
    for number, state in found.items():
        check_keys(state, run.cfg, run.stage_folder(number) / "last.pth.tar")
    if 1 in found:
        for stage in run.planned[1:]:
            check_second_stage(found[1], run.cfg, run.stage_folder(stage.number) / "last.pth.tar")
    if found and len(found) == len(run.stages):
        return finished_metrics(run.folder, found, run.cfg)
    return None


def share_stages(source: Path, target: Path, stages: Iterable[int]) -> None:
    """Give a run the checkpoints and feature banks of another one: hard links, copies where there are none.

    Args:
        source: A run's folder.
        target: Another one's.
        stages: Numbers of the stages whose checkpoints are shared.
    """
    for part, pattern in (*((f"stage{number}", "*.pth.tar") for number in stages), ("bank", "*.pt")):
        for file in sorted((source / part).glob(pattern)):
            copy = target / part / file.name
            if copy.exists() and copy.samefile(file):
                continue
            with atomic_file(copy) as temporary:
                try:
                    temporary.unlink()
                    os.link(file, temporary)
                except OSError:
                    shutil.copy2(file, temporary)


def write_context(run: Run) -> None:
    """Make the folder, clear what a killed run was writing, and write configuration and environment."""
    make_folder(run.folder)
    for part in ("", *(stage.name for stage in run.planned), "bank", "plots"):
        clear_leftovers(run.folder / part)
    if not run.stages and run.results == run.folder and (run.folder / "config.yml").is_file():
        return
    ckpt.write_text(run.results / "config.yml", run.cfg.dump())
    ckpt.write_json(run.results / "environment.json", environment())


def write_results(run: Run) -> list[str]:
    """Write curves, table and metrics; with the metrics, which come last, the run is finished.

    Returns:
        The notes that belong below the table.
    """
    notes = [*getattr(run.datamanager, "notes", []), *run.notes]
    metrics: dict[str, Any] = {
        "rows": [row.as_dict() for row in run.rows],
        "history": run.history,
        "selected_epoch": run.selected,
        "notes": notes,
    }
    plot_history(run.history, run.results / "plots")
    if run.cfg.test.verification:
        plot_roc(run.verified, run.results / "plots")
    ckpt.write_text(run.results / "table.md", markdown_table(run.rows) + "\n")
    ckpt.write_json(run.results / "metrics.json", without_nan(metrics))
    return notes
