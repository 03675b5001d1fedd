"""The information bottleneck bound beside its n x C x C form, and its share of a training step.

Run ``python benchmarks/information.py`` from the root of the repository, with ``--rows ibb-share`` for the share. The
n x C x C form multiplies out the double sum over the clusters of features and of inputs, as it is printed; it is written
here from the formula. Features and inputs are synthetic, 768 and 384 wide. The training step of ``ibb-share`` is that of a
ViT-B/16 on images of 256 x 128 with overlapping patches (stride 12): forward, cross-entropy, backward. 64 images take 8 GB;
where less memory is available its batch is smaller, and the bound keeps its batch of 64, so that its share comes out larger
than it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, available_memory, largest
from harness import Line, Row, Settings, main, ratio
from torch import Tensor

from relreid_plugin.rib.bound import InformationBottleneckBound
from relreid_plugin.rib.information import ib_bound, input_descriptor, soft_assignment

DIM, INPUTS = 768, 384
BATCH = 64
LIMIT, LIMIT64 = 1e-5, 1e-9
IMAGE_MIB = 130.0
"""What one more image adds to the training step's memory."""


def problem(batch: int, classes: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Features, inputs, labels, centroids and Q."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "features": draw(batch, DIM),
        "inputs": draw(batch, INPUTS),
        "labels": torch.randint(classes, (batch,), generator=generator),
        "centroids_f": F.normalize(draw(classes, DIM), dim=1) * 0.8,
        "centroids_x": F.normalize(draw(classes, INPUTS), dim=1) * 0.8,
        "log_q": draw(classes, classes).log_softmax(dim=1),
    }


def cubic_bound(log_f: Tensor, log_x: Tensor, log_q: Tensor) -> Tensor:
    """IBB with every pair of clusters of every sample in one array."""
    phi_f, phi_x = log_f.exp(), log_x.exp()
    cube = phi_f.unsqueeze(2) * phi_x.unsqueeze(1) * log_x.unsqueeze(1)
    return (cube.sum(dim=(1, 2)) - (phi_f * log_q).sum(dim=1)).mean()


def value_and_gradient(data: dict[str, Tensor], form: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Forward and backward of one form."""
    leaf = data["features"].clone().requires_grad_(True)
    log_f = soft_assignment(leaf, data["centroids_f"])
    log_x = soft_assignment(data["inputs"], data["centroids_x"])
    value = form(log_f, log_x, data["log_q"][data["labels"]])
    value.backward()
    assert leaf.grad is not None
    return {"value": value.detach().reshape(1), "gradient": leaf.grad}


def gap(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest difference of value and of gradient, the latter as a share of its largest entry."""
    scale = float(reference["gradient"].abs().max())
    return max(largest(ours["value"], reference["value"]), largest(ours["gradient"], reference["gradient"]) / scale)


def gap64(batch: int = 8, classes: int = 40) -> float:
    """:func:`gap` in float64 at a small size."""
    data = problem(batch, classes, torch.float64)
    return gap(value_and_gradient(data, ib_bound), value_and_gradient(data, cubic_bound))


def bound(classes: int, settings: Settings) -> list[Line]:
    """Value and gradient beside the n x C x C form."""
    batch, classes = settings.pick(BATCH, 8), settings.pick(classes, 60)
    data = problem(batch, classes)
    forms = {"ours": lambda: value_and_gradient(data, ib_bound), "cubic": lambda: value_and_gradient(data, cubic_bound)}
    timed = alternate(forms, settings.repeats)
    ours, cubic = timed["ours"], timed["cubic"]
    difference64 = gap64()
    line = Line(f"IBB forward+backward, batch {batch}, C={classes:,}", "n x C x C form", cubic.seconds, ours.seconds)
    line.reference_mib, line.mib, line.difference = cubic.mib, ours.mib, gap(ours.result, cubic.result)
    line.equal = line.difference <= LIMIT and difference64 <= LIMIT64
    line.values = {"difference64": difference64}
    line.notes = [f"float64 at batch 8, C=40: largest difference {difference64:.0e}"]
    return [line]


def bound_in_training(batch: int, classes: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """All that the bound adds to a training step: descriptor, value, sums for the next epoch's centroids and Q and for the
    estimate, gradient; and the same with the making of its buffers."""
    data = problem(batch, classes)
    images = torch.randn(batch, 3, 256, 128)

    def build() -> InformationBottleneckBound:
        made = InformationBottleneckBound(classes, DIM, input_dim=INPUTS)
        for _ in range(2):
            made(data["centroids_f"], torch.arange(classes), data["centroids_x"])
            made.end_epoch()
        return made

    def step(made: InformationBottleneckBound) -> None:
        leaf = data["features"].clone().requires_grad_(True)
        value = made(leaf, data["labels"], input_descriptor(images))
        assert value is not None
        value.backward()

    ready = build()
    return lambda: step(ready), lambda: step(build())


def training_step(batch: int, classes: int, *, small: bool) -> Callable[[], None]:
    """Forward and backward pass of a ViT-B/16 (of a narrow one if ``small``)."""
    import timm

    from relreid_plugin.rib.transreid import VisionTransformerReID

    options: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 2} if small else {}
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, **options)
    model = VisionTransformerReID(vit, classes, image_size=(256, 128), stride=12).train()
    images, labels = torch.randn(batch, 3, 256, 128), torch.randint(classes, (batch,))

    def step() -> None:
        logits, _ = model(images)
        F.cross_entropy(logits, labels).backward()
        model.zero_grad(set_to_none=True)

    return step


def share(settings: Settings) -> list[Line]:
    """The bound's share of a training step's time and memory."""
    classes, batch = settings.pick(1041, 60), settings.pick(BATCH, 2)
    step_batch = batch
    while step_batch > 1 and not settings.quick and step_batch * IMAGE_MIB + 1500 > available_memory():
        step_batch //= 2
    adding, building = bound_in_training(batch, classes)
    step = training_step(step_batch, classes, small=settings.quick)
    timed = alternate({"adding": adding, "step": step}, 1)
    timed["adding"] = alternate({"adding": adding}, 10 * settings.repeats)["adding"]
    mib = alternate({"building": building}, 1)["building"].mib
    name = f"training step, ViT-B/16 256x128, stride 12, batch {step_batch}"
    line = Line(f"IBB in a training step, batch {batch}, C={classes:,}", name, seconds=timed["adding"].seconds, mib=mib)
    line.reference_s, line.reference_mib, line.variant = timed["step"].seconds, timed["step"].mib, True
    line.values = {"time": line.seconds / line.reference_s, "memory": mib / max(1.0, line.reference_mib)}
    line.notes = [f"{line.values['time']:.2%} of the step's time, {line.values['memory']:.2%} of its memory"]
    return [line]


def _row(classes: int) -> Row:
    return Row(
        f"ibb-{classes}",
        "IBB forward+backward, batch 64, C=751/1,041",
        f"IBB forward+backward, batch {BATCH}, C={classes:,}",
        lambda settings: bound(classes, settings),
        must=(ratio(50),),
        aim=(ratio(100),),
    )


ROWS = [
    _row(751),
    _row(1041),
    Row("ibb-share", "", "IBB's share of a training step", share, needs=3500.0, when="named"),
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
