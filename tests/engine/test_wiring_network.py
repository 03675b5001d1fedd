"""The network of a run and its features: what is opened, which cameras and keys of the bank, devices, read pictures."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from wiring import settings, toy_checkpoint, write_pictures

from relreid_plugin.data.cameras import UNKNOWN, CameraRows, CameraTable
from relreid_plugin.engine import features as features_module
from relreid_plugin.engine import inference
from relreid_plugin.engine import network as network_module
from relreid_plugin.engine.bank import bank_key
from relreid_plugin.engine.evaluator import EvaluationOptions
from relreid_plugin.engine.features import RunFeatures
from relreid_plugin.engine.inference import cameras_of_checkpoint, data_of_checkpoint
from relreid_plugin.engine.network import Network, View, build_network
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import Features, TestFeatures
from relreid_plugin.graft.network import GraFTNetwork
from relreid_plugin.host import HOST
from relreid_plugin.methods import Method

LAST = "last.pth.tar"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


class Embeds(Method):
    """A method whose models have an embedding of cameras, or not."""

    name, embeds = "embeds", True

    def embeds_cameras(self, cfg):
        return self.embeds


class Plain(Embeds):
    embeds = False


@pytest.fixture
def embedding(monkeypatch):
    """A network with an embedding of cameras."""
    monkeypatch.setattr(network_module, "methods", lambda: (Plain(), Embeds()))


# --- opening the data ------------------------------------------------------------------------------------------------
def network_run(tmp_path, cfg, *, inference=False, restores=False, stages=(1,), cameras=None):
    first = SimpleNamespace(tested_path=lambda run: tmp_path / "stage1" / LAST, will_restore=lambda run: restores)
    run = SimpleNamespace(cfg=cfg, first=first, inference=inference, folder=tmp_path, stages=list(stages))
    run.stage_folder = lambda number: tmp_path / f"stage{number}"
    run.datamanager = SimpleNamespace(cameras=cameras)
    return run


def test_which_data_is_opened(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(network_module, "data_of_checkpoint", lambda *values: (asked.append(values), "of checkpoint")[1])
    monkeypatch.setattr(
        network_module, "build_datamanager", lambda cfg, cache_dir: (asked.append((cfg, cache_dir)), "all")[1]
    )
    cfg = settings()

    def opened(cfg, **options):
        return Network(cfg).open_data(network_run(tmp_path, cfg, **options))

    assert opened(cfg) == opened(cfg, inference=True) == "all" and asked[0] == (cfg, tmp_path / "cache") == asked[1]
    toy_checkpoint(tmp_path / "stage1" / LAST, epoch=4)
    assert opened(cfg) == "all" and opened(cfg, inference=True) == "of checkpoint"
    given, state, cache = asked[-1]
    assert given is cfg and state["epoch"] == 4 and cache == tmp_path / "cache"
    video = settings()
    video.data.type = "video"
    several = settings()
    several.model.name = "graft"
    assert opened(video, inference=True) == opened(several, inference=True) == "all"
    toy_checkpoint(tmp_path / "stage1" / LAST, kind="relation")
    with pytest.raises(UserError, match="holds the relation model, but the image model"):
        opened(cfg, inference=True)


def table(*cameras):
    return CameraTable.of([(number, "a", str(number)) for number in cameras], ["a"])


def test_whose_cameras_the_model_has(tmp_path, embedding):
    own, path = table(0, 1, 2), tmp_path / "stage1" / LAST

    def cameras(*keys, cameras=own, **options):
        cfg = settings("data.sources", ["a"], "train.max_epoch", 5, *keys)
        return Network(cfg).camera_table(network_run(tmp_path, cfg, cameras=cameras, **options))

    assert cameras() is own and cameras(restores=True) is own  # there is no checkpoint
    listed = {"cameras": [[0, "a", "0"], [1, "a", "1"], [2, "a", "2"]]}
    toy_checkpoint(path, epoch=2, **listed)
    assert cameras() is own
    assert cameras(restores=True) == own and cameras(restores=True) is not own
    other = {"cameras": [[0, "a", "0"], [1, "a", "1"]]}
    toy_checkpoint(path, epoch=5, **other)
    assert cameras(restores=True) == table(0, 1)  # it is complete
    toy_checkpoint(path, epoch=4, **other)
    assert cameras(restores=True, stages=[]) == table(0, 1) and cameras(restores=True, stages=[2]) == table(0, 1)
    words = f"checkpoint '{path}' was trained with 2 cameras, and the training set's 3 are not the same ones"
    with pytest.raises(UserError, match=words):
        cameras(restores=True)
    # from another file
    source = tmp_path / "r.pth"
    assert cameras("model.resume", source) is own
    toy_checkpoint(source, epoch=4, **listed)
    assert cameras("model.resume", source) == own and cameras("model.resume", source) is not own
    toy_checkpoint(source, epoch=4, **other)
    with pytest.raises(UserError, match=f"checkpoint '{source}' was trained with 2 cameras"):
        cameras("model.resume", source)
    source.write_text("no checkpoint")
    assert cameras("model.resume", source) is own
    toy_checkpoint(source, kind="relation", epoch=4, **other)
    assert cameras("model.resume", source) is own


def test_cameras_of_older_checkpoints(tmp_path, embedding):
    path = tmp_path / "stage1" / LAST

    def cameras(*numbers, rows, epoch=1):
        toy_checkpoint(path, epoch=epoch, weights={"cameras.table": torch.zeros(rows, 2)} if rows else {})
        cfg = settings("data.sources", ["a"], "train.max_epoch", 5)
        return Network(cfg).camera_table(network_run(tmp_path, cfg, cameras=table(*numbers), restores=True))

    assert cameras(0, 1, 2, rows=3) == CameraTable(None, 3, ("a",))
    assert cameras(0, 1, rows=4).size == 4 and cameras(0, 3, rows=4).size == 4
    with pytest.raises(UserError, match="was trained with 4 cameras, and the training set's 2 are not the same"):
        cameras(0, 4, rows=4)
    assert cameras(0, 4, rows=2).size == 2 and cameras(0, 4, rows=4, epoch=5).size == 4


def test_without_an_embedding_cameras_are_the_training_sets(tmp_path, monkeypatch):
    toy_checkpoint(tmp_path / "stage1" / LAST, cameras=[[0, "a", "0"]])
    cfg, own = settings("data.sources", ["a"]), table(0, 1)
    monkeypatch.setattr(network_module, "methods", lambda: (Plain(),))
    network = Network(cfg)
    assert network.camera_table(network_run(tmp_path, cfg, cameras=own, restores=True)) is own
    assert network.embeds_cameras is False and network.data_notes(SimpleNamespace(cameras=table())) == []
    monkeypatch.setattr(network_module, "methods", lambda: (Plain(), Embeds()))
    assert network.embeds_cameras is True and network.data_notes(SimpleNamespace(cameras=own)) == []
    assert network.data_notes(SimpleNamespace(cameras=table(0))) == []
    notes = ["the training data has no camera labels; the camera embedding is off."]
    assert network.data_notes(SimpleNamespace(cameras=table())) == notes


# --- the plain network -----------------------------------------------------------------------------------------------
def test_the_plain_network(monkeypatch):
    cfg, noted = settings("train.lr", 0.02), []
    network, model = Network(cfg), nn.Linear(2, 2)
    run = SimpleNamespace(model=model, bare=model, datamanager="manager")
    assert network.stands_alone(run) is False and network.prepare_weights(model, None) is None
    assert network.views() == [View()] and [network.classified(items) for items in (1, 7)] == [1, 7]
    assert (View().label, View().part, View().subset, View().note) == ("image model", "", (), "")
    with network.seeing(run, View()):
        pass

    def build(cfg, manager, model, optimizer, scheduler, *, feature_dim):
        noted.append((cfg, manager, model, optimizer, scheduler, feature_dim))
        return "engine", {}

    monkeypatch.setattr(network_module, "build_image_engine", build)
    assert network.build_engine(run) == ("engine", {})
    model.feature_dim = 16
    network.build_engine(run)
    for (given, manager, of, optimizer, scheduler, dim), wanted in zip(noted, (None, 16)):
        assert given is cfg and manager == "manager" and of is model and dim == wanted
        assert scheduler.optimizer is optimizer and optimizer.param_groups[0]["initial_lr"] == 0.02
        assert {id(value) for group in optimizer.param_groups for value in group["params"]} == set(
            map(id, model.parameters())
        )


def test_the_network_of_a_configuration(monkeypatch):
    cfg = settings()
    network = build_network(cfg)
    assert type(network) is Network and network.cfg is cfg
    several = settings()
    several.model.name = "graft"
    assert type(build_network(several)) is GraFTNetwork and build_network(several).cfg is several
    several.model.name = "transreid"  # of a method that trains it as any
    assert type(build_network(several)) is Network
    asked = []
    method = SimpleNamespace(network=lambda cfg: (asked.append(cfg), "its own")[1])
    monkeypatch.setattr(network_module, "method_of", lambda name: (asked.append(name), method)[1])
    assert build_network(cfg) == "its own" and asked == [cfg.model.name, cfg]


def test_how_images_are_read_in_words():
    cfg = settings("data.norm_mean", [0.1, 0.2, 0.3], "data.norm_std", [0.4, 0.5, 0.6])
    assert Network(cfg).describe_input(None) == "[0.1, 0.2, 0.3]|[0.4, 0.5, 0.6]"
    cfg = settings("data.norm_mean", [0.1, 0.2, 0.3], "data.norm_std", [0.4, 0.5, 0.6], "data.pixel_range", [0, 1000])
    assert Network(cfg).describe_input(None) == "[0.1, 0.2, 0.3]|[0.4, 0.5, 0.6]|range [0, 1000]"


def test_the_picture_of_an_item(pictures, monkeypatch):
    path = str(sorted((pictures / "query").iterdir())[0])
    unread = [("", 0, 0, 0)]
    dataset = HOST.data.ImageDataset(
        unread, unread, unread, transform=lambda image: 1 / 0, k_tfm=2, mode="query", verbose=False
    )
    dataset.pixel_range = None
    run = SimpleNamespace(datamanager=SimpleNamespace(train_loader=SimpleNamespace(dataset=dataset)))
    picture = Network(settings()).read_picture(run, path)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(path)))
    assert dataset.data == unread and dataset.k_tfm == 2  # left alone
    asked = []
    monkeypatch.setattr(network_module, "read_image", lambda *values: (asked.append(values), "first")[1])
    cfg = settings("data.pixel_range", [0, 500])
    cfg.data.type = "video"
    assert Network(cfg).read_picture(None, ("a.png", "b.png")) == "first"
    assert asked == [("a.png", network_module.check_range("data.pixel_range", [0, 500]))]
    with pytest.raises(UserError, match="'data.pixel_range'"):
        cfg.data.pixel_range = [5, 5]
        Network(cfg).read_picture(None, ("a.png",))


# --- a trained run that is looked into -------------------------------------------------------------------------------
def test_cameras_of_a_checkpoint():
    cfg = settings("data.sources", ["a", "b"])
    state = {"cameras": [[3, "a", "x"], [1, "b", "y"]], "state_dict": {}}
    assert cameras_of_checkpoint(cfg, state) == CameraTable(((1, "b", "y"), (3, "a", "x")), 2, ("a", "b"))
    rows = {"state_dict": {"cameras.table": torch.zeros(7, 2)}}
    assert cameras_of_checkpoint(cfg, rows) == CameraTable(None, 7, ("a", "b"))
    assert cameras_of_checkpoint(cfg, {"state_dict": {}}) == CameraTable(None, 0, ("a", "b"))


def test_data_of_a_checkpoint(pictures, tmp_path, capsys):
    name = str(pictures)
    keys = ["data.sources", ["neverwhere"], "data.targets", [name], "data.height", 20, "data.width", 10]
    keys += ["data.norm_mean", [0.1, 0.2, 0.3], "data.norm_std", [0.4, 0.5, 0.6], "data.pixel_range", [0, 500]]
    cfg = settings(*keys, "data.check_images", "header", "data.transforms", ["random_erase"])
    state = {"num_classes": 9, "label_map": {"0001": 0}, "cameras": [[0, "neverwhere", "1"]], "state_dict": {}}
    manager = data_of_checkpoint(cfg, state, tmp_path / "cache")
    assert "=> Loaded" not in capsys.readouterr().out  # the empty list of training images is not described
    assert (manager.num_train_pids, manager.label_map, manager.num_cameras) == (9, {"0001": 0}, 1)
    assert manager.cameras == CameraTable.of(state["cameras"], ["neverwhere"]) and manager.use_gpu is False
    assert list(manager.sources) == ["neverwhere"] and list(manager.targets) == [name]
    assert (manager.height, manager.width) == (20, 10) and manager.test_loader == {}
    assert manager.val_query == manager.val_gallery == [] and manager.camera_names == manager.identity_names == {}
    dataset = manager.train_loader.dataset
    assert len(dataset.data) == 0 and dataset.mode == "query" and dataset.pixel_range == (0, 500)
    pixels = manager.transform_te(Image.new("RGB", (30, 40), (60, 90, 120)))
    wanted = [(60 / 255 - 0.1) / 0.4, (90 / 255 - 0.2) / 0.5, (120 / 255 - 0.3) / 0.6]
    assert pixels.shape == (3, 20, 10) and torch.allclose(pixels[:, 0, 0], torch.tensor(wanted), atol=1e-5)
    names = [type(step).__name__ for step in manager.transform_tr.transforms]
    assert not any("Erasing" in step or "Flip" in step for step in names)
    sets = manager.test_dataset
    assert len(sets) == 1 and list(sets) == [name] and name in sets and "neverwhere" not in sets
    with pytest.raises(KeyError, match="neverwhere"):
        sets["neverwhere"]
    found = sets[name]
    assert capsys.readouterr().out == "" and sets[name] is found and set(found) == {"query", "gallery"}
    assert sorted(path.rsplit("/", 1)[1] for path, *_ in found["query"]) == sorted(
        p.name for p in (pictures / "query").iterdir()
    )
    assert len(found["gallery"]) == len(list((pictures / "bounding_box_test").iterdir()))
    assert manager.camera_names[name] and name in manager.identity_names


def test_how_test_sets_are_opened_late(tmp_path, monkeypatch):
    asked = {}
    items = [("q.png", 1, 0)], [("g.png", 1, 1)]
    dataset = SimpleNamespace(query=items[0], gallery=items[1], camera_names={0: "a"}, identity_names={1: "x"})

    def note(name, result=None):
        return lambda *values, **options: (asked.__setitem__(name, (values, options)), result)[1]

    monkeypatch.setattr(inference, "resolve_dataset", note("resolve"))
    monkeypatch.setattr(inference, "open_dataset", note("open", dataset))
    monkeypatch.setattr(inference, "check_images", note("check"))
    keys = ["data.targets", ["one", "two"], "data.root", "there", "data.combineall", True, "data.split_id", 3]
    keys += [
        "data.split_rule",
        "time",
        "data.name_pattern",
        "market",
        "data.download",
        True,
        "data.check_images",
        "full",
        "data.pixel_range",
        [0, 9],
    ]
    keys += ["cuhk03.labeled_images", True, "cuhk03.classic_split", True, "market1501.use_500k_distractors", True]
    cfg = settings(*keys)
    manager = SimpleNamespace(camera_names={}, identity_names={})
    sets = inference.TestSets(cfg.data.targets, partial(inference._open_test_set, cfg, manager, tmp_path))
    assert sets["two"] == {"query": items[0], "gallery": items[1]}
    how = {"download": True, "name_pattern": "market", "split_rule": "time"}
    assert asked["resolve"] == (("two", "there"), how)
    assert asked["open"] == (
        ("two",),
        {
            "root": "there",
            "cache_dir": tmp_path,
            "mode": "query",
            "combineall": True,
            "split_id": 3,
            "cuhk03_labeled": True,
            "cuhk03_classic_split": True,
            "market1501_500k": True,
        },
    )
    assert asked["check"] == ((["q.png", "g.png"], "full"), {"pixel_range": (0, 9)})
    assert manager.camera_names == {"two": {0: "a"}} and manager.identity_names == {"two": {1: "x"}}
    asked.clear()
    assert sets["two"]["query"] == items[0] and asked == {}
    del dataset.camera_names, dataset.identity_names
    assert sets["one"] and manager.camera_names["one"] == manager.identity_names["one"] == {}


# --- features ----------------------------------------------------------------------------------------------------------
class FeatureEngine:
    """An engine whose features are its own, and that notes how it extracts them."""

    def __init__(self, reads_cameras=False):
        self.reads_cameras, self.camera_rows, self.mode = reads_cameras, None, None
        self.training_cameras = CameraRows({0: 0, 5: 1})
        self.calls, self.draw = [], torch.zeros(1)

    def set_model_mode(self, mode):
        self.mode = mode

    def extract(self, loader, *, label, alter=None):
        self.draw = torch.rand(1)
        self.calls.append((loader, label, alter, self.camera_rows, self.mode, float(self.draw)))
        pids = np.array([record[1] for record in loader["records"]])
        cameras = np.array([record[2] for record in loader["records"]])
        return Features(
            torch.eye(6)[pids] + 0.01 * len(self.calls), pids, cameras, [record[0] for record in loader["records"]]
        )

    def extract_target(self, name):
        self.calls.append(("target", name, self.camera_rows))
        return TestFeatures(*(self.extract({"records": records(part)}, label=part) for part in ("q", "g")))


def records(part, folder=None):
    camera = 0 if part.endswith("q") else 1
    return [(str(folder / f"{part}{i}.png") if folder else f"{part}{i}.png", i, camera, 0) for i in range(3)]


@pytest.fixture
def feature_run(tmp_path, monkeypatch):
    """A run with an engine that takes notes; ``feature_run(KEY, VALUE, …, reads_cameras=…)``."""
    monkeypatch.setattr(
        features_module,
        "make_loader",
        lambda manager, records, transform, size, workers: {
            "manager": manager,
            "records": records,
            "transform": transform,
            "size": size,
            "workers": workers,
        },
    )
    for part in ("q", "g", "v-q", "v-g", "t"):
        for path, *_ in records(part, tmp_path):
            open(path, "w").close()

    def build(*keys, reads_cameras=False, **more):
        cfg = settings("data.targets", ["set"], "data.height", 20, "data.width", 10, "test.batch_size", 7, *keys)
        network = Network(cfg)
        run = SimpleNamespace(cfg=cfg, network=network, engine=FeatureEngine(reads_cameras), folder=tmp_path / "run")
        run.fingerprint, run.inference = "weights", False
        run.cameras = CameraTable.of([(0, "set", "1"), (5, "set", "6")], ["set"])
        sets = {"set": {"query": records("q", tmp_path), "gallery": records("g", tmp_path)}}
        run.datamanager = SimpleNamespace(
            test_dataset=sets,
            transform_te="test",
            transform_tr="train",
            camera_names={"set": {0: "1", 1: "6"}},
            identity_names={"set": {1: "anna"}},
            val_query=records("v-q", tmp_path),
            val_gallery=records("v-g", tmp_path),
        )
        run.options = lambda: EvaluationOptions.of(cfg)
        run.__dict__.update(more)
        return run

    return build


def test_how_features_are_extracted(feature_run, tmp_path):
    run = feature_run("data.workers", 3, "train.seed", 4)
    features, items = RunFeatures(run), records("t", tmp_path)
    before = torch.get_rng_state()
    found = features.bank("train", items)
    ((loader, label, alter, rows, mode, draw),) = run.engine.calls
    assert loader == {"manager": run.datamanager, "records": items, "transform": "test", "size": 7, "workers": 3}
    assert (label, alter, mode) == ("train", None, "eval") and rows is run.engine.training_cameras
    assert torch.equal(torch.get_rng_state(), before) and found.identity_names == {}
    assert (run.folder / "bank" / "train.pt").is_file() and draw == float(torch.rand(1))
    assert torch.equal(features.bank("train", items).features, found.features) and len(run.engine.calls) == 1
    key = bank_key("weights", items, f"20x10|{run.network.describe_input(run)}")
    assert torch.load(run.folder / "bank" / "train.pt", weights_only=True)["key"] == key
    # drawn anew, and not kept
    changed = features.bank("train", items, keep=False, alter="alter")
    assert not torch.equal(changed.features, found.features) and run.engine.calls[1][2] == "alter"
    assert torch.equal(features.bank("train", items).features, found.features) and len(run.engine.calls) == 2
    # under the training transform, by a seed of its own
    features.bank("augmented", items, augment=2)
    loader, *_, draw = run.engine.calls[-1]
    torch.manual_seed(4 * 1_000_003 + 2)
    assert loader["transform"] == "train" and draw == float(torch.rand(1))
    stored = torch.load(run.folder / "bank" / "augmented.pt", weights_only=True)["key"]
    words = f"20x10|{run.network.describe_input(run)}|{run.cfg.data.transforms}|4|2|3"
    assert stored == bank_key("weights", items, words)
    features.bank("augmented", items, augment=0)
    assert run.engine.calls[-1][0]["transform"] == "train" and len(run.engine.calls) == 4


def test_features_that_cannot_be_kept(feature_run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        features_module, "load_or_extract", lambda *values, optional: asked.append((*values[:2], optional)) or "found"
    )
    run = feature_run(inference=True)
    assert RunFeatures(run).bank("train", records("t", tmp_path)) == "found"
    run.inference = False
    RunFeatures(run).bank("x", records("t", tmp_path))
    assert asked == [(run.folder / "bank", "train", True), (run.folder / "bank", "x", False)]


def test_features_of_a_test_set(feature_run):
    run = feature_run()
    found = RunFeatures(run).test("set")
    assert [call[1] for call in run.engine.calls] == ["set-query", "set-gallery"]
    assert found.query.camids.tolist() == [0] * 3 and found.gallery.camids.tolist() == [1] * 3
    assert found.query.identity_names == found.gallery.identity_names == {1: "anna"}
    assert all(call[3] is UNKNOWN for call in run.engine.calls)
    seen = []

    class Looking(Network):
        def views(self):
            return [View("first", "-A")]

        def seeing(self, run, view):
            seen.append(view)
            return super().seeing(run, view)

    run.network = Looking(run.cfg)
    RunFeatures(run).test("set")
    assert run.engine.calls[-1][1] == "set-A-gallery" and seen == [View("first", "-A")]
    RunFeatures(run).test("set", View("other", "-B"))
    assert [call[1] for call in run.engine.calls[-2:]] == ["set-B-query", "set-B-gallery"] and seen[-1].part == "-B"
    run.cfg.data.type = "video"
    RunFeatures(run).test("set")
    assert [call[1] for call in run.engine.calls[-3:]] == ["set", "q", "g"]


def test_features_with_cameras(feature_run, tmp_path):
    run = feature_run(reads_cameras=True)
    features = RunFeatures(run)
    assert features.cameras("set")(torch.tensor([0, 1, 2])).tolist() == [0, 1, -1]
    features.test("set")
    rows = run.engine.calls[-1][3]
    assert rows(torch.tensor([0, 1])).tolist() == [0, 1]
    items = records("q", tmp_path)
    key = torch.load(run.folder / "bank" / "set-query.pt", weights_only=True)["key"]
    assert key == bank_key("weights", items, f"20x10|{run.network.describe_input(run)}|cameras {rows.description}")
    run.datamanager.camera_names = {}
    assert features.cameras("set")(torch.tensor([0])).tolist() == [-1]
    with pytest.raises(KeyError):
        features.cameras("elsewhere")
    assert RunFeatures(feature_run()).cameras("elsewhere") is UNKNOWN


def test_queries_that_are_changed(feature_run):
    run = feature_run()
    features = RunFeatures(run)
    plain = features.altered("set")
    assert [call[2] for call in run.engine.calls] == [None, None] and plain.query.identity_names == {1: "anna"}
    again = features.altered("set")
    assert len(run.engine.calls) == 2 and torch.equal(plain.query.features, again.query.features)
    found = features.altered("set", "darker")
    assert run.engine.calls[-1][1:3] == ("set-query", "darker") and len(run.engine.calls) == 3
    assert torch.equal(found.gallery.features, plain.gallery.features) and found.query.identity_names == {1: "anna"}
    assert not torch.equal(found.query.features, plain.query.features)
    with pytest.raises(UserError, match=f"'sets' is no test set of run '{run.folder}'.*'set'"):
        features.altered("sets")
    run.cfg.data.type = "video"
    with pytest.raises(UserError, match="is one of tracklets; queries can only be changed with 'data.type image'"):
        features.altered("set")


def test_held_out_features(feature_run):
    run = feature_run("test.dist_metric", "cosine")
    features = RunFeatures(run)
    found = features.held_out()
    assert [call[1] for call in run.engine.calls] == ["val-query", "val-gallery"]
    assert found.query.camids.tolist() == [0] * 3 and found.gallery.camids.tolist() == [1] * 3
    features.held_out()
    assert len(run.engine.calls) == 2 and found.query.identity_names == {}
    result = features.validate()
    assert [call[1] for call in run.engine.calls[2:]] == ["val-query", "val-gallery"]  # by the weights of this moment
    assert result.mAP == pytest.approx(1.0)
    run.datamanager.val_query = []
    assert features.held_out() is None


def test_scores_of_test_sets_while_training(feature_run):
    run = feature_run("data.targets", ["set", "other"], reads_cameras=True)
    run.datamanager.test_dataset["other"] = {}
    found = RunFeatures(run).monitor()
    assert list(found) == ["set/mAP", "set/R1", "other/mAP", "other/R1"] and set(found.values()) == {1.0}
    targets = [call for call in run.engine.calls if call[0] == "target"]
    assert [(name, rows(torch.tensor([0])).tolist()) for _, name, rows in targets] == [("set", [0]), ("other", [-1])]
    assert all(type(value) is float for value in found.values())


def test_features_are_scored_as_the_first_row(feature_run):
    draw = torch.Generator().manual_seed(0)
    pids, cameras = np.arange(12) % 4, np.arange(12) // 4
    sets = [
        Features(torch.randn(12, 4, generator=draw) * 3 + torch.arange(12.0)[:, None], pids, cameras + i, []) for i in (0, 5)
    ]
    scores = {}
    for metric in ("euclidean", "cosine"):
        run = feature_run("test.dist_metric", metric)
        scores[metric] = RunFeatures(run).score(TestFeatures(*sets)).mAP
        wanted = features_module.Evaluator("x", TestFeatures(*sets), options=run.options(), parameters=0).baseline_result()
        assert scores[metric] == wanted.mAP
    assert scores["euclidean"] != scores["cosine"]
