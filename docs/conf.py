"""How Sphinx builds the site: `make docs`. The pages are plain Markdown, which GitHub shows, too."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.inspect import signature, stringify_signature

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # so that the reference is of this checkout
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; nothing here needs it

TOUR = HERE.parent / "examples" / "tour.ipynb"

NAVIGATION = {
    "Guide": [
        *(
            "quickstart",
            "tour",
            "gallery",
            "targets",
            "kinds",
            "training",
            "trainer",
            "recipes",
            "distributed",
            "new-tokens",
            "saving",
            "hub",
            "merging",
            "quantized",
        ),
        *("adapters", "many-adapters", "serving", "export", "coming-from-peft", "faq"),
    ],
    "Reference": ["reference", "files", "peft-settings"],
    "Background": ["how-it-works", "results", "performance", "compatibility", "decisions/README"],
}

project = "minilora"
html_title = "minilora"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4  # links may name a heading, as on GitHub
root_doc = "index"

# The reference, from the docstrings: a name in backticks is a link wherever it is one of ours.
default_role = "py:obj"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 60
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "member-order": "bysource"}

html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["copy.js"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False, "top_of_page_buttons": []}


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the navigation under the first page, whose Markdown need not have it, and list the decisions."""
    if page == root_doc:
        app.env.note_dependency(__file__)  # the navigation is here
        for title, pages in NAVIGATION.items():
            source[0] += "\n".join(
                ["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""]
            )
    if page == "decisions/README":
        source[0] += "\n```{toctree}\n:glob:\n\n0*\n```\n"


def show_notebook(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the notebook in the place of the page that leads to it, with the outputs that are stored in it."""
    if page != "tour":
        return
    app.env.note_dependency(str(TOUR))
    parts = []
    for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]:
        code = cell["cell_type"] == "code"
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if code else text)
        shown = [output.get("data", {"text/plain": output.get("text")}) for output in cell.get("outputs", ())]
        printed = "".join("".join(data["text/plain"]) for data in shown if "image/png" not in data)
        if printed:
            parts.append(f"```output\n{printed.rstrip()}\n```")
        for data in shown:
            if "image/png" in data:
                png = data["image/png"].replace("\n", "")
                parts.append(f'<img alt="What this draws" src="data:image/png;base64,{png}">')
    source[0] = "\n\n".join(parts)


def class_signature(
    app: Sphinx, what: str, name: str, value: type, options: object, arguments: str, returns: str
) -> tuple[str, str] | None:
    """Return what a class is called with, as Python tells it: Sphinx takes `__new__` before `__init__`."""
    if what != "class":
        return None
    found = signature(value)
    return stringify_signature(found, show_return_annotation=False, unqualified_typehints=True), ""


def google_style(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Turn the sections of docstrings into lists; a field's is a sentence, in which a colon ends no type.

    Bars are those of a norm, |x|: outside of code they are no mark-up here.
    """
    example = False  # it goes on to the next empty line
    for i, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if not example:
            lines[i] = re.sub(r"(`[^`]*`)|\|", lambda m: m[1] or r"\|", line)
    if what not in ("attribute", "property"):
        lines[:] = GoogleDocstring(list(lines), what=what, name=name).lines()


class Columns(SphinxPostTransform):
    """Mark printed text that stands in columns: it is scrolled where it is too wide; all else wraps."""

    default_priority = 500

    def run(self) -> None:
        for block in self.document.findall(nodes.literal_block):
            printed = block["language"] not in ("python", "bash", "pycon", "json")
            if printed and re.search(r"\S {2,}\S|[─│├└┬┴]", block.astext()):
                block["classes"].append("columns")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("source-read", show_notebook)
    app.connect("autodoc-process-signature", class_signature)
    app.connect("autodoc-process-docstring", google_style)
    app.add_post_transform(Columns)
