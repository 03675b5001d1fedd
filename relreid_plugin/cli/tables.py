"""``relreid tables`` and ``relreid sweep``: the ablations of the papers, over several seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config.ranges import RIVALS
from ..options import parse_numbers
from .command import GO_ON, Command, add_jobs, add_overrides

RIB_CONFIGS = ["rib_dcs_vit_embedded.yml", "rib_ca_se_embedded.yml"]
RELATIONS_CONFIGS = [
    "magformer_embedded.yml",
    "rib_dcs_transreid_magformer_embedded.yml",
    "graft_magformer_embedded.yml",
]
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


def _relations_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sets",
        metavar="CONFIG[=DATA]",
        nargs="*",
        default=RELATIONS_CONFIGS,
        help="a configuration with a relation stage, and a folder, table or name as its source and target "
        f"(default: {' '.join(RELATIONS_CONFIGS)})",
    )
    parser.add_argument("--weights", metavar="F", default="", help="weights of the image model of every CONFIG=DATA")
    parser.add_argument("--rivals", metavar="A,B", default=",".join(RIVALS), help="as of relreid ladder")
    parser.add_argument("--seeds", metavar="1,2", default="1,2,3", help="seeds of the relation stage (default: 1,2,3)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/relations", help="folder of runs and table")
    add_overrides(parser, "overrides for all ladders")


def _relations(args: argparse.Namespace) -> None:
    from .. import register
    from ..magformer.across import across

    register()
    seeds = parse_numbers("--seeds", args.seeds, int)
    rivals = [name for name in args.rivals.split(",") if name]
    out = Path(args.out)
    print("\n" + across(args.sets, seeds=seeds, out=out, weights=args.weights, rivals=rivals, overrides=args.opts))


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
RELATIONS = Command(
    "tables relations",
    description="Run the ladder of the committed recipe on many data sets; say where relations gain and where they lose.",
    examples=[
        "relreid tables relations",
        "relreid tables relations magformer_recipe.yml=cuhk03 magformer_recipe.yml=viper --weights osnet_x0_25_msmt17.pth",
    ],
    epilog=GO_ON,
    arguments=_relations_arguments,
    work=_relations,
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
