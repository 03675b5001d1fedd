"""Packaged configurations by name, and every key explained from the source that declares it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from relreid_plugin.cli.configs import explained
from relreid_plugin.cli.main import main
from relreid_plugin.config.defaults import get_default_config, load_config
from relreid_plugin.config.explain import explain_keys, key_sources, read_comments
from relreid_plugin.config.merging import _flat
from relreid_plugin.config.packaged import find_config, packaged_configs, packaged_folder
from relreid_plugin.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.name for path in (ROOT / "configs").glob("*.yml"))


def test_all_are_packaged_and_have_a_line(capsys):
    configs = packaged_configs()
    assert [f"{each.name}.yml" for each in configs] == NAMES
    assert all(20 < len(each.summary) < 200 and each.summary[-1] not in ",(" for each in configs)
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    line = next(line for line in lines if line.startswith("magformer_grocery.yml"))
    assert line.endswith("81 grocery products (GroceryStoreDataset, Klasson 2019), from scratch.")  # two lines of comment


@pytest.mark.parametrize("name", ["osnet_embedded", "osnet_embedded.yml", "configs/osnet_embedded.yml"])
def test_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == packaged_folder() / "osnet_embedded.yml"
    assert load_config(name) == load_config(ROOT / "configs" / "osnet_embedded.yml")


def test_a_file_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("osnet_embedded.yml").write_text("train:\n  max_epoch: 7\n")
    assert load_config("osnet_embedded.yml").train.max_epoch == 7
    assert load_config("./osnet_embedded.yml").train.max_epoch == 7
    assert load_config("osnet_embedded").train.max_epoch != 7


@pytest.mark.parametrize("name", ["other/osnet_embedded.yml", "../osnet_embedded.yml", "/osnet_embedded.yml"])
def test_paths_are_paths(name, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert find_config(name) == Path(name)
    with pytest.raises(UserError, match="does not exist"):
        load_config(name)


def test_a_name_that_is_near(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'osnet_embeded' does not exist; did you mean 'osnet_embedded.yml'\?"):
        load_config("osnet_embeded")
    Path("mine.yml").write_text("")
    with pytest.raises(UserError, match=r"did you mean 'mine.yml'\?"):
        load_config("mime.yml")


# --- config NAME --explain ----------------------------------------------------------------------------------------------
SOURCE = '''
def add_config(cfg):
    """Doc."""
    # --- first part -------------------
    cfg.a = 1  # one
    cfg.b = CN()  # a node
    cfg.b.c = (
        "x"  # inside
    )
    cfg.b.d = ["#", 2]  # a list |
    # that goes on
    # over lines
    # --- second part ---
    cfg.e = 3
    other = 4  # not a key
    return cfg
'''


def test_comments_of_a_source():
    assert read_comments(SOURCE) == {
        "a": ("one", "first part"),
        "b": ("a node", "first part"),
        "b.c": ("inside", "first part"),
        "b.d": ("a list | that goes on over lines", "first part"),
        "e": ("", "second part"),
    }


def test_sources_of_methods_are_read(tmp_path, monkeypatch):
    import relreid_plugin.config.explain as module

    (tmp_path / "config").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.py").write_text("def add_config(cfg):\n    cfg.use_gpu = True  # by the method\n")
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    assert key_sources() == [tmp_path / "config" / "defaults.py", tmp_path / "mine" / "config.py"]
    keys = {key.name: key for key in explain_keys(get_default_config(), key_sources()[1:])}
    assert keys["use_gpu"].comment == "by the method" and keys["data.root"].comment == ""


def test_every_key_is_explained():
    cfg = load_config("magformer_embedded", ["relation.k", "7"])
    keys = {key.name: key for key in explain_keys(cfg)}
    assert keys.keys() == _flat(cfg).keys()
    declared = {}
    for path in key_sources():
        declared.update(read_comments(path.read_text(encoding="utf-8")))
    assert set(_flat(cfg)) <= set(declared)
    assert keys["relation.k"].changed and (keys["relation.k"].value, keys["relation.k"].default) == (7, 20)
    assert keys["relation.k"].comment == "neighbours per image" and "relation encoder" in keys["relation.k"].section
    assert not keys["relation.landmark_seed"].changed
    assert "camera-first" in keys["data.name_pattern"].comment  # goes on in a line of its own
    assert "identity (values and outputs" in keys["relation.init"].comment
    silent = [name for name, key in keys.items() if not key.comment]
    assert len(silent) < 0.3 * len(keys)


def test_explain_prints_keys_comments_defaults_and_values(capsys):
    assert main(["config", "magformer_embedded", "relation.k", "7", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "* relation.k: 7 (default: 20)\n      neighbours per image\n" in text
    assert "  relation.landmark_seed: 0\n" in text and "--- relation encoder" in text
    assert max(map(len, explained(get_default_config(), 60).splitlines()[:200])) < 200


def test_printed_configurations_are_configurations(tmp_path, capsys):
    assert main(["config", "magformer_embedded", "train.max_epoch", "3"]) == 0
    path = tmp_path / "own.yml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config("magformer_embedded", ["train.max_epoch", "3"])
    assert main(["config", "defaults"]) == 0
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == get_default_config()
    assert main(["config", "magformer_embedded", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()) == packaged_folder() / "magformer_embedded.yml"
    assert main(["config", "magformer_embedded", "train.max_epochs", "3"]) == 2
    assert "did you mean 'train.max_epoch'?" in capsys.readouterr().err


def test_names_are_found_in_a_fresh_process():
    """The first import of all may be that of a name, before its module was imported by anything else."""
    code = "from relreid_plugin.config import load_config; print(load_config('osnet_embedded').model.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "osnet_x0_25\n", done.stderr
