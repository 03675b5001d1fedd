"""``relreid figures``: feature space, attention scores and stage-2 loss of tested runs."""

from __future__ import annotations

import argparse

from ..options import integer
from .command import Command


def _figures_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders (data.save_dir) with stage 2")
    parser.add_argument("--out", metavar="FOLDER", help="where the pictures go (default: RUN/figures of the first run)")
    parser.add_argument("--target", metavar="NAME", help="test set (default: the first one of the first run)")
    parser.add_argument(
        "--identities", metavar="N", type=integer(1), default=12, help="identities in tsne.png (default: 12)"
    )


def _figures(args: argparse.Namespace) -> None:
    from ..magformer.figures import draw_figures

    draw_figures(args.runs, out=args.out, target=args.target, identities=args.identities)


FIGURES = Command(
    "figures",
    description="Draw feature space, attention scores and stage-2 loss of tested runs.",
    examples=[
        "relreid figures log/malaa log/magformer --out figures",
    ],
    arguments=_figures_arguments,
    work=_figures,
)
main = FIGURES.main
