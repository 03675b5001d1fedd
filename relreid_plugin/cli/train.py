"""``relreid train`` and ``relreid test``: a configuration, its run, and the table at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import UserError, shown
from ..options import read_launch
from .command import Command
from .running import run_command

OVERRIDES = "KEY VALUE pairs at the end override configuration keys, as in: train.max_epoch 10 model.pretrained False. "
SAME_NUMBERS = (
    "Results depend on the seed, and on the number of loader processes (data.workers) and threads (OMP_NUM_THREADS)."
)


class TrainParser(argparse.ArgumentParser):
    """A parser whose mistakes are :class:`~relreid_plugin.errors.UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise the sentence."""
        raise UserError(f"command line: {message}; see --help.")


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser of ``relreid train``."""
    return TRAIN.parser()


def _test_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="F", default="", help="YAML configuration: a path or a packaged name")
    parser.add_argument("--root", metavar="D", default="", help="folder that holds the data sets (data.root)")
    parser.add_argument("-s", "--sources", metavar="NAME", nargs="+", help="training sets: names, folders or CSV files")
    parser.add_argument("-t", "--targets", metavar="NAME", nargs="+", help="test sets")
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="configuration overrides")
    parser.set_defaults(transforms=None, stage=None, resume=False, eval_only=True)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``relreid train``: those of ``relreid test`` and what trains."""
    _test_arguments(parser)
    parser.set_defaults(eval_only=False)
    parser.add_argument("--transforms", metavar="NAME", nargs="+", help="training augmentation (data.transforms)")
    parser.add_argument("--stage", metavar="N", type=int, help="train only this stage of 'train.stages'")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in data.save_dir, if there are any"
    )
    parser.add_argument("--eval-only", action="store_true", help="test the checkpoints in data.save_dir; train nothing")


def _split_overrides(values: list[str] | None, keys: set[str]) -> tuple[list[str] | None, list[str]]:
    """``-t NAME KEY VALUE``: argparse takes all words as names; the first word that is a key ends the names."""
    for position, value in enumerate(values or []):
        if value in keys:
            return values[:position], values[position:]  # type: ignore[index]
    return values, []


def _pull_flags(opts: list[str]) -> tuple[list[str], list[str]]:
    """Options written after the first override belong to the parser, not to the overrides."""
    flags = [word for word in opts if word in ("--resume", "--eval-only")]
    return [word for word in opts if word not in flags], flags


def parse(argv: Sequence[str] | None = None) -> tuple[Any, argparse.Namespace]:
    """Return the validated configuration and the parsed options.

    Raises:
        UserError: Anything on the command line or in the file is wrong.
    """
    return parse_known(build_parser(), argv)


def parse_known(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[Any, argparse.Namespace]:
    """:func:`parse` with a parser that may have further options."""
    return configuration(parser.parse_args(argv))


def configuration(args: argparse.Namespace) -> tuple[Any, argparse.Namespace]:
    """Return the validated configuration of parsed options, and the options with what was found in the wrong place.

    Raises:
        UserError: Anything in them or in the file is wrong.
    """
    from ..config.defaults import _flat, get_default_config, merge_from_file, merge_from_list, validate
    from ..config.targets import pair_targets

    cfg = get_default_config()
    keys = set(_flat(cfg))
    opts: list[str] = []
    for name in ("sources", "targets", "transforms"):
        values, rest = _split_overrides(getattr(args, name), keys)
        setattr(args, name, values)
        opts += rest
    more, flags = _pull_flags(args.opts)
    args.resume, args.eval_only = args.resume or "--resume" in flags, args.eval_only or "--eval-only" in flags
    if args.config_file:
        merge_from_file(cfg, args.config_file)
    if args.root:
        cfg.data.root = args.root
    for name in ("sources", "targets", "transforms"):
        if getattr(args, name):
            setattr(cfg.data, name, getattr(args, name))
    args.opts = opts + more
    merge_from_list(cfg, args.opts)
    _note_repeated(args)
    validate(cfg)
    pair_targets(cfg)
    _check_text(cfg)
    if args.stage is not None and args.stage not in cfg.train.stages:
        raise UserError(f"--stage {args.stage}: this configuration has the stages {cfg.train.stages} ('train.stages').")
    if args.stage is not None and (args.eval_only or cfg.test.evaluate):
        only = "--eval-only" if args.eval_only else "'test.evaluate True'"
        raise UserError(f"{only} tests all stages of the configuration and trains none; leave out --stage {args.stage}.")
    return cfg, args


def _note_repeated(args: argparse.Namespace) -> None:
    """Say which of several values counts, when the command line gives a key more than one."""
    from ..config.merging import repeated_keys

    overrides = dict(zip(args.opts[::2], args.opts[1::2]))
    by_option = [name for name in ("root", "sources", "targets", "transforms") if getattr(args, name)]
    twice = {f"data.{name}": overrides[f"data.{name}"] for name in by_option if f"data.{name}" in overrides}
    for key, value in {**repeated_keys(args.opts), **twice}.items():
        print(f"note: '{key}' is given more than once; the last one counts: {shown(value)}")


def _check_text(cfg: Any) -> None:
    """Refuse text that can be neither a path nor be written into the run's folder."""
    from ..config.defaults import _flat

    for key, value in _flat(cfg).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and ("\0" in text or text != text.encode("utf-8", "ignore").decode("utf-8")):
                raise UserError(f"key '{key}' holds {text!r}, with a NUL character or with bytes that are no UTF-8.")


def _execute(args: argparse.Namespace) -> None:
    cfg, args = configuration(args)
    launch = read_launch()
    from .. import register

    register()
    from ..engine.distributed import joined
    from ..engine.runner import Run

    eval_only = args.eval_only or cfg.test.evaluate
    stages = [] if eval_only else ([args.stage] if args.stage else None)
    with joined(launch, use_gpu=cfg.use_gpu):
        Run(cfg, stages=stages, resume=args.resume).execute()


TRAIN = Command(
    "train",
    description="Train and test re-identification models: torchreid's own configurations and the plug-in's.",
    examples=[
        "relreid train --config-file magformer_embedded.yml",
        "relreid train --config-file magformer_embedded.yml --root /data -s shop -t shop data.save_dir runs/shop",
        "relreid train --config-file magformer.yml --resume train.max_epoch 200",
        "torchrun --nproc-per-node 4 -m relreid_plugin train --config-file magformer.yml",
    ],
    epilog=OVERRIDES + SAME_NUMBERS,
    arguments=train_arguments,
    work=_execute,
    parser_class=TrainParser,
    go_on="--resume",
)
TEST = Command(
    "test",
    description="Test the checkpoints of a run (data.save_dir) and print its table; the same as relreid train --eval-only.",
    examples=[
        "relreid test --config-file magformer_embedded.yml",
        "relreid test --config-file runs/magformer_embedded/config.yml test.rerank True",
    ],
    epilog=OVERRIDES,
    arguments=_test_arguments,
    work=_execute,
    parser_class=TrainParser,
    go_on="the same command",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``relreid train``; returns the exit code."""
    return TRAIN.main(argv)


__all__ = ["TEST", "TRAIN", "build_parser", "configuration", "main", "parse", "parse_known", "run_command"]

if __name__ == "__main__":
    sys.exit(main())
