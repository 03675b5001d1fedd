"""The one exception type that stands for a mistake of the user's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A wrong key, value, file or data set.

    The message is one sentence that names the file, key or value and the way out. Command-line tools print it on
    standard error and leave with exit code 2; no traceback is shown.
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice nearest to ``name``, or a list of all choices when none is near.

    Args:
        name: What the user wrote.
        choices: The valid spellings.
    """
    valid = sorted(str(choice) for choice in choices)
    lower = {choice.lower(): choice for choice in valid}
    near = difflib.get_close_matches(str(name).lower(), list(lower), n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{lower[near[0]]}'?"
    shown = ", ".join(valid[:40]) + (", …" if len(valid) > 40 else "")
    return f"; valid ones: {shown}"
