"""GraFT: fusion by loops, rivals, missing modalities, FFD triplets, stages, and the stacked forward pass."""

from __future__ import annotations

import json
import math
import signal
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import warm
import yaml
from conftest import TINY, comparable
from killing import spawn
from PIL import Image

import relreid_plugin
from relreid_plugin.config.defaults import get_default_config, merge_from_file, validate
from relreid_plugin.engine.evaluator import inference_parameters
from relreid_plugin.errors import UserError
from relreid_plugin.graft.ffd import SCHEMES, GraFTLoss, mined_triplet_loss, role_triplet_loss
from relreid_plugin.graft.model import FUSIONS, GraFT
from relreid_plugin.graft.schedule import sqrt_lambda
from relreid_plugin.graft.tables import TABLES, graft_report, graft_variants, token_indices
from relreid_plugin.graft.triplets import TripletSampler

relreid_plugin.register()

from relreid_plugin import host  # noqa: E402


def small_vit(channels):
    return timm.create_model(
        "deit_tiny_distilled_patch16_224",
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=0,
        img_size=(16, 32),
        patch_size=8,
        in_chans=channels,
    )


def build(fusion="graft", modalities=("R", "N", "T"), **options):
    torch.manual_seed(0)
    model = GraFT(small_vit, 5, modalities=modalities, fusion=fusion, heads=2, feedforward=24, **options)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(std=0.2)
    return model


def pictures(batch=4, count=3, dtype=torch.float32):
    return torch.randn(batch, count, 3, 16, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- fusion by loops --------------------------------------------------------------------------------------------------
def attend(x, attn):
    """Multi-head self-attention of torch by loops over heads and tokens, (T, d)."""
    tokens, dim = x.shape
    heads, width = attn.num_heads, dim // attn.num_heads
    qkv = x @ attn.in_proj_weight.t() + attn.in_proj_bias
    rows = []
    for t in range(tokens):
        parts = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            query = qkv[t, :dim][own]
            scores = torch.stack([(query * qkv[s, dim : 2 * dim][own]).sum() / math.sqrt(width) for s in range(tokens)])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weights[s] * qkv[s, 2 * dim :][own] for s in range(tokens)))
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ attn.out_proj.weight.t() + attn.out_proj.bias


def norm(x, layer):
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def encode(x, layer):
    """A transformer encoder layer, normalisation behind each branch."""
    x = norm(x + attend(x, layer.self_attn), layer.norm1)
    hidden = (x @ layer.linear1.weight.t() + layer.linear1.bias).clamp_min(0)
    return norm(x + hidden @ layer.linear2.weight.t() + layer.linear2.bias, layer.norm2)


def graft_by_loops(model, images):
    """Fused tokens and data tokens, sample by sample and modality by modality."""
    fused, data = [], []
    for sample in images:
        tokens_f, tokens_d = [], []
        for index in range(len(model.modalities)):
            tokens = model.backbones[0].forward_features(sample[index : index + 1])[0]
            output = encode(torch.cat([model.token[0], tokens]), model.encoders[index])
            tokens_f.append(output[0])
            tokens_d.append(output[1 + model.token_index])
        fused.append(sum(tokens_f) / len(tokens_f))
        data.append(sum(tokens_d) / len(tokens_d))
    return torch.stack(fused), torch.stack(data)


@pytest.mark.parametrize("modalities", [("R",), ("R", "N"), ("R", "N", "T"), ("a", "b", "c", "d")])
def test_fusion_against_loops_with_gradients(modalities):
    model = build(modalities=modalities, dropout=0.0, token_index=3).double().train()
    images = pictures(2, len(modalities), torch.float64)
    fused, data = model.embed(images)
    wanted_fused, wanted_data = graft_by_loops(model, images)
    assert torch.allclose(fused, wanted_fused, atol=1e-10) and torch.allclose(data, wanted_data, atol=1e-10)
    weights = torch.randn(2, 2, 16, dtype=torch.float64)
    parameters = [value for name, value in model.named_parameters() if not name.startswith("neck")]
    found = torch.autograd.grad((torch.stack([fused, data]) * weights).sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad((torch.stack([wanted_fused, wanted_data]) * weights).sum(), parameters, allow_unused=True)
    for left, right in zip(found, wanted):
        assert (left is None) == (right is None)
        assert left is None or torch.allclose(left, right, atol=1e-9)


def test_rivals_against_their_definitions():
    images = pictures(2, 3, torch.float64)
    late = build("late").double().eval()
    with torch.no_grad():
        tokens = [late.backbones[i].forward_features(images[:, i]) for i in range(3)]
        assert torch.allclose(late.embed(images)[0], sum(each[:, 0] for each in tokens) / 3, atol=1e-12)
        early = build("early").double().eval()
        tokens = early.backbones[0].forward_features(images.reshape(2, 9, 16, 32))
        assert torch.allclose(early.embed(images)[0], tokens.mean(dim=1), atol=1e-12)
        for fusion in ("cls", "average"):
            model = build(fusion).double().eval()
            for b in range(2):
                rows = [model.backbones[0].forward_features(images[b, i : i + 1])[0] for i in range(3)]
                sequence = torch.cat(([model.token[0]] if fusion == "cls" else []) + rows)
                output = encode(sequence, model.encoders[0])
                wanted = output[0] if fusion == "cls" else output.mean(dim=0)
                assert torch.allclose(model.embed(images)[0][b], wanted, atol=1e-10)
                body = output[1:] if fusion == "cls" else output
                data = body.view(3, -1, 16)[:, 0].mean(dim=0)
                assert torch.allclose(model.embed(images)[1][b], data, atol=1e-10)


# --- what must hold for all of them -----------------------------------------------------------------------------------
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_fusion_trains_and_tests(fusion, count):
    model = build(fusion, tuple("RNTX"[:count]))
    images = pictures(4, count)
    logits, fused, data = model.train()(images)
    assert logits.shape == (4, 5) and fused.shape == data.shape == (4, 16)
    (F.cross_entropy(logits, torch.arange(4)) + data.square().mean()).backward()
    without = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []
    with torch.no_grad():
        tested = model.eval()(images)
        assert torch.equal(tested, model(images))  # deterministic
        assert torch.allclose(tested.norm(dim=1), torch.ones(4), atol=1e-5)
        assert torch.allclose(model(images[:2]), tested[:2], atol=1e-5)
    assert inference_parameters(model) == sum(value.numel() for value in model.parameters()) - 5 * 16


@pytest.mark.parametrize("fusion", FUSIONS)
def test_modalities_may_come_in_any_order(fusion):
    model = build(fusion).eval()
    images = pictures()
    with torch.no_grad():
        assert torch.allclose(model(images), model(images[:, [2, 0, 1]], ("T", "R", "N")), atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_missing_modality_is_left_out(fusion):
    model = build(fusion).eval()
    images = pictures()
    with torch.no_grad():
        part = model.embed(images[:, [0, 2]], ("R", "T"))[0]
        other = images.clone()
        other[:, 1] = 7.0  # what N would have been does not matter
        assert torch.equal(model.embed(other[:, [0, 2]], ("R", "T"))[0], part)
        if fusion == "graft":
            alone = [model.embed(images[:, i : i + 1], (name,))[0] for i, name in ((0, "R"), (2, "T"))]
            assert torch.allclose(part, (alone[0] + alone[1]) / 2, atol=1e-5)
        if fusion == "early":
            zeroed = images.clone()
            zeroed[:, 1] = 0.0
            assert torch.allclose(part, model.embed(zeroed)[0], atol=1e-6)
    with pytest.raises(UserError, match="'X' is none of the model's: R, N, T"):
        model.embed(images[:, :1], ("X",))
    with pytest.raises(ValueError, match="2 modalities were given"):
        model.embed(images[:, :2], ("R",))


def test_wrong_settings_are_sentences():
    with pytest.raises(UserError, match=r"graft\.fusion"):
        build("sum")
    with pytest.raises(UserError, match=r"multimodal\.modalities"):
        build(modalities=("R", "R"))
    with pytest.raises(UserError, match=r"graft\.heads"):
        GraFT(small_vit, 5, modalities=("R",), heads=3)
    with pytest.raises(UserError, match=r"graft\.token_index"):
        build(token_index=99).embed(pictures())
    with pytest.raises(UserError, match=r"backbone\.name"):
        GraFT(lambda channels: timm.create_model("resnet10t", in_chans=channels), 5, modalities=("R",))


def test_parameters_of_the_paper():
    """101M with three modalities, 97M with two, DeiT-B (Tables 3 and 4), within 2 %."""
    with torch.device("meta"):
        for modalities, wanted in ((("R", "N", "T"), 101e6), (("R", "N"), 97e6)):
            model = GraFT(
                lambda channels: timm.create_model("deit_base_distilled_patch16_224", num_classes=0, in_chans=channels),
                50,
                modalities=modalities,
            )
            count = sum(value.numel() for value in model.parameters())
            assert abs(count / wanted - 1) < 0.02


def test_the_frozen_backbone_takes_no_gradient_and_stays_in_evaluation_mode():
    model = build()
    model.freeze_backbone()
    model.train()
    assert not any(module.training for module in model.backbones.modules()) and model.encoders.training
    logits, _, _ = model(pictures())
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(value.grad is None for value in model.backbones.parameters())
    assert all(value.grad is not None for value in model.encoders.parameters())
    model.freeze_backbone(False)
    assert all(module.training for module in model.backbones.modules())
    assert all(value.requires_grad for value in model.backbones.parameters())


def test_gradient_checkpointing_changes_nothing_but_memory():
    gradients, saved = [], []
    for checkpointing in (False, True):
        model = build(dropout=0.0, checkpointing=checkpointing).train()
        saved.append(0)

        def keep(value):
            saved[-1] += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            logits, fused, data = model(pictures())
        (logits.square().sum() + fused.sum() + data.square().sum()).backward()
        gradients.append([value.grad for value in model.parameters() if value.grad is not None])
    assert saved[1] < 0.5 * saved[0]
    assert all(torch.allclose(left, right, atol=1e-5) for left, right in zip(*gradients))


def test_bfloat16_autocast():
    model = build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, fused, data = model(pictures())
    (logits.float().sum() + fused.float().sum() + data.float().sum()).backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)


# --- losses -----------------------------------------------------------------------------------------------------------
def distance(a, b, kind):
    squared = sum((x - y) ** 2 for x, y in zip(a, b))
    return squared if kind == "squared" else squared.sqrt()


@pytest.mark.parametrize("kind", ["euclidean", "squared"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_given_triplets_against_loops_with_gradients(scheme, kind):
    torch.manual_seed(0)
    fused, data = torch.randn(2, 3, 4, 6, dtype=torch.float64).requires_grad_(True).unbind(0)
    value = role_triplet_loss(tuple(fused), tuple(data), scheme=scheme, distance=kind)
    total = 0.0
    for i in range(4):
        a, p, n = ((fused if letter == "F" else data)[role, i] for role, letter in enumerate(scheme))
        total = total + torch.log(1 + torch.exp(distance(a, p, kind) - distance(a, n, kind)))
    assert float(value.detach()) == pytest.approx(float(total.detach()) / 4, abs=1e-12)
    left = torch.autograd.grad(value, [fused, data], retain_graph=True, allow_unused=True)
    right = torch.autograd.grad(total / 4, [fused, data], allow_unused=True)
    for one, other in zip(left, right):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("kind", ["euclidean", "squared"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_mined_triplets_against_loops(scheme, kind):
    torch.manual_seed(1)
    fused, data = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])  # identity 3 has no positive
    values = []
    tables = [fused if letter == "F" else data for letter in scheme]
    for i in range(9):
        near = [distance(tables[0][i], tables[1][j], kind) for j in range(9) if labels[j] == labels[i] and j != i]
        far = [distance(tables[0][i], tables[2][j], kind) for j in range(9) if labels[j] != labels[i]]
        if near and far:
            values.append(torch.log(1 + torch.exp(max(near) - min(far))))
    wanted = sum(values) / len(values)
    found = mined_triplet_loss(fused, data, labels, scheme=scheme, distance=kind)
    assert float(found) == pytest.approx(float(wanted), abs=1e-9)


def test_mining_without_a_pair_gives_zero_with_a_gradient():
    fused = torch.randn(3, 4, requires_grad=True)
    value = mined_triplet_loss(fused, fused, torch.tensor([0, 1, 2]))
    value.backward()
    assert float(value.detach()) == 0.0 and float(fused.grad.abs().max()) == 0.0


@pytest.mark.parametrize("name", [{"scheme": "FFX"}, {"distance": "cosine"}])
def test_unknown_schemes_and_distances(name):
    with pytest.raises(ValueError, match="must be one of"):
        GraFTLoss(3, 4, **name)


def test_one_stacked_pass_equals_nine_separate_ones():
    """Three roles by three modalities, one image batch at a time, as in the released scheme: the same loss to 1e-5."""
    model = build(dropout=0.0).train()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3, 4])  # 4 anchors, positives, negatives
    images = pictures(12)
    loss = GraFTLoss(5, 16, ce=0.5, triplet=0.5, center=0.0005, label_smoothing=0.1)
    logits, fused, data = model(images, classified=4)
    total, parts = loss.fused_loss(logits, fused, data, labels)
    assert set(parts) == {"ce", "triplet", "center"}
    roles = []
    for role in range(3):
        outputs = []
        for index in range(3):
            tokens = model.backbones[0].forward_features(images[4 * role : 4 * role + 4, index])
            outputs.append(model.encoders[index](torch.cat([model.token.expand(4, -1, -1), tokens], dim=1)))
        mean = sum(outputs) / 3
        roles.append((mean[:, 0], mean[:, 1]))
    (anchor, _), (positive, _), (_, negative) = roles
    triplet = F.softplus((anchor - positive).norm(dim=1) - (anchor - negative).norm(dim=1)).mean()
    ce = F.cross_entropy(model.neck.classifier(model.neck.bn(anchor)), labels[:4], label_smoothing=0.1)
    center = 0.5 * (anchor - loss.center.centers[labels[:4]]).square().sum(dim=1).mean()
    wanted = 0.5 * triplet + 0.5 * ce + 0.0005 * center
    assert abs(float(total.detach() - wanted.detach())) < 1e-5
    left = torch.autograd.grad(total, list(model.encoders.parameters()), retain_graph=True)
    right = torch.autograd.grad(wanted, list(model.encoders.parameters()))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(left, right))


# --- schedule and sampler ---------------------------------------------------------------------------------------------
def test_warm_up_root_and_cool_down():
    factor = sqrt_lambda(1000, warmup_steps=100, cooldown=0.1)
    values = [factor(step) for step in range(1001)]
    assert values[0] == pytest.approx(0.01) and values[49] == pytest.approx(0.5) and values[99] == pytest.approx(1.0)
    assert values[100] == pytest.approx(1.0) and values[400] == pytest.approx(0.5)  # sqrt(100 / 400)
    assert values[899] == pytest.approx(math.sqrt(100 / 899))
    start = math.sqrt(100 / 900)
    assert values[900] == pytest.approx(start) and values[950] == pytest.approx(start / 2) and values[1000] == 0.0
    assert max(values) == pytest.approx(1.0)
    short = sqrt_lambda(5, warmup_steps=500, cooldown=0.2)
    assert [short(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    with pytest.raises(ValueError, match="total_steps"):
        sqrt_lambda(0)


def test_triplets_of_an_epoch():
    labels = [7, 3, 3, 3, 7, 5, 3, 7, 9]  # 5 and 9 have one image each
    torch.manual_seed(0)
    sampler = TripletSampler(labels, triplets=4, positives=2)
    indices = list(sampler)
    assert len(indices) == len(sampler) == 7 * 2 // 4 * 4 * 3
    pairs = set()
    for start in range(0, len(indices), 12):
        for i in range(4):
            anchor, positive, negative = (indices[start + 4 * role + i] for role in range(3))
            assert anchor != positive and labels[anchor] == labels[positive] != labels[negative]
            pairs.add((anchor, positive))
    assert len(pairs) == len(indices) // 3  # two different positives for every anchor
    with pytest.raises(UserError, match="two identities"):
        TripletSampler([1, 2, 3], triplets=2)


# --- runs -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def graft_config(tmp_path_factory):
    """The file of a tiny GraFT configuration on tiny vehicles."""
    return write_config(tmp_path_factory.mktemp("graft"))


def write_config(folder):
    """Render tiny vehicles into a folder, and write a tiny configuration there."""
    from relreid_plugin.data.embedded import ensure_embedded_vehicles

    ensure_embedded_vehicles("embedded_vehicles_tiny", folder, verbose=False)
    config = {
        "model": {"name": "graft", "pretrained": False},
        "backbone": {"name": "timm:vit_tiny_patch16_224"},
        "vit": {"patch_size": 16, "depth": 1, "drop_path": 0.0},
        "data": {
            **TINY["data"],
            "root": str(folder),
            "sources": ["embedded_vehicles_tiny"],
            "targets": ["embedded_vehicles_tiny"],
            "height": 32,
            "width": 64,
        },
        "multimodal": {"mean": [[0.5]], "std": [[0.25]], "test": ["R+N+T", "R+T", "N"]},
        "graft": {
            "heads": 3,
            "feedforward": 64,
            "positives": 1,
            "warmup_steps": 3,
            "finetune": {"max_epoch": 2, "lr": 0.0003},
        },
        "loss": {
            "name": "composite",
            "softmax": {"label_smooth": False},
            "composite": {"ce": 0.5, "triplet": 0.5, "center": 0.0},
        },
        "train": {"stages": [1, 2], "max_epoch": 2, "batch_size": 18, "optim": "adamw", "lr": 0.001, "lr_scheduler": "sqrt"},
        "test": {"dist_metric": "cosine", "rivals": []},
    }
    path = folder / "graft.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def weights(folder, stage, part):
    state = torch.load(folder / f"stage{stage}" / "last.pth.tar", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith(part)}


def test_two_stages(graft_config, tmp_path, command):
    folder = tmp_path / "run"
    drawn = ["test.visrank", "True", "test.visrank_topk", "2"]
    code, out, err = command("--config-file", graft_config, "data.save_dir", folder, *drawn)
    assert code == 0, err
    lists = list((folder / "visrank_embedded_vehicles_tiny").glob("*.jpg"))  # of the first modality
    assert len(lists) >= json.loads((folder / "metrics.json").read_text())["rows"][0]["queries"]
    assert Image.open(lists[0]).size == (64 + 24 + 2 * 64 + 6, 32)
    cfg = get_default_config()
    merge_from_file(cfg, graft_config)
    torch.manual_seed(0)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["method"] for row in metrics["rows"]] == [
        "GraFT, R+N+T",
        "GraFT, R+T (without N)",
        "GraFT, N (without R, T)",
    ]
    assert any("tests without R, T" in note for note in metrics["notes"]) and "tests without N" in out
    assert len({row["mAP"] for row in metrics["rows"]}) > 1
    assert set(metrics["history"]) == {"stage1", "stage2"} and metrics["selected_epoch"] == {"stage1": 2, "stage2": 2}
    assert "center" not in metrics["history"]["stage1"][0] and "center" in metrics["history"]["stage2"][0]
    assert metrics["history"]["stage1"][-1]["lr"] == 0.0  # cooled down
    assert {record["lr"] for record in metrics["history"]["stage2"]} == {0.0003}


def test_the_backbone_does_not_change_in_stage_1_and_does_in_stage_2(graft_config, tmp_path, command):
    for epochs in ("0", "2"):
        keys = ["train.max_epoch", epochs, "data.save_dir", tmp_path / epochs]
        assert command("--config-file", graft_config, *keys)[0] == 0
    before, after = weights(tmp_path / "0", 1, "backbones"), weights(tmp_path / "2", 1, "backbones")
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())
    encoders = weights(tmp_path / "0", 1, "encoders"), weights(tmp_path / "2", 1, "encoders")
    assert any(not torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())
    tuned = weights(tmp_path / "2", 2, "backbones")
    assert any(not torch.equal(value, tuned[name]) for name, value in after.items())


def test_stage_2_starts_from_the_best_of_stage_1(graft_config, tmp_path, command):
    folder = tmp_path / "run"
    keys = ["train.val_fraction", "0.34", "test.eval_freq", "1", "train.max_epoch", "3", "graft.finetune.max_epoch", "0"]
    code, out, err = command("--config-file", graft_config, "data.save_dir", folder, *keys)
    assert code == 0, err
    best = torch.load(folder / "stage1" / "best.pth.tar", weights_only=True)
    second = torch.load(folder / "stage2" / "last.pth.tar", weights_only=True)
    assert f"from stage 1, epoch {best['epoch']}" in out
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in best["state_dict"].items())


@pytest.mark.parametrize(
    "keys",
    [
        ["graft.sampling", "pk", "sampler.train_sampler", "RandomIdentitySampler", "train.batch_size", "12"],
        ["graft.fusion", "late"],
        ["graft.fusion", "early", "multimodal.modalities", "['R','N']", "multimodal.test", "[]"],
        ["graft.scheme", "DFD", "graft.distance", "squared", "graft.token_index", "3", "train.precision", "bfloat16"],
        ["train.lr_scheduler", "cosine", "graft.checkpointing", "True", "train.stages", "[1]"],
    ],
    ids=["pk", "late", "early-two", "scheme-bfloat16", "stage-1-cosine"],
)
def test_switches(graft_config, tmp_path, command, keys):
    code, _, err = command("--config-file", graft_config, "data.save_dir", tmp_path / "run", *keys)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.long
def test_killed_and_resumed_equals_not_killed(graft_config, tmp_path, command):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    base = ["--config-file", graft_config, "data.workers", "2", "data.save_dir"]
    assert command(*base, straight)[0] == 0
    steps = 36 // 6  # triplets of an epoch by triplets of a batch
    for call in (steps + 2, 2 * steps + 2):  # in the second epoch of stage 1; after it, in the second epoch of stage 2
        killed = spawn(tmp_path, "multimodal", call, *base, broken, "--resume")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    code, out, err = command(*base, broken, "--resume")
    assert code == 0, err
    assert "resuming stage 2 after epoch 1" in out
    assert comparable(broken) == comparable(straight)
    for stage in (1, 2):
        first, second = (torch.load(run / f"stage{stage}" / "last.pth.tar", weights_only=True) for run in (straight, broken))
        assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


def test_eval_only_gives_the_same_rows(graft_config, tmp_path, command):
    folder = tmp_path / "run"
    assert command("--config-file", graft_config, "data.save_dir", folder)[0] == 0
    before = comparable(folder)
    assert command("--config-file", graft_config, "data.save_dir", folder, "--eval-only")[0] == 0
    assert comparable(folder)["rows"] == before["rows"]
    code, _, err = command("--config-file", graft_config, "data.save_dir", tmp_path / "no", "--eval-only")
    assert code == 2 and "no stage-1 checkpoint" in err


@pytest.mark.parametrize(
    "keys,words",
    [
        (["multimodal.modalities", "['R','X']", "multimodal.test", "[]"], "X"),
        (["multimodal.test", "['R+Q']"], "'Q' is not trained on"),
        (["multimodal.mean", "[[0.5],[0.5]]"], "multimodal.mean"),
        (["train.batch_size", "16"], "multiple of 3"),
        (["graft.sampling", "pk"], "RandomIdentitySampler"),
        (["rib.attention", "dcs"], "rib.attention none"),
        (["loss.name", "triplet"], "loss.name composite"),
        (["data.sources", "embedded_persons_tiny"], "one image per sample"),
        (
            ["model.name", "bnneck_baseline", "train.lr_scheduler", "cosine", "train.stages", "[1]"],
            "several images per sample",
        ),
        (["model.name", "bnneck_baseline", "train.stages", "[1]"], "sqrt"),
        (["graft.heads", "5"], "graft.heads"),
        (["backbone.name", "timm:resnet10t"], "timm:vit"),
    ],
)
def test_one_sentence(graft_config, tmp_path, command, keys, words):
    code, _, err = command("--config-file", graft_config, "data.save_dir", tmp_path / "run", *keys)
    assert code == 2 and words in err, err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_papers_settings_are_shipped():
    from conftest import ROOT

    for name, modalities in (("rgbnt100", "RNT"), ("rgbn300", "RN"), ("rgbnt201", "RNT"), ("msvr310", "RNT")):
        cfg = get_default_config()
        merge_from_file(cfg, ROOT / "configs" / f"graft_{name}.yml")
        validate(cfg)
        assert cfg.data.sources == [name] and cfg.multimodal.modalities == list(modalities)
        assert (cfg.data.height, cfg.data.width, cfg.train.batch_size) == (224, 224, 78)
        assert (cfg.train.max_epoch, cfg.graft.finetune.max_epoch, cfg.graft.positives) == (40, 60, 8)
        assert cfg.train.lr == 2.54e-5 and cfg.train.lr_scheduler == "sqrt" and cfg.graft.warmup_steps == 500
        assert "deit_base_distilled_patch16_224" in cfg.backbone.name
        assert len(cfg.multimodal.mean) == len(modalities)


def test_registered_model_by_configuration():
    cfg = get_default_config()
    cfg.backbone.name, cfg.vit.depth, cfg.vit.patch_size = "timm:vit_tiny_patch16_224", 1, 16
    cfg.data.height, cfg.data.width = 32, 64
    cfg.graft.heads = 3
    model = host.build_model("graft", 4, "triplet", False, False, cfg=cfg)
    assert model.eval()(torch.randn(2, 3, 3, 32, 64)).shape == (2, 192)


# --- ablations --------------------------------------------------------------------------------------------------------
def test_rows_of_the_papers_tables(graft_config):
    cfg = get_default_config()
    merge_from_file(cfg, graft_config)
    rows = {table: graft_variants(cfg, table) for table in TABLES}
    assert [row.key for row in rows["fusion"]] == ["late", "early", "average", "cls", "graft"]
    assert [row.title for row in rows["modalities"]] == ["R", "N", "T", "R+N", "R+T", "N+T", "R+N+T"]
    assert [row.key for row in rows["schemes"]] == list(SCHEMES) and len(SCHEMES) == 8
    assert [row.title for row in rows["tokens"]][:2] == ["data token 0", "data token 2"]  # 9 tokens
    assert token_indices(198) == [0, 5, 10, 15, 20, 25] and token_indices(9) == [0, 2, 3, 5, 6, 8]
    assert token_indices(3) == [0, 1, 2]
    cfg.multimodal.mean = [[0.1], [0.2], [0.3]]
    overrides = dict(zip(*[iter(graft_variants(cfg, "modalities")[4].overrides)] * 2))
    assert overrides["multimodal.mean"] == "[[0.1], [0.3]]" and "multimodal.std" not in overrides
    with pytest.raises(UserError, match="did you mean 'fusion'"):
        graft_variants(cfg, "fusions")
    with pytest.raises(UserError, match=r"model\.name graft"):
        graft_variants(get_default_config(), "fusion")


@pytest.mark.slow
@pytest.mark.long
def test_the_modalities_of_a_table(graft_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm.python())
    keys = ["multimodal.modalities", "['R','T']", "multimodal.test", "[]", "graft.finetune.max_epoch", "1"]
    text = graft_report(str(graft_config), ["modalities"], [1], out=tmp_path, jobs=2, overrides=keys)
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")] == ["method", "R", "T", "R+T"]
    assert (tmp_path / "default-seed1" / "metrics.json").is_file()  # R+T changes nothing
    records = json.loads((tmp_path / "modalities.json").read_text())["records"]
    for record in records:
        row = json.loads((tmp_path / f"{record['variant']}-seed1" / "metrics.json").read_text())["rows"][0]
        assert record["mean"]["mAP"] == row["mAP"] and row["method"] == f"GraFT, {record['title']}"
    assert len({record["parameters"] for record in records}) == 2
