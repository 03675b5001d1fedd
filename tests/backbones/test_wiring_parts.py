"""Losses, samplers, draws and the bound: defaults, edges and kept state that the formulas' own tests pass by."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from wiring import centred, cross_entropy, unit

from relreid_plugin.backbones.losses import CenterLoss, CompositeLoss, batch_hard_triplet_loss
from relreid_plugin.errors import UserError
from relreid_plugin.graft import ffd
from relreid_plugin.graft.triplets import TripletSampler
from relreid_plugin.magformer.neighbourhoods import NeighbourhoodDataset
from relreid_plugin.rib import bound as rib
from relreid_plugin.rib.bound import InformationBottleneckBound


# --- image losses ------------------------------------------------------------------------------------------------------
def hard(features, labels, margin):
    """Batch-hard triplet loss by a loop over the anchors."""
    terms = []
    for anchor, label in zip(features, labels):
        away = (anchor - features).square().sum(dim=1).clamp_min(1e-12).sqrt()
        if bool((labels != label).any()):
            gap = away[labels == label].max() - away[labels != label].min()
            terms.append((gap + margin).clamp_min(0) if margin > 0 else torch.log1p(gap.exp()))
    return torch.stack(terms).mean()


def scene(seed=0, size=6, dim=4, classes=5):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])[:size]
    return torch.randn(size, classes, generator=draw), torch.randn(size, dim, generator=draw), labels


def test_weights_of_the_losses_by_default():
    logits, features, labels = scene()
    torch.manual_seed(1)
    loss = CompositeLoss(5, 4)
    torch.manual_seed(1)
    assert torch.equal(loss.center.centers, torch.randn(5, 4)) and loss.center.centers.requires_grad
    total, parts = loss(logits, features, labels)
    assert list(parts) == ["ce", "center"] and loss.margin == 0.3
    smoothed, pulled = cross_entropy(logits, labels, 0.1), centred(features, labels, loss.center.centers)
    assert torch.allclose(parts["ce"], smoothed) and torch.allclose(parts["center"], pulled)
    assert torch.allclose(total, smoothed + 0.0005 * pulled) and total.shape == ()
    for margin in (0.3, 0.0):
        close = features * 0.2  # the margin matters
        assert torch.allclose(batch_hard_triplet_loss(close, labels, margin=margin), hard(close, labels, margin), atol=1e-6)
    assert torch.allclose(batch_hard_triplet_loss(features * 0.2, labels), hard(features * 0.2, labels, 0.3), atol=1e-6)


def test_global_and_local_branches_count_half_each():
    logits, features, labels = scene()
    torch.manual_seed(1)
    loss = CompositeLoss(5, 4, ce=0.5, triplet=2.0, center=0.25, margin=0.7, label_smoothing=0.2)
    all_logits, all_features = [logits, logits * 2, logits * 3], [features, features * 2, features * 4]
    total, parts = loss(all_logits, tuple(all_features), labels)
    ce = [cross_entropy(each, labels, 0.2) for each in all_logits]
    triplet = [hard(each, labels, 0.7) for each in all_features]
    pulled = centred(features, labels, loss.center.centers)
    halves = [values[0] / 2 + (values[1] + values[2]) / 4 for values in (ce, triplet)]
    assert torch.allclose(parts["ce"], halves[0]) and torch.allclose(parts["triplet"], halves[1], atol=1e-6)
    assert torch.allclose(total, 0.5 * halves[0] + 2.0 * halves[1] + 0.25 * pulled, atol=1e-5)


@pytest.mark.parametrize("only", ["ce", "triplet", "center"])
def test_one_weight_is_enough(only):
    logits, features, labels = scene()
    weights = {"ce": 0.0, "triplet": 0.0, "center": 0.0, only: 0.5}
    loss = CompositeLoss(5, 4, **weights)
    total, parts = loss(logits, features, labels)
    assert list(parts) == [only] and torch.allclose(total, 0.5 * parts[only])
    states = loss.center_states(0.125)
    assert (loss.center is not None) == (only == "center")
    if only == "center":
        assert list(states) == ["loss", "center_optimizer"] and states["loss"] is loss
        (group,) = states["center_optimizer"].param_groups
        assert type(states["center_optimizer"]) is torch.optim.SGD
        assert group["lr"] == 0.125 and len(group["params"]) == 1 and group["params"][0] is loss.center.centers
    else:
        assert states == {}
    loss.unscale_center_gradients()  # nothing to divide yet
    if only == "center":
        total.backward()
        gradient = loss.center.centers.grad.clone()
        loss.unscale_center_gradients()
        assert torch.allclose(loss.center.centers.grad, gradient / 0.5)
    for pair in (("ce", "triplet"), ("ce", "center"), ("triplet", "center")):  # equal weights do not cancel out
        CompositeLoss(5, 4, **{"ce": 0.0, "triplet": 0.0, "center": 0.0} | dict.fromkeys(pair, 1.0))
    for name in ("ce", "triplet", "center"):
        with pytest.raises(ValueError, match="must not be negative"):
            CompositeLoss(5, 4, **{"ce": 1.0, "triplet": 1.0, "center": 1.0, name: -0.5})


def test_anchors_without_a_negative_and_centers_of_their_class():
    features = torch.randn(4, 3, requires_grad=True)
    none = batch_hard_triplet_loss(features, torch.zeros(4, dtype=torch.long))
    none.backward()
    assert none.item() == 0.0 and torch.equal(features.grad, torch.zeros(4, 3))
    twins = torch.zeros(4, 3, requires_grad=True)
    value = batch_hard_triplet_loss(twins, torch.tensor([0, 0, 1, 1]), margin=0.25)
    assert value.item() == pytest.approx(0.25, abs=1e-6)
    torch.manual_seed(2)
    loss = CenterLoss(3, 2)
    assert loss(loss.centers[[2, 0]], torch.tensor([2, 0])).item() == 0.0
    assert loss(loss.centers[[2]] + 2.0, torch.tensor([2])).item() == pytest.approx(4.0)


# --- GraFT's losses ----------------------------------------------------------------------------------------------------
def far(a, b, distance):
    squared = (a - b).square().sum()
    return squared if distance == "squared" else squared.clamp_min(1e-12).sqrt()


def mined(fused, data, labels, scheme, distance):
    """Farthest positive and nearest negative of every anchor, by loops."""
    roles = [fused if letter == "F" else data for letter in scheme]
    terms = []
    for i, pid in enumerate(labels.tolist()):
        near = [far(roles[0][i], roles[1][j], distance) for j in range(len(labels)) if labels[j] == pid and j != i]
        away = [far(roles[0][i], roles[2][j], distance) for j in range(len(labels)) if labels[j] != pid]
        if near and away:
            terms.append(F.softplus(max(near) - min(away)))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("distance", ffd.DISTANCES)
@pytest.mark.parametrize("scheme", ffd.SCHEMES)
def test_triplets_over_tokens(scheme, distance):
    draw = torch.Generator().manual_seed(3)
    fused, data = (torch.randn(7, 4, generator=draw) * scale for scale in (0.3, 0.5))
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])  # 2 has no positive
    options = {"scheme": scheme, "distance": distance}
    assert torch.allclose(ffd.mined_triplet_loss(fused, data, labels, **options), mined(fused, data, labels, **options))
    parts = [tuple(values.chunk(7)[i] for i in (0, 2, 5)) for values in (fused, data)]
    roles = [parts[letter == "D"][role] for role, letter in enumerate(scheme)]
    wanted = F.softplus(far(roles[0], roles[1], distance) - far(roles[0], roles[2], distance))
    assert torch.allclose(ffd.role_triplet_loss(*parts, **options), wanted)


def test_triplets_over_tokens_by_default():
    draw = torch.Generator().manual_seed(4)
    fused, data = torch.randn(6, 4, generator=draw), torch.randn(6, 4, generator=draw)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.allclose(ffd.mined_triplet_loss(fused, data, labels), mined(fused, data, labels, "FFD", "euclidean"))
    thirds = tuple(fused.chunk(3)), tuple(data.chunk(3))
    wanted = ffd.role_triplet_loss(*thirds, scheme="FFD", distance="euclidean")
    assert torch.equal(ffd.role_triplet_loss(*thirds), wanted)
    loss = ffd.GraFTLoss(5, 4)
    assert (loss.mined, loss.scheme, loss.distance, loss.weights["triplet"]) == (False, "FFD", "euclidean", 0.0)
    for options, message in (
        ({"scheme": "FFX"}, "scheme must be one of FFF, FFD, .*, got 'FFX'"),
        ({"distance": "cosine"}, "distance must"),
    ):
        for call in (
            lambda options: ffd.mined_triplet_loss(fused, data, labels, **options),
            lambda options: ffd.role_triplet_loss(*thirds, **options),
            lambda options: ffd.GraFTLoss(5, 4, **options),
        ):
            with pytest.raises(ValueError, match=message):
                call(options)


def test_mining_where_there_is_nothing_to_mine():
    fused, data = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    for labels in ([0, 0, 0], [0, 1, 2]):  # no negative, no positive
        fused.grad = data.grad = None
        value = ffd.mined_triplet_loss(fused, data, torch.tensor(labels))
        value.backward()
        assert (
            value.item() == 0.0 and torch.equal(fused.grad, torch.zeros(3, 4)) and torch.equal(data.grad, torch.zeros(3, 4))
        )
    same = torch.ones(4, 3, requires_grad=True)
    value = ffd.mined_triplet_loss(same, same, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value.item() == pytest.approx(math.log(2)) and bool(torch.isfinite(same.grad).all())


@pytest.mark.parametrize("scheme", ["DFD", "FDF"])
@pytest.mark.parametrize("mines", [False, True])
def test_the_sum_of_grafts_losses(mines, scheme):
    draw = torch.Generator().manual_seed(5)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    count = 6 if mines else 2
    logits = torch.randn(count, 5, generator=draw)
    fused, data = (torch.randn(6, 4, generator=draw) * 0.4 for _ in range(2))
    torch.manual_seed(1)
    weights = {"ce": 0.5, "triplet": 2.0, "center": 0.25, "label_smoothing": 0.2}
    loss = ffd.GraFTLoss(5, 4, mined=mines, scheme=scheme, distance="squared", **weights)
    total, parts = loss.fused_loss(logits, fused, data, labels)
    if mines:
        triplet = mined(fused, data, labels, scheme, "squared")
    else:
        one, other = (data, fused) if scheme == "DFD" else (fused, data)
        terms = [far(one[i], other[2 + i], "squared") - far(one[i], one[4 + i], "squared") for i in range(2)]
        triplet = F.softplus(torch.stack(terms)).mean()
    wanted = {
        "ce": cross_entropy(logits, labels[:count], 0.2),
        "triplet": triplet,
        "center": centred(fused[:count], labels[:count], loss.center.centers),
    }
    assert list(parts) == list(wanted)
    for name, value in wanted.items():
        assert torch.allclose(parts[name], value, atol=1e-5), name
    assert torch.allclose(total, sum(weights[name] * value for name, value in wanted.items()), atol=1e-5)
    bare = ffd.GraFTLoss(5, 4, ce=0.0, triplet=0.0, center=0.5)
    assert list(bare.fused_loss(logits, fused, data, labels)[1]) == ["center"] and total.shape == ()
    assert list(ffd.GraFTLoss(5, 4, center=0.0).fused_loss(logits, fused, data, labels)[1]) == ["ce"]


# --- GraFT's triplets --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alone", [9, 1])
def test_an_epoch_of_triplets(alone):
    labels = [7, 5, alone, 5, 7, 5]  # no anchor, but a negative
    torch.manual_seed(0)
    sampler = TripletSampler(labels, triplets=3, positives=2)
    assert len(sampler) == 27 and (sampler.triplets, sampler.positives) == (3, 2)
    negatives, positives, anchors = Counter(), Counter(), Counter()
    for _ in range(60):
        drawn = list(sampler)
        assert len(drawn) == 27
        for start in range(0, 27, 9):
            for a, p, n in zip(*(drawn[start + 3 * role : start + 3 * role + 3] for role in range(3))):
                assert labels[a] == labels[p] and a != p and labels[n] != labels[a]
                anchors[a] += 1
                positives[a, p] += 1
                negatives[a, n] += 1
    assert set(anchors) == {0, 1, 3, 4, 5} and all(100 < count <= 120 for count in anchors.values())
    assert set(negatives) == {(a, n) for a in anchors for n in range(6) if labels[a] != labels[n]}
    for anchor in anchors:
        counts = [count for (a, _), count in negatives.items() if a == anchor]
        assert min(counts) > 15 and max(counts) / min(counts) < 2.5
        counts = [count for (a, _), count in positives.items() if a == anchor]
        assert len(counts) == (1 if labels[anchor] == 7 else 2) and max(counts) / min(counts) < 1.4


def test_triplets_differ_from_draw_to_draw():
    labels = [0] * 300 + [1]
    torch.manual_seed(0)
    sampler = TripletSampler(labels, triplets=5000, positives=4)
    assert sampler.triplets == 1200 and len(sampler) == 3600  # fewer than asked for in an epoch
    first, second = (torch.tensor(list(sampler)).view(3, -1) for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[0].sort().values)
    pairs = sorted(zip(first[0].tolist(), first[1].tolist()))
    assert len(set(pairs)) == 1200 and len({anchor for anchor, _ in pairs}) == 300  # different positives of an anchor
    steps = [(positive - anchor) % 300 for anchor, positive in pairs]
    assert max(steps) > 250 and min(steps) < 50 and set(first[2].tolist()) == {300}
    third = torch.tensor(list(TripletSampler([0] * 300 + [1] * 300, triplets=600, positives=1))).view(3, -1)[2]
    assert len(third.unique()) > 300  # every anchor draws a negative of its own
    assert TripletSampler([0, 0, 1], triplets=1).positives == 8
    for labels in ([0, 1, 2], [0, 0, 0]):
        with pytest.raises(UserError, match="triplets need two identities, and one of them with two images"):
            TripletSampler(labels, triplets=1)


# --- MagFormer's steps -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "spread", "noise", "seed"), [(60, (1.0, 2.0), 0.0, 1), (60, (1.5, 4.0), 0.3, 7), (14, (1.0, 9.0), 0.1, 2**40)]
)
def test_a_step_draws_by_seed_epoch_and_number(size, spread, noise, seed):
    draw = torch.Generator().manual_seed(9)
    features, labels = unit(torch.randn(size, 5, generator=draw)).float(), torch.arange(size) + 100
    cameras = torch.arange(size) % 3
    data = NeighbourhoodDataset(
        features, labels, features_per_step=12, steps=4, spread=spread, noise=noise, seed=seed, cameras=cameras
    )
    assert len(data) == 4
    sizes = set()
    for epoch in (0, 3):
        data.epoch = epoch
        for index in range(4):
            source = torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + index) % 2**64)
            anchor = int(torch.randint(size, (1,), generator=source))
            factor = spread[0] + (spread[1] - spread[0]) * float(torch.rand(1, generator=source))
            pool = min(size, max(12, int(12 * factor)))
            sizes.add(pool)
            near = sorted(range(size), key=lambda j: -float(features[anchor] @ features[j])) if pool < size else range(size)
            rows = [list(near)[j] for j in torch.randperm(pool, generator=source)[:12].tolist()]
            moved = torch.randn(12, 5, generator=source) * noise / math.sqrt(5) if noise else torch.zeros(12, 5)
            item = data[index]
            assert item["pids"].tolist() == [100 + j for j in rows] and item["camids"].tolist() == [j % 3 for j in rows]
            assert torch.allclose(item["features"], features[rows] + moved, atol=1e-6)
    assert (len(sizes) > 1 or size == 14) and list(item) == ["features", "pids", "camids"]
    for index in (4, 5):
        with pytest.raises(IndexError):
            data[index]


def test_steps_by_default():
    features, labels = unit(torch.randn(95, 4)).float(), torch.arange(95)
    data = NeighbourhoodDataset(features, labels)
    assert (data.count, data.steps, data.spread, data.noise, data.seed, data.epoch) == (95, 3, (1.0, 2.0), 0.0, 1, 0)
    assert data[0]["camids"].tolist() == [0] * 95 and len(NeighbourhoodDataset(features[:29], labels[:29])) == 1
    assert len(NeighbourhoodDataset(features[:60], labels[:60])) == 2
    big = torch.zeros(2100, 2)
    assert NeighbourhoodDataset(big, torch.zeros(2100)).count == 2048


# --- RIB's bound -------------------------------------------------------------------------------------------------------
def trained(classes=4, epochs=2, **options):
    """A bound after some epochs."""
    bound = InformationBottleneckBound(classes, 3, input_dim=6, **options)
    draw = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for label in range(classes - 1):  # the last identity is never seen
            bound(torch.randn(2, 3, generator=draw), torch.tensor([label] * 2), torch.rand(2, 6, generator=draw))
        bound.end_epoch()
    return bound


def test_what_a_checkpoint_holds_of_the_bound():
    state = InformationBottleneckBound(4, 3).state_dict()
    wide, sums = torch.float32, torch.float64
    assert {name: (tuple(value.shape), value.dtype) for name, value in state.items()} == {
        "centroids_f": ((4, 3), wide),
        "centroids_x": ((4, 384), wide),
        "seen": ((4,), torch.bool),
        "log_q": ((4, 4), wide),
        "epochs": ((), torch.int64),
        "sum_f": ((4, 3), sums),
        "sum_x": ((4, 384), sums),
        "sum_phi": ((4, 4), sums),
        "count": ((4,), sums),
        "sum_joint": ((4, 4), sums),
        "sum_input": ((4,), sums),
        "sum_terms": ((2,), sums),
    }
    assert bool((state["log_q"] == -torch.tensor(4.0).log()).all())
    assert all(not bool(value.any()) for name, value in state.items() if name != "log_q")
    plain = InformationBottleneckBound(4, 3)
    assert (plain.beta, plain.epsilon, plain.estimate) == (1.0, 1e-8, True)
    bare = InformationBottleneckBound(4, 3, estimate=False)
    assert bare.sum_joint.shape == (0, 0)
    bound = trained()
    other = InformationBottleneckBound(4, 3, input_dim=6)
    other.load_state_dict(bound.state_dict())
    assert other.ready and int(other.epochs) == 2 and not InformationBottleneckBound(4, 3).ready
    with pytest.raises(RuntimeError, match="centroids_x"):
        InformationBottleneckBound(4, 3, input_dim=5).load_state_dict(bound.state_dict())


def test_an_epoch_of_one_sample_and_one_of_none():
    bound = trained()
    before = {name: value.clone() for name, value in bound.state_dict().items()}
    assert bound.end_epoch() is None  # no sample
    for name, value in bound.state_dict().items():
        assert torch.equal(value, before[name]), name
    sample = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([1]), torch.ones(1, 6)
    value = bound(*sample)
    found = bound.end_epoch()
    assert (
        found["ibb"] == pytest.approx(value.item(), rel=1e-5) and found["ib_bound"] == found["ibb"] + found["input_entropy"]
    )
    assert torch.allclose(bound.centroids_f[1], torch.tensor([0.6, 0.8, 0.0])) and int(bound.epochs) == 3
    assert torch.equal(bound.centroids_f[0], before["centroids_f"][0]) and bound.seen.tolist() == [True] * 3 + [False]
    first = trained(epochs=1)
    assert bool((first.log_q == -math.log(4)).all()) and not first.ready and bool(first.centroids_x.any())
    quiet = trained(estimate=False)
    quiet(*sample)
    assert quiet.end_epoch().keys() == {"ibb", "input_entropy", "ib_bound"}


def test_when_the_bound_holds(monkeypatch):
    bound = trained(epsilon=0.01)
    bound(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(2, 6))
    for gap, holds in ((-1.0, 1.0), (0.035, 1.0), (0.045, 0.0), (0.9, 0.0)):
        bound.count.fill_(1.0), bound.sum_terms.copy_(torch.tensor([3.0, 1.0]))
        values = iter([0.25 + 1.0 + 0.5 + gap, 0.5])  # i_fx = bound + i_fy + gap; the floor may lift the bound by 4 * 0.01
        monkeypatch.setattr(rib, "mutual_information", lambda joint, values=values: torch.tensor(next(values)))
        monkeypatch.setattr(rib, "entropy", lambda shares: torch.tensor(0.25))
        found = bound.end_epoch()
        assert (found["ibb"], found["input_entropy"], found["ib_bound"], found["ib_holds"]) == (1.0, 0.25, 1.25, holds)
        assert found["i_fy"] == 0.5 and found["ib_estimate"] == found["i_fx"] - 0.5
