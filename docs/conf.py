"""Sphinx: `python -m sphinx -W -n docs docs/_build` builds the pages as a site.

README.md, CONTRIBUTING.md and CHANGELOG.md are pages too; each exists once, at the top of
the repository, and is read from there. Docstrings are Markdown and become reStructuredText
here.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import keras_tapefit  # noqa: E402

# Its own name is that of Keras's class; the page has the one it is exported under.
keras_tapefit.TapeSequential.__name__ = "TapeSequential"

project = "keras-tapefit"
author = "The keras-tapefit authors"
copyright = author
version = release = keras_tapefit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
root_doc = "index"
nitpicky = True
# No inventory of another project is fetched, so that the site builds without a network;
# names that other projects document are not checked.
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|keras|keras_tuner|matplotlib|numpy|pandas|tensorflow|tf)\..*"),
    ("py:exc", r"[A-Z]\w*(Error|Warning)(, [A-Z]\w*Error)*"),
]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
# A method that does what its base class says needs no second entry.
autodoc_inherit_docstrings = False
toc_object_entries_show_parents = "hide"
# The text of each argument says what it may be.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"keras-tapefit {version}"
html_copy_source = False
html_show_sphinx = False

# Pages that stand at the top of the repository.
PAGES = {
    "index": "README.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
    "changelog": "CHANGELOG.md",
}
LINKS = [
    (r"\]\(docs/", "]("),
    (r"\]\(examples\)", "](examples.md)"),
    (r"\]\(examples/", "](../examples/"),
    (r"\]\((LICENSE|pyproject\.toml|tests)", r"](../\1"),
    *((rf"\]\({name}", f"]({page}.md") for page, name in PAGES.items()),
]


def setup(app: Any) -> None:
    app.connect("source-read", read_page)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)
    app.connect("autodoc-process-signature", show_init)


def read_page(app: Any, docname: str, source: list[str]) -> None:
    """Puts a page of the top of the repository in front of what docs/ has of it."""
    if docname not in PAGES:
        return
    path = ROOT / PAGES[docname]
    app.env.note_dependency(str(path))
    text = path.read_text(encoding="utf-8")
    for pattern, replacement in LINKS:
        text = re.sub(pattern, replacement, text)
    source[0] = f"{text}\n{source[0]}"


def to_restructured_text(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Turns the Markdown of a docstring into reStructuredText: code, tables, names."""
    result: list[str] = []
    code = False
    table: list[list[str]] = []
    for line in [*lines, ""]:
        indent = line[: len(line) - len(line.lstrip())]
        if line.strip().startswith("```"):
            code = not code
            result += [f"{indent}.. code-block:: python", ""] if code else [""]
        elif code:
            result.append(f"    {line}" if line.strip() else "")
        elif line.strip().startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        else:
            result += list_table(table)
            table = []
            result.append(inline(line))
    if what in ("attribute", "property"):
        # Napoleon takes what stands before a colon there for a type.
        result = [line.replace(": ", " – ") for line in result]
    lines[:] = result


def show_init(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: Any, returns: Any
) -> tuple[str, None] | None:
    """Shows the arguments of `__init__`, not those of a `__new__` that passes all on."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return str(inspect.Signature(bare)), None


def list_table(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    head, _, *body = rows
    result = ["", ".. list-table::", *([] if not any(head) else ["   :header-rows: 1"]), ""]
    for row in [head, *body]:
        for number, cell in enumerate(row):
            result.append(f"   {'* -' if number == 0 else '  -'} {inline(cell)}")
    return [*result, ""]


def inline(text: str) -> str:
    """Doubles the backticks of names, and ends them where a letter follows."""
    text = re.sub(r"(?<![`:\w])`([^`\n]+)`(?!`)", r"``\1``", text)
    return re.sub(r"``(?=\w)(?<=\w``)", r"``\\ ", text)
