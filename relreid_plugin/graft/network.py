"""GraFT's network in a run: stage 1 with the backbone frozen, pruned weights, and tests with modalities missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from ..backbones.files import WeightFile, read_weight_file
from ..data.ranges import modality_ranges
from ..data.views import read_views
from ..engine.base import EngineMixin
from ..engine.evaluator import inference_parameters
from ..engine.network import Network, View
from ..engine.stages import take_weights
from ..engine.updates import Practice, Updates
from ..errors import UserError
from ..host import build_optimizer, build_scheduler, cap_workers, worker_init
from .pruned import fit_shapes, zero_weights
from .schedule import sqrt_lambda
from .scores import TITLES
from .stage import build_engine
from .triplets import TripletSampler

if TYPE_CHECKING:
    from ..engine.runner import Run


class GraFTNetwork(Network):
    """The network of GraFT or one of its rivals.

    Args:
        cfg: Configuration of the run.
    """

    _pruned_weights = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        if cfg.data.type != "image":
            raise UserError(f"'model.name {cfg.model.name}' works with 'data.type image', not with '{cfg.data.type}'.")

    # --- weights ------------------------------------------------------------------------------------------------------
    def stands_alone(self, run: Run) -> bool:
        """Whether the folder holds a stage-2 model without its stage 1, a pruned one, and no other weights are named."""
        first, second = (run.stage_folder(stage) / "last.pth.tar" for stage in (1, 2))
        alone = 2 in self.cfg.train.stages and second.is_file() and not first.is_file()
        return alone and not (self.cfg.model.load_weights or self.cfg.model.resume)

    def prepare_weights(self, model: nn.Module, file: WeightFile) -> None:
        """Make the model as small as the pruned weights of a file."""
        self._pruned_weights = "pruning" in file.content and isinstance(file.content.get("state_dict"), dict)
        if self._pruned_weights and fit_shapes(model, file.content["state_dict"]):
            print(f"'{file.path}' has fewer heads and channels: so has the model now")

    def _take_pruned_weights(self, run: Run) -> None:
        """Weights given by a file that were pruned: count what is left, once the model is as small."""
        key = "model.load_weights" if self.cfg.model.load_weights else "model.resume"
        if key == "model.resume" and self.cfg.model.resume:
            if "pruning" in read_weight_file(self.cfg.model.resume, key=key).content:
                take_weights(run, run.bare, key)
        if not self._pruned_weights:
            return
        run.parameters = inference_parameters(run.bare) - (0 if run.stages else zero_weights(run.bare))

    # --- training -----------------------------------------------------------------------------------------------------
    def build_engine(self, run: Run) -> tuple[EngineMixin, dict[str, Any]]:
        """The engine of stage 1; with stage 1 alone (``train.stages [1]``) the backbone is frozen all the same."""
        cfg = self.cfg
        self._take_pruned_weights(run)
        run.bare.freeze_backbone()
        if cfg.graft.sampling == "triplets":
            self._sample_triplets(run)
        optimizer = build_optimizer(run.model, cfg)
        per_step = cfg.train.lr_scheduler == "sqrt"
        if per_step:
            updates = Updates(Practice.of(cfg)).updates_of(len(run.datamanager.train_loader))
            total = max(1, cfg.train.max_epoch * updates)
            factor = sqrt_lambda(total, warmup_steps=cfg.graft.warmup_steps, cooldown=cfg.graft.cooldown)
            scheduler: LRScheduler = LambdaLR(optimizer, factor)
        else:
            scheduler = build_scheduler(optimizer, cfg)
        weights = cfg.loss.composite
        return build_engine(
            run,
            optimizer,
            scheduler,
            per_step=per_step,
            center_lr=weights.center_lr,
            ce=weights.ce,
            triplet=weights.triplet,
            center=weights.center,
            label_smoothing=weights.smoothing if cfg.loss.softmax.label_smooth else 0.0,
        )

    def classified(self, items: int) -> int:
        """The anchors, where a batch is triplets."""
        return items // 3 if self.cfg.graft.sampling == "triplets" else items

    def _sample_triplets(self, run: Run) -> None:
        manager, cfg = run.datamanager, self.cfg
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

    # --- tests --------------------------------------------------------------------------------------------------------
    def views(self) -> list[View]:
        """One per subset of the modalities to test with."""
        trained, title = list(self.cfg.multimodal.modalities), TITLES[self.cfg.graft.fusion]
        found = []
        for subset in [tuple(words.split("+")) for words in self.cfg.multimodal.test] or [tuple(trained)]:
            whole, named = list(subset) == trained, "+".join(subset)
            missing = ", ".join(modality for modality in trained if modality not in subset)
            found.append(
                View(
                    f"{title}, {named}" + (f" (without {missing})" if missing else ""),
                    "" if whole else "-" + "".join(subset),
                    () if whole else subset,
                    f"{named} tests without {missing}." if missing else "",
                )
            )
        return found

    @contextlib.contextmanager
    def seeing(self, run: Run, view: View) -> Iterator[None]:
        """Show the model the modalities of a view."""
        engine: Any = run.engine
        engine.present = view.subset or None
        try:
            yield
        finally:
            engine.present = None

    def describe_input(self, run: Run) -> str:
        """Modalities, their normalisation, and which of them are there."""
        multimodal, engine = self.cfg.multimodal, run.engine
        ranges = f"|range {multimodal.pixel_range}" if multimodal.pixel_range else ""
        return f"{multimodal.modalities}|{multimodal.mean}|{multimodal.std}|{engine.present}{ranges}"

    def read_picture(self, run: Run, source: Any) -> Any:
        """The first modality's picture of a data set's item."""
        return self._views(source, [self.cfg.multimodal.modalities[0]])[0]

    def read_pictures(self, run: Run, source: Any) -> dict[str, Any]:
        """The picture of every modality that is trained on."""
        names = list(self.cfg.multimodal.modalities)
        return dict(zip(names, self._views(source, names)))

    def _views(self, source: Any, wanted: Sequence[str]) -> list[Any]:
        plain: str | tuple[str, ...] = str(source) if isinstance(source, str) else tuple(source)
        multimodal = self.cfg.multimodal
        ranges = modality_ranges(multimodal.modalities, multimodal.pixel_range)
        return read_views(plain, source.modalities, wanted, ranges=ranges)


__all__ = ["TITLES", "GraFTNetwork"]
