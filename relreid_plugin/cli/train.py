"""The training command: ``relreid-train``, also ``tools/train_net.py``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ..config.defaults import _flat, get_default_config, merge_from_file, merge_from_list, validate
from ..config.merging import repeated_keys
from ..errors import UserError, explain, shown
from ..files import write_error
from ..processes import ending_signals, received, watch_parent


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
    _check_text(cfg)
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


def _check_text(cfg: Any) -> None:
    """Refuse text that can be neither a path nor be written into the run's folder."""
    for key, value in _flat(cfg).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and ("\0" in text or text != text.encode("utf-8", "ignore").decode("utf-8")):
                raise UserError(f"key '{key}' holds {text!r}, with a NUL character or with bytes that are no UTF-8.")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def run_command(function: Any, *, go_on: str = "the same command") -> int:
    """Call ``function`` and return the exit code.

    A user's mistake, a file that cannot be written and a limit of the machine become one line on standard error and exit
    code 2. SIGINT, SIGTERM and SIGHUP end it alike, with one line and 128 + the signal's number: 130, 143, 129. Any other
    error is a defect of the program: one line too, exit code 1. ``RELREID_TRACEBACK=1`` shows where it comes from; a run's
    log holds that in any case.

    Args:
        function: The work.
        go_on: With what an interrupted command goes on.
    """
    with ending_signals():
        watch_parent()
        try:
            function()
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has gone
            _drop_output()
            return 141
        except KeyboardInterrupt as error:
            signum = getattr(error, "signum", None) or received() or 2
        except Exception as error:
            signum = received() or 0  # libraries turn the interruption into errors of their own
            sentence = "" if signum else _sentence(error)
            if not signum:
                if os.environ.get("RELREID_TRACEBACK", "") not in ("", "0") and not isinstance(error, UserError):
                    traceback.print_exc()
                if not sentence:
                    said = f"{type(error).__name__}: {_one_line(error)[:300]}".removesuffix(": ")
                    _say(
                        f"error: internal error ({said}); please report it with the traceback, which the same command with "
                        "RELREID_TRACEBACK=1 shows."
                    )
                    return 1
                _say(f"error: {sentence}")
                return 2
        else:
            return 0
        _say(f"interrupted; go on with {go_on}")
        return 128 + signum


def _sentence(error: Exception) -> str:
    """One line for a mistake of the user's, a full disk and the like; empty for anything else."""
    if isinstance(error, UserError):
        from ..host import clean_worker_error

        return _one_line(UserError(clean_worker_error(error)))
    sentence = explain(error)
    if sentence:
        return sentence
    found = write_error(error, done="read or written")
    return "" if found is None else _one_line(found)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _drop_output()


def _drop_output() -> None:
    """Keep Python from complaining at its end that standard output cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def work() -> None:
        cfg, args = parse(argv)
        from .. import register

        register()
        from ..engine.runner import Run

        eval_only = args.eval_only or cfg.test.evaluate
        stages = [] if eval_only else ([args.stage] if args.stage else None)
        Run(cfg, stages=stages, resume=args.resume).execute()

    return run_command(work, go_on="--resume")


if __name__ == "__main__":
    sys.exit(main())
