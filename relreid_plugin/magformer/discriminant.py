"""A linear head in closed form: shrunk discriminant analysis of image features (Fisher 1936; WCCN, Hatch et al. 2006).

Shapes: N images, C identities, d width.

Features are whitened by their scatter within identities, and those directions count that tell identities apart: the first
so many of them, or all of them by their scatter between identities. With few images the scatter within is shrunk towards a
multiple of the identity, with few identities so is the scatter between, and the result can be mixed with the features as
they are, so that "change nothing" is one end of the range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..metrics.neighbours import normalise

PRIOR_IDENTITIES = 50
"""Identities that the prior of the scatter between identities, a multiple of the identity matrix, is worth."""


@dataclass(frozen=True)
class Projection:
    """An affine map of unit features, ``normalise((x - mean) @ weight)``.

    Attributes:
        mean: (d,).
        weight: (d, d), symmetric up to the directions that are dropped.
    """

    mean: Tensor
    weight: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, d) features of any length -> (N, d) unit features."""
        x = normalise(features)
        return normalise((x - self.mean.to(x)) @ self.weight.to(x))


class Discriminant:
    """Scatter of labelled features, from which projections of any strength are read.

    Args:
        features: (N, d), any length; at least one identity with two images and two identities.
        labels: (N,) identities.

    Raises:
        UserError: Shapes that do not fit, features that are not finite, or nothing to tell apart.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        if features.dim() != 2 or len(features) != len(labels):
            raise UserError(
                f"features of shape {tuple(features.shape)} do not fit {len(labels)} labels; pass (N, d) and (N,)."
            )
        x = normalise(features.detach().double())
        if not bool(torch.isfinite(x).all()):
            raise UserError("features to fit a head on hold NaN or infinity; check the model or the bank they come from.")
        own = torch.as_tensor(labels).unique(return_inverse=True)[1]
        count = torch.bincount(own)
        self.identities, self.width = len(count), x.shape[1]
        if self.identities < 2 or len(x) <= self.identities:
            raise UserError(
                f"{len(x)} features of {self.identities} identities do not fit a head; it takes two identities and one with "
                "two images."
            )
        self.mean = x.mean(dim=0)
        centers = x.new_zeros(self.identities, self.width).index_add_(0, own, x) / count.unsqueeze(1)
        self._between = centers - self.mean
        rest = x - centers[own]
        values, self._vectors = torch.linalg.eigh(rest.t() @ rest / (len(x) - self.identities))
        self._values = values.clamp_min(0)
        self._total = (x - self.mean).t() @ (x - self.mean) / len(x)
        self._whitened: dict[float, tuple[Tensor, Tensor]] = {}
        self._spread: dict[float, tuple[Tensor, Tensor]] = {}

    def _whitening(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """(d, d) whitening, and the directions (r, d) between identities after it, the strongest first."""
        if shrinkage not in self._whitened:
            scale = (self._values + shrinkage * self._values.mean().clamp_min(1e-12)).rsqrt()
            white = (self._vectors * scale) @ self._vectors.t()
            basis = torch.linalg.svd(self._between @ white, full_matrices=False)[2]
            self._whitened[shrinkage] = (white, basis)
        return self._whitened[shrinkage]

    def _scattered(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Scatter between identities after the whitening, with its prior: (d,) over its mean, and (d, d) directions."""
        if shrinkage not in self._spread:
            between = self._between @ self._whitening(shrinkage)[0]
            scatter = between.t() @ between / self.identities
            mean = (scatter.trace() / self.width).clamp_min(1e-12)
            share = PRIOR_IDENTITIES / (PRIOR_IDENTITIES + self.identities)
            scatter = (1 - share) * scatter / mean
            scatter.diagonal().add_(share)
            values, vectors = torch.linalg.eigh(scatter)
            self._spread[shrinkage] = (values.clamp_min(0), vectors)
        return self._spread[shrinkage]

    def projection(self, *, shrinkage: float = 2.0, dims: int = 0, soft: float = 0.0, keep: float = 0.0) -> Projection:
        """Return a projection.

        Args:
            shrinkage: Share of the mean scatter that is added to every direction, above 0; large values whiten less.
            dims: Directions that are kept, those between identities first; 0, or C - 1 and more: all d.
            soft: Directions count in the similarity by b / (b + soft), where b is their scatter between identities over its
                mean (with a prior worth :data:`PRIOR_IDENTITIES`); 0: all alike. With ``dims`` 0 only.
            keep: Share of the features as they are in the similarity, in [0, 1]; 1 only centres them.

        Raises:
            UserError: A value out of range.
        """
        if shrinkage <= 0 or dims < 0 or soft < 0 or not 0 <= keep <= 1:
            raise UserError(
                "a head takes shrinkage above 0, dims and soft of at least 0 and keep in [0, 1]; got "
                f"{shrinkage}, {dims}, {soft}, {keep}."
            )
        white, basis = self._whitening(shrinkage)
        weight = white
        if 0 < dims < self.identities - 1:
            chosen = basis[:dims]
            weight = white @ chosen.t() @ chosen
        elif soft > 0:
            values, vectors = self._scattered(shrinkage)
            weight = white @ (vectors * (values / (values + soft)).sqrt()) @ vectors.t()
        if keep > 0:
            moved = torch.einsum("ij,ik,kj->", weight, self._total, weight)
            mixed = (1 - keep) * weight @ weight.t() / moved.clamp_min(1e-12)
            mixed += keep * torch.eye(self.width, dtype=weight.dtype, device=weight.device) / self._total.trace()
            values, vectors = torch.linalg.eigh(mixed)
            weight = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
        return Projection(self.mean.float(), weight.float())


def discriminant_projection(
    features: Tensor, labels: Tensor, *, shrinkage: float = 2.0, dims: int = 0, soft: float = 0.0, keep: float = 0.0
) -> Projection:
    """Fit :class:`Discriminant` and return one of its projections; arguments as there."""
    return Discriminant(features, labels).projection(shrinkage=shrinkage, dims=dims, soft=soft, keep=keep)
