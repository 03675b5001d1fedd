"""What the sdist and the wheel hold, what they ask for, and that the wheel works outside of any clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path

import pytest
from oldest import lowest, requirements

ROOT = Path(__file__).resolve().parents[2]
BUILT = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
)
needs_build = pytest.mark.skipif(
    find_spec("build") is None or find_spec("setuptools") is None, reason="needs build and setuptools"
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """sdist and wheel of a copy of the tree, without network."""
    copy = tmp_path_factory.mktemp("tree") / "clone"
    copy.mkdir()
    for name in (*BUILT, "Makefile"):
        shutil.copy2(ROOT / name, copy / name)
    for name in ("relreid_plugin", "configs", "tools", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@needs_build
def test_the_wheel_is_complete(dist):
    names = set(zipfile.ZipFile(dist[1]).namelist())
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "relreid_plugin").rglob("*.py") if "__pycache__" not in str(path)}
    configs = {f"relreid_plugin/configs/{path.name}" for path in (ROOT / "configs").glob("*.yml")}
    assert len(configs) > 30 and own | configs | {"relreid_plugin/py.typed"} <= names
    extra = {name for name in names - own - configs if ".dist-info/" not in name}
    assert extra == {"relreid_plugin/py.typed"}
    assert any(name.endswith("LICENSE") for name in names)


@needs_build
def test_the_sdist_is_complete(dist):
    names = {name.partition("/")[2] for name in tarfile.open(dist[0]).getnames()}
    wanted = set(BUILT) | {"Makefile"}
    for pattern in ("configs/*.yml", "tools/*.py", "tests/**/*.py", "benchmarks/*.py", "docs/*", "relreid_plugin/**/*.py"):
        wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()}
    assert {name for name in wanted if "__pycache__" not in name} <= names


@needs_build
def test_twine_finds_nothing(dist):
    pytest.importorskip("twine")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@needs_build
def test_metadata(dist):
    wheel = zipfile.ZipFile(dist[1])
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    text = message_from_string(wheel.read(name).decode("utf-8"))
    readme = text.get_payload()
    assert not re.search(r"!\[[^\]]*\]\((?!https?://)", readme)  # pictures that a package index cannot show
    assert "## " in readme and "magformer_embedded" in readme
    base = [line for line in text.get_all("Requires-Dist") if "extra ==" not in line]
    assert any(line.startswith("torch>=2.6") for line in base)
    assert not any(re.match(r"(torchreid|opencv|faiss)", line) for line in base)
    entry = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
    assert "relreid = relreid_plugin.cli.main:main" in entry


def test_extras_do_not_contradict_each_other():
    for extra in ("train", "figures", "all", "dev", "faiss-cpu", "faiss-gpu"):
        names = [re.match(r"[\w.-]+", line).group() for line in requirements([extra])]
        assert len([name for name in names if name.startswith("faiss")]) <= 1, extra
        assert len([name for name in names if name.startswith("opencv")]) <= 1, extra
    everything = set(requirements(["all"]))
    assert set(requirements(["train", "faiss-cpu", "figures"])) == everything <= set(requirements(["dev"]))


def test_the_sentence_installs_what_the_extra_does():
    from relreid_plugin.errors import INSTALL_HOST

    named = {re.match(r"[\w-]+", word).group() for word in INSTALL_HOST.split()[2:]}
    listed = {re.match(r"[\w-]+", line).group() for line in requirements(["train"])}
    assert "torchreid==0.2.5" in INSTALL_HOST.split() and named <= listed
    assert {re.match(r"[\w-]+", line).group() for line in set(requirements(["train"])) - set(requirements([]))} <= named


def test_lower_bounds():
    assert lowest("torch>=2.6") == "torch==2.6.*" and lowest("timm>=1.0.26") == "timm==1.0.26"
    assert lowest("torchreid==0.2.5") == "torchreid==0.2.5"
    assert all(lowest(line) for line in requirements(["all", "dev"]))


@needs_build
def test_the_wheel_works_outside_of_a_clone(dist, tmp_path):
    """In an environment of its own, with this one's libraries: the command, configurations, and a run."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    libraries = Path(__import__("torch").__file__).parents[1]
    (site / "libraries.pth").write_text(f"{libraries}\n")
    zipfile.ZipFile(dist[1]).extractall(site)
    python = str(tmp_path / "env" / "bin" / "python")
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def relreid(*arguments):
        command = [python, "-m", "relreid_plugin", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment, timeout=400)

    where = relreid("config", "magformer_embedded", "--path").stdout.strip()
    assert where == str(site / "relreid_plugin" / "configs" / "magformer_embedded.yml")
    assert len(relreid("configs").stdout.splitlines()) == len(list((ROOT / "configs").glob("*.yml")))
    assert "neighbours per image" in relreid("config", "magformer_embedded.yml", "--explain").stdout
    assert relreid("doctor").returncode == 0
    small = [
        "train.max_epoch",
        "1",
        "relation.train.max_epoch",
        "1",
        "relation.train.steps_per_epoch",
        "2",
        "data.workers",
        "0",
    ]
    tiny = ["-s", "embedded_persons_tiny", "-t", "embedded_persons_tiny", "data.save_dir", "run", *small]
    done = relreid("train", "--config-file", "magformer_embedded.yml", *tiny)
    assert done.returncode == 0, done.stderr
    assert "+ MagFormer" in done.stdout and (work / "run" / "metrics.json").is_file()
    again = relreid("test", "--config-file", "run/config.yml")
    assert again.returncode == 0 and "+ MagFormer" in again.stdout
