"""Sequential models."""

from __future__ import annotations

import keras

from keras_tapefit.models.keras_models import keep_class_when_cloned
from keras_tapefit.models.model import TapeModel


@keras.saving.register_keras_serializable("keras_tapefit")
class Sequential(keras.Sequential, TapeModel):
    """`keras.Sequential` with the training step of `TapeModel`.

    Exported as `TapeSequential`. It has the name of Keras's own class, because the
    names of classes are in automatic model names, variable paths and weight files.

    Args:
        layers: the layers, in order.
        trainable: whether its weights are trained.
        name: of the model.

    Example:

    ```python
    model = TapeSequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("adam", "mse", gradient_hooks=[hooks.GlobalNormClipping(1.0)])
    ```
    """


TapeSequential = Sequential
keep_class_when_cloned(Sequential)
