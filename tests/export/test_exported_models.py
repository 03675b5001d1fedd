"""Every image model of the plug-in as a file: the same features with batches of any size, or a sentence why not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import relreid_plugin
from relreid_plugin.backbones.runtimes import open_runtime
from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.errors import UserError
from relreid_plugin.export.graphs import image_graph
from relreid_plugin.export.resizing import Resize
from relreid_plugin.export.writers import write_graph
from relreid_plugin.methods import several_models, single_models

relreid_plugin.register()

from relreid_plugin import host  # noqa: E402
from relreid_plugin.extractor import load_extractor  # noqa: E402
from relreid_plugin.host.patches import channel_shuffle, transform_theta  # noqa: E402
from relreid_plugin.host.registry import _PLUGIN_MODELS  # noqa: E402

for needed in ("onnx", "onnxruntime"):
    pytest.importorskip(needed)

VIT = {"backbone.name": "timm:vit_tiny_patch16_224", "vit.depth": 1, "vit.patch_size": 16}
CNN = {"backbone.name": "torchvision:shufflenet_v2_x0_5", "backbone.output_stride": 0, "head.feature_dim": 16}
RESNET = {"backbone.name": "timm:resnet10t", "backbone.output_stride": 0, "rib.places": ["layer2", "layer3"]}
MODELS = {
    "bnneck_baseline": [
        CNN,
        {**CNN, "head.neck_feature": "before"},
        {**RESNET, "rib.attention": "se"},
        {**RESNET, "rib.attention": "cbam"},
        {**RESNET, "rib.attention": "dcs"},
    ],
    "vit_baseline": [VIT, {**VIT, "rib.attention": "dcs"}],
    "transreid": [{**VIT, "vit.stride": 12}],
    "graft": [
        {**VIT, "graft.heads": 3, "graft.feedforward": 32, "graft.fusion": each}
        for each in ("graft", "cls", "average", "early", "late")
    ],
}
CASES = [(name, number) for name, all_keys in MODELS.items() for number in range(len(all_keys))]


def build(name, keys, *, size=(64, 32), num_cameras=3):
    torch.manual_seed(0)
    cfg = get_default_config()
    cfg.merge_from_list([each for key, value in keys.items() for each in (key, value)])
    cfg.data.height, cfg.data.width = size
    cfg.loss.name = "composite"
    model = host.build_model(name, 4, "triplet", False, False, cfg=cfg, num_cameras=num_cameras).eval()
    with torch.no_grad():
        for module in model.modules():  # gates that start closed would hide what is behind them
            if isinstance(module, torch.nn.BatchNorm2d) and float(module.weight.abs().sum()) == 0:
                module.weight.fill_(0.5)
    return model


def graph_of(model, *, size=(64, 32), **options):
    return image_graph(model, size=size, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25], **options)


def agree(graph, runtime, *, sizes=(1, 3), tolerance=2e-5):
    for size in sizes:
        inputs = {name: torch.cat([value] * 3)[:size] for name, value in graph.inputs.items()}
        inputs["images"] = torch.randn_like(inputs["images"]) if inputs["images"].is_floating_point() else inputs["images"]
        with torch.inference_mode():
            wanted = graph.module(*inputs.values()).numpy()
        found = runtime({name: value.numpy() for name, value in inputs.items()})["features"]
        assert found.shape == wanted.shape and np.abs(found - wanted).max() < tolerance


def test_every_registered_model_has_a_case():
    assert set(MODELS) >= {name for name in (*single_models(), *several_models()) if not name.startswith("fourth")}


@pytest.mark.parametrize("name, number", CASES)
def test_a_model_is_exported_and_equal(name, number, tmp_path):
    graph = graph_of(build(name, MODELS[name][number]))
    write_graph(graph, tmp_path / "model.onnx", "onnx")
    runtime = open_runtime(tmp_path / "model.onnx", threads=1)
    agree(graph, runtime)
    assert runtime.about["dim"] == graph.about["dim"] and runtime.about["inputs"] == list(graph.inputs)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["osnet_x0_25", "squeezenet1_1"])  # benchmarks/exports.py tries all
def test_a_model_of_the_zoo_is_exported_from_its_released_file(name, tmp_path):
    torch.manual_seed(0)
    torch.save({"state_dict": host.build_model(name, 5, "softmax", False, False).state_dict()}, tmp_path / "zoo.pth")
    options = {"weights": tmp_path / "zoo.pth", "size": (64, 32), "device": "cpu", "channels_last": False}
    graph = graph_of(load_extractor(f"host:{name}", **options).opened.network)
    write_graph(graph, tmp_path / "model.onnx", "onnx")
    agree(graph, open_runtime(tmp_path / "model.onnx", threads=1), tolerance=1e-4)


def test_every_model_of_the_zoo_was_exported():
    result = json.loads((ROOT / "docs" / "results" / "export_zoo.json").read_text(encoding="utf-8"))
    tried = {row[0].strip("`"): row[3:] for row in result["rows"]}
    assert tried.keys() >= set(host.available_models()) - _PLUGIN_MODELS  # other tests register models, too
    assert all(isinstance(cell, float) and cell >= 0.9999 for cells in tried.values() for cell in cells)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_functions_of_the_zoo_that_are_replaced_do_what_they_did_with_any_batch_when_traced():
    zoo = host.models
    assert (zoo.shufflenetv2.channel_shuffle, zoo.hacnn.HACNN.transform_theta) == (channel_shuffle, transform_theta)
    region = SimpleNamespace(scale_factors=[torch.tensor([[1.0, 0.0], [0.0, 0.25]])])
    shuffle = torch.jit.trace(lambda images: channel_shuffle(images, 2), torch.randn(1, 6, 4, 3))
    maps = torch.jit.trace(lambda shifts: transform_theta(region, shifts, 0), torch.randn(1, 2))
    images, shifts = torch.randn(3, 6, 4, 3), torch.randn(3, 2)
    assert torch.equal(shuffle(images), images[:, [0, 3, 1, 4, 2, 5]])
    wanted = torch.zeros(3, 2, 3)
    wanted[:, :, :2], wanted[:, :, -1] = region.scale_factors[0], shifts
    assert torch.equal(maps(shifts), wanted)


def test_models_with_several_features_in_training_are_extracted_with_and_not_trained():
    from relreid_plugin.backbones.networks import build_backbone
    from relreid_plugin.engine.models import host_features

    options = {"host_builder": host_features, "image_size": (160, 64)}
    assert build_backbone("host:hacnn", **options, trained=False).feature_dim == 1024
    with pytest.raises(UserError, match="'host:hacnn' has several features per image in training"):
        build_backbone("host:hacnn", **options)


@pytest.mark.parametrize("subset", [["N"], ["R", "T"]])
def test_subsets_of_modalities(subset, tmp_path):
    model = build("graft", {**VIT, "graft.heads": 3, "graft.feedforward": 32})
    graph = graph_of(model, subset=list(reversed(subset)))
    assert graph.about["modalities"] == subset and graph.inputs["images"].shape[1] == len(subset)
    write_graph(graph, tmp_path / "part.onnx", "onnx")
    images = torch.randn(3, len(subset), 3, 64, 32)
    with torch.inference_mode():
        wanted = model(images, subset)
    found = open_runtime(tmp_path / "part.onnx", threads=1)({"images": images.numpy()})["features"]
    assert np.abs(found - wanted.numpy()).max() < 2e-5
    with pytest.raises(UserError, match="'X' is none of the model's modalities"):
        graph_of(model, subset=["X"])
    with pytest.raises(UserError, match="leave out --with-preprocessing"):
        graph_of(model, with_preprocessing=True)
    with pytest.raises(UserError, match="takes single images"):
        graph_of(build("bnneck_baseline", CNN), subset=["R"])


def test_cameras_are_an_input_and_unknown_ones_get_their_mean(tmp_path):
    model = build("transreid", MODELS["transreid"][0])
    with torch.no_grad():
        model.cameras.table.mul_(50)
    graph = graph_of(model)
    write_graph(graph, tmp_path / "model.onnx", "onnx")
    runtime = open_runtime(tmp_path / "model.onnx", threads=1)
    images = torch.randn(4, 3, 64, 32)
    for rows in ([0, 1, 2, -1], [-1, -1, 7, 1]):
        with torch.inference_mode():
            wanted = model(images, torch.tensor(rows)).numpy()
        found = runtime({"images": images.numpy(), "cameras": np.array(rows)})["features"]
        assert np.abs(found - wanted).max() < 2e-5
    with torch.inference_mode():
        mean = model(images).numpy()
    found = runtime({"images": images.numpy(), "cameras": np.full(4, -1)})["features"]
    assert np.abs(found - mean).max() < 2e-5 < np.abs(found - wanted).max()


@pytest.mark.parametrize("kind, file", [("openvino", "model.xml"), ("torchscript", "model.pt")])
@pytest.mark.parametrize("name", ["bnneck_baseline", "transreid"])
def test_other_runtimes(kind, file, name, tmp_path):
    if kind == "openvino":
        pytest.importorskip("openvino")
    graph = graph_of(build(name, MODELS[name][0]))
    write_graph(graph, tmp_path / file, kind)
    runtime = open_runtime(tmp_path / file, threads=1)
    agree(graph, runtime)
    assert runtime.about == json.loads(json.dumps(graph.about))
    assert {path.name for path in tmp_path.iterdir()} == {file, *(["model.bin"] if kind == "openvino" else [])}


def test_half_precision_and_bytes_are_near(tmp_path):
    graph = graph_of(build("bnneck_baseline", CNN))
    size = 0
    calibration = [{"images": torch.randn(8, 3, 64, 32).numpy()}]
    for precision, least in (("float32", 0.999999), ("fp16", 0.9999), ("int8", 0.9)):
        path = tmp_path / f"{precision}.onnx"
        write_graph(graph, path, "onnx", precision=precision, calibration=calibration)
        runtime = open_runtime(path, threads=1)
        images = torch.randn(8, 3, 64, 32)
        with torch.inference_mode():
            wanted = graph.module(images)
        found = torch.from_numpy(runtime({"images": images.numpy()})["features"])
        assert float((found * wanted).sum(dim=1).mean()) > least
        assert found.dtype == torch.float32 and runtime.about["dim"] == 16
        assert not size or path.stat().st_size < 0.75 * size
        size = size or path.stat().st_size
    with pytest.raises(UserError, match="float32 only"):
        write_graph(graph, tmp_path / "x.pt", "torchscript", precision="fp16")
    with pytest.raises(UserError, match="--calibration"):
        write_graph(graph, tmp_path / "x.onnx", "onnx", precision="int8")


@pytest.mark.parametrize("interpolation, code", [("bilinear", 2), ("bicubic", 3)])
def test_photos_are_resized_as_pillow_does(interpolation, code):
    generator = np.random.default_rng(0)
    resize = Resize((32, 16), interpolation=interpolation)
    for shape in ((32, 31), (90, 16), (20, 16), (32, 16)):  # along one axis: equal but for ties of rounding
        photo = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
        wanted = np.asarray(Image.fromarray(photo).resize((16, 32), code)).astype(int)
        found = resize(torch.from_numpy(photo).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - wanted).max() <= 1 and (found != wanted).mean() < 0.02
    photo = generator.integers(0, 256, (75, 41, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(photo).resize((16, 32), code)).astype(int)
    found = resize(torch.from_numpy(photo).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - wanted).max() <= 1
    with pytest.raises(UserError, match="leave out --with-preprocessing"):
        Resize((32, 16), interpolation="lanczos")


def test_a_file_with_preprocessing_takes_photos_of_any_size(tmp_path):
    model = build("bnneck_baseline", CNN)
    graph = graph_of(model, with_preprocessing=True)
    write_graph(graph, tmp_path / "photos.onnx", "onnx")
    runtime = open_runtime(tmp_path / "photos.onnx", threads=1)
    mean, std = (np.array(each, np.float32) for each in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]))
    for count, height, width in ((1, 40, 60), (3, 64, 32), (2, 200, 31)):
        photos = np.random.default_rng(height).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        small = np.stack([np.asarray(Image.fromarray(photo).resize((32, 64), 2)) for photo in photos])
        images = torch.from_numpy((small.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.inference_mode():
            wanted = model(images).numpy()
        found = runtime({"images": photos})["features"]
        assert (found * wanted).sum(axis=1).min() > 0.9999


@pytest.mark.slow
@pytest.mark.long
def test_the_other_exporter_of_torch_says_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    graph = graph_of(build("bnneck_baseline", CNN))
    write_graph(graph, tmp_path / "model.onnx", "onnx", exporter="dynamo")
    agree(graph, open_runtime(tmp_path / "model.onnx", threads=1))


def test_files_that_are_no_exported_networks(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_runtime(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match="cannot be opened as onnx"):
        open_runtime(tmp_path / "bad.onnx")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match="named like no exported network"):
        open_runtime(tmp_path / "weights.h5")
