"""Relation encoders from configurations and checkpoints; no host is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..backbones.baseline import GivenFeatures, baseline_on
from ..config.defaults import load_config
from ..engine import checkpoint as ckpt
from ..errors import UserError
from ..methods import BASELINE
from ..metrics.neighbours import SearchConfig
from .cameras import CameraRule
from .config import stage_number
from .encoder import RelationEncoder
from .recipe import with_recipe


def build_encoder(cfg: Any, *, dim: int, num_classes: int) -> RelationEncoder:
    """Build the encoder that the keys of ``relation`` describe."""
    relation = cfg.relation
    return RelationEncoder(
        dim,
        num_classes,
        attention=relation.attention,
        num_layers=relation.num_layers,
        num_heads=relation.num_heads,
        num_landmarks=relation.num_landmarks,
        k=relation.k,
        neighbours=relation.neighbours,
        mlp_ratio=relation.mlp_ratio,
        dropout=relation.dropout,
        landmarks=relation.landmarks,
        landmark_seed=relation.landmark_seed,
        precision=relation.precision,
        init=relation.init,
        search=SearchConfig(**relation.search),
        block=relation.block,
        head=relation.head.kind != "none",
        rule=CameraRule(**relation.camera),
        residual=relation.residual,
        anchor=relation.anchor,
    )


def encoder_of_state(cfg: Any, state: dict[str, Any], *, path: Path | str) -> RelationEncoder:
    """Build the encoder of a stage-2 checkpoint, with the recipe that was chosen for it.

    Raises:
        UserError: The weights do not fit the configuration.
    """
    encoder = build_encoder(with_recipe(cfg, state.get("recipe", [])), dim=state["dim"], num_classes=state["num_classes"])
    ckpt.load_weights(encoder, state["state_dict"], path=path)
    return encoder


def encoder_of_run(folder: Path | str) -> tuple[RelationEncoder, nn.Module | None]:
    """Return the tested encoder of a run, and the head that features pass before it; in evaluation mode.

    Args:
        folder: The run's folder.

    Returns:
        The encoder; and of a run on given features with the BNNeck baseline, that baseline, else ``None``: the encoder takes
        the features of the run's image model.

    Raises:
        UserError: No run, or one without a relation stage.
    """
    folder = Path(folder)
    if not (folder / "config.yml").is_file():
        raise UserError(f"'{folder}' holds no run ('{folder / 'config.yml'}' does not exist).")
    cfg = load_config(folder / "config.yml")
    if cfg.relation.attention == "none":
        raise UserError(f"run '{folder}' has no relation encoder; name a run with 'relation.attention'.")
    path = ckpt.tested(folder / f"stage{stage_number(cfg)}")
    encoder = encoder_of_state(cfg, ckpt.load(path, kind="relation"), path=path).eval()
    if cfg.data.type != "features" or cfg.model.name != BASELINE:
        return encoder, None
    path = ckpt.tested(folder / "stage1")
    state = ckpt.load(path, kind="image")
    head = baseline_on(GivenFeatures(int(state["input_dim"])), int(state["num_classes"]), cfg)
    ckpt.load_weights(head, state["state_dict"], path=path)
    return encoder, head.eval()


__all__ = ["build_encoder", "encoder_of_run", "encoder_of_state"]
