"""Pruning a trained GraFT to target parameter counts: prune a step, fine-tune, test, go on from there (METHODS 3).

Iterative magnitude pruning as in GraFT, section 5.4 (Tables 3 and 4): single weights of the backbone's blocks, chosen by
torch's own utilities over all blocks at once. Beyond the paper, whole heads and MLP channels, which makes the layers smaller
and inference faster. Every target leaves a folder of its own that ``tools/train_net.py --eval-only`` tests like a run's; its
checkpoint also serves as ``model.load_weights``.
"""

from __future__ import annotations

import copy
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.defaults import get_default_config, merge_from_file
from ..engine import checkpoint as ckpt
from ..engine.base import StageContext
from ..engine.evaluator import inference_parameters
from ..engine.packing import pack
from ..engine.runner import Run, environment, logged, open_run, read_metrics, set_seed
from ..engine.table import markdown, score_cells, score_columns, score_header
from ..errors import UserError
from ..files import clear_leftovers
from ..locks import folder_lock
from ..reading import read_json
from .network import GraFTNetwork
from .pruned import (
    block_shapes,
    find_units,
    fit_shapes,
    prunable_weights,
    prune_units,
    prune_weights,
    settle_weights,
    zero_weights,
)
from .stage import FinetuneStage

UNITS = {"k": 1e3, "m": 1e6}
TIMED_SAMPLES = 8
TIMED_ROUNDS = 7


# --- targets ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """A model size.

    Attributes:
        text: As it was asked for; also the name of its folder.
        parameters: Parameters left, of those that testing uses.
    """

    text: str
    parameters: int


def parse_targets(words: Sequence[str], *, dense: int, floor: int) -> list[Target]:
    """Return the targets of a command line.

    Args:
        words: Shares of the dense count (``0.8``), or counts (``812345``, ``800k``, ``76M``).
        dense: Parameters of the dense model.
        floor: Parameters that cannot be pruned.

    Raises:
        UserError: Something else, a count that is not below ``dense`` or is below ``floor``, or targets that do not fall.
    """
    targets: list[Target] = []
    for word in (word.strip() for word in words):
        match = re.fullmatch(r"(\d*\.?\d+)([kKmM]?)", word)
        if match is None:
            raise UserError(f"--targets: '{word}' is no share like 0.8 and no parameter count like 812345, 800k or 76M.")
        number, unit = float(match[1]), match[2].lower()
        share = not unit and "." in match[1]
        count = round(number * (dense if share else UNITS.get(unit, 1)))
        if count >= dense:
            raise UserError(f"--targets: {word} ({count:,} parameters) is not below the dense model's {dense:,} parameters.")
        if count < floor:
            raise UserError(
                f"--targets: {word} ({count:,} parameters) is below what can be pruned: {floor:,} parameters of the dense "
                f"model's {dense:,} stay; ask for more."
            )
        if targets and count >= targets[-1].parameters:
            raise UserError(
                f"--targets: {word} ({count:,} parameters) comes after {targets[-1].text} ({targets[-1].parameters:,}); "
                "every step goes on from the one before, so name them from large to small."
            )
        targets.append(Target(word, count))
    return targets


def _check_run(folder: Path) -> None:
    """A finished run of GraFT or one of its rivals, found out before its data is read."""
    if not (folder / "config.yml").is_file():
        raise UserError(f"'{folder}' holds no run ('{folder / 'config.yml'}' does not exist).")
    cfg = get_default_config()
    merge_from_file(cfg, folder / "config.yml")
    if cfg.model.name != "graft":
        raise UserError(f"'{folder}' is a run of '{cfg.model.name}'; pruning works on runs of 'model.name graft'.")
    read_metrics(folder)


# --- measuring --------------------------------------------------------------------------------------------------------
class _Counter:
    """A file that only counts what is written to it."""

    size = 0

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.size += written
        return written

    def flush(self) -> None:
        """Nothing is held back."""


def stored_bytes(state: dict[str, Any]) -> int:
    """Return how large a checkpoint would be."""
    counter = _Counter()
    torch.save({"format": ckpt.FORMAT, **state}, counter)  # type: ignore[arg-type]
    return counter.size


@torch.inference_mode()
def time_forward(models: Sequence[nn.Module], images: Tensor, *, rounds: int = TIMED_ROUNDS) -> list[float]:
    """Return the median seconds of a forward pass of each model, measured in turns so that a busy machine slows all alike.

    Args:
        models: In evaluation mode, on the device of ``images``.
        images: What they take.
        rounds: Measurements per model; one more before them is not counted.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for model, taken in zip(models, seconds):
            _wait(images)
            started = time.perf_counter()
            model(images)
            _wait(images)
            if turn:
                taken.append(time.perf_counter() - started)
    return [float(torch.tensor(taken, dtype=torch.float64).median()) for taken in seconds]


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


# --- the steps --------------------------------------------------------------------------------------------------------
class Pruner:
    """All steps of one pruning: the model goes through them in place.

    Args:
        run: The opened run.
        targets: From large to small.
        epochs: Fine-tuning epochs after every step.
        structured: Whole heads and channels instead of single weights.
        out: Where the folders of the targets go.
    """

    def __init__(self, run: Run, targets: Sequence[Target], *, epochs: int, structured: bool, out: Path, dense: int) -> None:
        self.run, self.targets, self.epochs, self.structured, self.out = run, list(targets), epochs, structured, out
        self.dense, self.source = dense, run.fingerprint
        self.original = copy.deepcopy(run.bare)
        self.centers = self._trained_centers()
        self.held = -1  # the step whose weights are in the model; -1: the dense one

    def _trained_centers(self) -> dict[str, Any] | None:
        """The class centers of the run's stage 2, which fine-tuning goes on with."""
        path = self.run.stage_folder(2) / "last.pth.tar"
        if 2 not in self.run.cfg.train.stages or not path.is_file():
            return None
        return ckpt.load(path, kind="finetune")["extra"].get("loss")

    def config(self, index: int) -> Any:
        """Return the configuration of a target's folder."""
        cfg = self.run.cfg.clone()
        cfg.data.save_dir = str(self.out / self.targets[index].text)
        cfg.model.pretrained, cfg.model.load_weights, cfg.model.resume, cfg.backbone.weights = False, "", "", ""
        cfg.train.stages = [1, 2]
        return cfg

    def settings(self, index: int) -> dict[str, Any]:
        """Return everything that a step's result depends on, for a comparison with what is there."""
        cfg = self.config(index)
        cfg.data.root, cfg.data.save_dir, cfg.data.workers, cfg.use_gpu = "", "", 0, False
        return {
            "source": self.source,
            "structured": self.structured,
            "epochs": self.epochs,
            "parameters": [target.parameters for target in self.targets[: index + 1]],
            "config": cfg.dump(),
        }

    def _check(self, found: dict[str, Any], index: int, path: Path) -> None:
        if found != self.settings(index):
            raise UserError(
                f"'{path}' belongs to another pruning (other run, targets, epochs or configuration); choose another folder "
                "by --out."
            )

    def _path(self, index: int) -> Path:
        return self.out / self.targets[index].text / "stage2" / "last.pth.tar"

    def _hold(self, index: int) -> None:
        """Put the weights of a finished step into the model."""
        if self.held == index:
            return
        state = ckpt.load(self._path(index), kind="finetune")
        fit_shapes(self.run.bare, state["state_dict"])
        ckpt.load_weights(self.run.bare, state["state_dict"], path=self._path(index))
        self.held = index

    def prune(self, index: int) -> None:
        """Prune from the step before to a target; single weights stay masked until they are settled."""
        target, bare = self.targets[index], self.run.bare
        if self.structured:
            prune_units(bare, inference_parameters(bare) - target.parameters)
        else:
            prune_weights(bare, self.dense - target.parameters)

    def finetune(self, index: int) -> list[dict[str, Any]]:
        """Train the pruned model by the losses and the optimiser of stage 2; returns the records per epoch."""
        run, folder = self.run, self.out / self.targets[index].text / "finetune"
        cfg = run.cfg
        set_seed(1_000_003 * cfg.train.seed + 3 + index)
        engine, extra = _finetune(run).build_engine(run)
        if self.centers is not None and "loss" in extra:
            extra["loss"].load_state_dict(self.centers)
        context = StageContext(
            kind="pruning",
            folder=folder,
            max_epoch=self.epochs,
            checkpoint_freq=cfg.train.checkpoint_freq,
            static={"settings": self.settings(index)},
            loggers=tuple(cfg.train.loggers),
        )
        engine.attach(context, **extra)
        run.engine = engine
        if context.last.is_file():
            state = ckpt.load(context.last, kind="pruning")
            self._check(state["settings"], index, context.last)
            engine.restore(state, context.last)
            print(f"resuming after epoch {engine.first_epoch} from '{context.last}'")
        engine.fit(print_freq=cfg.train.print_freq)
        engine.updates.settle()
        engine.set_model_mode("eval")
        return engine.history

    def _state(self, weights: dict[str, Any], index: int, history: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self.run.static(),
            "config": self.config(index).dump(),
            "kind": "finetune",
            "state_dict": weights,
            "epoch": self.epochs,
            "max_epoch": self.epochs,
            "rank1": 0.0,
            "history": history,
            "pruning": {"settings": self.settings(index)},
        }

    def make(self, index: int) -> None:
        """Prune, fine-tune and write a step that is not there yet."""
        folder, path = self.out / self.targets[index].text, self._path(index)
        if path.is_file():
            pruning = ckpt.load(path, kind="finetune").get("pruning")
            self._check((pruning or {}).get("settings", {}), index, path)
            return
        if index:
            self._hold(index - 1)
        print(f"{self.targets[index].text}: {self.targets[index].parameters:,} of {self.dense:,} parameters")
        self.prune(index)
        history = self.finetune(index)
        settle_weights(self.run.bare)
        self.held = index
        ckpt.write_text(folder / "config.yml", self.config(index).dump())
        ckpt.write_json(folder / "environment.json", environment())
        packed = {name: pack(value) for name, value in self.run.bare.state_dict().items()}
        ckpt.save(path, self._state(packed, index, history))

    def measure(self, index: int) -> dict[str, Any]:
        """Test a step as ``--eval-only`` does, time it beside the dense model, and return its record."""
        target, folder = self.targets[index], self.out / self.targets[index].text
        shutil.rmtree(folder / "finetune", ignore_errors=True)
        tested = Run(self.config(index), stages=[])
        result = tested.execute()
        self._hold(index)
        dense_seconds, seconds = self._time(self.run.bare)
        state = ckpt.load(self._path(index), kind="finetune")
        return {
            "settings": self.settings(index),
            "target": target.text,
            "folder": str(folder),
            "parameters": tested.parameters,
            "share": tested.parameters / self.dense,
            "zeros": zero_weights(self.run.bare),
            "blocks": block_shapes(self.run.bare),
            "bytes": self._path(index).stat().st_size,
            "bytes_unpacked": stored_bytes(state),
            "seconds": seconds,
            "seconds_dense": dense_seconds,
            "time_ratio": seconds / dense_seconds,
            "history": state["history"],
            "rows": [row.as_dict() for row in result.rows],
        }

    def _time(self, model: nn.Module) -> list[float]:
        cfg = self.run.cfg
        shape = (TIMED_SAMPLES, len(cfg.multimodal.modalities), 3, cfg.data.height, cfg.data.width)
        images = torch.zeros(shape, device=next(model.parameters()).device)
        return time_forward([self.original.eval(), model.eval()], images)

    def step(self, index: int) -> dict[str, Any]:
        """Return the record of a step, from its folder where it is done."""
        path = self.out / self.targets[index].text / "prune.json"
        if path.is_file():
            remedy = f"remove '{path.parent}' to prune it again"
            record = read_json(path, what="record of a pruning", remedy=remedy)
            if not {"settings", "target", "parameters", "share", "bytes", "rows", "seconds", "time_ratio"} <= record.keys():
                raise UserError(f"'{path}' is damaged (parts of the record are missing); {remedy}.")
            self._check(record["settings"], index, path)
            print(f"{self.targets[index].text} is done already ('{path.parent}')")
            return record
        self.make(index)
        record = self.measure(index)
        ckpt.write_json(path, record)
        return record

    def dense_record(self) -> dict[str, Any]:
        """Test the dense model; its row of the table."""
        run = self.run
        run.rows = []
        run.test([])
        state = self._state({name: value.detach().cpu() for name, value in run.bare.state_dict().items()}, 0, [])
        return {
            "parameters": self.dense,
            "share": 1.0,
            "bytes": stored_bytes(state),
            "blocks": block_shapes(run.bare),
            "rows": [row.as_dict() for row in run.rows],
        }


def _finetune(run: Run) -> FinetuneStage:
    """The stage of a run in which everything trains."""
    return next(stage for stage in run.planned if isinstance(stage, FinetuneStage))


# --- the report -------------------------------------------------------------------------------------------------------
def _headlines(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The first row of every test set."""
    found: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        found.setdefault(row["target"], row)
    return found


def prune_table(result: dict[str, Any]) -> str:
    """Return the result as Markdown: one table per test set; scores in percent."""
    tables = []
    for name, first in _headlines(result["dense"]).items():
        columns = score_columns(first["cmc"])[:-1]  # without mINP
        header = ["target", "parameters left", "share", *score_header(columns), "checkpoint", "time / dense"]
        rows = []
        for record in [result["dense"], *result["targets"]]:
            row = _headlines(record)[name]
            cells = [record.get("target", "dense"), f"{record['parameters']:,}", f"{record['share']:.1%}"]
            cells += score_cells({"mAP": row["mAP"], **row["cmc"]}, None, columns)
            rows.append([*cells, f"{record['bytes'] / 1e6:.2f} MB", f"{record.get('time_ratio', 1.0):.2f}"])
        title = f"**{name}**, {'structured' if result['structured'] else 'single weights'}"
        tables.append(markdown(header, rows, title=title))
    return "\n\n".join(tables)


def _draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    records = [result["dense"], *result["targets"]]
    scale, unit = (1e6, "millions") if result["dense"]["parameters"] >= 1e6 else (1e3, "thousands")
    for name in _headlines(result["dense"]):
        scores = [100 * _headlines(record)[name]["mAP"] for record in records]
        axis.plot([record["parameters"] / scale for record in records], scores, marker="o", linewidth=1.4, label=name)
    axis.set_xlabel(f"parameters left, {unit}")
    axis.set_ylabel("mAP, %")
    axis.set_title("structured pruning" if result["structured"] else "magnitude pruning of single weights")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    ckpt.write_figure(path, figure)


def pruning_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return parameters left, in millions, and mAP in percent of a pruning's steps by test set, the dense model first.

    Args:
        folder: Of :func:`prune_run`; none is no mistake, and gives nothing.

    Raises:
        UserError: Its ``prune.json`` is damaged.
    """
    path = folder / "prune.json"
    if not path.is_file():
        return {}
    remedy = f"prune again by 'relreid prune', or remove '{folder}'"
    result = read_json(path, what="result of a pruning", remedy=remedy)
    try:
        records = [(record["parameters"] / 1e6, _headlines(record)) for record in (result["dense"], *result["targets"])]
        return {name: [(left, 100 * rows[name]["mAP"]) for left, rows in records] for name in records[0][1]}
    except (KeyError, TypeError):
        raise UserError(f"'{path}' is damaged (parts of the record are missing); {remedy}.") from None


def _write(result: dict[str, Any], out: Path) -> None:
    ckpt.write_json(out / "prune.json", result)
    ckpt.write_text(out / "prune.md", prune_table(result) + "\n")
    _draw(result, out / "prune.png")


def prune_run(
    folder: Path | str,
    targets: Sequence[str],
    *,
    epochs: int = 1,
    structured: bool = False,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Prune a finished run of GraFT, step by step.

    Writes ``prune.json``, ``prune.md``, ``prune.png`` and ``prune.log`` to ``out``, and one folder per target with
    ``config.yml``, ``stage2/last.pth.tar``, the tables of its test and ``prune.json``. Steps that are there are used again.

    Args:
        folder: The run's folder; nothing in it is changed but its feature bank.
        targets: See :func:`parse_targets`; every step goes on from the one before.
        epochs: Fine-tuning epochs after every step.
        structured: Remove whole heads and MLP channels instead of single weights.
        out: Default: ``prune`` or ``prune-structured`` in the run's folder.
        overrides: ``KEY VALUE …`` over the run's configuration; keys of ``graft.finetune`` are those of the fine-tuning.

    Returns:
        The table.

    Raises:
        UserError: No finished run, a run of another model, a pruned model, a backbone that cannot be pruned so, or targets
            that make no sense for it.
    """
    folder = Path(folder)
    _check_run(folder)
    if epochs < 0:
        raise UserError(f"--epochs must not be negative, got {epochs}.")
    out = folder / ("prune-structured" if structured else "prune") if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is '{out}', which is a file; name a folder.")
    run = open_run(folder, [*overrides, "test.rivals", "[]"])
    assert isinstance(run.network, GraFTNetwork)
    if _finetune(run).pruning is not None:
        raise UserError(f"'{folder}' is pruned already; prune the run that it came from to further targets.")
    dense = inference_parameters(run.bare)
    floor = dense - (find_units(run.bare).removable if structured else prunable_weights(run.bare))
    parsed = parse_targets(targets, dense=dense, floor=floor)
    with folder_lock(out), logged(out / "prune.log"):
        clear_leftovers(out, below=True)  # what a killed command was writing
        pruner = Pruner(run, parsed, epochs=epochs, structured=structured, out=out, dense=dense)
        result: dict[str, Any] = {
            "run": str(folder),
            "structured": structured,
            "epochs": epochs,
            "seed": int(run.cfg.train.seed),
            "environment": environment(),
            "dense": pruner.dense_record(),
            "targets": [],
        }
        for index in range(len(parsed)):
            record = pruner.step(index)
            result["targets"].append({name: value for name, value in record.items() if name != "settings"})
            _write(result, out)
            print(
                f"{record['target']}: {record['parameters']:,} parameters left, {record['bytes'] / 1e6:.2f} MB "
                f"(dense {result['dense']['bytes'] / 1e6:.2f} MB), forward pass {record['seconds']:.4f} s, "
                f"{record['time_ratio']:.2f} of the dense model's"
            )
    return prune_table(result)


__all__ = ["Pruner", "Target", "parse_targets", "prune_run", "prune_table", "pruning_curves", "stored_bytes", "time_forward"]
