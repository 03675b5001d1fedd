"""Controls for RIB's claims: drawn gates, and label smoothing of like strength in the bound's place."""

from __future__ import annotations

import math

import pytest
import torch

from relreid_plugin.config.defaults import get_default_config, load_config, merge_from_list, validate
from relreid_plugin.config.idle import idle_settings
from relreid_plugin.engine.evaluator import inference_parameters
from relreid_plugin.engine.resume import _matches, resume_keys
from relreid_plugin.errors import UserError
from relreid_plugin.rib.control import random_logits, smoothed_entropy, smoothing_of_like_strength
from relreid_plugin.rib.dcs import ChannelGate, ChannelSelection, GateNoise
from relreid_plugin.rib.models import transreid, vit_baseline
from relreid_plugin.rib.observers import BoundObserver
from relreid_plugin.rib.tables import control_variants, signal_table


def logits(channels=200, keep=0.7, keep_noise=0.6, *, open_at=0.9, seed=0):
    return random_logits(channels, keep, keep_noise, open_at=open_at, generator=torch.Generator().manual_seed(seed))


# --- drawn gates ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_drawn_logits_keep_both_shares(keep, place):
    """The share above 0, and, by a loop over the channels, the expected share under logistic noise."""
    keep_noise = keep / 2 + place / 2  # any gate that keeps `keep` lies between keep / 2 and (1 + keep) / 2
    found = logits(keep=keep, keep_noise=keep_noise)
    assert int((found > 0).sum()) == round(200 * keep) and not bool((found == 0).any())
    expected = sum(1 / (1 + math.exp(-float(value))) for value in found) / 200  # P(value + noise > 0)
    assert expected == pytest.approx(keep_noise, abs=1e-6)


def test_drawn_logits_without_a_share_under_noise_open_as_learned_gates_do():
    found = logits(keep_noise=None, open_at=0.88)
    assert torch.sigmoid(found[found > 0]).tolist() == pytest.approx([0.88] * 140, abs=1e-6)


def test_shares_that_no_gate_has_are_brought_in():
    """Rounding may ask for more noise than there is; logits stay finite, and the share without noise is kept."""
    for keep_noise in (0.0, 1.0):
        found = logits(keep_noise=keep_noise)
        assert bool(torch.isfinite(found).all()) and int((found > 0).sum()) == 140


def test_channels_are_drawn_by_the_seed():
    one, same, other = (logits(seed=seed) > 0 for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert 0.3 < float((one & other).double().mean()) < 0.7  # 0.49 by chance
    halves = torch.stack([logits(seed=seed) > 0 for seed in range(60)]).double().mean(dim=0)
    assert float((halves - 0.7).abs().max()) < 0.35  # no channel is preferred


def build(*keys, model=vit_baseline, cameras=0):
    cfg = get_default_config()
    small = ["backbone.name", "timm:vit_tiny_patch16_224", "vit.patch_size", "16", "vit.depth", "2", "vit.stride", "8"]
    name = ["model.name", model.__name__, "data.height", "64", "data.width", "32", "rib.attention", "dcs", "vit.shift", "3"]
    merge_from_list(cfg, [*small, *name, "loss.name", "composite", *keys])
    torch.manual_seed(4)
    return model(5, pretrained=False, cfg=cfg, num_cameras=cameras)


RANDOM = ["rib.dcs.control", "random", "rib.dcs.keep"]


def test_control_has_the_same_parameters_start_and_noise_as_learned_gates():
    learned, drawn = build(), build(*RANDOM, "[0.7, 0.4]", "rib.dcs.keep_noise", "[0.6]")
    assert inference_parameters(learned) == inference_parameters(drawn)
    assert [name for name, _ in learned.named_parameters()] == [name for name, _ in drawn.named_parameters()]
    assert all(torch.equal(one, other) for one, other in zip(learned.parameters(), drawn.parameters()))
    assert set(drawn.state_dict()) - set(learned.state_dict()) == {f"vit.blocks.{n}.attn.select.drawn" for n in (0, 1)}
    noises = [next(iter(ChannelSelection(model).gates.values())).noise for model in (learned, drawn)]
    draws = [noise.sample(torch.Size([5]), torch.device("cpu")) for noise in noises]
    assert torch.equal(*draws)


def test_drawn_gates_mask_by_their_logits_and_learn_nothing():
    """By a loop: open where logit + noise > 0 in training, where logit > 0 in testing; the same for every token."""
    model = build(*RANDOM, "[0.7]", "rib.dcs.keep_noise", "[0.6]").train()
    gate = model.vit.blocks[0].attn.select
    x = torch.randn(2, 3, 192)
    gate.noise = GateNoise(7)
    mask = gate(x)
    noise = GateNoise(7).sample(torch.Size([2, 3, 192]), torch.device("cpu"))
    for image in range(2):
        for token in range(3):
            wanted = [float(a + b > 0) for a, b in zip(gate.drawn, noise[image, token])]
            assert mask[image, token].tolist() == wanted
    gate.eval()
    assert torch.equal(gate(x), (gate.drawn > 0).float().expand(2, 3, 192))
    rates = ChannelSelection(model).kept_rates()["vit.blocks.0.attn"]
    assert rates["test"] == round(0.7 * 192) / 192 and rates["train"] == pytest.approx(0.6, abs=0.05)
    output = model(torch.randn(2, 3, 64, 32))
    (output[0].sum() + output[1].square().sum()).backward()
    assert gate.theta.weight.grad is None and gate.theta.bias.grad is None
    assert model.vit.blocks[0].attn.qkv.weight.grad is not None


def test_shares_are_the_gates_in_the_models_order():
    model = build(*RANDOM, "[0.25, 0.75]")
    shares = [float((gate.drawn > 0).double().mean()) for gate in ChannelSelection(model).gates.values()]
    assert shares == [0.25, 0.75]
    with pytest.raises(UserError, match=r"'rib\.dcs\.keep' holds 3 shares, but the model has 2 gates; give 1 or 2"):
        build(*RANDOM, "[0.2, 0.3, 0.4]")
    with pytest.raises(UserError, match=r"keep_noise' holds 3 shares"):
        build(*RANDOM, "[0.2]", "rib.dcs.keep_noise", "[0.2, 0.3, 0.4]")


def test_transreids_jigsaw_gate_is_drawn_too():
    model = build(*RANDOM, "[0.25, 0.5, 0.75]", "loss.composite.triplet", "1", model=transreid)
    gates = ChannelSelection(model).gates.values()
    assert [float((gate.drawn > 0).double().mean()) for gate in gates] == [0.25, 0.5, 0.75]


def test_gates_of_a_cnn_are_drawn(tmp_path):
    from relreid_plugin import host

    cfg = get_default_config()
    keys = ["model.name", "bnneck_baseline", "backbone.name", "torchvision:resnet18", "rib.attention", "dcs"]
    merge_from_list(cfg, [*keys, *RANDOM, "[0.25, 0.75]", "data.height", "64", "data.width", "32", "head.feature_dim", "32"])
    model = host.build_model("bnneck_baseline", 4, "triplet", False, False, cfg=cfg)
    gates = ChannelSelection(model).gates.values()
    assert [float((gate.drawn > 0).double().mean()) for gate in gates] == [0.25, 0.75]


def test_a_gate_alone_is_learned():
    gate = ChannelGate(4, 6)
    assert gate.drawn is None and "drawn" not in gate.state_dict()


def test_what_does_not_go_together():
    cfg = get_default_config()
    merge_from_list(cfg, ["model.name", "vit_baseline", "rib.attention", "dcs", "rib.dcs.control", "random"])
    with pytest.raises(UserError, match=r"needs 'rib\.dcs\.keep'"):
        validate(cfg)
    merge_from_list(cfg, ["rib.dcs.keep", "[0.7]", "rib.dcs.lr_mult", "3.0"])
    validate(cfg)
    assert any("rib.dcs.lr_mult 3.0" in said and "trains no gates" in said for said in idle_settings(cfg))
    merge_from_list(cfg, ["rib.dcs.control", "none"])
    assert any("rib.dcs.keep" in said and "control random" in said for said in idle_settings(cfg))
    merge_from_list(cfg, ["rib.dcs.keep", "[1.5]"])
    with pytest.raises(UserError, match=r"rib\.dcs\.keep"):
        validate(cfg)


def test_a_test_with_drawn_gates_is_not_that_of_the_run():
    """What the gates are is read by a test of trained weights; how they were trained is not."""
    training = resume_keys().training
    matched = {key for key in ("control", "keep", "keep_noise", "lr_mult", "seed") if _matches(f"rib.dcs.{key}", training)}
    assert matched == {"lr_mult", "seed"}


# --- label smoothing in the bound's place -----------------------------------------------------------------------------
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("classes", [2, 110])
def test_entropy_of_the_best_prediction_against_a_loop(smoothing, classes):
    target = [smoothing / classes + (1 - smoothing) * (label == 0) for label in range(classes)]
    wanted = -sum(value * math.log(value) for value in target if value > 0)
    assert smoothed_entropy(smoothing, classes) == pytest.approx(wanted, abs=1e-12)


def test_smoothing_of_like_strength_changes_the_entropy_as_much():
    start = smoothed_entropy(0.1, 110)
    for change in (-0.4, -0.1, 0.0, 0.3, 1.5):
        found = smoothing_of_like_strength(change, smoothing=0.1, classes=110)
        assert smoothed_entropy(found, 110) - start == pytest.approx(change, abs=1e-4)
    assert smoothing_of_like_strength(-3.0, smoothing=0.1, classes=110) == 0.0  # out of reach
    assert smoothing_of_like_strength(9.0, smoothing=0.1, classes=110) == pytest.approx(0.99, abs=1e-5)


def test_entropy_of_predictions_against_a_loop():
    class Bound:
        def end_epoch(self):
            return {"ibb": 0.5}

    observer = BoundObserver(Bound(), eta=1.0, warmup=0.0, max_epoch=2)
    batches = [torch.randn(3, 4), torch.randn(5, 4)]
    observer.begin(0)
    observer.see(torch.zeros(2, 4), torch.zeros(2))  # of an epoch before
    observer.begin(1)
    values = []
    for batch in batches:
        observer.see(batch, torch.zeros(len(batch)))
        for row in batch.double():
            shares = [math.exp(float(value)) / sum(math.exp(float(other)) for other in row) for value in row]
            values.append(-sum(share * math.log(share) for share in shares))
    assert observer.end() == {"ibb": 0.5, "entropy": pytest.approx(sum(values) / 8, abs=1e-6), "eta": 1.0}


def test_smoothing_is_said_to_be_idle_without_label_smoothing():
    keys = ["loss.softmax.label_smooth", "False", "loss.composite.smoothing", "0.4"]
    assert any("loss.composite.smoothing" in said for said in idle_settings(load_config("rib_dcs_vit_embedded.yml", keys)))


# --- the table --------------------------------------------------------------------------------------------------------
LAST = {"entropy": 1.0, "kept/a": 0.61234, "kept_test/a": 0.7, "kept/b": 0.5, "kept_test/b": 0.4}


def test_controls_follow_from_the_learned_runs():
    cfg = load_config("rib_dcs_vit_embedded.yml")
    drawn, like = control_variants(cfg, LAST, {"entropy": 0.8}, classes=110)
    keys = dict(zip(drawn.overrides[::2], drawn.overrides[1::2]))
    assert keys == {
        **{"rib.ibb.eta": "0", "rib.ibb.measure": "True", "rib.dcs.control": "random"},
        **{"rib.dcs.keep": "[0.7, 0.4]", "rib.dcs.keep_noise": "[0.6123, 0.5]"},
    }
    keys = dict(zip(like.overrides[::2], like.overrides[1::2]))
    found = float(keys["loss.composite.smoothing"])
    assert smoothed_entropy(found, 110) - smoothed_entropy(0.1, 110) == pytest.approx(-0.2, abs=1e-3)
    assert keys["rib.ibb.eta"] == "0" and keys["loss.softmax.label_smooth"] == "True" and "rib.dcs.control" not in keys
    only = control_variants(load_config("rib_ca_se_embedded.yml"), {"entropy": 1.0}, {"entropy": 1.0}, classes=110)
    assert [variant.key for variant in only] == ["smoothing"] and "0.1000" in only[0].overrides


def test_signal_of_controls():
    signal = {"ibb_warmup": 0.2, "ibb_last": 0.1, "bound_holds": 3, "epochs_measured": 4, "kept": {}}
    both = [{**signal, "smoothing": 0.1, "entropy": 2.0}, {**signal, "smoothing": 0.05, "entropy": 3.0}]
    text = signal_table([{"variant": "v", "title": "one", "signal": both}])
    assert text.splitlines()[-1] == "| one | 0.2000 ± 0.0000 | 0.1000 ± 0.0000 | 6 of 8 epochs | 0.075 | 2.500 | - |"
