"""Reference of the configuration keys, as ``relreid config defaults --explain`` reads them."""

from __future__ import annotations

import re

from relreid_plugin.config.defaults import get_default_config
from relreid_plugin.config.explain import Key, explain_keys

HEAD = """\
# Configuration keys

Every key, its default and its comment, as the sources declare them. Keys are set in a YAML file or as `KEY VALUE` at the end
of a command; an unknown key, a wrong type or a value out of range stops the command with one sentence.
`relreid config NAME --explain` prints the same with a configuration's own values.

torchreid's own keys have torchreid's own names and meanings.
"""


def all_keys() -> list[Key]:
    """Return every declared key with its default."""
    return explain_keys(get_default_config())


def page() -> str:
    """Return the reference page as MyST Markdown, one section per first word of a key."""
    keys = all_keys()
    parts = [HEAD]
    for group in dict.fromkeys(key.name.split(".")[0] for key in keys):
        parts.append(f"## {group}\n")
        for key in keys:
            if key.name.split(".")[0] == group:
                parts.append(f"```{{confval}} {key.name}\n:default: `{key.default!r}`\n\n{prose(key.comment)}\n```\n")
    return "\n".join(parts)


def prose(comment: str) -> str:
    """A comment as Markdown: code stays code, nothing else in it is read as markup."""
    parts = re.split(r"(`[^`]+`)", comment)
    return "".join(part if place % 2 else re.sub(r"([\\`*_\[\]<|$])", r"\\\1", part) for place, part in enumerate(parts))


if __name__ == "__main__":
    print(page())
