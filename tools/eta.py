<<<<<<< HEAD
"""Sweep of eta, the weight of the information bottleneck bound: the door to ``relreid sweep``; ``--help`` has examples."""
=======
"""Sweep of eta, the weight of the information bottleneck bound: mAP and IBB over eta.

python tools/eta.py --config-file configs/rib_dcs_vit_embedded.yml --out runs/eta --jobs 2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.config.ranges import HUGE, Number
from relreid_plugin.options import OptionParser, integer, parse_numbers


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(
        description="Train and test one configuration under several weights of the information bottleneck bound.",
        epilog="Runs that are done are used again; a command that was stopped goes on where it was.",
    )
    parser.add_argument("--config-file", metavar="F", default="configs/rib_dcs_vit_embedded.yml", help="configuration")
    parser.add_argument("--etas", metavar="A,B", default="0,0.1,0.25,0.5,1,1.5,2", help="weights (0: the bound is measured)")
    parser.add_argument("--seeds", metavar="1,2", default="1", help="seeds (default: 1)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/eta", help="folder of runs, table and picture")
    parser.add_argument("--jobs", metavar="N", type=integer(1, 256), default=1, help="runs at a time (default: 1)")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", default=[], help="overrides for all runs")
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin import register
        from relreid_plugin.rib.tables import eta_report

        register()
        etas = parse_numbers("--etas", args.etas, float, Number(0, HUGE))
        seeds = parse_numbers("--seeds", args.seeds, int)
        print(eta_report(args.config_file, etas, seeds, out=Path(args.out), jobs=args.jobs, overrides=args.opts))

    return run_command(work)
>>>>>>> main

from relreid_plugin.cli.tables import sweep_main as main

if __name__ == "__main__":
    raise SystemExit(main())
