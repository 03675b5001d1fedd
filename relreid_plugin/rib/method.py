"""RIB: informative attention weights on CNNs and vision transformers, and TransReID beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..methods import Looks, Method, Panel, Table
from . import config


class RIB(Method):
    """RIB: informative attention weights on CNNs and vision transformers, and TransReID beside it."""

    name = "rib"
    models = {"vit_baseline": "relreid_plugin.rib.models:vit_baseline", "transreid": "relreid_plugin.rib.models:transreid"}
    seeds = ("rib.dcs.seed",)
    example = "rib_dcs_vit_embedded.yml"
    ranges, idle, resume = config.RANGES, config.IDLE, config.RESUME

    def add_config(self, cfg: Any) -> None:
        """Keys of ``rib``, and those of ``vit`` that TransReID alone has."""
        config.add_config(cfg)

    def validate(self, cfg: Any) -> None:
        """See :func:`relreid_plugin.rib.config.validate`."""
        config.validate(cfg)

    def adapt(self, cfg: Any, network: Any) -> None:
        """Put the attention that ``rib.attention`` names into a network."""
        from .models import add_attention

        add_attention(cfg, network)

    def observers(self, cfg: Any, model: Any, *, num_classes: int, feature_dim: int | None) -> list[Any]:
        """The information bottleneck bound, and the gates' temperature and kept channels."""
        from .observers import build_observers

        return build_observers(cfg, model, num_classes=num_classes, feature_dim=feature_dim)

    def looks(self) -> Looks:
        """Grad-CAM, and mAP over the covered part of the queries."""
        from .looks import RIBLooks

        return RIBLooks()

    def panels(self, folder: Path, metrics: Mapping[str, Any]) -> list[Panel | Table]:
        """The share of channels that every gate keeps by the test rule, over the epochs."""
        records = metrics["history"].get("stage1", [])
        names = [key for key in dict.fromkeys(key for record in records for key in record) if key.startswith("kept_test/")]
        lines = {
            name.removeprefix("kept_test/"): [(record["epoch"], 100 * record[name]) for record in records if name in record]
            for name in names
        }
        return [Panel("Channels that the gates keep", "epoch", "kept channels, %", lines)] if lines else []

    def embeds_cameras(self, cfg: Any) -> bool:
        """TransReID's, unless its factor is 0."""
        return cfg.model.name == "transreid" and cfg.vit.camera_weight > 0

    def group_parameters(self, cfg: Any, optimizer: Any, model: Any) -> None:
        """Give the gates the learning rate of ``rib.dcs.lr_mult``."""
        from .dcs import speed_up_gates

        speed_up_gates(optimizer, model, cfg.rib.dcs.lr_mult)


METHOD = RIB()
