"""The faces that methods show to the house, and how they are found.

A method is a folder (a *wing*) with one :class:`Method` object. The plug-in's own are named in :data:`OWN`; those of other
packages come in by the entry-point group :data:`GROUP`::

    [project.entry-points."relreid_plugin.methods"]
    mymethod = "mypackage.method:METHOD"

Configuration, engine, host and commands ask :func:`methods` and know none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
    from torch.optim import Optimizer

    from .config.idle import Rule as IdleRule
    from .config.ranges import Rule as Range
    from .engine.network import Network
    from .engine.observers import Observer
    from .engine.runner import Run
    from .engine.stages import Stage
    from .features.sets import TestFeatures

GROUP = "relreid_plugin.methods"
"""Entry points of methods in other packages."""

OWN = ("relreid_plugin.rib.method:METHOD", "relreid_plugin.graft.method:METHOD", "relreid_plugin.magformer.method:METHOD")
"""The plug-in's own methods, in the order in which their keys are written and their stages follow each other."""


@dataclass(frozen=True)
class ResumeKeys:
    """What may change in a method's keys when a run goes on; a pattern may end with ``*``.

    Attributes:
        machine: They say where and how a run is computed, and may change.
        testing: They belong to validating and testing, and may change.
        start: Where first weights came from: may be left out, but name no others.
        later: Not read by stage 1: may change until a later stage has begun.
        training: Not read by a test of trained weights.
        epochs: Kind of a stage's checkpoints to the key of its number of epochs.
    """

    machine: tuple[str, ...] = ()
    testing: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    epochs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Lines that a method adds to the report of its runs.

    Attributes:
        title: What is shown.
        x, y: Names of the axes.
        lines: Name to its points (x, y), in order.
        target: Test set that it belongs to; empty: all of the run's.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    target: str = ""


@dataclass(frozen=True)
class Table:
    """Scores that a method adds to the report of its runs.

    Attributes:
        title: What is shown.
        columns: Their names; the first is that of the rows.
        rows: A name, then fractions of 1 (floats, shown as percent), whole numbers or words.
        target: Test set that it belongs to; empty: all of the run's.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]
    target: str = ""


@dataclass(frozen=True)
class Overlay:
    """Where a network looks.

    Attributes:
        title: What the maps are called.
        about: What they say, for a sentence that begins with the title.
        maps: (n, h, w) in [0, 1], one for every image, stretched over it.
    """

    title: str
    about: str
    maps: np.ndarray


class Looks:
    """What a method finds by passes through the network of a run of single images, for the report."""

    def wanted(self, cfg: Any) -> bool:
        """Whether :meth:`overlays` belong to the report of a run, and of those beside it."""
        return False

    def overlays(self, run: Run, target: str, data: TestFeatures, rows: Sequence[int]) -> list[Overlay]:
        """Return where the network looks in some queries.

        Args:
            run: Opened.
            target: A test set of the run's.
            data: Its features, with the paths of its images.
            rows: Of the queries.

        Raises:
            UserError: An image is not there, or a package is missing.
        """
        return []

    def measured(self, run: Run, target: str, data: TestFeatures) -> list[Panel | Table]:
        """Return what is asked for by ``--measure``, from the run's folder where it was measured before.

        Args:
            run: Opened.
            target: A test set of the run's.
            data: Its features, with the paths of its images.

        Raises:
            UserError: An image is not there.
        """
        return []


class Method:
    """What a method adds to a run. Every part may be left as it is here: nothing.

    A method's module is imported to read any configuration: import torch and the engine inside the functions that need them.
    """

    name: ClassVar[str]
    """How tables, entry points and messages call it."""
    models: ClassVar[Mapping[str, str]] = {}
    """``model.name`` to ``module:builder``; a builder takes ``num_classes, loss, pretrained, use_gpu, cfg, num_cameras``."""
    several: ClassVar[frozenset[str]] = frozenset()
    """Those of :attr:`models` whose samples are several images each (``multimodal``)."""
    example: ClassVar[str] = ""
    """A packaged configuration of it that runs without any download."""
    seeds: ClassVar[tuple[str, ...]] = ()
    """Keys of further seeds of stage 1, which tables over several seeds set as ``train.seed``."""
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Key of the house to further values that it may take."""
    ranges: ClassVar[Mapping[str, Range]] = {}
    """Own key to its range."""
    idle: ClassVar[Sequence[IdleRule]] = ()
    """When keys of its own, or of the house beside it, cannot act."""
    uses: ClassVar[Mapping[str, Callable[[Any], bool]]] = {}
    """Key of the house to whether the method reads it, where nothing else may."""
    resume: ClassVar[ResumeKeys] = ResumeKeys()
    """Which of its keys may change when a run goes on."""

    def add_config(self, cfg: Any) -> None:
        """Add its keys with their defaults, which change nothing; a comment behind each says what it means."""

    def validate(self, cfg: Any) -> None:
        """Raise :class:`~relreid_plugin.errors.UserError` where values of its keys do not go together."""

    def schedule_notes(self, cfg: Any) -> list[str]:
        """Return what in its schedules is allowed, but probably not meant."""
        return []

    def register(self) -> None:
        """Add its data sets to the host; its :attr:`models` are added without it."""

    def network(self, cfg: Any) -> Network | None:
        """Return how a network of its own is trained and tested; ``None``: as any image model.

        It is asked where ``model.name`` is one of :attr:`models`.
        """
        return None

    def stages(self, cfg: Any) -> list[Stage]:
        """Return the stages that it adds to a run behind the network's first one, in order.

        It is asked where :meth:`stage_count` says that there are any.
        """
        return []

    def stage_count(self, cfg: Any) -> int:
        """Return how many stages :meth:`stages` has; asked before torch is imported."""
        return 0

    def stage_hint(self, cfg: Any) -> str:
        """Return why it adds no (further) stage and what would, for who asks for one; empty: nothing would."""
        return ""

    def adapt(self, cfg: Any, network: nn.Module) -> None:
        """Change a backbone that a model of the plug-in is built on, before it is wrapped."""

    def observers(self, cfg: Any, model: nn.Module, *, num_classes: int, feature_dim: int | None) -> list[Observer]:
        """Return what watches stage 1's epochs, and may add to its loss.

        Args:
            cfg: Configuration.
            model: The network, not wrapped.
            num_classes: Training identities.
            feature_dim: Width of its features where ``loss.name`` is ``composite``; ``None`` with the host's losses.
        """
        return []

    def looks(self) -> Looks | None:
        """Return what looks into trained networks for the report; ``None``: nothing does."""
        return None

    def panels(self, folder: Path, metrics: Mapping[str, Any]) -> list[Panel | Table]:
        """Return what it adds to the report of a run, from what the run's folder keeps.

        Args:
            folder: The run's folder.
            metrics: Content of its ``metrics.json``.

        Raises:
            UserError: A file of the method's own cannot be read.
        """
        return []

    def embeds_cameras(self, cfg: Any) -> bool:
        """Whether a configuration's model has an embedding of the training cameras."""
        return False

    def group_parameters(self, cfg: Any, optimizer: Optimizer, model: nn.Module) -> None:
        """Regroup an optimiser's parameters, such as for a learning rate of their own."""


def _load(place: str) -> Method:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


@lru_cache(maxsize=1)
def methods() -> tuple[Method, ...]:
    """Return all methods, the plug-in's own first.

    Raises:
        UserError: An entry point of another package cannot be imported, is no :class:`Method`, or takes a name or key twice.
    """
    found = [_load(place) for place in OWN]
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name):
        try:
            method = point.load()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"method '{point.name}' ({point.value}) cannot be imported: {reason}; repair or uninstall it."
            ) from error
        if isinstance(method, type):
            method = method()
        if not isinstance(method, Method):
            raise UserError(f"entry point '{point.name}' ({point.value}) is no relreid_plugin.methods.Method.")
        found.append(method)
    for index, method in enumerate(found):
        for other in found[:index]:
            taken = [*({method.name} & {other.name}), *(method.models.keys() & other.models.keys())]
            if taken:
                raise UserError(f"methods '{other.name}' and '{method.name}' both name '{taken[0]}'; uninstall one of them.")
    return tuple(found)


def own_models() -> tuple[str, ...]:
    """Return the ``model.name`` of all models that methods bring."""
    return tuple(name for method in methods() for name in method.models)


def single_models() -> tuple[str, ...]:
    """Return those of them that take one image per sample, the plug-in's plain baseline first."""
    return (BASELINE, *(name for method in methods() for name in method.models if name not in method.several))


BASELINE = "bnneck_baseline"
"""The plug-in's image model on any backbone, which belongs to no method."""


def several_models() -> tuple[str, ...]:
    """Return the models whose samples are several images each."""
    return tuple(name for method in methods() for name in method.models if name in method.several)


def takes_several(cfg: Any) -> bool:
    """Whether the samples of a configuration's model are several images each."""
    return cfg.model.name in several_models()


def method_of(name: str) -> Method | None:
    """Return the method that a ``model.name`` belongs to."""
    return next((method for method in methods() if name in method.models), None)


def no_download_hint(*, several: bool = False) -> str:
    """Return half a sentence that names a configuration which needs no data, with one or several images per sample."""
    found = [method.example for method in methods() if method.example and bool(method.several) == several]
    return f"'--config-file {found[-1]}' runs without any download"


def last_stage(cfg: Any) -> int:
    """Return the number of a configuration's last stage: the network's first one and what methods add."""
    return 1 + sum(method.stage_count(cfg) for method in methods())


def first_stage(name: str, cfg: Any) -> int:
    """Return the number of the first stage that a method adds to a configuration's run, or would add."""
    before = 1
    for method in methods():
        if method.name == name:
            return before + 1
        before += method.stage_count(cfg)
    raise KeyError(name)


def builders() -> dict[str, Callable[..., nn.Module]]:
    """Return the builders of all methods' models by ``model.name``."""
    from pkgutil import resolve_name

    return {name: resolve_name(place) for method in methods() for name, place in method.models.items()}
