"""A network of two convolutions with a BNNeck."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class FourthNet(nn.Module):
    """Trains returning (logits, features), tests returning features behind the BNNeck.

    Args:
        num_classes: Training identities.
        width: Channels.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.feature_dim = self.test_dim = 2 * width
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=4, padding=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.neck = nn.BatchNorm1d(2 * width)
        self.classifier = nn.Linear(2 * width, num_classes, bias=False)

    def forward(self, images: torch.Tensor) -> Any:
        """(B, 3, h, w) to (B, 2 * width)."""
        features = self.body(images)
        after = self.neck(features)
        return (self.classifier(after), features) if self.training else after


def fourth_net(
    num_classes: int,
    loss: str = "triplet",
    pretrained: bool = False,
    use_gpu: bool = False,
    *,
    cfg: Any,
    num_cameras: int = 0,
) -> FourthNet:
    """Build it from ``fourth.width``."""
    return FourthNet(num_classes, cfg.fourth.width)
