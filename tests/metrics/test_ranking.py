"""Distances and retrieval scores against naive loops and the host's own ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relreid_plugin.errors import UserError
from relreid_plugin.metrics import ranking
from relreid_plugin.metrics.distance import distance_to, pairwise_distance
from relreid_plugin.metrics.ranking import evaluate_cuhk03, evaluate_features, evaluate_ranking


def naive(distances, q_pids, g_pids, q_cams=None, g_cams=None, max_rank=50):
    """One query at a time with a stable argsort, in float64."""
    aps, inps, firsts = [], [], []
    for q, row in enumerate(np.asarray(distances)):
        order = np.argsort(row, kind="stable")
        if q_cams is not None:
            order = order[~((g_pids[order] == q_pids[q]) & (g_cams[order] == q_cams[q]))]
        ranks = np.flatnonzero(g_pids[order] == q_pids[q]) + 1
        if not len(ranks):
            aps.append(np.nan), inps.append(np.nan)
            continue
        aps.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
        inps.append(len(ranks) / ranks[-1])
        firsts.append(ranks[0])
    cmc = np.array([np.mean(np.array(firsts) <= r) for r in range(1, max_rank + 1)])
    return np.array(aps), np.array(inps), cmc


def scene(seed=0, queries=60, gallery=300, ids=25, cams=3):
    rng = np.random.default_rng(seed)
    distances = rng.permutation(queries * gallery).reshape(queries, gallery) / (queries * gallery)  # no ties
    return (
        distances,
        rng.integers(0, ids + 3, queries),  # some identities are missing in the gallery
        rng.integers(0, ids, gallery),
        rng.integers(0, cams, queries),
        rng.integers(0, cams, gallery),
    )


def assert_equal_to_naive(result, expected):
    ap, inp, cmc = expected
    np.testing.assert_allclose(result.ap, ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.inp, inp, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-12)
    assert result.mAP == pytest.approx(np.nanmean(ap), abs=1e-12)
    assert result.mINP == pytest.approx(np.nanmean(inp), abs=1e-12)
    assert result.num_valid_queries == np.sum(~np.isnan(ap))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_pairwise_distance(metric, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator).to(dtype)
    y = torch.cat([torch.randn(8, 5, generator=generator).to(dtype), x[:1]])
    got = pairwise_distance(x, y, metric=metric)
    a, b = x.double().numpy()[:, None], y.double().numpy()[None]
    if metric == "cosine":
        want = 1 - (a * b).sum(2) / np.linalg.norm(a, axis=2) / np.linalg.norm(b, axis=2)
    else:
        want = ((a - b) ** 2).sum(2) ** (0.5 if metric == "euclidean" else 1)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.min() >= 0
    np.testing.assert_allclose(got.numpy(), want, atol=1e-7 if dtype == torch.float64 else 2e-3)


def test_pairwise_distance_mixed_types_gradients_and_zero_vectors():
    x, y = torch.zeros(1, 3), torch.eye(3, dtype=torch.float64)
    assert pairwise_distance(x, y).dtype == pairwise_distance(y, x).dtype == torch.float64
    assert torch.equal(pairwise_distance(x, y, metric="cosine"), torch.ones(1, 3, dtype=torch.float64))
    leaf = torch.ones(2, 3, requires_grad=True)
    pairwise_distance(leaf, y[:1], metric="sqeuclidean").sum().backward()
    assert torch.allclose(leaf.grad, 2 * (torch.ones(2, 3) - y[:1].float()))


@pytest.mark.parametrize(
    "x, y, metric, words",
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "euclidean", "3 dimensions"),
        (torch.zeros(3), torch.zeros(2, 3), "euclidean", "x has shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 1), "euclidean", "y has shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "euclidian", "did you mean 'euclidean'"),
        (np.zeros((2, 3)), torch.zeros(2, 3), "euclidean", "torch.Tensor"),
        (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3), "euclidean", "real features"),
    ],
)
def test_pairwise_distance_mistakes(x, y, metric, words):
    with pytest.raises(UserError, match=words):
        pairwise_distance(x, y, metric=metric)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cams", [True, False])
def test_ranking_equals_naive(seed, cams):
    distances, q, g, qc, gc = scene(seed)
    args = (distances, q, g, qc, gc) if cams else (distances, q, g)
    result = evaluate_ranking(*args)
    assert_equal_to_naive(result, naive(*args))
    assert result.num_queries == 60 and result.num_valid_queries < 60


def test_ranking_equals_host():
    rank = pytest.importorskip("torchreid.reid.metrics.rank")
    distances, q, g, qc, gc = scene(7, queries=120)
    cmc, mean_ap = rank.eval_market1501(distances, q, g, qc, gc, 50)
    result = evaluate_ranking(distances, q, g, qc, gc)
    assert result.mAP == pytest.approx(mean_ap, abs=1e-12)
    np.testing.assert_allclose(result.cmc, cmc, atol=1e-6)  # the host's curve is float32


@pytest.mark.parametrize("levels", [1, 2, 5, 50])
@pytest.mark.parametrize("limit", [0, 64])
def test_ties_go_to_the_lower_gallery_index(levels, limit, monkeypatch):
    monkeypatch.setattr(ranking, "_COUNT_LIMIT", limit)  # 0: by sorting, 64: by counting
    _, q, g, qc, gc = scene(1)
    distances = np.random.default_rng(levels).integers(0, levels, (60, 300)).astype(np.float32)
    assert_equal_to_naive(evaluate_ranking(distances, q, g, qc, gc), naive(distances, q, g, qc, gc))


def test_tie_order_by_hand():
    # two positives and two strangers at one distance: order is the order of the gallery
    result = evaluate_ranking(np.zeros((1, 4)), np.array([1]), np.array([0, 1, 0, 1]))
    assert result.ap[0] == pytest.approx((1 / 2 + 2 / 4) / 2) and result.inp[0] == 0.5
    np.testing.assert_array_equal(result.cmc[:4], [0, 1, 1, 1])


def test_many_positives_take_the_sorting_path():
    rng = np.random.default_rng(3)
    distances = np.round(rng.random((20, 600)), 3).astype(np.float32)  # some ties
    args = (distances, rng.integers(0, 3, 20), rng.integers(0, 3, 600), rng.integers(0, 2, 20), rng.integers(0, 2, 600))
    assert min(np.bincount(args[2])) > 2 * ranking._COUNT_LIMIT
    assert_equal_to_naive(evaluate_ranking(*args), naive(*args))


def test_infinite_and_signed_zero_distances():
    distances = np.array([[np.inf, np.inf, 1.0, np.inf, -np.inf], [0.0, -0.0, 0.0, -0.0, 0.0]])
    q, g = np.array([1, 1]), np.array([0, 1, 0, 1, 0])
    assert_equal_to_naive(evaluate_ranking(distances, q, g), naive(distances, q, g))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_nothing(chunk, threads):
    args = scene(2)
    before, want = torch.get_num_threads(), evaluate_ranking(*args)
    try:
        torch.set_num_threads(threads)
        got = evaluate_ranking(*args, chunk=chunk)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(got.ap, want.ap)
    np.testing.assert_array_equal(got.inp, want.inp)
    np.testing.assert_array_equal(got.cmc, want.cmc)


@pytest.mark.parametrize(
    "convert",
    [
        lambda d: d.astype(np.float16),
        lambda d: (d * 100).astype(np.uint8),
        lambda d: (d * 1e6).astype(np.int64),
        lambda d: d > 0.5,
        lambda d: np.asfortranarray(d),
        lambda d: torch.from_numpy(d).float(),
        lambda d: torch.from_numpy(d).bfloat16(),
        lambda d: torch.from_numpy(d).requires_grad_(),
    ],
)
def test_types_of_distances(convert):
    distances, *labels = scene(4)
    converted = convert(distances)
    plain = converted.detach().double().numpy() if isinstance(converted, torch.Tensor) else converted
    assert_equal_to_naive(evaluate_ranking(converted, *labels), naive(plain, *labels))


def test_labels_may_be_tensors_or_lists():
    distances, q, g, qc, gc = scene(5)
    want = evaluate_ranking(distances, q, g, qc, gc).mAP
    assert evaluate_ranking(distances, torch.from_numpy(q), list(g), list(qc), torch.from_numpy(gc)).mAP == want


def test_accelerator_path():
    args = scene(6)
    distances = np.round(args[0], 1)
    images, real, _ = (labels := ranking._Labels.build(*args[1:], distances.shape)).listed(np.arange(60))
    got = ranking._positions_on_device(torch.from_numpy(distances), images, real)
    order = np.argsort(distances, axis=1, kind="stable")
    want = np.take_along_axis(np.argsort(order, axis=1), images, 1)
    np.testing.assert_array_equal(got[real], want[real])
    assert labels.num_gallery == 300


def test_rank_beyond_the_curve_and_the_gallery():
    q, g = np.array([0, 1]), np.array([1, 0, 0])
    short = evaluate_ranking(np.array([[0.0, 1, 2], [3.0, 1, 2]]), q, g, max_rank=1)
    assert short.rank(1) == 0 and short.rank(3) == short.rank(1000) == 1
    with pytest.raises(UserError, match="max_rank=2"):
        short.rank(2)
    with pytest.raises(UserError, match="first rank is 1"):
        short.rank(0)
    long = evaluate_ranking(np.array([[0.0, 1, 2], [3.0, 1, 2]]), q, g, max_rank=10)
    np.testing.assert_array_equal(long.cmc, [0, 0.5] + [1] * 8)
    assert long.rank(20) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(distances=np.zeros(3)), "matrix"),
        (dict(distances=np.zeros((0, 3))), "not empty"),
        (dict(distances=[[1.0]]), "numpy array"),
        (dict(distances=np.zeros((2, 3), complex)), "real numbers"),
        (dict(distances=np.array([[0, 1, np.nan], [0, 1, 2]])), "NaN"),
        (dict(query_pids=np.zeros(3)), r"query_pids has shape \(3,\)"),
        (dict(gallery_pids=np.zeros(2)), "gallery_pids"),
        (dict(query_camids=np.zeros(2)), "both or neither"),
        (dict(query_pids=np.array([7, 8])), "no query has a match"),
        (dict(query_camids=np.zeros(2), gallery_camids=np.zeros(3)), "no query has a match"),
        (dict(max_rank=0), "max_rank is 0"),
        (dict(chunk=0), "chunk is 0"),
    ],
)
def test_ranking_mistakes(change, words):
    arguments = dict(distances=np.arange(6.0).reshape(2, 3), query_pids=np.array([0, 1]), gallery_pids=np.array([0, 1, 1]))
    with pytest.raises(UserError, match=words):
        evaluate_ranking(**{**arguments, **change})


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("chunk", [None, 1, 11])
def test_features_equal_distances(metric, chunk):
    _, q, g, qc, gc = scene(8)
    generator = torch.Generator().manual_seed(8)
    x, y = torch.randn(60, 16, generator=generator).double(), torch.randn(300, 16, generator=generator).double()
    result = evaluate_features(x, y, q, g, qc, gc, metric=metric, chunk=chunk)
    assert_equal_to_naive(result, naive(pairwise_distance(x, y, metric=metric), q, g, qc, gc))


def test_features_mistakes():
    with pytest.raises(UserError, match="dimensions"):
        evaluate_features(torch.zeros(1, 3), torch.zeros(2, 4), [0], [0, 1])
    with pytest.raises(UserError, match="NaN"):
        evaluate_features(torch.full((1, 3), torch.nan), torch.zeros(2, 3), [0], [0, 1])


def test_features_hold_no_matrix(monkeypatch):
    biggest = 0

    def spying(*args, **kwargs):
        inner = distance_to(*args, **kwargs)

        def spy(x, out=None):
            nonlocal biggest
            result = inner(x, out)
            biggest = max(biggest, result.shape[0])
            return result

        return spy

    monkeypatch.setattr(ranking, "distance_to", spying)
    rng = np.random.default_rng(0)
    evaluate_features(torch.randn(50, 4), torch.randn(40, 4), rng.integers(0, 5, 50), rng.integers(0, 5, 40), chunk=8)
    assert biggest == 8


def test_cuhk03_with_one_image_per_identity_is_the_plain_curve():
    rng = np.random.default_rng(0)
    distances, q, g = rng.random((30, 20)), rng.integers(0, 20, 30), rng.permutation(20)
    cams = np.zeros(30), np.ones(20)
    single, plain = evaluate_cuhk03(distances, q, g, *cams), evaluate_ranking(distances, q, g, *cams)
    np.testing.assert_allclose(single.cmc, plain.cmc, atol=1e-12)
    np.testing.assert_array_equal(single.ap, plain.ap)


def test_cuhk03_equals_the_expected_curve_and_the_host():
    """Rank-1 has a closed form: the chosen positive beats the chosen image of every other identity."""
    rng = np.random.default_rng(1)
    distances = np.round(rng.random((12, 24)), 1)  # ties included
    q, g = rng.integers(0, 5, 12), np.repeat(np.arange(6), 4)
    qc, gc = rng.integers(0, 2, 12), np.tile([0, 1], 12)
    expected = []
    for i in range(12):
        keep = np.flatnonzero(~((g == q[i]) & (gc == qc[i])))
        wins = []
        for p in keep[g[keep] == q[i]]:
            behind = (distances[i] > distances[i, p]) | ((distances[i] == distances[i, p]) & (np.arange(24) > p))
            wins.append(np.prod([behind[g == other].mean() for other in range(6) if other != q[i]]))
        expected.append(np.mean(wins))
    result = evaluate_cuhk03(distances, q, g, qc, gc, num_repeats=4000, max_rank=6)
    assert result.cmc[0] == pytest.approx(np.mean(expected), abs=0.01)
    assert result.cmc[5] == pytest.approx(1) and (np.diff(result.cmc) >= 0).all()
    rank = pytest.importorskip("torchreid.reid.metrics.rank")
    if hasattr(np, "bool"):  # the host's function needs it; numpy 1.24-1.26 lack it
        tie_free = scene(9, queries=40, gallery=60, ids=10, cams=2)
        np.random.seed(0)  # noqa: NPY002  (the host draws from the global generator)
        curves, means = zip(*(rank.eval_cuhk03(*tie_free, 10) for _ in range(20)))
        ours = evaluate_cuhk03(*tie_free, num_repeats=200, max_rank=10)
        np.testing.assert_allclose(ours.cmc, np.mean(curves, 0), atol=0.02)
        assert ours.mAP == pytest.approx(means[0], abs=1e-12)


def test_cuhk03_depends_on_the_seed_and_not_on_the_chunk():
    args = scene(10)
    one = evaluate_cuhk03(*args, seed=3)
    np.testing.assert_array_equal(one.cmc, evaluate_cuhk03(*args, seed=3, chunk=7).cmc)
    assert not np.array_equal(one.cmc, evaluate_cuhk03(*args, seed=4).cmc)
    with pytest.raises(UserError, match="num_repeats"):
        evaluate_cuhk03(*args, num_repeats=0)
