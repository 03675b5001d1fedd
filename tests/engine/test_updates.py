"""What a training step does beyond the plain one, against plain loops; runs with all of it go on to the last digit."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from wiring import execute, graft_config, saved, settings, toy_config, write_pictures, write_vehicles

from relreid_plugin.backbones.baseline import BNNeckBaseline
from relreid_plugin.backbones.networks import PooledBackbone, build_backbone
from relreid_plugin.backbones.recompute import recompute_activations
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.base import EngineMixin, StageContext
from relreid_plugin.engine.image import build_image_engine
from relreid_plugin.engine.updates import Practice, Updates
from relreid_plugin.errors import UserError
from relreid_plugin.graft.model import GraFT
from relreid_plugin.rib.dcs import ChannelSelection, replace_attention
from relreid_plugin.rib.transreid import VisionTransformerReID


class Net(nn.Module):
    """A convolution and two layers without batch normalisation; in training (logits, features), or logits alone."""

    feature_dim = 4

    def __init__(self, alone=False):
        super().__init__()
        self.conv, self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 5)
        self.alone, self.seen = alone, []

    def forward(self, images):
        maps = self.conv(images).relu()
        features = self.body(maps.mean(dim=(2, 3)))
        self.seen.append((features.dtype, images.is_contiguous(memory_format=torch.channels_last)))
        logits = self.head(features)
        return logits if self.alone else (logits, features)


def draw(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "img": torch.randn(size, 3, 8, 6, generator=generator),
        "pid": torch.randint(0, 5, (size,), generator=generator),
        "camid": torch.zeros(size),
        "impath": [""] * size,
    }


def cut(data, size):
    return [{key: value[low : low + size] for key, value in data.items()} for low in range(0, len(data["pid"]), size)]


CENTERED = ("loss.name", "composite", "loss.composite.center", 0.2, "loss.composite.triplet", 0.0)
BOUND = ("rib.ibb.eta", 0.5, "rib.ibb.warmup", 0.0, "model.name", "bnneck_baseline")
SOFTMAX = ("loss.name", "softmax")


def build(*pairs, optimizer=torch.optim.SGD, lr=0.1):
    """An engine over :class:`Net`, in float32 on the CPU."""
    torch.manual_seed(3)
    net = Net(alone="softmax" in pairs).train()
    manager = SimpleNamespace(num_train_pids=5, train_loader=[], test_loader={}, transform_tr=None, sources=[])
    made = optimizer(net.parameters(), lr=lr)
    engine, _ = build_image_engine(settings(*pairs), manager, net, made, None, feature_dim=4)
    return engine


def train(engine, batches, epochs=1, *, before=lambda: None):
    """The epochs of an engine, without its loop around them; returns the records."""
    engine.train_loader = batches
    engine.updates.start(engine, mined=engine.mined)
    records = []
    for engine.epoch in range(epochs):
        engine._sums = {}
        for observer in engine.observers:
            observer.begin(engine.epoch)
        engine.updates.begin()
        for data in engine.updates.watched(batches):
            before()
            engine.forward_backward(data)
        records.append({**engine._sums, **engine.updates.end()})
        for observer in engine.observers:
            observer.end()
    return records


def weights(engine):
    return {name: value.detach().clone() for name, value in engine.model.state_dict().items()}


def same(found, wanted, tolerance=1e-6):
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=tolerance, rtol=0), (name, (found[name] - value).abs().max())


# --- accumulation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", [CENTERED, SOFTMAX, (*CENTERED, *BOUND)], ids=["composite", "host", "bound"])
def test_accumulated_batches_are_one_large_batch(loss):
    """3 batches of 4 are one of 12, and what is left of the epoch one of 8: weights and centers to 1e-6 after 3 epochs."""
    data = draw(20)
    large, small = build(*loss), build(*loss, "train.accumulate", 3)
    start = weights(large)
    epochs = 4 if loss[-1] == BOUND[-1] else 3
    train(large, [*cut({k: v[:12] for k, v in data.items()}, 12), {k: v[12:] for k, v in data.items()}], epochs)
    train(small, cut(data, 4), epochs)
    same(weights(small), weights(large))
    assert max(float((start[name] - value).abs().max()) for name, value in weights(large).items()) > 0.01
    if loss != SOFTMAX:
        same(small.loss.state_dict(), large.loss.state_dict())
        assert not torch.equal(small.loss.center.centers, build(*loss).loss.center.centers)


def test_what_accumulation_is_not_is_said(capsys):
    engine = build("loss.name", "composite", "loss.composite.triplet", 1.0, "train.accumulate", 4)
    engine.model.neck = nn.BatchNorm1d(4)
    train(engine, [draw(8)])
    said = capsys.readouterr().out
    assert "to the model's 1 batch normalisations" in said and "hardest triplets of a batch" in said
    assert "more than the 1 batches of an epoch" in said
    train(build(*CENTERED, "train.accumulate", 2), cut(draw(8), 4))
    assert capsys.readouterr().out == ""


# --- clipping ----------------------------------------------------------------------------------------------------------
def test_gradients_are_clipped_by_the_norm_of_all():
    engine, plain = build(*CENTERED, "train.clip_norm", 0.05), build(*CENTERED)
    logits, features = plain.model(draw(6)["img"])
    total, _ = plain.loss(logits, features, draw(6)["pid"])
    gradients = torch.autograd.grad(total, list(plain.model.parameters()))
    norm = sum(float(value.double().square().sum()) for value in gradients) ** 0.5
    assert norm > 0.1
    train(engine, [draw(6)])
    for value, before, gradient in zip(engine.model.parameters(), plain.model.parameters(), gradients):
        assert torch.allclose(value, before - 0.1 * gradient * 0.05 / norm, atol=1e-6)
    wide = build(*CENTERED, "train.clip_norm", 1e6)
    train(wide, [draw(6)]), train(plain, [draw(6)])
    same(weights(wide), weights(plain), 0.0)


# --- averaged weights --------------------------------------------------------------------------------------------------
def test_averaged_weights_follow_their_formula():
    engine = build(*CENTERED, "train.ema", 0.3)
    engine.model.neck = nn.BatchNorm1d(4)
    engine.model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    wanted = {name: value.double() for name, value in weights(engine).items()}
    updates, seen = engine.updates, []

    def before():
        seen.append(weights(engine))
        engine.model.neck.running_mean += 1.0
        engine.model.mask[0] += 1.0

    train(engine, cut(draw(20), 4), before=before)
    seen = [*seen[1:], weights(engine)]
    for count, value in enumerate(seen):
        decay = min(0.3, (1 + count) / (10 + count))
        for name in wanted:
            last = name == "mask" or name.endswith("num_batches_tracked")
            wanted[name] = value[name].double() if last else decay * wanted[name] + (1 - decay) * value[name].double()
    own = weights(engine)
    with updates.averaged():
        averaged = weights(engine)
        same({name: value.double() for name, value in averaged.items()}, wanted)
    same(weights(engine), own, 0.0)
    assert not torch.allclose(averaged["body.weight"], own["body.weight"], atol=1e-4)
    assert not torch.equal(averaged["neck.running_mean"], own["neck.running_mean"])


# --- precision ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", [CENTERED, SOFTMAX], ids=["composite", "host"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_torchs_own_recipe(loss, precision):
    """Weights of autocast and GradScaler as torch documents them, the loss itself scaled; the loss sees float32."""
    engine = build(*loss, "train.precision", precision, lr=0.01)
    centers = copy.deepcopy(engine.loss.center) if loss is CENTERED else None
    net = copy.deepcopy(engine.model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    batches = cut(draw(20), 4)
    train(engine, batches)
    for data in batches:
        with torch.autocast("cpu", dtype=getattr(torch, precision)):
            output = net(data["img"])
        logits = (output if loss is SOFTMAX else output[0]).float()
        total = F.cross_entropy(logits, data["pid"], label_smoothing=0.1)
        if centers is not None:
            total = total + 0.2 * centers(output[1].float(), data["pid"])
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        if centers is not None:
            with torch.no_grad():
                centers.centers -= 0.5 * centers.centers.grad / 0.2 / scaler.get_scale()
            centers.centers.grad = None
    assert {kind for kind, _ in engine.model.seen} == {getattr(torch, precision)}
    same(weights(engine), net.state_dict(), 2e-4)
    plain = build(*loss, lr=0.01)
    train(plain, batches)
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(engine).items())


@pytest.mark.parametrize("loss", [CENTERED, SOFTMAX, (*CENTERED, *BOUND)], ids=["composite", "host", "bound"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_float64_is_plain_training_in_double(loss, optimizer):
    """Weights, centers and the optimiser's state of a loop in float64 to 1e-13; behind it the network is float32 again."""
    engine = build(*loss, "train.precision", "float64", optimizer=optimizer, lr=0.01)
    net = copy.deepcopy(engine.model).double()
    centers = None if loss is SOFTMAX else copy.deepcopy(engine.loss.center).double()
    bounds = [copy.deepcopy(observer) for observer in engine.observers]
    for observer in bounds:
        observer.bound.double()
    epochs = 4 if bounds else 1
    plain = optimizer(net.parameters(), lr=0.01)
    engine.updates.widen(engine)
    engine.updates.widen(engine)
    batches = cut(draw(20), 4)
    train(engine, batches, epochs)
    for number in range(epochs * len(batches)):
        data = batches[number % len(batches)]
        output = net(data["img"].double())
        total = F.cross_entropy(output if loss is SOFTMAX else output[0], data["pid"], label_smoothing=0.1)
        if centers is not None:
            total = total + 0.2 * centers(output[1], data["pid"])
        for observer in bounds:
            value = observer.bound(output[1], data["pid"], observer.describe(data["img"]))
            total = total if value is None else total + 0.5 * value
        plain.zero_grad()
        total.backward()
        plain.step()
        if centers is not None:
            with torch.no_grad():
                centers.centers -= 0.5 * centers.centers.grad / 0.2
            centers.centers.grad = None
        if number % len(batches) == len(batches) - 1:
            for observer in bounds:
                observer.bound.end_epoch()
    assert {kind for kind, _ in engine.model.seen} == {torch.float64}
    assert {value.dtype for value in weights(engine).values()} == {torch.float64}
    states = [value for state in engine.optimizer.state.values() for value in state.values() if value.dim()]
    assert {value.dtype for value in states} == ({torch.float64} if optimizer is torch.optim.AdamW else set())
    # the host's cross-entropy writes its smoothed targets, which are constants, in float32
    same(weights(engine), net.state_dict(), 1e-13 if loss is not SOFTMAX else 1e-9 if optimizer is torch.optim.SGD else 1e-7)
    if centers is not None:
        same(engine.loss.center.state_dict(), centers.state_dict(), 1e-13)
    engine.updates.narrow(engine)
    for name, value in net.state_dict().items():
        assert weights(engine)[name].dtype == torch.float32 and (weights(engine)[name] - value).abs().max() < 1e-6
    engine.model(draw(4)["img"])
    assert engine.model.seen[-1][0] == torch.float32


def test_updates_that_overflow_are_left_out_and_counted(capsys):
    engine = build(*CENTERED, "train.precision", "float16", "train.ema", 0.5)
    start, centers = weights(engine), engine.loss.center.centers.detach().clone()
    engine.updates._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    (record,) = train(engine, cut(draw(8), 4))
    same(weights(engine), start, 0.0)
    assert torch.equal(engine.loss.center.centers, centers)
    assert record["scale"] == 2.0**38 and record["skipped"] == 2 and record["loss"] > 0
    assert "overflowed in all 2 updates of the epoch" in capsys.readouterr().out
    engine.updates._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    (record,) = train(engine, cut(draw(8), 4))
    assert record["skipped"] == 0 and not torch.equal(weights(engine)["body.weight"], start["body.weight"])
    assert engine.updates._averages == 2 and capsys.readouterr().out == ""


def test_gradients_that_are_finite_at_no_scale_and_losses_that_are_not(tmp_path):
    engine = build(*CENTERED, "train.precision", "float16")
    engine.attach(StageContext("image", tmp_path, 1))
    engine.model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match="not finite at a loss scale of 1.5e-05.*'train.precision float16'"):
        train(engine, cut(draw(400), 4))
    engine = build(*CENTERED, "train.precision", "float16")
    engine.attach(StageContext("image", tmp_path, 1))
    engine.train_loader, engine._sums = [1], {}
    with torch.no_grad():
        engine.model.head.weight.fill_(1e6)
    with pytest.raises(UserError, match="the loss became"):
        engine.forward_backward(draw(4))


# --- memory formats and compilers --------------------------------------------------------------------------------------
def test_channels_last_reaches_the_network():
    engine, plain = build(*CENTERED, "train.channels_last", True), build(*CENTERED)
    train(engine, [draw(6)]), train(plain, [draw(6)])
    assert engine.model.seen[0][1] and not plain.model.seen[0][1]
    same(weights(engine), weights(plain))


def test_a_compiled_pass_is_the_same_pass(monkeypatch):
    asked, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: asked.append(model) or compiler(model, backend="eager"))
    engine, plain = build(*CENTERED, "train.compile", True), build(*CENTERED)
    train(engine, cut(draw(8), 4), 2), train(plain, cut(draw(8), 4), 2)
    assert asked == [engine.model]
    same(weights(engine), weights(plain))

    def refuse(model):
        def call(*args):
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(UserError, match=r"cannot compile this network here \(no compiler here\).*'train.compile False'"):
        train(build(*CENTERED, "train.compile", True), [draw(4)])
    monkeypatch.setattr("relreid_plugin.engine.updates.world", lambda: 2)
    with pytest.raises(UserError, match="'train.compile True' works with one process"):
        train(build(*CENTERED, "train.compile", True), [draw(4)])


def test_an_encoder_behind_the_network_is_neither_compiled_nor_convolved():
    cfg = settings("train.compile", True, "train.channels_last", True, "train.accumulate", 2, "train.ema", 0.5)
    assert Practice.of(cfg, network=False) == Practice(accumulate=2, ema=0.5)
    assert Practice.of(cfg) == Practice(accumulate=2, ema=0.5, compile=True, channels_last=True)
    assert Practice.of(settings()) == Practice() and Updates(Practice(accumulate=3)).updates_of(7) == 3


# --- activation checkpointing ------------------------------------------------------------------------------------------
def vit(depth=2, gates=False, drop=0.3):
    import timm

    torch.manual_seed(0)
    options = {
        "img_size": (16, 16),
        "patch_size": 8,
        "depth": depth,
        "num_heads": 2,
        "embed_dim": 16,
        "dynamic_img_size": False,
    }
    network = timm.create_model("test_vit", pretrained=False, num_classes=0, proj_drop_rate=drop, **options)
    if gates:
        replace_attention(network, init_bias=0.3)
    return network


def transreid(parts=2):
    network = vit(gates=True)
    return VisionTransformerReID(network, 5, image_size=(16, 16), stride=4, parts=parts, shift=1, groups=2)


def graft():
    return GraFT(lambda channels: vit(), 5, modalities=["R", "N"], heads=2, feedforward=8, dropout=0.3)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(16, 8, 2, 2, 16, 16, dropout=0.3)


MODELS = {
    "transreid": transreid,
    "vit": lambda: transreid(parts=0),
    "graft": graft,
    "timm": lambda: BNNeckBaseline(PooledBackbone(vit(), 16), 5, feature_dim=8),
    "torchvision": torchvision_vit,
}


def flat(outputs):
    return [outputs] if torch.is_tensor(outputs) else [value for part in outputs for value in flat(part)]


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_give_the_same_gradients(name):
    """To 1e-6, with dropout and the gates' own noise; and the second of two steps draws what it draws without."""
    found = {}
    for recomputed in (False, True):
        model = MODELS[name]().train()
        if recomputed:
            assert recompute_activations(model) >= 1
        names, blocks = [], []
        for module in model.modules():
            if type(module).__name__ in ("Block", "EncoderBlock"):
                module.register_forward_pre_hook(lambda *args, to=blocks: to.append(1))
        torch.manual_seed(1)
        for _ in range(2):
            model.zero_grad()
            images = torch.randn(4, *((2,) if name == "graft" else ()), 3, 16, 16)
            sum(value.square().mean() for value in flat(model(images))).backward()
            names.append([value.grad for value in model.parameters() if value.grad is not None])
        found[recomputed] = names, ChannelSelection(model).kept_rates(), torch.rand(2), len(blocks)
    for without, with_it in zip(*(found[key][0] for key in (False, True))):
        assert len(without) == len(with_it) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(without, with_it))
    assert found[True][1] == found[False][1] and torch.equal(found[True][2], found[False][2])
    assert found[True][3] >= found[False][3] + 4  # two blocks, computed again in two steps
    if name in ("transreid", "vit"):
        assert all(0 < rates["train"] < 1 for rates in found[True][1].values()) and found[True][1]


def test_models_that_cannot_recompute_are_refused():
    with pytest.raises(UserError, match="a Net has none"):
        recompute_activations(Net())
    resnet = build_backbone("timm:test_resnet", pretrained=False, image_size=(32, 16))
    with pytest.raises(UserError, match="statistics of the batch normalisations in a ResNet twice"):
        recompute_activations(resnet)
    with pytest.raises(UserError, match="noise of the gates in a VisionTransformer again"):
        recompute_activations(PooledBackbone(vit(gates=True), 16))
    mixer = build_backbone("timm:test_mambaout", pretrained=False, image_size=(32, 32))
    recompute_activations(mixer)


# --- whole runs --------------------------------------------------------------------------------------------------------
ALL = ["train.precision", "float16", "train.accumulate", 3, "train.clip_norm", 0.5, "train.ema", 0.6]
TOY = [*ALL, "train.stages", "[1,2]", "train.max_epoch", 2, "train.val_fraction", 0.25, "test.eval_freq", 1]
TOY += [
    "relation.train.max_epoch",
    2,
    "relation.train.steps_per_epoch",
    5,
    "relation.train.eval_freq",
    1,
    "test.rivals",
    "[]",
]
TOY += ["relation.attention", "magformer", "train.channels_last", True, "relation.loss.triplet", 1.0, "train.batch_size", 4]
VEHICLES = [
    *ALL[2:],
    "train.max_epoch",
    1,
    "graft.finetune.max_epoch",
    2,
    "graft.dropout",
    0.1,
    "train.lr_scheduler",
    "sqrt",
]
VEHICLES += ["train.checkpointing", True, "train.batch_size", 6, "test.rivals", "[]", "multimodal.test", "['R']"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder / "pictures")
    write_vehicles(folder / "vehicles")
    return folder


def configured(data, folder, kind, more=()):
    return (
        toy_config(data / "pictures", folder, *TOY, *more)
        if kind == "toy"
        else graft_config(data / "vehicles", folder, *VEHICLES, *more)
    )


def stopping(call):
    """The step, stopped at one of its calls."""
    calls, step = [], EngineMixin.forward_backward

    def forward_backward(self, batch):
        calls.append(self)
        if len(calls) == call:
            raise KeyboardInterrupt
        return step(self, batch)

    return forward_backward, calls


@pytest.mark.parametrize("more", [[], ["train.precision", "float64"]], ids=["", "float64"])
@pytest.mark.parametrize("kind", ["toy", "graft"])
def test_a_run_that_was_stopped_goes_on_to_the_last_digit(data, tmp_path, monkeypatch, kind, more):
    tested = []
    fingerprint = ckpt.fingerprint
    monkeypatch.setattr(
        ckpt, "fingerprint", lambda model: tested.append(copy.deepcopy(model.state_dict())) or fingerprint(model)
    )
    run, result = execute(configured(data, tmp_path / "straight", kind, more))
    step = EngineMixin.forward_backward
    # in the second epoch of stage 1 (of stage 2, where stage 1 has one), and in that of stage 2
    per_epoch = len(run.datamanager.train_loader)
    calls = [per_epoch + 2, 6] if kind == "toy" else [2 * per_epoch + 2]
    folder, first = tmp_path / "broken", True
    for call in calls:
        patched, made = stopping(call)
        monkeypatch.setattr(EngineMixin, "forward_backward", patched)
        if not first and kind == "toy":
            patched, made = stopping(per_epoch + 7)
            monkeypatch.setattr(EngineMixin, "forward_backward", patched)
        with pytest.raises(KeyboardInterrupt):
            execute(configured(data, folder, kind, more), resume=not first)
        first = False
    monkeypatch.setattr(EngineMixin, "forward_backward", step)
    execute(configured(data, folder, kind, more), resume=True)
    for stage in (1, 2):
        wanted, found = saved(tmp_path / "straight", stage), saved(folder, stage)
        for name, value in wanted["state_dict"].items():
            assert torch.equal(found["state_dict"][name], value), (stage, name)
            assert torch.equal(found["updates"]["trained"][name], wanted["updates"]["trained"][name]), (stage, name)
        assert found["history"] == wanted["history"] and found["updates"].get("scaler") == wanted["updates"].get("scaler")
        assert found["updates"]["averages"] == wanted["updates"]["averages"] > 0
        trained = wanted["updates"]["trained"]
        assert any(not torch.equal(value, trained[name]) for name, value in wanted["state_dict"].items())
        scaled = kind == "toy" and not more
        assert ({"scale", "skipped"} <= set(wanted["history"][0])) is scaled is ("scaler" in wanted["updates"])
        kinds = {value.dtype for value in wanted["state_dict"].values() if value.is_floating_point()}
        assert kinds == {torch.float64 if more else torch.float32}
    assert next(run.bare.parameters()).dtype == torch.float32
    # what is tested, and what stage 2 begins with, are the averaged weights
    chosen = saved(tmp_path / "straight", 1, "best" if kind == "toy" else "last")["state_dict"]
    assert all(torch.equal(tested[0][name].float(), value.float()) for name, value in chosen.items())
    if kind == "graft":
        assert run.planned[1].name == "stage2" and saved(folder, 1)["scheduler"]["last_epoch"] == -(-per_epoch // 3)


def test_validation_and_tests_see_the_averaged_weights(data, tmp_path, monkeypatch):
    seen = []
    from relreid_plugin.engine.features import RunFeatures

    validate = RunFeatures.validate

    def watched(self):
        seen.append({name: value.clone() for name, value in self.run.model.state_dict().items()})
        return validate(self)

    monkeypatch.setattr(RunFeatures, "validate", watched)
    run, _ = execute(toy_config(data / "pictures", tmp_path / "run", *TOY, "train.stages", "[1]"))
    last = saved(tmp_path / "run", 1)
    assert all(torch.equal(value, seen[-1][name]) for name, value in last["state_dict"].items())
    assert run.model.embedding.weight.shape == last["updates"]["trained"]["embedding.weight"].shape
    best = saved(tmp_path / "run", 1, "best")["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in run.model.state_dict().items())
