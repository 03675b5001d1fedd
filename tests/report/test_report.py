"""Reports and runs side by side: numbers, escapes, limits, and nothing that points out of the page."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reported import GALLERY, HOSTILE, QUERIES, WIDTH, Page, features_of

from relreid_plugin.cli.main import main
from relreid_plugin.engine.attended import NOBODY, OWN
from relreid_plugin.files import write_json
from relreid_plugin.magformer.attended import query_attention
from relreid_plugin.magformer.loading import encoder_of_run
from relreid_plugin.metrics.bootstrap import interval
from relreid_plugin.metrics.plane import on_a_plane
from relreid_plugin.report import maps, measures
from relreid_plugin.report.lists import query_lists
from relreid_plugin.report.maps import identity_maps
from relreid_plugin.report.scored import read_subject


def test_every_number_is_that_of_the_metrics(reported_runs):
    first, second, out = reported_runs
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


def test_intervals_are_those_over_the_queries(reported_runs):
    subject = read_subject(reported_runs[0])
    scored = next(iter(subject.targets.values())).scored
    assert [one.row.method for one in scored] == [row["method"] for row in subject.rows]
    ap = scored[0].result.ap
    rng = np.random.default_rng(0)
    means = sorted(np.mean([ap[i] for i in rng.integers(0, len(ap), len(ap))]) for _ in range(1000))
    low, high = interval(ap)
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)), abs=1e-12)
    text = reported_runs[2].read_text(encoding="utf-8")
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in text


def test_nothing_points_out_of_the_page(reported_runs):
    text = reported_runs[2].read_text(encoding="utf-8")
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


def test_hostile_names_stay_text(reported_runs):
    text = reported_runs[2].read_text(encoding="utf-8")
    assert "alert(" in text and "<script>alert" not in text
    page = Page(text)
    assert [own.get("type") for tag, own in page.tags if tag == "script"] == ["application/json", None]
    data = json.loads(page.scripts[0])
    assert HOSTILE in data["views"][0]["pid"] and not set("<>&") & set(page.scripts[0])


def test_tables_and_controls_can_be_named(reported_runs):
    page = Page(reported_runs[2].read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") > 6
    assert all(own.get("aria-label") for tag, own in page.tags if tag == "svg") and tags.count("svg") >= 8
    assert [own["aria-selected"] for _, own in page.tags if own.get("role") == "tab"] == ["true", "false", "false"]


def test_ranked_lists_equal_a_loop(reported_runs):
    target = next(iter(read_subject(reported_runs[0]).targets.values()))
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


def test_distributions_and_groups_equal_a_loop(reported_runs):
    target = next(iter(read_subject(reported_runs[0]).targets.values()))
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
    text = reported_runs[2].read_text(encoding="utf-8")
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


def test_chosen_identities_are_on_the_map(reported_runs, tmp_path, monkeypatch, capsys):
    target = next(iter(read_subject(reported_runs[0]).targets.values()))
    data, (first, *_) = target.data, target.scored
    (own, expanded), notes = identity_maps(target, ["2", HOSTILE])
    assert not notes and (own.title, expanded.title) == ("image model (inductive)", "+ average query expansion (inductive)")
    for rows, part in ((own.query, data.query), (own.gallery, data.gallery)):
        shown = part.shown(part.pids)
        assert sorted(rows.tolist()) == [row for row, name in enumerate(shown) if str(name) in ("2", HOSTILE)]
    values = torch.cat([data.query.features[own.query], data.gallery.features[own.gallery]])
    plane = on_a_plane(torch.nn.functional.normalize(values).double().numpy(), what="a test")
    np.testing.assert_allclose(np.diff(own.place, axis=0) * np.ptp(plane, axis=0).max(), np.diff(plane, axis=0), atol=1e-6)
    assert own.place.min() == 0 and own.place.max() == 1 and not np.allclose(own.place, expanded.place)
    means = {pid: np.nanmean(first.result.ap[data.query.pids == pid]) for pid in np.unique(data.query.pids)}
    monkeypatch.setattr(maps, "SHOWN", 2)
    assert set(data.query.pids[identity_maps(target)[0][0].query]) == set(sorted(means, key=means.get)[:2])
    out = tmp_path / "r.html"
    assert main(["report", str(reported_runs[0]), "--identities", "2,99", "--out", str(out)]) == 2
    assert "'99' is no identity among the queries of 'odd'" in capsys.readouterr().err and not out.exists()
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    none, notes = identity_maps(target)
    assert none == [] and "scikit-learn" in notes[0]


def test_methods_add_kept_channels_and_pruning_curves(reported_runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(reported_runs[0], run)
    metrics = json.loads((run / "metrics.json").read_text())
    for record in metrics["history"]["stage1"]:
        record |= {"kept_test/gate1": 1 / record["epoch"], "kept_test/gate2": 0.5, "kept/gate1": 0.1}
    write_json(run / "metrics.json", metrics)
    steps = [{"parameters": count, "rows": [{"target": "odd", "mAP": count / 1e7}]} for count in (8_000_000, 4_000_000)]
    write_json(run / "prune" / "prune.json", {"dense": steps[0], "targets": steps[1:]})
    found = {panel.title: panel for panel in read_subject(run).panels}
    kept, pruned = found["Channels that the gates keep"], found["Pruning"]
    assert kept.lines == {
        "gate1": [(1, 100.0), (2, 50.0), (3, pytest.approx(100 / 3))],
        "gate2": [(1, 50), (2, 50), (3, 50)],
    }
    assert pruned.lines == {"single weights": [(8.0, 80.0), (4.0, 40.0)]} and pruned.target == "odd"
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert (
        'aria-label="Channels that the gates keep: gate1, gate2"' in text and 'aria-label="Pruning: single weights"' in text
    )
    write_json(run / "prune" / "prune.json", {"dense": steps[0]})
    assert main(["report", str(run), "--out", str(tmp_path / "no.html")]) == 2
    assert "prune.json' is damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_the_limit_is_kept_and_said(reported_runs, tmp_path, capsys):
    out = tmp_path / "small.html"
    assert main(["report", str(reported_runs[0]), "--out", str(out)]) == 0
    whole = out.stat().st_size
    pictures = json.loads(Page(out.read_text(encoding="utf-8")).scripts[0])["pictures"]
    limit = (whole - sum(map(len, pictures)) // 2) / 1e6
    assert main(["report", str(reported_runs[0]), "--out", str(out), "--limit", f"{limit:.4f}"]) == 0
    text, said = out.read_text(encoding="utf-8"), capsys.readouterr().out
    assert out.stat().st_size <= limit * 1e6 and 0 < len(json.loads(Page(text).scripts[0])["pictures"]) < len(pictures)
    assert re.search(r"\d+ of \d+ pictures are left out", text) and "pictures are left out" in said
    assert main(["report", str(reported_runs[0]), "--out", str(tmp_path / "no.html"), "--limit", "0.1"]) == 2
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


def test_a_bank_of_other_weights_is_said(reported_runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(reported_runs[0], run)
    bank = torch.load(run / "bank" / "odd-query.pt", weights_only=True)
    shutil.copy(reported_runs[1] / "bank" / "odd-query.pt", run / "bank" / "odd-query.pt")
    assert bank["features"].shape == (QUERIES, WIDTH)
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().out
    assert "give another mAP than metrics.json" in said
    assert "give another mAP than metrics.json" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_without_the_package_one_sentence_says_what_to_install(reported_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(reported_runs[0]), "--out", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert "pip install Jinja2" in said and len(said.splitlines()) == 1 and not (tmp_path / "r.html").exists()


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
