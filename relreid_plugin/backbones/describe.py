"""What a file of weights looks like, in words for a sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

_RESNETS = {(2, False): "18", (6, False): "34", (6, True): "50", (23, True): "101", (36, True): "152"}


def _own_run(content: Mapping[Any, Any]) -> str:
    """The model of a checkpoint that this plug-in wrote, else empty."""
    if not {"format", "kind", "config"} <= content.keys():
        return ""
    with contextlib.suppress(yaml.YAMLError, KeyError, TypeError, AttributeError):
        config = yaml.safe_load(content["config"])
        if content["kind"] == "relation":
            return f"the relation encoder '{config['relation']['attention']}' of a run of this plug-in"
        name, backbone = config["model"]["name"], config["backbone"]["name"]
        with_backbone = f" on '{backbone}'" if name in ("bnneck_baseline", "vit_baseline", "transreid", "graft") else ""
        return f"the '{name}'{with_backbone} of a run of this plug-in"
    return "a model of a run of this plug-in"


def _network(names: list[str]) -> str:
    """The kind of network by its layers' names, else empty."""
    text = "\n".join(names)
    stages = [int(number) for number in re.findall(r"(?:^|\.)layer3\.(\d+)\.conv1\.weight$", text, re.MULTILINE)]
    if stages:
        depth = _RESNETS.get((max(stages) + 1, bool(re.search(r"layer3\.0\.conv3\.weight", text))))
        return f"a ResNet-{depth}" if depth else "a ResNet"
    blocks = [int(number) for number in re.findall(r"(?:^|\.)blocks\.(\d+)\.attn\.qkv\.weight$", text, re.MULTILINE)]
    for pattern, what in (
        (r"magnitude", "a relation encoder of this plug-in with magnitudes (MagFormer)"),
        (r"blocks\.\d+\.attn\.(query|key|value)\.weight", "a relation encoder of this plug-in"),
        (r"visual\.(class_embedding|trunk)", "a CLIP model"),
        (r"(^|\n)(base|module\.base)\.blocks\.", "a TransReID of its authors' code"),
        (r"(^|\.)encoder\.layers\.encoder_layer_0", "a vision transformer of torchvision"),
        (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position", "a Swin transformer"),
        (r"conv2\.0\.conv2[ab]\.", "an OSNet of torchreid"),
        (r"stages\.\d+\.blocks\.\d+\.conv_dw", "a ConvNeXt of timm"),
        (r"blocks\.\d+\.\d+\.conv_pw", "an EfficientNet of timm"),
        (r"features\.\d+\.\d+", "a network of torchvision"),
    ):
        if re.search(pattern, text):
            return what
    return f"a vision transformer of timm with {max(blocks) + 1} blocks" if blocks else ""


def looks_like(content: Mapping[Any, Any], names: list[str]) -> str:
    """Return what a file looks like, such as ``a ResNet-18``; empty where nothing is known.

    Args:
        content: The file's outermost dict.
        names: Names of its tensors.
    """
    network = _own_run(content) or _network(names)
    if not _own_run(content) and {"state_dict", "epoch", "rank1"} <= content.keys():
        return f"a checkpoint of torchreid with {network}" if network else "a checkpoint of torchreid"
    return network


__all__ = ["looks_like"]
