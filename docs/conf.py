"""The site of the documentation: `make docs` builds it into docs/_build/html, without the network."""

import importlib

benchmark, errors, graft, verify = (
    importlib.import_module(f"kernelgraft.{name}") for name in ("benchmark", "errors", "graft", "verify")
)

project = "kernelgraft"
html_title = "kernelgraft"
html_theme = "furo"
highlight_language = "none"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3
add_module_names = False
autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Docstrings are Markdown in one respect: `name` is code.
default_role = "code"

# Two modules name types that they import for type checkers alone; here they are looked up.
errors.Report = graft.Report = verify.Report
graft.benchmarks = benchmark


def _fences_to_directives(app, what, name, obj, options, lines):  # noqa: ARG001 - what Sphinx hands over
    """Docstrings have code in Markdown's fences; reStructuredText has a directive for it."""
    fence = None
    for index, line in enumerate(lines):
        text = line.strip()
        if text.startswith("```"):
            indent = line[: len(line) - len(line.lstrip())]
            fence = None if fence is not None else indent
            lines[index] = "" if fence is None else f"{indent}.. code-block:: {text[3:] or 'text'}\n"
        elif fence is not None:
            lines[index] = f"   {line}"
    lines[:] = "\n".join(lines).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", _fences_to_directives)
