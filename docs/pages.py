"""What the pages hold: blocks of code with their marks, and the words in them that name something."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MADE = {"api", "keys.md", "commands.md", "configs.md", "results.md"}
FENCE = re.compile(r"((?:^<!-- not run: [^\n]*-->\n)?)^```(\w*|\{[\w-]+\}[^\n]*)\n(.*?)^```$", flags=re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path below the repository.
        language: What the fence names, such as ``bash``.
        text: What is inside.
        reason: Why it is not run; empty where it is.
    """

    page: str
    language: str
    text: str
    reason: str

    def commands(self) -> list[list[str]]:
        """Return the lines as words of a shell."""
        return [shlex.split(line) for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def written_pages() -> list[Path]:
    """Return README and the pages that people write."""
    return [ROOT / "README.md", *(path for path in sorted(DOCS.rglob("*.md")) if not {path.name, path.parent.name} & MADE)]


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    page = str(path.relative_to(ROOT))
    found = FENCE.finditer(path.read_text(encoding="utf-8"))
    return [
        Block(page, each[2], each[3], each[1].removeprefix("<!-- not run: ").removesuffix("-->\n").strip()) for each in found
    ]


def code_words(path: Path) -> list[str]:
    """Return what stands between single backquotes outside of blocks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", path.read_text(encoding="utf-8")))
