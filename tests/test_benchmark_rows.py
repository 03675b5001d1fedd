"""Rows of the benchmarks beside other programs, at small sizes: the host's loop, several processes, start-up, queries."""

from __future__ import annotations

import json
import os

import pytest
import torch
import yaml
from test_benchmarks import QUICK, ROOT, ROWS, harness, targets

import online  # isort: skip  (test_benchmarks has put the folder on the path)
import startup  # isort: skip
import training  # isort: skip


def measured(name):
    """The lines of a row at small sizes; skipped where a library is missing."""
    try:
        return ROWS[name].measure(QUICK)
    except harness.LacksPackage as lacking:
        pytest.skip(str(lacking))


def test_an_epoch_of_the_host():
    line, last = measured("epoch")
    assert last.variant and last.seconds > 0 and last.work.endswith("train.channels_last")
    assert line.equal and line.difference < 1e-6 and line.seconds > 0 and line.reference_s > 0


@pytest.mark.parametrize(
    "name", ["processes-osnet", pytest.param("processes-graft", marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_two_processes_beside_one(name, monkeypatch):
    """Configuration, data, epochs and lines; here every form trains in this process."""
    started = []

    def trained(path, processes, threads):
        precision = yaml.safe_load(path.read_text())["train"].get("precision", "float32")
        started.append((processes, threads, precision))
        training.work(path)
        return json.loads(path.with_suffix(".json").read_text())

    monkeypatch.setattr(training, "trained", trained)
    [line] = measured(name)
    assert started == [(count, 1, precision) for precision in ("float32", "float64") for count in (1, 2)]
    assert line.equal and line.difference < 1e-5 and line.ratio > 0


@pytest.mark.slow
@pytest.mark.long
def test_a_configuration_is_started_in_two_processes(tmp_path, monkeypatch):
    script = tmp_path / "work.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "found = {name: os.environ[name] for name in ('WORLD_SIZE', 'OMP_NUM_THREADS')}\n"
        "if os.environ['RANK'] == '1':\n"
        "    pathlib.Path(sys.argv[2]).with_suffix('.json').write_text(json.dumps(found))\n"
    )
    monkeypatch.setattr(training, "SCRIPT", script)
    assert training.trained(tmp_path / "run.yml", 2, 1) == {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    script.write_text("raise SystemExit('nothing to train')")
    with pytest.raises(RuntimeError, match="nothing to train"):
        training.trained(tmp_path / "run.yml", 1, 1)


def test_losses_of_two_runs_that_differ_are_seen():
    one = {"history": {"stage1": [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 0.5}]}}
    two = {"history": {"stage1": [{"epoch": 1, "loss": 2.1}, {"epoch": 2, "loss": 0.52}]}}
    assert training.loss_gap(two, one) == pytest.approx(0.05) and training.loss_gap(one, one) == 0
    del two["history"]["stage1"][1]
    with pytest.raises(ValueError):
        training.loss_gap(two, one)


def test_the_first_answer_of_a_command():
    lines = measured("startup")
    assert [line.work.split(": ")[1] for line in lines] == list(startup.COMMANDS)
    assert all(line.seconds > 0 and line.values["interpreter"] > 0 for line in lines)
    with pytest.raises(RuntimeError, match="exit code 2"):
        startup.call(("-m", "relreid_plugin", "nothing"), 0, "", dict(os.environ, PYTHONPATH=str(ROOT)))


def test_one_query_beside_other_libraries(one_thread):
    lines = measured("online")
    assert all(line.seconds > 0 and line.reference_s > 0 for line in lines)
    assert all(line.values["recall"] >= 0.95 and line.values["reference_recall"] >= 0.95 for line in lines[:2])


def test_a_library_takes_the_narrowest_front_that_finds_enough():
    gallery, queries = online.scene(300, 20, dim=16)
    wanted, width = online.exact(queries, gallery), [0]

    def search(query):
        found = online.exact(query, gallery).clone()
        found[:, : 1 if width[0] < 40 else 0] = 0 if int(found[0, 0]) else 1
        return found

    library = online.Library("toy", 0.0, search, lambda front: width.__setitem__(0, front))
    library.tune(queries, wanted)
    assert library.front == 40 and library.recall == 1.0
    owners = torch.arange(300) % 30
    assert (owners[wanted] == owners[wanted[:, :1]]).float().mean() > 0.5  # neighbours are images of one identity


def test_a_missing_library_is_one_sentence(monkeypatch, tmp_path):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(online, "import_module", missing)
    out, threads = tmp_path / "out.json", str(torch.get_num_threads())
    assert harness.main(targets.ROWS, "", ["--child", "online", "--json", str(out), "--threads", threads, "--quick"]) == 0
    assert json.loads(out.read_text())["problem"] == "faiss is not installed: pip install hnswlib usearch faiss-cpu"


def test_a_gallery_of_a_million_at_a_small_size():
    lines = measured("gallery-million")
    assert [line.work.split(": ")[1] for line in lines] == list(online.EARLIER)
    assert all(line.variant and line.seconds > 0 for line in lines)
