"""Writes examples/tour.ipynb from docs/tutorial.md: the same text and code, no output.

python docs/make_notebook.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
NOTEBOOK = DOCS.parent / "examples" / "tour.ipynb"


def notebook() -> str:
    """Returns the notebook as text."""
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    # A notebook shows its own output.
    page = re.sub(r"^```text\n.*?^```\n", "", page, flags=re.M | re.S)
    page = page.replace(
        "The same blocks are in a notebook, [tour.ipynb](../examples/tour.ipynb).",
        "This notebook is made from the page `docs/tutorial.md`.",
    )
    page = re.sub(r"\]\((\w+\.md)", r"](../docs/\1", page)
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.M | re.S)):
        source = re.sub(r"\n{3,}", "\n\n", part).strip("\n") if number % 2 == 0 else part.rstrip()
        if not source.strip():
            continue
        cell: dict[str, Any] = {
            "cell_type": "code" if number % 2 else "markdown",
            "id": f"cell-{len(cells)}",
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        if number % 2:
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
