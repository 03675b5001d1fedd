"""``relreid search`` and ``relreid refine``: rank a store of ``relreid extract`` for query images, and keep it up to date.

With ``--relations`` the gallery is refined first, where it was not; a killed refinement goes on where it was. Images that
were appended to a refined store are refined as if they were queries, which is approximate (the old images do not see
them); ``--full`` refines the whole gallery anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..options import Launch, integer, number, read_launch
from .command import Command, add_overrides
from .compare import verifier_of
from .ladder import RIVALS
from .naming import add_naming, naming
from .stores import STORE, add_filter, chosen_filter

RERANK = "rerank"
"""The re-ranking that is meant where none is named: k-reciprocal encoding."""


def _store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the model that made the store, as it was named there")
    parser.add_argument("store", metavar="STORE", help=STORE)


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add kind and parameters of the index."""
    parser.add_argument(
        "--index", choices=("flat", "scan", "ivf", "hnsw"), help="index (default: the run's relation.search.index)"
    )
    parser.add_argument("--nlist", type=integer(0, 10**7), help="ivf: cells")
    parser.add_argument("--nprobe", type=integer(1, 10**7), help="ivf: cells visited per query")
    parser.add_argument("--ef", type=integer(1), help="hnsw: width of the search front")


def _safety_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="compare every file of the store with its checksum first")
    parser.add_argument("--complete", action="store_true", help="refuse a store whose extraction was interrupted")
    add_naming(parser)
    add_overrides(parser)


def _threshold(text: str) -> float | str:
    return text if text == "verifier" else number(-1, 1)(text)


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    _store_arguments(parser)
    parser.add_argument("queries", metavar="IMAGE", nargs="*", help="query images, or folders with images in or below them")
    parser.add_argument("-k", type=integer(1), default=10, help="results per query (default: 10)")
    parser.add_argument("--relations", action="store_true", help="refine queries and gallery by the run's relation encoder")
    parser.add_argument("--full", action="store_true", help="refine the whole gallery anew")
    parser.add_argument("--rerank", metavar="N", type=integer(0), default=0, help="re-rank the N best images of every query")
    parser.add_argument(
        "--by",
        choices=RIVALS,
        help=f"how, with the run's settings of it, such as test.gcr (default: {RERANK}, that is k-reciprocal)",
    )
    parser.add_argument(
        "--threshold",
        metavar="SCORE",
        type=_threshold,
        help="leave out what scores less; 'verifier': the threshold of relreid calibrate",
    )
    add_filter(parser, "images that may be found: those that are")
    add_index_arguments(parser)
    parser.add_argument("--out", metavar="FOLDER", default="search", help="where ranking.json and ranking.png go")
    parser.add_argument(
        "--shown", metavar="N", type=integer(1), default=8, help="queries in the table and the picture (default: 8)"
    )
    _safety_arguments(parser)


def _refine_arguments(parser: argparse.ArgumentParser) -> None:
    _store_arguments(parser)
    parser.add_argument("--full", action="store_true", help="refine the whole gallery anew")
    add_index_arguments(parser)
    _safety_arguments(parser)


def chosen_config(args: argparse.Namespace, extractor: Any) -> Any:
    """Return the run's search settings, with what :func:`add_index_arguments` read instead."""
    import dataclasses

    chosen = {name: getattr(args, name) for name in ("index", "nlist", "nprobe", "ef")}
    return dataclasses.replace(
        extractor.search_config(), **{name: value for name, value in chosen.items() if value is not None}
    )


def _up_to_date(args: argparse.Namespace, *, relations: bool) -> tuple[Any, Any, Any, Any]:
    """The store, the extractor, the index's settings and the searcher, with everything made that is missing."""
    from ..errors import UserError
    from ..search import FeatureExtractor
    from ..search.engines import open_store
    from ..search.milvus import MilvusStore
    from ..search.opened import open_searcher

    store = open_store(args.store)
    if isinstance(store, MilvusStore) and args.index not in (None, store.kind):
        raise UserError(f"command line: '{args.store}' was made with --index {store.kind}, and has no other one.")
    extractor = FeatureExtractor(args.model, args.opts, **naming(args))
    config = chosen_config(args, extractor)
    searcher = open_searcher(
        store, extractor, config, relations=relations, full=args.full, verify=args.verify, complete=args.complete
    )
    if relations and searcher.states.alone:
        from ..metrics.cameras import ALONE

        print(f"note: '{args.store}': {ALONE}", file=sys.stderr)
    return store, extractor, config, searcher


def _refine(args: argparse.Namespace) -> None:
    launch = read_launch()
    if launch.world > 1:
        return _refine_together(args, launch)
    store, *_ = _up_to_date(args, relations=True)
    print(f"{args.store}: {len(store)} images, up to date")


def _refine_together(args: argparse.Namespace, launch: Launch) -> None:
    """One of several processes, each with its part of the rows; the first one brings the indices up to date."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[launch.local % len(visible)] if visible else str(launch.local)

    from ..engine.distributed import joined
    from ..errors import UserError
    from ..features.store import FeatureStore
    from ..search import FeatureExtractor
    from ..search.milvus import is_milvus
    from ..search.sharded import ShardedPass

    with joined(launch, use_gpu=False, go_on="start the same command again"):
        if is_milvus(args.store):
            raise UserError(
                f"command line: '{args.store}' is in Milvus; let the processes refine the store on disk, and write it "
                "there by relreid copy --relations."
            )
        store = FeatureStore(args.store, verify=args.verify)
        extractor = FeatureExtractor(args.model, args.opts, **naming(args))
        if extractor.fingerprint != store.model or (args.complete and store.shortage):
            raise UserError(
                store.shortage
                if extractor.fingerprint == store.model
                else f"store '{args.store}' holds features of another model; refine it by the run that made it."
            )
        ShardedPass(store, extractor.encoder()).run(full=args.full)
    args.full = False
    if not launch.rank:  # alone from here on
        _up_to_date(args, relations=True)
        print(f"{args.store}: {len(store)} images, refined by {launch.world} processes, up to date")


def _search(args: argparse.Namespace) -> None:
    import dataclasses
    import time

    from ..errors import UserError
    from ..metrics.cameras import UNKNOWN
    from ..search.extractor import list_images
    from ..search.report import draw_ranking, ranking_table, write_ranking
    from ..search.written import query_cameras

    if args.full and not args.relations:
        raise UserError("command line: --full belongs to --relations.")
    if args.by and not args.rerank:
        raise UserError("command line: --by belongs to --rerank.")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"command line: --out '{args.out}' is a file; name a folder.")
    if args.threshold == "verifier" and (args.relations or args.rerank):
        raise UserError(
            "command line: the verifier's threshold is one of image features, not of refined or re-ranked ones; give "
            "--threshold a number, or leave out --relations and --rerank."
        )
    queries = list_images(args.queries) if args.queries else []
    store, extractor, config, searcher = _up_to_date(args, relations=args.relations)
    if not queries:
        print(f"{args.store}: {len(store)} images, up to date")
        return
    by = args.by or RERANK
    rival, protocol, given = extractor.rerank_settings(by)
    cameras = None
    if searcher.reads_cameras or (args.rerank and rival.cameras != "none"):
        cameras = query_cameras(store, queries, extractor.name_pattern)
        unknown = int((cameras == UNKNOWN).sum())
        if searcher.reads_cameras and unknown:
            print(
                f"note: the camera of {unknown} of {len(queries)} queries is unknown; every gallery image counts as one of "
                "another camera for them."
            )
    features = extractor.features(queries)
    threshold = args.threshold
    if threshold == "verifier":
        threshold = verifier_of(args.model, None, dim=features.shape[1], model=extractor.fingerprint).threshold
    started = time.perf_counter()
    again = {"rerank": args.rerank, "by": by, "protocol": protocol, "settings": given} if args.rerank else {}
    chosen = chosen_filter(args) or None
    result = searcher.search(features, args.k, camids=cameras, threshold=threshold, among=chosen, **again)
    seconds = time.perf_counter() - started
    settings = {
        "store": args.store,
        "images": len(store),
        "index": dataclasses.asdict(config),
        "relations": args.relations,
        "rerank": args.rerank,
        "reranking": {"name": by, "protocol": protocol, "protocols": rival.protocols, **given} if args.rerank else None,
        "metric": "cosine" + (f", {rival.title.lstrip('+ ')} of the {args.rerank} best" if args.rerank else ""),
        "threshold": threshold,
        "among": dataclasses.asdict(chosen) if chosen else None,
        "milliseconds_per_query": 1000 * seconds / len(queries),
    }
    out = Path(args.out)
    write_ranking(out / "ranking.json", queries, result, settings)
    draw_ranking(
        out / "ranking.png",
        queries,
        result,
        shown_queries=args.shown,
        pixel_range=extractor.pixel_range,
        pattern=extractor.name_pattern,
    )
    print(ranking_table(queries[: args.shown], result))
    if threshold is not None:
        alone = int((result.rows < 0).all(dim=1).sum())
        print(f"\n{alone} of {len(queries)} queries are not in the gallery (no image scores {threshold:.4f})")
    if args.rerank:
        print(f"\n{_said(rival, protocol, max(args.k, args.rerank))}")
    print(f"\n{len(queries)} queries in {len(store)} images: {1000 * seconds / len(queries):.2f} ms each; {out}")


def _said(rival: Any, protocol: str, count: int) -> str:
    """What a re-ranking looks at, in one line."""
    seen = "look at each other, and it looks at them" if protocol == "inductive" else "and itself look at each other"
    return (
        f"re-ranked by {rival.name} ({rival.source}), {protocol} (it exists {' and '.join(rival.protocols)}): "
        f"a query's {count} best {seen}; other queries change nothing"
    )


SEARCH = Command(
    "search",
    description="Rank a gallery on disk for query images: table, JSON and picture.",
    examples=[
        "relreid search log/magformer gallery query.jpg more_queries/",
        "relreid search log/magformer gallery query.jpg --relations --rerank 100",
        "relreid search log/magformer gallery query.jpg --threshold verifier",
        "relreid search log/magformer milvus:gallery.db query.jpg --camera 3 --since 2025-03-01",
        "relreid search host:osnet_x0_25 gallery query.jpg --weights osnet_x0_25_msmt17.pth",
        "relreid search log/magformer gallery query.jpg --rerank 100 --by gcr --opts test.gcr.k1 13",
        "relreid search log/magformer gallery            (no query: only bring the index up to date)",
    ],
    arguments=_search_arguments,
    work=_search,
)
REFINE = Command(
    "refine",
    description="Refine a gallery on disk by the run's relation encoder, and bring its index up to date.",
    examples=[
        "relreid refine log/magformer gallery",
        "relreid refine log/magformer gallery --full",
        "torchrun --nproc-per-node 4 -m relreid_plugin refine log/magformer gallery",
    ],
    epilog=(
        "A killed refinement goes on where it was. Images that were appended later are refined as if they were queries, "
        "which is approximate; --full refines all anew. "
        "By torchrun several processes make a full pass, each with its part of the rows."
    ),
    arguments=_refine_arguments,
    work=_refine,
)
main = SEARCH.main
