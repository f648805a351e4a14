"""Train a small convolutional network on handwritten digits, with gradient hooks.

The network is an ordinary functional Keras model, made with `TapeModel`. What is new
is `gradient_hooks=` in `compile`: the norm of the gradient is measured, the gradient
is clipped, and the norm is measured again. Everything else (callbacks, validation,
`evaluate`) is Keras as usual.

    python examples/quickstart.py
    python examples/quickstart.py --dataset mnist    # downloads MNIST
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument(
    "--dataset",
    choices=["digits", "mnist"],
    default="digits",
    help="1797 digits that come with scikit-learn, or MNIST, which is downloaded",
)
PARSER.add_argument("--epochs", type=int, default=12, help="the largest number of epochs")
PARSER.add_argument("--batch-size", type=int, default=32, help="images in a step")
PARSER.add_argument("--max-norm", type=float, default=1.0, help="where gradients are clipped")

if __name__ == "__main__":
    # Before the imports, which take seconds.
    PARSER.parse_args()
    print("Trains a small network on digits, with gradients clipped.", flush=True)

import keras
import numpy as np

from keras_tapefit import TapeModel, hooks


def load_data(dataset: str) -> tuple[tuple, tuple]:
    """Returns (images, labels) twice, to train and to test; pixels in [0, 1]."""
    if dataset == "mnist":
        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
        scale = 255.0
    else:
        # 1797 images of 8 by 8 pixels that come with scikit-learn.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        x_train, x_test, y_train, y_test = train_test_split(
            digits.images, digits.target, test_size=0.2, random_state=0
        )
        scale = 16.0
    x_train, x_test = (np.expand_dims(x.astype("float32") / scale, -1) for x in (x_train, x_test))
    return (x_train, y_train), (x_test, y_test)


def make_model(input_shape: tuple[int, ...]) -> TapeModel:
    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(inputs)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(64, activation="relu")(x)
    outputs = keras.layers.Dense(10, activation="softmax")(x)
    return TapeModel(inputs, outputs)


def main(argv: Sequence[str] | None = None) -> None:
    args = PARSER.parse_args(argv)

    keras.utils.set_random_seed(0)
    (x_train, y_train), (x_test, y_test) = load_data(args.dataset)
    model = make_model(x_train.shape[1:])
    model.compile(
        optimizer="adam",
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # Hooks run in this order, after the backward pass and before the optimizer.
        gradient_hooks=[
            hooks.GradientMonitor(),
            hooks.GlobalNormClipping(args.max_norm),
            hooks.GradientMonitor(name="clipped"),
        ],
    )
    history = model.fit(
        x_train,
        y_train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_split=0.1,
        callbacks=[keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)],
    ).history

    print(f"{len(x_train)} images to train on, {len(x_test)} to test with")
    print("epoch    loss  val_loss  gradient norm  after clipping")
    for epoch, row in enumerate(
        zip(
            history["loss"],
            history["val_loss"],
            history["gradient_norm"],
            history["clipped_norm"],
            strict=True,
        )
    ):
        print("{:5d}  {:6.4f}    {:6.4f}  {:13.4f}  {:14.4f}".format(epoch + 1, *row))

    results = model.evaluate(x_test, y_test, verbose=0, return_dict=True)
    print(f"test accuracy: {results['accuracy']:.4f}")


if __name__ == "__main__":
    main()
