"""``relreid doctor``: what is installed and found, and what to do about the rest."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import INSTALL_HOST, UserError, is_installed, needed
from .command import Command

HOST_PACKAGES = {
    "scipy": "scipy",
    "cv2": "opencv-python-headless",
    "gdown": "gdown",
    "tensorboard": "tensorboard",
    "six": "six",
    "h5py": "h5py",
    "imageio": "imageio",
}
"""What torchreid imports and does not declare: module to package."""
_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
_FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        state: ``ok``, ``note`` (works without) or ``missing`` (training does not).
        what: What was looked at.
        text: What was found, and what to do.
    """

    state: str
    what: str
    text: str


def _version(*packages: str) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    return found


def check_python() -> Iterator[Finding]:
    """Python, torch, torchvision."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "torchvision"):
        if not is_installed(package):
            yield Finding("missing", package, f"is not installed; run 'pip install {package}'")
        else:
            yield Finding("ok", package, "".join(_version(package)) or "installed")


def check_device() -> Iterator[Finding]:
    """CUDA, or the processor's threads."""
    if not is_installed("torch"):
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Finding("ok", "cuda", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    elif torch.version.cuda:
        yield Finding("note", "cuda", f"torch is built for CUDA {torch.version.cuda}, but finds no device: see 'nvidia-smi'")
    else:
        yield Finding("note", "cuda", "torch is built without it; pytorch.org names the build for your device")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding("ok", "threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors (OMP_NUM_THREADS: {threads})")
    if not torch.cuda.is_available():
        from ..features.extractor import imitated

        for precision in ("bfloat16", "float16"):
            said = imitated(precision, torch.device("cpu"))
            if said:
                yield Finding(
                    "note", precision, f"{said}; keep 'train.precision', 'relation.precision' and --precision there"
                )


def check_faiss() -> Iterator[Finding]:
    """faiss, which only the indexes ivf and hnsw need."""
    installed = _version(*_FAISS)
    if len(installed) > 1:
        yield Finding("note", "faiss", f"{' and '.join(installed)} overwrite each other; uninstall all but one")
    elif not is_installed("faiss"):
        text = "is not installed: neighbours are searched exactly by torch; for ivf and hnsw run 'pip install faiss-cpu'"
        yield Finding("note", "faiss", text)
    else:
        try:
            needed("faiss", "an index of faiss")
        except UserError as error:
            yield Finding("note", "faiss", str(error).rstrip("."))
        else:
            yield Finding("ok", "faiss", "".join(installed) or "installed")


def check_host() -> Iterator[Finding]:
    """torchreid and what it needs without saying so."""
    opencv = _version(*_OPENCV)
    if len(opencv) > 1:
        yield Finding("note", "opencv", f"{' and '.join(opencv)} overwrite each other; uninstall all but one")
    if not is_installed("torchreid"):
        yield Finding("missing", "torchreid", f"is not installed, training needs it; run '{INSTALL_HOST}'")
        return
    lacking = [package for module, package in HOST_PACKAGES.items() if not is_installed(module)]
    if lacking:
        yield Finding(
            "missing", "torchreid", f"needs packages that it does not declare; run 'pip install {' '.join(lacking)}'"
        )
        return
    try:
        from ..host import LAYOUT, VERSION
    except UserError as error:
        yield Finding("missing", "torchreid", str(error))
    else:
        yield Finding("ok", "torchreid", f"{VERSION}, layout {LAYOUT}.*")


def check_data(root: str) -> Iterator[Finding]:
    """The folder of the data sets."""
    folder = Path(root)
    if not folder.is_dir():
        text = f"'{folder}' does not exist: embedded data sets are rendered into it, put others there (data.root)"
        yield Finding("note", "data", text)
        return
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".csv")
    writable = "" if os.access(folder, os.W_OK) else "; it may not be written to"
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    yield Finding("ok" if names else "note", "data", f"'{folder}' holds {listed or 'no data set'}{writable}")


def check_weights() -> Iterator[Finding]:
    """Pretrained weights that were downloaded before."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    torch_home = Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser()
    hub = Path(os.environ.get("HF_HOME", cache / "huggingface")).expanduser()
    files = sorted((torch_home / "hub" / "checkpoints").glob("*.pt*"))
    models = sorted((hub / "hub").glob("models--*"))
    if files or models:
        names = [*(file.name for file in files), *(model.name.removeprefix("models--") for model in models)]
        yield Finding("ok", "weights", ", ".join(names[:8]) + (", …" if len(names) > 8 else ""))
    else:
        text = "none downloaded yet: 'model.pretrained True' needs the network once, or a local file in 'backbone.weights'"
        yield Finding("note", "weights", text)


def check_config(cfg: Any) -> Iterator[Finding]:
    """The data sets, or features, and weight files that a configuration names."""
    for name in dict.fromkeys([*cfg.data.sources, *cfg.data.targets]):
        yield _features_of(cfg, name) if cfg.data.type == "features" else _data_set_of(cfg, name)
    for key in ("model.load_weights", "model.resume", "backbone.weights", "relation.load_weights"):
        node, name = key.split(".")
        value = cfg[node][name]
        if value and not Path(value).exists():
            yield Finding("missing", "weights", f"'{key}' names '{value}', which does not exist")
        elif value:
            yield Finding("ok", "weights", f"'{key}' is '{value}'")


def _features_of(cfg: Any, name: str) -> Finding:
    """Whether files of given features are there, and have a form that is read."""
    from ..engine.given import feature_places
    from ..features.files import FORMS, form_of

    places = feature_places(cfg, name)
    for place in places:
        if not form_of(place):
            return Finding("missing", "features", f"'{place}' holds no features; name {FORMS}")
    return Finding("ok", "features", " and ".join(f"'{place}'" for place in places))


def _data_set_of(cfg: Any, name: str) -> Finding:
    """Whether a data set of pictures is there."""
    from ..host.datasets import register_datasets, resolve_dataset
    from ..methods import takes_several

    register_datasets()
    try:
        resolve_dataset(
            name,
            cfg.data.root,
            data_type=cfg.data.type,
            download=cfg.data.download,
            multimodal=takes_several(cfg),
            name_pattern=cfg.data.name_pattern,
            split_rule=cfg.data.split_rule,
        )
    except UserError as error:
        return Finding("missing", "data set", str(error).rstrip("."))
    return Finding("ok", "data set", f"'{name}' under '{cfg.data.root}'")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="F", default="", help="also look for this configuration's data and weights")
    parser.add_argument("--root", metavar="D", default="", help="folder that holds the data sets (data.root)")
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="configuration overrides")


def _work(args: argparse.Namespace) -> None:
    from ..config.defaults import get_default_config, load_config, merge_from_list, validate

    overrides = [*args.opts, *(["data.root", args.root] if args.root else [])]
    if args.config_file:
        cfg = load_config(args.config_file, overrides)
    else:
        cfg = get_default_config()
        merge_from_list(cfg, overrides)
        validate(cfg)
    checks: list[Callable[[], Iterator[Finding]]] = [check_python, check_device, check_faiss, check_host]
    findings: list[Finding] = []
    for check in [*checks, lambda: check_data(cfg.data.root), check_weights]:
        findings += _shown(check())
    if args.config_file and not any(finding.state == "missing" for finding in findings):
        findings += _shown(check_config(cfg))
    missing = [finding.what for finding in findings if finding.state == "missing"]
    if missing:
        raise UserError(f"missing: {', '.join(dict.fromkeys(missing))}; the lines above say what to do.")
    print("everything that training needs is there")


def _shown(findings: Iterator[Finding]) -> list[Finding]:
    found = []
    for finding in findings:
        print(f"{finding.state:<8} {finding.what:<12} {finding.text}", flush=True)
        found.append(finding)
    return found


DOCTOR = Command(
    "doctor",
    description="Look at torch, CUDA, faiss, torchreid, data folders and weights, and say what to do.",
    examples=["relreid doctor", "relreid doctor --config-file magformer.yml --root /data"],
    epilog="The exit code is 2 where something is missing that training needs.",
    arguments=_arguments,
    work=_work,
)
