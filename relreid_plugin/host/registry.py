"""torchreid's registries of models and data sets, and building a model from them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UserError, did_you_mean
from .layout import HOST

_PLUGIN_MODELS: set[str] = set()


def model_factory() -> dict[str, Callable[..., nn.Module]]:
    """Return the host's own table of models, name to builder; what is added to it, the host knows."""
    return getattr(HOST.models, "__model_factory")


def dataset_table(data_type: str = "image") -> dict[str, Any]:
    """Return the host's own table of data sets, name to class; ``data_type`` is image or video."""
    return getattr(HOST.data.datasets, f"__{data_type}_datasets")


def available_models() -> list[str]:
    """Return all names that ``model.name`` may take, sorted."""
    return sorted(model_factory())


def available_image_datasets() -> list[str]:
    """Return the names of all registered image data sets, sorted."""
    return sorted(dataset_table("image"))


def available_video_datasets() -> list[str]:
    """Return the names of all registered video data sets, sorted."""
    return sorted(dataset_table("video"))


def register_model(name: str, builder: Callable[..., nn.Module]) -> None:
    """Add a model to the host's factory; the same builder twice is fine.

    Args:
        name: The value of ``model.name`` that selects it.
        builder: ``builder(num_classes=, loss=, pretrained=, use_gpu=, **plugin_kwargs) -> nn.Module``.

    Raises:
        ValueError: The name is taken by another model.
    """
    factory = model_factory()
    if factory.setdefault(name, builder) is not builder:
        raise ValueError(f"the model name '{name}' is taken")
    _PLUGIN_MODELS.add(name)


def register_image_dataset(name: str, cls: Callable[..., Any]) -> None:
    """Add an image data set to the host's table; the same class twice is fine.

    Args:
        name: The name in ``data.sources`` and ``data.targets`` that selects it.
        cls: A subclass of the host's ``ImageDataset``, or a callable that returns one.

    Raises:
        ValueError: The name is taken by another data set.
    """
    table = dataset_table("image")
    if name not in table:
        HOST.data.register_image_dataset(name, cls)
    elif table[name] is not cls:
        raise ValueError(f"the data set name '{name}' is taken")


def build_model(
    name: str,
    num_classes: int,
    loss: str = "softmax",
    pretrained: bool = True,
    use_gpu: bool = True,
    **plugin_kwargs: Any,
) -> nn.Module:
    """Build a model of the host's factory.

    Args:
        name: A name of :func:`available_models`.
        num_classes: Number of training identities.
        loss: ``softmax`` (training returns logits) or ``triplet`` (logits and features).
        pretrained: Start from the model's ImageNet weights, which come from the network or from torch's cache.
        use_gpu: Handed to the builder as the host does.
        **plugin_kwargs: Handed on to models that this plug-in registered; the host's own models know none.

    Raises:
        UserError: No such model (the nearest name is given), a loss the model does not know, or ImageNet weights that
            cannot be fetched.
    """
    factory = model_factory()
    if name not in factory:
        raise UserError(f"key 'model.name' is '{name}', which is no known model{did_you_mean(name, factory)}")
    if name not in _PLUGIN_MODELS and loss not in ("softmax", "triplet"):
        # the host's models find out in the first training step
        raise UserError(f"model '{name}' does not know the loss '{loss}'; it trains with softmax or triplet.")
    kwargs = plugin_kwargs if name in _PLUGIN_MODELS else {}
    try:
        return factory[name](num_classes=num_classes, loss=loss, pretrained=pretrained, use_gpu=use_gpu, **kwargs)
    except Exception as error:
        if not (pretrained and _is_download_error(error)):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(" .")
        raise UserError(
            f"the ImageNet weights of model '{name}' could not be fetched ({reason}); set 'model.pretrained False', and "
            "'model.load_weights FILE' to start from a local file."
        ) from error


def _is_download_error(error: Exception) -> bool:
    """Whether urllib, requests, gdown or torch raise ``error`` when weights cannot be fetched or came broken."""
    if isinstance(error, (OSError, EOFError, pickle.UnpicklingError)):
        return True
    if type(error).__module__.split(".")[0] in ("gdown", "requests", "urllib3", "http", "huggingface_hub"):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("invalid hash", "PytorchStreamReader"))
