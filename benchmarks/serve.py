"""A search service under many clients at once: rate, median and 95th percentile of the time of a search, errors.

python benchmarks/serve.py                                   20 clients for a minute, 10,000 images, torchvision's ResNet-18
python benchmarks/serve.py --clients 4 --seconds 5 --images 1000 --network resnet50

The store is made of synthetic features; the pictures are JPEG files of 128x64. The service runs in a process of its own,
with an untrained network, which takes as long as a trained one. Every answer is compared with the first one on its picture.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from common import features
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
_PICTURES = 64
_SIZE = (64, 128)


def pictures(count: int) -> list[bytes]:
    """JPEG files of smooth noise."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        stream = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 255, (16, 8, 3), np.uint8))
        small.resize(_SIZE, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        found.append(stream.getvalue())
    return found


def make_store(folder: Path, network: str, images: int) -> list[str]:
    """Write weights and a store; return the words that name the store and its model."""
    import torchvision

    from relreid_plugin.extractor import load_extractor
    from relreid_plugin.features.store import StoreWriter

    torch.manual_seed(0)
    weights = folder / "weights.pth"
    torch.save(torchvision.models.get_model(network).state_dict(), weights)
    model = f"torchvision:{network}"
    extractor = load_extractor(model, weights=weights, size=(_SIZE[1], _SIZE[0]))
    with StoreWriter(folder / "store", dim=extractor.dim, model=extractor.fingerprint) as writer:
        writer.add(features(images, dim=extractor.dim), np.arange(images) // 10, np.arange(images) % 6)
    return [str(folder / "store"), "--model", model, "--weights", str(weights), "--size", f"{_SIZE[1]}x{_SIZE[0]}"]


class Clients:
    """Clients that search one after the other's answer, each over a connection that it keeps.

    Args:
        address: Of the service.
        files: The pictures.
    """

    def __init__(self, address: str, files: list[bytes]) -> None:
        self.address, self.files = address, files
        self.seconds: list[float] = []
        self.errors: list[str] = []
        self._answers: dict[int, list[int]] = {}
        self._lock = threading.Lock()

    def run(self, count: int, seconds: float) -> float:
        """Search for some time; returns how long it was."""
        begun = time.perf_counter()
        threads = [threading.Thread(target=self._one, args=(number, begun + seconds)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begun

    def _one(self, number: int, until: float) -> None:
        import requests

        with requests.Session() as session:
            while time.perf_counter() < until:
                number = (number * 5 + 3) % len(self.files)
                started = time.perf_counter()
                try:
                    answer = session.post(
                        f"{self.address}api/search", files={"image": self.files[number]}, data={"k": 10}, timeout=60
                    )
                    rows = [item["row"] for item in answer.json()["results"]]
                    wrong = "" if rows == self._answers.setdefault(number, rows) else f"another answer on picture {number}"
                except (requests.RequestException, ValueError, KeyError) as error:
                    wrong = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.seconds.append(time.perf_counter() - started)
                    if wrong:
                        self.errors.append(wrong)


def measure(options: argparse.Namespace) -> int:
    """Start the service, let the clients search, stop it; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        words = make_store(Path(folder), options.network, options.images)
        environment = {**os.environ, "RELREID_TOKEN": secrets.token_urlsafe(24), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", "relreid_plugin", "serve", *words, "--port", "0", "--rate", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        try:
            found = None
            while found is None:
                line = process.stdout.readline()
                if not line:
                    print("the service did not start", file=sys.stderr)
                    return 1
                found = re.search(r"http://[^/]+/", line)
            clients = Clients(found[0], pictures(_PICTURES))
            clients.run(2, min(2.0, options.seconds))  # the first ones wait for pages of memory
            warm = len(clients.seconds)
            taken = clients.run(options.clients, options.seconds)
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        finally:
            if process.poll() is None:
                process.kill()
    times = 1000 * np.array(clients.seconds[warm:])
    print(
        f"{options.clients} clients for {taken:.0f} s, {options.images:,} images, {options.network} on "
        f"{_SIZE[1]}x{_SIZE[0]}, {torch.get_num_threads()} threads"
    )
    print(f"{len(times)} searches, {len(times) / taken:.0f} per second; {len(clients.errors)} errors; exit code {code}")
    print(f"p50 {np.percentile(times, 50):.0f} ms, p95 {np.percentile(times, 95):.0f} ms, longest {times.max():.0f} ms")
    for error in clients.errors[:3]:
        print(error, file=sys.stderr)
    return 1 if clients.errors or code else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="A search service under many clients at once.")
    parser.add_argument("--clients", type=int, default=20, help="at once (default: 20)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (default: 60)")
    parser.add_argument("--images", type=int, default=10_000, help="of the store (default: 10,000)")
    parser.add_argument("--network", default="resnet18", help="one of torchvision's (default: resnet18)")
    return measure(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
