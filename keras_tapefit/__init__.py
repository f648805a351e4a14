"""Gradients you can trust, inside the `fit` you already have."""

import importlib
from typing import TYPE_CHECKING, Any

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_tapefit needs Keras on the TensorFlow backend: its training step is a "
        f"`tf.GradientTape`. Received: backend={keras.backend.backend()!r}. Set the "
        "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
    )

from keras_tapefit import versions as _versions  # noqa: F401  # isort: skip
from keras_tapefit import backward as backward
from keras_tapefit import hooks as hooks
from keras_tapefit.gradients import Gradients as Gradients
from keras_tapefit.models import TapeModel as TapeModel
from keras_tapefit.models import TapeSequential as TapeSequential

if TYPE_CHECKING:
    from keras_tapefit import callbacks as callbacks
    from keras_tapefit import plots as plots
    from keras_tapefit import tuning as tuning

__version__ = "0.1.0"

# Imported when used: they need more packages.
_LAZY = ("callbacks", "plots", "tuning")

__all__ = [
    "Gradients",
    "TapeModel",
    "TapeSequential",
    "backward",
    "callbacks",
    "hooks",
    "plots",
    "tuning",
]


if not TYPE_CHECKING:
    # For type checkers.
    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
