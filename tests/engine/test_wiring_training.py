"""Both stages written out as plain loops: with every key at another value than its default, the weights are the same."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from wiring import (
    Decayed,
    Toy,
    assert_same_weights,
    centred,
    cross_entropy,
    execute,
    saved,
    seed_all,
    toy_config,
    unit,
    write_pictures,
)

from relreid_plugin.host import build_datamanager
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.magformer.neighbourhoods import NeighbourhoodDataset
from relreid_plugin.metrics.neighbours import SearchConfig


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


def hardest(features, labels, margin):
    """Batch-hard triplet loss by a loop over the anchors."""
    terms = []
    for anchor, label in zip(features, labels):
        distances = (anchor - features).square().sum(dim=1).clamp_min(1e-12).sqrt()
        terms.append((distances[labels == label].max() - distances[labels != label].min() + margin).clamp_min(0))
    return torch.stack(terms).mean()


STAGE_1 = [
    *("train.optim", "adamw", "train.lr", 0.02, "train.weight_decay", 0.4, "adam.beta1", 0.6, "adam.beta2", 0.7),
    *("train.lr_scheduler", "multi_step", "train.stepsize", [2], "train.gamma", 0.3),
    *("train.warmup_epochs", 1, "train.warmup_factor", 0.2, "train.max_epoch", 3, "train.seed", 5),
    *("loss.composite.ce", 0.7, "loss.composite.triplet", 3.0, "loss.triplet.margin", 0.9),
    *("loss.composite.center", 0.2, "loss.composite.center_lr", 0.3),
]


@pytest.mark.parametrize("smooth", [True, False])
def test_stage_1(pictures, tmp_path, smooth):
    cfg = toy_config(pictures, tmp_path / "run", *STAGE_1, "loss.softmax.label_smooth", smooth)
    run, result = execute(cfg)

    seed_all(5)
    manager = build_datamanager(cfg, tmp_path / "cache")
    seed_all(5)
    model = Toy(8)
    centers = torch.randn(8, 8, requires_grad=True)
    parameters = list(model.parameters())
    optimizer = Decayed(parameters, (0.6, 0.7), 0.4)
    sums = []
    for lr in (0.02 * 0.2, 0.02, 0.02 * 0.3):
        batches = []
        for data in manager.train_loader:
            logits, features = model(data["img"])
            parts = [
                cross_entropy(logits, data["pid"], 0.1 if smooth else 0.0),
                hardest(features, data["pid"], 0.9),
                centred(features, data["pid"], centers),
            ]
            total = 0.7 * parts[0] + 3.0 * parts[1] + 0.2 * parts[2]
            *gradients, of_centers = torch.autograd.grad(total, [*parameters, centers])
            optimizer.step(gradients, lr)
            with torch.no_grad():
                centers -= 0.3 * of_centers / 0.2
            hits = 100 * (logits.argmax(dim=1) == data["pid"]).double().mean()
            batches.append([float(value.detach()) for value in (total, *parts, hits)])
        sums.append(np.sum(batches, axis=0) / len(manager.train_loader))

    state = saved(tmp_path / "run", 1)
    assert_same_weights(state["state_dict"], model.state_dict())
    assert torch.allclose(state["extra"]["loss"]["center.centers"], centers, atol=2e-5)
    history = result.history["stage1"]
    assert [record["epoch"] for record in history] == [1, 2, 3]
    # the learning rate is that of the next epoch: the host's loop steps the schedule first
    assert [record["lr"] for record in history] == pytest.approx([0.02, 0.02 * 0.3, 0.02 * 0.3])
    for record, wanted in zip(history, sums):
        found = [record[name] for name in ("loss", "ce", "triplet", "center", "acc")]
        assert found == pytest.approx(wanted, rel=1e-4)


def extract(model, manager, records, seed=None):
    """(N, 8) test features image by image; with a seed under the training transform."""
    if seed is not None:
        seed_all(seed)
    transform = manager.transform_te if seed is None else manager.transform_tr

    class Pictures(Dataset):
        def __len__(self):
            return len(records)

        def __getitem__(self, index):
            return transform(Image.open(records[index][0]).convert("RGB"))

    with torch.no_grad():
        return torch.cat([model.eval()(images) for images in DataLoader(Pictures(), batch_size=7)])


STAGE_2 = [
    *("train.stages", [1, 2], "train.max_epoch", 1, "train.seed", 3, "train.warmup_factor", 0.2),
    *("data.transforms", ["random_flip", "random_erase"], "loss.softmax.label_smooth", True),
    *("relation.attention", "malaa", "relation.num_layers", 2, "relation.num_heads", 4, "relation.mlp_ratio", 0.5),
    *("relation.dropout", 0.3, "relation.k", 4, "relation.num_landmarks", 3, "relation.init", "diffusion"),
    *("relation.bank.noise", 0.2, "relation.train.max_epoch", 4, "relation.train.seed", 9),
    *("relation.train.lr", 0.02, "relation.train.betas", [0.5, 0.8], "relation.train.weight_decay", 0.6),
    *("relation.train.lr_scheduler", "multi_step", "relation.train.stepsize", [2, 3], "relation.train.gamma", 0.5),
    *("relation.train.warmup_epochs", 1, "relation.train.features_per_step", 10, "relation.train.steps_per_epoch", 3),
    *("relation.train.spread", [1.5, 3.0], "relation.loss.ce", 0.6, "relation.loss.triplet", 2.0),
    *("relation.loss.margin", 0.8, "relation.loss.center", 0.1, "relation.loss.center_lr", 0.2),
]


@pytest.mark.parametrize("refresh", [0, 1, 2])
def test_stage_2(pictures, tmp_path, refresh):
    cfg = toy_config(pictures, tmp_path / "run", *STAGE_2, "relation.bank.refresh", refresh)
    execute(cfg)

    seed_all(3)
    manager = build_datamanager(cfg, tmp_path / "cache")
    model = Toy(8)
    model.load_state_dict(saved(tmp_path / "run", 1)["state_dict"])
    records = manager.train_loader.dataset.train
    labels = torch.tensor([record[1] for record in records])

    def bank(epoch):
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        first = epoch - epoch % refresh if refresh else 0
        features = extract(model, manager, records, seed=None if refresh == 0 else 3 * 1_000_003 + first)
        random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])  # noqa: NPY002
        return unit(features).float()

    assert not torch.allclose(bank(0), unit(extract(model, manager, records)).float(), atol=1e-3) or refresh == 0
    seed_all(1_000_003 * 3 + 9)
    encoder = RelationEncoder(
        8,
        8,
        attention="malaa",
        num_layers=2,
        num_heads=4,
        num_landmarks=3,
        k=4,
        mlp_ratio=0.5,
        dropout=0.3,
        init="diffusion",
        search=SearchConfig(backend="torch"),
    )
    centers = torch.randn(8, 8, requires_grad=True)
    parameters = [value for value in encoder.parameters() if value.requires_grad]
    optimizer = Decayed(parameters, (0.5, 0.8), 0.6)
    encoder.train()
    for epoch, factor in enumerate((0.2, 1.0, 0.5, 0.25)):
        draws = NeighbourhoodDataset(
            bank(epoch), labels, features_per_step=10, steps=3, spread=(1.5, 3.0), noise=0.2, seed=9
        )
        draws.epoch = epoch
        for item in DataLoader(draws, batch_size=None):
            logits, refined = encoder(item["features"])
            pids = item["pids"]
            total = 0.6 * cross_entropy(logits, pids, 0.1) + 2.0 * hardest(refined, pids, 0.8)
            total = total + 0.1 * centred(refined, pids, centers)
            *gradients, of_centers = torch.autograd.grad(total, [*parameters, centers], allow_unused=True)
            gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]
            optimizer.step(gradients, 0.02 * factor)
            with torch.no_grad():
                centers -= 0.2 * of_centers / 0.1
    state = saved(tmp_path / "run", 2)
    assert_same_weights(state["state_dict"], encoder.state_dict(), tolerance=1e-3)
    assert torch.allclose(state["extra"]["loss"]["center.centers"], centers, atol=1e-3)
    assert math.isclose(state["history"][-1]["lr"], 0.02 * 0.25)
