"""``relreid doctor``: what is there, what is not, and what to do about it."""

from __future__ import annotations

import sys
from importlib import metadata

import numpy as np
import pytest

from relreid_plugin.cli import doctor
from relreid_plugin.cli.main import main


@pytest.fixture
def installed(monkeypatch):
    """Let other packages be installed than those that are."""

    def take(**versions):
        def version(name):
            if name in versions:
                return versions[name]
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(doctor.metadata, "version", version)

    return take


def test_a_whole_installation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--config-file", "magformer_embedded"]) == 0
    out = capsys.readouterr().out
    for line in ("ok       torch ", "ok       torchreid ", "ok       data set     'embedded_persons'"):
        assert line in out
    assert out.rstrip().endswith("everything that training needs is there")


def test_missing_data_and_weights(tmp_path, capsys):
    weights = tmp_path / "none.pth"
    arguments = ["--config-file", "magformer", "--root", str(tmp_path), "backbone.weights", str(weights)]
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: missing: data set, weights; the lines above say what to do.\n"
    assert "missing  data set     data set 'market1501' was looked for at" in captured.out
    assert f"missing  weights      'backbone.weights' names '{weights}', which does not exist" in captured.out
    weights.write_bytes(b"")
    main(["doctor", *arguments])
    assert f"ok       weights      'backbone.weights' is '{weights}'" in capsys.readouterr().out


def test_features_are_looked_for_as_files(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", features=np.eye(3))
    words = ["doctor", "--config-file", "magformer_features.yml", "--root", str(tmp_path), "data.sources", "['a.npz']"]
    assert main([*words, "data.targets", "['a.npz+b.npz']"]) == 2
    said = capsys.readouterr().out
    assert f"ok       features     '{tmp_path / 'a.npz'}'\n" in said
    assert "missing  features     'b.npz' holds no features; name a store" in said
    assert main([*words, "data.targets", "['a.npz']"]) == 0


@pytest.mark.parametrize("several", [True, False])
def test_the_registry_says_how_a_data_set_is_read(monkeypatch, several):
    from relreid_plugin import methods
    from relreid_plugin.config import load_config
    from relreid_plugin.host import datasets

    seen = []
    monkeypatch.setattr(datasets, "resolve_dataset", lambda name, root, **options: seen.append(options["multimodal"]))
    monkeypatch.setattr(methods, "several_models", lambda: ("bnneck_baseline",) if several else ())
    assert [finding.state for finding in doctor.check_config(load_config("magformer_embedded"))] == ["ok"]
    assert seen == [several]


def test_a_wrong_key_is_one_sentence(capsys):
    assert main(["doctor", "data.rot", "x"]) == 2
    captured = capsys.readouterr()
    assert "did you mean 'data.root'?" in captured.err and not captured.out


def test_packages_that_overwrite_each_other(installed):
    installed(**{"faiss-cpu": "1.8", "faiss-gpu-cu12": "1.8"})
    (finding,) = doctor.check_faiss()
    assert finding.state == "note" and "faiss-cpu 1.8 and faiss-gpu-cu12 1.8 overwrite each other" in finding.text
    installed(**{"opencv-python": "4.9", "opencv-python-headless": "4.9"})
    first, *_ = doctor.check_host()
    assert first.what == "opencv" and "uninstall all but one" in first.text


@pytest.mark.parametrize(
    ("gone", "check", "state", "sentence"),
    [
        ("faiss", doctor.check_faiss, "note", "pip install faiss-cpu"),
        ("torchreid", doctor.check_host, "missing", "pip install torchreid==0.2.5"),
        ("h5py", doctor.check_host, "missing", "pip install h5py"),
        ("cv2", doctor.check_host, "missing", "pip install opencv-python-headless"),
        ("torchvision", doctor.check_python, "missing", "pip install torchvision"),
    ],
)
def test_what_is_not_installed(installed, monkeypatch, gone, check, state, sentence):
    found = doctor.is_installed
    monkeypatch.setattr(doctor, "is_installed", lambda name: name != gone and found(name))
    installed(torch="2")
    finding = next(each for each in check() if each.state != "ok")
    assert finding.state == state and sentence in finding.text


def test_faiss_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr(doctor, "is_installed", lambda name: True)
    monkeypatch.setitem(sys.modules, "faiss", None)
    (finding,) = doctor.check_faiss()
    assert finding.state == "note" and "'faiss-cpu'" in finding.text and "pip install" in finding.text


def test_data_and_weights(tmp_path, monkeypatch):
    (none,) = doctor.check_data(str(tmp_path / "none"))
    assert none.state == "note" and "does not exist" in none.text
    (empty,) = doctor.check_data(str(tmp_path))
    assert empty.state == "note" and "no data set" in empty.text
    (tmp_path / "viper").mkdir()
    (tmp_path / "own.csv").write_text("")
    (some,) = doctor.check_data(str(tmp_path))
    assert some.state == "ok" and "own.csv, viper" in some.text
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (weights,) = doctor.check_weights()
    assert weights.state == "note" and "backbone.weights" in weights.text
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet50.pth").write_text("")
    (weights,) = doctor.check_weights()
    assert weights.state == "ok" and weights.text == "resnet50.pth"
