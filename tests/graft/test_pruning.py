"""Pruning: which weights and units go, how they are stored, and the command that does it step by step."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, comparable
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from relreid_plugin.data.embedded import ensure_embedded_vehicles
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.engine.evaluator import inference_parameters
from relreid_plugin.engine.packing import Packed, choose_units, pack, unpack
from relreid_plugin.errors import UserError
from relreid_plugin.graft.model import GraFT
from relreid_plugin.graft.pruned import (
    backbone_blocks,
    block_shapes,
    find_units,
    fit_shapes,
    keep_channels,
    keep_heads,
    prunable_layers,
    prunable_weights,
    prune_units,
    prune_weights,
    settle_weights,
    zero_weights,
)
from relreid_plugin.graft.pruning import parse_targets, stored_bytes, time_forward
from relreid_plugin.graft.stage import MultimodalEngine


def small_graft(seed=0, **options):
    torch.manual_seed(seed)

    def backbone(channels):
        return VisionTransformer(
            img_size=(16, 32),
            patch_size=8,
            in_chans=channels,
            embed_dim=24,
            depth=3,
            num_heads=4,
            num_classes=0,
            **{"mlp_ratio": 2.0, **options},
        )

    model = GraFT(backbone, 5, modalities=["R", "N"], heads=4, feedforward=32)
    with torch.no_grad():  # timm starts with small weights and without biases
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


def pictures(seed=0, dtype=torch.float32):
    return torch.randn(3, 2, 3, 16, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights_of(model):
    return {name: layer.weight.detach().clone() for name, layer in prunable_layers(model).items()}


# --- stored tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_a_sparse_tensor_comes_back_bit_by_bit(tmp_path, dtype, kept):
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(37, 41, generator=generator).to(dtype)
    tensor[torch.rand(37, 41, generator=generator) >= kept] = 0.0
    tensor[0, :3] = torch.tensor([-0.0, float("nan"), float("inf")], dtype=dtype)
    packed = pack(tensor)
    assert isinstance(packed, Packed) == (kept < 1.0)
    torch.save({"packed": packed, "dense": tensor}, tmp_path / "both.pt")
    back = torch.load(tmp_path / "both.pt", weights_only=True)["packed"]
    assert type(back) is torch.Tensor and back.dtype == dtype and back.shape == tensor.shape
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    assert torch.equal(back.view(integer), tensor.view(integer))
    torch.save(pack(tensor), tmp_path / "packed.pt")
    torch.save(tensor, tmp_path / "dense.pt")
    sizes = [(tmp_path / f"{name}.pt").stat().st_size for name in ("packed", "dense")]
    if kept < 1.0:
        expected = (37 * 41 + 7) // 8 + int((tensor.view(integer) != 0).sum()) * tensor.element_size()
        assert sizes[0] < sizes[1] and expected < sizes[0] < expected + 2500
    else:
        assert abs(sizes[0] - sizes[1]) < 64  # the archive holds the file's name


def test_what_would_grow_stays_as_it_is():
    for tensor in (torch.arange(900), torch.zeros(20), torch.zeros(0, 4), torch.tensor(3.0), torch.ones(9, 9).bool()):
        assert torch.equal(pack(tensor), tensor)
    part = torch.randn(1000, 10)[:2]  # a view drags its whole storage into a file
    assert pack(part).untyped_storage().nbytes() == 80


def test_damaged_parts_are_refused():
    packed = pack(torch.eye(64))
    with pytest.raises(ValueError, match="bytes of bits"):
        unpack(packed.bits[:-1], packed.values, packed.shape)
    with pytest.raises(ValueError, match="values were stored"):
        unpack(packed.bits, packed.values[:-1], packed.shape)


# --- single weights -----------------------------------------------------------------------------------------------------


def test_prunable_are_queries_keys_values_projections_and_mlps_of_all_blocks():
    model = small_graft()
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(prunable_layers(model)) == [f"backbones.0.blocks.{i}.{part}" for i in range(3) for part in parts]
    assert prunable_weights(model) == 3 * (3 * 24 * 24 + 24 * 24 + 2 * 24 * 48) and zero_weights(model) == 0


def test_weights_below_the_global_threshold_go_and_the_rest_stays():
    model = small_graft()
    before = weights_of(model)
    flat = sorted(abs(value) for weight in before.values() for value in weight.flatten().tolist())
    rest = {name: value.clone() for name, value in model.state_dict().items() if name.removesuffix(".weight") not in before}
    for count in (1000, 4321):
        prune_weights(model, count)
        settle_weights(model)
        for name, weight in weights_of(model).items():
            for old, new in zip(before[name].flatten().tolist(), weight.flatten().tolist()):
                assert new == (0.0 if abs(old) < flat[count] else old)
        assert zero_weights(model) == count
    after = model.state_dict()
    assert set(after) == {*rest, *(f"{name}.weight" for name in before)}
    assert all(torch.equal(after[name], value) for name, value in rest.items())


def test_pruned_weights_stay_zero_while_the_others_train():
    model = small_graft().train()
    for count in (2000, 5000):
        prune_weights(model, count)
        gone = {name: layer.weight == 0 for name, layer in prunable_layers(model).items()}
        before = weights_of(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            logits, fused, data = model(pictures(step))
            (logits.square().mean() + fused.square().mean() - data.mean()).backward()
            optimizer.step()
        settle_weights(model)
        assert zero_weights(model) == sum(int(mask.sum()) for mask in gone.values()) == count
        for name, weight in weights_of(model).items():
            assert torch.equal(weight == 0, gone[name])
            assert not torch.signbit(weight[gone[name]]).any()
            assert (weight[~gone[name]] != before[name][~gone[name]]).float().mean() > 0.9
        assert not any("_orig" in name or "_mask" in name for name in model.state_dict())
        assert all(isinstance(layer.weight, nn.Parameter) for layer in prunable_layers(model).values())


def test_weights_that_are_not_finite_are_named():
    for attempt in (lambda model: prune_weights(model, 10), find_units):
        model = small_graft()
        with torch.no_grad():
            model.backbones[0].blocks[1].mlp.fc1.weight[0, 0] = float("nan")
        with pytest.raises(UserError, match="not finite"):
            attempt(model)


# --- heads and channels -------------------------------------------------------------------------------------------------


def test_units_are_scored_by_the_mean_square_of_their_weights():
    model = small_graft().double()
    units = find_units(model)
    expected = []
    for index, block in enumerate(backbone_blocks(model).values()):
        qkv, proj, fc1, fc2 = (layer.weight for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
        for head in range(4):
            values = [
                value
                for channel in range(6 * head, 6 * head + 6)
                for part in (qkv[channel], qkv[24 + channel], qkv[48 + channel], proj[:, channel])
                for value in part.tolist()
            ]
            expected.append((sum(value**2 for value in values) / len(values), len(values) + 3 * 6, 2 * index))
        for channel in range(48):
            values = fc1[channel].tolist() + fc2[:, channel].tolist()
            expected.append((sum(value**2 for value in values) / len(values), len(values) + 1, 2 * index + 1))
    scores, sizes, groups = zip(*expected)
    torch.testing.assert_close(units.scores, torch.tensor(scores, dtype=torch.float64), rtol=1e-12, atol=0)
    assert units.sizes.tolist() == list(sizes) and units.groups.tolist() == list(groups)
    assert units.removable == sum(sizes) - 3 * (4 * 6 * 24 + 3 * 6 + 49)
    assert sum(sizes) == prunable_weights(model) + 3 * (3 * 24 + 48)


@pytest.mark.parametrize("excess", [0, 1, 49, 50, 700, 3000, 9000, 12255])
@pytest.mark.parametrize("seed", range(3))
def test_the_lowest_units_go_until_it_is_enough(excess, seed):
    model = small_graft(seed)
    units = find_units(model)
    removed = choose_units(units.scores, units.sizes, units.groups, excess)
    taken = int(units.sizes[removed].sum())
    assert excess <= taken < excess + 49
    last = {group: max(units.scores[units.groups == group].tolist()) for group in range(6)}
    kept = ~removed
    assert all(bool(kept[units.groups == group].any()) for group in range(6))
    if not excess:
        return
    top = units.scores[removed].max()
    for score, size, group, gone in zip(units.scores, units.sizes, units.groups, removed):
        if score < top and not gone:  # passed over: the last of its kind, or too large for what was left to go
            assert score == last[int(group)] or size > 49


def test_heads_go_when_no_channel_is_left():
    scores, sizes = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([100, 100, 10, 10])
    groups = torch.tensor([0, 0, 1, 1])
    assert choose_units(scores, sizes, groups, 15).tolist() == [True, False, True, False]
    assert choose_units(scores, sizes, groups, 10).tolist() == [False, False, True, False]
    assert choose_units(scores, sizes, groups, 105).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"qkv_bias": False}, {"class_token": False, "global_pool": "avg"}]
)
def test_removed_heads_and_channels_equal_zeroed_ones(options):
    small = small_graft(**options).double().eval()
    dense = copy.deepcopy(small)
    keep = [([0, 2, 3], 7), ([1], 48), ([0, 1, 2, 3], 1)]
    for index, (block, (heads, channels)) in enumerate(zip(backbone_blocks(small).values(), keep)):
        chosen = torch.randperm(48, generator=torch.Generator().manual_seed(index))[:channels].sort().values
        keep_heads(block.attn, torch.tensor(heads))
        keep_channels(block.mlp, chosen)
        whole = dense.backbones[0].blocks[index]
        with torch.no_grad():
            for head in set(range(4)) - set(heads):
                rows = slice(6 * head, 6 * head + 6)
                whole.attn.proj.weight[:, rows] = 0.0
                for part in range(3):
                    whole.attn.qkv.weight.view(3, 24, 24)[part, rows] = 0.0
                    if whole.attn.qkv.bias is not None:
                        whole.attn.qkv.bias.view(3, 24)[part, rows] = 0.0
            gone = torch.ones(48, dtype=torch.bool)
            gone[chosen] = False
            whole.mlp.fc1.weight[gone], whole.mlp.fc1.bias[gone] = 0.0, 0.0
            whole.mlp.fc2.weight[:, gone] = 0.0
    assert block_shapes(small) == [(3, 7), (1, 48), (4, 1)]
    images = pictures(dtype=torch.float64)
    torch.testing.assert_close(small(images), dense(images), rtol=0, atol=1e-10)
    assert inference_parameters(small) < inference_parameters(dense)
    for model in (small, dense):
        model.train(), model.zero_grad(), torch.manual_seed(0)
        model(images)[1].square().sum().backward()
    torch.testing.assert_close(
        small.backbones[0].patch_embed.proj.weight.grad, dense.backbones[0].patch_embed.proj.weight.grad, rtol=0, atol=1e-8
    )


def test_a_model_of_removed_units_is_built_again_from_its_weights():
    model = small_graft().eval()
    excess = find_units(model).removable - 30
    dense = inference_parameters(model)
    prune_units(model, excess)
    assert dense - excess - 49 < inference_parameters(model) <= dense - excess
    state = model.state_dict()
    again = small_graft(seed=1).eval()
    assert fit_shapes(again, state) and not fit_shapes(again, state)
    assert block_shapes(again) == block_shapes(model) and block_shapes(again)[0] != (4, 48)
    ckpt.load_weights(again, state, path="memory")
    assert torch.equal(again(pictures()), model(pictures()))
    assert not fit_shapes(small_graft(), small_graft().state_dict())


def test_blocks_of_another_kind():
    model = small_graft(mlp_layer=SwiGLU)
    with pytest.raises(UserError, match="SwiGLU.*without --structured"):
        find_units(model)
    prune_weights(model, 3000)
    settle_weights(model)
    assert zero_weights(model) == 3000 and model.eval()(pictures()).shape == (3, 24)
    model.backbones[0] = nn.Linear(3, 3)
    assert zero_weights(model) == 0
    with pytest.raises(UserError, match="Linear has no transformer blocks"):
        prunable_layers(model)


def test_forward_passes_are_timed_in_turns():
    calls = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, images):
            calls.append(self.name)

    seconds = time_forward([Noted("a"), Noted("b")], torch.zeros(1), rounds=3)
    assert calls == ["a", "b"] * 4 and all(value > 0 for value in seconds)


# --- targets ------------------------------------------------------------------------------------------------------------


def test_targets_are_shares_or_counts():
    targets = parse_targets(["0.9", " 0.85", ".8", "76.5k", "70K", "60001"], dense=100_001, floor=1)
    assert [target.parameters for target in targets] == [90_001, 85_001, 80_001, 76_500, 70_000, 60_001]
    assert parse_targets(["76M", "46m"], dense=101_000_000, floor=0)[1].parameters == 46_000_000


@pytest.mark.parametrize(
    "words, message",
    [
        (["half"], "'half' is no share"),
        (["-0.5"], "'-0.5' is no share"),
        ([""], "'' is no share"),
        (["1.0"], "1.0 .* is not below the dense model's 1,000"),
        (["1000"], "is not below the dense"),
        (["2k"], "2k .2,000 parameters. is not below the dense"),
        (["0.2"], "0.2 .200 parameters. is below what can be pruned: 300"),
        (["0.6", "0.7"], "0.7 .* comes after 0.6"),
        (["0.6", "600"], "600 .* comes after 0.6"),
    ],
)
def test_targets_that_make_no_sense_are_named(words, message):
    with pytest.raises(UserError, match=message):
        parse_targets(words, dense=1000, floor=300)


# --- the command --------------------------------------------------------------------------------------------------------


def prune(*args):
    """tools/prune.py in this process."""
    spec = importlib.util.spec_from_file_location("prune", ROOT / "tools" / "prune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("vehicles")
    ensure_embedded_vehicles("embedded_vehicles_tiny", root, verbose=False)
    name = ["embedded_vehicles_tiny"]
    values = {
        "model": {"name": "graft", "pretrained": False},
        "backbone": {"name": "timm:vit_tiny_patch16_224"},
        "vit": {"patch_size": 8, "depth": 2, "drop_path": 0.0},
        "data": {"root": str(root), "sources": name, "targets": name, "height": 32, "width": 64, "workers": 0},
        "multimodal": {"mean": [[0.5]], "std": [[0.25]]},
        "graft": {
            "heads": 4,
            "feedforward": 64,
            "sampling": "pk",
            "finetune": {"max_epoch": 1, "lr": 0.0005, "weight_decay": 0.05},
        },
        "sampler": {"train_sampler": "RandomIdentitySampler", "num_instances": 4},
        "loss": {"name": "composite", "composite": {"ce": 0.5, "triplet": 0.5, "center": 0.0}},
        "train": {"stages": [1, 2], "optim": "adamw", "lr": 0.001, "lr_scheduler": "sqrt", "max_epoch": 1, "batch_size": 8},
        "test": {"dist_metric": "cosine", "rivals": []},
    }
    path = root / "graft.yml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dense_run(config, tmp_path_factory):
    from relreid_plugin.cli.train import main

    folder = tmp_path_factory.mktemp("graft") / "run"
    assert main(["--config-file", str(config), "data.save_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def pruned(dense_run):
    """Pruned to two targets, two epochs of fine-tuning each."""
    assert prune(dense_run, "--targets", "0.8,1M", "--epochs", "2") == 0
    return dense_run / "prune"


@pytest.fixture(scope="module")
def structured(dense_run):
    assert prune(dense_run, "--targets", "0.7", "--structured") == 0
    return dense_run / "prune-structured"


def weights_in(folder):
    return torch.load(folder / "stage2" / "last.pth.tar", weights_only=True)["state_dict"]


def zeros_in(state):
    return sum(
        int((value == 0).sum())
        for name, value in state.items()
        if ".blocks." in name and name.endswith("weight") and value.dim() == 2
    )


@pytest.mark.slow
def test_the_command_leaves_a_table_and_a_folder_per_target(pruned, dense_run):
    result = json.loads((pruned / "prune.json").read_text(encoding="utf-8"))
    dense = result["dense"]["parameters"]
    [row] = result["dense"]["rows"]
    [trained] = comparable(dense_run)["rows"]
    assert row.pop("seconds") > 0 and row == trained and dense == trained["parameters"]
    assert [record["target"] for record in result["targets"]] == ["0.8", "1M"]
    counts = [round(0.8 * dense), 1_000_000]
    assert [record["parameters"] for record in result["targets"]] == counts
    for record, count in zip(result["targets"], counts):
        folder = pruned / record["target"]
        assert zeros_in(weights_in(folder)) == dense - count == record["zeros"]
        assert comparable(folder)["rows"][0]["mAP"] == record["rows"][0]["mAP"]
        assert record["rows"][0]["parameters"] == count and len(record["history"]) == 2
        file = folder / "stage2" / "last.pth.tar"
        assert record["bytes"] == file.stat().st_size < record["bytes_unpacked"]
        assert abs(record["bytes_unpacked"] - result["dense"]["bytes"]) < 10_000
        torch.save(torch.load(file, weights_only=True), pruned / "unpacked.pt")
        assert (pruned / "unpacked.pt").stat().st_size == pytest.approx(record["bytes_unpacked"], abs=10_000)
        (pruned / "unpacked.pt").unlink()
        bits = sum(layer.numel() for name, layer in weights_in(folder).items() if ".blocks." in name) / 8
        assert record["bytes_unpacked"] - record["bytes"] == pytest.approx(4 * (dense - count) - bits, rel=0.02)
        assert record["seconds"] > 0 and record["seconds_dense"] > 0
        assert not (folder / "finetune").exists()
    history = comparable(dense_run)["history"]["stage2"]
    for record in result["targets"]:  # fine-tuning goes on with the class centers of stage 2
        assert record["history"][0]["center"] < 0.6 * history[0]["center"]
    table = (pruned / "prune.md").read_text(encoding="utf-8")
    assert "| dense |" in table and "| 1M | 1,000,000 |" in table and "| mAP | R1 |" in table
    assert (pruned / "prune.png").stat().st_size > 0 and not list(pruned.rglob("*.tmp"))
    first, second = (weights_in(pruned / name) for name in ("0.8", "1M"))
    original = torch.load(dense_run / "stage2" / "last.pth.tar", weights_only=True)["state_dict"]
    for name in ("token", "neck.classifier.weight", "backbones.0.patch_embed.proj.weight", "encoders.2.linear1.weight"):
        assert not torch.equal(first[name], original[name]) and not torch.equal(second[name], first[name])
    for name in first:
        if ".blocks." in name and name.endswith("weight") and first[name].dim() == 2:
            assert not second[name][first[name] == 0].any()  # every step goes on from the one before


def test_a_target_is_tested_like_any_run(pruned, structured, command):
    for folder in (pruned / "1M", structured / "0.7"):
        before = comparable(folder)["rows"]
        shutil.rmtree(folder / "bank")
        (folder / "metrics.json").unlink()
        # with 'vit.depth' there are no pretrained weights to be had; none are asked for
        code, out, err = command("--config-file", folder / "config.yml", "--eval-only", "model.pretrained", "True")
        assert code == 0 and "GraFT, R+N+T" in out, err
        assert comparable(folder)["rows"] == before


@pytest.mark.parametrize("key", ["model.load_weights", "model.resume"])
def test_pruned_weights_load_like_any_others(pruned, structured, config, tmp_path, command, key):
    for folder in (pruned / "1M", structured / "0.7"):
        file, target = folder / "stage2" / "last.pth.tar", tmp_path / folder.name
        args = ["--eval-only", "train.stages", "[1]", key, file, "data.save_dir", target]
        code, out, err = command("--config-file", config, *args)
        assert code == 0, err
        assert ("fewer heads and channels" in out) == (folder.parent == structured)
        assert comparable(target)["rows"] == comparable(folder)["rows"]


def test_structured_pruning_makes_the_layers_smaller(structured, dense_run):
    result = json.loads((structured / "prune.json").read_text(encoding="utf-8"))
    [record] = result["targets"]
    dense, count = result["dense"]["parameters"], record["parameters"]
    assert 0.7 * dense - 385 <= count <= round(0.7 * dense) and record["zeros"] == 0
    state = weights_in(structured / "0.7")
    assert sum(value.numel() for name, value in state.items() if ".blocks." in name) < 0.7 * dense
    for index, (heads, channels) in enumerate(record["blocks"]):
        block = f"backbones.0.blocks.{index}"
        assert state[f"{block}.attn.qkv.weight"].shape == (3 * 64 * heads, 192)
        assert state[f"{block}.mlp.fc2.weight"].shape == (192, channels)
    assert record["bytes"] == pytest.approx(record["bytes_unpacked"], abs=10_000)
    assert record["bytes"] < 0.75 * result["dense"]["bytes"]
    assert record["time_ratio"] == pytest.approx(record["seconds"] / record["seconds_dense"])


@pytest.mark.slow
@pytest.mark.long
def test_what_is_done_stays_and_what_was_stopped_goes_on(pruned, dense_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    expected = {name: weights_in(out / name) for name in ("0.8", "1M")}
    rows = {name: comparable(out / name) for name in expected}
    shutil.rmtree(out / "1M")
    done = {path: path.stat().st_mtime_ns for path in (out / "0.8").rglob("*") if path.is_file()}
    args = (dense_run, "--targets", "0.8,1M", "--epochs", "2", "--out", out)
    step, calls = MultimodalEngine.forward_backward, []

    def dying(self, data):
        calls.append(1)
        if len(calls) == 4:  # in the second epoch
            raise KeyboardInterrupt
        return step(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(MultimodalEngine, "forward_backward", dying)
        assert prune(*args) == 130
    assert not (out / "1M" / "stage2").exists() and (out / "1M" / "finetune" / "last.pth.tar").is_file()
    assert prune(*args) == 0
    printed = capsys.readouterr().out
    assert "0.8 is done already" in printed and "resuming after epoch 1" in printed
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for name, state in expected.items():
        found = weights_in(out / name)
        assert all(torch.equal(found[key], value) for key, value in state.items()) and set(found) == set(state)
        assert comparable(out / name) == rows[name]
    (out / "1M" / "prune.json").unlink()  # stopped while it was tested
    written = (out / "1M" / "stage2" / "last.pth.tar").stat().st_mtime_ns
    assert prune(*args) == 0
    assert (out / "1M" / "stage2" / "last.pth.tar").stat().st_mtime_ns == written
    assert prune(dense_run, "--targets", "0.8", "--epochs", "1", "--out", out) == 2
    assert "belongs to another pruning" in capsys.readouterr().err


def test_mistakes_are_told_in_one_sentence(pruned, dense_run, config, tmp_path, capsys, command):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yml").write_text("model: {name: osnet_x0_25}\n", encoding="utf-8")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(dense_run / "config.yml", unfinished)
    for args, message in [
        ((tmp_path / "none",), "holds no run"),
        ((other,), "is a run of 'osnet_x0_25'; pruning works on runs of 'model.name graft'"),
        ((unfinished,), "holds no finished run"),
        ((dense_run, "--out", config), "is a file; name a folder"),
        ((dense_run, "--targets", "0.1"), "is below what can be pruned"),
        ((pruned / "0.8", "--targets", "0.5"), "is pruned already"),
    ]:
        assert prune(*args) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        prune(dense_run, "--epochs", "-1")
    error = capsys.readouterr().err
    assert left.value.code == 2 and "argument --epochs: takes an integer in [0, 1000000]" in error and error.count("\n") == 1
    for more in ([], ["--resume"]):
        code, _, error = command("--config-file", pruned / "0.8" / "config.yml", *more)
        assert code == 2 and "can only be tested" in error


def test_bytes_are_counted_as_they_are_written(tmp_path):
    state = {"state_dict": {"a": pack(torch.eye(100)), "b": torch.randn(50)}, "epoch": 3}
    ckpt.save(tmp_path / "file.pt", state)
    assert stored_bytes(state) == pytest.approx((tmp_path / "file.pt").stat().st_size, abs=200)
