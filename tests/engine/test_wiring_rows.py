"""Every row of the table against a computation of its own from the features."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from wiring import naive_scores, unit

from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.config.ranges import RIVALS as CONFIGURED
from relreid_plugin.engine.evaluator import EvaluationOptions, Evaluator, inference_parameters
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import Features, TestFeatures
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.metrics.neighbours import SearchConfig
from relreid_plugin.metrics.ranking import evaluate_cuhk03
from relreid_plugin.metrics.rivals import RIVALS

DIM = 8


def scene(queries=14, gallery=66, identities=7, seed=0):
    """Features whose lengths differ by a factor of 20, so that raw and unit features rank differently."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(identities, DIM))

    def part(count, name):
        pids = np.arange(count) % identities
        rows = centres[pids] + draw.normal(0, 0.9, (count, DIM)) + 0.7
        rows *= np.exp(draw.uniform(-1.5, 1.5, (count, 1)))
        paths = [f"{name}{i}.png" for i in range(count)]
        return Features(torch.from_numpy(rows).float(), pids, draw.integers(0, 3, count), paths)

    return TestFeatures(part(queries, "q"), part(gallery, "g"))


def make_encoder(seed=1):
    """An encoder with weights and statistics that are not those of the start."""
    torch.manual_seed(seed)
    options = {
        "attention": "magformer",
        "num_layers": 2,
        "k": 4,
        "num_landmarks": 3,
        "search": SearchConfig(backend="torch"),
    }
    encoder = RelationEncoder(DIM, 5, **options)
    with torch.no_grad():
        for value in encoder.parameters():
            value.mul_(8.0 if value.dim() > 1 else 1.0)
        encoder.neck.bn.running_mean.normal_()
        encoder.neck.bn.running_var.uniform_(0.5, 2.0)
    return encoder


def labels(data):
    return data.query.pids, data.gallery.pids, data.query.camids, data.gallery.camids


def check(row, distances, data, ranks=(1, 5, 10, 20)):
    mean_ap, mean_inp, cmc = naive_scores(distances, *labels(data), ranks=ranks)
    assert row.mAP == pytest.approx(mean_ap, abs=1e-9)
    assert row.mINP == pytest.approx(mean_inp, abs=1e-9)
    assert list(row.cmc) == list(cmc) and row.cmc == pytest.approx(cmc, abs=1e-9)


def differ(data, first, second):
    """Whether two matrices of distances score differently: else a test on this scene could not tell them apart."""
    return abs(naive_scores(first, *labels(data))[0] - naive_scores(second, *labels(data))[0]) > 1e-4


def evaluator(data, **options):
    return Evaluator("made", data, options=EvaluationOptions(**options), parameters=1000)


def raw(features):
    return torch.as_tensor(features).double()


def cosine(query, gallery):
    return 1.0 - unit(query) @ unit(gallery).t()


# --- the image model ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_image_models_row(metric, normalised):
    data = scene()
    query, gallery = data.query.features, data.gallery.features
    assert differ(data, torch.cdist(raw(query), raw(gallery)), cosine(query, gallery))
    prepare = unit if normalised else raw
    wanted = cosine(query, gallery) if metric == "cosine" else torch.cdist(prepare(query), prepare(gallery))
    row = evaluator(data, metric=metric, normalise=normalised).baseline()
    check(row, wanted, data)
    assert (row.target, row.protocol, row.method) == ("made", "inductive", "image model")
    assert (row.parameters, row.queries) == (1000, 14) and 0 <= row.seconds < 60
    assert evaluator(data).baseline("GraFT").method == "GraFT"


def test_any_rank_is_reported_also_beyond_50():
    data = scene()
    for options in ({"ranks": (60, 2)}, {"ranks": (3,)}):
        row = evaluator(data, **options).baseline()
        wanted = torch.cdist(raw(data.query.features), raw(data.gallery.features))
        check(row, wanted, data, ranks=options["ranks"])
    rows = evaluator(data, ranks=(60,)).rivals()
    assert [list(row.cmc) for row in rows] == [["60"], ["60"]]
    assert evaluator(data, ranks=(60,), rerank_all=True).baseline().cmc["60"] <= 1
    assert evaluator(data, ranks=(60,)).relation(make_encoder(), protocol="inductive", name="x").cmc["60"] <= 1


def test_queries_without_a_match_are_not_counted():
    data = scene()
    pids = data.query.pids.copy()
    pids[:3] = 99
    data = TestFeatures(Features(data.query.features, pids, data.query.camids, data.query.paths), data.gallery)
    row = evaluator(data).baseline()
    assert row.queries == 11
    check(row, torch.cdist(raw(data.query.features), raw(data.gallery.features)), data)


def test_a_test_set_without_a_side_is_refused():
    data = scene()
    empty = Features(torch.zeros(0, DIM), np.zeros(0, int), np.zeros(0, int), [])
    with pytest.raises(UserError, match="'made' has 0 query and 66 gallery images"):
        evaluator(TestFeatures(empty, data.gallery))
    with pytest.raises(UserError, match="'made' has 14 query and 0 gallery images"):
        evaluator(TestFeatures(data.query, empty))


def test_a_row_as_json():
    row = evaluator(scene()).baseline()
    assert row.as_dict() == asdict(row) and row.as_dict()["mAP"] == row.mAP


# --- rivals ----------------------------------------------------------------------------------------------------------------
def expand(features, gallery, k, alpha, skip_self):
    """Weighted sums with the k nearest, by loops."""
    scores, rows = (features @ gallery.t()).tolist(), []
    for i, feature in enumerate(features):
        order = [j for j in np.argsort([-s for s in scores[i]], kind="stable").tolist() if not (skip_self and j == i)]
        rows.append(feature + sum(max(scores[i][j], 0.0) ** alpha * gallery[j] for j in order[:k]))
    return torch.stack(rows)


@pytest.mark.parametrize("k,alpha", [(5, 0.0), (3, 2.0)])
def test_the_query_expansions_row(k, alpha):
    data = scene()
    query, gallery = unit(data.query.features), unit(data.gallery.features)
    wanted = cosine(expand(query, gallery, k, alpha, False), expand(gallery, gallery, k, alpha, True))
    (row,) = evaluator(data, rivals=("aqe",), aqe_k=k, aqe_alpha=alpha).rivals()
    check(row, wanted, data)
    assert (row.protocol, row.method) == ("inductive", "+ average query expansion")
    assert (row.parameters, row.queries) == (1000, 14) and 0 <= row.seconds < 60
    # what it is not: without expansion, of one side only, other settings
    assert differ(data, wanted, cosine(query, gallery))
    assert differ(data, wanted, cosine(expand(query, gallery, k, alpha, False), gallery))
    assert differ(data, wanted, cosine(query, expand(gallery, gallery, k, alpha, True)))
    for other in ((k + 1, alpha), (k, alpha + 3.0)):
        assert differ(data, wanted, cosine(expand(query, gallery, *other, False), expand(gallery, gallery, *other, True)))
    # nor on features as long as they come out of the model
    query, gallery = raw(data.query.features), raw(data.gallery.features)
    assert differ(data, wanted, torch.cdist(expand(query, gallery, k, 0, False), expand(gallery, gallery, k, 0, True)))


def reranked(query, gallery, k1, k2, lambda_value):
    """Zhong et al. 2017 by the host's code."""
    from torchreid.reid.utils.rerank import re_ranking

    pairs = ((query, gallery), (query, query), (gallery, gallery))
    matrices = [torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy() for x, y in pairs]
    return re_ranking(*matrices, k1=k1, k2=k2, lambda_value=lambda_value)


@pytest.mark.parametrize("settings", [(20, 6, 0.3), (7, 3, 0.6)])
def test_the_re_rankings_row(settings):
    data = scene()
    query, gallery = unit(data.query.features), unit(data.gallery.features)
    wanted = reranked(query, gallery, *settings)
    options = dict(zip(("k1", "k2", "lambda_value"), settings))
    (row,) = evaluator(data, rivals=("rerank",), **options).rivals()
    check(row, wanted, data)
    assert (row.protocol, row.method) == ("transductive", "+ k-reciprocal re-ranking")
    assert (row.parameters, row.queries) == (1000, 14) and 0 <= row.seconds < 60
    assert differ(data, wanted, reranked(raw(data.query.features), raw(data.gallery.features), *settings))
    k1, k2, lambda_value = settings
    for other in ((k1 + 5, k2, lambda_value), (k1, k2 + 3, lambda_value), (k1, k2, 0.95)):
        assert differ(data, wanted, reranked(query, gallery, *other))


@pytest.mark.parametrize("name", ["gnn", "gcr", "cajaccard", "nfc", "diffusion", "aqe-alpha"])
@pytest.mark.parametrize("wanted", ["published", "inductive", "transductive"])
def test_the_rows_of_further_rivals(name, wanted):
    data, rival = scene(), RIVALS[name]
    cameras = {"query_cameras": data.query.camids, "gallery_cameras": data.gallery.camids}
    protocol = wanted if wanted in rival.protocols else rival.protocols[0]
    distances = rival.distances(data.query.features, data.gallery.features, **cameras, protocol=protocol)
    plain = Evaluator("made", data, options=EvaluationOptions(rivals=(name,), rival_protocol=wanted), parameters=1000)
    (row,) = plain.rivals()
    check(row, distances, data)
    assert (row.protocol, row.method, row.parameters) == (protocol, rival.title, 1000)
    told = "cosine" if name == "aqe-alpha" else f"{rival.title[2:]} of cosine"
    assert row.metric == told and 0 <= row.seconds < 60
    assert differ(data, distances, cosine(data.query.features, data.gallery.features))
    # its settings reach it, and nobody else's do
    key, value = {"gcr": ("k1", 4), "cajaccard": ("k1_inter", 3), "nfc": ("k1", 6)}.get(name, ("alpha", 0.5))
    changed = rival.distances(data.query.features, data.gallery.features, **cameras, protocol=protocol, **{key: value})
    assert differ(data, distances, changed)
    settings = {name: {key: value}, "aqe": {"k": 1}}
    (row,) = evaluator(data, rivals=(name,), rival_protocol=wanted, rival_settings=settings).rivals()
    check(row, changed, data)


def test_further_rivals_under_the_metric_of_the_classic_split_and_where_every_row_is_re_ranked():
    data = scene()
    gnn = RIVALS["gnn"].distances(data.query.features, data.gallery.features)
    (row,) = evaluator(data, rivals=("gnn",), cuhk03_metric=True).rivals()
    wanted = evaluate_cuhk03(gnn, *labels(data))
    assert row.cmc == pytest.approx({str(rank): wanted.rank(rank) for rank in (1, 5, 10, 20)}, abs=1e-6)
    assert row.metric.startswith("GNN re-ranking of cosine; single-gallery-shot")
    every = evaluator(data, rivals=tuple(RIVALS), rerank_all=True).rivals()
    assert [row.method for row in every] == [
        f"{RIVALS[name].title} + k-reciprocal re-ranking" for name in ("aqe", "aqe-alpha")
    ]
    rows = evaluator(data, rivals=tuple(RIVALS)[::-1]).rivals()
    assert [row.method for row in rows] == [rival.title for rival in RIVALS.values()]


def test_the_configurations_rivals_are_those_of_the_table():
    test = get_default_config().test
    assert CONFIGURED == tuple(RIVALS) and test.rivals == ["aqe", "rerank"]
    for name, rival in RIVALS.items():
        assert dict(test["kreciprocal" if name == "rerank" else name.replace("-", "_")]) == dict(rival.settings)
        assert EvaluationOptions().settings(name) == dict(rival.settings)


def test_rivals_are_those_asked_for():
    data = scene()
    names = {"aqe": "+ average query expansion", "rerank": "+ k-reciprocal re-ranking"}
    for rivals in ((), ("aqe",), ("rerank",), ("aqe", "rerank")):
        assert [row.method for row in evaluator(data, rivals=rivals).rivals()] == [names[rival] for rival in rivals]


# --- the relation encoder ----------------------------------------------------------------------------------------------
def reference(data, encoder, protocol):
    """Refined unit features by dense loops in float64."""
    double = make_encoder().double().eval()
    double.load_state_dict(encoder.state_dict())
    query, gallery = raw(data.query.features), raw(data.gallery.features)

    def landmarks(size):
        return [double.landmark_rows(torch.zeros(size, DIM), layer).tolist() for layer in range(2)]

    with torch.no_grad():
        if protocol == "transductive":
            rows = landmarks(len(query) + len(gallery))
            both = oracles.embed(oracles.encode(torch.cat([query, gallery]), double, rows), double.neck)
            return both[: len(query)], both[len(query) :]
        rows = landmarks(len(gallery))
        refined = oracles.embed(oracles.encode(gallery, double, rows), double.neck)
        alone = [oracles.alone_with_gallery(gallery, row, double, rows) for row in query]
        return oracles.embed(torch.stack(alone), double.neck), refined


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
def test_the_relation_encoders_rows(protocol):
    data, encoder = scene(queries=6, gallery=24, identities=4), make_encoder()
    query, gallery = reference(data, encoder, protocol)
    wanted = cosine(query, gallery)
    row = evaluator(data).relation(encoder.train(), protocol=protocol, name="+ MagFormer")
    assert not encoder.training
    check(row, wanted, data)
    assert (row.target, row.protocol, row.method) == ("made", protocol, "+ MagFormer")
    assert row.queries == 6 and 0 <= row.seconds < 60
    assert row.parameters == 1000 + sum(value.numel() for value in encoder.parameters()) - 5 * DIM  # no classifier
    assert differ(data, wanted, cosine(data.query.features, data.gallery.features))
    assert differ(data, wanted, torch.cdist(raw(data.query.features), raw(data.gallery.features)))
    other = "inductive" if protocol == "transductive" else "transductive"
    assert differ(data, wanted, cosine(*reference(data, encoder, other)))


def test_refinement_leaves_the_features_alone():
    data = scene()
    before = data.query.features.clone(), data.gallery.features.clone()
    for protocol in ("inductive", "transductive"):
        evaluator(data).relation(make_encoder(), protocol=protocol, name="x")
    assert torch.equal(before[0], data.query.features) and torch.equal(before[1], data.gallery.features)


# --- every row re-ranked, and the metric of the classic split -------------------------------------------------------------
def test_re_ranking_of_every_row():
    data, settings = scene(queries=6, gallery=24, identities=4), (9, 4, 0.5)
    options = {"rerank_all": True, "k1": 9, "k2": 4, "lambda_value": 0.5, "normalise": True}
    row = evaluator(data, **options).baseline()
    check(row, reranked(unit(data.query.features), unit(data.gallery.features), *settings), data)
    assert (row.protocol, row.method) == ("transductive", "image model + k-reciprocal re-ranking")
    assert all(row.method != "+ k-reciprocal re-ranking" for row in evaluator(data, **options).rivals())
    encoder = make_encoder()
    query, gallery = reference(data, encoder, "transductive")
    check(
        evaluator(data, **options).relation(encoder, protocol="transductive", name="x"),
        reranked(query, gallery, *settings),
        data,
    )


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_metric_of_the_classic_split(metric):
    data = scene()
    distances = torch.cdist(raw(data.query.features), raw(data.gallery.features))
    if metric == "cosine":
        distances = cosine(data.query.features, data.gallery.features)
    wanted = evaluate_cuhk03(distances, *labels(data), max_rank=60)
    row = evaluator(data, cuhk03_metric=True, metric=metric, ranks=(1, 5, 60)).baseline()
    assert row.mAP == pytest.approx(wanted.mAP, abs=1e-6)
    assert row.cmc == pytest.approx({str(rank): wanted.rank(rank) for rank in (1, 5, 60)}, abs=1e-6)
    assert row.cmc != pytest.approx(evaluator(data, metric=metric, ranks=(1, 5, 60)).baseline().cmc, abs=0.05)


def test_rows_say_how_they_were_ranked():
    data, encoder = scene(), make_encoder()

    def said(**options):
        made = evaluator(data, normalise=True, **options)
        rows = [made.baseline(), *made.rivals(), made.relation(encoder, protocol="inductive", name="x")]
        return {row.method: row.metric for row in rows}

    assert said() == {
        "image model": "Euclidean, unit features",
        "+ average query expansion": "cosine",
        "+ k-reciprocal re-ranking": "k-reciprocal re-ranking of cosine",
        "x": "cosine",
    }
    assert said(metric="cosine", rivals=())["image model"] == "cosine"
    assert evaluator(data).baseline().metric == "Euclidean"
    draws = "; single-gallery-shot CMC, 10 draws"
    assert said(cuhk03_metric=True, rivals=()) == {"image model": f"Euclidean, unit features{draws}", "x": f"cosine{draws}"}
    assert said(rerank_all=True) == {
        "image model + k-reciprocal re-ranking": "k-reciprocal re-ranking of Euclidean, unit features",
        "+ average query expansion + k-reciprocal re-ranking": "k-reciprocal re-ranking of cosine",
        "x (inductive) + k-reciprocal re-ranking": "k-reciprocal re-ranking of cosine",
    }
    row = evaluator(data, rerank_all=True).relation(encoder, protocol="transductive", name="x")
    assert (row.method, row.protocol) == ("x + k-reciprocal re-ranking", "transductive")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_scores_of_any_features(metric):
    data = scene()
    query, gallery = data.query.features + 1.0, data.gallery.features + 1.0
    found = evaluator(data, normalise=True, metric="euclidean").score(query, gallery, metric)
    wanted = cosine(query, gallery) if metric == "cosine" else torch.cdist(raw(query), raw(gallery))
    assert float(found.mAP) == pytest.approx(naive_scores(wanted, *labels(data))[0], abs=1e-9)
    assert differ(data, cosine(query, gallery), torch.cdist(raw(query), raw(gallery)))


class Asked(torch.nn.Module):
    """An encoder that notes what it is given and returns features turned by a matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.turn = torch.nn.Parameter(torch.randn(DIM, 3))
        self.calls = []

    def refine_gallery(self, gallery, cameras=None):
        self.calls.append(("gallery", gallery, cameras, self.training, torch.is_grad_enabled()))
        return SimpleNamespace(refined=(gallery @ self.turn).double())

    def refine_queries(self, query, states, cameras=None):
        self.calls.append(("query", query, cameras, states))
        return (query @ self.turn).double() + 1

    def forward(self, features, cameras=None):
        self.calls.append(("both", features, cameras, self.training, torch.is_grad_enabled()))
        return (features @ self.turn).double() + 2


def test_what_an_encoder_is_given():
    data, encoder = scene(), Asked()
    query, gallery = evaluator(data).refined_features(encoder.train(), "inductive")
    first, second = encoder.calls
    assert torch.equal(first[1], data.gallery.features) and np.array_equal(first[2], data.gallery.camids)
    assert torch.equal(second[1], data.query.features) and np.array_equal(second[2], data.query.camids)
    assert first[3:] == (False, False) and second[3].refined.dtype == torch.float64
    turn = encoder.turn.detach()
    assert torch.allclose(query, data.query.features @ turn + 1) and torch.allclose(gallery, data.gallery.features @ turn)
    assert query.dtype == gallery.dtype == torch.float32 and not query.requires_grad
    encoder.calls.clear()
    query, gallery = evaluator(data).refined_features(encoder.train(), "transductive")
    (both,) = encoder.calls
    assert torch.equal(both[1], torch.cat([data.query.features, data.gallery.features])) and both[3:] == (False, False)
    assert both[2].tolist() == [*data.query.camids, *data.gallery.camids]
    assert torch.allclose(query, data.query.features @ turn + 2) and torch.allclose(
        gallery, data.gallery.features @ turn + 2
    )
    scores = evaluator(data).refined_result(encoder, "transductive")
    assert float(scores.mAP) == pytest.approx(naive_scores(cosine(query, gallery), *labels(data))[0], abs=1e-9)
    assert differ(data, cosine(query, gallery), torch.cdist(raw(query), raw(gallery)))


def test_classifiers_are_no_parameters_of_testing():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 2), "classifier": torch.nn.Linear(2, 50)})
    model["inner"] = torch.nn.ModuleDict({"classifier": torch.nn.Linear(2, 9), "classifiers": torch.nn.Linear(1, 1)})
    assert inference_parameters(model) == 3 * 2 + 2 + 1 + 1
