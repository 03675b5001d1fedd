"""``relreid tune``: a search over configuration keys on held-out training identities."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from ..options import integer, seed
from .command import Command, add_overrides

METRICS = ("mAP", "R1")
"""Those of :mod:`relreid_plugin.experiments.tuning`, written here so that ``--help`` needs no torch."""
SAMPLERS = ("tpe", "random", "grid")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="F", required=True, help="configuration")
    parser.add_argument(
        "--search",
        metavar="KEY=VALUES",
        action="append",
        default=[],
        help="a key and what it may be: a,b,c | LOW..HIGH | LOW..HIGH:STEP | log:LOW..HIGH; once per key",
    )
    parser.add_argument("--space", metavar="FILE", help="YAML file of such keys, written with dots, to values")
    parser.add_argument(
        "--trials",
        metavar="N",
        type=integer(1, 100_000),
        help="trials (default: all combinations of listed values, else 20)",
    )
    parser.add_argument(
        "--folds",
        metavar="K",
        type=integer(1, 100),
        default=1,
        help="K shares of the training identities are held out in turn (default: 1, one of train.val_fraction)",
    )
    parser.add_argument("--metric", choices=METRICS, default="mAP", help="of the held-out identities (default: mAP)")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help="how values are drawn (default: grid where all are listed, else tpe)"
    )
    parser.add_argument("--no-prune", action="store_true", help="finish trials that stay below the median, too")
    parser.add_argument("--seed", metavar="N", type=seed, default=1, help="of the drawing (default: 1)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/tune", help="folder of study, table, picture and best.yml")
    add_overrides(parser, "overrides for all trials")


def _work(args: argparse.Namespace) -> None:
    from ..config.defaults import load_config

    cfg = load_config(args.config_file, args.opts)
    from ..experiments.space import read_space

    space = read_space(cfg, args.search, args.space)
    from .. import register
    from ..experiments.trials import best_trial
    from ..experiments.tuned import trials_table, write_results
    from ..experiments.tuning import Plan, search

    register()
    plan = Plan(
        args.config_file,
        args.opts,
        space,
        Path(args.out),
        trials=args.trials,
        folds=args.folds,
        metric=args.metric,
        sampler=args.sampler,
        prune=not args.no_prune,
        seed=args.seed,
    )
    if plan.out.exists() and not plan.out.is_dir():
        raise UserError(f"--out '{plan.out}' is a file; name a folder.")
    found = search(plan, write_results)
    trials = found.ended()
    best = best_trial(trials)
    assert best is not None
    print(f"\n{trials_table(plan, trials)}\n\nbest: trial {best.number}; picture: {plan.out / 'tune.png'}; train it by")
    print(f"relreid train --config-file {plan.out / 'best.yml'}")


TUNE = Command(
    "tune",
    description="Search configuration keys by their scores on held-out training identities; no test set is looked at.",
    examples=[
        "relreid tune --config-file rib_dcs_vit_embedded.yml --search rib.ibb.eta=0.1,0.25,0.5,1,1.5,2 --folds 4",
        "relreid tune --config-file osnet_embedded.yml --search train.lr=log:1e-5..1e-2 "
        "--search train.batch_size=16..64:16 --trials 30",
    ],
    epilog="Needs the extra 'tune' (Optuna). A command that was stopped goes on where it was; one that had ended, "
    "with more --trials.",
    arguments=_arguments,
    work=_work,
)
main = TUNE.main
