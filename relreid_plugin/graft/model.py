"""GraFT: images of several modalities fused gradually by a learned token, and its rivals (METHODS 3).

Shape letters: B samples, M modalities, T tokens of an image, d token width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones.bnneck import BNNeck
from ..errors import UserError

FUSIONS = ("graft", "cls", "average", "early", "late")
"""``graft``: learned fusion token; ``cls``, ``average``: all tokens through one encoder layer, read at a CLS token or
averaged; ``early``: channels concatenated; ``late``: a transformer per modality, averaged (Multi-Stream ViT)."""


class ModalityEncoder(nn.TransformerEncoderLayer):
    """A modality's encoder: torch's transformer encoder layer, batch first, of which only some output rows may be computed.

    Every row needs the keys and values of all tokens, but only its own query and feed-forward pass.

    Args:
        dim: Token width d.
        heads: Heads.
        feedforward: Width of the feed-forward layer.
        dropout: Dropout.
    """

    def __init__(self, dim: int, *, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__(dim, heads, dim_feedforward=feedforward, dropout=dropout, activation="relu", batch_first=True)

    def rows(self, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        """Return rows of the layer's output.

        Args:
            tokens: (B, T, d).
            rows: Positions R of tokens.

        Returns:
            (B, R, d), equal to ``self(tokens)[:, rows]``.
        """
        picked = tokens[:, list(rows)]
        seen = self.self_attn(picked, tokens, tokens, need_weights=False)[0]
        picked = self.norm1(picked + self.dropout1(seen))
        return self.norm2(picked + self.dropout2(self.linear2(self.dropout(self.linear1(picked).relu()))))


class GraFT(nn.Module):
    """One transformer for all modalities, a light encoder per modality, and one fusion token that passes through each.

    Every image becomes data tokens by the shared backbone. The fusion token is put before each modality's tokens and goes
    through that modality's encoder; the mean of its outputs is the embedding (GraFT, eqs. 3-7). A forward pass takes all
    images of a batch, of all modalities, through the backbone at once.

    Args:
        backbone: Builds a timm transformer with ``forward_features`` and ``embed_dim``, given its input channels; called
            once, or once per modality with ``fusion late``.
        num_classes: Training identities C.
        modalities: Names of the modalities, in the order of the images; 1 to 4.
        fusion: One of :data:`FUSIONS`.
        heads: Heads of an encoder.
        feedforward: Width of an encoder's feed-forward layer.
        dropout: Dropout of an encoder.
        token_index: Data token that stands for a sample in the triplet loss; 0 is the backbone's first one.
        checkpointing: See :meth:`set_grad_checkpointing`.

    Attributes:
        feature_dim: d.
        frozen: Whether the backbone is frozen; it then stays in evaluation mode and takes no gradient.

    Raises:
        UserError: Unknown fusion, a backbone without tokens, or a token index that it does not have.
    """

    def __init__(
        self,
        backbone: Callable[[int], nn.Module],
        num_classes: int,
        *,
        modalities: Sequence[str],
        fusion: str = "graft",
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        token_index: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise UserError(f"key 'graft.fusion' is '{fusion}'; it must be one of {', '.join(FUSIONS)}.")
        if not 1 <= len(modalities) <= 4 or len(set(modalities)) != len(modalities):
            raise UserError(f"key 'multimodal.modalities' must hold 1 to 4 different names, got {list(modalities)}.")
        self.modalities, self.fusion, self.token_index = tuple(modalities), fusion, token_index
        channels = 3 * len(modalities) if fusion == "early" else 3
        count = len(modalities) if fusion == "late" else 1
        self.backbones = nn.ModuleList(backbone(channels) for _ in range(count))
        first: Any = self.backbones[0]
        if not hasattr(first, "forward_features") or not hasattr(first, "embed_dim"):
            raise UserError(
                f"backbone.name: a {type(first).__name__} gives no tokens; choose a vision transformer of timm "
                "('timm:vit_…', 'timm:deit_…')."
            )
        self.feature_dim = dim = int(first.embed_dim)
        encoders = {"graft": len(modalities), "cls": 1, "average": 1}.get(fusion, 0)
        if encoders and dim % heads:
            raise UserError(f"key 'graft.heads' is {heads}, which does not divide the backbone's token width {dim}.")
        self.encoders = nn.ModuleList(
            ModalityEncoder(dim, heads=heads, feedforward=feedforward, dropout=dropout) for _ in range(encoders)
        )
        self.token: nn.Parameter | None = None
        if fusion in ("graft", "cls"):
            self.token = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.xavier_uniform_(self.token[0])
        self.neck = BNNeck(dim, num_classes)
        self.frozen = self.checkpointing = False
        if checkpointing:
            self.set_grad_checkpointing()

    # --- freezing -----------------------------------------------------------------------------------------------------
    def freeze_backbone(self, frozen: bool = True) -> None:
        """Freeze the backbone (evaluation mode, no gradient), or let it train."""
        self.frozen = frozen
        for value in self.backbones.parameters():
            value.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> GraFT:
        """Switch modes; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbones.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of backbone and encoders in the backward pass instead of keeping their activations."""
        self.checkpointing = enable
        for body in self.backbones:
            body.set_grad_checkpointing(enable)  # type: ignore[operator]

    def recomputed(self) -> list[nn.Module]:
        """Return what :meth:`set_grad_checkpointing` is about."""
        return [*self.backbones, *self.encoders]

    # --- features -----------------------------------------------------------------------------------------------------
    def _tokens(self, images: Tensor, body: Any) -> Tensor:
        """(n, channels, h, w) -> (n, T, d) data tokens."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = body.forward_features(images)
        if tokens.dim() != 3 or tokens.shape[2] != self.feature_dim:
            raise UserError(
                f"backbone.name: a {type(body).__name__} gives features of shape {tuple(tokens.shape)} instead of tokens; "
                "choose a vision transformer of timm ('timm:vit_…', 'timm:deit_…')."
            )
        return tokens

    def _encode(self, index: int, tokens: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Pass (B, T, d) through an encoder; ``rows``: only these rows of its output."""
        layer: Any = self.encoders[index]
        function, args = (layer, (tokens,)) if rows is None else (layer.rows, (tokens, rows))
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _pick(self, tokens: Tensor) -> Tensor:
        """(…, T, d) -> (…, d), the data token of the triplet loss."""
        return tokens[..., self._token(tokens.shape[-2]), :]

    def _token(self, count: int) -> int:
        """Index of the triplet loss's data token among ``count``."""
        if self.token_index >= count:
            raise UserError(f"key 'graft.token_index' is {self.token_index}, but an image has {count} data tokens.")
        return self.token_index

    def _present(self, present: Sequence[str] | None, given: int) -> list[int]:
        names = self.modalities if present is None else tuple(present)
        unknown = [name for name in names if name not in self.modalities]
        if unknown:
            raise UserError(f"modality '{unknown[0]}' is none of the model's: {', '.join(self.modalities)}.")
        if len(names) != given or len(set(names)) != given:
            raise ValueError(f"images of {given} modalities were given for {', '.join(names)}")
        return [self.modalities.index(name) for name in names]

    def embed(self, images: Tensor, present: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Fuse the modalities of every sample.

        Args:
            images: (B, M', 3, h, w), the present modalities.
            present: Their names, in the order of the images; ``None``: all. What the model was trained on and is not
                there is left out of the averages (``early``: its channels are zero, the mean colour).

        Returns:
            Fused tokens (B, d), and data tokens (B, d) averaged over the modalities.

        Raises:
            UserError: An unknown modality.
        """
        batch, given = images.shape[:2]
        order = self._present(present, given)
        if self.fusion == "early":
            full = images.new_zeros(batch, len(self.modalities), *images.shape[2:])
            full[:, order] = images
            tokens = self._tokens(full.flatten(1, 2), self.backbones[0])
            return tokens.mean(dim=1), self._pick(tokens)
        if self.fusion == "late":
            parts = [self._tokens(images[:, slot], self.backbones[index]) for slot, index in enumerate(order)]
            fused = torch.stack([part[:, 0] for part in parts]).mean(dim=0)
            return fused, torch.stack([self._pick(part) for part in parts]).mean(dim=0)
        tokens = self._tokens(images.flatten(0, 1), self.backbones[0]).unflatten(0, (batch, given))  # (B, M', T, d)
        count = tokens.shape[2]
        token = None if self.token is None else self.token.expand(batch, -1, -1).to(tokens.dtype)
        if self.fusion == "graft":
            assert token is not None
            rows = [0, 1 + self._token(count)]
            outputs = [
                self._encode(index, torch.cat([token, tokens[:, slot]], dim=1), rows) for slot, index in enumerate(order)
            ]
            fused, data = torch.stack(outputs).mean(dim=0).unbind(dim=1)
            return fused, data
        sequence, chosen = tokens.flatten(1, 2), self._token(count)
        places = [slot * count + chosen for slot in range(given)]
        if token is None:
            output = self._encode(0, sequence)
            return output.mean(dim=1), output[:, places].mean(dim=1)
        output = self._encode(0, torch.cat([token, sequence], dim=1), [0, *(1 + place for place in places)])
        return output[:, 0], output[:, 1:].mean(dim=1)

    def forward(
        self, images: Tensor, present: Sequence[str] | None = None, *, classified: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Compute features.

        Args:
            images: (B, M', 3, h, w).
            present: See :meth:`embed`.
            classified: In training only so many samples, the first ones, go through BNNeck and classifier; ``None``: all.

        Returns:
            In training logits (classified, C), fused tokens (B, d) before the BNNeck, and data tokens (B, d); else unit
            features (B, d) behind the BNNeck.
        """
        fused, data = self.embed(images, present)
        if self.training:
            return self.neck.logits(fused[:classified])[0], fused, data
        return self.neck.embed(fused)
