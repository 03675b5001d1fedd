"""Building vision transformers, plain and TransReID, and putting attention into networks, from a configuration."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..engine.models import adapt, configured, configured_vit
from ..errors import UserError
from ..methods import BASELINE
from .dcs import ChannelSelection, GateNoise, replace_attention
from .placement import place_channel_attention, place_dcs
from .transreid import VisionTransformerReID


def add_attention(cfg: Any, network: nn.Module) -> None:
    """Put the attention that ``rib.attention`` names into a network."""
    rib = cfg.rib
    if rib.attention == "dcs":
        noise = GateNoise(rib.dcs.seed)
        if hasattr(network, "blocks") and hasattr(network, "patch_embed"):
            if rib.places:
                raise UserError("'rib.places' is for CNNs; in a vision transformer every block selects channels.")
            replace_attention(network, init_bias=rib.dcs.init_bias, noise=noise)
        else:
            place_dcs(
                network,
                list(rib.places),
                image_size=(cfg.data.height, cfg.data.width),
                reduction=rib.dcs.reduction,
                init_bias=rib.dcs.init_bias,
                noise=noise,
            )
        if cfg.model.name == BASELINE:
            draw_gates(cfg, network)
    elif rib.attention in ("se", "cbam"):
        place_channel_attention(network, rib.attention, list(rib.places), reduction=rib.reduction)


def draw_gates(cfg: Any, model: nn.Module) -> None:
    """Draw the logits of all gates of a finished model, where ``rib.dcs.control`` is ``random``."""
    dcs = cfg.rib.dcs
    if cfg.rib.attention == "dcs" and dcs.control == "random":
        open_at = 1 / (1 + math.exp(-dcs.init_bias))
        ChannelSelection(model).draw(dcs.keep, dcs.keep_noise, open_at=open_at, seed=dcs.seed)


def _build_vit(cfg: Any, num_classes: int, pretrained: bool, **options: Any) -> VisionTransformerReID:
    vit = configured_vit(cfg, pretrained)
    adapt(cfg, vit)
    size = (cfg.data.height, cfg.data.width)
    model = VisionTransformerReID(vit, num_classes, image_size=size, neck_feature=cfg.head.neck_feature, **options)
    draw_gates(cfg, model)  # those of the jigsaw module, a copy of the last block, too
    return model


def vit_baseline(
    num_classes: int,
    loss: str = "triplet",
    pretrained: bool = True,
    use_gpu: bool = True,
    *,
    cfg: Any = None,
    num_cameras: int = 0,
) -> VisionTransformerReID:
    """Build a plain vision transformer with BNNeck from ``backbone.name timm:…`` and the keys ``vit``, ``head``, ``rib``.

    Args:
        num_classes: Training identities.
        loss: Not read; the model trains returning (logits, features).
        pretrained: timm's weights.
        use_gpu: Not read; the engine moves the model.
        cfg: Configuration; ``None`` takes the defaults.
        num_cameras: Not read; the plain baseline has no camera embedding.

    Raises:
        UserError: ``loss.name softmax``, a backbone that is no vision transformer of timm, or weights that cannot be had.
    """
    cfg = configured("vit_baseline", loss, cfg)
    return _build_vit(cfg, num_classes, pretrained)


def transreid(
    num_classes: int,
    loss: str = "triplet",
    pretrained: bool = True,
    use_gpu: bool = True,
    *,
    cfg: Any = None,
    num_cameras: int = 0,
) -> VisionTransformerReID:
    """Build TransReID (He et al. 2021): overlapping patches, camera embedding, jigsaw module; keys as ``vit_baseline``.

    Args:
        num_classes: Training identities.
        loss: Not read; the model trains returning lists of logits and features, which ``composite`` takes.
        pretrained: timm's weights.
        use_gpu: Not read; the engine moves the model.
        cfg: Configuration; ``None`` takes the defaults.
        num_cameras: Cameras of the training set; 0, for data without camera labels, turns the camera embedding off.

    Raises:
        UserError: As for ``vit_baseline``.
    """
    cfg = configured("transreid", loss, cfg)
    vit = cfg.vit
    return _build_vit(
        cfg,
        num_classes,
        pretrained,
        stride=vit.stride,
        num_cameras=num_cameras if vit.camera_weight > 0 else 0,
        camera_weight=vit.camera_weight,
        parts=vit.parts,
        shift=vit.shift,
        groups=vit.groups,
    )
