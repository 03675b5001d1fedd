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


def needs_build(test):
    """Marks a test that builds: slow, and not without what builds."""
    lacking = find_spec("build") is None or find_spec("setuptools") is None
    return pytest.mark.slow(pytest.mark.skipif(lacking, reason="needs build and setuptools")(test))


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
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "relreid_plugin").rglob("templates/*")}
    assert len(templates) > 2 and extra == {"relreid_plugin/py.typed", "relreid_plugin/serve/page.html", *templates}
    assert any(name.endswith("LICENSE") for name in names)


@needs_build
def test_the_sdist_is_complete(dist):
    names = {name.partition("/")[2] for name in tarfile.open(dist[0]).getnames()}
    wanted = set(BUILT) | {"Makefile"}
    for pattern in ("configs/*.yml", "tools/*.py", "tests/**/*.py", "benchmarks/*", "docs/**/*", "relreid_plugin/**/*.py"):
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
    parts = ["train", "faiss-cpu", "figures", "parquet", "export", "report", "serve", "tune"]
    assert set(requirements(parts)) == set(requirements(["all"])) <= set(requirements(["dev"]))


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


MANY = """
import sys
from relreid_plugin.cli.main import main
for line in sys.argv[1].splitlines():
    code = main(line.split())
    if code:
        sys.exit(f"{line}: {code}")
"""
COMMANDS = """
test --config-file run/config.yml
extract run store reid-data/embedded_persons_tiny/Market-1501-v15.09.15/bounding_box_test
refine run store
search run store reid-data/embedded_persons_tiny/Market-1501-v15.09.15/query --relations --out found
figures run --out drawn
data make-embedded --name embedded_vehicles_tiny
stats --name embedded_vehicles_tiny
data convert folders photos converted
""".strip()


ALL = """
extract run store reid-data/embedded_persons_tiny/Market-1501-v15.09.15/bounding_box_test
extract run feats.npz --target embedded_persons_tiny --split all
evaluate feats.npz --json scores.json
calibrate --on feats.npz --out verifier.json
compare IMAGE OTHER --model run --verifier verifier.json
delete store 1
diagnose run
report run feats.npz --out report.html
export run --to torchscript --out model.pt --target embedded_persons_tiny --most 16
package run --out packed --licence MIT
ladder --config-file run/config.yml --rungs nformer --rivals aqe --seeds 1,2 data.save_dir rungs
compare-runs rungs/ladder/nformer-seed1 rungs/ladder/nformer-seed2
tune --config-file run/config.yml --search train.lr=0.001,0.003 --trials 2 --folds 2 --out tuned --opts train.batch_size 8
tables rib --config-file rib_dcs_vit_embedded.yml --seeds 1 --out rib --opts SMALL
sweep --config-file rib_dcs_vit_embedded.yml --etas 0.5,1 --out eta --opts SMALL
gradcam RIB=eta/eta1-seed1 --shown 2 --count 8 --out cam
occlusion RIB=eta/eta1-seed1 --fractions 0.5 --out covered
information RIB=eta/eta1-seed1 --out bound
tables graft fusion --config-file graft_embedded.yml --seeds 1 --out graft --opts VIEWS
train --config-file graft_embedded.yml VIEWS data.save_dir views
prune views --targets 0.9 --epochs 1
data show embedded_persons_tiny --root reid-data --out sheet.png
configs
config magformer_embedded.yml
doctor
""".strip()
WORDS = {
    "SMALL": "data.sources ['embedded_persons_tiny'] data.targets ['embedded_persons_tiny'] data.workers 0 vit.depth 2 "
    "train.max_epoch 4 train.warmup_epochs 0 train.batch_size 24 vit.patch_size 16",
    "VIEWS": "data.sources ['embedded_vehicles_tiny'] data.targets ['embedded_vehicles_tiny'] data.workers 0 backbone.name "
    "timm:test_vit vit.patch_size 16 vit.depth 1 data.height 32 data.width 64 train.max_epoch 1 graft.finetune.max_epoch 1 "
    "graft.heads 2 graft.feedforward 16 train.batch_size 24",
}
ELSEWHERE = {
    "serve": "tests/serve",
    "splits": "needs VIPeR or CUHK03; tests/experiments",
    "copy": "needs Milvus; tests/search/test_milvus.py",
}


@pytest.fixture(scope="module")
def wheel(dist, tmp_path_factory):
    """What calls programs outside of any clone, in an environment of its own with this one's libraries and the wheel."""
    place = tmp_path_factory.mktemp("wheel")
    venv.create(place / "env", with_pip=False, symlinks=True)
    site = next((place / "env" / "lib").glob("python*/site-packages"))
    libraries = Path(__import__("torch").__file__).parents[1]
    (site / "libraries.pth").write_text(f"{libraries}\n")
    programs, work = place / "env" / "bin", place / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(programs / "python"),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run([*pip, str(dist[1])], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr

    def call(program, *arguments):
        command = [str(programs / program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment, timeout=900)

    return call, work, site


@pytest.fixture(scope="module")
def trained(wheel):
    """What a run of both stages by the wheel's command printed; it lies in ``run``."""
    call, work, _ = wheel
    small = (
        "train.max_epoch 1 train.batch_size 24 relation.train.max_epoch 1 relation.train.steps_per_epoch 2 data.workers 0 "
        "data.height 64 data.width 32 backbone.name timm:test_resnet backbone.output_stride 0 test.rivals []"
    )
    tiny = ["-s", "embedded_persons_tiny", "-t", "embedded_persons_tiny", "data.save_dir", "run", *small.split()]
    done = call("relreid", "train", "--config-file", "magformer_embedded.yml", *tiny)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_build
def test_the_wheel_works_outside_of_a_clone(wheel, trained):
    """The command, configurations, and a run from end to end."""
    call, work, site = wheel
    where = call("relreid", "config", "magformer_embedded", "--path").stdout.strip()
    assert where == str(site / "relreid_plugin" / "configs" / "magformer_embedded.yml")
    assert len(call("relreid", "configs").stdout.splitlines()) == len(list((ROOT / "configs").glob("*.yml")))
    assert "neighbours per image" in call("relreid", "config", "magformer_embedded.yml", "--explain").stdout
    assert call("relreid", "doctor").returncode == 0
    assert "+ MagFormer" in trained and (work / "run" / "metrics.json").is_file()
    for name in ("a", "b", "c"):
        (work / "photos" / name).mkdir(parents=True)
        for number, path in zip(range(2), sorted((work / "reid-data").rglob("query/*.jpg"))):
            shutil.copy(path, work / "photos" / name / f"{number}.jpg")
    done = call("python", "-c", MANY, COMMANDS)
    assert done.returncode == 0, done.stderr
    assert "+ MagFormer" in done.stdout and "multimodal" in done.stdout
    for made in ("found/ranking.json", "found/ranking.png", "drawn/tsne.png", "converted/query"):
        assert (work / made).exists(), made


@needs_build
@pytest.mark.long
def test_every_subcommand_works_from_the_wheel(wheel, trained):
    """But those that need more than the wheel brings, and those of the test above."""
    from relreid_plugin.cli.main import COMMANDS as listed

    call, work, _ = wheel
    lines = [*ALL.splitlines(), *COMMANDS.splitlines()]
    assert {name for name in listed if not any(line.startswith(f"{name} ") or line == name for line in lines)} == {
        *ELSEWHERE
    }
    first, second = sorted((work / "reid-data").rglob("query/*.jpg"))[:2]
    words = {**WORDS, "IMAGE": str(first), "OTHER": str(second)}
    text = "\n".join(" ".join(words.get(word, word) for word in line.split()) for line in ALL.splitlines())
    done = call("python", "-c", MANY, text)
    assert done.returncode == 0, done.stderr[-3000:]
    for made in ("report.html", "model.pt", "packed/model.safetensors", "tuned/best.yml", "rib/rib.md", "eta/eta.png"):
        assert (work / made).exists(), (made, sorted(path.name for path in work.iterdir()))
