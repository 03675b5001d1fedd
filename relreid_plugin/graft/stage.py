"""GraFT's two stages: encoders on a frozen backbone, then everything; and tests with modalities missing (METHODS 3)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from ..backbones.files import WeightFile, read_weight_file
from ..data.multimodal import read_views
from ..data.ranges import modality_ranges
from ..engine import checkpoint as ckpt
from ..engine.base import EngineMixin, StageContext
from ..engine.evaluator import Evaluator, inference_parameters
from ..engine.image import _CompositeStep
from ..engine.resume import note_changes
from ..engine.runner import Run, set_seed
from ..engine.schedules import sqrt_lambda
from ..errors import UserError
from ..features.sets import TestFeatures
from ..host import build_optimizer, build_scheduler, cap_workers, worker_init
from .ffd import GraFTLoss
from .pruned import fit_shapes, zero_weights
from .triplets import TripletSampler

TITLES = {
    "graft": "GraFT",
    "early": "early fusion",
    "late": "late fusion (Multi-Stream ViT)",
    "cls": "vanilla fusion, CLS token",
    "average": "vanilla fusion, averaged tokens",
}


class _MultimodalStep(_CompositeStep):
    loss: GraFTLoss
    per_step = False
    present: tuple[str, ...] | None = None

    def forward_backward(self, data: Any) -> dict[str, float]:
        """One batch of samples, all modalities and roles in one forward pass."""
        images, pids = self.parse_data_for_train(data)
        if self.use_gpu:
            images, pids = images.cuda(non_blocking=True), pids.cuda(non_blocking=True)
        classified = len(pids) if self.loss.mined else len(pids) // 3
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits, fused, tokens = self.model(images, classified=classified)
        total, parts = self.loss.fused_loss(logits.float(), fused.float(), tokens.float(), pids)
        return self.update(total, parts, logits, pids[:classified])

    def update(
        self, total: torch.Tensor, parts: dict[str, torch.Tensor], logits: torch.Tensor, pids: torch.Tensor
    ) -> dict[str, float]:
        """As for images; a schedule by steps goes on by one."""
        summary = super().update(total, parts, logits, pids)
        if self.per_step:
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
        """A schedule by steps goes on at every batch."""
        return len(self.train_loader) if self.per_step else 1

    def extract_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, M, 3, h, w) -> (B, d) from the present modalities."""
        if self.present is None:
            return self.model(images)
        bare: Any = self.model.module if isinstance(self.model, nn.DataParallel) else self.model
        slots = [bare.modalities.index(name) for name in self.present]
        return self.model(images[:, slots], self.present)


class MultimodalRun(Run):
    """A run of GraFT or one of its rivals: stage 1 with the backbone frozen, stage 2 with everything training.

    Attributes:
        pruning: How the tested stage-2 weights were pruned (:mod:`relreid_plugin.graft.pruning`); ``None``: not at all.
    """

    engine: MultimodalEngine
    bare: Any
    _kinds = ("image", "finetune")
    pruning: dict[str, Any] | None = None
    _pruned_weights = False

    def __init__(self, cfg: Any, *, stages: list[int] | None = None, resume: bool = False) -> None:
        super().__init__(cfg, stages=stages, resume=resume)
        if cfg.data.type != "image":
            raise UserError(f"'model.name {cfg.model.name}' works with 'data.type image', not with '{cfg.data.type}'.")

    # --- folder -------------------------------------------------------------------------------------------------------
    @property
    def _second_alone(self) -> bool:
        """Whether the folder holds a stage-2 model without its stage 1: a pruned one."""
        first, second = (self._stage_folder(stage) / "last.pth.tar" for stage in (1, 2))
        return 2 in self.cfg.train.stages and second.is_file() and not first.is_file()

    def _guard_folder(self) -> None:
        if not self._second_alone or self.cfg.model.load_weights or self.cfg.model.resume:
            super()._guard_folder()
        elif self.stages:
            raise UserError(
                f"'{self.folder}' holds a pruned model without its stage 1, which can only be tested; add --eval-only, or "
                "choose another folder by 'data.save_dir FOLDER'."
            )

    def _will_restore_stage1(self) -> bool:
        return super()._will_restore_stage1() or (not self.stages and self._second_alone)

    # --- engines ------------------------------------------------------------------------------------------------------
    def _prepare_weights(self, model: nn.Module, file: WeightFile) -> None:
        """Make the model as small as the pruned weights of a file."""
        self._pruned_weights = "pruning" in file.content and isinstance(file.content.get("state_dict"), dict)
        if self._pruned_weights and fit_shapes(model, file.content["state_dict"]):
            print(f"'{file.path}' has fewer heads and channels: so has the model now")

    def _take_pruned_weights(self) -> None:
        """Weights given by a file that were pruned: count what is left, once the model is as small."""
        key = "model.load_weights" if self.cfg.model.load_weights else "model.resume"
        if key == "model.resume" and self.cfg.model.resume:
            if "pruning" in read_weight_file(self.cfg.model.resume, key=key).content:
                self._take_weights(self.bare, key)
        if not self._pruned_weights:
            return
        self.parameters = inference_parameters(self.bare) - (0 if self.stages else zero_weights(self.bare))

    def _build_engine(self) -> tuple[EngineMixin, dict[str, Any]]:
        """The engine of stage 1; with stage 1 alone (``train.stages [1]``) the backbone is frozen all the same."""
        cfg = self.cfg
        self._take_pruned_weights()
        self.bare.freeze_backbone()
        if cfg.graft.sampling == "triplets":
            self._sample_triplets()
        optimizer = build_optimizer(self.model, cfg)
        per_step = cfg.train.lr_scheduler == "sqrt"
        if per_step:
            total = max(1, cfg.train.max_epoch * len(self.datamanager.train_loader))
            factor = sqrt_lambda(total, warmup_steps=cfg.graft.warmup_steps, cooldown=cfg.graft.cooldown)
            scheduler: LRScheduler = LambdaLR(optimizer, factor)
        else:
            scheduler = build_scheduler(optimizer, cfg)
        weights = cfg.loss.composite
        return self._engine(
            optimizer,
            scheduler,
            per_step=per_step,
            center_lr=weights.center_lr,
            ce=weights.ce,
            triplet=weights.triplet,
            center=weights.center,
            label_smoothing=0.1 if cfg.loss.softmax.label_smooth else 0.0,
        )

    def _classified(self, items: int) -> int:
        return items // 3 if self.cfg.graft.sampling == "triplets" else items

    def _build_finetune_engine(self) -> tuple[EngineMixin, dict[str, Any]]:
        cfg, finetune = self.cfg, self.cfg.graft.finetune
        self.bare.freeze_backbone(False)
        optimizer = torch.optim.AdamW(self.bare.parameters(), lr=finetune.lr, weight_decay=finetune.weight_decay)
        return self._engine(
            optimizer,
            LambdaLR(optimizer, lambda epoch: 1.0),
            per_step=False,
            center_lr=cfg.loss.composite.center_lr,
            ce=finetune.ce,
            triplet=finetune.triplet,
            center=finetune.center,
            label_smoothing=finetune.label_smoothing,
        )

    def _engine(
        self, optimizer: Any, scheduler: LRScheduler, *, per_step: bool, center_lr: float, **weights: float
    ) -> tuple[EngineMixin, dict[str, Any]]:
        cfg = self.cfg
        loss = GraFTLoss(
            self.datamanager.num_train_pids,
            self.bare.feature_dim,
            mined=cfg.graft.sampling == "pk",
            scheme=cfg.graft.scheme,
            distance=cfg.graft.distance,
            **weights,
        )
        if cfg.use_gpu:
            loss.cuda()
        states = loss.center_states(center_lr)
        engine = MultimodalEngine(
            self.datamanager,
            self.model,
            optimizer,
            loss=loss,
            center_optimizer=states.get("center_optimizer"),
            precision=cfg.train.precision,
            scheduler=scheduler,
            use_gpu=cfg.use_gpu,
        )
        engine.per_step = per_step
        return engine, states

    def _sample_triplets(self) -> None:
        manager, cfg = self.datamanager, self.cfg
        dataset = manager.train_loader.dataset
        sampler = TripletSampler(
            [item[1] for item in dataset.train], triplets=cfg.train.batch_size // 3, positives=cfg.graft.positives
        )
        if 3 * sampler.triplets < cfg.train.batch_size:
            print(f"an epoch has {sampler.triplets} triplets, less than a batch of {cfg.train.batch_size // 3}")
        manager.train_loader = DataLoader(
            dataset,
            sampler=sampler,
            batch_size=3 * sampler.triplets,
            num_workers=cap_workers(cfg.data.workers),
            pin_memory=manager.use_gpu,
            drop_last=True,
            worker_init_fn=worker_init,
        )

    # --- stage 2 ------------------------------------------------------------------------------------------------------
    def _train_finetune(self) -> None:
        """Train everything, from the chosen weights of stage 1."""
        cfg, finetune = self.cfg, self.cfg.graft.finetune
        set_seed(1_000_003 * cfg.train.seed + 2)
        engine, extra = self._build_finetune_engine()
        held_out = bool(len(self.datamanager.val_query))
        context = StageContext(
            kind="finetune",
            folder=self._stage_folder(2),
            max_epoch=finetune.max_epoch,
            checkpoint_freq=cfg.train.checkpoint_freq,
            eval_freq=cfg.test.eval_freq,
            start_eval=cfg.test.start_eval,
            static={**self._static(), "stage1": self.fingerprint},
            validate=self._validate_image if held_out else None,
            monitor=None if held_out else self._monitor_image,
        )
        engine.attach(context, **extra)
        self.engine = engine  # type: ignore[assignment]
        if self.resume and context.last.is_file():
            state = ckpt.load(context.last, kind="finetune")
            if state["stage1"] != self.fingerprint:
                raise UserError(
                    f"checkpoint '{context.last}' goes on from another stage 1 than that of '{self._stage_folder(1)}'; "
                    "train stage 2 again in another 'data.save_dir', or put stage 1 back."
                )
            engine.restore(state, context.last)
            note_changes(state, cfg)
            print(f"resuming stage 2 after epoch {engine.first_epoch} from '{context.last}'")
        if engine.first_epoch >= context.max_epoch and context.last.is_file():
            print(f"stage 2 is complete ({context.max_epoch} epochs)")
            return
        started = time.perf_counter()
        print(f"stage 2: everything trains, {context.max_epoch} epochs from stage 1, epoch {self.selected.get('stage1', 0)}")
        engine.fit(start_eval=cfg.test.start_eval, print_freq=cfg.train.print_freq)
        if context.max_epoch == 0:
            ckpt.save(context.last, engine._state(0))
        print(f"stage 2 took {time.perf_counter() - started:.0f} s")

    def _load_finetuned(self) -> None:
        """Put the chosen stage-2 weights into the model."""
        folder = self._stage_folder(2)
        path = folder / "best.pth.tar"
        if not path.is_file():
            path = folder / "last.pth.tar"
        if not path.is_file():
            raise UserError(
                f"no stage-2 checkpoint in '{folder}'; train it first (without --eval-only), or test stage 1 alone by "
                "'train.stages [1]'."
            )
        state = ckpt.load(path, kind="finetune")
        self.pruning = state.get("pruning")
        if self.pruning is not None:
            fit_shapes(self.bare, state["state_dict"])
        ckpt.load_weights(self.bare, state["state_dict"], path=path)
        if self.pruning is not None:
            self.parameters = inference_parameters(self.bare) - zero_weights(self.bare)
        self.history["stage2"] = ckpt.load(folder / "last.pth.tar", kind="finetune")["history"]
        self.selected["stage2"] = state["epoch"]
        self.fingerprint = ckpt.fingerprint(self.bare)

    def _train_second(self) -> None:
        self._train_finetune()

    def _prepare_test(self, *, second: bool) -> None:
        if second:
            self._load_finetuned()

    # --- tests --------------------------------------------------------------------------------------------------------
    def subsets(self) -> list[tuple[str, ...]]:
        """Return the modalities to test with, one tuple per row of the table; the first is the headline."""
        trained = tuple(self.cfg.multimodal.modalities)
        return [tuple(words.split("+")) for words in self.cfg.multimodal.test] or [trained]

    def _subset_features(self, name: str, subset: Sequence[str]) -> TestFeatures:
        sets = self.datamanager.test_dataset[name]
        whole = tuple(subset) == tuple(self.cfg.multimodal.modalities)
        self.engine.present = None if whole else tuple(subset)
        part = "" if whole else "-" + "".join(subset)
        try:
            return TestFeatures(
                self._bank(f"{name}{part}-query", sets["query"]), self._bank(f"{name}{part}-gallery", sets["gallery"])
            )
        finally:
            self.engine.present = None

    def _test_features(self, name: str) -> TestFeatures:
        return self._subset_features(name, self.subsets()[0])

    def _describe_input(self) -> str:
        multimodal = self.cfg.multimodal
        ranges = f"|range {multimodal.pixel_range}" if multimodal.pixel_range else ""
        return f"{multimodal.modalities}|{multimodal.mean}|{multimodal.std}|{self.engine.present}{ranges}"

    def _test(self, *, with_relation: bool) -> dict[str, TestFeatures]:
        from ..engine.ranked import draw_target

        kept = {}
        trained = list(self.cfg.multimodal.modalities)
        title = TITLES[self.cfg.graft.fusion]
        for name in self.cfg.data.targets:
            for index, subset in enumerate(self.subsets()):
                features = self._subset_features(name, subset)
                evaluator = Evaluator(name, features, options=self._options(), parameters=self.parameters)
                label = f"{title}, {'+'.join(subset)}"
                missing = [modality for modality in trained if modality not in subset]
                if missing:
                    label += f" (without {', '.join(missing)})"
                    self.notes.append(f"{name}: {'+'.join(subset)} tests without {', '.join(missing)}.")
                self.rows.append(evaluator.baseline(label))
                if index == 0:
                    kept[name] = features
                    self.rows.extend(evaluator.rivals())
                    if self.cfg.test.visrank:
                        self._drawn.append(draw_target(self, evaluator, self._drawn))
        return kept

    def read_picture(self, source: Any) -> Any:
        """The first modality's picture of a data set's item."""
        plain = str(source) if isinstance(source, str) else tuple(source)
        multimodal = self.cfg.multimodal
        ranges = modality_ranges(multimodal.modalities, multimodal.pixel_range)
        return read_views(plain, source.modalities, [multimodal.modalities[0]], ranges=ranges)[0]


def build_run(cfg: Any, *, stages: list[int] | None = None, resume: bool = False) -> Run:
    """Return the run of a configuration: :class:`MultimodalRun` for ``model.name graft``, else :class:`Run`."""
    from ..config.defaults import MULTIMODAL_MODELS

    cls = MultimodalRun if cfg.model.name in MULTIMODAL_MODELS else Run
    return cls(cfg, stages=stages, resume=resume)


__all__ = ["MultimodalEngine", "MultimodalRun", "build_run"]
