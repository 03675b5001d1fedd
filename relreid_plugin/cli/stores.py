"""``relreid copy`` and ``relreid delete``: a store on disk into Milvus, and images out of either."""

from __future__ import annotations

import argparse
import datetime
from typing import Any

from ..options import integer
from .command import Command, add_overrides
from .naming import add_naming, naming

STORE = "folder of the store, or of its shards; or milvus:FILE.db or milvus:http://HOST:PORT, with #NAME behind it"


def _moment(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"takes a date such as 2025-03-01 or 2025-03-01T12:30, got '{text}'") from None


def add_filter(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the conditions that images must meet."""
    group = parser.add_argument_group(about)
    group.add_argument("--camera", metavar="NAME", action="append", default=[], help="of this camera, or of one of several")
    group.add_argument("--label", metavar="NAME", action="append", default=[], help="of this identity, or of one of several")
    group.add_argument("--since", metavar="DATE", type=_moment, help="taken at or after, such as 2025-03-01T12:30")
    group.add_argument("--until", metavar="DATE", type=_moment, help="taken at or before")


def chosen_filter(args: argparse.Namespace) -> Any:
    """Return what :func:`add_filter` read."""
    from ..search.filters import Filter

    return Filter(tuple(args.camera), tuple(args.label), args.since, args.until)


def _copy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder of the store, or of its shards")
    parser.add_argument("target", metavar="TARGET", help="milvus:FILE.db or milvus:http://HOST:PORT, with #NAME behind it")
    parser.add_argument("--index", choices=("flat", "ivf", "hnsw"), help="of a new gallery (default: flat, which is exact)")
    parser.add_argument("--nlist", type=integer(0, 65_536), default=0, help="ivf: cells (default: 1024)")
    parser.add_argument(
        "--relations", metavar="MODEL", help="the refined gallery, too, by this run's relation encoder (made where missing)"
    )
    add_naming(parser)
    add_overrides(parser)


def _copy(args: argparse.Namespace) -> None:
    from ..errors import UserError
    from ..features.store import FeatureStore
    from ..search.milvus import is_milvus
    from ..search.milvus.copying import copy_store
    from ..search.milvus.states import upload

    if not is_milvus(args.target):
        raise UserError(f"command line: '{args.target}' is no gallery in Milvus, whose names begin with milvus:.")
    store, searcher = FeatureStore(args.store), None
    if args.relations:
        from ..search import FeatureExtractor
        from ..search.opened import open_searcher

        extractor = FeatureExtractor(args.relations, args.opts, **naming(args))
        searcher = open_searcher(store, extractor, extractor.search_config(), relations=True)
    gallery = copy_store(store, args.target, index=args.index, nlist=args.nlist)
    print(f"{args.target}: {gallery.living} images, width {gallery.dim}, index {gallery.kind}")
    if searcher is not None:
        states = upload(searcher.states, gallery)
        print(f"{args.target}: {states.rows} rows refined by {args.relations}")


def _delete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help=STORE)
    parser.add_argument("rows", metavar="ROW", nargs="*", type=integer(0, 10**12), help="rows, as ranking.json names them")
    add_filter(parser, "instead of rows: all images that are")
    parser.add_argument("--dry-run", action="store_true", help="only say how many there are")


def _delete(args: argparse.Namespace) -> None:
    from ..errors import UserError
    from ..search.engines import engine_of

    chosen = chosen_filter(args)
    if bool(args.rows) == bool(chosen):
        raise UserError("command line: name rows, or images by --camera, --label, --since or --until, and not both.")
    engine = engine_of(args.store)
    rows = args.rows or engine.rows_of(chosen)
    if args.dry_run:
        print(f"{args.store}: {len(rows)} of {engine.living} images would be deleted")
        return
    count = engine.delete(rows)
    print(f"{args.store}: {count} images deleted, {engine_of(args.store).living} are left")


COPY = Command(
    "copy",
    description="Write a store on disk into Milvus, embedded in a file or on a server; with --relations refined, too.",
    examples=[
        "relreid copy gallery milvus:gallery.db",
        "relreid copy gallery milvus:gallery.db --relations log/magformer",
        "relreid copy gallery milvus:http://localhost:19530#shop --index hnsw",
    ],
    epilog=(
        "Run again, it goes on where it was killed, writes rows that the store has got since, and deletes those that were "
        "deleted. The access token of a server is read from the variable MILVUS_TOKEN."
    ),
    arguments=_copy_arguments,
    work=_copy,
)
DELETE = Command(
    "delete",
    description="Take images out of a store: no search finds them, and in Milvus they are gone.",
    examples=[
        "relreid delete gallery 12 57",
        "relreid delete milvus:gallery.db --camera 3 --until 2024-12-31",
        "relreid delete gallery --label 0042 --dry-run",
    ],
    arguments=_delete_arguments,
    work=_delete,
)
