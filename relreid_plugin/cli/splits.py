"""``relreid splits``: a configuration on every split of its data set, one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import GO_ON, Command, add_jobs


def _splits_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="F", required=True, help="configuration")
    parser.add_argument(
        "--splits", metavar="N", default="all", help="all, the first N, or a list like 0,2,4 (default: all of the data set)"
    )
    parser.add_argument("--out", metavar="FOLDER", default="runs/splits", help="folder of runs and tables")
    add_jobs(parser)


def _splits(args: argparse.Namespace) -> None:
    from .. import register
    from ..experiments.splits import run_splits, splits_table

    register()
    options = {"splits": args.splits, "out": Path(args.out), "jobs": args.jobs, "overrides": args.opts}
    print("\n" + splits_table(run_splits(args.config_file, **options)))


SPLITS = Command(
    "splits",
    description="Train and test a configuration on every split of its data set: one table, mean ± standard deviation.",
    examples=[
        "relreid splits --config-file magformer_viper.yml --out runs/viper --jobs 2",
        "relreid splits --config-file magformer_viper.yml --splits 3",
    ],
    epilog=GO_ON,
    arguments=_splits_arguments,
    work=_splits,
)
main = SPLITS.main
