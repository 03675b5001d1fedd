"""``relreid data``: data sets that are rendered, and public ones brought into the layout that is read."""

from __future__ import annotations

import argparse

from ..options import number, seed
from .command import Command


def _make_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", metavar="D", default="reid-data", help="folder that holds the data sets (default: reid-data)"
    )
    parser.add_argument(
        "--name",
        default="embedded_persons",
        help="one of embedded_persons, embedded_vehicles, and either with _tiny (default: embedded_persons)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="world seed (default: 0)")
    parser.add_argument("--sheet", metavar="PNG", help="also write a contact sheet")


def _make(args: argparse.Namespace) -> None:
    from ..data.embedded import (
        SPECS,
        VEHICLE_SPECS,
        contact_sheet,
        ensure_embedded,
        ensure_embedded_vehicles,
        vehicles_sheet,
    )
    from ..errors import UserError, did_you_mean

    names = [*SPECS, *VEHICLE_SPECS]
    if args.name not in names:
        raise UserError(f"there is no embedded data set '{args.name}'{did_you_mean(args.name, names)}")
    vehicles = args.name in VEHICLE_SPECS
    folder = (ensure_embedded_vehicles if vehicles else ensure_embedded)(args.name, args.root, seed=args.seed)
    print(folder)
    if args.sheet:
        if vehicles:
            vehicles_sheet(folder, args.sheet, num_ids=4)
        else:
            contact_sheet(folder, args.sheet)
        print(args.sheet)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=("grocery", "folders"),
        help="grocery: a clone of GroceryStoreDataset; folders: IDENTITY/… or IDENTITY/CAMERA/… with images",
    )
    parser.add_argument("source", metavar="SOURCE", help="the folder as it was downloaded; nothing in it is changed")
    parser.add_argument("out", metavar="FOLDER", help="the data set's folder, such as reid-data/grocery")
    parser.add_argument(
        "--train",
        metavar="SHARE",
        type=number(0, 1, above=True, below=True),
        default=None,
        help="folders: share of the identities to train on (default: 0.5)",
    )
    parser.add_argument("--seed", type=seed, default=None, help="folders: seed of the draw of identities (default: 0)")


def _convert(args: argparse.Namespace) -> None:
    from ..data.convert import convert_folders, convert_grocery
    from ..errors import UserError

    if args.kind == "grocery":
        if args.train is not None or args.seed is not None:
            raise UserError("command line: --train and --seed belong to 'folders'; the halves of grocery are fixed.")
        print(convert_grocery(args.source, args.out))
    else:
        fraction, draw = 0.5 if args.train is None else args.train, args.seed or 0
        print(convert_folders(args.source, args.out, fraction=fraction, seed=draw))


MAKE = Command(
    "data make-embedded",
    description="Write an embedded data set and its contact sheet.",
    examples=[
        "relreid data make-embedded --root reid-data",
        "relreid data make-embedded --name embedded_vehicles --sheet vehicles.png",
    ],
    arguments=_make_arguments,
    work=_make,
)
CONVERT = Command(
    "data convert",
    description="Make the layout of Market-1501 (bounding_box_train, query, bounding_box_test) from other folders.",
    examples=[
        "relreid data convert grocery GroceryStoreDataset reid-data/grocery",
        "relreid data convert folders photos reid-data/products --train 0.5",
    ],
    epilog=(
        "No identity is both trained on and tested with. The first image of every test identity and camera is a query. "
        "Market-1501, DukeMTMC-reID, CUHK03, VIPeR and torchreid's other data sets need no conversion."
    ),
    arguments=_convert_arguments,
    work=_convert,
)
make_main = MAKE.main
