"""Sphinx: the site in build/docs, from these pages and the docstrings (make docs)."""

from __future__ import annotations

from typing import Any

import mfd_fast

project = "mfd_fast"
author = "the mfd_fast contributors"
version = release = mfd_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_*"]
html_theme = "furo"
html_title = "mfd_fast"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # performance.md is generated

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

# Every reference resolves, but for those to packages whose own sites would have to be asked.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|nn|collections|typing|contextlib|types|_?Loss|Tensor)\b.*")]


def resolve_by_last_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Links of annotations and docstrings, which name the defining module or none, lead to the documented name."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or (not target.startswith("mfd_fast.") and "." in target):
        return None
    domain, name = env.get_domain("py"), target.rpartition(".")[2]
    public = [known for known, *_ in domain.get_objects() if known.rpartition(".")[2] == name]
    if len(public) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public[0], node, contnode)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve_by_last_name)
