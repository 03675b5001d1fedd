"""``relreid diagnose``: what relations have to work with on a run's features, or on anyone's."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from ..options import parse_numbers
from .command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RUN|FEATURES", help="folder of a run, or a store of features (relreid extract)")
    parser.add_argument("--gallery", metavar="FEATURES", help="store of the gallery; the first one holds queries then")
    parser.add_argument("--train", metavar="FEATURES", help="store of training identities, to compare with")
    parser.add_argument("--target", metavar="NAME", help="test set of a run (default: all)")
    parser.add_argument("-k", metavar="5,10", default="", help="neighbours (default: those of the run's encoder, else 10)")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go (default: RUN/diagnosis, or diagnosis)")


def _diagnose(args: argparse.Namespace) -> None:
    from ..config.ranges import Number

    ks = parse_numbers("-k", args.k, int, Number(1, 10**6)) if args.k else []
    is_run = (Path(args.what) / "config.yml").is_file()
    if is_run and (args.gallery or args.train):
        raise UserError("command line: --gallery and --train belong to features, not to a run.")
    if args.target and not is_run:
        raise UserError(f"command line: --target belongs to a run, and '{args.what}' is none.")
    folder = Path(args.out) if args.out else Path(args.what) / "diagnosis" if is_run else Path("diagnosis")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"command line: --out '{folder}' is a file; name a folder.")

    from ..magformer.diagnosed import parts_of_features, parts_of_run, write_diagnosis

    if is_run:
        from .. import register

        register()
        parts, k = parts_of_run(args.what, target=args.target)
    else:
        from ..features import read

        found = read(args.what)
        others = {name: read(value) for name in ("gallery", "train") if (value := getattr(args, name))}
        if found.splits is not None:
            kept = set(found.splits.tolist())
            others = {**{name: found.part(name) for name in ("gallery", "train") if name in kept}, **others}
            found = found.part("query") if "query" in kept else found
        parts, k = parts_of_features(Path(args.what).name, found, **others), 10
    write_diagnosis(args.what, parts, folder, ks=ks or [k])


DIAGNOSE = Command(
    "diagnose",
    description=(
        "Count true matches among the neighbours, by camera, look where attention puts its weight, and score what an oracle "
        "would reach, on training, held-out and test identities."
    ),
    examples=[
        "relreid diagnose runs/magformer_embedded",
        "relreid diagnose gallery -k 5,10,20 --out looks",
        "relreid diagnose queries --gallery gallery --train bank",
        "relreid diagnose features.npz",
    ],
    epilog="The oracles read the identities of test images: they say what is left to gain, and are no method.",
    arguments=_arguments,
    work=_diagnose,
)
main = DIAGNOSE.main
