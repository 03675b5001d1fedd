"""The information bottleneck bound beside its n x C x C form, and its share of a training step.

Run ``OMP_NUM_THREADS=2 python benchmarks/information.py`` from the root of the repository. The n x C x C form multiplies out
the double sum over the clusters of features and of inputs, as it is printed; it is written here from the formula. Features
and inputs are synthetic, 768 and 384 wide. The training step is that of a ViT-B/16 on images of 256 x 128 with overlapping
patches (stride 12): forward, cross-entropy, backward. ``--step-batch`` makes its batch smaller where memory is short (64
images take 8 GB); the bound keeps its batch of 64, so that its share comes out larger than it is.
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

from relreid_plugin.functional.information import ib_bound, input_descriptor, soft_assignment
from relreid_plugin.losses.information import InformationBottleneckBound
from relreid_plugin.models.vit import VisionTransformerReID

DIM, INPUTS = 768, 384


def problem(batch: int, classes: int) -> dict[str, torch.Tensor]:
    """Features, inputs, labels, centroids and Q."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "features": draw(batch, DIM),
        "inputs": draw(batch, INPUTS),
        "labels": torch.randint(classes, (batch,), generator=generator),
        "centroids_f": F.normalize(draw(classes, DIM), dim=1) * 0.8,
        "centroids_x": F.normalize(draw(classes, INPUTS), dim=1) * 0.8,
        "log_q": draw(classes, classes).log_softmax(dim=1),
    }


def cubic_bound(log_f: torch.Tensor, log_x: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """IBB with every pair of clusters of every sample in one array."""
    phi_f, phi_x = log_f.exp(), log_x.exp()
    cube = phi_f.unsqueeze(2) * phi_x.unsqueeze(1) * log_x.unsqueeze(1)
    return (cube.sum(dim=(1, 2)) - (phi_f * log_q).sum(dim=1)).mean()


def compare(batch: int, classes: int, repeats: int) -> dict[str, Any]:
    """Value and gradient of both forms."""
    data = problem(batch, classes)

    def run(form: Any) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = data["features"].clone().requires_grad_(True)
        log_f = soft_assignment(leaf, data["centroids_f"])
        log_x = soft_assignment(data["inputs"], data["centroids_x"])
        value = form(log_f, log_x, data["log_q"][data["labels"]])
        value.backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    ours, seconds, peak = measure(lambda: run(ib_bound), 20 * repeats)
    cubic, cubic_seconds, cubic_peak = measure(lambda: run(cubic_bound), repeats)
    return {
        "work": f"forward and backward, batch {batch}, C = {classes}",
        "cubic_seconds": cubic_seconds,
        "seconds": seconds,
        "ratio": cubic_seconds / seconds,
        "cubic_peak_mib": cubic_peak,
        "peak_mib": peak,
        "difference": float((ours[0] - cubic[0]).abs()),
        "gradient_difference": float((ours[1] - cubic[1]).abs().max()),
    }


def bound_in_training(batch: int, classes: int, repeats: int) -> tuple[float, float]:
    """Seconds and peak MiB, buffers included, of all that the bound adds to a training step: descriptor, value, sums for
    the next epoch's centroids and Q and for the estimate, gradient."""
    data = problem(batch, classes)
    images = torch.randn(batch, 3, 256, 128)

    def build() -> InformationBottleneckBound:
        bound = InformationBottleneckBound(classes, DIM, input_dim=INPUTS)
        for _ in range(2):
            order = torch.arange(classes)
            features, inputs = data["centroids_f"][order], data["centroids_x"][order]
            bound(features, order, inputs)
            bound.end_epoch()
        return bound

    def step(bound: InformationBottleneckBound) -> None:
        leaf = data["features"].clone().requires_grad_(True)
        value = bound(leaf, data["labels"], input_descriptor(images))
        assert value is not None
        value.backward()

    _, _, peak = measure(lambda: step(build()), 1)
    ready = build()
    _, seconds, _ = measure(lambda: step(ready), 10 * repeats)
    return seconds, peak


def training_step(batch: int, classes: int, repeats: int) -> tuple[float, float]:
    """Seconds and peak MiB of forward and backward pass of a ViT-B/16, gradients included, weights not."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    model = VisionTransformerReID(vit, classes, image_size=(256, 128), stride=12).train()
    images, labels = torch.randn(batch, 3, 256, 128), torch.randint(classes, (batch,))

    def step() -> None:
        logits, _ = model(images)
        F.cross_entropy(logits, labels).backward()
        model.zero_grad(set_to_none=True)

    _, seconds, peak = measure(step, repeats)
    return seconds, peak


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="batch of the bound")
    parser.add_argument("--step-batch", type=int, default=0, help="batch of the training step (default: that of the bound)")
    parser.add_argument("--classes", type=int, nargs="+", default=[751, 1041])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; the n x C x C form against the bound; peak MiB above the inputs")
    print(f"{'work':<46}{'n C C ms':>10}{'ms':>8}{'ratio':>8}{'n C C MiB':>11}{'MiB':>7}{'value':>9}{'gradient':>10}")
    records = []
    for classes in args.classes:
        record = compare(args.batch, classes, args.repeats)
        records.append(record)
        print(
            f"{record['work']:<46}{1e3 * record['cubic_seconds']:>10.0f}{1e3 * record['seconds']:>8.2f}"
            f"{record['ratio']:>7.0f}x{record['cubic_peak_mib']:>11.0f}{record['peak_mib']:>7.1f}"
            f"{record['difference']:>9.0e}{record['gradient_difference']:>10.0e}",
            flush=True,
        )
    classes, batch = max(args.classes), args.step_batch or args.batch
    seconds, peak = bound_in_training(args.batch, classes, args.repeats)
    step_seconds, step_peak = training_step(batch, classes, max(1, args.repeats // 3))
    share = {
        "work": f"ViT-B/16 256x128, stride 12, batch {batch}; bound: batch {args.batch}, C = {classes}",
        "step_seconds": step_seconds,
        "step_peak_mib": step_peak,
        "seconds": seconds,
        "peak_mib": peak,
        "share_of_time": seconds / step_seconds,
        "share_of_memory": peak / step_peak,
    }
    records.append(share)
    print(f"\n{share['work']}\n{'':<46}{'seconds':>10}{'MiB':>10}")
    print(f"{'training step':<46}{step_seconds:>10.3f}{step_peak:>10.0f}")
    print(f"{'bound: value, gradient, sums, estimate':<46}{seconds:>10.4f}{peak:>10.1f}")
    print(f"{'share':<46}{share['share_of_time']:>10.2%}{share['share_of_memory']:>10.2%}")
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
