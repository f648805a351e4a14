"""Imports Keras's own test modules as if they had been written for another model class.

Only what a test module itself says is changed. `from keras.src.models import Model` and
`models.Sequential` become the classes that the caller gives, wherever they stand: in a
base class, in a function, in an annotation. Keras itself stays as it is.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any

NAMES = ("Model", "Sequential")
# Not a public name. Tests make models of this class, and look whether a model is one:
# that the graph inside a Sequential is exactly one is no business of ours.
FUNCTIONAL = "Functional"
_SWAP = "_conformance_swap"


class _Rewrite(ast.NodeTransformer):
    """Passes what a module gets by one of `NAMES` through a function, and `FUNCTIONAL`
    where it is called, is a base class, or gives a method."""

    def __init__(self) -> None:
        self.num_changes = 0

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt]:
        statements: list[ast.stmt] = [node]
        for alias in node.names:
            if alias.name in NAMES:
                name = alias.asname or alias.name
                value = self._swapped(ast.Name(name, ast.Load()))
                statements.append(ast.Assign([ast.Name(name, ast.Store())], value))
        return [ast.copy_location(statement, node) for statement in statements]

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        node.value = self._functional(node.value)
        if node.attr in NAMES and isinstance(node.ctx, ast.Load):
            return self._swapped(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        node.func = self._functional(node.func)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        self.generic_visit(node)
        node.bases = [self._functional(base) for base in node.bases]
        return node

    def _functional(self, node: ast.expr) -> ast.expr:
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        return self._swapped(node) if name == FUNCTIONAL else node

    def _swapped(self, node: ast.expr) -> ast.expr:
        self.num_changes += 1
        return ast.copy_location(ast.Call(ast.Name(_SWAP, ast.Load()), [node], []), node)


def rewrite(source: bytes | str) -> tuple[ast.Module, int]:
    """Returns the syntax tree of a rewritten module, and the number of changes."""
    transformer = _Rewrite()
    tree = transformer.visit(ast.parse(source))
    return ast.fix_missing_locations(tree), transformer.num_changes


class RewritingFinder(importlib.abc.MetaPathFinder):
    """Finds modules and has them rewritten. To be put in front of `sys.meta_path`.

    Args:
        matches: which modules, by name.
        classes: returns which class takes the place of which. Called when the first of
            them is asked for, because Keras is not to be imported before.
    """

    def __init__(
        self, matches: Callable[[str], bool], classes: Callable[[], dict[type, type]]
    ) -> None:
        self.matches = matches
        self.classes = classes

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not self.matches(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _RewritingLoader(fullname, spec.origin, self.classes)
        return spec


class _RewritingLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, classes: Callable[[], dict[type, type]]) -> None:
        super().__init__(name, path)
        self.classes = classes

    def get_code(self, fullname: str) -> Any:
        # Neither read from nor written to the cache of bytecode, which is Keras's own.
        tree, _ = rewrite(self.get_data(self.path))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: Any) -> None:
        def swap(value: Any) -> Any:
            for old, new in self.classes().items():
                if value is old:
                    return new
            return value

        setattr(module, _SWAP, swap)
        super().exec_module(module)


def install(matches: Callable[[str], bool], classes: Callable[[], dict[type, type]]) -> None:
    """Rewrites what is imported from now on."""
    sys.meta_path.insert(0, RewritingFinder(matches, classes))
