"""The configurations of the package: the folder ``configs/`` of a clone, ``relreid_plugin/configs`` in a wheel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Packaged:
    """A packaged configuration.

    Attributes:
        name: Its name without ``.yml``.
        path: The file.
        summary: The first sentence of the comment that it begins with.
    """

    name: str
    path: Path
    summary: str


def packaged_folder() -> Path:
    """Return the folder of the packaged configurations."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def packaged_configs() -> list[Packaged]:
    """Return the packaged configurations, sorted by name."""
    return [Packaged(path.stem, path, _summary(path)) for path in sorted(packaged_folder().glob("*.yml"))]


def _summary(path: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += line.lstrip("#").split()
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(words), maxsplit=1)[0]


def find_config(path: str | Path) -> Path:
    """Return the file that ``--config-file`` means.

    A file at the path goes first. A bare name, with or without ``.yml``, is then looked for among the packaged
    configurations, and so is ``configs/NAME.yml``, which is how they lie in a clone.

    Args:
        path: A path, or the name of a packaged configuration.

    Returns:
        The file; the path as it is where nothing is found.
    """
    path = Path(path)
    if path.parent in (Path("."), Path("configs")) and path.name and not _exists(path):
        for name in (path.name, f"{path.name}.yml"):
            packaged = packaged_folder() / name
            if name.endswith(".yml") and packaged.is_file():
                return packaged
    return path


def _exists(path: Path) -> bool:
    try:
        return path.is_symlink() or path.exists()
    except (OSError, ValueError):
        return True


def near_config(path: Path) -> str:
    """Return the end of "… does not exist": the nearest file beside it, or the nearest packaged configuration."""
    names: list[str] = []
    try:
        names = [file.name for file in path.parent.glob("*.y*ml")]
    except (OSError, ValueError):
        pass
    if path.parent in (Path("."), Path("configs")):
        names += [file.name for file in packaged_folder().glob("*.yml")]
    return did_you_mean(path.name, names) if names else ""
