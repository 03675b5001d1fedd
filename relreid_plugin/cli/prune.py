"""``relreid prune``: pruned models of a GraFT run, fewer and fewer parameters, fine-tuned and tested after every step."""

from __future__ import annotations

import argparse

from ..options import integer
from .command import Command, add_overrides


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run of model.name graft")
    parser.add_argument(
        "--targets",
        metavar="A,B",
        default="0.9,0.8,0.7,0.6",
        help="falling parameter counts, shares like 0.8 or numbers like 76M (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", metavar="N", type=integer(0), default=1, help="fine-tuning after every step (default: 1)"
    )
    parser.add_argument(
        "--structured", action="store_true", help="remove whole heads and MLP channels, which makes inference faster"
    )
    parser.add_argument("--out", metavar="FOLDER", help="default: RUN/prune, with --structured RUN/prune-structured")
    add_overrides(parser)


def _prune(args: argparse.Namespace) -> None:
    from .. import register
    from ..graft.pruning import prune_run

    register()
    table = prune_run(
        args.run,
        args.targets.split(","),
        epochs=args.epochs,
        structured=args.structured,
        out=args.out,
        overrides=args.opts,
    )
    print(f"\n{table}")


PRUNE = Command(
    "prune",
    description="Prune a trained GraFT step by step, fine-tune after every step, and test.",
    examples=[
        "relreid prune runs/graft_embedded --targets 0.9,0.8,0.6 --epochs 1",
        "relreid prune runs/graft_embedded --structured",
    ],
    epilog="Targets that are done are used again; a command that was stopped goes on where it was.",
    arguments=_prune_arguments,
    work=_prune,
)
main = PRUNE.main
