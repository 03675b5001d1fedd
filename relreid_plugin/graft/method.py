"""GraFT: several images of a sample, fused gradually by learned tokens; two stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..methods import Method, Panel, Table
from . import config


class GraFT(Method):
    """GraFT: several images of a sample, fused gradually by learned tokens; two stages."""

    name = "graft"
    models = {"graft": "relreid_plugin.graft.build:graft"}
    several = frozenset(models)
    example = "graft_embedded.yml"
    choices = {"train.lr_scheduler": ("sqrt",)}
    ranges, idle, uses, resume = config.RANGES, config.IDLE, config.USES, config.RESUME

    def add_config(self, cfg: Any) -> None:
        """Keys of ``graft``."""
        config.add_config(cfg)

    def validate(self, cfg: Any) -> None:
        """See :func:`relreid_plugin.graft.config.validate`."""
        config.validate(cfg)

    def panels(self, folder: Path, metrics: Mapping[str, Any]) -> list[Panel | Table]:
        """By test set: mAP over the parameters that prunings of the run left, and what every modality is worth."""
        from .pruning import pruning_curves
        from .scores import modality_tables

        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name, title in (("prune", "single weights"), ("prune-structured", "heads and channels")):
            for target, points in pruning_curves(folder / name).items():
                found.setdefault(target, {})[title] = points
        curves = [
            Panel("Pruning", "parameters left, millions", "mAP, %", lines, target=target) for target, lines in found.items()
        ]
        return [*modality_tables(folder, metrics), *curves]

    def network(self, cfg: Any) -> Any:
        """Triplets, a frozen backbone in stage 1, and tests with modalities missing."""
        from .network import GraFTNetwork

        return GraFTNetwork(cfg)

    def stages(self, cfg: Any) -> list[Any]:
        """Stage 2, in which everything trains."""
        from .stage import FinetuneStage

        return [FinetuneStage()]

    def stage_count(self, cfg: Any) -> int:
        """One."""
        return int(cfg.model.name in self.models)


METHOD = GraFT()
