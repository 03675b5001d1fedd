"""The relation stage: training the encoder on the frozen network's features, in the host's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..backbones.losses import CompositeLoss
from ..collective import Cut, current, rank, world
from ..engine import checkpoint as ckpt
from ..engine.attended import Attended
from ..engine.base import EngineMixin, StageContext
from ..engine.distributed import from_main
from ..engine.evaluator import Evaluator, Row, inference_parameters
from ..engine.image import _CompositeStep
from ..engine.logs import set_seed
from ..engine.stages import Stage, take_weights, train_engine
from ..engine.updates import Practice, Updates
from ..errors import UserError
from ..features.sets import Features, TestFeatures
from ..host.schedules import warmup_lambda
from ..metrics.neighbours import faiss_available, normalise
from ..metrics.ranking import RankingResult
from .attended import query_attention
from .discriminant import Discriminant
from .encoder import RelationEncoder
from .loading import build_encoder, encoder_of_state
from .neighbourhoods import NeighbourhoodDataset
from .recipe import Episode, HeadChoice, choose_recipe, fold_episodes, with_recipe

if TYPE_CHECKING:
    from ..engine.runner import Run


class BankDataManager:
    """The part of the host's data manager that its engine reads, over a feature bank.

    Args:
        bank: Training features with labels in [0, C).
        dataset_options: Keyword arguments of :class:`NeighbourhoodDataset`.
        num_train_pids: Training identities C.
        name: Name of the source.
    """

    def __init__(self, bank: Features, *, dataset_options: dict[str, Any], num_train_pids: int, name: str) -> None:
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

    def replace(self, bank: Features) -> None:
        """Use other features of the same images from now on."""
        self.dataset.features = normalise(bank.features)
        self.dataset.labels = torch.from_numpy(bank.pids).long()
        self.dataset.cameras = torch.from_numpy(bank.camids).long()


class _RelationStep(_CompositeStep):
    def forward_backward(self, data: Any) -> dict[str, float]:
        """One neighbourhood of features; each of several processes refines its rows of it."""
        features, pids = data["features"], data["pids"]
        if self.use_gpu:
            features, pids = features.cuda(non_blocking=True), pids.cuda(non_blocking=True)
        logits, refined = self.model(features, cameras=data["camids"])
        cut = current()
        pids = pids if cut is None else cut.take(pids)
        return self.step(logits.to(torch.promote_types(logits.dtype, torch.float32)), refined, pids)


class RelationEngine(EngineMixin, _RelationStep):
    """The stage-2 engine. ``refresh`` gives the bank of an epoch, or ``None`` to keep the one in use."""

    refresh: Callable[[int], Features | None] | None = None

    def share_loader(self, loader: Any) -> tuple[Any, Cut]:
        """Every process draws the same neighbourhoods; their rows are cut."""
        return loader, Cut(self.datamanager.dataset.count, 1, world(), rank())

    def train(self, print_freq: int = 10, fixbase_epoch: int = 0, open_layers: Any = None) -> None:
        """One epoch on the epoch's bank."""
        if self.refresh is not None:
            bank = self.refresh(self.epoch)
            if bank is not None:
                self.datamanager.replace(bank)
        self.datamanager.dataset.epoch = self.epoch
        super().train(print_freq=print_freq, fixbase_epoch=fixbase_epoch, open_layers=open_layers)


def fit_head(cfg: Any, encoder: RelationEncoder, bank: Features) -> None:
    """Fit the encoder's head, where it has one, on training features."""
    if encoder.head is not None:
        head = cfg.relation.head
        fit = Discriminant(bank.features, torch.from_numpy(bank.pids))
        encoder.head.set(HeadChoice(head.shrinkage, head.dims, head.soft, head.keep).of(fit))


def chosen_recipe(cfg: Any, bank: Features, held_out: TestFeatures | None) -> list[str]:
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


def build_relation_engine(
    cfg: Any, bank: Features, encoder: RelationEncoder, *, num_classes: int, name: str
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
    engine.updates = Updates(Practice.of(cfg, network=False))
    return engine, states


METHOD_NAMES = {"nformer": "+ NFormer", "malaa": "+ MALAA", "magformer": "+ MagFormer"}


class RelationStage(Stage):
    """The stage behind the network's: a relation encoder on its frozen features.

    Attributes:
        encoder: The tested encoder, once it was loaded.
    """

    kind = "relation"
    refines = True
    encoder: RelationEncoder | None = None
    _bank_epoch: int | None = None

    def check(self, run: Run) -> None:
        """Find out before the network is trained whether an encoder fits its features, and weights fit the encoder."""
        width: Any = getattr(run.bare, "test_dim", getattr(run.bare, "feature_dim", None))
        if width is None:
            return
        with ckpt.preserved_rng():
            try:
                encoder = build_encoder(run.cfg, dim=width, num_classes=2)
            except ValueError as error:
                raise UserError(f"keys of 'relation' do not fit features of width {width}: {error}") from None
            if run.cfg.relation.load_weights and self.number in run.stages:
                take_weights(run, encoder, "relation.load_weights", only_check=True, classes=2)
        encoder.search.resolve()

    def train(self, run: Run) -> None:
        """Train the encoder."""
        cfg = run.cfg
        if cfg.data.type == "video":
            raise UserError(f"stage {self.number} works on image data; set 'data.type image'.")
        records = run.datamanager.train_loader.dataset.train
        refresh = cfg.relation.bank.refresh
        bank = run.features.bank("train", records, augment=None if refresh == 0 else 0)
        set_seed(1_000_003 * cfg.train.seed + cfg.relation.train.seed)
        cfg, recipe = self._with_recipe(run, bank)
        encoder = build_encoder(cfg, dim=bank.features.shape[1], num_classes=run.datamanager.num_train_pids)
        fit_head(cfg, encoder, bank)
        if cfg.relation.load_weights:
            take_weights(run, encoder, "relation.load_weights")
        engine, extra = build_relation_engine(
            cfg, bank, encoder, num_classes=run.datamanager.num_train_pids, name="+".join(cfg.data.sources)
        )
        validation = run.features.held_out() if cfg.relation.train.eval_freq > 0 else None
        context = StageContext(
            kind=self.kind,
            folder=self.folder(run),
            max_epoch=cfg.relation.train.max_epoch,
            checkpoint_freq=cfg.train.checkpoint_freq,
            eval_freq=cfg.relation.train.eval_freq,
            static={
                **run.static(),
                "image_model": run.fingerprint,
                "dim": bank.features.shape[1],
                **({"recipe": recipe} if recipe else {}),
            },
            validate=None if validation is None else lambda: self._validate(run, encoder, validation),
            sample_seeds=cfg.data.sample_seeds,
            loggers=tuple(cfg.train.loggers),
            watch=run.watch,
        )
        if refresh > 0:
            engine.refresh = lambda epoch: self._refreshed_bank(run, records, epoch)

        def announce() -> None:
            print(
                f"stage {self.number}: {cfg.relation.attention}, {inference_parameters(encoder) / 1e6:.2f}M parameters, "
                f"{len(bank)} features, {len(engine.train_loader)} steps of {engine.datamanager.dataset.count} per epoch, "
                f"{context.max_epoch} epochs"
            )
            note_search(cfg, encoder)

        train_engine(
            run,
            self,
            engine,
            extra,
            context,
            announce=announce,
            belongs=lambda state, path: self._belongs(run, state, path),
        )

    def _with_recipe(self, run: Run, bank: Features) -> tuple[Any, list[str]]:
        """The stage's configuration, and the keys in it that held-out identities chose, now or before a resumed run."""
        state = self.newest(run) if run.resume else None
        if state is not None:
            recipe = state.get("recipe", [])
        else:
            with ckpt.preserved_rng():
                held_out = run.features.held_out()
                recipe = from_main(lambda: chosen_recipe(run.cfg, bank, held_out))
        return with_recipe(run.cfg, recipe), recipe

    def _refreshed_bank(self, run: Run, records: list[tuple], epoch: int) -> Features | None:
        refresh = run.cfg.relation.bank.refresh
        first = epoch - epoch % refresh
        if epoch != first and self._bank_epoch == first:
            return None
        self._bank_epoch = first
        return run.features.bank("train", records, augment=first)

    def _belongs(self, run: Run, state: dict[str, Any], path: Path) -> None:
        if state["image_model"] != run.fingerprint:
            raise UserError(
                f"checkpoint '{path}' belongs to another image model than that of '{run.stage_folder(self.number - 1)}'; "
                f"train stage {self.number} again in another 'data.save_dir', or put the image model back."
            )

    def _validate(self, run: Run, encoder: RelationEncoder, validation: TestFeatures) -> RankingResult:
        encoder.eval()
        if run.cfg.train.precision == "float64":  # tested as it will be
            encoder = copy.deepcopy(encoder).float()
        evaluator = Evaluator("validation", validation, options=run.options(), parameters=0)
        return evaluator.refined_result(encoder, run.cfg.relation.protocols[0])

    def load(self, run: Run) -> None:
        """Take the tested encoder, the best validated one, else the last, in evaluation mode.

        Raises:
            UserError: No checkpoint, or one over another image model.
        """
        folder, path, cfg = self.folder(run), self.tested_path(run), run.cfg
        if not path.is_file() and cfg.relation.load_weights:
            path = Path(cfg.relation.load_weights)
        if not path.is_file():
            raise UserError(
                f"no stage-{self.number} checkpoint in '{folder}'; train it first (without --eval-only), or test without "
                f"it by 'train.stages {[number for number in cfg.train.stages if number != self.number] or [1]}'."
            )
        state = ckpt.load(path, kind=self.kind)
        self._belongs(run, state, path)
        encoder = encoder_of_state(cfg, state, path=path)
        last = folder / "last.pth.tar"
        alone = path == last or not last.is_file()
        self.note_tested(run, state, state if alone else ckpt.load(last, kind=self.kind))
        if cfg.use_gpu:
            encoder.cuda()
        self.encoder = encoder.eval()

    def refiner(self, run: Run) -> RelationEncoder:
        """The tested encoder."""
        if self.encoder is None:
            self.load(run)
        assert self.encoder is not None
        return self.encoder

    def rows(self, run: Run, evaluator: Evaluator) -> list[Row]:
        """One row per protocol."""
        encoder = self.refiner(run)
        note_search(run.cfg, encoder)
        title = METHOD_NAMES[run.cfg.relation.attention]
        return [evaluator.relation(encoder, protocol=protocol, name=title) for protocol in run.cfg.relation.protocols]

    def attended(self, run: Run, data: TestFeatures) -> Attended:
        """Weights of every layer, each query alone with the gallery."""
        index, weight = query_attention(self.refiner(run), data)
        return Attended(METHOD_NAMES[run.cfg.relation.attention], index, weight)


def note_search(cfg: Any, encoder: RelationEncoder) -> None:
    """Say where faiss would search and is not installed."""
    if encoder.search.resolve() == "torch" and cfg.relation.search.backend == "auto" and not faiss_available():
        print("note: faiss is not installed; neighbours are searched exactly by torch ('pip install faiss-cpu' for faiss).")
