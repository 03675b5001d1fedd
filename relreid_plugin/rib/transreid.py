"""Vision transformers for re-identification: a plain baseline and TransReID (He et al., ICCV 2021), on any timm ViT.

Shape letters: B images, N patches, P prefix tokens (class, distillation, register), D token width, S jigsaw parts,
C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones.bnneck import BNNeck
from ..backbones.patches import fit_to_images
from ..errors import UserError
from ..metrics.neighbours import normalise
from .dcs import replayed


def jigsaw(patches: Tensor, *, shift: int, groups: int) -> Tensor:
    """Shift the patches, then shuffle them across groups, so that every part covers the whole image (TransReID, eq. 3).

    The first ``shift`` patches move to the end; the sequence is cut into ``groups`` runs of equal length (the last patch is
    repeated until they are equal), and one patch is taken from every run in turn.

    Args:
        patches: (B, N, D).
        shift: Patches that move to the end.
        groups: Runs.

    Returns:
        (B, N', D), N' the next multiple of ``groups``.
    """
    moved = torch.cat([patches[:, shift:], patches[:, :shift]], dim=1)
    missing = -moved.shape[1] % groups
    if missing:
        moved = torch.cat([moved, moved[:, -1:].expand(-1, missing, -1)], dim=1)
    batch, count, width = moved.shape
    return moved.view(batch, groups, count // groups, width).transpose(1, 2).reshape(batch, count, width)


class CameraEmbedding(nn.Module):
    """Side information embedding of the camera (TransReID, eq. 4): one vector per camera, added to every token.

    Args:
        num_cameras: Cameras of the training set.
        dim: Token width D.
        weight: Factor lambda.
    """

    def __init__(self, num_cameras: int, dim: int, *, weight: float = 3.0) -> None:
        super().__init__()
        self.weight = weight
        self.table = nn.Parameter(torch.zeros(num_cameras, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, tokens: Tensor, cameras: Tensor | None) -> Tensor:
        """Add the embedding.

        Args:
            tokens: (B, T, D).
            cameras: (B,) cameras; ``None`` and numbers that were not trained mean an unknown camera, which gets the mean
                of all embeddings.
        """
        mean = self.table.mean(dim=0)
        if cameras is None:
            return tokens + self.weight * mean
        known = (cameras >= 0) & (cameras < len(self.table))
        rows = torch.where(known.unsqueeze(1), self.table[cameras.clamp(0, len(self.table) - 1)], mean)
        return tokens + self.weight * rows.unsqueeze(1)


class VisionTransformerReID(nn.Module):
    """A timm vision transformer with BNNeck; with camera embedding and jigsaw module it is TransReID.

    The jigsaw module feeds the tokens before the last block to a copy of that block, once per part, and gives every part a
    BNNeck and classifier of its own. The test feature is the global one beside the local ones divided by their number.

    Args:
        vit: A timm ``VisionTransformer`` without classification head.
        num_classes: Training identities C.
        image_size: (height, width) of the images.
        stride: Pixels between patches; 0: the patch size.
        num_cameras: Cameras of the training set; 0: no camera embedding.
        camera_weight: Factor of the camera embedding.
        parts: Jigsaw parts S; 0: no jigsaw module.
        shift: Patches that the jigsaw module moves to the end.
        groups: Groups that it shuffles across.
        neck_feature: Test feature ``before`` (TransReID) or ``after`` the BNNeck.

    Attributes:
        returns_neck: In training, also return the global feature behind its BNNeck, third.
        recomputes: Whether blocks recompute their activations in the backward pass (:meth:`set_grad_checkpointing`).

    Raises:
        UserError: The network is no plain vision transformer, or has fewer patches than the jigsaw module needs.
    """

    vit: Any
    returns_neck = False
    recomputes = False

    def __init__(
        self,
        vit: nn.Module,
        num_classes: int,
        *,
        image_size: tuple[int, int],
        stride: int = 0,
        num_cameras: int = 0,
        camera_weight: float = 3.0,
        parts: int = 0,
        shift: int = 5,
        groups: int = 2,
        neck_feature: str = "before",
    ) -> None:
        super().__init__()
        self.grid = fit_to_images(vit, image_size, stride=stride)
        patches = self.grid[0] * self.grid[1]
        if parts and patches < max(2 * parts, shift + 1, groups):
            raise UserError(
                f"the jigsaw module needs at least {max(2 * parts, shift + 1, groups)} patches, but images of "
                f"{image_size[0]}x{image_size[1]} make {patches}; lower 'vit.stride', 'vit.parts' or 'vit.shift'."
            )
        self.vit = vit
        self.parts, self.shift, self.groups, self.neck_feature = parts, shift, groups, neck_feature
        dim: int = self.vit.embed_dim
        self.feature_dim = dim
        self.test_dim = dim * (1 + parts)
        self.cameras = CameraEmbedding(num_cameras, dim, weight=camera_weight) if num_cameras else None
        if parts:
            self.local_block = copy.deepcopy(self.vit.blocks[-1])
            self.local_norm = copy.deepcopy(self.vit.norm)
        self.necks = nn.ModuleList(BNNeck(dim, num_classes) for _ in range(1 + parts))

    @property
    def uses_cameras(self) -> bool:
        """Whether ``forward`` reads the cameras."""
        return self.cameras is not None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the blocks keep their inputs only, and compute their activations again in the backward pass."""
        self.recomputes = enable

    def recomputed(self) -> list[nn.Module]:
        """Return the blocks that :meth:`set_grad_checkpointing` is about; their gates draw the same noise again."""
        return [*self.vit.blocks, *([self.local_block] if self.parts else [])]

    def _through(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False, context_fn=lambda: replayed(block))  # type: ignore[no-any-return]
        return block(tokens)  # type: ignore[no-any-return]

    def _local_features(self, tokens: Tensor) -> list[Tensor]:
        """Tokens before the last block (B, P + N, D) -> S features (B, D), all parts in one pass."""
        prefix = self.vit.num_prefix_tokens
        batch = tokens.shape[0]
        patches = jigsaw(tokens[:, prefix:], shift=self.shift, groups=self.groups)
        length = patches.shape[1] // self.parts
        pieces = patches[:, : length * self.parts].reshape(batch, self.parts, length, -1)
        heads = tokens[:, None, :prefix].expand(-1, self.parts, -1, -1)
        local = torch.cat([heads, pieces], dim=2).flatten(0, 1)  # (B S, P + N / S, D)
        features = self._pool(self.local_norm(self._through(self.local_block, local)))
        return list(features.view(batch, self.parts, -1).unbind(1))

    def _pool(self, tokens: Tensor) -> Tensor:
        return self.vit.forward_head(tokens, pre_logits=True)

    def features(self, images: Tensor, cameras: Tensor | None = None) -> list[Tensor]:
        """(B, 3, h, w), (B,) -> the global feature (B, D), then the local ones."""
        vit = self.vit
        tokens = vit._pos_embed(vit.patch_embed(images))
        if self.cameras is not None:
            tokens = self.cameras(tokens, cameras)
        tokens = vit.norm_pre(vit.patch_drop(tokens))
        for block in vit.blocks[:-1]:
            tokens = self._through(block, tokens)
        local = self._local_features(tokens) if self.parts else []
        return [self._pool(vit.norm(self._through(vit.blocks[-1], tokens))), *local]

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor | tuple[Tensor | list[Tensor], ...]:
        """Compute features.

        Args:
            images: (B, 3, h, w).
            cameras: (B,) integer cameras; only read with a camera embedding.

        Returns:
            In training logits (B, C) and features (B, D) before BNNeck; with a jigsaw module lists of them, the global one
            first. Else unit features (B, ``test_dim``).
        """
        features = self.features(images, cameras)
        if self.training:
            pairs = [neck.logits(feature) for neck, feature in zip(self._necks(), features)]
            logits, behind = [pair[0] for pair in pairs], pairs[0][1]
            outputs: tuple[Any, ...] = (logits, features) if self.parts else (logits[0], features[0])
            return (*outputs, behind) if self.returns_neck else outputs
        if self.neck_feature == "after":
            features = [neck.bn(feature) for neck, feature in zip(self._necks(), features)]
        local: Sequence[Tensor] = [feature / self.parts for feature in features[1:]]
        return normalise(torch.cat([features[0], *local], dim=1))

    def _necks(self) -> list[BNNeck]:
        return [neck for neck in self.necks if isinstance(neck, BNNeck)]
