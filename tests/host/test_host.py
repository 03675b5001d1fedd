"""The door to torchreid: both layouts, registries, patches, data sets, data manager, optimisers, checkpoints."""

from __future__ import annotations

import importlib
import os
import pickle
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from relreid_plugin import host
from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.errors import UserError
from relreid_plugin.host import patches
from relreid_plugin.host.datasets import FolderDataset
from relreid_plugin.host.opening import is_writable, make_overlay
from relreid_plugin.host.registry import dataset_table, model_factory

REPO = Path(__file__).resolve().parents[2]
EMBEDDED_HINT = "--config-file magformer_embedded.yml"

host.apply_patches()
host.register_datasets()


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 255, (16, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def market(folder: Path, *, identities: int = 8, first: int = 1, cameras: int = 2, shots: int = 2, seed: int = 0) -> Path:
    """Write a data set in the layout of Market-1501: half of the identities train, the others test."""
    names = [
        (pid, f"{pid:04d}_c{camera}s1_{shot:06d}_00.jpg")
        for pid in range(first, first + identities)
        for camera in range(1, cameras + 1)
        for shot in range(shots)
    ]
    random.Random(seed).shuffle(names)
    for pid, name in names:
        if pid - first < identities // 2:
            split = "bounding_box_train"
        else:
            split = "query" if name.endswith("s1_000000_00.jpg") else "bounding_box_test"
        write_image(folder / split / name, pid)
    return folder


def viper(root: Path, people: int = 6) -> Path:
    for camera, angle in (("a", 45), ("b", 90)):
        for pid in range(people):
            write_image(root / "viper" / "VIPeR" / f"cam_{camera}" / f"{pid:03d}_{angle}.bmp", pid)
    return root


def config(root: Path, source: str | list[str] = "set", **changes: Any) -> Any:
    cfg = get_default_config()
    cfg.use_gpu = False
    cfg.data.root, cfg.data.workers = str(root), 0
    cfg.data.sources = cfg.data.targets = [source] if isinstance(source, str) else source
    cfg.data.height, cfg.data.width = 32, 16
    cfg.train.batch_size = 4
    for key, value in changes.items():
        node, leaf = key.split("__")
        cfg[node][leaf] = value
    return cfg


# --- finding the host ---------------------------------------------------------------------------------------------------


def fake_import(missing: str, answer: Exception | None = None) -> Any:
    def import_module(name: str) -> types.ModuleType:
        if name == missing or name.startswith(missing + "."):
            raise answer or ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return types.ModuleType(name)

    return import_module


def test_layouts() -> None:
    assert host.find_host(fake_import("nothing")).layout == "torchreid.reid"
    original = host.find_host(fake_import("torchreid.reid"))
    assert original.layout == "torchreid" and original.engine.__name__ == "torchreid.engine"


def test_torchreid_is_missing() -> None:
    with pytest.raises(UserError, match="torchreid is not installed; run 'pip install torchreid"):
        host.find_host(fake_import("torchreid"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'gdown'", name="gdown"), "needs the package 'gdown'; run 'pip install gdown'"),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), "'opencv-python-headless'; run 'pip install opencv"),
        (ImportError("libGL.so.1: cannot open shared object file", name="cv2"), r"could not be imported \(libGL\.so\.1"),
        (ModuleNotFoundError("No module named 'torchreid.data'", name="torchreid.data"), "is not the person re-identif"),
    ],
)
def test_a_dependency_is_missing(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message):
        host.find_host(fake_import("torchreid.reid", error))


SHIM = '''
"""The installed torchreid.reid.* under the names of torchreid 1.4.0, torchreid.*"""
import importlib, os, sys
_shim, _path = sys.modules.pop(__name__), list(sys.path)
sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
importlib.import_module("torchreid.reid")
_found = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchreid"}
sys.path[:] = _path
sys.modules[__name__] = _shim
for _name, _module in _found.items():
    if _name.startswith("torchreid.reid."):
        _new = "torchreid." + _name[len("torchreid.reid."):]
        sys.modules[_new] = _module
        if _new.count(".") == 1:
            setattr(_shim, _new.split(".")[1], _module)
__version__ = "1.4.0"
'''

USE_THE_HOST = """
import sys, warnings
warnings.simplefilter("error")
from relreid_plugin import host
warnings.simplefilter("default")
from relreid_plugin.config.defaults import get_default_config
host.register_datasets()
cfg = get_default_config()
cfg.data.root, cfg.data.sources, cfg.data.targets, cfg.data.workers = sys.argv[1], ["set"], ["set"], 0
cfg.data.height, cfg.data.width, cfg.train.batch_size, cfg.train.val_fraction = 64, 32, 4, 0.25
manager = host.build_datamanager(cfg, sys.argv[2])
model = host.build_model("osnet_x0_25", manager.num_train_pids, pretrained=False, use_gpu=False)
optimizer = host.build_optimizer(model, cfg)
scheduler = host.build_scheduler(optimizer, cfg)
engine = host.engine.ImageSoftmaxEngine(manager, model, optimizer=optimizer, scheduler=scheduler, use_gpu=False)
loss = engine.forward_backward(next(iter(manager.train_loader)))
print("FOUND", host.LAYOUT, host.VERSION, "torchreid.reid" in sys.modules, loss["loss"] > 0, len(manager.val_query) > 0)
"""


@pytest.mark.slow
@pytest.mark.long
def test_the_original_layout_for_real(tmp_path: Path) -> None:
    (tmp_path / "shim" / "torchreid").mkdir(parents=True)
    (tmp_path / "shim" / "torchreid" / "__init__.py").write_text(SHIM)
    market(tmp_path / "root" / "set", identities=12)
    path = os.pathsep.join([str(tmp_path / "shim"), str(REPO)])
    done = subprocess.run(
        [sys.executable, "-c", USE_THE_HOST, str(tmp_path / "root"), str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "FOUND torchreid 1.4.0 False True True"
    assert "Cython" not in done.stderr


# --- registries ---------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.body = nn.Linear(3, width)
        self.classifier = nn.Linear(width, 5)


def build_toy(num_classes: int, loss: str, pretrained: bool, use_gpu: bool, width: int = 2) -> nn.Module:
    return Toy(width)


def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.models, "__model_factory", dict(model_factory()))
    host.register_model("toy", build_toy)
    host.register_model("toy", build_toy)
    with pytest.raises(ValueError, match="'toy' is taken"):
        host.register_model("toy", lambda **_: nn.Identity())
    with pytest.raises(ValueError, match="'resnet50' is taken"):
        host.register_model("resnet50", build_toy)
    assert {"toy", "resnet50"} <= set(host.available_models())
    assert host.build_model("toy", 5, width=7).body.out_features == 7
    # the host's own models are not handed what they do not know
    assert host.build_model("squeezenet1_0", 5, pretrained=False, use_gpu=False, width=7).classifier.out_features == 5


def test_unknown_model_and_loss() -> None:
    with pytest.raises(UserError, match="'model.name' is 'resnet5'.*did you mean 'resnet50'"):
        host.build_model("resnet5", 5)
    with pytest.raises(UserError, match="'resnet18' does not know the loss 'hinge'"):
        host.build_model("resnet18", 5, loss="hinge", pretrained=False)


@pytest.mark.parametrize(
    "error", [URLError("no network"), RuntimeError("invalid hash value"), pickle.UnpicklingError("html")]
)
def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module(f"{host.LAYOUT}.models.resnet").model_zoo, "load_url", no_network)
    with pytest.raises(UserError, match=r"'resnet18' could not be fetched.*'model\.pretrained False'.*'model\.load_weights"):
        host.build_model("resnet18", 5, pretrained=True)


def test_an_error_of_the_model_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> nn.Module:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(host.models, "__model_factory", {"broken": broken})
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        host.build_model("broken", 5, pretrained=True)


def test_datasets_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.data.datasets, "__image_datasets", dict(dataset_table()))
    host.register_datasets()
    host.register_datasets()
    assert {"embedded_persons", "embedded_persons_tiny", "occluded_duke", "market1501"} <= set(
        host.available_image_datasets()
    )
    assert "mars" in host.available_video_datasets()
    with pytest.raises(ValueError, match="'occluded_duke' is taken"):
        host.register_image_dataset("occluded_duke", FolderDataset)


# --- patches ------------------------------------------------------------------------------------------------------------


def test_patches_are_applied_once() -> None:
    before = (host.data.Dataset.__add__, host.utils.read_image)
    host.apply_patches()
    assert before == (host.data.Dataset.__add__, host.utils.read_image)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_in_a_loader(tmp_path: Path, workers: int) -> None:
    market(tmp_path / "set")
    manager = host.build_datamanager(config(tmp_path, data__workers=workers, data__check_images="none"), tmp_path / "cache")
    bad = Path(manager.test_dataset["set"]["gallery"][0][0])
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        for _ in manager.test_loader["set"]["gallery"]:
            pass
    sentence = host.clean_worker_error(caught.value)
    assert sentence.startswith(f"image '{bad}' cannot be decoded (") and "\n" not in sentence
    assert sentence.endswith("; replace the file or take it out of the data set.")


def test_clean_worker_error_leaves_other_errors_alone() -> None:
    assert host.clean_worker_error(ValueError("plain words")) == "plain words"


class Counted(FolderDataset):
    """Reads a sample in its own way."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"img": self.factor * torch.ones(1), "pid": self.data[index][1]}


def test_sum_of_data_sets_keeps_k_tfm_and_class(tmp_path: Path) -> None:
    market(tmp_path / "one")
    market(tmp_path / "two", identities=6)
    plain = [FolderDataset(name, root=str(tmp_path), transform=np.asarray, k_tfm=3) for name in ("one", "two")]
    assert len(sum(plain)[0]["img"]) == 3 and len(sum(plain)) == 16 + 12 and sum(plain).num_train_pids == 7
    own = [Counted(name, root=str(tmp_path), k_tfm=2) for name in ("one", "two")]
    own[0].factor = 5
    assert sum(own)[0]["img"].item() == 5 and len(sum(own)) == 28
    mixed = own[0] + plain[1]
    assert type(mixed) is host.data.ImageDataset and mixed.k_tfm == 2


def test_cuhk03_metric_without_numpy_bool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np, "bool", raising=False)
    patches._patch_numpy_bool()
    # one gallery image per identity leaves nothing to chance: CMC and mAP follow from the order alone
    distances = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    ids, cameras = np.array([0, 1, 2]), np.array([1, 1, 1])
    cmc, mean_ap = host.metrics.evaluate_rank(distances, ids[:2], ids, 0 * ids[:2], cameras, use_metric_cuhk03=True)
    assert cmc.tolist() == [0.5, 1.0, 1.0] and mean_ap == pytest.approx(0.75)


# --- data sets by name --------------------------------------------------------------------------------------------------


def host_datasets() -> list[tuple[str, str]]:
    images = [(name, "image") for name, cls in dataset_table("image").items() if not issubclass(cls, FolderDataset)]
    images = [item for item in images if not item[0].startswith("embedded")]
    return [*images, ("occluded_duke", "image"), *((name, "video") for name in dataset_table("video"))]


@pytest.mark.parametrize(("name", "data_type"), host_datasets())
def test_a_data_set_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data_type: str) -> None:
    folder = tmp_path / dataset_table(data_type)[name].dataset_dir
    with pytest.raises(UserError) as caught:
        host.resolve_dataset(name, tmp_path, data_type=data_type)
    text = str(caught.value)
    assert f"'{folder}'" in text and f"should hold {folder.name}/" in text and EMBEDDED_HINT in text and "\n" not in text
    # nothing was made, downloaded or printed
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
    folder.mkdir()
    with pytest.raises(UserError, match="which does not exist"):
        host.resolve_dataset(name, tmp_path, data_type=data_type)


def test_names_that_match_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        host.resolve_dataset("markt1501", tmp_path)
    text = str(caught.value)
    assert "did you mean 'market1501'" in text and f"'{tmp_path / 'markt1501'}'" in text and EMBEDDED_HINT in text
    assert "bounding_box_train/" in text and "path,pid,camid,split" in text
    (tmp_path / "half" / "query").mkdir(parents=True)
    with pytest.raises(UserError, match="half', which lacks bounding_box_train, bounding_box_test"):
        host.resolve_dataset("half", tmp_path)
    with pytest.raises(UserError, match="no known video data set; did you mean 'mars'"):
        host.resolve_dataset("marss", tmp_path, data_type="video")


def test_a_download_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(host.data.datasets.dataset, "download_url", no_network)
    with pytest.raises(UserError, match=rf"'market1501'.*could not download it \(URLError.*{EMBEDDED_HINT}"):
        host.build_datamanager(config(tmp_path, "market1501", data__download=True), tmp_path / "cache")
    assert not (tmp_path / "market1501").exists()


def test_folder_and_table_by_name(tmp_path: Path) -> None:
    market(tmp_path / "shop")
    manager = host.build_datamanager(config(tmp_path, "shop"), tmp_path / "cache")
    rows = [
        f"shop/{split}/{path.name},{path.name.split('_')[0]},{int(path.name[6]) - 1},{name}"
        for split, name in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery"))
        for path in sorted((tmp_path / "shop" / split).iterdir())
    ]
    (tmp_path / "shop.csv").write_text("\n".join(["path,pid,camid,split", *rows]))
    table = host.build_datamanager(config(tmp_path, "shop.csv"), tmp_path / "cache")
    assert manager.train_loader.dataset.train == table.train_loader.dataset.train
    assert manager.test_dataset["shop"] == table.test_dataset["shop.csv"]
    absolute = host.build_datamanager(config(tmp_path / "elsewhere", str(tmp_path / "shop")), tmp_path / "cache")
    assert absolute.train_loader.dataset.train == manager.train_loader.dataset.train


def test_occluded_duke(tmp_path: Path) -> None:
    market(tmp_path / "Occluded_Duke", cameras=8)
    manager = host.build_datamanager(config(tmp_path, "occluded_duke"), tmp_path / "cache")
    assert manager.num_train_pids == 4 and manager.num_train_cams == 8
    assert {item[1] for item in manager.test_dataset["occluded_duke"]["query"]} == {5, 6, 7, 8}
    (tmp_path / "Occluded_Duke" / "query").rename(tmp_path / "queries")
    with pytest.raises(UserError, match=f"'occluded_duke' was looked for at '{tmp_path}/Occluded_Duke/query'"):
        host.build_datamanager(config(tmp_path, "occluded_duke"), tmp_path / "cache")


def test_the_same_name_under_another_root(tmp_path: Path) -> None:
    for number, identities in enumerate((8, 12)):
        market(tmp_path / str(number) / "again", identities=identities)
        manager = host.build_datamanager(config(tmp_path / str(number), "again"), tmp_path / "cache")
        assert manager.num_train_pids == identities // 2
    with pytest.raises(UserError, match="data set 'again' is neither registered"):
        host.build_datamanager(config(tmp_path, "again"), tmp_path / "cache")


def test_an_empty_split_of_a_host_data_set(tmp_path: Path) -> None:
    market(tmp_path / "market1501" / "Market-1501-v15.09.15")
    for path in (tmp_path / "market1501" / "Market-1501-v15.09.15" / "query").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"data set 'market1501': a split in '{tmp_path}/market1501' has no images"):
        host.build_datamanager(config(tmp_path, "market1501"), tmp_path / "cache")


def test_embedded_data_set_through_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[tuple[str, str]] = []

    def ensure_embedded(name: str, root: str) -> Path:
        rendered.append((name, str(root)))
        place = Path(root) / name / "Market-1501-v15.09.15"
        return place if place.exists() else market(place, identities=8)

    fake = types.ModuleType("relreid_plugin.data.embedded")
    fake.ensure_embedded = ensure_embedded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "relreid_plugin.data.embedded", fake)
    root = tmp_path / "reid-data"
    manager = host.build_datamanager(config(root, "embedded_persons_tiny"), tmp_path / "cache")
    assert set(rendered) == {("embedded_persons_tiny", str(root))} and manager.label_map[0] == "0001"
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    host.build_datamanager(config(locked, "embedded_persons_tiny"), tmp_path / "cache")
    assert rendered[-1] == ("embedded_persons_tiny", str(tmp_path / "cache")) and not list(locked.iterdir())


def test_host_reader_in_sorted_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    market(tmp_path / "market1501" / "Market-1501-v15.09.15", identities=40, first=900)
    import glob

    listing = glob.glob
    managers = []
    for seed in (0, 1):
        rng = random.Random(seed)

        def shuffled(pattern: str, rng: random.Random = rng) -> list[str]:
            found = sorted(listing(pattern))
            return rng.sample(found, len(found))

        monkeypatch.setattr(glob, "glob", shuffled)
        managers.append(host.build_datamanager(config(tmp_path, "market1501"), tmp_path / "cache"))
    first, second = managers
    assert first.train_loader.dataset.train == second.train_loader.dataset.train
    assert first.test_dataset == second.test_dataset
    assert all(first.label_map[label] == Path(path).name[:4] for path, label, *_ in first.train_loader.dataset.data)
    assert list(first.label_map.values()) == [f"{pid:04d}" for pid in range(900, 920)]


# --- VIPeR: split files and folders that must not be written to ---------------------------------------------------------


@pytest.fixture
def locked_viper(tmp_path: Path) -> Any:
    root = viper(tmp_path / "data")
    (root / "viper").chmod(0o555)
    yield root
    (root / "viper").chmod(0o755)


def test_viper_in_a_locked_folder(locked_viper: Path, tmp_path: Path) -> None:
    managers = []
    for number in range(2):
        np.random.seed(number)  # noqa: NPY002
        random.seed(number)
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        cfg = config(locked_viper, "viper")
        managers.append(host.build_datamanager(cfg, tmp_path / f"run{number}" / "cache"))
        assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    train = managers[0].train_loader.dataset.train
    assert train == managers[1].train_loader.dataset.train and len(train) == 6
    assert sorted(p.name for p in (locked_viper / "viper").iterdir()) == ["VIPeR"]
    assert all(path.startswith(str(locked_viper / "viper" / "VIPeR")) for path, *_ in train)
    assert managers[0].train_identities == [
        next(Path(path).name[:3] for path, label, *_ in train if label == number) for number in range(3)
    ]


def test_viper_in_an_open_folder_is_split_in_the_same_way(locked_viper: Path, tmp_path: Path) -> None:
    locked = host.build_datamanager(config(locked_viper, "viper"), tmp_path / "cache").train_loader.dataset.train
    (locked_viper / "viper").chmod(0o755)
    np.random.seed(99)  # noqa: NPY002
    opened = host.build_datamanager(config(locked_viper, "viper"), tmp_path / "other").train_loader.dataset.train
    assert (locked_viper / "viper" / "splits.json").is_file() and opened == locked


def test_a_stale_split_file(tmp_path: Path) -> None:
    root = viper(tmp_path / "old")
    host.build_datamanager(config(root, "viper"), tmp_path / "cache")
    root.rename(tmp_path / "new")
    with pytest.raises(UserError, match=rf"\*\.json\) in '{tmp_path}/new/viper' name images at another place .*delete them"):
        host.build_datamanager(config(tmp_path / "new", "viper"), tmp_path / "cache")


def test_overlay(tmp_path: Path) -> None:
    (tmp_path / "set" / "sub").mkdir(parents=True)
    overlay = make_overlay(tmp_path / "set", tmp_path / "cache")
    assert overlay.name == "set" and (overlay / "sub").is_symlink()
    (overlay / "made.json").write_text("[]")
    (tmp_path / "set" / "new.txt").write_text("x")
    (tmp_path / "set" / "sub").rmdir()
    assert make_overlay(tmp_path / "set", tmp_path / "cache") == overlay
    assert sorted(entry.name for entry in overlay.iterdir()) == ["made.json", "new.txt"]
    # what was written at another place may name it: it goes
    (tmp_path / "cache").rename(tmp_path / "moved")
    moved = make_overlay(tmp_path / "set", tmp_path / "moved")
    assert sorted(entry.name for entry in moved.iterdir()) == ["new.txt"]
    (tmp_path / "set").chmod(0o555)
    assert not is_writable(tmp_path / "set") and is_writable(tmp_path)
    (tmp_path / "set").chmod(0o755)


def test_viper_split_id_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data set 'viper'.*split_id exceeds range"):
        host.build_datamanager(config(viper(tmp_path), "viper", data__split_id=20), tmp_path / "cache")


# --- data manager -------------------------------------------------------------------------------------------------------


def test_held_out_identities(tmp_path: Path) -> None:
    market(tmp_path / "set", identities=40)
    managers = [
        host.build_datamanager(config(tmp_path, train__val_fraction=0.25, train__seed=seed), tmp_path) for seed in (1, 1, 2)
    ]
    first, again, other = managers
    assert (
        (first.val_query, first.val_gallery) == (again.val_query, again.val_gallery) != (other.val_query, other.val_gallery)
    )
    held = {Path(item[0]).name[:4] for item in first.val_query + first.val_gallery}
    assert len(held) == 5 and first.num_train_pids == 15 and not held & set(first.train_identities)
    assert sorted(held | set(first.train_identities)) == [f"{pid:04d}" for pid in range(1, 21)]
    for path, label, *_ in first.train_loader.dataset.data:
        assert first.label_map[label] == Path(path).name[:4]
    assert len(first.train_loader.dataset) == 15 * 4
    batch = next(iter(first.val_loader["query"]))
    assert batch["impath"] == [item[0] for item in first.val_query][:100] and batch["img"].shape[1:] == (3, 32, 16)
    whole = host.build_datamanager(config(tmp_path), tmp_path)
    assert whole.val_query == [] and whole.val_loader is None and whole.num_train_pids == 20


def test_labels_of_several_sources(tmp_path: Path) -> None:
    market(tmp_path / "left", identities=6)
    market(tmp_path / "right", identities=8)
    cfg = config(tmp_path, ["left", "right"], train__val_fraction=0.3, data__k_tfm=2, train__batch_size=6)
    manager = host.build_datamanager(cfg, tmp_path)
    assert manager.num_train_pids == 5
    for path, label, *_ in manager.train_loader.dataset.data:
        place = Path(path)
        assert manager.label_map[label] == f"{place.parent.parent.name}/{place.name[:4]}"
    assert len(next(iter(manager.train_loader))["img"]) == 2  # k_tfm copies of the batch


def test_make_loader(tmp_path: Path) -> None:
    market(tmp_path / "set")
    manager = host.build_datamanager(config(tmp_path, data__k_tfm=2), tmp_path)
    data = list(reversed(manager.train_loader.dataset.train))[:7]
    batches = list(host.make_loader(manager, data, manager.transform_te, batch_size=3, workers=500))
    assert [len(batch["pid"]) for batch in batches] == [3, 3, 1]
    assert [path for batch in batches for path in batch["impath"]] == [item[0] for item in data]
    assert [pid for batch in batches for pid in batch["pid"].tolist()] == [item[1] for item in data]
    assert set(batches[0]) == {"img", "pid", "camid", "impath", "dsetid"}
    with Image.open(data[0][0]) as image:
        assert torch.equal(batches[0]["img"][0], manager.transform_te(image))
    assert manager.train_loader.dataset.k_tfm == 2 and len(manager.train_loader.dataset) == 16


def test_workers_are_capped() -> None:
    assert host.cap_workers(10_000) <= (os.cpu_count() or 1) and host.cap_workers(0) == 0


def test_a_training_set_smaller_than_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    market(tmp_path / "set")
    manager = host.build_datamanager(config(tmp_path, train__batch_size=64), tmp_path)
    assert [len(batch["pid"]) for batch in manager.train_loader] == [16]
    assert "less than train.batch_size 64" in capsys.readouterr().out
    manager = host.build_datamanager(config(tmp_path, train__batch_size=6), tmp_path)
    assert [len(batch["pid"]) for batch in manager.train_loader] == [6, 6]


def test_identity_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    market(tmp_path / "set")  # 4 training identities with 4 images
    cfg = config(tmp_path, train__batch_size=11, sampler__train_sampler="RandomIdentitySampler")
    manager = host.build_datamanager(cfg, tmp_path)
    assert "batches have 8 items" in capsys.readouterr().out
    for batch in manager.train_loader:
        pids, counts = batch["pid"].unique(return_counts=True)
        assert len(pids) == 2 and counts.tolist() == [4, 4]
    cfg.train.batch_size = 32
    with pytest.raises(
        UserError, match=r"needs 8 identities \('train.batch_size 32' / 'sampler.num_instances 4'\), but only 4"
    ):
        host.build_datamanager(cfg, tmp_path)
    cfg.train.batch_size = 2
    with pytest.raises(UserError, match=r"'sampler\.num_instances 4' must lie in 1 … 'train\.batch_size' \(2\)"):
        host.build_datamanager(cfg, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler__num_cams": 3}, "'sampler.num_cams 3' is more than the training data's 2"),
        ({"sampler__num_cams": 2, "train__batch_size": 5}, "'train.batch_size 5' must be a multiple of 'sampler.num_cams'"),
        ({"sampler__num_cams": 2, "train__batch_size": 20}, "one camera has only 8; lower 'train.batch_size' to at most 16"),
    ],
)
def test_domain_sampler(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    market(tmp_path / "set")
    cfg = config(tmp_path, sampler__train_sampler="RandomDomainSampler", **changes)
    with pytest.raises(UserError, match=message):
        host.build_datamanager(cfg, tmp_path)


def test_wrong_names_of_transform_and_sampler(tmp_path: Path) -> None:
    market(tmp_path / "set")
    with pytest.raises(UserError, match="'random_earse'.*did you mean 'random_erase'"):
        host.build_datamanager(config(tmp_path, data__transforms=["random_earse"]), tmp_path)
    with pytest.raises(UserError, match="'sampler.train_sampler' is 'RandomIdentity'.*did you mean 'RandomIdentitySampler'"):
        host.build_datamanager(config(tmp_path, sampler__train_sampler="RandomIdentity"), tmp_path)


def test_sources_and_targets_overlap(tmp_path: Path) -> None:
    market(tmp_path / "set")
    with pytest.raises(
        UserError, match="'data.load_train_targets True' needs sources and targets apart, but both hold 'set'"
    ):
        host.build_datamanager(config(tmp_path, data__load_train_targets=True), tmp_path)
    market(tmp_path / "other")
    cfg = config(tmp_path, data__load_train_targets=True, data__targets=["other"])
    manager = host.build_datamanager(cfg, tmp_path)
    assert "other" in next(iter(manager.train_loader_t))["impath"][0]


def test_images_are_checked_at_load_time(tmp_path: Path) -> None:
    market(tmp_path / "set")
    bad = sorted((tmp_path / "set" / "bounding_box_test").iterdir())[0]
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=f"image '{bad}' is empty"):
        host.build_datamanager(config(tmp_path), tmp_path)


def test_transforms_are_built_and_reset(tmp_path: Path) -> None:
    market(tmp_path / "set")
    cfg = config(tmp_path, data__transforms=["pad_crop", "random_patch"])
    manager = host.build_datamanager(cfg, tmp_path)
    steps = {type(step).__name__: step for step in manager.transform_tr.transforms}
    assert list(steps) == ["Resize", "PadCrop", "RandomPatch", "ToTensor", "Normalize"]
    assert manager.train_loader.dataset.transform is manager.transform_tr

    def epoch() -> list[torch.Tensor]:
        host.reset_transforms(manager)
        steps["RandomPatch"].min_sample_size = 2
        random.seed(5)
        torch.manual_seed(5)
        return [batch["img"] for batch in manager.train_loader]

    first = epoch()
    assert len(steps["RandomPatch"].patchpool) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, epoch()))


def test_combineall_and_a_video_set(tmp_path: Path) -> None:
    market(tmp_path / "set")
    manager = host.build_datamanager(config(tmp_path, data__combineall=True), tmp_path)
    assert list(manager.label_map.values()) == [f"{pid:04d}" for pid in range(1, 9)]
    for pid in range(1, 5):
        for camera in (0, 1):
            name = "prid_2011/multi_shot/cam_" + "ab"[camera]
            for frame in range(3):
                write_image(tmp_path / "prid2011" / name / f"person_{pid:04d}" / f"{frame:04d}.png", pid)
    people = [f"person_{pid:04d}" for pid in range(1, 5)]
    split = f'[{{"train": {people[:2]}, "test": {people[2:]}}}]'.replace("'", '"')
    (tmp_path / "prid2011" / "splits_prid2011.json").write_text(split)
    cfg = config(tmp_path, "prid2011", data__type="video", video__seq_len=2, train__batch_size=2)
    manager = host.build_datamanager(cfg, tmp_path)
    assert next(iter(manager.train_loader))["img"].shape == (2, 2, 3, 32, 16)
    loader = host.make_loader(manager, manager.train_loader.dataset.train, manager.transform_te, 4, 0)
    assert next(iter(loader))["img"].shape == (4, 2, 3, 32, 16)


# --- optimisers and schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("name", ["adam", "amsgrad", "sgd", "rmsprop", "radam", "adamw"])
def test_optimizers(name: str, staged: bool) -> None:
    cfg = get_default_config()
    cfg.train.optim, cfg.train.staged_lr, cfg.train.lr = name, staged, 0.01
    model = Toy(4)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = host.build_optimizer(model, cfg)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.001 if staged and "classifier" not in key else 0.01)
    assert isinstance(optimizer, torch.optim.AdamW) == (name == "adamw")
    if name == "adamw":
        assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_optimizers_that_cannot_be_built() -> None:
    cfg = get_default_config()
    cfg.train.staged_lr, cfg.train.new_layers = True, ["clasifier"]
    with pytest.raises(UserError, match="'train.new_layers' holds 'clasifier'.*did you mean 'classifier'"):
        host.build_optimizer(Toy(2), cfg)
    cfg = get_default_config()
    cfg.train.optim, cfg.sgd.nesterov, cfg.sgd.momentum = "sgd", True, 0.0
    with pytest.raises(UserError, match="'train.optim sgd' cannot be built: Nesterov"):
        host.build_optimizer(Toy(2), cfg)


def make_schedule(cfg: Any) -> tuple[torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    optimizer = host.build_optimizer(Toy(2), cfg)
    return optimizer, host.build_scheduler(optimizer, cfg)


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, epochs: int) -> list[float]:
    out = []
    for _ in range(epochs):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["none", "single_step", "multi_step", "cosine"])
def test_schedules_resume_to_the_last_digit(tmp_path: Path, name: str, warmup: int) -> None:
    cfg = get_default_config()
    cfg.train.lr_scheduler, cfg.train.warmup_epochs, cfg.train.max_epoch = name, warmup, 12
    cfg.train.stepsize = [5, 8] if name == "multi_step" else [4]
    optimizer, scheduler = make_schedule(cfg)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    whole = rates(optimizer, scheduler, 12)
    for stop in (1, 2, 3, 4, 7):
        optimizer, scheduler = make_schedule(cfg)
        begun = rates(optimizer, scheduler, stop)
        torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
        optimizer, scheduler = make_schedule(cfg)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        assert begun + rates(optimizer, scheduler, 12 - stop) == whole


def test_schedule_values() -> None:
    cfg = get_default_config()
    cfg.train.lr, cfg.train.max_epoch = 1.0, 6
    cfg.train.lr_scheduler, cfg.train.stepsize = "multi_step", [3, 5]
    assert rates(*make_schedule(cfg), 6) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01])
    cfg.train.warmup_epochs, cfg.train.warmup_factor = 2, 0.2
    assert rates(*make_schedule(cfg), 6) == pytest.approx([0.2, 0.6, 1, 0.1, 0.1, 0.01])
    cfg.train.lr_scheduler = "none"
    assert rates(*make_schedule(cfg), 4) == pytest.approx([0.2, 0.6, 1, 1])
    cfg.train.lr_scheduler, cfg.train.warmup_epochs = "cosine", 0
    assert rates(*make_schedule(cfg), 6) == pytest.approx([0.5 * (1 + np.cos(np.pi * e / 6)) for e in range(6)])
    cfg.train.lr_scheduler, cfg.train.stepsize = "single_step", [0]
    with pytest.raises(UserError, match="single_step needs a period of at least 1 epoch"):
        make_schedule(cfg)


# --- checkpoints --------------------------------------------------------------------------------------------------------


def host_checkpoint(model: nn.Module) -> dict[str, Any]:
    """Return what the host's ``Engine.save_model`` writes, its numpy ``rank1`` included."""
    optimizer, scheduler = make_schedule(get_default_config())
    return {
        "state_dict": nn.DataParallel(model).state_dict(),
        "epoch": 7,
        "rank1": np.asarray([0.25, 0.5]).astype(np.float32).sum(0),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


@pytest.mark.parametrize("new_format", [True, False])
def test_host_checkpoint(tmp_path: Path, new_format: bool) -> None:
    model = Toy(3)
    path = tmp_path / "model.pth.tar-7"
    torch.save(host_checkpoint(model), path, _use_new_zipfile_serialization=new_format)
    checkpoint = host.load_host_checkpoint(path)
    assert checkpoint["epoch"] == 7 and float(checkpoint["rank1"]) == 0.75 and "optimizer" in checkpoint
    assert checkpoint["state_dict"].keys() == model.state_dict().keys()
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in model.state_dict().items())


def test_host_checkpoint_of_numpy_1(tmp_path: Path) -> None:
    torch.save(host_checkpoint(Toy(3)), tmp_path / "new", _use_new_zipfile_serialization=False)
    names = (b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    content = (tmp_path / "new").read_bytes()
    assert names[0] in content or names[1] in content
    (tmp_path / "old").write_bytes(content.replace(*names))
    assert float(host.load_host_checkpoint(tmp_path / "old")["rank1"]) == 0.75


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-was-here",)


def test_files_that_are_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="none.pth' does not exist"):
        host.load_host_checkpoint(tmp_path / "none.pth")
    torch.save({"state_dict": Toy(2).state_dict(), "rank1": Evil()}, "evil.pth")
    torch.save(Toy(2).state_dict(), "cut.pth")
    Path("cut.pth").write_bytes(Path("cut.pth").read_bytes()[:700])
    Path("text.pth").write_text("hello")
    torch.save(torch.ones(3), "tensor.pth")
    torch.save({"epoch": 3}, "numbers.pth")
    for name in ("evil", "cut", "text", "tensor", "numbers"):
        with pytest.raises(UserError, match=rf"{name}\.pth'") as caught:
            host.load_host_checkpoint(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
    assert not Path("evil-was-here").exists()


def test_matching_weights(tmp_path: Path) -> None:
    donor, model = Toy(3), Toy(3)
    model.classifier = nn.Linear(3, 9)
    old = model.classifier.weight.detach().clone()
    torch.save({f"module.{name}": value for name, value in donor.state_dict().items()}, tmp_path / "plain.pth")
    loaded, skipped = host.load_matching_weights(model, tmp_path / "plain.pth")
    assert loaded == ["scale", "body.weight", "body.bias"] and skipped == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.body.weight, donor.body.weight) and torch.equal(model.classifier.weight, old)
    with pytest.raises(UserError, match=r"plain\.pth' is one of another model: none of its 5 layers fits Conv2d"):
        host.load_matching_weights(nn.Conv2d(1, 1, 1), tmp_path / "plain.pth")


# --- loaders under other start methods ----------------------------------------------------------------------------------


def test_what_a_loader_sends_to_its_processes_can_be_pickled(tmp_path: Path) -> None:
    market(tmp_path / "set")
    manager = host.build_datamanager(config(tmp_path, data__transforms=["pad_crop"]), tmp_path)
    loaders: list[DataLoader] = [manager.train_loader, manager.test_loader["set"]["query"]]
    for loader in loaders:
        copy = pickle.loads(pickle.dumps((loader.dataset, loader.worker_init_fn)))
        assert copy[1] is host.worker_init and copy[0].data == loader.dataset.data


def test_combineall_with_a_query_identity_that_the_gallery_lacks(tmp_path: Path) -> None:
    for split, names in {
        "bounding_box_train": ["0001_c1.jpg", "0001_c2.jpg", "0004_c1.jpg"],
        "query": ["0006_c1.jpg", "0002_c1.jpg"],
        "bounding_box_test": ["0002_c2.jpg", "0003_c1.jpg", "-1_c1.jpg", "0000_c1.jpg"],
    }.items():
        (tmp_path / "set" / split).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 16)).save(tmp_path / "set" / split / name)
    host.resolve_dataset("set", tmp_path)
    dataset = host.open_dataset("set", root=tmp_path, cache_dir=tmp_path / "cache", combineall=True, verbose=False)
    labels = {Path(path).name: label for path, label, *_ in dataset.train}
    number = {"0001": 0, "0002": 1, "0003": 2, "0004": 3, "0006": 4}  # in the order of the identities
    assert labels == {name: number[name[:4]] for name in labels} and len(labels) == 7
    assert dataset.num_train_pids == 5
