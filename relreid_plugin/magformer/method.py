"""MagFormer, and NFormer and MALAA beside it: gallery features refine each other."""

from __future__ import annotations

from typing import Any

from ..methods import Method
from . import config


class MagFormer(Method):
    """MagFormer, and NFormer and MALAA beside it: gallery features refine each other."""

    name = "magformer"
    example = "magformer_embedded.yml"
    ranges, idle, uses, resume = config.RANGES, config.IDLE, config.USES, config.RESUME

    def add_config(self, cfg: Any) -> None:
        """Keys of ``relation``."""
        config.add_config(cfg)

    def validate(self, cfg: Any) -> None:
        """See :func:`relreid_plugin.magformer.config.validate`."""
        config.validate(cfg)

    def schedule_notes(self, cfg: Any) -> list[str]:
        """Of ``relation.train``."""
        return config.schedule_notes(cfg)

    def stages(self, cfg: Any) -> list[Any]:
        """The relation encoder on the network's frozen features."""
        from .stage import RelationStage

        return [RelationStage()]

    def stage_count(self, cfg: Any) -> int:
        """One, where ``relation.attention`` is named."""
        return int(cfg.relation.attention != "none")

    def stage_hint(self, cfg: Any) -> str:
        """The key that adds the stage."""
        return "" if self.stage_count(cfg) else "'relation.attention' is 'none'; choose nformer, malaa or magformer"


METHOD = MagFormer()
