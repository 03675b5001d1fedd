"""Writes the pages that are made from the sources; nothing of them is committed."""

from __future__ import annotations

from pathlib import Path

import api
import commands
import keys
import tables

from relreid_plugin.config.packaged import packaged_configs

ROOT = Path(__file__).resolve().parent.parent
METHOD = ROOT / "tests" / "fourth_method"

CONFIGS = """\
# Configurations

They come with the package. `--config-file` takes a name or a path; `relreid configs` prints this list, and
`relreid config NAME --explain` every key of one. Those of embedded data need no download.

"""

RESULTS = """\
# Results and their commands

Every table of results is a file in `docs/results`, with the command that prints it and the file in which that command leaves
the numbers in full. `python docs/tables.py take NAME FILE` reads a new one; `python docs/tables.py` writes all of them into
the pages.

"""


def configs_page() -> str:
    """Return the packaged configurations with the first comment of each."""
    lines = ["| configuration | what |", "|---|---|"]
    for config in packaged_configs():
        about = []
        for line in config.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            about.append(line.lstrip("# "))
        lines.append(f"| `{config.path.name}` | {keys.prose(' '.join(about))} |")
    return CONFIGS + "\n".join(lines) + "\n"


def results_page() -> str:
    """Return the committed results with their commands."""
    lines = ["| file | command | numbers in full |", "|---|---|---|"]
    for path in sorted(tables.RESULTS.glob("*.json")):
        result = tables.load(path.stem)
        command = f"`{result['command']}`" if result["command"] else result["about"]
        full = f"`{result['json']}`" if result["json"] else "-"
        lines.append(f"| `{path.name}` | {command} | {full} |")
    return RESULTS + "\n".join(lines) + "\n"


def method_page() -> str:
    """Return the files of the method that the tests bring from outside, to be included."""
    parts = ["## A whole one\n", "The tests train, resume and test this package, `tests/fourth_method`.\n"]
    for path in sorted(METHOD.rglob("*")):
        if path.suffix in (".py", ".toml", ".yml") and not any("egg-info" in part for part in path.parts):
            language = {".py": "python", ".toml": "toml", ".yml": "yaml"}[path.suffix]
            text = path.read_text(encoding="utf-8").rstrip()
            if text:
                parts.append(f"`{path.relative_to(METHOD)}`\n\n````{language}\n{text}\n````\n")
    return "\n".join(parts) if len(parts) > 2 else ""


def pages() -> dict[str, str]:
    """Return path below the documentation's folder -> text."""
    out = {
        "reference/keys.md": keys.page(),
        "reference/commands.md": commands.page(),
        "reference/configs.md": configs_page(),
        "reference/results.md": results_page(),
        "reference/fourth-method.inc": method_page(),
    }
    out.update({f"reference/api/{name}": text for name, text in api.pages().items()})
    return out


def write(folder: Path) -> None:
    """Write the pages below ``folder``; those that have not changed are left alone, others of the API are removed."""
    wanted = pages()
    for path in sorted((folder / "reference" / "api").glob("*.md")):
        if f"reference/api/{path.name}" not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
