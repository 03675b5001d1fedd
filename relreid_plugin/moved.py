"""Old module paths, which go on working: each gives the module that took its place, and warns once.

:func:`install` puts one finder at the end of ``sys.meta_path``; it is asked only for modules that nothing else finds, and
imports nothing before one of the old names is.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_ROOT = __name__.rpartition(".")[0]

MOVED: dict[str, str] = {
    "analysis.ablation": "rib.tables",
    "analysis.curves": "engine.curves",
    "analysis.figures": "magformer.figures",
    "analysis.gradcam": "rib.gradcam",
    "analysis.graft": "graft.tables",
    "analysis.information": "rib.figures",
    "analysis.occlusion": "rib.occlusion",
    "analysis.ranked": "engine.ranked",
    "data.neighbourhoods": "magformer.neighbourhoods",
    "data.triplets": "graft.triplets",
    "engine.ablation": "engine.grid",
    "engine.cli": "cli.train",
    "engine.ladder": "magformer.ladder",
    "engine.multimodal": "graft.stage",
    "engine.pruning": "graft.pruning",
    "engine.recipe": "magformer.recipe",
    "engine.relation": "magformer.stage",
    "engine.rib": "rib.observers",
    "engine.schedules": "host.schedules",
    "engine.splits": "experiments.splits",
    "evaluation.features": "features.sets",
    "evaluation.protocols": "engine.evaluator",
    "evaluation.report": "engine.table",
    "evaluation.scoring": "engine.scoring",
    "functional.cameras": "magformer.cameras",
    "functional.discriminant": "magformer.discriminant",
    "functional.distance": "metrics.distance",
    "functional.expansion": "metrics.expansion",
    "functional.gate": "rib.gate",
    "functional.information": "rib.information",
    "functional.matches": "metrics.matches",
    "functional.neighbours": "metrics.neighbours",
    "functional.pruning": "engine.packing",
    "functional.ranking": "metrics.ranking",
    "functional.relation": "magformer.operations",
    "functional.reranking": "metrics.reranking",
    "graft.datasets": "host.multimodal",
    "graft.modalities": "data.multimodal",
    "graft.packing": "engine.packing",
    "graft.transforms": "data.multimodal_transforms",
    "graft.views": "data.views",
    "idle": "config.idle",
    "layers.bnneck": "backbones.bnneck",
    "layers.dcs": "rib.dcs",
    "layers.insertion": "rib.insertion",
    "layers.placement": "rib.placement",
    "layers.pruned": "graft.pruned",
    "layers.relation": "magformer.attention",
    "losses.ffd": "graft.ffd",
    "losses.information": "rib.bound",
    "losses.metric": "backbones.losses",
    "merging": "config.merging",
    "models.backbones": "backbones.networks",
    "models.baseline": "backbones.baseline",
    "models.graft": "graft.model",
    "models.relation": "magformer.encoder",
    "models.vit": "rib.transreid",
    "ranges": "config.ranges",
    "search.arrays": "features.arrays",
    "search.store": "features.store",
    "search.verified": "features.verified",
    "validation": "config.validation",
}
"""Old module below ``relreid_plugin`` to the one in its place."""
EMPTY = ("analysis", "evaluation", "functional", "layers", "losses", "models")
"""Old packages that held nothing but modules."""


class _Loader:
    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own empty module, which stands in until the real one takes its place."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that took the old one's place under the old name; of an old package, leave the empty one."""
        old = module.__name__
        if not self.new:
            return
        warnings.warn(f"'{old}' is now '{self.new}'; the old name will be taken away.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(self.new)


class MovedFinder:
    """Finds the old names."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return a spec for an old name, ``None`` for any other."""
        root, _, rest = name.partition(".")
        if root != _ROOT:
            return None
        if rest in EMPTY:
            return ModuleSpec(name, _Loader(""), is_package=True)  # type: ignore[arg-type]
        new = MOVED.get(rest)
        return ModuleSpec(name, _Loader(f"{_ROOT}.{new}")) if new else None  # type: ignore[arg-type]


def install() -> None:
    """Let the old names be found; calling it again does nothing."""
    if not any(getattr(finder, "__name__", "") == MovedFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder)
