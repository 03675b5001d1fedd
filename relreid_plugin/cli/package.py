"""``relreid package``: a run's model as a folder of the hub's layout, with a model card and without pickles."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command


def _package_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="finished run (data.save_dir)")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to make")
    parser.add_argument(
        "--licence", metavar="NAME", required=True, help="licence of the weights, such as mit or cc-by-nc-4.0"
    )
    parser.add_argument("--title", metavar="TEXT", default="", help="heading of the card (default: the folder's name)")


def _package(args: argparse.Namespace) -> None:
    from ..export.package import write_package

    package = write_package(args.run, Path(args.out), licence=args.licence, title=args.title)
    size = sum(path.stat().st_size for path in package.folder.iterdir())
    names = ", ".join(sorted(path.name for path in package.folder.iterdir()))
    print(f"{package.folder}: {size / 1e6:.1f} MB ({names}); the model out of it gives the run's features")


PACKAGE = Command(
    "package",
    description="Make a folder in the layout of the Hugging Face hub out of a run: safetensors, configuration, model card.",
    examples=["relreid package log/magformer --out my-model --licence mit"],
    epilog="The card is written from the run's metrics, and its lines that load the backbone are tried before it is kept.",
    arguments=_package_arguments,
    work=_package,
)
main = PACKAGE.main
