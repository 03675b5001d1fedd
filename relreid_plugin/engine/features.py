"""Features of a run's network: of training, held-out and test images, kept in the run's bank."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..data.cameras import UNKNOWN, CameraRows
from ..errors import UserError, did_you_mean
from ..features.sets import Features, TestFeatures
from ..host import make_loader
from ..metrics.ranking import RankingResult
from . import checkpoint as ckpt
from .bank import bank_key, load_or_extract
from .base import Alter
from .distributed import seeded_loader
from .evaluator import Evaluator
from .logs import set_seed
from .network import View

if TYPE_CHECKING:
    from .runner import Run


class RunFeatures:
    """The features of a run.

    Args:
        run: The run; its engine has the weights.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def bank(
        self,
        name: str,
        records: list[tuple],
        *,
        keep: bool = True,
        augment: int | None = None,
        target: str = "",
        alter: Alter | None = None,
    ) -> Features:
        """Return features of a list of samples, from the folder's bank where they are the same.

        Args:
            name: Name in the bank.
            records: The host's tuples.
            keep: Read and write the bank.
            augment: Training transform, drawn by this number; ``None``: test transform.
            target: The test set whose samples they are.
            alter: Changes a batch of normalised images before the model sees it.
        """
        run, cfg, manager, engine = self.run, self.run.cfg, self.run.datamanager, self.run.engine
        rows = self.cameras(target) if target else engine.training_cameras
        transform = manager.transform_te if augment is None else manager.transform_tr

        def extract() -> Features:
            engine.set_model_mode("eval")
            engine.camera_rows = rows
            loader = make_loader(manager, records, transform, cfg.test.batch_size, cfg.data.workers)
            with ckpt.preserved_rng():
                if augment is not None:
                    set_seed(cfg.train.seed * 1_000_003 + augment)
                    loader = seeded_loader(loader) if cfg.data.sample_seeds else loader
                found = engine.extract(loader, label=name, alter=alter)
            return replace(found, identity_names=manager.identity_names.get(target, {})) if target else found

        if not keep:
            return extract()
        description = f"{cfg.data.height}x{cfg.data.width}|{run.network.describe_input(run)}"
        if engine.reads_cameras:
            description += f"|cameras {rows.description}"
        if augment is not None:
            description += f"|{cfg.data.transforms}|{cfg.train.seed}|{augment}|"
            description += "seeds" if cfg.data.sample_seeds else f"{cfg.data.workers}"
        key = bank_key(run.fingerprint, records, description)
        return load_or_extract(run.folder / "bank", name, key, extract, optional=run.inference)

    def cameras(self, name: str) -> CameraRows:
        """Return the rows of the model's camera embedding for the cameras of a test set."""
        run = self.run
        if not run.engine.reads_cameras:
            return UNKNOWN
        _ = run.datamanager.test_dataset[name]  # opens it, where that is left until it is needed
        return run.cameras.test_rows(name, run.datamanager.camera_names.get(name, {}))

    def test(self, name: str, view: View | None = None) -> TestFeatures:
        """Return query and gallery features of a test set under a view; ``None``: the headline's."""
        run = self.run
        if run.cfg.data.type == "video":
            return run.engine.extract_target(name)
        sets = run.datamanager.test_dataset[name]
        view = run.network.views()[0] if view is None else view
        with run.network.seeing(run, view):
            return TestFeatures(
                self.bank(f"{name}{view.part}-query", sets["query"], target=name),
                self.bank(f"{name}{view.part}-gallery", sets["gallery"], target=name),
            )

    def altered(self, name: str, alter: Alter | None = None) -> TestFeatures:
        """Return features of a test set, its queries changed by ``alter`` before the model sees them.

        Raises:
            UserError: No such test set, or tracklets.
        """
        run = self.run
        if name not in run.datamanager.test_dataset:
            raise UserError(f"'{name}' is no test set of run '{run.folder}'{did_you_mean(name, run.cfg.data.targets)}")
        if run.cfg.data.type == "video":
            raise UserError(f"run '{run.folder}' is one of tracklets; queries can only be changed with 'data.type image'.")
        sets = run.datamanager.test_dataset[name]
        query = self.bank(f"{name}-query", sets["query"], keep=alter is None, target=name, alter=alter)
        return TestFeatures(query, self.bank(f"{name}-gallery", sets["gallery"], target=name))

    def held_out(self) -> TestFeatures | None:
        """Return features of the identities that ``train.val_fraction`` holds out; ``None`` without any."""
        manager = self.run.datamanager
        if not len(manager.val_query):
            return None
        return TestFeatures(self.bank("val-query", manager.val_query), self.bank("val-gallery", manager.val_gallery))

    # --- while the network trains -------------------------------------------------------------------------------------
    def score(self, features: TestFeatures) -> RankingResult:
        """Return the scores of features under the metric of the run's image-model row."""
        return Evaluator("test", features, options=self.run.options(), parameters=0).baseline_result()

    def validate(self) -> RankingResult:
        """Return the scores of the held-out identities by the weights of this moment."""
        manager = self.run.datamanager
        query = self.bank("val-query", manager.val_query, keep=False)
        return self.score(TestFeatures(query, self.bank("val-gallery", manager.val_gallery, keep=False)))

    def monitor(self) -> dict[str, float]:
        """Return mAP and R1 of every test set by the weights of this moment."""
        run, scores = self.run, {}
        for name in run.cfg.data.targets:
            run.engine.camera_rows = self.cameras(name)
            result = self.score(run.engine.extract_target(name))
            scores[f"{name}/mAP"], scores[f"{name}/R1"] = float(result.mAP), float(result.rank(1))
        return scores
