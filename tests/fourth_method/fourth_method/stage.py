"""A stage that learns to whiten the network's features, from one augmented extraction per epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.evaluator import Evaluator, Row
from relreid_plugin.engine.stages import Stage


class WhiteningStage(Stage):
    """Whitening by the covariance of the training features."""

    kind = "whitening"
    state: dict[str, Any] | None = None

    def train(self, run: Any) -> None:
        """Add one augmented extraction per epoch to the moments; every epoch is a checkpoint."""
        epochs, records = run.cfg.fourth.epochs, run.datamanager.train_loader.dataset.train
        state = self.newest(run) if run.resume else None
        done = state["epoch"] if state else 0
        if state:
            print(f"resuming stage {self.number} after epoch {done}")
        count, total, square, history = state["moments"] if state else (0, 0.0, 0.0, [])
        for epoch in range(done, epochs):
            features = run.features.bank("whitening", records, augment=epoch).features.double()
            count, total = count + len(features), total + features.sum(dim=0)
            square = square + features.T @ features
            mean = total / count
            spread = square / count - torch.outer(mean, mean)
            history = [*history, {"epoch": epoch + 1, "lr": 0.0, "loss": float(spread.diagonal().mean())}]
            shrunk = spread + run.cfg.fourth.shrinkage * spread.diagonal().mean() * torch.eye(len(spread))
            values, vectors = torch.linalg.eigh(shrunk)
            weights = {"mean": mean.float(), "matrix": (vectors / values.sqrt()).float()}
            ckpt.save(
                self.folder(run) / "last.pth.tar",
                {
                    **run.static(),
                    "kind": self.kind,
                    "state_dict": weights,
                    "epoch": epoch + 1,
                    "max_epoch": epochs,
                    "history": history,
                    "moments": (count, total, square, history),
                },
            )

    def load(self, run: Any) -> None:
        """Take the last whitening."""
        self.state = ckpt.load(self.folder(run) / "last.pth.tar", kind=self.kind)
        self.note_tested(run, self.state, self.state)

    def rows(self, run: Any, evaluator: Evaluator) -> list[Row]:
        """Whitened features by cosine."""
        weights = self.state["state_dict"]

        def whiten(features: Tensor) -> Tensor:
            return (features - weights["mean"]) @ weights["matrix"]

        data, size = evaluator.data, sum(value.numel() for value in weights.values())
        return [
            evaluator.row(whiten(data.query.features), whiten(data.gallery.features), name="+ whitening", parameters=size)
        ]
