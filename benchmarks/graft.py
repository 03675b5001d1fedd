"""One stacked forward pass of GraFT's triplets beside the nine separate ones of the released scheme: time, memory, equality.

Run ``OMP_NUM_THREADS=2 python benchmarks/graft.py`` from the root of the repository. The released scheme passes every role
(anchor, positive, negative) and every modality through the backbone on its own; it is written here from that description.
``--backbone deit_base_distilled_patch16_224 --size 224 224 --triplets 26`` are the paper's sizes. PK batches, which mine
their triplets among as many samples as there are anchors, are timed beside both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from ranking import measure
from torch import Tensor

from relreid_plugin.losses.ffd import GraFTLoss
from relreid_plugin.models.graft import GraFT

CLASSES = 50


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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="deit_small_distilled_patch16_224", help="a ViT of timm")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128], help="height and width")
    parser.add_argument("--triplets", type=int, default=8)
    parser.add_argument("--modalities", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = GraFT(
        lambda channels: timm.create_model(args.backbone, num_classes=0, img_size=tuple(args.size), in_chans=channels),
        CLASSES,
        modalities="RNTX"[: args.modalities],
        dropout=0.0,
        checkpointing=args.checkpointing,
    ).train()
    options: dict[str, Any] = {"ce": 0.5, "triplet": 0.5, "center": 0.0005, "label_smoothing": 0.1}
    given = GraFTLoss(CLASSES, model.feature_dim, **options)
    mined = GraFTLoss(CLASSES, model.feature_dim, mined=True, **options)
    mined.load_state_dict(given.state_dict())
    images = torch.randn(3 * args.triplets, args.modalities, 3, *args.size)
    labels = torch.arange(3 * args.triplets) % CLASSES
    labels[args.triplets : 2 * args.triplets] = labels[: args.triplets]
    pairs = torch.arange(args.triplets) // 4

    def step(value: Tensor) -> tuple[float, Tensor]:
        value.backward()
        gradient = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        model.zero_grad(set_to_none=True)
        return float(value.detach()), gradient

    def stacked() -> tuple[float, Tensor]:
        return step(given.fused_loss(*model(images, classified=args.triplets), labels)[0])

    def separate() -> tuple[float, Tensor]:
        return step(separate_loss(model, given, images, labels))

    def in_batch() -> tuple[float, Tensor]:
        return step(mined.fused_loss(*model(images[: args.triplets]), pairs)[0])

    name = f"{args.backbone}, {args.size[0]}x{args.size[1]}, {args.triplets} triplets, {args.modalities} modalities"
    print(f"{torch.get_num_threads()} threads; {name}; forward and backward pass")
    print(f"{'scheme':<44}{'s':>8}{'ratio':>8}{'peak MiB':>10}{'loss':>10}{'gradient':>10}")
    base: tuple[float, Tensor] | None = None
    reference, records = 0.0, []
    schemes = (
        (f"{3 * args.modalities} separate passes", separate),
        ("one stacked pass", stacked),
        ("PK batch, mined", in_batch),
    )
    for title, function in schemes:
        result, seconds, peak = measure(function, args.repeats)
        if base is None:
            base, reference = result, seconds
        same = function is not in_batch
        difference = abs(result[0] - base[0]) if same else None
        gradient = float((result[1] - base[1]).abs().max()) if same else None
        records.append(
            {"scheme": title, "seconds": seconds, "ratio": reference / seconds, "peak_mib": peak, "difference": difference}
        )
        shown = f"{difference:>10.0e}{gradient:>10.0e}" if same else f"{'-':>10}{'-':>10}"
        print(f"{title:<44}{seconds:>8.2f}{reference / seconds:>7.2f}x{peak:>10.0f}{shown}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"work": name, "schemes": records}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
