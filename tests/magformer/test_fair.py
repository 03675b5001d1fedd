"""Fair tables: intervals, choices on held-out identities, rows and verdicts against loops."""

import numpy as np
import pytest
import torch

from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.engine.scoring import EvaluationOptions
from relreid_plugin.features.sets import Features, TestFeatures
from relreid_plugin.magformer.fair import (
    CONTROL,
    EXPANSION_K,
    IMAGE,
    Expansion,
    FairTable,
    bootstrap,
    choose_expansion,
    expand,
    fair_markdown,
    held_out_expansions,
    judge,
)
from relreid_plugin.metrics.ranking import evaluate_features


def made(identities=12, images=6, d=8, noise=0.9, seed=0):
    """A test set: every identity's first image is its query, under camera 0; the gallery is under cameras 1 and 2."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(identities, d))
    pids = np.repeat(np.arange(identities), images)
    x = torch.tensor(centres[pids] + noise * rng.normal(size=(len(pids), d)), dtype=torch.float32)
    first = np.arange(len(pids)) % images == 0
    camids = np.where(first, 0, 1 + np.arange(len(pids)) % 2)
    paths = [f"{row}.jpg" for row in range(len(pids))]

    def part(mask):
        rows = np.flatnonzero(mask)
        return Features(x[rows], pids[rows], camids[rows], [paths[row] for row in rows])

    return TestFeatures(part(first), part(~first))


def score(data, query, gallery):
    labels = (data.query.pids, data.gallery.pids, data.query.camids, data.gallery.camids)
    return evaluate_features(query, gallery, *labels, metric="cosine", max_rank=1)


def loop_ap(data, query, gallery, ties=0):
    """Average precision of every query, image by image; scores within 1e-5 of each other are ties.

    Args:
        ties: -1: matches come first, 1: last, 0: there are none.
    """
    query, gallery = (
        x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (query, gallery)
    )
    out = []
    for row, q in enumerate(query):
        matches = data.gallery.pids == data.query.pids[row]
        scores = (1 - gallery @ q).round(5 if ties else 12)
        order = sorted(range(len(gallery)), key=lambda column: (scores[column], ties * matches[column], column))
        kept = [
            column
            for column in order
            if not (
                data.gallery.pids[column] == data.query.pids[row] and data.gallery.camids[column] == data.query.camids[row]
            )
        ]
        hits = [place for place, column in enumerate(kept, 1) if data.gallery.pids[column] == data.query.pids[row]]
        out.append(np.mean([number / place for number, place in enumerate(hits, 1)]))
    return np.array(out)


@pytest.fixture
def options():
    return EvaluationOptions.of(get_default_config())


def table_of(data, options, gains, rivals=("aqe", "rerank"), held_out=()):
    """Image model, control and a rung that lies nearer to its identity's centre by a share of ``gains``."""
    table = FairTable("made", data, options, rivals=rivals)
    centre = {pid: data.gallery.features[data.gallery.pids == pid].mean(0) for pid in np.unique(data.gallery.pids)}

    def nearer(features, share):
        mean = torch.stack([centre[pid] for pid in features.pids])
        return features.features + share * (mean - features.features)

    for name, share in zip((IMAGE, CONTROL, "own"), gains):
        pair = nearer(data.query, share), nearer(data.gallery, share)
        table.add(name, name, *pair, parameters=7, held_out=held_out, metric=None if name == IMAGE else "cosine")
    return table


def test_bootstrap_is_that_of_a_loop_and_leaves_out_queries_without_a_match():
    rng = np.random.default_rng(3)
    first, second = rng.random(30), rng.random(30)
    first[4] = np.nan
    got = bootstrap(first, second, resamples=50, seed=5)
    gain = np.delete(first - second, 4)
    draws, means = np.random.default_rng(5), []
    for _ in range(50):
        picked = draws.integers(0, 29, 29)
        means.append(sum(gain[row] for row in picked) / 29)
    means.sort()
    assert got.mean == pytest.approx(gain.mean(), abs=1e-12)
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)


def test_a_difference_says_whether_it_may_be_none():
    ones = np.ones(20)
    assert bootstrap(ones, 0.9 * ones).certain
    noisy = np.tile([0.0, 1.0], 10)
    assert str(bootstrap(noisy, 1 - noisy)).endswith("n.s.")
    assert not str(bootstrap(ones, 0.9 * ones)).endswith("n.s.")


@pytest.mark.parametrize("alphas", [(0.0,), (1.0, 3.0)])
def test_the_expansion_is_the_best_of_all_on_held_out_identities(alphas):
    held = [made(noise=1.2, seed=seed) for seed in (4, 5)]
    got = choose_expansion(held_out_expansions(held), alphas=alphas)

    def mean(k, alpha):
        values = []
        for data in held:
            choice = Expansion(k, alpha)
            values.append(loop_ap(data, *expand(data.query.features, data.gallery.features, choice)).mean())
        return np.mean(values)

    every = {(k, alpha): mean(k, alpha) for alpha in alphas for k in EXPANSION_K}
    assert max(every, key=every.get) == (got.k, got.alpha)
    assert every[got.k, got.alpha] > mean(0, 0.0)


def test_no_expansion_is_chosen_where_it_only_harms():
    data = made(images=2, noise=0.3)
    assert choose_expansion(held_out_expansions([data]), alphas=(0.0,)).k == 0


def test_rows_are_those_of_a_loop(options):
    data = made()
    table = table_of(data, options, (0.0, 0.2, 0.5), held_out=[made(seed=9)])
    own = table.row("own")
    aqe = table.row(CONTROL, "aqe-held-out")
    assert {row.features for row in table.rows.values()} == {IMAGE, CONTROL, "own"}
    assert own.rival == "" and aqe.setting and aqe.method.startswith(CONTROL)
    centre = {pid: data.gallery.features[data.gallery.pids == pid].mean(0) for pid in range(12)}

    def nearer(part, share):
        return part.features + share * (torch.stack([centre[pid] for pid in part.pids]) - part.features)

    np.testing.assert_allclose(own.ap, loop_ap(data, nearer(data.query, 0.5), nearer(data.gallery, 0.5)), atol=1e-6)
    k = int(aqe.setting[0].removeprefix("k="))
    chosen = expand(nearer(data.query, 0.2), nearer(data.gallery, 0.2), Expansion(k))
    best, worst = (loop_ap(data, *chosen, ties=sign) for sign in (-1, 1))  # images with the same neighbours become the same
    assert (aqe.ap > worst - 1e-6).all() and (aqe.ap < best + 1e-6).all() and (best - worst).mean() < 0.05


def test_a_rung_is_judged_against_the_best_rows_of_image_model_and_control(options):
    data = made()
    table = table_of(data, options, (0.0, 0.2, 0.6), rivals=("aqe", "gnn", "rerank"))
    verdict = judge(table, "own")
    rows = [row for row in table.rows.values() if row.features in (IMAGE, CONTROL)]
    plain = [row for row in rows if row.protocol == "inductive" and row.rival in ("", "aqe")]
    best = max(plain, key=lambda row: row.mean("mAP"))
    again = max((row for row in rows if row not in plain and row.features == CONTROL), key=lambda row: row.mean("mAP"))
    assert {row.rival for row in rows if row not in plain} == {"gnn", "rerank"}
    own, control, image = table.row("own"), table.row(CONTROL), table.row(IMAGE)
    assert verdict.gain.mean == pytest.approx(own.mean("mAP") - control.mean("mAP"))
    assert verdict.inductive[0].mean == pytest.approx(own.mean("mAP") - best.mean("mAP"))
    assert verdict.inductive[1] == best.method and verdict.reranked[1] == again.method
    assert verdict.reranked[0].mean == pytest.approx(own.mean("mAP") - again.mean("mAP"))
    assert verdict.floor[0] == pytest.approx(own.mean("mAP") - max(image.mean("mAP"), control.mean("mAP")))
    assert verdict.harmless and "no harm" in verdict.lines()[-1]


def test_harm_is_said(options):
    table = table_of(made(), options, (0.5, 0.2, 0.0))
    verdict = judge(table, "own")
    assert not verdict.harmless and verdict.lines()[-1].endswith("HARM") and verdict.floor[0] < -0.003
    assert any(": no, " in line for line in verdict.lines())


def test_seeds_are_averaged_query_by_query(options):
    data = made()
    table = table_of(data, options, (0.0, 0.2, 0.6))
    first = table.row("own").ap
    table.add("own", "own", data.query.features, data.gallery.features, parameters=7)
    row = table.row("own")
    alone = loop_ap(data, data.query.features, data.gallery.features)
    np.testing.assert_allclose(row.ap, (first + alone) / 2, atol=1e-6)
    assert len(row.results) == 2
    about = row.as_dict([1])
    assert about["runs"] == 2 and about["std"]["mAP"] == pytest.approx(np.std(row.values("mAP"), ddof=1))


def test_the_table_has_a_line_per_row_with_its_difference_to_the_control(options):
    table = table_of(made(), options, (0.0, 0.2, 0.6))
    text = fair_markdown(table, ["own"])
    for row in table.rows.values():
        line = next(line for line in text.splitlines() if line.startswith(f"| {row.method} |"))
        assert f"{100 * row.mean('mAP'):.1f}" in line
        if row is not table.row(CONTROL):
            assert str(table.difference(row, table.row(CONTROL))) in line
    assert "own - control" in text
