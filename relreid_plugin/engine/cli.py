"""The training command: ``relreid-train``, also ``tools/train_net.py``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ..config import _flat, get_default_config, merge_from_file, merge_from_list, validate
from ..errors import UserError, explain, shown
from ..merging import repeated_keys


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see --help.")


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = _Parser(
        prog="train_net.py",
        description="Train and test re-identification models: torchreid's own configurations and the plug-in's.",
        epilog=(
            "KEY VALUE pairs at the end override configuration keys, as in: train.max_epoch 10 model.pretrained False. "
            "Results depend on the seed, and on the number of loader processes (data.workers) and threads (OMP_NUM_THREADS)."
        ),
    )
    parser.add_argument("--config-file", metavar="F", default="", help="YAML configuration")
    parser.add_argument("--root", metavar="D", default="", help="folder that holds the data sets (data.root)")
    parser.add_argument("-s", "--sources", metavar="NAME", nargs="+", help="training sets: names, folders or CSV files")
    parser.add_argument("-t", "--targets", metavar="NAME", nargs="+", help="test sets")
    parser.add_argument("--transforms", metavar="NAME", nargs="+", help="training augmentation (data.transforms)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="train only this stage")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in data.save_dir, if there are any"
    )
    parser.add_argument("--eval-only", action="store_true", help="test the checkpoints in data.save_dir; train nothing")
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="configuration overrides")
    return parser


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
    args = parser.parse_args(argv)
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
    if args.stage is not None and args.stage not in cfg.train.stages:
        raise UserError(f"--stage {args.stage}: this configuration has the stages {cfg.train.stages} ('train.stages').")
    if args.eval_only and args.stage == 2:
        raise UserError("--eval-only tests all stages of the configuration; leave out --stage 2.")
    return cfg, args


def _note_repeated(args: argparse.Namespace) -> None:
    """Say which of several values counts, when the command line gives a key more than one."""
    overrides = dict(zip(args.opts[::2], args.opts[1::2]))
    by_option = [name for name in ("root", "sources", "targets", "transforms") if getattr(args, name)]
    twice = {f"data.{name}": overrides[f"data.{name}"] for name in by_option if f"data.{name}" in overrides}
    for key, value in {**repeated_keys(args.opts), **twice}.items():
        print(f"note: '{key}' is given more than once; the last one counts: {shown(value)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def run_command(function: Any, *, go_on: str = "the same command") -> int:
    """Call ``function``; a user's mistake, or a limit of the machine, becomes one line on standard error and exit code 2.

    Any other error is a defect of the program: one line too, exit code 1. ``RELREID_TRACEBACK=1`` shows where it comes from;
    a run's log holds that in any case.

    Args:
        function: The work.
        go_on: With what an interrupted command goes on.
    """
    try:
        function()
    except UserError as error:
        from ..host import clean_worker_error

        print(f"error: {_one_line(UserError(clean_worker_error(error)))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; go on with {go_on}", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = explain(error)
        if os.environ.get("RELREID_TRACEBACK", "") not in ("", "0"):
            traceback.print_exc()
        if sentence is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return 2
        said = f"{type(error).__name__}: {_one_line(error)[:300]}".removesuffix(": ")
        print(
            f"error: internal error ({said}); please report it with the traceback, which the same command with "
            "RELREID_TRACEBACK=1 shows.",
            file=sys.stderr,
        )
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def work() -> None:
        cfg, args = parse(argv)
        from .. import register

        register()
        from .multimodal import build_run

        eval_only = args.eval_only or cfg.test.evaluate
        stages = [] if eval_only else ([args.stage] if args.stage else None)
        build_run(cfg, stages=stages, resume=args.resume).execute()

    return run_command(work, go_on="--resume")


if __name__ == "__main__":
    sys.exit(main())
