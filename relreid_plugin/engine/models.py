"""The plug-in's models as builders of the host's model factory."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..backbones.baseline import BNNeckBaseline, baseline_on
from ..backbones.networks import build_backbone, build_vit
from ..config.defaults import get_default_config
from ..errors import UserError
from ..host import build_model, register_model
from ..methods import BASELINE, builders, methods


def host_features(name: str, pretrained: bool) -> nn.Module:
    """One of the host's models without its classifier; in training it returns (feature, feature)."""
    model = build_model(name, 1, "triplet", pretrained, False)
    if isinstance(getattr(model, "classifier", None), nn.Module):
        model.classifier = nn.Identity()
    return model


def configured(name: str, loss: str, cfg: Any) -> Any:
    """Return the configuration of a model that trains returning logits and features; ``cfg`` ``None``: the defaults.

    Raises:
        UserError: ``loss.name softmax``, which such a model does not take.
    """
    if loss == "softmax":
        raise UserError(
            f"'model.name {name}' trains with 'loss.name composite' or 'triplet'; for cross-entropy alone set the "
            "weights of 'loss.composite'."
        )
    return cfg if cfg is not None else get_default_config()


def configured_vit(cfg: Any, pretrained: bool, **options: Any) -> nn.Module:
    """Return the vision transformer of ``backbone`` and ``vit``.

    Args:
        cfg: Configuration.
        pretrained: timm's weights.
        **options: Further ones of :func:`~relreid_plugin.backbones.networks.build_vit`.
    """
    return build_vit(
        cfg.backbone.name,
        pretrained=pretrained,
        weights=cfg.backbone.weights,
        partial=cfg.model.partial_weights,
        patch_size=cfg.vit.patch_size,
        depth=cfg.vit.depth,
        drop_path=cfg.vit.drop_path,
        **options,
    )


def adapt(cfg: Any, network: nn.Module) -> None:
    """Let the methods change a backbone before it is wrapped."""
    for method in methods():
        method.adapt(cfg, network)


def bnneck_baseline(
    num_classes: int,
    loss: str = "triplet",
    pretrained: bool = True,
    use_gpu: bool = True,
    *,
    cfg: Any = None,
    num_cameras: int = 0,
) -> BNNeckBaseline:
    """Build a backbone with BNNeck from the keys ``backbone``, ``head`` and ``data``, changed as the methods' keys say.

    Args:
        num_classes: Training identities.
        loss: Not read; the model trains returning (logits, features) and so suits ``triplet`` and ``composite``.
        pretrained: ImageNet weights for the backbone.
        use_gpu: Not read; the engine moves the model.
        cfg: Configuration; ``None`` takes the defaults.
        num_cameras: Not read.

    Raises:
        UserError: ``loss.name softmax``, an unknown backbone, weights that cannot be had, or a backbone in which
            an attention finds no place.
    """
    cfg = configured(BASELINE, loss, cfg)
    backbone = build_backbone(
        cfg.backbone.name,
        pretrained=pretrained,
        weights=cfg.backbone.weights,
        partial=cfg.model.partial_weights,
        output_stride=cfg.backbone.output_stride,
        image_size=(cfg.data.height, cfg.data.width),
        host_builder=host_features,
    )
    adapt(cfg, backbone.body)
    return baseline_on(backbone, num_classes, cfg)


def register_models() -> None:
    """Add the plug-in's plain baseline and the methods' models to the host's factory."""
    register_model(BASELINE, bnneck_baseline)
    for name, builder in builders().items():
        register_model(name, builder)
