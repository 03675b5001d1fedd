"""Which row of a camera embedding stands for which camera.

An embedding has one row for every camera of the training set, whatever the cameras' numbers are. A checkpoint holds the list
of them, by data set and by what is written there, so that a test set's cameras find their rows however they are numbered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .labels import plain

Camera = tuple[int, str, str]
"""A training camera: its number in the training set, its data set, and what is written for it there."""


class CameraRows:
    """Rows of an embedding for the camera numbers of some images.

    Args:
        rows: Number to row; every other number is a camera that training never saw.
    """

    def __init__(self, rows: Mapping[int, int]) -> None:
        ordered = sorted(rows.items())
        self._numbers = torch.tensor([number for number, _ in ordered], dtype=torch.int64)
        self._rows = torch.tensor([row for _, row in ordered], dtype=torch.int64)
        same = bool(ordered) and all(number == row for number, row in ordered)
        self.description = "True" if same else f"True {ordered}" if ordered else "False"

    def __call__(self, numbers: Tensor) -> Tensor:
        """(B,) camera numbers -> (B,) rows on the CPU, -1 for cameras that training never saw."""
        numbers = numbers.cpu().long()
        if not len(self._numbers):
            return torch.full_like(numbers, -1)
        place = torch.searchsorted(self._numbers, numbers).clamp(max=len(self._numbers) - 1)
        return torch.where(self._numbers[place] == numbers, self._rows[place], -1)


class NumberedRows(CameraRows):
    """Rows that are the camera numbers themselves, as in checkpoints that hold no list of cameras."""

    def __init__(self) -> None:
        super().__init__({})
        self.description = "True"

    def __call__(self, numbers: Tensor) -> Tensor:
        return numbers.cpu().long()


UNKNOWN = CameraRows({})
"""No camera is one of the training set's."""


@dataclass(frozen=True)
class CameraTable:
    """The rows of a camera embedding.

    Attributes:
        cameras: The training camera of every row, or None: rows are numbers, as older checkpoints have it.
        size: Rows; 0 without camera labels.
        sources: Data sets of the training set.
    """

    cameras: tuple[Camera, ...] | None
    size: int
    sources: tuple[str, ...]

    @classmethod
    def of(cls, cameras: Iterable[Sequence[object]], sources: Sequence[str]) -> CameraTable:
        """Return the table of training cameras, one row each in the order of their numbers."""
        ordered = sorted((int(str(number)), str(source), str(name)) for number, source, name in cameras)
        return cls(tuple(ordered), len(ordered), tuple(sources))

    @property
    def largest(self) -> int:
        """Largest number of a training camera, -1 without any."""
        return max((camera[0] for camera in self.cameras or ()), default=-1)

    def training_rows(self) -> CameraRows:
        """Rows for the camera numbers of the training set."""
        if self.cameras is None:
            return NumberedRows()
        return CameraRows({number: row for row, (number, _, _) in enumerate(self.cameras)})

    def test_rows(self, name: str, written: Mapping[int, str]) -> CameraRows:
        """Rows for the camera numbers of a test set.

        Args:
            name: The test set; its cameras are known where it is one of the training sets.
            written: What is written there for every camera number.
        """
        if self.cameras is None:
            return NumberedRows() if self.sources == (name,) else UNKNOWN
        rows = {text: row for row, (_, source, text) in enumerate(self.cameras) if source == name}
        return CameraRows({number: rows[text] for number, text in written.items() if text in rows})

    def named_rows(self, names: Iterable[str]) -> dict[str, int]:
        """Return the row of every camera as written, -1 for those that training never saw.

        Raises:
            UserError: Several training sets have a camera of that name.
        """
        rows: dict[str, int] = {}
        for name in names:
            if self.cameras is None:
                found = [int(plain(name))] if plain(name).isdigit() and len(plain(name)) < 10 else []
            else:
                found = [row for row, camera in enumerate(self.cameras) if camera[2] == plain(name)]
            if len(found) > 1:
                owners = ", ".join(f"'{source}'" for _, source, text in self.cameras or () if text == plain(name))
                raise UserError(
                    f"camera '{name}' is one of several training sets ({owners}), so images cannot be told to be of one of "
                    "them by it; leave the cameras unknown."
                )
            rows[name] = found[0] if found else -1
        return rows
