"""A report at the size of Market-1501: time, size of the page, and pictures in it.

``OMP_NUM_THREADS=1 python benchmarks/report.py`` from the root of the repository. Features and pictures are made: 3,368
queries and 15,913 gallery images of 750 identities and 6 cameras, 512 dimensions, a JPEG of 64 x 128 pixels each (blurred
noise with grain). Making them is not timed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from common import features
from PIL import Image

from relreid_plugin.report.page import LIMIT_MB, write_report

QUERIES, GALLERY, IDENTITIES, CAMERAS = 3368, 15913, 750, 6
WIDTH, HEIGHT = 64, 128


def make(folder: Path, queries: int, gallery: int) -> Path:
    """Write features with a picture for each; returns the npz file."""
    arrays = {}
    vectors = features(10 * IDENTITIES).numpy()
    rng = np.random.default_rng(0)
    for split, count in (("query", queries), ("gallery", gallery)):
        pids, cameras = rng.integers(0, IDENTITIES, count), rng.integers(0, CAMERAS, count)
        values = vectors[pids] + 0.06 * rng.normal(size=(count, vectors.shape[1]))
        paths = [str(folder / split / f"{row:05d}.jpg") for row in range(count)]
        (folder / split).mkdir()
        for path in paths:
            rough = Image.fromarray(rng.integers(0, 255, (16, 8, 3), np.uint8)).resize(
                (WIDTH, HEIGHT), Image.Resampling.BICUBIC
            )
            grain = rng.normal(0, 6, (HEIGHT, WIDTH, 1))
            Image.fromarray(np.clip(np.asarray(rough) + grain, 0, 255).astype(np.uint8)).save(path, quality=90)
        own = {"features": values.astype(np.float32), "pids": pids, "camids": cameras, "paths": np.array(paths)}
        arrays |= {f"{split}_{name}": value for name, value in own.items()}
    np.savez(folder / "market.npz", **arrays)
    return folder / "market.npz"


def main() -> None:
    """Make, report, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--gallery", type=int, default=GALLERY)
    parser.add_argument("--limit", type=float, default=LIMIT_MB, help="largest size of the page, MB (default: 60)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = make(Path(name), args.queries, args.gallery)
        out = Path(name) / "report.html"
        started = time.perf_counter()
        said = write_report([str(place)], out, limit=args.limit)
        seconds = time.perf_counter() - started
        data = out.read_text(encoding="utf-8").split('<script type="application/json" id="data">')[1].split("</script>")[0]
        pictures = len(json.loads(data)["pictures"])
        print(
            f"{args.queries:,} queries x {args.gallery:,} gallery images: {seconds:.0f} s, "
            f"{out.stat().st_size / 1e6:.1f} MB, {pictures:,} pictures"
        )
        for sentence in said:
            print(f"note: {sentence}")


if __name__ == "__main__":
    main()
