"""One worker of `test_faults_workers.py`.

python -m tests.reference.worker '<json>'
"""

import json
import os
import pathlib
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

TASK = json.loads(sys.argv[1])
INDEX = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if "TF_CONFIG" in os.environ else 0
FOLDER = pathlib.Path(TASK["folder"]) / f"worker_{INDEX}"
FOLDER.mkdir(parents=True, exist_ok=True)
RNG = np.random.default_rng(17)
X = RNG.normal(size=(48, 4)).astype("float32")
Y = RNG.normal(size=(48, 2)).astype("float32")


class DieAtTheEnd(keras.callbacks.Callback):
    """Ends this worker at the end of the second epoch, before its own backup."""

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            os._exit(9)


class Saved(keras.callbacks.Callback):
    """Says that the backup of an epoch is written; stands behind it."""

    def on_epoch_end(self, epoch, logs=None):
        (FOLDER / f"saved_{epoch}").touch()


def main():
    keras.utils.set_random_seed(4)
    strategy = tf.distribute.get_strategy()
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        inputs = keras.Input((4,))
        model = TapeModel(inputs, layers.Dense(2)(layers.Dense(6, activation="tanh")(inputs)))
        optimizer = keras.optimizers.SGD(
            0.1, momentum=0.9, gradient_accumulation_steps=TASK.get("accumulation")
        )
        gate = [hooks.SkipNonFinite()] if TASK.get("gate") else []
        model.compile(optimizer, "mse", gradient_hooks=gate)
    callbacks = []
    if TASK.get("backup"):
        dies = TASK.get("dies") == INDEX
        backup = keras.callbacks.BackupAndRestore(FOLDER / "backup")
        callbacks = [*([DieAtTheEnd()] if dies else []), backup, Saved()]
    y = Y.copy()
    if TASK.get("gate"):
        y[14] = np.nan
    model.fit(X, y, batch_size=12, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
    arrays = {f"w{i}": w for i, w in enumerate(model.get_weights())}
    np.savez(FOLDER / "weights.npz", **arrays)


if __name__ == "__main__":
    main()
