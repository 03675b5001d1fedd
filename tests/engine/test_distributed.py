"""Two processes over gloo train as one does: losses, weights, tables; what is said when one of them ends."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from wiring import Toy, execute, graft_config, saved, toy_config, write_pictures, write_vehicles

from relreid_plugin import collective
from relreid_plugin.backbones.shared import share_batch
from relreid_plugin.collective import Cut
from relreid_plugin.config.defaults import load_config
from relreid_plugin.engine.base import EngineMixin
from relreid_plugin.engine.distributed import SeededSamples, joined, share_loader
from relreid_plugin.errors import UserError
from relreid_plugin.host import register_model
from relreid_plugin.options import Launch

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

IMAGE = [
    *("data.transforms", "['random_flip','pad_crop','random_erase']", "data.sample_seeds", True, "train.optim", "sgd"),
    *("loss.composite.triplet", 1.0, "loss.composite.center", 0.01, "train.batch_size", 9, "sampler.num_instances", 3),
    *("train.max_epoch", 3, "train.stages", "[1]", "relation.attention", "none", "train.lr", 0.02),
    *("test.rivals", "[]"),
]
"""Odd parts of a batch: 5 rows and 4."""
CASES: dict[str, list] = {
    "baseline": [
        *("model.name", "bnneck_baseline", "backbone.name", "timm:test_resnet", "backbone.output_stride", 0),
        *("head.feature_dim", 16, "train.max_epoch", 2, "train.fixbase_epoch", 1, "train.open_layers", "['neck']"),
        *("data.height", 32, "data.width", 16),
    ],
    "transreid": [
        *("model.name", "transreid", "backbone.name", "timm:vit_tiny_patch16_224", "backbone.output_stride", 0),
        *("vit.patch_size", 8, "vit.stride", 4, "vit.depth", 2, "vit.shift", 3, "vit.parts", 2, "vit.drop_path", 0.1),
        *("rib.attention", "dcs", "rib.dcs.init_bias", 0.5, "rib.ibb.eta", 1.0, "rib.ibb.warmup", 0.5),
        *("data.height", 32, "data.width", 16, "train.lr", 0.001),
    ],
    "host": [
        *("loss.name", "triplet", "loss.triplet.weight_x", 0.5, "model.name", "distributed_toy", "train.max_epoch", 2),
    ],
    "practice": [
        *("model.name", "distributed_toy", "train.accumulate", 2, "train.clip_norm", 0.3, "train.ema", 0.5),
        *("train.max_epoch", 2),
    ],
    "relation": [
        *("train.stages", "[1,2]", "train.max_epoch", 1, "relation.attention", "magformer", "relation.num_layers", 2),
        *("relation.train.features_per_step", 13, "relation.train.steps_per_epoch", 3, "relation.dropout", 0.2),
        *("relation.bank.refresh", 1, "relation.train.max_epoch", 2, "relation.k", 4),
    ],
    "affinity": [
        *("train.stages", "[1,2]", "train.max_epoch", 1, "relation.attention", "nformer", "relation.neighbours", "affinity"),
        *("relation.bank.refresh", 0, "relation.dropout", 0.0),
    ],
}
DOUBLE = ["train.precision", "float64", "train.optim", "adam", "train.lr", 0.001]
CASES["transreid-float64"] = [*CASES["transreid"], *DOUBLE]
CASES["relation-float64"] = [*CASES["relation"], "model.name", "distributed_toy", *DOUBLE]
GRAFT = {
    "triplets": ["graft.sampling", "triplets", "graft.positives", 2, "train.batch_size", 15],
    "pk": [
        *("graft.sampling", "pk", "sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 2),
        *("train.batch_size", 6, "graft.fusion", "average"),
    ],
}


class NormedToy(Toy):
    """The toy with a batch normalisation; in training (logits, features)."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.embedding = nn.Sequential(self.embedding, nn.BatchNorm1d(self.feature_dim), nn.Dropout(0.2))


def build_normed(num_classes, *args, **options):
    """The toy as a model of the host's factory; spawned processes import this module too."""
    return NormedToy(num_classes)


register_model("distributed_toy", build_normed)


def second(jobs, port):
    """Process 1 of 2: the same runs as the first one's; it ends at the last of them."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    torch.set_num_threads(1)
    with joined(Launch(1, 2, 1), use_gpu=False):
        layers(1)
        for job in jobs[:-1]:
            execute(load_config(*job))
        with dying():
            execute(load_config(*jobs[-1]))


@contextlib.contextmanager
def dying():
    """Training that ends this process, without a word, in its second epoch."""
    step = EngineMixin.forward_backward

    def forward_backward(self, data):
        if self.epoch == 1:
            os._exit(9)
        return step(self, data)

    EngineMixin.forward_backward = forward_backward
    yield


def small():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)).double()


def pairwise(features):
    """A loss of all pairs: a process that sees its own rows only cannot have it."""
    return (features @ features.t()).square().mean() + features.sin().mean()


def layers(rank):
    """Loss and gradients of a small model, by this process's rows of a batch of 7 (and of 6, in three runs)."""
    found = []
    for cut in (Cut(7, 1, 2, rank), Cut(6, 3, 2, rank)):
        model = small()
        assert share_batch(model) == []
        torch.manual_seed(1)
        images = torch.randn(cut.total, 3, 5, 5, dtype=torch.float64)
        with collective.cutting(cut):
            loss = pairwise(collective.gather(model(cut.take(images))))
        loss.backward()
        for value in model.parameters():
            dist.all_reduce(value.grad)
            value.grad.div_(2)
        found.append((loss.detach(), [value.grad for value in model.parameters()], model.state_dict()))
    return found


def files(tmp_path, folder):
    """(YAML file, overrides) of every case, with a run's folder of its own below ``folder``."""
    data, vehicles, jobs = tmp_path / "pictures", tmp_path / "vehicles", {}
    (tmp_path / folder).mkdir()
    for name, pairs in CASES.items():
        place = tmp_path / folder / name
        toy_config(data, place)
        jobs[name] = (tmp_path / folder / f"{name}.yml", [str(item) for item in [*IMAGE, *pairs]])
    for name, pairs in GRAFT.items():
        place = tmp_path / folder / name
        graft_config(vehicles, place)
        common = ["data.sample_seeds", True, "data.transforms", "['random_flip','random_erase']", "test.rivals", "[]"]
        common += ["graft.dropout", 0.1, "graft.finetune.lr", 1e-5]
        jobs[name] = (tmp_path / folder / f"{name}.yml", [str(item) for item in [*common, *pairs]])
    return jobs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The runs of two processes, what they said, and the folder that holds them."""
    tmp_path = tmp_path_factory.mktemp("distributed")
    write_pictures(tmp_path / "pictures")
    write_vehicles(tmp_path / "vehicles")
    jobs = files(tmp_path, "two")
    dying_job = (tmp_path / "two" / "baseline.yml", [*jobs["baseline"][1], "data.save_dir", str(tmp_path / "two" / "dead")])
    runs = [*jobs.values(), dying_job]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    other = multiprocessing.get_context("spawn").Process(target=second, args=(runs, port), daemon=True)
    other.start()
    said = ""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("RANK", 0), ("WORLD_SIZE", 2)):
            patch.setenv(name, str(value))
        try:
            with joined(Launch(0, 2, 0), use_gpu=False):
                found = layers(0)
                for job in runs:
                    execute(load_config(*job))
        except UserError as error:
            said = str(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            other.join(20)
            other.kill()
    yield {"folder": tmp_path, "layers": found, "said": said, "code": other.exitcode}


@pytest.fixture(scope="module")
def alone(pair):
    """The same runs by one process."""
    jobs = files(pair["folder"], "one")
    for job in jobs.values():
        execute(load_config(*job))
    return pair["folder"] / "one"


def test_a_batch_is_cut_run_by_run_and_put_together_again():
    values = torch.arange(12)
    parts = [Cut(12, 3, 3, rank).take(values).tolist() for rank in range(3)]
    assert parts == [[0, 4, 8], [1, 5, 9], [2, 3, 6, 7, 10, 11]]
    assert [Cut(7, 1, 2, rank).rows() for rank in range(2)] == [[0, 1, 2], [3, 4, 5, 6]]
    assert Cut(7, 1, 2, 0).take(torch.arange(14)).tolist() == [0, 1, 2, 3, 4, 5]
    assert [Cut(12, 3, 2, 1).size(), Cut(12, 3, 2, 1).part(3)] == [6, Cut(4, 1, 2, 1)]
    with pytest.raises(ValueError, match="3 runs"):
        Cut(10, 3)


def test_outside_of_several_processes_nothing_changes():
    values = torch.ones(3)
    assert collective.gather(values) is values and collective.all_sum(values) is values
    assert collective.total(values) is values and (collective.world(), collective.rank()) == (1, 0)
    assert collective.draw((2, 3), torch.zeros).shape == (2, 3)


def test_statistics_noise_and_losses_are_those_of_the_whole_batch(pair):
    for cut, (loss, gradients, state) in zip((7, 6), pair["layers"]):
        model = small()
        torch.manual_seed(1)
        wanted = pairwise(model(torch.randn(cut, 3, 5, 5, dtype=torch.float64)))
        wanted.backward()
        assert abs(float(loss - wanted.detach())) < 1e-12
        for found, value in zip(gradients, model.parameters()):
            assert torch.allclose(found, value.grad, atol=1e-12)
        for name, value in model.state_dict().items():
            assert torch.allclose(state[name].double(), value.double(), atol=1e-12), name


def alike(found, wanted):
    """Whether tensors agree to 1e-5, but for one element in a hundred whose gradient is rounding, which Adam enlarges."""
    distance = (found - wanted).abs()
    return float((distance > 1e-5 * (1 + wanted.abs())).double().mean()) <= 0.01 and float(distance.max()) < 5e-5


@pytest.mark.parametrize("name", [*CASES, *GRAFT])
def test_two_processes_train_as_one(pair, alone, name):
    """Losses of every epoch and weights to 1e-5, in float64 to 1e-9 and 1e-11, features' scores alike."""
    double = name.endswith("float64")
    folder = pair["folder"] / "two" / name
    for stage in (path.name for path in sorted((alone / name).glob("stage*"))):
        found, wanted = saved(folder, stage.removeprefix("stage")), saved(alone / name, stage.removeprefix("stage"))
        assert found["processes"] == 2 and wanted["processes"] == 1
        for here, there in zip(found["history"], wanted["history"], strict=True):
            assert here.keys() == there.keys()
            for key, value in there.items():
                near = (
                    1e-4 if stage == "stage2" and key in ("loss", "triplet") else 1e-5
                )  # a copy's distance: a root of rounding
                closeness = {"abs": 1e-9, "rel": 1e-9} if double else {"abs": near, "rel": 1e-5}
                assert here[key] == pytest.approx(value, **closeness), (stage, key)
        for key, value in wanted["state_dict"].items():
            if double:  # a batch normalisation takes the shift of this bias out again, so that its gradient is rounding
                near = 1e-5 if key == "local_norm.bias" or key.endswith("bn.running_mean") else 1e-11
                assert torch.allclose(found["state_dict"][key], value, atol=near, rtol=0), (stage, key)
            elif not key.endswith(("in_proj_bias", "qkv.bias")):  # the keys' gradient is rounding, which Adam enlarges
                assert alike(found["state_dict"][key].double(), value.double()), (stage, key)
    here, there = (json.loads((place / name / "metrics.json").read_text()) for place in (folder.parent, alone))
    assert [row["method"] for row in here["rows"]] == [row["method"] for row in there["rows"]]
    for row, wanted_row in zip(here["rows"], there["rows"]):
        assert row["mAP"] == pytest.approx(wanted_row["mAP"], abs=1e-3)
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    assert len(list((folder / "stage1" / "tensorboard").iterdir())) == 1  # one of them writes


def test_a_process_that_is_gone_ends_the_others_with_a_sentence(pair):
    assert pair["code"] == 9
    assert pair["said"].startswith("process 1 of 2 was ended from outside") and "--resume" in pair["said"]


def test_one_process_goes_on_where_two_were(pair, alone, capsys):
    folder = pair["folder"] / "two" / "dead"
    assert saved(folder, 1)["epoch"] == 1
    job = (pair["folder"] / "two" / "baseline.yml", [*map(str, IMAGE), *map(str, CASES["baseline"])])
    cfg = load_config(job[0], [*job[1], "data.save_dir", str(folder)])
    execute(cfg, resume=True)
    assert "2 processes wrote the checkpoint, and 1 go on" in capsys.readouterr().out
    found, wanted = saved(folder, 1)["state_dict"], saved(alone / "baseline", 1)["state_dict"]
    for key, value in wanted.items():
        assert torch.allclose(found[key].double(), value.double(), atol=1e-5, rtol=1e-5), key


def test_a_sample_draws_from_its_own_seed():
    class Drawing:
        def __getitem__(self, index):
            import random

            return index, random.random(), float(torch.rand(()))

    samples = SeededSamples(Drawing())
    torch.manual_seed(3)
    first, state = samples[4, 17], torch.get_rng_state()
    torch.rand(5)
    assert samples[4, 17] == first and samples[4, 18] != first
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_smaller_than_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr("relreid_plugin.engine.distributed.world", lambda: 5)
    loader = torch.utils.data.DataLoader(list(range(12)), batch_size=12)
    with pytest.raises(UserError, match="batch of 12 images cannot be cut across 5 processes.*at least 15"):
        share_loader(loader, groups=3)


def test_layers_that_cannot_be_shared_are_named():
    model = nn.Sequential(nn.Dropout2d(0.5), nn.SyncBatchNorm(3), nn.Dropout(0.5))
    assert share_batch(model) == ["0", "1"] and share_batch(model) == ["0", "1"]
