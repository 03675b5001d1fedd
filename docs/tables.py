"""Result tables: out of the committed JSON in ``docs/results`` into the pages and the README.

python docs/tables.py                      write every table between its markers
python docs/tables.py --check              exit code 1, and the names, where a page is not up to date
python docs/tables.py take NAME FILE       read what a command wrote into docs/results/NAME.json
                                           (--table 2: the second table of a Markdown file; other files: as they are)

A marker names its table: ``<!-- table: graft_fusion -->``, then what is written, then ``<!-- end of table -->``. Every JSON
file says by ``command`` what prints the table, and by ``json`` where that command leaves the numbers in full.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"
MARKER = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", flags=re.S)
NUMBER = re.compile(r"^(-?\d+(?:\.(\d+))?)(?: ± (\d+\.\d+))?$")


def pages() -> list[Path]:
    """Return the files that may hold markers."""
    written = [path for path in sorted(DOCS.rglob("*.md")) if "api" not in path.parts]
    return [ROOT / "README.md", *written]


def load(name: str) -> dict[str, Any]:
    """Return a committed result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def render(result: dict[str, Any]) -> str:
    """Return a result as Markdown: a table, or printed lines as a block."""
    if "lines" in result:
        return "\n".join(["```text", *result["lines"], "```"])
    columns = result["columns"]
    lines = ["| " + " | ".join(column["name"] for column in columns) + " |"]
    lines.append("|" + "|".join("---" if column.get("align") == "left" else "---:" for column in columns) + "|")
    for row in result["rows"]:
        lines.append("| " + " | ".join(_cell(value, column) for value, column in zip(row, columns, strict=True)) + " |")
    return "\n".join(lines)


def _cell(value: Any, column: dict[str, Any]) -> str:
    if isinstance(value, str):
        return value
    digits = column["digits"]
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"
    return f"{value:.{digits}f}"


def filled(text: str) -> str:
    """Return a page with its tables as the JSON has them."""
    return MARKER.sub(lambda found: f"{found[1]}\n{render(load(found[2]))}\n\n{found[4]}", text)


def stale() -> list[Path]:
    """Return the pages whose tables are not those of the JSON."""
    return [path for path in pages() if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]


def used() -> list[str]:
    """Return the names that markers ask for."""
    return [found[2] for path in pages() for found in MARKER.finditer(path.read_text(encoding="utf-8"))]


def read_table(text: str, number: int = 1) -> dict[str, Any]:
    """Return columns and rows of a Markdown table, numbers as numbers.

    Args:
        text: Markdown.
        number: Which of its tables, from 1.

    Raises:
        ValueError: There are fewer tables, or the digits of a column differ from row to row.
    """
    blocks = re.findall(r"(?:^\|.*\|[ ]*\n?)+", text, flags=re.M)
    if number > len(blocks):
        raise ValueError(f"there are {len(blocks)} tables, not {number}")
    header, rule, *rows = (
        [cell.strip() for cell in line.strip()[1:-1].split("|")] for line in blocks[number - 1].splitlines()
    )
    columns: list[dict[str, Any]] = []
    table: list[list[Any]] = [[] for _ in rows]
    for position, name in enumerate(header):
        cells = [row[position] for row in rows]
        column: dict[str, Any] = {"name": name}
        if not rule[position].endswith(":"):
            column["align"] = "left"
        found = [NUMBER.match(cell) for cell in cells]
        digits = {len(match[2] or "") for match in found if match}
        if len(digits) == 1 and all(match or cell in ("", "-") for match, cell in zip(found, cells)):
            column["digits"] = digits.pop()
            values: list[Any] = [_value(match) if match else cell for match, cell in zip(found, cells)]
        else:
            values = list(cells)
        columns.append(column)
        for row, value in zip(table, values):
            row.append(value)
    return {"columns": columns, "rows": table}


def _value(match: re.Match[str]) -> Any:
    if match[3]:
        return {"mean": float(match[1]), "std": float(match[3])}
    return float(match[1]) if match[2] else int(match[1])


def take(name: str, path: Path, number: int = 1) -> Path:
    """Read a command's table into the committed JSON; ``command``, ``json`` and ``about`` stay as they are."""
    target = RESULTS / f"{name}.json"
    kept = load(name) if target.is_file() else {"command": "", "json": ""}
    head = {key: value for key, value in kept.items() if key not in ("lines", "columns", "rows")}
    text = path.read_text(encoding="utf-8")
    body = read_table(text, number) if path.suffix == ".md" else {"lines": text.rstrip().splitlines()}
    target.write_text(dump({**head, **body}), encoding="utf-8")
    return target


def dump(result: dict[str, Any]) -> str:
    """Return a result as JSON with one row per line."""
    parts = [f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in result.items() if key not in LISTS]
    for key in LISTS:
        if key in result:
            rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in result[key])
            parts.append(f'"{key}": [\n  {rows}\n ]')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


LISTS = ("columns", "rows", "lines")


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which pages are not up to date")
    parser.add_argument("--table", metavar="N", type=int, default=1, help="take: which table of the file (default: 1)")
    parser.add_argument("take", nargs="*", metavar="take NAME FILE", help="read a command's table into docs/results")
    args = parser.parse_args(argv)
    if args.take:
        if len(args.take) != 3 or args.take[0] != "take":
            parser.error("say: take NAME FILE")
        print(take(args.take[1], Path(args.take[2]), args.table))
    late = stale()
    for path in late:
        print(f"{path.relative_to(ROOT)}: {'not up to date; python docs/tables.py' if args.check else 'written'}")
        if not args.check:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if args.check and late else 0


if __name__ == "__main__":
    sys.exit(main())
