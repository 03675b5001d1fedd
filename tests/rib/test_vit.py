"""Vision transformers: patch grid, position embeddings, camera embedding, jigsaw module, plain and TransReID."""

from __future__ import annotations

import pytest
import timm
import torch

import relreid_plugin
from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.errors import UserError
from relreid_plugin.rib.transreid import CameraEmbedding, VisionTransformerReID, fit_to_images, jigsaw

relreid_plugin.register()

from relreid_plugin import host  # noqa: E402

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}


def small_vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options})


def build(name, *, size=(64, 32), backbone="timm:vit_tiny_patch16_224", num_cameras=0, **keys):
    torch.manual_seed(0)
    cfg = get_default_config()
    cfg.backbone.name, cfg.loss.name = backbone, "composite"
    cfg.data.height, cfg.data.width = size
    cfg.vit.depth = 2
    for key, value in keys.items():
        cfg.vit[key] = value
    return host.build_model(name, 5, "triplet", False, False, cfg=cfg, num_cameras=num_cameras)


def test_plain_images_of_the_networks_size_give_timms_own_features():
    vit = small_vit(img_size=(64, 32), patch_size=8).eval()
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        wanted = vit(images)
        model = VisionTransformerReID(vit, 4, image_size=(64, 32)).eval()
        assert torch.allclose(model.features(images)[0], wanted, atol=1e-6)
        assert torch.allclose(model(images), wanted / wanted.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_siglip_224"],
)
@pytest.mark.parametrize("model", ["vit_baseline", "transreid"])
def test_any_timm_vit(name, model):
    net = build(model, backbone=f"timm:{name}", num_cameras=3, drop_path=0.0)
    images, cameras = torch.rand(2, 3, 64, 32), torch.tensor([0, 2])
    logits, features = net.train()(images, cameras)
    logits = logits if isinstance(logits, list) else [logits]
    features = features if isinstance(features, list) else [features]
    assert len(logits) == len(features) == (5 if model == "transreid" else 1)
    assert all(item.shape == (2, 5) for item in logits) and all(item.shape == (2, net.feature_dim) for item in features)
    sum(item.sum() for item in logits).backward()
    assert [key for key, value in net.named_parameters() if value.requires_grad and value.grad is None] == []
    with torch.no_grad():
        tested = net.eval()(images, cameras)
    assert tested.shape == (2, net.test_dim)


@pytest.mark.parametrize("size,stride,grid", [((256, 128), 12, (21, 10)), ((256, 128), 0, (16, 8)), ((64, 48), 8, (7, 5))])
def test_patch_grid(size, stride, grid):
    vit = small_vit()
    assert fit_to_images(vit, size, stride=stride) == grid
    assert vit.pos_embed.shape == (1, 1 + grid[0] * grid[1], 24)
    tokens = vit.patch_embed(torch.rand(1, 3, *size))
    assert tokens.shape[1] == grid[0] * grid[1]


def test_overlapping_patches_are_windows_of_the_image():
    vit = small_vit(patch_size=8)
    rows, columns = fit_to_images(vit, (30, 20), stride=5)
    image = torch.rand(1, 3, 30, 20)
    tokens = vit.patch_embed(image)[0]
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    for row in range(rows):
        for column in range(columns):
            window = image[0, :, 5 * row : 5 * row + 8, 5 * column : 5 * column + 8]
            value = (weight * window).sum(dim=(1, 2, 3)) + bias
            assert torch.allclose(tokens[row * columns + column], value, atol=1e-5)


def test_position_embeddings_are_resized_from_the_pretrained_grid():
    vit = small_vit(img_size=(32, 32), patch_size=8)
    with torch.no_grad():
        ramp = torch.linspace(0, 1, 4).view(4, 1).expand(4, 4).reshape(16, 1)
        vit.pos_embed[:, 1:] = ramp.expand(16, 24)
        vit.pos_embed[:, :1] = 7.0
    fit_to_images(vit, (64, 32))
    assert torch.equal(vit.pos_embed[:, 0], torch.full((1, 24), 7.0))
    grid = vit.pos_embed[0, 1:, 0].view(8, 4)
    assert torch.allclose(grid, grid[:, :1].expand(8, 4), atol=1e-5)  # constant along the rows
    assert bool((grid[1:, 0] > grid[:-1, 0]).all()) and vit.pos_embed.requires_grad


def naive_jigsaw(patches, shift, groups):
    moved = patches[shift:] + patches[:shift]
    while len(moved) % groups:
        moved.append(moved[-1])
    length = len(moved) // groups
    return [moved[group * length + place] for place in range(length) for group in range(groups)]


@pytest.mark.parametrize("count,shift,groups", [(8, 5, 2), (9, 5, 2), (210, 5, 2), (7, 0, 3), (6, 2, 1)])
def test_jigsaw_order(count, shift, groups):
    patches = torch.arange(count, dtype=torch.float64).view(1, count, 1).expand(2, count, 3)
    shuffled = jigsaw(patches, shift=shift, groups=groups)
    assert shuffled[0, :, 0].tolist() == naive_jigsaw(list(map(float, range(count))), shift, groups)
    assert torch.equal(shuffled[0], shuffled[1])


def test_local_branches_against_one_pass_per_part():
    model = build("transreid", size=(80, 48), stride=8, shift=3).double().eval()
    images = torch.rand(2, 3, 80, 48, dtype=torch.float64)
    vit = model.vit
    with torch.no_grad():
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        tokens = vit.blocks[0](tokens)
        found = model.features(images)
        assert torch.allclose(found[0], vit.norm(vit.blocks[1](tokens))[:, 0])
        order = naive_jigsaw(list(range(tokens.shape[1] - 1)), 3, 2)
        length = len(order) // 4
        for part in range(4):
            rows = [1 + place for place in order[part * length : (part + 1) * length]]
            piece = torch.cat([tokens[:, :1], tokens[:, rows]], dim=1)
            wanted = model.local_norm(model.local_block(piece))[:, 0]
            assert torch.allclose(found[1 + part], wanted, atol=1e-10)
        expected = torch.cat([found[0], *[each / 4 for each in found[1:]]], dim=1)
        assert torch.allclose(model(images), expected / expected.norm(dim=1, keepdim=True))


def test_camera_embedding():
    embedding = CameraEmbedding(3, 4, weight=2.0)
    tokens = torch.rand(3, 5, 4)
    out = embedding(tokens, torch.tensor([2, -1, 7]))
    mean = embedding.table.mean(dim=0)
    assert torch.allclose(out[0], tokens[0] + 2 * embedding.table[2])
    assert torch.allclose(out[1], tokens[1] + 2 * mean) and torch.allclose(out[2], tokens[2] + 2 * mean)
    assert torch.allclose(embedding(tokens, None), tokens + 2 * mean)


def test_camera_embedding_is_off_without_cameras():
    assert not build("transreid", num_cameras=0).uses_cameras
    assert not build("transreid", num_cameras=3, camera_weight=0.0).uses_cameras
    assert not build("vit_baseline", num_cameras=3).uses_cameras
    net = build("transreid", num_cameras=3).eval()
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        assert net.uses_cameras
        assert not torch.allclose(net(images, torch.tensor([0, 1])), net(images, torch.tensor([1, 0])))


def test_pretrained_files_of_the_224_grid_load(tmp_path):
    torch.manual_seed(3)
    whole = timm.create_model("vit_tiny_patch16_224", depth=2)
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    cfg = get_default_config()
    cfg.backbone.name, cfg.backbone.weights, cfg.vit.depth = "timm:vit_tiny_patch16_224", str(tmp_path / "vit.pth"), 2
    net = host.build_model("vit_baseline", 5, "triplet", True, False, cfg=cfg)
    assert torch.equal(net.vit.blocks[1].attn.qkv.weight, whole.blocks[1].attn.qkv.weight)
    reference = timm.create_model("vit_tiny_patch16_224", depth=2)
    reference.load_state_dict(whole.state_dict())
    fit_to_images(reference, (256, 128))
    assert torch.equal(net.vit.pos_embed, reference.pos_embed)


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"backbone": "torchvision:resnet18"}, "timm"),
        ({"backbone": "timm:vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"backbone": "timm:swin_tiny_patch4_window7_224"}, "SwinTransformer|does not take"),
        ({"size": (12, 12)}, "smaller than a patch"),
        ({"size": (32, 16), "stride": 0}, "jigsaw"),
    ],
)
def test_mistakes_are_named(keys, words):
    with pytest.raises(UserError, match=words):
        build("transreid", **keys)
