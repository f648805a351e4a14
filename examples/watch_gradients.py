"""See what is wrong with a deep network, and fix it with two hooks.

Sixteen layers of tanh units start from weights that are too large, and three images have
missing rows. `GradientHistory` records every step, and its report names the hook that
would help:

1. Without hooks the first image with missing rows makes all weights NaN. The report
   names `SkipNonFinite`.
2. With that hook the first steps, far too large, saturate the units, and almost no
   gradient reaches the first layers. The report names `AdaptiveClipping`.
3. With both hooks the network learns.

Pictures of the second and the third training are saved.

    python examples/watch_gradients.py --output-dir pictures
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument("--depth", type=int, default=16, help="hidden layers of the network")
PARSER.add_argument("--epochs", type=int, default=8, help="epochs of each training")
PARSER.add_argument(
    "--output-dir", type=Path, help="where the pictures are kept; None: a temporary folder"
)

if __name__ == "__main__":
    # Before the imports, which take seconds.
    PARSER.parse_args()
    print("Trains a deep network three times, and reports on its gradients.", flush=True)

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_tapefit import TapeModel, callbacks, hooks, plots


def load_data() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype("float32")
    # The scanner lost rows of these three images.
    x[[700, 1100, 1500], 24:40] = np.nan
    return x, y


def make_model(depth: int) -> TapeModel:
    h = inputs = keras.Input((64,))
    for i in range(1, depth + 1):
        # glorot_uniform and he_normal have scales of 1 and 2.
        too_large = keras.initializers.VarianceScaling(4.0)
        layer = keras.layers.Dense(
            32, activation="tanh", kernel_initializer=too_large, name=f"hidden_{i}"
        )
        h = layer(h)
    return TapeModel(inputs, keras.layers.Dense(10, name="scores")(h))


def train(
    gradient_hooks: list[hooks.GradientHook], depth: int, epochs: int
) -> tuple[callbacks.GradientHistory, float]:
    """Returns the records of a training, and the accuracy on the undamaged images."""
    keras.utils.set_random_seed(2)
    x, y = load_data()
    model = make_model(depth)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        gradient_hooks=gradient_hooks,
    )
    history = callbacks.GradientHistory(weights="scores/bias")
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=2, callbacks=[history])
    whole = np.isfinite(x).all(axis=1)
    return history, model.evaluate(x[whole], y[whole], verbose=0, return_dict=True)["accuracy"]


def save_pictures(history: callbacks.GradientHistory, name: str, folder: Path) -> None:
    figures = {
        "gradient_flow": plots.gradient_flow(history),
        "norms": plots.norms(history),
        "heat_map": plots.heat_map(history),
        "trajectory": plots.trajectory(history, max_lines=5),
    }
    for kind, figure in figures.items():
        path = folder / f"{name}_{kind}.png"
        figure.savefig(path)
        print(f"saved {path}")


def main(argv: Sequence[str] | None = None) -> None:
    args = PARSER.parse_args(argv)
    output_dir = args.output_dir or Path(tempfile.mkdtemp(prefix="watch_gradients_"))
    output_dir.mkdir(parents=True, exist_ok=True)

    stages = {
        "no_hooks": [],
        "one_hook": [hooks.SkipNonFinite()],
        "two_hooks": [hooks.SkipNonFinite(), hooks.AdaptiveClipping()],
    }
    for stage, chosen in stages.items():
        print(f"== {stage.replace('_', ' ')}: {', '.join(hook.name for hook in chosen) or '-'}")
        history, accuracy = train(chosen, args.depth, args.epochs)
        print(history.report())
        if chosen:
            save_pictures(history, stage, output_dir)
        print(f"accuracy: {accuracy:.3f}\n")


if __name__ == "__main__":
    main()
