"""Which key reaches which part of a model, and what RIB's observers do with an epoch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relreid_plugin import methods
from relreid_plugin.backbones import baseline
from relreid_plugin.config.defaults import get_default_config, merge_from_list
from relreid_plugin.engine import models
from relreid_plugin.errors import UserError
from relreid_plugin.graft import build as graft_models
from relreid_plugin.rib import models as rib_models
from relreid_plugin.rib import observers as rib
from relreid_plugin.rib.dcs import ChannelSelection, GateNoise

KEYS = {
    "backbone.name": "timm:vit_x",
    "backbone.weights": "file.pth",
    "backbone.output_stride": 8,
    "model.partial_weights": True,
    "head.feature_dim": 77,
    "head.neck_feature": "before",
    "vit.patch_size": 4,
    "vit.depth": 3,
    "vit.drop_path": 0.25,
    "vit.stride": 5,
    "vit.camera_weight": 1.5,
    "vit.parts": 2,
    "vit.shift": 7,
    "vit.groups": 3,
    "data.height": 48,
    "data.width": 24,
    "rib.dcs.seed": 11,
    "rib.dcs.init_bias": 1.25,
    "rib.dcs.reduction": 4,
    "rib.reduction": 8,
    "graft.fusion": "late",
    "graft.heads": 2,
    "graft.feedforward": 33,
    "graft.dropout": 0.3,
    "graft.token_index": 2,
    "graft.checkpointing": True,
    "multimodal.modalities": ["N", "R"],
}
"""Every value differs from its default and from the others."""


def builders():
    """Name of a model to its builder."""
    return {"bnneck_baseline": models.bnneck_baseline, **methods.builders()}


@pytest.fixture
def calls(monkeypatch):
    """What the builders ask their parts for: name to (positional arguments, keyword arguments)."""
    seen: dict[str, tuple[tuple, dict]] = {}

    def watch(name, result=None):
        def call(*args, **options):
            seen[name] = (args, options)
            return seen.setdefault(f"{name} result", result if result is not None else object())

        for module in (models, baseline, rib_models, graft_models):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, call)

    class Backbone:
        body = nn.Identity()

    watch("build_backbone", Backbone())
    watch("build_vit", nn.Identity())
    for name in ("BNNeckBaseline", "VisionTransformerReID", "GraFT", "replace_attention", "place_dcs"):
        watch(name)
    watch("place_channel_attention")
    return seen


def settings(*overrides):
    cfg = get_default_config()
    flat = [word for pair in KEYS.items() for word in pair]
    merge_from_list(cfg, [str(word) for word in (*flat, *overrides)])
    return cfg


def test_keys_of_the_baseline(calls):
    cfg = settings()
    model = models.bnneck_baseline(9, "triplet", False, cfg=cfg)
    assert calls["build_backbone"] == (
        ("timm:vit_x",),
        {
            "pretrained": False,
            "weights": "file.pth",
            "partial": True,
            "output_stride": 8,
            "image_size": (48, 24),
            "host_builder": models.host_features,
        },
    )
    backbone = calls["build_backbone result"]
    assert calls["BNNeckBaseline"] == ((backbone, 9), {"feature_dim": 77, "neck_feature": "before"})
    assert model is calls["BNNeckBaseline result"] and "place_dcs" not in calls
    models.bnneck_baseline(9, "triplet", True, cfg=settings("rib.attention", "se"))
    assert calls["build_backbone"][1]["pretrained"] is True
    assert calls["place_channel_attention"] == ((backbone.body, "se", []), {"reduction": 8})
    models.bnneck_baseline(9, cfg=settings("rib.attention", "cbam", "rib.places", ["layer3"]))
    assert calls["place_channel_attention"] == ((backbone.body, "cbam", ["layer3"]), {"reduction": 8})


def test_keys_of_channel_selection(calls):
    cfg = settings("rib.attention", "dcs", "rib.places", ["layer2", "layer4"])
    network = nn.Identity()
    rib_models.add_attention(cfg, network)
    args, options = calls["place_dcs"]
    noise = options.pop("noise")
    assert args == (network, ["layer2", "layer4"])
    assert options == {"image_size": (48, 24), "reduction": 4, "init_bias": 1.25}
    assert isinstance(noise, GateNoise) and noise.seed == 11
    transformer = nn.Identity()
    transformer.blocks, transformer.patch_embed = nn.Identity(), nn.Identity()
    with pytest.raises(UserError, match="'rib.places' is for CNNs"):
        rib_models.add_attention(cfg, transformer)
    rib_models.add_attention(settings("rib.attention", "dcs"), transformer)
    args, options = calls["replace_attention"]
    assert args == (transformer,) and options["init_bias"] == 1.25 and options["noise"].seed == 11
    half = nn.Identity()
    half.blocks = nn.Identity()  # blocks alone make no transformer
    calls.pop("replace_attention")
    rib_models.add_attention(settings("rib.attention", "dcs"), half)
    assert calls["place_dcs"][0] == (half, []) and "replace_attention" not in calls


def test_keys_of_transformers(calls):
    cfg = settings()
    for build, options in (
        (rib_models.vit_baseline, {}),
        (
            rib_models.transreid,
            {"stride": 5, "num_cameras": 6, "camera_weight": 1.5, "parts": 2, "shift": 7, "groups": 3},
        ),
    ):
        model = build(9, "triplet", False, cfg=cfg, num_cameras=6)
        assert calls["build_vit"] == (
            ("timm:vit_x",),
            {
                "pretrained": False,
                "weights": "file.pth",
                "partial": True,
                "patch_size": 4,
                "depth": 3,
                "drop_path": 0.25,
            },
        )
        wanted = {"image_size": (48, 24), "neck_feature": "before", **options}
        assert calls["VisionTransformerReID"] == ((calls["build_vit result"], 9), wanted)
        assert model is calls["VisionTransformerReID result"]
    rib_models.transreid(9, cfg=settings("vit.camera_weight", 0.0), num_cameras=6)
    assert calls["VisionTransformerReID"][1]["num_cameras"] == 0 and calls["build_vit"][1]["pretrained"] is True
    rib_models.transreid(9, cfg=cfg)
    assert calls["VisionTransformerReID"][1]["num_cameras"] == 0
    rib_models.vit_baseline(9, cfg=cfg)
    assert calls["build_vit"][1]["pretrained"] is True
    chosen = settings("rib.attention", "dcs")
    vit = calls["build_vit result"]
    vit.blocks = vit.patch_embed = nn.Identity()
    rib_models.vit_baseline(9, cfg=chosen)
    assert calls["replace_attention"][0] == (vit,)


def test_keys_of_graft(calls):
    cfg = settings()
    model = graft_models.graft(9, "triplet", False, cfg=cfg)
    (backbone, classes), options = calls["GraFT"]
    assert classes == 9 and model is calls["GraFT result"]
    assert options == {
        "modalities": ["N", "R"],
        "fusion": "late",
        "heads": 2,
        "feedforward": 33,
        "dropout": 0.3,
        "token_index": 2,
        "checkpointing": True,
    }
    for pretrained in (False, True):
        graft_models.graft(9, "triplet", pretrained, cfg=cfg)
        assert calls["GraFT"][0][0](6) is calls["build_vit result"]
        assert calls["build_vit"] == (
            ("timm:vit_x",),
            {
                "pretrained": pretrained,
                "weights": "file.pth",
                "partial": True,
                "patch_size": 4,
                "depth": 3,
                "drop_path": 0.25,
                "image_size": (48, 24),
                "channels": 6,
            },
        )


@pytest.mark.parametrize("name", ["bnneck_baseline", "vit_baseline", "transreid", "graft"])
def test_models_with_features_refuse_cross_entropy_alone(name, calls):
    with pytest.raises(UserError, match=f"'model.name {name}' trains with 'loss.name composite' or 'triplet'"):
        builders()[name](9, "softmax", False, cfg=settings())
    builders()[name](9, pretrained=False)  # the defaults, and triplet
    used = "build_backbone" if name == "bnneck_baseline" else "build_vit" if name != "graft" else "GraFT"
    defaults = get_default_config()
    assert calls[used][0][0] == defaults.backbone.name or name == "graft"


def test_a_network_of_the_host_loses_its_classifier(monkeypatch):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(2, 3)

    made = []
    monkeypatch.setattr(models, "build_model", lambda *args: made.append(args) or Network())
    assert isinstance(models.host_features("osnet", True).classifier, nn.Identity)
    assert made == [("osnet", 1, "triplet", True, False)]
    monkeypatch.setattr(models, "build_model", lambda *args: nn.Linear(2, 2))
    assert not hasattr(models.host_features("osnet", False), "classifier")


def test_models_are_registered_under_their_names(monkeypatch):
    made = {}
    monkeypatch.setattr(models, "register_model", made.__setitem__)
    models.register_models()
    names = {"bnneck_baseline", "vit_baseline", "transreid", "graft"}
    assert set(made) == names and all(callable(builder) and builder.__name__ == name for name, builder in made.items())
    assert made["bnneck_baseline"] is models.bnneck_baseline


def test_what_a_model_is_built_with_by_default(calls):
    models.bnneck_baseline(9, cfg=settings())
    assert calls["build_backbone"][1]["pretrained"] is True
    graft_models.graft(9, cfg=settings())
    calls["GraFT"][0][0](3)
    assert calls["build_vit"][1]["pretrained"] is True
    rib_models.transreid(9, cfg=settings("vit.camera_weight", 0.5), num_cameras=6)
    assert calls["VisionTransformerReID"][1]["num_cameras"] == 6


# --- RIB's observers ----------------------------------------------------------------------------------------------------


class Selection:
    def __init__(self):
        self.temperatures, self.resets = [], []

    def set_temperature(self, value):
        self.temperatures.append(value)

    def kept_rates(self, *, reset):
        self.resets.append(reset)
        return {"a": {"train": 0.5, "test": 0.75}, "b": {"train": 0.25}}


def test_gates_are_annealed_and_counted_per_epoch():
    selection = Selection()
    observer = rib.GateObserver(selection, max_epoch=5, temperature=(1.0, 0.2), schedule="linear")
    for epoch in range(5):
        observer.begin(epoch)
    assert selection.temperatures == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2]) and selection.resets == [True] * 5
    assert observer.end() == {"kept/a": 0.5, "kept_test/a": 0.75, "kept/b": 0.25}
    assert selection.resets[-1] is True
    steady = rib.GateObserver(selection, max_epoch=5, temperature=(1.0, 0.2), schedule="constant")
    steady.begin(4)
    assert selection.temperatures[-1] == 1.0


class Bound:
    def __init__(self, found):
        self.found, self.calls = found, []

    def __call__(self, features, labels, descriptor):
        self.calls.append((features, labels, descriptor))
        return torch.tensor(2.0)

    def end_epoch(self):
        return self.found


@pytest.mark.parametrize(
    ("warmup", "epochs", "wanted"), [(0.3, 10, 3), (0.25, 10, 3), (0.0, 10, 0), (1.0, 4, 4), (0.21, 5, 2)]
)
def test_the_bound_has_no_weight_in_the_warm_up(warmup, epochs, wanted):
    assert rib.warmup_epochs(warmup, epochs) == wanted
    observer = rib.BoundObserver(Bound({}), eta=0.7, warmup=warmup, max_epoch=epochs)
    assert observer.weight == 0.0
    weights = []
    for epoch in range(epochs):
        observer.begin(epoch)
        weights.append(observer.weight)
    assert weights == [0.0] * wanted + [0.7] * (epochs - wanted)


def test_the_bound_sees_pooled_images_and_reports(capsys):
    bound = Bound({"ib_bound": 1.5, "ib_estimate": 1.0, "ib_holds": 1.0})
    observer = rib.BoundObserver(bound, eta=0.7, warmup=0.0, max_epoch=2)
    images = torch.rand(2, 3, 32, 16)
    value = observer.loss(torch.ones(2, 4), torch.tensor([0, 1]), observer.describe(images))
    features, labels, descriptor = bound.calls[0]
    assert float(value) == 2.0 and torch.equal(features, torch.ones(2, 4)) and labels.tolist() == [0, 1]
    pooled = images.view(2, 3, 16, 2, 8, 2).mean(dim=(3, 5)).flatten(1)
    assert torch.allclose(descriptor, pooled, atol=1e-6) and rib.DESCRIPTOR_GRID == (16, 8)
    observer.begin(1)
    assert observer.end() == {"ib_bound": 1.5, "ib_estimate": 1.0, "ib_holds": 1.0, "eta": 0.7}
    assert capsys.readouterr().out == ""
    bound.found = {"ib_bound": 0.5, "ib_estimate": 1.0, "ib_holds": 0.0}
    assert observer.end()["ib_holds"] == 0.0 and "warning: the bound 0.5" in capsys.readouterr().out
    bound.found = {"ib_bound": 0.5, "ib_estimate": 0.1}
    assert observer.end() == {"ib_bound": 0.5, "ib_estimate": 0.1, "eta": 0.7} and capsys.readouterr().out == ""
    bound.found = None
    assert observer.end() == {}


def test_keys_of_the_observers(monkeypatch):
    cfg = settings("train.max_epoch", 6, "rib.dcs.temperature", [2.0, 0.5], "rib.dcs.schedule", "cosine")
    assert rib.build_gate_observer(cfg, nn.Identity()) is None
    cfg.rib.attention = "dcs"
    observer = rib.build_gate_observer(cfg, nn.Identity())
    assert isinstance(observer.selection, ChannelSelection)
    assert (observer.max_epoch, observer.temperature, observer.schedule) == (6, (2.0, 0.5), "cosine")
    assert rib.build_bound_observer(cfg, num_classes=4, feature_dim=5) is None
    merge_from_list(
        cfg, ["rib.ibb.measure", "True", "rib.ibb.beta", "3.5", "rib.ibb.epsilon", "1e-5", "rib.ibb.warmup", "0.5"]
    )
    made = []
    monkeypatch.setattr(
        rib, "InformationBottleneckBound", lambda *args, **options: made.append((args, options)) or Bound({})
    )
    measured = rib.build_bound_observer(cfg, num_classes=4, feature_dim=5)
    assert made == [((4, 5), {"input_dim": 3 * 16 * 8, "beta": 3.5, "epsilon": 1e-5})]
    assert (measured.eta, measured.warmup_epochs) == (0.0, 3) and isinstance(measured.bound, Bound)
    cfg.rib.ibb.measure, cfg.rib.ibb.eta = False, 1.25
    assert rib.build_bound_observer(cfg, num_classes=4, feature_dim=5).eta == 1.25
