"""Draw feature space, attention scores and stage-2 loss of one or more tested runs.

python tools/figures.py log/malaa log/magformer --out figures
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.options import OptionParser, integer


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(description="Draw feature space, attention scores and stage-2 loss of tested runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders (data.save_dir) with stage 2")
    parser.add_argument("--out", metavar="FOLDER", help="where the pictures go (default: RUN/figures of the first run)")
    parser.add_argument("--target", metavar="NAME", help="test set (default: the first one of the first run)")
    parser.add_argument(
        "--identities", metavar="N", type=integer(1), default=12, help="identities in tsne.png (default: 12)"
    )
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin.magformer.figures import draw_figures

        draw_figures(args.runs, out=args.out, target=args.target, identities=args.identities)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
