"""Packages: the image model of a run in the layout of the Hugging Face hub, without pickles, with a model card.

A package is a folder of three files, four with a relation encoder::

    model.safetensors     all tensors of the image model, by their names here
    config.json           how the model is built and how images are read
    README.md             the model card: data, protocol, metrics, licence, how to load
    relation.safetensors  the relation encoder, where the run has one

Before it is moved to its place it is read back: the model out of the folder gives the same features, bit by bit, and so does
the backbone by the lines that the card shows to users of torchreid, timm and torchvision.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.files import read_weight_file
from ..backbones.opened import Opened, Reading
from ..config.defaults import get_default_config
from ..engine import checkpoint as ckpt
from ..engine.evaluator import Row
from ..engine.opened import RunNetwork
from ..engine.records import read_metrics
from ..engine.runner import open_run
from ..engine.table import markdown_table
from ..errors import UserError
from ..features.opening import PACKAGE_ENTRY, Request, is_package
from ..files import folder_beside, make_folder, write_json, write_text
from ..host import HOST, build_model
from ..methods import takes_several

FORMAT = 1
WEIGHTS, CONFIG, CARD, RELATION = "model.safetensors", "config.json", "README.md", "relation.safetensors"
ENTRY = PACKAGE_ENTRY
_PLACES = {"data.root": "reid-data", "data.save_dir": "log"}
_FILES = ("backbone.weights", "model.load_weights", "model.resume", "relation.load_weights")


@dataclass(frozen=True)
class Package:
    """A package that was read.

    Attributes:
        folder: Where it is.
        model: The image model, in evaluation mode.
        cfg: Configuration of its run, without places.
        about: The plug-in's entry of ``config.json``.
    """

    folder: Path
    model: nn.Module
    cfg: Any
    about: dict[str, Any]


def read_package(folder: Path | str) -> Package:
    """Build the image model of a package.

    Raises:
        UserError: The folder is none, of another version, or its weights do not fit.
    """
    from .. import register

    register()
    folder = Path(folder)
    if not is_package(folder):
        raise UserError(f"'{folder}' is no package of this plug-in ('{folder / CONFIG}' has no entry '{ENTRY}').")
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))[ENTRY]
    if about.get("format") != FORMAT:
        raise UserError(f"package '{folder}' has format {about.get('format')}; this version of the plug-in reads {FORMAT}.")
    cfg = get_default_config()
    with contextlib.suppress(AttributeError):
        cfg.set_new_allowed(False)
    from yacs.config import CfgNode

    cfg.merge_from_other_cfg(CfgNode.load_cfg(about["config"]))
    with contextlib.redirect_stdout(io.StringIO()):
        model = build_model(
            cfg.model.name,
            about["num_classes"],
            "softmax" if cfg.loss.name == "softmax" else "triplet",
            False,
            False,
            cfg=cfg,
            num_cameras=about["num_cameras"],
        )
    file = read_weight_file(folder / WEIGHTS)
    ckpt.load_weights(model, file.content, path=file.path)
    return Package(folder, model.eval(), cfg, about)


def open_package(name: str, request: Request) -> Opened:
    """Open a package for pictures; its images are read as its run read them.

    Raises:
        UserError: As :func:`read_package`, or its model takes several modalities.
    """
    request.refuse(f"package '{name}'")
    package = read_package(name)
    cfg = package.cfg
    if takes_several(cfg):
        raise UserError(
            f"package '{name}' takes samples of several modalities, not single pictures; open it by read_package."
        )
    reading = Reading((cfg.data.height, cfg.data.width), tuple(cfg.data.norm_mean), tuple(cfg.data.norm_std))
    return Opened(
        RunNetwork(package.model).eval(),
        reading,
        f"package '{name}'",
        identity=package.about["fingerprint"],
        pixel_range=list(cfg.data.pixel_range),
    )


def write_package(run_folder: Path | str, out: Path, *, licence: str, title: str = "") -> Package:
    """Make a package of a finished run.

    Args:
        run_folder: The run.
        out: The folder to make; it must not exist, or be empty.
        licence: Identifier of the licence, as the hub knows it, such as ``mit``.
        title: Heading of the card; empty: the folder's name.

    Raises:
        UserError: The run was not tested, or the package does not give the run's features; then nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out '{out}' is there already; name a folder that is not.")
    folder = Path(run_folder)
    if (folder / "config.yml").is_file() and not (folder / "metrics.json").is_file():
        raise UserError(f"run '{folder}' was not tested ('metrics.json' is missing); run 'relreid test' on it first.")
    from .. import register

    register()
    run = open_run(folder, ["use_gpu", "False"])
    if run.cfg.data.type != "image":
        raise UserError(f"run '{folder}' is one of tracklets, whose model is not packaged; choose one of images.")
    run.bare.cpu().eval()
    make_folder(out.parent)
    with folder_beside(out) as place:
        _write(run, place, licence, title or out.name)
        package = read_package(place)
        images = example_images(run)
        _require_same(run.bare, package.model, images, out)
        os.chmod(place, 0o755)
        if out.is_dir():
            out.rmdir()
        os.replace(place, out)
    return Package(out, package.model, package.cfg, package.about)


def example_images(run: Any) -> Tensor:
    """Return made images (3, …) of the size that a run's model takes."""
    data = run.cfg.data
    shape = [len(run.bare.modalities)] if takes_several(run.cfg) else []
    return torch.randn(3, *shape, 3, data.height, data.width, generator=torch.Generator().manual_seed(0))


def _require_same(model: nn.Module, other: nn.Module, images: Tensor, out: Path) -> None:
    with torch.inference_mode():
        if not torch.equal(model(images), other(images)):
            raise UserError(f"'{out}' was not written: the model that is read back from it gives other features.")


def _write(run: Any, place: Path, licence: str, title: str) -> None:
    from .. import __version__

    cfg = run.cfg.clone()
    cfg.defrost()
    for key, value in (*_PLACES.items(), *((key, "") for key in _FILES)):
        section, _, name = key.partition(".")
        cfg[section][name] = value
    about = {
        "format": FORMAT,
        "version": __version__,
        "config": cfg.dump(),
        "num_classes": int(run.datamanager.num_train_pids),
        "num_cameras": int(run.cameras.size),
        "cameras": [list(each) for each in run.cameras.cameras or ()],
        "fingerprint": run.fingerprint,
    }
    several = takes_several(run.cfg)
    reading = {
        "input_size": [3, cfg.data.height, cfg.data.width],
        "mean": list(cfg.multimodal.mean if several else cfg.data.norm_mean),
        "std": list(cfg.multimodal.std if several else cfg.data.norm_std),
        "interpolation": "bicubic" if several else "bilinear",
    }
    config = {"library_name": ENTRY, "model_type": cfg.model.name, **reading, "num_features": width(run), ENTRY: about}
    _save(place / WEIGHTS, run.bare.state_dict())
    write_json(place / CONFIG, config)
    encoder = run.refiner()
    if encoder is not None:
        _save(place / RELATION, encoder.state_dict())
    write_text(place / CARD, card(run, title, licence, relation=encoder is not None, files=place))


def _save(path: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, path, {"format": "pt"})
    os.chmod(path, 0o644)


def width(run: Any) -> int:
    """Return the width of a run's features."""
    with torch.inference_mode():
        return int(run.bare(example_images(run)[:1]).shape[1])


# --- the card ---------------------------------------------------------------------------------------------------------
def card(run: Any, title: str, licence: str, *, relation: bool, files: Path) -> str:
    """Return the model card, README.md.

    Args:
        run: An open run.
        title: Its heading.
        licence: Of the weights.
        relation: Whether there is a relation encoder.
        files: The package's folder, to try the lines for the backbone.
    """
    cfg = run.cfg
    rows = [Row(**row) for row in read_metrics(run.folder)["rows"]]
    head = ["---", f"license: {json.dumps(licence)}", f"library_name: {ENTRY}", "pipeline_tag: image-feature-extraction"]
    head += ["tags:", "- re-identification", "- image-retrieval", f"- {cfg.model.name}", "datasets:"]
    head += [f"- {json.dumps(name)}" for name in cfg.data.sources]
    head += ["metrics:", "- mAP", "- CMC", "---"]
    identities = int(run.datamanager.num_train_pids)
    size = f"{cfg.data.height} x {cfg.data.width}"
    tests = ", ".join(f"`{name}`" for name in cfg.data.targets)
    parts = [
        "\n".join(head),
        f"# {title}",
        f"`{cfg.model.name}` on `{cfg.backbone.name}`: {run.parameters / 1e6:.2f}M parameters, features of width "
        f"{width(run)} from images of {size} pixels.",
        "## Data",
        f"Trained on {', '.join(f'`{name}`' for name in cfg.data.sources)}, {identities} identities; tested on {tests}. "
        "The names of the identities are not in the package.",
        "## Metrics",
        "Gallery images of a query's identity and camera are discarded, as in Market-1501. Scores are in percent; rows say "
        "what was done to the features, and whether queries see each other.",
        markdown_table(rows),
        "## Licence",
        f"`{licence}`, of the weights. The data sets have licences of their own.",
        "## Load it",
        "The whole model, with [relreid_plugin](https://pypi.org/project/relreid-plugin):",
        '```python\nfrom relreid_plugin.export.package import read_package\n\nmodel = read_package("FOLDER").model\n```',
        "or as `model.load_weights FOLDER` beside the configuration in `config.json`.",
    ]
    if relation:
        parts.append("The relation encoder goes into `relation.load_weights FOLDER/relation.safetensors`.")
    lines = backbone_lines(run)
    why = _untrue(run, lines, files) if lines else "it is wrapped in a way that other libraries have not"
    if why:
        parts.append(f"The backbone alone cannot be loaded by another library: {why}.")
    else:
        library = cfg.backbone.name.partition(":")[0] if ":" in cfg.backbone.name else "torchvision"
        library = {"host": "torchreid"}.get(library, library)
        parts.append(f"The backbone alone, with {library} (tried when this card was written):")
        parts.append(f"```python\n{lines}\n```")
    return "\n\n".join(parts) + "\n"


def backbone_lines(run: Any) -> str:
    """Return the Python that loads a run's backbone by its own library; empty where that has no such network.

    After it, ``backbone`` maps images (B, 3, h, w), as the model takes them, to (B, d).
    """
    cfg, model = run.cfg, run.bare
    prefix = next((name for name in ("backbone.body.", "vit.") if _has(model, name[:-1])), None)
    source, _, name = (cfg.backbone.name if prefix else f"host:{cfg.model.name}").rpartition(":")
    reading = 'from safetensors.torch import load_file\n\nweights = load_file("FOLDER/model.safetensors")\n' + (
        f"weights = {{name[{len(prefix)}:]: value for name, value in weights.items() if name.startswith({prefix!r})}}\n"
        if prefix
        else ""
    )
    if takes_several(cfg):
        return ""
    if source == "timm":
        size = (cfg.data.height, cfg.data.width)
        options = _timm_options(model, prefix, size)
        return (
            f"import timm\n{reading}backbone = timm.create_model({name!r}, num_classes=0{options})\n"
            "backbone.load_state_dict(weights)\nbackbone.eval()"
        )
    if source == "host":
        package = HOST.models.__name__
        classes = 1 if prefix else int(run.datamanager.num_train_pids)
        loss = "softmax" if cfg.loss.name == "softmax" and not prefix else "triplet"
        return (
            f"import {package}\n{reading}backbone = {package}.build_model({name!r}, {classes}, {loss!r}, pretrained=False)\n"
            f"backbone.load_state_dict(weights, strict={not prefix})\nbackbone.eval()"
        )
    return (
        f"import torch, torchvision\n{reading}backbone = torchvision.models.get_model({name!r})\n"
        f"{_head_name(name)} = torch.nn.Identity()\nbackbone.load_state_dict(weights)\nbackbone.eval()"
    )


def _has(model: nn.Module, name: str) -> bool:
    with contextlib.suppress(AttributeError):
        model.get_submodule(name)
        return True
    return False


def _timm_options(model: nn.Module, prefix: str | None, size: tuple[int, int]) -> str:
    """Further arguments of timm's builder, for networks that are made for one size of images."""
    body: Any = model.get_submodule((prefix or "")[:-1])
    embed = getattr(body, "patch_embed", None)
    if embed is None or not hasattr(embed, "img_size"):
        return ""
    patch, depth = getattr(embed, "patch_size", None), getattr(body, "blocks", None)
    options = f", img_size={size}"
    if patch is not None:
        options += f", patch_size={int(patch[0])}"
    if depth is not None and isinstance(depth, nn.Sequential) and hasattr(body, "cls_token"):
        options += f", depth={len(depth)}"
    return options


def _head_name(name: str) -> str:
    import torchvision

    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    return next(f"backbone.{each}" for each in ("fc", "classifier", "heads", "head") if hasattr(network, each))


def _untrue(run: Any, lines: str, files: Path) -> str:
    """Run the card's lines and return why the backbone that they load is another one; empty: it is the same."""
    from ..backbones.networks import pooled_output

    found: dict[str, Any] = {}
    images = example_images(run)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(lines.replace("FOLDER", files.as_posix()), CARD, "exec"), found)
        with torch.inference_mode():
            same = torch.allclose(pooled_output(found["backbone"](images)), backbone_features(run.bare, images), atol=1e-5)
    except Exception as error:  # whatever the library says of weights that do not fit
        return " ".join(str(error).split())[:120].rstrip(" .:") or type(error).__name__
    return "" if same else "it was changed (strides, attention or patches) in a way that its library has no option for"


def backbone_features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a model's backbone alone gives for images, (B, d)."""
    network: Any = model
    if _has(model, "backbone.body"):
        return network.backbone(images)
    if _has(model, "vit"):
        return network.vit.forward_head(network.vit.forward_features(images), pre_logits=True)
    return network(images)


__all__ = [
    "CARD",
    "CONFIG",
    "RELATION",
    "WEIGHTS",
    "Package",
    "backbone_features",
    "backbone_lines",
    "card",
    "is_package",
    "read_package",
    "write_package",
]
