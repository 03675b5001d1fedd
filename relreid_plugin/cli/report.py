"""``relreid report`` and ``relreid compare-runs``: runs and features as one page, and side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import integer, number
from .command import Command

FORMS = ("text", "markdown", "latex", "csv")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN|FEATURES", nargs="+", help="folders of finished runs; stores, npz, npy or parquet files"
    )
    parser.add_argument("--out", metavar="FILE", default="report.html", help="the page (default: report.html)")
    parser.add_argument(
        "--limit", metavar="MB", type=number(0.1, 2000), default=60.0, help="largest size of the page (default: 60)"
    )
    parser.add_argument("--topk", metavar="N", type=integer(1, 100), default=10, help="images of a list (default: 10)")
    parser.add_argument(
        "--identities", metavar="A,B", default="", help="those on the map (default: the 12 of the lowest mean AP)"
    )
    parser.add_argument(
        "--overlays",
        metavar="N",
        type=integer(0, 500),
        default=12,
        help="queries, worst first, that show where the networks of RIB's runs and of those beside them look (default: 12)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also measure mAP over the covered part of the queries; the runs keep it",
    )


def _report(args: argparse.Namespace) -> None:
    from ..report.page import write_report

    out, identities = Path(args.out), [name.strip() for name in args.identities.split(",") if name.strip()]
    options = {"limit": args.limit, "topk": args.topk, "overlays": args.overlays, "measure": args.measure}
    for sentence in write_report(args.runs, out, identities=identities, **options):
        print(f"note: {sentence}")
    print(f"'{out}': {out.stat().st_size / 1e6:.1f} MB; open it in any browser, no network is needed")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN|FILE",
        nargs="+",
        help="runs' folders, features, logs of torchreid or fast-reid, rankings as JSON; the first one is the reference",
    )
    parser.add_argument("--form", choices=FORMS, default="text", help="of the table (default: text)")
    parser.add_argument("--out", metavar="FILE", help="write the table there instead of printing it")
    parser.add_argument("--queries", metavar="FILE", help="write a CSV file of all queries, won and lost")
    parser.add_argument("--report", metavar="FILE", help="write a page of the runs with pictures of what was won and lost")


def _compare(args: argparse.Namespace) -> None:
    from ..files import write_text
    from ..report.side_by_side import columns, compare, queries_csv, written

    found = columns(args.runs)
    lines, notes = compare(found)
    text = written(lines, notes, form=args.form)
    if args.report:
        from ..report.page import write_page

        for sentence in write_page([one for one in found if not one.foreign], Path(args.report)):
            print(f"note: {sentence}", file=sys.stderr)
        print(f"'{args.report}' is written", file=sys.stderr)
    if args.queries:
        write_text(Path(args.queries), queries_csv(lines))
        print(f"'{args.queries}' is written", file=sys.stderr)
    if args.out:
        write_text(Path(args.out), text + "\n")
        print(f"'{args.out}' is written")
    else:
        print(text)


REPORT = Command(
    "report",
    description="Write one HTML page on runs or features: table, curves, cameras and every query's ranked list.",
    examples=[
        "relreid report log/magformer",
        "relreid report log/osnet log/magformer --out both.html --limit 30",
        "relreid report log/magformer --identities 0001,0042",
        "relreid report features.npz",
    ],
    epilog="The page holds all it needs and asks no network. Queries and gallery in two files: QUERY.npz+GALLERY.npz.",
    arguments=_report_arguments,
    work=_report,
)
COMPARE_RUNS = Command(
    "compare-runs",
    description="Runs side by side: mean and deviation over seeds, paired bootstrap by query, queries won and lost.",
    examples=[
        "relreid compare-runs log/osnet log/magformer",
        "relreid compare-runs log/a-seed1 log/a-seed2 log/b-seed1 log/b-seed2 --form latex --out table.tex",
        "relreid compare-runs log/osnet log/magformer --queries won.csv --report both.html",
        "relreid compare-runs log/magformer fastreid/log.txt torchreid/train.log ranking.json",
    ],
    epilog="Runs whose configurations differ in nothing but seeds and folders are one line. A log whose test set has "
    "another name: TEST_SET=FILE.",
    arguments=_compare_arguments,
    work=_compare,
)
