"""Stage 2: training the relation encoder on the frozen image model's features, in the host's loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..backbones.losses import CompositeLoss
from ..engine import checkpoint as ckpt
from ..engine.base import EngineMixin
from ..engine.image import _CompositeStep
from ..engine.schedules import warmup_lambda
from ..features.sets import FeatureSet, TestFeatures
from ..metrics.neighbours import SearchConfig, normalise
from .cameras import CameraRule
from .discriminant import Discriminant
from .encoder import RelationEncoder
from .neighbourhoods import NeighbourhoodDataset
from .recipe import Episode, HeadChoice, choose_recipe, fold_episodes, with_recipe


class BankDataManager:
    """The part of the host's data manager that its engine reads, over a feature bank.

    Args:
        bank: Training features with labels in [0, C).
        dataset_options: Keyword arguments of :class:`NeighbourhoodDataset`.
        num_train_pids: Training identities C.
        name: Name of the source.
    """

    def __init__(self, bank: FeatureSet, *, dataset_options: dict[str, Any], num_train_pids: int, name: str) -> None:
        self.dataset = NeighbourhoodDataset(
            normalise(bank.features),
            torch.from_numpy(bank.pids).long(),
            cameras=torch.from_numpy(bank.camids).long(),
            **dataset_options,
        )
        self.train_loader = DataLoader(self.dataset, batch_size=None, shuffle=False, num_workers=0)
        self.test_loader: dict[str, Any] = {}
        self.sources = self.targets = [name]
        self.num_train_pids = num_train_pids
        self.data_type = "features"
        self.transform_tr = None

    def replace(self, bank: FeatureSet) -> None:
        """Use other features of the same images from now on."""
        self.dataset.features = normalise(bank.features)
        self.dataset.labels = torch.from_numpy(bank.pids).long()
        self.dataset.cameras = torch.from_numpy(bank.camids).long()


class _RelationStep(_CompositeStep):
    def forward_backward(self, data: Any) -> dict[str, float]:
        """One neighbourhood of features."""
        features, pids = data["features"], data["pids"]
        if self.use_gpu:
            features, pids = features.cuda(non_blocking=True), pids.cuda(non_blocking=True)
        logits, refined = self.model(features, cameras=data["camids"])
        return self.step(logits.float(), refined, pids)


class RelationEngine(EngineMixin, _RelationStep):
    """The stage-2 engine. ``refresh`` gives the bank of an epoch, or ``None`` to keep the one in use."""

    refresh: Callable[[int], FeatureSet | None] | None = None

    def train(self, print_freq: int = 10, fixbase_epoch: int = 0, open_layers: Any = None) -> None:
        """One epoch on the epoch's bank."""
        if self.refresh is not None:
            bank = self.refresh(self.epoch)
            if bank is not None:
                self.datamanager.replace(bank)
        self.datamanager.dataset.epoch = self.epoch
        super().train(print_freq=print_freq, fixbase_epoch=fixbase_epoch, open_layers=open_layers)


def build_encoder(cfg: Any, *, dim: int, num_classes: int) -> RelationEncoder:
    """Build the encoder that the keys of ``relation`` describe."""
    relation = cfg.relation
    return RelationEncoder(
        dim,
        num_classes,
        attention=relation.attention,
        num_layers=relation.num_layers,
        num_heads=relation.num_heads,
        num_landmarks=relation.num_landmarks,
        k=relation.k,
        neighbours=relation.neighbours,
        mlp_ratio=relation.mlp_ratio,
        dropout=relation.dropout,
        landmarks=relation.landmarks,
        landmark_seed=relation.landmark_seed,
        precision=relation.precision,
        init=relation.init,
        search=SearchConfig(**relation.search),
        block=relation.block,
        head=relation.head.kind != "none",
        rule=CameraRule(**relation.camera),
        residual=relation.residual,
    )


def fit_head(cfg: Any, encoder: RelationEncoder, bank: FeatureSet) -> None:
    """Fit the encoder's head, where it has one, on training features."""
    if encoder.head is not None:
        head = cfg.relation.head
        fit = Discriminant(bank.features, torch.from_numpy(bank.pids))
        encoder.head.set(HeadChoice(head.shrinkage, head.dims, head.soft, head.keep).of(fit))


def chosen_recipe(cfg: Any, bank: FeatureSet, held_out: TestFeatures | None) -> list[str]:
    """Choose the relation recipe where the configuration asks for one.

    Args:
        cfg: Configuration.
        bank: Training features.
        held_out: Identities that the image model was not trained on. Where stage 1 is trained in the run, they are fair; a
            frozen model has seen none of the training identities, and all of them take turns.

    Returns:
        ``KEY VALUE …``; empty without a recipe.
    """
    if cfg.relation.recipe == "none":
        return []
    select = cfg.relation.select
    if 1 in cfg.train.stages and held_out is not None:
        episodes = [Episode(bank, held_out.query, held_out.gallery)]
    else:
        if 1 in cfg.train.stages:
            print(
                "note: the recipe is chosen on identities that the image model was trained on, whose features are cleaner "
                "than any test set's; hold some out by 'train.val_fraction'."
            )
        episodes = fold_episodes(
            bank, folds=select.folds, identities=select.identities, images=select.images, seed=cfg.relation.train.seed
        )
    recipe = choose_recipe(episodes, cfg, alone=cfg.relation.k == 1)
    print(recipe.sentence())
    return recipe.overrides()


def encoder_of_state(cfg: Any, state: dict[str, Any], *, path: Path | str) -> RelationEncoder:
    """Build the encoder of a stage-2 checkpoint, with the recipe that was chosen for it.

    Raises:
        UserError: The weights do not fit the configuration.
    """
    encoder = build_encoder(with_recipe(cfg, state.get("recipe", [])), dim=state["dim"], num_classes=state["num_classes"])
    ckpt.load_weights(encoder, state["state_dict"], path=path)
    return encoder


def build_relation_engine(
    cfg: Any, bank: FeatureSet, encoder: RelationEncoder, *, num_classes: int, name: str
) -> tuple[RelationEngine, dict[str, Any]]:
    """Build the stage-2 engine with AdamW, the class centers' SGD and the schedule.

    Returns:
        The engine, and the further states that its checkpoints must hold.
    """
    train, weights = cfg.relation.train, cfg.relation.loss
    manager = BankDataManager(
        bank,
        dataset_options={
            "features_per_step": train.features_per_step,
            "steps": train.steps_per_epoch,
            "spread": tuple(train.spread),
            "noise": cfg.relation.bank.noise,
            "seed": cfg.relation.train.seed,
        },
        num_train_pids=num_classes,
        name=name,
    )
    loss = CompositeLoss(
        num_classes,
        encoder.dim,
        ce=weights.ce,
        triplet=weights.triplet,
        center=weights.center,
        margin=weights.margin,
        label_smoothing=0.1 if cfg.loss.softmax.label_smooth else 0.0,
    )
    if cfg.use_gpu and torch.cuda.is_available():
        encoder.cuda()
        loss.cuda()
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=train.lr, betas=tuple(train.betas), weight_decay=train.weight_decay
    )
    schedule = warmup_lambda(
        train.lr_scheduler,
        max_epoch=max(train.max_epoch, train.warmup_epochs + 1),
        stepsize=list(train.stepsize),
        gamma=train.gamma,
        warmup_epochs=train.warmup_epochs,
        warmup_factor=cfg.train.warmup_factor,
    )
    scheduler = LambdaLR(optimizer, schedule)
    states = loss.center_states(weights.center_lr)
    engine = RelationEngine(
        manager,
        encoder,
        optimizer,
        loss=loss,
        center_optimizer=states.get("center_optimizer"),
        scheduler=scheduler,
        use_gpu=cfg.use_gpu,
    )
    return engine, states
