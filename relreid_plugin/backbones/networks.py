"""Backbones by name from torchvision, timm or the host, as modules that map images to pooled features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, did_you_mean
from .files import WeightFile, read_weight_file
from .opened import Request
from .resize import stored_grid, take_grid
from .weights import load_weight_file, state_dicts


class PooledBackbone(nn.Module):
    """A network that returns one pooled feature per image.

    Args:
        body: Module that maps (B, 3, h, w) to (B, d), (B, d, h', w'), or in training to (logits, (B, d)).
        feature_dim: Width d.
    """

    def __init__(self, body: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.body = body
        self.feature_dim = feature_dim

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, d)."""
        return pooled_output(self.body(images))


def pooled_output(output: Tensor | tuple | list) -> Tensor:
    """Return the (B, d) feature of a backbone's raw output.

    Raises:
        UserError: The network returns something else than one feature per image.
    """
    if isinstance(output, (tuple, list)):
        output = output[-1]
    if not isinstance(output, Tensor):
        raise UserError(
            "backbone.name: this network returns several features per image; choose one that returns a single one."
        )
    if output.dim() == 4:
        output = output.mean(dim=(2, 3))
    return output.flatten(1)


def _load_local(
    body: nn.Module,
    path: str,
    *,
    partial: bool,
    prepare: Any = None,
    key: str = "backbone.weights",
    say: Callable[[str], Any] = print,
) -> None:
    report = load_weight_file(body, path, key=key, partial=partial, whole=False, prepare=prepare)
    say(report.sentence())


def _take_grid_of(body: nn.Module, file: WeightFile) -> None:
    for _, weights in state_dicts(file.content)[:1]:
        take_grid(body, weights, stored_grid(file.content, weights))


def _strip_head(body: nn.Module) -> None:
    """Replace a torchvision network's classification head by identity."""
    for name in ("fc", "classifier", "heads", "head"):
        if isinstance(getattr(body, name, None), nn.Module):
            setattr(body, name, nn.Identity())
            return
    raise UserError("backbone.name: this torchvision network has no classification head to take off; choose another one.")


def _torchvision(name: str, pretrained: bool, output_stride: int) -> nn.Module:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(f"backbone.name: torchvision has no model '{name}'{did_you_mean(name, names)}")
    if output_stride == 8 and name in ("resnet18", "resnet34"):
        raise UserError(f"'backbone.output_stride 8' needs bottleneck blocks, which '{name}' has not; take 16 or 0.")
    options = {}
    bottleneck = name.startswith(("resnet50", "resnet101", "resnet152", "resnext", "wide_resnet"))
    if output_stride and bottleneck:
        options["replace_stride_with_dilation"] = [False, output_stride == 8, True]
    body = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    if output_stride and name in ("resnet18", "resnet34"):
        _undo_last_stride(body)
    _strip_head(body)
    return body


def _undo_last_stride(body: nn.Module) -> None:
    """Give the last stage of a basic-block ResNet stride 1 and dilation 2, keeping its weights."""
    for block in body.get_submodule("layer4").children():
        for conv in (block.get_submodule("conv1"), block.get_submodule("conv2")):
            assert isinstance(conv, nn.Conv2d)
            first = conv.stride == (2, 2)
            conv.stride = (1, 1)
            if not first:
                conv.dilation = conv.padding = (2, 2)
        if getattr(block, "downsample", None) is not None:
            shortcut = block.get_submodule("downsample.0")
            assert isinstance(shortcut, nn.Conv2d)
            shortcut.stride = (1, 1)


def _timm(name: str, pretrained: bool, output_stride: int, image_size: tuple[int, int]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(f"backbone.name: timm has no model '{name}'{did_you_mean(name.split('.')[0], timm.list_models())}")
    attempts: list[dict] = [{"img_size": image_size}]
    if output_stride:
        attempts.append({"output_stride": output_stride})
    attempts.append({})
    for options in attempts:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except (TypeError, NotImplementedError, AssertionError):
            if not options:
                raise
    raise AssertionError("unreachable")


def _feature_width(name: str, body: nn.Module, image_size: tuple[int, int], trained: bool = True) -> int:
    """Return the width of the pooled feature; some of the host's networks have another one, or several, in training."""
    before = {key: value.clone() for key, value in body.state_dict().items()}
    widths = []
    with torch.no_grad():
        for training in (False, True) if trained else (False,):
            body.train(training)
            try:
                widths.append(pooled_output(body(torch.zeros(2, 3, *image_size))).shape[1])
            except (TypeError, UserError):
                if not training:
                    raise
                raise UserError(
                    f"backbone.name: '{name}' has several features per image in training, and one in testing; choose "
                    f"another to train, or extract with it as '{name}'."
                ) from None
    body.load_state_dict(before)
    if widths[0] != widths[-1]:
        raise UserError(
            f"backbone.name: '{name}' has features of width {widths[-1]} in training, {widths[0]} in testing; choose "
            "another."
        )
    return widths[0]


def build_backbone(
    name: str,
    *,
    pretrained: bool = False,
    weights: str = "",
    output_stride: int = 16,
    image_size: tuple[int, int] = (256, 128),
    host_builder: Callable[[str, bool], nn.Module] | None = None,
    partial: bool = False,
    key: str = "backbone.weights",
    say: Callable[[str], Any] = print,
    trained: bool = True,
) -> PooledBackbone:
    """Build a backbone by name.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME`` or ``host:NAME``; a bare name is torchvision's. ``file:PATH`` is one
            of a family that is known (:mod:`relreid_plugin.backbones.families`), a checkpoint with its weights.
        pretrained: Load the library's ImageNet weights (over the network, or from its cache).
        weights: Local weight file, used instead of the network.
        output_stride: 16 keeps the resolution of the last stage by dilation where the architecture allows it (torchvision
            ResNets, timm CNNs); 0 leaves the architecture as it is. Host models are always left as they are.
        image_size: (height, width) of the images, needed by vision transformers.
        host_builder: ``(name, pretrained) -> module`` that builds the host's models, for ``host:`` names.
        partial: Take what fits of ``weights``; else the file must fill the whole network.
        key: What names ``weights``, for the sentences.
        say: Takes the sentence of what was loaded.
        trained: It must give the same single feature in training; else in testing alone, as extractors ask for.

    Raises:
        UserError: Unknown name, weights that cannot be had, or a network that does not give one feature per image.
    """
    if name.startswith("file:"):
        return _of_family(name.removeprefix("file:"), weights, image_size, say)
    source, _, model = name.rpartition(":")
    source = source or "torchvision"
    download = pretrained and not weights
    if source not in ("torchvision", "timm", "host"):
        raise UserError(f"backbone.name: '{name}' must start with 'torchvision:', 'timm:', 'host:' or 'file:'.")
    if source == "host" and host_builder is None:
        raise UserError(f"backbone.name: '{name}' needs the host's model zoo, which is not connected here.")
    with _download_errors(name, download):
        if source == "torchvision":
            body = _torchvision(model, download, output_stride)
        elif source == "timm":
            body = _timm(model, download, output_stride, image_size)
        else:
            assert host_builder is not None
            body = host_builder(model, download)
    if weights:
        _load_local(body, weights, partial=partial, key=key, say=say)
    return PooledBackbone(body, _feature_width(name, body, image_size, trained))


def _of_family(path: str, weights: str, image_size: tuple[int, int], say: Callable[[str], Any]) -> PooledBackbone:
    """A checkpoint of a known family as a backbone, at the size of the images that it is trained with."""
    from .families import open_family, unknown_file

    if weights:
        raise UserError(f"backbone.name: '{path}' brings its weights; leave out 'backbone.weights'.")
    file = read_weight_file(path, key="backbone.name")
    opened = open_family(file, Request(size=image_size))
    if opened is None:
        raise UserError(f"backbone.name: {unknown_file(file)}")
    for note in opened.notes:
        say(note)
    assert isinstance(opened.network, nn.Module)
    return PooledBackbone(opened.network, _feature_width(path, opened.network, image_size))


@contextmanager
def _download_errors(name: str, download: bool) -> Iterator[None]:
    """Turn a failed download into a sentence with the ways out."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if download and isinstance(error, (OSError, RuntimeError, ValueError)):
            raise UserError(
                f"pretrained weights of '{name}' could not be loaded ({type(error).__name__}); set 'model.pretrained False' "
                "to train from scratch, or give a local file by 'backbone.weights'."
            ) from error
        raise


def build_vit(
    name: str,
    *,
    pretrained: bool = False,
    weights: str = "",
    patch_size: int = 0,
    depth: int = 0,
    drop_path: float = 0.0,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    partial: bool = False,
) -> nn.Module:
    """Build a timm vision transformer without classification head.

    Args:
        name: ``timm:NAME``.
        pretrained: Load timm's weights (over the network, or from its cache).
        weights: Local weight file, used instead of the network.
        patch_size: Pixels; 0: the network's own. timm resizes pretrained patch embeddings.
        depth: Number of blocks; 0: the network's own.
        drop_path: Stochastic depth rate of the last block.
        image_size: (height, width); ``None``: that of its own weights, or of ``weights``. timm resizes pretrained position
            embeddings.
        channels: Channels of an image. timm repeats or sums pretrained patch embeddings.
        partial: Take what fits of ``weights``; else the file must fill the whole network.

    Raises:
        UserError: No such network in timm, one that does not take these options, or weights that cannot be had.
    """
    import timm

    source, _, model = name.rpartition(":")
    if source != "timm":
        raise UserError(
            f"backbone.name: '{name}' must be a vision transformer of timm, such as 'timm:vit_base_patch16_224'."
        )
    if not timm.is_model(model):
        names = timm.list_models(["vit*", "deit*"])
        raise UserError(f"backbone.name: timm has no model '{model}'{did_you_mean(model.split('.')[0], names)}")
    options: dict[str, Any] = {"drop_path_rate": drop_path}
    if patch_size:
        options["patch_size"] = patch_size
    if depth:
        options["depth"] = depth
    if image_size is not None:
        options["img_size"] = image_size
    if channels != 3:
        options["in_chans"] = channels
    download = pretrained and not weights
    if depth and download:
        raise UserError(
            f"'vit.depth {depth}' makes a network that timm has no weights for; set 'model.pretrained False' or "
            "'vit.depth 0'."
        )
    with _download_errors(name, download):
        try:
            body = timm.create_model(model, pretrained=download, num_classes=0, **options)
        except TypeError:
            raise UserError(
                f"backbone.name: '{name}' does not take {', '.join(options)}; choose a 'timm:vit_…' or 'timm:deit_…'."
            ) from None
    if weights:
        _load_local(body, weights, partial=partial, prepare=_take_grid_of if image_size is None else None)
    return body
