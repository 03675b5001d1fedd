"""``relreid ladder``: the ablation ladder of MagFormer (paper Table 1) from one stage 1."""

from __future__ import annotations

import argparse

from ..errors import UserError
from .command import GO_ON, Command
from .train import TrainParser, configuration, train_arguments

RUNGS = ("nformer", "malaa", "magformer", "affinity", "diffusion")
"""Keys of :data:`relreid_plugin.magformer.ladder.RUNGS`, written here so that ``--help`` needs no torch."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    train_arguments(parser)
    parser.add_argument("--rungs", metavar="A,B", default=",".join(RUNGS), help=f"rungs to run ({','.join(RUNGS)})")
    parser.add_argument("--seeds", metavar="1,2", default="1,2,3", help="seeds of stage 2")


def _work(args: argparse.Namespace) -> None:
    cfg, args = configuration(args)
    for key, option in (("relation.train.seed", "--seeds"), ("relation.attention", "--rungs")):
        if key in args.opts[::2]:
            raise UserError(f"command line: '{key}' is set by {option}; leave it out.")
    from .. import register
    from ..magformer.ladder import ladder_table, run_ladder
    from ..options import parse_numbers

    register()
    seeds = parse_numbers("--seeds", args.seeds, int)
    print("\n" + ladder_table(run_ladder(cfg, rungs=args.rungs.split(","), seeds=seeds)))


LADDER = Command(
    "ladder",
    description="Train and test every rung of the ablation ladder from one stage 1.",
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
