"""The image encoder of CLIP-ReID (Li et al. 2023), with and without its prompts.

Names as ``image_encoder.transformer.resblocks.0.ln_1.weight``, ``bottleneck_proj.weight``. The feature is the class token
behind the encoder's last normalisation, beside its projection into CLIP's space.

Shape letters: B images, D token width, E width of the projection, M cameras.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..files import WeightFile
from ..opened import HALF, Opened, Reading
from .common import NECKS, Family, Neck, Weights, choose, count, fill, number, say_left, without
from .transformers import HEAD, build, camera_notes, find_grid, tokens_of

CAMERA_WEIGHT = 3.0
_TEXT = ("prompt_learner.", "text_encoder.", "logit_scale")
_NAMES = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
}


class CLIPReIDNetwork(nn.Module):
    """What a checkpoint of CLIP-ReID computes at test.

    Args:
        vit: A timm vision transformer with a normalisation before its blocks.
        projected: Width E.
        cameras: Rows M of the embedding of cameras and viewpoints; 0: none.
        camera_weight: Its factor.
        where: Features ``before`` or ``after`` the necks.
    """

    def __init__(
        self, vit: Any, projected: int, *, cameras: int = 0, camera_weight: float = CAMERA_WEIGHT, where: str = "before"
    ) -> None:
        super().__init__()
        self.vit, self.camera_weight = vit, camera_weight
        dim: int = vit.embed_dim
        self.proj = nn.Linear(dim, projected, bias=False)
        self.cv_embed = nn.Parameter(torch.zeros(cameras, dim)) if cameras else None
        self.bottleneck, self.bottleneck_proj = Neck(dim, where), Neck(projected, where)

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Compute features.

        Args:
            images: (B, 3, h, w).
            cameras: (B,) rows of the embedding; None: the mean of them.

        Returns:
            (B, D + E).
        """
        side = None
        if self.cv_embed is not None:
            rows = self.cv_embed.mean(dim=0, keepdim=True) if cameras is None else self.cv_embed[cameras]
            side = self.camera_weight * rows
        tokens = tokens_of(self.vit, images, side, every=False)
        for block in self.vit.blocks:
            tokens = block(tokens)
        feature = self.vit.norm(tokens[:, 0])
        return torch.cat([self.bottleneck(feature), self.bottleneck_proj(self.proj(feature))], dim=1)


def _detect(weights: Weights) -> bool:
    return any(name.startswith("image_encoder.") for name in weights) and "bottleneck_proj.weight" in weights


def _open(file: WeightFile, weights: Weights, request: Any) -> Opened:
    options, body = request.options, without(weights, "image_encoder.")
    if "class_embedding" not in body:
        raise UserError(
            f"'{file.path}' is a checkpoint of CLIP-ReID with a ResNet as its image encoder, which is not built here; give "
            "one with a vision transformer."
        )
    patch, dim = body["conv1.weight"].shape[-1], len(body["class_embedding"])
    tokens = len(body["positional_embedding"]) - 1
    size, stride = find_grid(tokens, patch, request.size, options.get("stride"), label=f"'{file.path}'")
    vit = build(
        size=size,
        stride=stride,
        patch=patch,
        dim=dim,
        depth=count(body, r"transformer\.resblocks\.(\d+)\."),
        heads=max(1, dim // HEAD),
        hidden=len(body["transformer.resblocks.0.mlp.c_fc.weight"]),
        eps=1e-5,
        pre_norm=True,
        act_layer="quick_gelu",
    )
    cameras = len(weights["cv_embed"]) if "cv_embed" in weights else 0
    weight = number(options, "camera_weight", CAMERA_WEIGHT, 0, 1000)
    where = choose(options, "neck", "before", NECKS)
    network = CLIPReIDNetwork(vit, body["proj"].shape[1], cameras=cameras, camera_weight=weight, where=where)
    mapped: Weights = {}
    unused = []
    for name, value in weights.items():
        inner = name.removeprefix("image_encoder.")
        part, _, leaf = name.partition(".")
        if name.startswith(_TEXT):
            unused.append(name)
        elif inner == name:
            mapped[f"{part}.norm.{leaf}" if part.startswith("bottleneck") else name] = value
        elif inner == "proj":
            mapped["proj.weight"] = value.t()
        else:
            place, shaped = _vit_name(inner), value
            if inner == "class_embedding":
                shaped = value.view(1, 1, -1)
            elif inner == "positional_embedding":
                shaped = value[None]
            mapped[f"vit.{place}"] = shaped
    reading = request.reading(Reading(size, *HALF))
    notes = [
        f"read as released: images of {size[0]}x{size[1]} normalised by 0.5, patches {stride} pixels apart, the features "
        f"{where} the necks",
        *camera_notes(cameras, weight),
        *say_left(unused, "of the text encoder are not used at test"),
    ]
    return fill(network, mapped, file, reading=reading, title="CLIP-ReID", notes=notes)


def _vit_name(name: str) -> str:
    """A name of CLIP's encoder as timm's."""
    if name.startswith("transformer.resblocks."):
        name = name.replace("transformer.resblocks.", "blocks.", 1)
        for theirs, ours in _NAMES.items():
            name = name.replace(f".{theirs}", f".{ours}", 1)
        return name
    return {
        "conv1.weight": "patch_embed.proj.weight",
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "ln_pre.weight": "norm_pre.weight",
        "ln_pre.bias": "norm_pre.bias",
        "ln_post.weight": "norm.weight",
        "ln_post.bias": "norm.bias",
    }.get(name, name)


FAMILY = Family("clipreid", "CLIP-ReID", _detect, _open, ("neck", "stride", "camera_weight"))
__all__ = ["FAMILY", "CLIPReIDNetwork"]
