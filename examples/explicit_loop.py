"""Train one network twice, by a hand-written loop and by `fit`: the same weights.

The hand-written loop is the one of TensorFlow's guides: a `tf.GradientTape`, an
optimizer, metrics that are reset in each epoch, and a test loop of its own. Both
trainings start from the same weights and see the same batches in the same order. The
program compares the results, and exits with status 1 if a bit differs.

    python examples/explicit_loop.py
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument("--epochs", type=int, default=5, help="epochs of both trainings")
PARSER.add_argument("--batch-size", type=int, default=32, help="images in a step")

if __name__ == "__main__":
    # Before the imports, which take seconds.
    PARSER.parse_args()
    print("Trains a network by a loop, then by `fit`, and compares the weights.", flush=True)

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_tapefit import TapeModel


def load_data(batch_size: int) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches in a fixed order, so that both trainings see the same ones."""
    digits = load_digits()
    images = np.expand_dims(digits.images.astype("float32") / 16.0, -1)
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.2, random_state=0
    )
    return tuple(
        tf.data.Dataset.from_tensor_slices(pair).batch(batch_size)
        for pair in ((x_train, y_train), (x_test, y_test))
    )


def make_model() -> TapeModel:
    """The same initial weights each time."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(32, 3, activation="relu")(inputs)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(128, activation="relu")(x)
    outputs = keras.layers.Dense(10)(x)
    return TapeModel(inputs, outputs)


def train_by_hand(
    model: TapeModel, train: tf.data.Dataset, test: tf.data.Dataset, epochs: int
) -> None:
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam()
    train_loss = keras.metrics.Mean()
    train_accuracy = keras.metrics.SparseCategoricalAccuracy()
    test_loss = keras.metrics.Mean()
    test_accuracy = keras.metrics.SparseCategoricalAccuracy()

    @tf.function
    def train_step(images, labels):
        with tf.GradientTape() as tape:
            predictions = model(images, training=True)
            loss = loss_function(labels, predictions)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        # The mean of an epoch is over examples, and the last batch is a smaller one.
        train_loss.update_state(loss, sample_weight=tf.shape(images)[0])
        train_accuracy.update_state(labels, predictions)

    @tf.function
    def test_step(images, labels):
        predictions = model(images, training=False)
        loss = loss_function(labels, predictions)
        test_loss.update_state(loss, sample_weight=tf.shape(images)[0])
        test_accuracy.update_state(labels, predictions)

    for epoch in range(epochs):
        for metric in (train_loss, train_accuracy, test_loss, test_accuracy):
            metric.reset_state()
        for images, labels in train:
            train_step(images, labels)
        for images, labels in test:
            test_step(images, labels)
        record = {
            "loss": float(train_loss.result()),
            "accuracy": float(train_accuracy.result()),
            "val_loss": float(test_loss.result()),
            "val_accuracy": float(test_accuracy.result()),
        }
        show("loop", epoch, record)


def train_by_fit(
    model: TapeModel, train: tf.data.Dataset, test: tf.data.Dataset, epochs: int
) -> None:
    model.compile(
        optimizer=keras.optimizers.Adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        train,
        validation_data=test,
        epochs=epochs,
        shuffle=False,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=functools.partial(show, "fit"))],
        verbose=0,
    )


def show(name: str, epoch: int, logs: dict[str, float]) -> None:
    print(
        f"{name:4}  epoch {epoch + 1}"
        f"  loss {logs['loss']:.6f}  accuracy {logs['accuracy']:.4f}"
        f"  test loss {logs['val_loss']:.6f}"
        f"  test accuracy {logs['val_accuracy']:.4f}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = PARSER.parse_args(argv)

    train, test = load_data(args.batch_size)
    loop_model, fit_model = make_model(), make_model()
    train_by_hand(loop_model, train, test, args.epochs)
    train_by_fit(fit_model, train, test, args.epochs)

    different = 0
    for variable, loop_value, fit_value in zip(
        loop_model.weights,
        loop_model.get_weights(),
        fit_model.get_weights(),
        strict=True,
    ):
        if not np.array_equal(loop_value, fit_value):
            different += 1
            largest = np.max(np.abs(loop_value - fit_value))
            print(f"{variable.path} differs by up to {largest:.3g}")
    if different:
        print(f"weights: {different} of {len(loop_model.weights)} variables differ")
        return 1
    print(f"weights: all {len(loop_model.weights)} variables are equal, bit for bit")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
