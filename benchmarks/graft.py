"""One stacked forward pass of GraFT's triplets beside the nine separate ones of the released scheme: time, memory, equality.

Run ``python benchmarks/graft.py`` from the root of the repository (``--list`` names the rows; ``graft-paper`` is the paper's
size and takes minutes). The released scheme passes every role (anchor, positive, negative) and every modality through the
backbone on its own; it is written here from that description. PK batches mine their triplets among as many samples as there
are anchors; the images that pass through the backbone, and the triplets, are counted.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, largest
from harness import Gate, Line, Row, Settings, main
from torch import Tensor

from relreid_plugin.graft.ffd import GraFTLoss
from relreid_plugin.graft.model import GraFT

CLASSES = 50
IMAGES_PER_IDENTITY = 4
LIMIT = 1e-5


def separate_loss(model: GraFT, loss: GraFTLoss, images: Tensor, labels: Tensor) -> Tensor:
    """Loss of 3 B samples by one pass per role and modality."""
    count = len(labels) // 3
    assert model.token is not None and loss.center is not None
    roles = []
    for role in range(3):
        fused, data = [], []
        for index, encoder in enumerate(model.encoders):
            body: Any = model.backbones[0]
            tokens = body.forward_features(images[role * count : (role + 1) * count, index])
            output = encoder(torch.cat([model.token.expand(count, -1, -1), tokens], dim=1))
            fused.append(output[:, 0])
            data.append(output[:, 1 + model.token_index])
        roles.append((sum(fused) / len(fused), sum(data) / len(data)))
    (anchor, _), (positive, _), (_, negative) = roles
    near, far = (anchor - positive).square().sum(dim=1), (anchor - negative).square().sum(dim=1)
    triplet = F.softplus(near.clamp_min(1e-12).sqrt() - far.clamp_min(1e-12).sqrt()).mean()
    logits, _ = model.neck.logits(anchor)
    ce = F.cross_entropy(logits, labels[:count], label_smoothing=0.1)
    center = 0.5 * (anchor - loss.center.centers[labels[:count]]).square().sum(dim=1).mean()
    return 0.5 * triplet + 0.5 * ce + 0.0005 * center


class Problem:
    """A model, its losses and a batch.

    Args:
        backbone: A ViT of timm.
        size: Height and width.
        triplets: B.
        modalities: M.
        checkpointing: Recompute activations in the backward pass.
        options: Further arguments of the backbone.
    """

    def __init__(
        self,
        backbone: str,
        *,
        size: tuple[int, int],
        triplets: int,
        modalities: int = 3,
        checkpointing: bool = False,
        **options: Any,
    ) -> None:
        import timm  # here, because every row's process would take two seconds for it

        torch.manual_seed(0)
        self.model = GraFT(
            lambda channels: timm.create_model(backbone, num_classes=0, img_size=size, in_chans=channels, **options),
            CLASSES,
            modalities="RNTX"[:modalities],
            dropout=0.0,
            checkpointing=checkpointing,
        ).train()
        weights: dict[str, Any] = {"ce": 0.5, "triplet": 0.5, "center": 0.0005, "label_smoothing": 0.1}
        self.given = GraFTLoss(CLASSES, self.model.feature_dim, **weights)
        self.mined = GraFTLoss(CLASSES, self.model.feature_dim, mined=True, **weights)
        self.mined.load_state_dict(self.given.state_dict())
        self.triplets = triplets
        self.images = torch.randn(3 * triplets, modalities, 3, *size)
        self.labels = torch.arange(3 * triplets) % CLASSES
        self.labels[triplets : 2 * triplets] = self.labels[:triplets]
        self.pairs = torch.arange(triplets) // IMAGES_PER_IDENTITY

    def stacked(self) -> dict[str, Tensor]:
        """Loss and gradients of the triplets in one pass."""
        logits, fused, data = self.model(self.images, classified=self.triplets)
        return self._step(self.given.fused_loss(logits, fused, data, self.labels)[0])

    def separate(self) -> dict[str, Tensor]:
        """The same in separate passes."""
        return self._step(separate_loss(self.model, self.given, self.images, self.labels))

    def in_batch(self) -> dict[str, Tensor]:
        """A step on a PK batch."""
        logits, fused, data = self.model(self.images[: self.triplets])
        return self._step(self.mined.fused_loss(logits, fused, data, self.pairs)[0])

    def _step(self, value: Tensor) -> dict[str, Tensor]:
        value.backward()
        gradient = torch.cat([each.grad.flatten() for each in self.model.parameters() if each.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return {"loss": value.detach().reshape(1), "gradient": gradient}

    def passes_per_triplet(self) -> tuple[float, float]:
        """Images that pass through the backbone per triplet: of given triplets, of a PK batch."""
        passed = []
        body: Any = self.model.backbones[0]
        hook = body.patch_embed.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
        with torch.no_grad():
            self.model(self.images, classified=self.triplets)
            given = sum(passed) / self.triplets
            passed.clear()
            self.model(self.images[: self.triplets])
        hook.remove()
        same = self.pairs.unsqueeze(0) == self.pairs.unsqueeze(1)
        mined = int(((same.sum(dim=1) > 1) & (~same).any(dim=1)).sum())
        return given, sum(passed) / mined


def step(problem: Problem, title: str, settings: Settings) -> list[Line]:
    """One stacked pass beside separate ones, and a PK batch as a variant."""
    forms = {"ours": problem.stacked, "separate": problem.separate, "batch": problem.in_batch}
    timed = alternate(forms, settings.pick(settings.repeats + 2, settings.repeats))  # they are close to each other
    ours, separate, batch = timed["ours"], timed["separate"], timed["batch"]
    count = 3 * problem.images.shape[1]
    line = Line(title, f"{count} separate passes", separate.seconds, ours.seconds, separate.mib, ours.mib)
    line.difference = largest(ours.result["loss"], separate.result["loss"])
    gradient = largest(ours.result["gradient"], separate.result["gradient"])
    line.equal = max(line.difference, gradient) <= LIMIT
    given, mined = problem.passes_per_triplet()
    line.values = {"gradient": gradient, "passes": given / mined}
    line.notes = [
        f"difference: of the loss; of the gradient {gradient:.0e}; {given:g} image passes per given triplet, {mined:g} per "
        f"mined one: {given / mined:.1f}x fewer"
    ]
    other = Line(f"{title}, PK batch", line.reference, line.reference_s, batch.seconds, line.reference_mib, batch.mib)
    other.variant, other.values = True, {"passes": given / mined}
    return [line, other]


def small(settings: Settings) -> list[Line]:
    """A step that a laptop can do."""
    name, triplets = "deit_small_distilled_patch16_224", 8
    if settings.quick:
        problem = Problem(name, size=(32, 32), triplets=triplets, embed_dim=32, depth=1, num_heads=2)
    else:
        problem = Problem(name, size=(128, 128), triplets=triplets)
    return step(problem, f"GraFT step, M=3, {triplets} triplets", settings)


def paper(settings: Settings) -> list[Line]:
    """The paper's sizes."""
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2} if settings.quick else {}
    size = settings.pick((224, 224), (32, 32))
    problem = Problem("deit_base_distilled_patch16_224", size=size, triplets=26, checkpointing=True, **options)
    return step(problem, "GraFT step, M=3, 26 triplets, DeiT-B 224x224", settings)


GATES: dict[str, Any] = {
    "must": (Gate("ratio", 1.0, text="not slower"),),
    "aim": (Gate("passes", 2.5, text="2.5x fewer passes"),),
}
ROWS = [
    Row("graft-step", "GraFT step, M=3", "GraFT step, M=3, 8 triplets", small, needs=3000.0, **GATES),
    Row("graft-paper", "", "GraFT step, M=3, the paper's sizes", paper, needs=12000.0, when="named", **GATES),
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
