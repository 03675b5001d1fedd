"""Reports and runs side by side: numbers, escapes, limits, and nothing that points out of the page."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from relreid_plugin.cli.main import main
from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.attended import NOBODY, OWN
from relreid_plugin.engine.evaluator import Evaluator
from relreid_plugin.engine.scoring import EvaluationOptions
from relreid_plugin.features.banks import bank_features
from relreid_plugin.features.sets import TestFeatures
from relreid_plugin.magformer.attended import query_attention
from relreid_plugin.magformer.loading import encoder_of_run
from relreid_plugin.metrics.bootstrap import interval
from relreid_plugin.report import measures
from relreid_plugin.report.lists import query_lists
from relreid_plugin.report.scored import read_subject
from relreid_plugin.report.side_by_side import groups, tex

HOSTILE = "<script>alert('x')</script> & \"_q_\" </script>"
QUERIES, GALLERY, WIDTH = 12, 40, 8


def features_of(seed: int, folder):
    """Query and gallery as a run keeps them: three cameras, six identities, pictures for the half of them."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(6, WIDTH))
    out = {}
    for name, count, shift in (("query", QUERIES, 0), ("gallery", GALLERY, 1)):
        pids = np.arange(count) % 6
        cameras = (np.arange(count) // 6 + shift) % 3
        values = centres[pids] + 1.2 * rng.normal(size=(count, WIDTH))
        paths = [str(folder / f"{name}{row}.png") for row in range(count)]
        out[name] = {
            "key": "k",
            "features": torch.tensor(values, dtype=torch.float32),
            "pids": torch.from_numpy(pids),
            "camids": torch.from_numpy(cameras),
            "paths": paths,
            "identity_names": {3: HOSTILE},
        }
    return out


def write_run(folder, *, seed=1, lr=0.01, name="odd", noise=None, verification=False):
    """A finished run of an image model, as the engine writes it, with rivals and training records."""
    pictures = folder.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    sides = features_of(seed if noise is None else noise, pictures)
    for side in sides.values():
        for row, path in enumerate(side["paths"]):
            if row % 2 == 0:
                noise_of = np.random.default_rng(row).integers(0, 255, (96, 48, 3), np.uint8)
                Image.fromarray(noise_of).save(path)
    cfg = get_default_config()
    cfg.data.sources, cfg.data.targets, cfg.train.seed, cfg.train.lr = ["market1501"], [name], seed, lr
    cfg.data.save_dir, cfg.test.dist_metric = str(folder), "cosine"
    cfg.test.rivals, cfg.test.verification = ["aqe", "rerank"], verification
    ckpt.write_text(folder / "config.yml", cfg.dump())
    data = TestFeatures(bank_features(sides["query"]), bank_features(sides["gallery"]))
    evaluator = Evaluator(name, data, options=EvaluationOptions.of(cfg), parameters=1234)
    rows = [evaluator.baseline(), *evaluator.rivals()]
    for split, value in sides.items():
        ckpt.write_tensors(folder / "bank" / f"{name}-{split}.pt", value)
    history = {"stage1": [{"epoch": n, "lr": 0.1, "loss": 2.0 / n, "val_mAP": 0.3 + n / 10} for n in (1, 2, 3)]}
    metrics = {"rows": [row.as_dict() for row in rows], "history": history, "selected_epoch": {"stage1": 3}}
    ckpt.write_json(folder / "metrics.json", {**metrics, "notes": [f"a note {HOSTILE}"]})
    ckpt.write_json(folder / "environment.json", {"python": "3.11", "packages": {"torch": HOSTILE}})
    return folder


class Page(HTMLParser):
    """What a browser would read: cells by row, attributes, text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.cells, self.links, self.tags, self.scripts, self._open = {}, [], [], [], [], []
        self._row = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        own = dict(attrs)
        self.tags.append((tag, own))
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
        if tag == "tr":
            self._row = (own.get("data-target"), own.get("data-protocol"), own.get("data-method"))
        if "data-metric" in own:
            self._cell = (own, [])
            self.cells.append(self._cell)
            if tag == "td":
                self.rows.setdefault(self._row, {})[own["data-metric"]] = self._cell
        self._open.append(tag)

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self.cells:
            self.cells[-1][1].append(data)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._open.pop()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs that differ in a key, and their report."""
    place = tmp_path_factory.mktemp("report")
    first, second = write_run(place / "first", verification=True), write_run(place / "second", lr=0.02, noise=5)
    out = place / "report.html"
    assert main(["report", str(first), str(second), "--out", str(out)]) == 0
    return first, second, out


def test_every_number_is_that_of_the_metrics(made):
    first, second, out = made
    page = Page(out.read_text(encoding="utf-8"))
    shown = [own for own, _ in page.cells]
    assert len(shown) > 30
    text = out.read_text(encoding="utf-8")
    for number, folder in enumerate((first, second)):
        view = Page(text.split(f'id="v{number}"')[1].split("</section>")[0])
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        assert set(view.rows) >= {(row["target"], row["protocol"], row["method"]) for row in rows}
        for row in rows:
            cells = view.rows[(row["target"], row["protocol"], row["method"])]
            wanted = {"mAP": row["mAP"], "mINP": row["mINP"], **row["cmc"]}
            if row["verification"]:
                wanted["eer"] = row["verification"]["eer"][0]
                wanted |= {f"tpr {rate}": value[0] for rate, value in row["verification"]["tpr"].items()}
            assert bool(row["verification"]) == (number == 0)
            for name, value in wanted.items():
                own, said = cells[name]
                assert float(own["data-value"]) == value
                assert "".join(said).split()[0] == f"{100 * value:.1f}", (row["method"], name)
            assert float(cells["parameters"][0]["data-value"]) == row["parameters"]
            assert float(cells["seconds"][0]["data-value"]) == row["seconds"]


def test_intervals_are_those_over_the_queries(made):
    subject = read_subject(made[0])
    scored = next(iter(subject.targets.values())).scored
    assert [one.row.method for one in scored] == [row["method"] for row in subject.rows]
    ap = scored[0].result.ap
    rng = np.random.default_rng(0)
    means = sorted(np.mean([ap[i] for i in rng.integers(0, len(ap), len(ap))]) for _ in range(1000))
    low, high = interval(ap)
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)), abs=1e-12)
    text = made[2].read_text(encoding="utf-8")
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in text


def test_nothing_points_out_of_the_page(made):
    text = made[2].read_text(encoding="utf-8")
    page = Page(text)
    data = json.loads(page.scripts[0])
    assert all(re.fullmatch(r"[A-Za-z0-9+/]+=*", picture) for picture in data["pictures"]) and data["pictures"]
    for picture in data["pictures"]:
        text = text.replace(picture, "")
    assert not re.search(r"https?:|//[a-z]|@import|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon", text)
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    assert {target.split(")")[0] for target in text.split("url(")[1:]} <= {
        match for match in re.findall(r"url\((#[\w-]+)\)", text)
    }
    assert "default-src 'none'" in text
    ids = [own["id"] for _, own in page.tags if "id" in own]
    assert len(ids) == len(set(ids))


def test_hostile_names_stay_text(made):
    text = made[2].read_text(encoding="utf-8")
    assert "alert(" in text and "<script>alert" not in text
    page = Page(text)
    assert [own.get("type") for tag, own in page.tags if tag == "script"] == ["application/json", None]
    data = json.loads(page.scripts[0])
    assert HOSTILE in data["views"][0]["pid"] and not set("<>&") & set(page.scripts[0])


def test_tables_and_controls_can_be_named(made):
    page = Page(made[2].read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") > 6
    assert all(own.get("aria-label") for tag, own in page.tags if tag == "svg") and tags.count("svg") >= 8
    assert [own["aria-selected"] for _, own in page.tags if own.get("role") == "tab"] == ["true", "false"]


def test_ranked_lists_equal_a_loop(made):
    target = next(iter(read_subject(made[0]).targets.values()))
    data, scorer = target.data, target.evaluator.scorer
    for scored in target.scored:
        lists = measures.ranked(target, scored, 5)
        distances = scorer.distances(scored.query, scored.gallery, scored.metric).double().numpy()
        junk = scorer.junk(slice(0, QUERIES))
        for query in range(QUERIES):
            order = sorted(range(GALLERY), key=lambda item: (distances[query, item], item))
            real = [item for item in order if not junk[query, item]][:5]
            shown = [item for item in lists.index[query].tolist() if item >= 0]
            states = lists.state[query][: len(shown)].tolist()
            assert [item for item, state in zip(shown, states) if state != 2] == real
            waste = [item for item in order if junk[query, item] and distances[query, item] <= distances[query, real[-1]]]
            assert [item for item, state in zip(shown, states) if state == 2] == waste[: measures.JUNK_SHOWN]
            for item, state in zip(shown, states):
                same = data.query.pids[query] == data.gallery.pids[item]
                assert state == (2 if junk[query, item] else int(same))


def test_distributions_and_groups_equal_a_loop(made):
    target = next(iter(read_subject(made[0]).targets.values()))
    data, scorer, first = target.data, target.evaluator.scorer, target.scored[0]
    found = measures.distributions(data, scorer, 0.3)
    query, gallery = (torch.nn.functional.normalize(part.features.double()) for part in (data.query, data.gallery))
    cells, accepted, counts = {}, [0, 0], [0] * QUERIES
    for q in range(QUERIES):
        for g in range(GALLERY):
            same = data.query.pids[q] == data.gallery.pids[g]
            if same and data.query.camids[q] == data.gallery.camids[g]:
                continue
            cosine = float(query[q] @ gallery[g])
            counts[q] += int(same)
            key = (str(data.query.camids[q]), str(data.gallery.camids[g]))
            cells.setdefault(key, ([], []))[int(same)].append(cosine)
            accepted[int(same)] += cosine >= 0.3
    assert found.accepted == (accepted[1], accepted[0])
    assert found.same.sum() == sum(len(own[1]) for own in cells.values())
    assert {(row[0], row[1]) for row in found.cameras} == set(cells)
    for own, other, same, mean, different, other_mean in found.cameras:
        values = cells[(own, other)]
        assert (same, different) == (len(values[1]), len(values[0]))
        assert mean == (pytest.approx(np.mean(values[1]), abs=1e-6) if values[1] else None)
        assert other_mean == pytest.approx(np.mean(values[0]), abs=1e-6)
    assert measures.matches(data, scorer).tolist() == counts
    total = sum(count * value for _, count, value in measures.by_matches(first.result.ap, np.array(counts)))
    assert total / QUERIES == pytest.approx(first.result.mAP)
    table, note = measures.by_camera(target, first)
    text = made[2].read_text(encoding="utf-8")
    assert all(f'{100 * value:.1f} <span class="interval">({count})</span>' in text for _, _, count, value in table)
    assert not note and len(table) == 4
    for own, other, count, value in table:
        aps = []
        for q in np.flatnonzero(data.query.camids == int(own)):
            rows = [g for g in np.flatnonzero(data.gallery.camids == int(other))]
            rows.sort(key=lambda g: -float(query[q] @ gallery[g]))
            hits = [rank for rank, g in enumerate(rows, 1) if data.gallery.pids[g] == data.query.pids[q]]
            if hits:
                aps.append(np.mean([(place + 1) / rank for place, rank in enumerate(hits)]))
        assert (count, value) == (len(aps), pytest.approx(np.mean(aps)))


def test_the_limit_is_kept_and_said(made, tmp_path, capsys):
    out = tmp_path / "small.html"
    assert main(["report", str(made[0]), "--out", str(out)]) == 0
    whole = out.stat().st_size
    pictures = json.loads(Page(out.read_text(encoding="utf-8")).scripts[0])["pictures"]
    limit = (whole - sum(map(len, pictures)) // 2) / 1e6
    assert main(["report", str(made[0]), "--out", str(out), "--limit", f"{limit:.4f}"]) == 0
    text, said = out.read_text(encoding="utf-8"), capsys.readouterr().out
    assert out.stat().st_size <= limit * 1e6 and 0 < len(json.loads(Page(text).scripts[0])["pictures"]) < len(pictures)
    assert re.search(r"\d+ of \d+ pictures are left out", text) and "pictures are left out" in said
    assert main(["report", str(made[0]), "--out", str(tmp_path / "no.html"), "--limit", "0.1"]) == 2
    assert "without any picture" in capsys.readouterr().err and not (tmp_path / "no.html").exists()


def test_features_without_a_run(tmp_path, capsys):
    sides = features_of(1, tmp_path)
    arrays = {
        f"{split}_{name}": np.asarray(side[name]) for split, side in sides.items() for name in ("features", "pids", "camids")
    }
    np.savez(tmp_path / "f.npz", **arrays)
    out = tmp_path / "f.html"
    assert main(["report", str(tmp_path / "f.npz"), "--out", str(out)]) == 0
    assert "pictures" not in capsys.readouterr().out
    rows = Page(out.read_text(encoding="utf-8")).rows
    assert ("f.npz", "inductive", "features as given") in rows and "features without a run" in out.read_text()
    assert main(["report", str(tmp_path / "f.npz"), str(tmp_path / "f.npz")]) == 2
    assert "named twice" in capsys.readouterr().err


def test_a_bank_of_other_weights_is_said(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    bank = torch.load(run / "bank" / "odd-query.pt", weights_only=True)
    shutil.copy(made[1] / "bank" / "odd-query.pt", run / "bank" / "odd-query.pt")
    assert bank["features"].shape == (QUERIES, WIDTH)
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().out
    assert "give another mAP than metrics.json" in said
    assert "give another mAP than metrics.json" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_without_the_package_one_sentence_says_what_to_install(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(made[0]), "--out", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert "pip install Jinja2" in said and len(said.splitlines()) == 1 and not (tmp_path / "r.html").exists()


def test_runs_side_by_side(made, tmp_path, capsys):
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


def test_other_queries_are_not_paired(made, tmp_path, capsys):
    run = write_run(tmp_path / "other", lr=0.3)
    for file in (run / "bank").glob("*-query.pt"):
        bank = torch.load(file, weights_only=True)
        ckpt.write_tensors(file, {**bank, "paths": [f"{path}x" for path in bank["paths"]]})
    assert main(["compare-runs", str(made[0]), str(run)]) == 0
    said = capsys.readouterr().out
    assert "has other queries of 'odd'" in said and " / " not in said.split("\n\n")[0].split("\n", 2)[2]


@pytest.mark.slow
def test_rows_of_later_stages_are_scored_by_query(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    subject = read_subject(run)
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    target = subject.targets[rows[0]["target"]]
    assert not target.why and len({(row["protocol"], row["method"]) for row in rows}) == len(rows) > 3
    for row in rows:
        scored = target.find(row)
        assert scored is not None and np.nanmean(scored.result.ap) == pytest.approx(row["mAP"], abs=1e-6), row["method"]
    lists = query_lists(target, 3)
    (look,) = lists["looks"]
    index, weight = query_attention(encoder_of_run(run)[0], target.data)
    assert look["title"] == "+ MagFormer" and len(look["layers"]) == len(index) == 2 and not lists["unseen"]
    for layer, rows, values in zip(look["layers"], index.tolist(), weight):
        for query, items in enumerate(layer["index"]):
            shown = ["itself" if item < 0 else lists["gpath"][item] for item in items]
            assert shown == [
                "itself" if row == OWN else target.data.gallery.paths[row] for row in rows[query] if row != NOBODY
            ]
            assert layer["weight"][query] == pytest.approx(values[query][: len(items)], abs=1e-4)


def test_sizes_of_queries_equal_a_loop(tmp_path):
    rng = np.random.default_rng(3)
    sizes, ap = rng.integers(20, 60, (31, 2)), np.where(np.arange(31) == 4, np.nan, rng.random(31))
    sizes[7] = 0
    table = measures.by_size(ap, sizes)
    left = sorted((int(w * h), row) for row, (w, h) in enumerate(sizes) if row not in (4, 7))
    assert sum(count for _, count, _ in table) == len(left) == 29 and len(table) == 4
    for name, count, value in table:
        rows, left = [row for _, row in left[:count]], left[count:]
        assert value == pytest.approx(np.mean(ap[rows])) and f"{sizes[rows[-1]][0]} × {sizes[rows[-1]][1]}" in name
    assert [count for _, count, _ in measures.by_size(ap, np.full((31, 2), 9))] == [30]
    Image.new("RGB", (12, 34)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    assert measures.image_sizes(paths).tolist() == [[12, 34], [0, 0], [0, 0]]


def test_latex_signs_are_written_out():
    assert tex("50% a_b & {x} $1 #2 \\") == r"50\% a\_b \& \{x\} \$1 \#2 \textbackslash{}"


def test_a_browser_opens_it(made, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium is installed")
    words = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom".split()
    more = [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [browser, *words, *more, f"file://{made[2]}#view=1&cam=1&q=7"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    page = Page(done.stdout)
    assert [own["aria-selected"] for _, own in page.tags if own.get("role") == "tab"] == ["false", "true"]
    shown = done.stdout.split('id="v1"')[1].split("</section>")[0]
    assert re.search(r"6 of 12 queries; won by the change: \d+, lost: \d+", shown)
    assert 'class="item hit"' in shown or 'class="item miss"' in shown
