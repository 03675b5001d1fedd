"""Features, metrics, relations and search where neither torchreid nor OpenCV nor faiss is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import sys
class Block:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
BLOCKED = ("torchreid", "cv2", "faiss", "gdown", "tensorboard", "h5py", "imageio", "six")
sys.meta_path.insert(0, Block)
for name in BLOCKED: sys.modules.pop(name, None)
"""


def alone(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        timeout=300,
    )


USE = """
import importlib, pkgutil
import numpy as np, torch
import relreid_plugin

for room in ("metrics", "features", "config", "data", "backbones"):
    package = importlib.import_module(f"relreid_plugin.{room}")
    for found in pkgutil.walk_packages(package.__path__, f"relreid_plugin.{room}."):
        importlib.import_module(found.name)
from relreid_plugin.features.sets import FeatureSet
from relreid_plugin.magformer.attention import RelationBlock
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.metrics.expansion import average_query_expansion
from relreid_plugin.metrics.neighbours import SearchConfig, faiss_available, topk_neighbours
from relreid_plugin.metrics.ranking import evaluate_features
from relreid_plugin.metrics.reranking import k_reciprocal_rerank_features
from relreid_plugin.rib import bound, dcs, gate, transreid
from relreid_plugin.graft import ffd, model, packing
from relreid_plugin.search import FeatureStore, GallerySearcher, StoreWriter

assert not faiss_available()
torch.manual_seed(0)
centres = torch.randn(6, 16)
gallery = torch.nn.functional.normalize(centres.repeat_interleave(8, 0) + 0.1 * torch.randn(48, 16), dim=1)
pids, camids = np.repeat(np.arange(6), 8), np.tile(np.arange(8), 6)
query = gallery[::8]
rest = np.arange(48) % 8 != 0
result = evaluate_features(query, gallery[rest], pids[::8], pids[rest], camids[::8], camids[rest])
assert result.mAP == 1.0, result
encoder = RelationEncoder(16, 6, attention="magformer", num_layers=1, k=5).eval()
with torch.no_grad():
    states = encoder.refine_gallery(gallery[rest])
    refined = encoder.refine_queries(query, states)
assert states.refined.shape == (42, 16) and refined.shape == (6, 16)
print("used", sorted(name for name in sys.modules if name.partition(".")[0] in BLOCKED))
"""


def test_what_needs_no_host():
    done = alone(USE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "used []"


SEARCH = """
from pathlib import Path
import numpy as np, torch
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.search import FeatureStore, GallerySearcher, StoreWriter

folder = Path(sys.argv[1])
features = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
with StoreWriter(folder, dim=8, model="m") as writer:
    writer.add(features, paths=[f"{row}.jpg" for row in range(40)])
encoder = RelationEncoder(8, 3, num_layers=1, k=5).eval()
for relations in (None, encoder):
    searcher = GallerySearcher(FeatureStore(folder), encoder=relations, model="m")
    if relations is not None:
        searcher.refine()
    searcher.update()
    found = searcher.search(features[:5], 3, rerank=0 if relations is not None else 10)
    assert found.rows.shape == (5, 3)
found = GallerySearcher(FeatureStore(folder), model="m").search(features[:5], 3)
print(found.rows[:, 0].tolist())
"""


def test_galleries_on_disk_need_no_host(tmp_path):
    done = alone(SEARCH, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[0, 1, 2, 3, 4]"
    assert alone("from relreid_plugin.search import FeatureExtractor").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--config-file", "magformer_embedded"], "torchreid is not installed; run 'pip install torchreid==0.2.5 "),
        (["extract", "RUN", "STORE", "x.jpg"], "torchreid is not installed; run 'pip install torchreid==0.2.5 "),
        (["doctor"], "missing: torchreid; the lines above say what to do."),
        (["train", "data.rot", "x"], "did you mean 'data.root'?"),
    ],
)
def test_commands_say_what_to_install(tmp_path, arguments, sentence):
    done = alone("from relreid_plugin.cli.main import main; sys.exit(main(sys.argv[1:]))", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr and done.stderr.count("\n") == 1
    if arguments == ["doctor"]:
        assert "missing  torchreid" in done.stdout and "note     faiss" in done.stdout and "pip install" in done.stdout


def test_convert_and_configs_need_no_host(tmp_path):
    done = alone(
        "from relreid_plugin.cli.main import main; sys.exit(main(['config', 'magformer', '--explain']))", cwd=tmp_path
    )
    assert done.returncode == 0 and "* relation.attention: 'magformer'" in done.stdout
