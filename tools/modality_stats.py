"""Mean and standard deviation of every modality, as lines for a configuration file.

python tools/modality_stats.py --root reid-data --name rgbnt100
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.options import OptionParser


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(
        description="Measure the mean and standard deviation of every modality over a data set's training samples.",
        epilog="The layout (strips, RGBNT201, MSVR310, WMVEID863, released GraFT, CSV table) is found out by looking.",
    )
    parser.add_argument("--root", metavar="D", default="reid-data", help="folder that holds the data sets")
    parser.add_argument(
        "--name", metavar="NAME", required=True, help="data set: a known name, a folder or CSV file in D, or a path"
    )
    parser.add_argument(
        "--modalities", metavar="R,N,T", default="", help="views of a strip from left to right (default: by number)"
    )
    parser.add_argument(
        "--pixel-range",
        metavar="ROWS",
        default="[]",
        help="multimodal.pixel_range for files of more than 8 bits, such as [[],[],[0,65535]]",
    )
    args = parser.parse_args(argv)

    def work() -> None:
        from relreid_plugin.data.multimodal import find_dataset, modality_statistics, read_any, statistics_yaml
        from relreid_plugin.data.ranges import modality_ranges, parse_range_rows

        modalities = [name.strip() for name in args.modalities.split(",") if name.strip()] or None
        splits = read_any(find_dataset(args.root, args.name), modalities)
        ranges = modality_ranges(splits.modalities, parse_range_rows(args.pixel_range))
        sources = [item[0] for item in splits.train]
        statistics = modality_statistics(sources, splits.modalities, ranges=ranges, progress=True)
        print(f"# {args.name}: {statistics.samples} training samples")
        print(statistics_yaml(statistics))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
