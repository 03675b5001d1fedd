"""Occlusion stress test: mAP of trained runs while more and more of every query is covered.

python tools/occlusion.py baseline=runs/a,runs/b RIB=runs/c,runs/d --out occlusion
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.config.ranges import Number
from relreid_plugin.options import OptionParser, parse_numbers, seed


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(description="Score trained runs while more and more of every query is covered.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder, or LABEL=RUN,RUN for the seeds of a method")
    parser.add_argument("--out", metavar="FOLDER", default="occlusion", help="where picture, table and JSON go")
    parser.add_argument("--fractions", metavar="A,B", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8", help="covered shares")
    parser.add_argument("--target", metavar="NAME", help="test set (default: the first one of the first run)")
    parser.add_argument("--fill", default="noise", help="what covers: noise (blocks of random colours) or mean")
    parser.add_argument("--seed", type=seed, default=0, help="seed of sides and colours")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", default=[], help="overrides, such as data.root FOLDER")
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin import register
        from relreid_plugin.rib.occlusion import parse_groups, write_stress_test

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

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
