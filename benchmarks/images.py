"""Features of image files beside the plain way: loader processes, then the network on one batch after the other.

Run ``python benchmarks/images.py`` from the root of the repository. The files are JPEGs of smooth noise, 128 x 256 pixels
as detectors cut persons. The plain way is what the package did before and what many write: a ``DataLoader`` with as many
processes as threads, torchvision's transforms, batches of 100, the network on all threads. Printed beside it is the limit:
the network's best time on tensors in memory (channels last, the best of several batches) and decoding with resizing alone,
on the same threads, one after the other. ``share`` is how much of the limit's rate is reached.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, largest
from harness import Gate, Line, Row, Settings, main, ratio
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from relreid_plugin.backbones.networks import build_backbone
from relreid_plugin.backbones.opened import Opened, Reading
from relreid_plugin.features.extractor import Extractor

LIMIT = 1e-5
BATCHES = (8, 16, 32, 64, 128)
PLAIN_BATCH = 100


def write_images(paths: Iterable[Path], *, size: tuple[int, int] = (256, 128)) -> list[str]:
    """Write JPEGs of smooth noise, height x width pixels, and return their paths."""
    generator = np.random.default_rng(0)
    height, width = size
    written = []
    for path in paths:
        coarse = generator.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        written.append(str(path))
    return written


class _Files(Dataset):
    def __init__(self, paths: list[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def plain(network: nn.Module, reading: Reading, paths: list[str], workers: int) -> Tensor:
    """Features in the plain way, (n, d)."""
    transform = T.Compose([T.Resize(reading.size), T.ToTensor(), T.Normalize(reading.mean, reading.std)])
    loader = DataLoader(_Files(paths, transform), PLAIN_BATCH, num_workers=workers)
    with torch.no_grad():
        return torch.cat([network(batch) for batch in loader])


def _rate(function: Callable[[], Any], images: int, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return images / statistics.median(times)


def limit(extractor: Extractor, paths: list[str], threads: int, repeats: int) -> dict[str, float]:
    """Rates, images per second, of the network alone and of decoding alone, and of one after the other."""
    height, width = extractor.size
    best, chosen = 0.0, 0
    for batch in BATCHES[: 2 if repeats == 1 else None]:
        pixels = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
        extractor.forward(pixels)
        rate = _rate(lambda pixels=pixels: extractor.forward(pixels), batch, max(1, repeats))
        if rate > best:
            best, chosen = rate, batch
    some = paths[:200]

    def decode(path: str) -> None:
        extractor._photo(path, 0, False)()

    with ThreadPoolExecutor(threads) as pool:
        decoding = _rate(lambda: list(pool.map(decode, some)), len(some), repeats)
    return {"forward": best, "batch": chosen, "decoding": decoding, "limit": 1 / (1 / best + 1 / decoding)}


def compare(network: nn.Module, title: str, count: int, settings: Settings) -> list[Line]:
    """Our extractor beside the plain way, in float32 and, where the processor has its products, as a variant in bfloat16."""
    torch.manual_seed(0)
    opened = Opened(network.eval(), Reading(), title, identity="benchmark")
    names = ("float32", "bfloat16") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("float32",)
    extractors = {name: Extractor(opened, precision=name) for name in names}
    workers = 0 if settings.quick else settings.threads
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder, f"{number:05d}.jpg") for number in range(count))
        forms = {name: lambda each=each: each(paths) for name, each in extractors.items()}
        timed = alternate({**forms, "plain": lambda: plain(network, opened.reading, paths, workers)}, settings.repeats)
        rates = {name: limit(each, paths, settings.threads, settings.repeats) for name, each in extractors.items()}
    reference = timed["plain"]
    scale = float(reference.result.abs().max())
    lines = []
    for precision in names:
        each = timed[precision]
        line = Line(
            title if precision == "float32" else f"{title}, {precision}",
            f"loader processes, batches of {PLAIN_BATCH}",
            reference.seconds,
            each.seconds,
        )
        line.reference_mib, line.mib = reference.mib, each.mib
        line.difference = largest(each.result, reference.result) / scale
        rate = count / each.seconds
        found = rates[precision]
        line.values = {**found, "images_per_second": rate, "share": rate / found["limit"]}
        line.notes = [
            f"{rate:.0f} images/s, plain {count / reference.seconds:.0f}; the limit is {found['limit']:.0f}: the network "
            f"alone {found['forward']:.0f} (batch {found['batch']:.0f}), decoding alone {found['decoding']:.0f}; reached "
            f"{100 * line.values['share']:.0f} % of it"
        ]
        line.variant = precision != "float32"
        if not line.variant:
            line.equal = line.difference <= LIMIT
        lines.append(line)
    if "bfloat16" not in names:
        lines[0].notes.append("this processor has no bfloat16 products; bfloat16 was not timed")
    return lines


def osnet(settings: Settings) -> list[Line]:
    """OSNet x0.25 of torchreid; where that is not installed, torchvision's smallest ShuffleNet."""
    count = settings.pick(2000, 24)
    try:
        from relreid_plugin.engine.models import host_features

        network, name = host_features("osnet_x0_25", False), "OSNet x0.25"
    except Exception:  # torchreid, or a package that it needs, is not installed
        network, name = build_backbone("torchvision:shufflenet_v2_x0_5", output_stride=0), "ShuffleNet x0.5"
    return compare(network, f"features of {count:,} images, {name}", count, settings)


def vit(settings: Settings) -> list[Line]:
    """ViT-S/16 of timm."""
    import timm

    count = settings.pick(600, 24)
    options = settings.pick({}, {"embed_dim": 32, "depth": 1, "num_heads": 2})
    network = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=(256, 128), **options)
    return compare(network, f"features of {count:,} images, ViT-S/16", count, settings)


SHARE = Gate("share", 0.8, text="80 % of the limit")
ROWS = [
    Row(
        "features-osnet",
        "features from images",
        "features of image files, OSNet x0.25",
        osnet,
        must=(ratio(1.8), SHARE),
        aim=(Gate("share", 0.95, text="95 % of the limit"),),
    ),
    Row(
        "features-vit",
        "features from images",
        "features of image files, ViT-S/16",
        vit,
        must=(SHARE,),
        aim=(Gate("share", 0.95, text="95 % of the limit"),),
    ),
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
