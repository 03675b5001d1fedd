"""RIB's table: baseline, + attention, + attention + IBB over several seeds, and the occlusion stress test.

python tools/rib.py --out runs/rib --jobs 2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.options import OptionParser, integer, parse_numbers

CONFIGS = ["configs/rib_dcs_vit_embedded.yml", "configs/rib_ca_se_embedded.yml"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(
        description="Train and test baseline, + attention and + attention + IBB over several seeds, then cover the queries.",
        epilog="Runs that are done are used again; a command that was stopped goes on where it was.",
    )
    parser.add_argument("--config-file", metavar="F", nargs="+", default=CONFIGS, help=f"default: {' '.join(CONFIGS)}")
    parser.add_argument("--seeds", metavar="1,2", default="1,2,3", help="seeds (default: 1,2,3)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/rib", help="folder of runs, tables and pictures")
    parser.add_argument("--jobs", metavar="N", type=integer(1, 256), default=1, help="runs at a time (default: 1)")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", default=[], help="overrides for all runs")
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin import register
        from relreid_plugin.rib.tables import rib_report

        register()
        seeds = parse_numbers("--seeds", args.seeds, int)
        print(rib_report(args.config_file, seeds, out=Path(args.out), jobs=args.jobs, overrides=args.opts))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
