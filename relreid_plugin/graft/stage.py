"""GraFT's training: its step and engine, and stage 2, in which everything trains (METHODS 3)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..collective import bare_model, gather
from ..engine import checkpoint as ckpt
from ..engine.base import EngineMixin, StageContext
from ..engine.evaluator import inference_parameters
from ..engine.image import _CompositeStep
from ..engine.logs import set_seed
from ..engine.stages import Stage, train_engine
from ..engine.updates import Practice, Updates
from ..errors import UserError
from .ffd import GraFTLoss
from .observers import TripletObserver
from .pruned import fit_shapes, zero_weights

if TYPE_CHECKING:
    from ..engine.runner import Run


class _MultimodalStep(_CompositeStep):
    loss: GraFTLoss
    per_step = False
    present: tuple[str, ...] | None = None

    def forward_backward(self, data: Any) -> dict[str, float]:
        """One batch of samples, all modalities and roles in one forward pass."""
        images, pids = self.parse_data_for_train(data)
        if self.use_gpu:
            images, pids = images.cuda(non_blocking=True), pids.cuda(non_blocking=True)
        runs = 1 if self.loss.mined else 3
        logits, fused, tokens = self.model(images, classified=len(pids) // runs)
        logits, pids = gather(logits, first_of=runs), gather(pids)
        total, parts = self.loss.fused_loss(logits, gather(fused), gather(tokens), pids)
        return self.update(total, parts, logits, pids[: len(logits)])

    def update(
        self, total: torch.Tensor, parts: dict[str, torch.Tensor], logits: torch.Tensor, pids: torch.Tensor
    ) -> dict[str, float]:
        """As for images; a schedule by steps goes on by one at every update."""
        summary = super().update(total, parts, logits, pids)
        if self.per_step and self.updates.last:
            self.scheduler.step()
        return summary

    def update_lr(self, names: Any = None) -> None:
        """The host's step at the end of an epoch, unless the schedule goes by batches."""
        if not self.per_step:
            super().update_lr(names)


class MultimodalEngine(EngineMixin, _MultimodalStep):
    """The engine of both stages. ``present``: the modalities that testing sees; ``None``: all that were trained on."""

    @property
    def schedule_steps(self) -> int:
        """A schedule by steps goes on at every update."""
        return self.updates.updates_of(len(self.train_loader)) if self.per_step else 1

    def extract_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, M, 3, h, w) -> (B, d) from the present modalities."""
        if self.present is None:
            return self.model(images)
        bare = bare_model(self.model)
        slots = [bare.modalities.index(name) for name in self.present]
        return self.model(images[:, slots], self.present)


def build_engine(
    run: Run, optimizer: Any, scheduler: LRScheduler, *, per_step: bool, center_lr: float, **weights: float
) -> tuple[EngineMixin, dict[str, Any]]:
    """Return an engine over a run's network, and the further states that its checkpoints must hold.

    Args:
        run: The run.
        optimizer: Of the network.
        scheduler: Its schedule.
        per_step: Step the schedule after every update instead of every epoch.
        center_lr: Learning rate of the class centers.
        **weights: Weights and label smoothing of :class:`~relreid_plugin.graft.ffd.GraFTLoss`.
    """
    cfg = run.cfg
    loss = GraFTLoss(
        run.datamanager.num_train_pids,
        run.bare.feature_dim,
        mined=cfg.graft.sampling == "pk",
        scheme=cfg.graft.scheme,
        distance=cfg.graft.distance,
        tokens=cfg.graft.tokens,
        **weights,
    )
    if cfg.use_gpu:
        loss.cuda()
    states = loss.center_states(center_lr)
    engine = MultimodalEngine(
        run.datamanager,
        run.model,
        optimizer,
        loss=loss,
        center_optimizer=states.get("center_optimizer"),
        scheduler=scheduler,
        use_gpu=cfg.use_gpu,
    )
    engine.updates = Updates(Practice.of(cfg))
    engine.mined = bool(loss.mined and loss.weights["triplet"])
    engine.per_step = per_step
    engine.batch_groups = 1 if loss.mined else 3
    if loss.weights["triplet"]:
        engine.observers.append(TripletObserver(loss))
    return engine, states


class FinetuneStage(Stage):
    """Stage 2: everything trains, from the chosen weights of stage 1.

    Attributes:
        pruning: How the tested weights were pruned (:mod:`relreid_plugin.graft.pruning`); ``None``: not at all.
    """

    kind = "finetune"
    pruning: dict[str, Any] | None = None

    def build_engine(self, run: Run) -> tuple[EngineMixin, dict[str, Any]]:
        """Return the engine of the stage, and the further states that its checkpoints must hold."""
        finetune = run.cfg.graft.finetune
        run.bare.freeze_backbone(False)
        optimizer = torch.optim.AdamW(run.bare.parameters(), lr=finetune.lr, weight_decay=finetune.weight_decay)
        return build_engine(
            run,
            optimizer,
            LambdaLR(optimizer, lambda epoch: 1.0),
            per_step=False,
            center_lr=run.cfg.loss.composite.center_lr,
            ce=finetune.ce,
            triplet=finetune.triplet,
            center=finetune.center,
            label_smoothing=finetune.label_smoothing,
        )

    def train(self, run: Run) -> None:
        """Train everything."""
        cfg, finetune = run.cfg, run.cfg.graft.finetune
        set_seed(1_000_003 * cfg.train.seed + 2)
        engine, extra = self.build_engine(run)
        held_out = bool(len(run.datamanager.val_query))
        context = StageContext(
            kind=self.kind,
            folder=self.folder(run),
            max_epoch=finetune.max_epoch,
            checkpoint_freq=cfg.train.checkpoint_freq,
            eval_freq=cfg.test.eval_freq,
            start_eval=cfg.test.start_eval,
            static={**run.static(), "stage1": run.fingerprint},
            validate=run.features.validate if held_out else None,
            monitor=None if held_out else run.features.monitor,
            sample_seeds=cfg.data.sample_seeds,
            loggers=tuple(cfg.train.loggers),
            watch=run.watch,
        )
        run.engine = engine
        epoch = run.selected.get("stage1", 0)
        said = f"stage {self.number}: everything trains, {finetune.max_epoch} epochs from stage 1, epoch {epoch}"
        train_engine(
            run,
            self,
            engine,
            extra,
            context,
            announce=lambda: print(said),
            belongs=lambda state, path: self._belongs(run, state, path),
            start_eval=cfg.test.start_eval,
        )

    def _belongs(self, run: Run, state: dict[str, Any], path: Path) -> None:
        if state["stage1"] != run.fingerprint:
            raise UserError(
                f"checkpoint '{path}' goes on from another stage 1 than that of '{run.stage_folder(1)}'; "
                "train stage 2 again in another 'data.save_dir', or put stage 1 back."
            )

    def load(self, run: Run) -> None:
        """Put the chosen weights into the network, made as small as they are where they were pruned."""
        folder, path = self.folder(run), self.tested_path(run)
        if not path.is_file():
            raise UserError(
                f"no stage-2 checkpoint in '{folder}'; train it first (without --eval-only), or test stage 1 alone by "
                "'train.stages [1]'."
            )
        run.engine.updates.narrow(run.engine)
        state = ckpt.load(path, kind=self.kind)
        self.pruning = state.get("pruning")
        if self.pruning is not None:
            fit_shapes(run.bare, state["state_dict"])
        ckpt.load_weights(run.bare, state["state_dict"], path=path)
        if self.pruning is not None:
            run.parameters = inference_parameters(run.bare) - zero_weights(run.bare)
        last = folder / "last.pth.tar"
        self.note_tested(run, state, state if path == last else ckpt.load(last, kind=self.kind))
        run.fingerprint = ckpt.fingerprint(run.bare)


__all__ = ["FinetuneStage", "MultimodalEngine", "build_engine"]
