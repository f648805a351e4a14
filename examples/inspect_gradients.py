"""Look at gradients: of single examples, by variable path, and inside a hook.

`compute_gradients` returns the gradients that the first hook of a training step would
receive, and changes nothing in the model. A plain function can be registered as a hook;
the handle that comes back removes it.

    python examples/inspect_gradients.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument("--examples", type=int, default=10, help="how many images to look at")

if __name__ == "__main__":
    # Before the imports, which take seconds.
    PARSER.parse_args()
    print("Prints the norms of gradients, image by image.", flush=True)

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from keras_tapefit import TapeModel


def make_model() -> TapeModel:
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(32, activation="relu", name="hidden")(x)
    outputs = keras.layers.Dense(10, activation="softmax", name="scores")(x)
    model = TapeModel(inputs, outputs)
    model.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    return model


def main(argv: Sequence[str] | None = None) -> None:
    args = PARSER.parse_args(argv)

    keras.utils.set_random_seed(0)
    digits = load_digits()
    x = np.expand_dims(digits.images[: args.examples].astype("float32") / 16.0, -1)
    y = digits.target[: args.examples]
    model = make_model()

    # One row an example, one column a variable: the norm of its gradient.
    columns = [variable.path for variable in model.trainable_variables]
    print("example  digit  " + "  ".join(columns) + "  all")
    for i in range(len(x)):
        gradients = model.compute_gradients(x[i : i + 1], y[i : i + 1])
        norms = [float(tf.norm(gradients[path])) for path in columns]
        cells = [f"{norm:{len(path)}.4f}" for path, norm in zip(columns, norms, strict=True)]
        print(f"{i:7d}  {y[i]:5d}  " + "  ".join(cells) + f"  {float(gradients.global_norm()):.4f}")

    gradients = model.compute_gradients(x, y)
    print(f"norms of the gradients of all {len(x)} examples together:")
    for path, norm in gradients.norms().items():
        print(f"  {path}: {float(norm):.4f}")

    # A function hook gets a gradient and its variable, and returns the gradient to use.
    def halve(gradient, variable):
        return gradient / 2

    def one_step():
        """The change that one step makes to the bias of the last layer."""
        before = [variable.numpy() for variable in model.trainable_variables]
        model.train_on_batch(x, y)
        change = model.trainable_variables[-1].numpy() - before[-1]
        for variable, value in zip(model.trainable_variables, before, strict=True):
            variable.assign(value)
        return float(np.linalg.norm(change))

    plain = one_step()
    handle = model.register_gradient_hook(halve, targets="scores/*")
    hooked = one_step()
    handle.remove()
    removed = one_step()
    print("change of scores/bias in one step:")
    print(f"  without a hook: {plain:.6f}")
    print(f"  with the hook that halves scores/*: {hooked:.6f}")
    print(f"  after handle.remove(): {removed:.6f}")


if __name__ == "__main__":
    main()
