"""BNNeck: batch normalisation without bias between embedding and classifier (Luo et al. 2019)."""

from __future__ import annotations

from torch import Tensor, nn

from ..metrics.neighbours import normalise


class BNNeck(nn.Module):
    """Batch normalisation without a trained bias, then a classifier without bias.

    Args:
        dim: Feature width d.
        num_classes: Training identities C.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.bn.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, d) -> logits (B, C), and the normalised features (B, d) that they are computed from."""
        normalised = self.bn(features)
        return self.classifier(normalised), normalised

    def embed(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, d) unit test features."""
        return normalise(self.bn(features))

    def train(self, mode: bool = True) -> BNNeck:
        """Switch modes; the bias of the normalisation stays fixed at 0 whatever unfreezes the layers around it."""
        super().train(mode)
        self.bn.bias.requires_grad_(False)
        return self
