"""``relreid extract``: features of images by any model into a store to search.

Run again with the same store, it goes on where it was killed and appends images that are new. Under torchrun every process
writes a shard of its own; machines that share no disk each write to their own, and the shard folders are put together in one
folder afterwards.
"""

from __future__ import annotations

import argparse
import os

from ..options import integer, read_launch
from .command import Command, add_overrides
from .naming import MODEL, add_naming, naming


def _extract_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("store", metavar="STORE", help="folder of the store; an existing one is appended to")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image files, or folders with images in or below them")
    parser.add_argument("--target", metavar="NAME", help="instead: images of a test set of the run, with its labels")
    parser.add_argument("--split", choices=("gallery", "query"), default="gallery", help="of --target (default: gallery)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="type of a new store (default: float32)")
    parser.add_argument(
        "--chunk", metavar="ROWS", type=integer(1, 10**8), default=8192, help="images per chunk (default: 8192)"
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
    from ..search import FeatureExtractor
    from ..search.extractor import list_images

    if bool(args.images) == bool(args.target):
        raise UserError("command line: name image files or folders, or a test set by --target, and not both.")
    files = list_images(args.images) if args.images else None
    extractor = FeatureExtractor(args.model, args.opts, cameras_known=args.known_cameras, **naming(args))
    for note in extractor.extractor.notes:
        print(f"note: {note}")
    records = files if files is not None else extractor.test_records(args.target, args.split)
    store = extractor.store(
        args.store,
        records,
        dtype=args.dtype,
        chunk_rows=args.chunk,
        shard=(launch.rank, launch.world),
        skip_broken=args.skip_broken,
    )
    if args.verify:
        store.verify()
    print(f"{store.folder}: {len(store)} images, width {store.dim}, {store.dtype}")


EXTRACT = Command(
    "extract",
    description="Extract features of images into a store.",
    examples=[
        "relreid extract log/magformer gallery photos/",
        "relreid extract host:osnet_x0_25 gallery photos/ --weights osnet_x0_25_msmt17.pth",
        "relreid extract transreid_msmt17.pth gallery photos/ --model-option neck=after",
        "relreid extract log/magformer gallery --target market1501",
        "torchrun --nproc-per-node 4 -m relreid_plugin extract log/magformer gallery photos/",
    ],
    arguments=_extract_arguments,
    work=_extract,
)
main = EXTRACT.main
