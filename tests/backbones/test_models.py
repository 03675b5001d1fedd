"""Every model that the plug-in registers, on backbones of all three sources."""

from __future__ import annotations

import pytest
import torch

import relreid_plugin
from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.engine.evaluator import inference_parameters
from relreid_plugin.errors import UserError

relreid_plugin.register()

from relreid_plugin import host  # noqa: E402
from relreid_plugin.host.registry import _PLUGIN_MODELS  # noqa: E402

BACKBONES = [
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "timm:resnet10t",
    "timm:vit_tiny_patch16_224",
    "host:osnet_x0_25",
    "host:resnet18",
]


VITS = ["timm:vit_tiny_patch16_224", "timm:deit_tiny_distilled_patch16_224", "timm:vit_wee_patch16_reg1_gap_256"]
ATTENDED = {
    "dcs": [
        *VITS,
        "timm:resnet10t",
        "timm:vit_tiny_patch16_224",
        "host:osnet_x0_25",
        "host:resnet18",
        "torchvision:resnet18",
    ],
    "se": ["timm:resnet10t", "host:osnet_x0_25", "host:resnet18", "torchvision:resnet18"],
    "cbam": ["timm:resnet10t", "host:osnet_x0_25", "host:resnet18", "torchvision:resnet18"],
}
REGISTERED = frozenset(_PLUGIN_MODELS) - {"wiring_toy"}  # of other tests
CASES = [("bnneck_baseline", backbone) for backbone in BACKBONES]
CASES += [(name, backbone) for name in ("vit_baseline", "transreid") for backbone in VITS]


def build(name, backbone, *, stride=16, size=(64, 32), dim=24, rib="none", cameras=0):
    torch.manual_seed(0)
    cfg = get_default_config()
    cfg.rib.attention, cfg.vit.depth, cfg.vit.patch_size, cfg.vit.stride = rib, 2, 8, 6
    cfg.backbone.name, cfg.backbone.output_stride, cfg.head.feature_dim = backbone, stride, dim
    cfg.data.height, cfg.data.width = size
    return host.build_model(name, 5, "triplet", False, False, cfg=cfg, num_cameras=cameras)


def test_registering_twice_is_fine():
    relreid_plugin.register()
    assert "bnneck_baseline" in host.available_models() and "embedded_persons" in host.available_image_datasets()


def test_every_registered_model_is_tested():
    assert {name for name, _ in CASES} | {"graft"} == REGISTERED  # graft: test_graft.py


@pytest.mark.parametrize(
    "name,backbone,rib",
    [
        (name, backbone, rib)
        for name, backbone in CASES
        for rib in ("none", "dcs", "se", "cbam")
        if rib == "none" or backbone in ATTENDED[rib]  # elsewhere a sentence: test_dcs.py, test_channel_attention.py
    ],
)
def test_forward_backward_and_test_features(name, backbone, rib):
    model = build(name, backbone, rib=rib, cameras=3)
    images, cameras = torch.rand(4, 3, 64, 32), torch.tensor([0, 1, 2, 7])
    inputs = (images, cameras) if name == "transreid" else (images,)
    logits, features = model.train()(*inputs)
    parts = 5 if name == "transreid" else 1
    width = model.feature_dim
    assert width == (24 if name == "bnneck_baseline" else model.vit.embed_dim)
    logits, features = (value if isinstance(value, list) else [value] for value in (logits, features))
    assert [tuple(value.shape) for value in logits] == parts * [(4, 5)]
    assert [tuple(value.shape) for value in features] == parts * [(4, width)]
    losses = [torch.nn.functional.cross_entropy(value, torch.arange(4)) for value in logits]
    (sum(losses) + sum(value.square().mean() for value in features)).backward()
    without = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)
    with torch.no_grad():
        tested = model.eval()(*inputs)
        assert tested.shape == (4, getattr(model, "test_dim", width))
        assert torch.allclose(tested.norm(dim=1), torch.ones(4), atol=1e-5)
        assert torch.equal(tested, model(*inputs))
        assert torch.allclose(model(*(value[:2] for value in inputs)), tested[:2], atol=1e-5)
    assert inference_parameters(model) == sum(v.numel() for v in model.parameters()) - parts * 5 * width


@pytest.mark.parametrize("stride,size", [(16, (16, 8)), (8, (32, 16)), (0, (8, 4))])
def test_resnet50_keeps_the_resolution_of_its_last_stage(stride, size):
    model = build("bnneck_baseline", "torchvision:resnet50", stride=stride, size=(256, 128), dim=8)
    shapes = []
    model.backbone.body.layer4.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 256, 128))
    assert tuple(shapes[0]) == size
    assert model.backbone.feature_dim == 2048


def test_resnet18_is_dilated_with_its_own_weights():
    import torchvision

    plain = torchvision.models.resnet18()
    model = build("bnneck_baseline", "torchvision:resnet18", size=(64, 64))
    own = {key: value.shape for key, value in model.backbone.body.state_dict().items()}
    assert own == {key: value.shape for key, value in plain.state_dict().items() if not key.startswith("fc.")}
    shapes = []
    model.backbone.body.layer4.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 64, 64))
    assert tuple(shapes[0]) == (4, 4)


def test_local_weights(tmp_path):
    import torchvision

    torch.manual_seed(3)
    plain = torchvision.models.resnet18()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    cfg = get_default_config()
    cfg.backbone.name, cfg.backbone.weights = "torchvision:resnet18", str(tmp_path / "weights.pth")
    model = host.build_model("bnneck_baseline", 5, "triplet", True, False, cfg=cfg)
    assert torch.equal(model.backbone.body.layer3[0].conv1.weight, plain.layer3[0].conv1.weight)
    torch.save({"other": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="another network"):
        host.build_model("bnneck_baseline", 5, "triplet", True, False, cfg=cfg)


@pytest.mark.parametrize("backbone", ["resnet5", "timm:resnet5o", "host:osnet_x0_26", "other:resnet50"])
def test_unknown_backbones_are_named(backbone):
    with pytest.raises(UserError, match="resnet|osnet"):
        build("bnneck_baseline", backbone)


def test_backbones_with_several_features_are_refused():
    with pytest.raises(UserError, match="backbone.name"):
        build("bnneck_baseline", "host:hacnn", size=(160, 64))
