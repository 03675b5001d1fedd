"""What a configuration makes of the host's data manager: which key goes where, which loaders come out, what is said."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import RandomSampler, SequentialSampler
from wiring import defaults, write_pictures

from relreid_plugin.config.defaults import merge_from_list
from relreid_plugin.errors import UserError
from relreid_plugin.host import HOST, build_datamanager, cap_workers, make_loader
from relreid_plugin.host import datamanager as module
from relreid_plugin.host.patches import worker_init


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two data sets: ``one`` with cameras 1 and 2, ``two`` with cameras 4 and 7."""
    root = tmp_path_factory.mktemp("data")
    write_pictures(root / "one", identities=4, tested=3)
    write_pictures(root / "two", identities=6, tested=2, seed=5)
    for path in list((root / "two").rglob("*.png")):
        path.rename(path.with_name(path.name.replace("_c2s", "_c7s").replace("_c1s", "_c4s")))
    return root


@pytest.fixture
def build(root, tmp_path):
    def make(*pairs, sources=("one",), targets=("one",)):
        cfg = configure(root, *pairs, sources=sources, targets=targets)
        return build_datamanager(cfg, tmp_path / "cache")

    return make


def configure(root, *pairs, sources=("one",), targets=("one",)):
    cfg = defaults()
    cfg.data.root, cfg.data.sources, cfg.data.targets = str(root), list(sources), list(targets)
    cfg.data.height, cfg.data.width, cfg.data.workers, cfg.train.batch_size, cfg.test.batch_size = 16, 8, 0, 4, 5
    cfg.data.transforms = []
    merge_from_list(cfg, [str(item) for item in pairs])
    return cfg


class Asked(Exception):
    pass


# --- which key goes where ----------------------------------------------------------------------------------------------
COMMON = (
    *("data.height", 24, "data.width", 12, "data.norm_mean", [0.1, 0.2, 0.3], "data.norm_std", [0.4, 0.5, 0.6]),
    *("data.split_id", 3, "data.combineall", True, "train.batch_size", 6, "test.batch_size", 7),
    *("data.transforms", ["random_flip", "pad_crop"], "data.k_tfm", 2, "cuhk03.labeled_images", True),
    *("cuhk03.classic_split", True, "market1501.use_500k_distractors", True, "video.seq_len", 4),
    *("video.sample_method", "random"),
)


@pytest.mark.parametrize("video", [False, True])
def test_keys_of_the_hosts_manager(root, tmp_path, monkeypatch, video):
    asked = []

    def manager(**options):
        asked.append(options)
        raise Asked

    monkeypatch.setattr(HOST.data, "VideoDataManager" if video else "ImageDataManager", manager)
    monkeypatch.setattr(module, "resolve_dataset", lambda name, root, **rest: asked.append((name, root, rest)))
    monkeypatch.setattr(module, "dataset_place", lambda name, root, **rest: asked.append((name, root, rest)) or name)
    kind = ("data.type", "video") if video else ("data.type", "image")
    more = ("data.download", True, "data.name_pattern", "duke", "data.load_train_targets", True)
    more += ("data.split_rule", "camera")
    cfg = configure(root, *kind, *COMMON, *more, sources=["one", "x"], targets=["two", "y"])
    before = getattr(HOST.data.datamanager, f"init_{cfg.data.type}_dataset")
    with pytest.raises(Asked):
        build_datamanager(cfg, tmp_path)
    assert getattr(HOST.data.datamanager, f"init_{cfg.data.type}_dataset") is before
    how = {"data_type": cfg.data.type, "download": True, "multimodal": False, "name_pattern": "duke"}
    how["split_rule"] = "camera"
    assert asked[:4] == [(name, str(root), how) for name in ("one", "x", "two", "y")]
    assert asked[4:-1] == [(name, str(root), {"data_type": cfg.data.type}) for name in ("one", "x", "two", "y")]
    common = {
        **{"root": str(root), "sources": ["one", "x"], "targets": ["two", "y"], "height": 24, "width": 12},
        **{"transforms": ["random_flip"], "norm_mean": [0.1, 0.2, 0.3], "norm_std": [0.4, 0.5, 0.6], "use_gpu": False},
        **{"split_id": 3, "combineall": True, "batch_size_train": 6, "batch_size_test": 7, "workers": 0},
        "train_sampler": "SequentialSampler",
    }
    own = {
        **{"k_tfm": 2, "load_train_targets": True, "train_sampler_t": "SequentialSampler", "cuhk03_labeled": True},
        **{"cuhk03_classic_split": True, "market1501_500k": True},
    }
    assert asked[-1] == {**common, **({"seq_len": 4, "sample_method": "random"} if video else own)}


def test_how_data_sets_are_opened(build, monkeypatch, tmp_path, root):
    asked = []
    original = module.open_dataset

    def opening(name, **options):
        asked.append((name, options))
        return original(name, **options)

    monkeypatch.setattr(module, "open_dataset", opening)
    build(sources=["one", "two"], targets=["two"])
    assert [(name, options["mode"]) for name, options in asked][:2] == [("one", "train"), ("two", "train")]
    for _, options in asked:
        assert (options["root"], options["cache_dir"], options["data_type"]) == (str(root), tmp_path / "cache", "image")


# --- loaders -----------------------------------------------------------------------------------------------------------
def test_loaders(build, capsys):
    keys = ("train.val_fraction", 0.34, "sampler.train_sampler", "RandomSampler", "data.pixel_range", [0.0, 255.0])
    manager = build(*keys, sources=["two"], targets=["one"])
    held = 6 - manager.num_train_pids
    assert held == 2 and manager._num_train_pids == 4 and manager.train_loader.dataset.num_train_pids == 4
    loader = manager.train_loader
    assert type(loader.sampler) is RandomSampler and (loader.batch_size, loader.drop_last) == (4, True)
    assert loader.worker_init_fn is worker_init and loader.num_workers == 0 and loader.pin_memory is False
    assert loader.dataset.data is loader.dataset.train and len(loader.dataset) == 16
    for split, data in (("query", manager.val_query), ("gallery", manager.val_gallery)):
        loader = manager.val_loader[split]
        assert type(loader.sampler) is SequentialSampler and loader.batch_size == 5 and loader.worker_init_fn is worker_init
        assert (
            loader.dataset.data == data and loader.dataset.transform is manager.transform_te and loader.pin_memory is False
        )
        assert manager.test_loader["one"][split].worker_init_fn is worker_init
        assert manager.test_loader["one"][split].dataset.pixel_range == manager.train_loader.dataset.pixel_range != None  # noqa: E711
    out = capsys.readouterr().out
    counts = f"({len(manager.val_query)} queries, {len(manager.val_gallery)} gallery items)"
    assert f"=> Held out 2 of 6 training identities {counts}; 4 identities with 16 items train" in out
    assert manager.label_map == dict(enumerate(manager.train_identities)) and len(manager.label_map) == 4
    assert set(manager.train_identities) < {f"{pid:04d}" for pid in range(1, 7)}
    whole = build(sources=["two"], targets=["one"])
    assert (whole.val_query, whole.val_gallery, whole.val_loader) == ([], [], None)
    assert whole.label_map == {n: f"{n + 1:04d}" for n in range(6)} and "Held out" not in capsys.readouterr().out


def test_which_identities_are_held_out_is_a_matter_of_the_seed(build):
    held = {
        seed: tuple(build("train.val_fraction", 0.34, "train.seed", seed, sources=["two"]).train_identities)
        for seed in range(6)
    }
    assert len(set(held.values())) > 1
    again = build("train.val_fraction", 0.34, "train.seed", 3, sources=["two"])
    assert tuple(again.train_identities) == held[3]


def test_memory_is_pinned_for_the_gpu(root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpu in (True, False):
        cfg = configure(root, "train.val_fraction", 0.5)
        cfg.use_gpu = gpu
        manager = build_datamanager(cfg, tmp_path)
        assert manager.train_loader.pin_memory is gpu and manager.val_loader["query"].pin_memory is gpu


def test_what_a_range_that_is_none_is_called(build):
    with pytest.raises(UserError, match="^key 'data.pixel_range' must be"):
        build("data.pixel_range", [9.0, 0.0])


def test_the_last_batch_is_whole_unless_it_is_the_only_one(build, capsys):
    for size, batches, said in ((5, 3, False), (16, 1, False), (17, 1, True)):
        manager = build("train.batch_size", size, "sampler.train_sampler", "RandomSampler")
        assert len(manager.train_loader) == batches and manager.train_loader.batch_size == size
        line = f"the training set has 16 items, less than train.batch_size {size}: one batch per epoch"
        assert (line in capsys.readouterr().out) is said and manager.train_loader.drop_last is not said


def test_batches_of_whole_identities(build, capsys):
    keys = ("sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 2)
    for size, whole in ((4, 4), (5, 4), (7, 6), (2, 2)):
        loader = build(*keys, "train.batch_size", size).train_loader
        assert loader.batch_size == whole and loader.sampler.batch_size == whole and loader.sampler.num_instances == 2
        line = f"train.batch_size {size} is no multiple of sampler.num_instances 2; batches have {whole} items"
        assert (line in capsys.readouterr().out) is (size != whole)
    other = build("sampler.train_sampler", "RandomSampler", "sampler.num_instances", 3, "train.batch_size", 4)
    assert other.train_loader.batch_size == 4


def test_loaders_of_targets_train_by_a_sampler_of_their_own(build):
    keys = ("data.load_train_targets", True, "sampler.train_sampler", "RandomSampler")
    more = ("sampler.train_sampler_t", "RandomIdentitySampler", "sampler.num_instances", 2, "data.pixel_range", [0.0, 9.0])
    manager = build(*keys, *more, targets=["two"])
    assert type(manager.train_loader.sampler) is RandomSampler and len(manager.train_loader.dataset) == 16
    loader = manager.train_loader_t
    assert type(loader.sampler).__name__ == "RandomIdentitySampler" and len(loader.dataset) == 24
    assert loader.worker_init_fn is worker_init and loader.dataset.pixel_range == manager.train_loader.dataset.pixel_range
    with pytest.raises(UserError, match="'sampler.train_sampler_t' is 'Random', which is no sampler"):
        build("sampler.train_sampler_t", "Random")
    with pytest.raises(UserError, match="needs sources and targets apart, but both hold 'one'"):
        build(*keys, targets=["two", "one"])


def test_a_loader_over_chosen_data(build):
    manager = build()
    data = tuple(manager.train_loader.dataset.train[:3])
    manager.train_loader.dataset.k_tfm = 2
    loader = make_loader(manager, data, manager.transform_te, 2, 0)
    assert (
        loader.dataset.data == list(data) and loader.dataset.k_tfm == 1 and loader.dataset.transform is manager.transform_te
    )
    assert type(loader.sampler) is SequentialSampler and (loader.batch_size, loader.num_workers) == (2, 0)
    assert loader.worker_init_fn is worker_init and loader.pin_memory is False
    assert [len(batch["pid"]) for batch in loader] == [2, 1] and manager.train_loader.dataset.k_tfm == 2
    manager.use_gpu = True
    assert make_loader(manager, data, manager.transform_te, 2, 0).pin_memory is True


def test_workers(build, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0: "this"}[pid] and {1, 2, 5}, raising=False)
    assert [cap_workers(n) for n in (-1, 0, 1, 3, 4)] == [0, 0, 1, 3, 3]
    loader = build("data.workers", 8, "train.val_fraction", 0.5)
    assert loader.train_loader.num_workers == 3 and loader.val_loader["query"].num_workers == 3
    assert "data.workers 8 is more than this machine's processors; 3 are used" in capsys.readouterr().out
    build("data.workers", 3)
    assert "processors" not in capsys.readouterr().out
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert [cap_workers(n) for n in (-1, 0, 1, 2, 3)] == [0, 0, 1, 2, 2]
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert [cap_workers(n) for n in (-1, 0, 1, 2)] == [0, 0, 1, 1]


# --- samplers ----------------------------------------------------------------------------------------------------------
def items(pairs):
    """Items of (identity, camera, data set) with a count each."""
    return [("x", *key) for key, count in pairs.items() for _ in range(count)]


def test_keys_of_the_samplers(monkeypatch, build):
    asked = []

    def make(*args, **options):
        asked.append((args, options))
        return RandomSampler(args[0])

    monkeypatch.setattr(HOST.data.sampler, "build_train_sampler", make)
    numbers = {"batch_size": 4, "num_instances": 2, "num_cams": 1, "num_datasets": 3}
    data = tuple(items({(0, 0, 0): 4, (1, 1, 1): 4, (2, 0, 2): 4}))
    for name in ("RandomSampler", "RandomIdentitySampler", "RandomDomainSampler"):
        module.build_sampler(data, name, **numbers)
        assert asked.pop() == ((list(data), name), numbers)
    keys = ("sampler.num_instances", 2, "sampler.num_cams", 5, "sampler.num_datasets", 6, "train.batch_size", 4)
    manager = build("sampler.train_sampler", "RandomSampler", *keys)
    wanted = {"batch_size": 4, "num_instances": 2, "num_cams": 5, "num_datasets": 6}
    assert asked == [((manager.train_loader.dataset.train, "RandomSampler"), wanted)]


def test_what_a_batch_needs():
    def build(name, data, batch_size, **numbers):
        options = {"num_instances": 1, "num_cams": 0, "num_datasets": 0, **numbers}
        return module.build_sampler(items(data), name, batch_size=batch_size, **options)

    people = {(0, 0, 0): 4, (1, 0, 0): 4, (2, 0, 0): 4}
    for batch_size, instances in ((6, 2), (3, 1), (4, 4), (12, 4), (7, 2)):
        build("RandomIdentitySampler", people, batch_size, num_instances=instances)
    for batch_size, instances in ((4, 0), (4, 5), (4, -1)):
        with pytest.raises(
            UserError, match=rf"'sampler.num_instances {instances}' must lie in 1 … 'train.batch_size' \(4\)"
        ):
            build("RandomIdentitySampler", people, batch_size, num_instances=instances)
    message = (
        r"^a batch needs 4 identities \('train.batch_size 8' / 'sampler.num_instances 2'\), but only 3 train; lower "
        r"'train.batch_size' to at most 6 or raise 'sampler.num_instances'\.$"
    )
    with pytest.raises(UserError, match=message):
        build("RandomIdentitySampler", people, 8, num_instances=2)
    cameras = {(0, 3, 9): 4, (1, 5, 9): 3, (2, 8, 9): 5}
    sets = {(0, 9, 3): 4, (1, 9, 5): 3, (2, 9, 8): 5}
    for name, data, key, what in (
        ("RandomDomainSampler", cameras, "num_cams", "camera"),
        ("RandomDatasetSampler", sets, "num_datasets", "data set"),
    ):
        for number, batch_size in ((0, 9), (3, 9), (1, 3), (2, 6), (-1, 9)):
            build(name, data, batch_size, **{key: number})
        for number, batch_size, message in (
            (1, 4, rf"^a batch needs 4 images of one {what} \('train.batch_size 4' / 'sampler.{key}' 1\), but one"),
            (4, 8, rf"^'sampler.{key} 4' is more than the training data's 3 \({what}s\)\.$"),
            (2, 5, rf"^'train.batch_size 5' must be a multiple of 'sampler.{key}' \(2\)\.$"),
            (0, 8, rf"^'train.batch_size 8' must be a multiple of 'sampler.{key}' \(3\)\.$"),
            (
                0,
                12,
                rf"^a batch needs 4 images of one {what} \('train.batch_size 12' / 'sampler.{key}' 3\), but one {what} has "
                rf"only 3; lower 'train.batch_size' to at most 9\.$",
            ),
        ):
            with pytest.raises(UserError, match=message):
                build(name, data, batch_size, **{key: number})
    with pytest.raises(UserError, match="'sampler.num_cams 4' is more"):
        module._check_domains(Counter({0: 3, 1: 3}), "sampler.num_cams", 4, 8, "camera")


def test_too_few_images_to_train(root, tmp_path):
    data = tmp_path / "small"
    shutil.copytree(root / "one", data)
    files = sorted((data / "bounding_box_train").iterdir())
    for path in files[2:]:
        path.unlink()
    cfg = configure(tmp_path, "train.batch_size", 2, sources=["small"], targets=["small"])
    assert len(build_datamanager(cfg, tmp_path / "cache").train_loader) == 1
    files[1].unlink()
    with pytest.raises(UserError, match="^data sets small have 1 training images; 2 are needed"):
        build_datamanager(cfg, tmp_path / "cache")


# --- several sources, cameras and names ----------------------------------------------------------------------------------
def test_cameras_and_identities_of_several_sources(build):
    manager = build(sources=["one", "two"], targets=["two", "one"])
    train = manager.train_loader.dataset.train
    assert [set(manager.camera_names[name].values()) for name in ("one", "two")] == [{"1", "2"}, {"4", "7"}]
    assert [name for _, name in sorted(manager.label_map.items())] == [
        *(f"one/{pid:04d}" for pid in range(1, 5)),
        *(f"two/{pid:04d}" for pid in range(1, 7)),
    ]
    one, two = (sorted({item[2] for item in train if item[3] == number}) for number in (0, 1))
    written = {(source, text): number for number, source, text in manager.cameras.cameras}
    assert set(written) == {("one", "1"), ("one", "2"), ("two", "4"), ("two", "7")} and manager.num_cameras == 4
    assert one == [written["one", "1"], written["one", "2"]] and two == [written["two", "4"], written["two", "7"]]
    assert max(one) < min(two) and manager.train_loader.dataset.num_train_cams == 4
    for path, label, camera, number, *_ in train:
        name = os.path.basename(path)
        assert manager.label_map[label] == f"{('one', 'two')[number]}/{name[:4]}"
        assert written[("one", "two")[number], name[6]] == camera
    assert manager.train_loader.dataset.data is train and manager.cameras.sources == ("one", "two")
    alone = build(sources=["two"], targets=["two", "one"])
    assert list(alone.label_map.values()) == [f"{pid:04d}" for pid in range(1, 7)]
    assert [camera[1:] for camera in alone.cameras.cameras] == [("two", "4"), ("two", "7")]
    assert {camera[0] for camera in alone.cameras.cameras} == {item[2] for item in alone.train_loader.dataset.train}
    assert set(alone.camera_names) == {"two", "one"} and set(alone.identity_names) == {"two", "one"}


def test_numbers_of_cameras_by_loops():
    def opened(*cameras, names=None):
        made = SimpleNamespace(train=[("p", 0, camera, 9) for camera in cameras])
        if names is not None:
            made.camera_names = names
        return made

    first, second, third = opened(2, 5, 2), opened(0, 3, names={3: "door"}), opened(1)
    mixed = SimpleNamespace(train=[("p", n, 99, 7) for n in range(6)], num_train_cams=99)
    module._number_cameras_on(mixed, [first, second, third])
    assert mixed.train == [("p", n, camera, 7) for n, camera in enumerate((2, 5, 2, 6, 9, 11))]
    assert mixed.data is mixed.train and mixed.num_train_cams == 5
    found = module._training_cameras(mixed, ["a", "b", "c"], [first, second, third])
    assert found == [(2, "a", "2"), (5, "a", "5"), (6, "b", "0"), (9, "b", "door"), (11, "c", "1")]
    mixed.train = mixed.train[:3] + mixed.train[4:]  # an identity held out takes its camera with it
    assert (6, "b", "0") not in module._training_cameras(mixed, ["a", "b", "c"], [first, second, third])
    single = SimpleNamespace(train=[("p", 0, 5, 7)])
    module._number_cameras_on(single, [opened(5)])
    assert single.train == [("p", 0, 5, 7)] and not hasattr(single, "data")
    pair = SimpleNamespace(train=[("p", 0, 9, 7), ("p", 1, 9, 7)])
    module._number_cameras_on(pair, [opened(2), opened(2)])
    assert [item[2] for item in pair.train] == [2, 5]
    with pytest.raises(ValueError):
        module._number_cameras_on(SimpleNamespace(train=[("p", 0, 9, 7)]), [opened(2), opened(2)])
    empty = SimpleNamespace(train=[("p", 0, 4, 7)])
    module._number_cameras_on(empty, [opened(), opened(4)])
    assert empty.train == [("p", 0, 4, 7)] and module._training_cameras(empty, ["a", "b"], [opened(), opened(4)]) == [
        (4, "b", "4")
    ]


def test_no_camera_labels_no_cameras(build, root, tmp_path):
    for path in (root / "one" / "bounding_box_train").iterdir():
        target = tmp_path / "plain" / "bounding_box_train" / (path.name[:4] + path.name.replace("_", "")[4:])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(
            path, tmp_path / "plain" / "bounding_box_train" / f"{path.name[:4]}_{path.stem[5:].replace('c', 'x')}.png"
        )
    for split in ("query", "bounding_box_test"):
        for path in (root / "one" / split).iterdir():
            target = tmp_path / "plain" / split / f"{path.name[:4]}_{path.stem[5:].replace('c', 'x')}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    manager = build(sources=[str(tmp_path / "plain")], targets=["one"])
    assert manager.num_cameras == 0 and manager.cameras.cameras == ()


# --- what is refused and said --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["sources", "targets"])
def test_one_data_set_twice(build, root, key):
    for names, pair in (
        (["one", "two", "one"], "'one' twice"),
        (["one", str(root / "one")], "'one' and '.*one', which are"),
    ):
        with pytest.raises(UserError, match=f"^key 'data.{key}' names {pair}.*; name it once"):
            build(**{key: names})


def test_several_images_per_sample_and_models_for_them(build, monkeypatch):
    def cfg(name):
        return SimpleNamespace(model=SimpleNamespace(name=name))

    several = object.__new__(module.MultimodalDataset)
    module._require_kind(cfg("graft"), "set", several)
    module._require_kind(cfg("resnet50"), "set", object())
    with pytest.raises(
        UserError, match="^data set 'set' has one image per sample, but 'model.name graft' fuses several; cho"
    ):
        module._require_kind(cfg("graft"), "set", object())
    message = "^data set 'set' has several images per sample, but 'model.name osnet' takes one; choose 'model.name graft'"
    with pytest.raises(UserError, match=message):
        module._require_kind(cfg("osnet"), "set", several)
    monkeypatch.setattr(module, "MultimodalDataset", object)
    with pytest.raises(UserError, match="'one' has several images per sample, but 'model.name resnet50' takes one; choose"):
        build()


def test_every_picture_is_checked(root, tmp_path, monkeypatch):
    asked = []

    def check(paths, mode, **options):
        asked.append((list(paths), mode, options))

    monkeypatch.setattr(module, "check_images", check)
    keys = ("data.check_images", "full", "data.pixel_range", [0.0, 9.0], "data.load_train_targets", True)
    build_datamanager(configure(root, *keys, targets=["two"]), tmp_path)
    ((paths, mode, options),) = asked
    wanted = [*(root / "one" / "bounding_box_train").iterdir(), *(root / "two").rglob("*.png")]
    assert sorted(paths) == sorted(map(str, wanted)) and mode == "full" and list(options) == ["pixel_range"]
    assert options["pixel_range"] is not None


def test_what_is_said_of_shared_identities(root, tmp_path, capsys):
    data = tmp_path / "shared"
    shutil.copytree(root / "one", data)
    for path in list((data / "query").iterdir()) + list((data / "bounding_box_test").iterdir()):
        if path.name.startswith("0101"):
            path.rename(path.with_name("0002" + path.name[4:].replace("_00.", "_07.")))
    note = "test set 'shared': 1 identity is trained on as well ('0002'); its scores are not those of unseen identities"

    def notes(*pairs, sources=("shared",)):
        cfg = configure(tmp_path, *pairs, sources=sources, targets=["shared"])
        manager = build_datamanager(cfg, tmp_path / "cache")
        said = [line.removeprefix("note: ") for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        return manager.notes, said

    kept, said = notes()
    assert note in kept and kept.count(note) == 1 and note in said
    assert note not in notes("data.check_leakage", "none")[0]
    assert note not in notes("data.combineall", True)[0]
    assert note not in notes(sources=[str(root / "two")])[0]
    kept, _ = notes(sources=[str(root / "two"), str(tmp_path / "shared")])
    assert note in kept


@pytest.mark.parametrize("labelled", [True, False, None])
def test_names_and_cameras_are_asked_of_the_data_sets(root, tmp_path, monkeypatch, labelled):
    original = module.open_dataset

    def bare(name, **options):
        dataset = original(name, **options)
        for attribute in ("camera_names", "identity_names", "has_cameras", "shared_identities", "notes"):
            for owner in (dataset.__dict__, type(dataset).__dict__):
                if attribute in owner:
                    monkeypatch.delattr(dataset if owner is dataset.__dict__ else type(dataset), attribute)
        if labelled is not None:
            dataset.has_cameras = labelled
            dataset.camera_names, dataset.identity_names = {0: "door"}, {101: "Eve"}
        return dataset

    monkeypatch.setattr(module, "open_dataset", bare)
    manager = build_datamanager(configure(root), tmp_path)
    assert manager.num_cameras == (0 if labelled is False else 2)
    assert manager.camera_names == {"one": {} if labelled is None else {0: "door"}}
    assert manager.identity_names == {"one": {} if labelled is None else {101: "Eve"}}


def test_what_is_said_of_queries_without_a_match(root, tmp_path, capsys):
    data = tmp_path / "lonely"
    shutil.copytree(root / "one", data)
    for path in (data / "bounding_box_test").glob("0101*"):
        path.unlink()
    manager = build_datamanager(configure(tmp_path, sources=["lonely"], targets=["lonely"]), tmp_path / "cache")
    (note,) = [note for note in manager.notes if "lonely" in note]
    assert "2 of 6 queries" in note or "2" in note
    assert f"note: {note}" in capsys.readouterr().out.splitlines()


def test_training_and_test_files_are_compared(root, tmp_path, monkeypatch):
    asked = {}

    def audit(train, identities, tests, **options):
        asked.update(train=train, identities=identities, tests=tests, options=options)
        return ["one note"]

    monkeypatch.setattr(module, "audit_splits", audit)
    cfg = configure(root, "data.check_leakage", "path", sources=["two"], targets=["one", "two"])
    manager = build_datamanager(cfg, tmp_path)
    assert (
        asked["identities"] == [f"{pid:04d}" for pid in range(1, 7)] and asked["train"] == manager.train_loader.dataset.train
    )
    assert asked["options"] == {"check": "path", "files": None} and list(asked["tests"]) == ["one", "two"]
    assert asked["tests"]["one"].query == manager.test_dataset["one"]["query"] and len(asked["tests"]["one"].gallery) == 6
    assert asked["tests"]["two"].gallery == manager.test_dataset["two"]["gallery"] and "one note" in manager.notes


def test_held_out_identities_are_checked_for_matches(root, tmp_path, monkeypatch, capsys):
    asked = []

    def matches(name, test, **options):
        asked.append((name, test.query, test.gallery, options))
        return ["held note"] if name.startswith("held") else []

    monkeypatch.setattr(module, "check_matches", matches)
    manager = build_datamanager(configure(root, "train.val_fraction", 0.5), tmp_path)
    assert [(name, options.get("group")) for name, _, _, options in asked] == [
        ("one", "camera"),
        ("held-out identities", None),
    ]
    assert asked[1][3]["way_out"] == "change 'train.val_fraction' or 'train.seed', or set the fraction to 0"
    assert asked[1][1:3] == (manager.val_query, manager.val_gallery)
    assert asked[0][1:3] == (manager.test_dataset["one"]["query"], manager.test_dataset["one"]["gallery"])
    assert manager.notes.count("held note") == 1 and "note: held note" in capsys.readouterr().out


def test_notes_of_the_data_sets_come_first(root, tmp_path, monkeypatch, capsys):
    original = module.open_dataset

    def noted(name, **options):
        dataset = original(name, **options)
        dataset.notes = ["of its own"]
        return dataset

    monkeypatch.setattr(module, "open_dataset", noted)
    manager = build_datamanager(configure(root, sources=["one"], targets=["two"]), tmp_path)
    assert manager.notes[:2] == ["one: of its own", "two: of its own"]


def test_pictures_of_a_batch_are_read_by_their_range(root, tmp_path):
    data = tmp_path / "deep"
    shutil.copytree(root / "one", data)
    for path in data.rglob("*.png"):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 100
        Image.fromarray(grey).save(path)
    with pytest.raises(UserError, match="data.pixel_range"):
        build_datamanager(configure(tmp_path, sources=["deep"], targets=["deep"]), tmp_path / "cache")
    cfg = configure(tmp_path, "data.pixel_range", [0, 25500], sources=["deep"], targets=["deep"])
    manager = build_datamanager(cfg, tmp_path / "cache")
    images = next(iter(manager.test_loader["deep"]["query"]))["img"]
    assert bool(torch.isfinite(images).all()) and float(images.std()) > 0.05
