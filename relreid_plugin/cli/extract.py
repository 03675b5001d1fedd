"""``relreid extract``: features of images by any model, into a store to search, or into a file.

Run again with the same store, it goes on where it was killed and appends images that are new. Under torchrun every process
writes a shard of its own; machines that share no disk each write to their own, and the shard folders are put together in one
folder afterwards.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..options import integer, read_launch
from .command import Command, add_overrides
from .naming import MODEL, add_naming, naming

FILES = (".npz", ".npy", ".parquet")
"""Endings of files of features; any other name is that of a store's folder."""
SPLITS = ("gallery", "query", "train", "test", "all")
"""Those of :data:`relreid_plugin.engine.inference.SPLITS`, written here so that ``--help`` needs no torch."""


def _extract_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "out",
        metavar="OUT",
        help="folder of a store, where an existing one is appended to; a file .npz, .npy or .parquet; or milvus:FILE.db "
        "or milvus:http://HOST:PORT",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image files, or folders with images in or below them")
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="instead: a data set with its labels: a test set of the run; of other models a registered one below "
        "data.root, a folder, or a CSV file",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="gallery",
        help="of --target; test: queries and gallery, all: training images too, each with its split (default: gallery)",
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="type of a new store (default: float32)")
    parser.add_argument(
        "--chunk", metavar="ROWS", type=integer(1, 10**8), help="images per chunk of a store (default: 8192)"
    )
    parser.add_argument("--known-cameras", action="store_true", help="cameras are those of the training set")
    parser.add_argument("--skip-broken", action="store_true", help="pass over files that are no images, and name them")
    parser.add_argument("--verify", action="store_true", help="compare every file of the store with its checksum afterwards")
    add_naming(parser)
    add_overrides(parser)


def _extract(args: argparse.Namespace) -> None:
    launch = read_launch()
    if launch.world > 1:  # one GPU per process; before CUDA starts
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[launch.local % len(visible)] if visible else str(launch.local)

    from ..errors import UserError
    from ..features.arrays import CHUNK_ROWS
    from ..features.files import check_ending
    from ..features.opening import is_run
    from ..search import FeatureExtractor
    from ..search.extractor import list_images
    from ..search.milvus import is_milvus

    if bool(args.images) == bool(args.target):
        raise UserError("command line: name image files or folders, or a test set by --target, and not both.")
    files = list_images(args.images) if args.images else None
    in_milvus = is_milvus(args.out)
    out, of_run = Path(args.out), is_run(args.model.removeprefix("run:"))
    a_file = out.suffix in FILES and not in_milvus
    if in_milvus and (args.dtype or launch.world > 1):
        raise UserError(
            f"command line: '{args.out}' is in Milvus, which keeps float32 and takes one writer at a time; leave out "
            "--dtype and several processes, or extract into shards and write them by relreid copy."
        )
    if a_file:
        check_ending(out)
    if a_file and (args.dtype or args.chunk or args.verify or launch.world > 1):
        raise UserError(
            f"command line: '{out}' is a file; --dtype, --chunk, --verify and several processes are for stores, which "
            "are folders."
        )
    data = args.opts if args.target and not of_run else []
    extractor = FeatureExtractor(args.model, [] if data else args.opts, cameras_known=args.known_cameras, **naming(args))
    for note in extractor.extractor.notes:
        print(f"note: {note}")
    records = files if files is not None else extractor.data_records(args.target, args.split, data, cache_dir=out.parent)
    if a_file:
        features = extractor.write(out, records, skip_broken=args.skip_broken)
        print(f"{out}: {len(features)} images, width {features.dim}")
        return
    store: Any = extractor.store(
        args.out if in_milvus else out,
        records,
        dtype=args.dtype,
        chunk_rows=args.chunk or CHUNK_ROWS,
        shard=(launch.rank, launch.world),
        skip_broken=args.skip_broken,
    )
    if args.verify:
        store.verify()
    print(f"{args.out if in_milvus else store.folder}: {len(store)} images, width {store.dim}, {store.dtype}")


EXTRACT = Command(
    "extract",
    description="Extract features of images into a store, or into a file.",
    examples=[
        "relreid extract log/magformer gallery photos/",
        "relreid extract host:osnet_x0_25 gallery photos/ --weights osnet_x0_25_msmt17.pth",
        "relreid extract transreid_msmt17.pth gallery photos/ --model-option neck=after",
        "relreid extract log/magformer gallery --target market1501",
        "relreid extract host:osnet_x0_25 shop.npz --target shop/ --split test --weights osnet_x0_25_msmt17.pth",
        "torchrun --nproc-per-node 4 -m relreid_plugin extract log/magformer gallery photos/",
    ],
    arguments=_extract_arguments,
    work=_extract,
)
main = EXTRACT.main
