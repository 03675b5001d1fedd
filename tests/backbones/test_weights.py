"""The one loader of weight files: complete or refused, resized as the libraries do, all else named for what it is."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from relreid_plugin.backbones import load_weight_file, read_weight_file
from relreid_plugin.backbones.baseline import BNNeckBaseline
from relreid_plugin.backbones.networks import build_backbone, build_vit
from relreid_plugin.backbones.weights import state_dicts
from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.errors import UserError
from relreid_plugin.graft.model import GraFT
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.rib.transreid import VisionTransformerReID, fit_to_images

VIT = "vit_tiny_patch16_224"


class Net(nn.Module):
    """A body with batch normalisation, and a classifier."""

    def __init__(self, classes: int = 4, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, classes)


@pytest.fixture(scope="module")
def vit():
    """Weights of a small transformer of timm, with its head, at 224x224."""
    torch.manual_seed(5)
    return timm.create_model(VIT, depth=2).state_dict()


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(4)
    return torchvision.models.resnet18().state_dict()


def equal(model, state):
    own = model.state_dict()
    return all(torch.equal(own[name], value) for name, value in state.items())


def refused(model, path, *words, **options):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weight_file(model, path, key="model.load_weights", **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and message.endswith("."), message
    for word in words:
        assert word in message, message
    assert equal(model, before)
    return message


# --- complete or refused ----------------------------------------------------------------------------------------------
def test_another_depth_is_refused_with_counts_and_names(tmp_path, resnet18):
    torch.save(resnet18, tmp_path / "r18.pth")
    words = ["'layer1.0.conv3.weight'", "looks like a ResNet-18", "model.partial_weights"]
    with pytest.raises(UserError) as caught:
        build_backbone("resnet50", weights=str(tmp_path / "r18.pth"))
    for word in words:
        assert word in str(caught.value), caught.value
    refused(torchvision.models.resnet50(), tmp_path / "r18.pth", "missing there", "of another shape", "ResNet-18")
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "r50.pth")
    refused(torchvision.models.resnet18(), tmp_path / "r50.pth", "left over", "looks like a ResNet-50")


def test_half_a_checkpoint_is_refused_and_partial_weights_say_what_they_leave(tmp_path):
    donor, model = Net(), Net()
    half = {name: value for name, value in donor.state_dict().items() if not name.startswith("body.1")}
    torch.save({**half, "foreign": torch.ones(2)}, tmp_path / "half.pth")
    refused(model, tmp_path / "half.pth", "4 missing there", "'body.1.weight'", "1 left over ('foreign')")
    report = load_weight_file(model, tmp_path / "half.pth", partial=True)
    assert equal(model, half) and "PARTIAL: 4 missing there" in report.sentence() and "foreign" in report.sentence()
    torch.save({"foreign": torch.ones(2)}, tmp_path / "none.pth")
    refused(model, tmp_path / "none.pth", "another model", partial=True)


def test_a_classifier_of_other_classes_starts_anew_and_is_said(tmp_path):
    donor, model = Net(9), Net(4)
    old = model.classifier.weight.detach().clone()
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    report = load_weight_file(model, tmp_path / "w.pth", classes=4)
    assert "'classifier.weight': 9 classes there, 4 here" in report.sentence()
    assert torch.equal(model.classifier.weight, old) and torch.equal(model.body[0].weight, donor.body[0].weight)
    torch.save(Net(9, width=5).state_dict(), tmp_path / "w.pth")
    refused(model, tmp_path / "w.pth", "7 of another shape", "'body.0.weight' (5, 3, 3, 3) there, (6, 3, 3, 3) here")
    state = {**Net(9).state_dict(), "classifier.weight": torch.ones(9, 5)}
    torch.save(state, tmp_path / "w.pth")
    refused(model, tmp_path / "w.pth", "1 of another shape", "'classifier.weight' (9, 5) there, (4, 6) here")
    torch.save(donor.body.state_dict(), tmp_path / "body.pth")
    assert "not there" in load_weight_file(model, _wrapped(tmp_path, donor)).sentence()


def _wrapped(folder, donor):
    state = {name: value for name, value in donor.state_dict().items() if not name.startswith("classifier")}
    torch.save(state, folder / "headless.pth")
    return folder / "headless.pth"


def test_an_embedding_called_fc_is_no_classifier(tmp_path, resnet18):
    state = dict(resnet18)
    for name in ("fc.weight", "fc.bias"):
        del state[name]
    layer = nn.Sequential(nn.Linear(512, 8), nn.BatchNorm1d(8))
    torch.save({**state, **{f"fc.{name}": value for name, value in layer.state_dict().items()}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"7 left over \('fc.0.weight'"):
        build_backbone("resnet18", weights=str(tmp_path / "w.pth"))


def test_relation_encoders_of_another_rung_are_refused(tmp_path):
    make = {name: RelationEncoder(16, 4, attention=name, num_layers=2) for name in ("nformer", "magformer")}
    torch.save(make["nformer"].state_dict(), tmp_path / "nformer.pth")
    refused(make["magformer"], tmp_path / "nformer.pth", "missing there", classes=4)
    torch.save(make["magformer"].state_dict(), tmp_path / "magformer.pth")
    refused(make["nformer"], tmp_path / "magformer.pth", "magnitude", "MagFormer", classes=4)
    other = RelationEncoder(16, 7, attention="magformer", num_layers=2)
    assert "4 classes there, 7 here" in load_weight_file(other, tmp_path / "magformer.pth", classes=7).sentence()


# --- wrappings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "place",
    [(), ("state_dict",), ("model",), ("teacher",), ("checkpoint", "net"), ("model_ema",)],
    ids=lambda p: "/".join(p),
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.backbone.", "_orig_mod."])
def test_wrappings_are_taken_off_and_said(tmp_path, place, prefix):
    donor, model = Net(), Net()
    content = {prefix + name: value for name, value in donor.state_dict().items()}
    for name in reversed(place):
        content = {name: content, "optimizer": {"state": torch.ones(3)}, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    report = load_weight_file(nn.DataParallel(model), tmp_path / "w.pth")
    assert equal(model, donor.state_dict()) and report.misfits == 0
    assert (not prefix) or f"without '{prefix}'" in report.sentence()
    assert (not place) or f"its '{'.'.join(place)}'" in report.sentence()


def test_averaged_weights_are_preferred_and_named(tmp_path):
    plain, averaged, model = Net(), Net(), Net()
    torch.save({"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "w.pth")
    assert "its 'state_dict_ema'" in load_weight_file(model, tmp_path / "w.pth").sentence()
    assert equal(model, averaged.state_dict())
    torch.save({"student": plain.state_dict(), "teacher": averaged.state_dict()}, tmp_path / "w.pth")
    assert load_weight_file(model, tmp_path / "w.pth").place == "teacher"


def test_batch_counters_of_old_files_may_be_missing(tmp_path, resnet18):
    state = {name: value for name, value in resnet18.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    backbone = build_backbone("resnet18", weights=str(tmp_path / "w.pth"))
    assert equal(backbone.body, {name: value for name, value in state.items() if not name.startswith("fc.")})


def test_distilled_heads_are_heads(tmp_path, capsys):
    donor = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    torch.save({"model": donor.state_dict()}, tmp_path / "w.pth")
    body = build_vit("timm:deit_tiny_distilled_patch16_224", depth=2, weights=str(tmp_path / "w.pth"))
    assert torch.equal(body.dist_token, donor.dist_token) and "head_dist.weight" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"left over \('dist_token'\)"):
        build_vit("timm:deit_tiny_patch16_224", depth=2, weights=str(tmp_path / "w.pth"))


def test_a_whole_model_of_ours_gives_its_backbone_and_a_backbone_alone_is_named(tmp_path, capsys):
    ours = BNNeckBaseline(build_backbone("resnet18", image_size=(64, 32)), 6, feature_dim=8)
    torch.save({"state_dict": ours.state_dict()}, tmp_path / "ours.pth")
    body = build_backbone("resnet18", weights=str(tmp_path / "ours.pth"), image_size=(64, 32)).body
    assert equal(body, ours.backbone.body.state_dict())
    said = capsys.readouterr().out
    assert "without 'backbone.body.'" in said and "tensors of other parts left out" in said and "'embedding.weight'" in said
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    message = refused(ours, tmp_path / "r18.pth", "backbone alone", "by 'backbone.weights'", classes=6)
    assert "embedding.weight" in message


# --- sizes ------------------------------------------------------------------------------------------------------------
def loaded_by_timm(state, name=VIT, **options):
    """The library's own way: create_model with its pretrained weights given as a state dict."""
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)}, num_classes=0, depth=2, **options
    )


@pytest.mark.parametrize(
    "options",
    [
        {"img_size": (256, 128)},
        {"img_size": (384, 384)},
        {"img_size": (256, 128), "patch_size": 8},
        {"img_size": (64, 32), "in_chans": 9},
        {"img_size": (64, 32), "in_chans": 1, "patch_size": 32},
    ],
    ids=str,
)
def test_sizes_and_channels_are_those_that_timm_makes(tmp_path, vit, capsys, options):
    torch.save({"state_dict": vit}, tmp_path / "vit.pth")
    expected = loaded_by_timm(vit, **options)
    body = build_vit(
        f"timm:{VIT}",
        weights=str(tmp_path / "vit.pth"),
        depth=2,
        image_size=options["img_size"],
        patch_size=options.get("patch_size", 0),
        channels=options.get("in_chans", 3),
    )
    assert equal(body, expected.state_dict()) and len(body.state_dict()) == len(expected.state_dict())
    said = capsys.readouterr().out
    assert ("resized" in said) and ("'pos_embed'" in said) and ((" channels" in said) == ("in_chans" in options))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beitv2_base_patch16_224", "deit3_small_patch16_224"])
def test_other_transformers_are_resized_by_their_own_functions(tmp_path, name):
    torch.manual_seed(1)
    donor = timm.create_model(name, depth=1)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    size = (112, 56) if "14" in name else (128, 64)
    body = build_vit(f"timm:{name}", weights=str(tmp_path / "w.pth"), image_size=size, depth=1)
    overlay = {"state_dict": donor.state_dict()}
    expected = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, depth=1, img_size=size
    )
    assert equal(body, expected.state_dict())


def test_positions_are_resized_once_from_the_files_grid(tmp_path, vit):
    donor = timm.create_model(VIT, depth=2, img_size=(384, 384))
    torch.save(donor.state_dict(), tmp_path / "vit384.pth")
    body = build_vit(f"timm:{VIT}", weights=str(tmp_path / "vit384.pth"), depth=2)
    net = VisionTransformerReID(body, 4, image_size=(256, 128), stride=12, parts=2, num_cameras=3)
    fit_to_images(donor, (256, 128), stride=12)
    assert torch.equal(net.vit.pos_embed, donor.pos_embed) and net.grid == (21, 10)
    assert net.eval()(torch.rand(1, 3, 256, 128)).shape[1] == net.test_dim


def config_of(name, height, width, stride=12):
    cfg = get_default_config()
    cfg.model.name, cfg.data.height, cfg.data.width, cfg.vit.stride = name, height, width, stride
    return cfg.dump()


def test_a_whole_model_of_another_image_size_is_resized(tmp_path, vit):
    def make(size, classes):
        return VisionTransformerReID(timm.create_model(VIT, depth=2, num_classes=0), classes, image_size=size, stride=12)

    donor, model = make((144, 144), 3), make((256, 128), 5)
    content = {"format": 1, "kind": "image", "state_dict": donor.state_dict(), "config": config_of("transreid", 144, 144)}
    torch.save(content, tmp_path / "w.pth")
    report = load_weight_file(model, tmp_path / "w.pth", classes=5)
    assert "'vit.pos_embed' from 11x11 to 21x10 patches" in report.sentence()
    reference = make((144, 144), 3)
    reference.load_state_dict(donor.state_dict())
    from timm.layers import resample_abs_pos_embed

    wanted = resample_abs_pos_embed(donor.vit.pos_embed, [21, 10], [11, 11], num_prefix_tokens=1)
    assert torch.equal(model.vit.pos_embed, wanted)
    wide, tall = make((128, 256), 3), make((256, 128), 3)  # as many patches, on another grid
    torch.save({**content, "state_dict": wide.state_dict(), "config": config_of("transreid", 128, 256)}, tmp_path / "w.pth")
    report = load_weight_file(tall, tmp_path / "w.pth", classes=3)
    assert "from 10x21 to 21x10 patches" in report.sentence() and not torch.equal(tall.vit.pos_embed, wide.vit.pos_embed)


def test_early_fusion_starts_from_three_channels(tmp_path, vit):
    torch.save(vit, tmp_path / "vit.pth")

    def backbone(channels):
        return build_vit(f"timm:{VIT}", weights=str(tmp_path / "vit.pth"), depth=2, image_size=(64, 32), channels=channels)

    model = GraFT(backbone, 4, modalities=["R", "N", "T"], fusion="early", heads=3, feedforward=16)
    weight = model.backbones[0].patch_embed.proj.weight
    assert torch.allclose(weight, vit["patch_embed.proj.weight"].repeat(1, 3, 1, 1) / 3)
    single = GraFT(backbone, 4, modalities=["R"], fusion="early", heads=3, feedforward=16)
    torch.save(single.state_dict(), tmp_path / "single.pth")
    assert "from 3 to 9 channels" in load_weight_file(model, tmp_path / "single.pth", classes=4).sentence()


def test_a_grid_that_cannot_be_known_is_refused(tmp_path, vit):
    donor = timm.create_model(VIT, depth=2, img_size=(112, 16 * 11))  # 7 x 11: no square, not of a person's shape
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    net = VisionTransformerReID(timm.create_model(VIT, depth=2, num_classes=0), 3, image_size=(256, 128))
    torch.save({f"vit.{k}": v for k, v in donor.state_dict().items()} | _neck(net), tmp_path / "w.pth")
    refused(net, tmp_path / "w.pth", "'vit.pos_embed' (1, 78, 192) there, (1, 129, 192) here", classes=3)


def _neck(net):
    return {name: value for name, value in net.state_dict().items() if name.startswith("necks")}


# --- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_is_cast(tmp_path, dtype):
    donor, model = Net(), Net()
    torch.save({n: v.to(dtype) if v.is_floating_point() else v for n, v in donor.state_dict().items()}, tmp_path / "w.pth")
    load_weight_file(model, tmp_path / "w.pth")
    assert torch.equal(model.body[0].weight, donor.body[0].weight.to(dtype).float())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda w: w.long(), "int64"),
        (lambda w: w > 0, "bool"),
        (lambda w: w.to(torch.complex64), "complex"),
        (lambda w: w.to_sparse(), "sparse"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "quantised"),
        (lambda w: w * float("nan"), "NaN"),
        (lambda w: w.double() * 1e300, "infinity"),
        (lambda w: w.to("meta"), "meta"),
        (lambda w: w[0, 0, 0, 0].clone(), "of another shape"),
    ],
    ids=["int", "bool", "complex", "sparse", "quantised", "nan", "overflow", "meta", "scalar"],
)
@pytest.mark.filterwarnings("ignore")
def test_values_that_are_no_weights_are_refused(tmp_path, change, word):
    donor = Net()
    state = donor.state_dict()
    state["body.0.weight"] = change(state["body.0.weight"] + 0.1)
    torch.save(state, tmp_path / "w.pth")
    refused(Net(), tmp_path / "w.pth", "body.0.weight", word)


def test_shared_storage_and_views_load(tmp_path):
    donor, model, base = Net(), Net(), torch.randn(2, 6, 3, 3, 3)
    state = {**donor.state_dict(), "body.0.weight": base[1], "body.0.bias": base.flatten()[:12:2]}
    torch.save(state, tmp_path / "w.pth")
    load_weight_file(model, tmp_path / "w.pth")
    assert equal(model, state)


# --- files ------------------------------------------------------------------------------------------------------------
def test_safetensors_for_every_loader(tmp_path, vit, resnet18):
    save_file(vit, tmp_path / "vit.safetensors")
    save_file(resnet18, tmp_path / "named.pth")  # by its content, whatever its name
    body = build_vit(f"timm:{VIT}", weights=str(tmp_path / "vit.safetensors"), depth=2, image_size=(64, 32))
    assert torch.equal(body.blocks[1].mlp.fc1.weight, vit["blocks.1.mlp.fc1.weight"])
    assert equal(
        build_backbone("resnet18", weights=str(tmp_path / "named.pth")).body, {"conv1.weight": resnet18["conv1.weight"]}
    )
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(Net().state_dict(), hub / "model.safetensors")
    assert load_weight_file(Net(), hub).path == hub / "model.safetensors"
    data = (hub / "model.safetensors").read_bytes()
    for damaged in (data[:-5], data[:60], data[:8] + b"{" + b"x" * 40, data[:40] + b"\0" + data[41:]):
        (tmp_path / "bad.safetensors").write_bytes(damaged)
        refused(Net(), tmp_path / "bad.safetensors", "safetensors", "damaged")


def _zip(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _tar(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights.pth")


def _npz(path):
    with path.open("wb") as stream:
        np.savez(stream, a=np.ones(3))


FILES = {
    "lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"), "LFS pointer"),
    "html": (lambda p: p.write_text("\n<!DOCTYPE html><html><head><title>x</title></head></html>"), "web page"),
    "json error": (lambda p: p.write_text(json.dumps({"error": "Repository not found"})), "Repository not found"),
    "json": (lambda p: p.write_text('{"a": 1}'), "JSON text"),
    "index": (lambda p: p.write_text('{"weight_map": {"a": "model-00001.safetensors"}}'), "several files"),
    "xml": (lambda p: p.write_text("<?xml version='1.0'?><Error>NoSuchKey</Error>"), "XML"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "zeros": (lambda p: p.write_bytes(bytes(9000)), "zeros alone"),
    "text": (lambda p: p.write_text("Not Found\n"), "text ('Not Found')"),
    "utf16": (lambda p: p.write_text("größer", encoding="utf-16"), "text ('größer')"),
    "umlauts": (lambda p: p.write_text("ü" * 5000), "is a text"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"abc")), "gzip"),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "HDF5"),
    "onnx": (lambda p: p.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x05" + bytes(range(90))), "ONNX"),
    "npy": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00" + bytes(90)), "numpy"),
    "npz": (_npz, "numpy arrays (.npz)"),
    "zip": (lambda p: _zip(p, **{"readme.txt": "x", "weights.pth": "y"}), "zip archive (readme.txt, weights.pth)"),
    "keras": (lambda p: _zip(p, **{"config.json": "x", "model.weights.h5": "y"}), "Keras"),
    "tar": (_tar, "tar archive"),
    "cut zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(200)), "cut off or damaged"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1}, protocol=4)), "pickle that torch.save did not write"),
    "random": (lambda p: p.write_bytes(bytes((i * 89 + 130) % 256 for i in range(5000))), "no file of weights"),
    "picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), "PNG"),
    "tensor": (lambda p: torch.save(torch.ones(3), p), "holds a Tensor alone"),
    "list": (lambda p: torch.save([torch.ones(3)], p), "holds a list alone"),
    "nothing": (lambda p: torch.save({}, p), "it is empty"),
    "numbers": (lambda p: torch.save({"epoch": 3}, p), "holds no tensors by name ('epoch')"),
    "torchscript": (lambda p: torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), p), "TorchScript"),
    "model": (lambda p: torch.save(Net(), p), "whole model"),
    "model inside": (lambda p: torch.save({"model": Net(), "epoch": 3}, p), "whole model"),
    "model of torch": (lambda p: torch.save(nn.Linear(2, 2), p), "whole model"),
    "legacy model": (lambda p: torch.save(Net(), p, _use_new_zipfile_serialization=False), "whole model"),
    "folder": (lambda p: p.mkdir(), "folder without one of"),
    "pipe": (lambda p: os.mkfifo(p), "no regular file"),
    "missing": (lambda p: None, "does not exist"),
    "loop": (lambda p: p.symlink_to(p), "cannot be read"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")
def test_other_files_are_named_for_what_they_are(tmp_path, kind):
    make, words = FILES[kind]
    path = tmp_path / "file.pth"
    make(path)
    refused(Net(), path, words)
    with pytest.raises(UserError, match=r"^backbone\.weights: '"):
        build_backbone("shufflenet_v2_x0_5", weights=str(path))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_cut_files_are_refused(tmp_path, new_format, share):
    torch.save(Net().state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    data = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(data[: int(len(data) * share)])
    refused(Net(), tmp_path / "w.pth")


def test_unreadable_files_are_one_sentence(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    torch.save(Net().state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(Path, "stat", lambda self, **_: denied(self))
    with pytest.raises(UserError, match=r"w\.pth' cannot be read \(Permission denied\)"):
        read_weight_file(tmp_path / "w.pth")


# --- foreign objects --------------------------------------------------------------------------------------------------
class Node(dict):
    """A configuration as yacs has it: a dict with attributes of its own."""

    def __init__(self, **items):
        super().__init__(**items)
        self.frozen = True


class Color(Enum):
    RED = 1


class Meter:
    def __init__(self):
        self.values = [1, 2]


class Names(list):
    pass


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "thing",
    [
        argparse.Namespace(lr=0.1, data=argparse.Namespace(path="x")),
        Node(lr=0.1, inner=Node(a=1)),
        Path("data"),
        Color.RED,
        Meter(),
        Names([1, 2]),
        defaultdict(list, a=[1]),
        np.float64(0.5),
        np.arange(3),
        np.int64(3),
        {1, 2},
        1 + 2j,
        slice(1, 2),
        get_default_config,
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_tensors_are_read_beside_objects_that_are_not(tmp_path, thing, new_format):
    donor, model = Net(), Net()
    content = {"args": thing, "state_dict": donor.state_dict(), "more": [thing, {"deep": thing}], "epoch": 3}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    before = list(torch.serialization.get_safe_globals())
    load_weight_file(model, tmp_path / "w.pth")
    assert equal(model, donor.state_dict())
    assert set(map(str, torch.serialization.get_safe_globals())) == set(map(str, before))


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("call", [(os.mkdir, "evil"), (eval, "__import__('os').mkdir('evil')"), (os.system, "mkdir evil")])
def test_no_code_is_executed(tmp_path, monkeypatch, call, new_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Net().state_dict(), "x": Evil(*call)}, "w.pth", _use_new_zipfile_serialization=new_format)
    message = refused(Net(), "w.pth", "asks to run")
    assert "malicious" in message and not Path("evil").exists()
    torch.save({"state_dict": Net().state_dict(), "x": Evil(Meter)}, "w.pth", _use_new_zipfile_serialization=new_format)
    monkeypatch.setattr(Meter, "__init__", lambda self: Path("evil").mkdir())
    load_weight_file(Net(), "w.pth")
    assert not Path("evil").exists()


def test_state_dicts_are_found_and_others_passed_over():
    tensor = torch.ones(2)
    content = OrderedDict(optimizer={"state": {"a": tensor}}, model={"a": tensor}, criterion={"centers": tensor}, epoch=1)
    assert [place for place, _ in state_dicts(content)] == ["model"]
    assert state_dicts({"lr": 0.1}) == []
