"""The face that the method shows to relreid_plugin; it is imported with every configuration, so torch is not."""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode as CN

from relreid_plugin.config.idle import Rule
from relreid_plugin.config.ranges import SHARE, WEIGHT, count
from relreid_plugin.errors import UserError
from relreid_plugin.methods import Method, ResumeKeys, first_stage


def whitens(cfg: Any) -> bool:
    """Whether a configuration's run has the whitening stage."""
    return cfg.fourth.epochs > 0 and first_stage("fourth", cfg) in cfg.train.stages


class FourthMethod(Method):
    """A small network, a loss that spreads its features, and a whitening stage."""

    name = "fourth"
    models = {"fourth_net": "fourth_method.network:fourth_net"}
    ranges = {
        "fourth.width": count(1, 4096),
        "fourth.spread": WEIGHT,
        "fourth.epochs": count(0),
        "fourth.shrinkage": SHARE,
    }
    idle = (
        Rule(("fourth.width",), lambda c: c.model.name == "fourth_net", "it belongs to 'model.name fourth_net'"),
        Rule(("fourth.shrinkage",), whitens, "there is no whitening stage"),
    )
    resume = ResumeKeys(later=("fourth.epochs", "fourth.shrinkage"), epochs={"whitening": "fourth.epochs"})

    def add_config(self, cfg: Any) -> None:
        """Keys of ``fourth``."""
        cfg.fourth = CN()
        cfg.fourth.width = 16  # channels of fourth_net
        cfg.fourth.spread = 0.0  # weight of the loss that spreads features
        cfg.fourth.epochs = 0  # epochs of the whitening stage; 0: none
        cfg.fourth.shrinkage = 0.1  # share of the mean variance in every direction

    def validate(self, cfg: Any) -> None:
        """The further loss belongs to the composite one."""
        if cfg.fourth.spread > 0 and cfg.loss.name != "composite":
            raise UserError(f"'fourth.spread' belongs to 'loss.name composite', not to '{cfg.loss.name}'.")

    def stages(self, cfg: Any) -> list[Any]:
        """The whitening stage."""
        from .stage import WhiteningStage

        return [WhiteningStage()]

    def stage_count(self, cfg: Any) -> int:
        """One, where it has epochs."""
        return int(cfg.fourth.epochs > 0)

    def observers(self, cfg: Any, model: Any, *, num_classes: int, feature_dim: int | None) -> list[Any]:
        """The further loss."""
        from .loss import Spread

        return [Spread(cfg.fourth.spread)] if cfg.fourth.spread > 0 else []


METHOD = FourthMethod()
