"""Which images of a gallery may be found: by camera, time and label, whatever holds the gallery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data.labels import as_label, stored_number


@dataclass(frozen=True)
class Filter:
    """Conditions that an image must meet, all of them.

    Attributes:
        cameras: Only images of these cameras, as they are written; none: of all.
        labels: Only images of these identities; none: of all.
        since, until: Only images taken between, in seconds since 1970; None: at any time. An image whose time is unknown
            meets neither.
    """

    cameras: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None

    def __bool__(self) -> bool:
        return bool(self.cameras or self.labels or self.since is not None or self.until is not None)

    @property
    def numbers(self) -> dict[str, list[int]]:
        """The numbers that stand for the cameras (``camid``) and the labels (``pid``), where any are asked for."""
        wanted = {"camid": self.cameras, "pid": self.labels}
        return {name: [stored_number(as_label(one)) for one in each] for name, each in wanted.items() if each}

    def mask(self, pids: np.ndarray, camids: np.ndarray, times: Callable[[], np.ndarray]) -> np.ndarray:
        """Return (N,) bool, the images that meet the conditions.

        Args:
            pids: (N,) identities.
            camids: (N,) cameras.
            times: Returns (N,) seconds since 1970, NaN where unknown; called where times are asked for.
        """
        chosen = np.ones(len(pids), bool)
        for name, numbers in self.numbers.items():
            chosen &= np.isin({"camid": camids, "pid": pids}[name], numbers)
        if self.since is not None:
            chosen &= times() >= self.since
        if self.until is not None:
            chosen &= times() <= self.until
        return chosen

    def expression(self) -> str:
        """Return the conditions as Milvus writes them; empty where there is none."""
        parts = [f"{name} in {numbers}" for name, numbers in self.numbers.items()]
        parts += [f"time >= {self.since!r}"] if self.since is not None else []
        parts += [f"time <= {self.until!r}"] if self.until is not None else []
        return " and ".join(parts)


__all__ = ["Filter"]
