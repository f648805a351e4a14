"""The versions of Keras and TensorFlow that this library was tried with."""

from __future__ import annotations

import re
import warnings
from importlib import metadata

# By distribution, the oldest version that passes the tests and the newest that was tried.
TRIED = {"keras": ((3, 15), (3, 15)), "tensorflow": ((2, 21), (2, 21))}


def check(installed: dict[str, str] | None = None) -> None:
    """Compares the installed versions with those that were tried.

    Args:
        installed: versions by distribution; `None`: those of this environment.

    Raises:
        ImportError: when one is older than any that passes the tests: state would be lost
            without a word.
    """
    for name, (oldest, newest) in TRIED.items():
        text = _installed(name) if installed is None else installed.get(name)
        found = re.match(r"(\d+)\.(\d+)", text or "")
        if found is None:
            # A build under another name, such as tensorflow-cpu.
            continue
        version = int(found[1]), int(found[2])
        tried = " to ".join(dict.fromkeys(".".join(map(str, v)) for v in (oldest, newest)))
        if version < oldest:
            raise ImportError(
                f"keras_tapefit needs {name} {tried} or later. Received: {name} {text}. "
                f"Install a newer one: `pip install --upgrade {name}`."
            )
        if version > newest:
            warnings.warn(
                f"keras_tapefit was tried with {name} {tried}, and {name} {text} is newer. "
                "Private names that it uses may have changed.",
                stacklevel=3,
            )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


check()
