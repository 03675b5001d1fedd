"""Options of the tools and the launcher's variables: a number in its range, or one sentence and exit code 2."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from relreid_plugin.cli.ladder import main as ladder
from relreid_plugin.config.ranges import Number
from relreid_plugin.engine.grid import plan, train
from relreid_plugin.errors import UserError
from relreid_plugin.options import Launch, check_integer, parse_numbers, read_launch
from relreid_plugin.rib.tables import eta_variants

ROOT = Path(__file__).resolve().parents[2]
NOT_COUNTS = ("0", "-1", "1.5", "x", "", "9" * 30, "nan")
NOT_SEEDS = ("-1", "1.5", "x", str(2**32), "9" * 5000)


def tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


ABLATIONS = (("rib", []), ("eta", []), ("graft", ["x"]))
CASES = [
    *[(name, [*first, "--jobs", value]) for value in NOT_COUNTS for name, first in ABLATIONS],
    *[(name, [*first, "--seeds", value]) for value in ("-1", "1,1", "a", "1.5", "", str(2**32), "nan")
      for name, first in ABLATIONS],
    *[("eta", ["--etas", value]) for value in ("nan", "inf", "-1", "1e31", "0,0", "")],
    *[("extract", ["RUN", "STORE", "x", "--chunk", value]) for value in NOT_COUNTS],
    *[("extract", ["RUN", "STORE", "x", option, value]) for value in ("-1", "x", "1.5")
      for option in ("--batch", "--workers")],
    *[("figures", ["RUN", "--identities", value]) for value in NOT_COUNTS],
    *[("gradcam", ["RUN", option, value]) for value in NOT_COUNTS for option in ("--shown", "--count", "--fraction")],
    *[("gradcam", ["RUN", "--fraction", value]) for value in ("1", "inf")],
    *[(name, [*first, "--seed", value]) for value in NOT_SEEDS for name, first in (
        ("gradcam", ["RUN"]), ("occlusion", ["RUN"]), ("make_embedded", []))],
    *[("occlusion", ["RUN", "--fractions", value]) for value in ("1.1", "-0.1", "nan", "", "0.1,0.1")],
    *[("prune", ["RUN", "--epochs", value]) for value in ("-1", "x", "1.5", "9" * 30)],
    *[("search", ["RUN", "STORE", option, value]) for value in NOT_COUNTS
      for option in ("-k", "--nprobe", "--ef", "--shown")],
    *[("search", ["RUN", "STORE", option, value]) for value in ("-1", "x") for option in ("--rerank", "--nlist")],
    ("search", ["RUN", "STORE", "--indx", "flat"]),
    ("search", []),
    ("information", []),
    ("modality_stats", []),
]  # fmt: skip


@pytest.fixture(scope="module")
def mains():
    return {name: tool(name) for name in {name for name, _ in CASES}}


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=lambda value: None if isinstance(value, list) else value)
def test_numbers_of_the_tools_have_ranges(mains, monkeypatch, tmp_path, capsys, name, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("relreid_plugin.register", lambda: None)
    try:
        code = mains[name]([str(word) for word in arguments])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: command line: ") and error.count("\n") == 1 and len(error) < 500
    assert not list(tmp_path.iterdir())
    if arguments and arguments[-2].startswith("--") and arguments[-1]:
        assert arguments[-2] in error


@pytest.mark.parametrize("seeds", ["-1", "1,1", "²", "1.5", str(2**32)])
def test_the_ladders_seeds(tmp_path, monkeypatch, capsys, seeds):
    monkeypatch.chdir(tmp_path)
    assert ladder(["--seeds", seeds]) == 2
    assert "--seeds takes different numbers" in capsys.readouterr().err


def test_what_a_tool_sets_itself_is_not_overwritten_in_silence(tmp_path, capsys):
    config = str(ROOT / "configs" / "rib_dcs_vit_embedded.yml")
    for key in ("train.seed", "rib.dcs.seed", "data.save_dir", "test.rivals"):
        with pytest.raises(UserError, match=f"'{key}'"):
            plan(config, eta_variants([0.0]), [1], folder=tmp_path, overrides=[key, "1"])
    assert tool("eta")(["--config-file", config, "--out", str(tmp_path), "--opts", "rib.ibb.eta", "3"]) == 2
    assert "set by --etas" in capsys.readouterr().err
    assert ladder(["relation.train.seed", "3"]) == 2 and "set by --seeds" in capsys.readouterr().err


def test_weights_of_a_sweep_are_taken_as_given():
    variants = eta_variants([0.0, 0.1, 1.0, 0.1234567891, 1.0000001])
    assert [variant.key for variant in variants] == ["eta0", "eta0.1", "eta1", "eta0.1234567891", "eta1.0000001"]
    assert [float(variant.overrides[1]) for variant in variants] == [0.0, 0.1, 1.0, 0.1234567891, 1.0000001]


@pytest.mark.parametrize(
    "environment,words",
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "1"}, "not set"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be an integer"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be an integer .* got 'one'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE must be an integer"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be an integer"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK must be an integer"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK is 2"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ],
)
def test_ranks_outside_of_their_world(environment, words):
    with pytest.raises(UserError, match=words) as caught:
        read_launch(environment)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_ranks_that_fit():
    assert read_launch({}) == read_launch({"RANK": "", "WORLD_SIZE": " "}) == Launch(0, 1, 0)
    assert read_launch({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Launch(5, 8, 1)
    assert read_launch({"RANK": "1", "WORLD_SIZE": "2"}) == Launch(1, 2, 0)


def test_extraction_refuses_a_rank_before_it_opens_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tool("extract")([str(tmp_path / "run"), str(tmp_path / "store"), "x.jpg"]) == 2
    assert "RANK is 3" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_numbers_of_callers():
    import numpy as np

    assert check_integer("k", np.int64(3), 1) == 3
    for value in (True, 0, 1.0, "1", None, float("nan"), 10**30):
        with pytest.raises(UserError, match="k takes an integer in"):
            check_integer("k", value, 1)
    with pytest.raises(UserError, match="jobs"):
        train([], jobs=0)
    assert parse_numbers("--x", "0,0.5", float, Number(0, 1)) == [0.0, 0.5]
