"""The house: what may import what, and where Keras's private names are touched.

Nothing is imported here; the source is read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keras_tapefit"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. A room imports from the floors below it, and from itself.
FLOORS = [{"versions", "gradients"}, {"backward", "hooks"}, {"update"}, {"training"}, {"models"}]
FLOORS.append({"tuning", "callbacks", "plots", "__main__"})
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Whose private names and modules are meant.
OTHERS = ("keras.src", "keras_tuner.src", "tensorflow.python")
# Public names of Python that look private, and the one by which notebooks show objects.
OURS = {
    "gradients/gradients.py": {"_values"},
    "hooks/arguments.py": {"_name"},
    "hooks/during.py": {"_name"},
    "hooks/hook_list.py": {"_name", "_structure"},
    "hooks/number.py": {"_structure"},
}
# Public names of Python that look private.
PUBLIC = {"_replace", "_getframe", "_current_frames", "_repr_png_"}


def room_of(path: Path) -> str:
    """Returns the folder of the package, or the file in it, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and the full name of each thing that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    for line, name in imported(parsed(path)):
        if name.split(".")[0] != "keras_tapefit":
            continue
        other = name.split(".")[1]
        assert other in FLOOR_OF, f"{path}:{line} imports {name}"
        down = FLOOR_OF[other] < FLOOR_OF[room]
        assert other == room or down, f"{path}:{line}: {room} imports {other}"


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR_OF)


def names_of_keras() -> set[str]:
    """Returns the private names that Keras defines: methods, classes and attributes."""
    found = set()
    for path in (Path(find_spec("keras").origin).parent / "src").rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


def foreign_names(path: Path, of_keras: set[str]) -> Iterator[tuple[int, str]]:
    """Yields the line and the name of each private thing of another library."""
    tree = parsed(path)
    for line, name in imported(tree):
        if name.startswith(OTHERS):
            yield line, name
    ours = OURS.get(str(path.relative_to(PACKAGE)), set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in of_keras - ours - PUBLIC:
            # What an object of ours has is ours, but for the mixin in front of a model.
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own:
                yield node.lineno, node.attr


@pytest.mark.slow
def test_private_names_of_others_are_told_and_tested():
    """A file that uses some says which, for which versions, and what test holds them."""
    of_keras = names_of_keras()
    assert "_flatten_layers" in of_keras
    faults = []
    for path in FILES:
        used = list(foreign_names(path, of_keras))
        told = " ".join((ast.get_docstring(parsed(path)) or "").split())
        for line, name in used:
            if "Private names used here" not in told:
                faults.append(f"{path.relative_to(ROOT)}:{line}: {name}, and does not say so")
            elif name.split(".")[-1] not in told:
                faults.append(f"{path.relative_to(ROOT)}:{line}: {name} is not told")
        if used and "Private names used here" in told:
            assert re.search(r"Checked with Keras 3\.\d+", told), path
            tests = re.findall(r"`(tests/\S+\.py)` fails when", told)
            assert tests and all((ROOT / test).exists() for test in tests), path
    assert not faults, "\n".join(faults)
