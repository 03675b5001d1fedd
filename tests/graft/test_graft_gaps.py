"""Whether GraFT's triplet loss acts: distances of triplets, tokens of length 1 or centred, what a run says about them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_graft import write_config

from relreid_plugin.config.defaults import load_config
from relreid_plugin.engine.checkpoint import write_json
from relreid_plugin.engine.observers import Observer
from relreid_plugin.graft import stage
from relreid_plugin.graft import tables as graft_tables
from relreid_plugin.graft.ffd import (
    SCHEMES,
    TOKENS,
    GraFTLoss,
    mined_distances,
    mined_triplet_loss,
    role_distances,
    role_triplet_loss,
)
from relreid_plugin.graft.gaps import TripletGaps
from relreid_plugin.graft.observers import IDLE, TripletObserver
from relreid_plugin.graft.tables import graft_report, graft_variants, triplet_signal, triplet_table

KEYS = ["near", "near_95", "far", "far_5", "active", "hinge", "pull"]


def placed(rows, tokens):
    """Lists of numbers as ``tokens`` says, by loops."""
    rows = [[float(value) for value in row] for row in rows]
    if tokens == "unit":
        return [[value / math.sqrt(sum(other**2 for other in row)) for value in row] for row in rows]
    if tokens == "centred":
        means = [sum(column) / len(rows) for column in zip(*rows)]
        return [[value - mean for value, mean in zip(row, means)] for row in rows]
    return rows


def apart(one, other):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other)))


def drawn(count, seed=0):
    """Fused and data tokens that lie apart from one another, as an encoder's do."""
    generator = torch.Generator().manual_seed(seed)
    fused, data = torch.randn(2, count, 5, dtype=torch.float64, generator=generator)
    return fused + 4.0, data - 4.0


# --- distances --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_given_triplets_of_placed_tokens_against_loops(scheme, tokens):
    fused, data = drawn(12)
    kinds = {"F": placed(fused, tokens), "D": placed(data, tokens)}
    near, far = role_distances(tuple(fused.chunk(3)), tuple(data.chunk(3)), scheme=scheme, tokens=tokens)
    losses = []
    for i in range(4):
        a, p, n = (kinds[letter][4 * role + i] for role, letter in enumerate(scheme))
        assert float(near[i]) == pytest.approx(apart(a, p), abs=1e-12)
        assert float(far[i]) == pytest.approx(apart(a, n), abs=1e-12)
        losses.append(math.log1p(math.exp(apart(a, p) - apart(a, n))))
    loss = role_triplet_loss(tuple(fused.chunk(3)), tuple(data.chunk(3)), scheme=scheme, tokens=tokens)
    assert float(loss) == pytest.approx(sum(losses) / 4, abs=1e-12)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_mined_triplets_of_placed_tokens_against_loops(scheme, tokens):
    fused, data = drawn(8, seed=1)
    labels = [0, 0, 0, 1, 1, 2, 2, 3]  # identity 3 has no positive
    kinds = {"F": placed(fused, tokens), "D": placed(data, tokens)}
    wanted = []
    for i in range(7):
        a, p, n = (kinds[letter] for letter in scheme)
        near = max(apart(a[i], p[j]) for j in range(8) if labels[j] == labels[i] and j != i)
        wanted.append((near, min(apart(a[i], n[j]) for j in range(8) if labels[j] != labels[i])))
    found = mined_distances(fused, data, torch.tensor(labels), scheme=scheme, tokens=tokens)
    assert torch.stack(found, dim=1).flatten().tolist() == pytest.approx(
        [value for pair in wanted for value in pair], abs=1e-7
    )
    loss = mined_triplet_loss(fused, data, torch.tensor(labels), scheme=scheme, tokens=tokens)
    assert float(loss) == pytest.approx(sum(math.log1p(math.exp(near - far)) for near, far in wanted) / 7, abs=1e-7)


def test_tokens_of_two_kinds_lie_apart_until_they_are_centred():
    """Raw, any negative of another kind is far away; centred, the distance to it is one between samples."""
    fused, data = drawn(30, seed=2)
    roles = tuple(fused.chunk(3)), tuple(data.chunk(3))
    pulls = {}
    for tokens in TOKENS:
        near, far = role_distances(*roles, tokens=tokens)
        pulls[tokens] = float((near - far).sigmoid().mean())
    assert pulls["raw"] < 1e-3 and pulls["unit"] > 0.1 and pulls["centred"] > 0.3
    plain = role_distances(*roles, scheme="FFF")
    assert torch.allclose(
        torch.stack(plain), torch.stack(role_distances(*roles, scheme="FFF", tokens="centred")), atol=1e-12
    )


def test_unknown_tokens():
    with pytest.raises(ValueError, match="raw, unit, centred"):
        GraFTLoss(3, 4, tokens="whitened")


# --- what an epoch's triplets were like -------------------------------------------------------------------------------
def test_summary_against_loops():
    generator = torch.Generator().manual_seed(3)
    near, far = torch.rand(2, 41, generator=generator).double() * 3
    far[5] = near[5]  # as far: not nearer, so violated
    gaps = TripletGaps()
    for start in (0, 17):
        stop = 17 if start == 0 else 41
        gaps.add(near[start:stop], far[start:stop])
    found = gaps.summary()
    pairs = list(zip(near.tolist(), far.tolist()))
    assert list(found) == KEYS
    assert found["near"] == pytest.approx(sum(a for a, _ in pairs) / 41)
    assert found["far"] == pytest.approx(sum(b for _, b in pairs) / 41)
    assert found["near_95"] == sorted(a for a, _ in pairs)[38]  # 39 of 41 are the first 95 %
    assert found["far_5"] == sorted(b for _, b in pairs)[2]  # 3 of 41 are the first 5 %
    assert found["active"] == sum(a >= b for a, b in pairs) / 41
    assert found["hinge"] == pytest.approx(sum(max(0, a - b) for a, b in pairs) / 41)
    assert found["pull"] == pytest.approx(sum(1 / (1 + math.exp(b - a)) for a, b in pairs) / 41)
    assert gaps.summary() == {}


def test_pull_is_the_size_of_the_gradient():
    fused, data = drawn(9, seed=4)
    near, far = role_distances(tuple(fused.chunk(3)), tuple(data.chunk(3)), tokens="unit")
    gaps = TripletGaps()
    gaps.add(near, far)
    gap = (near - far).requires_grad_(True)
    torch.nn.functional.softplus(gap).sum().backward()
    assert gaps.summary()["pull"] == pytest.approx(float(gap.grad.mean()))


def test_a_loss_that_does_nothing_is_said_once(capsys):
    loss = SimpleNamespace(gaps=TripletGaps(), scheme="FFD", tokens="raw")
    observer = TripletObserver(loss)
    for epoch, (near, far) in enumerate([(1.0, 1.5), (1.0, 20.0), (1.0, 20.0)]):
        loss.gaps.add(torch.tensor([9.0]), torch.tensor([0.0]))  # of a part of an epoch that was broken off
        observer.begin(epoch)
        loss.gaps.add(torch.tensor([near, near]), torch.tensor([far, far]))
        record = observer.end()
        assert list(record) == [f"triplet/{key}" for key in KEYS] and record["triplet/near"] == near
    said = capsys.readouterr().out
    assert said.count("did nothing") == 1 and "epoch 2" in said and "1.00 to its positive and 20.00" in said
    assert set(observer.shown) <= set(record)
    observer.begin(3)
    assert observer.end() == {}


# --- runs and tables --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The file of a tiny GraFT configuration on tiny vehicles."""
    return write_config(tmp_path_factory.mktemp("triplets"))


def run(tiny, folder, command, *keys):
    short = ["train.max_epoch", "1", "graft.finetune.max_epoch", "1", "multimodal.test", "[]", *keys]
    code, out, err = command("--config-file", tiny, "data.save_dir", folder, *short)
    assert code == 0, err
    return out, json.loads((folder / "metrics.json").read_text())["history"]


@pytest.mark.slow
def test_a_run_says_whether_its_triplets_act(tiny, tmp_path, command):
    """Raw FFD does nothing and is said so once per stage; centred it acts."""
    raw, history = run(tiny, tmp_path / "raw", command)
    assert raw.count("the triplet loss (FFD, raw tokens) did nothing") == 2
    for record in [*history["stage1"], *history["stage2"]]:
        assert set(record) >= {f"triplet/{key}" for key in KEYS}
        assert record["triplet/pull"] < IDLE and record["triplet/near"] < record["triplet/far"]
        assert f"triplet/pull {record['triplet/pull']:.3f}, lr" in raw
    centred, other = run(tiny, tmp_path / "centred", command, "graft.tokens", "centred", "train.stages", "[1]")
    assert "did nothing" not in centred
    assert other["stage1"][0]["triplet/pull"] > 0.05 and other["stage1"][0]["triplet"] > 10 * history["stage1"][0]["triplet"]


def test_without_a_triplet_loss_there_is_nothing_to_watch(tiny, monkeypatch):
    """What the engine is built with: the loss has the tokens of its key, and an observer where it has a weight."""
    made = []
    monkeypatch.setattr(stage, "GraFTLoss", lambda *args, **options: made.append(GraFTLoss(*args, **options)) or made[-1])
    monkeypatch.setattr(stage, "MultimodalEngine", lambda *args, **options: SimpleNamespace(observers=[]))
    cfg = load_config(str(tiny), ["graft.tokens", "unit", "use_gpu", "False"])
    part = SimpleNamespace(
        cfg=cfg, model=None, datamanager=SimpleNamespace(num_train_pids=3), bare=SimpleNamespace(feature_dim=4)
    )
    for weight in (0.0, 0.5):
        options = {"per_step": False, "center_lr": 0.5, "ce": 1.0, "triplet": weight, "center": 0.0}
        engine, _ = stage.build_engine(part, None, None, **options)
        assert [type(observer) for observer in engine.observers] == ([TripletObserver] if weight else [])
        assert made[-1].tokens == "unit"
    assert engine.observers[0].triplets is made[-1]


def test_the_table_of_triplets(tiny, tmp_path, monkeypatch):
    """Its rows are runs that differ in scheme, tokens and weight of the triplet loss, and its signal is that of the runs."""
    asked = {}

    def trained(parts, *, jobs):
        for number, part in enumerate(parts):
            asked[part.folder.name] = part.cfg
            record = {f"triplet/{key}": number + 0.25 for key in KEYS} if part.cfg.loss.composite.triplet else {}
            row = {
                "target": "t",
                "protocol": "p",
                "method": "m",
                "mAP": 0.5,
                "mINP": 0.5,
                "cmc": {"1": 0.5},
                "parameters": 1,
            }
            history = {"stage1": [{"epoch": 1, **record}], "stage2": [{"epoch": 1, **record}]}
            write_json(part.folder / "metrics.json", {"rows": [row], "history": history, "selected_epoch": {}})

    monkeypatch.setattr(graft_tables, "train", trained)
    text = graft_report(str(tiny), ["triplets"], [1], out=tmp_path)
    assert list(asked) == [f"{name}-seed1" for name in ("none", "FFF-raw", "FFF-unit", "default", "FFD-unit", "FFD-centred")]
    found = {
        (cfg.graft.scheme, cfg.graft.tokens, cfg.loss.composite.triplet, cfg.graft.finetune.triplet)
        for cfg in asked.values()
    }
    wanted = [("FFF", "raw"), ("FFF", "unit"), ("FFD", "raw"), ("FFD", "unit"), ("FFD", "centred")]
    assert found == {("FFD", "raw", 0.0, 0.0), *((*row, 0.5, 0.5) for row in wanted)}
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:7]] == ["no triplet loss", *(f"{scheme}, {tokens} tokens" for scheme, tokens in wanted)]
    assert rows[8] == ["no triplet loss", *["-"] * 8]
    assert rows[13] == ["FFD, centred tokens", *["5.25", "5.25", "525.0 %", "525.0 %"] * 2]


def test_signal_of_made_up_runs():
    history = {"stage1": [{"triplet/near": 1.0, "triplet/far": 2.0, "triplet/active": 0.25, "triplet/pull": 0.5}]}
    signal = triplet_signal(None, {"history": history})
    assert signal["first_near"] == signal["last_near"] == 1.0 and signal["last_active"] == 0.25
    assert triplet_signal(None, {"history": {"stage1": [{}]}}) == {}
    other = {**signal, "first_near": 3.0}
    records = [{"variant": "v", "title": "one", "signal": [signal, other]}, {"variant": "w", "title": "two", "signal": [{}]}]
    assert triplet_table(records).splitlines()[2:] == [
        "| one | 2.00 | 2.00 | 25.0 % | 50.0 % | 1.00 | 2.00 | 25.0 % | 50.0 % |",
        "| two | - | - | - | - | - | - | - | - |",
    ]


def test_the_shipped_configuration_samples_as_the_paper_and_its_loss_acts():
    cfg = load_config("graft_triplets_embedded.yml")
    assert (cfg.graft.sampling, cfg.graft.positives, cfg.graft.scheme) == ("triplets", 8, "FFD")
    assert cfg.graft.tokens == "centred" and cfg.train.batch_size == 3 * 26
    assert [row.key for row in graft_variants(cfg, "triplets")][0] == "none"


def test_observers_show_nothing_of_their_own_accord():
    assert Observer.shown == ()
