"""``relreid configs`` and ``relreid config``: what is packaged, and what a configuration says."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any

from .command import Command


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def _list(_args: argparse.Namespace) -> None:
    from ..config.packaged import packaged_configs

    configs = packaged_configs()
    width = max((len(each.name) for each in configs), default=0) + 6
    for each in configs:
        print(f"{each.name + '.yml':<{width}}{each.summary}")


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="F", help="packaged name or path of a configuration, or 'defaults'")
    parser.add_argument("--explain", action="store_true", help="every key with its comment, default and value")
    parser.add_argument("--path", action="store_true", help="print where the file is, and nothing else")
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="configuration overrides")


def _config(args: argparse.Namespace) -> None:
    from ..config.defaults import get_default_config, load_config, merge_from_list, validate
    from ..config.packaged import find_config

    options = {"--explain": "explain", "--path": "path"}
    for word in [word for word in args.opts if word in options]:  # written after the first override
        args.opts.remove(word)
        setattr(args, options[word], True)
    if args.path:
        load_config(args.name)
        print(find_config(args.name))
        return
    if args.name == "defaults":
        cfg = get_default_config()
        merge_from_list(cfg, args.opts)
        validate(cfg)
    else:
        cfg = load_config(args.name, args.opts)
    print(explained(cfg) if args.explain else cfg.dump().rstrip())


def explained(cfg: Any, width: int = 0) -> str:
    """Return every key of a configuration with its comment, default and value; changed ones are marked by ``*``.

    Args:
        cfg: The configuration.
        width: Columns; 0: those of the terminal.
    """
    from ..config.explain import explain_keys

    width = width or max(60, shutil.get_terminal_size().columns)
    lines = ["* marks keys whose value is not the default", ""]
    section = ""
    for key in explain_keys(cfg):
        if key.section and key.section != section:
            section = key.section
            lines += ["", f"--- {section}", ""]
        value = f"{key.value!r} (default: {key.default!r})" if key.changed else repr(key.value)
        lines.append(f"{'*' if key.changed else ' '} {key.name}: {value}")
        lines += textwrap.wrap(key.comment, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


CONFIGS = Command(
    "configs",
    description="List the packaged configurations, one line each.",
    examples=["relreid configs", "relreid train --config-file magformer_embedded.yml"],
    arguments=_no_arguments,
    work=_list,
)
CONFIG = Command(
    "config",
    description="Print a configuration with all its keys, as YAML, or explain them.",
    examples=[
        "relreid config magformer_embedded --explain",
        "relreid config defaults --explain",
        "relreid config magformer.yml train.max_epoch 10 > own.yml",
    ],
    arguments=_config_arguments,
    work=_config,
)
