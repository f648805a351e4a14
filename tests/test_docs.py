"""Runs the Python in README.md and docs/, and compares what it prints.

The ```python blocks of a page run in order and share one namespace. Where a ```text
block follows a ```python block, it must hold exactly what that block printed. All pages
run in this process, because importing TensorFlow takes seconds.
"""

from __future__ import annotations

import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent
# Pages that a command writes hold tables only.
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python" in page.read_text(encoding="utf-8")
]
# These train for longer than the others.
SLOW = ("fine_tune_and_freeze", "see_the_gradients", "several_machines", "tune")


@dataclass
class Block:
    line: int
    code: str
    expected: str | None


def python_blocks(page: Path) -> list[Block]:
    """Returns the ```python blocks of a page, each with the output it promises."""
    blocks: list[Block] = []
    language, begin, body = None, 0, []
    joins = False  # whether only blank lines came since the last ```python block
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if language is not None:
            if line != "```":
                body.append(line)
                continue
            if language == "python":
                blocks.append(Block(begin + 1, "\n".join(body), None))
            elif language == "text" and joins:
                blocks[-1].expected = "\n".join(body)
            joins = language == "python"
            language = None
        elif match := re.fullmatch(r"```(\w*)", line):
            language, begin, body = match[1], number, []
        elif line.strip():
            joins = False
    assert language is None, f"{page.name}: the block of line {begin} has no end"
    return blocks


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW else [], id=page.stem)
        for page in PAGES
    ],
)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    blocks = python_blocks(page)
    assert blocks, f"{page.name} has no Python block"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)

    # A real file with the page's line numbers: tracebacks point into the page, and
    # AutoGraph finds the source of functions.
    lines = [""] * (max(block.line + block.code.count("\n") for block in blocks))
    for block in blocks:
        code = block.code.split("\n")
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    source = tmp_path / f"{page.stem.lower()}_page.py"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    module = types.ModuleType(source.stem)
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    for block in blocks:
        padded = "\n" * (block.line - 1) + block.code
        capsys.readouterr()
        exec(compile(padded, str(source), "exec"), module.__dict__)
        printed = capsys.readouterr().out.rstrip("\n")
        if block.expected is not None:
            assert printed == block.expected, f"{page.name}:{block.line}"
    keras.utils.clear_session()


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http://", "https://")):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_fit_example_is_complete_by_line_30():
    first = python_blocks(ROOT / "README.md")[0]
    assert ".fit(" in first.code
    assert first.line + first.code.count("\n") < 30


def test_readme_has_the_two_commands_that_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"<!-- ci: (\w+) -->\n```bash\n(.+)\n```\n", readme))
    assert list(commands) == ["quickstart", "tests"]
    assert commands["quickstart"].endswith("examples/quickstart.py")
    assert commands["tests"].endswith("-m pytest")
