"""The public names of a package."""

from __future__ import annotations

import types
from typing import Any


def publish(namespace: dict[str, Any], *modules: str) -> None:
    """Has `dir`, `help` and `import *` show the names that a package imports for its users.

    To be called at the end of its `__init__.py`, whose imports are the one list of names.

    Args:
        namespace: the package's `globals()`.
        modules: the names of those of its modules that are public too.
    """
    names = sorted(
        name
        for name, value in namespace.items()
        if name in modules or not (name.startswith("_") or isinstance(value, types.ModuleType))
    )
    namespace["__all__"] = names
    namespace["__dir__"] = lambda: list(names)
