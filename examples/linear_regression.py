"""Fit a line to noisy points, by hand and through `fit`: the same numbers.

The model has two bare `tf.Variable` attributes and no layer at all. Both trainings
start from w = 5 and b = 0, take plain gradient descent steps on the whole data set,
and record the path of w and b. The weights are checkpointed and read back, and a plot
of the data and of the path is saved.

    python examples/linear_regression.py --output-dir .
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument("--epochs", type=int, default=20, help="steps of both trainings")
PARSER.add_argument("--learning-rate", type=float, default=0.1, help="of gradient descent")
PARSER.add_argument(
    "--output-dir",
    type=Path,
    help="where the plot and the weights are kept; None: a temporary folder",
)

if __name__ == "__main__":
    # Before the imports, which take seconds.
    PARSER.parse_args()
    print("Fits a line by hand, then by `fit`, and compares the numbers.", flush=True)

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from keras_tapefit import TapeModel

TRUE_W, TRUE_B = 3.0, 2.0
NUM_POINTS = 201


class Line(TapeModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.w = tf.Variable(5.0)
        self.b = tf.Variable(0.0)

    def call(self, x):
        return self.w * x + self.b


def load_data() -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(-2.0, 2.0, NUM_POINTS, dtype="float32")[:, None]
    noise = np.random.default_rng(0).normal(size=x.shape).astype("float32")
    return x, TRUE_W * x + TRUE_B + noise


def train_by_hand(
    x: np.ndarray, y: np.ndarray, epochs: int, learning_rate: float
) -> list[tuple[float, float]]:
    """Returns (w, b) before the first epoch and after each one."""
    model = Line()
    path = [(float(model.w), float(model.b))]

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(y - model(x)))
        dw, db = tape.gradient(loss, [model.w, model.b])
        model.w.assign_sub(learning_rate * dw)
        model.b.assign_sub(learning_rate * db)

    for _ in range(epochs):
        step(x, y)
        path.append((float(model.w), float(model.b)))
    return path


def train_by_fit(
    x: np.ndarray, y: np.ndarray, epochs: int, learning_rate: float, checkpoint: Path
) -> tuple[Line, list[tuple[float, float]]]:
    """Returns the model, and (w, b) before the first epoch and after each one."""
    model = Line()
    path = [(float(model.w), float(model.b))]
    model.compile(optimizer=keras.optimizers.SGD(learning_rate), loss="mean_squared_error")
    model.fit(
        x,
        y,
        batch_size=len(x),
        epochs=epochs,
        shuffle=False,
        callbacks=[
            keras.callbacks.ModelCheckpoint(checkpoint, save_weights_only=True),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: path.append((float(model.w), float(model.b)))
            ),
        ],
        verbose=0,
    )
    return model, path


def plot(x: np.ndarray, y: np.ndarray, model: Line, path: list[tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    line, parameters = figure.subplots(1, 2)
    line.plot(x, y, ".", color="0.6", label="data")
    line.plot(x, TRUE_W * x + TRUE_B, "--", color="black", label="truth")
    line.plot(x, model.predict(x, verbose=0), color="C1", label="prediction")
    line.set(xlabel="x", ylabel="y")
    line.legend()
    for values, truth, name, color in (
        ([w for w, _ in path], TRUE_W, "w", "C0"),
        ([b for _, b in path], TRUE_B, "b", "C3"),
    ):
        parameters.plot(values, color=color, label=name)
        parameters.axhline(truth, color=color, linestyle="--", label=f"true {name}")
    parameters.set(xlabel="epoch")
    parameters.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    args = PARSER.parse_args(argv)
    output_dir = args.output_dir or Path(tempfile.mkdtemp(prefix="linear_regression_"))
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = output_dir / "line.weights.h5"

    x, y = load_data()
    by_hand = train_by_hand(x, y, args.epochs, args.learning_rate)
    model, by_fit = train_by_fit(x, y, args.epochs, args.learning_rate, checkpoint)

    print("epoch    w by hand  w by fit    b by hand  b by fit")
    for epoch, ((hand_w, hand_b), (fit_w, fit_b)) in enumerate(zip(by_hand, by_fit, strict=True)):
        print(f"{epoch:5d}    {hand_w:9.6f}  {fit_w:8.6f}    {hand_b:9.6f}  {fit_b:8.6f}")

    restored = Line()
    restored(x)  # Keras reads weights only into a model that has been called or built.
    restored.load_weights(checkpoint)
    print(f"weights read back: w = {float(restored.w):.6f}, b = {float(restored.b):.6f}")

    figure_path = output_dir / "linear_regression.png"
    plot(x, y, model, by_fit).savefig(figure_path)
    print(f"plot: {figure_path}")

    if by_hand != by_fit:
        print("the two paths differ")
        return 1
    if (float(restored.w), float(restored.b)) != by_fit[-1]:
        print("the weights that were read back differ")
        return 1
    print(f"the two paths are equal, bit for bit, over {args.epochs} epochs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
