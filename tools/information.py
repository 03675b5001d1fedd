"""Information bottleneck bound and plug-in estimate over the training of finished runs.

python tools/information.py baseline=runs/a RIB=runs/c --out information
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.options import OptionParser


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(description="Draw the information bottleneck bound over the training of finished runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder, or LABEL=RUN")
    parser.add_argument("--out", metavar="FOLDER", default="information", help="where picture, table and JSON go")
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin.rib.figures import draw_information
        from relreid_plugin.rib.occlusion import single_runs

        print(f"{draw_information(single_runs(args.runs), Path(args.out))}\n\n{args.out}")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
