"""Turns every ```key``` in the text that is a configuration key into a link to its entry in the reference."""

from __future__ import annotations

import keys
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform


class KeyLinks(SphinxTransform):
    """A literal that spells a configuration key becomes a cross-reference."""

    default_priority = 600
    known: frozenset[str] = frozenset(key.name for key in keys.all_keys())

    def apply(self, **kwargs: object) -> None:
        """Wrap the literals of this document."""
        if self.env.docname == "reference/keys":
            return
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext()
            if name in self.known and not isinstance(literal.parent, (nodes.reference, pending_xref, nodes.title)):
                link = pending_xref("", refdomain="std", reftype="confval", reftarget=name, refexplicit=True, refwarn=True)
                link["refdoc"] = self.env.docname
                literal.replace_self(link)
                link += literal


def setup(app):
    app.add_transform(KeyLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
