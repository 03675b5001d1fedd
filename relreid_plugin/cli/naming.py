"""How commands name a model: a run, a checkpoint, or a network of a library with a file of weights."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UserError
from ..options import integer

MODEL = "run (data.save_dir), checkpoint, folder of the hub's layout, or host:NAME, timm:NAME, torchvision:NAME"


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add what is said beside the name of a model that is no run."""
    group = parser.add_argument_group("models that are no run")
    group.add_argument("--weights", metavar="FILE", default="", help="weights of host:NAME, timm:NAME or torchvision:NAME")
    group.add_argument("--pretrained", action="store_true", help="instead: the library's own, over the network")
    group.add_argument("--size", metavar="HxW", help="size of the images (default: as it was trained)")
    group.add_argument(
        "--model-option", metavar="NAME=VALUE", action="append", default=[], help="of a family, such as neck=after"
    )


def add_naming(parser: argparse.ArgumentParser) -> None:
    """Add what is said beside a model's name, and how fast it works."""
    add_network(parser)
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch", metavar="N", type=integer(0), default=0, help="images at a time (default: as fits the device)"
    )
    speed.add_argument(
        "--workers", metavar="N", type=integer(0, 1024), help="lanes on a CPU, decoding threads on a GPU (default: as torch)"
    )
    speed.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:N or auto (default)")
    speed.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the network (default: float32)",
    )


def network(args: argparse.Namespace) -> dict[str, Any]:
    """Return what :func:`add_network` read, as :func:`~relreid_plugin.extractor.load_extractor` takes it.

    Raises:
        UserError: An option of a family that is no ``NAME=VALUE``.
    """
    found: dict[str, Any] = {"weights": args.weights, "pretrained": args.pretrained, "options": {}}
    if args.size:
        found["size"] = args.size
    for word in args.model_option:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise UserError(f"command line: --model-option takes NAME=VALUE, got '{word}'.")
        found["options"][name] = int(value) if value.isdigit() else value
    return found


def naming(args: argparse.Namespace) -> dict[str, Any]:
    """Return what :func:`add_naming` read, as :func:`~relreid_plugin.extractor.load_extractor` takes it.

    Raises:
        UserError: An option of a family that is no ``NAME=VALUE``.
    """
    return {
        **network(args),
        "batch_size": args.batch,
        "workers": args.workers,
        "device": args.device,
        "precision": args.precision,
    }


__all__ = ["MODEL", "add_naming", "add_network", "naming", "network"]
