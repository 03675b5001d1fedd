"""A small store with a network that is quick and tells its pictures apart, served in this process or in one of its own."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import threading
from dataclasses import dataclass

import hostile
import numpy as np
import torch
import warm
from conftest import ROOT
from PIL import Image

from relreid_plugin.cli.main import main
from relreid_plugin.features.verifier import Verifier

TOKEN = "a-token-of-the-tests-0123"
DIM = 24


class Means(torch.nn.Module):
    """Mean colours of 2x4 fields: (B, 3, 16, 8) -> (B, 24)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, (4, 2)).flatten(1)


def picture(number, size=(8, 16)):
    pixels = np.random.default_rng(number).integers(0, 255, (4, 2, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def file_of(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def make_store(folder):
    """Six identities, each twice before two cameras, row by row; returns the words that name store and model."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for number in range(hostile.ROWS):
        picture(number).save(photos / f"{number // 4 + 1:04d}_c{number % 4 // 2 + 1}s1_{number:06d}_00.png")
    torch.jit.script(Means()).save(str(folder / "means.pt"))
    model = [f"torchscript:{folder / 'means.pt'}", "--size", "16x8"]
    assert main(["extract", model[0], str(folder / "store"), str(photos), *model[1:]]) == 0
    verifier = Verifier(
        "logistic", {"slope": 10.0, "offset": -5.0}, 0.9, 0.0, 1.0, {}, [0, 0, 0], [1, 1], 2, dim=DIM, source="made"
    )
    verifier.save(folder / "verifier.json")
    return [str(folder / "store"), "--model", *model, "--verifier", str(folder / "verifier.json")]


@dataclass
class Client:
    """Asks a service over a socket of its own each time."""

    port: int
    token: str = ""

    def raw(self, method, path, headers=None, body=b""):
        """Return status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            given = {name.title() for name in headers or {}}
            connection.putrequest(method, path, skip_host="Host" in given, skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value.encode("latin-1"))
            if "Content-Length" not in given and (body or method in ("POST", "PUT")):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def ask(self, method, path, image=None, **fields):
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        body = b""
        if image is not None or fields:
            image = file_of(image) if isinstance(image, Image.Image) else image
            headers, body = {**headers, **hostile.FORM}, hostile.form(image, **fields)
        status, _, content = self.raw(method, path, headers, body)
        return status, json.loads(content) if content[:1] in (b"{", b"[") else content

    def search(self, image, **fields):
        status, found = self.ask("POST", "/api/search", image, **fields)
        assert status == 200, found
        return found["results"]


class Process:
    """``relreid serve`` in a process of its own."""

    def __init__(self, words, *more):
        environment = {**os.environ, "RELREID_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [warm.python(), "-m", "relreid_plugin", "serve", *words, "--port", "0", "--rate", "0", *more]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        said = ""
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)/", said)) is None:
            line = self.process.stdout.readline()
            if not line:
                raise AssertionError(said + self.process.stderr.read())
            said += line
        self.client = Client(int(found[1]), TOKEN)
        self.log: list[str] = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
