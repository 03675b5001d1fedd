"""One loader for all keys that name a weight file: what it loads is complete, or refused, and every exception is said.

A file fits when every tensor of the model is in it in the same shape and none is left over. What may differ:

- names: a wrapping (``state_dict``, ``model``, ``teacher``, …) and a prefix (``module.``, ``backbone.``, …) are taken off;
- sizes: position embeddings, patch embeddings and first convolutions are resized by timm's and torchvision's own functions;
- classifiers of other classes: they start anew;
- counters of batches that old files of torch lack.

All but the last is said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..collective import bare_model
from ..errors import UserError
from .describe import looks_like
from .files import Unread, WeightFile, read_weight_file, whole_model
from .resize import Grid, adapt, library_form, same_grid, stored_grid

_PREFERRED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema", "teacher", "state_dict", "model_state_dict",
    "model_state", "model", "module", "net", "network", "weights", "params", "backbone", "encoder",
)  # fmt: skip
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|^amp$|loss|criterion|center|rng|history|extra|config|args|queue|^meta", re.I)
_DEPTH = 3  # dicts within dicts that are looked into
_SHOWN = 3  # names in a sentence
_PARTS = ("backbone.body.", "vit.", "backbones.0.")  # where the plug-in's models have their backbone
_OWN_HEAD = re.compile(r"(^|\.)(classifier\w*|head|heads|head_dist|last_linear|logits)(\.|$)|^fc\.(weight|bias)$", re.I)
_LEFT_HEAD = re.compile(
    r"^(fc|classifier\w*|head|heads|head_dist|last_linear|logits|aux_?logits|aux\d|aux_classifier)\.", re.I
)
_STATISTICS = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")


def shown(names: Iterable[str], limit: int = _SHOWN) -> str:
    """Return the first names, quoted, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(f"'{name}'" for name in listed[:limit]) + more


def compare_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Return the names that ``given`` lacks, those that only it has, and those whose shapes differ, in order."""
    missing = [name for name in own if name not in given]
    extra = [name for name in given if name not in own]
    wrong = [name for name in own if name in given and own[name].shape != given[name].shape]
    return missing, extra, wrong


# --- what a file holds ------------------------------------------------------------------------------------------------
def state_dicts(content: Mapping[Any, Any]) -> list[tuple[str, dict[str, Tensor]]]:
    """Return the state dicts in a file's content with where they are, the likeliest first; averaged weights (EMA) lead."""
    found: list[tuple[str, dict[str, Tensor]]] = []

    def walk(value: Mapping[Any, Any], place: str, depth: int) -> None:
        tensors = {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}
        if tensors:
            found.append((place, tensors))
        for name, item in value.items():
            if isinstance(item, Mapping) and isinstance(name, str) and depth < _DEPTH and not _NO_WEIGHTS.search(name):
                walk(item, f"{place}.{name}" if place else name, depth + 1)

    walk(content, "", 0)

    def order(entry: tuple[str, dict[str, Tensor]]) -> tuple[int, int]:
        place = entry[0].split(".")
        return min((_PREFERRED.index(part) for part in place if part in _PREFERRED), default=len(_PREFERRED)), len(place)

    return sorted(found, key=order)


def _prefixes(own: Iterable[str], given: Iterable[str]) -> list[str]:
    """Prefixes of a file's names under which a model's names are found, the one with most first."""
    names, counts = set(own), Counter[str]()
    for name in given:
        start = 0
        while True:
            if name[start:] in names:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1
            if not start:
                break
    best = sorted(counts, key=lambda prefix: (-counts[prefix], "teacher" not in prefix, "ema" not in prefix, len(prefix)))
    return best[:3] or [""]


# --- fitting ----------------------------------------------------------------------------------------------------------
@dataclass
class LoadReport:
    """What was, or would be, loaded.

    Attributes:
        path: The file.
        place: Where in the file the weights are; empty: outermost.
        prefix: What was taken off the names.
        loaded: Names of the model's tensors that are in the file.
        missing: Names that are not.
        left: Names in the file that the model has not.
        wrong: Names in other shapes, with both.
        outside: Names in the file that do not begin with ``prefix``.
        heads: Classifiers that start anew, by name, with the reason.
        left_heads: Names of the file's classifiers that the model has not.
        resized: What was resized, in words.
    """

    path: Path
    place: str = ""
    prefix: str = ""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    heads: dict[str, str] = field(default_factory=dict)
    left_heads: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict, repr=False)
    unread: tuple[str, ...] = ()

    @property
    def misfits(self) -> int:
        """Tensors that do not fit."""
        return len(self.missing) + len(self.left) + len(self.wrong)

    def differences(self) -> str:
        """Return what does not fit, with counts and the first names."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing there ({shown(self.missing)})")
        if self.left:
            parts.append(f"{len(self.left)} left over ({shown(self.left)})")
        if self.wrong:
            first = ", ".join(f"'{name}' {shapes}" for name, shapes in list(self.wrong.items())[:_SHOWN])
            parts.append(f"{len(self.wrong)} of another shape ({first}{', …' if len(self.wrong) > _SHOWN else ''})")
        return ", ".join(parts)

    def sentence(self) -> str:
        """Return what was done, in one line."""
        where = ", ".join(
            [*([f"its '{self.place}'"] if self.place else []), *([f"without '{self.prefix}'"] if self.prefix else [])]
        )
        parts = [f"loaded {len(self.loaded)} tensors from '{self.path}'" + (f" ({where})" if where else "")]
        if self.resized:
            parts.append("resized: " + ", ".join(self.resized))
        if self.heads:
            name, reason = next(iter(self.heads.items()))
            more = f" and {len(self.heads) - 1} more" if len(self.heads) > 1 else ""
            parts.append(f"the classifier starts anew ('{name}': {reason}{more})")
        if self.left_heads:
            parts.append(f"the file's classifier is left out ({shown(self.left_heads)})")
        if self.outside:
            parts.append(f"{len(self.outside)} tensors of other parts left out ({shown(self.outside)})")
        if self.misfits:
            parts.append(f"PARTIAL: {self.differences()}")
        if self.unread:
            parts.append(f"objects that are no tensors were not read ({', '.join(self.unread[:_SHOWN])})")
        return "; ".join(parts)


def _shapes(there: Tensor, here: Tensor) -> str:
    return f"{tuple(there.shape)} there, {tuple(here.shape)} here"


def _is_own_head(name: str, here: Tensor, there: Tensor | None, classes: int) -> bool:
    """Whether a tensor of the model is a classifier that another number of classes explains."""
    if not _OWN_HEAD.search(name) or not here.dim() or (classes and len(here) != classes):
        return False
    return there is None or (there.dim() == here.dim() and there.shape[1:] == here.shape[1:])


def _left_heads(names: list[str]) -> list[str]:
    """Classifiers of a file that the model has not: weights and biases alone, as an embedding with its own norm is none."""
    parts = {name.split(".")[0] for name in names if _STATISTICS.search(name) and not name.lower().startswith("aux")}
    return [name for name in names if _LEFT_HEAD.search(name) and name.split(".")[0] not in parts]


def _fit(
    model: nn.Module, path: Path, place: str, prefix: str, given: Mapping[str, Tensor], *, grid: Grid | None, classes: int
) -> LoadReport:
    """Find out what of a state dict goes where."""
    report = LoadReport(path, place, prefix)
    own = model.state_dict()
    named = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    report.outside = [name for name in given if not name.startswith(prefix)]
    for name, here in own.items():
        there = named.get(name)
        if there is None:
            if name.endswith("num_batches_tracked"):
                continue
            if _is_own_head(name, here, None, classes):
                report.heads[name] = "not there"
            else:
                report.missing.append(name)
            continue
        if there.shape != here.shape or not same_grid(model, name, grid):
            made = None if _unusual(there) else adapt(model, name, there, here, grid)
            if made is not None:
                there = made[0]
                report.resized.append(f"'{name}' {made[1]}")
            elif _is_own_head(name, here, there, classes):
                report.heads[name] = f"{len(there)} classes there, {len(here)} here"
                continue
            else:
                report.wrong[name] = _shapes(there, here)
                continue
        report.loaded.append(name)
        report.values[name] = there
    left = [name for name in named if name not in own]
    report.left_heads = _left_heads(left)
    report.left = [name for name in left if name not in set(report.left_heads)]
    return report


def _unusual(value: Tensor) -> str:
    """What is unusual about a tensor, so that it is no weight; empty: nothing."""
    if value.is_quantized:
        return "is quantised"
    if value.layout != torch.strided:
        return "is sparse"
    if value.is_meta:
        return "has no values (device 'meta')"
    return "is of complex numbers" if value.is_complex() else ""


def _checked(label: str, name: str, value: Tensor, here: Tensor) -> Tensor:
    """A tensor of the file in the model's type."""
    problem = _unusual(value)
    if not problem and value.is_floating_point() != here.is_floating_point():
        counts = not here.is_floating_point() and value.numel() == 1 and bool((value == value.round()).all())
        problem = "" if counts else f"is of type {str(value.dtype).removeprefix('torch.')}"
    if problem:
        wanted = str(here.dtype).removeprefix("torch.")
        raise UserError(f"{label}: tensor '{name}' {problem}, where the model has {wanted}; give weights of floating point.")
    cast = value.to(here.dtype)
    if cast.is_floating_point() and bool(torch.isfinite(here).all()) and not bool(torch.isfinite(cast).all()):
        raise UserError(
            f"{label}: tensor '{name}' holds NaN or infinity; its training has diverged or it was damaged; give another."
        )
    return cast


def _candidates(
    model: nn.Module, file: WeightFile, classes: int
) -> Iterable[LoadReport]:  # the likeliest first, made when they are asked for
    own = model.state_dict()
    for place, given in state_dicts(file.content):
        grid = stored_grid(file.content, given)
        for prefix in _prefixes(own, given):
            options: dict[str, Any] = {"grid": grid, "classes": classes}
            stripped = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
            made = library_form(model, stripped) if grid is None else None
            if made is not None:
                report = _fit(model, file.path, place, "", made, **options)
                report.prefix, report.outside = prefix, [name for name in given if not name.startswith(prefix)]
                report.resized += [
                    f"'{name}' from {tuple(stripped[name].shape)} to {tuple(made[name].shape)}"
                    for name in report.loaded
                    if name in stripped and name in made and stripped[name].shape != made[name].shape
                ]
                yield report
            yield _fit(model, file.path, place, prefix, given, **options)
        made = library_form(model, given)
        if made is not None:
            yield _fit(model, file.path, place, "", made, grid=None, classes=classes)


def best_fit(
    model: nn.Module, file: WeightFile, *, classes: int = 0, whole: bool = True, label: str = ""
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Return the fit of the state dict, prefix and form of a file that fit a model best, and the names in the file.

    Args:
        model: The model; not changed.
        file: The file.
        classes: Training identities of the model; 0: its classifiers are known by name alone.
        whole: Tensors outside of the prefix count as left over; ``False``: the model is a part of what the file holds.
        label: Begin of the sentences.

    Raises:
        UserError: The file holds no tensors.
    """
    found = state_dicts(file.content)
    if not found:
        if any(isinstance(value, Unread) for value in file.content.values()):
            raise UserError(whole_model(label, [name for name in file.unread if not name.startswith("torch.")][:1]))
        inside = ", ".join(f"'{name}'" for name in list(file.content)[:_SHOWN])
        raise UserError(f"{label} holds no tensors by name ({inside or 'it is empty'}), so it is no file of weights.")
    best: LoadReport | None = None
    for report in _candidates(model, file, classes):
        if whole and report.outside:
            heads = _left_heads(report.outside)
            report.left += [name for name in report.outside if name not in set(heads)]
            report.left_heads, report.outside = [*report.left_heads, *heads], []
        if best is None or (not report.misfits, len(report.loaded), -report.misfits) > (
            not best.misfits,
            len(best.loaded),
            -best.misfits,
        ):
            best = report
        if not best.misfits and best.loaded:
            break
    assert best is not None
    best.unread = file.unread
    return best, dict(found)[best.place]


def _refuse(label: str, model: nn.Module, report: LoadReport, given: Mapping[str, Tensor], file: WeightFile) -> None:
    """Raise the sentence for a file that does not fit."""
    what = looks_like(file.content, list(given))
    looks = f"; it looks like {what}" if what else ""
    kind = type(model).__name__
    own, part = list(model.state_dict()), ""
    for name in _PARTS:
        inside = {key.removeprefix(name) for key in own if key.startswith(name)}
        if inside and len(inside & {key.removeprefix("module.") for key in given}) > 0.9 * len(inside):
            part = name
    if part:
        rest = shown(name for name in own if not name.startswith(part))
        raise UserError(f"{label} is a backbone alone{looks}, and {kind} has more ({rest}); give it by 'backbone.weights'.")
    if not report.loaded:
        raise UserError(
            f"{label} is one of another model: none of its {len(given)} layers fits {kind} by name and shape{looks}; "
            "it holds another network."
        )
    ending = "name the model that it was made with, or set 'model.partial_weights True' to load what fits."
    raise UserError(
        f"{label} fits {kind} in {len(report.loaded)} of {len(own)} tensors only: {report.differences()}{looks}; {ending}"
    )


def load_into(
    model: nn.Module,
    file: WeightFile,
    *,
    label: str,
    partial: bool = False,
    classes: int = 0,
    whole: bool = True,
    only_check: bool = False,
) -> LoadReport:
    """Put the weights of a file that was read into a model; see :func:`load_weight_file`."""
    bare = bare_model(model)
    report, given = best_fit(bare, file, classes=classes, whole=whole, label=label)
    if not report.loaded or (report.misfits and not partial):
        _refuse(label, bare, report, given, file)
    own = bare.state_dict()
    values = {name: _checked(label, name, value, own[name]) for name, value in report.values.items()}
    if not only_check:
        bare.load_state_dict(values, strict=False)
    report.values = {}
    return report


def load_weight_file(
    model: nn.Module,
    path: str | Path,
    *,
    key: str = "",
    partial: bool = False,
    classes: int = 0,
    whole: bool = True,
    prepare: Callable[[nn.Module, WeightFile], None] | None = None,
    only_check: bool = False,
) -> LoadReport:
    """Load a weight file into a model, completely.

    Args:
        model: Changed in place, once everything is known to fit; ``DataParallel`` is looked through.
        path: File of torch or safetensors; see :func:`~relreid_plugin.backbones.files.read_weight_file`.
        key: The configuration's key, for the sentences.
        partial: Load what fits and say what does not.
        classes: Training identities of the model; 0: classifiers are known by name alone.
        whole: The file is one of this model; ``False``: the model may be a part of it, as a backbone is.
        prepare: Called with the model and the file before they are compared.
        only_check: Leave the model as it is: find out early whether the file will fit.

    Returns:
        What was loaded; its ``sentence`` is to be said.

    Raises:
        UserError: The file cannot be read, does not fit, or holds values that are no weights.
    """
    file = read_weight_file(path, key=key)
    bare = bare_model(model)
    if prepare is not None:
        prepare(bare, file)
    label = f"{key}: '{path}'" if key else f"weight file '{path}'"
    return load_into(model, file, label=label, partial=partial, classes=classes, whole=whole, only_check=only_check)


__all__ = ["LoadReport", "best_fit", "compare_names", "load_into", "load_weight_file", "shown", "state_dicts"]
