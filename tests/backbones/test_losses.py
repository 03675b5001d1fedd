"""Losses and neighbourhood draws against naive loops."""

from __future__ import annotations

import math

import pytest
import torch

from relreid_plugin.backbones.losses import CenterLoss, CompositeLoss, batch_hard_triplet_loss
from relreid_plugin.magformer.neighbourhoods import NeighbourhoodDataset
from relreid_plugin.metrics.neighbours import normalise


def naive_triplet(features, labels, margin):
    terms = []
    for a in range(len(labels)):
        distance = [torch.sqrt(((features[a] - row) ** 2).sum().clamp_min(1e-12)) for row in features]
        positives = [distance[j] for j in range(len(labels)) if labels[j] == labels[a]]
        negatives = [distance[j] for j in range(len(labels)) if labels[j] != labels[a]]
        if negatives:
            gap = max(positives) - min(negatives)
            terms.append(torch.clamp(gap + margin, min=0) if margin > 0 else torch.log1p(torch.exp(gap)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("margin", [0.3, 5.0, 0.0])
def test_batch_hard_triplet_and_gradient(margin):
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    features = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    loss = batch_hard_triplet_loss(features, labels, margin=margin)
    (gradient,) = torch.autograd.grad(loss, features)
    expected = naive_triplet(features, labels.tolist(), margin)
    (expected_gradient,) = torch.autograd.grad(expected, features)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert torch.allclose(gradient, expected_gradient, atol=1e-8)


def test_triplet_of_one_identity_is_zero_with_zero_gradient():
    features = torch.randn(4, 3, requires_grad=True)
    loss = batch_hard_triplet_loss(features, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and float(features.grad.abs().sum()) == 0.0


def test_duplicate_features_have_finite_gradients():
    features = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet_loss(features, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(features.grad).all()


def test_center_loss_is_half_the_mean_squared_distance():
    torch.manual_seed(0)
    loss = CenterLoss(4, 3).double()
    features, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 3, 3, 2, 0])
    expected = sum(((features[i] - loss.centers[labels[i]]) ** 2).sum() for i in range(6)) / 6 / 2
    assert loss(features, labels).item() == pytest.approx(expected.item(), abs=1e-12)


def test_composite_is_the_weighted_sum_with_label_smoothing():
    torch.manual_seed(0)
    loss = CompositeLoss(4, 3, ce=0.7, triplet=0.5, center=0.01, margin=0.3, label_smoothing=0.1).double()
    logits = torch.randn(6, 4, dtype=torch.float64)
    features, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 3, 3, 2, 0])
    total, parts = loss(logits, features, labels)
    ce = 0.0
    for i in range(6):
        shares = [math.exp(v) for v in logits[i].tolist()]
        for c in range(4):
            target = 0.1 / 4 + (0.9 if c == labels[i] else 0.0)
            ce -= target * math.log(shares[c] / sum(shares)) / 6
    assert parts["ce"].item() == pytest.approx(ce, abs=1e-10)
    triplet = naive_triplet(features, labels.tolist(), 0.3).item()
    assert total.item() == pytest.approx(0.7 * ce + 0.5 * triplet + 0.01 * parts["center"].item(), abs=1e-10)


def test_center_gradients_lose_their_weight():
    torch.manual_seed(0)
    weighted = CompositeLoss(4, 3, ce=0.0, triplet=0.0, center=0.0005)
    features, labels = torch.randn(6, 3), torch.tensor([0, 1, 3, 3, 2, 0])
    weighted(torch.zeros(6, 4), features, labels)[0].backward()
    weighted.unscale_center_gradients()
    plain = CenterLoss(4, 3)
    plain.load_state_dict(weighted.center.state_dict())
    plain(features, labels).backward()
    assert torch.allclose(weighted.center.centers.grad, plain.centers.grad, atol=1e-7)


def test_weights_that_make_no_loss_are_refused():
    with pytest.raises(ValueError, match="above 0"):
        CompositeLoss(2, 2, ce=0.0, triplet=0.0, center=0.0)


# --- neighbourhood draws ------------------------------------------------------------------------------------------------


def make_bank(size=120, dim=8):
    generator = torch.Generator().manual_seed(0)
    return normalise(torch.randn(size, dim, generator=generator)), torch.arange(size)


def test_draws_depend_on_seed_epoch_and_step_only():
    features, labels = make_bank()
    first = NeighbourhoodDataset(features, labels, features_per_step=20, seed=3, noise=0.3)
    second = NeighbourhoodDataset(features, labels, features_per_step=20, seed=3, noise=0.3)
    torch.manual_seed(123)
    second[0]
    for index in (2, 0, 3):
        a, b = first[index], second[index]
        assert torch.equal(a["features"], b["features"]) and torch.equal(a["pids"], b["pids"])
    second.epoch = 1
    assert not torch.equal(first[1]["pids"], second[1]["pids"])


def test_a_step_is_a_neighbourhood():
    features, labels = make_bank()
    data = NeighbourhoodDataset(features, labels, features_per_step=20, spread=(1.0, 2.0), steps=25)
    assert len(data) == 25
    for index in range(len(data)):
        item = data[index]
        chosen = item["pids"]
        assert len(set(chosen.tolist())) == 20
        assert torch.equal(item["features"], features[chosen])
        ranks = (-(features @ features.t())).argsort(dim=1).argsort(dim=1)[:, chosen]
        assert bool((ranks.amax(dim=1) < 40).any()), "no anchor has all drawn features among its 40 nearest"


def test_small_banks_and_default_steps():
    features, labels = make_bank(95)
    data = NeighbourhoodDataset(features, labels)
    assert len(data) == 3 and sorted(data[0]["pids"].tolist()) == list(range(95))
    assert len(NeighbourhoodDataset(features[:5], labels[:5])) == 1
    with pytest.raises(IndexError):
        data[3]


def test_noise_has_the_expected_norm():
    features, labels = make_bank(400, 64)
    item = NeighbourhoodDataset(features, labels, features_per_step=400, noise=0.5)[0]
    norms = (item["features"] - features[item["pids"]]).norm(dim=1)
    assert norms.mean().item() == pytest.approx(0.5, abs=0.03)
