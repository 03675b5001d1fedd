"""``relreid diagnose``: what relations have to work with on a run's features, or on anyone's."""

from __future__ import annotations

import argparse

from ..options import parse_numbers
from .command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="RUN|FEATURES", help="folder of a run, or features: npz, npy and csv, parquet, store"
    )
    parser.add_argument("--gallery", metavar="FEATURES", help="features of the gallery; the first ones are queries then")
    parser.add_argument("--train", metavar="FEATURES", help="features of training identities, to compare with")
    parser.add_argument("--target", metavar="NAME", help="test set of a run (default: all)")
    parser.add_argument("-k", metavar="5,10", default="", help="neighbours (default: those of the run's encoder, else 10)")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go (default: RUN/diagnosis, or diagnosis)")


def _diagnose(args: argparse.Namespace) -> None:
    from ..config.ranges import Number
    from ..magformer.diagnosed import run_diagnosis

    ks = parse_numbers("-k", args.k, int, Number(1, 10**6)) if args.k else []
    run_diagnosis(args.what, out=args.out, gallery=args.gallery, train=args.train, target=args.target, ks=ks)


DIAGNOSE = Command(
    "diagnose",
    description=(
        "Count true matches among the neighbours, by camera, look where attention puts its weight, and score what an oracle "
        "would reach, on training, held-out and test identities."
    ),
    examples=[
        "relreid diagnose runs/magformer_embedded",
        "relreid diagnose features.npz -k 5,10,20 --out looks",
        "relreid diagnose queries.npz --gallery gallery.npz --train train.npz",
    ],
    epilog="The oracles read the identities of test images: they say what is left to gain, and are no method.",
    arguments=_arguments,
    work=_diagnose,
)
main = DIAGNOSE.main
