"""Same or not: rates, intervals, calibration and open-set search against loops in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from relreid_plugin.errors import UserError
from relreid_plugin.features import Features
from relreid_plugin.features.verifier import Verifier
from relreid_plugin.metrics import verification
from relreid_plugin.metrics.verification import cosine_scores, open_set, verify


def scene(identities=9, images=5, dim=6, noise=1.1, seed=0, first=0):
    draw = np.random.default_rng(seed)
    pids = np.repeat(np.arange(identities), images)
    rows = draw.normal(size=(identities, dim))[pids] + noise * draw.normal(size=(len(pids), dim))
    return Features.of(rows, pids + first, np.tile(np.arange(images) % 3, identities))


def matrix_scores(matrix):
    return lambda rows: torch.from_numpy(matrix[rows])


def naive_pairs(matrix, query, gallery, junk):
    positive, negative = [], []
    for row, pid in enumerate(query):
        for column, other in enumerate(gallery):
            if not junk[row, column]:
                (positive if pid == other else negative).append((float(matrix[row, column]), int(pid)))
    return positive, negative


def naive_rates(positive, negative, rate):
    """EER and the best TPR at a false-match rate, by trying every score as a threshold."""
    best, eer = 0.0, 1.0
    for threshold in {score for score, _ in [*positive, *negative]} | {np.inf}:
        tpr = sum(score >= threshold for score, _ in positive) / len(positive)
        fpr = sum(score >= threshold for score, _ in negative) / len(negative)
        eer = min(eer, max(fpr, 1 - tpr))
        if fpr <= rate:
            best = max(best, tpr)
    return eer, best


@pytest.mark.parametrize("rounded", [False, True])
def test_rates_are_those_of_all_thresholds(rounded, monkeypatch):
    monkeypatch.setattr(verification, "_BLOCK_VALUES", 64)  # several blocks
    draw = np.random.default_rng(1)
    query, gallery = draw.integers(0, 5, 17), draw.integers(0, 6, 23)
    matrix = (draw.normal(size=(17, 23)) + (query[:, None] == gallery[None])).astype(np.float32)
    if rounded:
        matrix = matrix.round(1)  # many ties
    junk = draw.random((17, 23)) < 0.1
    found = verify(matrix_scores(matrix), query, gallery, junk=lambda rows: junk[rows], rates=(0.3, 0.05, 0.001))
    positive, negative = naive_pairs(matrix, query, gallery, junk)
    assert (found.positives, found.negatives) == (len(positive), len(negative))
    for rate, value in found.at.items():
        eer, best = naive_rates(positive, negative, rate)
        assert value.value == pytest.approx(best, abs=1e-12) and found.eer.value == pytest.approx(eer, abs=1e-12)
        threshold, fpr, tpr = found.threshold(rate)
        assert fpr <= rate and tpr == value.value
        assert fpr == pytest.approx(np.mean([score >= threshold for score, _ in negative]), abs=1e-12)
    assert found.threshold(0.0)[1] == 0.0


def test_intervals_are_those_of_identities_drawn_again():
    draw = np.random.default_rng(2)
    query, gallery = np.repeat(np.arange(6), 2), np.repeat(np.arange(6), 3)
    matrix = (draw.normal(size=(12, 18)) + 1.5 * (query[:, None] == gallery[None])).astype(np.float32)
    found = verify(matrix_scores(matrix), query, gallery, rates=(0.1,), repeats=40, seed=3)
    positive, negative = naive_pairs(matrix, query, gallery, np.zeros_like(matrix, bool))
    weights = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=40)
    eers, rates = [], []
    for drawn in weights:
        times = [[pair for pair in part for _ in range(drawn[pair[1]])] for part in (positive, negative)]
        eer, best = naive_rates(*times, 0.1)
        eers.append(eer)
        rates.append(best)
    for value, draws in ((found.eer, eers), (found.at[0.1], rates)):
        assert [value.low, value.high] == pytest.approx(np.percentile(draws, [2.5, 97.5]).tolist(), abs=1e-12)


def test_a_coarse_grid_keeps_the_rates_and_widens_no_interval(monkeypatch):
    data = scene(12, 6)
    unit = torch.nn.functional.normalize(data.features, dim=1)
    arguments = cosine_scores(unit, unit), data.pids, data.pids
    fine = verify(*arguments, repeats=200)
    monkeypatch.setattr(verification, "GRID", 60)
    coarse = verify(*arguments, repeats=200)
    assert coarse.eer.value == fine.eer.value and coarse.at[1e-2].value == fine.at[1e-2].value
    assert coarse.eer.low == pytest.approx(fine.eer.low, abs=0.03) and coarse.eer.high == pytest.approx(
        fine.eer.high, abs=0.03
    )


def test_what_cannot_be_verified_is_refused():
    for query, gallery, word in (([1, 2], [3, 4], "one identity"), ([1, 1], [1, 1], "two identities")):
        with pytest.raises(UserError, match=word):
            verify(matrix_scores(np.eye(2, dtype=np.float32)), np.array(query), np.array(gallery))
    with pytest.raises(UserError, match="NaN"):
        verify(matrix_scores(np.full((2, 2), np.nan, np.float32)), np.array([1, 2]), np.array([1, 2]))


# --- open-set search --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [1, 3])
def test_open_set_rates_are_those_of_a_loop(rank, monkeypatch):
    monkeypatch.setattr(verification, "_BLOCK_VALUES", 50)
    draw = np.random.default_rng(4)
    query, gallery = draw.integers(0, 10, 40), draw.integers(0, 6, 21)
    matrix = (draw.normal(size=(40, 21)) + 1.5 * (query[:, None] == gallery[None])).astype(np.float32).round(1)
    junk = draw.random((40, 21)) < 0.1
    found = open_set(matrix_scores(matrix), query, gallery, junk=lambda rows: junk[rows], rank=rank, rates=(0.3, 0.1, 0.0))
    strangers, mated = [], []
    for row, pid in enumerate(query):
        order = sorted((-float(matrix[row, c]), c) for c in range(21) if not junk[row, c])
        own = [(place, -score) for place, (score, c) in enumerate(order) if gallery[c] == pid]
        if own:
            mated.append(own[0])
        else:
            strangers.append(-order[0][0])
    assert (found.mated, found.strangers) == (len(mated), len(strangers))
    for rate, (threshold, alarm, hit) in found.at.items():
        assert alarm == np.mean([score >= threshold for score in strangers]) <= rate
        assert hit == np.mean([place < rank and score >= threshold for place, score in mated])
        lower = [t for t in {score for _, score in mated} if np.mean([s >= t for s in strangers]) <= rate]
        best = max((np.mean([place < rank and s >= t for place, s in mated]) for t in lower), default=0.0)
        assert hit == best  # no threshold does better at that rate
    with pytest.raises(UserError, match="40 and 0|and others"):
        open_set(matrix_scores(matrix), query % 6, np.arange(21) % 6)


# --- the verifier -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["isotonic", "logistic"])
def test_a_verifier_is_calibrated_and_kept(method, tmp_path):
    pytest.importorskip("sklearn")
    data = scene(30, 6)
    made = Verifier.fit(data, data, method=method, false_match_rate=0.02, model="m")
    unit = data.features.double().numpy() / np.linalg.norm(data.features.double().numpy(), axis=1, keepdims=True)
    positive, negative = [], []
    for a in range(len(data)):
        for b in range(len(data)):
            if data.pids[a] == data.pids[b]:
                if data.camids[a] != data.camids[b]:
                    positive.append(unit[a] @ unit[b])
            else:
                negative.append(unit[a] @ unit[b])
    positive, negative = np.array(positive), np.array(negative)
    assert made.pairs == [len(positive), len(negative)] and made.identities == 30 and made.dim == 6
    assert (
        made.false_match_rate == pytest.approx((negative >= made.threshold - 1e-6).mean(), abs=2e-4)
        and made.false_match_rate <= 0.02
    )
    assert made.true_match_rate == pytest.approx((positive >= made.threshold - 1e-6).mean(), abs=1e-3)
    grid = np.linspace(-1, 1, 101)
    probability = made.probability(grid)
    assert (np.diff(probability) >= 0).all() and probability[0] < 0.1 and probability[-1] > 0.9
    # among pairs drawn alike from both kinds, those of a probability p are of one identity in a share of p
    scores = np.concatenate([positive, negative])
    weights = np.concatenate([np.full(len(positive), 1 / len(positive)), np.full(len(negative), 1 / len(negative))])
    said, one = made.probability(scores), np.repeat([1.0, 0.0], [len(positive), len(negative)])
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = (said >= low) & (said < low + 0.25)
        mean, share = (np.average(values[chosen], weights=weights[chosen]) for values in (said, one))
        assert mean == pytest.approx(share, abs=0.02 if method == "isotonic" else 0.12)
    odds = probability[50] / (1 - probability[50])
    other = made.probability(grid, prior=0.1)[50]
    assert other / (1 - other) == pytest.approx(odds / 9)
    made.save(tmp_path / "v.json")
    again = Verifier.load(tmp_path / "v.json", model="m")
    assert again == made and np.array_equal(again.probability(grid), probability)
    assert made.scores(data.features[:3], data.features[3:6]) == pytest.approx((unit[:3] * unit[3:6]).sum(1), abs=1e-6)
    assert made.same([made.threshold, made.threshold - 1e-3]).tolist() == [True, False]
    assert "false-match rate" in made.sentence()


def test_what_is_no_verifier_is_refused(tmp_path):
    pytest.importorskip("sklearn")
    data = scene()
    made = Verifier.fit(data, data, model="m")
    made.save(tmp_path / "v.json")
    content = json.loads((tmp_path / "v.json").read_text())
    (tmp_path / "short.json").write_text(json.dumps({k: v for k, v in content.items() if k != "threshold"}))
    (tmp_path / "nan.json").write_text(json.dumps({**content, "threshold": float("nan")}))
    (tmp_path / "old.json").write_text(json.dumps({**content, "format": 0}))
    for name, options, word in (
        ("missing.json", {}, "no verifier"),
        ("short.json", {}, "damaged"),
        ("nan.json", {}, "damaged"),
        ("old.json", {}, "this version"),
        ("v.json", {"model": "other"}, "another model"),
    ):
        with pytest.raises(UserError, match=word):
            Verifier.load(tmp_path / name, **options)
    for call, word in (
        (lambda: Verifier.fit(data, data, method="isotone"), "did you mean 'isotonic'"),
        (lambda: Verifier.fit(data, data, false_match_rate=1.5), "between 0 and 1"),
        (lambda: Verifier.fit(Features.of(np.eye(3)), Features.of(np.eye(3))), "unknown"),
        (lambda: made.scores(np.eye(3), np.eye(3)), "width 6"),
        (lambda: made.probability([0.1], prior=1.0), "prior"),
    ):
        with pytest.raises(UserError, match=word):
            call()
