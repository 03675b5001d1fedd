"""Write an embedded data set, persons or multispectral vehicles, and, on request, its contact sheet.

python tools/make_embedded.py --root reid-data --sheet docs/embedded_persons.png
python tools/make_embedded.py --name embedded_vehicles --sheet docs/embedded_vehicles.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relreid_plugin.cli.train import run_command
from relreid_plugin.data.embedded import (
    SPECS,
    VEHICLE_SPECS,
    contact_sheet,
    ensure_embedded,
    ensure_embedded_vehicles,
    vehicles_sheet,
)
from relreid_plugin.errors import UserError, did_you_mean
from relreid_plugin.options import OptionParser, seed


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = OptionParser(description="Write an embedded data set and its contact sheet.")
    parser.add_argument("--root", default="reid-data", help="folder that holds the data sets (default: reid-data)")
    parser.add_argument("--name", default="embedded_persons", help=f"one of {', '.join([*SPECS, *VEHICLE_SPECS])}")
    parser.add_argument("--seed", type=seed, default=0, help="world seed (default: 0)")
    parser.add_argument("--sheet", metavar="PNG", help="also write a contact sheet")
    args = parser.parse_args(argv)

    def work() -> None:
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

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
