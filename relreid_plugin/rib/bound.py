"""The information bottleneck bound over a training run: centroids and Q of the previous epoch, streamed over this one.

Shape letters: B batch, d feature width, x width of the input descriptor, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..metrics.neighbours import normalise
from .information import entropy, ib_bound_terms, mutual_information, soft_assignment


class InformationBottleneckBound(nn.Module):
    """IBB of features F and inputs X given identities Y (RIB; METHODS 2), at a cost of O(B C) per batch in the loss.

    IBB = mean_i [ sum_b phi(X_i, b) log phi(X_i, b) - sum_a phi(F_i, a) log Q(a | y_i) ]

    bounds I(F;X) - I(F;Y) from above, up to the entropy H(b) of the input clusters, which does not depend on the network.
    Centroids and Q are those of the previous epoch. During an epoch the sums for the next ones are collected from the same
    batches, so there is no second pass over the data. The first epoch yields centroids, the second one Q; from the third on
    the bound is there. An identity that an epoch misses keeps its centroid and its row of Q; one that was never seen has no
    cluster. Everything is computed in float32 (sums in float64; all of it for features in float64), whatever autocast says,
    and lives in buffers, so a checkpoint holds it. Memory is that of Q and of the joint distribution for the estimate:
    O(C^2), not O(B C^2).

    Args:
        num_classes: C.
        feature_dim: d.
        input_dim: x; see :func:`relreid_plugin.rib.information.input_descriptor`.
        beta: Sharpness of the assignments.
        epsilon: Floor of Q before the logarithm.
        estimate: Also collect what the plug-in estimate of I(F;X) - I(F;Y) needs: one B x C by B x C product per batch.
    """

    centroids_f: Tensor
    centroids_x: Tensor
    seen: Tensor
    log_q: Tensor
    epochs: Tensor
    sum_f: Tensor
    sum_x: Tensor
    sum_phi: Tensor
    count: Tensor
    sum_joint: Tensor
    sum_input: Tensor
    sum_terms: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        input_dim: int = 384,
        beta: float = 1.0,
        epsilon: float = 1e-8,
        estimate: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.beta, self.epsilon, self.estimate = num_classes, beta, epsilon, estimate
        double = torch.float64
        self.register_buffer("centroids_f", torch.zeros(num_classes, feature_dim))
        self.register_buffer("centroids_x", torch.zeros(num_classes, input_dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("log_q", torch.full((num_classes, num_classes), -math.log(num_classes)))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.long))
        self.register_buffer("sum_f", torch.zeros(num_classes, feature_dim, dtype=double))
        self.register_buffer("sum_x", torch.zeros(num_classes, input_dim, dtype=double))
        self.register_buffer("sum_phi", torch.zeros(num_classes, num_classes, dtype=double))
        self.register_buffer("count", torch.zeros(num_classes, dtype=double))
        size = num_classes if estimate else 0
        self.register_buffer("sum_joint", torch.zeros(size, size, dtype=double))
        self.register_buffer("sum_input", torch.zeros(num_classes, dtype=double))
        self.register_buffer("sum_terms", torch.zeros(2, dtype=double))
        self._epochs = 0  # of `epochs`, without asking the device

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._epochs = int(self.epochs)

    @property
    def ready(self) -> bool:
        """Whether there are centroids and Q, and so a bound."""
        return self._epochs >= 2

    def forward(self, features: Tensor, labels: Tensor, inputs: Tensor) -> Tensor | None:
        """Return IBB of a batch and, in training mode, collect its share of the next epoch's centroids and Q.

        Args:
            features: (B, d); the gradient flows through their assignment in the second term only.
            labels: (B,) in [0, C).
            inputs: (B, x) descriptors of the input images.

        Returns:
            Scalar float32 (float64 for features in float64), or ``None`` in the first two epochs.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            inputs = inputs.detach().to(features.dtype)
            if self._epochs == 0:
                if self.training:
                    self._collect(features, labels, inputs)
                return None
            log_f = soft_assignment(features, self.centroids_f, beta=self.beta, seen=self.seen)
            with torch.no_grad():
                log_x = soft_assignment(inputs, self.centroids_x, beta=self.beta, seen=self.seen)
            first, second = ib_bound_terms(log_f, log_x, self.log_q[labels])
            if self.training:
                self._collect(features, labels, inputs, log_f, log_x, first, second)
            return first.mean() + second.mean() if self.ready else None

    @torch.no_grad()
    def _collect(self, features: Tensor, labels: Tensor, inputs: Tensor, *measured: Tensor) -> None:
        self.sum_f.index_add_(0, labels, normalise(features).double())
        self.sum_x.index_add_(0, labels, normalise(inputs).double())
        self.count.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        if not measured:
            return
        log_f, log_x, first, second = measured
        phi_f, phi_x = log_f.exp(), log_x.exp()
        self.sum_phi.index_add_(0, labels, phi_f.double())
        self.sum_input += phi_x.double().sum(dim=0)
        self.sum_terms += torch.stack([first.double().sum(), second.double().sum()])
        if self.estimate:
            self.sum_joint += phi_f.t() @ phi_x

    @torch.no_grad()
    def end_epoch(self) -> dict[str, float] | None:
        """Put this epoch's centroids and Q in place for the next one.

        Under ``torch.distributed`` the sums of all processes are added first. Whether each of them collected its own part of
        the batches, or all of them the whole ones, only ratios of the sums are read.

        Returns:
            ``ibb``; ``input_entropy`` H(b); ``ib_bound`` = ibb + H(b); with ``estimate`` also ``i_fx``, ``i_fy``,
            ``ib_estimate`` = i_fx - i_fy and ``ib_holds`` (1 or 0); all over this epoch's samples, under the assignments
            that the bound used. ``None`` while there is no bound, and when the epoch had no sample.
        """
        sums = [self.sum_f, self.sum_x, self.sum_phi, self.count, self.sum_joint, self.sum_input, self.sum_terms]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for value in sums:
                torch.distributed.all_reduce(value)
        found = self._diagnostics() if self.ready and bool(self.count.sum() > 0) else None
        present = self.count > 0
        if bool(present.any()):
            size, kind = self.count[present].unsqueeze(1), self.log_q.dtype
            self.centroids_f[present] = (self.sum_f[present] / size).to(kind)
            self.centroids_x[present] = (self.sum_x[present] / size).to(kind)
            if self._epochs > 0:
                self.log_q[present] = (self.sum_phi[present] / size).clamp_min(self.epsilon).log().to(kind)
            self.seen |= present
            self.epochs += 1
            self._epochs += 1
        for value in sums:
            value.zero_()
        return found

    def _diagnostics(self) -> dict[str, float]:
        total = self.count.sum()
        ibb = float(self.sum_terms.sum() / total)
        input_entropy = float(entropy(self.sum_input / total))
        found = {"ibb": ibb, "input_entropy": input_entropy, "ib_bound": ibb + input_entropy}
        if self.estimate:
            i_fx = float(mutual_information(self.sum_joint / total))
            i_fy = float(mutual_information(self.sum_phi / total))
            # rows of Q that the floor lifts may sum to more than 1, by no more than C epsilon
            slack = 1e-6 + self.num_classes * self.epsilon
            holds = float(found["ib_bound"] >= i_fx - i_fy - slack)
            found.update(i_fx=i_fx, i_fy=i_fy, ib_estimate=i_fx - i_fy, ib_holds=holds)
        return found
