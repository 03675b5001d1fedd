"""The rivals' formulas against plain loops in float64, and what the table of rivals promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg

from relreid_plugin.errors import UserError
from relreid_plugin.metrics import camera_jaccard, diffusion, graph, lists
from relreid_plugin.metrics.camera_jaccard import camera_jaccard_rerank
from relreid_plugin.metrics.centralisation import neighbour_centralisation
from relreid_plugin.metrics.diffusion import diffusion_scores
from relreid_plugin.metrics.expansion import average_query_expansion, database_augmentation
from relreid_plugin.metrics.graph import gnn_rerank, graph_convolution
from relreid_plugin.metrics.reranking import k_reciprocal_rerank_features
from relreid_plugin.metrics.rivals import RIVALS, rival_named

QUERIES, GALLERY = 9, 50


def sets(queries=QUERIES, gallery=GALLERY, d=12, noise=0.5, seed=0, dtype=torch.float64):
    """Clustered features of any length, and three cameras of different sizes."""
    rng = np.random.default_rng(seed)
    count = queries + gallery
    pids = rng.permutation(count) // 6
    x = rng.standard_normal((count // 6 + 1, d))[pids] + noise * rng.standard_normal((count, d))
    x = torch.from_numpy(x * rng.uniform(0.5, 3, (count, 1))).to(dtype)
    cameras = rng.choice(3, count, p=[0.6, 0.3, 0.1])
    return x[:queries], x[queries:], cameras[:queries], cameras[queries:]


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest(scores, k, allowed=None):
    """The k largest, ties by index, among those that are allowed."""
    order = [j for j in np.argsort(-scores, kind="stable") if allowed is None or allowed[j]]
    return order[:k]


# --- GNN re-ranking ----------------------------------------------------------------------------------------------------
def gnn_layer(rows, sums):
    symmetric, out = rows + rows.T, np.zeros_like(rows)
    for i, weights in enumerate(sums):
        for j, weight in weights:
            out[i] += weight * symmetric[j]
    return out


def naive_gnn(query, gallery, k1, k2, alpha, layers):
    x = unit(np.concatenate([query, gallery]))
    s, count = x @ x.T, len(x)
    rows = np.zeros((count, count))
    for i in range(count):
        rows[i, nearest(s[i], k1)] = 1
    sums = [[(j, max(s[i, j], 0) ** alpha) for j in nearest(s[i], k2)] for i in range(count)]
    for _ in range(layers):
        rows = unit(gnn_layer(rows, sums))
    return rows[: len(query)] @ rows[len(query) :].T


def naive_gnn_attached(query, gallery, k1, k2, alpha, layers):
    """One query at a time as a further node of the gallery's graph, whose lists and lengths stay as they are."""
    query, gallery = unit(query), unit(gallery)
    s, count, result = gallery @ gallery.T, len(gallery), []
    for q in query:
        own = gallery @ q
        rows, alone = np.zeros((count + 1, count + 1)), np.zeros((count, count))
        for i in range(count):
            near = nearest(s[i], k1)
            rows[i, near] = alone[i, near] = 1
            rows[i, count] = len(near) < k1 or own[i] > s[i, near[-1]]
        rows[count, nearest(own, k1 - 1)] = rows[count, count] = 1
        sums = [[(j, max(s[i, j], 0) ** alpha) for j in nearest(s[i], k2)] for i in range(count)]
        with_query = [*sums, [(count, 1.0)] + [(j, max(own[j], 0) ** alpha) for j in nearest(own, k2 - 1)]]
        for _ in range(layers):
            rows, alone = gnn_layer(rows, with_query), gnn_layer(alone, sums)
            length = np.linalg.norm(alone, axis=1, keepdims=True)
            rows[:count] /= length
            alone = alone / length
            rows[count] = unit(rows[count])
        result.append(rows[:count] @ rows[count])
    return np.array(result)


@pytest.mark.parametrize(
    "k1, k2, alpha, layers",
    [(26, 7, 2.0, 2), (5, 3, 2.0, 2), (8, 1, 0.5, 1), (4, 9, 3.0, 3), (1, 1, 2.0, 1), (99, 99, 1.0, 2)],
)
@pytest.mark.parametrize("protocol, naive", [("transductive", naive_gnn), ("inductive", naive_gnn_attached)])
def test_gnn_equals_naive(protocol, naive, k1, k2, alpha, layers):
    query, gallery, *_ = sets()
    got = gnn_rerank(query, gallery, k1=k1, k2=k2, alpha=alpha, layers=layers, protocol=protocol)
    assert got.shape == (QUERIES, GALLERY) and got.dtype == torch.float32
    np.testing.assert_allclose(1 - got.numpy(), naive(query, gallery, k1, k2, alpha, layers), atol=2e-6)


@pytest.mark.parametrize("protocol", ["transductive", "inductive"])
def test_gnn_mixes_in_the_cosine(protocol):
    query, gallery, *_ = sets()
    scores = 1 - gnn_rerank(query, gallery, protocol=protocol).numpy()
    mixed = 1 - gnn_rerank(query, gallery, lambda_value=0.3, protocol=protocol).numpy()
    np.testing.assert_allclose(mixed, 0.7 * scores + 0.3 * unit(query) @ unit(gallery).T, atol=2e-6)


# --- graph convolution re-ranking ------------------------------------------------------------------------------------------
def affinity(x, k, beta, cameras):
    """S: the image itself and its k - 1 nearest others, of other cameras if cameras are given."""
    s, out = x @ x.T, np.zeros((len(x), len(x)))
    for i in range(len(x)):
        allowed = np.arange(len(x)) != i if cameras is None else cameras != cameras[i]
        near = nearest(s[i], k - 1, allowed)
        out[i, near], out[i, i] = np.exp(s[i, near] / beta), np.exp(s[i, i] / beta)
    return out


def propagated(s, x):
    return (s / np.sqrt(np.outer(s.sum(1), s.sum(0)))) @ x


def naive_gcr(query, gallery, cameras, k1, k2, beta1, beta2, scale, rounds):
    x = unit(np.concatenate([query, gallery]))
    together = None if cameras is None else np.concatenate(cameras)
    for _ in range(rounds):
        new = propagated(affinity(x, k1, beta1, None), x)
        if together is not None:
            new = (1 - scale) * new + scale * propagated(affinity(x, k2, beta2, together), x)
        x = unit(new)
    return x[: len(query)], x[len(query) :]


def naive_gcr_attached(query, gallery, cameras, k1, k2, beta1, beta2, scale, rounds):
    x, g = unit(query), unit(gallery)

    def alone(q, camera, k, beta, of):
        s, own = g @ g.T, g @ q
        allowed = np.ones(len(g), bool) if of is None else of != camera
        weights = affinity(g, k, beta, of)
        listed = np.exp(1 / beta)  # sum of the query's column
        for j in range(len(g)):
            if k > 1 and allowed[j]:
                among = np.arange(len(g)) != j if of is None else of != of[j]
                near = nearest(s[j], k - 1, among)
                if len(near) < k - 1 or own[j] > s[j, near[-1]]:
                    listed += np.exp(own[j] / beta)
        near = nearest(own, k - 1, allowed)
        total = np.exp(1 / beta) + np.exp(own[near] / beta).sum()
        out = np.exp(1 / beta) / np.sqrt(total * listed) * q
        for j in near:
            out = out + np.exp(own[j] / beta) / np.sqrt(total * weights[:, j].sum()) * g[j]
        return out

    for _ in range(rounds):
        new_x, new_g = [], propagated(affinity(g, k1, beta1, None), g)
        for i, q in enumerate(x):
            new = alone(q, None, k1, beta1, None)
            if cameras is not None:
                new = (1 - scale) * new + scale * alone(q, cameras[0][i], k2, beta2, cameras[1])
            new_x.append(new)
        if cameras is not None:
            new_g = (1 - scale) * new_g + scale * propagated(affinity(g, k2, beta2, cameras[1]), g)
        x, g = unit(new_x), unit(new_g)
    return x, g


@pytest.mark.parametrize(
    "settings", [(15, 3, 0.2, 0.2, 0.3, 3), (6, 4, 0.5, 0.1, 0.7, 1), (3, 90, 0.3, 0.2, 1.0, 2), (1, 1, 0.2, 0.2, 0.5, 1)]
)
@pytest.mark.parametrize("protocol, naive", [("transductive", naive_gcr), ("inductive", naive_gcr_attached)])
@pytest.mark.parametrize("with_cameras", [True, False])
def test_gcr_equals_naive(protocol, naive, settings, with_cameras):
    query, gallery, query_cameras, gallery_cameras = sets()
    named = dict(zip(("k1", "k2", "beta1", "beta2", "scale", "rounds"), settings))
    cameras = (query_cameras, gallery_cameras) if with_cameras else None
    given = {"query_cameras": query_cameras, "gallery_cameras": gallery_cameras} if with_cameras else {}
    got = graph_convolution(query, gallery, **named, **given, protocol=protocol)
    for mine, wanted in zip(got, naive(query.numpy(), gallery.numpy(), cameras, *settings)):
        assert mine.dtype == torch.float64
        np.testing.assert_allclose(mine.numpy(), wanted, atol=3e-6)


# --- camera-aware Jaccard --------------------------------------------------------------------------------------------------
def naive_camera_jaccard(query, gallery, cameras, k1_intra, k1_inter, k2_intra, k2_inter, lambda_value):
    x, cameras = np.concatenate([query, gallery]), np.concatenate(cameras)
    count = len(x)
    d = np.square(x[:, None] - x[None]).sum(2)
    d = d / d.max(1, keepdims=True)
    same = cameras[:, None] == cameras[None]
    intra = [nearest(-d[i], count, same[i]) for i in range(count)]
    inter = [nearest(-d[i], count, ~same[i]) for i in range(count)]
    encoding = np.zeros((count, count))
    for i in range(count):
        members = {j for j in intra[i][: k1_intra + 1] if i in intra[j][: k1_intra + 1]}
        members |= {j for j in inter[i][: k1_inter + 1] if i in inter[j][: k1_inter + 1]}
        chosen = sorted(members)
        encoding[i, chosen] = np.exp(-d[i, chosen]) / np.exp(-d[i, chosen]).sum()
    encoding = np.array([encoding[[*intra[i][:k2_intra], *inter[i][:k2_inter]]].mean(0) for i in range(count)])
    smaller = np.minimum(encoding[: len(query), None], encoding[None, len(query) :]).sum(2)
    larger = np.maximum(encoding[: len(query), None], encoding[None, len(query) :]).sum(2)
    return (1 - lambda_value) * (1 - smaller / larger) + lambda_value * d[: len(query), len(query) :]


@pytest.mark.parametrize("settings", [(5, 20, 3, 3, 0.3), (2, 4, 2, 4, 0.0), (0, 0, 1, 0, 0.5), (90, 90, 40, 40, 0.1)])
@pytest.mark.parametrize("cameras", ["three", "one", "each"])
def test_camera_jaccard_equals_naive(settings, cameras):
    query, gallery, *given = sets(noise=0.8)
    if cameras != "three":
        numbers = np.zeros(QUERIES + GALLERY, int) if cameras == "one" else 5 * np.arange(QUERIES + GALLERY)[::-1]
        given = [numbers[:QUERIES], numbers[QUERIES:]]
    named = dict(zip(("k1_intra", "k1_inter", "k2_intra", "k2_inter", "lambda_value"), settings))
    wanted = naive_camera_jaccard(query.numpy(), gallery.numpy(), given, *settings)
    for chunk in (None, 7):
        got = camera_jaccard_rerank(query, gallery, *given, **named, chunk=chunk)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, atol=2e-6)
    # cameras are names: what they are called does not matter
    renamed = [torch.from_numpy(1000 - 7 * part) for part in given]
    np.testing.assert_allclose(camera_jaccard_rerank(query, gallery, *renamed, **named), wanted, atol=2e-6)


# --- neighbour feature centralisation --------------------------------------------------------------------------------------
def naive_nfc(x, k1, k2):
    x = unit(x)
    s = x @ x.T
    np.fill_diagonal(s, -np.inf)
    lists_ = [[j for j in nearest(s[i], max(k1, k2)) if j != i] for i in range(len(x))]
    return unit(
        [x[i] + sum((x[j] for j in lists_[i][:k1] if i in lists_[j][:k2]), np.zeros(x.shape[1])) for i in range(len(x))]
    )


@pytest.mark.parametrize("k1, k2", [(2, 2), (1, 4), (5, 2), (80, 80)])
def test_nfc_equals_naive(k1, k2):
    query, gallery, *_ = sets()
    got = neighbour_centralisation(query, gallery, k1=k1, k2=k2)
    for mine, given in zip(got, (query, gallery)):
        np.testing.assert_allclose(mine.numpy(), naive_nfc(given, k1, k2), atol=1e-9)
    alone, refined = neighbour_centralisation(query, gallery, k1=k1, k2=k2, protocol="inductive")
    assert torch.equal(refined, got[1])
    q, g = unit(query), unit(gallery)
    for i in range(QUERIES):
        total = q[i].copy()
        for j in nearest(g @ q[i], k1):
            others = np.delete(g @ g[j], j)
            if k2 > len(others) or q[i] @ g[j] > np.sort(others)[-k2]:
                total += g[j]
        np.testing.assert_allclose(alone[i].numpy(), unit(total), atol=1e-9)


# --- diffusion -------------------------------------------------------------------------------------------------------------
def naive_graph(x, k, gamma):
    s = x @ x.T
    near = [nearest(row, k) for row in s]
    w = np.zeros_like(s)
    for i in range(len(x)):
        for j in near[i]:
            if i != j and i in near[j]:
                w[i, j] = max(s[i, j], 0) ** gamma
    return w


def laplacian(w, alpha):
    degree = w.sum(1)
    root = np.divide(1, np.sqrt(degree), out=np.zeros(len(w)), where=degree > 0)
    return np.eye(len(w)) - alpha * root[:, None] * w * root[None]


def naive_diffusion(query, gallery, k, k_query, alpha, gamma, protocol, truncate=0, solve=np.linalg.solve):
    query, gallery = unit(query), unit(gallery)
    inductive = protocol == "inductive"
    w, out = naive_graph(gallery if inductive else np.concatenate([gallery, query]), k, gamma), []
    for i, q in enumerate(query):
        s, y = gallery @ q, np.zeros(len(w))
        if inductive:
            near = nearest(s, k_query)
            y[near] = np.maximum(s[near], 0) ** gamma
        else:
            y[len(gallery) + i] = 1
        kept = sorted(nearest(s, truncate)) if truncate else np.arange(len(w))
        f = np.zeros(len(w))
        f[kept] = solve(laplacian(w[np.ix_(kept, kept)], alpha), y[kept])
        out.append(f[: len(gallery)])
    return np.array(out)


@pytest.mark.parametrize(
    "k, k_query, alpha, gamma", [(50, 10, 0.99, 3.0), (8, 3, 0.9, 1.0), (3, 1, 0.5, 3.0), (99, 99, 0.0, 2.0)]
)
@pytest.mark.parametrize(
    "protocol, truncate", [("inductive", 0), ("inductive", 20), ("inductive", 1000), ("transductive", 0)]
)
def test_diffusion_equals_the_inverse(k, k_query, alpha, gamma, protocol, truncate):
    query, gallery, *_ = sets()
    settings = dict(k=k, k_query=k_query, alpha=alpha, gamma=gamma, protocol=protocol)
    got = diffusion_scores(query, gallery, **settings, truncate=truncate, iterations=300, tolerance=1e-9).numpy()
    wanted = naive_diffusion(query, gallery, **settings, truncate=truncate if truncate < GALLERY else 0)
    reached = np.abs(wanted) > 1e-12
    np.testing.assert_allclose(got[reached], wanted[reached], rtol=2e-3, atol=3e-5 * wanted.max())
    # what is not reached comes last, by cosine
    cosine = unit(query) @ unit(gallery).T
    for row, scores, near in zip(~reached, got, cosine):
        assert not row.any() or row.all() or scores[row].max() < scores[~row].min()
        np.testing.assert_array_equal(np.argsort(scores[row]), np.argsort(near[row]))


@pytest.mark.parametrize("iterations, tolerance", [(3, 0.0), (20, 1e-6), (20, 0.3)])
@pytest.mark.parametrize("truncate", [0, 25])
def test_diffusion_stops_where_conjugate_gradients_do(iterations, tolerance, truncate):
    query, gallery, *_ = sets()

    def solve(matrix, right):
        return cg(matrix, right, rtol=tolerance, atol=0.0, maxiter=iterations)[0]

    settings = dict(k=12, k_query=4, alpha=0.99, gamma=3.0, protocol="inductive", truncate=truncate)
    got = diffusion_scores(query, gallery, **settings, iterations=iterations, tolerance=tolerance).numpy()
    wanted = naive_diffusion(query, gallery, **settings, solve=solve)
    reached = wanted != 0
    np.testing.assert_allclose(got[reached], wanted[reached], rtol=1e-3, atol=1e-5 * wanted.max())


def test_an_image_that_no_graph_reaches():
    gallery = torch.cat([torch.eye(4)[:2].repeat(3, 1), torch.eye(4)[2:]])
    got = diffusion_scores(torch.tensor([[1.0, 0.1, 0.3, 0.2]]), gallery, k=3, k_query=3)
    assert got[0].argsort(descending=True, stable=True).tolist() == [0, 2, 4, 6, 7, 1, 3, 5]
    assert (got[0, :6:2] > 0).all() and (got[0, [1, 3, 5, 6, 7]] < 0).all()


# --- all of them -----------------------------------------------------------------------------------------------------------
def ranking_of(rival, query, gallery, query_cameras, gallery_cameras, **options):
    return rival.distances(query, gallery, query_cameras=query_cameras, gallery_cameras=gallery_cameras, **options)


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.inductive])
def test_a_query_is_alone_with_the_gallery(name):
    query, gallery, query_cameras, gallery_cameras = sets(queries=40, gallery=200, d=32, dtype=torch.float32)
    rival = RIVALS[name]
    few = {"diffusion": {"k": 12, "truncate": 60}}.get(name, {})
    for settings in ({}, few):
        together = ranking_of(rival, query, gallery, query_cameras, gallery_cameras, protocol="inductive", **settings)
        for rows in ([0], [3, 7, 39], list(range(20, 40))):
            part = ranking_of(
                rival, query[rows], gallery, query_cameras[rows], gallery_cameras, protocol="inductive", **settings
            )
            np.testing.assert_allclose(part.numpy(), together[rows].numpy(), rtol=1e-5, atol=1e-6)
        # other queries, among them doubles of this one and of its nearest images
        crowd = torch.cat([query[:1], query[:1].repeat(20, 1), gallery[together[0].argsort()[:20]]])
        cameras = np.r_[query_cameras[:1], np.arange(40) % 3]
        crowded = ranking_of(rival, crowd, gallery, cameras, gallery_cameras, protocol="inductive", **settings)
        np.testing.assert_allclose(crowded[0].numpy(), together[0].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if "transductive" in rival.protocols])
def test_transductive_queries_see_each_other(name):
    query, gallery, query_cameras, gallery_cameras = sets(queries=40, gallery=60, dtype=torch.float32)
    together = ranking_of(RIVALS[name], query, gallery, query_cameras, gallery_cameras, protocol="transductive")
    alone = ranking_of(RIVALS[name], query[:1], gallery, query_cameras[:1], gallery_cameras, protocol="transductive")
    assert not np.allclose(together[:1].numpy(), alone.numpy(), atol=1e-3)


@pytest.mark.parametrize("rival", RIVALS.values(), ids=list(RIVALS))
def test_every_rival_takes_anything_and_leaves_it_alone(rival):
    query, gallery, query_cameras, gallery_cameras = sets(dtype=torch.float32)
    copies = query.clone(), gallery.clone()
    for protocol in (None, *rival.protocols):
        one = ranking_of(rival, query, gallery, query_cameras, gallery_cameras, protocol=protocol)
        assert one.shape == (QUERIES, GALLERY) and one.dtype == torch.float32 and one.isfinite().all()
        same = ranking_of(rival, query, gallery, query_cameras, gallery_cameras, protocol=rival.protocol(protocol))
        assert torch.equal(one, same)
        longer = ranking_of(rival, 5 * query, 0.1 * gallery, query_cameras, gallery_cameras, protocol=protocol)
        np.testing.assert_allclose(longer.numpy(), one.numpy(), atol=3e-5)
        assert one.neg().add_(1).isfinite().all()  # an ordinary tensor, not one of inference mode
        # hardly any images, equal ones, and none at all in a picture
        for cut, flat in ((1, gallery[:1]), (2, gallery[:1].repeat(60, 1)), (3, torch.zeros(5, 12)), (1, torch.ones(2, 12))):
            cameras = np.arange(len(flat)) % 2
            got = ranking_of(rival, query[:cut], flat, query_cameras[:cut], cameras, protocol=protocol)
            assert got.shape == (cut, len(flat)) and got.isfinite().all()
        got = ranking_of(rival, torch.zeros(2, 12), gallery, [0, 1], gallery_cameras, protocol=protocol)
        assert got.isfinite().all()
    assert torch.equal(query, copies[0]) and torch.equal(gallery, copies[1])


def test_the_table_calls_what_it_names():
    query, gallery, query_cameras, gallery_cameras = sets(dtype=torch.float32)
    q, g = (torch.nn.functional.normalize(part, dim=1) for part in (query, gallery))

    def cosine(left, right):
        return 1 - left @ right.t()

    cameras = {"query_cameras": query_cameras, "gallery_cameras": gallery_cameras}
    wanted = {
        "aqe": cosine(average_query_expansion(q, g, k=5), database_augmentation(g, k=5)),
        "aqe-alpha": cosine(average_query_expansion(q, g, k=10, alpha=3), database_augmentation(g, k=10, alpha=3)),
        "rerank": torch.from_numpy(k_reciprocal_rerank_features(q, g)),
        "gnn": gnn_rerank(q, g),
        "gcr": cosine(*graph_convolution(q, g, **cameras)),
        "cajaccard": torch.from_numpy(camera_jaccard_rerank(q, g, query_cameras, gallery_cameras)),
        "nfc": cosine(*neighbour_centralisation(q, g)),
        "diffusion": -diffusion_scores(q, g),
    }
    assert list(wanted) == list(RIVALS)
    for name, distances in wanted.items():
        got = RIVALS[name].distances(query, gallery, **cameras)
        np.testing.assert_allclose(got.numpy(), distances.numpy(), atol=1e-5)
        others = [other for key, other in wanted.items() if key != name]
        assert all(not np.allclose(got.numpy(), other.numpy(), atol=1e-3) for other in others)
    for name in ("gcr", "cajaccard"):  # cameras reach it, those of both sides
        for side in cameras:
            turned = {**cameras, side: (cameras[side] + np.arange(len(cameras[side]))) % 3}
            assert not np.allclose(RIVALS[name].distances(query, gallery, **turned).numpy(), wanted[name].numpy(), atol=1e-3)


@pytest.mark.parametrize("name, key", [(name, key) for name, rival in RIVALS.items() for key in rival.settings])
def test_every_setting_acts(name, key):
    rival = RIVALS[name]
    query, gallery, *cameras = sets(queries=12, gallery=90, noise=0.9, dtype=torch.float32)
    base = {"iterations": {"tolerance": 0.0}, "tolerance": {"alpha": 0.9}}.get(key, {})
    changed = {"iterations": 2, "tolerance": 0.5, "lambda_value": 0.7, "alpha": 0.5, "truncate": 15}
    changed = {**changed, "scale": 0.9, "beta1": 1.0, "beta2": 0.05}
    value = changed.get(key, rival.settings[key] + 3 if key != "layers" else 1)
    value = {"k": 7, "k_query": 3, "rounds": 1}.get(key, value) if name != "aqe" else value
    one = ranking_of(rival, query, gallery, *cameras, **base)
    other = ranking_of(rival, query, gallery, *cameras, **{**base, key: value})
    assert not np.allclose(one.numpy(), other.numpy(), atol=1e-4), (name, key)


@pytest.mark.parametrize("module", [lists, graph, diffusion, camera_jaccard], ids=lambda module: module.__name__)
def test_small_blocks_change_nothing(module, monkeypatch):
    query, gallery, *cameras = sets(queries=20, dtype=torch.float32)
    cases = [(rival, protocol, {}) for rival in RIVALS.values() for protocol in rival.protocols]
    cases.append((RIVALS["diffusion"], "inductive", {"truncate": 15}))
    wanted = [ranking_of(rival, query, gallery, *cameras, protocol=protocol, **more) for rival, protocol, more in cases]
    for name in ("_BLOCK_VALUES", "_ROW_VALUES"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, 130)
    for (rival, protocol, more), want in zip(cases, wanted):
        got = ranking_of(rival, query, gallery, *cameras, protocol=protocol, **more)
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-5, atol=1e-6)


def test_rivals_by_name():
    assert rival_named("gnn") is RIVALS["gnn"] and all(name == rival.name for name, rival in RIVALS.items())
    with pytest.raises(UserError, match="'cajacard' is unknown; did you mean 'cajaccard'"):
        rival_named("cajacard")
    assert RIVALS["diffusion"].protocol() == "inductive" and RIVALS["nfc"].protocol() == "transductive"
    assert RIVALS["nfc"].protocol("inductive") == "inductive" and RIVALS["rerank"].protocol("inductive") == "transductive"
    inductive = {name for name, rival in RIVALS.items() if rival.inductive}
    assert inductive == {"aqe", "aqe-alpha", "gnn", "gcr", "nfc", "diffusion"}
    assert [name for name, rival in RIVALS.items() if rival.needs_cameras] == ["cajaccard"]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("gnn", {"k3": 1}, "'gnn' has no setting 'k3'; valid ones: alpha, k1"),
        ("gnn", {"k1": 0}, "k1 is 0"),
        ("gnn", {"layers": 0}, "layers is 0"),
        ("gnn", {"alpha": -1.0}, "alpha is -1.0"),
        ("gnn", {"lambda_value": 1.5}, "lambda_value is 1.5"),
        ("gnn", {"protocol": "transductiv"}, "no protocol 'transductiv'; did you mean 'transductive'"),
        ("rerank", {"protocol": "inductive"}, "'rerank' has no protocol 'inductive'"),
        ("gcr", {"scale": 1.5}, "scale is 1.5"),
        ("gcr", {"beta1": 0.0}, "beta1 is 0.0"),
        ("gcr", {"gallery_cameras": None}, "belong together"),
        ("gcr", {"query_cameras": [1, 2]}, r"query_cameras has shape \(2,\)"),
        ("cajaccard", {"query_cameras": None, "gallery_cameras": None}, "'cajaccard' needs the cameras"),
        ("cajaccard", {"k2_intra": 0}, "k2_intra is 0"),
        ("cajaccard", {"lambda_value": -0.5}, "lambda_value is -0.5"),
        ("nfc", {"k2": 0}, "k2 is 0"),
        ("diffusion", {"alpha": 1.0}, "alpha is 1.0"),
        ("diffusion", {"gamma": float("nan")}, "gamma is nan"),
        ("diffusion", {"truncate": 5, "protocol": "transductive"}, "truncate belongs to the inductive"),
    ],
)
def test_mistakes(name, options, words):
    query, gallery, query_cameras, gallery_cameras = sets()
    with pytest.raises(UserError, match=words):
        RIVALS[name].distances(
            query, gallery, **{"query_cameras": query_cameras, "gallery_cameras": gallery_cameras, **options}
        )


@pytest.mark.parametrize("rival", RIVALS.values(), ids=list(RIVALS))
def test_mistakes_in_features(rival):
    query, gallery, query_cameras, gallery_cameras = sets(dtype=torch.float32)
    for left, right, words in (
        (query[:, :5], gallery, "dimensions"),
        (query[0], gallery, "shape"),
        (query[:0], gallery, "queries and gallery"),
        (query, gallery[:0], "queries and gallery"),
        (torch.full_like(query, torch.nan), gallery, "NaN"),
    ):
        with pytest.raises(UserError, match=words):
            ranking_of(rival, left, right, query_cameras[: len(left)], gallery_cameras[: len(right)])


def test_a_protocol_that_is_none():
    query, gallery, *_ = sets()
    for function in (gnn_rerank, graph_convolution, neighbour_centralisation, diffusion_scores):
        with pytest.raises(UserError, match="protocol 'both' is unknown"):
            function(query, gallery, protocol="both")
