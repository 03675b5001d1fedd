"""Occluders, Grad-CAM's layer and mass, and the bound's picture, on data made for it."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from relreid_plugin.errors import UserError
from relreid_plugin.rib import gradcam
from relreid_plugin.rib.figures import information_table, plot_information
from relreid_plugin.rib.occlusion import Curve, occlude, occluder_mask, parse_groups, single_runs, stress_table
from relreid_plugin.rib.transreid import VisionTransformerReID

KEYS = [f"{index:04d}_c1.jpg" for index in range(40)]


# --- occluders --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(32, 16), (50, 20)])
def test_masks_cover_the_fraction_from_one_side_and_are_nested(size):
    earlier = torch.zeros(len(KEYS), *size, dtype=torch.bool)
    for step in range(11):
        mask = occluder_mask(step / 10, KEYS, size)
        areas = mask.float().mean(dim=(1, 2))
        assert torch.allclose(areas, torch.full_like(areas, step / 10), atol=0.5 / min(size))
        assert bool((mask | ~earlier).all())
        for one in mask:
            rows, columns = one.any(dim=1), one.any(dim=0)
            assert torch.equal(one, rows.unsqueeze(1) & columns.unsqueeze(0))  # a rectangle
            assert step in (0, 10) or bool(rows.all()) != bool(columns.all())  # across the whole image
        earlier = mask
    half = occluder_mask(0.5, KEYS, size)
    starts = {(bool(one[0].all()), bool(one[-1].all()), bool(one[:, 0].all()), bool(one[:, -1].all())) for one in half}
    assert len(starts) == 4  # all four sides occur


def test_masks_of_names_that_are_no_text():
    assert occluder_mask(0.5, ["a\udcff.jpg", "b.jpg"], (16, 8)).shape == (2, 16, 8)


@pytest.mark.parametrize("fill", ["noise", "mean"])
def test_images_are_covered_independent_of_their_batch(fill):
    images = torch.randn(len(KEYS), 3, 32, 16)
    untouched = images.clone()
    covered = occlude(images, 0.3, KEYS, seed=5, fill=fill)
    assert torch.equal(images, untouched)
    mask = occluder_mask(0.3, KEYS, (32, 16), seed=5).unsqueeze(1).expand(-1, 3, -1, -1)
    assert torch.equal(covered[~mask], images[~mask])
    assert (covered[mask] == 0).all() if fill == "mean" else (covered[mask] != images[mask]).all()
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0))
    again = occlude(images[order], 0.3, [KEYS[index] for index in order], seed=5, fill=fill)
    assert torch.equal(again, covered[order])
    more = occlude(images, 0.6, KEYS, seed=5, fill=fill)
    assert torch.equal(more[mask], covered[mask])  # what was covered looks the same
    assert not torch.equal(occlude(images, 0.3, KEYS, seed=6, fill=fill), covered)
    assert torch.equal(occlude(images, 0.0, KEYS), images)


def test_colours_are_spread_and_differ_between_images():
    covered = occlude(torch.zeros(len(KEYS), 3, 32, 16), 1.0, KEYS)
    assert covered.min() < -1.9 and covered.max() > 1.9 and abs(float(covered.mean())) < 0.05
    assert abs(float(covered.var()) - 4 / 3) < 0.05  # uniform in [-2, 2)
    flat = covered.flatten(1)
    correlation = torch.corrcoef(flat[:, ::8]) - torch.eye(len(KEYS))
    assert float(correlation.abs().max()) < 0.5


def test_wrong_fills_and_fractions():
    images = torch.zeros(1, 3, 8, 4)
    with pytest.raises(ValueError, match="noise"):
        occlude(images, 0.5, ["a"], fill="black")
    with pytest.raises(ValueError, match="1.5"):
        occlude(images, 1.5, ["a"])


def test_groups_on_the_command_line():
    assert parse_groups(["a=x,y", "runs/b"]) == {"a": ["x", "y"], "b": ["runs/b"]}
    assert single_runs(["a=x"]) == {"a": "x"}
    for words in (["a="], ["=x"], ["a=x", "a=y"]):
        with pytest.raises(UserError, match="LABEL=RUN"):
            parse_groups(words)
    with pytest.raises(UserError, match="'a' names 2 runs"):
        single_runs(["a=x,y"])


def test_stress_table_is_mean_and_deviation():
    curve = Curve("RIB", ["x", "y"], np.array([[0.5, 0.2], [0.7, 0.4]]), np.array([[0.6, 0.1], [0.6, 0.3]]))
    lines = stress_table("set", [0.0, 0.4], [curve, Curve("one", ["z"], np.array([[0.1, 0.0]]), np.array([[0.2, 0.0]]))])
    assert lines.splitlines()[-2:] == [
        "| 0% | 60.0 ± 14.1 | 60.0 ± 0.0 | 10.0 | 20.0 |",
        "| 40% | 30.0 ± 14.1 | 20.0 ± 14.1 | 0.0 | 0.0 |",
    ]


# --- Grad-CAM ---------------------------------------------------------------------------------------------------------
def small_vit():
    torch.manual_seed(0)
    vit = timm.create_model(
        "deit_tiny_distilled_patch16_224", embed_dim=24, depth=3, num_heads=2, num_classes=0, patch_size=8
    )
    return VisionTransformerReID(vit, 5, image_size=(32, 16), stride=4).eval()


def test_layer_of_a_transformer_puts_patches_back_on_their_grid():
    model = small_vit()
    layer, reshape = gradcam.target_layer(model, (32, 16))
    assert layer is model.vit.blocks[-1].norm1 and model.grid == (7, 3)
    tokens = torch.arange(2 + 21).view(1, -1, 1).expand(1, -1, 5).float()
    maps = reshape(tokens)
    assert maps.shape == (1, 5, 7, 3)
    assert maps[0, 0, 4, 2] == 2 + 4 * 3 + 2


def test_layer_of_a_cnn_is_its_last_feature_map():
    network = torchvision.models.resnet18().eval()
    layer, reshape = gradcam.target_layer(network, (64, 64))
    assert layer is network.layer4 and reshape is None
    with pytest.raises(UserError, match="feature map"):
        gradcam.target_layer(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 4, 3)), (8, 4))


class Fake:
    """As much of a run as Grad-CAM reads."""

    def __init__(self, model):
        from relreid_plugin.config.defaults import get_default_config

        self.bare, self.cfg = model, get_default_config()
        self.cfg.test.batch_size = 2


def test_maps_against_the_formula():
    """Selvaraju et al., eq. 1-2: relu of the maps weighted by their mean gradients, here of a cosine similarity."""
    pytest.importorskip("pytorch_grad_cam")
    model = small_vit()
    images = torch.randn(3, 3, 32, 16)
    wanted = torch.nn.functional.normalize(torch.randn(3, 24), dim=1)
    found = gradcam.cams(Fake(model), images, np.zeros(3), wanted)
    assert found.shape == (3, 32, 16) and found.min() >= 0 and found.max() <= 1
    layer, reshape = gradcam.target_layer(model, (32, 16))
    kept = {}

    def keep(module, inputs, output):
        output.retain_grad()
        kept["out"] = output

    layer.register_forward_hook(keep)
    (model(images) * wanted).sum().backward()
    maps, gradients = reshape(kept["out"].detach()), reshape(kept["out"].grad)
    naive = (gradients.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu()
    for one, value in zip(found, naive):
        small = torch.from_numpy(one)[None, None]
        resized = torch.nn.functional.interpolate(value[None, None], size=(32, 16), mode="bilinear", align_corners=False)[
            0, 0
        ]
        if float(value.max()) > 0:
            assert np.corrcoef(small.flatten().numpy(), resized.flatten().numpy())[0, 1] > 0.97
        else:
            assert float(small.max()) == 0.0


def test_mass_on_the_occluder():
    maps = np.array([[[1.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    mask = np.array([[[True, False], [True, False]], [[True, True], [False, False]]])
    found = gradcam.mass_on_occluder(maps, mask)
    assert found[0] == pytest.approx(0.75) and np.isnan(found[1])


# --- the bound over training ------------------------------------------------------------------------------------------
def records():
    out = [{"epoch": 1, "kept_test/vit.blocks.0.attn": 1.0}, {"epoch": 2, "kept_test/vit.blocks.0.attn": 0.9}]
    for epoch in (3, 4, 5):
        value = {"ibb": 0.1 / epoch, "input_entropy": 2.0, "i_fx": 0.25, "i_fy": 0.5, "ib_estimate": -0.25}
        value.update(epoch=epoch, eta=0.0 if epoch < 4 else 1.0, ib_bound=2.0 + 0.1 / epoch, ib_holds=float(epoch != 4))
        out.append({**value, "kept_test/vit.blocks.0.attn": 0.8})
    return out


def test_information_table_and_picture(tmp_path):
    table = information_table("RIB", records())
    assert "| 3 | 0 | 0.03333 | 2.00000 | 2.03333 | 0.25000 | 0.50000 | -0.25000 | yes |" in table
    assert "| 4 | 1 | 0.02500 | 2.00000 | 2.02500 | 0.25000 | 0.50000 | -0.25000 | NO |" in table
    assert table.endswith("The bound holds in 2 of 3 epochs.")
    plot_information({"RIB": records(), "other": records()}, tmp_path / "information.png")
    assert (tmp_path / "information.png").read_bytes().startswith(b"\x89PNG")
