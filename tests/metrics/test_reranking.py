"""k-reciprocal re-ranking against the host's code, whose sort is made stable so that ties can be compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relreid_plugin.errors import UserError
from relreid_plugin.metrics import reranking
from relreid_plugin.metrics.distance import pairwise_distance
from relreid_plugin.metrics.reranking import k_reciprocal_rerank, k_reciprocal_rerank_features


class StableNumpy:
    """numpy whose argsort keeps ties in order."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def argsort(values):
        return np.argsort(values, kind="stable")


@pytest.fixture
def host(monkeypatch):
    module = pytest.importorskip("torchreid.reid.utils.rerank")
    monkeypatch.setattr(module, "np", StableNumpy())
    return module.re_ranking


def features(queries, gallery, *, seed=0, noise=0.1, per_identity=6, dimensions=32):
    generator = torch.Generator().manual_seed(seed)
    count = queries + gallery
    centres = torch.randn(count // per_identity + 1, dimensions, generator=generator, dtype=torch.float64)
    pids = torch.randperm(count, generator=generator) // per_identity
    x = centres[pids] + noise * torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    x = torch.nn.functional.normalize(x, dim=1)
    return x[:queries], x[queries:]


def distances(query, gallery):
    pairs = ((query, gallery), (query, query), (gallery, gallery))
    return tuple(pairwise_distance(x, y).numpy() for x, y in pairs)


@pytest.mark.parametrize("noise", [0.1, 0.8, 5.0])
@pytest.mark.parametrize("k1, k2, lambda_value", [(20, 6, 0.3), (7, 1, 0.0), (5, 9, 0.7), (1, 2, 1.0)])
def test_equals_host(host, noise, k1, k2, lambda_value):
    matrices = distances(*features(40, 160, noise=noise))
    want = host(*matrices, k1=k1, k2=k2, lambda_value=lambda_value)
    got = k_reciprocal_rerank(*matrices, k1=k1, k2=k2, lambda_value=lambda_value)
    assert got.dtype == np.float32 and got.shape == (40, 160)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_equals_host_where_the_grouped_search_is_used(host):
    matrices = distances(*features(150, 750, noise=0.8))
    assert 900 // reranking._GROUP >= 2 * 22
    np.testing.assert_allclose(k_reciprocal_rerank(*matrices), host(*matrices), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(15, 60), (100, 800)])
def test_ties_go_to_the_lower_index(host, size):
    rng = np.random.default_rng(0)
    count = sum(size)
    full = rng.integers(1, 12, (count, count)).astype(np.float64)  # nearly everything is tied
    full = np.minimum(full, full.T)
    np.fill_diagonal(full, 0)
    cut = size[0]
    matrices = full[:cut, cut:], full[:cut, :cut], full[cut:, cut:]
    np.testing.assert_allclose(k_reciprocal_rerank(*matrices), host(*matrices), rtol=0, atol=1e-6)


def test_distances_need_not_be_symmetric(host):
    rng = np.random.default_rng(1)
    matrices = rng.random((20, 70)), rng.random((20, 20)), rng.random((70, 70))
    np.testing.assert_allclose(k_reciprocal_rerank(*matrices), host(*matrices), rtol=0, atol=1e-6)


@pytest.mark.parametrize("queries, gallery", [(1, 1), (1, 2), (1, 30), (3, 2), (12, 5)])
def test_small_sets(host, queries, gallery):
    x, y = features(queries, gallery, noise=2.0)
    matrices = distances(x, y)
    for k1, k2 in ((20, 6), (1, 1), (100, 50)):
        got = k_reciprocal_rerank(*matrices, k1=k1, k2=k2)
        np.testing.assert_allclose(got, host(*matrices, k1=k1, k2=k2), rtol=0, atol=1e-6)
        np.testing.assert_allclose(k_reciprocal_rerank_features(x, y, k1=k1, k2=k2), got, rtol=0, atol=1e-6)


def test_duplicates(host):
    x, y = features(10, 40)
    x = torch.cat([x, x[:5]])
    y = torch.cat([y, y[:30], y[:1].repeat(40, 1)])  # more equal images than k1
    matrices = tuple(np.round(part, 6) for part in distances(x, y))
    got = k_reciprocal_rerank(*matrices)
    np.testing.assert_allclose(got, host(*matrices), rtol=0, atol=1e-6)
    assert np.isfinite(k_reciprocal_rerank_features(x, y)).all()


def test_identical_features_have_no_order_and_no_nan():
    same = torch.ones(4, 3)
    for result in (
        k_reciprocal_rerank(np.zeros((4, 6)), np.zeros((4, 4)), np.zeros((6, 6))),
        k_reciprocal_rerank_features(same, torch.ones(6, 3)),
    ):
        assert np.isfinite(result).all() and result.shape == (4, 6)
    np.testing.assert_allclose(k_reciprocal_rerank(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1))), 0, atol=1e-7)


@pytest.mark.parametrize("chunk", [None, 1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_equal_distances(chunk, dtype):
    x, y = (part.to(dtype) for part in features(60, 240, noise=0.6))
    want = k_reciprocal_rerank(*distances(x, y))
    got = k_reciprocal_rerank_features(x, y, chunk=chunk)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_small_blocks_change_nothing(monkeypatch):
    matrices = distances(*features(30, 120, noise=0.6))
    want = k_reciprocal_rerank(*matrices)
    for name in ("_ROW_VALUES", "_MERGE_VALUES", "_PAIR_VALUES", "_TILE"):
        monkeypatch.setattr(reranking, name, 7)
    np.testing.assert_array_equal(k_reciprocal_rerank(*matrices), want)


def test_inputs_may_be_tensors_and_stay_untouched():
    matrices = [torch.from_numpy(part).float() for part in distances(*features(10, 50))]
    copies = [part.clone() for part in matrices]
    want = k_reciprocal_rerank(*(part.numpy() for part in matrices))
    np.testing.assert_array_equal(k_reciprocal_rerank(*matrices), want)
    assert all(torch.equal(a, b) for a, b in zip(matrices, copies))


def test_reranking_helps_on_clusters():
    """A positive beyond the query's own reach is pulled in through the neighbours that both share."""
    from relreid_plugin.metrics.ranking import evaluate_ranking

    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=1)
    pids = torch.arange(40).repeat(12)
    x = torch.nn.functional.normalize(centres[pids] + 0.16 * torch.randn(480, 16, generator=generator), dim=1)
    plain = evaluate_ranking(pairwise_distance(x[:80], x[80:]), pids[:80], pids[80:]).mAP
    better = evaluate_ranking(k_reciprocal_rerank_features(x[:80], x[80:]), pids[:80], pids[80:]).mAP
    assert better > plain + 0.02


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(k1=0), "k1 is 0"),
        (dict(k2=0), "k2 is 0"),
        (dict(lambda_value=1.5), "lambda_value is 1.5"),
        (dict(query_query=np.zeros((2, 3))), r"query_query has shape \(2, 3\)"),
        (dict(gallery_gallery=np.zeros((2, 2))), "gallery_gallery has shape"),
        (dict(query_gallery=np.zeros(3)), "query_gallery must be a matrix"),
        (dict(query_gallery=np.full((2, 3), np.nan)), "NaN"),
    ],
)
def test_mistakes(change, words):
    arguments = dict(query_gallery=np.ones((2, 3)), query_query=np.zeros((2, 2)), gallery_gallery=np.zeros((3, 3)))
    with pytest.raises(UserError, match=words):
        k_reciprocal_rerank(**{**arguments, **change})


def test_mistakes_in_features():
    with pytest.raises(UserError, match="dimensions"):
        k_reciprocal_rerank_features(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="queries and gallery"):
        k_reciprocal_rerank_features(torch.zeros(0, 3), torch.zeros(2, 3))
    with pytest.raises(UserError, match="NaN"):
        k_reciprocal_rerank_features(torch.full((1, 3), torch.nan), torch.zeros(2, 3))
    with pytest.raises(UserError, match="chunk is 0"):
        k_reciprocal_rerank_features(torch.zeros(2, 3), torch.zeros(2, 3), chunk=0)
