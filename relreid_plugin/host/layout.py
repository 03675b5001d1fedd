"""Finding torchreid in either of its layouts."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from ..errors import INSTALL_HOST, PACKAGES, UserError

PIP_COMMAND = INSTALL_HOST

_PARTS = ("data", "engine", "models", "optim", "metrics", "utils", "losses")


@dataclass(frozen=True)
class Host:
    """torchreid's modules, wherever they lie.

    Attributes:
        layout: ``torchreid.reid`` (PyPI 0.2.5) or ``torchreid`` (original 1.4.0).
        version: The package's version.
    """

    layout: str
    version: str
    data: ModuleType
    engine: ModuleType
    models: ModuleType
    optim: ModuleType
    metrics: ModuleType
    utils: ModuleType
    losses: ModuleType


def find_host(import_module: Callable[[str], ModuleType] = importlib.import_module) -> Host:
    """Find torchreid: the layout ``torchreid.reid.*`` when it is there, else ``torchreid.*``.

    Args:
        import_module: Replaces ``importlib.import_module`` in tests.

    Raises:
        UserError: torchreid, or a package that torchreid needs and does not declare, is missing; the sentence holds the
            pip command.
    """
    with warnings.catch_warnings():
        # the host recommends its Cython ranking at every import; the plug-in ranks with vectorised code of its own
        warnings.filterwarnings("ignore", message="Cython evaluation")
        warnings.filterwarnings("ignore", category=SyntaxWarning)
        try:
            try:
                import_module("torchreid.reid")
                layout = "torchreid.reid"
            except ModuleNotFoundError as error:
                if error.name != "torchreid.reid":
                    raise
                layout = "torchreid"
            parts = {part: import_module(f"{layout}.{part}") for part in _PARTS}
            version = str(getattr(import_module("torchreid"), "__version__", "unknown"))
        except ImportError as error:
            raise _missing(error) from error
    return Host(layout=layout, version=version, **parts)


def _missing(error: ImportError) -> UserError:
    name = (error.name or "").split(".")[0]
    if name == "torchreid" and isinstance(error, ModuleNotFoundError):
        if error.name == "torchreid":
            return UserError(f"torchreid is not installed; run '{PIP_COMMAND}'.")
        return UserError(
            f"the installed 'torchreid' has no module '{error.name}' and is not the person re-identification library; "
            f"run '{PIP_COMMAND}'."
        )
    if isinstance(error, ModuleNotFoundError) and name:
        package = PACKAGES.get(name, name)
        return UserError(f"torchreid needs the package '{package}'; run 'pip install {package}'.")
    reason = " ".join(str(error).split())
    return UserError(f"torchreid could not be imported ({reason}); '{PIP_COMMAND}' installs what it needs.")


HOST = find_host()
"""The torchreid that this process uses."""
