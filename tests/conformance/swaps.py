"""The classes that are put in the place of `keras.Model` and `keras.Sequential`."""

from __future__ import annotations

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

        return {keras.Model: NaiveModel, keras.Sequential: NaiveSequential}

    import keras_tapefit

    return {
        keras.Model: keras_tapefit.TapeModel,
        keras.Sequential: keras_tapefit.TapeSequential,
    }
