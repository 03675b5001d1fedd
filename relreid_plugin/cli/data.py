"""``relreid data``: data sets that are rendered, looked at, and brought into the layout that is read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import integer, number, seed
from .command import Command

RULES = ("image", "identity", "camera", "time")
"""Those of :data:`relreid_plugin.data.rules.RULES`, written here so that ``--help`` needs no numpy."""

if TYPE_CHECKING:
    from ..data.overview import Entry


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


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="FOLDER|CSV|NAME", help="a folder or CSV file in D or by its path, or a known name")
    parser.add_argument(
        "--root", metavar="D", default="reid-data", help="folder that holds the data sets (default: reid-data)"
    )
    parser.add_argument("--out", metavar="PNG", default="data.png", help="the contact sheet (default: data.png)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers and names there")
    parser.add_argument("--identities", metavar="N", type=integer(1, 200), default=12, help="rows (default: 12)")
    parser.add_argument(
        "--near", metavar="BITS", type=integer(0, 128), default=16, help="of 256, for near duplicates (default: 16)"
    )
    parser.add_argument("--name-pattern", metavar="PATTERN", default="", help="as data.name_pattern")
    parser.add_argument("--split-rule", choices=RULES, default="", help="as data.split_rule, for what has no splits")
    parser.add_argument(
        "--pixel-range", metavar=("LOW", "HIGH"), nargs=2, type=number(-1e12, 1e12), default=[], help="as data.pixel_range"
    )


def _is_registered(name: str) -> bool:
    """Whether a data set of torchreid's or the plug-in's has this name; none has where torchreid is not installed."""
    from ..errors import UserError

    try:
        from ..host.datasets import register_datasets
        from ..host.registry import available_image_datasets
    except UserError:
        return False
    register_datasets()
    return name in available_image_datasets()


def _entries(name: str, root: str, pattern: str, rule: str) -> list[Entry]:
    """The images of a data set: of a folder or CSV file without the host, of a known name through it."""
    from ..data.labels import plain
    from ..data.names import name_pattern
    from ..data.overview import Entry, entries_of
    from ..data.unsplit import is_local, read_local
    from ..errors import UserError

    places = (Path(root).expanduser() / name, Path(name).expanduser())
    place = next((place for place in places if is_local(place)), None)
    if place is None and not _is_registered(name):
        place = next((place for place in places if is_local(place, RULES[0])), None)
        if place is not None and not rule:
            raise UserError(f"'{place}' has no splits; name the rule that divides it by --split-rule ({', '.join(RULES)}).")
    if place is not None:
        splits = read_local(place.absolute(), name_pattern(pattern), rule)
        if not splits.rule:
            return entries_of(splits)
        print("".join(f"note: {note}\n" for note in splits.notes), end="")
        return list({entry.path: entry for entry in entries_of(splits)}.values())  # a rule may put one into two parts
    from ..host.datasets import register_datasets, resolve_dataset
    from ..host.opening import open_dataset

    register_datasets()
    resolve_dataset(name, root, name_pattern=pattern)
    dataset = open_dataset(name, root=root, cache_dir=root)
    if dataset.train and not isinstance(dataset.train[0][0], str):
        raise UserError(f"data set '{name}' has several pictures per sample; name one of single pictures.")
    found = []
    for split in ("train", "query", "gallery"):
        for path, label, camera, *_ in getattr(dataset, split):
            identity = plain(dataset.train_identities[label]) if split == "train" else str(label)
            found.append(Entry(path, identity, dataset.camera_names.get(camera, str(camera)), split))
    return found


def _show(args: argparse.Namespace) -> None:
    from ..data.overview import draw, look
    from ..data.ranges import check_range
    from ..errors import needed
    from ..files import write_json

    needed("imagehash", "near duplicates")
    pixel_range = check_range("--pixel-range", args.pixel_range)
    found = look(_entries(args.name, args.root, args.name_pattern, args.split_rule), near=args.near, pixel_range=pixel_range)
    draw(found, Path(args.out), identities=args.identities, pixel_range=pixel_range)
    if args.json:
        write_json(Path(args.json), found.numbers())
    print(f"{found.text()}\n\n{args.out}")


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
SHOW = Command(
    "data show",
    description="Show a data set: numbers, duplicates, labels that look wrong, and a contact sheet.",
    examples=[
        "relreid data show embedded_persons --root reid-data",
        "relreid data show data/products.csv --out products.png --json products.json",
    ],
    epilog=(
        "Suspicious are copies and near duplicates under two identities, identities with one image, cameras with one "
        "identity, and queries without a match. Needs the extra 'figures'."
    ),
    arguments=_show_arguments,
    work=_show,
)
make_main = MAKE.main
