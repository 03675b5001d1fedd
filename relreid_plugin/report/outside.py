"""Results of other programs beside runs: logs of torchreid and fast-reid, and rankings as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.evaluator import Row
from ..errors import UserError
from ..features.files import form_of
from ..reading import is_regular
from .logs import read_log
from .rankings import read_ranking, score_ranking
from .scored import Scored, Subject, Target

_NAMED = "="


@dataclass(frozen=True)
class Outside:
    """A file of another program.

    Attributes:
        place: The file.
        target: Test set that its only result is said to be of; empty: as the file has it.
    """

    place: Path
    target: str = ""

    def subject(self, runs: Sequence[Subject]) -> Subject:
        """Return what it says as a column beside runs, whose names of the test sets it takes.

        Raises:
            UserError: The file is not understood, or its test set is none of the runs'.
        """
        if self.place.suffix.lower() == ".json":
            return self._ranking(runs)
        rows = read_log(self.place)
        if self.target and len(rows) > 1:
            listed = ", ".join(row["target"] for row in rows)
            raise UserError(
                f"'{self.place}' has results of several test sets ({listed}); leave out '{self.target}{_NAMED}'."
            )
        rows = [{**row, "target": self._target(row["target"], runs)} for row in rows]
        why = "a log has no scores by query"
        targets = {row["target"]: Target(row["target"], why=why) for row in rows}
        return Subject(self.place.name, self.place, None, rows, targets, foreign=True)

    def _target(self, written: str, runs: Sequence[Subject]) -> str:
        """The runs' name of a test set; upper and lower case and signs do not matter."""
        wanted = self.target or written
        names = list(dict.fromkeys(name for run in runs for name in run.targets))
        same = [name for name in names if _plain(name) == _plain(wanted)]
        if same or not names:
            return same[0] if same else wanted
        raise UserError(
            f"'{self.place}' has results of '{wanted}', and the runs are tested on {', '.join(names)}; if that is another "
            f"name of the same test set, write '{names[0]}{_NAMED}{self.place}'."
        )

    def _ranking(self, runs: Sequence[Subject]) -> Subject:
        found = read_ranking(self.place)
        name = self._target(found["target"], runs)
        evaluator = next((run.targets[name].evaluator for run in runs if name in run.targets), None)
        if evaluator is None:
            why = next((run.targets[name].why for run in runs if name in run.targets), "")
            raise UserError(
                f"'{self.place}' is scored by the labels of a run on '{found['target']}', or of features of it; name one "
                f"beside it that has them{f' ({why})' if why else '.'}"
            )
        result = score_ranking(found, evaluator, path=self.place)
        metric = evaluator.scorer.metric()
        row = Row(
            target=name,
            protocol=found["protocol"],
            method=found["method"],
            mAP=float(result.mAP),
            mINP=float(result.mINP),
            cmc={str(rank): float(result.rank(rank)) for rank in evaluator.options.ranks},
            parameters=0,
            seconds=0.0,
            queries=int(result.num_valid_queries),
            metric="as ranked",
        )
        nothing = torch.empty(0)
        target = Target(name, evaluator, [Scored(row, result, nothing, nothing, metric)])
        return Subject(self.place.name, self.place, None, [asdict(row)], {name: target}, foreign=True)


def _plain(name: str) -> str:
    return "".join(sign for sign in name.casefold() if sign.isalnum())


def outside(place: str) -> Outside | None:
    """Return a place as a file of another program, with ``TEST_SET=FILE`` its test set; ``None``: a run or features."""
    path: Any = Path(place)
    target, _, rest = place.partition(_NAMED)
    if rest and not path.exists():
        path = Path(rest)
    else:
        target = ""
    return Outside(path, target) if is_regular(path) and not form_of(path) else None


__all__ = ["Outside", "outside"]
