"""Distances by either of the two matrix products, against a loop in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relreid_plugin.metrics import distance


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("metric", distance.METRICS)
def test_both_products_give_the_distances(monkeypatch, intel, metric):
    """Whichever library multiplies, with a tensor for the result or without; which one it is shows in who was called."""
    asked, plain = [], np.matmul
    monkeypatch.setattr(distance, "_intel", lambda: intel)
    monkeypatch.setattr(distance.np, "matmul", lambda *args, **options: asked.append(1) or plain(*args, **options))
    torch.manual_seed(0)
    x, y = torch.randn(5, 7), torch.randn(9, 7)
    wanted = np.empty((5, 9))
    for i, a in enumerate(x.double().numpy()):
        for j, b in enumerate(y.double().numpy()):
            squared = float(((a - b) ** 2).sum())
            cosine = 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            wanted[i, j] = {"euclidean": squared**0.5, "sqeuclidean": squared, "cosine": cosine}[metric]
    room = torch.empty(5, 9)
    with torch.inference_mode():
        assert distance.distance_to(y, metric=metric)(x, room) is not None
    assert np.allclose(room.numpy(), wanted, atol=1e-5)
    assert np.allclose(distance.pairwise_distance(x, y, metric=metric).numpy(), wanted, atol=1e-5)
    assert bool(asked) is not intel


def test_float32_that_torch_may_round_is_left_to_numpy(monkeypatch):
    asked, plain = [], np.matmul
    monkeypatch.setattr(distance, "_intel", lambda: True)
    monkeypatch.setattr(distance.np, "matmul", lambda *args, **options: asked.append(1) or plain(*args, **options))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        distance.pairwise_distance(torch.ones(2, 3), torch.ones(2, 3))
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked
