"""``relreid tables`` and ``relreid sweep``: the ablations of the papers, over several seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import parse_numbers
from .command import GO_ON, Command, add_jobs

RIB_CONFIGS = ["rib_dcs_vit_embedded.yml", "rib_ca_se_embedded.yml"]
GRAFT_TABLES = "fusion, modalities, schemes, tokens, triplets"


def _rib_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file", metavar="F", nargs="+", default=RIB_CONFIGS, help=f"default: {' '.join(RIB_CONFIGS)}"
    )
    parser.add_argument("--seeds", metavar="1,2", default="1,2,3", help="seeds (default: 1,2,3)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/rib", help="folder of runs, tables and pictures")
    add_jobs(parser)


def _rib(args: argparse.Namespace) -> None:
    from .. import register
    from ..rib.tables import rib_report

    register()
    seeds = parse_numbers("--seeds", args.seeds, int)
    print(rib_report(args.config_file, seeds, out=Path(args.out), jobs=args.jobs, overrides=args.opts))


def _graft_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", metavar="TABLE", nargs="+", help=GRAFT_TABLES)
    parser.add_argument("--config-file", metavar="F", default="graft_embedded.yml", help="configuration")
    parser.add_argument("--seeds", metavar="1,2", default="1,2,3", help="seeds (default: 1,2,3)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/graft", help="folder of runs and tables")
    add_jobs(parser)


def _graft(args: argparse.Namespace) -> None:
    from .. import register
    from ..graft.tables import graft_report

    register()
    seeds = parse_numbers("--seeds", args.seeds, int)
    print(graft_report(args.config_file, args.tables, seeds, out=Path(args.out), jobs=args.jobs, overrides=args.opts))


def _eta_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="F", default="rib_dcs_vit_embedded.yml", help="configuration")
    parser.add_argument("--etas", metavar="A,B", default="0,0.1,0.25,0.5,1,1.5,2", help="weights (0: the bound is measured)")
    parser.add_argument("--seeds", metavar="1,2", default="1", help="seeds (default: 1)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/eta", help="folder of runs, table and picture")
    add_jobs(parser)


def _eta(args: argparse.Namespace) -> None:
    from .. import register
    from ..config.ranges import HUGE, Number
    from ..rib.tables import eta_report

    register()
    etas = parse_numbers("--etas", args.etas, float, Number(0, HUGE))
    seeds = parse_numbers("--seeds", args.seeds, int)
    print(eta_report(args.config_file, etas, seeds, out=Path(args.out), jobs=args.jobs, overrides=args.opts))


RIB = Command(
    "tables rib",
    description="Train and test baseline, + attention, + attention + IBB and controls over several seeds; cover queries.",
    examples=[
        "relreid tables rib --out runs/rib --jobs 2",
        "relreid tables rib --config-file rib_dcs_transreid_embedded.yml --seeds 1",
    ],
    epilog=GO_ON,
    arguments=_rib_arguments,
    work=_rib,
)
GRAFT = Command(
    "tables graft",
    description="Train and test the rows of GraFT's ablations over several seeds.",
    examples=[
        "relreid tables graft fusion modalities --jobs 2",
        "relreid tables graft tokens --seeds 1",
        "relreid tables graft triplets --config-file graft_triplets_embedded.yml",
    ],
    epilog=GO_ON,
    arguments=_graft_arguments,
    work=_graft,
)
SWEEP = Command(
    "sweep",
    description="Train and test one configuration under several weights of the information bottleneck bound.",
    examples=[
        "relreid sweep --config-file rib_dcs_vit_embedded.yml --out runs/eta --jobs 2",
    ],
    epilog=GO_ON,
    arguments=_eta_arguments,
    work=_eta,
)
rib_main, graft_main, sweep_main = RIB.main, GRAFT.main, SWEEP.main
