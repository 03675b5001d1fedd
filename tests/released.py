"""Tiny checkpoints under the names that released code gives them, and plain functions of those names."""

from __future__ import annotations

import json
import math

import torch
from torch.nn import functional as F

SIZE = (64, 32)
DIM = 64


class Tensors(dict):
    """Random tensors under names, drawn once, from layers' shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(len(self))

    def draw(self, name, *shape, scale=1.0, shift=0.0):
        self[name] = shift + scale * torch.randn(shape, generator=self.generator)

    def linear(self, name, out, inner, bias=True):
        self.draw(f"{name}.weight", out, inner, scale=1 / math.sqrt(inner))
        if bias:
            self.draw(f"{name}.bias", out, scale=0.1)

    def conv(self, name, out, inner, side, bias=False):
        self.draw(f"{name}.weight", out, inner, side, side, scale=1 / math.sqrt(inner * side * side))
        if bias:
            self.draw(f"{name}.bias", out, scale=0.1)

    def norm(self, name, width, batch=False):
        self.draw(f"{name}.weight", width, scale=0.1, shift=1.0)
        self.draw(f"{name}.bias", width, scale=0.1)
        if batch:
            self.draw(f"{name}.running_mean", width, scale=0.1)
            self[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=self.generator)
            self[f"{name}.num_batches_tracked"] = torch.tensor(1)


# --- plain functions over released names ------------------------------------------------------------------------------
def linear(t, name, x):
    return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def layer_norm(t, name, x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def batch_norm(t, name, x):
    return F.batch_norm(
        x, t[f"{name}.running_mean"], t[f"{name}.running_var"], t[f"{name}.weight"], t[f"{name}.bias"], False, 0, 1e-5
    )


def attend(q, k, v, heads, scale=None, bias=None):
    """(B, n, D) each -> (B, n, D), head by head."""
    parts = []
    for q_head, k_head, v_head in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        logits = q_head @ k_head.transpose(1, 2) * (scale or q_head.shape[-1] ** -0.5)
        if bias is not None:
            logits = logits + bias[len(parts)]
        parts.append(logits.softmax(-1) @ v_head)
    return torch.cat(parts, -1)


# --- vision transformers ----------------------------------------------------------------------------------------------
def write_block(t, name, dim):
    t.norm(f"{name}.norm1", dim)
    t.linear(f"{name}.attn.qkv", 3 * dim, dim)
    t.linear(f"{name}.attn.proj", dim, dim)
    t.norm(f"{name}.norm2", dim)
    t.linear(f"{name}.mlp.fc1", 2 * dim, dim)
    t.linear(f"{name}.mlp.fc2", dim, 2 * dim)


def block(t, name, x, heads=1):
    q, k, v = linear(t, f"{name}.attn.qkv", layer_norm(t, f"{name}.norm1", x)).chunk(3, -1)
    x = x + linear(t, f"{name}.attn.proj", attend(q, k, v, heads))
    return x + linear(t, f"{name}.mlp.fc2", F.gelu(linear(t, f"{name}.mlp.fc1", layer_norm(t, f"{name}.norm2", x))))


def write_transreid(jigsaw=False, cameras=0, stride=16, prefix="base.", neck=True, stem=False, size=SIZE):
    t = Tensors()
    grid = ((size[0] - 16) // stride + 1) * ((size[1] - 16) // stride + 1)
    t.draw(f"{prefix}cls_token", 1, 1, DIM)
    t.draw(f"{prefix}pos_embed", 1, 1 + grid, DIM)
    if cameras:
        t.draw(f"{prefix}sie_embed", cameras, 1, DIM)
    if stem:
        for place, inner, side in ((0, 3, 7), (3, 64, 3), (6, 64, 3)):
            t.conv(f"{prefix}patch_embed.conv.{place}", 64, inner, side)
        for place in (1, 4):
            t.norm(f"{prefix}patch_embed.conv.{place}.IN", 32)
            t.norm(f"{prefix}patch_embed.conv.{place}.BN", 32, batch=True)
        t.norm(f"{prefix}patch_embed.conv.7", 64, batch=True)
    t.conv(f"{prefix}patch_embed.proj", DIM, 64 if stem else 3, 8 if stem else 16, bias=True)
    for number in range(2):
        write_block(t, f"{prefix}blocks.{number}", DIM)
    t.norm(f"{prefix}norm", DIM)
    if jigsaw:
        for branch in ("b1", "b2"):
            write_block(t, f"{branch}.0", DIM)
            t.norm(f"{branch}.1", DIM)
    if neck:
        t.linear(f"{prefix}fc", 10, DIM)
        for part in ["", "_1", "_2", "_3", "_4"] if jigsaw else [""]:
            t.norm(f"bottleneck{part}", DIM, batch=True)
            t.linear(f"classifier{part}", 5, DIM, bias=False)
    return t


def transreid(t, images, *, stride=16, camera=None, neck="before", pooling="cls", prefix="base.", stem=False):
    maps = images
    if stem:
        for place, wide in ((0, 7), (3, 3), (6, 3)):
            name = f"{prefix}patch_embed.conv.{place}"
            maps = F.conv2d(maps, t[f"{name}.weight"], None, 2 if place == 0 else 1, wide // 2)
            behind = f"{prefix}patch_embed.conv.{place + 1}"
            if place < 6:
                first = F.instance_norm(maps[:, :32], weight=t[f"{behind}.IN.weight"], bias=t[f"{behind}.IN.bias"])
                maps = torch.cat([first, batch_norm(t, f"{behind}.BN", maps[:, 32:])], 1)
            else:
                maps = batch_norm(t, behind, maps)
            maps = maps.relu()
    name = f"{prefix}patch_embed.proj"
    x = F.conv2d(maps, t[f"{name}.weight"], t[f"{name}.bias"], 8 if stem else stride).flatten(2).transpose(1, 2)
    x = torch.cat([t[f"{prefix}cls_token"].expand(len(x), -1, -1), x], 1) + t[f"{prefix}pos_embed"]
    if camera is not None:
        x = x + 3.0 * camera
    x = block(t, f"{prefix}blocks.0", x)
    if "b1.1.weight" not in t:
        x = layer_norm(t, f"{prefix}norm", block(t, f"{prefix}blocks.1", x))
        patches = x[:, 1:]
        feature = {
            "cls": lambda: x[:, 0],
            "gem": lambda: x[:, 0] + patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3),
            "avg": lambda: patches.mean(1),
            "max": lambda: patches.amax(1),
            "avg_max": lambda: torch.stack([patches[:, i : i + 4].amax(1) for i in range(0, patches.shape[1], 4)]).mean(0),
        }[pooling]()
        return batch_norm(t, "bottleneck", feature) if neck == "after" else feature
    whole = layer_norm(t, "b1.1", block(t, "b1.0", x))[:, 0]
    count = x.shape[1] - 1
    order = [*range(5, count + 1), *range(1, 5)]  # the released code counts its shift of 5 from the class token on
    if count % 2:
        order.append(order[-2])
    half = len(order) // 2
    order = [order[i + part * half] for i in range(half) for part in (0, 1)]
    features = [whole]
    for part in range(4):
        places = order[part * (count // 4) : (part + 1) * (count // 4)]
        features.append(layer_norm(t, "b2.1", block(t, "b2.0", x[:, [0, *places]]))[:, 0])
    if neck == "after":
        features = [batch_norm(t, f"bottleneck{f'_{i}' if i else ''}", feature) for i, feature in enumerate(features)]
    return torch.cat([features[0], *(feature / 4 for feature in features[1:])], 1)


# --- CLIP-ReID --------------------------------------------------------------------------------------------------------
def write_clipreid(cameras=0, size=SIZE):
    t, p = Tensors(), "image_encoder."
    t.draw(f"{p}class_embedding", DIM)
    t.draw(f"{p}positional_embedding", 1 + size[0] * size[1] // 256, DIM)
    t.draw(f"{p}proj", DIM, 24, scale=0.1)
    t.conv(f"{p}conv1", DIM, 3, 16)
    t.norm(f"{p}ln_pre", DIM)
    for number in range(2):
        name = f"{p}transformer.resblocks.{number}"
        t.norm(f"{name}.ln_1", DIM)
        t.norm(f"{name}.ln_2", DIM)
        t.draw(f"{name}.attn.in_proj_weight", 3 * DIM, DIM, scale=0.1)
        t.draw(f"{name}.attn.in_proj_bias", 3 * DIM, scale=0.1)
        t.linear(f"{name}.attn.out_proj", DIM, DIM)
        t.linear(f"{name}.mlp.c_fc", 4 * DIM, DIM)
        t.linear(f"{name}.mlp.c_proj", DIM, 4 * DIM)
    t.norm(f"{p}ln_post", DIM)
    for name, width in (("", DIM), ("_proj", 24)):
        t.norm(f"bottleneck{name}", width, batch=True)
        t.linear(f"classifier{name}", 5, width, bias=False)
    t.draw("prompt_learner.cls_ctx", 5, 4)
    t.draw("text_encoder.ln_final.weight", 4)
    if cameras:
        t.draw("cv_embed", cameras, DIM)
    return t


def clipreid(t, images, *, neck="before", camera=None):
    p = "image_encoder."
    x = F.conv2d(images, t[f"{p}conv1.weight"], None, 16).flatten(2).transpose(1, 2)
    first = t[f"{p}class_embedding"].expand(len(x), 1, -1)
    if camera is not None:
        first = first + 3.0 * camera
    x = layer_norm(t, f"{p}ln_pre", torch.cat([first, x], 1) + t[f"{p}positional_embedding"], 1e-5)
    for number in range(2):
        name = f"{p}transformer.resblocks.{number}"
        qkv = F.linear(
            layer_norm(t, f"{name}.ln_1", x, 1e-5), t[f"{name}.attn.in_proj_weight"], t[f"{name}.attn.in_proj_bias"]
        )
        x = x + linear(t, f"{name}.attn.out_proj", attend(*qkv.chunk(3, -1), 1))
        hidden = linear(t, f"{name}.mlp.c_fc", layer_norm(t, f"{name}.ln_2", x, 1e-5))
        x = x + linear(t, f"{name}.mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))
    feature = layer_norm(t, f"{p}ln_post", x, 1e-5)[:, 0]
    features = [feature, feature @ t[f"{p}proj"]]
    if neck == "after":
        features = [batch_norm(t, name, each) for name, each in zip(("bottleneck", "bottleneck_proj"), features)]
    return torch.cat(features, 1)


# --- residual networks ------------------------------------------------------------------------------------------------
WIDTHS = (64, 128, 256, 512)


def write_resnet(t, prefix, *, bottleneck=False, ibn=False, se=False, nonlocal_=False):
    def normed(name, width, halved=False):
        if halved:
            t.norm(f"{name}.IN", width // 2)
            t.norm(f"{name}.BN", width - width // 2, batch=True)
        else:
            t.norm(name, width, batch=True)

    t.conv(f"{prefix}conv1", 64, 3, 7)
    normed(f"{prefix}bn1", 64)
    inner = 64
    for stage, width in enumerate(WIDTHS, 1):
        name, out = f"{prefix}layer{stage}.0", width * (4 if bottleneck else 1)
        t.conv(f"{name}.conv1", width, inner, 1 if bottleneck else 3)
        normed(f"{name}.bn1", width, ibn and stage < 4)
        t.conv(f"{name}.conv2", width, width, 3)
        normed(f"{name}.bn2", width)
        if bottleneck:
            t.conv(f"{name}.conv3", out, width, 1)
            normed(f"{name}.bn3", out)
        if se:
            t.linear(f"{name}.se.fc.0", out // 16, out, bias=False)
            t.linear(f"{name}.se.fc.2", out, out // 16, bias=False)
        if inner != out or stage > 1:
            t.conv(f"{name}.downsample.0", out, inner, 1)
            normed(f"{name}.downsample.1", out)
        if nonlocal_ and stage in (2, 3):
            for part in ("g", "theta", "phi"):
                t.conv(f"{prefix}NL_{stage}.0.{part}", 1, out, 1, bias=True)
            t.conv(f"{prefix}NL_{stage}.0.W.0", out, 1, 1, bias=True)
            t.norm(f"{prefix}NL_{stage}.0.W.1", out, batch=True)
        inner = out
    return inner


def resnet(t, prefix, x, *, relu=True, ceil=False):
    def normed(name, x):
        if f"{name}.IN.weight" not in t:
            return batch_norm(t, name, x)
        half = len(t[f"{name}.IN.weight"])
        first = F.instance_norm(x[:, :half], weight=t[f"{name}.IN.weight"], bias=t[f"{name}.IN.bias"])
        return torch.cat([first, batch_norm(t, f"{name}.BN", x[:, half:])], 1)

    x = normed(f"{prefix}bn1", F.conv2d(x, t[f"{prefix}conv1.weight"], None, 2, 3))
    x = F.max_pool2d(x.relu() if relu else x, 3, 2, 0 if ceil else 1, ceil_mode=ceil)
    for stage in range(1, 5):
        name, stride = f"{prefix}layer{stage}.0", 2 if stage in (2, 3) else 1
        if f"{name}.conv3.weight" in t:
            y = normed(f"{name}.bn1", F.conv2d(x, t[f"{name}.conv1.weight"])).relu()
            y = normed(f"{name}.bn2", F.conv2d(y, t[f"{name}.conv2.weight"], None, stride, 1)).relu()
            y = normed(f"{name}.bn3", F.conv2d(y, t[f"{name}.conv3.weight"]))
        else:
            y = normed(f"{name}.bn1", F.conv2d(x, t[f"{name}.conv1.weight"], None, stride, 1)).relu()
            y = normed(f"{name}.bn2", F.conv2d(y, t[f"{name}.conv2.weight"], None, 1, 1))
        if f"{name}.se.fc.0.weight" in t:
            weight = linear(t, f"{name}.se.fc.2", linear(t, f"{name}.se.fc.0", y.mean((2, 3))).relu()).sigmoid()
            y = y * weight[:, :, None, None]
        if f"{name}.downsample.0.weight" in t:
            x = batch_norm(t, f"{name}.downsample.1", F.conv2d(x, t[f"{name}.downsample.0.weight"], None, stride))
        x = (x + y).relu()
        place = f"{prefix}NL_{stage}.0"
        if f"{place}.g.weight" in t:
            g, theta, phi = (
                F.conv2d(x, t[f"{place}.{part}.weight"], t[f"{place}.{part}.bias"]).flatten(2)
                for part in ("g", "theta", "phi")
            )
            seen = (theta.transpose(1, 2) @ phi / phi.shape[2]) @ g.transpose(1, 2)
            seen = seen.transpose(1, 2).view(len(x), -1, *x.shape[2:])
            x = x + batch_norm(t, f"{place}.W.1", F.conv2d(seen, t[f"{place}.W.0.weight"], t[f"{place}.W.0.bias"]))
    return x


def write_strong(**options):
    t = Tensors()
    width = write_resnet(t, "base.", **options)
    t.norm("bottleneck", width, batch=True)
    t.linear("classifier", 5, width, bias=False)
    if options.get("ibn"):
        t.linear("base.fc", 10, width)
    return t


def write_fastreid(learned=False, reduced=0, **options):
    t = Tensors()
    width = write_resnet(t, "backbone.", **options)
    if reduced:
        t.conv("heads.bottleneck.0", reduced, width, 1)
    t.norm(f"heads.bottleneck.{int(bool(reduced))}", reduced or width, batch=True)
    t.draw("heads.weight", 5, reduced or width)
    if learned:
        t["heads.pool_layer.p"] = torch.full((1,), 2.5)
    for name, values in (("pixel_mean", (120.0, 110.0, 100.0)), ("pixel_std", (50.0, 60.0, 70.0))):
        t[name] = torch.tensor(values).view(1, 3, 1, 1)
    return t


def fastreid(t, images, *, pooling="avg"):
    maps = resnet(t, "backbone.", images, ceil=True)
    power = float(t["heads.pool_layer.p"]) if "heads.pool_layer.p" in t else 3.0
    feature = {
        "avg": lambda: maps.mean((2, 3)),
        "max": lambda: maps.amax((2, 3)),
        "avg_max": lambda: maps.mean((2, 3)) + maps.amax((2, 3)),
        "gem": lambda: maps.clamp(min=1e-6).pow(power).mean((2, 3)).pow(1 / power),
    }[pooling]()
    last = 0
    if "heads.bottleneck.1.weight" in t:
        feature, last = feature @ t["heads.bottleneck.0.weight"].flatten(1).T, 1
    return batch_norm(t, f"heads.bottleneck.{last}", feature)


# --- SOLIDER ----------------------------------------------------------------------------------------------------------
WINDOW, SWIN = 3, 16


def write_solider(semantic=True, neck=True, prefix="base."):
    t, heads = Tensors(), (1, 2)
    t.conv(f"{prefix}patch_embed.projection", SWIN, 3, 4, bias=True)
    t.norm(f"{prefix}patch_embed.norm", SWIN)
    for stage, count in enumerate(heads):
        dim = SWIN * 2**stage
        for number in range(2):
            name = f"{prefix}stages.{stage}.blocks.{number}"
            t.norm(f"{name}.norm1", dim)
            t.norm(f"{name}.norm2", dim)
            t.draw(f"{name}.attn.w_msa.relative_position_bias_table", (2 * WINDOW - 1) ** 2, count)
            t[f"{name}.attn.w_msa.relative_position_index"] = relative_places()
            t.linear(f"{name}.attn.w_msa.qkv", 3 * dim, dim)
            t.linear(f"{name}.attn.w_msa.proj", dim, dim)
            t.linear(f"{name}.ffn.layers.0.0", 4 * dim, dim)
            t.linear(f"{name}.ffn.layers.1", dim, 4 * dim)
        t.norm(f"{prefix}norm{stage}", dim)
        if semantic:
            t.linear(f"{prefix}semantic_embed_w.{stage}", 2 * SWIN, 2)
            t.linear(f"{prefix}semantic_embed_b.{stage}", 2 * SWIN, 2)
    t.norm(f"{prefix}stages.0.downsample.norm", 4 * SWIN)
    t.linear(f"{prefix}stages.0.downsample.reduction", 2 * SWIN, 4 * SWIN, bias=False)
    if neck:
        t.norm("bottleneck", 2 * SWIN, batch=True)
        t.linear("classifier", 5, 2 * SWIN, bias=False)
    return t


def relative_places():
    """Row of the table of biases for every pair of places in a window."""
    index = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
    for i in range(WINDOW**2):
        for j in range(WINDOW**2):
            rows, columns = i // WINDOW - j // WINDOW, i % WINDOW - j % WINDOW
            index[i, j] = (rows + WINDOW - 1) * (2 * WINDOW - 1) + columns + WINDOW - 1
    return index


def swin_attention(t, name, x, shift, heads):
    """Window by window; what a shift brings together from both ends is kept apart by -100."""
    batch, height, width, dim = x.shape
    rows, columns = math.ceil(height / WINDOW) * WINDOW, math.ceil(width / WINDOW) * WINDOW
    padded = torch.zeros(batch, rows, columns, dim)
    padded[:, :height, :width] = x
    out = torch.zeros_like(padded)
    table = t[f"{name}.relative_position_bias_table"][t[f"{name}.relative_position_index"]]
    for top in range(0, rows, WINDOW):
        for left in range(0, columns, WINDOW):
            places = [(top + r, left + c) for r in range(WINDOW) for c in range(WINDOW)]
            real = [((r + shift) % rows, (c + shift) % columns) for r, c in places]
            q, k, v = linear(t, f"{name}.qkv", torch.stack([padded[:, r, c] for r, c in real], 1)).chunk(3, -1)
            wrapped = [(r + shift >= rows, c + shift >= columns) for r, c in places]
            apart = torch.tensor([[0.0 if a == b else -100.0 for b in wrapped] for a in wrapped])
            seen = attend(q, k, v, heads, bias=[table[..., head] + apart for head in range(heads)])
            for place, value in zip(real, linear(t, f"{name}.proj", seen).unbind(1)):
                out[:, place[0], place[1]] = value
    return out[:, :height, :width]


def solider(t, images, *, neck="before", weight=0.2, prefix="base."):
    name = f"{prefix}patch_embed.projection"
    x = F.conv2d(images, t[f"{name}.weight"], t[f"{name}.bias"], 4).permute(0, 2, 3, 1)
    x = layer_norm(t, f"{prefix}patch_embed.norm", x, 1e-5)
    for stage, heads in enumerate((1, 2)):
        for number in range(2):
            name = f"{prefix}stages.{stage}.blocks.{number}"
            normed = layer_norm(t, f"{name}.norm1", x, 1e-5)
            x = x + swin_attention(t, f"{name}.attn.w_msa", normed, number * (WINDOW // 2), heads)
            hidden = F.gelu(linear(t, f"{name}.ffn.layers.0.0", layer_norm(t, f"{name}.norm2", x, 1e-5)))
            x = x + linear(t, f"{name}.ffn.layers.1", hidden)
        if stage == 0:
            parts = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
            parts = layer_norm(t, f"{prefix}stages.0.downsample.norm", parts, 1e-5)
            x = linear(t, f"{prefix}stages.0.downsample.reduction", parts)
            x = x.view(len(images), images.shape[2] // 8, images.shape[3] // 8, -1)
            if f"{prefix}semantic_embed_w.0.weight" in t:
                given = torch.tensor([weight, 1 - weight])
                scale, shift = (linear(t, f"{prefix}semantic_embed_{part}.0", given) for part in "wb")
                x = x * F.softplus(scale) + shift
    feature = layer_norm(t, f"{prefix}norm1", x, 1e-5).mean((1, 2))
    return batch_norm(t, "bottleneck", feature) if neck == "after" else feature


# --- files of the documentation ---------------------------------------------------------------------------------------
def write_hub_folder(folder, name="swin_tiny_patch4_window7_224", **config):
    """A folder of the hub's layout with weights of timm, as MegaDescriptor is published; returns the network."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    options = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "img_size": 64, "window_size": 2}
    net = timm.create_model(name, num_classes=0, **options).eval()
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    described = {
        "architecture": name,
        "num_classes": 0,
        "model_args": options,
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"},
    }
    (folder / "config.json").write_text(json.dumps({**described, **config}))
    return net


def write_models(folder):
    """Write what the page of models names."""
    import timm
    from safetensors.torch import save_file
    from torchreid.reid.models import build_model
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "test_vit.safetensors")
    torch.save(squeezenet1_1().state_dict(), folder / "squeezenet.pth")
    person = (256, 128)
    torch.save(build_model("osnet_x0_25", 7, pretrained=False).state_dict(), folder / "osnet_x0_25_msmt17.pth")
    files = {
        "transreid_msmt17": write_transreid(jigsaw=True, cameras=3, stride=12, size=person),
        "personvit": write_transreid(size=person),
        "clipreid": write_clipreid(size=person),
        "market_sbs": write_fastreid(learned=True, nonlocal_=True),
        "solider": write_solider(),
        "strong_market": write_strong(),
    }
    for name, tensors in files.items():
        torch.save(dict(tensors), folder / f"{name}.pth")
    write_hub_folder(folder / "MegaDescriptor-T-224")
