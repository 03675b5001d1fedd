"""Building GraFT and its rivals from a configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.models import configured, configured_vit
from .model import GraFT


def graft(
    num_classes: int,
    loss: str = "triplet",
    pretrained: bool = True,
    use_gpu: bool = True,
    *,
    cfg: Any = None,
    num_cameras: int = 0,
) -> GraFT:
    """Build GraFT, or a rival, from ``backbone.name timm:…`` and the keys ``vit``, ``graft``, ``multimodal`` and ``data``.

    Args:
        num_classes: Training identities.
        loss: Not read; the model trains returning logits, fused tokens and data tokens.
        pretrained: timm's weights.
        use_gpu: Not read; the engine moves the model.
        cfg: Configuration; ``None`` takes the defaults.
        num_cameras: Not read.

    Raises:
        UserError: ``loss.name softmax``, a backbone that gives no tokens, or weights that cannot be had.
    """
    cfg = configured("graft", loss, cfg)

    def backbone(channels: int) -> nn.Module:
        return configured_vit(cfg, pretrained, image_size=(cfg.data.height, cfg.data.width), channels=channels)

    return GraFT(
        backbone,
        num_classes,
        modalities=list(cfg.multimodal.modalities),
        fusion=cfg.graft.fusion,
        heads=cfg.graft.heads,
        feedforward=cfg.graft.feedforward,
        dropout=cfg.graft.dropout,
        token_index=cfg.graft.token_index,
        checkpointing=cfg.graft.checkpointing,
    )
