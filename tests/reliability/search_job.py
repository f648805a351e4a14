"""One search, to be killed: `python -m tests.reliability.search_job FOLDER KIND TUNER`.

What it comes to is in `FOLDER/result.json` at its end. It may be started again after a kill.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner
import numpy as np

from keras_tapefit import TapeModel, hooks, tuning

KINDS = ("plain", "tape", "reuse")
# Not `GridSearch`, which forgets its order in a new process, and then raises a KeyError.
TUNERS: dict[str, dict[str, Any]] = {
    "RandomSearch": {"max_trials": 6},
    "Hyperband": {"max_epochs": 4, "factor": 2},
    "BayesianOptimization": {"max_trials": 6, "num_initial_points": 3},
}
# As many epochs as the search makes, at least.
NUM_EPOCHS = 12
_RNG = np.random.default_rng(3)
X = _RNG.normal(size=(24, 4)).astype("float32")
Y = _RNG.normal(size=(24, 1)).astype("float32")


def build(kind: str, hp: Any) -> Any:
    """Returns a model of a trial; its seeds are the same in each trial, and process."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(6, activation="tanh")(inputs)
    hidden = keras.layers.Dropout(0.2, seed=1)(keras.layers.BatchNormalization()(hidden))
    outputs = keras.layers.Dense(1)(hidden)
    rate = hp.Float("rate", 1e-3, 1e-1, sampling="log")
    momentum = hp.Choice("momentum", [0.0, 0.5, 0.9])
    options = {"optimizer": keras.optimizers.SGD(rate, momentum=momentum), "loss": "mse"}
    if kind == "plain":
        model = keras.Model(inputs, outputs)
    else:
        model = TapeModel(inputs, outputs)
        made = [hooks.SkipNonFinite(), hooks.PercentileClipping(30, history=4)]
        options["gradient_hooks"] = made
    model.compile(**options)
    return model


class Progress(keras.callbacks.Callback):
    """Writes a line for each epoch, and gives time to be killed in."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        time.sleep(0.03)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{epoch}\n")


def search(folder: Path, kind: str, name: str) -> None:
    """Makes the search, or goes on with it."""
    given: Any = lambda hp: build(kind, hp)  # noqa: E731
    if kind != "plain":
        given = tuning.TapeHyperModel(given, reuse=kind == "reuse")
    tuner = getattr(keras_tuner, name)(
        given,
        keras_tuner.Objective("val_loss", "min"),
        seed=5,
        directory=folder,
        project_name="search",
        overwrite=False,
        **TUNERS[name],
    )
    progress = Progress(str(folder / "epochs.txt"))
    (folder / "begun").touch()
    options = {} if name == "Hyperband" else {"epochs": 2}
    tuner.search(
        X, Y, validation_data=(X, Y), batch_size=8, verbose=0, callbacks=[progress], **options
    )
    found = {
        trial.trial_id: {
            "status": trial.status,
            "message": trial.message,
            "values": trial.hyperparameters.values,
            "score": trial.score,
        }
        for trial in tuner.oracle.trials.values()
    }
    best = tuner.get_best_models()[0]
    found["best"] = {"score": float(best.evaluate(X, Y, batch_size=8, verbose=0))}
    unfinished = folder / ".result.json"
    unfinished.write_text(json.dumps(found, indent=1, sort_keys=True))
    os.replace(unfinished, folder / "result.json")


if __name__ == "__main__":
    search(Path(sys.argv[1]), *sys.argv[2:])
