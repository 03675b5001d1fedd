"""GraFT's ablations: fusion (paper, Table 5), modalities (Tables 6 and 7), triplet schemes (Table 8), token index.

python tools/graft.py fusion modalities --jobs 2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.options import OptionParser, integer, parse_numbers

TABLES = "fusion, modalities, schemes, tokens"


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(
        description="Train and test the rows of GraFT's ablations over several seeds.",
        epilog="Runs that are done are used again; a command that was stopped goes on where it was.",
    )
    parser.add_argument("tables", metavar="TABLE", nargs="+", help=TABLES)
    parser.add_argument("--config-file", metavar="F", default="configs/graft_embedded.yml", help="configuration")
    parser.add_argument("--seeds", metavar="1,2", default="1,2,3", help="seeds (default: 1,2,3)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/graft", help="folder of runs and tables")
    parser.add_argument("--jobs", metavar="N", type=integer(1, 256), default=1, help="runs at a time (default: 1)")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", default=[], help="overrides for all runs")
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin import register
        from relreid_plugin.graft.tables import graft_report

        register()
        seeds = parse_numbers("--seeds", args.seeds, int)
        print(graft_report(args.config_file, args.tables, seeds, out=Path(args.out), jobs=args.jobs, overrides=args.opts))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
