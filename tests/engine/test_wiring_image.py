"""The image engines that a configuration asks for, and the step of the plug-in's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from wiring import settings

from relreid_plugin.backbones.losses import batch_hard_triplet_loss
from relreid_plugin.engine import image
from relreid_plugin.engine.base import StageContext
from relreid_plugin.engine.image import build_image_engine
from relreid_plugin.errors import UserError
from relreid_plugin.rib.bound import InformationBottleneckBound
from relreid_plugin.rib.dcs import DCSNonLocal


class Net(nn.Module):
    """Features, logits and what lies behind a neck; ``form`` says what it returns in training."""

    uses_cameras = False

    def __init__(self, form="pair", gated=False) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 5)
        self.form = form
        self.returns_neck = None
        self.seen: list[tuple] = []
        if gated:
            self.gates = DCSNonLocal(4)

    def forward(self, images, cameras=None):
        features = self.body(images.mean(dim=(2, 3)))
        self.seen.append((features.dtype, cameras))
        if not self.training:
            return features
        logits = self.head(features)
        return {
            "pair": lambda: (logits, features),
            "three": lambda: (logits, features, features * 10),
            "lists": lambda: ([logits, -logits], [features, features * 3]),
            "four": lambda: (logits, features, features, features),
            "one": lambda: logits,
            "single": lambda: (logits,),
            "list": lambda: [logits, features],
        }[self.form]()


def batch(seed=0, size=6):
    draw = torch.Generator().manual_seed(seed)
    return {
        "img": torch.randn(size, 3, 32, 16, generator=draw),
        "pid": torch.tensor([0, 0, 1, 1, 2, 2]),
        "camid": torch.arange(size),
        "impath": [""] * size,
    }


def build(*pairs, form="pair", gated=False, feature_dim=4, parallel=False, gpu=False):
    """(engine, its states, the bare model) of a configuration."""
    torch.manual_seed(2)
    net = Net(form, gated)
    model = nn.DataParallel(net) if parallel else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    manager = SimpleNamespace(
        num_train_pids=5, train_loader=[batch()], test_loader={}, transform_tr=SimpleNamespace(transforms=[]), sources=[]
    )
    cfg = settings(*pairs)
    cfg.use_gpu = gpu
    engine, states = build_image_engine(cfg, manager, model, optimizer, scheduler, feature_dim=feature_dim)
    assert engine.datamanager is manager and engine.model is model and engine.optimizer is optimizer
    assert engine.scheduler is scheduler and engine.use_gpu is gpu
    assert engine._models["model"] is model and engine._optims["model"] is optimizer
    assert engine._scheds["model"] is scheduler
    return engine, states, net


def stepped(engine, folder, data=None):
    """What a step reports, and the gradient of the model's weights that it went by."""
    engine.attach(StageContext("image", folder, 1))
    engine._sums = {}
    report = engine.forward_backward(data or batch())
    return report, [value.grad.clone() for value in engine.model.parameters()]


# --- which engine ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("video", [False, True])
def test_the_hosts_engines(smooth, video):
    kind = ("data.type", "video", "video.pooling_method", "max") if video else ()
    engine, states, _ = build(*kind, "loss.name", "softmax", "loss.softmax.label_smooth", smooth)
    assert type(engine) is (image.VideoSoftmaxEngine if video else image.SoftmaxEngine) and states == {}
    assert (engine.criterion.eps if hasattr(engine.criterion, "eps") else 0.1 * smooth) == (0.1 if smooth else 0)
    assert getattr(engine, "pooling_method", None) == ("max" if video else None)
    keys = ("loss.triplet.margin", 0.7, "loss.triplet.weight_t", 0.25, "loss.triplet.weight_x", 0.75)
    engine, states, _ = build(*kind, "loss.name", "triplet", *keys, "loss.softmax.label_smooth", smooth)
    assert type(engine) is (image.VideoTripletEngine if video else image.TripletEngine) and states == {}
    assert (engine.criterion_t.margin, engine.weight_t, engine.weight_x) == (0.7, 0.25, 0.75)
    assert engine.criterion_x.eps == (0.1 if smooth else 0)
    assert getattr(engine, "pooling_method", None) == ("max" if video else None)


def test_what_composite_does_not_work_with():
    for pairs, dim in ((("data.type", "video"), 4), ((), None)):
        kind = "video" if pairs else "image"
        with pytest.raises(UserError, match=f"composite' works with image models.*'data.type {kind}' and 'model.name"):
            build("loss.name", "composite", *pairs, feature_dim=dim)


@pytest.mark.parametrize("smooth", [True, False])
def test_keys_of_the_composite_loss(smooth):
    keys = {"ce": 0.5, "triplet": 2.0, "center": 0.25, "center_lr": 0.125, "smoothing": 0.3}
    flat = [word for name, value in keys.items() for word in (f"loss.composite.{name}", value)]
    more = ("loss.triplet.margin", 0.7, "loss.softmax.label_smooth", smooth, "train.precision", "bfloat16")
    engine, states, _ = build("loss.name", "composite", *flat, *more)
    assert type(engine) is image.CompositeEngine and engine.updates.practice.precision == "bfloat16"
    assert engine.loss.weights == {"ce": 0.5, "triplet": 2.0, "center": 0.25} and engine.loss.margin == 0.7
    assert engine.loss.label_smoothing == (0.3 if smooth else 0.0) and engine.loss.center.centers.shape == (5, 4)
    assert list(states) == ["loss", "center_optimizer"] and states["loss"] is engine.loss
    assert states["center_optimizer"] is engine.center_optimizer
    assert engine.center_optimizer.param_groups[0]["lr"] == 0.125
    engine, states, _ = build("loss.name", "composite", "loss.composite.center", 0.0)
    assert states == {} and engine.center_optimizer is None and engine.updates.practice.precision == "float32"


def test_gates_are_watched_whatever_the_loss():
    keys = ("model.name", "bnneck_baseline", "rib.attention", "dcs", "train.max_epoch", 7)
    for loss in ("composite", "softmax", "triplet"):
        for parallel in (False, True):
            engine, states, net = build("loss.name", loss, *keys, gated=True, parallel=parallel)
            assert len(engine.observers) == 1
            engine.observers[0].begin(0)
            found = states["gates"]
            assert isinstance(found, nn.Module) or hasattr(found, "state_dict")
            assert engine.observers[0].selection is found and engine.observers[0].max_epoch == 7
    engine, states, _ = build("loss.name", "softmax")
    assert engine.observers == [] and states == {}


# --- a step ------------------------------------------------------------------------------------------------------------
WEIGHTS = ("loss.composite.ce", 0.5, "loss.composite.triplet", 2.0, "loss.composite.center", 0.25)


def expected(net, engine, data, form, *, precision=torch.float32):
    """Loss and parts of a batch, written out."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        features = net.body(data["img"].mean(dim=(2, 3)))
        logits = net.head(features)
        pairs = [(logits, features)] if form != "lists" else [(logits, features), (-logits, features * 3)]
    pairs = [(a.float(), b.float()) for a, b in pairs]
    parts = {
        "ce": [F.cross_entropy(a, data["pid"], label_smoothing=0.1) for a, _ in pairs],
        "triplet": [batch_hard_triplet_loss(b, data["pid"], margin=0.3) for _, b in pairs],
    }
    parts = {name: values[0] if len(values) == 1 else sum(values) / 2 for name, values in parts.items()}
    parts["center"] = 0.5 * (pairs[0][1] - engine.loss.center.centers[data["pid"]]).square().sum(dim=1).mean()
    accuracy = 100 * (logits.argmax(dim=1) == data["pid"]).float().mean()
    return 0.5 * parts["ce"] + 2.0 * parts["triplet"] + 0.25 * parts["center"], parts, accuracy


@pytest.mark.parametrize("form", ["pair", "lists", "three"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step(tmp_path, form, precision):
    engine, _, net = build("loss.name", "composite", *WEIGHTS, "train.precision", precision, form=form)
    before = [value.detach().clone() for value in net.parameters()]
    centers = engine.loss.center.centers.detach().clone()
    total, parts, accuracy = expected(net, engine, batch(), form, precision=getattr(torch, precision))
    wanted = torch.autograd.grad(total, [*net.parameters(), engine.loss.center.centers])
    for value in [*net.parameters(), engine.loss.center.centers]:
        value.grad = torch.full_like(value, 9.0)  # of the step before
    report, found = stepped(engine, tmp_path)
    assert list(report) == ["loss", "ce", "triplet", "center", "acc"] and 0 < accuracy < 100
    assert report["loss"] == pytest.approx(total.item(), rel=1e-5) and report["acc"] == pytest.approx(accuracy.item())
    assert {name: report[name] for name in parts} == pytest.approx({k: v.item() for k, v in parts.items()}, rel=1e-5)
    assert net.seen == [(getattr(torch, precision), None)]
    for value, start, gradient, made in zip(net.parameters(), before, wanted, found):
        assert torch.allclose(made, gradient, atol=1e-5) and torch.allclose(value, start - 0.1 * gradient, atol=1e-5)
    assert torch.allclose(engine.loss.center.centers, centers - 0.5 * wanted[-1] / 0.25, atol=1e-5)
    assert engine._sums == report


def test_a_step_without_class_centers(tmp_path):
    engine, _, net = build("loss.name", "composite", "loss.composite.center", 0.0, "loss.composite.triplet", 1.0)
    for value in net.parameters():
        value.grad = torch.full_like(value, 9.0)
    report, found = stepped(engine, tmp_path)
    assert list(report) == ["loss", "ce", "triplet", "acc"] and all(float(g.abs().max()) < 8 for g in found)


def test_cameras_go_to_a_model_that_asks_for_them(tmp_path, monkeypatch):
    engine, _, net = build("loss.name", "composite", *WEIGHTS)
    monkeypatch.setattr(Net, "uses_cameras", True)
    stepped(engine, tmp_path)
    assert net.seen[0][1].tolist() == [-1] * 6


@pytest.mark.parametrize("form", ["four", "one", "single", "list"])
def test_models_that_train_otherwise_are_refused(tmp_path, form):
    engine, *_ = build("loss.name", "composite", form=form)
    with pytest.raises(UserError, match="'loss.name composite' needs a model that trains returning one pair"):
        stepped(engine, tmp_path)


def test_the_part_that_is_not_finite_is_named(tmp_path, monkeypatch):
    engine, *_ = build("loss.name", "composite", *WEIGHTS)
    engine.attach(StageContext("image", tmp_path, 1))
    monkeypatch.setattr(image.CompositeLoss, "forward", lambda *args: made)
    one = torch.tensor(1.0, requires_grad=True)
    for parts, name in (
        ({"ce": one, "triplet": one * float("nan"), "center": one * float("inf")}, "triplet"),
        ({"ce": one}, "loss"),
    ):
        made = (one * float("inf"), parts)
        with pytest.raises(UserError, match=rf"the loss became inf in epoch 1.*\(part '{name}'\)"):
            engine.forward_backward(batch())


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_what_goes_to_the_gpu(tmp_path, monkeypatch, gpu, bounded):
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: moved.append(type(self).__name__) or self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **options: moved.append((tuple(self.shape), options)) or self)
    keys = ("rib.ibb.measure", True) if bounded else ()
    engine, *_ = build("loss.name", "composite", *WEIGHTS, *keys, gpu=gpu)
    assert moved == (["CompositeLoss"] + ["InformationBottleneckBound"] * bounded if gpu else [])
    moved.clear()
    stepped(engine, tmp_path)
    whole = {"non_blocking": True}
    assert moved == ([((6, 3, 32, 16), whole), ((6,), whole)] if gpu else [])
    moved.clear()
    engine.model.eval()
    engine.extract([batch()], label="x")
    assert moved == ([((6, 3, 32, 16), whole)] if gpu else [])
    for loss in ("softmax", "triplet"):
        build("loss.name", loss, gpu=gpu)


# --- the bound ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("feature", ["before", "after"])
@pytest.mark.parametrize("form", ["pair", "three", "lists"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_bound_in_a_step(tmp_path, monkeypatch, feature, form, eta):
    asked = []

    def forward(self, features, labels, inputs):
        asked.append((features, labels, inputs))
        return None if len(asked) == 1 else features.square().sum()

    monkeypatch.setattr(InformationBottleneckBound, "forward", forward)
    keys = ("rib.ibb.measure", True, "rib.ibb.eta", eta, "rib.ibb.warmup", 0.0, "rib.ibb.feature", feature)
    engine, states, net = build("loss.name", "composite", *WEIGHTS, *keys, form=form)
    (observer,) = engine.observers
    assert states["bound"] is observer.bound and net.returns_neck is (feature == "after")
    assert (observer.bound.num_classes, observer.bound.centroids_f.shape) == (5, (5, 4))
    observer.begin(3)
    report, _ = stepped(engine, tmp_path)
    assert "ibb" not in report
    net.load_state_dict(build("loss.name", "composite", *WEIGHTS, form=form)[2].state_dict())
    total, *_ = expected(net, engine, batch(), form)
    about = net.body(batch()["img"].mean(dim=(2, 3))) * (10 if form == "three" else 1)
    value = about.square().sum()
    wanted = torch.autograd.grad(total + eta * value, list(net.parameters()), allow_unused=True)
    report, found = stepped(engine, tmp_path)
    assert torch.allclose(asked[-1][0], about) and asked[-1][1].tolist() == batch()["pid"].tolist()
    assert asked[-1][2].shape == (6, 3 * 16 * 8) and list(report) == ["loss", "ce", "triplet", "center", "ibb", "acc"]
    assert report["ibb"] == pytest.approx(value.item(), rel=1e-5)
    assert report["loss"] == pytest.approx((total + eta * value).item(), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted))


def test_where_the_bound_s_features_come_from_in_parallel():
    for feature in ("before", "after"):
        keys = ("rib.ibb.measure", True, "rib.ibb.feature", feature)
        engine, _, net = build("loss.name", "composite", *keys, parallel=True)
        assert net.returns_neck is (feature == "after") and not hasattr(engine.model, "returns_neck")


def test_no_bound_without_its_key():
    engine, states, net = build("loss.name", "composite")
    assert "bound" not in states and engine.observers == [] and net.returns_neck is None
