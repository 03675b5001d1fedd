"""``relreid gradcam``, ``occlusion`` and ``information``: where runs look, what covering costs, the bound."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import integer, number, parse_numbers, seed
from .command import Command, add_overrides


def _gradcam_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder, or LABEL=RUN")
    parser.add_argument("--out", metavar="FOLDER", default="gradcam", help="where picture, table and JSON go")
    parser.add_argument("--target", metavar="NAME", help="test set (default: the first one of the first run)")
    parser.add_argument("--shown", metavar="N", type=integer(1), default=6, help="queries in the picture (default: 6)")
    parser.add_argument("--count", metavar="N", type=integer(1), default=64, help="queries in the table (default: 64)")
    share = number(0, 1, above=True, below=True)
    parser.add_argument("--fraction", type=share, default=0.4, help="share of every query that is covered (default: 0.4)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the occluders")
    add_overrides(parser)


def _gradcam(args: argparse.Namespace) -> None:
    from .. import register
    from ..rib.gradcam import draw_gradcam
    from ..rib.occlusion import single_runs

    register()
    table = draw_gradcam(
        single_runs(args.runs),
        Path(args.out),
        target=args.target,
        shown=args.shown,
        count=args.count,
        fraction=args.fraction,
        seed=args.seed,
        overrides=args.opts,
    )
    print(f"{table}\n\n{args.out}")


def _occlusion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder, or LABEL=RUN,RUN for the seeds of a method")
    parser.add_argument("--out", metavar="FOLDER", default="occlusion", help="where picture, table and JSON go")
    parser.add_argument("--fractions", metavar="A,B", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8", help="covered shares")
    parser.add_argument("--target", metavar="NAME", help="test set (default: the first one of the first run)")
    parser.add_argument("--fill", default="noise", help="what covers: noise (blocks of random colours) or mean")
    parser.add_argument("--seed", type=seed, default=0, help="seed of sides and colours")
    add_overrides(parser)


def _occlusion(args: argparse.Namespace) -> None:
    from .. import register
    from ..config.ranges import Number
    from ..rib.occlusion import parse_groups, write_stress_test

    register()
    table = write_stress_test(
        parse_groups(args.runs),
        Path(args.out),
        fractions=parse_numbers("--fractions", args.fractions, float, Number(0, 1)),
        target=args.target,
        fill=args.fill,
        seed=args.seed,
        overrides=args.opts,
    )
    print(f"\n{table}\n\n{args.out}")


def _information_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder, or LABEL=RUN")
    parser.add_argument("--out", metavar="FOLDER", default="information", help="where picture, table and JSON go")


def _information(args: argparse.Namespace) -> None:
    from ..rib.figures import draw_information
    from ..rib.occlusion import single_runs

    print(f"{draw_information(single_runs(args.runs), Path(args.out))}\n\n{args.out}")


GRADCAM = Command(
    "gradcam",
    description="Draw Grad-CAM of trained runs on the same covered queries.",
    examples=[
        "relreid gradcam baseline=runs/a RIB=runs/c --out gradcam",
    ],
    arguments=_gradcam_arguments,
    work=_gradcam,
)
OCCLUSION = Command(
    "occlusion",
    description="Score trained runs while more and more of every query is covered.",
    examples=[
        "relreid occlusion baseline=runs/a1,runs/a2 RIB=runs/c1,runs/c2 --out occlusion",
    ],
    arguments=_occlusion_arguments,
    work=_occlusion,
)
INFORMATION = Command(
    "information",
    description="Draw the information bottleneck bound over the training of finished runs.",
    examples=[
        "relreid information baseline=runs/a RIB=runs/c --out information",
    ],
    arguments=_information_arguments,
    work=_information,
)
gradcam_main, occlusion_main, information_main = GRADCAM.main, OCCLUSION.main, INFORMATION.main
