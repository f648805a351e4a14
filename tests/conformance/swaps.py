"""The classes that are put in the place of `keras.Model` and `keras.Sequential`."""

from __future__ import annotations

from typing import Any

NAMES = ("stock", "naive", "tapefit")


def classes(swap: str) -> dict[type, type]:
    """Returns which class takes the place of which."""
    import keras

    if swap == "naive":
        from .naive import NaiveModel as model
        from .naive import NaiveSequential as sequential
    else:
        from keras_tapefit import TapeModel as model
        from keras_tapefit import TapeSequential as sequential

    # Keras's functional class has no public name: it is what a call makes.
    functional, new_functional = (_functional_class(cls) for cls in (keras.Model, model))
    return {keras.Model: model, keras.Sequential: sequential, functional: new_functional}


def _functional_class(model: Any) -> type:
    import keras

    # Named, because Keras counts the automatic names.
    inputs = keras.Input((1,), name="inputs")
    return type(model(inputs, inputs, name="model"))
