"""Keys of optimisers and schedules: what each changes in the object that trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from wiring import settings

from relreid_plugin import host
from relreid_plugin.errors import UserError
from relreid_plugin.graft.schedule import sqrt_lambda
from relreid_plugin.host.schedules import warmup_lambda
from relreid_plugin.rib.dcs import DCSNonLocal


class Layers(nn.Module):
    """Two layers, a classifier, and a parameter that belongs to none of them."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(3))
        self.base = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.classifier = nn.Linear(2, 5)
        if gated:
            self.gates = DCSNonLocal(4)


KEYS = ("train.lr", 0.125, "train.weight_decay", 0.25)
ADAM = ("adam.beta1", 0.5, "adam.beta2", 0.75)
OPTIMISERS = {
    "adam": (ADAM, torch.optim.Adam, {"betas": (0.5, 0.75), "amsgrad": False}),
    "amsgrad": (ADAM, torch.optim.Adam, {"betas": (0.5, 0.75), "amsgrad": True}),
    "radam": (ADAM, None, {"betas": (0.5, 0.75)}),
    "adamw": (ADAM, torch.optim.AdamW, {"betas": (0.5, 0.75), "amsgrad": False}),
    "sgd": (
        ("sgd.momentum", 0.625, "sgd.dampening", 0.375, "sgd.nesterov", False),
        torch.optim.SGD,
        {"momentum": 0.625, "dampening": 0.375, "nesterov": False},
    ),
    "rmsprop": (
        ("sgd.momentum", 0.625, "rmsprop.alpha", 0.875),
        torch.optim.RMSprop,
        {"momentum": 0.625, "alpha": 0.875},
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("staged", [False, True])
def test_every_key_of_an_optimiser_arrives_in_every_group(name, staged):
    pairs, cls, values = OPTIMISERS[name]
    more = ("train.staged_lr", True, "train.new_layers", ["head", "classifier"], "train.base_lr_mult", 0.5) if staged else ()
    model = Layers()
    optimizer = host.build_optimizer(model, settings("train.optim", name, *KEYS, *pairs, *more))
    assert cls is None or type(optimizer) is cls
    for group in optimizer.param_groups:
        assert {key: tuple(group[key]) if key == "betas" else group[key] for key in values} == values
        assert group["weight_decay"] == 0.25
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates) == 7
    for key, value in model.named_parameters():
        assert rates[id(value)] == (0.0625 if staged and key.startswith(("token", "base")) else 0.125), key
    assert len(optimizer.param_groups) == (2 if staged else 1)
    assert optimizer.defaults["lr"] == 0.125


def test_nesterov():
    keys = ("train.optim", "sgd", "sgd.momentum", 0.5, "sgd.nesterov", True)
    (group,) = host.build_optimizer(Layers(), settings(*keys)).param_groups
    assert group["nesterov"] and group["momentum"] == 0.5
    with pytest.raises(UserError, match=r"'sgd.nesterov True' needs a 'sgd.momentum' above 0"):
        host.build_optimizer(Layers(), settings(*keys, "sgd.dampening", 0.5))


@pytest.mark.parametrize("parallel", [False, True])
def test_new_layers_must_be_layers(parallel):
    model = nn.DataParallel(Layers()) if parallel else Layers()
    keys = ("train.staged_lr", True, "train.new_layers", ["head", "classifer"], "model.name", "resnet50")
    with pytest.raises(
        UserError, match=r"'train\.new_layers' holds 'classifer'.*no layer of model 'resnet50'.*'classifier'"
    ):
        host.build_optimizer(model, settings(*keys))
    optimizer = host.build_optimizer(model, settings("train.staged_lr", True, "train.new_layers", ["head"]))
    assert [len(group["params"]) for group in optimizer.param_groups] == [5, 2]
    assert len(host.build_optimizer(Layers(), settings("train.new_layers", ["classifer"])).param_groups) == 1


@pytest.mark.parametrize("parallel", [False, True])
def test_open_layers_must_be_layers_where_they_are_read(parallel):
    model = nn.DataParallel(Layers()) if parallel else Layers()
    for epochs in (1, 3):
        cfg = settings("train.fixbase_epoch", epochs, "train.open_layers", ["head"], "model.name", "resnet50")
        host.build_optimizer(model, cfg)
        cfg.train.open_layers = ["head", "classifer"]
        with pytest.raises(UserError, match=r"'train\.open_layers' holds 'classifer'.*of model 'resnet50'.*'classifier'"):
            host.build_optimizer(model, cfg)
        cfg.train.fixbase_epoch = 0
        host.build_optimizer(model, cfg)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_gates_have_a_learning_rate_of_their_own(name, staged):
    model = Layers(gated=True)
    gates = {id(value) for value in model.gates.select.parameters()}
    keys = ("train.optim", name, *KEYS, *ADAM, "train.staged_lr", staged, "rib.dcs.lr_mult", 4.0)
    optimizer = host.build_optimizer(model, settings(*keys))
    first, *rest = optimizer.param_groups
    assert {id(value) for value in first["params"]} == gates and first["lr"] == 0.5
    assert len(rest) == (2 if staged else 1)
    assert first.keys() == rest[-1].keys()
    for key in ("weight_decay", *(("betas",) if name != "sgd" else ("momentum",))):
        assert first[key] == rest[-1][key]
    others = [id(value) for group in rest for value in group["params"]]
    assert len(others) == len(set(others)) == len(list(model.parameters())) - len(gates)
    assert not gates & set(others) and rest[-1]["lr"] == 0.125
    for plain in (settings(*keys, "rib.dcs.lr_mult", 1.0), settings(*keys)):
        gated = host.build_optimizer(Layers(gated=plain.rib.dcs.lr_mult == 1.0), plain)
        assert len(gated.param_groups) == (2 if staged else 1)


# --- schedules -------------------------------------------------------------------------------------------------------------
def factors(*pairs, epochs=8):
    """Learning-rate factors of the schedule that the keys of ``train`` describe."""
    cfg = settings("train.lr", 1.0, "train.optim", "sgd", *pairs)
    optimizer = host.build_optimizer(Layers(), cfg)
    scheduler = host.build_scheduler(optimizer, cfg)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 2])
def test_every_key_of_a_schedule(warmup):
    ramp = [0.25, 0.625] if warmup else [1.0, 1.0]
    more = ("train.warmup_epochs", warmup, "train.warmup_factor", 0.25)

    def wanted(*tail):
        return pytest.approx([*ramp, *tail], abs=1e-9)

    def name(kind, *pairs):
        return factors("train.lr_scheduler", kind, *more, *pairs)

    assert name("none") == wanted(1, 1, 1, 1, 1, 1)
    assert name("single_step", "train.stepsize", [3], "train.gamma", 0.5) == wanted(1, 0.5, 0.5, 0.5, 0.25, 0.25)
    assert name("multi_step", "train.stepsize", [3, 6], "train.gamma", 0.2) == wanted(1, 0.2, 0.2, 0.2, 0.04, 0.04)
    assert name("single_step", "train.stepsize", [2, 4], "train.gamma", 0.5)[:6] == pytest.approx([*ramp, 1, 1, 0.5, 0.5])
    cosine = [0.5 * (1 + math.cos(math.pi * max(0, epoch - warmup) / (10 - warmup))) for epoch in range(8)]
    found = name("cosine", "train.max_epoch", 10)
    assert found == pytest.approx([a * b for a, b in zip(cosine, [*ramp, *[1.0] * 6])] if warmup else cosine)


def test_whose_schedule_it_is():
    for warmup in (0, 1, 2):
        for name in ("none", "multi_step"):
            cfg = settings("train.lr_scheduler", name, "train.warmup_epochs", warmup)
            scheduler = host.build_scheduler(host.build_optimizer(Layers(), cfg), cfg)
            assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) is (warmup > 0 or name == "none")
    assert factors("train.lr_scheduler", "cosine", "train.max_epoch", 1, epochs=2) == pytest.approx([1.0, 0.0], abs=1e-9)


def test_schedules_without_an_epoch_left():
    assert factors("train.lr_scheduler", "cosine", "train.max_epoch", 0, epochs=1) == [1.0]
    short = ("train.lr_scheduler", "cosine", "train.max_epoch", 2, "train.warmup_epochs", 2, "train.warmup_factor", 0.5)
    assert factors(*short, epochs=4) == pytest.approx([0.5, 0.75, 1.0, 0.0], abs=1e-9)
    with pytest.raises(UserError, match="key 'train.stepsize' holds 0"):
        factors("train.lr_scheduler", "single_step", "train.stepsize", [0])


def test_warm_up_in_closed_form():
    plain = warmup_lambda()
    assert [plain(epoch) for epoch in (0, 1, 100)] == [1.0, 1.0, 1.0]
    single = warmup_lambda("single_step", stepsize=2)
    assert [single(epoch) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert warmup_lambda("none", warmup_epochs=2)(0) == pytest.approx(0.01)
    both = warmup_lambda("multi_step", stepsize=[1], gamma=0.5, warmup_epochs=2, warmup_factor=0.5)
    assert [both(epoch) for epoch in range(3)] == [0.5, 0.375, 0.5]
    unsorted = warmup_lambda("multi_step", stepsize=[4, 2], gamma=0.5)
    assert [unsorted(epoch) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    every = warmup_lambda("single_step", stepsize=[1], gamma=0.5, max_epoch=0)
    assert [every(epoch) for epoch in range(3)] == [1.0, 0.5, 0.25]
    cosine = warmup_lambda("cosine", max_epoch=6, warmup_epochs=2, warmup_factor=0.5)
    assert [cosine(epoch) for epoch in (1, 2, 3, 4, 6, 9)] == pytest.approx(
        [0.75, 1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0, 0], abs=1e-12
    )
    assert warmup_lambda("cosine", max_epoch=1)(0) == 1.0 and warmup_lambda("cosine", max_epoch=3, warmup_epochs=2)(2) == 1.0
    with pytest.raises(ValueError, match="scheduler must be one of"):
        warmup_lambda("sqrt")
    for steps in ([], [0], [3, 0], -1):
        with pytest.raises(ValueError, match="period of at least 1"):
            warmup_lambda("single_step", stepsize=steps)
    with pytest.raises(ValueError, match="more epochs"):
        warmup_lambda("cosine", warmup_epochs=1)
    warmup_lambda("multi_step", stepsize=[0])


def test_the_square_root_in_closed_form():
    factor = sqrt_lambda(20, warmup_steps=4, cooldown=0.25)  # 4 up, 11 along, 5 down
    wanted = [0.25, 0.5, 0.75, 1.0] + [math.sqrt(4 / step) for step in range(4, 15)]
    top = math.sqrt(4 / 15)
    wanted += [top * left / 5 for left in (5, 4, 3, 2, 1)] + [0.0, 0.0]
    assert [factor(step) for step in range(22)] == pytest.approx(wanted)
    by_default = sqrt_lambda(10000)
    assert by_default(0) == pytest.approx(1 / 500) and by_default(499) == 1.0 and by_default(500) == 1.0
    assert by_default(8999) == pytest.approx(math.sqrt(500 / 8999)) and by_default(9500) == pytest.approx(
        0.5 * math.sqrt(500 / 9000)
    )
    at_once = sqrt_lambda(4, warmup_steps=0, cooldown=0.0)
    assert [at_once(step) for step in range(5)] == pytest.approx([1.0, 1.0, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.0])
    falling = sqrt_lambda(4, cooldown=1.0)
    assert [falling(step) for step in range(5)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    capped = sqrt_lambda(10, warmup_steps=500, cooldown=0.5)
    assert [capped(step) for step in (0, 4, 5, 10)] == pytest.approx([0.2, 1.0, 1.0, 0.0])
    assert sqrt_lambda(1, cooldown=0.0)(0) == 1.0
    last = sqrt_lambda(10, warmup_steps=1, cooldown=0.1)
    assert [last(step) for step in (8, 9, 10)] == pytest.approx([math.sqrt(1 / 8), math.sqrt(1 / 9), 0.0])
    for steps, share in ((0, 0.1), (5, 1.1), (5, -0.1)):
        with pytest.raises(ValueError, match="total_steps must be at least 1"):
            sqrt_lambda(steps, cooldown=share)
