"""Plant a fault in a layer, find it by the layer's name, and fix it.

A layer adds the length of a row to its features, and one image in the data is blank, so
the length is 0 and the derivative of its root infinite. The forward pass is finite.

1. `SkipNonFinite(locate=True)` skips the step and says in which layer it began, and for
   which example.
2. `model.find_non_finite` shows the table of layers for that batch.
3. With a floor inside the root no step is skipped.

    python examples/find_nan.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument("--epochs", type=int, default=2, help="epochs of each training")
PARSER.add_argument("--blank", type=int, default=150, help="the number of the blank image")

if __name__ == "__main__":
    # Before the imports, which take seconds.
    PARSER.parse_args()
    print("Trains a network with a fault, finds it, and fixes it.", flush=True)

import keras
import numpy as np
from keras import ops
from sklearn.datasets import load_digits

from keras_tapefit import TapeModel, callbacks, hooks

BATCH_SIZE = 32


class WithLength(keras.layers.Layer):
    """Adds the length of each row to it, as one feature more.

    Args:
        floor: added inside the root.
    """

    def __init__(self, floor: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.floor = floor

    def call(self, inputs):
        squares = ops.sum(ops.square(inputs), axis=-1, keepdims=True)
        return ops.concatenate([inputs, ops.sqrt(squares + self.floor)], axis=-1)


def load_data(blank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns digits and their labels, one image blank."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    x[blank] = 0.0
    return x[:512], y[:512]


def make_model(floor: float = 0.0) -> TapeModel:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,), name="pixels")
    h = keras.layers.Dense(32, use_bias=False, name="features")(inputs)
    h = WithLength(floor, name="with_length")(h)
    return TapeModel(inputs, keras.layers.Dense(10, activation="softmax", name="head")(h))


def train(model: TapeModel, x: np.ndarray, y: np.ndarray, epochs: int) -> tuple[float, str]:
    """Returns the number of skipped steps, and the report on the gradients."""
    model.compile(
        keras.optimizers.Adam(1e-2),
        "sparse_categorical_crossentropy",
        gradient_hooks=[hooks.SkipNonFinite(locate=True)],
    )
    history = callbacks.GradientHistory()
    logs = model.fit(
        x, y, BATCH_SIZE, epochs=epochs, shuffle=False, verbose=0, callbacks=[history]
    ).history
    return sum(logs["skipped_steps"]), str(history.report())


def main(argv: Sequence[str] | None = None) -> None:
    args = PARSER.parse_args(argv)
    x, y = load_data(args.blank)

    print("With the fault:")
    model = make_model()
    skipped, report = train(model, x, y, args.epochs)
    print(f"skipped steps: {skipped:.0f}")
    print(report)
    print(model.gradient_hooks[0].located)

    print("\nThat batch in hand:")
    start = args.blank // BATCH_SIZE * BATCH_SIZE
    batch = slice(start, start + BATCH_SIZE)
    print(model.find_non_finite(x[batch], y[batch]))

    print("\nWith a floor inside the root:")
    model = make_model(floor=1e-6)
    skipped, _ = train(model, x, y, args.epochs)
    print(f"skipped steps: {skipped:.0f}")
    print(model.find_non_finite(x[batch], y[batch]))


if __name__ == "__main__":
    main()
