"""``relreid ladder``: image model, control and the rungs of MagFormer (paper Table 1), alone and under every rival."""

from __future__ import annotations

import argparse

from ..config.ranges import RIVALS
from ..errors import UserError
from .command import GO_ON, Command
from .train import TrainParser, configuration, train_arguments

RUNGS = ("own", "nformer", "malaa", "magformer", "affinity", "diffusion")
"""Keys of :data:`relreid_plugin.magformer.ladder.RUNGS`, written here so that ``--help`` needs no torch."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    train_arguments(parser)
    parser.add_argument(
        "--rungs",
        metavar="A,B",
        default="",
        help=f"rungs to run ({','.join(RUNGS)}); default: own with a recipe, else the others",
    )
    parser.add_argument(
        "--rivals",
        metavar="A,B",
        default=",".join(RIVALS),
        help=f"what else is done with the features ({','.join(RIVALS)})",
    )
    parser.add_argument("--seeds", metavar="1,2", default="1,2,3", help="seeds of stage 2")


def _work(args: argparse.Namespace) -> None:
    cfg, args = configuration(args)
    for key, option in (("relation.train.seed", "--seeds"), ("relation.attention", "--rungs")):
        if key in args.opts[::2]:
            raise UserError(f"command line: '{key}' is set by {option}; leave it out.")
    from .. import register
    from ..magformer.ladder import default_rungs, run_ladder
    from ..options import parse_numbers

    register()
    seeds = parse_numbers("--seeds", args.seeds, int)
    rungs = args.rungs.split(",") if args.rungs else default_rungs(cfg)
    rivals = [name for name in args.rivals.split(",") if name]
    print("\n" + run_ladder(cfg, rungs=rungs, seeds=seeds, rivals=rivals)["table"])


LADDER = Command(
    "ladder",
    description="Test image model, control and rungs from one stage 1, alone and under every rival.",
    examples=[
        "relreid ladder --config-file magformer_embedded.yml",
        "relreid ladder --config-file magformer_embedded.yml --rungs nformer,magformer --seeds 1",
    ],
    epilog=GO_ON,
    arguments=_arguments,
    work=_work,
    parser_class=TrainParser,
)
main = LADDER.main
