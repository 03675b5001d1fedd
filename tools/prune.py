"""Pruned models of a GraFT run: fewer and fewer parameters, fine-tuned and tested after every step.

python tools/prune.py runs/graft_embedded --targets 0.9,0.8,0.6 --epochs 1
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
        description="Prune a trained GraFT step by step, fine-tune after every step, and test.",
        epilog="Targets that are done are used again; a command that was stopped goes on where it was.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run of model.name graft")
    parser.add_argument(
        "--targets",
        metavar="A,B",
        default="0.9,0.8,0.7,0.6",
        help="falling parameter counts, shares like 0.8 or numbers like 76M (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", metavar="N", type=integer(0), default=1, help="fine-tuning after every step (default: 1)"
    )
    parser.add_argument(
        "--structured", action="store_true", help="remove whole heads and MLP channels, which makes inference faster"
    )
    parser.add_argument("--out", metavar="FOLDER", help="default: RUN/prune, with --structured RUN/prune-structured")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", default=[], help="overrides, such as data.root FOLDER")
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin import register
        from relreid_plugin.graft.pruning import prune_run

        register()
        table = prune_run(
            args.run,
            args.targets.split(","),
            epochs=args.epochs,
            structured=args.structured,
            out=args.out,
            overrides=args.opts,
        )
        print(f"\n{table}")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
