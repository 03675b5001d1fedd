"""``relreid``: one command with everything in it. The modules of a subcommand are imported when it is called.

``relreid --help`` and a mistyped command import none of them, and no command's ``--help`` imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse

    from .command import Command

SHELLS = ("bash", "zsh", "tcsh")


class Entry(NamedTuple):
    """Where a command is.

    Attributes:
        module: Module of :mod:`relreid_plugin.cli`.
        attribute: The :class:`~relreid_plugin.cli.command.Command` in it.
        summary: One line for the list of commands.
    """

    module: str
    attribute: str
    summary: str

    def load(self) -> Command:
        """Import the command."""
        found: Command = getattr(import_module(f"{__package__}.{self.module}"), self.attribute)
        return found


GROUPS: dict[str, dict[str, Entry]] = {
    "models": {
        "train": Entry("train", "TRAIN", "train and test a configuration, and print its table"),
        "test": Entry("train", "TEST", "test the checkpoints of a run"),
        "splits": Entry("splits", "SPLITS", "a configuration on every split of its data set"),
        "prune": Entry("prune", "PRUNE", "prune a trained GraFT step by step"),
    },
    "galleries": {
        "extract": Entry("extract", "EXTRACT", "features of images into a store or file"),
        "search": Entry("search", "SEARCH", "rank a store for query images"),
        "evaluate": Entry("evaluate", "EVALUATE", "the table of features of any model"),
        "serve": Entry("serve", "SERVE", "a store as a search page and a JSON API"),
        "refine": Entry("search", "REFINE", "refine a store by the run's relation encoder"),
        "copy": Entry("stores", "COPY", "a store on disk into Milvus"),
        "delete": Entry("stores", "DELETE", "take images out of a store"),
        "compare": Entry("compare", "COMPARE", "whether pictures show the same one"),
        "calibrate": Entry("compare", "CALIBRATE", "threshold and probability of 'same or not'"),
    },
    "out": {
        "export": Entry("export", "EXPORT", "a model as ONNX, OpenVINO or TorchScript, proven to be the same"),
        "package": Entry("package", "PACKAGE", "a model as safetensors with its card, in the hub's layout"),
    },
    "tables and pictures": {
        "report": Entry("report", "REPORT", "runs or features as one HTML page that opens offline"),
        "compare-runs": Entry("report", "COMPARE_RUNS", "runs side by side, over seeds and by query"),
        "ladder": Entry("ladder", "LADDER", "MagFormer's ablation ladder from one stage 1"),
        "tables relations": Entry("tables", "RELATIONS", "what relations gain and lose, set by set"),
        "tables rib": Entry("tables", "RIB", "RIB's table: attention, bound, occlusion"),
        "tables graft": Entry("tables", "GRAFT", "GraFT's ablations"),
        "sweep": Entry("tables", "SWEEP", "weights of the information bottleneck bound"),
        "tune": Entry("tune", "TUNE", "search configuration keys on held-out training identities"),
        "figures": Entry("figures", "FIGURES", "feature space, attention and loss of tested runs"),
        "diagnose": Entry("diagnose", "DIAGNOSE", "neighbours, attention and oracles on any features"),
        "gradcam": Entry("looks", "GRADCAM", "Grad-CAM of trained runs on covered queries"),
        "occlusion": Entry("looks", "OCCLUSION", "scores while more and more of every query is covered"),
        "information": Entry("looks", "INFORMATION", "the information bottleneck bound over the training"),
    },
    "data": {
        "data make-embedded": Entry("data", "MAKE", "write an embedded data set and its contact sheet"),
        "data show": Entry("data", "SHOW", "a data set in numbers, with duplicates and suspicious labels, and as a picture"),
        "data convert": Entry("data", "CONVERT", "make the Market-1501 layout from other folders"),
        "stats": Entry("stats", "STATS", "mean and standard deviation of every modality"),
    },
    "help": {
        "configs": Entry("configs", "CONFIGS", "list the packaged configurations"),
        "config": Entry("configs", "CONFIG", "a configuration: its keys, comments, defaults and values"),
        "doctor": Entry("doctor", "DOCTOR", "what is installed, what is found, what to do"),
    },
}
COMMANDS: dict[str, Entry] = {name: entry for group in GROUPS.values() for name, entry in group.items()}
_FAMILIES = {name.split()[0] for name in COMMANDS if " " in name}

_HEAD = """usage: relreid COMMAND [options]
       relreid COMMAND --help

Relation models, informative attention and multimodal fusion for torchreid.
"""
_TAIL = """options:
  --help                    show this list, or a command's options and examples
  --version                 show the version
  --print-completion SHELL  print the completion of bash, zsh or tcsh

examples:
  relreid train --config-file magformer_embedded.yml
  relreid config magformer_embedded --explain
  relreid doctor
  relreid --print-completion bash > ~/.local/share/bash-completion/completions/relreid"""


def help_text(family: str = "") -> str:
    """Return the list of commands, or of those that begin with ``family``."""
    width = max(map(len, COMMANDS)) + 2
    parts = [_HEAD if not family else f"usage: relreid {family} COMMAND [options]\n"]
    for title, group in GROUPS.items():
        members = {name: entry for name, entry in group.items() if not family or name.split()[0] == family}
        if members:
            parts.append(f"{title}:\n" + "".join(f"  {name:<{width}}{entry.summary}\n" for name, entry in members.items()))
    return "\n".join([*parts, _TAIL] if not family else parts).rstrip()


def find(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of a command and the words that are left for it; the name is empty where there is none."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in COMMANDS:
            return name, list(words[count:])
    return "", list(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        from .running import open_streams

        open_streams()
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the list has gone
        from .running import drop_output

        drop_output()
        return 141
    return code


def _dispatch(words: list[str]) -> int:
    first = words[0] if words else ""
    if first in ("", "-h", "--help", "help") and len(words) <= 1:
        print(help_text())
        return 0 if first else 2
    if first == "help":
        return _dispatch([*words[1:], "--help"])
    if first == "--version":
        from .. import __version__

        print(f"relreid {__version__}")
        return 0
    if first.split("=")[0] == "--print-completion":
        return _print_completion(first.partition("=")[2] or "".join(words[1:2]))
    name, rest = find(words)
    if name:
        return COMMANDS[name].load().main(rest, prog=f"relreid {name}")
    if first in _FAMILIES and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(help_text(first))
        return 0 if len(words) > 1 else 2
    return _refuse(words)


def _refuse(words: Sequence[str]) -> int:
    from ..errors import did_you_mean, shown

    wrong = " ".join(words[:2]) if words[0] in _FAMILIES else words[0]
    if wrong.startswith("-"):
        sentence = (
            f"unknown option {shown(wrong)}; the command goes first: 'relreid train --config-file F'; see relreid --help."
        )
    else:
        sentence = f"there is no command {shown(wrong)}{did_you_mean(wrong, COMMANDS)}"
    print(f"error: command line: {sentence}", file=sys.stderr)
    return 2


def full_parser() -> argparse.ArgumentParser:
    """Return one parser with the options of all commands, for the completion of shells."""
    import argparse

    top = argparse.ArgumentParser(prog="relreid")
    top.add_argument("--version", action="store_true", help="show the version")
    top.add_argument("--print-completion", choices=SHELLS, help="print the completion of a shell")
    below = top.add_subparsers()
    families: dict[str, argparse._SubParsersAction] = {}
    for name, entry in COMMANDS.items():
        family, _, own = name.rpartition(" ")
        place = below
        if family:
            if family not in families:
                families[family] = below.add_parser(family, help=f"{family} …").add_subparsers()
            place = families[family]
        entry.load().arguments(place.add_parser(own, help=entry.summary))
    return top


def _print_completion(shell: str) -> int:
    from .completion import completion
    from .running import run_command

    return run_command(lambda: print(completion(shell)))


def _alias(old: str, name: str) -> int:
    print(f"note: {old} is now 'relreid {name}'; the old name will be taken away.", file=sys.stderr)
    return COMMANDS[name].load().main(None, prog=old)


def train_alias() -> int:
    """``relreid-train``, the old name of ``relreid train``."""
    return _alias("relreid-train", "train")


def ladder_alias() -> int:
    """``relreid-ladder``, the old name of ``relreid ladder``."""
    return _alias("relreid-ladder", "ladder")


if __name__ == "__main__":
    sys.exit(main())
