"""DCS-Attention: the gate, timm's attention with selected channels, the non-local block, their temperature and noise."""

from __future__ import annotations

import copy
import inspect
import io
import math

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope

import relreid_plugin
from relreid_plugin.errors import UserError
from relreid_plugin.rib.dcs import (
    ChannelGate,
    ChannelSelection,
    DCSAttention,
    DCSAttentionRope,
    DCSNonLocal,
    GateNoise,
    replace_attention,
    temperature_at,
)
from relreid_plugin.rib.gate import logistic_noise, straight_through_gate
from relreid_plugin.rib.placement import place_dcs

relreid_plugin.register()

from relreid_plugin import host  # noqa: E402

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0, "img_size": (32, 16), "patch_size": 8}


class RecordedNoise(GateNoise):
    """Noise that can be looked at afterwards."""

    def sample(self, shape, device):
        drawn = super().sample(shape, device)
        self.drawn = [*getattr(self, "drawn", []), drawn]
        return drawn


# --- the gate ---------------------------------------------------------------------------------------------------------
def test_noise_is_the_difference_of_two_gumbels():
    noise = logistic_noise((200_000,), generator=torch.Generator().manual_seed(0), device="cpu").double()
    assert torch.isfinite(noise).all()
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 3) < 0.05  # variance of two Gumbels, pi^2 / 6 each
    points = torch.tensor([-4.0, -2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
    found = torch.tensor([float((noise < point).double().mean()) for point in points], dtype=torch.float64)
    assert torch.allclose(found, points.sigmoid(), atol=0.005)


def test_noise_stays_finite_at_the_ends_of_the_uniform_draw(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor([0.0, 1.0 - 2**-24, 0.5]))
    noise = logistic_noise((3,), generator=torch.Generator(), device="cpu")
    assert torch.isfinite(noise).all() and noise[2] == 0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_gate_is_hard_forward_and_soft_backward(temperature):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    upstream = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    mask = straight_through_gate(logits, noise=noise, temperature=temperature)
    assert mask.dtype == torch.float64
    (gradient,) = torch.autograd.grad(mask, logits, upstream)
    for row in range(5):
        for column in range(7):
            z = float(logits[row, column].detach() + noise[row, column])
            assert float(mask[row, column].detach()) == (1.0 if z > 0 else 0.0)
            soft = 1 / (1 + math.exp(-z / temperature))
            wanted = float(upstream[row, column]) * soft * (1 - soft) / temperature
            assert float(gradient[row, column]) == pytest.approx(wanted, rel=1e-12)


def test_gate_in_half_precision_is_computed_in_float32():
    logits = torch.tensor([2.0, -2.0, 0.1], dtype=torch.bfloat16, requires_grad=True)
    noise = torch.tensor([-1.999, 1.999, -0.1005])
    mask = straight_through_gate(logits, noise=noise)
    assert mask.dtype == torch.bfloat16
    assert mask.tolist() == [1.0, 0.0, 0.0]  # 0.1 is 0.10009765625 in bfloat16
    mask.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_test_rule_is_theta_above_zero_without_noise():
    gate = ChannelGate(6, 4).eval()
    torch.nn.init.normal_(gate.theta.weight)
    torch.nn.init.normal_(gate.theta.bias)
    x = torch.randn(9, 6)
    first, second = gate(x), gate(x)
    assert torch.equal(first, second) and torch.equal(first, (gate.theta(x) > 0).float())
    assert 0 < float(first.mean()) < 1
    assert gate.counts == {}


# --- noise ------------------------------------------------------------------------------------------------------------
def test_noise_has_a_seed_of_its_own_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = GateNoise(3).sample(torch.Size([4]), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(GateNoise(3).sample(torch.Size([4]), torch.device("cpu")), first)
    assert not torch.equal(GateNoise(4).sample(torch.Size([4]), torch.device("cpu")), first)


def test_noise_goes_on_from_its_state():
    noise, shape = GateNoise(0), torch.Size([6])
    noise.sample(shape, torch.device("cpu"))
    file = io.BytesIO()
    torch.save(noise.state_dict(), file)
    wanted = noise.sample(shape, torch.device("cpu"))
    file.seek(0)
    other = GateNoise(8)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.seed == 0 and torch.equal(other.sample(shape, torch.device("cpu")), wanted)


def test_copied_gates_share_their_noise():
    gate = ChannelGate(4, 4)
    assert copy.deepcopy(gate).noise is gate.noise


# --- attention of a transformer ---------------------------------------------------------------------------------------
def dcs_by_loops(x, layer, mask):
    """softmax((Q * M)(K * M)^T / sqrt(d)) V, head by head and token by token, with the mask (T, H d) given."""
    tokens, dim = x.shape
    heads, width = layer.num_heads, layer.head_dim
    qkv = x @ layer.qkv.weight.t() + (layer.qkv.bias if layer.qkv.bias is not None else 0)
    rows = []
    for t in range(tokens):
        parts = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)

            def vector(which, token, own=own):
                piece = qkv[token, which * dim :][: heads * width][own]
                norm = (layer.q_norm, layer.k_norm)[which] if which < 2 else None
                return piece if norm is None else norm(piece) * mask[token, own]

            query = vector(0, t)
            scores = torch.stack([(query * vector(1, s)).sum() / math.sqrt(width) for s in range(tokens)])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weights[s] * vector(2, s) for s in range(tokens)))
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ layer.proj.weight.t() + layer.proj.bias


def soft_dcs_by_loops(x, layer, noise, temperature):
    """The same with hard values and the gradient of the soft gate: hard + soft - soft.detach()."""
    logits = x @ layer.select.theta.weight.t() + layer.select.theta.bias
    soft = torch.sigmoid((logits + noise) / temperature)
    hard = ((logits + noise) > 0).to(soft.dtype)
    return dcs_by_loops(x, layer, hard.detach() + soft - soft.detach())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_against_loops_with_gradients(fused, qk_norm):
    torch.manual_seed(0)
    noise = RecordedNoise(1)
    options = {"qk_norm": True, "norm_layer": torch.nn.LayerNorm} if qk_norm else {}
    layer = DCSAttention(12, 3, qkv_bias=True, init_bias=0.4, noise=noise, **options).double()
    torch.nn.init.normal_(layer.select.theta.weight, std=0.5)
    layer.fused_attn, layer.select.temperature = fused, 0.7
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 12, dtype=torch.float64)
    out = layer.train()(x)
    values = [x, *layer.parameters()]
    found = torch.autograd.grad(out, values, upstream)
    drawn = noise.drawn[0].double()
    wanted_out = torch.stack([soft_dcs_by_loops(x[b], layer, drawn[b], 0.7) for b in range(2)])
    wanted = torch.autograd.grad(wanted_out, values, upstream)
    assert torch.allclose(out, wanted_out, atol=1e-12)
    for name, left, right in zip(["x", *dict(layer.named_parameters())], found, wanted):
        assert torch.allclose(left, right, atol=1e-10), name
    theta = found[1 + list(dict(layer.named_parameters())).index("select.theta.weight")]
    assert float(theta.abs().max()) > 1e-4  # the masks learn


def test_attention_in_testing_against_loops():
    torch.manual_seed(0)
    layer = DCSAttention(12, 3, qkv_bias=True).double().eval()
    torch.nn.init.normal_(layer.select.theta.weight)
    torch.nn.init.zeros_(layer.select.theta.bias)
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    mask = (layer.select.theta(x[0]) > 0).double()
    assert 0.2 < float(mask.mean()) < 0.8
    assert torch.allclose(layer(x)[0], dcs_by_loops(x[0], layer, mask), atol=1e-12)
    assert torch.equal(layer(x), layer(x))


def test_every_head_has_its_own_channels_and_values_keep_all():
    torch.manual_seed(0)
    layer = DCSAttention(8, 2).eval()
    plain = Attention(8, 2).eval()
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if "select" not in key})
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        layer.select.theta.bias[:4] = -1.0  # head 0 selects nothing: uniform attention over all its value channels
        value = layer.qkv(x)[0, :, 16:]
        seen = {}
        layer.proj.register_forward_pre_hook(lambda module, inputs: seen.update(heads=inputs[0][0]))
        layer(x)
        assert torch.allclose(seen["heads"][:, :4], value[:, :4].mean(dim=0).expand(4, -1), atol=1e-6)
        first = seen["heads"][:, 4:].clone()
        plain.proj.register_forward_pre_hook(lambda module, inputs: seen.update(heads=inputs[0][0]))
        plain(x)
        assert torch.allclose(first, seen["heads"][:, 4:], atol=1e-6)  # head 1 is untouched


@pytest.mark.parametrize("mask", ["float", "bool", "causal"])
def test_masks_of_timm_fused_and_unfused(mask):
    if mask == "causal" and "is_causal" not in inspect.signature(Attention.forward).parameters:
        pytest.skip("this version of timm has no causal attention")
    torch.manual_seed(0)
    layer = DCSAttention(8, 2).eval()
    torch.nn.init.normal_(layer.select.theta.weight)
    plain = Attention(8, 2).eval()
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if "select" not in key})
    x = torch.randn(2, 5, 8)
    allowed = torch.rand(2, 1, 5, 5) > 0.4
    allowed |= torch.eye(5, dtype=torch.bool)
    options = {
        "float": {"attn_mask": torch.zeros(2, 1, 5, 5).masked_fill(~allowed, -1e9)},
        "bool": {"attn_mask": allowed},
        "causal": {"is_causal": True},
    }[mask]
    with torch.no_grad():
        results = []
        for fused in (True, False):
            layer.fused_attn = fused
            results.append(layer(x, **options))
        assert torch.allclose(*results, atol=1e-6)
        layer.select.theta.weight.zero_()
        assert torch.allclose(layer(x, **options), plain(x, **options), atol=1e-6)


VITS = [
    ("vit_tiny_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("vit_small_patch16_18x2_224", {}),  # parallel blocks
    ("vit_small_patch14_reg4_dinov2", {}),  # register tokens, layer scale
    ("vit_medium_patch16_gap_256", {}),  # no class token
    ("vit_so150m_patch16_reg4_map_256", {}),  # attention pooling
    ("vit_wee_patch16_reg1_gap_256", {}),
    ("vit_tiny_patch16_224", {"qk_norm": True}),
]


@pytest.mark.parametrize("name,options", VITS)
def test_open_masks_are_timms_transformer(name, options):
    torch.manual_seed(0)
    settings = {**SMALL, **options}
    plain = timm.create_model(name, **settings).eval()
    selecting = timm.create_model(name, **settings).eval()
    names = replace_attention(selecting)
    assert names and all(type(selecting.get_submodule(each)) is DCSAttention for each in names)
    missing, unexpected = selecting.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and missing and all(".select.theta." in key for key in missing)
    images = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        assert torch.allclose(selecting(images), plain(images), atol=1e-5)


ROTARY = [
    ("eva02_tiny_patch14_224", {}),  # separate biases, rotary
    ("eva_large_patch14_196", {}),  # without rotary
    ("vit_small_patch16_rope_224", {}),
    ("vit_small_patch16_rope_mixed_224", {}),
    ("vit_pe_core_tiny_patch16_384", {}),
    ("vit_small_patch16_dinov3", {}),  # rotation by halves, register tokens
    ("vit_small_patch16_dinov3_qkvb", {}),
]


@pytest.mark.parametrize("name,options", ROTARY)
def test_open_masks_are_timms_rotary_transformer(name, options):
    if not timm.is_model(name):
        pytest.skip("this version of timm does not have it")
    torch.manual_seed(0)
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, "img_size": (32, 16), "patch_size": 8}
    plain = timm.create_model(name, **settings, **options).eval()
    for key, value in plain.named_parameters():
        if ".attn." in key:
            torch.nn.init.normal_(value, std=0.3)  # timm starts with attention that is nearly uniform
        elif "gamma" in key:
            torch.nn.init.ones_(value)
    selecting = copy.deepcopy(plain)
    names = replace_attention(selecting)
    assert names == ["blocks.0.attn", "blocks.1.attn"]
    missing, unexpected = selecting.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and missing and all(".select.theta." in key for key in missing)
    images = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        wanted = plain(images)
        for fused in (True, False):
            for each in names:
                selecting.get_submodule(each).fused_attn = fused
            assert torch.allclose(selecting(images), wanted, atol=1e-5)
        for each in names:
            torch.nn.init.normal_(selecting.get_submodule(each).select.theta.weight)
            torch.nn.init.zeros_(selecting.get_submodule(each).select.theta.bias)
        assert not torch.allclose(selecting(images), wanted, atol=1e-3)


def test_channels_are_selected_behind_the_rotation():
    torch.manual_seed(0)
    plain = AttentionRope(8, 2, num_prefix_tokens=1).double().eval()
    layer = DCSAttentionRope.from_attention(copy.deepcopy(plain)).double().eval()
    torch.nn.init.normal_(layer.select.theta.weight)
    torch.nn.init.zeros_(layer.select.theta.bias)
    x, rope = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    mask = (layer.select.theta(x[0]) > 0).double()
    qkv = plain.qkv(x[0]).view(5, 3, 2, 4)
    sin, cos = rope.chunk(2, dim=1)
    rows = []
    for t in range(5):
        parts = []
        for h in range(2):

            def turned(which, token, h=h):
                vector = qkv[token, which, h]
                if token > 0:  # interleaved pairs (a, b) -> (-b, a)
                    crossed = torch.stack([-vector[1::2], vector[0::2]], dim=1).flatten()
                    vector = vector * cos[token - 1] + crossed * sin[token - 1]
                return vector * mask[token, 4 * h : 4 * h + 4]

            scores = torch.stack([(turned(0, t) * turned(1, s)).sum() / 2.0 for s in range(5)])
            weights = scores.softmax(dim=0)
            parts.append(sum(weights[s] * qkv[s, 2, h] for s in range(5)))
        rows.append(torch.cat(parts))
    wanted = plain.proj(torch.stack(rows))
    assert torch.allclose(layer(x, rope=rope)[0], wanted, atol=1e-12)


def test_open_masks_are_timms_vit_base_at_full_width():
    torch.manual_seed(0)
    options = {"depth": 2, "num_classes": 0, "img_size": (256, 128)}
    plain = timm.create_model("vit_base_patch16_224", **options).eval()
    selecting = copy.deepcopy(plain)
    replace_attention(selecting)
    images = torch.randn(1, 3, 256, 128)
    with torch.no_grad():
        assert torch.allclose(selecting(images), plain(images), atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet10t"])
def test_networks_without_plain_attention_are_refused(name):
    with pytest.raises(UserError, match=r"rib\.attention dcs.*backbone\.name"):
        replace_attention(timm.create_model(name))


def test_attention_under_bfloat16_autocast():
    torch.manual_seed(0)
    layer = DCSAttention(16, 2, init_bias=0.3).train()
    x = torch.randn(2, 6, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.select.theta.weight.grad.dtype == torch.float32
    assert all(torch.isfinite(value.grad).all() for value in layer.parameters())


# --- non-local block of a CNN -----------------------------------------------------------------------------------------
def non_local_by_loops(x, block, mask):
    """X + BN(W softmax((X * M)(X * M)^T / sqrt(D)) g(X)) of one image (T, D), BN by its running statistics."""
    tokens, channels = x.shape
    values = x @ block.value.weight.t() + block.value.bias
    rows = []
    for t in range(tokens):
        scores = torch.stack([(x[t] * mask[t] * x[s] * mask[s]).sum() / math.sqrt(channels) for s in range(tokens)])
        weights = scores.exp() / scores.exp().sum()
        rows.append(sum(weights[s] * values[s] for s in range(tokens)))
    out = torch.stack(rows) @ block.proj.weight[:, :, 0, 0].t()
    bn = block.bn
    return x + (out - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias


def test_non_local_block_against_loops_with_gradients():
    torch.manual_seed(0)
    noise = RecordedNoise(2)
    block = DCSNonLocal(8, reduction=2, init_bias=0.3, noise=noise).double().train()
    torch.nn.init.normal_(block.select.theta.weight, std=0.5)
    torch.nn.init.normal_(block.bn.weight)
    block.bn.running_mean.normal_()
    block.bn.running_var.uniform_(0.5, 2.0)
    block.bn.eval()
    x = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 8, 2, 3, dtype=torch.float64)
    out = block(x)
    values = [x, *block.parameters()]
    found = torch.autograd.grad(out, values, upstream)
    wanted_out = []
    for b in range(2):
        tokens = x[b].flatten(1).t()
        shifted = tokens @ block.select.theta.weight.t() + block.select.theta.bias + noise.drawn[0][b].double()
        soft = torch.sigmoid(shifted)
        mask = (shifted > 0).double().detach() + soft - soft.detach()
        wanted_out.append(non_local_by_loops(tokens, block, mask).t().reshape(8, 2, 3))
    wanted_out = torch.stack(wanted_out)
    wanted = torch.autograd.grad(wanted_out, values, upstream)
    assert torch.allclose(out, wanted_out, atol=1e-12)
    for name, left, right in zip(["x", *dict(block.named_parameters())], found, wanted):
        assert torch.allclose(left, right, atol=1e-10), name


CNNS = {
    "resnet50": ["layer3", "layer4"],
    "resnet18": ["layer3", "layer4"],
    "osnet_x0_25": ["conv4", "conv5"],
    "mobilenetv2_x1_0": ["conv8", "conv9"],
}


@pytest.mark.parametrize("name,places", CNNS.items())
def test_non_local_blocks_of_the_hosts_networks(name, places):
    torch.manual_seed(0)
    plain = host.build_model(name, 5, "triplet", False, False).eval()
    network = copy.deepcopy(plain)
    found = place_dcs(network, [], image_size=(64, 32), reduction=2, init_bias=2.0, noise=GateNoise(0))
    assert found == places
    assert all(isinstance(child, type(other)) for child, other in zip(network.children(), plain.children()))
    assert not any(module.training for module in network.modules())
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and missing and all(".dcs." in key for key in missing)
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.allclose(network(images), plain(images), atol=1e-6)  # the identity at the start
    assert ChannelSelection(network).names == [f"{place}.dcs" for place in places]
    for module in network.modules():
        if isinstance(module, DCSNonLocal):
            torch.nn.init.ones_(module.bn.weight)
    with torch.no_grad():
        assert not torch.allclose(network(images), plain(images), atol=1e-3)  # it is there
    copied = copy.deepcopy(network)
    with torch.no_grad():
        assert torch.equal(copied(images), network(images))


def test_places_by_name_and_unknown_places():
    network = host.build_model("resnet18", 5, "triplet", False, False)
    options = {"image_size": (64, 32), "reduction": 2, "init_bias": 2.0, "noise": GateNoise(0)}
    assert place_dcs(network, ["layer2", "layer4.0"], **options) == ["layer2", "layer4.0"]
    assert network.layer2.dcs.value.in_features == 128
    with pytest.raises(UserError, match=r"rib\.places.*'layer5'.*layer"):
        place_dcs(network, ["layer5"], **options)
    with pytest.raises(UserError, match=r"rib\.places"):
        place_dcs(host.build_model("hacnn", 5, "triplet", False, False), [], **options)


# --- temperature and kept channels ------------------------------------------------------------------------------------
def test_temperature_schedules():
    def at(epoch, schedule):
        return temperature_at(epoch, 11, start=2.0, end=0.5, schedule=schedule)

    for schedule in ("linear", "cosine", "exponential"):
        assert at(0, schedule) == pytest.approx(2.0) and at(10, schedule) == pytest.approx(0.5)
        values = [at(epoch, schedule) for epoch in range(11)]
        assert all(later < earlier for earlier, later in zip(values, values[1:]))
    assert at(5, "linear") == pytest.approx(1.25)
    assert at(5, "cosine") == pytest.approx(1.25) and at(2, "cosine") > at(2, "linear")
    assert at(5, "exponential") == pytest.approx(1.0)
    assert [at(epoch, "constant") for epoch in (0, 10)] == [2.0, 2.0]
    assert temperature_at(0, 1, start=2.0, end=0.5) == 0.5
    with pytest.raises(ValueError, match="linear"):
        at(0, "step")


def test_kept_rates_are_counted_exactly():
    torch.manual_seed(0)
    noise = RecordedNoise(4)
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL)
    replace_attention(vit, init_bias=0.5, noise=noise)
    selection = ChannelSelection(vit)
    assert selection.names == [f"blocks.{index}.attn" for index in range(3)]
    for gate in selection.gates.values():
        torch.nn.init.normal_(gate.theta.weight, std=0.7)
    logits = {name: [] for name in selection.names}
    for name, gate in selection.gates.items():
        gate.theta.register_forward_hook(lambda module, inputs, out, name=name: logits[name].append(out.detach()))
    vit.train()
    for _ in range(2):
        vit(torch.randn(2, 3, 32, 16))
    kept = {name: [] for name in selection.names}
    for index, drawn in enumerate(noise.drawn):
        name = selection.names[index % 3]
        kept[name].append((logits[name][index // 3] + drawn > 0).double())
    rates = selection.kept_rates(reset=True)
    for name in selection.names:
        assert rates[name]["train"] == pytest.approx(float(torch.cat(kept[name]).mean()), abs=1e-12)
        rule = torch.cat([value > 0 for value in logits[name]]).double()
        assert rates[name]["test"] == pytest.approx(float(rule.mean()), abs=1e-12)
        assert 0 < rates[name]["train"] < 1
    assert selection.kept_rates() == {}
    vit.eval()(torch.randn(2, 3, 32, 16))
    assert selection.kept_rates() == {}


def test_temperature_reaches_all_gates_and_noise_is_checkpointed_once():
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL)
    replace_attention(vit, noise=GateNoise(4))
    selection = ChannelSelection(vit)
    selection.set_temperature(0.25)
    assert {gate.temperature for gate in selection.gates.values()} == {0.25}
    vit.train()
    images = torch.randn(2, 3, 32, 16)
    vit(images)
    state = selection.state_dict()
    assert len(state["noise"]) == 1
    first = vit(images)
    selection.load_state_dict(state)
    assert torch.equal(vit(images), first)
    assert not torch.equal(vit(images), first)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gates_on_a_gpu():
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL).cuda()
    replace_attention(vit, init_bias=0.5, noise=GateNoise(4))
    vit.cuda().train()
    state = torch.cuda.get_rng_state()
    vit(torch.randn(2, 3, 32, 16, device="cuda")).sum().backward()
    rates = ChannelSelection(vit).kept_rates()
    assert all(0 < value["train"] < 1 for value in rates.values())
    assert state.shape == torch.cuda.get_rng_state().shape
