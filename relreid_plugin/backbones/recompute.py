"""Activation checkpointing: transformer blocks keep no activations for the backward pass, which computes them again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.vision_transformer import Encoder

from ..errors import UserError


class RecomputedLayers(nn.Sequential):
    """Layers one after the other that keep their inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the last one's output, as ``nn.Sequential`` does."""
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False) if self.training else layer(x)
        return x


def _able(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that can recompute their layers."""
    if callable(getattr(model, "set_grad_checkpointing", None)) or isinstance(model, Encoder):
        yield model
        return
    for child in model.children():
        yield from _able(child)


def recompute_activations(model: nn.Module) -> int:
    """Let the transformer blocks of a model recompute their activations in the backward pass, in place.

    Gradients stay those of the model without it: dropout draws the same again, and so does what a module draws from
    generators of its own where the network takes care of it.

    Args:
        model: With networks of timm or torchvision, or of the plug-in: those have timm's ``set_grad_checkpointing``, and a
            method ``recomputed`` that returns what is recomputed, all of whose draws are drawn again.

    Returns:
        How many networks in it recompute.

    Raises:
        UserError: There is none; one has batch normalisations, which would count their statistics twice; or one draws noise
            that could not be drawn again.
    """
    found = list(_able(model))
    if not found:
        raise UserError(
            f"'train.checkpointing True' recomputes the blocks of transformers, and a {type(model).__name__} has none that "
            "can; set it to False, or choose a vision transformer ('backbone.name timm:vit_…')."
        )
    for network in found:
        name = type(network).__name__
        body: Any = network if hasattr(network, "recomputed") else None
        parts = [network] if body is None else body.recomputed()
        if any(isinstance(module, _BatchNorm) for part in parts for module in part.modules()):
            raise UserError(
                f"'train.checkpointing True' would count the statistics of the batch normalisations in a {name} twice; set "
                "it to False, or choose a vision transformer ('backbone.name timm:vit_…')."
            )
        if body is None and any(getattr(module, "draws", False) for module in network.modules()):
            raise UserError(
                f"'train.checkpointing True' cannot draw the noise of the gates in a {name} again; set it to False, or take "
                "a 'model.name' of vision transformers, which can."
            )
        if isinstance(network, Encoder):
            network.layers.__class__ = RecomputedLayers
            continue
        try:
            network.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, NotImplementedError):
            raise UserError(f"'train.checkpointing True' is not known to timm's {name}; set it to False.") from None
    return len(found)


__all__ = ["RecomputedLayers", "recompute_activations"]
