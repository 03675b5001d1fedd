"""How test sets of given features are named."""

from __future__ import annotations

from typing import Any

PAIR = "+"
"""Between queries and gallery of a test set in two files."""


def pair_targets(cfg: Any) -> None:
    """Let two files of ``data.targets`` be one test set, queries and gallery, with ``data.type features``.

    They are each a test set where a rule to divide them is named (``data.split_rule``). Calling it again changes nothing.
    """
    data = cfg.data
    targets = list(data.targets)
    if data.type == "features" and not data.split_rule and len(targets) == 2 and not any(PAIR in name for name in targets):
        data.targets = [PAIR.join(targets)]
