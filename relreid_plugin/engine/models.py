"""The plug-in's models as builders of the host's model factory."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import get_default_config
from ..host import build_model, register_model
from ..models.backbones import build_backbone
from ..models.baseline import BNNeckBaseline


def _host_features(name: str, pretrained: bool) -> nn.Module:
    """One of the host's models without its classifier; in training it returns (feature, feature)."""
    model = build_model(name, 1, "triplet", pretrained, False)
    if isinstance(getattr(model, "classifier", None), nn.Module):
        model.classifier = nn.Identity()
    return model


def bnneck_baseline(
    num_classes: int, loss: str = "triplet", pretrained: bool = True, use_gpu: bool = True, *, cfg: Any = None
) -> BNNeckBaseline:
    """Build the image model of stage 1 from the keys ``backbone``, ``head`` and ``data``.

    Args:
        num_classes: Training identities.
        loss: Not read; the model trains returning (logits, features) and so suits ``triplet`` and ``composite``.
        pretrained: ImageNet weights for the backbone.
        use_gpu: Not read; the engine moves the model.
        cfg: Configuration; ``None`` takes the defaults.

    Raises:
        UserError: ``loss.name softmax``, an unknown backbone, or weights that cannot be had.
    """
    from ..errors import UserError

    cfg = cfg if cfg is not None else get_default_config()
    if loss == "softmax":
        raise UserError(
            "'model.name bnneck_baseline' trains with 'loss.name composite' or 'triplet'; for cross-entropy alone set the "
            "weights of 'loss.composite'."
        )
    backbone = build_backbone(
        cfg.backbone.name,
        pretrained=pretrained,
        weights=cfg.backbone.weights,
        output_stride=cfg.backbone.output_stride,
        image_size=(cfg.data.height, cfg.data.width),
        host_builder=_host_features,
    )
    return BNNeckBaseline(backbone, num_classes, feature_dim=cfg.head.feature_dim)


def register_models() -> None:
    """Add the plug-in's models to the host's factory."""
    register_model("bnneck_baseline", bnneck_baseline)
