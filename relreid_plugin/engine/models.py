"""The plug-in's models as builders of the host's model factory."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..backbones.baseline import BNNeckBaseline
from ..backbones.networks import build_backbone, build_vit
from ..config.defaults import get_default_config
from ..errors import UserError
from ..graft.model import GraFT
from ..host import build_model, register_model
from ..rib.dcs import GateNoise, replace_attention
from ..rib.placement import place_channel_attention, place_dcs
from ..rib.transreid import VisionTransformerReID


def _host_features(name: str, pretrained: bool) -> nn.Module:
    """One of the host's models without its classifier; in training it returns (feature, feature)."""
    model = build_model(name, 1, "triplet", pretrained, False)
    if isinstance(getattr(model, "classifier", None), nn.Module):
        model.classifier = nn.Identity()
    return model


def _refuse_softmax(name: str, loss: str) -> None:
    if loss == "softmax":
        raise UserError(
            f"'model.name {name}' trains with 'loss.name composite' or 'triplet'; for cross-entropy alone set the "
            "weights of 'loss.composite'."
        )


def _add_attention(cfg: Any, network: nn.Module) -> None:
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
    elif rib.attention in ("se", "cbam"):
        place_channel_attention(network, rib.attention, list(rib.places), reduction=rib.reduction)


def bnneck_baseline(
    num_classes: int,
    loss: str = "triplet",
    pretrained: bool = True,
    use_gpu: bool = True,
    *,
    cfg: Any = None,
    num_cameras: int = 0,
) -> BNNeckBaseline:
    """Build a backbone with BNNeck from the keys ``backbone``, ``head``, ``rib`` and ``data``.

    Args:
        num_classes: Training identities.
        loss: Not read; the model trains returning (logits, features) and so suits ``triplet`` and ``composite``.
        pretrained: ImageNet weights for the backbone.
        use_gpu: Not read; the engine moves the model.
        cfg: Configuration; ``None`` takes the defaults.
        num_cameras: Not read.

    Raises:
        UserError: ``loss.name softmax``, an unknown backbone, weights that cannot be had, or a backbone in which
            ``rib.attention`` finds no place.
    """
    cfg = cfg if cfg is not None else get_default_config()
    _refuse_softmax("bnneck_baseline", loss)
    backbone = build_backbone(
        cfg.backbone.name,
        pretrained=pretrained,
        weights=cfg.backbone.weights,
        partial=cfg.model.partial_weights,
        output_stride=cfg.backbone.output_stride,
        image_size=(cfg.data.height, cfg.data.width),
        host_builder=_host_features,
    )
    _add_attention(cfg, backbone.body)
    return BNNeckBaseline(backbone, num_classes, feature_dim=cfg.head.feature_dim, neck_feature=cfg.head.neck_feature)


def _build_vit(cfg: Any, num_classes: int, pretrained: bool, **options: Any) -> VisionTransformerReID:
    vit = build_vit(
        cfg.backbone.name,
        pretrained=pretrained,
        weights=cfg.backbone.weights,
        partial=cfg.model.partial_weights,
        patch_size=cfg.vit.patch_size,
        depth=cfg.vit.depth,
        drop_path=cfg.vit.drop_path,
    )
    _add_attention(cfg, vit)
    size = (cfg.data.height, cfg.data.width)
    return VisionTransformerReID(vit, num_classes, image_size=size, neck_feature=cfg.head.neck_feature, **options)


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
    cfg = cfg if cfg is not None else get_default_config()
    _refuse_softmax("vit_baseline", loss)
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
    cfg = cfg if cfg is not None else get_default_config()
    _refuse_softmax("transreid", loss)
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
    cfg = cfg if cfg is not None else get_default_config()
    _refuse_softmax("graft", loss)

    def backbone(channels: int) -> nn.Module:
        return build_vit(
            cfg.backbone.name,
            pretrained=pretrained,
            weights=cfg.backbone.weights,
            partial=cfg.model.partial_weights,
            patch_size=cfg.vit.patch_size,
            depth=cfg.vit.depth,
            drop_path=cfg.vit.drop_path,
            image_size=(cfg.data.height, cfg.data.width),
            channels=channels,
        )

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


def register_models() -> None:
    """Add the plug-in's models to the host's factory."""
    register_model("bnneck_baseline", bnneck_baseline)
    register_model("vit_baseline", vit_baseline)
    register_model("transreid", transreid)
    register_model("graft", graft)
