"""The classes that are put in the place of `keras.Model` and `keras.Sequential`."""

from __future__ import annotations

from typing import Any

NAMES = ("stock", "naive", "tapefit")


def classes(swap: str) -> dict[type, type]:
    """Returns which class takes the place of which."""
    import keras

    if swap == "naive":
        # What anyone would write first. Many of Keras's tests fail on it, which shows
        # that these tests can fail.
        class NaiveModel(keras.Model):
            pass

        class NaiveSequential(keras.Sequential):
            pass

        model, sequential = NaiveModel, NaiveSequential
    else:
        from keras_tapefit import TapeModel, TapeSequential

        model, sequential = TapeModel, TapeSequential

    # Keras's functional class has no public name: it is what a call makes.
    functional, new_functional = (_functional_class(cls) for cls in (keras.Model, model))
    return {keras.Model: model, keras.Sequential: sequential, functional: new_functional}


def _functional_class(model: Any) -> type:
    import keras

    # Named, because Keras counts the automatic names.
    inputs = keras.Input((1,), name="inputs")
    return type(model(inputs, inputs, name="model"))
