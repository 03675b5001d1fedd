"""Blocks put behind the layers of a network that exists, without changing a name in its state dict."""

from __future__ import annotations

from typing import Any

from torch import nn

_FOLLOWED: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _followed_class(base: type[nn.Module], name: str) -> type[nn.Module]:
    """A subclass of ``base`` whose output goes through its child ``name``."""
    key = (base, name)
    if key not in _FOLLOWED:

        def forward(self: Any, *inputs: Any, **options: Any) -> Any:
            return getattr(self, name)(base.forward(self, *inputs, **options))

        _FOLLOWED[key] = type(f"{base.__name__}Then{name.title()}", (base,), {"forward": forward})
    return _FOLLOWED[key]


def insert_after(network: nn.Module, path: str, name: str, block: nn.Module) -> None:
    """Run ``block`` on the output of a layer, as a child of that layer.

    All names that the network's state dict had stay; those of ``block`` are ``<path>.<name>.…``. The layer keeps its class
    for ``isinstance``, and the network can still be copied and replicated. ``block`` takes over the layer's mode.

    Args:
        network: Changed in place.
        path: Dotted name of the layer.
        name: Name of the new child.
        block: The block.

    Raises:
        ValueError: There is no such layer, or it has a child of that name.
    """
    try:
        layer = network.get_submodule(path)
    except AttributeError:
        raise ValueError(f"a {type(network).__name__} has no layer '{path}'") from None
    if hasattr(layer, name):
        raise ValueError(f"layer '{path}' of a {type(network).__name__} already has '{name}'")
    followed = None if isinstance(layer, nn.Sequential) else _followed_class(type(layer), name)
    block.train(layer.training)
    layer.add_module(name, block)  # the last child of a Sequential runs last
    if followed is not None:
        layer.__class__ = followed
