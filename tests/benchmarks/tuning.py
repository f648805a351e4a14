"""Wall time of three searches, with traces kept and without, side by side.

    python tests/benchmarks/tuning.py
    python tests/benchmarks/tuning.py --write docs/tune.md

Without is the build function given to KerasTuner as it is. Both run in this process, one
search after the other, and must find the same trials with the same scores.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner
from sklearn.datasets import load_digits

from keras_tapefit import TapeModel, hooks, tuning

DIGITS = load_digits()


def dense(hp: Any) -> TapeModel:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    h = keras.layers.Dense(64, activation="relu")(inputs)
    h = keras.layers.Dense(32, activation="relu")(h)
    return compiled(hp, inputs, h)


def convolutional(hp: Any) -> TapeModel:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    h = keras.layers.Reshape((8, 8, 1))(inputs)
    for filters in (8, 16):
        h = keras.layers.Conv2D(filters, 3, activation="relu", padding="same")(h)
        h = keras.layers.BatchNormalization()(h)
        h = keras.layers.MaxPooling2D()(h)
    return compiled(hp, inputs, keras.layers.Flatten()(h))


def compiled(hp: Any, inputs: Any, h: Any) -> TapeModel:
    model = TapeModel(inputs, keras.layers.Dense(10, activation="softmax")(h))
    model.compile(
        keras.optimizers.Adam(hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        gradient_hooks=[
            hooks.SkipNonFinite(),
            hooks.GlobalNormClipping(hp.Float("max_norm", 0.1, 10.0, sampling="log")),
        ],
    )
    return model


SEARCHES: dict[str, tuple[Any, Any, dict[str, Any], int | None]] = {
    "12 trials of 3 epochs, dense": (dense, keras_tuner.RandomSearch, {"max_trials": 12}, 3),
    "30 trials of 1 epoch, CNN": (convolutional, keras_tuner.RandomSearch, {"max_trials": 30}, 1),
    "Hyperband to 6 epochs, dense": (
        dense,
        keras_tuner.Hyperband,
        {"max_epochs": 6, "factor": 3},
        None,
    ),
}


def run(name: str, reuse: bool) -> tuple[float, float, list[Any]]:
    """Returns wall time, processor time, and the trials from the best on."""
    build, cls, options, epochs = SEARCHES[name]
    keras.utils.clear_session()
    gc.unfreeze()
    gc.collect()
    with tempfile.TemporaryDirectory() as directory:
        begin = time.perf_counter(), time.process_time()
        hypermodel = tuning.TapeHyperModel(build, parts=()) if reuse else build
        tuner = cls(
            hypermodel,
            objective=keras_tuner.Objective("val_accuracy", "max"),
            seed=1,
            directory=directory,
            **options,
        )
        x, y = DIGITS.data.astype("float32") / 16, DIGITS.target
        fit = {} if epochs is None else {"epochs": epochs}
        tuner.search(x, y, validation_split=0.2, batch_size=64, verbose=0, **fit)
        end = time.perf_counter(), time.process_time()
        trials = tuner.oracle.get_best_trials(len(tuner.oracle.trials))
        found = [(trial.trial_id, trial.score) for trial in trials]
    return end[0] - begin[0], end[1] - begin[1], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    args = parser.parse_args()
    rows = [
        "| search | trials | stock | reuse | times faster | same scores |",
        "|---|---|---|---|---|---|",
    ]
    for name in SEARCHES:
        stock, _, first = run(name, False)
        reuse, _, second = run(name, True)
        same = "yes" if first == second else "NO"
        rows.append(
            f"| {name} | {len(first)} | {stock:.1f} s | {reuse:.1f} s | "
            f"{stock / reuse:.1f} | {same} |"
        )
        print(rows[-1], flush=True)
    if args.write:
        page = args.write.read_text(encoding="utf-8")
        block = "<!-- figures -->\n" + "\n".join(rows) + "\n<!-- end of figures -->"
        page = re.sub(
            r"<!-- figures -->.*<!-- end of figures -->", lambda _: block, page, flags=re.S
        )
        args.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
