"""What all families need: their names without wrappings, sizes out of shapes, and loading what was mapped."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError, did_you_mean
from ..files import WeightFile
from ..opened import Opened, Reading
from ..weights import load_into, shown, state_dicts

Weights = dict[str, Tensor]
NECKS = ("before", "after")


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: One word.
        title: In words.
        detect: Whether a state dict is of it.
        open: Builds the network of a file, a state dict in it and a request, and fills it.
        options: What a user may say beside it.
    """

    name: str
    title: str
    detect: Callable[[Weights], bool]
    open: Callable[[WeightFile, Weights, Any], Opened]
    options: tuple[str, ...] = ()


def plain_states(content: Mapping[Any, Any]) -> list[Weights]:
    """Return the state dicts in a file's content, the likeliest first, without the ``module.`` of parallel training."""
    found = []
    for _, weights in state_dicts(content):
        if all(name.startswith("module.") for name in weights):
            weights = {name.removeprefix("module."): value for name, value in weights.items()}
        found.append(weights)
    return found


def count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """Return 1 + the largest number that ``pattern``, with one group, finds in the names; 0 where it finds none."""
    found = [int(match[1]) for name in weights if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def before(weights: Mapping[str, Tensor], ending: str) -> str:
    """Return what stands before ``ending`` in the first name that ends so: the prefix of a network; empty for none."""
    return next((name.removesuffix(ending) for name in weights if name.endswith(ending)), "")


def without(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    """Return the tensors below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def fill(
    network: nn.Module, mapped: Weights, file: WeightFile, *, reading: Reading, title: str, notes: Sequence[str] = ()
) -> Opened:
    """Fill a network with mapped weights, completely.

    Args:
        network: The network.
        mapped: Weights under its own names; classifiers under theirs.
        file: The file that they come from.
        reading: How the network wants its images.
        title: What it is, in words.
        notes: What else a user should know.

    Raises:
        UserError: They do not fill it.
    """
    report = load_into(network, WeightFile(file.path, dict(mapped), file.unread), label=f"'{file.path}' ({title})")
    return Opened(network.eval(), reading, title, [f"{title}: {report.sentence()}", *notes])


def choose(options: Mapping[str, Any], name: str, default: Any, choices: Sequence[Any]) -> Any:
    """Return an option out of several.

    Raises:
        UserError: It is none of them.
    """
    value = options.get(name, default)
    if value not in choices:
        raise UserError(f"option '{name}' is '{value}'{did_you_mean(str(value), [str(each) for each in choices])}")
    return value


def number(options: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """Return an option that is a number.

    Raises:
        UserError: It is none, or out of range.
    """
    value = options.get(name, default)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not low <= found <= high or isinstance(value, bool):
        raise UserError(f"option '{name}' takes a number in [{low:g}, {high:g}], got {value!r}.")
    return found


def say_left(names: Sequence[str], what: str) -> list[str]:
    """Return a note of tensors that are not used."""
    return [f"{len(names)} tensors {what} ({shown(names)})"] if names else []


class Neck(nn.Module):
    """A feature before or behind the batch normalisation of a BNNeck.

    Args:
        width: Of the feature.
        where: ``before`` or ``after``.
    """

    def __init__(self, width: int, where: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.where = where

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, d)."""
        found: Tensor = self.norm(features) if self.where == "after" else features
        return found


class InstanceBatchNorm(nn.Module):
    """Instance normalisation of the first half of the channels, batch normalisation of the others (IBN-a, Pan et al. 2018).

    Args:
        channels: Channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.split = channels // 2
        self.IN = nn.InstanceNorm2d(self.split, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.split)

    def forward(self, images: Tensor) -> Tensor:
        """(B, c, h, w) -> the same shape."""
        first, second = images[:, : self.split], images[:, self.split :]
        return torch.cat([self.IN(first.contiguous()), self.BN(second.contiguous())], dim=1)


class GeneralisedMean(nn.Module):
    """Generalised mean of a feature map over its places (GeM, Radenovic et al. 2019).

    Args:
        power: Exponent p.
        eps: What values are at least.
    """

    def __init__(self, power: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), float(power)))
        self.eps = eps

    def forward(self, maps: Tensor) -> Tensor:
        """(B, d, h, w) -> (B, d, 1, 1)."""
        return F.adaptive_avg_pool2d(maps.clamp(min=self.eps).pow(self.p), 1).pow(1 / self.p)


__all__ = [
    "NECKS",
    "Family",
    "GeneralisedMean",
    "InstanceBatchNorm",
    "Neck",
    "Weights",
    "before",
    "choose",
    "count",
    "fill",
    "number",
    "plain_states",
    "say_left",
    "without",
]
