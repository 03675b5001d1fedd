"""Every row of a table against an independent computation from its features; one metric for all rows; a query's own file."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch

from relreid_plugin.engine.evaluator import Evaluator
from relreid_plugin.engine.scoring import EvaluationOptions, Scorer
from relreid_plugin.engine.table import markdown, markdown_table, mean_and_spread, score_cells, score_columns, text_table
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import Features, TestFeatures
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.metrics.matches import has_match
from relreid_plugin.metrics.neighbours import normalise
from relreid_plugin.metrics.ranking import evaluate_cuhk03, evaluate_features, evaluate_ranking
from relreid_plugin.metrics.reranking import k_reciprocal_rerank_features

OPTIONS = EvaluationOptions(ranks=(1, 5), k1=6, k2=3, aqe_k=3, aqe_alpha=1.0)


def features(seed=0, queries=10, gallery=26, identities=5, dim=8):
    """Clusters of features of different lengths, so that cosine and Euclidean distance order them differently."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(identities, dim))

    def some(count, name):
        pids = rng.integers(0, identities, count)
        values = (centers[pids] + 0.9 * rng.normal(size=(count, dim))) * rng.uniform(0.3, 3.0, (count, 1))
        paths = [f"/nowhere/{name}{number}.jpg" for number in range(count)]
        return Features(torch.from_numpy(values).float(), pids, rng.integers(0, 3, count), paths)

    return TestFeatures(some(queries, "q"), some(gallery, "g"))


# --- the naive forms: float64, loops, dense matrices -------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def arrays(data):
    return data.query.features.double().numpy(), data.gallery.features.double().numpy()


def euclidean(x, y):
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(2))


def naive_expansion(x, gallery, k, alpha, own):
    out = []
    for row, vector in enumerate(x):
        scores = gallery @ vector
        order = [j for j in np.argsort(-scores, kind="stable") if not (own and j == row)][:k]
        out.append(vector + sum(max(scores[j], 0) ** alpha * gallery[j] for j in order))
    return unit(np.array(out))


def naive_rerank(query, gallery, k1, k2, weight):
    """Zhong et al., CVPR 2017, line by line."""
    everything = np.concatenate([query, gallery])
    original = euclidean(everything, everything) ** 2
    original = (original / original.max(axis=0)).T
    rank = np.argsort(original, axis=1, kind="stable")
    size = len(everything)

    @functools.cache
    def reciprocal(i, k):
        return [j for j in rank[i, : k + 1] if i in rank[j, : k + 1]]

    encoding = np.zeros((size, size))
    for i in range(size):
        expanded = list(reciprocal(i, k1))
        for candidate in reciprocal(i, k1):
            more = reciprocal(candidate, int(np.around(k1 / 2)))
            if len(set(more) & set(reciprocal(i, k1))) > 2 / 3 * len(more):
                expanded += more
        expanded = sorted(set(expanded))
        weights = np.exp(-original[i, expanded])
        encoding[i, expanded] = weights / weights.sum()
    if k2 > 1:
        encoding = np.array([encoding[rank[i, :k2]].mean(axis=0) for i in range(size)])
    out = np.zeros((len(query), len(gallery)))
    for i in range(len(query)):
        for j in range(len(gallery)):
            least = np.minimum(encoding[i], encoding[len(query) + j]).sum()
            out[i, j] = (1 - weight) * (1 - least / (2 - least)) + weight * original[i, len(query) + j]
    return out


def naive_scores(distances, data, own=None):
    """mAP, mINP, R1, R5 and how many queries count; ``own[q, g]``: the same file."""
    q, g = data.query, data.gallery
    aps, inps, firsts = [], [], []
    for row in range(len(q)):
        kept = [
            j
            for j in np.argsort(distances[row], kind="stable")
            if not (g.pids[j] == q.pids[row] and g.camids[j] == q.camids[row]) and not (own is not None and own[row, j])
        ]
        ranks = [place for place, j in enumerate(kept, 1) if g.pids[j] == q.pids[row]]
        if ranks:
            aps.append(np.mean([(n + 1) / place for n, place in enumerate(ranks)]))
            inps.append(len(ranks) / ranks[-1])
            firsts.append(ranks[0])
    return np.mean(aps), np.mean(inps), np.mean(np.array(firsts) <= 1), np.mean(np.array(firsts) <= 5), len(aps)


def assert_row(row, scores):
    got = row.mAP, row.mINP, row.cmc["1"], row.cmc["5"], row.queries
    np.testing.assert_allclose(got, scores, atol=1e-9)


# --- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_baseline_row(metric, normalise, seed):
    data = features(seed)
    row = Evaluator("set", data, options=replace(OPTIONS, metric=metric, normalise=normalise), parameters=7).baseline()
    query, gallery = arrays(data)
    scaled = metric == "cosine" or normalise
    assert_row(row, naive_scores(euclidean(unit(query), unit(gallery)) if scaled else euclidean(query, gallery), data))
    assert (row.protocol, row.method, row.parameters) == ("inductive", "image model", 7)
    assert row.metric == ("cosine" if metric == "cosine" else "Euclidean" + ", unit features" * normalise)


def expansion(data):
    query, gallery = map(unit, arrays(data))
    expanded = naive_expansion(query, gallery, OPTIONS.aqe_k, OPTIONS.aqe_alpha, own=False)
    return expanded, naive_expansion(gallery, gallery, OPTIONS.aqe_k, OPTIONS.aqe_alpha, own=True)


def rerank(query, gallery):
    return naive_rerank(query, gallery, OPTIONS.k1, OPTIONS.k2, OPTIONS.lambda_value)


@pytest.mark.parametrize("seed", [0, 1])
def test_rivals_are_those_of_unit_features(seed):
    data = features(seed)
    aqe, reranked = Evaluator("set", data, options=OPTIONS, parameters=0).rivals()
    assert_row(aqe, naive_scores(euclidean(*expansion(data)), data))
    assert_row(reranked, naive_scores(rerank(*map(unit, arrays(data))), data))
    assert (aqe.protocol, aqe.metric) == ("inductive", "cosine")
    assert (reranked.protocol, reranked.metric) == ("transductive", "k-reciprocal re-ranking of cosine")
    assert naive_scores(rerank(*arrays(data)), data) != naive_scores(rerank(*map(unit, arrays(data))), data)


def make_encoder(dim=8):
    torch.manual_seed(3)
    encoder = RelationEncoder(dim, 5, attention="magformer", num_layers=2, num_heads=1, num_landmarks=3, k=4)
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if "bn.bias" not in name:  # the neck has none
                value.add_(0.05 * torch.randn(value.shape))
    return encoder.eval()


def landmarks(encoder, size):
    rows = torch.zeros(size, encoder.dim)
    return [encoder.landmark_rows(rows, layer).tolist() for layer in range(len(encoder.blocks))]


def refined(data, encoder, protocol):
    """Both sets refined densely in float64, as numpy."""
    twin = make_encoder().double()
    query, gallery = data.query.features.double(), data.gallery.features.double()
    with torch.no_grad():
        if protocol == "transductive":
            both = torch.cat([query, gallery])
            out = oracles.embed(oracles.encode(both, twin, landmarks(twin, len(both))), twin.neck)
            return out[: len(query)].numpy(), out[len(query) :].numpy()
        rows = landmarks(twin, len(gallery))
        alone = oracles.embed(oracles.encode(gallery, twin, rows), twin.neck).numpy()
        queries = [oracles.embed(oracles.alone_with_gallery(gallery, one, twin, rows), twin.neck) for one in query]
        return torch.stack(queries).numpy(), alone


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
def test_relation_rows(protocol):
    data, encoder = features(2), make_encoder()
    evaluator = Evaluator("set", data, options=OPTIONS, parameters=0)
    row = evaluator.relation(encoder, protocol=protocol, name="+ MagFormer")
    expected = refined(data, encoder, protocol)
    assert_row(row, naive_scores(euclidean(*expected), data))
    assert naive_scores(euclidean(*expected), data) != naive_scores(euclidean(*map(unit, arrays(data))), data)
    other = evaluator.refined_features(encoder, "inductive" if protocol == "transductive" else "transductive")
    assert np.abs(other[0].numpy() - expected[0]).max() > 1e-3  # the protocols are told apart
    assert (row.protocol, row.metric) == (protocol, "cosine")


# --- one metric for all rows --------------------------------------------------------------------------------------------


def all_rows(data, options):
    evaluator, encoder = Evaluator("set", data, options=options, parameters=0), make_encoder()
    rows = [evaluator.baseline(), *evaluator.rivals()]
    return [*rows, *(evaluator.relation(encoder, protocol=p, name="+ MagFormer") for p in ("inductive", "transductive"))]


def test_rerank_holds_for_every_row():
    data, encoder = features(3), make_encoder()
    rows = all_rows(data, replace(OPTIONS, rerank_all=True))
    expected = [arrays(data), expansion(data), *(refined(data, encoder, p) for p in ("inductive", "transductive"))]
    assert [row.method for row in rows] == [
        "image model + k-reciprocal re-ranking",
        "+ average query expansion + k-reciprocal re-ranking",
        "+ MagFormer (inductive) + k-reciprocal re-ranking",
        "+ MagFormer + k-reciprocal re-ranking",
    ]
    for row, pair in zip(rows, expected):
        assert_row(row, naive_scores(rerank(*pair), data))
        assert row.protocol == "transductive" and row.metric.startswith("k-reciprocal re-ranking of ")


@pytest.mark.parametrize("change", [{"metric": "cosine"}, {"normalise": True}])
def test_rerank_starts_from_the_configured_distance(change):
    data = features(4)
    row = Evaluator("set", data, options=replace(OPTIONS, rerank_all=True, **change), parameters=0).baseline()
    assert_row(row, naive_scores(rerank(*map(unit, arrays(data))), data))


def test_cuhk03_metric_holds_for_every_row():
    data, encoder = features(5), make_encoder()
    rows = all_rows(data, replace(OPTIONS, cuhk03_metric=True))
    unit_pair = [unit(part) for part in arrays(data)]
    distances = [
        euclidean(*arrays(data)),
        euclidean(*expansion(data)),
        rerank(*unit_pair),
        *(euclidean(*refined(data, encoder, protocol)) for protocol in ("inductive", "transductive")),
    ]
    labels = (data.query.pids, data.gallery.pids, data.query.camids, data.gallery.camids)
    for row, matrix in zip(rows, distances):
        expected = evaluate_cuhk03(matrix, *labels)
        assert row.cmc == {"1": pytest.approx(expected.rank(1)), "5": pytest.approx(expected.rank(5))}
        assert row.mAP == pytest.approx(expected.mAP) and "single-gallery-shot" in row.metric
        assert expected.rank(1) != evaluate_ranking(matrix, *labels).rank(1)
    assert "single-gallery-shot" in text_table(rows) and "single-gallery-shot" in markdown_table(rows)
    again = all_rows(data, replace(OPTIONS, cuhk03_metric=True))
    assert [row.cmc for row in rows] == [row.cmc for row in again]


def test_a_runs_own_scores_are_those_of_its_row():
    """Validation, monitoring and the occlusion test score as the image model's row does."""
    from relreid_plugin.config.defaults import get_default_config
    from relreid_plugin.engine.runner import Run

    data = features(6)
    for key, value in (("test.rerank", True), ("test.normalize_feature", True), ("cuhk03.use_metric_cuhk03", True)):
        cfg = get_default_config()
        node, leaf = key.split(".")
        cfg[node][leaf] = value
        run = Run(cfg, stages=[])
        row = Evaluator("set", data, options=run.options(), parameters=0).baseline()
        result = run.score(data)
        assert (result.mAP, result.rank(1)) == (row.mAP, row.cmc["1"])
        plain = Evaluator("set", data, options=EvaluationOptions(), parameters=0).baseline()
        assert (plain.mAP, plain.cmc) != (row.mAP, row.cmc)


# --- a query's own file -------------------------------------------------------------------------------------------------


def scene(seed, queries=30, gallery=90, identities=8):
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, identities, n) for n in (queries, gallery)] + [
        rng.integers(0, 2, n) for n in (queries, gallery)
    ]
    q_files, g_files = np.arange(queries), 1000 + np.arange(gallery)
    for query in range(0, queries, 2):  # once or twice in the gallery, under its own identity or another one
        g_files[rng.choice(gallery, 1 + query % 3, replace=False)] = query
    return rng.permutation(queries * gallery).reshape(queries, gallery) // 3, *labels, q_files, g_files


def naive_files(distances, q, g, qc, gc, qf, gf):
    aps, firsts = [], []
    for row in range(len(q)):
        order = np.argsort(distances[row], kind="stable")
        order = order[~((g[order] == q[row]) & (gc[order] == qc[row])) & (gf[order] != qf[row])]
        ranks = np.flatnonzero(g[order] == q[row]) + 1
        aps.append(np.mean(np.arange(1, len(ranks) + 1) / ranks) if len(ranks) else np.nan)
        firsts.append(ranks[0] if len(ranks) else 0)
    return np.array(aps), np.array(firsts)


@pytest.mark.parametrize("seed", range(4))
def test_own_files_are_junk_whatever_their_labels(seed):
    distances, q, g, qc, gc, qf, gf = scene(seed)
    ap, first = naive_files(distances, q, g, qc, gc, qf, gf)
    result = evaluate_ranking(distances, q, g, qc, gc, query_files=qf, gallery_files=gf, max_rank=90)
    np.testing.assert_allclose(result.ap, ap, atol=1e-12)
    valid = first[first > 0]
    np.testing.assert_allclose(result.cmc, [(valid <= rank).mean() for rank in range(1, 91)], atol=1e-12)
    assert not np.allclose(result.ap, evaluate_ranking(distances, q, g, qc, gc).ap, equal_nan=True)
    np.testing.assert_array_equal(has_match(q, g, qc, gc, query_files=qf, gallery_files=gf), first > 0)
    for chunk in (1, 7):
        again = evaluate_ranking(distances, q, g, qc, gc, query_files=qf, gallery_files=gf, max_rank=90, chunk=chunk)
        np.testing.assert_array_equal(again.ap, result.ap)


def test_own_files_from_features_and_with_the_cuhk03_metric():
    _, q, g, qc, gc, qf, gf = scene(9)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 6, generator=generator), torch.randn(90, 6, generator=generator)
    files = {"query_files": qf, "gallery_files": gf}
    distances = torch.cdist(x.double(), y.double()).numpy()
    ap, _ = naive_files(distances, q, g, qc, gc, qf, gf)
    np.testing.assert_allclose(evaluate_features(x.double(), y.double(), q, g, qc, gc, **files).ap, ap, atol=1e-12)
    shot = evaluate_cuhk03(distances, q, g, qc, gc, **files, num_repeats=50)
    np.testing.assert_allclose(shot.ap, ap, atol=1e-12)
    # one own image at distance 0 under each other identity: only leaving it out of the draws gives the curve without it
    g2, qf2 = np.array([0, 1, 2, 3]), np.array([7])
    single = evaluate_cuhk03(
        np.array([[1.0, 0.0, 0.0, 0.0]]), [0], g2, [0], np.ones(4), query_files=qf2, gallery_files=np.array([1, 7, 7, 7])
    )
    assert single.cmc[0] == 1.0
    with pytest.raises(UserError, match="go together"):
        evaluate_ranking(distances, q, g, query_files=qf)
    with pytest.raises(UserError, match="query_files has shape"):
        evaluate_ranking(distances, q, g, query_files=qf[:2], gallery_files=gf)


def test_no_match_but_the_query_itself():
    with pytest.raises(UserError, match="no query has a match"):
        evaluate_ranking(np.zeros((1, 2)), [5], [5, 6], [0], [1, 1], query_files=[3], gallery_files=[3, 4])


def test_every_row_leaves_the_querys_own_file_out(tmp_path):
    """Through links and other spellings too; a file's features are those of its query, so it would be the first match."""
    data = features(7)
    query, gallery = data.query, data.gallery
    paths = {"q": [], "g": []}
    for name, part in (("q", query), ("g", gallery)):
        for number in range(len(part)):
            paths[name].append(str(tmp_path / f"{name}{number}.jpg"))
            (tmp_path / f"{name}{number}.jpg").write_bytes(b"x")
    own = np.zeros((len(query), len(gallery)), bool)
    values, pids, camids = gallery.features.clone(), gallery.pids.copy(), gallery.camids.copy()
    spellings = [paths["q"][0], f"{tmp_path}/./a/../{os.path.basename(paths['q'][1])}", "", ""]
    (tmp_path / "a").mkdir()
    for index, make in ((2, os.symlink), (3, os.link)):
        spellings[index] = str(tmp_path / f"link{index}.jpg")
        make(paths["q"][index], spellings[index])
    for index, spelling in enumerate(spellings):
        place = 5 * index
        paths["g"][place], own[index, place] = spelling, True
        values[place], pids[place], camids[place] = query.features[index], query.pids[index], query.camids[index] + 1
    data = TestFeatures(replace(query, paths=paths["q"]), Features(values, pids, camids, paths["g"]))
    rows, encoder = all_rows(data, OPTIONS), make_encoder()
    expected = [
        euclidean(*arrays(data)),
        euclidean(*expansion(data)),
        rerank(*map(unit, arrays(data))),
        *(euclidean(*refined(data, encoder, protocol)) for protocol in ("inductive", "transductive")),
    ]
    for row, distances in zip(rows, expected):
        assert_row(row, naive_scores(distances, data, own))
    scorer = Scorer(data, OPTIONS)
    same = (query.pids[:, None] == pids) & (query.camids[:, None] == camids)
    np.testing.assert_array_equal(scorer.junk(slice(None)), same | own)


# --- a finished run's table from its saved features ---------------------------------------------------------------------


def test_a_runs_table_is_that_of_its_saved_features(tiny_run):
    """Ranks by the encoder's own module, everything else anew: which features, which metric, which protocol."""
    from relreid_plugin.engine.runner import open_run

    run = open_run(tiny_run)
    name = run.cfg.data.targets[0]
    data, encoder = run.target_features(name), run.refiner()
    rows = {(row["protocol"], row["method"]): row for row in json.loads((tiny_run / "metrics.json").read_text())["rows"]}
    query, gallery = map(unit, arrays(data))
    aqe = run.cfg.test.aqe
    expanded = naive_expansion(query, gallery, aqe.k, aqe.alpha, own=False)
    augmented = naive_expansion(gallery, gallery, aqe.k, aqe.alpha, own=True)
    k = run.cfg.test.kreciprocal
    with torch.no_grad():
        both = encoder(torch.cat([data.query.features, data.gallery.features]))
        states = encoder.refine_gallery(data.gallery.features)
        alone = encoder.refine_queries(data.query.features, states), states.refined
    labels = (data.query.pids, data.gallery.pids, data.query.camids, data.gallery.camids)
    expanded, augmented = (torch.from_numpy(part).float() for part in (expanded, augmented))
    plain = data.query.features, data.gallery.features
    ranked = k_reciprocal_rerank_features(
        normalise(plain[0]), normalise(plain[1]), k1=k.k1, k2=k.k2, lambda_value=k.lambda_value
    )
    expected = {
        ("inductive", "image model"): evaluate_features(
            data.query.features, data.gallery.features, *labels, metric="cosine"
        ),
        ("inductive", "+ MagFormer"): evaluate_features(*alone, *labels, metric="cosine"),
        ("transductive", "+ k-reciprocal re-ranking"): evaluate_ranking(ranked, *labels),
        ("transductive", "+ MagFormer"): evaluate_features(both[: len(query)], both[len(query) :], *labels, metric="cosine"),
    }
    assert set(rows) == {*expected, ("inductive", "+ average query expansion")}
    for key, result in expected.items():
        row = rows[key]
        assert (row["mAP"], row["mINP"], row["cmc"]["1"]) == (result.mAP, result.mINP, result.rank(1)), key
        assert row["queries"] == result.num_valid_queries and row["metric"]
    # the expansion is computed in another order here, and the features of a barely trained model are nearly equal
    aqe_row = rows["inductive", "+ average query expansion"]
    assert aqe_row["mAP"] == pytest.approx(evaluate_features(expanded, augmented, *labels, metric="cosine").mAP, abs=0.03)


# --- search ---------------------------------------------------------------------------------------------------------------


def test_a_search_result_says_which_image_is_the_query_itself(tmp_path):
    from PIL import Image

    from relreid_plugin.search.gallery import SearchResult
    from relreid_plugin.search.report import draw_ranking, ranking_table, write_ranking

    for name in ("0007_c1_a.png", "0007_c2_b.png"):
        Image.new("RGB", (8, 16), (9, 9, 9)).save(tmp_path / name)
    os.link(tmp_path / "0007_c1_a.png", tmp_path / "0007_c3_c.png")
    queries = [str(tmp_path / "0007_c1_a.png")]
    paths = [[str(tmp_path / "0007_c3_c.png"), str(tmp_path / "0007_c2_b.png")]]
    numbers = np.array([[7, 7]])
    result = SearchResult(torch.tensor([[1.0, 0.9]]), torch.tensor([[0, 1]]), numbers, numbers * 0, paths)
    own, other = ranking_table(queries, result).splitlines()[1:]
    assert "the query itself" in own and "the query itself" not in other
    write_ranking(tmp_path / "ranking.json", queries, result, {})
    items = json.loads((tmp_path / "ranking.json").read_text())["queries"][0]["results"]
    assert [item["query_itself"] for item in items] == [True, False]
    draw_ranking(tmp_path / "ranking.png", queries, result)
    colours = set(Image.open(tmp_path / "ranking.png").convert("RGB").getdata())
    assert (150, 150, 150) in colours and (30, 140, 60) in colours  # grey for itself, green for the match
    # where only the query itself is found, nothing is green
    alone = replace(result, scores=result.scores[:, :1], rows=result.rows[:, :1], pids=numbers[:, :1], paths=[paths[0][:1]])
    draw_ranking(tmp_path / "alone.png", queries, alone)
    assert (30, 140, 60) not in set(Image.open(tmp_path / "alone.png").convert("RGB").getdata())


def test_gradcam_compares_a_query_with_other_files():
    from types import SimpleNamespace

    from relreid_plugin.rib.gradcam import identity_features

    gallery = Features(torch.eye(3), np.array([5, 5, 6]), np.zeros(3), ["/nowhere/a", "/nowhere/b", "/nowhere/c"])
    bare = torch.nn.Linear(3, 3)
    run = SimpleNamespace(bare=bare)
    wanted = identity_features(run, gallery, torch.ones(1, 3), np.array([5]), np.zeros(1), ["/nowhere/./a"])
    assert torch.equal(wanted, torch.eye(3)[1:2])


def test_the_parts_of_a_table():
    table = markdown(["a", "b", "c"], [["x", "1", "y"]], title="**t**", align="lrl")
    assert table == "**t**\n\n| a | b | c |\n|---|---:|---|\n| x | 1 | y |"
    assert markdown(["a", "b"], []) == "| a | b |\n|---|---:|"
    columns = score_columns({"1": 0, "10": 0, "20": 0})
    assert columns == ["mAP", "1", "10", "mINP"]
    mean, spread = {"mAP": 0.5, "1": 0.25, "10": 1.0, "mINP": 0.0}, {"mAP": 0.011, "1": 0.0, "10": 0.1, "mINP": 0.2}
    assert score_cells(mean, None, columns) == ["50.0", "25.0", "100.0", "0.0"]
    assert score_cells(mean, spread, columns) == ["50.0 ± 1.1", "25.0 ± 0.0", "100.0 ± 10.0", "0.0 ± 20.0"]
    assert mean_and_spread(0.12345, 0.5, digits=4) == "0.1235 ± 0.5000"
