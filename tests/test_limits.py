"""What a machine runs out of, what data is too small for, and what is a defect: each ends in one line."""

from __future__ import annotations

import errno
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from relreid_plugin.cli.train import run_command
from relreid_plugin.engine.batches import check_batches, smallest_batch
from relreid_plugin.engine.runner import logged
from relreid_plugin.errors import UserError, explain

LIMITS = [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 GiB."), "20.00 MiB more"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"), "4294967296 bytes more"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory is used up"),
    (MemoryError(), "memory is used up"),
    (MemoryError("Unable to allocate 74.5 GiB for an array with shape (1, 2)"), "74.5 GiB more"),
    (RuntimeError("std::bad_alloc"), "memory is used up"),
    (RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "), "loader process was ended from outside"),
    (RuntimeError("DataLoader worker (pid(s) 3, 4) exited unexpectedly"), "loader process was ended from outside"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that dataloader's workers are "
                  "out of shared memory. Please try to raise your limit."), "'data.workers' \\(0 needs none\\)"),
    (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: No space left"), "data.workers"),
    (ValueError("Expected more than 1 value per channel when training, got [1, 8]"), "train.batch_size"),
    (RuntimeError("Given input size: (5x1x1). Calculated output size: (5x0x0). Output size is too small"), "data.height"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words"), LIMITS, ids=lambda value: type(value).__name__)
def test_limits_are_one_sentence_with_the_keys_to_change(capsys, error, words):
    def work():
        raise error

    assert run_command(work) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert re.search(words, said)
    assert "data." in said or "train." in said


def test_real_allocations_are_explained():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**55, dtype=np.float64)
    assert "used up" in explain(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert "used up" in explain(caught.value)
    with pytest.raises(ValueError) as caught:
        nn.BatchNorm1d(4)(torch.zeros(1, 4))
    assert "train.batch_size" in explain(caught.value)
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(nn.MaxPool2d(8))(torch.zeros(1, 3, 2, 2))
    assert "data.height" in explain(caught.value)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("size mismatch"), ValueError("no"), OSError(errno.EIO, "I/O")]
)
def test_other_errors_have_no_explanation(error):
    assert explain(error) is None


def test_a_defect_is_one_line_and_its_traceback_is_kept(tmp_path, capsys, monkeypatch):
    def work():
        with logged(tmp_path / "train.log"):
            print("before")
            raise KeyError("a\nb")

    monkeypatch.delenv("RELREID_TRACEBACK", raising=False)
    assert run_command(work) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: internal error (KeyError") and captured.err.count("\n") == 1
    assert "RELREID_TRACEBACK=1" in captured.err and "Traceback" not in captured.out
    log = (tmp_path / "train.log").read_text()
    assert log.startswith("before\n") and 'raise KeyError("a\\nb")' in log
    monkeypatch.setenv("RELREID_TRACEBACK", "1")
    assert run_command(work) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_users_mistake_leaves_no_traceback_in_the_log(tmp_path):
    with pytest.raises(UserError):
        with logged(tmp_path / "train.log"):
            raise UserError("no")
    assert (tmp_path / "train.log").read_text() == ""


def loader(items, size, drop_last):
    data = TensorDataset(torch.zeros(items))
    return DataLoader(data, sampler=SequentialSampler(data), batch_size=size, drop_last=drop_last)


@pytest.mark.parametrize(
    ("items", "size", "drop_last", "smallest"),
    [(9, 4, True, 4), (9, 4, False, 1), (8, 4, False, 4), (3, 4, False, 3), (4, 1, True, 1)],
)
def test_the_smallest_batch_of_an_epoch(items, size, drop_last, smallest):
    batches = loader(items, size, drop_last)
    assert smallest_batch(batches) == smallest == min(len(batch[0]) for batch in batches)


def test_batches_that_normalisation_cannot_use():
    model = nn.Sequential(nn.BatchNorm1d(3))
    check_batches(model, loader(9, 4, True), identities=2)
    check_batches(nn.Linear(2, 2), loader(9, 1, True), identities=2)
    check_batches(model, loader(9, 6, True), identities=2, classified=lambda items: items // 3)
    with pytest.raises(UserError, match="has 1 image .*needs 2"):
        check_batches(model, loader(9, 1, True), identities=2)
    with pytest.raises(UserError, match="has 3 images .*needs 6"):
        check_batches(model, loader(9, 3, True), identities=2, classified=lambda items: items // 3)
    with pytest.raises(UserError, match="1 training identity .*2 are needed"):
        check_batches(model, loader(9, 4, True), identities=1)


def test_a_run_refuses_them_before_it_writes(tmp_path, command, tiny_config):
    folder = tmp_path / "run"
    small = ["sampler.train_sampler", "RandomSampler", "train.batch_size", "1", "data.save_dir", folder]
    code, _, error = command("--config-file", tiny_config, *small)
    assert code == 2 and "'train.batch_size'" in error and not folder.exists()
    code, _, error = command("--config-file", tiny_config, "train.fixbase_epoch", "1", "data.save_dir", folder)
    assert code == 2 and "'train.open_layers'" in error and not folder.exists()


def test_seeds_up_to_the_last_one_can_be_drawn_from():
    from relreid_plugin.config.ranges import LAST_SEED
    from relreid_plugin.engine.checkpoint import preserved_rng
    from relreid_plugin.engine.runner import set_seed
    from relreid_plugin.magformer.neighbourhoods import NeighbourhoodDataset

    bank = torch.eye(6), torch.arange(6)
    last = NeighbourhoodDataset(*bank, features_per_step=3, steps=2, seed=LAST_SEED)
    assert len(last[0]["pids"]) == 3
    first = NeighbourhoodDataset(*bank, features_per_step=3, steps=2, seed=7)
    first.epoch = 5
    generator = torch.Generator().manual_seed((7 * 1_000_003 + 5) * 1_000_003 + 1)
    anchor = int(torch.randint(6, (1,), generator=generator))
    share = float(torch.rand(1, generator=generator))
    pool = (bank[0] @ bank[0][anchor]).topk(min(6, max(3, int(3 * (1 + share))))).indices
    expected = bank[1][pool[torch.randperm(len(pool), generator=generator)[:3]]]
    assert first[1]["pids"].tolist() == expected.tolist()
    with preserved_rng():
        set_seed(1_000_003 * LAST_SEED + LAST_SEED)
