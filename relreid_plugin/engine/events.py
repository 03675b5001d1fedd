"""TensorBoard events: what their background thread could not write is said in a sentence that names the folder."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from ..errors import needed
from ..files import writing


class EventWriter:
    """torch's writer of scalars; what its thread could not write is raised by the next call as a sentence.

    Args:
        folder: Where the events go.
        purge_step: Events of this step and later ones, of a run that was killed, are hidden.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        self._folder = folder
        writer = needed("torch.utils.tensorboard", "the record of a training").SummaryWriter
        _hush()
        with writing(folder):
            self._writer: Any = writer(log_dir=str(folder), purge_step=purge_step)

    def add_scalar(self, *args: Any, **options: Any) -> None:
        """See torch."""
        with writing(self._folder):
            self._writer.add_scalar(*args, **options)

    def close(self) -> None:
        """Write what is left.

        Raises:
            WriteError: It cannot be written.
        """
        writers: dict[str, Any] = self._writer.all_writers or {}
        with writing(self._folder):
            for writer in writers.values():
                writer.flush()  # closing alone hides what the thread could not write
            self._writer.close()

    def abandon(self) -> None:
        """Write what can be written, after an error."""
        with contextlib.suppress(Exception):
            self.close()


class NoEvents:
    """The writer of a process that does not write."""

    def add_scalar(self, *args: Any, **options: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    abandon = flush = close


def _hush() -> None:
    """An exception of the writer's thread is raised in the main one; it is not printed by the thread as well."""
    hook = threading.excepthook
    if getattr(hook, "_hushed", False):
        return

    def quiet(found: Any) -> None:
        if type(found.thread).__name__ != "_AsyncWriterThread":
            hook(found)

    quiet._hushed = True  # type: ignore[attr-defined]
    threading.excepthook = quiet
