"""Train and test a configuration on the splits of its data set, and average: VIPeR, CUHK03's classic split, and others.

python tools/splits.py --config-file configs/magformer_viper.yml --out runs/viper --jobs 2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.options import OptionParser, integer


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(
        description="Train and test a configuration on every split of its data set: one table, mean ± standard deviation.",
        epilog="Runs that are done are used again; a command that was stopped goes on where it was.",
    )
    parser.add_argument("--config-file", metavar="F", required=True, help="configuration")
    parser.add_argument(
        "--splits", metavar="N", default="all", help="all, the first N, or a list like 0,2,4 (default: all of the data set)"
    )
    parser.add_argument("--out", metavar="FOLDER", default="runs/splits", help="folder of runs and tables")
    parser.add_argument("--jobs", metavar="N", type=integer(1, 256), default=1, help="runs at a time (default: 1)")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", default=[], help="overrides for all runs")
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin import register
        from relreid_plugin.experiments.splits import run_splits, splits_table

        register()
        options = {"splits": args.splits, "out": Path(args.out), "jobs": args.jobs, "overrides": args.opts}
        print("\n" + splits_table(run_splits(args.config_file, **options)))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
