"""Sampling of triplets: every image is an anchor, with several positives per epoch (GraFT, section 5.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import UserError


class TripletSampler(Sampler[int]):
    """Yield indices such that every run of 3 B of them is B anchors, their B positives and their B negatives.

    In an epoch every image whose identity has another one is an anchor ``positives`` times, with different positives as
    far as there are, less a rest of triplets that does not fill a batch. A negative is drawn from all images of other
    identities. Draws come from torch's global generator.

    Args:
        labels: Identity of every image.
        triplets: B, triplets per batch; fewer where an epoch has fewer.
        positives: Positives per anchor.

    Raises:
        UserError: No identity has two images, or there is only one identity.
    """

    def __init__(self, labels: Sequence[int], *, triplets: int, positives: int = 8) -> None:
        values = torch.as_tensor(list(labels))
        self.order = torch.argsort(values, stable=True)  # images by identity
        _, inverse, counts = torch.unique(values[self.order], return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        self.start, self.count = starts[inverse], counts[inverse]  # of the identity of every image in that order
        self.anchors = torch.nonzero(self.count > 1).squeeze(1)
        if not len(self.anchors) or len(counts) < 2:
            raise UserError("triplets need two identities, and one of them with two images; the training data has none.")
        self.positives = positives
        self.triplets = min(triplets, len(self.anchors) * positives)

    def __len__(self) -> int:
        return len(self.anchors) * self.positives // self.triplets * self.triplets * 3

    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        size = len(self.anchors)
        # the slots of an anchor are turns around its identity's other images, from a place of its own
        turn = torch.randint(2**31, (size, 1)) + torch.arange(self.positives)
        anchor = self.anchors.unsqueeze(1).expand(-1, self.positives)
        start, count = self.start[anchor], self.count[anchor]
        positive = start + (anchor - start + 1 + turn % (count - 1)) % count
        other = (torch.rand(size, self.positives, dtype=torch.float64) * (len(self.order) - count)).long()
        negative = torch.where(other < start, other, other + count)
        shuffled = torch.randperm(size * self.positives)
        first, second, third = (self.order[part.reshape(-1)[shuffled]] for part in (anchor, positive, negative))
        return first, second, third

    def __iter__(self) -> Iterator[int]:
        roles = torch.stack(self._draw())  # (3, triplets of the epoch)
        whole = roles.shape[1] // self.triplets * self.triplets
        batches = roles[:, :whole].view(3, -1, self.triplets).transpose(0, 1)
        yield from batches.reshape(-1).tolist()
