"""Checkpoints as the field publishes them: tiny ones under the released names, against plain functions of those names."""

from __future__ import annotations

import pytest
import torch
from released import (
    DIM,
    SIZE,
    batch_norm,
    clipreid,
    fastreid,
    resnet,
    solider,
    transreid,
    write_clipreid,
    write_fastreid,
    write_solider,
    write_strong,
    write_transreid,
)

from relreid_plugin.backbones.families import FAMILIES, find_family
from relreid_plugin.backbones.files import WeightFile
from relreid_plugin.backbones.networks import build_backbone
from relreid_plugin.errors import UserError
from relreid_plugin.extractor import load_extractor

# --- the tests --------------------------------------------------------------------------------------------------------
ALONE = {"neck": False, "prefix": "backbone."}
CASES = {
    "transreid": (write_transreid, {}, transreid, {}, {}),
    "transreid, behind the neck": (write_transreid, {}, transreid, {"neck": "after"}, {"neck": "after"}),
    "transreid, stride 12": (write_transreid, {"stride": 12}, transreid, {"stride": 12}, {}),
    "transreid, stride 9": (write_transreid, {"stride": 9}, transreid, {"stride": 9}, {"stride": 9}),
    "transreid, jigsaw": (write_transreid, {"jigsaw": True}, transreid, {}, {}),
    "transreid, jigsaw, 15 patches": (
        write_transreid,
        {"jigsaw": True, "stride": 11},
        transreid,
        {"stride": 11, "neck": "after"},
        {"stride": 11, "neck": "after"},
    ),
    "transreid-ssl, stem and gem": (
        write_transreid,
        {"stem": True},
        transreid,
        {"stem": True, "pooling": "gem"},
        {"pooling": "gem"},
    ),
    "personvit, avg_max": (write_transreid, {}, transreid, {"pooling": "avg_max"}, {"pooling": "avg_max"}),
    "personvit, max": (write_transreid, {}, transreid, {"pooling": "max"}, {"pooling": "max"}),
    "personvit, avg": (write_transreid, {}, transreid, {"pooling": "avg"}, {"pooling": "avg"}),
    "a backbone alone": (write_transreid, ALONE, transreid, {"prefix": "backbone."}, {}),
    "clipreid": (write_clipreid, {}, clipreid, {}, {}),
    "clipreid, behind the necks": (write_clipreid, {}, clipreid, {"neck": "after"}, {"neck": "after"}),
    "fastreid, bot": (write_fastreid, {}, fastreid, {}, {}),
    "fastreid, agw": (write_fastreid, {"nonlocal_": True, "ibn": True}, fastreid, {"pooling": "gem"}, {}),
    "fastreid, sbs": (
        write_fastreid,
        {"learned": True, "bottleneck": True, "se": True, "reduced": 32},
        fastreid,
        {"pooling": "gem"},
        {},
    ),
    "fastreid, se": (write_fastreid, {"se": True}, fastreid, {"pooling": "avg_max"}, {"pooling": "avg_max"}),
    "solider": (write_solider, {}, solider, {}, {}),
    "solider, behind the neck": (
        write_solider,
        {},
        solider,
        {"neck": "after", "weight": 0.7},
        {"neck": "after", "semantic_weight": 0.7},
    ),
    "solider, a backbone alone": (
        write_solider,
        {"semantic": False, "neck": False, "prefix": "backbone."},
        solider,
        {"prefix": "backbone."},
        {},
    ),
    "strong": (
        write_strong,
        {},
        lambda t, x: batch_norm(t, "bottleneck", resnet(t, "base.", x, relu=False).mean((2, 3))),
        {},
        {},
    ),
    "strong, before the neck": (
        write_strong,
        {"bottleneck": True},
        lambda t, x: resnet(t, "base.", x, relu=False).mean((2, 3)),
        {},
        {"neck": "before"},
    ),
    "strong, ibn": (
        write_strong,
        {"ibn": True, "bottleneck": True},
        lambda t, x: batch_norm(t, "bottleneck", resnet(t, "base.", x).mean((2, 3))),
        {},
        {},
    ),
}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_are_those_of_the_released_names(name, images, tmp_path):
    write, written, function, said, options = CASES[name]
    tensors = write(**written)
    torch.save({"model": {f"module.{key}": value for key, value in tensors.items()}, "epoch": 1}, tmp_path / "a.pth")
    extractor = load_extractor(tmp_path / "a.pth", size=SIZE, options=options)
    wanted = function(tensors, images, **said)
    found = extractor.opened.network(images)
    assert extractor.dim == wanted.shape[1] and wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_cameras_are_added_where_they_are_known_else_their_mean(images, tmp_path):
    for write, function, name, known in (
        (write_transreid, transreid, "base.sie_embed", lambda rows: rows[:, None]),
        (write_clipreid, clipreid, "cv_embed", lambda rows: rows[:, None]),
    ):
        tensors = write(cameras=3)
        torch.save(dict(tensors), tmp_path / "a.pth")
        extractor = load_extractor(tmp_path / "a.pth", size=SIZE)
        rows = tensors[name].reshape(3, DIM)
        assert any("the camera is unknown here: the mean of the file's 3" in note for note in extractor.notes)
        for cameras, value in ((None, rows.mean(0).expand(2, -1)), (torch.tensor([2, 0]), rows[[2, 0]])):
            wanted = function(tensors, images, camera=known(value))
            torch.testing.assert_close(extractor.features(images, cameras), wanted, rtol=1e-4, atol=1e-4)


def test_every_family_is_told_by_its_names_alone():
    found = {write.__name__.removeprefix("write_"): set() for write, *_ in CASES.values()}
    for write, written, *_ in CASES.values():
        family, _ = find_family(WeightFile(None, {"state_dict": dict(write(**written))}))
        found[write.__name__.removeprefix("write_")].add(family.name)
    assert found == {family.name: {family.name} for family in FAMILIES}


def test_readings_are_those_of_the_released_configurations(tmp_path):
    def reading(tensors):
        torch.save(dict(tensors), tmp_path / "a.pth")
        return load_extractor(tmp_path / "a.pth").reading

    found = reading(write_fastreid(learned=True))
    assert (found.size, found.interpolation) == ((384, 128), "bicubic")
    assert found.mean == (round(120 / 255, 6), round(110 / 255, 6), round(100 / 255, 6)) and found.std[2] == round(
        70 / 255, 6
    )
    assert reading(write_fastreid()).size == reading(write_strong()).size == (256, 128)
    assert reading(write_solider()).size == (384, 128) and reading(write_solider()).mean == (0.5, 0.5, 0.5)


def test_what_is_missing_or_left_over_is_refused(tmp_path):
    tensors = write_transreid()
    del tensors["base.blocks.1.mlp.fc2.bias"]
    torch.save(dict(tensors), tmp_path / "a.pth")
    with pytest.raises(UserError, match="1 missing there .'vit.blocks.1.mlp.fc2.bias'"):
        load_extractor(tmp_path / "a.pth", size=SIZE)
    tensors = write_solider()
    tensors.linear("base.extra", 3, 3)
    torch.save(dict(tensors), tmp_path / "a.pth")
    with pytest.raises(UserError, match="2 left over"):
        load_extractor(tmp_path / "a.pth", size=SIZE)


@pytest.mark.parametrize(
    "write, options, sentence",
    [
        (write_transreid, {"size": None}, "positions for 8 patches of 16 pixels, which usual images do not have"),
        (write_transreid, {"size": (64, 48)}, "which images of 64x48 do not have"),
        (
            write_transreid,
            {"options": {"neck": "behind"}},
            "option 'neck' is 'behind'; valid ones: after",
        ),
        (write_transreid, {"options": {"stride": 99}}, "option 'stride' takes the pixels"),
        (write_transreid, {"options": {"camera_weight": "x"}}, "option 'camera_weight' takes a number"),
        (write_solider, {"options": {"semantic_weight": 2}}, r"option 'semantic_weight' takes a number in \[0, 1\]"),
        (write_strong, {"options": {"nekc": "after"}}, "option 'nekc' is none of .*did you mean 'neck'"),
        (write_strong, {"weights": "x.pth"}, "does not take 'weights'"),
    ],
)
def test_options_that_are_none_are_refused(write, options, sentence, tmp_path):
    torch.save(dict(write()), tmp_path / "a.pth")
    with pytest.raises(UserError, match=sentence):
        load_extractor(tmp_path / "a.pth", **{"size": SIZE, **options})


def test_backbones_that_are_not_built_are_refused(tmp_path):
    torch.save({"backbone.stem.weight": torch.zeros(3), "heads.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="fast-reid with a backbone that is not built here"):
        load_extractor(tmp_path / "a.pth")
    tensors = {"image_encoder.layer1.0.conv1.weight": torch.zeros(3), "bottleneck_proj.weight": torch.zeros(3)}
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a ResNet as its image encoder"):
        load_extractor(tmp_path / "a.pth")
    torch.save(dict(write_fastreid(learned=True)), tmp_path / "a.pth")
    with pytest.raises(UserError, match="leave out option 'pooling'"):
        load_extractor(tmp_path / "a.pth", options={"pooling": "avg"})


@torch.no_grad()
def test_a_configuration_takes_a_family_as_its_backbone(images, tmp_path):
    tensors = write_transreid(jigsaw=True)
    torch.save(dict(tensors), tmp_path / "a.pth")
    said = []
    backbone = build_backbone(f"file:{tmp_path / 'a.pth'}", image_size=SIZE, say=said.append).eval()
    assert backbone.feature_dim == 5 * DIM and "TransReID, with its jigsaw module: loaded" in said[0]
    torch.testing.assert_close(backbone(images), transreid(tensors, images), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="leave out 'backbone.weights'"):
        build_backbone(f"file:{tmp_path / 'a.pth'}", weights="b.pth", image_size=SIZE)
    torch.save({"a.b": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="backbone.name: .* is of no family"):
        build_backbone(f"file:{tmp_path / 'a.pth'}", image_size=SIZE)
