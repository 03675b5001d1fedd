"""Checks every internal link of the built site, anchors included: ``python docs/links.py build/docs``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page points at, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect ``href``, ``src`` and ``id``."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif value and (name == "src" or (name == "href" and tag in ("a", "link"))):
                self.targets.append(value)


def broken_links(folder: Path) -> list[str]:
    """Return one line per internal link of the HTML files below ``folder`` that leads nowhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.resolve().rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not goal.is_file():
                found.append(f"{path.relative_to(folder.resolve())}: {target}: no such file")
            elif goal in pages and unquote(parts.fragment) not in pages[goal].anchors:
                found.append(f"{path.relative_to(folder.resolve())}: {target}: no such anchor")
    return found


def main(argv: list[str]) -> int:
    """Print the broken links of the folder that is named; exit code 1 if there are any, or no page."""
    folder = Path(argv[0])
    found = broken_links(folder)
    print("\n".join(found) or f"{folder}: {len(list(folder.rglob('*.html')))} pages, no broken link")
    return 1 if found or not list(folder.rglob("*.html")) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
