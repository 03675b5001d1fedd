"""What works where torchreid, or a package that one command needs, is not installed; and what the other commands say.

An import hook hides the packages. The cases share one process that has imported torch, and fork from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

BLOCK = """
import sys

class Hiding:
    # a finder without some packages

    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

def block(names):
    assert not [name for name in names if name in sys.modules], names
    sys.meta_path[:] = [Hiding(finder, names) for finder in sys.meta_path]
"""
HOST = ("torchreid", "cv2", "gdown", "tensorboard", "h5py", "imageio", "six")
ALL = (*HOST, "faiss", "sklearn", "pytorch_grad_cam")


def alone(code: str, *arguments: str, blocked=ALL, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, without some packages."""
    return subprocess.run(
        [sys.executable, "-c", f"{BLOCK}\nblock({tuple(blocked)!r})\n{code}", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        timeout=300,
    )


# --- commands -----------------------------------------------------------------------------------------------------------
SERVE = (
    BLOCK
    + """
import contextlib, io, json, os
import torch, torchvision, scipy.sparse

for number, (blocked, words) in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        continue
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        block(blocked)
        from relreid_plugin.cli.main import main
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    with open(f"{number}.json", "w") as file:
        json.dump([code, out.getvalue(), err.getvalue()], file)
    os._exit(0)
"""
)
NO_HOST = "torchreid is not installed; run 'pip install torchreid==0.2.5 "
TRAIN = ("train", "--config-file", "magformer_embedded")
EXTRACT = ("extract", "host:osnet_x0_25", "STORE", "x.jpg", "--weights", "x.jpg")
SAID = [  # what is not there, the command, its code, and what is said on standard error or, with 0, on standard output
    (HOST, TRAIN, 2, NO_HOST),
    (HOST, EXTRACT, 2, NO_HOST),
    (HOST, ("doctor",), 2, "missing: torchreid; the lines above say what to do."),
    (HOST, ("train", "data.rot", "x"), 2, "did you mean 'data.root'?"),
    (HOST, ("config", "magformer", "--explain"), 0, "* relation.attention: 'magformer'"),
    (["torchreid"], TRAIN, 2, NO_HOST),
    (["torchreid"], ("prune", "RUN"), 2, NO_HOST),
    (["tensorboard"], TRAIN, 2, "torchreid needs the package 'tensorboard'; run 'pip install tensorboard'."),
    (["tensorboard"], EXTRACT, 2, "'pip install tensorboard'."),
    (["tensorboard"], ("doctor",), 2, "missing: torchreid;"),
    (["cv2"], TRAIN, 2, "torchreid needs the package 'opencv-python-headless'; run 'pip install opencv-python-headless'."),
    (["cv2"], EXTRACT, 2, "'pip install opencv-python-headless'."),
    (["cv2"], ("doctor",), 2, "missing: torchreid;"),
    (["faiss"], ("doctor",), 0, "note     faiss        is not installed: neighbours are searched exactly by torch"),
    (["faiss", "sklearn", "pytorch_grad_cam"], ("figures", "RUN"), 2, "run folder 'RUN' does not exist"),
    (["shtab"], ("--print-completion", "bash"), 2, "the package 'shtab', which is not installed; run 'pip install shtab'."),
    (["yaml"], ("config", "magformer"), 2, "the package 'PyYAML', which is not installed; run 'pip install PyYAML'."),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Code, standard output and standard error of every case, and what lies in the folder afterwards."""
    folder = tmp_path_factory.mktemp("alone")
    Image.new("RGB", (8, 16)).save(folder / "x.jpg")
    cases = json.dumps([[blocked, words] for blocked, words, *_ in SAID])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SERVE, cases], capture_output=True, text=True, env=environment, cwd=folder, timeout=300
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("number", range(len(SAID)), ids=[f"{case[1][0]}-without-{case[0][0]}" for case in SAID])
def test_commands_say_what_to_install(answers, number):
    blocked, words, code, sentence = SAID[number]
    found, out, err = json.loads((answers / f"{number}.json").read_text())
    assert found == code, err
    if code:
        assert sentence in err and err.startswith("error: ") and err.count("\n") == 1
    else:
        assert sentence in out and not err
    if words == ("doctor",) and blocked == HOST:
        assert "missing  torchreid" in out and "pip install" in out


def test_nothing_is_written_by_a_command_that_cannot_work(answers):
    assert {path.name for path in answers.iterdir()} == {"x.jpg", *(f"{number}.json" for number in range(len(SAID)))}


# --- features, metrics, relations, search -------------------------------------------------------------------------------
USE = """
import importlib, pkgutil
from pathlib import Path
import numpy as np, torch
import relreid_plugin

for room in ("metrics", "features", "config", "data", "backbones"):
    package = importlib.import_module(f"relreid_plugin.{room}")
    for found in pkgutil.walk_packages(package.__path__, f"relreid_plugin.{room}."):
        importlib.import_module(found.name)
from relreid_plugin.features.sets import Features
from relreid_plugin.magformer.attention import RelationBlock
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.metrics.expansion import average_query_expansion
from relreid_plugin.metrics.neighbours import SearchConfig, build_faiss_index, faiss_available
from relreid_plugin.metrics.ranking import evaluate_features
from relreid_plugin.metrics.reranking import k_reciprocal_rerank_features
from relreid_plugin.metrics.rivals import RIVALS
from relreid_plugin.rib import bound, dcs, gate, transreid
from relreid_plugin.graft import ffd, model
from relreid_plugin.search import FeatureStore, GallerySearcher, StoreWriter
from relreid_plugin.errors import UserError

torch.manual_seed(0)
centres = torch.randn(6, 16)
images = torch.nn.functional.normalize(centres.repeat_interleave(8, 0) + 0.1 * torch.randn(48, 16), dim=1)
pids, camids = np.repeat(np.arange(6), 8), np.tile(np.arange(8), 6)
query, rest = images[::8], np.arange(48) % 8 != 0
gallery = images[rest]
result = evaluate_features(query, gallery, pids[::8], pids[rest], camids[::8], camids[rest])
assert result.mAP == 1.0, result
assert (k_reciprocal_rerank_features(query, gallery, k1=5).argmin(1) // 7 == np.arange(6)).all()
expanded = average_query_expansion(query, gallery, k=2)
assert expanded.shape == query.shape
encoder = RelationEncoder(16, 6, attention="magformer", num_layers=1, k=5).eval()
with torch.no_grad():
    states = encoder.refine_gallery(gallery)
    refined = encoder.refine_queries(query, states)
assert states.refined.shape == (42, 16) and refined.shape == (6, 16)

with StoreWriter(Path(sys.argv[1]), dim=16, model="m") as writer:
    writer.add(gallery, paths=[f"{row}.jpg" for row in range(42)])
for relations in (None, encoder):
    searcher = GallerySearcher(FeatureStore(Path(sys.argv[1])), encoder=relations, model="m")
    if relations is not None:
        searcher.refine()
    searcher.update()
    found = searcher.search(query, 7, rerank=0 if relations is not None else 10)
    assert (found.rows // 7 == np.arange(6)[:, None]).all(), found.rows
assert not faiss_available()
try:
    GallerySearcher(FeatureStore(Path(sys.argv[1])), search=SearchConfig(index="hnsw"), model="m").update()
except UserError as error:
    print(error)
try:
    build_faiss_index(gallery, SearchConfig(index="hnsw"))
except UserError as error:
    print(error)
try:
    from relreid_plugin.search import FeatureExtractor

    torch.save({}, sys.argv[1] + ".pth")
    FeatureExtractor("host:osnet_x0_25", weights=sys.argv[1] + ".pth")
except UserError as error:
    print(error)
print("used", sorted(name for name in sys.modules if name.partition(".")[0] in sys.meta_path[0].names))
"""


def test_what_needs_no_host(tmp_path):
    done = alone(USE, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr[-2000:]
    approximate, index, extractor, used = done.stdout.splitlines()
    assert used == "used []"
    assert "run 'pip install faiss-cpu', or set 'relation.search.backend torch'" in approximate
    assert index == "an index of faiss needs the package 'faiss-cpu', which is not installed; run 'pip install faiss-cpu'."
    assert extractor.startswith(NO_HOST)


@pytest.mark.slow
def test_commands_over_a_run_say_what_to_install(tiny_run, tiny_root, tmp_path):
    """What needs no package is done; the sentence comes where one is needed."""
    photos = tiny_root / "embedded_persons_tiny" / "Market-1501-v15.09.15" / "query"
    run, out, store = str(tiny_run), str(tmp_path / "out"), str(tmp_path / "store")
    lines = [
        ["extract", run, store, str(photos)],
        ["search", run, store, str(photos), "--out", str(tmp_path / "found")],
        ["search", run, store, "--index", "hnsw"],
        ["figures", run, "--out", out],
        ["gradcam", run, "--out", out, "--count", "4", "--shown", "2"],
    ]
    code = (
        "import json\nfrom relreid_plugin.cli.main import main\nprint('@', [main(line) for line in json.loads(sys.argv[1])])"
    )
    done = alone(code, json.dumps(lines), blocked=["faiss", "sklearn", "pytorch_grad_cam"])
    assert done.stdout.rpartition("@ ")[2].strip() == "[0, 0, 2, 2, 2]", done.stderr
    index, space, cam = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "asks for faiss" in index and "which is not installed; run 'pip install faiss-cpu'" in index
    said = "needs the package '{0}', which is not installed; run 'pip install {0}'."
    assert space == "error: the feature-space figure " + said.format("scikit-learn")
    assert cam == "error: Grad-CAM " + said.format("grad-cam")
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("out/*.p*")) and (tmp_path / "found").is_dir()


# --- the sentences ------------------------------------------------------------------------------------------------------
def test_what_is_no_missing_package_stays_a_defect():
    from relreid_plugin.errors import explain, is_installed, needed

    assert explain(ModuleNotFoundError("x", name="relreid_plugin.metrics.nothing")) is None
    assert explain(ModuleNotFoundError("x", name="_sqlite3")) is None or "_sqlite3" not in sys.stdlib_module_names
    assert explain(ImportError("cannot import name 'x' from 'relreid_plugin.errors'", name="relreid_plugin.errors")) is None
    assert explain(ImportError("x")) is None
    assert "'scikit-learn', which is not installed" in explain(ModuleNotFoundError("x", name="sklearn"))
    broken = explain(ImportError("libGL.so.1: cannot open shared object file", name="cv2"))
    assert "'opencv-python-headless', which is installed and cannot be loaded (libGL.so.1" in broken
    assert needed("json.decoder", "x") is json.decoder
    assert is_installed("json") and not is_installed("no_such") and not is_installed("no_such.below")
