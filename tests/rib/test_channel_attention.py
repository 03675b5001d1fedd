"""RIB-CA: squeeze-and-excitation and CBAM in the residual blocks of CNNs, by formula and by place."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import SEModule
from timm.layers.cbam import CbamModule
from torch import nn

import relreid_plugin
from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.errors import UserError
from relreid_plugin.rib.insertion import insert_after
from relreid_plugin.rib.placement import CHANNEL_ATTENTION, place_channel_attention

relreid_plugin.register()

from relreid_plugin import host  # noqa: E402

NETWORKS = {
    "host:resnet50": (lambda: host.build_model("resnet50", 5, "triplet", False, False), 16),
    "host:resnet18": (lambda: host.build_model("resnet18", 5, "triplet", False, False), 8),
    "host:osnet_x0_25": (lambda: host.build_model("osnet_x0_25", 5, "triplet", False, False), 6),
    "torchvision:resnet18": (torchvision.models.resnet18, 8),
    "timm:resnet10t": (lambda: timm.create_model("resnet10t"), 4),
}


# --- the formulas -----------------------------------------------------------------------------------------------------
def convolve(x, weight, bias=None):
    """1x1 convolution (C, h, w) by loops over places."""
    out = torch.zeros(weight.shape[0], *x.shape[1:], dtype=x.dtype)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = weight[:, :, 0, 0] @ x[:, i, j] + (bias if bias is not None else 0)
    return out


def squeeze_excite(x, module):
    """Hu et al. 2018: x_c * sigmoid(W2 relu(W1 mean(x)))_c."""
    channels = x.shape[0]
    mean = torch.stack([x[c].sum() / x[c].numel() for c in range(channels)])
    hidden = (module.fc1.weight[:, :, 0, 0] @ mean + module.fc1.bias).clamp_min(0)
    gate = torch.sigmoid(module.fc2.weight[:, :, 0, 0] @ hidden + module.fc2.bias)
    return torch.stack([x[c] * gate[c] for c in range(channels)])


def cbam(x, module):
    """Woo et al. 2018: channel attention by mean and maximum, then spatial attention by their maps over the channels."""
    channels, height, width = x.shape
    mean = torch.stack([x[c].mean() for c in range(channels)])
    peak = torch.stack([x[c].max() for c in range(channels)])
    first, second = module.channel.fc1.weight[:, :, 0, 0], module.channel.fc2.weight[:, :, 0, 0]
    gate = torch.sigmoid(second @ (first @ mean).clamp_min(0) + second @ (first @ peak).clamp_min(0))
    x = torch.stack([x[c] * gate[c] for c in range(channels)])
    kernel = module.spatial.conv.conv.weight[0]  # (2, 7, 7)
    maps = torch.stack([x.mean(dim=0), x.amax(dim=0)])
    size = kernel.shape[-1] // 2
    out = torch.zeros(height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            for u in range(-size, size + 1):
                for v in range(-size, size + 1):
                    if 0 <= i + u < height and 0 <= j + v < width:
                        out[i, j] += (kernel[:, u + size, v + size] * maps[:, i + u, j + v]).sum()
    bn = module.spatial.conv.bn
    out = (out - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
    return x * torch.sigmoid(out)


@pytest.mark.parametrize("kind,oracle", [("se", squeeze_excite), ("cbam", cbam)])
def test_against_loops_with_gradients(kind, oracle):
    torch.manual_seed(0)
    block = CHANNEL_ATTENTION[kind](8, rd_channels=3).double().eval()
    assert type(block) is {"se": SEModule, "cbam": CbamModule}[kind]
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    values = [x, *block.parameters()]
    out, wanted = block(x), torch.stack([oracle(each, block) for each in x])
    assert torch.allclose(out, wanted, atol=1e-12)
    found = torch.autograd.grad(out, values, upstream)
    for left, right in zip(found, torch.autograd.grad(wanted, values, upstream)):
        assert torch.allclose(left, right, atol=1e-10)


# --- places -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["se", "cbam"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_residual_block_gets_one_and_names_stay(name, kind):
    torch.manual_seed(0)
    make, count = NETWORKS[name]
    plain = make().eval()
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # some networks start with branches at zero
    network = copy.deepcopy(plain)
    blocks = place_channel_attention(network, kind, [], reduction=16)
    assert len(blocks) == count
    added = [module for module in network.modules() if isinstance(module, (SEModule, CbamModule))]
    assert len(added) == count
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and missing and all(f".{kind}." in key for key in missing)
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        assert not torch.allclose(network(images), plain(images), atol=1e-4)
        assert torch.equal(copy.deepcopy(network)(images), network(images))


@pytest.mark.parametrize("kind", ["se", "cbam"])
def test_attention_is_before_the_addition(kind):
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    place_channel_attention(network, kind, ["layer1"], reduction=4)
    block = network.layer1[1]
    x = torch.randn(1, 64, 6, 4)
    with torch.no_grad():
        inner = block.conv2(block.relu(block.bn1(block.conv1(x))))
        normalised = nn.functional.batch_norm(inner, block.bn2.running_mean, block.bn2.running_var)
        wanted = torch.relu(getattr(block.bn2, kind)(normalised) + x)
        assert torch.allclose(block(x), wanted, atol=1e-5)


def test_places_restrict_it():
    network = torchvision.models.resnet18()
    assert place_channel_attention(network, "se", ["layer3", "layer4.1"], reduction=4) == [
        "layer3.0",
        "layer3.1",
        "layer4.1",
    ]
    assert network.layer3[0].bn2.se.fc1.weight.shape[0] == 64


def test_sentences_for_networks_and_places_that_do_not_fit():
    with pytest.raises(UserError, match=r"rib\.places.*'layer9'"):
        place_channel_attention(torchvision.models.resnet18(), "se", ["layer9"])
    with pytest.raises(UserError, match=r"rib\.attention se.*backbone\.name"):
        place_channel_attention(timm.create_model("vit_tiny_patch16_224", depth=1), "se", [])
    with pytest.raises(UserError, match=r"stages conv1 of a ResNet"):
        place_channel_attention(torchvision.models.resnet18(), "cbam", ["conv1"])


@pytest.mark.parametrize(
    "keys,words",
    [(["vit_baseline", "se"], "CNN"), (["resnet50", "dcs"], "bnneck_baseline"), (["osnet_x0_25", "se"], "host:osnet_x0_25")],
)
def test_models_that_cannot_take_it(keys, words):
    from relreid_plugin.config.defaults import validate

    cfg = get_default_config()
    cfg.model.name, cfg.rib.attention = keys
    with pytest.raises(UserError, match=words):
        validate(cfg)


# --- insertion --------------------------------------------------------------------------------------------------------
def test_insertion_runs_the_block_last_and_keeps_the_class():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3))).eval()
    wanted = copy.deepcopy(network)
    insert_after(network, "0", "extra", nn.Tanh())
    insert_after(network, "1", "extra", nn.Sigmoid())
    x = torch.randn(4, 3)
    assert torch.allclose(network(x), torch.sigmoid(wanted[1](torch.tanh(wanted[0](x)))))
    assert isinstance(network[0], nn.Linear) and list(network.state_dict()) == list(wanted.state_dict())
    assert not network[0].extra.training
    with pytest.raises(ValueError, match="already"):
        insert_after(network, "0", "extra", nn.Tanh())
    with pytest.raises(ValueError, match="'7'"):
        insert_after(network, "7", "extra", nn.Tanh())
