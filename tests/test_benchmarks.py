"""The benchmarks: their references, how rows are judged, and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
sys.path.append(str(FOLDER))

import common  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
import information  # noqa: E402
import neighbours  # noqa: E402
import plain  # noqa: E402
import ranking  # noqa: E402
import relation  # noqa: E402
import targets  # noqa: E402
from harness import Gate, Line, Outcome, Row, Settings, failed, judge, memory, ratio  # noqa: E402
from pretended import Pretending, on_card  # noqa: E402

from relreid_plugin.metrics.neighbours import topk_neighbours  # noqa: E402
from relreid_plugin.metrics.ranking import evaluate_ranking  # noqa: E402
from relreid_plugin.metrics.reranking import k_reciprocal_rerank  # noqa: E402

QUICK = Settings(threads=1, repeats=1, quick=True)
ROWS = {row.name: row for row in targets.ROWS}
WORKS = {
    "NFormer / MagFormer eval, N=7,000",
    "NFormer / MagFormer eval, N=19,281",
    "NFormer / MagFormer training step, N=2,048",
    "encoder alone, N=1,000,000",
    "k-NN graph, 19,281",
    "k-NN graph, 1,000,000",
    "ranking",
    "k-reciprocal re-ranking",
    "IBB forward+backward, batch 64, C=751/1,041",
    "GraFT step, M=3",
    "features from images",
    "training epoch of stage 1",
    "first answer of a command",
    "one query",
    "1M gallery",
    "two processes against one",
}


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


# The command


@pytest.mark.slow
@pytest.mark.long
def test_command(tmp_path):
    out = tmp_path / "numbers.json"
    names = ["knn-19281", "ibb-751"]
    done = run(FOLDER / "targets.py", "--quick", "--threads", "1", "--json", str(out), "--rows", *names)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert (
        content["threads"] == 1
        and content["quick"] is True
        and content["machine"]["torch"] == torch.__version__.split("+")[0]
    )
    assert [row["name"] for row in content["rows"]] == names
    for row in content["rows"]:
        assert not row["failed"] and not row["problem"] and row["must"] and row["aim"]
        for line in row["lines"]:
            assert line["equal"] is True and line["reached"] == "-"
            assert line["ratio"] == pytest.approx(line["reference_s"] / line["seconds"])
    for name in names:
        assert ROWS[name].work in done.stderr
    head = next(line for line in done.stdout.splitlines() if line.startswith("work"))
    assert re.split(r"\s{2,}", head) == list(harness.HEAD)


def test_unknown_row(capsys):
    assert harness.main(targets.ROWS, "", ["--rows", "nformer-eval-7000", "rankin"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "row 'rankin' is unknown; did you mean 'ranking'?\n"


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--repeats", "0"], ["--json", "/nowhere/at/all.json"]])
def test_wrong_command_line(arguments, capsys):
    assert harness.main(targets.ROWS, "", arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_list_covers_the_targets(capsys):
    assert harness.main(targets.ROWS, "", ["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ROWS) and all(work in text for work in WORKS)
    assert {row.target for row in targets.ROWS} - {""} == WORKS


def test_rows_that_are_run():
    def names(rows):
        return {row.name for row in rows}

    default = names(harness._choose(targets.ROWS, None, million=False))
    assert "knn-million" not in default and "ibb-share" not in default and "encoder-million" in default
    million = {"knn-million", "online-million", "gallery-million"}
    assert not default & million
    assert names(harness._choose(targets.ROWS, None, million=True)) == default | million
    assert names(harness._choose(targets.ROWS, ["ibb-share"], million=False)) == {"ibb-share"}


def test_exit_code_of_a_missed_must(tmp_path):
    script = tmp_path / "rows.py"
    script.write_text(
        "import sys\n"
        "from harness import Line, Row, main, ratio\n"
        "def missed(settings):\n"
        "    return [Line('slow', 'fast', 1.0, 2.0, equal=True, values={'threads': settings.threads})]\n"
        "sys.exit(main([Row('missed', '', 'slow', missed, must=(ratio(4),))], ''))\n"
    )
    out = tmp_path / "out.json"
    done = run(script, "--json", str(out), "--threads", "3")
    assert done.returncode == 1
    [missed] = json.loads(out.read_text())["rows"]
    assert missed["lines"][0]["reached"] == "NO" and missed["lines"][0]["values"] == {"threads": 3}


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ValueError('what went wrong')", "ValueError: what went wrong"),
        ("import os\nos.kill(os.getpid(), 9)", "killed by signal 9"),
        ("", "no result"),
    ],
)
def test_row_that_breaks_down(tmp_path, monkeypatch, code, problem):
    script = tmp_path / "child.py"
    script.write_text(code)
    monkeypatch.setattr(sys, "argv", [str(script)])
    outcome = harness.run_apart(ROW, QUICK, lambda _: None)
    assert outcome.failed and outcome.problem == problem and failed([outcome], quick=True)
    assert f"work: FAILED: {problem}" in harness.report([outcome], QUICK)


def test_row_that_lacks_memory(tmp_path):
    out = tmp_path / "lines.json"
    row = Row("big", "", "big work", lambda _: [Line("big work")], needs=2.0**40)
    threads = str(torch.get_num_threads())  # a child sets them for its whole process, which is this one here
    assert harness.main([row], "", ["--child", "big", "--json", str(out), "--threads", threads]) == 0
    problem = json.loads(out.read_text())["problem"]
    assert problem.startswith("needs 1073741824.0 GiB, ")
    table = harness.report([Outcome(row, problem=problem)], QUICK)
    assert "not run" in table.splitlines()[2] and f"big work: not run: {problem}" in table


# Judging


ROW = Row("name", "", "work", lambda _: [], must=(ratio(4), memory(256)), aim=(ratio(10),))


@pytest.mark.parametrize(
    ("seconds", "mib", "equal", "want"),
    [
        (0.1, 10.0, True, "aim"),
        (0.2, 256.0, True, "must"),
        (0.25, 10.0, True, "must"),
        (0.26, 10.0, True, "NO"),
        (0.1, 257.0, True, "NO"),
        (0.1, 10.0, False, "NO"),
        (0.1, 10.0, None, "aim"),
    ],
)
def test_judging(seconds, mib, equal, want):
    line = Line("work", "reference", 1.0, seconds, 500.0, mib, 0.0, equal)
    assert judge(ROW, line, quick=False) == want
    assert failed([Outcome(ROW, [line])], quick=False) is (want == "NO")
    assert judge(ROW, line, quick=True) == ("NO" if equal is False else "-")
    line.variant = True
    assert judge(ROW, line, quick=False) == ("NO" if equal is False else "-")


@pytest.mark.parametrize(("seconds", "mib", "want"), [(0.4, 10.0, "kept"), (0.6, 10.0, "NO"), (0.4, 300.0, "NO")])
def test_what_was_reached_is_kept_beside_another_reference(seconds, mib, want):
    row = Row("name", "", "work", lambda _: [], must=(ratio(4),), aim=(ratio(2),), kept=(ratio(2), memory(256)))
    line = Line("work", "released", 1.0, seconds, 500.0, mib, 0.0, True, kept=True)
    assert judge(row, line, quick=False) == want
    cells = dict(zip(harness.HEAD, harness._cells(row, line, quick=False), strict=True))
    assert (cells["must"], cells["aim"], cells["memory must"], cells["reached"]) == ("2x", "-", "256", want)
    line.kept = False
    assert judge(row, line, quick=False) == "NO"


def test_judging_without_a_reference():
    line = Line("work", "cannot run", seconds=1.0, mib=10.0)
    assert judge(ROW, line, quick=False) == "?" and not failed([Outcome(ROW, [line])], quick=False)
    line.mib = 300.0
    assert judge(ROW, line, quick=False) == "NO"
    assert failed([Outcome(ROW, problem="killed", failed=True)], quick=True)
    assert not failed([Outcome(ROW, problem="needs 900 GiB")], quick=False)


def test_gates_on_further_numbers():
    line = Line("work", values={"share": 0.8})
    assert Gate("share", 0.8).passed(line) is True and Gate("share", 0.81).passed(line) is False
    assert Gate("share", 0.8, at_most=True).passed(line) is True and Gate("other", 1.0).passed(line) is None


# Measuring


def test_forms_take_turns():
    calls = []
    timed = common.alternate({name: lambda name=name: calls.append(name) or name for name in "ab"}, 3)
    turn = list("a" * common.TURN_CALLS + "b" * common.TURN_CALLS)
    assert calls[: 2 * len(turn)] == 2 * turn and len(calls) == 2 * len(timed["a"].times) + 2
    assert timed["a"].result == "a" and timed["a"].seconds == np.median(timed["a"].times)
    calls.clear()
    common.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, 1)
    assert calls == list("abab")  # one timed turn, one that is watched
    calls.clear()
    timed = common.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, 3, once={"b"})
    assert calls.count("b") == 1 and calls.index("b") == common.TURN_CALLS and len(timed["b"].times) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_counts_neither_inputs_nor_result():
    held = torch.ones(1 << 23)

    def work():
        scratch = held + 1
        return {"result": (scratch * 2).add_(scratch)}

    mib = common.alternate({"work": work}, 1)["work"].mib
    assert 24 < mib < 48  # 32 MiB of scratch; as much again is the result


def test_bfloat16_is_a_variant():
    first, second, third = ROWS["nformer-eval-7000"].measure(QUICK)
    for line in (first, second):
        assert not line.variant and line.difference < 1e-5 and line.values["difference64"] < 1e-9
    assert first.reference.startswith("best plain") and not first.kept
    assert second.reference.startswith("dense released") and second.kept
    assert third.variant and third.difference > 1e-4 and 0.999 < third.values["cosine"] < 1 - 1e-9


def test_features():
    x = common.features(300, dim=64)
    assert torch.allclose(x.norm(dim=1), torch.ones(300), atol=1e-5)
    owner = torch.arange(300) % common.identities(300)
    nearest = (x @ x.t()).fill_diagonal_(-1).argmax(dim=1)
    assert (owner[nearest] == owner).float().mean() > 0.95
    assert torch.equal(x, common.features(300, dim=64))


# References


@pytest.mark.parametrize("attention", ["nformer", "magformer"])
@pytest.mark.parametrize("training", [False, True])
def test_dense_forms(attention, training):
    assert relation.gap64(attention, training=training, size=60, dim=32) < 1e-9


def test_a_way_that_is_wrong_is_seen(monkeypatch):
    def shifted(queries, keys, values, mask, share):
        return plain.by_products(queries, keys, values, mask, share) + 1e-6

    monkeypatch.setitem(plain.WAYS, "shifted", shifted)
    assert relation.gap64("nformer", training=False, size=60, dim=32) > 1e-8


def test_the_fastest_way_is_judged(monkeypatch):
    def slow(*given):
        time.sleep(0.05)
        return plain.by_products(*given)

    monkeypatch.setattr(plain, "WAYS", {"slow": slow, "products": plain.by_products})
    monkeypatch.setattr(relation, "WAYS", plain.WAYS)
    assert relation.fastest_way("magformer", 60, training=False, repeats=1) == "products"


def test_a_reference_that_does_not_fit_judges_nothing(monkeypatch):
    monkeypatch.setattr(relation, "dense_need", lambda *_: 1e9)
    lines = relation.compare("nformer", 60, 60, training=False, settings=QUICK)
    released = next(line for line in lines if line.reference.startswith("dense released form: needs"))
    assert released.variant and released.ratio is None and judge(ROWS["nformer-eval-19281"], released, quick=False) == "-"


def test_dense_form_drops_edges_that_are_not_reciprocal():
    problem = relation.Problem("nformer", 60, training=False, dtype=torch.float64, dim=32)
    assert not bool(problem.graph().mask.all())
    before = problem.reference()["features"]
    graph = problem.graph()
    graph.mask[:] = True
    with torch.no_grad():
        everything = problem.encoder.encode(problem.x, graph=graph)
    assert float((before - everything).abs().max()) > 1e-4


def test_memory_of_the_dense_form():
    gib = {name: relation.dense_need(name, 19281) / 1024 for name in ("nformer", "magformer")}
    assert 8 < gib["nformer"] < 9.5 and 27 < gib["magformer"] < 30  # 8.5 were measured, 29 extrapolated from smaller ones


def test_gap_sees_a_wrong_or_missing_gradient():
    problem = relation.Problem("magformer", 40, training=True, dtype=torch.float64, dim=32)
    ours, reference = problem.ours(), problem.reference()
    assert len(reference) > 40 and relation.gap(ours, reference, each=True) < 1e-9
    name = "blocks.0.attn.lambda_q1"
    reference[name] = reference[name] * 1.001
    assert relation.gap(ours, reference, each=True) > 1e-4
    del reference[name]
    assert relation.gap(ours, reference) == float("inf")


def test_known_graph():
    graph = relation.known_graph(205)
    assert bool(graph.mask[torch.arange(205)][graph.index == torch.arange(205).unsqueeze(1)].any())
    mates = (graph.index // 10 == torch.arange(205).unsqueeze(1) // 10) & graph.mask
    assert bool((mates.sum(dim=1)[:200] == 10).all())
    assert 13 < float(graph.mask[:200].sum(dim=1).float().mean()) < 16


def test_operations_of_the_encoder():
    encoder = relation.RelationEncoder(64, 3, attention="nformer", num_layers=2)
    assert relation.encoder_operations(encoder, 100) == 100 * 2 * (2 * (2 * 64 * 64) + 2 * (2 * 64 * 256) + 2 * 64 * 20)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return ranking.compiled_library(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_references(library, ties):
    query, gallery, labels = ranking.scene(40, 260, noise=4.0)
    distances = torch.cdist(query, gallery).numpy()
    if ties:
        distances = np.round(distances, 1) - np.float32(1)  # also below zero
    ours = evaluate_ranking(distances, *labels)
    assert 0 < ours.mAP < 1

    forms = [ranking.rank(distances, labels, ranking.stable_order, ranking.vector_walk)]
    if library is not None:
        walk = ranking.compiled_walk(library)
        forms += [
            ranking.rank(distances, labels, order, walk, threads=threads)
            for order in (ranking.stable_order, ranking.compiled_order(library))
            for threads in (1, 3)
        ]
    for scores in forms:
        assert scores.gap(ours) < 1e-9 and scores.mINP is not None
    assert ranking.Scores(ours.mAP, None, ours.cmc + 0.1).gap(ours) == pytest.approx(0.1)


def test_ranking_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(ranking.shutil, "which", lambda _: None)
    monkeypatch.setattr(ranking, "host_compiled", lambda: None)
    query, gallery, labels = ranking.scene(20, 130, noise=4.0)
    distances = torch.cdist(query, gallery).numpy()
    [(name, form)] = ranking.references(tmp_path, distances, labels, 2).items()
    assert name.startswith("no compiler") and form(distances, labels).gap(evaluate_ranking(distances, *labels)) < 1e-9


def test_what_is_kept_is_beside_the_fastest_released_ranking(monkeypatch, tmp_path):
    query, gallery, labels = ranking.scene(20, 130, noise=4.0)
    distances = torch.cdist(query, gallery).numpy()
    wanted = evaluate_ranking(distances, *labels)
    monkeypatch.setattr(ranking, "host_compiled", lambda: lambda *_: wanted)
    for seconds, best in ((0.01, "torchreid, compiled"), (0.05, "numpy's argsort, compiled walk")):
        taken = {"torchreid, compiled": seconds, "numpy's argsort, compiled walk": 0.02}

        def timed(forms, _, taken=taken):
            assert all(form() is not None for form in forms.values())  # every form works on the queries that are timed
            return {name: SimpleNamespace(seconds=taken[name]) for name in forms}

        monkeypatch.setattr(ranking, "alternate", timed)
        names = list(ranking.references(tmp_path, distances, labels, 2))
        compiled = ranking.compiled_library(tmp_path) is not None
        assert names == (["counting sort in C, 2 threads", best] if compiled else ["torchreid, compiled"])


def test_reranking_reference():
    rerank = pytest.importorskip("torchreid.reid.utils.rerank")
    query, gallery, _ = ranking.scene(30, 170, noise=1.5)
    matrices = [torch.cdist(x, y).numpy() for x, y in ((query, gallery), (query, query), (gallery, gallery))]
    assert np.abs(k_reciprocal_rerank(*matrices) - rerank.re_ranking(*matrices)).max() < 1e-5
    matrices = [np.round(one, 1) for one in matrices]  # equal distances, which a sort that is not stable moves
    stable = ranking.by_stable_sort(lambda: rerank.re_ranking(*matrices))
    assert np.abs(k_reciprocal_rerank(*matrices) - stable).max() < 1e-5 and rerank.np is np


def test_dense_lists():
    x = common.features(300, dim=64).double()
    ours = topk_neighbours(x, x, 20)
    assert neighbours.disagreement(x, ours, neighbours.dense_lists(x, 20)) == (0.0, 0.0)
    wrong = ours.clone()
    wrong[7] = torch.arange(280, 300)
    share, apart = neighbours.disagreement(x, ours, wrong)
    assert share == pytest.approx(1 / 300) and apart > 0.1
    assert neighbours.recall(ours, ours) == 1.0 and neighbours.recall(ours, wrong) < 1.0


def test_information_reference():
    assert information.gap64(batch=4, classes=12) < 1e-9


def test_separate_passes():
    graft = pytest.importorskip("graft")
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    problem = graft.Problem("deit_small_distilled_patch16_224", size=(32, 32), triplets=8, **small)
    for module in (problem.model, problem.given, problem.mined):
        module.double()
    problem.images = problem.images.double()
    ours, reference = problem.stacked(), problem.separate()
    assert max(common.largest(ours[name], reference[name]) for name in ours) < 1e-9
    assert problem.passes_per_triplet() == (9.0, 3.0)


@pytest.mark.parametrize(
    "name", ["magformer-step-2048", "encoder-million", "knn-19281", "ranking-features", "ibb-1041", "features-vit"]
)
def test_rows_at_small_sizes(name):
    lines = ROWS[name].measure(QUICK)
    assert lines and all(line.equal is not False and line.seconds > 0 and line.mib is not None for line in lines)
    assert not failed([Outcome(ROWS[name], lines)], quick=True)
    keys = {gate.key for gates in ROWS[name].gates(lines[0]) for gate in gates}
    assert all(lines[0].value(key) is not None for key in keys)


# The table of a GPU


@pytest.fixture
def card(monkeypatch):
    """A card that is only pretended: its times are the processor's, its placement of tensors is a card's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(gpu, "_wait", lambda device: None)
    monkeypatch.setattr(gpu, "_memory", lambda device, reset=False: 0 if reset else 2**20)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: on_card(module))
    with Pretending():
        yield gpu.Card(torch.device("cuda", 0), "pretended", 1e9, {"float32": 1e12, "bfloat16": 4e12}, quick=True, repeats=1)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", gpu.ROWS)
def test_rows_of_the_gpu_table(card, name):
    results = gpu.ROWS[name](card)
    assert results and all(result.seconds > 0 and result.mib == 1 for result in results)
    for result in results:
        assert result.equal is (None if result.work.startswith("GNN") else True), result
        rate, share = result.shares(card)
        assert share > 0 and (rate is None) == result.work.startswith("reciprocal graph")
    said = gpu.report(card, results)
    assert "of matrix rate" in said and all(result.work in said for result in results)


def test_the_rates_of_a_device():
    found = gpu.measure_card(torch.device("cpu"), quick=True, repeats=1)
    assert found.bandwidth > 0 and set(found.rates) == {"float32", "bfloat16"} and min(found.rates.values()) > 0


def test_dense_k_reciprocal_is_the_released_one():
    query, gallery, _ = ranking.scene(30, 170, noise=1.5)
    ours = k_reciprocal_rerank(torch.cdist(query, gallery), torch.cdist(query, query), torch.cdist(gallery, gallery))
    assert np.abs(gpu.dense_k_reciprocal(query, gallery).numpy() - ours).max() < 1e-4


def test_shares_and_verdicts_of_the_gpu_table():
    card = gpu.Card(torch.device("cpu"), "card", 1e9, {"float32": 1e12, "bfloat16": 4e12})
    result = gpu.Result("work", "dense", 0.5, 1.0, 10.0, 40.0, operations=1e11, bytes=1e8, kind="bfloat16")
    assert result.shares(card) == (pytest.approx(0.05), pytest.approx(0.2))
    gpu.judge(result, 2e-4, 1e-4)
    assert result.equal is False
    cells = ["work", "dense", "1e+03", "500", "2x", "40", "10", "2.0e-04", "NO", "5.0 %", "20.0 %"]
    assert result.cells(card) == cells


def test_without_a_card_the_gpu_table_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"error: {gpu.NO_CARD}\n"
    assert gpu.main(["--rows", "encodr"]) == 2 and "did you mean 'encoder'" in capsys.readouterr().err
