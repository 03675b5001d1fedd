"""Runs side by side: seeds, pairs of queries, logs of other toolkits, rankings."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from reported import QUERIES, write_run

from relreid_plugin.cli.main import main
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.report.lists import query_lists
from relreid_plugin.report.paired import paired_lists
from relreid_plugin.report.scored import read_subject
from relreid_plugin.report.side_by_side import groups, tex


def test_runs_side_by_side(reported_runs, tmp_path, capsys):
    runs = [write_run(tmp_path / f"a{seed}", seed=seed, name="odd") for seed in (1, 2)]
    runs += [write_run(tmp_path / f"b{seed}", seed=seed, lr=0.5, noise=seed + 10, name="odd") for seed in (1, 2)]
    places = [str(run) for run in runs]
    assert [len(group) for group in groups([read_subject(run) for run in runs])] == [2, 2]
    printed = {}
    for form in ("text", "markdown", "latex", "csv"):
        assert main(["compare-runs", *places, "--form", form]) == 0
        printed[form] = capsys.readouterr().out
    lines = list(csv.DictReader(io.StringIO(printed["csv"])))
    own = [line for line in lines if line["method"] == "image model"]
    rows = [json.loads((run / "metrics.json").read_text())["rows"][0]["mAP"] for run in runs]
    for line, values in zip(own, (rows[:2], rows[2:])):
        assert line["seeds"] == "2" and float(line["mAP"]) == pytest.approx(np.mean(values))
        assert float(line["mAP_std"]) == pytest.approx(np.std(values, ddof=1))
    aps = [next(iter(read_subject(run).targets.values())).scored[0].result.ap for run in runs]
    gain = (aps[2] + aps[3]) / 2 - (aps[0] + aps[1]) / 2
    assert own[0]["difference"] == "" and float(own[1]["difference"]) == pytest.approx(gain.mean())
    assert (int(own[1]["won"]), int(own[1]["lost"])) == ((gain > 1e-9).sum(), (gain < -1e-9).sum())
    mean = f"{100 * np.mean(rows[:2]):.1f} ± {100 * np.std(rows[:2], ddof=1):.1f}"
    assert mean in printed["text"] and mean in printed["markdown"] and mean.replace("±", r"$\pm$") in printed["latex"]
    assert "a1 (× 2)" in printed["text"] and printed["latex"].count(r"\begin{tabular}") == 2


def test_other_queries_are_not_paired(reported_runs, tmp_path, capsys):
    run = write_run(tmp_path / "other", lr=0.3)
    for file in (run / "bank").glob("*-query.pt"):
        bank = torch.load(file, weights_only=True)
        ckpt.write_tensors(file, {**bank, "paths": [f"{path}x" for path in bank["paths"]]})
    assert main(["compare-runs", str(reported_runs[0]), str(run)]) == 0
    said = capsys.readouterr().out
    assert "has other queries of 'odd'" in said and " / " not in said.split("\n\n")[0].split("\n", 2)[2]


def test_latex_signs_are_written_out():
    assert tex("50% a_b & {x} $1 #2 \\") == r"50\% a\_b \& \{x\} \$1 \#2 \textbackslash{}"


TORCHREID = """Creating new gallery
##### Evaluating odd (source) #####
Computing CMC and mAP ...
** Results **
mAP: 11.1%
CMC curve
Rank-1  : 22.2%
Rank-5  : 33.3%
##### Evaluating odd (source) #####
Applying person re-ranking ...
** Results **
mAP: 40.5%
CMC curve
Rank-1  : 50.6%
Rank-5  : 60.7%
Rank-10 : 70.8%
Rank-20 : 80.9%
Elapsed 0:01:02
"""
FASTREID = """[07/31 15:11:05 fastreid.evaluation.evaluator]: Start inference on 19281 images
[07/31 15:11:05 fastreid.data.datasets.bases]: => Loaded Odd in csv format:
| subset   | # ids   | # images   | # cameras   |
|:---------|:--------|:-----------|:------------|
| query    | 750     | 3368       | 6           |
[07/31 15:11:05 fastreid.evaluation.testing]: Evaluation results in csv format:
\x1b[36m| Datasets   | Rank-1   | Rank-5   | Rank-10   | mAP   | mINP   | metric   |
|:-----------|:---------|:---------|:----------|:------|:-------|:---------|
| Odd        | 96.35    | 98.43    | 98.84     | 85.23 | 60.53  | 95.79    |\x1b[0m
"""


def table(capsys, *places, code=0):
    """Run compare-runs: its lines as dictionaries, or what it says."""
    assert main(["compare-runs", *map(str, places), "--form", "csv"]) == code
    said = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(said.out))) if code == 0 else said.err


def test_logs_of_other_toolkits_are_columns(reported_runs, tmp_path, capsys):
    first, second = tmp_path / "train.log", tmp_path / "log.txt"
    first.write_text(TORCHREID)
    second.write_text(FASTREID)
    lines = {(line["method"], line["protocol"]): line for line in table(capsys, reported_runs[0], first, second)}
    own = lines["torchreid's log + k-reciprocal re-ranking", "transductive"]
    assert [float(own[name]) for name in ("mAP", "1", "5", "10", "20")] == pytest.approx([0.405, 0.506, 0.607, 0.708, 0.809])
    own = lines["fast-reid's log", "inductive"]
    assert [float(own[name]) for name in ("mAP", "1", "10", "mINP")] == pytest.approx([0.8523, 0.9635, 0.9884, 0.6053])
    assert own["target"] == "odd" and own["runs"] == "log.txt" and own["difference"] == own["20"] == ""
    second.write_text(
        FASTREID.replace("Start inf", "Test with AQE setting\nTest with gpu real-time rerank setting\nStart inf", 1)
    )
    assert "fast-reid's log" in {line["method"] for line in table(capsys, second)}
    second.write_text(FASTREID.replace("Evaluation res", "Test with rerank setting\nEvaluation res"))
    assert table(capsys, second)[0]["method"] == "fast-reid's log + k-reciprocal re-ranking"


def test_logs_that_are_not_understood_are_one_sentence(reported_runs, tmp_path, capsys):
    log = tmp_path / "x.log"
    for text in ("nothing", TORCHREID.replace("mAP:", "map="), FASTREID.replace("Rank-1 ", "R1 ")):
        log.write_text(text)
        said = table(capsys, reported_runs[0], log, code=2)
        assert "no log that is understood" in said and len(said.splitlines()) == 1
    log.write_text(TORCHREID.replace("odd", "dukemtmcreid"))
    said = table(capsys, reported_runs[0], log, code=2)
    assert f"write 'odd={log}'" in said and "dukemtmcreid" in said
    assert [line["target"] for line in table(capsys, reported_runs[0], f"odd={log}")][-1] == "odd"
    log.write_text(TORCHREID + TORCHREID.replace("odd", "other"))
    assert "several test sets (odd, other)" in table(capsys, reported_runs[0], f"odd={log}", code=2)
    assert main(["compare-runs", str(log), "--report", str(tmp_path / "r.html")]) == 2
    assert "needs a run or features" in capsys.readouterr().err


def ranking_of(run, noise):
    """The ranking of a run's image model with noise on its distances, without what the protocol discards."""
    target = next(iter(read_subject(run).targets.values()))
    data, scorer = target.data, target.evaluator.scorer
    distances = scorer.distances(data.query.features, data.gallery.features, scorer.metric()).numpy()
    distances = distances + noise * np.random.default_rng(0).normal(size=distances.shape)
    junk = scorer.junk(slice(0, QUERIES))
    lists = {}
    for query, path in enumerate(data.query.paths):
        order = [item for item in np.argsort(distances[query], kind="stable") if not junk[query, item]]
        lists[path] = [data.gallery.paths[item] for item in order]
    return {"target": "Odd", "method": "mine", "rankings": lists}


def test_rankings_are_scored_and_paired_by_query(reported_runs, tmp_path, capsys):
    place = tmp_path / "ranking.json"
    place.write_text(json.dumps(ranking_of(reported_runs[0], 0.0)))
    own = table(capsys, reported_runs[0], place)
    first = next(line for line in own if line["method"] == "image model")
    mine = next(line for line in own if line["method"] == "mine")
    assert all(mine[name] == first[name] for name in ("mAP", "mINP", "1", "5", "10", "20"))
    assert (float(mine["difference"]), mine["won"], mine["lost"]) == (0.0, "0", "0")
    found = ranking_of(reported_runs[0], 1.0)
    place.write_text(json.dumps(found))
    mine = table(capsys, reported_runs[0], place)[-1]
    target = next(iter(read_subject(reported_runs[0]).targets.values()))
    pids = dict(zip(target.data.gallery.paths, target.data.gallery.pids))
    aps = []
    for query, own in enumerate(found["rankings"].values()):
        hits = [rank for rank, path in enumerate(own, 1) if pids[path] == target.data.query.pids[query]]
        aps.append(np.mean([(place + 1) / rank for place, rank in enumerate(hits)]))
    before = target.scored[0].result.ap
    assert float(mine["mAP"]) == pytest.approx(np.mean(aps)) and float(mine["mAP"]) < float(first["mAP"])
    assert float(mine["difference"]) == pytest.approx(np.mean(aps - before))
    assert (int(mine["won"]), int(mine["lost"])) == (sum(aps > before + 1e-9), sum(aps < before - 1e-9))
    names = {path.rsplit("/", 1)[-1]: [one.rsplit("/", 1)[-1] for one in own] for path, own in found["rankings"].items()}
    place.write_text(json.dumps({**found, "rankings": names}))
    assert table(capsys, reported_runs[0], place)[-1] == mine


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda found, first: found.pop("method"), "needs texts for 'target' and 'method'"),
        (lambda found, first: found.update(protocol="odd"), "'protocol' is 'odd'"),
        (lambda found, first: found["rankings"].pop(first), "has no list for 1 of 12 queries"),
        (lambda found, first: found["rankings"][first].pop(), "1 queries leave out gallery images that count"),
        (lambda found, first: found["rankings"][first].append("no.png"), "1 gallery images are not in the test set"),
        (lambda found, first: found["rankings"][first].append(found["rankings"][first][0]), "names an image twice"),
        (lambda found, first: found.update(rankings=[]), "'rankings', an object"),
    ],
)
def test_rankings_that_cannot_be_scored_are_refused(reported_runs, tmp_path, capsys, change, said):
    found = ranking_of(reported_runs[0], 0.0)
    change(found, next(iter(found["rankings"])))
    place = tmp_path / "ranking.json"
    place.write_text(json.dumps(found))
    error = table(capsys, reported_runs[0], place, code=2)
    assert said in error and len(error.splitlines()) == 1


def test_queries_won_and_lost_are_written_and_drawn(reported_runs, tmp_path, capsys):
    out, page = tmp_path / "won.csv", tmp_path / "both.html"
    words = [
        "compare-runs",
        str(reported_runs[0]),
        str(reported_runs[1]),
        "--queries",
        str(out),
        "--report",
        str(page),
        "--out",
        str(tmp_path / "t"),
    ]
    assert main(words) == 0
    targets = [next(iter(read_subject(run).targets.values())) for run in reported_runs[:2]]
    lines = [line for line in csv.DictReader(out.open()) if line["method"] == "image model"]
    assert len(lines) == QUERIES
    aps = [dict(zip(target.data.query.paths, target.scored[0].result.ap)) for target in targets]
    for line in lines:
        before, after = (own[line["query"]] for own in aps)
        assert (float(line["ap_first"]), float(line["ap"])) == (before, after)
        assert line["outcome"] == ("won" if after > before + 1e-9 else "lost" if after < before - 1e-9 else "same")
    gains = [float(line["gain"]) for line in lines]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0 > gains[-1]
    text = page.read_text(encoding="utf-8")
    assert 'id="p0"' in text and "Queries won and lost" in text and f">{sum(gain > 0 for gain in gains)}</td>" in text


def test_paired_lists_keep_every_list(reported_runs):
    lists = [query_lists(next(iter(read_subject(run).targets.values())), 5) for run in reported_runs[:2]]
    turned = {**lists[1], **{name: lists[1][name][::-1] for name in ("pid", "cam", "path", "matches", "thumb")}}
    turned |= {name: [way[::-1] for way in lists[1][name]] for name in ("ap", "rank", "index", "state", "distance")}
    without = {**lists[1], "path": [f"query {row}" for row in range(QUERIES)]}
    assert paired_lists(lists[0], without, ("a", "b"))["ap"][2] == lists[1]["ap"][0]
    both = paired_lists(lists[0], turned, ("a", "b"))
    names = [way["name"] for way in both["ways"]]
    last = max(n for n, way in enumerate(lists[0]["ways"]) if way["protocol"] == lists[0]["ways"][0]["protocol"])
    assert names == [
        f"a: {lists[0]['ways'][last]['name']}",
        "a: image model",
        "b: image model",
        names[0].replace("a:", "b:"),
    ]
    for number, (own, way) in enumerate(((lists[0], last), (lists[0], 0), (lists[1], 0), (lists[1], last))):
        for query in range(QUERIES):
            assert both["ap"][number][query] == own["ap"][way][query]
            shown = [both["gpath"][item] for item in both["index"][number][query] if item >= 0]
            assert shown == [own["gpath"][item] for item in own["index"][way][query] if item >= 0]
