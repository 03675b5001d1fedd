"""Multimodal data sets in the host: registry, data manager, samplers, the training command, and what mistakes say."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import comparable
from PIL import Image

from relreid_plugin import register
from relreid_plugin.config.defaults import get_default_config, merge_from_file, validate
from relreid_plugin.data.samples import SCENE_NOTE
from relreid_plugin.errors import UserError
from relreid_plugin.graft.triplets import TripletSampler
from relreid_plugin.host import HOST, build_datamanager, make_loader
from relreid_plugin.host.datasets import resolve_dataset
from relreid_plugin.host.multimodal import PUBLISHED, Files, MultimodalDataset, Strip
from relreid_plugin.host.opening import open_dataset
from relreid_plugin.host.registry import dataset_table
from relreid_plugin.metrics.ranking import evaluate_features

register()

RNT = ("R", "N", "T")
BASE = {"R": 40, "N": 120, "T": 200}
"""Mean grey value of a modality's images in the generated trees: it tells a view's modality."""

CONFIG: dict[str, Any] = {
    "model": {"name": "graft", "pretrained": False},
    "backbone": {"name": "timm:vit_tiny_patch16_224"},
    "vit": {"patch_size": 16, "depth": 1, "drop_path": 0.0},
    "data": {"height": 32, "width": 64, "transforms": ["random_flip", "pad_crop", "random_erase"], "workers": 0},
    "multimodal": {"mean": [[0.5]], "std": [[0.25]]},
    "graft": {
        "heads": 3,
        "feedforward": 64,
        "positives": 2,
        "warmup_steps": 2,
        "finetune": {"max_epoch": 1, "lr": 0.0001},
    },
    "loss": {"name": "composite", "composite": {"ce": 0.5, "triplet": 0.5, "center": 0.0}},
    "train": {
        "stages": [1, 2],
        "optim": "adamw",
        "lr": 0.001,
        "max_epoch": 1,
        "batch_size": 12,
        "lr_scheduler": "sqrt",
    },
    "test": {"dist_metric": "cosine", "rivals": []},
}

# ---------------------------------------------------------------------------------------------------------------------
# Small trees of every layout: (split, identity, camera, number)

Shot = tuple[str, int, int, int]
TRAIN: list[Shot] = [("train", pid, camera, n) for pid in (1, 2, 5, 9) for camera in (1, 2) for n in (0, 1)]
TEST: list[Shot] = [("query", pid, 1, 0) for pid in (20, 21)]
TEST += [("gallery", pid, 2, n) for pid in (20, 21) for n in (0, 1)] + [("gallery", 22, 1, 0)]
SHOTS = TRAIN + TEST
MARKET_SPLITS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
SCENES = {1: 3, 2: 20}


def view(shot: Shot, modality: str) -> np.ndarray:
    """Noise of 16x8 pixels around the modality's grey value."""
    rng = np.random.default_rng([*map(int, shot[1:]), ord(modality), len(shot[0])])
    return (BASE[modality] + rng.integers(-30, 31, (8, 16, 3))).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_strips(folder: Path, shots: list[Shot] = SHOTS, modalities: tuple[str, ...] = RNT) -> None:
    for shot in shots:
        split, pid, camera, n = shot
        path = folder / "rgbir" / MARKET_SPLITS[split] / f"{pid:04d}_c{camera}_{n:06d}.jpg"
        save(path, np.concatenate([view(shot, modality) for modality in modalities], axis=1))


def _write_views(shots: list[Shot], place: Callable[[Shot, int], Path]) -> None:
    for shot in shots:
        for index, modality in enumerate(RNT):
            save(place(shot, index), view(shot, modality))


def write_rgbnt201(folder: Path, shots: list[Shot] = SHOTS) -> None:
    names = ("RGB", "NI", "TI")
    _write_views(
        shots,
        lambda shot, index: (
            folder
            / ("train_171" if shot[0] == "train" else "test")
            / names[index]
            / f"{shot[1]:06d}_cam{shot[2]}_{shot[3]}_00.jpg"
        ),
    )


def msvr310_file(folder: Path, shot: Shot, index: int, scenes: dict[int, int] = SCENES) -> Path:
    split, pid, camera, n = shot
    split_folder = {**MARKET_SPLITS, "query": "query3"}[split]
    name = f"{pid:04d}_s{scenes[camera]:03d}_v{camera}_{n:03d}.jpg"
    return folder / split_folder / f"{pid:04d}" / ("vis", "ni", "th")[index] / name


def write_msvr310(folder: Path, shots: list[Shot] = SHOTS, scenes: dict[int, int] = SCENES) -> None:
    _write_views(shots, lambda shot, index: msvr310_file(folder, shot, index, scenes))


def write_wmveid863(folder: Path, shots: list[Shot] = SHOTS) -> None:
    splits = {"train": "train", "query": "query", "gallery": "test"}
    _write_views(
        shots,
        lambda shot, index: (
            folder / splits[shot[0]] / ("vis", "ni", "th")[index] / f"{shot[1]:06d}_cam{shot[2]}_{shot[3]}_00.jpg"
        ),
    )


def write_wild(folder: Path, shots: list[Shot] = SHOTS) -> None:
    splits = {"train": "train", "query": "query", "gallery": "test"}
    _write_views(
        shots,
        lambda shot, index: (
            folder / splits[shot[0]] / f"{shot[1]:04d}" / ("vis", "ni", "th")[index] / f"v{shot[2]}n1s1_{shot[3]}.jpg"
        ),
    )


def write_released(folder: Path, shots: list[Shot] = SHOTS) -> None:
    _write_views(shots, lambda shot, index: folder / shot[0] / RNT[index] / str(shot[1]) / f"x_c{shot[2]}_{shot[3]}.png")


def write_table(path: Path, shots: list[Shot] = SHOTS, modalities: tuple[str, ...] = RNT) -> None:
    rows = [",".join(["pid", "split", "camid", *modalities])]
    for shot in shots:
        split, pid, camera, n = shot
        files = [f"{path.stem}/{split}_{pid}_{camera}_{n}_{modality}.png" for modality in modalities]
        for file, modality in zip(files, modalities):
            save(path.parent / file, view(shot, modality))
        rows.append(",".join([str(pid), split, str(camera - 1), *files]))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_all(root: Path) -> None:
    """Every layout, under the names of :data:`NAMES`."""
    write_strips(root / "RGBNT100")
    write_strips(root / "RGBN300", modalities=("R", "N"))
    write_rgbnt201(root / "RGBNT201")
    write_msvr310(root / "MSVR310")
    write_wmveid863(root / "WMVEID863")
    write_released(root / "released")
    write_strips(root / "mine")
    write_table(root / "table.csv")
    write_wild(root / "other" / "MSVWild863")


NAMES = ("rgbnt100", "rgbn300", "rgbnt201", "msvr310", "wmveid863", "MSVWild863", "released", "mine", "table.csv")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with every layout; tests do not change it."""
    root = tmp_path_factory.mktemp("multimodal")
    write_all(root)
    return root


def source_of(name: str, root: Path) -> tuple[str, Path]:
    """Return the registered name and the root; MSVWild863 is found for wmveid863 where that has no folder."""
    return ("wmveid863", root / "other") if name == "MSVWild863" else (name, root)


def modalities_of(name: str) -> tuple[str, ...]:
    return ("R", "N") if name == "rgbn300" else RNT


def write_config(folder: Path, root: Path, sources: str | list[str], changes: dict[str, Any] | None = None) -> Path:
    """Write a configuration; ``changes`` maps dotted keys to values."""
    config = copy.deepcopy(CONFIG)
    names = [sources] if isinstance(sources, str) else sources
    config["data"].update(root=str(root), sources=names, targets=names[:1])
    for key, value in (changes or {}).items():
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path = folder / "config.yml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def make_manager(folder: Path, root: Path, sources: str | list[str], **changes: Any) -> Any:
    """Build the data manager of a configuration; ``data__workers=2`` changes ``data.workers``."""
    cfg = get_default_config()
    merge_from_file(cfg, write_config(folder, root, sources, {key.replace("__", "."): v for key, v in changes.items()}))
    validate(cfg)
    return build_datamanager(cfg, folder / "cache")


def grey_levels(images: torch.Tensor) -> list[str]:
    """(M, 3, h, w) normalised by 0.5 and 0.25 -> the modality whose grey value each view has."""
    means = (images.mean(dim=(1, 2, 3)) * 0.25 + 0.5) * 255
    return [min(BASE, key=lambda name: abs(BASE[name] - float(mean))) for mean in means]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


# ---------------------------------------------------------------------------------------------------------------------
# Data sets in the host's registry and under the command


def test_every_published_data_set_is_registered() -> None:
    assert {cls.key for cls in PUBLISHED} == {"rgbnt100", "rgbn300", "rgbnt201", "msvr310", "wmveid863"}
    for cls in PUBLISHED:
        assert dataset_table("image")[cls.key] is cls and issubclass(cls, HOST.data.ImageDataset)


@pytest.mark.parametrize("name", NAMES)
def test_a_data_set_through_the_hosts_registry(trees: Path, name: str) -> None:
    key, root = source_of(name, trees)
    resolve_dataset(key, root, multimodal=True)
    for mode, size in (("train", 16), ("query", 2), ("gallery", 5)):
        dataset = HOST.data.datasets.init_image_dataset(key, root=str(root), mode=mode, verbose=False)
        if name == "rgbnt201" and mode != "train":
            size = 7  # query and gallery are both `test`
        assert isinstance(dataset, MultimodalDataset) and len(dataset) == len(dataset.data) == size
        assert len(dataset.train) == 16 and dataset.num_train_pids == 4 and dataset.modalities == modalities_of(name)
    labels = Counter(item[1] for item in dataset.train)
    assert labels == {0: 4, 1: 4, 2: 4, 3: 4}
    assert [int(identity) for identity in dataset.train_identities] == [1, 2, 5, 9]
    everybody = {20, 21, 22} if name == "rgbnt201" else {20, 21}
    assert {item[1] for item in dataset.query} == everybody and {item[1] for item in dataset.gallery} == {20, 21, 22}
    assert {item[3] for item in dataset.train + dataset.query + dataset.gallery} == {0}
    assert {item[2] for item in dataset.train} == {0, 1} and dataset.num_train_cams == 2
    assert dataset.group == ("scene" if name == "msvr310" else "camera") and dataset.has_cameras
    kind = Strip if name in ("rgbnt100", "rgbn300", "mine") else Files
    assert all(type(item[0]) is kind and item[0].modalities == dataset.modalities for item in dataset.data)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_trains_and_tests_on(trees: Path, tmp_path: Path, command: Any, name: str) -> None:
    key, root = source_of(name, trees)
    changes = {"multimodal.modalities": list(modalities_of(name))}
    config = write_config(tmp_path, root, key, changes)
    before = snapshot(root)
    code, out, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    assert code == 0, err
    metrics = comparable(tmp_path / "run")
    (row,) = metrics["rows"]
    assert row["target"] == key and row["method"] == "GraFT, " + "+".join(modalities_of(name))
    # identity 22 has no match; of RGBNT201, all six others of `test` ask
    assert row["queries"] == (6 if name == "rgbnt201" else 2) and 0 < row["mAP"] <= 1
    assert [len(metrics["history"][stage]) for stage in ("stage1", "stage2")] == [1, 1]
    assert (SCENE_NOTE in out) == (name == "msvr310")
    assert snapshot(root) == before


PUBLISHED_COUNTS: dict[str, dict[str, int]] = {
    "rgbnt100": {"train": 8675, "query": 1715, "gallery": 8575, "train_ids": 50, "test_ids": 50},
    "rgbn300": {"train": 25200, "query": 4985, "gallery": 24925, "train_ids": 150, "test_ids": 150},
    "rgbnt201": {"train_ids": 171, "ids": 201},
    "msvr310": {"ids": 310},
    "wmveid863": {"ids": 863},
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_published_counts(name: str) -> None:
    root = os.environ.get("RELREID_DATA", "")
    try:
        if not root:
            raise UserError("the environment variable RELREID_DATA names no folder with the published data sets")
        dataset = open_dataset(name, root=root, cache_dir=root, verbose=False)
    except UserError as error:
        if root and "does not exist" not in str(error):
            raise
        pytest.skip(str(error))
    test_ids = {item[1] for item in dataset.query + dataset.gallery}
    counts = {split: len(getattr(dataset, split)) for split in ("train", "query", "gallery")}
    counts.update(train_ids=dataset.num_train_pids, test_ids=len(test_ids), ids=dataset.num_train_pids + len(test_ids))
    expected = PUBLISHED_COUNTS[name]
    assert {key: counts[key] for key in expected} == expected


def write_scene_protocol(folder: Path, scene_of_the_copy: int) -> None:
    """One query (identity 311, scene 7): its exact copy, an identity that looks alike, and itself in negative."""
    write_msvr310(folder, TRAIN)
    query = {modality: view(("query", 311, 1, 0), modality) for modality in RNT}
    gallery = {
        f"0311/{{}}/0311_s{scene_of_the_copy:03d}_v1_001.jpg": query,
        "0312/{}/0312_s001_v1_000.jpg": {modality: pixels // 2 * 2 for modality, pixels in query.items()},
        "0311/{}/0311_s020_v1_002.jpg": {modality: 255 - np.rot90(pixels, 2) for modality, pixels in query.items()},
    }
    for index, modality in enumerate(RNT):
        save(msvr310_file(folder, ("query", 311, 1, 0), index, {1: 7}), query[modality])
        for name, views in gallery.items():
            save(folder / "bounding_box_test" / name.format(("vis", "ni", "th")[index]), views[modality])


@pytest.mark.parametrize("scene, rank1, mean_ap", [(7, 0.0, 1 / 2), (8, 1.0, (1 + 2 / 3) / 2)])
def test_the_querys_scene_is_discarded(tmp_path: Path, command: Any, scene: int, rank1: float, mean_ap: float) -> None:
    write_scene_protocol(tmp_path / "MSVR310", scene)
    config = write_config(tmp_path, tmp_path, "msvr310")
    code, out, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    assert code == 0, err
    (row,) = comparable(tmp_path / "run")["rows"]
    assert row["queries"] == 1 and row["cmc"]["1"] == rank1 and row["mAP"] == pytest.approx(mean_ap)
    assert SCENE_NOTE in out


def test_scenes_are_the_cameras_of_the_evaluation(tmp_path: Path) -> None:
    """The same features score differently when the host's scene labels are taken away."""
    write_scene_protocol(tmp_path / "MSVR310", 7)
    manager = make_manager(tmp_path, tmp_path, "msvr310")
    sides = [next(iter(manager.test_loader["msvr310"][split])) for split in ("query", "gallery")]
    features = [side["img"].flatten(1) for side in sides]
    pids = [side["pid"].numpy() for side in sides]
    scenes = [side["camid"].numpy() for side in sides]
    none = [np.zeros_like(scenes[0]), np.ones_like(scenes[1])]
    with_scenes = evaluate_features(*features, *pids, *scenes, metric="euclidean")
    without = evaluate_features(*features, *pids, *none, metric="euclidean")
    assert float(with_scenes.rank(1)) == 0.0 and float(without.rank(1)) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Training on more: query and gallery too, and several sources


@pytest.mark.parametrize("name", ["rgbnt100", "rgbnt201", "released"])
def test_combineall_adds_every_sample_once(trees: Path, tmp_path: Path, name: str) -> None:
    manager = make_manager(tmp_path, trees, name, data__combineall=True)
    data = manager.train_loader.dataset.data
    assert len(data) == 16 + 7 and len({item[0] for item in data}) == 23
    assert manager.num_train_pids == 7 and Counter(item[1] for item in data) == {0: 4, 1: 4, 2: 4, 3: 4, 4: 3, 5: 3, 6: 1}
    if name != "released":  # file names of the released layout do not tell identities
        assert [int(manager.label_map[label]) for label in range(7)] == [1, 2, 5, 9, 20, 21, 22]
    for item in manager.train_loader.dataset.query:
        (label,) = {label for source, label, *_ in data if source == item[0]}
        assert label == 4 + (item[1] - 20)
    assert all(isinstance(item[0], (Strip, Files)) and item[0].modalities == RNT for item in data)
    assert next(iter(manager.train_loader))["img"].shape == (12, 3, 3, 32, 64)


def test_combineall_takes_queries_without_a_match_and_leaves_distractors_out(tmp_path: Path) -> None:
    write_strips(tmp_path / "RGBNT100", [*SHOTS, ("query", 30, 1, 0), ("gallery", 0, 1, 0)])
    manager = make_manager(tmp_path, tmp_path, "rgbnt100", data__combineall=True)
    assert [int(manager.label_map[label]) for label in range(8)] == [1, 2, 5, 9, 20, 21, 22, 30]
    assert len(manager.train_loader.dataset) == 16 + 8
    assert 0 in {item[1] for item in manager.test_dataset["rgbnt100"]["gallery"]}  # it still distracts


def test_two_sources_are_numbered_on(tmp_path: Path) -> None:
    write_strips(tmp_path / "RGBNT100", [(split, pid, 2 * camera - 1, n) for split, pid, camera, n in SHOTS])
    write_msvr310(tmp_path / "MSVR310")
    changes = {"data__workers": 2, "data__transforms": [], "test__batch_size": 4}
    manager = make_manager(tmp_path, tmp_path, ["rgbnt100", "msvr310"], **changes)
    data = manager.train_loader.dataset.data
    first, second = data[:16], data[16:]
    assert {item[1] for item in first} == {0, 1, 2, 3} and {item[1] for item in second} == {4, 5, 6, 7}
    # cameras 1 and 3 of the first set are 0 and 2: the second one's go on at 3
    assert {item[2] for item in first} == {0, 2} and {item[2] for item in second} == {3, 4}
    assert {item[3] for item in first} == {0} and {item[3] for item in second} == {1}
    assert manager.num_train_pids == 8 and manager.num_cameras == 4
    assert manager.label_map[3] == "rgbnt100/0009" and manager.label_map[4] == "msvr310/0001"
    assert {type(item[0]) for item in first} == {Strip} and {type(item[0]) for item in second} == {Files}
    assert manager.train_loader.num_workers == min(2, len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    dsets: set[int] = set()
    for batch in manager.train_loader:
        assert batch["img"].shape == (12, 3, 3, 32, 64)
        assert all(grey_levels(sample) == ["R", "N", "T"] for sample in batch["img"])
        dsets |= set(batch["dsetid"].tolist())
    assert dsets == {0, 1}


def test_three_sources_with_two_common_modalities(trees: Path, tmp_path: Path) -> None:
    manager = make_manager(
        tmp_path, trees, ["rgbn300", "rgbnt201", "table.csv"], multimodal__modalities=["N", "R"], data__transforms=[]
    )
    data = manager.train_loader.dataset.data
    assert [{item[3] for item in data[k : k + 16]} for k in (0, 16, 32)] == [{0}, {1}, {2}]
    assert {item[1] for item in data} == set(range(12)) and {item[2] for item in data} == set(range(6))
    for index in (0, 16, 32):
        assert grey_levels(manager.train_loader.dataset[index]["img"]) == ["N", "R"]


def test_two_sources_train_under_the_command(trees: Path, tmp_path: Path, command: Any) -> None:
    changes = {"data.workers": 2, "data.targets": ["released"], "train.val_fraction": 0.3, "test.eval_freq": 1}
    config = write_config(tmp_path, trees, ["rgbnt100", "msvr310"], changes)
    code, out, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    assert code == 0, err
    metrics = comparable(tmp_path / "run")
    assert metrics["rows"][0]["target"] == "released" and metrics["rows"][0]["queries"] == 2
    assert "Held out 2 of 8 training identities" in out
    assert all("val_mAP" in metrics["history"][stage][0] for stage in ("stage1", "stage2"))
    state = torch.load(tmp_path / "run" / "stage2" / "last.pth.tar", weights_only=True)
    assert len(state["label_map"]) == state["num_classes"] == 6


def test_unlabelled_target_images_are_read_too(trees: Path, tmp_path: Path) -> None:
    changes = {"data__load_train_targets": True, "data__targets": ["msvr310"], "data__transforms": []}
    manager = make_manager(tmp_path, trees, "rgbnt100", multimodal__modalities=["T", "R"], **changes)
    batch = next(iter(manager.train_loader_t))
    assert batch["img"].shape == (12, 2, 3, 32, 64) and grey_levels(batch["img"][0]) == ["T", "R"]


def test_notes_of_the_test_sets_are_kept(trees: Path, tmp_path: Path) -> None:
    manager = make_manager(tmp_path, trees, "rgbnt100", data__targets=["msvr310", "rgbnt201"])
    assert manager.notes[0] == f"msvr310: {SCENE_NOTE}"
    assert len(manager.notes) == 2 and "1 of 7 queries without a match" in manager.notes[1]  # identity 22 has one image


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


def test_random_identity_sampler_over_samples(trees: Path, tmp_path: Path) -> None:
    changes = {"sampler__train_sampler": "RandomIdentitySampler", "sampler__num_instances": 3, "graft__sampling": "pk"}
    manager = make_manager(tmp_path, trees, ["msvr310", "rgbnt100"], train__batch_size=12, **changes)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the host's sampler draws from the global generator)
    batches = [batch["pid"].tolist() for batch in manager.train_loader]
    assert len(batches) == 2
    for pids in batches:
        assert [len(set(pids[k : k + 3])) for k in (0, 3, 6, 9)] == [1, 1, 1, 1] and len(set(pids)) == 4


def draw(sampler: TripletSampler, seed: int) -> list[list[list[int]]]:
    """An epoch as batches of [anchors, positives, negatives]."""
    torch.manual_seed(seed)
    indices = list(sampler)
    size = sampler.triplets
    assert len(indices) == len(sampler) and len(indices) % (3 * size) == 0
    batches = [indices[k : k + 3 * size] for k in range(0, len(indices), 3 * size)]
    return [[batch[:size], batch[size : 2 * size], batch[2 * size :]] for batch in batches]


LABELS = [3, 0, 3, 1, 0, 2, 3, 0, 3, 1, 3]  # five of identity 3, three of 0, two of 1, one of 2; mixed


@pytest.mark.parametrize("positives", [1, 2, 4, 7])
@pytest.mark.parametrize("triplets", [1, 4, 1000])
def test_triplet_sampler(positives: int, triplets: int) -> None:
    sampler = TripletSampler(LABELS, triplets=triplets, positives=positives)
    anchors_there = 10 * positives  # the single image of identity 2 is no anchor
    size = min(triplets, anchors_there)
    assert sampler.triplets == size and len(sampler) == anchors_there // size * size * 3
    for seed in range(5):
        positives_of: dict[int, list[int]] = {}
        for anchors, others, negatives in draw(sampler, seed):
            for anchor, positive, negative in zip(anchors, others, negatives, strict=True):
                assert anchor != positive and LABELS[anchor] == LABELS[positive] != LABELS[negative]
                positives_of.setdefault(anchor, []).append(positive)
        counts = {anchor: len(found) for anchor, found in positives_of.items()}
        assert sum(counts.values()) == anchors_there // size * size
        for anchor, found in positives_of.items():
            uses = Counter(found)
            available = LABELS.count(LABELS[anchor]) - 1
            # different ones as far as there are, then round again
            assert len(found) <= positives and max(uses.values()) <= -(-positives // available)
            if len(found) == positives:
                assert len(uses) == min(positives, available) and min(uses.values()) >= max(1, positives // available)
        if len(sampler) == 3 * anchors_there:
            assert counts == {index: positives for index, label in enumerate(LABELS) if label != 2}


def test_triplet_negatives_are_drawn_from_all_other_images() -> None:
    sampler = TripletSampler(LABELS, triplets=10, positives=2)
    seen: dict[int, Counter[int]] = {}
    for seed in range(400):
        for anchors, _, negatives in draw(sampler, seed):
            for anchor, negative in zip(anchors, negatives, strict=True):
                seen.setdefault(LABELS[anchor], Counter())[negative] += 1
    for label, counts in seen.items():
        assert set(counts) == {index for index, other in enumerate(LABELS) if other != label}
        expected = sum(counts.values()) / len(counts)
        # five standard deviations of a binomial count
        assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


def test_triplet_positives_change_from_epoch_to_epoch() -> None:
    sampler = TripletSampler(LABELS, triplets=10, positives=1)
    torch.manual_seed(0)
    pairs = Counter()
    for _ in range(200):
        indices = list(sampler)
        pairs.update(zip(indices[:10], indices[10:20], strict=True))
    wanted = {(a, b) for a, la in enumerate(LABELS) for b, lb in enumerate(LABELS) if a != b and la == lb}
    assert set(pairs) == wanted


def test_triplet_sampler_is_deterministic_by_torchs_seed() -> None:
    sampler = TripletSampler(LABELS, triplets=4, positives=3)
    assert draw(sampler, 7) == draw(TripletSampler(LABELS, triplets=4, positives=3), 7)
    assert draw(sampler, 7) != draw(sampler, 8)
    torch.manual_seed(7)
    first = list(sampler)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (neither of them counts)
    assert list(sampler) != first


@pytest.mark.parametrize("labels", [[0, 1, 2], [5, 5, 5], [4]])
def test_triplets_need_two_identities_and_two_images(labels: list[int]) -> None:
    with pytest.raises(UserError, match="two identities"):
        TripletSampler(labels, triplets=2)


def test_batches_of_triplets_reach_the_model(
    trees: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relreid_plugin.graft.stage import MultimodalEngine

    seen: list[tuple[list[int], list[str]]] = []
    original = MultimodalEngine.forward_backward

    def watch(self: Any, data: Any) -> Any:
        seen.append((data["pid"].tolist(), list(data["impath"])))
        return original(self, data)

    monkeypatch.setattr(MultimodalEngine, "forward_backward", watch)
    config = write_config(tmp_path, trees, "rgbnt100")
    code, _, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    assert code == 0, err
    assert len(seen) == 2 * (16 * 2 // 4)  # two stages of an epoch: 16 anchors, 2 positives each, 4 triplets per batch
    for pids, paths in seen:
        anchors, positives, negatives = pids[:4], pids[4:8], pids[8:]
        assert len(pids) == 12 and anchors == positives and all(a != b for a, b in zip(anchors, negatives))
        assert all(a != b for a, b in zip(paths[:4], paths[4:8]))


# ---------------------------------------------------------------------------------------------------------------------
# A selection of modalities


@pytest.mark.parametrize("name", ["rgbnt100", "msvr310", "released", "table.csv"])
@pytest.mark.parametrize("wanted", [["R", "T"], ["T", "R"], ["N"], ["N", "T", "R"]], ids="".join)
def test_a_selection_reads_the_right_views(trees: Path, tmp_path: Path, name: str, wanted: list[str]) -> None:
    manager = make_manager(tmp_path, trees, name, multimodal__modalities=wanted, data__transforms=[])
    loaders = [manager.train_loader, *manager.test_loader[name].values()]
    for loader in loaders:
        images = next(iter(loader))["img"]
        assert images.shape[1:] == (len(wanted), 3, 32, 64)
        assert all(grey_levels(sample) == wanted for sample in images)


def test_every_view_gets_the_numbers_of_its_modality(trees: Path, tmp_path: Path) -> None:
    mean = {name: [BASE[name] / 255] for name in RNT}
    for wanted in (["T", "R"], ["R", "N", "T"]):
        rows = [mean[name] for name in wanted]
        std = [[0.1 * (index + 1)] for index in range(len(wanted))]
        changes = {"multimodal__modalities": wanted, "multimodal__mean": rows, "multimodal__std": std}
        manager = make_manager(tmp_path, trees, "rgbnt201", data__transforms=[], **changes)
        images = torch.stack([sample["img"] for sample in manager.train_loader.dataset])
        assert images.mean(dim=(0, 2, 3, 4)).abs().max() < 0.1
        ratio = images.std(dim=(0, 2, 3, 4)) * torch.tensor(std).squeeze(1)
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=0.1)


@pytest.mark.parametrize("name, opened", [("rgbnt100", 1), ("msvr310", 2)])
def test_files_are_decoded_once_and_only_where_needed(
    trees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, opened: int
) -> None:
    manager = make_manager(tmp_path, trees, name, multimodal__modalities=["T", "R"])
    files: list[str] = []
    original = Image.open

    def count(file: Any, *args: Any, **kwargs: Any) -> Any:
        files.append(str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(Image, "open", count)
    dataset = manager.train_loader.dataset
    item = dataset[3]
    source = dataset.data[3][0]
    assert len(files) == opened == len(set(files))
    assert files == ([str(source)] if isinstance(source, Strip) else [source[2], source[0]])
    assert item["img"].shape == (2, 3, 32, 64)


def test_rows_of_subsets_under_the_command(trees: Path, tmp_path: Path, command: Any) -> None:
    changes = {"multimodal.modalities": ["T", "R"], "multimodal.test": ["T+R", "R"], "train.stages": [1]}
    config = write_config(tmp_path, trees, "rgbnt100", changes)
    code, _, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    assert code == 0, err
    methods = [row["method"] for row in comparable(tmp_path / "run")["rows"]]
    assert methods == ["GraFT, T+R", "GraFT, R (without T)"]


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


def test_samples_say_what_they_are(trees: Path, tmp_path: Path) -> None:
    for name, kind in (("rgbnt100", Strip), ("msvr310", Files)):
        manager = make_manager(tmp_path / name, trees, name, data__transforms=[])
        dataset = manager.train_loader.dataset
        item = dataset[0]
        assert set(item) == {"img", "pid", "camid", "impath", "dsetid"}
        source = dataset.data[0][0]
        assert type(source) is kind and type(item["impath"]) is str
        assert item["impath"] == (str(source) if kind is Strip else source[0])
        batch = next(iter(manager.test_loader[name]["gallery"]))
        expected = [s if kind is Strip else s[0] for s, *_ in manager.test_dataset[name]["gallery"]]
        assert batch["impath"] == expected and batch["pid"].tolist() == [20, 20, 21, 21, 22]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_keep_the_order_of_the_data(trees: Path, tmp_path: Path, workers: int) -> None:
    manager = make_manager(tmp_path, trees, "rgbnt201", data__workers=workers, test__batch_size=3)
    records = manager.test_dataset["rgbnt201"]["gallery"]
    assert records == sorted(records, key=lambda item: item[0])
    passes = [list(make_loader(manager, records, manager.transform_te, 3, workers)) for _ in range(2)]
    assert [len(batch["pid"]) for batch in passes[0]] == [3, 3, 1]
    assert [path for batch in passes[0] for path in batch["impath"]] == [item[0][0] for item in records]
    alone = [manager.transform_te(item[0]) for item in records]
    passes.append(list(manager.test_loader["rgbnt201"]["gallery"]))  # no augmentation either
    for batches in passes:
        assert torch.equal(torch.cat([batch["img"] for batch in batches]), torch.stack(alone))


def test_training_batches_are_deterministic_by_the_seeds(trees: Path, tmp_path: Path) -> None:
    def epoch() -> list[tuple[list[str], torch.Tensor]]:
        manager = make_manager(tmp_path, trees, "released")
        random.seed(3)
        torch.manual_seed(3)
        return [(batch["impath"], batch["img"]) for batch in manager.train_loader]

    first, second = epoch(), epoch()
    assert len(first) == 1
    for (paths, images), (other_paths, other_images) in zip(first, second, strict=True):
        assert paths == other_paths and torch.equal(images, other_images)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_sources_survive_pickling_and_copying(protocol: int) -> None:
    strip, files = Strip("/a/b.jpg", ("R", "N")), Files(("/a/r.jpg", "/a/t.jpg"), ("R", "T"))
    for source in (strip, files):
        for again in (pickle.loads(pickle.dumps(source, protocol)), copy.deepcopy(source), copy.copy(source)):
            assert type(again) is type(source) and again == source and hash(again) == hash(source)
            assert again.modalities == source.modalities
    assert os.path.basename(strip) == "b.jpg" and isinstance(files, tuple) and files[1] == "/a/t.jpg"


@pytest.mark.parametrize("name", ["rgbnt100", "msvr310"])
def test_a_loader_can_be_sent_to_a_new_process(trees: Path, tmp_path: Path, name: str) -> None:
    manager = make_manager(tmp_path, trees, name, data__transforms=["random_flip"])
    dataset = manager.train_loader.dataset
    again = pickle.loads(pickle.dumps(dataset))
    assert again.data == dataset.data and [i[0].modalities for i in again.data] == [i[0].modalities for i in dataset.data]
    random.seed(1)
    image = dataset[5]["img"]
    random.seed(1)
    assert torch.equal(again[5]["img"], image)


@pytest.mark.parametrize("name", ["rgbnt100", "msvr310", "released"])
def test_identities_are_held_out(trees: Path, tmp_path: Path, name: str) -> None:
    manager = make_manager(tmp_path, trees, name, train__val_fraction=0.5, data__transforms=[])
    kept = manager.train_loader.dataset.data
    held = manager.val_query + manager.val_gallery
    assert manager.num_train_pids == 2 and {item[1] for item in kept} == {0, 1}
    assert len(kept) == 8 and len(held) == 8 and len({item[0] for item in [*kept, *held]}) == 16
    names = {int(identity) for identity in manager.label_map.values()}

    def identity(source: Strip | Files) -> int:
        path = Path(source if isinstance(source, Strip) else source[0])
        return int(path.parent.name if name == "released" else path.name.split("_")[0])

    assert {identity(item[0]) for item in kept} == names
    assert {identity(item[0]) for item in held} == {1, 2, 5, 9} - names
    for _, pid, camid, _ in manager.val_query:
        assert any(pid == other and camid != camera for _, other, camera, _ in manager.val_gallery)
    batch = next(iter(manager.val_loader["gallery"]))
    assert batch["img"].shape[1:] == (3, 3, 32, 64) and grey_levels(batch["img"][0]) == ["R", "N", "T"]


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A data root whose files and folders must not be written to."""
    root = tmp_path / "locked"
    write_strips(root / "RGBNT100")
    write_table(root / "table.csv")
    places = [root, *root.rglob("*")]
    for place in places:
        place.chmod(stat.S_IRUSR | (stat.S_IXUSR if place.is_dir() else 0))
    yield root
    for place in places:
        place.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("name", ["rgbnt100", "table.csv"])
def test_a_data_root_that_must_not_be_written_to(locked: Path, tmp_path: Path, command: Any, name: str) -> None:
    before = snapshot(locked)
    config = write_config(tmp_path, locked, name, {"train.stages": [1]})
    code, _, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    assert code == 0, err
    assert snapshot(locked) == before


def test_embedded_vehicles_are_rendered_beside_the_run_where_the_root_is_locked(tmp_path: Path, command: Any) -> None:
    root = tmp_path / "data"
    root.mkdir()
    root.chmod(stat.S_IRUSR | stat.S_IXUSR)
    changes = {"train.stages": [1], "graft.sampling": "pk", "sampler.train_sampler": "RandomIdentitySampler"}
    config = write_config(tmp_path, root, "embedded_vehicles_tiny", {**changes, "sampler.num_instances": 2})
    try:
        code, out, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    finally:
        root.chmod(stat.S_IRWXU)
    assert code == 0, err
    assert not list(root.iterdir()) and (tmp_path / "run" / "cache" / "embedded_vehicles_tiny").is_dir()
    assert "may not be written to" in out and comparable(tmp_path / "run")["rows"][0]["queries"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: exit code 2, one line, no run folder


def check_sentence(result: tuple[int, str, str], folder: Path, *words: object) -> None:
    code, _, err = result
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].count("error: ") == 1
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
    assert not folder.exists(), "a run that could not start leaves no folder"


def files_of(name: str, root: Path, split: str = "train") -> Strip | Files:
    """The source of the third sample of a split."""
    key, root = source_of(name, root)
    resolve_dataset(key, root, multimodal=True)
    return getattr(open_dataset(key, root=root, cache_dir=root, verbose=False), split)[1][0]


@pytest.mark.parametrize(
    "name, writer", [("rgbnt201", write_rgbnt201), ("msvr310", write_msvr310), ("mine", write_released)]
)
def test_a_missing_near_infrared_file(tmp_path: Path, command: Any, name: str, writer: Callable[[Path], None]) -> None:
    writer(tmp_path / (name if name == "mine" else name.upper()))
    source = files_of(name, tmp_path)
    os.remove(source[1])
    config = write_config(tmp_path / "config", tmp_path, name)
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", source[0], source[1], "its N image", "is missing")


def test_a_missing_file_of_a_table(tmp_path: Path, command: Any) -> None:
    write_table(tmp_path / "table.csv")
    source = files_of("table.csv", tmp_path)
    os.remove(source[1])
    config = write_config(tmp_path / "config", tmp_path, "table.csv")
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", "table.csv, line 3", source[1], "its N image")


def damage_strip(kind: str, path: str) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if kind == "width":
        save(Path(path), pixels[:, :40])
    elif kind == "views":
        save(Path(path), pixels[:, :32])
    elif kind == "grey":
        save(Path(path), pixels[:, :, 0])
    elif kind == "truncated":
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) * 2 // 3])
    elif kind == "16 bits":
        os.remove(path)
        Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(Path(path).with_suffix(".png"))


@pytest.mark.parametrize(
    "kind, words",
    [
        ("width", ["40 pixels wide", "R, N, T"]),
        ("views", ["32x8", "2 views", "multimodal.modalities"]),
        ("grey", ["is grey-scale", "R (visible)"]),
        ("truncated", ["cannot be decoded"]),
        ("16 bits", ["16 bits per channel", "8 bits"]),
    ],
)
@pytest.mark.parametrize("split", ["train", "gallery"])
def test_a_strip_that_cannot_be_used(tmp_path: Path, command: Any, kind: str, words: list[str], split: str) -> None:
    write_strips(tmp_path / "RGBNT100")
    path = str(files_of("rgbnt100", tmp_path, split))
    damage_strip(kind, path)
    config = write_config(tmp_path / "config", tmp_path, "rgbnt100")
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", Path(path).stem, *words)


def test_a_truncated_file_among_separate_files(tmp_path: Path, command: Any) -> None:
    write_msvr310(tmp_path / "MSVR310")
    victim = Path(files_of("msvr310", tmp_path, "gallery")[2])
    victim.write_bytes(victim.read_bytes()[:400])
    config = write_config(tmp_path / "config", tmp_path, "msvr310")
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", victim)


def test_a_truncated_strip_in_a_loader_process_is_one_sentence_too(tmp_path: Path, command: Any) -> None:
    write_strips(tmp_path / "RGBNT100")
    victim = Path(files_of("rgbnt100", tmp_path))
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size * 2 // 3])
    config = write_config(tmp_path / "config", tmp_path, "rgbnt100", {"data.workers": 2, "data.check_images": "none"})
    code, _, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    assert code == 2 and err.count("\n") == 1 and str(victim) in err


@pytest.mark.parametrize(
    "source, changes, words",
    [
        ("rgbn300", {}, ["asks for T", "'rgbn300'", "R, N"]),
        ("rgbnt100", {"multimodal.modalities": ["R", "X"]}, ["asks for X", "R, N, T"]),
        ("rgbnt100", {"multimodal.modalities": ["R", "R"]}, ["multimodal.modalities", "different"]),
        ("rgbnt100", {"multimodal.test": ["R+X"]}, ["multimodal.test", "'X'"]),
        ("rgbnt100", {"multimodal.mean": [[0.5], [0.5]]}, ["multimodal.mean", "R, N, T"]),
        ("rgbnt100", {"multimodal.std": [[0.5, 0.5]]}, ["multimodal.std", "1 or 3"]),
        ("rgbnt100", {"multimodal.std": [[0.0]]}, ["multimodal.std", "got 0.0"]),
        ("rgbnt100", {"train.batch_size": 10}, ["train.batch_size 10", "multiple of 3"]),
        ("rgbnt100", {"data.k_tfm": 2}, ["data.k_tfm"]),
        ("rgbnt100", {"data.transforms": ["random_patch"]}, ["data.transforms", "'random_patch'"]),
        ("rgbnt100", {"graft.sampling": "pk"}, ["graft.sampling pk", "RandomIdentitySampler"]),
        ("rgbnt10", {}, ["data set 'rgbnt10'", "did you mean 'rgbnt100'", "graft_embedded.yml"]),
        ("no_such_thing", {}, ["data set 'no_such_thing'", "rgbnt201", "no_such_thing'", "CSV"]),
        ("wmveid863", {"data.root": "nowhere"}, ["WMVEID863", "MSVWild863", "does not exist", "graft_embedded.yml"]),
        ("market1501", {}, ["market1501"]),
        ("table.csv", {"multimodal.modalities": ["V"]}, ["asks for V", "'table.csv'"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value))[:40],
)
def test_one_sentence_and_no_run_folder(
    trees: Path, tmp_path: Path, command: Any, source: str, changes: dict[str, Any], words: list[str]
) -> None:
    config = write_config(tmp_path, trees, source, changes)
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", *words)


@pytest.mark.parametrize("folder, writer", [("MSVWild863", write_wmveid863), ("rgbnt201", write_rgbnt201)])
def test_a_missing_split_is_named_in_the_folder_that_is_there(
    tmp_path: Path, command: Any, folder: str, writer: Callable[[Path], None]
) -> None:
    writer(tmp_path / folder)
    (tmp_path / folder / "test").rename(tmp_path / "elsewhere")
    name = "wmveid863" if folder == "MSVWild863" else "rgbnt201"
    config = write_config(tmp_path / "config", tmp_path, name)
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", f"'{tmp_path / folder / 'test'}', which does not exist", f"{folder}/train")


IMAGE_MODEL = {
    "model.name": "bnneck_baseline",
    "backbone.name": "torchvision:shufflenet_v2_x0_5",
    "train.stages": [1],
    "train.lr_scheduler": "cosine",
}


def test_the_sqrt_schedule_without_graft(trees: Path, tmp_path: Path, command: Any) -> None:
    config = write_config(tmp_path, trees, "rgbnt100", {**IMAGE_MODEL, "train.lr_scheduler": "sqrt"})
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", "train.lr_scheduler sqrt", "model.name graft")


@pytest.mark.parametrize("places", [("source",), ("target",), ("second source",)], ids=lambda places: places[0])
def test_multimodal_data_for_a_model_of_single_images(
    trees: Path, tiny_root: Path, tmp_path: Path, command: Any, places: tuple[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for place in (trees / "RGBNT100", tiny_root / "embedded_persons_tiny"):
        (root / place.name).symlink_to(place)
    persons = ["embedded_persons_tiny"]
    sources = {"source": ["rgbnt100"], "target": persons, "second source": [*persons, "rgbnt100"]}[places[0]]
    changes = {**IMAGE_MODEL, "data.targets": ["rgbnt100"] if places[0] == "target" else persons}
    config = write_config(tmp_path, root, sources, changes)
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", "'rgbnt100'", "several images per sample", "model.name graft")


@pytest.mark.parametrize("place", ["source", "target", "second source", "first source"])
def test_image_data_for_graft(trees: Path, tiny_root: Path, tmp_path: Path, command: Any, place: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for folder in (trees / "RGBNT100", tiny_root / "embedded_persons_tiny"):
        (root / folder.name).symlink_to(folder)
    persons, vehicles = "embedded_persons_tiny", "rgbnt100"
    sources = {"source": [persons], "target": [vehicles], "second source": [vehicles, persons]}.get(
        place, [persons, vehicles]
    )
    changes = {"data.targets": [persons] if place == "target" else [vehicles]}
    config = write_config(tmp_path, root, sources, changes)
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", f"'{persons}'", "one image per sample", "model.name graft", "rgbnt100")


def test_a_folder_of_single_images_for_graft(tiny_root: Path, tmp_path: Path, command: Any) -> None:
    (folder,) = (place for place in (tiny_root / "embedded_persons_tiny").iterdir() if place.is_dir())
    config = write_config(tmp_path, folder.parent, folder.name)
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", folder.name, "no strip of two or three views")


def test_a_sum_with_single_images_is_refused(trees: Path, tiny_root: Path) -> None:
    """What a user of the host's own data manager sees."""
    datasets = HOST.data.datasets
    vehicles = datasets.init_image_dataset("rgbnt100", root=str(trees), verbose=False)
    persons = datasets.init_image_dataset("embedded_persons_tiny", root=str(tiny_root), verbose=False)
    with pytest.raises(UserError, match="one image per sample"):
        vehicles + persons


def test_a_file_that_is_no_table(trees: Path, tmp_path: Path, command: Any) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    config = write_config(tmp_path, tmp_path, "notes.txt")
    result = command("--config-file", config, "data.save_dir", tmp_path / "run")
    check_sentence(result, tmp_path / "run", "notes.txt", "CSV file")


def test_metrics_hold_the_protocols_note(trees: Path, tmp_path: Path, command: Any) -> None:
    config = write_config(tmp_path, trees, "rgbnt100", {"data.targets": ["msvr310"], "train.stages": [1]})
    code, out, err = command("--config-file", config, "data.save_dir", tmp_path / "run")
    assert code == 0, err
    notes = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["notes"]
    assert notes[0] == f"msvr310: {SCENE_NOTE}" and f"note: msvr310: {SCENE_NOTE}" in out
