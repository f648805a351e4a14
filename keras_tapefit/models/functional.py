"""Functional models."""

from __future__ import annotations

from typing import Any

import keras

from keras_tapefit.models.keras_models import KerasFunctional
from keras_tapefit.models.model import TapeModel


@keras.saving.register_keras_serializable("keras_tapefit")
class Functional(KerasFunctional, TapeModel):
    """What `TapeModel(inputs, outputs)` returns.

    It has the name of Keras's own functional class, because the names of classes are in
    automatic model names, variable paths and weight files.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        KerasFunctional.__init__(self, *args, **kwargs)
