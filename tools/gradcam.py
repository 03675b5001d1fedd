"""Grad-CAM of trained runs on covered queries, one beside the other.

python tools/gradcam.py baseline=runs/a RIB=runs/c --out gradcam
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.options import OptionParser, integer, number, seed


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(description="Draw Grad-CAM of trained runs on the same covered queries.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder, or LABEL=RUN")
    parser.add_argument("--out", metavar="FOLDER", default="gradcam", help="where picture, table and JSON go")
    parser.add_argument("--target", metavar="NAME", help="test set (default: the first one of the first run)")
    parser.add_argument("--shown", metavar="N", type=integer(1), default=6, help="queries in the picture (default: 6)")
    parser.add_argument("--count", metavar="N", type=integer(1), default=64, help="queries in the table (default: 64)")
    share = number(0, 1, above=True, below=True)
    parser.add_argument("--fraction", type=share, default=0.4, help="share of every query that is covered (default: 0.4)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the occluders")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", default=[], help="overrides, such as data.root FOLDER")
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin import register
        from relreid_plugin.rib.gradcam import draw_gradcam
        from relreid_plugin.rib.occlusion import single_runs

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

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
