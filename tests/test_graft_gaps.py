"""Whether GraFT's triplet loss acts: distances of triplets, tokens of length 1 or centred, what a run says about them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_graft import write_config

from relreid_plugin.engine.observers import Observer
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


def test_a_run_says_whether_its_triplets_act(tiny, tmp_path, command):
    """Raw FFD does nothing and is said so once per stage; centred it acts; without a triplet loss nothing is said."""
    raw, history = run(tiny, tmp_path / "raw", command)
    assert raw.count("the triplet loss (FFD, raw tokens) did nothing") == 2
    for record in [*history["stage1"], *history["stage2"]]:
        assert set(record) >= {f"triplet/{key}" for key in KEYS}
        assert record["triplet/pull"] < IDLE and record["triplet/near"] < record["triplet/far"]
        assert f"triplet/pull {record['triplet/pull']:.3f}, lr" in raw
    centred, other = run(tiny, tmp_path / "centred", command, "graft.tokens", "centred", "train.stages", "[1]")
    assert "did nothing" not in centred
    assert other["stage1"][0]["triplet/pull"] > 0.05 and other["stage1"][0]["triplet"] > 10 * history["stage1"][0]["triplet"]
    off = ["loss.composite.triplet", "0", "train.stages", "[1]"]
    none, without = run(tiny, tmp_path / "none", command, *off)
    assert "triplet" not in none.split("stage 1:")[1] and not any("triplet" in key for key in without["stage1"][-1])


def test_a_part_that_is_zero_for_an_epoch_is_said_once(tiny, tmp_path, command):
    """A batch of one identity each has no pair to mine."""
    keys = ["graft.sampling", "pk", "sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", "1"]
    out, history = run(tiny, tmp_path / "run", command, *keys, "train.batch_size", "6", "train.stages", "[1]")
    assert history["stage1"][0]["triplet"] == 0.0 and not any("triplet/" in key for key in history["stage1"][0])
    assert out.count("part 'triplet' of the loss was 0 in every batch of epoch 1") == 1


def test_the_table_of_triplets(tiny, tmp_path):
    keys = ["train.max_epoch", "1", "graft.finetune.max_epoch", "1", "multimodal.test", "[]"]
    text = graft_report(str(tiny), ["triplets"], [1], out=tmp_path, jobs=2, overrides=keys)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    titles = ["no triplet loss", *(f"{s}, {t} tokens" for s, t in [("FFF", "raw"), ("FFF", "unit"), ("FFD", "raw")])]
    assert [row[0] for row in rows[1:5]] == titles and len(rows) == 14
    assert rows[8][1:] == ["-"] * 8  # no triplets
    assert rows[11][3] == "0.0 %" and rows[13][0] == "FFD, centred tokens" and float(rows[13][4].rstrip(" %")) > 5
    assert (tmp_path / "default-seed1" / "metrics.json").is_file()  # FFD, raw: the configuration itself
    records = {record["variant"]: record for record in json.loads((tmp_path / "triplets.json").read_text())["records"]}
    history = json.loads((tmp_path / "FFD-unit-seed1" / "metrics.json").read_text())["history"]
    signal = records["FFD-unit"]["signal"][0]
    assert signal["first_near"] == history["stage1"][0]["triplet/near"]
    assert signal["last_pull"] == history["stage2"][-1]["triplet/pull"]


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
    from relreid_plugin.config.defaults import load_config

    cfg = load_config("graft_triplets_embedded.yml")
    assert (cfg.graft.sampling, cfg.graft.positives, cfg.graft.scheme) == ("triplets", 8, "FFD")
    assert cfg.graft.tokens == "centred" and cfg.train.batch_size == 3 * 26
    assert [row.key for row in graft_variants(cfg, "triplets")][0] == "none"


def test_observers_show_nothing_of_their_own_accord():
    assert Observer.shown == ()
