"""A run killed with SIGKILL and resumed gives the numbers of the run that was not killed, to the last digit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, comparable

DRIVER = """
import os, signal, sys
target, call = sys.argv[1], int(sys.argv[2])
import relreid_plugin
relreid_plugin.register()
from relreid_plugin.engine import checkpoint, image
from relreid_plugin.graft import stage as multimodal
from relreid_plugin.magformer import stage as relation
calls = 0
def die_at(owner, name):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == call:
            if name == "save":
                with open(str(args[0]) + ".half", "wb") as file:
                    file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)
if target == "image":
    die_at(image.CompositeEngine, "forward_backward")
elif target == "relation":
    die_at(relation.RelationEngine, "forward_backward")
elif target == "multimodal":
    die_at(multimodal.MultimodalEngine, "forward_backward")
elif target == "replace":
    die_at(os, "replace")
from relreid_plugin.cli.train import main
sys.exit(main(sys.argv[3:]))
"""


def spawn(tmp_path, *args):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(driver), *map(str, args)], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills,overrides",
    [
        ([("image", 7), ("relation", 5)], ["relation.bank.refresh", "1"]),
        ([("image", 3)], ["data.workers", "2", "relation.bank.refresh", "2", "relation.train.max_epoch", "3"]),
        ([("replace", 6)], []),
    ],
    ids=["both-stages-augmented-bank", "loader-workers", "while-writing-a-checkpoint"],
)
def test_killed_and_resumed_equals_not_killed(tmp_path, tiny_config, kills, overrides):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    base = ["--config-file", tiny_config, *overrides]
    done = spawn(tmp_path, "none", 0, *base, "data.save_dir", straight)
    assert done.returncode == 0, done.stderr
    for target, call in kills:
        killed = spawn(tmp_path, target, call, *base, "data.save_dir", broken, "--resume")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = spawn(tmp_path, "none", 0, *base, "data.save_dir", broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert comparable(broken) == comparable(straight)
    assert not list(broken.rglob("*.tmp"))
    for stage in ("stage1", "stage2"):
        first, second = (torch.load(run / stage / "last.pth.tar", weights_only=True) for run in (straight, broken))
        assert first["epoch"] == second["epoch"]
        for name, value in first["state_dict"].items():
            assert torch.equal(value, second["state_dict"][name]), name


def test_an_interrupted_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    from relreid_plugin.engine import checkpoint

    path = tmp_path / "last.pth.tar"
    checkpoint.save(path, {"kind": "image", "state_dict": {}, "value": 1})

    def half(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"kind": "image", "state_dict": {}, "value": 2})
    assert checkpoint.load(path, kind="image")["value"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth.tar"]


def test_random_states_come_back():
    import random

    import numpy as np

    from relreid_plugin.engine import checkpoint

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    state = checkpoint.rng_state()
    first = draw()
    checkpoint.set_rng_state(state)
    assert draw() == first
    with checkpoint.preserved_rng():
        draw()
    checkpoint.set_rng_state(state)
    assert draw() == first
