"""Gradients you can trust, inside the `fit` you already have."""

import importlib
from typing import Any

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_tapefit needs Keras on the TensorFlow backend: its training step is a "
        f"`tf.GradientTape`. Received: backend={keras.backend.backend()!r}. Set the "
        "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
    )

from keras_tapefit import backward as backward
from keras_tapefit import hooks as hooks
from keras_tapefit.gradients import Gradients as Gradients
from keras_tapefit.models import TapeModel as TapeModel
from keras_tapefit.models import TapeSequential as TapeSequential

__version__ = "0.1.0"

_LAZY = ("callbacks", "plots", "tuning")


def __getattr__(name: str) -> Any:
    # Imported when used: they need more packages.
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
