"""A run's log, its seeds, and the machine that its numbers belong to."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from ..collective import world
from ..errors import UserError
from ..files import writing
from ..host import HOST


class _Tee:
    """Standard output that is also written to a file; what cannot be written there is said."""

    def __init__(self, console: TextIO, file: TextIO, path: Path) -> None:
        self.console, self.file, self.path = console, file, path

    def write(self, text: str) -> int:
        with writing(self.path):
            self.file.write(text)
        return self.console.write(text)

    def flush(self) -> None:
        with writing(self.path):
            self.file.flush()
        self.console.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Append everything printed in the block to ``path``; also where a defect of the program is, for a report.

    Raises:
        WriteError: The file cannot be written, from any ``print`` in the block.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    console = sys.stdout
    sys.stdout = _Tee(console, file, path)  # type: ignore[assignment]
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            with contextlib.suppress(OSError):
                file.write(traceback.format_exc())
        raise
    finally:
        sys.stdout = console
        with contextlib.suppress(OSError):  # what could not be written was said when it was printed
            file.close()


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the host draws from the global generator)
    torch.manual_seed(seed)


def environment() -> dict[str, Any]:
    """Return the versions and the machine that a run's numbers belong to."""
    from importlib import metadata

    versions = {}
    for name in ("torch", "torchvision", "torchreid", "timm", "faiss-cpu", "numpy", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "host_layout": HOST.layout,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": world(),
        "command": sys.argv,
    }


__all__ = ["environment", "logged", "set_seed"]
