"""Where attention goes in a CNN: DCS non-local blocks after stages, SE or CBAM in residual blocks (RIB; METHODS 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import SEModule
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from ..errors import UserError, did_you_mean
from .dcs import DCSNonLocal, GateNoise
from .insertion import insert_after

LAST_STAGES = (("layer3", "layer4"), ("conv8", "conv9"), ("conv4", "conv5"))
"""Last two stages of a ResNet (torchvision, timm, torchreid), of torchreid's MobileNetV2 and of its OSNet."""

CHANNEL_ATTENTION: dict[str, Callable[..., nn.Module]] = {"se": SEModule, "cbam": CbamModule}


def _last_stages(network: nn.Module) -> list[str]:
    children = dict(network.named_children())
    for names in LAST_STAGES:
        if all(name in children for name in names):
            return list(names)
    features = children.get("features")
    if isinstance(features, nn.Sequential) and len(features) > 1:  # torchvision's MobileNets
        return [f"features.{len(features) - 2}", f"features.{len(features) - 1}"]
    raise UserError(
        f"'rib.attention dcs' does not know the last stages of a {type(network).__name__}; name them by 'rib.places', or "
        "choose a ResNet, an OSNet or a MobileNetV2 by 'backbone.name'."
    )


def _check_places(network: nn.Module, places: list[str]) -> None:
    names = dict(network.named_modules())
    for place in places:
        if not place or place not in names:
            near = did_you_mean(place, [name for name in names if name.count(".") <= 1 and name])
            raise UserError(f"key 'rib.places' holds '{place}', which is no stage of a {type(network).__name__}{near}")


@torch.no_grad()
def _channels(network: nn.Module, places: list[str], image_size: tuple[int, int]) -> list[int]:
    """Channels of the feature maps that come out of the places; the network's state is left as it was."""
    shapes: dict[str, torch.Size] = {}

    def record(place: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(output, Tensor):
                shapes[place] = output.shape

        return hook

    hooks = [network.get_submodule(place).register_forward_hook(record(place)) for place in places]
    modes = {name: module.training for name, module in network.named_modules()}
    network.eval()
    try:
        network(torch.zeros(1, 3, *image_size))
    finally:
        for handle in hooks:
            handle.remove()
        for name, module in network.named_modules():
            module.training = modes[name]
    for place in places:
        if len(shapes.get(place, ())) != 4:
            raise UserError(f"key 'rib.places' holds '{place}', which gives no feature map (B, D, h, w); name a stage.")
    return [shapes[place][1] for place in places]


def place_dcs(
    network: nn.Module,
    places: list[str],
    *,
    image_size: tuple[int, int],
    reduction: int = 2,
    init_bias: float = 2.0,
    noise: GateNoise | None = None,
) -> list[str]:
    """Put a DCS non-local block after stages of a CNN, in place.

    Args:
        network: A ResNet, OSNet or MobileNetV2; with ``places`` any CNN.
        places: Dotted names of the stages; empty: the last two.
        image_size: (height, width) of the images, to find the stages' channels.
        reduction: See :class:`relreid_plugin.rib.dcs.DCSNonLocal`.
        init_bias: See :class:`relreid_plugin.rib.dcs.ChannelGate`.
        noise: Noise that all gates share; ``None`` makes one.

    Returns:
        The stages.

    Raises:
        UserError: A stage does not exist or gives no feature map.
    """
    places = places or _last_stages(network)
    _check_places(network, places)
    noise = noise if noise is not None else GateNoise()
    for place, channels in zip(places, _channels(network, places, image_size)):
        block = DCSNonLocal(channels, reduction=reduction, init_bias=init_bias, noise=noise)
        insert_after(network, place, "dcs", block)
    return places


def _last_convolution(block: nn.Module) -> tuple[str, int] | None:
    """The layer before a residual block's addition and its channels; ``None`` when ``block`` is no residual block.

    ResNets add after ``bn3`` (bottleneck) or ``bn2``; torchreid's OSNet adds after ``conv3``, its linear 1x1 convolution.
    """
    children = dict(block.named_children())
    if "downsample" not in children and not hasattr(block, "downsample"):
        return None
    for name in ("bn3", "bn2"):
        layer = children.get(name)
        if isinstance(layer, nn.BatchNorm2d):
            return name, layer.num_features
    inner = getattr(children.get("conv3"), "bn", None)
    return ("conv3", inner.num_features) if isinstance(inner, nn.BatchNorm2d) else None


def place_channel_attention(network: nn.Module, kind: str, places: list[str], *, reduction: int = 16) -> list[str]:
    """Put squeeze-and-excitation or CBAM into the residual blocks of a ResNet or OSNet, before the addition, in place.

    Args:
        network: The network.
        kind: ``se`` (Hu et al. 2018) or ``cbam`` (Woo et al. 2018: channel, then spatial attention).
        places: Stages to which it is restricted, dotted names; empty: all.
        reduction: Channels divided by this in the bottleneck.

    Returns:
        The blocks.

    Raises:
        UserError: A stage does not exist, or there is no residual block.
    """
    _check_places(network, places)
    found = {}
    for name, module in network.named_modules():
        inside = not places or any(name == place or name.startswith(f"{place}.") for place in places)
        last = _last_convolution(module) if inside and name else None
        if last is not None:
            found[name] = last
    if not found:
        where = f"stages {', '.join(places)} of a" if places else "a"
        raise UserError(
            f"'rib.attention {kind}' finds no residual block in {where} {type(network).__name__}; choose a ResNet or an "
            "OSNet by 'backbone.name', or other 'rib.places'."
        )
    for name, (leaf, channels) in found.items():
        block = CHANNEL_ATTENTION[kind](channels, rd_channels=max(1, channels // reduction))
        insert_after(network, f"{name}.{leaf}", kind, block)
    return list(found)
