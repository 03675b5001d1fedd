"""Sphinx: the documentation site. ``make docs`` builds it into ``build/docs``; a warning is an error there."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference_pages  # noqa: E402
from sphinx.util.nodes import make_refnode  # noqa: E402

import relreid_plugin  # noqa: E402

project = "relreid_plugin"
author = "the authors of relreid_plugin"
release = version = relreid_plugin.__version__
language = "en"
smartquotes_action = "qe"  # options begin with two dashes

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "key_links",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["results", "_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "ignore-module-all": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
add_module_names = False

viewcode_follow_imported_members = False

suppress_warnings = ["ref.python"]  # attributes of several classes share a name; none is linked by it
nitpicky = True  # a name in a docstring that is nowhere is a broken link; types in signatures and private data are not
nitpick_ignore_regex = [("py:(class|data|attr|obj|exc|param)", ".*")]

html_theme = "furo"
html_title = f"relreid_plugin {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = "$ "


def by_last_name(app, env, node, contnode):
    """Docstrings name what is in another module by its last name; the only one of that name is meant."""
    if node.get("refdomain") != "py":
        return None
    found = env.domains["py"].find_obj(env, "", "", node["reftarget"], node["reftype"], 1)
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def setup(app):
    app.connect("missing-reference", by_last_name)
    app.connect("builder-inited", lambda app: reference_pages.write(Path(app.srcdir)))
