"""The versions of Keras and TensorFlow that this library was tried with."""

from __future__ import annotations

import warnings

import keras
import tensorflow as tf

# The oldest version and the newest that the tests were run with.
TRIED = {"keras": ((3, 14), (3, 15)), "tensorflow": ((2, 20), (2, 21))}
# As the packages say it: the distribution may have another name, such as tensorflow-cpu.
INSTALLED = {"keras": keras.__version__, "tensorflow": tf.__version__}


def check(installed: dict[str, str]) -> None:
    """Compares versions with those that were tried.

    Raises:
        ImportError: when one is older than any that was tried: weights and state would be wrong
            without a word.
    """
    for name, text in installed.items():
        oldest, newest = TRIED[name]
        version = tuple(int(number) for number in text.split(".")[:2])
        least = ".".join(map(str, oldest))
        if version < oldest:
            raise ImportError(
                f"keras_tapefit needs {name} {least} or later. Received: {name} {text}. "
                f"Install a newer one: `pip install --upgrade {name}`."
            )
        if version > newest:
            most = ".".join(map(str, newest))
            warnings.warn(
                f"keras_tapefit was tried with {name} {least} to {most}, and {name} {text} "
                "is newer. Private names that it uses may have changed.",
                stacklevel=4,
            )


check(INSTALLED)
