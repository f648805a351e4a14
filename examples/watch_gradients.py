"""See what is wrong with a deep network, mend it with two hooks, and see the difference.

Sixteen layers with sigmoid activations and weights drawn far too small: next to nothing
of the gradient reaches the first layers, and the few batches with wild pixels throw the
last ones about. `GradientHistory` keeps a record of every step; its report says what is
wrong and which hooks would help. The pictures are saved.

    python examples/watch_gradients.py --output-dir pictures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_tapefit import TapeSequential, callbacks, hooks, plots


def load_data() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype("float32")
    # A fault of the scanner: a few images are a thousand times too bright.
    x[np.random.default_rng(0).choice(len(x), 6, replace=False)] *= 1000.0
    return x, y


def make_model(depth: int) -> TapeSequential:
    keras.utils.set_random_seed(1)
    hidden = [
        keras.layers.Dense(
            32, activation="tanh", kernel_initializer="he_normal", name=f"hidden_{i}"
        )
        for i in range(depth)
    ]
    return TapeSequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, name="scores")])


def train(
    gradient_hooks: list[hooks.GradientHook], depth: int, epochs: int
) -> tuple[callbacks.GradientHistory, float]:
    x, y = load_data()
    model = make_model(depth)
    model.compile(
        optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        gradient_hooks=gradient_hooks,
    )
    history = callbacks.GradientHistory(weights="scores/bias")
    logs = model.fit(x, y, batch_size=64, epochs=epochs, verbose=0, callbacks=[history])
    return history, logs.history["accuracy"][-1]


def save_pictures(history: callbacks.GradientHistory, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (plots.gradient_flow, plots.norms, plots.heat_map, plots.trajectory):
        path = folder / f"{name}_{draw.__name__}.png"
        draw(history).savefig(path)
        print(f"saved {path.name}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args(argv)

    before, accuracy_before = train([], args.depth, args.epochs)
    print("without hooks:", before.report(), sep="\n")
    save_pictures(before, "before", args.output_dir)

    after, accuracy_after = train([], args.depth, args.epochs)
    print("\nwith two hooks:", after.report(), sep="\n")
    save_pictures(after, "after", args.output_dir)

    print(f"\naccuracy without hooks: {accuracy_before:.3f}, with two hooks: {accuracy_after:.3f}")


if __name__ == "__main__":
    main()
