"""``relreid stats``: mean and standard deviation of every modality, as ``multimodal.mean`` and ``multimodal.std``."""

from __future__ import annotations

import argparse

from .command import Command


def _modality_stats_arguments(parser: argparse.ArgumentParser) -> None:
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


def _modality_stats(args: argparse.Namespace) -> None:
    from ..data.ranges import modality_ranges, parse_range_rows
    from ..graft.modalities import find_dataset, modality_statistics, read_any, statistics_yaml

    modalities = [name.strip() for name in args.modalities.split(",") if name.strip()] or None
    splits = read_any(find_dataset(args.root, args.name), modalities)
    ranges = modality_ranges(splits.modalities, parse_range_rows(args.pixel_range))
    sources = [item[0] for item in splits.train]
    statistics = modality_statistics(sources, splits.modalities, ranges=ranges, progress=True)
    print(f"# {args.name}: {statistics.samples} training samples")
    print(statistics_yaml(statistics))


STATS = Command(
    "stats",
    description="Measure the mean and standard deviation of every modality over a data set's training samples.",
    examples=[
        "relreid stats --root reid-data --name rgbnt100",
        "relreid stats --root reid-data --name my-strips --modalities R,N",
    ],
    epilog="The layout (strips, RGBNT201, MSVR310, WMVEID863, released GraFT, CSV table) is found out by looking.",
    arguments=_modality_stats_arguments,
    work=_modality_stats,
)
main = STATS.main
