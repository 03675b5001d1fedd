"""``data.combineall`` for the plug-in's data sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class CombinesAll:
    """Mixed in before the host's ``ImageDataset``, whose own way fails for a query identity that the gallery lacks."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    train: list[tuple[Any, int, int, int]]
    num_train_pids: int

    def combine_all(self) -> None:
        """Add query and gallery to the training set: every sample once, also where query and gallery are the same samples.

        Their identities are labelled on from those of the training set, in the order of their numbers. As for image data
        sets, -1 stays out, and so does 0, the distractor of Market-1501, unless a query asks for it.
        """
        junk = {-1} if any(item[1] == 0 for item in self.query) else {0, -1}
        test = {item[0]: item for item in [*self.query, *self.gallery] if item[1] not in junk}
        pids = sorted({item[1] for item in test.values()})
        labels = {pid: label for label, pid in enumerate(pids, start=self.num_train_pids)}
        self.train = [*self.train, *((source, labels[pid], camid, dsetid) for source, pid, camid, dsetid in test.values())]
        self.num_train_pids, self.num_train_cams = self.get_num_pids(self.train), self.get_num_cams(self.train)
