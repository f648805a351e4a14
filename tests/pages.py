"""Runs the Python in README.md, docs/ and the notebook; needs nothing but the library.

The ```python blocks of a page run in order and share one namespace. Where a ```text
block follows a ```python block, it must hold exactly what that block printed. All pages
run in one process, because importing TensorFlow takes seconds.

    python -m tests.pages           # the pages whose blocks need no extra
    python -m tests.pages examples  # those that say they need the extra `examples`
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import keras

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
ALL_PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
]
# Pages that a command writes hold tables only, and those of docs/api docstrings.
PAGES = [page for page in ALL_PAGES if re.search("^```python", page.read_text("utf-8"), re.M)]


@dataclass
class Block:
    line: int
    code: str
    expected: str | None


def blocks_of(page: Path, language: str = "python") -> list[Block]:
    """Returns the blocks of a page in a language, each with the output it promises."""
    blocks: list[Block] = []
    kind, begin, body = None, 0, []
    joins = False  # whether only blank lines came since the last block in that language
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if kind is not None:
            if line != "```":
                body.append(line)
                continue
            if kind == language:
                blocks.append(Block(begin + 1, "\n".join(body), None))
            elif kind == "text" and joins:
                blocks[-1].expected = "\n".join(body)
            joins = kind == language
            kind = None
        elif match := re.fullmatch(r"```(\S*)", line):
            kind, begin, body = match[1], number, []
        elif line.strip():
            joins = False
    assert kind is None, f"{page.name}: the block of line {begin} has no end"
    return blocks


def cells_of(notebook: Path) -> list[Block]:
    """Returns the code of a notebook, the lines counted as if it were one file."""
    blocks, line = [], 1
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            blocks.append(Block(line, "".join(cell["source"]), None))
            line += len(cell["source"])
    return blocks


def extras_of(page: Path) -> list[str]:
    """Returns the extras that a page says its blocks need.

    Raises:
        ValueError: when it does not say it before the first block.
    """
    if page.name == "README.md":
        # Its command installs this one.
        return ["examples"]
    page = DOCS / "tutorial.md" if page == NOTEBOOK else page
    text = page.read_text(encoding="utf-8").partition("```python")[0]
    said = re.search(r"need (no extra|the extras? (`\w+`(?:(?:,| and) `\w+`)*))", text)
    if said is None:
        raise ValueError(f"{page.name} does not say which extra its blocks need")
    return re.findall(r"`(\w+)`", said[2] or "")


def run(page: Path, folder: Path) -> None:
    """Runs a page in a folder, which becomes the working directory."""
    blocks = cells_of(page) if page == NOTEBOOK else blocks_of(page)
    assert blocks, f"{page.name} has no Python block"
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)

    # A real file with the page's line numbers: tracebacks point into the page, and
    # AutoGraph finds the source of functions.
    lines = [""] * (max(block.line + block.code.count("\n") for block in blocks))
    for block in blocks:
        code = block.code.split("\n")
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    source = folder / f"{page.stem.lower()}_page.py"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    module = types.ModuleType(source.stem)
    module.__file__ = str(source)
    sys.modules[module.__name__] = module
    try:
        with contextlib.chdir(folder):
            for block in blocks:
                padded = "\n" * (block.line - 1) + block.code
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(padded, str(source), "exec"), module.__dict__)
                if block.expected is not None:
                    found = printed.getvalue().rstrip("\n")
                    assert found == block.expected, f"{page.name}:{block.line} printed {found!r}"
    finally:
        del sys.modules[module.__name__]
        keras.utils.clear_session()


def main(extras: list[str]) -> None:
    os.environ.setdefault("MPLBACKEND", "agg")
    # For programs that a page starts.
    os.environ["PYTHONPATH"] = str(ROOT)
    pages = [page for page in [*PAGES, NOTEBOOK] if extras_of(page) == extras]
    for page in pages:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run(page, Path(folder))
        print(f"{page.name}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(pages)} passed, 0 failed")


if __name__ == "__main__":
    main(sys.argv[1:])
