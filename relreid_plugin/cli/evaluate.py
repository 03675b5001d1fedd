"""``relreid evaluate``: the table of features, from whatever model and in whatever form."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command, add_overrides


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "features",
        metavar="FEATURES",
        nargs="+",
        help="a store, npz, npy or parquet file with the column split, or without, or queries and gallery",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    add_overrides(parser, "keys of test, and data.split_rule, such as test.rivals ['gnn']")


def _evaluate(args: argparse.Namespace) -> None:
    from ..config.targets import PAIR
    from ..engine.evaluator import Row
    from ..engine.table import text_table
    from ..errors import UserError
    from ..files import write_json
    from ..report.scored import features_config, features_subject

    if len(args.features) > 2:
        raise UserError(
            f"command line: {len(args.features)} files are named; features are one file, or queries and gallery."
        )
    found = features_subject(PAIR.join(args.features), features_config(args.opts))
    for note in found.notes:
        print(f"note: {note}")
    print(f"\n{text_table([Row(**row) for row in found.rows])}")
    if args.json:
        write_json(Path(args.json), {"features": args.features, "notes": found.notes, "rows": found.rows})


EVALUATE = Command(
    "evaluate",
    description="Score features of any model: mAP, CMC and mINP, and what re-ranking makes of them.",
    examples=[
        "relreid evaluate features.npz",
        "relreid evaluate query.npz gallery.npz --json scores.json",
        "relreid evaluate store/ --opts test.rivals ['aqe','gnn'] test.verification True",
    ],
    epilog="Features without splits are divided by data.split_rule (default: image, each asks for all others).",
    arguments=_arguments,
    work=_evaluate,
)
main = EVALUATE.main
