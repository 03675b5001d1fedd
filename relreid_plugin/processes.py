"""How commands and their children end: by a signal as cleanly as by themselves, and never without one another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

PARENT = "RELREID_PARENT"
"""Environment variable by which a child of a grid knows its parent."""
_AGAIN = 1.0  # seconds after which another signal means: at once
_GRACE = 30.0  # seconds that a child whose parent has gone takes at most to end
_TURN = 0.1  # seconds between looks at children

_NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        signum: Its number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _State:
    """What the handlers know: who installed them, and the first signal that came."""

    def __init__(self) -> None:
        self.owner = 0
        self.received: int | None = None
        self.since = 0.0


_state = _State()


def _handle(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.owner:  # a forked process: its parent tells it when to end, or ends it
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    now = time.monotonic()
    if _state.received is None:
        _state.received, _state.since = signum, now
        raise Interrupted(signum)
    if now - _state.since > _AGAIN:  # some senders signal twice; who signals again does not want to wait
        os._exit(128 + signum)


@contextmanager
def ending_signals() -> Iterator[None]:
    """In the block SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`, once; another one a second later ends at once.

    SIGHUP stays ignored where it was (``nohup``). Elsewhere than in the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    _state.owner, _state.received = os.getpid(), None
    for name in _NAMES:
        number = getattr(signal, name)
        if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _state.received = None


def received() -> int | None:
    """Return the signal that asked this process to end, ``None`` so far."""
    return _state.received if os.getpid() == _state.owner else None


def raise_pending() -> None:
    """Raise :class:`Interrupted` anew where a library has swallowed it (bare ``except``, callbacks out of C code)."""
    signum = received()
    if signum is not None:
        raise Interrupted(signum)


def watch_parent() -> None:
    """End this process like by SIGTERM when the grid that started it has gone, however that happened."""
    parent = os.environ.pop(PARENT, "")
    if not parent.isdecimal():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(5 * _TURN)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def end_with(parent: int) -> None:
    """Let a forked helper process leave ends to its parent, and end when the parent has gone.

    Args:
        parent: The process that forked it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(5 * _TURN)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


# --- children ---------------------------------------------------------------------------------------------------------
class _Child:
    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self.number = number
        self.errors = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                env={**environment, PARENT: str(os.getpid())},
                start_new_session=True,  # the terminal's Ctrl-C comes to the parent, which hands it on
            )
        except BaseException:
            self.errors.close()
            raise

    def end(self) -> None:
        """Ask the child and its own children to end."""
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                self.process.terminate()
            else:
                os.killpg(self.process.pid, signal.SIGTERM)

    def message(self) -> str:
        """What it wrote to standard error."""
        self.errors.seek(0)
        text = self.errors.read().decode("utf-8", "replace")
        self.errors.close()
        return text


def usable_cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def run_all(
    commands: Sequence[Sequence[str]],
    *,
    jobs: int,
    environment: dict[str, str],
    done: Callable[[int, int, str], None],
) -> None:
    """Run commands, some at a time; whatever ends this call ends those that still run.

    Args:
        commands: The commands; what they print is dropped.
        jobs: Commands at a time.
        environment: Their environment.
        done: Called with (number, exit code, standard error) when one has ended. When it raises, no further command is
            started, those that run are waited for, and then the first exception is raised.

    Raises:
        Interrupted: A signal came; all children have ended.
    """
    waiting, running = deque(enumerate(commands)), list[_Child]()
    failure: Exception | None = None
    try:
        while running or (waiting and failure is None):
            while waiting and failure is None and len(running) < max(1, jobs):
                running.append(_Child(*waiting.popleft(), environment))
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                try:
                    done(child.number, child.process.returncode, child.message())
                except Exception as error:
                    failure = failure or error
            raise_pending()
            time.sleep(_TURN if running else 0)
    except BaseException:
        for child in running:
            child.end()
        for child in running:
            child.process.wait()
            child.errors.close()
        raise
    if failure is not None:
        raise failure
