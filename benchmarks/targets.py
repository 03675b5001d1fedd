"""Every speed and memory target beside its reference, in one run and one table.

Run ``python benchmarks/targets.py`` from the root of the repository. ``--list`` names the rows, ``--rows NAME …`` chooses
some, ``--quick`` tries them at small sizes, ``--million`` adds the neighbour lists of a million images (``--threads 4``: its
aim is given for four cores), ``--json FILE`` writes every number. Ours and the reference take turns; a row runs in a process
of its own. The exit code is 1 when a result is not equal to its reference's or a must is missed.

Columns: ``must`` and ``aim`` are bounds on the ratio unless they say otherwise, ``memory must`` one on our peak memory;
``reached`` says ``aim``, ``must``, ``NO``, ``?`` (the reference could not run, so that the must cannot be judged) or ``-``
(a variant, or a try-out: equality only).
"""

from __future__ import annotations

import sys

import graft
import images
import information
import neighbours
import online
import ranking
import relation
import startup
import training
from harness import main

ROWS = [
    *relation.ROWS,
    *neighbours.ROWS,
    *ranking.ROWS,
    *information.ROWS,
    *graft.ROWS,
    *images.ROWS,
    *training.ROWS,
    *online.ROWS,
    *startup.ROWS,
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
