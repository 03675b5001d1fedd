"""How every command runs: its work in one frame that turns mistakes, limits and signals into one line and an exit code.

Nothing here imports torch: ``--help`` and a mistake on the command line are answered at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from ..errors import UserError, explain
from ..files import write_error
from ..processes import ending_signals, received, watch_parent


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def run_command(function: Any, *, go_on: str = "the same command") -> int:
    """Call ``function`` and return the exit code.

    A user's mistake, a file that cannot be written and a limit of the machine become one line on standard error and exit
    code 2. SIGINT, SIGTERM and SIGHUP end it alike, with one line and 128 + the signal's number: 130, 143, 129. Any other
    error is a defect of the program: one line too, exit code 1. ``RELREID_TRACEBACK=1`` shows where it comes from; a run's
    log holds that in any case.

    Args:
        function: The work.
        go_on: With what an interrupted command goes on.
    """
    open_streams()
    with ending_signals():
        watch_parent()
        try:
            function()
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has gone
            drop_output()
            return 141
        except KeyboardInterrupt as error:
            signum = getattr(error, "signum", None) or received() or 2
        except Exception as error:
            signum = received() or 0  # libraries turn the interruption into errors of their own
            sentence = "" if signum else _sentence(error)
            if not signum:
                if os.environ.get("RELREID_TRACEBACK", "") not in ("", "0") and not isinstance(error, UserError):
                    import traceback

                    traceback.print_exc()
                if not sentence:
                    said = f"{type(error).__name__}: {_one_line(error)[:300]}".removesuffix(": ")
                    _say(
                        f"error: internal error ({said}); please report it with the traceback, which the same command with "
                        "RELREID_TRACEBACK=1 shows."
                    )
                    return 1
                _say(f"error: {sentence}")
                return 2
        else:
            return 0
        _say(f"interrupted; go on with {go_on}")
        return 128 + signum


def open_streams() -> None:
    """Make the standard streams fit for every sentence.

    Closed ones (``>&-``) lead nowhere, so that no file is opened under their numbers and written into by what prints. Names
    of files may hold bytes of no text, and a terminal may know few signs: both are printed as escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _sentence(error: Exception) -> str:
    """One line for a mistake of the user's, a full disk and the like; empty for anything else."""
    if isinstance(error, UserError):
        host = sys.modules.get("relreid_plugin.host.patches")  # without it there are no loader processes to have failed
        return _one_line(error if host is None else UserError(host.clean_worker_error(error)))
    sentence = explain(error)
    if sentence:
        return sentence
    found = write_error(error, done="read or written")
    return "" if found is None else _one_line(found)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        drop_output()


def drop_output() -> None:
    """Keep Python from complaining at its end that standard output cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
