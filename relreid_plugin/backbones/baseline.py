"""The image model of stage 1: backbone, pooled feature, embedding, BNNeck, classifier (METHODS 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..metrics.neighbours import normalise
from .bnneck import BNNeck


class BNNeckBaseline(nn.Module):
    """Strong re-ID baseline: pooled backbone feature -> FC -> BNNeck -> classifier.

    Args:
        backbone: Module with ``feature_dim`` that maps (B, 3, h, w) to (B, ``feature_dim``).
        num_classes: Training identities C.
        feature_dim: Width d of the embedding; 0 uses the backbone's feature itself.
        neck_feature: Test feature ``before`` or ``after`` the BNNeck.

    Attributes:
        returns_neck: In training, also return the features behind the BNNeck, third.
    """

    returns_neck = False

    def __init__(
        self, backbone: nn.Module, num_classes: int, *, feature_dim: int = 512, neck_feature: str = "after"
    ) -> None:
        super().__init__()
        self.backbone, self.neck_feature = backbone, neck_feature
        width: int = backbone.feature_dim  # type: ignore[assignment]
        self.embedding = nn.Linear(width, feature_dim) if feature_dim else nn.Identity()
        self.feature_dim = feature_dim or width
        self.neck = BNNeck(self.feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute features.

        Args:
            images: (B, 3, h, w).

        Returns:
            In training (logits (B, C), features (B, d) before BNNeck); else the L2-normalised test feature (B, d).
        """
        features = self.embedding(self.backbone(images))
        if self.training:
            logits, behind = self.neck.logits(features)
            return (logits, features, behind) if self.returns_neck else (logits, features)
        return self.neck.embed(features) if self.neck_feature == "after" else normalise(features)


def baseline_on(backbone: nn.Module, num_classes: int, cfg: Any) -> BNNeckBaseline:
    """Return the baseline on a backbone with the head that the keys ``head`` describe."""
    head = cfg.head
    return BNNeckBaseline(backbone, num_classes, feature_dim=head.feature_dim, neck_feature=head.neck_feature)


class GivenFeatures(nn.Module):
    """The features as they are, in place of a backbone's.

    Args:
        dim: Width d.
    """

    width: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.feature_dim = dim
        self.register_buffer("width", torch.tensor(dim))

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, d)."""
        if features.shape[1] != self.feature_dim:
            raise UserError(
                f"features have width {features.shape[1]}, and the run's {self.feature_dim}; one model makes all."
            )
        return features
