"""A run killed with SIGKILL and resumed gives the numbers of the run that was not killed, to the last digit."""

from __future__ import annotations

import signal

import pytest
import torch
from conftest import comparable
from killing import spawn


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills,overrides",
    [
        ([("image", 7), ("relation", 5)], ["relation.bank.refresh", "1"]),
        pytest.param(
            [("image", 3)],
            ["data.workers", "2", "relation.bank.refresh", "2", "relation.train.max_epoch", "3"],
            marks=[pytest.mark.slow, pytest.mark.long],
        ),
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
