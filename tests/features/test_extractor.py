"""Any model by name: runs, libraries, folders of the hub, checkpoints of known families, and what is none of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import MARKET
from released import write_hub_folder

import relreid_plugin
from relreid_plugin.backbones.opened import Opened, Reading, check_size
from relreid_plugin.cli.main import main
from relreid_plugin.errors import UserError
from relreid_plugin.extractor import load_extractor, prefixes, register_opener
from relreid_plugin.search import FeatureExtractor, FeatureStore

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 20, 3), np.uint8)


@pytest.fixture(scope="module")
def osnet(tmp_path_factory):
    """Weights of a small model of torchreid's, as it saves them, and the model."""
    from torchreid.reid.models import build_model

    torch.manual_seed(0)
    model = build_model("osnet_x0_25", 7, pretrained=False).eval()
    path = tmp_path_factory.mktemp("zoo") / "osnet_x0_25_mine.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "rank1": 0.5}, path)
    return path, model


def prepared(reading: Reading) -> torch.Tensor:
    from PIL import Image
    from torchvision import transforms as T

    transform = T.Compose([T.Resize(reading.size), T.ToTensor(), T.Normalize(reading.mean, reading.std)])
    return transform(Image.fromarray(PICTURE))[None]


def test_a_model_of_torchreid_with_weights(osnet):
    path, model = osnet
    extractor = relreid_plugin.load_extractor("host:osnet_x0_25", weights=path)
    with torch.no_grad():
        wanted = model(prepared(extractor.reading))
    assert extractor.dim == 512 and extractor.size == (256, 128)
    torch.testing.assert_close(extractor(PICTURE), wanted, rtol=0, atol=1e-5)
    assert "the file's classifier is left out" in extractor.notes[0]


def test_a_file_of_torchreids_zoo_names_its_model(osnet, tmp_path):
    path, _ = osnet
    named = load_extractor(path)
    torch.testing.assert_close(named(PICTURE), load_extractor("host:osnet_x0_25", weights=path)(PICTURE))
    other = tmp_path / "mine.pth"
    other.write_bytes(path.read_bytes())
    assert load_extractor(other).fingerprint == named.fingerprint


def test_networks_of_torchvision_and_timm_are_read_as_their_own_weights_want_it(tmp_path):
    import timm
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.shufflenet_v2_x0_5()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    extractor = load_extractor("torchvision:shufflenet_v2_x0_5", weights=tmp_path / "a.pth", size=64)
    assert extractor.size == (64, 64) and extractor.dim == 1024
    assert load_extractor("torchvision:shufflenet_v2_x0_5", weights=tmp_path / "a.pth").size == (224, 224)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(extractor(PICTURE), net.eval()(prepared(extractor.reading)), rtol=0, atol=1e-5)

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(256, 128), depth=1)
    with pytest.raises(UserError, match="left over|missing"):
        torch.save(vit.state_dict(), tmp_path / "b.pth")
        load_extractor("timm:vit_tiny_patch16_224", weights=tmp_path / "b.pth")
    small = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(small.state_dict(), tmp_path / "c.pth")
    found = load_extractor("timm:test_vit", weights=tmp_path / "c.pth")
    config = timm.get_pretrained_cfg("test_vit")
    assert found.size == tuple(config.input_size[1:]) and found.reading.interpolation == config.interpolation
    assert found.normalisation == (config.mean, config.std)


def test_the_size_of_a_vision_transformer_is_that_of_its_weights(tmp_path):
    import timm

    net = timm.create_model("test_vit", num_classes=0, img_size=(128, 64))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    assert load_extractor("timm:test_vit", weights=tmp_path / "a.pth").size == (128, 64)


def test_a_folder_of_the_hubs_layout(tmp_path):
    net = write_hub_folder(tmp_path / "mega")
    extractor = load_extractor(tmp_path / "mega")
    assert extractor.size == (64, 64) and extractor.normalisation == ((0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        torch.testing.assert_close(extractor(PICTURE), net(prepared(extractor.reading)), rtol=0, atol=1e-5)


def test_folders_that_name_no_network(tmp_path):
    write_hub_folder(tmp_path / "a", architecture="no_such_network")
    with pytest.raises(UserError, match="names 'no_such_network', which timm .* does not have"):
        load_extractor(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON text"):
        load_extractor(tmp_path / "a")


def test_a_run_is_a_model(tiny_run, tiny_root):
    extractor = load_extractor(tiny_run)
    images = sorted((tiny_root / "embedded_persons_tiny" / MARKET / "query").glob("*.jpg"))
    stored = torch.load(tiny_run / "bank" / "embedded_persons_tiny-query.pt", weights_only=True)
    by_path = dict(zip(stored["paths"], stored["features"]))
    wanted = torch.stack([by_path[str(path)] for path in images])
    torch.testing.assert_close(extractor(images), wanted, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="does not take 'weights'"):
        load_extractor(tiny_run, weights="x.pth")
    with pytest.raises(UserError, match="has no camera embedding"):
        extractor([PICTURE], cameras=[0])
    with pytest.raises(UserError, match="cameras must be whole numbers, one for each of 1 pictures"):
        extractor([PICTURE], cameras=[0.5])


def test_a_model_makes_a_store_and_searches_it(osnet, tiny_root, tmp_path, capsys):
    path, _ = osnet
    photos = tiny_root / "embedded_persons_tiny" / MARKET / "query"
    store, query = str(tmp_path / "store"), str(sorted(photos.glob("*.jpg"))[0])
    naming = ["--weights", str(path), "--size", "64x32", "--batch", "8"]
    assert main(["extract", "host:osnet_x0_25", store, str(photos), *naming]) == 0
    said = capsys.readouterr().out
    assert "width 512" in said and "note: loaded 565 tensors" in said
    assert len(FeatureStore(store)) == len(list(photos.glob("*.jpg")))
    assert main(["search", "host:osnet_x0_25", store, query, "-k", "1", "--out", str(tmp_path / "out"), *naming]) == 0
    ranking = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert query in json.dumps(ranking)
    again = ["-k", "3", "--rerank", "5", "--by", "gcr", "--out", str(tmp_path / "again")]
    assert main(["search", "host:osnet_x0_25", store, query, *again, *naming]) == 0
    assert json.loads((tmp_path / "again" / "ranking.json").read_text())["settings"]["reranking"]["name"] == "gcr"
    assert main(["search", "host:osnet_x0_25", store, query, "--out", str(tmp_path / "out"), "--weights", str(path)]) == 2
    assert "another model" in capsys.readouterr().err, "images of another size make other features"
    assert main(["search", "host:osnet_x0_25", store, query, "--relations", *naming]) == 2
    assert "is no run, and has no relation encoder" in capsys.readouterr().err


def test_pictures_are_compared_by_any_model(osnet, tiny_root, tmp_path, capsys):
    path, _ = osnet
    photos = tiny_root / "embedded_persons_tiny" / MARKET
    store, verifier, pairs = str(tmp_path / "store"), str(tmp_path / "verifier.json"), tmp_path / "pairs.json"
    naming = ["--weights", str(path), "--size", "64x32"]
    assert main(["extract", "host:osnet_x0_25", store, str(photos / "bounding_box_test"), *naming]) == 0
    first, second = (str(name) for name in sorted((photos / "bounding_box_test").glob("*.jpg"))[:2])
    compare = ["compare", first, second, first, "--model", "host:osnet_x0_25", *naming]
    capsys.readouterr()
    assert main(compare) == 2
    assert "is no run and keeps no verifier; calibrate one by 'relreid calibrate" in capsys.readouterr().err
    assert main(["calibrate", "--on", store, "--out", verifier]) == 0
    assert main([*compare, "--verifier", verifier, "--json", str(pairs)]) == 0
    extractor = load_extractor("host:osnet_x0_25", weights=path, size=(64, 32))
    a, b = torch.nn.functional.normalize(extractor([first, second]).double())
    found = json.loads(pairs.read_text())["pairs"]
    assert [pair["score"] for pair in found] == pytest.approx([float(a @ b), 1.0], abs=1e-5)
    assert found[1]["same"] and [pair["second"] for pair in found] == [second, first]


def test_what_only_runs_have_is_refused_of_other_models(osnet):
    path, _ = osnet
    extractor = FeatureExtractor("host:osnet_x0_25", weights=path, size=(64, 32))
    with pytest.raises(UserError, match="is no run, and has no test sets"):
        extractor.test_records("market1501")
    with pytest.raises(UserError, match="is no run, and knows no cameras"):
        FeatureExtractor("host:osnet_x0_25", weights=path, cameras_known=True)


@pytest.mark.parametrize(
    "model, naming, sentence",
    [
        ("nowhere", {}, "model 'nowhere' does not exist; name the folder of a run"),
        ("hots:osnet", {}, "begins with 'hots:'; did you mean 'host'"),
        ("host:", {}, "names no model behind 'host:'"),
        ("host:osnet_x0_26", {"weights": "x.pth"}, "did you mean 'osnet_x0_25'"),
        ("host:osnet_x0_25", {}, "has no weights; name a file by 'weights'"),
        ("timm:test_vit", {"weights": "x.pth", "pretrained": True}, "not both"),
        ("timm:test_vit", {"weights": "x.pth", "overrides": ["a", "b"]}, "does not take 'overrides'"),
        ("timm:test_vit", {"weights": "missing.pth"}, "weights: 'missing.pth' does not exist"),
        ("", {}, "a model is named by a text or a path"),
        (3, {}, "a model is named by a text or a path"),
    ],
)
def test_what_names_no_model(model, naming, sentence):
    with pytest.raises(UserError, match=sentence):
        load_extractor(model, **naming)


def test_a_file_of_no_family_says_what_it_looks_like(tmp_path):
    import torchvision

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="it looks like a ResNet-18; name its network as 'host:NAME'"):
        load_extractor(tmp_path / "a.pth")
    torch.save({"a.b": torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="its 1 tensors begin with 'a.b'"):
        load_extractor(tmp_path / "b.pth")


@pytest.mark.parametrize("value, size", [("64x32", (64, 32)), ("64", (64, 64)), (48, (48, 48)), ([64, 32], (64, 32))])
def test_sizes(value, size):
    assert check_size(value) == size


@pytest.mark.parametrize("value", ["64x", "axb", "1x2x3", 0, (0, 3), (3,), 5000, True, None, (1.5, 2)])
def test_sizes_that_are_none(value):
    with pytest.raises(UserError, match="size must be"):
        check_size(value)


def test_prefixes_can_be_added():
    def opener(name, request):
        return Opened(lambda images: images.mean(dim=(2, 3)), request.reading(Reading((8, 8))), name, identity="mean")

    register_opener("mean_of_pixels", opener, endings=[".mean_of_pixels"])
    register_opener("mean_of_pixels", opener)
    assert "mean_of_pixels" in prefixes()
    assert load_extractor("mean_of_pixels:x")(PICTURE).shape == (1, 3)
    with pytest.raises(ValueError, match="is taken"):
        register_opener("mean_of_pixels", "another:opener")
    with pytest.raises(UserError, match="interpolation is 'cubic'; did you mean 'bicubic'"):
        load_extractor("mean_of_pixels:x", interpolation="cubic")
    with pytest.raises(UserError, match="std must be three positive numbers"):
        load_extractor("mean_of_pixels:x", std=[0, 1, 1])
