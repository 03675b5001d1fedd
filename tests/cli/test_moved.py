"""Module paths of before: the same module object, one warning, and nothing imported that was not asked for."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import relreid_plugin
from relreid_plugin.engine.packing import Packed, pack, unpack
from relreid_plugin.moved import EMPTY, MOVED, MovedFinder, install

ROOT = Path(__file__).resolve().parents[2]


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("old", MOVED)
def test_every_old_module_is_the_new_one(old):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(f"relreid_plugin.{old}")
    new = importlib.import_module(f"relreid_plugin.{MOVED[old]}")
    assert module is new and sys.modules[f"relreid_plugin.{old}"] is new
    assert new.__name__ == new.__spec__.name == f"relreid_plugin.{MOVED[old]}"
    parent, _, name = f"relreid_plugin.{old}".rpartition(".")
    assert getattr(importlib.import_module(parent), name) is new


def test_old_names_are_no_modules_now():
    folder = Path(relreid_plugin.__file__).parent
    for old in (*MOVED, *EMPTY):
        assert not (folder / old.replace(".", "/")).with_suffix(".py").exists()
        assert not list((folder / old.replace(".", "/")).glob("*.py"))


def test_one_warning_that_names_both():
    out = fresh(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from relreid_plugin.merging import merge_from_list\n"
        "    import relreid_plugin.merging\n"
        "    from relreid_plugin import merging\n"
        "from relreid_plugin.config.merging import merge_from_list as same\n"
        "assert merge_from_list is same is merging.merge_from_list\n"
        "print([(w.category.__name__, str(w.message)) for w in seen if 'relreid' in str(w.message)])"
    )
    sentence = "'relreid_plugin.merging' is now 'relreid_plugin.config.merging'; the old name will be taken away."
    assert out == str([("DeprecationWarning", sentence)])


def test_nothing_is_imported_and_no_other_name_is_found():
    out = fresh(
        "import sys, relreid_plugin\n"
        "print([n for n in sys.modules if n.startswith('relreid_plugin')])\n"
        "for name in ('relreid_plugin.nothing', 'relreid_plugin.functional.nothing', 'relreid_plugin.layers.dcs.x'):\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError as error: print(error)"
    ).splitlines()
    assert out[0] == "['relreid_plugin.moved', 'relreid_plugin']"
    assert len(out) == 4 and all("relreid_plugin." in line for line in out[1:])
    assert MovedFinder.find_spec("functional.ranking") is None and MovedFinder.find_spec("other.functional.ranking") is None


def test_installing_again_adds_nothing():
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before and before.count(MovedFinder) == 1


def test_the_configuration_module_of_before():
    from relreid_plugin.config import _flat, get_default_config, merge_from_list

    cfg = get_default_config()
    merge_from_list(cfg, ["model.name", "bnneck_baseline"])
    assert _flat(cfg)["model.name"] == "bnneck_baseline"
    with pytest.raises(ImportError, match="nothing_such"):
        from relreid_plugin.config import nothing_such  # noqa: F401


class _OldPickler(pickle.Pickler):
    """Names the function that unpacks by the path that it had in earlier versions."""

    def reducer_override(self, value):
        if isinstance(value, Packed):
            return _old_unpack, (value.bits, value.values, value.shape)
        return NotImplemented


def _old_unpack(*parts):
    return unpack(*parts)


_old_unpack.__qualname__ = _old_unpack.__name__ = "unpack"


@pytest.mark.parametrize(
    "old", ["functional.pruning", pytest.param("graft.packing", marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_pruned_checkpoints_of_before_load(tmp_path, monkeypatch, old):
    """The pickle holds the old path and gives the tensor, also in a process that has imported no old module."""
    name = f"relreid_plugin.{old}"
    monkeypatch.setattr(_old_unpack, "__module__", name)
    tensor = torch.zeros(4096)
    tensor[::97] = 1.5
    packed = pack(tensor)
    assert isinstance(packed, Packed)
    path = tmp_path / "old.pth.tar"
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "unpack", _old_unpack)
    pickler = type("pickler", (), {"Pickler": _OldPickler, "dumps": pickle.dumps, "HIGHEST_PROTOCOL": 2})
    torch.save({"format": 1, "kind": "image", "state_dict": {"w": packed}}, path, pickle_module=pickler)
    monkeypatch.undo()
    assert name.encode() in path.read_bytes() and b"relreid_plugin.engine.packing" not in path.read_bytes()
    from relreid_plugin.engine import checkpoint

    for _ in range(2):
        assert torch.equal(checkpoint.read_tensors(path)["state_dict"]["w"], tensor)
    code = (
        "from relreid_plugin.engine.checkpoint import read_tensors; from pathlib import Path\n"
        f"print(int((read_tensors(Path({str(path)!r}))['state_dict']['w'] != 0).sum()))\n"
        "import sys, torch, warnings; warnings.simplefilter('ignore')\n"
        f"print({name!r} in sys.modules, int((torch.load({str(path)!r}, weights_only=False)['state_dict']['w'] != 0).sum()))"
    )
    count = int((tensor != 0).sum())
    assert fresh(code).splitlines() == [str(count), f"False {count}"]


def test_pruned_checkpoints_name_todays_path(tmp_path):
    tensor = torch.zeros(4096)
    tensor[7] = -2.0
    buffer = io.BytesIO()
    torch.save({"w": pack(tensor)}, buffer)
    assert b"relreid_plugin.engine.packing" in buffer.getvalue()
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["w"], tensor)
